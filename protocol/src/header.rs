//! The seat header: what a seat knows of itself when everything but its disk is gone.
//!
//! It is a small file next to the seat's disk. The engine writes it atomically (temporary file, fsync, rename, fsync of
//! the directory) whenever the core says so; the daemon reads it, also for other seats that ask before a cold start.
//!
//! File format, all little-endian: magic `FTVMHDR1`, u32 length of the body, u32 crc32 of the body, body (postcard).

use serde::{Deserialize, Serialize};

use crate::identity::{ArbiterUid, Incarnation, SeatId, Term};

/// First bytes of a header file.
pub const MAGIC: [u8; 8] = *b"FTVMHDR1";
/// Most bytes that a header file may have.
pub const MAX_FILE_BYTES: usize = 4096;
/// Most incarnations that a header keeps.
pub const MAX_INCARNATIONS: usize = 64;

/// What a seat keeps next to its disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatHeader {
    /// Highest term that this seat confirmed by a swap of its own, or had when its resync was completed.
    pub term: Term,
    /// The arbiter's record that this seat belongs to.
    pub uid: ArbiterUid,
    /// Incarnations under which this disk's content may be named in the record.
    pub incarnations: Vec<Incarnation>,
    /// False from the beginning of a resync until its join checkpoint is complete and durable: such a disk never boots.
    pub complete: bool,
}

/// Why a header file is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Too short, too long, or a length that does not fit.
    #[error("seat header has {got} bytes and that is not a header's size: the file is damaged")]
    Size {
        /// Bytes in the file.
        got: usize,
    },
    /// Does not begin with the magic.
    #[error("seat header does not begin with FTVMHDR1: not a header, or of another version")]
    Magic,
    /// Checksum differs.
    #[error("seat header's checksum is {found:08x}, {computed:08x} expected: the file is damaged")]
    Checksum {
        /// In the file.
        found: u32,
        /// Of the body.
        computed: u32,
    },
    /// Body does not decode.
    #[error("seat header's body is malformed though its checksum fits: written by another version")]
    Body,
    /// More incarnations than allowed.
    #[error("seat header names {0} incarnations, at most {MAX_INCARNATIONS} are kept")]
    TooMany(usize),
}

impl SeatHeader {
    /// Header of the seat that has the VM's original disk, before its first engine (goes with
    /// [`crate::record::Record::genesis`]).
    pub fn genesis(seat: SeatId, uid: ArbiterUid) -> Self {
        Self {
            term: 0,
            uid,
            incarnations: vec![Incarnation::genesis(seat)],
            complete: true,
        }
    }

    /// Does the record's set of members name this disk?
    pub fn is_named(&self, members: &crate::record::Members) -> bool {
        self.incarnations
            .iter()
            .any(|incarnation| members.contains(*incarnation))
    }

    /// The bytes of the header file.
    pub fn to_file(&self) -> Result<Vec<u8>, HeaderError> {
        if self.incarnations.len() > MAX_INCARNATIONS {
            return Err(HeaderError::TooMany(self.incarnations.len()));
        }
        let body = postcard::to_allocvec(self).map_err(|_| HeaderError::Body)?;
        let length = u32::try_from(body.len()).map_err(|_| HeaderError::Size { got: body.len() })?;
        let mut file = Vec::with_capacity(16 + body.len());
        file.extend_from_slice(&MAGIC);
        file.extend_from_slice(&length.to_le_bytes());
        file.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        file.extend_from_slice(&body);
        Ok(file)
    }

    /// From the bytes of a header file, which are not trusted.
    pub fn from_file(file: &[u8]) -> Result<Self, HeaderError> {
        let size = HeaderError::Size { got: file.len() };
        if file.len() > MAX_FILE_BYTES {
            return Err(size);
        }
        let (magic, rest) = file.split_first_chunk::<8>().ok_or(size.clone())?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or(size.clone())?;
        let (checksum, body) = rest.split_first_chunk::<4>().ok_or(size.clone())?;
        if *magic != MAGIC {
            return Err(HeaderError::Magic);
        }
        if u32::from_le_bytes(*length) as usize != body.len() {
            return Err(size);
        }
        let found = u32::from_le_bytes(*checksum);
        let computed = crc32fast::hash(body);
        if found != computed {
            return Err(HeaderError::Checksum { found, computed });
        }
        let (header, rest) = postcard::take_from_bytes::<Self>(body).map_err(|_| HeaderError::Body)?;
        if !rest.is_empty() {
            return Err(HeaderError::Body);
        }
        if header.incarnations.len() > MAX_INCARNATIONS {
            return Err(HeaderError::TooMany(header.incarnations.len()));
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> SeatHeader {
        let incarnation = |start| Incarnation { seat: SeatId(5), start };
        SeatHeader {
            term: 77,
            uid: ArbiterUid(3),
            incarnations: vec![incarnation(1), incarnation(2)],
            complete: true,
        }
    }

    #[test]
    fn round_trip() {
        assert_eq!(SeatHeader::from_file(&header().to_file().unwrap()), Ok(header()));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_found() {
        let file = header().to_file().unwrap();
        for end in 0..file.len() {
            assert!(SeatHeader::from_file(&file[..end]).is_err(), "cut at {end}");
        }
        for bit in 0..file.len() * 8 {
            let mut bad = file.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(SeatHeader::from_file(&bad).is_err(), "bit {bit}");
        }
        let mut long = file;
        long.push(0);
        assert!(SeatHeader::from_file(&long).is_err());
    }

    #[test]
    fn too_many_incarnations_are_refused_both_ways() {
        let mut big = header();
        big.incarnations = (0..MAX_INCARNATIONS as u64 + 1)
            .map(|start| Incarnation { seat: SeatId(5), start })
            .collect();
        assert_eq!(big.to_file(), Err(HeaderError::TooMany(MAX_INCARNATIONS + 1)));
    }
}
