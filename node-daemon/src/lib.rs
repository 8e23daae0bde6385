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

/// An error with its causes, for people: "what: why: why". A cause that the text repeats already is not added.
pub fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let why = error.to_string();
        if !text.contains(&why) {
            text.push_str(": ");
            text.push_str(&why);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod testing;
