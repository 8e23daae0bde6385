//! Bytes of the journal. Little endian.

use ftvm_protocol::identity::{Incarnation, SeatId, SessionId};

use crate::replication::changed::Stream;

/// At the start of a half; a sector of its own, so that it is written whole or not at all.
pub(super) const HALF_HEADER_BYTES: usize = 512;
/// Before a record's data: magic u32, kind u8, 0 u8, disk u16, generation u64, epoch u64, offset u64, length u64,
/// sequence u32, CRC-32 of all that and the data.
pub(super) const RECORD_HEADER_BYTES: usize = 48;

const HALF_MAGIC: [u8; 8] = *b"FTVMJRN1";
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"JREC");

/// Whose changes a history has, and of which volumes. Since it began nobody else has changed them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    /// The stream that the records are of.
    pub stream: Stream,
    /// The volumes' identity.
    pub volumes: u128,
    /// The volumes had everything through this epoch, durably, when the history began; none if only records say what is there.
    pub holds: Option<u64>,
}

/// What a half belongs to. An engine that knows no origin writes zeroes there, which are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HalfHeader {
    /// Records of another generation are not this half's.
    pub generation: u64,
    /// The last epoch in the other half, if this one continues it; none begins a history, and the other half is void.
    pub follows: Option<u64>,
    /// Of the history; none if the volumes may be anything.
    pub origin: Option<Origin>,
}

impl HalfHeader {
    pub fn encode(&self) -> [u8; HALF_HEADER_BYTES] {
        let mut bytes = [0; HALF_HEADER_BYTES];
        bytes[0..8].copy_from_slice(&HALF_MAGIC);
        bytes[8..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.follows.unwrap_or(0).to_le_bytes());
        bytes[24] = u8::from(self.follows.is_some());
        if let Some(origin) = self.origin {
            let Stream { leader, session } = origin.stream;
            bytes[25] = 1;
            bytes[26] = u8::from(origin.holds.is_some());
            bytes[32..48].copy_from_slice(&leader.seat.0.to_le_bytes());
            bytes[48..56].copy_from_slice(&leader.start.to_le_bytes());
            bytes[56..64].copy_from_slice(&session.0.to_le_bytes());
            bytes[64..80].copy_from_slice(&origin.volumes.to_le_bytes());
            bytes[80..88].copy_from_slice(&origin.holds.unwrap_or(0).to_le_bytes());
        }
        let checksum = crc32fast::hash(&bytes[..HALF_HEADER_BYTES - 4]);
        bytes[HALF_HEADER_BYTES - 4..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// `None` if it is not whole: a new file, or torn.
    pub fn decode(bytes: &[u8; HALF_HEADER_BYTES]) -> Option<Self> {
        let (body, checksum) = bytes.split_last_chunk::<4>()?;
        if body[0..8] != HALF_MAGIC || crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
            return None;
        }
        let u128_at = |at| u128::from(u64_at(body, at)) | (u128::from(u64_at(body, at + 8)) << 64);
        let origin = || Origin {
            stream: Stream {
                leader: Incarnation {
                    seat: SeatId(u128_at(32)),
                    start: u64_at(body, 48),
                },
                session: SessionId(u64_at(body, 56)),
            },
            volumes: u128_at(64),
            holds: (body[26] == 1).then_some(u64_at(body, 80)),
        };
        Some(Self {
            generation: u64_at(body, 8),
            follows: (body[24] == 1).then_some(u64_at(body, 16)),
            origin: (body[25] == 1).then(origin),
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum RecordKind {
    Written = 1,
    Zeroed = 2,
    /// Ends an epoch: sequence is the number of records, offset the CRC-32 over their checksums.
    Commit = 3,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub kind: RecordKind,
    pub disk: u16,
    pub sequence: u32,
    pub generation: u64,
    pub epoch: u64,
    pub offset: u64,
    pub len: u64,
    pub checksum: u32,
}

impl Record {
    /// The header, its checksum covering `data` too.
    pub fn encode(&self, data: &[u8]) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[6..8].copy_from_slice(&self.disk.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.offset.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.len.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.sequence.to_le_bytes());
        let checksum = checksum(&bytes, data);
        bytes[44..48].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; RECORD_HEADER_BYTES]) -> Option<Self> {
        let kind = match bytes[4] {
            1 => RecordKind::Written,
            2 => RecordKind::Zeroed,
            3 => RecordKind::Commit,
            _ => return None,
        };
        let magic = u32_at(bytes, 0);
        (magic == RECORD_MAGIC).then(|| Self {
            kind,
            disk: u16::from_le_bytes([bytes[6], bytes[7]]),
            sequence: u32_at(bytes, 40),
            generation: u64_at(bytes, 8),
            epoch: u64_at(bytes, 16),
            offset: u64_at(bytes, 24),
            len: u64_at(bytes, 32),
            checksum: u32_at(bytes, 44),
        })
    }

    /// Bytes of data behind the header.
    pub fn data_len(&self) -> u64 {
        if self.kind == RecordKind::Written { self.len } else { 0 }
    }

    /// Whether header and data are what was written.
    pub fn verify(&self, header: &[u8; RECORD_HEADER_BYTES], data: &[u8]) -> bool {
        checksum(header, data) == self.checksum
    }
}

fn checksum(header: &[u8; RECORD_HEADER_BYTES], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..RECORD_HEADER_BYTES - 4]);
    hasher.update(data);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}
