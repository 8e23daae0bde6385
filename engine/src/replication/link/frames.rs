//! Bytes of a stream to frames.

use crate::replication::buffers;
use ftvm_protocol::wire::{FrameHeader, HEADER_BYTES, Kind, VERSION_HELLO, WireError};

/// Room that is taken for a payload before its bytes are there; more as they come.
const FIRST_ROOM_BYTES: usize = 512 * 1024;

/// A frame whose length and checksum were verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: Kind,
    /// Epoch, 0 if none.
    pub epoch: u64,
    /// Session, 0 if none.
    pub session: u64,
    /// Payload, not decoded.
    pub payload: Vec<u8>,
}

/// Collects frames from pieces of a stream of any size.
pub(super) struct Assembler {
    agreed: u16,
    header: [u8; HEADER_BYTES],
    filled: usize,
    payload: Option<(FrameHeader, Vec<u8>)>,
}

impl Assembler {
    /// For a new connection: the first frame has to be a hello.
    pub fn new() -> Self {
        Self {
            agreed: VERSION_HELLO,
            header: [0; HEADER_BYTES],
            filled: 0,
            payload: None,
        }
    }

    /// From the next frame on, only this version.
    pub fn agree(&mut self, version: u16) {
        self.agreed = version;
    }

    /// Takes bytes off the front of `bytes` until a frame is complete or none are left.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, WireError> {
        if self.payload.is_none() {
            let take = bytes.len().min(HEADER_BYTES - self.filled);
            let (now, rest) = bytes.split_at(take);
            self.header[self.filled..self.filled + take].copy_from_slice(now);
            self.filled += take;
            *bytes = rest;
            if self.filled < HEADER_BYTES {
                return Ok(None);
            }
            self.filled = 0;
            let header = FrameHeader::decode(&self.header, self.agreed)?;
            let room = (header.len as usize).min(FIRST_ROOM_BYTES);
            self.payload = Some((header, buffers::take(room)));
        }
        let Some((header, payload)) = &mut self.payload else {
            return Ok(None);
        };
        let missing = header.len as usize - payload.len();
        let (now, rest) = bytes.split_at(bytes.len().min(missing));
        payload.extend_from_slice(now);
        *bytes = rest;
        if payload.len() < header.len as usize {
            return Ok(None);
        }
        let Some((header, payload)) = self.payload.take() else {
            return Ok(None);
        };
        header.verify(&payload)?;
        Ok(Some(Frame {
            kind: header.kind,
            epoch: header.epoch,
            session: header.session,
            payload,
        }))
    }
}

#[cfg(test)]
mod tests {
    use ftvm_protocol::wire::{VERSION_MIN, encode_header};

    use super::*;
    use crate::replication::testing::Seeded;

    fn frame(kind: Kind, epoch: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = encode_header(VERSION_MIN, kind, epoch, 7, payload)
            .expect("fits")
            .to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    fn assembler() -> Assembler {
        let mut assembler = Assembler::new();
        assembler.agree(VERSION_MIN);
        assembler
    }

    #[test]
    fn pieces_of_any_size_give_the_same_frames() {
        let mut seeded = Seeded::new(1);
        let payloads: Vec<Vec<u8>> = (0..50)
            .map(|_| {
                let len = seeded.below(3000) as usize;
                seeded.bytes(len)
            })
            .collect();
        let stream: Vec<u8> = payloads
            .iter()
            .zip(1u64..)
            .flat_map(|(payload, n)| frame(Kind::EpochState, n, payload))
            .collect();
        let mut assembler = assembler();
        let mut frames = Vec::new();
        let mut rest = &stream[..];
        while !rest.is_empty() {
            let take = (1 + seeded.below(2000) as usize).min(rest.len());
            let (mut piece, after) = rest.split_at(take);
            rest = after;
            while !piece.is_empty() {
                frames.extend(assembler.take(&mut piece).expect("well formed"));
            }
        }
        assert_eq!(frames.len(), payloads.len());
        for ((frame, payload), n) in frames.iter().zip(&payloads).zip(1u64..) {
            assert_eq!((frame.epoch, frame.session, &frame.payload), (n, 7, payload));
        }
    }

    #[test]
    fn damage_is_refused_before_anything_is_delivered() {
        let good = frame(Kind::Control, 1, b"control message");
        for at in 0..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 0x10;
            let mut rest = &damaged[..];
            let taken = assembler().take(&mut rest);
            // A longer length waits for bytes that never come; everything else is refused.
            assert!(
                taken.is_err() || matches!(taken, Ok(None)) && (24..28).contains(&at),
                "byte {at}: {taken:?}"
            );
        }
    }

    #[test]
    fn oversized_frames_are_refused_by_their_header() {
        let mut header = encode_header(VERSION_MIN, Kind::Control, 0, 0, &[]).expect("fits");
        header[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        let refused = assembler().take(&mut &header[..]);
        assert!(
            matches!(refused, Err(WireError::TooLong { got: u32::MAX, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn only_a_hello_comes_first() {
        let refused = Assembler::new().take(&mut &frame(Kind::Control, 0, &[])[..]);
        assert!(
            matches!(
                refused,
                Err(WireError::Version {
                    got: VERSION_MIN,
                    agreed: VERSION_HELLO
                })
            ),
            "{refused:?}"
        );
    }
}
