//! Which pages this program itself wrote to.
//!
//! KVM sees the guest's writes, not ours. Every write through `vm-memory` marks its pages here.

use super::PAGE_SIZE;
use super::dirty::{Bits, DirtyPages};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// A bitmap over all RAM pages with two levels of summary, so that collecting costs in proportion to what is marked:
/// a bit of one level says that its word in the level below may hold bits.
///
/// Invariant: a page is marked *after* it was written, and collected *before* it is copied; so a write is either in the
/// copy or found by the next collection. Both sides use locked instructions, since a store and a later plain load of
/// the mark may pass each other.
///
/// Invariant: a collection that runs while others mark may leave a page for the next one; with the pause gate closed
/// nothing is left.
#[derive(Debug)]
pub struct DirtyMap {
    /// `levels[0]` has a bit for every page, `levels[n + 1]` a bit for every word of `levels[n]`.
    levels: [Box<[AtomicU64]>; 3],
    pages: u32,
}

fn zeroed(words: usize) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

impl DirtyMap {
    /// A clean map of `pages` pages.
    pub fn new(pages: u32) -> Self {
        let level0 = (pages as usize).div_ceil(64);
        let level1 = level0.div_ceil(64);
        Self {
            levels: [zeroed(level0), zeroed(level1), zeroed(level1.div_ceil(64))],
            pages,
        }
    }

    /// Marks a page; a page that does not exist is ignored.
    pub fn mark(&self, page: u32) {
        if page >= self.pages {
            return;
        }
        let mut index = page as usize;
        for level in &self.levels {
            let before = level[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
            if before != 0 {
                // Whoever made the word non-zero sets the summary, and a collector takes the summary first.
                return;
            }
            index /= 64;
        }
    }

    /// Marks the pages that `len` bytes at `offset` of RAM touch.
    pub fn mark_range(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let last = offset.saturating_add(len - 1) / PAGE_SIZE;
        for page in offset / PAGE_SIZE..=last.min(self.pages as usize) {
            self.mark(page as u32);
        }
    }

    /// Whether the page is marked.
    pub fn is_marked(&self, page: u32) -> bool {
        page < self.pages && self.levels[0][page as usize / 64].load(Ordering::SeqCst) & (1 << (page % 64)) != 0
    }

    /// Moves all marks into `into`.
    pub fn collect(&self, into: &mut DirtyPages) {
        for (top, word) in self.levels[2].iter().enumerate() {
            for middle in Bits(take(word)) {
                let middle = top * 64 + middle as usize;
                for bottom in Bits(take(&self.levels[1][middle])) {
                    let bottom = middle * 64 + bottom as usize;
                    into.insert_word(bottom as u32, take(&self.levels[0][bottom]));
                }
            }
        }
    }
}

/// Takes all bits; a word that is zero is only read.
fn take(word: &AtomicU64) -> u64 {
    if word.load(Ordering::SeqCst) == 0 {
        0
    } else {
        word.swap(0, Ordering::SeqCst)
    }
}

/// The part of the [`DirtyMap`] that belongs to one region of RAM.
#[derive(Debug, Clone)]
pub struct WriteTracker {
    map: Arc<DirtyMap>,
    /// Offset of the region in RAM, in bytes.
    base: usize,
}

impl WriteTracker {
    /// A tracker for the region at `base` bytes of RAM.
    pub fn new(map: Arc<DirtyMap>, base: usize) -> Self {
        Self { map, base }
    }
}

/// A [`WriteTracker`] borrowed by a slice of guest memory.
#[derive(Debug, Clone, Copy)]
pub struct TrackerSlice<'a> {
    map: &'a DirtyMap,
    base: usize,
}

impl<'a> WithBitmapSlice<'a> for WriteTracker {
    type S = TrackerSlice<'a>;
}

impl Bitmap for WriteTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.map.mark_range(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(offset).dirty_at(0)
    }

    fn slice_at(&self, offset: usize) -> TrackerSlice<'_> {
        TrackerSlice {
            map: &self.map,
            base: self.base.saturating_add(offset),
        }
    }
}

impl WithBitmapSlice<'_> for TrackerSlice<'_> {
    type S = Self;
}

impl BitmapSlice for TrackerSlice<'_> {}

impl Bitmap for TrackerSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.map.mark_range(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.map.is_marked(
            (self.base.saturating_add(offset) / PAGE_SIZE)
                .try_into()
                .unwrap_or(u32::MAX),
        )
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            map: self.map,
            base: self.base.saturating_add(offset),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_mark_every_page_they_touch() {
        let map = DirtyMap::new(1 << 20);
        map.mark_range(4095, 2);
        map.mark_range(0x1234 * PAGE_SIZE, 0);
        map.mark_range(((1 << 20) - 1) * PAGE_SIZE, 3 * PAGE_SIZE);
        map.mark_range(500_000 * PAGE_SIZE + 1, PAGE_SIZE);
        let mut pages = DirtyPages::new(1 << 20);
        map.collect(&mut pages);
        pages.sort();
        assert_eq!(
            pages.iter().collect::<Vec<_>>(),
            [0, 1, 500_000, 500_001, (1 << 20) - 1]
        );
        pages.clear();
        map.collect(&mut pages);
        assert!(pages.is_empty());
    }

    /// Several threads raise a counter per page and mark it; the collector copies the counters of what it collected.
    /// After the threads have ended and one more collection, every copy is current.
    #[test]
    fn no_write_is_lost_between_markers_and_collector() {
        const PAGES: u32 = 5000;
        let map = DirtyMap::new(PAGES);
        let counters: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let mut copies = vec![0; PAGES as usize];
        let mut dirty = DirtyPages::new(PAGES);
        let mut copy_marked = |dirty: &mut DirtyPages| {
            dirty.clear();
            map.collect(dirty);
            for page in dirty.iter() {
                copies[page as usize] = counters[page as usize].load(Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3u64)
                .map(|writer| {
                    let (map, counters) = (&map, &counters);
                    scope.spawn(move || {
                        let mut seed = writer;
                        for _ in 0..100_000 {
                            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                            let page = (seed >> 33) as u32 % PAGES;
                            counters[page as usize].fetch_add(1, Ordering::Relaxed);
                            map.mark(page);
                        }
                    })
                })
                .collect();
            while writers.iter().any(|writer| !writer.is_finished()) {
                copy_marked(&mut dirty);
            }
        });
        copy_marked(&mut dirty);
        for (page, counter) in counters.iter().enumerate() {
            assert_eq!(copies[page], counter.load(Ordering::Relaxed), "page {page}");
        }
    }
}
