//! Digests of memory and disks, to compare both sides at one epoch. They find differences, not forgers: XXH3 is no
//! cryptographic hash.
//!
//! Every piece is hashed with its number, and the hashes are added up: so the pieces can be taken in any order, and one of
//! them anew.

use std::collections::HashSet;
use std::fmt;
use std::io;

use twox_hash::XxHash3_128;

use crate::replication::memory::{Page, PageMemory, ZERO_PAGE};
use crate::replication::storage::Storage;

/// Disks are hashed in blocks of this size.
const BLOCK_BYTES: u64 = 1 << 20;

/// So much of memory is taken between two jobs of a thread that has others: 256 KiB, some 50 µs.
pub const DIGEST_PIECE_PAGES: u32 = 64;

/// 128 bits over contents and places.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Digest(pub u128);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Digest {
    fn add(&mut self, number: u64, contents: &[u8]) {
        self.0 = self.0.wrapping_add(placed_hash(number, contents));
    }
}

fn placed_hash(number: u64, contents: &[u8]) -> u128 {
    let mut placed = [0; 24];
    placed[..16].copy_from_slice(&XxHash3_128::oneshot(contents).to_le_bytes());
    placed[16..].copy_from_slice(&number.to_le_bytes());
    XxHash3_128::oneshot(&placed)
}

/// The digest of memory that changes, kept up to date page by page: a leader takes it piece by piece while its guest runs, then
/// again of every page that is sent, and has it at the end of an epoch without making anybody wait. 16 bytes for each page.
#[derive(Debug)]
pub struct PageDigests {
    hashes: Vec<u128>,
    total: Digest,
    /// The first page that was not read yet.
    next: u32,
}

impl PageDigests {
    /// Of memory of so many pages, none of which was read yet.
    pub fn new(page_count: u32) -> Self {
        Self {
            hashes: vec![0; page_count as usize],
            total: Digest::default(),
            next: 0,
        }
    }

    /// Whether every page was read once.
    pub fn is_whole(&self) -> bool {
        self.next as usize >= self.hashes.len()
    }

    /// Reads up to `pages` more, as they are now.
    pub fn advance(&mut self, memory: &dyn PageMemory, pages: u32) {
        let end = self.next.saturating_add(pages).min(self.hashes.len() as u32);
        (self.next..end).for_each(|page| self.reread(memory, page));
        self.next = end;
    }

    /// Page `number` has these contents now. (Pages that the memory doesn't have are none of its digest.)
    pub fn set(&mut self, number: u32, contents: &Page) {
        let Some(hash) = self.hashes.get_mut(number as usize) else {
            return;
        };
        let new = placed_hash(number.into(), contents);
        self.total.0 = self.total.0.wrapping_sub(*hash).wrapping_add(new);
        *hash = new;
    }

    /// Page `number` may have changed.
    pub fn reread(&mut self, memory: &dyn PageMemory, number: u32) {
        let mut page = ZERO_PAGE;
        memory.read_page(number, &mut page);
        self.set(number, &page);
    }

    /// Of all pages as they were set last.
    pub fn digest(&self) -> Digest {
        self.total
    }
}

/// The digest of memory as it is when this is made, taken piece by piece: whoever changes a page until it is whole says so first
/// ([`Self::keep`]). So a follower goes on meanwhile.
#[derive(Debug, Default)]
pub struct StillDigest {
    /// The first page that was not come to yet.
    next: u32,
    /// Pages from there on that were taken because they were about to change.
    kept: HashSet<u32>,
    total: Digest,
}

impl StillDigest {
    /// Takes up to `pages` more; gives the digest once it is whole.
    pub fn advance(&mut self, memory: &dyn PageMemory, pages: u32) -> Option<Digest> {
        let page_count = memory.page_count();
        let end = self.next.saturating_add(pages).min(page_count);
        for number in self.next..end {
            if !self.kept.remove(&number) {
                self.take(memory, number);
            }
        }
        self.next = end;
        (end >= page_count).then_some(self.total)
    }

    /// Page `number` is about to change.
    pub fn keep(&mut self, memory: &dyn PageMemory, number: u32) {
        if number >= self.next && self.kept.insert(number) {
            self.take(memory, number);
        }
    }

    fn take(&mut self, memory: &dyn PageMemory, number: u32) {
        let mut page = ZERO_PAGE;
        memory.read_page(number, &mut page);
        self.total.add(number.into(), &page);
    }
}

/// Digest of a whole volume, size included.
pub fn digest_storage(storage: &dyn Storage) -> io::Result<Digest> {
    let size = storage.size_bytes();
    let mut digest = Digest::default();
    digest.add(u64::MAX, &size.to_le_bytes());
    let mut block = vec![0; BLOCK_BYTES.min(size) as usize];
    let mut offset = 0;
    while offset < size {
        let len = BLOCK_BYTES.min(size - offset);
        let bytes = &mut block[..len as usize];
        storage.read_at(offset, bytes)?;
        digest.add(offset, bytes);
        offset += len;
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::memory::HeapMemory;
    use crate::replication::testing::{MemStorage, Seeded};

    /// Of all of memory as it is, taken page by page and kept nowhere.
    fn fresh(memory: &HeapMemory) -> Digest {
        let whole = StillDigest::default().advance(memory, memory.page_count());
        whole.expect("all pages were asked for")
    }

    #[test]
    fn pieces_change_nothing_and_every_byte_counts() {
        let memory = HeapMemory::new(130);
        let mut seeded = Seeded::new(1);
        (0..130).for_each(|page| memory.write_page(page, &seeded.page()));
        let digest = fresh(&memory);
        for pages in [1, 7, 64, 129, 130, u32::MAX] {
            let (mut still, mut kept) = (StillDigest::default(), PageDigests::new(130));
            let whole = loop {
                assert!(!kept.is_whole(), "{pages} at a time");
                kept.advance(&memory, pages);
                if let Some(whole) = still.advance(&memory, pages) {
                    break whole;
                }
            };
            assert!(kept.is_whole(), "{pages} at a time");
            assert_eq!((whole, kept.digest()), (digest, digest), "{pages} at a time");
        }
        memory.write_in_page(129, 4095, &[0]);
        assert_ne!(fresh(&memory), digest);
    }

    #[test]
    fn a_digest_kept_up_to_date_is_the_digest() {
        let memory = HeapMemory::new(40);
        let mut seeded = Seeded::new(2);
        (0..40).for_each(|page| memory.write_page(page, &seeded.page()));
        let mut digests = PageDigests::new(40);
        // What is set before its page was come to is read again there.
        for at in 0..6 {
            assert!(!digests.is_whole(), "7 pages at a time, {at} times");
            let (page, contents) = (seeded.below(40) as u32, seeded.page());
            memory.write_page(page, &contents);
            digests.set(page, &contents);
            digests.advance(&memory, 7);
        }
        assert!(digests.is_whole());
        assert_eq!(digests.digest(), fresh(&memory));
        for _ in 0..200 {
            let (page, contents) = (seeded.below(40) as u32, seeded.page());
            memory.write_page(page, &contents);
            assert_ne!(digests.digest(), fresh(&memory), "one page is not set yet");
            if seeded.below(2) == 0 {
                digests.set(page, &contents);
            } else {
                digests.reread(&memory, page);
            }
            assert_eq!(digests.digest(), fresh(&memory));
        }
    }

    #[test]
    fn memory_that_goes_on_keeps_the_digest_of_what_it_was() {
        let mut seeded = Seeded::new(3);
        for kept in [true, false] {
            let memory = HeapMemory::new(40);
            (0..40).for_each(|page| memory.write_page(page, &seeded.page()));
            let mut before = PageDigests::new(40);
            before.advance(&memory, 40);
            let before = before.digest();
            let mut digest = StillDigest::default();
            let mut whole = None;
            while whole.is_none() {
                whole = digest.advance(&memory, 3);
                // Pages that were come to, that were not, and one of them twice.
                for page in [0, 38, 39, 39, seeded.below(40) as u32] {
                    if kept {
                        digest.keep(&memory, page);
                    }
                    memory.write_page(page, &seeded.page());
                }
            }
            assert_eq!(whole == Some(before), kept, "whoever changes a page says so: {kept}");
        }
    }

    #[test]
    fn exchanged_pages_differ() {
        let memory = HeapMemory::new(2);
        memory.write_page(0, &[1; 4096]);
        let digest = fresh(&memory);
        memory.write_page(0, &[0; 4096]);
        memory.write_page(1, &[1; 4096]);
        assert_ne!(fresh(&memory), digest);
    }

    #[test]
    fn disks_of_zeroes_differ_by_size() {
        let digest = |bytes: usize| digest_storage(&*MemStorage::new(vec![0; bytes])).expect("no fault");
        assert_ne!(digest(512), digest(1024));
        assert_eq!(digest(3 << 20), digest(3 << 20));
    }
}
