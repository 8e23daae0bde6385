//! What the core tells about itself: for status files, metrics, conditions.

use crate::identity::{ArbiterUid, Epoch, Incarnation, Nonce, SessionId, Term};
use crate::record::{Members, Phase, Record};

use super::Core;
use super::action::{EndReason, Gate};
use super::event::StorageHealth;
use super::refusal::Refusal;
use super::role::{Confirmed, Frozen, LeadStage, Role};

/// Role in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RoleName {
    /// Waits: for its turn to boot, or for a leader to join.
    Starting,
    /// Receives a resync.
    Joining,
    /// Warm standby.
    Standby,
    /// Runs the guest.
    Active,
    /// Handed the guest over and waits for the outcome.
    Frozen,
    /// Ended.
    Ended,
}

/// How the seat stands to the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ArbiterState {
    /// Not asked yet.
    Unknown,
    /// Last answer was fine.
    Reachable,
    /// Last request was not answered.
    Unreachable,
    /// The record is gone.
    Gone,
    /// Other UID, or a term below a confirmed one, or malformed.
    Strange,
}

/// What became of the last [`super::Command::AcceptDataLoss`] of a seat that has not booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AcceptedLoss {
    /// Not decided: the arbiter or the other seats' daemons are asked.
    UnderWay,
    /// The seat does not boot for it.
    Refused(Refusal),
}

/// A snapshot of the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// This engine.
    pub incarnation: Incarnation,
    /// Its role.
    pub role: RoleName,
    /// Why it ended, in role [`RoleName::Ended`].
    pub ended: Option<EndReason>,
    /// Has a running or paused guest or a checkpoint that it may run, or boots as soon as it hears that its write of the record has landed: what the
    /// daemon answers other seats with ([`super::event::GuestReport::Present`]).
    pub holds_guest: bool,
    /// Confirmed by the arbiter: both seats are members and the session streams.
    pub protected: bool,
    /// Highest term known.
    pub term: Term,
    /// The record's UID that this seat belongs to.
    pub uid: Option<ArbiterUid>,
    /// The peer of the session.
    pub peer: Option<Incarnation>,
    /// The session.
    pub session: Option<SessionId>,
    /// The gate.
    pub gate: Gate,
    /// The running epoch (active), or the last staged one (standby).
    pub epoch: Epoch,
    /// Last acknowledged epoch.
    pub acked: Epoch,
    /// Arbiter.
    pub arbiter: ArbiterState,
    /// A write of unknown outcome.
    pub unsettled: bool,
    /// Since when there was no contact with the session's peer, in ms; `None` without a session.
    pub contact_age_ms: Option<u64>,
    /// How long sealed epochs have waited without any acknowledgment, in ms; `None` while none waits.
    pub unacknowledged_ms: Option<u64>,
    /// Why a switchover would be refused now; `None`: the pair is whole and nothing is under way (rule 6).
    pub switchover: Option<Refusal>,
    /// A standby whose leader is gone or silent: it tries to take over.
    pub leader_lost: bool,
    /// A standby whose leader wants to hand the guest over: it lets the record name it, or has done so (rule 6).
    pub claiming: bool,
    /// A standby whose leader stands still and asked it to take over (rule 6).
    pub switching: bool,
    /// A standby that is to end: it waits until its leader has ejected it.
    pub leaving: bool,
    /// A stop is under way.
    pub stopping: bool,
    /// What this seat's own storage does; `Failed` stays.
    pub storage: StorageHealth,
    /// Why the last attempt or command was refused; what a person sees when it waits.
    pub refused: Option<Refusal>,
    /// What became of a loss that a person accepted. `None`: there was none, or the seat does not wait any more.
    pub accepted_loss: Option<AcceptedLoss>,
    /// The record that the operator may create if it is gone: what this seat vouches for ([`crate::recreation`]).
    pub recreate: Option<Record>,
    /// Text of a guest failure.
    pub failure: Option<String>,
}

impl Core {
    /// Snapshot for status, metrics and the daemon's answers to other seats.
    pub fn status(&self) -> Status {
        let session = self.role.session();
        let active = self.role.active();
        let (epoch, acked) = match &self.role {
            Role::Standby(standby) => (standby.staged, standby.acked),
            Role::Joining(joining) => (joining.staged, 0),
            Role::Active(active) | Role::Frozen(Frozen { active, .. }) => {
                (active.running, active.lead.as_ref().map_or(0, |lead| lead.acked))
            }
            Role::Starting(_) | Role::Ended(_) => (0, 0),
        };
        Status {
            incarnation: self.me,
            role: self.role.name(),
            ended: if let Role::Ended(reason) = self.role {
                Some(reason)
            } else {
                None
            },
            holds_guest: match self.role {
                Role::Standby(_) | Role::Active(_) | Role::Frozen(_) => true,
                // Its write may have landed: then it boots as soon as it hears of that, and the record that others read is its own.
                Role::Starting(_) => self.has_tried(),
                Role::Joining(_) | Role::Ended(_) => false,
            },
            protected: self.is_protected(),
            term: self.known_term,
            uid: self.known_uid,
            peer: session.map(|(peer, ..)| peer),
            session: session.map(|(_, session, ..)| session),
            gate: self.gate,
            epoch,
            acked,
            arbiter: self.arbiter,
            unsettled: self.unsettled.is_some() || active.is_some_and(|active| active.doubt),
            contact_age_ms: self.contact_age_ms(),
            unacknowledged_ms: self
                .role
                .lead()
                .and_then(|lead| lead.waiting_since_ms)
                .map(|since_ms| self.now_ms.saturating_sub(since_ms)),
            switchover: self.may_switch_over().err(),
            leader_lost: matches!(&self.role, Role::Standby(standby) if self.is_leader_lost(standby)),
            claiming: matches!(&self.role, Role::Standby(standby) if standby.claim.is_some()),
            switching: matches!(&self.role, Role::Standby(standby) if standby.switch.is_some()),
            leaving: matches!(&self.role, Role::Standby(standby) if standby.leave_ms.is_some()),
            stopping: active.is_some_and(|active| active.stop.is_some()),
            storage: self.storage.health,
            refused: self.refused,
            accepted_loss: match &self.role {
                Role::Starting(starting) if starting.accept_loss.is_some() => Some(AcceptedLoss::UnderWay),
                Role::Starting(starting) => starting.loss_refused.map(AcceptedLoss::Refused),
                Role::Joining(_) | Role::Standby(_) | Role::Active(_) | Role::Frozen(_) | Role::Ended(_) => None,
            },
            recreate: self.recreate_consent(),
            failure: self.failure.clone(),
        }
    }

    fn is_protected(&self) -> bool {
        match &self.role {
            Role::Active(active) => {
                active.confirmed == Confirmed::Pair
                    && !active.doubt
                    && active.lead.as_ref().is_some_and(|lead| lead.stage == LeadStage::Live)
                    && self.is_lead_healthy()
                    && self.header_is_current()
            }
            Role::Starting(_) | Role::Joining(_) | Role::Standby(_) | Role::Frozen(_) | Role::Ended(_) => false,
        }
    }

    /// Rule 10: the record that may be created in place of one that is gone, as far as this seat is concerned.
    fn recreate_consent(&self) -> Option<Record> {
        let known = self.known_uid.filter(|_| self.arbiter == ArbiterState::Gone)?;
        if self.has_tried() || self.adopting.is_some() {
            return None;
        }
        let (holder, members) = match &self.role {
            Role::Active(active) if active.stop.is_none() => match (active.confirmed, &active.lead) {
                (Confirmed::Alone, _) if !active.doubt => (self.me, Members::one(self.me)),
                // A broken session may stay broken: the record only has to say what both agree on.
                (Confirmed::Pair, Some(lead)) if !active.doubt && !self.is_silent() => {
                    (self.me, Members::pair(self.me, lead.peer))
                }
                _ => return None,
            },
            Role::Standby(standby) if !self.is_silent() => (standby.leader, Members::pair(self.me, standby.leader)),
            _ => return None,
        };
        Some(Record {
            holder,
            members,
            term: self.known_term + 1,
            nonce: Nonce(0),
            phase: Phase::Running,
            group: 0,
            predecessor: Some(known),
        })
    }
}
