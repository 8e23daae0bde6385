//! Exit codes of all programs of the project; `docs/exit-codes.md` explains each and a test compares the two.

use ftvm_protocol::core::EndReason;

/// Ended as asked.
pub const OK: u8 = 0;
/// A defect of the program: an unexpected state or a panic.
pub const INTERNAL: u8 = 1;
/// Wrong command line.
pub const USAGE: u8 = 2;
/// The configuration is refused.
pub const CONFIG: u8 = 10;
/// The state folder is in use or unusable.
pub const STATE_FOLDER: u8 = 11;
/// The arbiter is gone or can't be written.
pub const ARBITER: u8 = 12;
/// `/dev/kvm` is missing, not permitted or too old.
pub const KVM: u8 = 13;
/// The host has too little memory.
pub const MEMORY: u8 = 14;
/// Kernel, initrd or command line are refused.
pub const BOOT: u8 = 15;
/// A disk is missing, too short, read-only or in use.
pub const DISK: u8 = 16;
/// A tap, an address or a port can't be had.
pub const NETWORK: u8 = 17;
/// The identity of this seat is unusable, or the peer's is wrong.
pub const IDENTITY: u8 = 18;
/// The peer speaks another wire version.
pub const WIRE_VERSION: u8 = 19;
/// A host lacks a CPU feature of the baseline, or clocks differ too much.
pub const CPU: u8 = 20;
/// A disk, journal or header failed while running (EIO, full).
pub const STORAGE: u8 = 21;
/// The jail could not be built.
pub const JAIL: u8 = 22;
/// The peer is the successor, or ejected this seat: this incarnation halted for good, a new one may join.
pub const SEAT_LOST: u8 = 23;
/// The launch message is malformed or of another version.
pub const LAUNCH: u8 = 24;
/// A daemon could not be reached, or refused the caller.
pub const DAEMON: u8 = 25;
/// The request was understood and refused; the message says why.
pub const REFUSED: u8 = 26;
/// A thread did a system call that its filter forbids.
pub const SECCOMP: u8 = 27;
/// The request was not settled within its time.
pub const TIMEOUT: u8 = 28;
/// The guest could not be loaded or run on this host.
pub const GUEST: u8 = 29;
/// A file of the guest image could not be copied into the seat's pod.
pub const GUEST_IMAGE: u8 = 30;
/// The API server of Kubernetes has not said what has to be known (of the operator's program and of `kubectl ftvm`, which have copies of this number).
pub const API_SERVER: u8 = 31;
/// There is no such virtual machine in the cluster (of `kubectl ftvm` alone, which has a copy of this number).
pub const NOT_FOUND: u8 = 32;

/// What an engine exits with when its core ends it.
pub fn of_end(reason: EndReason) -> u8 {
    match reason {
        EndReason::Stopped => OK,
        EndReason::LostToSuccessor | EndReason::Ejected | EndReason::SessionOver => SEAT_LOST,
        EndReason::HeaderFailed | EndReason::StorageFailed => STORAGE,
        EndReason::GuestFailed => GUEST,
    }
}

/// Every code with its name, as the documentation lists them.
pub const ALL: &[(u8, &str)] = &[
    (OK, "ok"),
    (INTERNAL, "internal"),
    (USAGE, "usage"),
    (CONFIG, "config"),
    (STATE_FOLDER, "state-folder"),
    (ARBITER, "arbiter"),
    (KVM, "kvm"),
    (MEMORY, "memory"),
    (BOOT, "boot"),
    (DISK, "disk"),
    (NETWORK, "network"),
    (IDENTITY, "identity"),
    (WIRE_VERSION, "wire-version"),
    (CPU, "cpu"),
    (STORAGE, "storage"),
    (JAIL, "jail"),
    (SEAT_LOST, "seat-lost"),
    (LAUNCH, "launch"),
    (DAEMON, "daemon"),
    (REFUSED, "refused"),
    (SECCOMP, "seccomp"),
    (TIMEOUT, "timeout"),
    (GUEST, "guest"),
    (GUEST_IMAGE, "guest-image"),
    (API_SERVER, "api-server"),
    (NOT_FOUND, "not-found"),
];
