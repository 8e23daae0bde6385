//! Node daemon: starts, jails and supervises the engines of one node, and asks the arbiter for them.
//!
//! ```text
//!   ftvm ── api ──► daemon ── seat (a thread each) ── jail ──► ftvm-engine
//!                     │          └ prepare: disks, taps, identity, checked and locked
//!                     ├ peer: daemons of other machines, over TLS
//!                     └ arbiter: the record, compared and swapped with a hard deadline: a folder, or a Lease
//!
//!   on Kubernetes: pods ──► kubernetes ──► seats; their programs ── seat_socket ──► files, cgroups, network
//!                  kernel ── networks ──► kubernetes: which paths the node has for each role
//! ```

pub mod api;
pub mod arbiter;
pub mod beneath;
pub mod bridges;
pub mod check;
pub mod client;
pub mod config;
pub mod daemon;
pub mod disks;
mod durable;
pub mod identity;
pub mod import;
pub mod jail;
pub mod kubernetes;
pub mod netns;
pub mod networks;
pub mod peer;
pub mod prepare;
pub mod random;
pub mod seat;
pub mod seat_socket;
pub mod state;
pub mod tap;

pub use ftvm_watch::explain;

#[cfg(test)]
mod testing;
