//! The last sent versions of pages, as many as fit.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::replication::memory::{PAGE_SIZE, Page};

/// Pages in one allocation: the cache grows by these, nothing is moved.
const SEGMENT_PAGES: usize = 64;

/// Page numbers are dense and not chosen by an adversary within one VM's cache: one multiplication spreads them.
#[derive(Default)]
pub(super) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }
    fn write_u32(&mut self, page: u32) {
        self.0 = (u64::from(page) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

/// A page used in this generation or so many before it isn't evicted.
const LIFETIME_GENERATIONS: u32 = 1;
/// Slots looked at for one to evict before the new page is sent without being remembered.
const SEARCH_SLOTS: usize = 8;

/// Versions by page number. A generation is one call of the encoder. A page that was used in this generation or the
/// one before is not evicted for another: a guest that dirties more pages than fit in every epoch keeps hitting those
/// that are here, where evicting the oldest would never hit; and a scan over all memory costs nothing of what is in
/// use.
pub(super) struct PageCache {
    capacity: usize,
    slots_of: HashMap<u32, u32, BuildHasherDefault<PageHasher>>,
    segments: Vec<Box<[Page]>>,
    owners: Vec<Option<u32>>,
    used: Vec<u32>,
    generation: u32,
    free: Vec<u32>,
    hand: usize,
}

/// What a page costs beyond itself: map entry, owner, mark.
const OVERHEAD_BYTES: usize = 32;

impl PageCache {
    /// A cache that takes about `bytes` once it is full.
    pub fn new(bytes: usize) -> Self {
        Self {
            capacity: bytes / (PAGE_SIZE + OVERHEAD_BYTES),
            slots_of: HashMap::default(),
            segments: Vec::new(),
            owners: Vec::new(),
            used: Vec::new(),
            generation: 0,
            free: Vec::new(),
            hand: 0,
        }
    }

    /// Bytes taken now.
    pub fn bytes(&self) -> usize {
        self.segments.len() * SEGMENT_PAGES * PAGE_SIZE + self.owners.len() * OVERHEAD_BYTES
    }

    fn page(&self, slot: u32) -> &Page {
        &self.segments[slot as usize / SEGMENT_PAGES][slot as usize % SEGMENT_PAGES]
    }

    fn page_mut(&mut self, slot: u32) -> &mut Page {
        &mut self.segments[slot as usize / SEGMENT_PAGES][slot as usize % SEGMENT_PAGES]
    }

    /// The version of `page` that was sent last, if it is still here.
    pub fn find(&mut self, page: u32) -> Option<&Page> {
        let slot = *self.slots_of.get(&page)?;
        self.used[slot as usize] = self.generation;
        Some(self.page(slot))
    }

    /// Remembers what was sent.
    pub fn store(&mut self, page: u32, contents: &Page) {
        if let Some(&slot) = self.slots_of.get(&page) {
            *self.page_mut(slot) = *contents;
            return;
        }
        if self.capacity == 0 {
            return;
        }
        let Some(slot) = self.take_slot() else {
            return;
        };
        *self.page_mut(slot) = *contents;
        self.owners[slot as usize] = Some(page);
        self.used[slot as usize] = self.generation;
        self.slots_of.insert(page, slot);
    }

    /// Forgets one page.
    pub fn remove(&mut self, page: u32) {
        if let Some(slot) = self.slots_of.remove(&page) {
            self.owners[slot as usize] = None;
            self.free.push(slot);
        }
    }

    /// Forgets everything and gives the memory back.
    pub fn clear(&mut self) {
        self.slots_of = HashMap::default();
        self.segments = Vec::new();
        self.owners = Vec::new();
        self.used = Vec::new();
        self.free = Vec::new();
        self.hand = 0;
    }

    /// Begins another generation: the pages used before become older.
    pub fn advance(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    fn take_slot(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.owners.len() < self.capacity {
            let slot = self.owners.len();
            if slot == self.segments.len() * SEGMENT_PAGES {
                self.segments
                    .push(vec![[0; PAGE_SIZE]; SEGMENT_PAGES].into_boxed_slice());
            }
            self.owners.push(None);
            self.used.push(0);
            return Some(slot as u32);
        }
        for _ in 0..SEARCH_SLOTS.min(self.owners.len()) {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.owners.len();
            if self.generation.wrapping_sub(self.used[slot]) <= LIFETIME_GENERATIONS {
                continue;
            }
            if let Some(evicted) = self.owners[slot].take() {
                self.slots_of.remove(&evicted);
            }
            return Some(slot as u32);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::testing::Seeded;

    fn contents(of: u32, version: u8) -> Page {
        let mut page = [version; PAGE_SIZE];
        page[..4].copy_from_slice(&of.to_le_bytes());
        page
    }

    #[test]
    fn never_tells_another_pages_or_an_older_version() {
        let mut cache = PageCache::new(100 * (PAGE_SIZE + OVERHEAD_BYTES));
        let mut versions = [0u8; 300];
        let mut seeded = Seeded::new(4);
        let mut hits = 0;
        for step in 0..20_000 {
            if step % 50 == 0 {
                cache.advance();
            }
            let page = seeded.below(300) as u32;
            let version = &mut versions[page as usize];
            if let Some(found) = cache.find(page) {
                hits += 1;
                assert_eq!(*found, contents(page, *version));
            }
            if seeded.below(20) == 0 {
                cache.remove(page);
                assert!(cache.find(page).is_none());
            } else {
                *version = version.wrapping_add(1);
                cache.store(page, &contents(page, *version));
            }
            assert!(cache.slots_of.len() <= 100);
        }
        assert!(
            (5_000..9_000).contains(&hits),
            "a third of the pages fit, so about a third of the look-ups hit: {hits}"
        );
        assert!(cache.bytes() <= 128 * (PAGE_SIZE + OVERHEAD_BYTES));
    }

    #[test]
    fn a_scan_does_not_evict_what_is_used() {
        let mut cache = PageCache::new(64 * (PAGE_SIZE + OVERHEAD_BYTES));
        for round in 0..50u32 {
            cache.advance();
            for hot in 0..32 {
                let found = cache.find(hot).is_some();
                assert!(found || round == 0, "page {hot} was evicted before round {round}");
                cache.store(hot, &contents(hot, 0));
            }
            (0..16).for_each(|cold| cache.store(1000 + round * 16 + cold, &contents(cold, 0)));
        }
        assert!(cache.find(1000).is_none(), "what is not used makes room");
    }

    #[test]
    fn a_set_larger_than_the_cache_hits_as_much_as_fits() {
        let mut cache = PageCache::new(64 * (PAGE_SIZE + OVERHEAD_BYTES));
        for round in 0..10u32 {
            cache.advance();
            let hits = (0..128).filter(|&page| {
                let hit = cache.find(page).is_some();
                cache.store(page, &contents(page, round as u8));
                hit
            });
            assert_eq!(hits.count(), if round == 0 { 0 } else { 64 });
        }
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let mut cache = PageCache::new(PAGE_SIZE);
        cache.store(1, &[1; PAGE_SIZE]);
        assert!(cache.find(1).is_none());
        assert_eq!(cache.bytes(), 0);
    }
}
