//! What the importer, the program that touches what others wrote, says to the program that started it.
//!
//! ```text
//!   kind (1 byte) │ a (8 bytes) │ b (8 bytes) │ length (4 bytes) │ bytes
//! ```
//!
//! Numbers are little-endian. The receiver believes none of it: what it does with a frame is bounded by what it asked for.

use std::io::{self, ErrorKind, Read, Write};

/// Longest contents of a frame.
pub const BYTES_MAX: usize = 1 << 20;

/// One message.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The file is compared with its digest: so many bytes of so many.
    Checked {
        /// Bytes looked at.
        done_bytes: u64,
        /// Of so many.
        total_bytes: u64,
    },
    /// A download begins at this place, and the whole has this length (0: not known). The server's ETag comes with it.
    Begins {
        /// Where it goes on.
        offset: u64,
        /// The whole.
        total_bytes: u64,
        /// The ETag, or nothing.
        etag: &'a [u8],
    },
    /// Contents. What is between two of these is zeros.
    Data {
        /// Where.
        offset: u64,
        /// What.
        bytes: &'a [u8],
    },
    /// Zeros up to here: for the progress alone.
    Zeros {
        /// Up to where.
        end: u64,
    },
    /// That was all.
    End,
    /// It can't be done. For people.
    Failed {
        /// The file is not the one that was asked for: its digest differs.
        other: bool,
        /// What, where, why.
        why: &'a [u8],
    },
}

impl Frame<'_> {
    /// Writes it.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, a, b, bytes): (u8, u64, u64, &[u8]) = match self {
            Frame::Checked {
                done_bytes,
                total_bytes,
            } => (b'C', *done_bytes, *total_bytes, &[]),
            Frame::Begins {
                offset,
                total_bytes,
                etag,
            } => (b'B', *offset, *total_bytes, etag),
            Frame::Data { offset, bytes } => (b'D', *offset, 0, bytes),
            Frame::Zeros { end } => (b'Z', *end, 0, &[]),
            Frame::End => (b'E', 0, 0, &[]),
            Frame::Failed { other, why } => (b'F', u64::from(*other), 0, why),
        };
        let bytes = &bytes[..bytes.len().min(BYTES_MAX)];
        let mut head = [0u8; 21];
        head[0] = kind;
        head[1..9].copy_from_slice(&a.to_le_bytes());
        head[9..17].copy_from_slice(&b.to_le_bytes());
        head[17..21].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        to.write_all(&head)?;
        to.write_all(bytes)
    }
}

/// Reads one; `buffer` holds its contents. None at the end.
pub fn read<'a>(from: &mut impl Read, buffer: &'a mut Vec<u8>) -> io::Result<Option<Frame<'a>>> {
    let mut head = [0u8; 21];
    match from.read_exact(&mut head) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| head[at + n]));
    let (a, b) = (number(1), number(9));
    let length = u32::from_le_bytes(std::array::from_fn(|n| head[17 + n])) as usize;
    if length > BYTES_MAX {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "a message of the importer is too long",
        ));
    }
    buffer.resize(length, 0);
    from.read_exact(buffer)?;
    Ok(Some(match head[0] {
        b'C' => Frame::Checked {
            done_bytes: a,
            total_bytes: b,
        },
        b'B' => Frame::Begins {
            offset: a,
            total_bytes: b,
            etag: buffer,
        },
        b'D' => Frame::Data {
            offset: a,
            bytes: buffer,
        },
        b'Z' => Frame::Zeros { end: a },
        b'E' => Frame::End,
        b'F' => Frame::Failed {
            other: a != 0,
            why: buffer,
        },
        _ => {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "a message of the importer of an unknown kind",
            ));
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_and_nonsense_is_an_error() {
        let frames = [
            Frame::Checked {
                done_bytes: 1,
                total_bytes: 2,
            },
            Frame::Begins {
                offset: 3,
                total_bytes: 4,
                etag: b"\"x\"",
            },
            Frame::Data {
                offset: u64::MAX,
                bytes: &[7; 5],
            },
            Frame::Zeros { end: 9 },
            Frame::End,
            Frame::Failed {
                other: true,
                why: b"because",
            },
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            frame.write(&mut wire).unwrap();
        }
        let (mut reader, mut buffer) = (wire.as_slice(), Vec::new());
        for frame in &frames {
            assert_eq!(read(&mut reader, &mut buffer).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(read(&mut reader, &mut buffer).unwrap(), None);
        let mut long = vec![b'D'; 17];
        long.extend(u32::MAX.to_le_bytes());
        assert!(read(&mut long.as_slice(), &mut buffer).is_err());
        assert!(read(&mut [b'?'; 21].as_slice(), &mut buffer).is_err());
    }
}
