//! The seat header in a file that is never renamed.
//!
//! A jailed engine has the header file as a descriptor and no folder to rename in. So the file holds the header twice, and a
//! write overwrites one copy, fsyncs, overwrites the other, fsyncs. At any moment at least one copy is whole:
//!
//! ```text
//!   0      8        4096     4104      8192
//!   │ count │ header │ count  │ header │        count: u64 little-endian, plus one at every write
//! ```
//!
//! A crash within a write leaves one torn copy, and the other is the header as it was or as it is to be; both are right,
//! for the write was not yet reported. Two whole copies with different counts mean the same. Two damaged copies are a
//! damaged header, and a person decides (rule 8).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ftvm_protocol::core::StoredHeader;
use ftvm_protocol::header::{HeaderError, MAX_FILE_BYTES, SeatHeader};

/// Bytes of one copy, with its count in front.
const COPY_BYTES: usize = MAX_FILE_BYTES;
const COUNT_BYTES: usize = 8;

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
}

impl HeaderFile {
    /// Reads the file; an empty one has no header yet.
    pub fn open(file: File) -> Result<(HeaderFile, StoredHeader), HeaderFileError> {
        let (count, stored) = read(&file)?;
        Ok((HeaderFile { file, count }, stored))
    }

    /// Writes durably: when this returns, a reader finds this header and no other.
    pub fn write(&mut self, header: &SeatHeader) -> Result<(), HeaderFileError> {
        let bytes = header.to_file().map_err(HeaderFileError::Encode)?;
        if bytes.len() > COPY_BYTES - COUNT_BYTES {
            return Err(HeaderFileError::TooLarge(bytes.len()));
        }
        // Counted even if it fails: the torn copy may be whole on disk after all.
        self.count += 1;
        let mut copy = vec![0u8; COPY_BYTES];
        copy[..COUNT_BYTES].copy_from_slice(&self.count.to_le_bytes());
        copy[COUNT_BYTES..COUNT_BYTES + bytes.len()].copy_from_slice(&bytes);
        // Not the one that alone may be whole.
        let first = u64::from(whole(&self.file, 0)?.is_some() && whole(&self.file, 1)?.is_none());
        for index in [first, 1 - first] {
            let offset = index * COPY_BYTES as u64;
            let io = |what| move |source| HeaderFileError::Io { what, source };
            self.file.write_all_at(&copy, offset).map_err(io("writing"))?;
            self.file.sync_all().map_err(io("fsync"))?;
        }
        Ok(())
    }
}

/// Reads a header file without changing it: for the daemon, which answers other seats (rule 8).
pub fn read_header(file: &File) -> Result<StoredHeader, HeaderFileError> {
    read(file).map(|(_, stored)| stored)
}

fn read(file: &File) -> Result<(u64, StoredHeader), HeaderFileError> {
    let length = file
        .metadata()
        .map_err(|source| HeaderFileError::Io { what: "fstat", source })?
        .len();
    if length == 0 {
        return Ok((0, StoredHeader::Absent));
    }
    let copies = [whole(file, 0)?, whole(file, 1)?];
    // The first write of all was torn before its first copy was whole, so there never was a header.
    if length <= COPY_BYTES as u64 && copies[0].is_none() {
        return Ok((0, StoredHeader::Absent));
    }
    let newest = copies.into_iter().flatten().max_by_key(|(count, _)| *count);
    Ok(newest.map_or((0, StoredHeader::Damaged), |(count, header)| {
        (count, StoredHeader::Found(header))
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
    let Some((count, rest)) = copy[..filled].split_first_chunk::<COUNT_BYTES>() else {
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

    #[test]
    fn a_write_torn_anywhere_leaves_the_old_or_the_new() {
        let contents = |file: &File| {
            let mut bytes = vec![0; 2 * COPY_BYTES];
            let length = file.read_at(&mut bytes, 0).unwrap();
            bytes.truncate(length);
            bytes
        };
        let file = memory_file();
        let (mut header_file, _) = HeaderFile::open(file.try_clone().unwrap()).unwrap();
        header_file.write(&header(1)).unwrap();
        let old = contents(&file);
        header_file.write(&header(2)).unwrap();
        let new = contents(&file);
        // The second copy may be torn only after the first is complete, and the other way round.
        for torn in (0..=COPY_BYTES).step_by(13).chain([COPY_BYTES]) {
            for second in [false, true] {
                let mut disk = if second { new.clone() } else { old.clone() };
                let (start, source) = if second { (COPY_BYTES, &old) } else { (0, &new) };
                disk[start..start + torn].copy_from_slice(&source[start..start + torn]);
                let crashed = memory_file();
                crashed.write_all_at(&disk, 0).unwrap();
                let stored = read_header(&crashed).unwrap();
                let whole = [header(1), header(2)].map(StoredHeader::Found);
                assert!(whole.contains(&stored), "torn at {torn} of copy {second}: {stored:?}");
                // And it can be written again without ever losing both.
                let (mut again, _) = HeaderFile::open(crashed.try_clone().unwrap()).unwrap();
                again.write(&header(3)).unwrap();
                assert_eq!(read_header(&crashed).unwrap(), StoredHeader::Found(header(3)));
            }
        }
    }

    #[test]
    fn damage_to_both_copies_is_told() {
        let file = memory_file();
        HeaderFile::open(file.try_clone().unwrap())
            .unwrap()
            .0
            .write(&header(1))
            .unwrap();
        file.write_all_at(&[0xff], 25).unwrap();
        assert_eq!(read_header(&file).unwrap(), StoredHeader::Found(header(1)));
        file.write_all_at(&[0xff], COPY_BYTES as u64 + 25).unwrap();
        assert_eq!(read_header(&file).unwrap(), StoredHeader::Damaged);
        let first_write_torn = memory_file();
        first_write_torn.write_all_at(b"FTVM", 0).unwrap();
        assert_eq!(read_header(&first_write_torn).unwrap(), StoredHeader::Absent);
    }
}
