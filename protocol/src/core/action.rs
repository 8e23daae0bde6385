//! What the driver has to do.

use crate::header::SeatHeader;
use crate::identity::{ArbiterUid, Epoch, Incarnation, LinkId, RequestId, SeatId, SessionId, Term};
use crate::message::Message;
use crate::record::Record;

use super::event::Seal;
use super::refusal::Refusal;

/// What may leave the guest now. Checked for every frame and console byte at the moment of sending, never per batch;
/// output is tagged with the epoch that was running when the guest produced it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gate {
    /// Nothing.
    Closed,
    /// Output of this epoch and of those before it.
    Through(Epoch),
    /// Everything, at once.
    Open,
}

impl Gate {
    /// May output of this epoch leave?
    pub fn admits(self, epoch: Epoch) -> bool {
        match self {
            Gate::Closed => false,
            Gate::Through(last) => epoch <= last,
            Gate::Open => true,
        }
    }
}

/// Why an engine ends for good. The driver exits with it; the daemon starts a new incarnation where that makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// The record says Stopped, confirmed by an own swap (this seat reported it) or read (the other one did).
    Stopped,
    /// Another incarnation holds the record: whatever this one has is out of date. Start again and join.
    LostToSuccessor,
    /// The active ejected this standby. Start again and join.
    Ejected,
    /// The resync or the leader's session is over before this seat became a member. Start again and join.
    SessionOver,
    /// The header could not be written: the seat's storage is broken.
    HeaderFailed,
    /// A disk or the journal failed or hangs, and the other seat has the guest: what is here must be copied again. Whoever starts the next
    /// engine of this seat waits until this process is gone: a write that is under way may land until then.
    StorageFailed,
    /// The guest could not be loaded or run on this host.
    GuestFailed,
}

/// One thing to do. Actions of one step are executed in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Set the gate, effective before any later action of this step and before a paused guest runs on. A gate that
    /// closes comes first in its step, one that opens last.
    SetGate(Gate),

    // ---- links
    /// Send a control message. A link that is gone swallows it.
    Send {
        /// On which link.
        link: LinkId,
        /// What.
        message: Message,
    },

    // ---- header, arbiter, other seats
    /// Write the seat header: temporary file, fsync, rename, fsync of the directory; then report `HeaderWritten`. At
    /// most one is outstanding.
    WriteHeader {
        /// For the answer.
        request: RequestId,
        /// The header.
        header: SeatHeader,
    },
    /// Read the record, uncached.
    ReadRecord {
        /// For the answer.
        request: RequestId,
        /// Time (of the core's clock) after which nobody waits any more.
        deadline_ms: u64,
    },
    /// Write the record if UID and version still are these. One try; no retry by any layer.
    SwapRecord {
        /// For the answer.
        request: RequestId,
        /// `metadata.uid` that must match.
        uid: ArbiterUid,
        /// `metadata.resourceVersion` that must match.
        version: u64,
        /// The new record.
        record: Record,
        /// Time (of the core's clock) after which the outcome is unknown.
        deadline_ms: u64,
    },
    /// Ask the daemons of these seats for header and guest, now: no remembered answers.
    AskSeats {
        /// For the answer.
        request: RequestId,
        /// Which seats.
        seats: Vec<SeatId>,
        /// Time (of the core's clock) after which nobody waits any more.
        deadline_ms: u64,
    },

    // ---- guest
    /// Boot the guest from this seat's disk (the journal is replayed first). The running epoch is `first_epoch`. The
    /// gate stays closed until the header is durable.
    BootFromDisk {
        /// Term of the confirmed record.
        term: Term,
        /// Number of the first epoch.
        first_epoch: Epoch,
    },
    /// Takeover: load the last staged epoch, apply what the journal has, inject again the input frames copied after
    /// that epoch, interrupt every queue once, run. The running epoch is `epoch + 1`. What the leader may not have
    /// released is sent again as soon as the gate admits it: the output of epochs `resend_after + 1 ..= epoch`.
    /// Announce the guest's addresses when the gate admits `epoch`.
    LoadAndRun {
        /// The last staged epoch.
        epoch: Epoch,
        /// Output up to this epoch was released by the leader, as far as is known.
        resend_after: Epoch,
        /// Term of the confirmed record.
        term: Term,
    },
    /// A guest that was paused by `Seal { Freeze | Final }` runs on. The running epoch is the sealed one plus one.
    Resume,

    // ---- leading a session
    /// Prepare a resync of that peer over that link; nothing is sent yet but what [`Action::StreamResync`] will need.
    /// Track every page and block as dirty from here on.
    BeginResync {
        /// The new session.
        session: SessionId,
        /// The link that carries its bulk.
        link: LinkId,
        /// The joiner.
        peer: Incarnation,
    },
    /// The joiner is ready: stream memory and disks while the guest runs; when little is left, cut the join checkpoint
    /// and report `EpochSealed { seal: JoinCut }`, send it, and go on with ordinary epochs.
    StreamResync {
        /// The session.
        session: SessionId,
    },
    /// Lead a session whose follower already has the state of `base` (a switchover's frozen source): first ordinary
    /// epoch is `base + 1`.
    LeadFrom {
        /// The new session.
        session: SessionId,
        /// The link that carries its bulk.
        link: LinkId,
        /// The follower.
        peer: Incarnation,
        /// Epoch that both have.
        base: Epoch,
    },
    /// Pause the guest at a clean point and seal the running epoch; it stays paused. `Seal::Freeze` or `Seal::Final`.
    /// Always the last action of its step, so that a driver may report `EpochSealed` while it executes this.
    Seal(Seal),
    /// The session is over: stop streaming, drop what is in flight. The guest runs on unless it is paused.
    EndSession {
        /// The session.
        session: SessionId,
    },

    // ---- following a session
    /// Receive a resync. Only now may memory and disk of this seat be overwritten (the header says "incomplete").
    ReceiveResync {
        /// The leader's session.
        session: SessionId,
        /// The link that carries its bulk.
        link: LinkId,
        /// The leader.
        leader: Incarnation,
    },
    /// Turn the frozen guest into a standby whose staged epoch is `base`; ordinary epochs from `base + 1` on follow.
    FollowFrom {
        /// The leader's session.
        session: SessionId,
        /// The link that carries its bulk.
        link: LinkId,
        /// The leader.
        leader: Incarnation,
        /// Epoch that both have.
        base: Epoch,
    },

    // ---- the end
    /// Tell the user: the guest is stopped, durably, as of this term.
    ReportStopped {
        /// Term of the Stopped record.
        term: Term,
    },
    /// Stop the guest at once if there is one, report, exit the process. No action follows, no event is heard any more.
    End(EndReason),

    // ---- for the log
    /// An event or command was refused, or an attempt failed; nothing changed by it. For logs, status and the answer to
    /// a command.
    Refused(Refusal),
}
