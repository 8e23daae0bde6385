//! Requests to a daemon, over its control socket: one JSON datagram each way ([`ftvm_engine::control::Connection`]).
//!
//! Only root and the daemon's own user are answered (SO_PEERCRED). Keys are stable; new ones may be added.

use std::net::SocketAddr;
use std::path::PathBuf;

use ftvm_engine::control::{Command, Event, ExitReport, Reply, Status};
use ftvm_protocol::core::SeatReport;
use ftvm_protocol::identity::{ArbiterUid, Incarnation, SeatId};
use ftvm_protocol::record::Snapshot;
use serde::{Deserialize, Serialize};

use crate::config::{PeerConfig, SeatConfig};

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// The whole [`DaemonStatus`].
    Status,
    /// Add a seat, or replace its configuration (which takes effect at the next start of its engine; peers at once).
    ApplySeat {
        /// The seat.
        seat: Box<SeatConfig>,
    },
    /// End a seat's engine and forget the seat. The record is not touched.
    RemoveSeat {
        /// Name of the virtual machine.
        vm: String,
        /// Name of the seat.
        seat: String,
    },
    /// Make the arbiter's first record and the header of this seat, which has the original disks. Harmless if done before.
    SetUp {
        /// Name of the virtual machine.
        vm: String,
        /// Name of the seat.
        seat: String,
    },
    /// Hand a command to a seat's engine.
    Command {
        /// Name of the virtual machine.
        vm: String,
        /// Name of the seat.
        seat: String,
        /// The command.
        command: Command,
    },
    /// Kill a seat's engine as a crash would, if it is active and its standby would take over.
    Failover {
        /// Name of the virtual machine.
        vm: String,
        /// Name of the seat.
        seat: String,
    },
    /// Start a stopped virtual machine: reads the record's term now, and starts the engine over it.
    Start {
        /// Name of the virtual machine.
        vm: String,
        /// Name of the seat.
        seat: String,
    },
    /// Make these the peers of a seat. Done means remembered, also for the next daemon: the engine is told as soon as it
    /// can be, whether it runs, starts or is adopted. They hold until the configured peers are changed or the seat is removed.
    SetPeers {
        /// Name of the virtual machine.
        vm: String,
        /// Name of the seat.
        seat: String,
        /// The peers.
        peers: Vec<PeerConfig>,
    },
    /// The record of a virtual machine, read now.
    Record {
        /// Name of the virtual machine.
        vm: String,
    },
    /// What can be said of a seat, for another seat's cold start.
    SeatReport {
        /// The seat.
        seat_id: SeatId,
    },
    /// Another daemon says that this incarnation's engine has ended: handed to every engine of that virtual machine here.
    PeerGone {
        /// Name of the virtual machine.
        vm: String,
        /// The dead incarnation.
        incarnation: Incarnation,
    },
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Done,
    /// To [`Request::Status`].
    Status(Box<DaemonStatus>),
    /// To [`Request::Command`].
    Reply {
        /// The engine's.
        reply: Reply,
    },
    /// To [`Request::SetUp`].
    SetUp {
        /// Identity of the arbiter object.
        uid: ArbiterUid,
    },
    /// To [`Request::Record`].
    Record {
        /// The record.
        snapshot: Option<Snapshot>,
        /// Why there is none.
        why: Option<String>,
    },
    /// To [`Request::SeatReport`].
    SeatReport {
        /// Header and guest.
        report: SeatReport,
    },
    /// Not done.
    Refused {
        /// Exit code for a command line program, see `docs/exit-codes.md`.
        code: u8,
        /// What, where, why, what to do.
        message: String,
    },
}

/// State of a daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Name of the node.
    pub node: String,
    /// Version of the daemon.
    pub version: String,
    /// Its state folder.
    pub state_folder: PathBuf,
    /// Folder of the arbiter; none: Leases of a Kubernetes API server.
    pub arbiter_folder: Option<PathBuf>,
    /// Where daemons of other machines reach it, if they may.
    pub peer_address: Option<SocketAddr>,
    /// Its seats.
    pub seats: Vec<SeatStatus>,
}

/// Phase of a seat, as its daemon sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Has the original disks and no header yet: `ftvm standalone up` sets it up.
    NotSetUp,
    /// The engine runs.
    Running,
    /// The engine ended or can't be started, and will be tried again.
    Waiting,
    /// The virtual machine was stopped.
    Stopped,
}

/// State of a seat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeatStatus {
    /// Name of the virtual machine.
    pub vm: String,
    /// Name of the seat.
    pub seat: String,
    /// The seat, once its identity was read.
    pub seat_id: Option<SeatId>,
    /// Whether it has the original disks.
    pub original_disk: bool,
    /// Where its link listens.
    pub link_address: SocketAddr,
    /// Its peers, as configured or set last.
    pub peers: Vec<PeerConfig>,
    /// Phase.
    pub phase: Phase,
    /// Why, and what to do; empty if all is well.
    pub why: String,
    /// Exit code of what `why` says, 0 if all is well.
    pub code: u8,
    /// Process of the engine.
    pub pid: Option<i32>,
    /// True if an earlier daemon started the engine.
    pub adopted: bool,
    /// Kind of jail: "full" or "reduced" (without root).
    pub jail: String,
    /// Engines started by this daemon.
    pub starts: u64,
    /// Engines in a row that ended because of the seat's storage (code 21), none of which was a standby or had the guest for long.
    #[serde(default)]
    pub storage_failures: u32,
    /// Console of the guest.
    pub console: PathBuf,
    /// Messages of the engine.
    pub log: PathBuf,
    /// The engine's own status, asked now; none if there is no engine or it did not answer in time.
    pub engine: Option<Status>,
    /// How the last engine ended.
    pub last_exit: Option<ExitReport>,
    /// What happened lately, oldest first.
    pub events: Vec<TimedEvent>,
}

/// An event with its time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TimedEvent {
    /// Milliseconds since 1970, by this node's clock.
    pub unix_ms: u64,
    /// What happened.
    pub event: Event,
}
