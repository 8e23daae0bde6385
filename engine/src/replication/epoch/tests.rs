use std::sync::{Arc, Mutex};

use ftvm_protocol::wire::Kind;

use super::*;
use crate::replication::memory::{HeapMemory, PageMemory, ZERO_PAGE};
use crate::replication::pages::{CopiedPages, EncoderConfig, LivePages, PageEncoder, SinkClosed};
use crate::replication::testing::Seeded;

const PAGES: u32 = 300;
const DISKS: [u64; 2] = [1 << 20, 4096];

type Frames = Vec<(Kind, u64, Vec<u8>)>;

/// Keeps frames; refuses from a number on.
#[derive(Default)]
struct Taken {
    frames: Mutex<Frames>,
    refuse_after: Option<usize>,
}

impl Taken {
    fn drain(&self) -> Frames {
        std::mem::take(&mut *self.frames.lock().expect("no panic"))
    }
}

impl FrameSink for Taken {
    fn frame(&self, kind: Kind, epoch: u64, payload: Vec<u8>) -> Result<(), SinkClosed> {
        assert!(
            payload.len() <= kind.max_len() as usize,
            "{kind:?} payload of {} bytes",
            payload.len()
        );
        let mut frames = self.frames.lock().expect("no panic");
        if self.refuse_after.is_some_and(|after| frames.len() >= after) {
            return Err(SinkClosed);
        }
        frames.push((kind, epoch, payload));
        Ok(())
    }

    fn bulk_frames(&self) -> u64 {
        3
    }

    fn wait_bulk_sent(&self) -> Result<(), SinkClosed> {
        Ok(())
    }
}

fn limits() -> StagingLimits {
    StagingLimits {
        page_count: PAGES,
        disk_bytes: DISKS.to_vec(),
        nics: 2,
        max_epoch_bytes: 8 << 20,
    }
}

fn sender(sink: &Arc<Taken>) -> EpochSender {
    let encoder = PageEncoder::new(EncoderConfig {
        workers: 2,
        cache_bytes: 1 << 20,
        ..EncoderConfig::default()
    });
    EpochSender::new(sink.clone(), encoder.expect("threads"))
}

fn receiver() -> EpochReceiver {
    let mut receiver = EpochReceiver::new(limits(), None);
    (0..3).for_each(|_| receiver.bulk_frame());
    receiver
}

fn accept_all(receiver: &mut EpochReceiver, frames: Frames) -> Result<Option<StagedEpoch>, EpochError> {
    let mut staged = None;
    for (kind, epoch, payload) in frames {
        staged = receiver.accept(kind, epoch, payload)?;
    }
    Ok(staged)
}

fn sealed(seeded: &mut Seeded, epoch: u64, base: Option<u64>) -> SealedEpoch {
    let mut pages = CopiedPages::default();
    for _ in 0..seeded.below(120) {
        pages.push(seeded.below(PAGES.into()) as u32, &seeded.page());
    }
    let sectors = 1 + seeded.below(700) as usize;
    let write = seeded.bytes(512 * sectors);
    SealedEpoch {
        epoch,
        base,
        released_through: epoch.saturating_sub(2),
        pages: Arc::new(pages),
        state: {
            let len = seeded.below(600_000) as usize;
            seeded.bytes(len)
        },
        disk: vec![DiskChange::written(0, 1024, &write), DiskChange::zeroed(1, 512, 1024)],
        outputs: vec![
            PortData {
                port: Port::Nic(1),
                bytes: seeded.bytes(1500),
            },
            PortData {
                port: Port::Console,
                bytes: seeded.bytes(10),
            },
            PortData {
                port: Port::Nic(0),
                bytes: seeded.bytes(60),
            },
        ],
        contains_flush: epoch.is_multiple_of(2),
    }
}

/// Contents of disk `disk` after `changes`.
fn disk_after(changes: &[DiskChange], disk: u16) -> Vec<u8> {
    let mut bytes = vec![0xEE; DISKS[disk as usize] as usize];
    for change in changes.iter().filter(|change| change.disk == disk) {
        let range = change.offset as usize..change.end() as usize;
        match &change.what {
            DiskData::Written(data) => bytes[range].copy_from_slice(data),
            DiskData::Zeroed(_) => bytes[range].fill(0),
        }
    }
    bytes
}

#[test]
fn epochs_arrive_as_they_were_sealed() {
    let (sink, mut seeded) = (Arc::new(Taken::default()), Seeded::new(1));
    let (mut sender, mut receiver) = (sender(&sink), receiver());
    let (active, standby) = (HeapMemory::new(PAGES), HeapMemory::new(PAGES));
    let mut base = None;
    for epoch in [5, 6, 9, 10, 11, 12] {
        let sealed = sealed(&mut seeded, epoch, base);
        for index in 0..sealed.pages.numbers().len() {
            let mut scratch = ZERO_PAGE;
            let page = crate::replication::pages::PageSource::contents(&*sealed.pages, index, &mut scratch);
            active.write_page(sealed.pages.numbers()[index], page);
        }
        let stats = sender.finish(&sealed).expect("sent");
        let frames = sink.drain();
        assert_eq!(stats.frames, frames.len() as u64);
        let staged = accept_all(&mut receiver, frames).expect("accepted").expect("complete");
        assert_eq!(
            (staged.epoch, staged.base, staged.released_through),
            (epoch, base, epoch - 2)
        );
        assert_eq!(staged.state, sealed.state);
        assert_eq!(staged.outputs, sealed.outputs);
        assert_eq!(staged.contains_flush, sealed.contains_flush);
        (0..2).for_each(|disk| assert_eq!(disk_after(&staged.disk, disk), disk_after(&sealed.disk, disk)));
        staged.apply_pages(&standby);
        base = Some(epoch);
        let (mut x, mut y) = (ZERO_PAGE, ZERO_PAGE);
        for page in 0..PAGES {
            active.read_page(page, &mut x);
            standby.read_page(page, &mut y);
            assert_eq!(x, y, "page {page} after epoch {epoch}");
        }
    }
    assert_eq!(receiver.last(), Some(12));
}

#[test]
fn pages_sent_before_the_end_are_overtaken_by_later_ones() {
    let sink = Arc::new(Taken::default());
    let (mut sender, mut receiver) = (sender(&sink), receiver());
    let active = Arc::new(HeapMemory::new(PAGES));
    let standby = HeapMemory::new(PAGES);
    let mut base = None;
    for epoch in 1..20u64 {
        sender.begin(epoch, base, 0).expect("begun");
        (0..200).for_each(|page| active.write_in_page(page, 8 * epoch as usize, &epoch.to_le_bytes()));
        sender
            .pages(Arc::new(LivePages::new(active.clone(), (0..200).collect())))
            .expect("sent");
        active.write_in_page(7, 0, &epoch.to_le_bytes());
        let mut pages = CopiedPages::default();
        pages.copy_from(&*active, 7);
        let stats = sender
            .finish(&SealedEpoch {
                epoch,
                base,
                pages: Arc::new(pages),
                ..SealedEpoch::default()
            })
            .expect("sent");
        assert_eq!(stats.pages.pages, 201);
        let staged = accept_all(&mut receiver, sink.drain())
            .expect("accepted")
            .expect("complete");
        assert_eq!(staged.pages(), 201);
        staged.apply_pages(&standby);
        let (mut x, mut y) = (ZERO_PAGE, ZERO_PAGE);
        active.read_page(7, &mut x);
        standby.read_page(7, &mut y);
        assert_eq!(x, y);
        base = Some(epoch);
    }
}

fn one_epoch() -> Frames {
    let sink = Arc::new(Taken::default());
    sender(&sink)
        .finish(&sealed(&mut Seeded::new(2), 1, None))
        .expect("sent");
    sink.drain()
}

#[test]
fn a_frame_lost_doubled_or_exchanged_is_noticed() {
    let frames = one_epoch();
    assert!(accept_all(&mut receiver(), frames.clone()).expect("accepted").is_some());
    for lost in 0..frames.len() {
        let mut without = frames.clone();
        without.remove(lost);
        match accept_all(&mut receiver(), without) {
            Ok(None) => assert_eq!(lost, frames.len() - 1, "only the missing end leaves the epoch open"),
            Ok(Some(_)) => panic!("complete without frame {lost}"),
            Err(error) => assert!(
                matches!(error, EpochError::Sequence { .. } | EpochError::Unexpected { .. }),
                "{error}"
            ),
        }
        let mut doubled = frames.clone();
        doubled.insert(lost, frames[lost].clone());
        assert!(accept_all(&mut receiver(), doubled).is_err(), "frame {lost} twice");
        if lost > 0 {
            let mut exchanged = frames.clone();
            exchanged.swap(lost, lost - 1);
            assert!(
                accept_all(&mut receiver(), exchanged).is_err(),
                "frames {lost} and the one before exchanged"
            );
        }
    }
}

#[test]
fn after_an_error_the_epoch_is_gone() {
    let frames = one_epoch();
    let mut receiver = receiver();
    receiver.accept(frames[0].0, 1, frames[0].2.clone()).expect("begin");
    assert!(receiver.accept(Kind::EpochState, 1, vec![9, 0, 0, 0]).is_err());
    let next = receiver.accept(frames[1].0, 1, frames[1].2.clone());
    assert!(
        matches!(next, Err(EpochError::Unexpected { expected: None, .. })),
        "{next:?}"
    );
    assert_eq!(receiver.last(), None);
}

#[test]
fn damage_anywhere_is_noticed() {
    let frames = one_epoch();
    let mut seeded = Seeded::new(3);
    for _ in 0..300 {
        let mut damaged = frames.clone();
        let frame = seeded.below(frames.len() as u64) as usize;
        let payload = &mut damaged[frame].2;
        let at = if seeded.below(2) == 0 {
            seeded.below(payload.len().min(40) as u64)
        } else {
            seeded.below(payload.len() as u64)
        };
        payload[at as usize] ^= 1 << seeded.below(8);
        let result = accept_all(&mut receiver(), damaged);
        // Only what the link's own checksum would have caught, in the two numbers that nothing repeats, may pass.
        if let Ok(Some(staged)) = result {
            assert!(
                frame == frames.len() - 1 && staged.contains_flush || staged.epoch == 1 && frame == 0,
                "frame {frame}, byte {at}"
            );
        }
    }
}

#[test]
fn old_and_foreign_epochs_are_refused() {
    let frames = one_epoch();
    let mut receiver = receiver();
    accept_all(&mut receiver, frames.clone()).expect("accepted");
    let replayed = accept_all(&mut receiver, frames);
    assert!(
        matches!(replayed, Err(EpochError::Replayed { epoch: 1, last: 1 })),
        "{replayed:?}"
    );

    let sink = Arc::new(Taken::default());
    let mut sender = sender(&sink);
    for (epoch, base) in [(3, Some(2)), (3, None)] {
        sender
            .finish(&SealedEpoch {
                epoch,
                base,
                ..SealedEpoch::default()
            })
            .expect("sent");
        let foreign = accept_all(&mut receiver, sink.drain());
        assert!(
            matches!(
                foreign,
                Err(EpochError::Base {
                    epoch: 3,
                    last: Some(1),
                    ..
                })
            ),
            "{foreign:?}"
        );
    }
    sender
        .finish(&SealedEpoch {
            epoch: 3,
            base: Some(1),
            ..SealedEpoch::default()
        })
        .expect("sent");
    assert!(
        accept_all(&mut receiver, sink.drain()).expect("accepted").is_some(),
        "numbers may be left out, bases not"
    );
}

#[test]
fn an_epoch_that_overtakes_its_resync_is_refused() {
    let result = accept_all(&mut EpochReceiver::new(limits(), None), one_epoch());
    assert!(
        matches!(
            result,
            Err(EpochError::Fence {
                announced: 3,
                received: 0,
                ..
            })
        ),
        "{result:?}"
    );
}

#[test]
fn epochs_beyond_the_cap_are_refused_before_they_are_whole() {
    let limits = StagingLimits {
        max_epoch_bytes: 100_000,
        ..limits()
    };
    let mut receiver = EpochReceiver::new(limits, Some(0));
    let sink = Arc::new(Taken::default());
    let state = vec![1; 120_000];
    sender(&sink)
        .finish(&SealedEpoch {
            epoch: 1,
            base: Some(0),
            state,
            ..SealedEpoch::default()
        })
        .expect("sent");
    let result = accept_all(&mut receiver, sink.drain());
    assert!(
        matches!(result, Err(EpochError::TooLarge { epoch: 1, max: 100_000 })),
        "{result:?}"
    );
}

#[test]
fn disk_changes_outside_the_disk_are_refused() {
    for (what, change) in [
        ("beyond the end", DiskChange::written(1, 3584, &[0; 1024])),
        ("wraps", DiskChange::zeroed(0, u64::MAX - 511, 1024)),
        ("half a sector", DiskChange::written(0, 0, &[0; 100])),
        ("between sectors", DiskChange::zeroed(0, 100, 512)),
        ("nothing", DiskChange::zeroed(0, 0, 0)),
        ("no such disk", DiskChange::zeroed(2, 0, 512)),
    ] {
        let sink = Arc::new(Taken::default());
        sender(&sink)
            .finish(&SealedEpoch {
                epoch: 1,
                disk: vec![change],
                ..SealedEpoch::default()
            })
            .expect("sent");
        let result = accept_all(&mut receiver(), sink.drain());
        assert!(matches!(result, Err(EpochError::Payload { .. })), "{what}: {result:?}");
    }
}

#[test]
fn a_closed_link_ends_the_epoch_and_the_next_starts_from_nothing() {
    let sink = Arc::new(Taken {
        refuse_after: Some(2),
        ..Taken::default()
    });
    let mut sender = sender(&sink);
    let sealed = sealed(&mut Seeded::new(4), 1, None);
    assert!(matches!(
        sender.finish(&sealed),
        Err(SendError::Encode(_) | SendError::Closed(_))
    ));
    assert_eq!(sender.encoder().cache_bytes(), 0);
    assert!(matches!(sender.pages(sealed.pages.clone()), Err(SendError::Encode(_))));
}

#[test]
fn input_travels_exactly_and_hostile_input_is_refused() {
    let mut seeded = Seeded::new(5);
    let items: Vec<_> = (0..400u16)
        .map(|n| PortData {
            port: if n % 7 == 0 { Port::Console } else { Port::Nic(n % 2) },
            bytes: seeded.bytes(1 + n as usize * 9),
        })
        .collect();
    let payloads = encode_input(&items);
    assert!(payloads.len() > 1);
    let mut decoded = Vec::new();
    for payload in &payloads {
        assert!(payload.len() <= Kind::Input.max_len() as usize);
        decoded.extend(decode_input(payload, 2).expect("decodes"));
    }
    assert_eq!(decoded, items);
    assert!(matches!(
        decode_input(&payloads[0], 1),
        Err(PayloadError::NoPort { number: 1, .. })
    ));
    for len in 1..200 {
        let cut = decode_input(&payloads[0][..len], 2);
        assert!(
            cut.is_err() || cut.is_ok_and(|items| encode_input(&items).concat().len() == len),
            "cut at {len}"
        );
    }
    let huge = [vec![0, 0, 0], u32::MAX.to_le_bytes().to_vec()].concat();
    assert_eq!(decode_input(&huge, 2), Err(PayloadError::PortSize(u32::MAX as usize)));
    assert_eq!(decode_input(&[0, 0, 0, 0, 0, 0, 0], 2), Err(PayloadError::PortSize(0)));
}
