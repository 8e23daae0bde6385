//! The messages themselves: plain data, no behaviour beyond small accessors.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ftvm_protocol::core::{ReadOutcome, SeatReport, SwapOutcome};
use ftvm_protocol::identity::{ArbiterUid, Incarnation, SeatId, Term, VmId};
use ftvm_protocol::record::Record;
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
        /// What the arbiter or the other daemons said.
        answer: Answer,
        /// Why it is not what one would wish, for people.
        why: Option<String>,
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
    /// A question to the arbiter or to the daemons of other seats.
    Request {
        /// Unique within the life of the engine.
        request: u64,
        /// The question.
        ask: Ask,
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
    pub incarnation: Incarnation,
}

/// Everything that an engine needs to begin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// [`VERSION`] of the daemon.
    pub version: u16,
    /// Name of the virtual machine, the same for both seats; for people.
    pub vm: String,
    /// The virtual machine.
    pub vm_id: VmId,
    /// Name of this seat, for people.
    pub seat: String,
    /// This run of the engine, never used before and never again.
    pub incarnation: Incarnation,
    /// Every other seat of this VM that the daemon knows of and that may have had an engine, whether it can be dialled now or not.
    pub other_seats: Vec<SeatId>,
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
    /// How the guest is protected.
    #[serde(default)]
    pub protection: Protection,
    /// Other descriptors.
    pub files: Files,
    /// Only a process with this user id (as the engine sees it) may connect to the control listener.
    pub daemon_uid: u32,
    /// The console is a FIFO that the seat's program reads, and without a reader for so long the engine hands over and
    /// ends; none: nobody need read it.
    #[serde(default)]
    pub seat_patience_ms: Option<u32>,
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
    /// The guest's IP addresses there: it speaks with no others. None: which it has is not known.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Largest payload of a frame that the tap and what is behind it carry, in bytes: the MTU of a guest that boots here.
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
    /// Whom to dial, if known already.
    pub peers: Vec<Peer>,
    /// Who this seat is, and whom it believes.
    pub identity: Identity,
}

/// The other seat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name, for people.
    pub seat: String,
    /// The seat: the certificate must say the same.
    pub seat_id: SeatId,
    /// Where its link listens.
    pub address: SocketAddr,
}

/// TLS identity of a seat. The certificate's one subject alternative name is the DNS name
/// [`ftvm_protocol::identity::identity_name`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Certificate chain of this seat, PEM.
    pub certificate_pem: String,
    /// Its private key, PKCS#8 PEM.
    pub key_pem: Secret,
    /// The authority that signed both seats' certificates, PEM.
    pub authority_pem: String,
}

/// Time-outs, in milliseconds: [`ftvm_protocol::core::Timing`], which explains each but the last two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Timing {
    pub heartbeat_ms: u32,
    pub peer_lost_ms: u32,
    pub arbiter_deadline_ms: u32,
    pub retry_ms: u32,
    pub contact_limit_ms: u32,
    pub ack_stall_ms: u32,
    pub switch_ms: u32,
    pub observe_ms: u32,
    pub holder_first_ms: u32,
    /// A disk's request that is under way for longer hangs.
    #[serde(default = "disk_hang_ms")]
    pub disk_hang_ms: u32,
    /// What a disk fails is kept from the guest for so long, as far as it runs, while another seat may do it; 0: it is told at once.
    #[serde(default = "disk_hold_ms")]
    pub disk_hold_ms: u32,
}

/// So long Linux waits for a SCSI disk before it gives a command up.
const fn disk_hang_ms() -> u32 {
    30_000
}

/// Longer than a switchover takes in both of its parts.
const fn disk_hold_ms() -> u32 {
    10_000
}

impl Default for Timing {
    fn default() -> Self {
        let core = ftvm_protocol::core::Timing::default();
        let ms = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Timing {
            heartbeat_ms: ms(core.heartbeat_ms),
            peer_lost_ms: ms(core.peer_lost_ms),
            arbiter_deadline_ms: ms(core.arbiter_deadline_ms),
            retry_ms: ms(core.retry_ms),
            contact_limit_ms: ms(core.contact_limit_ms),
            ack_stall_ms: ms(core.ack_stall_ms),
            switch_ms: ms(core.switch_ms),
            observe_ms: ms(core.observe_ms),
            holder_first_ms: ms(core.holder_first_ms),
            disk_hang_ms: disk_hang_ms(),
            disk_hold_ms: disk_hold_ms(),
        }
    }
}

impl From<&Timing> for ftvm_protocol::core::Timing {
    fn from(timing: &Timing) -> Self {
        ftvm_protocol::core::Timing {
            heartbeat_ms: timing.heartbeat_ms.into(),
            peer_lost_ms: timing.peer_lost_ms.into(),
            arbiter_deadline_ms: timing.arbiter_deadline_ms.into(),
            retry_ms: timing.retry_ms.into(),
            contact_limit_ms: timing.contact_limit_ms.into(),
            ack_stall_ms: timing.ack_stall_ms.into(),
            switch_ms: timing.switch_ms.into(),
            observe_ms: timing.observe_ms.into(),
            holder_first_ms: timing.holder_first_ms.into(),
        }
    }
}

/// What the guest does while no standby would take over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenUnprotected {
    /// It runs on, and what it says leaves at once.
    #[default]
    Continue,
    /// It stands still and nothing that it said leaves, until a standby has joined.
    Pause,
}

/// How the guest is protected: what may change while it runs, by [`Command::SetProtection`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protection {
    /// What the guest does while no standby would take over.
    pub when_unprotected: WhenUnprotected,
    /// Shortest epoch, in microseconds.
    pub interval_min_us: u32,
    /// Longest epoch, in microseconds.
    pub interval_max_us: u32,
    /// How long output may wait for its release, in microseconds: epochs are as long as that allows, within their bounds. None: as
    /// short as the load allows.
    pub target_latency_us: Option<u32>,
}

impl Default for Protection {
    fn default() -> Self {
        Protection {
            when_unprotected: WhenUnprotected::default(),
            interval_min_us: 2_000,
            interval_max_us: 50_000,
            target_latency_us: None,
        }
    }
}

/// Bound of the delta cache unless configured, in bytes.
pub const DELTA_CACHE_BYTES: u64 = 64 << 20;

/// Checkpoint settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
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
            dirty_pages_max: 16_384,
            delta_cache_bytes: DELTA_CACHE_BYTES,
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
    /// Header of the seat (rule 8), read and written in place by [`super::header_file`].
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

/// Questions of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    /// The record as it is now, past every cache.
    ReadRecord,
    /// Write the record if identity and version still are these. One try.
    SwapRecord {
        /// Identity of the arbiter object that must match.
        uid: ArbiterUid,
        /// Version that must match.
        version: u64,
        /// The new record.
        record: Record,
    },
    /// Header and guest of these seats, asked of their daemons now.
    AskSeats {
        /// Which seats.
        seats: Vec<SeatId>,
    },
}

/// Answers to [`Ask`], of the same kind as the question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", content = "outcome", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Ask::ReadRecord`].
    Read(ReadOutcome),
    /// To [`Ask::SwapRecord`].
    Swap(SwapOutcome),
    /// To [`Ask::AskSeats`]; a seat that is missing is unreadable and unknown.
    Seats(Vec<SeatReport>),
}

/// What a daemon may tell an engine to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Command {
    /// Report [`Status`].
    Status,
    /// Dial these peers from now on, and no others: a replaced seat, another address.
    SetPeers {
        /// The peers.
        peers: Vec<Peer>,
        /// Other seats of this VM that can't be dialled now, and are asked after before a disk is booted as the peers are.
        #[serde(default)]
        absent: Vec<SeatId>,
    },
    /// Protect the guest in this way from now on.
    SetProtection {
        /// How.
        protection: Protection,
    },
    /// The peer's daemon says that this incarnation is dead. A hint: the arbiter decides.
    PeerGone {
        /// The dead incarnation.
        incarnation: Incarnation,
        /// How that is known.
        why: String,
    },
    /// Planned switchover (rule 6).
    Switchover,
    /// Stop the virtual machine (rule 7); `phase` becomes Stopped.
    Stop,
    /// Start over a record that says Stopped at exactly this term (rule 7).
    Start {
        /// Term of the Stopped record.
        over_stopped_term: Term,
    },
    /// Boot although others may have more (rule 9).
    AcceptDataLoss {
        /// The holder as the person saw it.
        holder: Incarnation,
        /// The record's term as the person saw it, if he said so.
        #[serde(default)]
        term: Option<Term>,
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
    /// This seat is to go: hand the guest over if it is protected here, be ejected by the leader, and end. Ends after this
    /// time in any case.
    Leave {
        /// Time, ms.
        within_ms: u64,
    },
    /// End this engine at once, without touching the record.
    Quit,
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
    /// Waits: for its turn to boot, or for a leader to join. `why` says for what.
    Starting,
    /// Receives its first whole checkpoint.
    Joining,
    /// Holds a complete checkpoint and follows the active.
    Standby,
    /// Runs the guest.
    Active,
    /// Handed the guest over and waits for the outcome.
    Frozen,
    /// Ended, with a report.
    Ended,
}

/// The state of an engine. Keys are stable; new ones may be added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the virtual machine.
    pub vm: String,
    /// Name of the seat.
    pub seat: String,
    /// Incarnation of the engine.
    pub incarnation: Incarnation,
    /// Role.
    pub role: Role,
    /// Has a running or paused guest, or a checkpoint that it may run.
    pub holds_guest: bool,
    /// True while a standby has acknowledged a covering checkpoint and the record names both.
    pub protected: bool,
    /// The guest stands still because no standby would take over, see [`WhenUnprotected::Pause`].
    #[serde(default)]
    pub paused: bool,
    /// This seat is to go, and ends once nobody needs it any more, see [`Command::Leave`].
    #[serde(default)]
    pub leaving: bool,
    /// A write of the record was sent, and it is not known whether it counts. None from an engine of an earlier version.
    #[serde(default)]
    pub unsettled: Option<bool>,
    /// Why the role is what it is, or why the machine is not protected.
    pub why: String,
    /// Exit code of what `why` says if a person has to mend it (the peer's identity, its wire version), else 0.
    #[serde(default)]
    pub code: u8,
    /// Term of the record that this engine knows to be in force.
    pub term: Term,
    /// Holder in that record.
    pub holder: Option<Incarnation>,
    /// Members in that record.
    pub members: Vec<Incarnation>,
    /// Last epoch that was cut (active) or received whole (standby).
    pub epoch: u64,
    /// Last epoch that the standby acknowledged.
    pub acknowledged: u64,
    /// The peer as this engine knows it.
    pub peer: Option<PeerStatus>,
    /// As an active: what its standby would be worth if this engine died now. None without a session, and from an engine of
    /// an earlier version.
    #[serde(default)]
    pub standby: Option<StandbyStatus>,
    /// False after the last request to the arbiter failed.
    pub arbiter_reachable: bool,
    /// UID of the arbiter's record that this engine goes by.
    #[serde(default)]
    pub arbiter_uid: Option<ArbiterUid>,
    /// The record that may be created in place of one that this engine found gone, as far as it is concerned (rule 10).
    #[serde(default)]
    pub vouches: Option<Record>,
    /// Progress of a resync, 0 to 100.
    pub resync_percent: Option<u8>,
    /// Own disks that failed what the guest asked for, and have not worked since. Empty from an engine of an earlier version.
    #[serde(default)]
    pub failing_disks: Vec<FailingDisk>,
    /// What became of the last [`Command::AcceptDataLoss`], which is decided after its reply. None: there was none, the seat does not wait any
    /// more, or the engine is of an earlier version.
    #[serde(default)]
    pub accepted_loss: Option<AcceptedLoss>,
    /// Everything that counts or measures, by stable name with its unit last (`pause_us_p99`, `link_sent_bytes`).
    pub counters: serde_json::Map<String, serde_json::Value>,
}

/// A loss that a person accepted, in the [`Status`] of a seat that has not booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum AcceptedLoss {
    /// Not decided: the arbiter or the other seats' daemons are asked.
    UnderWay,
    /// The seat does not boot for it.
    Refused {
        /// Why, and what to do.
        why: String,
    },
}

/// A failing disk in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailingDisk {
    /// Its position in [`Launch::disks`].
    pub disk: usize,
    /// How.
    #[serde(default)]
    pub kind: StorageKind,
    /// What failed first, with the operating system's error.
    pub why: String,
}

/// How storage does not work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StorageKind {
    /// An I/O error.
    #[default]
    Failed,
    /// No room, or no quota, is left.
    Full,
    /// Something has been under way for too long, and may be done yet.
    Hangs,
}

/// A part of a seat's storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoragePart {
    /// A disk, by its position in [`Launch::disks`].
    Disk(usize),
    /// The journal.
    Journal,
    /// The header.
    Header,
}

/// What failed of a seat's storage, in [`ExitReport`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailingStorage {
    /// Which part.
    pub part: StoragePart,
    /// How.
    pub kind: StorageKind,
    /// It was the guest that used it: the seat was the active one.
    #[serde(default)]
    pub under_guest: bool,
    /// What failed first, with the operating system's error.
    pub why: String,
}

/// A peer in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its seat.
    pub seat: String,
    /// Its incarnation, once it told.
    pub incarnation: Option<Incarnation>,
    /// Where its link listens.
    pub address: SocketAddr,
    /// True while the link is up.
    pub connected: bool,
}

/// The standby in the [`Status`] of an active. Ages are as of the core's last step, at most one heartbeat ago.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyStatus {
    /// Age of the last sign that it lives, in milliseconds: an answer to an own probe counts from when the probe was sent.
    pub contact_age_ms: u64,
    /// How long sealed epochs have waited without any acknowledgment, in milliseconds; 0 if none waits.
    pub unacknowledged_ms: u64,
    /// Why a switchover to it would be refused now: not whole, or something else is under way. None: it would be taken up.
    pub not_ready: Option<String>,
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
        term: Term,
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
    pub incarnation: Incarnation,
    /// Exit code of the process, see `docs/exit-codes.md`.
    pub code: u8,
    /// Role at the end.
    pub role: Role,
    /// Last term known to be in force.
    pub term: Term,
    /// What, where, why, what to do.
    pub message: String,
    /// Of an engine that its storage ended (code 21): what failed, as far as that is known. Empty from an engine of an earlier version.
    #[serde(default)]
    pub storage: Vec<FailingStorage>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_str, from_value, to_value};

    /// What of the time-outs is about disks alone: whoever does not say it means what there was before, and nobody refuses what it does not
    /// know.
    #[test]
    fn time_outs_of_disks_may_be_missing_and_others_may_be_there() {
        let mut said = to_value(Timing::default()).unwrap();
        let fields = said.as_object_mut().unwrap();
        for field in ["disk_hang_ms", "disk_hold_ms"] {
            fields.remove(field).unwrap();
        }
        fields.insert("disk_of_tomorrow_ms".to_owned(), 1.into());
        assert_eq!(from_value::<Timing>(said.clone()).unwrap(), Timing::default());
        said["disk_hold_ms"] = 0.into();
        let told_at_once = Timing {
            disk_hold_ms: 0,
            ..Timing::default()
        };
        assert_eq!(from_value::<Timing>(said).unwrap(), told_at_once);
    }

    /// Engines outlive the daemon that began them.
    #[test]
    fn what_an_engine_of_an_earlier_release_tells_of_storage_is_read() {
        let failing: FailingDisk = from_str(r#"{"disk":1,"why":"no"}"#).unwrap();
        assert_eq!((failing.disk, failing.kind), (1, StorageKind::Failed));
        let report = ExitReport {
            vm: "demo".to_owned(),
            seat: "a".to_owned(),
            incarnation: Incarnation {
                seat: SeatId(1),
                start: 2,
            },
            code: 21,
            role: Role::Ended,
            term: 3,
            message: "this seat's storage failed".to_owned(),
            storage: vec![FailingStorage {
                part: StoragePart::Disk(1),
                kind: StorageKind::Full,
                under_guest: true,
                why: "no".to_owned(),
            }],
        };
        let mut told = to_value(&report).unwrap();
        assert_eq!(from_value::<ExitReport>(told.clone()).unwrap(), report);
        told.as_object_mut().unwrap().remove("storage").unwrap();
        let earlier: ExitReport = from_value(told).unwrap();
        assert!(earlier.storage.is_empty() && earlier.code == report.code);
    }
}
