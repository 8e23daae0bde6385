//! Hosts made of namespaces: several "machines", a client and two networks on one real machine.
//!
//! ```text
//!                outer namespaces (this process is their pid 1)
//!    ┌───────────────────────────────────────────────────────────────┐
//!    │   bridge `client`                     bridge `ft`             │
//!    │   │      │      │      │              │      │      │         │
//!    └───┼──────┼──────┼──────┼──────────────┼──────┼──────┼─────────┘
//!     client    h1     h2     h3             h1     h2     h3
//!     (judge)   client0 ─ bridge `guest` ─ tap of the guest's NIC
//!               ft0, 10.99.0.1 …
//! ```
//!
//! * A **host** has its own network, mount, pid, UTS and IPC namespace, its own boot id, and an init that reaps. Killing
//!   that init kills every process of the host in one step, as a power cut does.
//! * The **outer** namespaces are entered by [`outer::enter`]: the program starts itself again as pid 1 of a new pid
//!   namespace. Whatever way it ends (return, panic, SIGKILL, ctrl-C), the kernel kills every process below it, and with
//!   the last process go the network and mount namespaces, bridges, taps and mounts. Nothing needs to be tidied up.
//! * With root the namespaces are made directly, otherwise below a user namespace, where this process is root.
//!
//! Faults are real: processes die or stop, links lose their carrier, packets are dropped by nftables, disks hang, fail and are full ([`disk`]).
//!
//! Invariant: only processes that this module started, and what those started inside a host, are ever signalled.

use std::path::PathBuf;

pub mod disk;
mod host;
pub(crate) mod namespace;
pub mod net;
pub mod outer;
pub(crate) mod processes;
pub mod thaw;

pub use host::{CutDirection, Host, HostPlan, HostProcess, Lab, LabPlan};
pub(crate) use host::{ip_inside, new_boot_id};
pub use processes::ProcessInfo;

/// What can go wrong with hosts.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// A system call or a file operation failed.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A program ended with an error.
    #[error("`{command}` failed ({status}): {output}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it printed.
        output: String,
    },
    /// A new host's init could not set itself up.
    #[error("host {host}: {step} failed while its namespaces were set up")]
    Init {
        /// The host.
        host: String,
        /// The step.
        step: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// This process is not in outer namespaces of its own.
    #[error("hosts can only be made inside outer namespaces: call hosts::outer::enter first")]
    NotInside,
    /// A file holds something unexpected.
    #[error("{path}: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A host is not there, or not in the state that an operation needs.
    #[error("host {host}: {what}")]
    State {
        /// The host.
        host: String,
        /// What is wrong.
        what: String,
    },
}

/// Shortens the common case of [`HostsError::Io`].
pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> HostsError {
    let what = what.into();
    move |source| HostsError::Io { what, source }
}
