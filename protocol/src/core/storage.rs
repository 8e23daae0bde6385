//! Rule 13: what this seat's own storage does, and what follows from it.
//!
//! Losing a datastore is survived by the other seat's: an active hands over, a standby is ejected and copied again. What
//! failed once stays failed for the life of the engine, whatever it claims later: after a flush that failed the kernel may
//! call pages clean which never got to the disk.

use crate::identity::Incarnation;

use super::role::{Active, Confirmed, Lead, LeadStage, Role};
use super::{Action, Core, EndReason, StorageHealth, Timing};

/// Longest pause between two switchovers that storage asks for, in times of [`Timing::switch_ms`].
const PAUSE_MAX: u64 = 8;

/// What this seat's storage has done so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnStorage {
    pub(super) health: StorageHealth,
    /// When a switchover may be asked for next.
    next_ms: u64,
    /// How long after that one the next may be.
    pause_ms: u64,
}

impl OwnStorage {
    pub(super) fn new(timing: Timing) -> Self {
        Self {
            health: StorageHealth::Works,
            next_ms: 0,
            pause_ms: 2 * timing.switch_ms,
        }
    }

    pub(super) fn works(self) -> bool {
        self.health == StorageHealth::Works
    }
}

impl Core {
    pub(super) fn on_storage(&mut self, health: StorageHealth, actions: &mut Vec<Action>) {
        if self.storage.health == StorageHealth::Failed {
            return;
        }
        self.storage.health = health;
        match (&self.role, health) {
            (_, StorageHealth::Works) | (Role::Starting(_), StorageHealth::Hangs) => {}
            (Role::Starting(_) | Role::Joining(_), _) => self.end(EndReason::StorageFailed, actions),
            // The leader ejects it, and a new engine is copied whole.
            (Role::Standby(standby), _) => {
                let session = standby.session;
                self.on_session_failed(session, actions);
            }
            // What is due follows from the state.
            (Role::Active(_) | Role::Frozen(_) | Role::Ended(_), _) => {}
        }
    }

    /// The active's own storage is in trouble: the guest goes to the standby, whose storage works as far as is known, for one
    /// that fails breaks its session.
    pub(super) fn drive_storage(&mut self, actions: &mut Vec<Action>) {
        if self.is_header_stuck() {
            self.end(EndReason::StorageFailed, actions);
            return;
        }
        if self.storage.works() || self.now_ms < self.storage.next_ms || self.command_switchover().is_err() {
            return;
        }
        self.storage.next_ms = self.now_ms + self.storage.pause_ms;
        self.storage.pause_ms = (2 * self.storage.pause_ms).min(PAUSE_MAX * self.timing.switch_ms);
    }

    /// A header does not get to the disk, and nothing is released meanwhile. A switchover needs it too. Of storage that is not known to be in
    /// trouble one waits for longer: the header may be all that anybody asks of it.
    fn is_header_stuck(&self) -> bool {
        let Role::Active(active) = &self.role else { return false };
        let limit_ms = if self.storage.works() {
            self.timing.ack_stall_ms
        } else {
            self.timing.switch_ms
        };
        let writes_long = self.writing.is_some() && self.writing_for_ms > limit_ms;
        writes_long && !self.header_is_current() && self.is_replaceable(active)
    }

    /// Should this active end, its standby takes over with everything that was released: it follows, does not leave, and no write of this
    /// seat, which might eject it, is on its way.
    pub(super) fn is_replaceable(&self, active: &Active) -> bool {
        let follows = |lead: &Lead| lead.stage == LeadStage::Live && !lead.leaving;
        let is_pair = active.confirmed == Confirmed::Pair && !active.doubt && active.stop.is_none();
        is_pair && active.lead.as_ref().is_some_and(follows) && self.is_lead_healthy() && !self.has_tried()
    }

    /// Whom a stop leaves as the only member: the guest's last writes are on its disk, and perhaps not on this one. That must not depend on
    /// what can still be written here.
    pub(super) fn stop_leaves(&self, active: &Active) -> Option<Incarnation> {
        let failed = self.storage.health == StorageHealth::Failed && active.confirmed == Confirmed::Pair;
        active.lead.as_ref().filter(|_| failed).map(|lead| lead.peer)
    }

    /// The guest was stopped, and the other seat's disk is the one to boot from.
    pub(super) fn is_left_behind(&self, active: &Active) -> bool {
        self.stop_leaves(active).is_some() && active.stop.is_some_and(|stop| stop.done.is_some())
    }
}
