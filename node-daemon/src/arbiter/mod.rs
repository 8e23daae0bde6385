//! The arbiter: one record per virtual machine that is compared and swapped.
//!
//! [`Arbiter`] is what a daemon needs of one; [`FileArbiter`] keeps the record in a folder, [`LeaseArbiter`] in a Lease. [`Bounded`] puts a hard deadline
//! around either, because a call into a hung network file system never returns.

mod bounded;
mod file;
mod files;
mod lease;

use std::time::Instant;

use ftvm_protocol::core::{ReadOutcome, SwapOutcome};
use ftvm_protocol::identity::ArbiterUid;
use ftvm_protocol::record::Record;

pub use bounded::Bounded;
pub use file::{ArbiterError, FileArbiter};
pub use files::{Files, PosixFiles};
pub use lease::{HttpAnswer, LeaseArbiter, Leases, RequestError, Server, ServerError, follow_servers};

/// An answer with the reason why it is not what one would wish, for people.
pub type Said<T> = (T, Option<String>);

/// Who keeps the record. Calls may block; [`Bounded`] is what requests go through.
pub trait Arbiter: Send + Sync + 'static {
    /// The record as it is now, past every cache.
    fn read(&self) -> Said<ReadOutcome>;

    /// Writes the record if identity and version still are these; one try, begun before `deadline` or not at all.
    fn swap(&self, uid: ArbiterUid, version: u64, record: &Record, deadline: Instant) -> Said<SwapOutcome>;

    /// Called after an answer was given, while nobody waits: what can be done ahead for the next request.
    fn prepare(&self) {}
}

#[cfg(test)]
mod tests;
