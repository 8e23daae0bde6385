//! One page to bytes. A record is {kind u8, page u32, length u16, data}, little endian.
//!
//! The words that changed are written as runs {words to skip u8, words that follow u8, the new words}; new words
//! rather than their XOR, so that applying needs no read. A page that changed in many words is XORed with its last
//! version and compressed (LZ4 block).

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use crate::replication::memory::{PAGE_SIZE, Page};

/// Bytes before a record's data.
pub(super) const RECORD_HEADER_BYTES: usize = 7;
/// Longest record: a page as it is.
pub(super) const RECORD_MAX_BYTES: usize = RECORD_HEADER_BYTES + PAGE_SIZE;
/// A word of the delta encoding, in bytes.
pub(super) const WORD: usize = 8;
/// Words in a page.
pub(super) const WORDS: usize = PAGE_SIZE / WORD;

const BLOCK: usize = 64;
/// Runs longer than this are compared with the compressed XOR.
const RUNS_SMALL_BYTES: usize = 512;
/// Compression must save this much of a page to be worth its decompression.
const WORTH_SAVING_BYTES: usize = PAGE_SIZE / 8;
/// After fruitless attempts compression is not tried for up to this many pages.
const BACKOFF_MAX_PAGES: u32 = 64;

/// How a page is represented in a chunk. The numbers are the wire's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageKind {
    /// `length` consecutive pages of zeroes, no data.
    Zero = 0,
    /// The page.
    Raw = 1,
    /// Runs of changed words.
    Runs = 2,
    /// The page, LZ4.
    Compressed = 3,
    /// XOR with the version before, LZ4.
    CompressedXor = 4,
}

impl PageKind {
    pub(super) fn from_wire(kind: u8) -> Option<Self> {
        Some(match kind {
            0 => Self::Zero,
            1 => Self::Raw,
            2 => Self::Runs,
            3 => Self::Compressed,
            4 => Self::CompressedXor,
            _ => return None,
        })
    }
}

/// Whether pages are compressed when no small delta exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Never: for links that are faster than a compressor (about 500 MB/s a core).
    Off,
    /// LZ4, given up for a while where it saves nothing.
    #[default]
    Lz4,
}

/// Pages by the representation they took, and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageStats {
    /// Pages looked at.
    pub pages: u64,
    /// Not sent: equal to the version sent last.
    pub unchanged: u64,
    /// Sent as zeroes.
    pub zero: u64,
    /// Sent as runs of changed words.
    pub runs: u64,
    /// Sent as compressed XOR.
    pub compressed_xor: u64,
    /// Sent compressed.
    pub compressed: u64,
    /// Sent as they are.
    pub raw: u64,
    /// Bytes of all chunks.
    pub encoded_bytes: u64,
}

impl PageStats {
    /// Adds another's counts.
    pub fn add(&mut self, other: &PageStats) {
        self.pages += other.pages;
        self.unchanged += other.unchanged;
        self.zero += other.zero;
        self.runs += other.runs;
        self.compressed_xor += other.compressed_xor;
        self.compressed += other.compressed;
        self.raw += other.raw;
        self.encoded_bytes += other.encoded_bytes;
    }

    /// Bytes of the pages looked at for each byte sent; 1.0 if nothing was sent.
    pub fn ratio(&self) -> f64 {
        if self.encoded_bytes == 0 {
            1.0
        } else {
            (self.pages * PAGE_SIZE as u64) as f64 / self.encoded_bytes as f64
        }
    }
}

/// Whether all bytes are zero.
pub(super) fn is_zero(page: &Page) -> bool {
    page.chunks_exact(BLOCK)
        .all(|block| block.iter().fold(0u8, |all, byte| all | byte) == 0)
}

/// Appends the runs of words in which `page` differs from `base`; gives up (leaving `out` longer) once more than
/// `limit` bytes were appended. `Some(bytes)` appended, 0 if the pages are equal.
pub(super) fn encode_runs(page: &Page, base: &Page, out: &mut Vec<u8>, limit: usize) -> Option<usize> {
    let start = out.len();
    let mut skip = 0usize;
    // Where the open run's word count stands, if a run is open.
    let mut open: Option<usize> = None;
    for (new, old) in page.chunks_exact(BLOCK).zip(base.chunks_exact(BLOCK)) {
        if new == old {
            skip += BLOCK / WORD;
            open = None;
            continue;
        }
        for (word, old_word) in new.chunks_exact(WORD).zip(old.chunks_exact(WORD)) {
            if word == old_word {
                skip += 1;
                open = None;
                continue;
            }
            match open {
                Some(count_at) if out[count_at] < u8::MAX => out[count_at] += 1,
                _ => {
                    while skip > u8::MAX as usize {
                        out.extend_from_slice(&[u8::MAX, 0]);
                        skip -= u8::MAX as usize;
                    }
                    out.extend_from_slice(&[skip as u8, 1]);
                    skip = 0;
                    open = Some(out.len() - 1);
                }
            }
            out.extend_from_slice(word);
        }
        if out.len() - start > limit {
            return None;
        }
    }
    Some(out.len() - start)
}

/// Visits the runs of a record as (byte offset in the page, new bytes). `None` if the record is malformed; then the
/// runs before the fault were visited.
pub(super) fn visit_runs(mut data: &[u8], mut visit: impl FnMut(usize, &[u8])) -> Option<()> {
    let mut word = 0usize;
    while let Some((&[skip, count], rest)) = data.split_first_chunk::<2>() {
        let bytes = count as usize * WORD;
        word += skip as usize;
        if word + count as usize > WORDS || rest.len() < bytes || (skip == 0 && count == 0) {
            return None;
        }
        if bytes > 0 {
            visit(word * WORD, &rest[..bytes]);
        }
        word += count as usize;
        data = &rest[bytes..];
    }
    data.is_empty().then_some(())
}

pub(super) fn xor_into(page: &mut Page, other: &Page) {
    for (byte, with) in page.iter_mut().zip(other) {
        *byte ^= with;
    }
}

/// Encodes pages one after another; owns the compressor's working memory.
pub(super) struct PageCoder {
    compression: Compression,
    table: CompressTable,
    compressed: Vec<u8>,
    xor: Box<Page>,
    runs: Vec<u8>,
    fruitless: u32,
    resting: u32,
}

/// What became of a page: its kind, and where the data is.
pub(super) enum Coded<'a> {
    Unchanged,
    Zero,
    Data(PageKind, &'a [u8]),
}

impl PageCoder {
    pub fn new(compression: Compression) -> Self {
        Self {
            compression,
            table: CompressTable::small(),
            compressed: vec![0; get_maximum_output_size(PAGE_SIZE)],
            xor: Box::new([0; PAGE_SIZE]),
            runs: Vec::with_capacity(PAGE_SIZE + BLOCK * 2),
            fruitless: 0,
            resting: 0,
        }
    }

    /// Chooses the representation of `page`, given the version the receiver has, if that is known.
    pub fn code<'a>(&'a mut self, page: &'a Page, base: Option<&Page>) -> Coded<'a> {
        if let Some(base) = base {
            self.runs.clear();
            let runs = encode_runs(page, base, &mut self.runs, PAGE_SIZE - WORTH_SAVING_BYTES);
            match runs {
                Some(0) => return Coded::Unchanged,
                Some(bytes) if bytes <= RUNS_SMALL_BYTES => return Coded::Data(PageKind::Runs, &self.runs),
                _ if is_zero(page) => return Coded::Zero,
                _ => {}
            }
            *self.xor = *page;
            xor_into(&mut self.xor, base);
            let limit = runs.unwrap_or(PAGE_SIZE - WORTH_SAVING_BYTES);
            if let Some(bytes) = compress(
                self.compression,
                &mut self.table,
                &self.xor,
                &mut self.compressed,
                limit,
            ) {
                return Coded::Data(PageKind::CompressedXor, &self.compressed[..bytes]);
            }
            return match runs {
                Some(_) => Coded::Data(PageKind::Runs, &self.runs),
                None => self.code_alone(page),
            };
        }
        if is_zero(page) {
            return Coded::Zero;
        }
        self.code_alone(page)
    }

    /// Without a version to compare with. Incompressible pages come in herds: after a fruitless attempt the next ones
    /// are sent as they are.
    fn code_alone<'a>(&'a mut self, page: &'a Page) -> Coded<'a> {
        if self.resting > 0 {
            self.resting -= 1;
            return Coded::Data(PageKind::Raw, page);
        }
        let limit = PAGE_SIZE - WORTH_SAVING_BYTES;
        if let Some(bytes) = compress(self.compression, &mut self.table, page, &mut self.compressed, limit) {
            self.fruitless = 0;
            return Coded::Data(PageKind::Compressed, &self.compressed[..bytes]);
        }
        self.fruitless = (self.fruitless + 1).min(BACKOFF_MAX_PAGES.ilog2());
        self.resting = (1 << self.fruitless) - 1;
        Coded::Data(PageKind::Raw, page)
    }
}

fn compress(how: Compression, table: &mut CompressTable, from: &Page, into: &mut [u8], limit: usize) -> Option<usize> {
    match how {
        Compression::Off => None,
        Compression::Lz4 => compress_into_with_table(from, into, table)
            .ok()
            .filter(|&bytes| bytes < limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::memory::ZERO_PAGE;
    use crate::replication::testing::Seeded;

    fn apply_runs(base: &Page, data: &[u8]) -> Option<Page> {
        let mut page = *base;
        visit_runs(data, |at, bytes| page[at..at + bytes.len()].copy_from_slice(bytes))?;
        Some(page)
    }

    #[test]
    fn runs_of_random_changes_are_exact() {
        let mut seeded = Seeded::new(1);
        for _ in 0..300 {
            let base: Page = seeded.page();
            let mut page = base;
            for _ in 0..seeded.below(600) {
                page[seeded.below(PAGE_SIZE as u64) as usize] ^= seeded.next() as u8;
            }
            let mut runs = Vec::new();
            let bytes = encode_runs(&page, &base, &mut runs, usize::MAX).expect("no limit");
            assert_eq!(bytes, runs.len());
            assert_eq!(bytes == 0, page == base);
            assert_eq!(apply_runs(&base, &runs).expect("well formed"), page);
        }
    }

    #[test]
    fn long_skips_and_long_runs_are_split() {
        let base = ZERO_PAGE;
        let mut last_word = base;
        last_word[PAGE_SIZE - 1] = 1;
        let mut runs = Vec::new();
        encode_runs(&last_word, &base, &mut runs, usize::MAX);
        assert_eq!(runs.len(), 2 + 2 + 2 + WORD, "511 words skipped as 255, 255, 1");
        assert_eq!(apply_runs(&base, &runs), Some(last_word));

        let all = [7; PAGE_SIZE];
        runs.clear();
        assert_eq!(encode_runs(&all, &base, &mut runs, usize::MAX), Some(PAGE_SIZE + 3 * 2));
        assert_eq!(apply_runs(&base, &runs), Some(all));
        runs.clear();
        assert_eq!(encode_runs(&all, &base, &mut runs, 100), None);
    }

    #[test]
    fn malformed_runs_are_refused() {
        for (what, data) in [
            ("half a header", vec![1]),
            ("words missing", vec![0, 2, 1, 2, 3, 4, 5, 6, 7, 8]),
            ("empty run", vec![0, 0]),
            ("beyond the page", [vec![255, 0, 255, 0, 2, 1], vec![0; 8]].concat()),
        ] {
            assert_eq!(visit_runs(&data, |_, _| {}), None, "{what}");
        }
    }

    #[test]
    fn counters_in_every_word_take_the_compressed_xor() {
        let mut seeded = Seeded::new(2);
        let base = seeded.page();
        let mut page = base;
        page.chunks_exact_mut(WORD).for_each(|word| word[0] ^= 1);
        let mut coder = PageCoder::new(Compression::Lz4);
        match coder.code(&page, Some(&base)) {
            Coded::Data(PageKind::CompressedXor, data) => assert!(data.len() < PAGE_SIZE / 8, "{}", data.len()),
            _ => panic!("another kind"),
        }
    }

    #[test]
    fn incompressible_pages_are_not_tried_again_at_once() {
        let mut seeded = Seeded::new(3);
        let mut coder = PageCoder::new(Compression::Lz4);
        assert!(matches!(
            coder.code(&seeded.page(), None),
            Coded::Data(PageKind::Raw, _)
        ));
        assert_eq!(coder.resting, 1);
        let text = [b'a'; PAGE_SIZE];
        assert!(
            matches!(coder.code(&text, None), Coded::Data(PageKind::Raw, _)),
            "resting"
        );
        assert!(
            matches!(coder.code(&text, None), Coded::Data(PageKind::Compressed, _)),
            "tried again"
        );
    }
}
