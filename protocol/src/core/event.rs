//! What the core is told: by the driver of the engine, or by the simulator.
//!
//! One call of [`super::Core::step`] takes one event and the time. The driver executes all actions of a step, in order,
//! before it hands in the next event.

use serde::{Deserialize, Serialize};

use crate::header::SeatHeader;
use crate::identity::{Epoch, Incarnation, LinkId, RequestId, SeatId, SessionId, Term};
use crate::message::Message;
use crate::record::Snapshot;

/// Why an epoch was sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Seal {
    /// The interval was over; the guest runs on. Only while a session streams, after its join checkpoint.
    Ordinary,
    /// Cut of the join checkpoint: the first epoch of a session begun with [`super::Action::BeginResync`]. The driver
    /// chooses the moment; the guest runs on.
    JoinCut,
    /// Asked for by [`super::Action::Seal`]: last epoch before a switchover; the guest stays paused.
    Freeze,
    /// Asked for by [`super::Action::Seal`]: last epoch before a stop; the guest stays paused, its disks are flushed.
    /// When alone there is no follower to send it to; the driver flushes the disks and reports it all the same.
    Final,
}

/// Answer to [`super::Action::ReadRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReadOutcome {
    /// An uncached read that began after the request was made.
    Found(Snapshot),
    /// The arbiter answered and has no record (deleted).
    Gone,
    /// No answer, or one that does not count: time-out, cut connection, 401, 403, 5xx.
    Unreachable,
}

/// Answer to [`super::Action::SwapRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SwapOutcome {
    /// The arbiter confirmed the write; version and UID as written.
    Won(Snapshot),
    /// The arbiter refused it because UID or version differ (409). It can never land.
    Conflict,
    /// It provably did not and will never land: not sent at all, or refused with 401, 403 or 404.
    NotSent,
    /// Everything else: it may have landed, or may still land.
    Unknown,
}

/// What a seat's daemon can say of its header file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HeaderReport {
    /// Read and intact.
    Found(SeatHeader),
    /// The seat exists and never had one.
    Absent,
    /// Daemon not reachable, file damaged, disk gone: a person decides.
    Unreadable,
}

/// What a seat's daemon can prove of guests on that seat, under any incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestReport {
    /// No engine of that seat has a guest or a checkpoint: no such process, a new boot id of its node, its exit report,
    /// an out-of-service taint; or an engine whose status says so ([`super::Status::holds_guest`]), asked now.
    None,
    /// An engine that has one.
    Present,
    /// Cannot be told.
    Unknown,
}

/// Answer to [`super::Action::AskSeats`] for one seat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatReport {
    /// The seat.
    pub seat: SeatId,
    /// Its header.
    pub header: HeaderReport,
    /// Its guest.
    pub guest: GuestReport,
}

/// What a seat's own storage does, all of it together: its disks, its journal. Of several the worst counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StorageHealth {
    /// As far as known.
    Works,
    /// A request has been under way for longer than anybody should wait. It may still be done, at any time.
    Hangs,
    /// A request failed (EIO, ENOSPC). Nothing takes that back in this life of the engine: after a flush that failed, what was
    /// written before it may be lost although later ones succeed.
    Failed,
}

/// A person's or a controller's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Stop the guest and make that durable (spec Halted, deletion). Also given to a starting engine when nothing runs:
    /// it writes Stopped without booting.
    Stop,
    /// Start over a record that says Stopped at exactly this term. The daemon reads that term when the user asks, so
    /// that an old request can't undo a later stop. On an active seat that has not yet sent the swap of a stop it
    /// withdraws that stop (`over_stopped_term` is ignored).
    Start {
        /// Term of the Stopped record.
        over_stopped_term: Term,
    },
    /// Hand the guest over to the standby.
    Switchover,
    /// To a standby that is to end (its pod goes, its node is drained): have the leader eject it, acknowledge until then, and
    /// end as [`super::EndReason::Ejected`]. Ending at once would hold up the guest's output until the leader has ejected it.
    Leave,
    /// Boot this seat's disk although the record names another that holds alone, or although another one's header can't be read; everything that
    /// only others have is given up. Needs proof that every other seat is dead ([`GuestReport::None`]).
    AcceptDataLoss {
        /// The holder as the person saw it; another one in the record refuses the command.
        holder: Incarnation,
        /// The record's term as the person saw it, if he said so; another one refuses the command.
        term: Option<Term>,
    },
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time has passed. The driver hands it in at [`super::Core::next_wake_ms`] at the latest.
    Tick,

    // ---- links
    /// A link is up: authenticated, hellos exchanged, version agreed on. `peer` is from the hello and its seat is the
    /// certificate's. Either side may have dialled; several links to one peer may exist.
    Connected {
        /// Name of the link, never used before.
        link: LinkId,
        /// Who is at the other end.
        peer: Incarnation,
        /// Wire version that the hellos agreed on: the peer is told nothing that it lacks.
        version: u16,
    },
    /// A link is down (closed, reset, or closed by the driver after a bad frame).
    Disconnected {
        /// The link.
        link: LinkId,
    },
    /// A control message arrived.
    Received {
        /// The link.
        link: LinkId,
        /// The message.
        message: Message,
    },
    /// Something arrived on this link since the last event of this kind, if only a part of an epoch: the peer lives.
    /// Says nothing of whether it hears us.
    Heard {
        /// The link.
        link: LinkId,
    },
    /// The daemon's hint: the engine process of that incarnation has ended. Only speeds things up; proves nothing.
    PeerGone {
        /// The incarnation.
        peer: Incarnation,
    },

    // ---- replication
    /// Leader: the guest is paused, the running epoch was cut and its state captured. The actions of this step, the gate
    /// above all, are executed before the guest runs on.
    EpochSealed {
        /// Its number: the running epoch. The next one is running from now on.
        epoch: Epoch,
        /// Why it was sealed.
        seal: Seal,
    },
    /// Follower: this epoch of the session is here completely, validated so that loading it can't fail, and, if it
    /// contains a guest flush, its disk writes and those of all epochs before it are in the fsynced journal. Epochs are
    /// reported in order and each once. The first of a session begun by [`super::Action::ReceiveResync`] is the join
    /// checkpoint: the driver has loaded it completely once (proof that it loads), and the whole disk is durable.
    EpochStaged {
        /// Session of the frames.
        session: SessionId,
        /// The epoch.
        epoch: Epoch,
        /// Highest epoch that the leader knew to be acknowledged when it sent this one (field of its EpochBegin): its
        /// output needs no second sending.
        leader_acked: Epoch,
    },
    /// The session's bulk stream broke: staging, validation or journal failed, or as leader: sending failed. The link
    /// may still be up.
    SessionFailed {
        /// The session.
        session: SessionId,
    },

    // ---- header
    /// The header of that request is durable (file and directory fsynced).
    HeaderWritten {
        /// Of the WriteHeader.
        request: RequestId,
    },
    /// The header could not be written (disk full, EIO).
    HeaderFailed {
        /// Of the WriteHeader.
        request: RequestId,
    },

    // ---- storage
    /// What this seat's disks and journal do, when that changes. A driver whose disks fail the last flush before a stop, or do not
    /// do it in time, says `Failed` before it reports that seal. A flush that failed or was not done is never answered as done, neither to the guest nor to a
    /// leader, and no flush of that disk succeeds after it in this life of the engine.
    Storage(StorageHealth),

    // ---- arbiter and other seats, through the daemon
    /// Answer to a read. May come late or never.
    RecordRead {
        /// Of the ReadRecord.
        request: RequestId,
        /// What was read.
        outcome: ReadOutcome,
    },
    /// Answer to a swap. May come late or never; the core itself turns it into unknown at the deadline.
    RecordSwapped {
        /// Of the SwapRecord.
        request: RequestId,
        /// What became of it.
        outcome: SwapOutcome,
    },
    /// Answer about other seats. A seat that is missing counts as unreadable and unknown.
    SeatsReported {
        /// Of the AskSeats.
        request: RequestId,
        /// One a seat.
        reports: Vec<SeatReport>,
    },

    /// The VM's other seats are these by now ([`super::Config::other_seats`]): one was replaced.
    OtherSeats(Vec<SeatId>),

    // ---- guest
    /// The guest switched itself off (ACPI S5). The guest is paused at that point. A guest reset is no event: the driver
    /// does it in place and the next epoch carries it.
    GuestPoweredOff,
    /// The guest could not be loaded or started, or the VMM failed for good; the text goes into the status.
    GuestFailed {
        /// What happened.
        error: String,
    },

    /// A command.
    Command(Command),
}
