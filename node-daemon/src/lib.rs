//! Node daemon: starts, jails and supervises the engines of one node, and asks the arbiter for them.
//!
//! ```text
//!   ftvm ── api ──► daemon ── seat (a thread each) ── jail ──► ftvm-engine
//!                     │          └ prepare: disks, taps, identity, checked and locked
//!                     └ arbiter: the record, compared and swapped with a hard deadline
//! ```

pub mod api;
pub mod arbiter;
pub mod check;
pub mod client;
pub mod config;
pub mod daemon;
pub mod identity;
pub mod jail;
pub mod prepare;
pub mod random;
pub mod seat;
pub mod state;
pub mod tap;

#[cfg(test)]
mod testing;
