//! The end of a run: faults stop, and protected service must come back, or the VM must be in a state in which the
//! documentation says that a person decides.

use ftvm_protocol::core::{Refusal, RoleName, Status};
use ftvm_protocol::record::Phase;

use crate::checks::Kind;
use crate::world::{TIMING, What, World};

/// Why a person is needed. Each is described in `docs/protocol.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PersonNeeded {
    /// The only disk that the record names is lost.
    NamedDiskLost,
    /// The header of a seat that the record names can't be read: its disk is lost.
    HeaderUnreadable,
    /// The arbiter's backup is older than what a seat confirmed.
    RestoredTooOld,
    /// The record was deleted and nobody may agree to a new one.
    RecordGone,
}

impl World {
    /// Faults stop. `None`: service came back.
    pub(crate) fn heal(&mut self) -> Option<PersonNeeded> {
        self.healing = true;
        self.profile.heal();
        self.log(|| "---- faults stop".to_string());
        for slot in 0..2 {
            self.slots[slot].cut_until_ms = 0;
            self.slots[slot].disk.fails_until_ms = 0;
            let hangs_until_ms = &mut self.slots[slot].disk.hangs_until_ms;
            *hangs_until_ms = self.now_ms.min(*hangs_until_ms);
            if let Some(life) = self.slots[slot].engine.as_ref().map(|engine| engine.life) {
                self.resume(slot, life);
            }
            self.after(5, What::Start { slot });
        }
        let released = self.checks.releases;
        // Longer than T, so that seats which wait for it get their turn.
        let until_ms = self.now_ms + 3 * TIMING.contact_limit_ms + 2_000;
        while self.now_ms < until_ms && self.violation.is_none() {
            let next_ms = self.now_ms + 20;
            self.run_until(next_ms);
            if self.is_well(released) {
                return None;
            }
        }
        if self.violation.is_some() {
            return None;
        }
        let person = self.person_needed();
        if person.is_none() {
            let text = self.describe();
            self.check(Err((Kind::Stuck, text)));
        }
        person
    }

    fn is_well(&self, released: u64) -> bool {
        let statuses = || {
            self.slots
                .iter()
                .flat_map(|slot| &slot.engine)
                .map(|engine| engine.core.status())
        };
        let stopped = self
            .arbiter
            .get()
            .is_some_and(|snapshot| snapshot.record.phase == Phase::Stopped);
        if self.user.wants_stop || self.user.powered_off || (stopped && self.checks.stopped) {
            return self.checks.stopped && !statuses().any(|status| status.holds_guest);
        }
        let protected = statuses().any(|status| status.role == RoleName::Active && status.protected);
        let leaving = statuses().any(|status| status.leaving);
        // A guest beside whose disk there is a better one moves there.
        let misplaced = self.slots.iter().any(|slot| {
            let role = slot.engine.as_ref().map(|engine| engine.core.status().role);
            slot.disk.unsure && role == Some(RoleName::Active)
        });
        protected && !leaving && !misplaced && self.checks.releases > released + 5
    }

    fn person_needed(&self) -> Option<PersonNeeded> {
        let refused = |wanted: fn(&Refusal) -> bool| {
            let engines = self.slots.iter().flat_map(|slot| &slot.engine);
            engines
                .filter_map(|engine| engine.core.status().refused)
                .any(|refusal| wanted(&refusal))
        };
        // Who is alone, or a pair in contact, is given a new record by the operator.
        let sure = (0..2).any(|slot| {
            let Some(engine) = &self.slots[slot].engine else {
                return false;
            };
            let status = engine.core.status();
            let sure = |status: &Status| !status.unsettled && !status.stopping;
            let follows = self.slots[1 - slot].engine.as_ref().is_some_and(|peer| {
                let peer = peer.core.status();
                let with = (peer.role, peer.session, peer.uid) == (RoleName::Standby, status.session, status.uid);
                with && sure(&peer) && !peer.leader_lost
            });
            status.role == RoleName::Active && sure(&status) && (status.session.is_none() || follows)
        });
        if self.arbiter.get().is_none() && (!sure || self.disks_lost > 0) {
            return Some(PersonNeeded::RecordGone);
        }
        if self.arbiter.disturbed
            && refused(|refusal| {
                matches!(
                    refusal,
                    Refusal::OwnHeaderAbove
                        | Refusal::OtherHeaderAbove(_)
                        | Refusal::TermBelowKnown
                        | Refusal::RecordStrange
                        | Refusal::ContactTooOld
                        | Refusal::NotNamed
                        | Refusal::PhaseStopped
                )
            })
        {
            return Some(PersonNeeded::RestoredTooOld);
        }
        if self.disks_lost > 0
            && refused(|refusal| {
                matches!(
                    refusal,
                    Refusal::OtherHeaderUnreadable(_) | Refusal::ContactTooOld | Refusal::NotAdopted(_)
                )
            })
        {
            return Some(PersonNeeded::HeaderUnreadable);
        }
        let no_guest = self
            .slots
            .iter()
            .flat_map(|slot| &slot.engine)
            .all(|engine| !engine.core.status().holds_guest);
        if self.disks_lost > 0 && no_guest {
            return Some(PersonNeeded::NamedDiskLost);
        }
        None
    }

    fn describe(&self) -> String {
        let seats = self.slots.iter().map(|slot| match &slot.engine {
            None => "no engine".to_string(),
            Some(engine) => {
                let status = engine.core.status();
                format!(
                    "{:?} {:?} (refused {:?}, session {:?}, gate {:?})",
                    status.incarnation, status.role, status.refused, status.session, status.gate
                )
            }
        });
        format!(
            "record {:?}; {}",
            self.arbiter.get().map(|snapshot| &snapshot.record),
            seats.collect::<Vec<_>>().join("; ")
        )
    }
}
