//! RAM beyond the image: the page tables that boot.s did not make, and the pages that the churn works on.

use crate::start_info::Range;
use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a page, and words of eight bytes in it.
pub const PAGE_BYTES: u64 = 4096;
/// Words of eight bytes in a page.
pub const PAGE_WORDS: usize = (PAGE_BYTES / 8) as usize;

const MAX_SEGMENTS: usize = 8;
const GIB: u64 = 1 << 30;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// One page directory pointer table reaches as far as this.
const MAX_ADDRESS: u64 = 512 * GIB;
const PRESENT_WRITABLE_USER: u64 = 7;
const LARGE: u64 = 0x80;

// SAFETY: guest.ld defines the image's ends, of which only addresses are taken; boot.s defines the page directory pointer table,
// 512 aligned entries that the processors read as well.
unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    static pdpt: [AtomicU64; 512];
}

/// RAM that nothing else uses, as a row of pages numbered from 0.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    segments: [Range; MAX_SEGMENTS],
    pages: u64,
}

impl Region {
    /// Takes all RAM behind the image, and maps what lies above 4 GiB.
    pub fn take(ram: &[Range]) -> Self {
        let mut region = Self {
            segments: [Range::default(); MAX_SEGMENTS],
            pages: 0,
        };
        let (first, last) = (&raw const image_start as u64, &raw const image_end as u64);
        assert!(
            ram.iter().any(|range| range.start <= first && range.end >= last),
            "too little RAM: the image ends at {last:#x}"
        );
        let free = ram.iter().filter_map(|range| {
            let start = range.start.max(last).next_multiple_of(PAGE_BYTES);
            let end = range.end.min(MAX_ADDRESS) / PAGE_BYTES * PAGE_BYTES;
            (start < end).then_some(Range { start, end })
        });
        let mut segments = 0;
        for range in free.take(MAX_SEGMENTS) {
            region.segments[segments] = range;
            segments += 1;
        }
        for index in 0..segments {
            region.map_high(region.segments[index]);
        }
        region.pages = region
            .segments
            .iter()
            .map(|range| (range.end - range.start) / PAGE_BYTES)
            .sum();
        region
    }

    /// Pages in all.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The end of the highest range, so many bytes of it in a row: the number of their first page, and where it is. None if the range
    /// is not that large.
    pub fn tail(&self, bytes: u64) -> Option<(u64, *mut u8)> {
        let highest = self.segments.iter().rfind(|range| range.start < range.end)?;
        let start = highest.end.checked_sub(bytes)?;
        (start >= highest.start).then_some((self.pages - bytes / PAGE_BYTES, start as *mut u8))
    }

    /// The address of page `index`.
    pub fn page(&self, index: u64) -> *mut [AtomicU64; PAGE_WORDS] {
        let mut offset = index * PAGE_BYTES;
        for range in &self.segments {
            let size = range.end - range.start;
            if offset < size {
                return (range.start + offset) as *mut _;
            }
            offset -= size;
        }
        panic!("page {index} is beyond the region's {}", self.pages);
    }

    /// Maps the range's part above 4 GiB, one to one. The tables come out of the region's own low memory.
    fn map_high(&mut self, range: Range) {
        let mut gib = (range.start / GIB).max(4);
        while gib * GIB < range.end {
            // SAFETY: the table of boot.s, written by this vCPU before any other runs.
            let entry = unsafe { &pdpt[gib as usize] };
            if entry.load(Ordering::Relaxed) == 0 {
                let table = self.segments[0].start;
                assert!(
                    table + PAGE_BYTES <= self.segments[0].end.min(4 * GIB),
                    "no low RAM left for page tables"
                );
                self.segments[0].start += PAGE_BYTES;
                for index in 0..512 {
                    // SAFETY: the page is RAM that nothing else uses, taken out of the region just now, and mapped.
                    unsafe {
                        ((table + index * 8) as *mut u64)
                            .write((gib * GIB + index * LARGE_PAGE_BYTES) | PRESENT_WRITABLE_USER | LARGE);
                    }
                }
                // From absent to present: no TLB entry can be stale.
                entry.store(table | PRESENT_WRITABLE_USER, Ordering::Release);
            }
            gib += 1;
        }
    }
}
