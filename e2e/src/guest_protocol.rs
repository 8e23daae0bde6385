//! The embedded guest's request protocol, for both ends.
//!
//! The guest (`e2e/guests/embedded`) compiles this very file, so it uses `core` only. The description for readers is
//! `e2e/guests/embedded/PROTOCOL.md`. All numbers are little endian.
//!
//! A request is [`REQUEST_BYTES`] long, an answer [`ANSWER_BYTES`]. A [`Op::Sink`] request is followed by `arg` bytes of
//! payload, a [`Op::Bulk`] answer by `arg` bytes of [`bulk_word`] data, an [`Op::Block`] answer by a report. Requests may be pipelined; the answers of one
//! connection come in the order of its requests.

use core::fmt;

/// TCP port on which the guest listens unless its command line says otherwise.
pub const DEFAULT_PORT: u16 = 7777;
/// First word of a request, the bytes `FTRQ`.
pub const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"FTRQ");
/// First word of an answer, the bytes `FTAN`.
pub const ANSWER_MAGIC: u32 = u32::from_le_bytes(*b"FTAN");
/// Size of an encoded request without the payload of [`Op::Sink`].
pub const REQUEST_BYTES: usize = 32;
/// Size of an encoded answer without the data of [`Op::Bulk`].
pub const ANSWER_BYTES: usize = 80;
/// Largest payload of [`Op::Bulk`] and [`Op::Sink`], in bytes.
pub const MAX_PAYLOAD_BYTES: u64 = 64 << 20;
/// Set in an answer's op when the guest refused the request: unknown op, or an argument out of range.
pub const REFUSED: u32 = 1 << 31;
/// Set in [`Op::SetChurn`]'s `arg2` to write one word of a page instead of the whole page.
pub const CHURN_WORD_ONLY: u64 = 1 << 63;

/// Most network cards on which the guest answers.
pub const MAX_CARDS: usize = 8;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Op {
    /// Adds one to the count and links the request's `seq` into the chain, see [`next_chain`].
    Increment = 1,
    /// Changes nothing.
    Status = 2,
    /// Increments, appends a record to the journal on disk, and answers when the record is durable.
    Journal = 3,
    /// Memory churn: `arg` pages in all (0 stops), `arg2` pages per second and vCPU (0: as fast as it can), optionally
    /// with [`CHURN_WORD_ONLY`].
    SetChurn = 4,
    /// Checks every page of the churn region and reads the whole journal back from the disk. Errors are in the answer.
    Verify = 5,
    /// The answer is followed by `arg` bytes of data that depend on `seq` and the offset only, see [`bulk_word`].
    Bulk = 6,
    /// The request is followed by `arg` bytes; the answer's `chain` is their [`Checksum`].
    Sink = 7,
    /// `arg` 1 starts and 0 stops a CPU-bound loop on every vCPU. Its progress is the answer's `work`.
    SetWork = 8,
    /// Resets the machine; no answer.
    Reset = 9,
    /// Powers the machine off by ACPI (S5); no answer.
    PowerOff = 10,
    /// Negative control: flips one bit of page `arg` of the churn region, so that a check must report it.
    Damage = 11,
    /// A load on the first disk; arguments, and the report that follows the answer, are those of `guest_blocks.rs`.
    Block = 12,
}

impl Op {
    /// The op with this number, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Increment,
            2 => Self::Status,
            3 => Self::Journal,
            4 => Self::SetChurn,
            5 => Self::Verify,
            6 => Self::Bulk,
            7 => Self::Sink,
            8 => Self::SetWork,
            9 => Self::Reset,
            10 => Self::PowerOff,
            11 => Self::Damage,
            12 => Self::Block,
            _ => return None,
        })
    }
}

/// One request, as it is on the wire but for the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// An [`Op`] as a number; kept raw so that unknown ones can be sent and refused.
    pub op: u32,
    /// Chosen by the client; comes back in the answer, and enters the chain.
    pub seq: u64,
    /// Meaning depends on `op`.
    pub arg: u64,
    /// Meaning depends on `op`.
    pub arg2: u64,
}

impl Request {
    /// A request with arguments; most ops ignore them.
    pub fn new(op: Op, seq: u64, arg: u64, arg2: u64) -> Self {
        Self {
            op: op as u32,
            seq,
            arg,
            arg2,
        }
    }

    /// The request's bytes.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.op.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.arg.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.arg2.to_le_bytes());
        bytes
    }

    /// Reads a request; refuses any other magic.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, ProtocolError> {
        let magic = u32_at(bytes, 0);
        if magic != REQUEST_MAGIC {
            return Err(ProtocolError::RequestMagic { found: magic });
        }
        Ok(Self {
            op: u32_at(bytes, 4),
            seq: u64_at(bytes, 8),
            arg: u64_at(bytes, 16),
            arg2: u64_at(bytes, 24),
        })
    }
}

/// One answer: the guest's state right after the request, as it is on the wire but for the magic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The request's op, with [`REFUSED`] set if nothing was done.
    pub op: u32,
    /// The request's `seq`.
    pub seq: u64,
    /// Increments applied by this network card's requests since the disk's first boot. Kept in RAM; a start takes it up from the last
    /// journal record.
    pub count: u64,
    /// Hash over every increment of this card, see [`next_chain`]; for [`Op::Sink`] the checksum of its payload.
    pub chain: u64,
    /// Monotonic time since this boot.
    pub guest_time_ns: u64,
    /// Number of the last durable journal record.
    pub journal_seq: u64,
    /// Starts of a guest on this disk, this one included; 0 without a disk.
    pub boots: u32,
    /// Faulty pages found since this boot.
    pub memory_errors: u32,
    /// Faulty or missing journal records, and failed disk requests, found since this boot (its start included).
    pub journal_errors: u32,
    /// vCPUs that run.
    pub vcpus: u32,
    /// Pages dirtied by the churn since this boot, all vCPUs.
    pub churned_pages: u64,
    /// Units of CPU-bound work done since this boot, all vCPUs.
    pub work: u64,
}

impl Answer {
    /// Whether the guest refused the request.
    pub fn refused(&self) -> bool {
        self.op & REFUSED != 0
    }

    /// The answer's bytes.
    pub fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[0..4].copy_from_slice(&ANSWER_MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.op.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.count.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.chain.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.guest_time_ns.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.journal_seq.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.boots.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.memory_errors.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.journal_errors.to_le_bytes());
        bytes[60..64].copy_from_slice(&self.vcpus.to_le_bytes());
        bytes[64..72].copy_from_slice(&self.churned_pages.to_le_bytes());
        bytes[72..80].copy_from_slice(&self.work.to_le_bytes());
        bytes
    }

    /// Reads an answer; refuses any other magic.
    pub fn decode(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, ProtocolError> {
        let magic = u32_at(bytes, 0);
        if magic != ANSWER_MAGIC {
            return Err(ProtocolError::AnswerMagic { found: magic });
        }
        Ok(Self {
            op: u32_at(bytes, 4),
            seq: u64_at(bytes, 8),
            count: u64_at(bytes, 16),
            chain: u64_at(bytes, 24),
            guest_time_ns: u64_at(bytes, 32),
            journal_seq: u64_at(bytes, 40),
            boots: u32_at(bytes, 48),
            memory_errors: u32_at(bytes, 52),
            journal_errors: u32_at(bytes, 56),
            vcpus: u32_at(bytes, 60),
            churned_pages: u64_at(bytes, 64),
            work: u64_at(bytes, 72),
        })
    }
}

/// Why bytes are neither a request nor an answer. (Written out by hand: the guest has no `std` and few dependencies.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// A request starts with something else.
    RequestMagic {
        /// What was there.
        found: u32,
    },
    /// An answer starts with something else.
    AnswerMagic {
        /// What was there.
        found: u32,
    },
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, found, expected) = match self {
            Self::RequestMagic { found } => ("request", found, REQUEST_MAGIC),
            Self::AnswerMagic { found } => ("answer", found, ANSWER_MAGIC),
        };
        write!(
            f,
            "{what} starts with {found:#010x} instead of {expected:#010x}: the byte stream is out of step"
        )
    }
}

impl core::error::Error for ProtocolError {}

/// The chain after an increment by request `seq` that made the count `count`. It starts as 0 on a new disk.
pub fn next_chain(chain: u64, seq: u64, count: u64) -> u64 {
    (chain ^ seq.wrapping_mul(0x9E37_79B9_7F4A_7C15))
        .rotate_left(17)
        .wrapping_add(count)
}

/// The 64-bit word number `index` (byte offset divided by eight) of the data that a [`Op::Bulk`] request `seq` gets.
/// (SplitMix64's output function over a counter.)
pub fn bulk_word(seq: u64, index: u64) -> u64 {
    let mut z = seq
        .rotate_left(32)
        .wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Fills `buffer` with the bulk data of `seq` from byte `offset` on.
pub fn fill_bulk(seq: u64, offset: u64, buffer: &mut [u8]) {
    let mut done = 0;
    while done < buffer.len() {
        let at = offset + done as u64;
        let skip = (at % 8) as usize;
        let word = bulk_word(seq, at / 8).to_le_bytes();
        let part = (8 - skip).min(buffer.len() - done);
        buffer[done..done + part].copy_from_slice(&word[skip..skip + part]);
        done += part;
    }
}

/// A 64-bit checksum of a byte stream, independent of how the stream was cut into pieces. It finds accidents, not
/// forgeries: words of eight bytes are mixed in one after the other, the last one padded with zeroes, then the length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    state: u64,
    length_bytes: u64,
    tail: [u8; 8],
}

impl Default for Checksum {
    fn default() -> Self {
        Self {
            state: 0x4654_564D_4755_4553,
            length_bytes: 0,
            tail: [0; 8],
        }
    }
}

impl Checksum {
    /// The checksum of one piece.
    pub fn of(bytes: &[u8]) -> u64 {
        let mut sum = Self::default();
        sum.update(bytes);
        sum.finish()
    }

    /// Takes the next piece of the stream.
    pub fn update(&mut self, mut bytes: &[u8]) {
        let held = (self.length_bytes % 8) as usize;
        self.length_bytes += bytes.len() as u64;
        if held > 0 {
            let part = bytes.len().min(8 - held);
            self.tail[held..held + part].copy_from_slice(&bytes[..part]);
            bytes = &bytes[part..];
            if held + part < 8 {
                return;
            }
            self.state = mix(self.state, u64::from_le_bytes(self.tail));
        }
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.state = mix(self.state, u64::from_le_bytes(*word));
        }
        self.tail = [0; 8];
        self.tail[..rest.len()].copy_from_slice(rest);
    }

    /// The checksum of everything taken so far.
    pub fn finish(&self) -> u64 {
        let state = if !self.length_bytes.is_multiple_of(8) {
            mix(self.state, u64::from_le_bytes(self.tail))
        } else {
            self.state
        };
        let end = mix(state, self.length_bytes);
        end ^ (end >> 29)
    }
}

fn mix(state: u64, word: u64) -> u64 {
    (state ^ word).wrapping_mul(0x9FB2_1C65_1E98_DF25).rotate_left(29)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_survive_the_wire() {
        let request = Request::new(Op::SetChurn, 0x0102_0304_0506_0708, u64::MAX, CHURN_WORD_ONLY | 7);
        assert_eq!(Request::decode(&request.encode()), Ok(request));
        let answer = Answer {
            op: 3,
            seq: 4,
            count: 5,
            chain: 6,
            guest_time_ns: 7,
            journal_seq: 8,
            boots: 9,
            memory_errors: 10,
            journal_errors: 11,
            vcpus: 12,
            churned_pages: 13,
            work: 14,
        };
        assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let request = Request::new(Op::Increment, 0x1122, 0, 0).encode();
        assert_eq!(&request[..10], b"FTRQ\x01\0\0\0\x22\x11");
        let answer = Answer {
            work: 0x5566,
            vcpus: 2,
            ..Answer::default()
        }
        .encode();
        assert_eq!(&answer[..4], b"FTAN");
        assert_eq!((answer[60], answer[72], answer[73]), (2, 0x66, 0x55));
    }

    #[test]
    fn a_stream_out_of_step_is_refused() {
        let mut request = Request::new(Op::Status, 1, 0, 0).encode();
        request[3] ^= 1;
        assert!(matches!(
            Request::decode(&request),
            Err(ProtocolError::RequestMagic { .. })
        ));
        assert!(matches!(
            Answer::decode(&[0; ANSWER_BYTES]),
            Err(ProtocolError::AnswerMagic { found: 0 })
        ));
    }

    #[test]
    fn every_op_number_reads_back() {
        let known: Vec<u32> = (0..32)
            .filter(|&n| Op::from_u32(n).is_some_and(|op| op as u32 == n))
            .collect();
        assert_eq!(known, (1..=12).collect::<Vec<_>>());
    }

    #[test]
    fn checksums_ignore_the_cuts_and_notice_changes() {
        let mut data = [0u8; 1000];
        fill_bulk(42, 3, &mut data);
        let whole = Checksum::of(&data);
        for piece in [1, 3, 7, 8, 9, 64, 999] {
            let mut sum = Checksum::default();
            data.chunks(piece).for_each(|chunk| sum.update(chunk));
            assert_eq!(sum.finish(), whole, "pieces of {piece}");
        }
        for bit in 0..data.len() * 8 {
            data[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(Checksum::of(&data), whole, "bit {bit}");
            data[bit / 8] ^= 1 << (bit % 8);
        }
        assert_ne!(Checksum::of(b"ab"), Checksum::of(b"ab\0"));
    }

    #[test]
    fn bulk_data_depends_on_the_offset_alone() {
        let mut whole = [0u8; 256];
        fill_bulk(7, 0, &mut whole);
        for start in 0..64 {
            let mut part = [0u8; 100];
            fill_bulk(7, start, &mut part);
            assert_eq!(part, whole[start as usize..start as usize + 100]);
        }
        let mut other = [0u8; 256];
        fill_bulk(8, 0, &mut other);
        assert_ne!(whole, other);
    }
}
