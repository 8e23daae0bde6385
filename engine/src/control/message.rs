//! The messages themselves: plain data, no behaviour beyond small accessors.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Version of the launch message. A daemon starts only engines of its own version; adoption tolerates others.
pub const VERSION: u16 = 1;

/// Largest JSON text of one message, in bytes (a default `SO_SNDBUF` must hold it whole).
pub const MESSAGE_BYTES_MAX: usize = 128 * 1024;

/// Most file descriptors beside one message (the kernel's own bound is 253).
pub const MESSAGE_FDS_MAX: usize = 64;

/// Most bytes of console input in one command.
pub const CONSOLE_INPUT_BYTES_MAX: usize = 4096;

/// Number of the control socket in a freshly started engine.
pub const CONTROL_FD: i32 = 3;

/// An arbiter record as JSON, as the protocol crate encodes it.
pub type Record = serde_json::Value;

/// What makes a stored record the one that was read; opaque to everyone but the arbiter.
///
/// A swap is done only if the arbiter still holds the record of this version (resourceVersion and metadata.uid of a Lease;
/// term and folder identity of the file arbiter).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordVersion {
    /// Identity of the arbiter object: a re-created one has another.
    pub uid: String,
    /// Changes with every write and never returns to an earlier value.
    pub version: String,
}

/// Position of a file descriptor among those that came with the launch message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub u16);

/// A secret in PEM form; `Debug` does not show it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// From the daemon to the engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToEngine {
    /// First message of a fresh engine, with every descriptor that it will ever have.
    Launch(Box<Launch>),
    /// Answer of the arbiter to an earlier [`FromEngine::Request`].
    Answer {
        /// Number of the request.
        request: u64,
        /// What the arbiter said.
        answer: Answer,
    },
    /// Something to do; the engine replies with the same number.
    Command {
        /// Chosen by the daemon, echoed in the reply.
        id: u64,
        /// What to do.
        command: Command,
    },
}

/// From the engine to the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromEngine {
    /// First message on every connection.
    Hello(Hello),
    /// A question to the arbiter.
    Request {
        /// Unique within the life of the engine.
        request: u64,
        /// The question.
        ask: ArbiterRequest,
        /// The daemon gives up after this many milliseconds; the engine counts by its own clock.
        deadline_ms: u32,
    },
    /// Reply to a command.
    Reply {
        /// Number of the command.
        id: u64,
        /// What came of it.
        reply: Reply,
    },
    /// Something happened. Events are told for people and for the daemon's books; nothing depends on their arrival.
    Event(Event),
}

/// Who the engine is; lets a new daemon check that it adopts what it believes to adopt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of the engine.
    pub version: u16,
    /// Version of the program, for people.
    pub engine: String,
    /// Name of the virtual machine.
    pub vm: String,
    /// Name of the seat.
    pub seat: String,
    /// Incarnation of this engine.
    pub incarnation: String,
}

/// Everything that an engine needs to begin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// [`VERSION`] of the daemon.
    pub version: u16,
    /// Name of the virtual machine, the same for both seats.
    pub vm: String,
    /// Name of this seat.
    pub seat: String,
    /// Name of this run of the engine, never used before and never again: seat name and a random value.
    pub incarnation: String,
    /// Identity of the arbiter object (rule 10).
    pub arbiter_uid: String,
    /// How to begin.
    pub begin: Begin,
    /// `machine::MachineConfig` as JSON: memory, vCPUs, CPU baseline, firmware tables.
    pub machine: serde_json::Value,
    /// Kernel, initrd and command line.
    pub boot: Boot,
    /// Network cards, in the order in which the guest sees them.
    pub nics: Vec<Nic>,
    /// Disks, in the order in which the guest sees them.
    pub disks: Vec<Disk>,
    /// The replication link.
    pub link: Link,
    /// Time-outs.
    pub timing: Timing,
    /// Checkpoint settings.
    pub checkpoint: Checkpoint,
    /// Other descriptors.
    pub files: Files,
    /// Only a process with this user id (as the engine sees it) may connect to the control listener.
    pub daemon_uid: u32,
}

/// How a new engine begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum Begin {
    /// Look at the record and the header; join the peer if it lives, cold start by rule 8 once the daemon has sent the
    /// evidence, wait and say so otherwise.
    Auto,
    /// A new, empty seat: wait for the active to replicate to it, never boot.
    Join,
}

/// What the guest boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// A bzImage or a PVH ELF kernel.
    pub kernel: Fd,
    /// The initial RAM disk.
    pub initrd: Option<Fd>,
    /// The kernel command line.
    pub cmdline: String,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Name in messages and metrics.
    pub name: String,
    /// MAC address, the same on both seats, as `02:00:00:00:00:01`.
    pub mac: String,
    /// Largest payload of a frame, in bytes.
    pub mtu: u16,
    /// A tap without packet information, non-blocking.
    pub tap: Fd,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Name in messages and metrics; also its serial number in the guest.
    pub name: String,
    /// A raw file or a block device, opened for reading and, unless `read_only`, writing.
    pub file: Fd,
    /// Path outside the jail, for messages only.
    pub path: String,
    /// The guest must not write.
    pub read_only: bool,
}

/// The replication link of this seat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// A bound, listening TCP socket.
    pub listener: Fd,
    /// Its address as the peer reaches it.
    pub listen_address: SocketAddr,
    /// The peer, if there is one already.
    pub peer: Option<Peer>,
    /// Who this seat is, and whom it believes.
    pub identity: Identity,
}

/// The other seat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Name of the seat: the certificate must say the same.
    pub seat: String,
    /// Where its link listens.
    pub address: SocketAddr,
    /// Its incarnation, if known.
    pub incarnation: Option<String>,
}

/// TLS identity of a seat. Certificate names are `SEAT.VM.ftvm`, as a DNS subject alternative name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Certificate chain of this seat, PEM.
    pub certificate_pem: String,
    /// Its private key, PKCS#8 PEM.
    pub key_pem: Secret,
    /// The authority that signed both seats' certificates, PEM.
    pub authority_pem: String,
}

/// Name in the certificate of a seat, in lower case: `SEAT.VM.ftvm`.
pub fn identity_name(vm: &str, seat: &str) -> String {
    format!("{}.{}.ftvm", seat.to_ascii_lowercase(), vm.to_ascii_lowercase())
}

/// Time-outs, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Interval of heartbeats on the link.
    pub heartbeat_ms: u32,
    /// A peer that was not heard of for this long is lost.
    pub peer_lost_ms: u32,
    /// Hard deadline of one arbiter request.
    pub arbiter_deadline_ms: u32,
    /// Pause between two attempts at the arbiter.
    pub arbiter_retry_ms: u32,
    /// Without contact for this long a seat of a pair writes nothing on its own (rule 11).
    pub contact_limit_ms: u32,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            heartbeat_ms: 50,
            peer_lost_ms: 300,
            arbiter_deadline_ms: 1000,
            arbiter_retry_ms: 50,
            contact_limit_ms: 600_000,
        }
    }
}

/// Checkpoint settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Shortest epoch, in microseconds.
    pub interval_min_us: u32,
    /// Longest epoch, in microseconds.
    pub interval_max_us: u32,
    /// An epoch ends early when this many pages are dirty.
    pub dirty_pages_max: u32,
    /// Bound of the delta cache, in bytes.
    pub delta_cache_bytes: u64,
    /// Encoder threads.
    pub workers: u8,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint {
            interval_min_us: 2_000,
            interval_max_us: 50_000,
            dirty_pages_max: 16_384,
            delta_cache_bytes: 64 << 20,
            workers: 1,
        }
    }
}

/// Descriptors that belong to no device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// `/dev/kvm`.
    pub kvm: Fd,
    /// `/dev/userfaultfd`, where the node has it.
    pub userfaultfd: Option<Fd>,
    /// Header of the seat (rule 8), read and written in place.
    pub header: Fd,
    /// Redo journal of the standby (rule 5).
    pub journal: Fd,
    /// Listening `SOCK_SEQPACKET` socket for daemons that adopt this engine.
    pub control_listener: Fd,
    /// Receives the guest's console, appended.
    pub console: Fd,
    /// Receives the exit report ([`ExitReport`] as JSON, fsynced): an adopted engine is no child of its daemon.
    pub exit_report: Fd,
}

/// Questions to the arbiter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum ArbiterRequest {
    /// The record as it is now, past every cache.
    Read,
    /// Replace the record of this version.
    Swap {
        /// What was read in this attempt.
        expected: RecordVersion,
        /// The record to write.
        record: Record,
    },
}

/// Answers of the arbiter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// The record, read now.
    Record {
        /// The record.
        record: Record,
        /// What a swap must name.
        version: RecordVersion,
    },
    /// The swap was done.
    Won {
        /// The record that now stands.
        record: Record,
        /// Its version.
        version: RecordVersion,
    },
    /// Another record stands; ours was not and will not be written.
    Conflict {
        /// The record that stands.
        record: Record,
        /// Its version.
        version: RecordVersion,
    },
    /// Nobody knows: the write may have been done or may still land.
    Unknown {
        /// Why.
        why: String,
    },
    /// The request did not reach the arbiter, or it refuses us: nothing was and nothing will be written.
    Unreachable {
        /// Why.
        why: String,
    },
}

/// What a daemon may tell an engine to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Command {
    /// Report [`Status`].
    Status,
    /// Replicate to this new standby (rule 4); only the active does anything with it.
    Join {
        /// The joiner.
        peer: Peer,
    },
    /// The peer's address or seat changed without a join.
    SetPeer {
        /// The peer.
        peer: Peer,
    },
    /// The peer's daemon says that this incarnation is dead. A hint: the arbiter decides.
    PeerLostHint {
        /// The dead incarnation.
        incarnation: String,
        /// How that is known.
        why: String,
    },
    /// What the daemon of another seat says of it (rules 8 and 11).
    PeerEvidence {
        /// What it says.
        evidence: PeerEvidence,
    },
    /// Planned switchover (rule 6).
    Switchover,
    /// Stop the virtual machine (rule 7); `phase` becomes Stopped.
    Stop {
        /// Identifies the request of the user.
        request: String,
    },
    /// Leave `phase` Stopped (rule 7).
    Start {
        /// Identifies the request of the user.
        request: String,
    },
    /// Override a holder that is alone (rule 9).
    AcceptDataLoss {
        /// Who says so, and the proof that the holder is dead.
        evidence: PeerEvidence,
    },
    /// Press the guest's power button.
    PowerButton,
    /// Bytes for the guest's serial console, at most [`CONSOLE_INPUT_BYTES_MAX`].
    ConsoleInput {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Digest of guest memory and disks at the next epoch, on both sides.
    Digest,
    /// End this engine without touching the record: for the seat that lost, or after a hand-over.
    Quit,
}

/// What a seat's daemon can say of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerEvidence {
    /// The seat that is spoken of.
    pub seat: String,
    /// True: no engine of this seat runs a guest, under any incarnation (no such process, another boot id, an exit report).
    pub runs_no_guest: bool,
    /// Term of the seat's header; none if it has no header yet.
    pub header_term: Option<u64>,
    /// The header exists but could not be read: a person decides.
    pub header_unreadable: bool,
    /// How that is known, for people.
    pub source: String,
}

/// Replies to commands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Done, or begun: its end is told by status and events.
    Ok,
    /// Not done.
    Refused {
        /// Why, and what to do.
        why: String,
    },
    /// To [`Command::Status`].
    Status(Box<Status>),
    /// To [`Command::Digest`].
    Digest(Digest),
}

/// Digest of a seat's state at one epoch. Equal digests of two seats at the same epoch mean equal contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// The epoch.
    pub epoch: u64,
    /// Over all of guest RAM, in hexadecimal.
    pub memory: String,
    /// Over each disk by name, in hexadecimal.
    pub disks: BTreeMap<String, String>,
}

/// What an engine is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Launched, no decision yet.
    Starting,
    /// May not boot yet and says why.
    Waiting,
    /// Receives its first whole checkpoint.
    Joining,
    /// Holds a complete checkpoint and follows the active.
    Standby,
    /// Asks the arbiter whether it may take over.
    TakingOver,
    /// Runs the guest.
    Active,
    /// Runs or ran the guest, frozen for a switchover or a stop.
    Frozen,
    /// The virtual machine is stopped.
    Stopped,
    /// Lost: halted for good, to be rebuilt from the winner.
    Halted,
}

/// The state of an engine. Keys are stable; new ones may be added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the virtual machine.
    pub vm: String,
    /// Name of the seat.
    pub seat: String,
    /// Incarnation of the engine.
    pub incarnation: String,
    /// Role.
    pub role: Role,
    /// True while a standby has acknowledged a covering checkpoint and the record names both.
    pub protected: bool,
    /// Why the role is what it is, or why the machine is not protected.
    pub why: String,
    /// Term of the record that this engine knows to be in force.
    pub term: u64,
    /// Holder in that record.
    pub holder: Option<String>,
    /// Members in that record.
    pub members: Vec<String>,
    /// Last epoch that was cut (active) or received whole (standby).
    pub epoch: u64,
    /// Last epoch that the standby acknowledged.
    pub acknowledged: u64,
    /// The peer as this engine knows it.
    pub peer: Option<PeerStatus>,
    /// False after the last request to the arbiter failed.
    pub arbiter_reachable: bool,
    /// Progress of a resync, 0 to 100.
    pub resync_percent: Option<u8>,
    /// Everything that counts or measures, by stable name with its unit last (`pause_us_p99`, `link_sent_bytes`).
    pub counters: serde_json::Map<String, serde_json::Value>,
}

/// A peer in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its seat.
    pub seat: String,
    /// Its incarnation, once it told.
    pub incarnation: Option<String>,
    /// Where its link listens.
    pub address: SocketAddr,
    /// True while the link is up.
    pub connected: bool,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The role changed.
    Role {
        /// The new role.
        role: Role,
        /// Term in force.
        term: u64,
        /// Why.
        why: String,
    },
    /// Protection began or ended.
    Protected {
        /// Protected now.
        protected: bool,
        /// Why not, or with whom.
        why: String,
    },
    /// The link to the peer went up or down.
    Link {
        /// Up now.
        up: bool,
        /// Why.
        why: String,
    },
    /// The arbiter could not be used, or can be again.
    Arbiter {
        /// Usable now.
        reachable: bool,
        /// Why.
        why: String,
    },
    /// The guest reset, powered off, panicked or did a triple fault.
    Guest {
        /// What it did.
        what: String,
    },
    /// Something that a person should read: where, why, what to do.
    Warning {
        /// The text.
        text: String,
    },
    /// The engine is about to end.
    Exit(ExitReport),
}

/// How an engine ended; also written to [`Files::exit_report`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// Name of the virtual machine.
    pub vm: String,
    /// Name of the seat.
    pub seat: String,
    /// Incarnation of the engine.
    pub incarnation: String,
    /// Exit code of the process, see `docs/exit-codes.md`.
    pub code: u8,
    /// Role at the end.
    pub role: Role,
    /// Last term known to be in force.
    pub term: u64,
    /// What, where, why, what to do.
    pub message: String,
}
