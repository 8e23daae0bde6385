//! A set of RAM pages whose cost follows what is in it, not the size of RAM.

/// Set of RAM page numbers. Inserting is O(1); clearing, merging and walking cost in proportion to the content; one bit
/// of memory per RAM page beside.
#[derive(Debug, Clone)]
pub struct DirtyPages {
    words: Vec<u64>,
    /// Indices of words that are not zero, in no order.
    touched: Vec<u32>,
    len: usize,
    pages: u32,
}

impl DirtyPages {
    /// An empty set of pages below `pages`.
    pub fn new(pages: u32) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            touched: Vec::new(),
            len: 0,
            pages,
        }
    }

    /// Number of pages that the RAM has; every member is below.
    pub fn capacity(&self) -> u32 {
        self.pages
    }

    /// Number of members.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no members.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a page; false if it was there.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn insert(&mut self, page: u32) -> bool {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.insert_word(page / 64, 1 << (page % 64)) == 1
    }

    /// Adds the pages `64 * word + i` for every bit i of `bits`; returns how many of them are new. Bits beyond the last
    /// page are ignored.
    pub fn insert_word(&mut self, word: u32, bits: u64) -> u32 {
        let bits = bits & self.valid_bits(word);
        let slot = &mut self.words[word as usize];
        let new = bits & !*slot;
        if new == 0 {
            return 0;
        }
        if *slot == 0 {
            self.touched.push(word);
        }
        *slot |= new;
        self.len += new.count_ones() as usize;
        new.count_ones()
    }

    fn valid_bits(&self, word: u32) -> u64 {
        let left = self.pages.saturating_sub(word.saturating_mul(64));
        if left >= 64 { u64::MAX } else { (1 << left) - 1 }
    }

    /// Removes a page; false if it was not there.
    pub fn remove(&mut self, page: u32) -> bool {
        if !self.contains(page) {
            return false;
        }
        let word = page / 64;
        self.words[word as usize] &= !(1 << (page % 64));
        self.len -= 1;
        if self.words[word as usize] == 0 {
            self.touched.retain(|&touched| touched != word);
        }
        true
    }

    /// Whether the page is a member.
    pub fn contains(&self, page: u32) -> bool {
        page < self.pages && self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Adds all members of `other`, which must be of the same RAM.
    pub fn merge(&mut self, other: &DirtyPages) {
        assert_eq!(self.pages, other.pages, "sets of two different machines");
        for &word in &other.touched {
            self.insert_word(word, other.words[word as usize]);
        }
    }

    /// Adds every page: a full copy.
    pub fn insert_all(&mut self) {
        for word in 0..self.words.len() as u32 {
            self.insert_word(word, u64::MAX);
        }
    }

    /// Removes all members.
    pub fn clear(&mut self) {
        for &word in &self.touched {
            self.words[word as usize] = 0;
        }
        self.touched.clear();
        self.len = 0;
    }

    /// Puts the set in ascending order for [`DirtyPages::iter`]; neighbours in RAM are then neighbours in the walk.
    pub fn sort(&mut self) {
        self.touched.sort_unstable();
    }

    /// The members; ascending if [`DirtyPages::sort`] was called after the last insertion, otherwise ascending within
    /// each aligned group of 64 pages only.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.touched
            .iter()
            .flat_map(|&word| Bits(self.words[word as usize]).map(move |bit| word * 64 + bit))
    }
}

/// Positions of the bits that are set in a word, ascending.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bits(pub u64);

impl Iterator for Bits {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The same random operations on this set and on a `BTreeSet`.
    #[test]
    fn behaves_like_a_set() {
        let mut set = DirtyPages::new(1000);
        let mut model = BTreeSet::new();
        let mut seed = 1u64;
        for step in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let page = ((seed >> 33) % 1000) as u32;
            match (seed >> 20) % 8 {
                0 => assert_eq!(set.remove(page), model.remove(&page)),
                1 if step % 97 == 0 => {
                    set.clear();
                    model.clear();
                }
                2 => {
                    let mut other = DirtyPages::new(1000);
                    other.insert(page);
                    other.insert(999);
                    set.merge(&other);
                    model.extend([page, 999]);
                }
                _ => assert_eq!(set.insert(page), model.insert(page)),
            }
            assert_eq!(set.len(), model.len());
        }
        set.sort();
        assert!(set.iter().eq(model.iter().copied()));
    }

    #[test]
    fn bits_beyond_the_last_page_are_ignored() {
        let mut set = DirtyPages::new(70);
        assert_eq!(set.insert_word(1, u64::MAX), 6);
        assert_eq!(set.len(), 6);
        set.insert_all();
        assert_eq!(set.len(), 70);
        assert!(!set.contains(70));
    }
}
