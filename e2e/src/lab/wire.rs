//! What is spoken between a lab and the agent inside a node: one TCP connection a command.
//!
//! The lab sends one line of JSON, a [`Start`]. Then both sides send frames: one byte of kind, four bytes of length (little endian), and
//! as many bytes. Lab to agent: [`STDIN`], [`STDIN_END`], [`SIGNAL`]. Agent to lab: [`STDOUT`], [`STDERR`], [`STARTED`], and last either
//! [`EXIT`] or [`FAILED`]. If the connection goes away, the command's process group is killed, unless it was started detached.
use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// TCP port of the agent, on the node's management address.
pub const PORT: u16 = 9000;
/// Bytes for the command's standard input.
pub const STDIN: u8 = 0;
/// End of the standard input; no payload.
pub const STDIN_END: u8 = 1;
/// One byte: a signal number for the command's process group.
pub const SIGNAL: u8 = 2;
/// Bytes of standard output.
pub const STDOUT: u8 = 16;
/// Bytes of standard error.
pub const STDERR: u8 = 17;
/// The command runs; four bytes: its process id in the node.
pub const STARTED: u8 = 18;
/// The command ended; four bytes: its exit code, or 128 plus the signal that ended it.
pub const EXIT: u8 = 19;
/// The command could not be started; the payload says why, as UTF-8.
pub const FAILED: u8 = 20;
/// The longest payload of a frame, in bytes.
pub const MAX_FRAME: usize = 64 * 1024;
/// The longest [`Start`] line, in bytes.
pub const MAX_START: u64 = 256 * 1024;

/// A command to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Start {
    /// Program (looked up in PATH) and arguments.
    pub argv: Vec<String>,
    /// Variables added to the agent's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/` if absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Run it without the connection: output goes to this file, the agent answers [`STARTED`] and hangs up.
    #[serde(default)]
    pub detach_to: Option<String>,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is: one of the constants of this module.
    pub kind: u8,
    /// Its bytes, at most [`MAX_FRAME`].
    pub payload: Vec<u8>,
}

/// Writes one frame.
///
/// # Errors
/// Those of the writer; `InvalidInput` for a payload longer than [`MAX_FRAME`].
pub fn write_frame(to: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    if payload.len() > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a frame of {} bytes", payload.len()),
        ));
    }
    let mut bytes = Vec::with_capacity(5 + payload.len());
    bytes.push(kind);
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    to.write_all(&bytes)
}

/// Reads one frame; `None` at an end between two frames.
///
/// # Errors
/// Those of the reader; `UnexpectedEof` within a frame; `InvalidData` for a length above [`MAX_FRAME`].
pub fn read_frame(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut kind = [0];
    loop {
        match from.read(&mut kind) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes"),
        ));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some(Frame { kind: kind[0], payload }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let mut wire = Vec::new();
        write_frame(&mut wire, STDOUT, b"hello").unwrap();
        write_frame(&mut wire, EXIT, &7i32.to_le_bytes()).unwrap();
        let mut reader = wire.as_slice();
        assert_eq!(
            read_frame(&mut reader).unwrap(),
            Some(Frame {
                kind: STDOUT,
                payload: b"hello".to_vec()
            })
        );
        assert_eq!(read_frame(&mut reader).unwrap().unwrap().payload, 7i32.to_le_bytes());
        assert_eq!(read_frame(&mut reader).unwrap(), None);
    }

    #[test]
    fn a_cut_or_oversized_frame_is_an_error() {
        let mut wire = Vec::new();
        write_frame(&mut wire, STDOUT, b"hello").unwrap();
        assert_eq!(
            read_frame(&mut &wire[..7]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        let mut long = vec![STDOUT];
        long.extend_from_slice(&(MAX_FRAME as u32 + 1).to_le_bytes());
        assert_eq!(
            read_frame(&mut long.as_slice()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert!(write_frame(&mut Vec::new(), STDOUT, &vec![0; MAX_FRAME + 1]).is_err());
    }
}
