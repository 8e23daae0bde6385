//! Roles, each with the data that only it has.

use crate::header::SeatHeader;
use crate::identity::{ArbiterUid, Epoch, Incarnation, LinkId, SessionId, Term};
use crate::record::{Members, Record};

use super::action::EndReason;
use super::refusal::Refusal;
use super::status::RoleName;

/// The role of a seat; the diagram is in the parent module.
#[derive(Debug, Clone)]
pub(super) enum Role {
    Starting(Starting),
    Joining(Joining),
    Standby(Standby),
    Active(Active),
    Frozen(Frozen),
    Ended(EndReason),
}

impl Role {
    pub(super) fn name(&self) -> RoleName {
        match self {
            Role::Starting(_) => RoleName::Starting,
            Role::Joining(_) => RoleName::Joining,
            Role::Standby(_) => RoleName::Standby,
            Role::Active(_) => RoleName::Active,
            Role::Frozen(_) => RoleName::Frozen,
            Role::Ended(_) => RoleName::Ended,
        }
    }

    /// The session that this seat leads, if any.
    pub(super) fn lead(&self) -> Option<&Lead> {
        match self {
            Role::Active(active) => active.lead.as_ref(),
            Role::Frozen(frozen) => frozen.active.lead.as_ref(),
            Role::Starting(_) | Role::Joining(_) | Role::Standby(_) | Role::Ended(_) => None,
        }
    }

    pub(super) fn lead_mut(&mut self) -> Option<&mut Lead> {
        match self {
            Role::Active(active) => active.lead.as_mut(),
            Role::Frozen(frozen) => frozen.active.lead.as_mut(),
            Role::Starting(_) | Role::Joining(_) | Role::Standby(_) | Role::Ended(_) => None,
        }
    }

    /// The active's data, also while it is frozen.
    pub(super) fn active(&self) -> Option<&Active> {
        match self {
            Role::Active(active) => Some(active),
            Role::Frozen(frozen) => Some(&frozen.active),
            Role::Starting(_) | Role::Joining(_) | Role::Standby(_) | Role::Ended(_) => None,
        }
    }

    /// The peer of the session, its id, and when there was contact last.
    pub(super) fn session(&self) -> Option<(Incarnation, SessionId, LinkId, u64)> {
        match self {
            Role::Joining(joining) => Some((joining.leader, joining.session, joining.link, joining.contact_ms)),
            Role::Standby(standby) => Some((standby.leader, standby.session, standby.link, standby.contact_ms)),
            Role::Active(_) | Role::Frozen(_) => self
                .lead()
                .map(|lead| (lead.peer, lead.session, lead.link, lead.contact_ms)),
            Role::Starting(_) | Role::Ended(_) => None,
        }
    }

    pub(super) fn contact_mut(&mut self) -> Option<(Incarnation, &mut u64)> {
        match self {
            Role::Joining(joining) => Some((joining.leader, &mut joining.contact_ms)),
            Role::Standby(standby) => Some((standby.leader, &mut standby.contact_ms)),
            Role::Active(Active { lead: Some(lead), .. })
            | Role::Frozen(Frozen {
                active: Active { lead: Some(lead), .. },
                ..
            }) => Some((lead.peer, &mut lead.contact_ms)),
            Role::Active(_) | Role::Frozen(_) | Role::Starting(_) | Role::Ended(_) => None,
        }
    }
}

/// No guest; waits to boot or to join.
#[derive(Debug, Clone)]
pub(super) struct Starting {
    /// The user asked for a stop: write it, boot nothing.
    pub(super) stop: bool,
    /// The user asked for a start over a Stopped record of this term.
    pub(super) start_over: Option<Term>,
    /// A person accepts the loss of what only this holder has.
    pub(super) accept_loss: Option<(Incarnation, Option<Term>)>,
    /// Why the last acceptance of a loss came to nothing; what the seat waits for since is another matter.
    pub(super) loss_refused: Option<Refusal>,
    /// Since when the holder's seat could have booted in our stead.
    pub(super) holder_could_since_ms: Option<u64>,
    /// Header that has to be durable before the next swap.
    pub(super) prepare: Option<SeatHeader>,
    /// A stop was written by a swap of this term: report it once the header is durable.
    pub(super) stopped: Option<Term>,
}

/// How far a joiner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JoinStage {
    /// The header does not yet say "incomplete".
    Preparing,
    /// Receives bulk.
    Receiving,
    /// The join checkpoint is here; the header does not yet say "complete".
    Completing,
}

/// Receives a resync.
#[derive(Debug, Clone)]
pub(super) struct Joining {
    pub(super) leader: Incarnation,
    pub(super) link: LinkId,
    pub(super) session: SessionId,
    pub(super) uid: ArbiterUid,
    pub(super) stage: JoinStage,
    pub(super) staged: Epoch,
    pub(super) leader_acked: Epoch,
    pub(super) contact_ms: u64,
}

/// The leader wants to hand the guest over: this seat lets the record name it as holder. That gives no right to run: the
/// leader runs on, and both stay members.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    /// When it was asked for.
    pub(super) since_ms: u64,
    /// Term of the record that names this seat, once it does.
    pub(super) term: Option<Term>,
    /// The leader was told.
    pub(super) told: bool,
}

impl Claim {
    pub(super) fn new(now_ms: u64) -> Self {
        Self {
            since_ms: now_ms,
            term: None,
            told: false,
        }
    }
}

/// A switchover that the source asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct SwitchRequest {
    /// The source is frozen at the end of this epoch.
    pub(super) epoch: Epoch,
    /// The claim for which it froze.
    pub(super) term: Term,
    /// When it was asked for.
    pub(super) since_ms: u64,
}

/// Warm standby: has a complete checkpoint.
#[derive(Debug, Clone)]
pub(super) struct Standby {
    pub(super) leader: Incarnation,
    pub(super) link: LinkId,
    pub(super) session: SessionId,
    /// Last staged epoch.
    pub(super) staged: Epoch,
    /// Last epoch for which an acknowledgment was sent.
    pub(super) acked: Epoch,
    /// Highest epoch that the leader knew to be acknowledged.
    pub(super) leader_acked: Epoch,
    /// Staging failed: acknowledges nothing more, keeps what it has.
    pub(super) failed: bool,
    /// The link is down or the leader's process is gone.
    pub(super) lost: bool,
    /// Somebody said that we are no member any more, or stopped: read the record.
    pub(super) verify: bool,
    pub(super) claim: Option<Claim>,
    pub(super) switch: Option<SwitchRequest>,
    /// A switchover at this epoch was refused.
    pub(super) switch_refused: Epoch,
    /// This seat is to go: when the leader is asked next to eject it.
    pub(super) leave_ms: Option<u64>,
    pub(super) contact_ms: u64,
    /// Since when a write of ours is unsettled.
    pub(super) unsettled_since_ms: Option<u64>,
}

/// What the last own successful swap (or the record adopted) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Confirmed {
    /// Members are this seat only.
    Alone,
    /// Members are this seat and the session's peer.
    Pair,
}

/// How far a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeadStage {
    /// Join was sent.
    Offered { since_ms: u64 },
    /// The joiner is ready; bulk streams.
    Streaming,
    /// After the cut of the join checkpoint, or after the follower of a switchover said that it follows.
    Live,
    /// After a switchover: Follow was sent, the source has not answered.
    AwaitFollowing {
        previous: SessionId,
        since_ms: u64,
        sent_ms: u64,
    },
}

/// A session that this seat leads.
#[derive(Debug, Clone)]
pub(super) struct Lead {
    pub(super) session: SessionId,
    pub(super) peer: Incarnation,
    pub(super) link: LinkId,
    pub(super) stage: LeadStage,
    /// Cut of the join checkpoint, or base of the session.
    pub(super) cut: Epoch,
    /// Last sealed epoch.
    pub(super) sealed: Epoch,
    /// Last acknowledged epoch.
    pub(super) acked: Epoch,
    /// Since when sealed epochs wait without any progress.
    pub(super) waiting_since_ms: Option<u64>,
    /// The session can't go on.
    pub(super) broken: Option<Refusal>,
    /// The follower is to go. It acknowledges until it is ejected.
    pub(super) leaving: bool,
    pub(super) contact_ms: u64,
}

/// A stop under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stopping {
    /// The driver was asked for the final epoch.
    pub(super) asked: bool,
    /// The final epoch, once sealed.
    pub(super) sealed: Option<Epoch>,
    /// The guest switched itself off: can't be withdrawn.
    pub(super) by_guest: bool,
    /// A swap was sent: can't be withdrawn.
    pub(super) written: bool,
    /// Confirmed at this term: report it once the header is durable.
    pub(super) done: Option<Term>,
}

/// A switchover that was asked for, until the target says that the record names it.
#[derive(Debug, Clone, Copy)]
pub(super) struct HandOver {
    pub(super) since_ms: u64,
    /// When Claim is sent next.
    pub(super) ask_ms: u64,
}

/// Runs the guest.
#[derive(Debug, Clone)]
pub(super) struct Active {
    /// The running epoch.
    pub(super) running: Epoch,
    /// Output up to this epoch may be released whatever else happens: it was produced while confirmed alone, or is in
    /// the state from which this seat took over.
    pub(super) floor: Epoch,
    pub(super) confirmed: Confirmed,
    /// Term of the last confirmation; the header must say so before anything is released.
    pub(super) term: Term,
    /// A write of unknown outcome happened since: only an own successful swap ends this.
    pub(super) doubt: bool,
    pub(super) lead: Option<Lead>,
    pub(super) stop: Option<Stopping>,
    pub(super) hand_over: Option<HandOver>,
}

impl Active {
    /// The record names the follower of a session that streams: it claimed the record for a switchover, and both are
    /// members. This seat is as much active as before, and may write.
    pub(super) fn is_claimed(&self, record: &Record, me: Incarnation) -> bool {
        let by_follower = |lead: &Lead| {
            lead.stage == LeadStage::Live
                && record.holder == lead.peer
                && record.members == Members::pair(me, lead.peer)
        };
        self.confirmed == Confirmed::Pair && self.lead.as_ref().is_some_and(by_follower)
    }
}

/// Handed the guest over; paused at the end of an epoch.
#[derive(Debug, Clone)]
pub(super) struct Frozen {
    pub(super) active: Active,
    /// Term of the record that names the target, as the target says. Not confirmed: it only tells orders and answers of
    /// this switchover from older ones.
    pub(super) claimed: Term,
    /// The last epoch, once sealed.
    pub(super) sealed: Option<Epoch>,
    pub(super) since_ms: u64,
    /// When Switch was sent last.
    pub(super) asked_ms: u64,
    /// The target refused, or time is over.
    pub(super) give_up: bool,
}
