//! A chunk of pages as it was received: checked once, applied later without a way to fail.

use lz4_flex::block::decompress_into;

use super::codec::{PageKind, RECORD_HEADER_BYTES, visit_runs, xor_into};
use super::{CHUNK_HEADER_BYTES, CHUNK_MAX_BYTES};
use crate::replication::buffers;
use crate::replication::memory::{PAGE_SIZE, Page, PageMemory, ZERO_PAGE};

/// What is wrong with a chunk of pages. The connection that brought it is not to be trusted any further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PagesError {
    /// Too short for its header, or longer than any chunk.
    #[error("a chunk of {0} bytes; chunks have {CHUNK_HEADER_BYTES} to {CHUNK_MAX_BYTES}")]
    Size(usize),
    /// The records end before or after the chunk does.
    #[error("record {record} of a chunk of pages is cut off or followed by {rest} bytes that belong to none")]
    Length {
        /// Which record, from 0.
        record: u32,
        /// Bytes left.
        rest: usize,
    },
    /// No such representation of a page.
    #[error("page {page} is represented by unknown kind {kind}")]
    Kind {
        /// Page number.
        page: u32,
        /// The kind found.
        kind: u8,
    },
    /// The page isn't in the guest's memory.
    #[error("pages {page} to {last} were sent, but the guest has {page_count} pages")]
    OutOfRange {
        /// First page of the record.
        page: u32,
        /// Last page of the record.
        last: u64,
        /// Pages of the guest.
        page_count: u32,
    },
    /// Page numbers in a chunk ascend.
    #[error("page {page} comes after or again in a chunk that had reached page {reached}")]
    Order {
        /// Page number.
        page: u32,
        /// Lowest page that could have come.
        reached: u32,
    },
    /// The data doesn't decode to a page.
    #[error("the data of page {page} does not decode to {PAGE_SIZE} bytes")]
    Data {
        /// Page number.
        page: u32,
    },
}

/// Pages that were checked: every number is in range and every record decodes. Holds the bytes as they came.
#[derive(Debug)]
pub struct PageChunk {
    payload: Vec<u8>,
    pages: u64,
    page_count: u32,
}

/// One record of a checked or unchecked chunk.
struct Record<'a> {
    page: u32,
    kind: u8,
    len: u16,
    data: &'a [u8],
    rest: &'a [u8],
}

fn next_record(bytes: &[u8]) -> Option<Record<'_>> {
    let (header, rest) = bytes.split_first_chunk::<RECORD_HEADER_BYTES>()?;
    let [kind, p0, p1, p2, p3, l0, l1] = *header;
    let len = u16::from_le_bytes([l0, l1]);
    let data_len = if kind == PageKind::Zero as u8 { 0 } else { len as usize };
    let (data, rest) = rest.split_at_checked(data_len)?;
    Some(Record {
        page: u32::from_le_bytes([p0, p1, p2, p3]),
        kind,
        len,
        data,
        rest,
    })
}

fn check_data(kind: PageKind, data: &[u8], scratch: &mut Page) -> bool {
    match kind {
        PageKind::Zero => true,
        PageKind::Raw => data.len() == PAGE_SIZE,
        PageKind::Runs => !data.is_empty() && visit_runs(data, |_, _| {}).is_some(),
        PageKind::Compressed | PageKind::CompressedXor => matches!(decompress_into(data, scratch), Ok(PAGE_SIZE)),
    }
}

impl PageChunk {
    /// Checks a received chunk for a guest of `page_count` pages.
    pub fn check(payload: Vec<u8>, page_count: u32) -> Result<Self, PagesError> {
        if payload.len() < CHUNK_HEADER_BYTES || payload.len() > CHUNK_MAX_BYTES {
            return Err(PagesError::Size(payload.len()));
        }
        let records = u32::from_le_bytes([payload[4], payload[5], payload[6], payload[7]]);
        let mut rest = &payload[CHUNK_HEADER_BYTES..];
        let mut scratch = ZERO_PAGE;
        let mut reached = 0u32;
        let mut pages = 0u64;
        for record in 0..records {
            let Some(next) = next_record(rest) else {
                return Err(PagesError::Length {
                    record,
                    rest: rest.len(),
                });
            };
            let page = next.page;
            let kind = PageKind::from_wire(next.kind).ok_or(PagesError::Kind { page, kind: next.kind })?;
            let count = if kind == PageKind::Zero { next.len } else { 1 };
            let end = u64::from(page) + u64::from(count);
            if end > u64::from(page_count) {
                return Err(PagesError::OutOfRange {
                    page,
                    last: end.saturating_sub(1),
                    page_count,
                });
            }
            if page < reached {
                return Err(PagesError::Order { page, reached });
            }
            if count == 0 || !check_data(kind, next.data, &mut scratch) {
                return Err(PagesError::Data { page });
            }
            reached = end as u32;
            pages += u64::from(count);
            rest = next.rest;
        }
        if !rest.is_empty() {
            return Err(PagesError::Length {
                record: records,
                rest: rest.len(),
            });
        }
        Ok(Self {
            payload,
            pages,
            page_count,
        })
    }

    /// Sequence number that the sender gave the chunk.
    pub fn sequence(&self) -> u32 {
        u32::from_le_bytes([self.payload[0], self.payload[1], self.payload[2], self.payload[3]])
    }

    /// Pages that [`Self::apply`] changes.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Visits the numbers of the pages that [`Self::apply`] changes.
    pub fn visit_pages(&self, mut visit: impl FnMut(u32)) {
        let mut rest = &self.payload[CHUNK_HEADER_BYTES..];
        while let Some(record) = next_record(rest) {
            rest = record.rest;
            let count = if record.kind == PageKind::Zero as u8 {
                u32::from(record.len)
            } else {
                1
            };
            (record.page..record.page + count).for_each(&mut visit);
        }
    }

    /// Bytes of memory that the chunk holds.
    pub fn staged_bytes(&self) -> usize {
        self.payload.capacity()
    }

    /// Brings `memory` to the version sent. Deltas are against what earlier chunks left there, so chunks are applied
    /// in the order of the stream.
    ///
    /// # Panics
    /// If `memory` has fewer pages than the chunk was checked for.
    pub fn apply(&self, memory: &dyn PageMemory) {
        assert!(
            memory.page_count() >= self.page_count,
            "the chunk was checked for a larger guest"
        );
        let mut rest = &self.payload[CHUNK_HEADER_BYTES..];
        let mut scratch = ZERO_PAGE;
        let mut base = ZERO_PAGE;
        while let Some(record) = next_record(rest) {
            rest = record.rest;
            let page = record.page;
            match PageKind::from_wire(record.kind) {
                Some(PageKind::Zero) => {
                    (page..page + u32::from(record.len)).for_each(|page| memory.write_page(page, &ZERO_PAGE))
                }
                Some(PageKind::Raw) => memory.write_in_page(page, 0, record.data),
                Some(PageKind::Runs) => {
                    // Checked: the runs stay inside the page.
                    let _ = visit_runs(record.data, |at, bytes| memory.write_in_page(page, at, bytes));
                }
                Some(kind @ (PageKind::Compressed | PageKind::CompressedXor)) => {
                    // Checked: decodes to a page.
                    let _ = decompress_into(record.data, &mut scratch);
                    if kind == PageKind::CompressedXor {
                        memory.read_page(page, &mut base);
                        xor_into(&mut scratch, &base);
                    }
                    memory.write_page(page, &scratch);
                }
                None => unreachable!("the kind was checked"),
            }
        }
    }
}

impl Drop for PageChunk {
    fn drop(&mut self) {
        buffers::give(std::mem::take(&mut self.payload));
    }
}

#[cfg(test)]
#[path = "staged_tests.rs"]
mod tests;
