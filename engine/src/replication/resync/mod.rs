//! Everything at once, while the guest runs: the whole memory of the active, and its whole disks, or of disks that are known
//! what changed since ([`super::changed`]).
//!
//! ```text
//!   ResyncSource::copy                                                  ResyncTarget::accept
//!   ResyncBegin ─► is that my machine?    ◄── ResyncHolds: what these disks hold
//!   ResyncPlan: whole disks, or so much of each
//!               ─► disks, block by block, with the changes that complete meanwhile in order ─► StandbyDisks
//!               ─► memory, page by page ─────────────────────────────────────────────────────► guest memory
//!   Resync::pass ─► pages that were written meanwhile, until few are left ─────────────────────► guest memory
//!   Resync::end  ─► ResyncEnd: counts, checksum   ◄── Credit: how much was taken ──────────────  every page, every block
//! ```
//!
//! The result is no state that ever was: pages and blocks were read at different times. It becomes one with the join
//! checkpoint, the epoch that follows, which has every page that was dirtied since it was sent last and every disk
//! change that completed and was not sent. The joiner has to stage that epoch, beside all of memory: so pages that were
//! dirtied during the copy are sent again first, pass after pass, and the guest may write less in each ([`pass_limit`]).
//!
//! Why a disk ends up right although the guest writes while it is copied: changes are recorded when they complete,
//! after they are on the volume. This side reads a block, queues it, and only then queues the changes that completed
//! meanwhile. So a change that the read missed, or saw half, comes behind the block; one that the read saw and that
//! comes again is repeated together with everything that overwrote it, in order.
//!
//! Bulk frames are the last class of the link, so epochs, input and heartbeats of other sessions are not held up.
//! Credit bounds what the other side has received and not taken yet: payload, and what zeroes of memory and of copied disks make of it, which
//! have next to none. Of what the guest zeroes meanwhile it is payload alone.

mod digest;
mod source;
mod target;
mod window;

use serde::{Deserialize, Serialize};

use super::changed::Holds;
use super::epoch::{PayloadError, SendError};
use super::pages::{EncodeError, PagesError, SinkClosed};
use super::standby_disks::StandbyDisksError;
use crate::control::exit_code;
use crate::kvm::{CpuBaseline, CpuError, CpuOffer};

pub use digest::{DIGEST_PIECE_PAGES, Digest, PageDigests, StillDigest, digest_storage};
pub use source::{Resync, ResyncProgress, ResyncSource, ResyncStats};
pub use target::{ResyncTarget, ResyncTotals};
pub use window::ResyncWindow;

/// Bytes before the records of a `ResyncDisk` payload: number in the stream u32, what it is u8.
const DISK_PREFIX_BYTES: usize = 5;
/// A copy of blocks, in order, no byte of a disk twice: every one, or as many as the plan says.
const DISK_COPY: u8 = 0;
/// Changes that completed while the copy was made.
const DISK_CHANGES: u8 = 1;

/// Payload of `ResyncBegin` behind the number (postcard).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Begin {
    page_count: u32,
    disk_bytes: Vec<u64>,
    /// The CPU that the guest sees.
    cpu: CpuBaseline,
    /// The MTU that the guest was told, by network card.
    mtus: Vec<u16>,
}

/// Payload of `ResyncHolds` (postcard): what the joiner's disks hold, if that is proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    holds: Option<Holds>,
}

/// Payload of `ResyncPlan` behind the number (postcard).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Plan {
    /// By disk, bytes that will be copied, of disks that hold what the joiner told; none: whole disks.
    changed_bytes: Option<Vec<u64>>,
}

/// What a seat has to offer to the guest that it is to follow.
#[derive(Debug, Clone)]
pub struct Offer {
    /// CPUs.
    pub cpu: CpuOffer,
    /// By network card: its name, and the largest payload that its end here carries, in bytes.
    pub nics: Vec<(String, u16)>,
}

/// Payload of `ResyncEnd` behind the number (postcard).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct End {
    payload_bytes: u64,
    /// CRC-32 of all payloads before this one.
    checksum: u32,
}

/// Why a resync failed. The side that receives is of no use until another one succeeds; the guest is not affected.
#[derive(Debug, thiserror::Error)]
pub enum ResyncError {
    /// The link is down.
    #[error("resync not sent: {0}")]
    Closed(#[from] SinkClosed),
    /// Pages could not be encoded, or the link is down.
    #[error("resync: {0}")]
    Encode(#[from] EncodeError),
    /// Begin or end could not be sent.
    #[error("resync: {0}")]
    Send(#[from] SendError),
    /// The active's own disk can't be read.
    #[error(
        "resync: reading disk {disk} at {offset} failed: {error}; the guest meets the same error there: replace the active's volume by a planned switchover once protected, or restore it"
    )]
    Read {
        /// Disk index.
        disk: u16,
        /// First byte.
        offset: u64,
        /// The cause.
        #[source]
        error: std::io::Error,
    },
    /// The other side takes nothing.
    #[error(
        "resync: the other side confirmed nothing for {seconds} s with {waiting_bytes} bytes under way: is its disk stuck?"
    )]
    Stalled {
        /// How long.
        seconds: u64,
        /// Bytes sent and not confirmed.
        waiting_bytes: u64,
    },
    /// Machines differ.
    #[error(
        "resync of a machine with {theirs}, this seat's has {ours}: both seats need the same memory, disk sizes and network cards"
    )]
    OtherMachine {
        /// The active's.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// The guest's CPU can't be given here.
    #[error("resync refused before anything was copied: {0}")]
    Cpu(#[from] CpuError),
    /// A network card of the guest carries more than its end here.
    #[error("resync refused before anything was copied: network card {nic}: {why}")]
    Mtu {
        /// Its name.
        nic: String,
        /// Both MTUs, and what to do.
        why: String,
    },
    /// Only what changed, for disks that are not known to hold the rest; or more than there is.
    #[error("resync refused before anything was copied: {0}")]
    Plan(String),
    /// A frame before the beginning, after the end, or a second beginning.
    #[error("resync frame out of place: {0}")]
    Unexpected(&'static str),
    /// Frame missing, doubled or out of order.
    #[error("resync frame {found} came, {expected} was expected: a frame is missing, doubled or out of order")]
    Sequence {
        /// Its number.
        found: u32,
        /// Number expected.
        expected: u32,
    },
    /// Blocks of a disk are not copied one after the other.
    #[error("resync: disk {disk} is copied through byte {expected}, then a block at {found} came")]
    Block {
        /// Disk index.
        disk: u16,
        /// First byte of the block.
        found: u64,
        /// First byte expected.
        expected: u64,
    },
    /// Ends without having brought everything, or with another checksum.
    #[error("resync ended, but {0}")]
    Incomplete(String),
    /// A malformed payload.
    #[error("resync: {0}")]
    Payload(#[from] PayloadError),
    /// A malformed chunk of pages.
    #[error("resync: {0}")]
    Pages(#[from] PagesError),
    /// This side's disks.
    #[error("resync: {0}")]
    Disks(#[from] StandbyDisksError),
}

/// Pages that the guest may write while a pass sends so many: half of them, so that passes end. Then its vCPUs wait for
/// the next pass.
pub fn pass_limit(pages: usize) -> usize {
    pages / 2
}

impl ResyncError {
    /// The exit code of a joiner, if a person has to mend something before this seat can join.
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            Self::Cpu(_) => Some(exit_code::CPU),
            Self::Mtu { .. } => Some(exit_code::NETWORK),
            Self::OtherMachine { .. } => Some(exit_code::CONFIG),
            Self::Disks(error) if error.is_storage() => Some(exit_code::STORAGE),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
