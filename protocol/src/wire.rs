//! Frames of the replication link.
//!
//! A frame is a fixed header of [`HEADER_BYTES`] and a payload. All numbers are little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `FTVM` |
//! | 4 | 2 | wire version |
//! | 6 | 2 | kind |
//! | 8 | 8 | epoch (0 where a kind has none) |
//! | 16 | 8 | session (0 where a kind has none) |
//! | 24 | 4 | payload bytes |
//! | 28 | 4 | crc32 (IEEE) of bytes 0..28 and the payload |
//!
//! Invariant: the length is bounded by the kind before anything is allocated, and the checksum is verified before the
//! payload is decoded. The order on a new connection is: each side sends one [`Hello`] frame, reads the peer's, agrees
//! on a version with [`negotiate`], and only then speaks in frames of that version.

use crate::identity::{Incarnation, SeatId, VmId};

/// First four bytes of a frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"FTVM");
/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 32;
/// Oldest wire version that this build speaks.
pub const VERSION_MIN: u16 = 2;
/// Newest wire version that this build speaks: at most one above [`VERSION_MIN`].
pub const VERSION_MAX: u16 = 3;
/// First version in which a follower says that it is its storage which fails ([`crate::message::SessionEnd::FollowerStorage`]).
pub const VERSION_STORAGE: u16 = 3;
/// First version in which a joiner confirms a resync by what it has written or zeroed, too, and not only by what came ([`Kind::Credit`]).
pub const VERSION_WORK: u16 = 3;
/// Version field of every [`Hello`] frame, whatever was or will be agreed on: its layout never changes.
pub const VERSION_HELLO: u16 = 0;
/// Payload bytes of a [`Hello`].
pub const HELLO_BYTES: usize = 44;

const KIB: u32 = 1024;
const MIB: u32 = 1024 * KIB;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $max:expr;)*) => {
        /// What a frame carries. Control and hello frames are this crate's; the rest is opaque to it and belongs to the
        /// engine's replication.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Kind {
            $($(#[$doc])* $name = $number,)*
        }

        impl Kind {
            /// Every kind.
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            /// From the number in a header.
            pub fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Kind::$name),)*
                    _ => None,
                }
            }

            /// First wire version that has it.
            pub fn since(self) -> u16 {
                match self {
                    Kind::Hello => VERSION_HELLO,
                    _ => VERSION_MIN,
                }
            }

            /// Most payload bytes of this kind.
            pub fn max_len(self) -> u32 {
                match self {
                    $(Kind::$name => $max,)*
                }
            }
        }
    };
}

kinds! {
    /// [`Hello`]: first frame in either direction.
    Hello = 1, HELLO_BYTES as u32;
    /// A control message ([`crate::message::Message`]), heartbeats and acknowledgments included.
    Control = 2, 4 * KIB;
    /// An epoch begins; the payload describes what follows.
    EpochBegin = 16, 64 * KIB;
    /// Guest pages of an epoch.
    EpochPages = 17, 4 * MIB;
    /// vCPU and device state of an epoch.
    EpochState = 18, 16 * MIB;
    /// Disk writes of an epoch.
    EpochDisk = 19, 4 * MIB;
    /// Output of an epoch (network frames, console bytes), for the successor to send again.
    EpochOutput = 20, 4 * MIB;
    /// The epoch is complete; the payload says how many frames and bytes it had.
    EpochEnd = 21, 4 * KIB;
    /// Frames to the guest, copied as they arrive.
    Input = 24, 256 * KIB;
    /// A resync begins: sizes of memory and disks.
    ResyncBegin = 32, 64 * KIB;
    /// Guest memory of a resync.
    ResyncMemory = 33, 4 * MIB;
    /// Disk content of a resync.
    ResyncDisk = 34, 4 * MIB;
    /// The resync's bulk is over; the join checkpoint follows as an epoch.
    ResyncEnd = 35, 4 * KIB;
    /// Joiner to leader, after the beginning: what its disks hold, or that it does not know.
    ResyncHolds = 36, 256;
    /// Leader to joiner, after that: whole disks, or how much of each.
    ResyncPlan = 37, 64 * KIB;
    /// Flow control and progress of bulk data.
    Credit = 40, 4 * KIB;
    /// Why the sender can't go on with a session, in words for a person (UTF-8). Nothing follows from them: the session's end is a control
    /// message, or the receiver's own decision. Without words: it goes on after all.
    Trouble = 42, KIB;
    /// Digest of memory or disks at an epoch, for tests and scrubbing.
    Digest = 41, 64 * KIB;
}

/// Why bytes are no frame that may be accepted. The connection is closed on any of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not our magic.
    #[error(
        "frame begins with {0:08x} instead of FTVM: the other side speaks something else, or the stream is out of step"
    )]
    Magic(u32),
    /// Version that was not agreed on.
    #[error("frame has wire version {got}, {agreed} was agreed on")]
    Version {
        /// In the frame.
        got: u16,
        /// Agreed on.
        agreed: u16,
    },
    /// A kind that this version does not have.
    #[error("frame has unknown kind {0}")]
    Kind(u16),
    /// Longer than its kind may be.
    #[error("{kind:?} frame announces {got} bytes, at most {max} are allowed")]
    TooLong {
        /// Its kind.
        kind: Kind,
        /// Announced.
        got: u32,
        /// Allowed.
        max: u32,
    },
    /// Checksum differs: damaged on the way, or forged.
    #[error("{kind:?} frame's checksum is {found:08x}, {computed:08x} expected")]
    Checksum {
        /// Its kind.
        kind: Kind,
        /// In the frame.
        found: u32,
        /// Computed.
        computed: u32,
    },
    /// Payload does not have the announced length.
    #[error("{kind:?} frame announces {announced} payload bytes and has {got}")]
    Length {
        /// Its kind.
        kind: Kind,
        /// In the header.
        announced: u32,
        /// There.
        got: usize,
    },
    /// A hello that is malformed.
    #[error("hello is malformed: {0}")]
    Hello(&'static str),
}

/// Header of a frame, as it is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Wire version.
    pub version: u16,
    /// What it carries.
    pub kind: Kind,
    /// Epoch, 0 if none.
    pub epoch: u64,
    /// Session, 0 if none.
    pub session: u64,
    /// Payload bytes; already checked against the kind's bound when it was decoded.
    pub len: u32,
    crc: u32,
    fields: [u8; 28],
}

fn checksum(fields: &[u8; 28], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(fields);
    hasher.update(payload);
    hasher.finalize()
}

impl FrameHeader {
    /// Decodes a header and bounds its length. `agreed` is the negotiated version, or [`VERSION_HELLO`] while only a
    /// hello is acceptable.
    pub fn decode(bytes: &[u8; HEADER_BYTES], agreed: u16) -> Result<Self, WireError> {
        let (fields, crc) = bytes.split_first_chunk::<28>().ok_or(WireError::Magic(0))?;
        let u16_at = |at: usize| u16::from_le_bytes([fields[at], fields[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([fields[at], fields[at + 1], fields[at + 2], fields[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let crc = u32::from_le_bytes([crc[0], crc[1], crc[2], crc[3]]);
        let magic = u32_at(0);
        if magic != MAGIC {
            return Err(WireError::Magic(magic));
        }
        let version = u16_at(4);
        if version != agreed {
            return Err(WireError::Version { got: version, agreed });
        }
        let kind = Kind::from_number(u16_at(6)).filter(|kind| kind.since() <= agreed);
        let kind = kind.ok_or(WireError::Kind(u16_at(6)))?;
        if (kind == Kind::Hello) != (agreed == VERSION_HELLO) {
            return Err(WireError::Kind(u16_at(6)));
        }
        let len = u32_at(24);
        if len > kind.max_len() {
            return Err(WireError::TooLong {
                kind,
                got: len,
                max: kind.max_len(),
            });
        }
        Ok(Self {
            version,
            kind,
            epoch: u64_at(8),
            session: u64_at(16),
            len,
            crc,
            fields: *fields,
        })
    }

    /// Verifies length and checksum of the payload that followed this header.
    pub fn verify(&self, payload: &[u8]) -> Result<(), WireError> {
        if payload.len() != self.len as usize {
            return Err(WireError::Length {
                kind: self.kind,
                announced: self.len,
                got: payload.len(),
            });
        }
        let computed = checksum(&self.fields, payload);
        if computed != self.crc {
            return Err(WireError::Checksum {
                kind: self.kind,
                found: self.crc,
                computed,
            });
        }
        Ok(())
    }
}

/// Header bytes for a payload that is sent behind them.
pub fn encode_header(
    version: u16,
    kind: Kind,
    epoch: u64,
    session: u64,
    payload: &[u8],
) -> Result<[u8; HEADER_BYTES], WireError> {
    let too_long = |got| WireError::TooLong {
        kind,
        got,
        max: kind.max_len(),
    };
    if kind.since() > version {
        return Err(WireError::Kind(kind as u16));
    }
    let len = u32::try_from(payload.len()).map_err(|_| too_long(u32::MAX))?;
    if len > kind.max_len() {
        return Err(too_long(len));
    }
    let mut fields = [0u8; 28];
    fields[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    fields[4..6].copy_from_slice(&version.to_le_bytes());
    fields[6..8].copy_from_slice(&(kind as u16).to_le_bytes());
    fields[8..16].copy_from_slice(&epoch.to_le_bytes());
    fields[16..24].copy_from_slice(&session.to_le_bytes());
    fields[24..28].copy_from_slice(&len.to_le_bytes());
    let mut bytes = [0u8; HEADER_BYTES];
    bytes[..28].copy_from_slice(&fields);
    bytes[28..].copy_from_slice(&checksum(&fields, payload).to_le_bytes());
    Ok(bytes)
}

/// First frame in either direction: who speaks, for which VM, in which versions. Its layout never changes:
/// u16 oldest version, u16 newest version, u128 VM, u128 seat, u64 start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version that the sender speaks.
    pub version_min: u16,
    /// Newest version that the sender speaks.
    pub version_max: u16,
    /// The VM.
    pub vm: VmId,
    /// The sender. Its seat must be the one that the TLS certificate names: the driver checks that.
    pub from: Incarnation,
}

impl Hello {
    /// A hello of this build.
    pub fn new(vm: VmId, from: Incarnation) -> Self {
        Self {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            vm,
            from,
        }
    }

    /// The whole frame.
    pub fn to_frame(&self) -> Result<Vec<u8>, WireError> {
        let mut payload = Vec::with_capacity(HELLO_BYTES);
        payload.extend_from_slice(&self.version_min.to_le_bytes());
        payload.extend_from_slice(&self.version_max.to_le_bytes());
        payload.extend_from_slice(&self.vm.0.to_le_bytes());
        payload.extend_from_slice(&self.from.seat.0.to_le_bytes());
        payload.extend_from_slice(&self.from.start.to_le_bytes());
        let mut frame = encode_header(VERSION_HELLO, Kind::Hello, 0, 0, &payload)?.to_vec();
        frame.extend_from_slice(&payload);
        Ok(frame)
    }

    /// From the payload of a verified hello frame.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let payload: &[u8; HELLO_BYTES] = payload.try_into().map_err(|_| WireError::Hello("wrong length"))?;
        let (min, rest) = payload
            .split_first_chunk::<2>()
            .ok_or(WireError::Hello("wrong length"))?;
        let (max, rest) = rest.split_first_chunk::<2>().ok_or(WireError::Hello("wrong length"))?;
        let (vm, rest) = rest.split_first_chunk::<16>().ok_or(WireError::Hello("wrong length"))?;
        let (seat, rest) = rest.split_first_chunk::<16>().ok_or(WireError::Hello("wrong length"))?;
        let start: [u8; 8] = rest.try_into().map_err(|_| WireError::Hello("wrong length"))?;
        let hello = Self {
            version_min: u16::from_le_bytes(*min),
            version_max: u16::from_le_bytes(*max),
            vm: VmId(u128::from_le_bytes(*vm)),
            from: Incarnation {
                seat: SeatId(u128::from_le_bytes(*seat)),
                start: u64::from_le_bytes(start),
            },
        };
        if hello.version_min > hello.version_max {
            return Err(WireError::Hello("oldest version above newest"));
        }
        if hello.version_min == VERSION_HELLO {
            return Err(WireError::Hello("version 0 is the hello's own"));
        }
        Ok(hello)
    }
}

/// Why two engines refuse to talk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NegotiateError {
    /// No common wire version.
    #[error(
        "{peer} speaks wire versions {peer_min} to {peer_max}, this engine {own_min} to {own_max}: upgrade the older \
         one first, one version at a time"
    )]
    Versions {
        /// The other side.
        peer: Incarnation,
        /// Its oldest.
        peer_min: u16,
        /// Its newest.
        peer_max: u16,
        /// Own oldest.
        own_min: u16,
        /// Own newest.
        own_max: u16,
    },
    /// Another VM.
    #[error("{peer} belongs to VM {theirs}, this engine to {ours}: check both seats' configuration")]
    OtherVm {
        /// The other side.
        peer: Incarnation,
        /// Its VM.
        theirs: VmId,
        /// Own VM.
        ours: VmId,
    },
    /// Both claim the same seat.
    #[error("{0} claims this engine's own seat: both seats are configured as the same one")]
    SameSeat(Incarnation),
}

/// The version to speak with the peer: the newest that both have.
pub fn negotiate(own: &Hello, peer: &Hello) -> Result<u16, NegotiateError> {
    if own.vm != peer.vm {
        return Err(NegotiateError::OtherVm {
            peer: peer.from,
            theirs: peer.vm,
            ours: own.vm,
        });
    }
    if own.from.seat == peer.from.seat {
        return Err(NegotiateError::SameSeat(peer.from));
    }
    let version = own.version_max.min(peer.version_max);
    if version < own.version_min.max(peer.version_min) {
        return Err(NegotiateError::Versions {
            peer: peer.from,
            peer_min: peer.version_min,
            peer_max: peer.version_max,
            own_min: own.version_min,
            own_max: own.version_max,
        });
    }
    Ok(version)
}
