use std::sync::{Arc, Mutex};

use super::super::{
    Compression, CopiedPages, EncodeError, EncoderConfig, LivePages, PageEncoder, PageStats, SinkClosed,
};
use super::*;
use crate::replication::memory::HeapMemory;
use crate::replication::testing::Seeded;

fn encode(encoder: &mut PageEncoder, source: CopiedPages) -> (Vec<Vec<u8>>, PageStats) {
    let chunks = Arc::new(Mutex::new(Vec::new()));
    let taken = chunks.clone();
    let sink = move |payload| {
        taken.lock().expect("no panic").push(payload);
        Ok(())
    };
    let stats = encoder.encode(Arc::new(source), Arc::new(sink)).expect("encoded");
    let chunks = std::mem::take(&mut *chunks.lock().expect("no panic"));
    (chunks, stats)
}

fn equal(a: &HeapMemory, b: &HeapMemory) -> Option<u32> {
    let (mut x, mut y) = (ZERO_PAGE, ZERO_PAGE);
    (0..a.page_count()).find(|&page| {
        a.read_page(page, &mut x);
        b.read_page(page, &mut y);
        x != y
    })
}

/// One page's next contents: every pattern that has a representation of its own.
fn change(seeded: &mut Seeded, page: &mut Page) {
    match seeded.below(7) {
        0 => *page = ZERO_PAGE,
        1 => *page = seeded.page(),
        2 => page.fill(seeded.next() as u8),
        3 => page
            .chunks_exact_mut(8)
            .for_each(|word| word[0] = word[0].wrapping_add(1)),
        4 => {}
        _ => {
            for _ in 0..=seeded.below(20) {
                page[seeded.below(PAGE_SIZE as u64) as usize] = seeded.next() as u8;
            }
        }
    }
}

#[test]
fn memory_follows_through_many_epochs_evictions_and_resets() {
    for (seed, workers, cache_pages, compression) in [
        (1, 1, 1000, Compression::Lz4),
        (2, 3, 100, Compression::Lz4),
        (3, 2, 7, Compression::Off),
        (4, 4, 0, Compression::Lz4),
    ] {
        let mut seeded = Seeded::new(seed);
        let (active, standby) = (HeapMemory::new(700), HeapMemory::new(700));
        let config = EncoderConfig {
            workers,
            cache_bytes: cache_pages * 5000,
            compression,
        };
        let mut encoder = PageEncoder::new(config).expect("threads");
        let mut all = PageStats::default();
        for epoch in 0..60 {
            let mut dirty = CopiedPages::default();
            // Small sets are encoded by the caller, large ones by the pool; in any order of pages.
            let count = if epoch % 3 == 0 { 400 } else { 30 };
            let first = seeded.below(700) as u32;
            for number in (0..count).map(|n| (first + n) % 700) {
                let mut page = ZERO_PAGE;
                active.read_page(number, &mut page);
                change(&mut seeded, &mut page);
                active.write_page(number, &page);
                dirty.copy_from(&active, number);
            }
            let (chunks, stats) = encode(&mut encoder, dirty);
            all.add(&stats);
            for chunk in chunks {
                PageChunk::check(chunk, 700).expect("own chunk").apply(&standby);
            }
            assert_eq!(equal(&active, &standby), None, "seed {seed}, epoch {epoch}");
            if seeded.below(10) == 0 {
                encoder.reset();
            }
        }
        let sent = all.zero + all.runs + all.compressed + all.compressed_xor + all.raw;
        assert_eq!(all.pages, sent + all.unchanged);
        assert!(all.zero > 0 && all.raw > 0, "{all:?}");
        assert!(all.runs == 0 || cache_pages > 0, "{all:?}");
        assert!(all.runs > 0 || cache_pages < 100, "{all:?}");
        assert_eq!(all.compressed > 0, compression == Compression::Lz4, "{all:?}");
        assert!(encoder.cache_bytes() <= cache_pages * 5000 + workers * 64 * PAGE_SIZE);
    }
}

#[test]
fn a_page_that_changes_while_it_is_copied_is_mended_by_the_next_pass() {
    let (active, standby) = (Arc::new(HeapMemory::new(256)), HeapMemory::new(256));
    let mut encoder = PageEncoder::new(EncoderConfig {
        workers: 2,
        ..EncoderConfig::default()
    })
    .expect("threads");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let send = |encoder: &mut PageEncoder| {
        let chunks = Arc::new(Mutex::new(Vec::new()));
        let taken = chunks.clone();
        let source = LivePages::new(active.clone(), (0..256).collect());
        let sink = move |payload| {
            taken.lock().expect("no panic").push(payload);
            Ok(())
        };
        encoder.encode(Arc::new(source), Arc::new(sink)).expect("encoded");
        for chunk in chunks.lock().expect("no panic").drain(..) {
            PageChunk::check(chunk, 256).expect("own chunk").apply(&standby);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seeded = Seeded::new(5);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                active.write_in_page(
                    seeded.below(256) as u32,
                    8 * seeded.below(512) as usize,
                    &seeded.next().to_le_bytes(),
                );
            }
        });
        (0..10).for_each(|_| send(&mut encoder));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    send(&mut encoder);
    assert_eq!(equal(&active, &standby), None);
}

#[test]
fn a_closed_sink_ends_the_call_and_empties_the_cache() {
    let mut encoder = PageEncoder::new(EncoderConfig {
        workers: 2,
        ..EncoderConfig::default()
    })
    .expect("threads");
    let mut seeded = Seeded::new(6);
    let mut pages = CopiedPages::default();
    (0..500).for_each(|page| pages.push(page, &seeded.page()));
    let refused = encoder.encode(Arc::new(pages), Arc::new(|_| Err(SinkClosed)));
    assert!(matches!(refused, Err(EncodeError::Closed(SinkClosed))), "{refused:?}");
    assert_eq!(encoder.cache_bytes(), 0);
}

/// A chunk with all kinds of records, for pages below 100.
fn sample(seeded: &mut Seeded) -> Vec<u8> {
    let mut encoder = PageEncoder::new(EncoderConfig {
        workers: 1,
        ..EncoderConfig::default()
    })
    .expect("threads");
    let mut first = CopiedPages::default();
    (0..10).for_each(|page| first.push(page, &seeded.page()));
    encode(&mut encoder, first);
    let mut second = CopiedPages::default();
    second.push(1, &seeded.page());
    second.push(2, &[3; PAGE_SIZE]);
    (3..6).for_each(|page| second.push(page, &ZERO_PAGE));
    second.push(50, &[1; PAGE_SIZE]);
    let (mut chunks, _) = encode(&mut encoder, second);
    assert_eq!(chunks.len(), 1);
    chunks.remove(0)
}

#[test]
fn a_chunk_cut_anywhere_is_refused() {
    let chunk = sample(&mut Seeded::new(7));
    assert!(PageChunk::check(chunk.clone(), 100).is_ok());
    for len in 0..chunk.len() {
        assert!(PageChunk::check(chunk[..len].to_vec(), 100).is_err(), "cut at {len}");
    }
    let longer = [chunk, vec![0]].concat();
    assert!(matches!(
        PageChunk::check(longer, 100),
        Err(PagesError::Length { rest: 1, .. })
    ));
}

#[test]
fn damaged_chunks_are_refused_or_applied_inside_the_guest() {
    let mut seeded = Seeded::new(8);
    let chunk = sample(&mut seeded);
    let memory = HeapMemory::new(100);
    let (mut refused, mut accepted) = (0, 0);
    for _ in 0..4000 {
        let mut damaged = chunk.clone();
        for _ in 0..=seeded.below(3) {
            // Mostly where the structure is, which is short.
            let below = if seeded.below(2) == 0 { 40 } else { damaged.len() as u64 };
            damaged[seeded.below(below) as usize] ^= 1 << seeded.below(8);
        }
        match PageChunk::check(damaged, 100) {
            Ok(checked) => {
                accepted += 1;
                checked.apply(&memory);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(
        refused > 500 && accepted > 500,
        "{refused} refused, {accepted} accepted"
    );
}

#[test]
fn each_fault_has_its_error() {
    let record = |kind: u8, page: u32, len: u16, data: &[u8]| {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&page.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(data);
        bytes
    };
    let chunk = |records: &[Vec<u8>]| {
        let mut bytes = vec![0, 0, 0, 0];
        bytes.extend_from_slice(&(records.len() as u32).to_le_bytes());
        bytes.extend(records.concat());
        PageChunk::check(bytes, 100)
    };
    let zero = |page, count| record(0, page, count, &[]);
    assert!(chunk(&[zero(0, 100)]).is_ok());
    assert_eq!(
        chunk(&[zero(1, 100)]).err(),
        Some(PagesError::OutOfRange {
            page: 1,
            last: 100,
            page_count: 100
        })
    );
    assert_eq!(
        chunk(&[zero(u32::MAX, u16::MAX)])
            .err()
            .map(|error| error.to_string().contains("4295032829")),
        Some(true)
    );
    assert_eq!(
        chunk(&[zero(5, 2), zero(6, 1)]).err(),
        Some(PagesError::Order { page: 6, reached: 7 })
    );
    assert_eq!(
        chunk(&[zero(5, 1), zero(5, 1)]).err(),
        Some(PagesError::Order { page: 5, reached: 6 })
    );
    assert_eq!(chunk(&[zero(5, 0)]).err(), Some(PagesError::Data { page: 5 }));
    assert_eq!(
        chunk(&[record(9, 5, 1, &[0])]).err(),
        Some(PagesError::Kind { page: 5, kind: 9 })
    );
    assert_eq!(
        chunk(&[record(1, 5, 1, &[0])]).err(),
        Some(PagesError::Data { page: 5 }),
        "short raw page"
    );
    assert_eq!(
        chunk(&[record(2, 5, 0, &[])]).err(),
        Some(PagesError::Data { page: 5 }),
        "no runs"
    );
    let short = lz4_flex::block::compress(&[0; PAGE_SIZE - 1]);
    assert_eq!(
        chunk(&[record(3, 5, short.len() as u16, &short)]).err(),
        Some(PagesError::Data { page: 5 }),
        "short when decompressed"
    );
    let bomb = lz4_flex::block::compress(&[0; 1 << 20]);
    assert_eq!(
        chunk(&[record(4, 5, bomb.len() as u16, &bomb)]).err(),
        Some(PagesError::Data { page: 5 }),
        "a bomb"
    );
    assert_eq!(
        PageChunk::check(vec![0; CHUNK_MAX_BYTES + 1], 100).err(),
        Some(PagesError::Size(CHUNK_MAX_BYTES + 1))
    );
}
