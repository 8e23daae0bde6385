//! The file that holds a seat's header, next to its disk.
//!
//! The engine gets one descriptor and no directory, so the file is never renamed. It has two slots that are written in
//! turn; a write that is cut off at any byte leaves the other slot, and with it the header before, as it was.
//!
//! ```text
//!   slot n at n * 8192:  magic u64 | sequence u64 | length u32 | CRC-32 of sequence, length and body | body
//! ```
//!
//! The body is [`SeatHeader::to_file`]. The slot with the higher sequence is the header.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ftvm_protocol::core::StoredHeader;
use ftvm_protocol::header::{HeaderError, MAX_FILE_BYTES, SeatHeader};

const MAGIC: u64 = u64::from_le_bytes(*b"FTVMSLOT");
const SLOT_BYTES: u64 = 8192;
const PREFIX_BYTES: usize = 24;

/// Why the header file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum HeaderFileError {
    /// The host failed.
    #[error("seat header file could not be {what}: check the volume it is on")]
    Io {
        /// "read", "written", "synced".
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The header does not encode.
    #[error("seat header does not fit its file")]
    Encode(#[from] HeaderError),
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> HeaderFileError {
    move |source| HeaderFileError::Io { what, source }
}

/// The header file of one seat.
#[derive(Debug)]
pub struct HeaderFile {
    file: File,
    /// Sequence of the newest valid slot; 0 if there is none.
    sequence: u64,
}

impl HeaderFile {
    /// Takes the file over and reads it.
    ///
    /// A file without a byte is [`StoredHeader::Absent`]; one with bytes but no valid slot is `Damaged`.
    pub fn open(file: File) -> Result<(Self, StoredHeader), HeaderFileError> {
        let size_bytes = file.metadata().map_err(io_error("read"))?.len();
        let mut newest: Option<(u64, SeatHeader)> = None;
        for slot in 0..2 {
            let found = read_slot(&file, slot)?;
            if let Some((sequence, header)) = found
                && newest.as_ref().is_none_or(|(best, _)| sequence > *best)
            {
                newest = Some((sequence, header));
            }
        }
        let sequence = newest.as_ref().map_or(0, |(sequence, _)| *sequence);
        let stored = match newest {
            Some((_, header)) => StoredHeader::Found(header),
            None if size_bytes == 0 => StoredHeader::Absent,
            None => StoredHeader::Damaged,
        };
        Ok((Self { file, sequence }, stored))
    }

    /// Writes a header durably: when this returns, a crash leaves this header.
    pub fn write(&mut self, header: &SeatHeader) -> Result<(), HeaderFileError> {
        let body = header.to_file()?;
        let sequence = self.sequence + 1;
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut slot = Vec::with_capacity(PREFIX_BYTES + body.len());
        slot.extend_from_slice(&MAGIC.to_le_bytes());
        slot.extend_from_slice(&sequence.to_le_bytes());
        slot.extend_from_slice(&length.to_le_bytes());
        slot.extend_from_slice(&checksum(sequence, length, &body).to_le_bytes());
        slot.extend_from_slice(&body);
        let at = (sequence % 2) * SLOT_BYTES;
        self.file.write_all_at(&slot, at).map_err(io_error("written"))?;
        self.file.sync_all().map_err(io_error("synced"))?;
        self.sequence = sequence;
        Ok(())
    }
}

fn checksum(sequence: u64, length: u32, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sequence.to_le_bytes());
    hasher.update(&length.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// `None` if the slot is empty, cut off or damaged.
fn read_slot(file: &File, slot: u64) -> Result<Option<(u64, SeatHeader)>, HeaderFileError> {
    let mut bytes = [0u8; SLOT_BYTES as usize];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], slot * SLOT_BYTES + filled as u64) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error("read")(error)),
        }
    }
    Ok(parse_slot(&bytes[..filled], slot))
}

fn parse_slot(bytes: &[u8], slot: u64) -> Option<(u64, SeatHeader)> {
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let (sequence, rest) = rest.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (found, rest) = rest.split_first_chunk::<4>()?;
    let sequence = u64::from_le_bytes(*sequence);
    let length = u32::from_le_bytes(*length);
    if u64::from_le_bytes(*magic) != MAGIC || sequence % 2 != slot || length as usize > MAX_FILE_BYTES {
        return None;
    }
    let body = rest.get(..length as usize)?;
    if checksum(sequence, length, body) != u32::from_le_bytes(*found) {
        return None;
    }
    Some((sequence, SeatHeader::from_file(body).ok()?))
}

#[cfg(test)]
mod tests {
    use ftvm_protocol::identity::{ArbiterUid, SeatId};

    use super::*;
    fn temporary_file() -> File {
        let fd = rustix::fs::memfd_create("header", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        File::from(fd)
    }

    fn header(term: u64) -> SeatHeader {
        let mut header = SeatHeader::genesis(SeatId(1), ArbiterUid(2));
        header.term = term;
        header
    }

    fn stored(file: &File) -> StoredHeader {
        HeaderFile::open(file.try_clone().unwrap()).unwrap().1
    }

    #[test]
    fn empty_then_written_then_overwritten() {
        let file = temporary_file();
        let (mut on_disk, found) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(found, StoredHeader::Absent);
        for term in 1..6 {
            on_disk.write(&header(term)).unwrap();
            assert_eq!(stored(&file), StoredHeader::Found(header(term)));
        }
    }

    #[test]
    fn a_write_cut_off_at_any_byte_leaves_the_header_before() {
        let file = temporary_file();
        let (mut on_disk, _) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
        on_disk.write(&header(1)).unwrap();
        on_disk.write(&header(2)).unwrap();
        let mut before = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut before, 0).unwrap();
        on_disk.write(&header(3)).unwrap();
        let mut after = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut after, 0).unwrap();
        let changed: Vec<usize> = (0..before.len()).filter(|&at| before[at] != after[at]).collect();
        for cut in &changed[..changed.len() - 1] {
            let mut torn = before.clone();
            torn[..=*cut].copy_from_slice(&after[..=*cut]);
            file.write_all_at(&torn, 0).unwrap();
            assert_eq!(stored(&file), StoredHeader::Found(header(2)), "cut at {cut}");
        }
    }

    #[test]
    fn bytes_that_are_no_header_are_damage_not_absence() {
        let file = temporary_file();
        file.write_all_at(&[7; 300], 0).unwrap();
        assert_eq!(stored(&file), StoredHeader::Damaged);
    }
}
