//! `importer read`: the digest of standard input, then its contents.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use ftvm_node_daemon::disks::frame::Frame;
use ftvm_node_daemon::disks::{Backing, Read};
use ring::digest::{Context, SHA256};

use crate::Failure;
use crate::formats::{self, Behind, PIECE_BYTES, Sink};

/// Zeros are told of in blocks of this size; smaller ones are contents like others.
const BLOCK_BYTES: usize = 64 << 10;
/// To compare with.
static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
/// Bytes between two words about the digest.
const CHECKED_BYTES: u64 = 16 << 20;

/// Does it.
pub fn run(order: &str, out: &mut impl Write) -> Result<(), Failure> {
    let order: Read =
        serde_json::from_str(order).map_err(|error| Failure::new(format!("its order is malformed: {error}")))?;
    // SAFETY: standard input is open, and nobody else in this program uses it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(0) });
    let behind = take(order.backing)?;
    if let Some(digest) = &order.sha256 {
        check(&mut file, digest, out)?;
    }
    let limits = (order.from_bytes, order.limit_bytes);
    formats::read((file, behind), order.reading, limits, &mut Pieces { out })
}

/// The backing files, which are open.
fn take(backing: Vec<Backing>) -> Result<Vec<Behind>, Failure> {
    let mut taken: Vec<Behind> = Vec::new();
    for Backing { name, descriptor } in backing {
        let twice = taken.iter().any(|behind| behind.file.as_raw_fd() == descriptor);
        if descriptor <= libc::STDERR_FILENO || twice {
            return Err(Failure::new(format!(
                "its order names descriptor {descriptor} for {name}"
            )));
        }
        // SAFETY: whoever started this program left it open for this, it is taken once, and nobody else in this program uses it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
        taken.push(Behind { name, file });
    }
    Ok(taken)
}

/// Compares the whole file with its digest, before anything in it is believed.
fn check(file: &mut File, digest: &str, out: &mut impl Write) -> Result<(), Failure> {
    let total_bytes = file.metadata()?.len();
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0u8; PIECE_BYTES];
    let (mut done_bytes, mut told) = (0u64, 0u64);
    loop {
        let count = formats::fill(file, &mut buffer)?;
        if count == 0 {
            break;
        }
        context.update(&buffer[..count]);
        done_bytes += count as u64;
        if done_bytes - told >= CHECKED_BYTES {
            told = done_bytes;
            Frame::Checked {
                done_bytes,
                total_bytes,
            }
            .write(out)?;
            out.flush()?;
        }
    }
    let found: String = context
        .finish()
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if found != digest.to_ascii_lowercase() {
        return Err(Failure {
            other: true,
            why: format!("its SHA-256 is {found}, not {digest}: correct source.sha256, or put the right file there"),
        });
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(())
}

/// Contents as frames, without the zeros in them.
struct Pieces<'a, W> {
    out: &'a mut W,
}

impl<W: Write> Sink for Pieces<'_, W> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let mut at = offset;
        for block in bytes.chunks(BLOCK_BYTES) {
            let end = at + block.len() as u64;
            if *block == ZEROS[..block.len()] {
                Frame::Zeros { end }.write(self.out)?;
            } else {
                Frame::Data {
                    offset: at,
                    bytes: block,
                }
                .write(self.out)?;
            }
            at = end;
        }
        Ok(())
    }

    fn zeros(&mut self, end: u64) -> Result<(), Failure> {
        Frame::Zeros { end }.write(self.out)?;
        Ok(())
    }
}
