//! The seat header in a file that is never renamed.
//!
//! A jailed engine has the header file as a descriptor and no folder to rename in. So the file holds the header twice:
//!
//! ```text
//!   0       8        4092    4096    4104     8188    8192
//!   │ count │ header │ crc32 │ count │ header │ crc32 │       count: u64 little-endian, plus one at every write
//! ```
//!
//! The checksum is over everything before it in its copy, so a new count never stands with an old header.
//!
//! A write overwrites the copy that is not the newest and makes it durable ([`HeaderFile::write`]): with that it is done,
//! and the newest whole copy is the header. Then, while nobody waits, the other copy follows ([`HeaderFile::complete`]), so
//! that damage to one copy later takes nothing back.
//!
//! Invariant: a copy is overwritten only while the other one is whole *and durable*. So a crash at any byte leaves the
//! header as it was or as it is to be; both are right, for the write was not yet reported. What an engine before this one
//! left in the page cache is made durable when the file is opened.
//!
//! The file keeps its length from the first write on: later writes change neither its size nor its blocks, so fdatasync
//! needs no transaction of the file system's journal, and lasts as long as the device needs.
//!
//! Two damaged copies are a damaged header, and a person decides (rule 8).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ftvm_protocol::core::StoredHeader;
use ftvm_protocol::header::{HeaderError, MAX_FILE_BYTES, SeatHeader};

/// Bytes of one copy, with its count in front.
const COPY_BYTES: usize = MAX_FILE_BYTES;
const COUNT_BYTES: usize = 8;
const CHECKSUM_BYTES: usize = 4;

/// Errors of the header file.
#[derive(Debug, thiserror::Error)]
pub enum HeaderFileError {
    /// The system refused.
    #[error("seat header: {what} failed; check the file system under the seat's folder")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The header does not encode.
    #[error("seat header does not encode")]
    Encode(#[source] HeaderError),
    /// The header does not fit into its copy.
    #[error("seat header of {0} bytes is too large")]
    TooLarge(usize),
}

/// A seat's header file, opened for reading and writing.
#[derive(Debug)]
pub struct HeaderFile {
    file: File,
    count: u64,
    /// The copy that is whole and durable and has the newest header; the next write goes to the other one.
    newest: usize,
    /// The header that the other copy lacks.
    lacking: Option<Vec<u8>>,
}

impl HeaderFile {
    /// Reads the file; an empty one has no header yet.
    pub fn open(file: File) -> Result<(HeaderFile, StoredHeader), HeaderFileError> {
        sync(&file)?;
        let (newest, stored) = read(&file)?;
        let (newest, count) = newest.unwrap_or((1, 0));
        let header_file = HeaderFile {
            file,
            count,
            newest,
            lacking: None,
        };
        Ok((header_file, stored))
    }

    /// Writes durably: when this returns, a reader finds this header and no other.
    pub fn write(&mut self, header: &SeatHeader) -> Result<(), HeaderFileError> {
        let bytes = header.to_file().map_err(HeaderFileError::Encode)?;
        if bytes.len() > COPY_BYTES - COUNT_BYTES - CHECKSUM_BYTES {
            return Err(HeaderFileError::TooLarge(bytes.len()));
        }
        // Counted even if it fails: the torn copy may be whole on disk after all.
        self.count += 1;
        let mut copy = vec![0u8; COPY_BYTES];
        copy[..COUNT_BYTES].copy_from_slice(&self.count.to_le_bytes());
        copy[COUNT_BYTES..COUNT_BYTES + bytes.len()].copy_from_slice(&bytes);
        let (body, checksum) = copy.split_at_mut(COPY_BYTES - CHECKSUM_BYTES);
        checksum.copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        let into = 1 - self.newest;
        self.lacking = None;
        self.write_copy(into, &copy)?;
        self.newest = into;
        self.lacking = Some(copy);
        Ok(())
    }

    /// Writes the last header to the copy that lacks it. An error takes nothing back; the next write tries again.
    pub fn complete(&mut self) -> Result<(), HeaderFileError> {
        match self.lacking.take() {
            Some(copy) => self.write_copy(1 - self.newest, &copy),
            None => Ok(()),
        }
    }

    fn write_copy(&self, index: usize, copy: &[u8]) -> Result<(), HeaderFileError> {
        let offset = (index * COPY_BYTES) as u64;
        self.file
            .write_all_at(copy, offset)
            .map_err(|source| HeaderFileError::Io {
                what: "writing",
                source,
            })?;
        sync(&self.file)
    }
}

fn sync(file: &File) -> Result<(), HeaderFileError> {
    let what = "fdatasync";
    file.sync_data().map_err(|source| HeaderFileError::Io { what, source })
}

/// Reads a header file without changing it: for the daemon, which answers other seats (rule 8).
pub fn read_header(file: &File) -> Result<StoredHeader, HeaderFileError> {
    read(file).map(|(_, stored)| stored)
}

/// The newest copy (index and count), and what the file says.
fn read(file: &File) -> Result<(Option<(usize, u64)>, StoredHeader), HeaderFileError> {
    let length = file
        .metadata()
        .map_err(|source| HeaderFileError::Io { what: "fstat", source })?
        .len();
    if length == 0 {
        return Ok((None, StoredHeader::Absent));
    }
    let copies = [whole(file, 0)?, whole(file, 1)?];
    // The first write of all was torn before its copy was whole, so there never was a header.
    if length <= COPY_BYTES as u64 && copies[0].is_none() {
        return Ok((None, StoredHeader::Absent));
    }
    let found = copies
        .into_iter()
        .enumerate()
        .filter_map(|(index, copy)| copy.map(|(count, header)| (index, count, header)));
    let newest = found.max_by_key(|(_, count, _)| *count);
    Ok(newest.map_or((None, StoredHeader::Damaged), |(index, count, header)| {
        (Some((index, count)), StoredHeader::Found(header))
    }))
}

/// The copy at this index, if it is whole.
fn whole(file: &File, index: u64) -> Result<Option<(u64, SeatHeader)>, HeaderFileError> {
    let mut copy = [0u8; COPY_BYTES];
    let mut filled = 0;
    while filled < copy.len() {
        let offset = index * COPY_BYTES as u64 + filled as u64;
        match file.read_at(&mut copy[filled..], offset) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(HeaderFileError::Io {
                    what: "reading",
                    source,
                });
            }
        }
    }
    if filled < COPY_BYTES {
        return Ok(None);
    }
    let (body, checksum) = copy.split_at(COPY_BYTES - CHECKSUM_BYTES);
    if crc32fast::hash(body).to_le_bytes() != checksum {
        return Ok(None);
    }
    let Some((count, rest)) = body.split_first_chunk::<COUNT_BYTES>() else {
        return Ok(None);
    };
    // The header says its own length (magic, length, checksum, body); zeros follow it up to the end of the copy.
    let Some(length) = rest
        .get(8..12)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u32::from_le_bytes)
    else {
        return Ok(None);
    };
    let Some(header) = rest.get(..16usize.saturating_add(length as usize)) else {
        return Ok(None);
    };
    Ok(SeatHeader::from_file(header)
        .ok()
        .map(|header| (u64::from_le_bytes(*count), header)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ftvm_protocol::identity::{ArbiterUid, SeatId};

    fn header(term: u64) -> SeatHeader {
        SeatHeader {
            term,
            ..SeatHeader::genesis(SeatId(7), ArbiterUid(9))
        }
    }

    fn memory_file() -> File {
        rustix::fs::memfd_create("header", rustix::fs::MemfdFlags::CLOEXEC)
            .unwrap()
            .into()
    }

    #[test]
    fn what_was_written_is_found() {
        let file = memory_file();
        let (mut header_file, stored) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(stored, StoredHeader::Absent);
        for term in 1..5 {
            header_file.write(&header(term)).unwrap();
            assert_eq!(read_header(&file).unwrap(), StoredHeader::Found(header(term)));
            if term % 2 == 0 {
                header_file.complete().unwrap();
            }
        }
        let (mut again, stored) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(stored, StoredHeader::Found(header(4)));
        again.write(&header(3)).unwrap();
        assert_eq!(
            read_header(&file).unwrap(),
            StoredHeader::Found(header(3)),
            "newest by count, not by term"
        );
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; 2 * COPY_BYTES];
        let length = file.read_at(&mut bytes, 0).unwrap();
        bytes.truncate(length);
        bytes
    }

    fn file_of(contents: &[u8]) -> File {
        let file = memory_file();
        file.write_all_at(contents, 0).unwrap();
        file
    }

    /// What a power cut may leave of a step that changed `old` to `new`: any first part of what it wrote, up to all of it.
    fn torn<'a>(old: &'a [u8], new: &'a [u8], step: usize) -> impl Iterator<Item = Vec<u8>> + 'a {
        let first = old
            .iter()
            .zip(new)
            .position(|(old, new)| old != new)
            .unwrap_or(old.len());
        let steps = (first..new.len()).step_by(step).chain([new.len()]);
        steps.map(move |reached| [&new[..reached], old.get(reached..).unwrap_or_default()].concat())
    }

    /// The file after one header, after the write of the next, and after that one was completed.
    fn three_states() -> [Vec<u8>; 3] {
        let file = memory_file();
        let (mut header_file, _) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
        header_file.write(&header(1)).unwrap();
        header_file.complete().unwrap();
        let first = contents(&file);
        header_file.write(&header(2)).unwrap();
        let written = contents(&file);
        header_file.complete().unwrap();
        [first, written, contents(&file)]
    }

    #[test]
    fn a_write_torn_anywhere_leaves_the_old_or_the_new() {
        let [first, written, completed] = three_states();
        assert_eq!(
            read_header(&file_of(&written)).unwrap(),
            StoredHeader::Found(header(2)),
            "one copy is enough"
        );
        for disk in torn(&first, &written, 13) {
            let stored = read_header(&file_of(&disk)).unwrap();
            let whole = [header(1), header(2)].map(StoredHeader::Found);
            assert!(whole.contains(&stored), "{stored:?}");
        }
        for disk in torn(&written, &completed, 13) {
            assert_eq!(
                read_header(&file_of(&disk)).unwrap(),
                StoredHeader::Found(header(2)),
                "it was reported before the second copy was begun"
            );
        }
    }

    /// A second power cut within the first write after a first one never meets the only whole copy.
    #[test]
    fn a_write_after_a_torn_one_spares_the_copy_that_is_whole() {
        let [first, written, completed] = three_states();
        for disk in torn(&first, &written, 131).chain(torn(&written, &completed, 131)) {
            let before = read_header(&file_of(&disk)).unwrap();
            let file = file_of(&disk);
            let (mut again, stored) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
            assert_eq!(stored, before);
            again.write(&header(3)).unwrap();
            let after = contents(&file);
            for disk in torn(&disk, &after, 131) {
                let stored = read_header(&file_of(&disk)).unwrap();
                let right = stored == before || stored == StoredHeader::Found(header(3));
                assert!(right, "{stored:?} instead of {before:?}");
            }
            assert_eq!(read_header(&file).unwrap(), StoredHeader::Found(header(3)));
            again.complete().unwrap();
            assert_eq!(read_header(&file).unwrap(), StoredHeader::Found(header(3)));
        }
    }

    /// A write that the storage refuses is tried again in the same copy: the other one is the header until then.
    #[test]
    fn a_refused_write_leaves_the_whole_copy_alone() {
        let file = memory_file();
        let (mut header_file, _) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
        header_file.write(&header(1)).unwrap();
        header_file.complete().unwrap();
        let read_only = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
        let writable = std::mem::replace(&mut header_file.file, read_only);
        assert!(header_file.write(&header(2)).is_err());
        assert_eq!(header_file.newest, 0);
        header_file.file = writable;
        header_file.write(&header(3)).unwrap();
        assert_eq!(read_header(&file).unwrap(), StoredHeader::Found(header(3)));
        assert_eq!(whole(&file, 0).unwrap().map(|(_, header)| header.term), Some(1));
    }

    #[test]
    fn damage_to_both_copies_is_told() {
        let file = memory_file();
        let (mut header_file, _) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
        header_file.write(&header(1)).unwrap();
        header_file.complete().unwrap();
        file.write_all_at(&[0xff], 25).unwrap();
        assert_eq!(read_header(&file).unwrap(), StoredHeader::Found(header(1)));
        file.write_all_at(&[0xff], COPY_BYTES as u64 + 25).unwrap();
        assert_eq!(read_header(&file).unwrap(), StoredHeader::Damaged);
        let first_write_torn = memory_file();
        first_write_torn.write_all_at(b"FTVM", 0).unwrap();
        assert_eq!(read_header(&first_write_torn).unwrap(), StoredHeader::Absent);
    }
}
