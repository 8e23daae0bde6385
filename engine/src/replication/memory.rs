//! Guest memory as replication sees it: numbered pages that can be read and written while a guest runs.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::GuestRam;
pub use crate::memory::PAGE_SIZE;

/// The contents of one guest page.
pub type Page = [u8; PAGE_SIZE];

/// A page of zeroes.
pub const ZERO_PAGE: Page = [0; PAGE_SIZE];

/// Guest RAM by page number. Pages are numbered from 0 without holes: the number indexes RAM, it is not a guest
/// physical address shifted right.
///
/// Reading while the guest writes gives some mixture of old and new bytes, never undefined behaviour; whoever needs a
/// consistent page reads it again after it was found dirty, or while the guest is paused.
///
/// Callers check page numbers against [`Self::page_count`] when data enters; implementations may panic on others.
pub trait PageMemory: Send + Sync {
    /// Number of pages.
    fn page_count(&self) -> u32;
    /// Copies page `page` into `into`.
    fn read_page(&self, page: u32, into: &mut Page);
    /// Overwrites a page.
    fn write_page(&self, page: u32, from: &Page) {
        self.write_in_page(page, 0, from);
    }
    /// Overwrites `bytes.len()` bytes of a page from byte `offset`; `offset + bytes.len()` is at most [`PAGE_SIZE`].
    fn write_in_page(&self, page: u32, offset: usize, bytes: &[u8]);
}

impl PageMemory for GuestRam {
    fn page_count(&self) -> u32 {
        self.pages()
    }

    fn read_page(&self, page: u32, into: &mut Page) {
        GuestRam::read_page(self, page, into).expect("callers check page numbers");
    }

    fn write_in_page(&self, page: u32, offset: usize, bytes: &[u8]) {
        assert!(
            offset + bytes.len() <= PAGE_SIZE,
            "{} bytes at {offset} leave the page",
            bytes.len()
        );
        let start = self.page_ptr(page).expect("callers check page numbers");
        // SAFETY: `page_ptr` gives PAGE_SIZE bytes that stay mapped while `self` lives, the range was checked to be
        // among them, and a slice of ours can't overlap guest memory. What comes from the peer is not marked as
        // written by this program.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.as_ptr().add(offset), bytes.len()) };
    }
}

/// Pages on the heap: guest memory where there is no guest, for tests and for measuring.
#[derive(Debug)]
pub struct HeapMemory {
    words: Vec<AtomicU64>,
}

const WORDS_PER_PAGE: usize = PAGE_SIZE / 8;

impl HeapMemory {
    /// `page_count` pages of zeroes.
    pub fn new(page_count: u32) -> Self {
        let words = (0..page_count as usize * WORDS_PER_PAGE)
            .map(|_| AtomicU64::new(0))
            .collect();
        Self { words }
    }

    fn page_words(&self, page: u32) -> &[AtomicU64] {
        let first = page as usize * WORDS_PER_PAGE;
        &self.words[first..first + WORDS_PER_PAGE]
    }
}

impl PageMemory for HeapMemory {
    fn page_count(&self) -> u32 {
        (self.words.len() / WORDS_PER_PAGE) as u32
    }

    fn read_page(&self, page: u32, into: &mut Page) {
        for (word, bytes) in self.page_words(page).iter().zip(into.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
    }

    fn write_in_page(&self, page: u32, offset: usize, bytes: &[u8]) {
        assert!(
            offset + bytes.len() <= PAGE_SIZE,
            "{} bytes at {offset} leave the page",
            bytes.len()
        );
        let words = self.page_words(page);
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let in_word = at % 8;
            let take = rest.len().min(8 - in_word);
            let word = &words[at / 8];
            let mut value = word.load(Ordering::Relaxed).to_le_bytes();
            value[in_word..in_word + take].copy_from_slice(&rest[..take]);
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
            at += take;
            rest = &rest[take..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unaligned_writes_touch_only_their_bytes() {
        unaligned(&HeapMemory::new(2));
        unaligned(&GuestRam::new(crate::memory::MIN_RAM_BYTES, false).expect("RAM"));
    }

    fn unaligned(memory: &dyn PageMemory) {
        memory.write_page(1, &[0xAA; PAGE_SIZE]);
        memory.write_in_page(1, 3, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        let mut page = ZERO_PAGE;
        memory.read_page(1, &mut page);
        assert_eq!(page[..3], [0xAA; 3]);
        assert_eq!(page[3..13], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(page[13..], [0xAA; PAGE_SIZE - 13]);
        memory.read_page(0, &mut page);
        assert_eq!(page, ZERO_PAGE);
    }
}
