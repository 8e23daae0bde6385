//! One request of a disk: parsed out of a chain, executed on private memory, told to the guest.

use std::io;

use super::{BlkMetrics, RANGE_SECTORS, RANGES_TAKEN, REQUEST_BYTES, SECTOR_BYTES, SERIAL_BYTES};
use crate::backends::{DiskBackend, DiskOp};
use crate::devices::virtio::queue::{Chain, QueueError};
use crate::memory::GuestMem;
use std::sync::atomic::Ordering;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
const RANGE_UNMAP: u32 = 1;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// What the guest is told (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A range to discard or to fill with zeroes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    /// Nothing: the request is answered with this status.
    Refuse(Status),
}

/// A request with its private data.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) action: Action,
    /// What is written, or was read.
    pub(super) data: Vec<u8>,
    /// How the execution went; `None` until then.
    pub(super) outcome: Option<Status>,
}

/// What a disk is, as far as requests are checked against it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) size_bytes: u64,
    pub(super) read_only: bool,
}

impl Request {
    /// Reads the request in `chain`; `data` is an empty buffer to use. A chain that no answer fits is an error.
    pub(super) fn parse(chain: &Chain, mem: &GuestMem, limits: Limits, data: Vec<u8>) -> Result<Self, QueueError> {
        let refuse = |what| QueueError::Request { head: chain.head, what };
        if chain.writable_len() == 0 {
            return Err(refuse("has no room for its status"));
        }
        let mut header = [0; HEADER_BYTES];
        if chain.read(mem, 0, &mut header)? < HEADER_BYTES {
            return Err(refuse("is shorter than its header"));
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = header[8..]
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let mut request = Self {
            action: Action::Refuse(Status::IoError),
            data,
            outcome: None,
        };
        request.fill(kind, sector, chain, mem, limits)?;
        Ok(request)
    }

    /// Decides what is done and copies what the guest sends.
    fn fill(
        &mut self,
        kind: u32,
        sector: u64,
        chain: &Chain,
        mem: &GuestMem,
        limits: Limits,
    ) -> Result<(), QueueError> {
        let (sent, room) = (chain.readable_len() - HEADER_BYTES as u64, chain.writable_len() - 1);
        let allowed = |len: u64| {
            if len <= REQUEST_BYTES {
                limits.range(sector, len)
            } else {
                None
            }
        };
        let writes = matches!(kind, TYPE_OUT | TYPE_DISCARD | TYPE_WRITE_ZEROES);
        self.action = match kind {
            _ if writes && limits.read_only => Action::Refuse(Status::IoError),
            TYPE_IN => match allowed(room) {
                Some(offset) => {
                    self.data.resize(room as usize, 0);
                    Action::Read { offset }
                }
                None => Action::Refuse(Status::IoError),
            },
            TYPE_OUT => match allowed(sent) {
                Some(offset) => {
                    self.data.resize(sent as usize, 0);
                    chain.read(mem, HEADER_BYTES as u64, &mut self.data)?;
                    Action::Write { offset }
                }
                None => Action::Refuse(Status::IoError),
            },
            TYPE_FLUSH => Action::Flush,
            TYPE_GET_ID => {
                self.data.resize((room as usize).min(SERIAL_BYTES), 0);
                Action::GetId
            }
            TYPE_DISCARD | TYPE_WRITE_ZEROES => ranges(kind, sent, chain, mem, limits)?,
            _ => Action::Refuse(Status::Unsupported),
        };
        Ok(())
    }

    /// Does it. May block; errors become the guest's and are returned for the owner. `begins` is called when it begins, and again for
    /// each range: one takes as long as a request may, and several are still none that hangs.
    pub(super) fn execute(
        &mut self,
        disk: &mut dyn DiskBackend,
        serial: &[u8; SERIAL_BYTES],
        begins: &mut dyn FnMut(),
    ) -> Result<(), String> {
        begins();
        let (result, what) = match &self.action {
            Action::Read { offset } => (
                disk.read_at(*offset, &mut self.data),
                format!("reading {} bytes at {offset}", self.data.len()),
            ),
            Action::Write { offset } => (
                disk.write_at(*offset, &self.data),
                format!("writing {} bytes at {offset}", self.data.len()),
            ),
            Action::Flush => (disk.flush(), "flushing".to_owned()),
            Action::GetId => {
                let len = self.data.len();
                self.data.copy_from_slice(&serial[..len]);
                (Ok(()), String::new())
            }
            Action::Discard(ranges) => each("discarding", ranges, begins, |range| {
                disk.discard(range.offset, range.len)
            }),
            Action::WriteZeroes(ranges) => each("zeroing", ranges, begins, |range| {
                disk.write_zeroes(range.offset, range.len)
            }),
            Action::Refuse(status) => {
                self.outcome = Some(*status);
                return Ok(());
            }
        };
        self.outcome = Some(if result.is_ok() { Status::Ok } else { Status::IoError });
        result.map_err(|error| format!("{what}: {error}"))
    }

    /// Bytes of the disk that it is about, as far as they take time.
    pub(super) fn disk_bytes(&self) -> usize {
        match &self.action {
            Action::Discard(ranges) | Action::WriteZeroes(ranges) => {
                ranges.iter().map(|range| range.len as usize).sum()
            }
            _ => self.data.len(),
        }
    }

    /// Tells the backend, inside the gate, what was executed.
    pub(super) fn report(&self, disk: &mut dyn DiskBackend) {
        let ok = self.outcome == Some(Status::Ok);
        match &self.action {
            Action::Read { offset } => disk.completed(
                &DiskOp::Read {
                    offset: *offset,
                    len: self.data.len() as u64,
                },
                ok,
            ),
            Action::Write { offset } => disk.completed(
                &DiskOp::Write {
                    offset: *offset,
                    data: &self.data,
                },
                ok,
            ),
            Action::Flush => disk.completed(&DiskOp::Flush, ok),
            Action::Discard(ranges) => ranges.iter().for_each(|range| disk.completed(&range.discard(), ok)),
            Action::WriteZeroes(ranges) => ranges.iter().for_each(|range| disk.completed(&range.zeroes(), ok)),
            Action::GetId | Action::Refuse(_) => {}
        }
    }

    /// Writes data and status into the guest's buffers; returns how many bytes from their beginning are valid.
    pub(super) fn answer(&self, chain: &Chain, mem: &GuestMem) -> Result<u32, QueueError> {
        let status = self.outcome.unwrap_or(Status::IoError);
        let at = chain.writable_len() - 1;
        let returns = matches!(self.action, Action::Read { .. } | Action::GetId) && status == Status::Ok;
        let written = if returns {
            chain.write(mem, 0, &self.data)? as u64
        } else {
            0
        };
        chain.write(mem, at, &[status as u8])?;
        // The status byte counts only if all before it was written (2.7.8.2).
        Ok(if written == at { at as u32 + 1 } else { written as u32 })
    }

    /// Counts the request.
    pub(super) fn count(&self, metrics: &BlkMetrics) {
        let add = |counter: &std::sync::atomic::AtomicU64, value: u64| counter.fetch_add(value, Ordering::Relaxed);
        if self.outcome != Some(Status::Ok) {
            add(&metrics.errors, 1);
            return;
        }
        let bytes = self.data.len() as u64;
        match &self.action {
            Action::Read { .. } => {
                add(&metrics.reads, 1);
                add(&metrics.read_bytes, bytes);
            }
            Action::Write { .. } => {
                add(&metrics.writes, 1);
                add(&metrics.written_bytes, bytes);
            }
            Action::Flush => {
                add(&metrics.flushes, 1);
            }
            Action::Discard(ranges) | Action::WriteZeroes(ranges) => {
                add(&metrics.ranges, ranges.len() as u64);
            }
            Action::GetId | Action::Refuse(_) => {}
        }
    }
}

impl Range {
    fn discard(&self) -> DiskOp<'static> {
        DiskOp::Discard {
            offset: self.offset,
            len: self.len,
        }
    }

    fn zeroes(&self) -> DiskOp<'static> {
        DiskOp::WriteZeroes {
            offset: self.offset,
            len: self.len,
            unmap: self.unmap,
        }
    }
}

impl Limits {
    /// Byte offset of `sector` if `len` bytes from there are whole sectors inside the disk.
    fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR_BYTES)?;
        let end = offset.checked_add(len)?;
        (len > 0 && len.is_multiple_of(SECTOR_BYTES) && end <= self.size_bytes).then_some(offset)
    }
}

/// Does one range after the other, until one fails; with the error belongs which one that was.
fn each(
    what: &str,
    ranges: &[Range],
    begins: &mut dyn FnMut(),
    mut run: impl FnMut(&Range) -> io::Result<()>,
) -> (io::Result<()>, String) {
    for range in ranges {
        begins();
        if let Err(error) = run(range) {
            return (Err(error), format!("{what} {} bytes at {}", range.len, range.offset));
        }
    }
    (Ok(()), String::new())
}

/// Parses the ranges of a discard or write-zeroes request (5.2.6).
fn ranges(kind: u32, sent: u64, chain: &Chain, mem: &GuestMem, limits: Limits) -> Result<Action, QueueError> {
    let most = u64::from(RANGES_TAKEN) * RANGE_BYTES as u64;
    if sent == 0 || !sent.is_multiple_of(RANGE_BYTES as u64) || sent > most {
        return Ok(Action::Refuse(Status::IoError));
    }
    let mut raw = vec![0; sent as usize];
    chain.read(mem, HEADER_BYTES as u64, &mut raw)?;
    let mut ranges = Vec::with_capacity(raw.len() / RANGE_BYTES);
    for bytes in raw.chunks_exact(RANGE_BYTES) {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (sector, sectors, flags) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(8), word(12));
        // A discard may not ask for unmapping, and other flags do not exist (5.2.6.2). Zeroing may, and is not heard.
        if flags & !RANGE_UNMAP != 0 || kind == TYPE_DISCARD && flags != 0 {
            return Ok(Action::Refuse(Status::Unsupported));
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        match limits.range(sector, len) {
            Some(offset) if sectors <= RANGE_SECTORS => ranges.push(Range {
                offset,
                len,
                unmap: flags & RANGE_UNMAP != 0,
            }),
            _ => return Ok(Action::Refuse(Status::IoError)),
        }
    }
    Ok(if kind == TYPE_DISCARD {
        Action::Discard(ranges)
    } else {
        Action::WriteZeroes(ranges)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::MemoryDisk;

    /// Sixteen long ranges may take longer than a request may, all together.
    #[test]
    fn each_range_has_a_time_of_its_own() {
        let mut disk = MemoryDisk::new(1 << 16);
        let executed = disk.executed.clone();
        let range = |number: u64| Range {
            offset: number * 1024,
            len: 512,
            unmap: false,
        };
        let mut request = Request {
            action: Action::WriteZeroes((0..3).map(range).collect()),
            data: Vec::new(),
            outcome: None,
        };
        let mut begun = Vec::new();
        let mut begins = || begun.push(executed.load(Ordering::SeqCst));
        let result = request.execute(&mut disk, &[0; SERIAL_BYTES], &mut begins);
        assert_eq!((result, request.disk_bytes()), (Ok(()), 3 * 512));
        assert_eq!(begun, [0, 0, 1, 2]);
        disk.fails.store(true, Ordering::SeqCst);
        let error = request.execute(&mut disk, &[0; SERIAL_BYTES], &mut || {}).unwrap_err();
        assert!(error.starts_with("zeroing 512 bytes at 0: "), "{error}");
    }
}
