//! Named reasons for everything that the core declines to do.

use crate::identity::{Incarnation, SeatId};

/// Why something was refused. Each says what, why, and where a person can do something, what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    // ---- events
    /// An answer to a request that is not outstanding (late, or after its deadline).
    #[error("answer to a request that nobody waits for any more")]
    StaleAnswer,
    /// A frame, report or message of a session that is not the current one.
    #[error("belongs to a session that is over")]
    OtherSession,
    /// An acknowledgment for another incarnation.
    #[error("acknowledgment is for another incarnation")]
    OtherIncarnation,
    /// An acknowledgment of an epoch that was never sealed.
    #[error("acknowledgment of an epoch that was never sealed")]
    NeverSealed,
    /// An epoch out of order.
    #[error("epoch is not the next one")]
    EpochGap,
    /// A message or report that makes no sense in this role.
    #[error("not possible in this role")]
    WrongRole,
    /// A message on a link that is not known.
    #[error("unknown link")]
    UnknownLink,

    // ---- arbiter
    /// The arbiter does not answer. Protected service goes on; nothing else is decided.
    #[error("arbiter unreachable: check the API server or the arbiter's directory")]
    ArbiterUnreachable,
    /// The record was deleted.
    #[error("arbiter's record is gone: the operator re-creates it once both seats agree; if not, a person must")]
    RecordGone,
    /// The record has another UID.
    #[error("arbiter's record is another one than this seat's header knows: it was re-created; a person decides")]
    RecordStrange,
    /// The record's term is below one that was already confirmed.
    #[error("arbiter's record is older than what this seat has confirmed: restored from a backup; a person decides")]
    TermBelowKnown,
    /// The record's members do not contain its holder.
    #[error("arbiter's record is malformed: its holder is no member; a person decides")]
    RecordMalformed,
    /// The record does not name this seat.
    #[error("arbiter's record does not name this seat: it waits to join")]
    NotNamed,
    /// The record names another holder.
    #[error("arbiter's record names another holder")]
    NotHolder,
    /// Another one was written meanwhile.
    #[error("somebody else wrote the record first")]
    Conflict,
    /// The outcome of a write is unknown.
    #[error("outcome of a write is unknown: settled by the next successful one")]
    Unsettled,
    /// No contact to the peer for longer than the limit, and no proof about it.
    #[error("no contact with the peer for too long, and its daemon has not proven that no guest runs there")]
    ContactTooOld,
    /// The other member of a re-created record is not known to have adopted it, and there is no proof about that seat.
    #[error(
        "arbiter's record was re-created, and {0} is not known to go by it; its daemon has not proven that no guest runs there: bring its node back"
    )]
    NotAdopted(Incarnation),

    // ---- start
    /// The record says Stopped and nobody asked for a start over it.
    #[error("the guest is stopped: ask for a start")]
    PhaseStopped,
    /// This seat has no usable header or an incomplete disk.
    #[error("this seat's disk is not complete: it can only be resynchronised")]
    DiskIncomplete,
    /// Own header is above the record.
    #[error("this seat's header is newer than the arbiter's record: restored from a backup; a person decides")]
    OwnHeaderAbove,
    /// The other seat's header is above the record.
    #[error("header of seat {0} is newer than the arbiter's record: that seat has newer data; a person decides")]
    OtherHeaderAbove(SeatId),
    /// The other seat's header can't be read.
    #[error("header of seat {0} can't be read: bring its node back, or a person decides (accept-data-loss)")]
    OtherHeaderUnreadable(SeatId),
    /// A guest runs, or may run, on the other seat.
    #[error(
        "a guest runs or may run on seat {0}: bring its node back, or prove that it is switched off (rule 9 in docs/protocol.md)"
    )]
    OtherGuest(SeatId),
    /// The holder's seat goes first.
    #[error("the holder's seat may boot too and goes first")]
    HolderFirst,
    /// The person named another holder, or term, than the record does.
    #[error("the record is not the one that the command is about: it has another holder or term by now")]
    OverrideOtherHolder,

    // ---- commands
    /// Only a protected active can do this.
    #[error("the VM is not protected: there is nobody to hand over to")]
    NotProtected,
    /// Another change is under way.
    #[error("another change of the members is under way: try again")]
    Busy,
    /// The stop is already being written.
    #[error("the stop is already being written: wait until it is stopped, then start")]
    StopUnderWay,
    /// The header could not be written.
    #[error("seat header could not be written: nothing is released until it is; check the seat's storage")]
    HeaderNotWritten,
    /// The target refused a switchover or did not answer in time.
    #[error("{0} did not take over in time: the guest goes on here after a swap")]
    SwitchFailed(Incarnation),
    /// What this seat's disks would hold is unknown.
    #[error("this seat's storage hangs or has failed: it follows nobody")]
    OwnStorage,
    /// The follower made no progress.
    #[error("{0} acknowledged nothing for too long: it is ejected")]
    FollowerStalled(Incarnation),
    /// The follower can't go on.
    #[error("{0} can't follow any more, its storage or its stream failed: it is ejected")]
    FollowerFailed(Incarnation),
    /// The follower can't go on, and says that it is its storage.
    #[error("{0} can't follow any more, its storage failed or hangs: it is ejected")]
    FollowerStorage(Incarnation),
    /// The peer is lost.
    #[error("{0} is lost: no answer to heartbeats, or its process is gone")]
    PeerLost(Incarnation),
}
