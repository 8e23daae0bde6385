//! Replication of a guest to its standby: what a seat sends, receives, keeps and applies.
//!
//! ```text
//!       active                                                   standby
//!  paused guest ─► SealedEpoch ─► EpochSender   link ══TLS══ link   EpochReceiver ─► StagedEpoch ─► memory
//! └ PageEncoder                     └ whole, checked  └► StandbyDisks (journal, volumes)
//!  frames to the guest ─► encode_input ───────────────────────────► InputLog, until their epoch commits
//! running guest ─► ResyncSource (memory, disks) ─────────────────► ResyncTarget: of use once the join checkpoint is
//! here
//! ```
//!
//! Nothing here decides: roles, acknowledgments and the output gate belong to `ftvm_protocol`. Nothing here needs a
//! VM: guest memory is the trait [`PageMemory`], volumes are [`storage::Storage`], so every part is tested alone.
//!
//! Invariant: whatever arrives from a peer is checked completely before anything of it changes guest memory or a
//! volume; applying what was checked can't fail for a reason that lies in the data.
//!
//! Invariant: every buffer is bounded; who produces faster than the link carries waits or is told so.

mod buffers;
pub mod changed;
pub mod epoch;
pub mod journal;
pub mod link;
pub mod memory;
pub mod noted;
pub mod pages;
pub mod resync;
pub mod standby_disks;
pub mod storage;
pub mod threads;
pub mod watched;

pub(crate) use buffers::KEPT_BUFFERS_BYTES;
pub use memory::{HeapMemory, PAGE_SIZE, Page, PageMemory};

#[cfg(test)]
pub(crate) mod testing;
