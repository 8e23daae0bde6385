//! One attempt to change the record: read, decide, perhaps ask the other seats, swap.
//!
//! Every request has a hard deadline. An answer that is handled after it counts as none: a read is dropped, a swap is
//! unknown, whatever the answer says (the process may have been paused meanwhile).

use crate::identity::{ArbiterUid, RequestId, SeatId};
use crate::record::{Members, Phase, Record, Snapshot};

use super::decide::Decision;
use super::role::Role;
use super::{Action, Adopting, ArbiterState, Core, ReadOutcome, Refusal, SeatReport, SwapOutcome};

/// What a swap is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// Members become this seat alone.
    Eject,
    /// Members stay the pair: settles what is unknown on either side.
    Settle,
    /// The joiner becomes a member.
    AdmitJoin,
    /// A standby, or a frozen source whose target is lost, becomes holder alone.
    Takeover,
    /// The target of a switchover becomes holder, both stay members, and the source runs on.
    Claim,
    /// A frozen source goes on as active.
    Unfreeze,
    /// The active stops.
    Stop,
    /// A starting seat boots.
    ColdStart,
    /// A starting seat writes Stopped while nothing runs.
    WriteStopped,
}

#[derive(Debug, Clone)]
enum Stage {
    Reading,
    Asking {
        snapshot: Snapshot,
        seats: Vec<SeatId>,
    },
    Swapping {
        goal: Goal,
        uid: ArbiterUid,
        version: u64,
        record: Record,
    },
}

/// An attempt under way.
#[derive(Debug, Clone)]
pub(super) struct Attempt {
    request: RequestId,
    deadline_ms: u64,
    stage: Stage,
}

impl Attempt {
    pub(super) fn deadline_ms(&self) -> u64 {
        self.deadline_ms
    }

    pub(super) fn is_swapping(&self) -> bool {
        matches!(self.stage, Stage::Swapping { .. })
    }

    /// A write is on its way that takes something from the other side. A claim takes nothing: both stay members.
    pub(super) fn is_taking(&self) -> bool {
        matches!(self.stage, Stage::Swapping { goal, .. } if goal != Goal::Claim)
    }
}

impl Core {
    pub(super) fn begin_attempt(&mut self, actions: &mut Vec<Action>) {
        let request = self.next_request();
        let deadline_ms = self.now_ms + self.timing.arbiter_deadline_ms;
        self.attempt = Some(Attempt {
            request,
            deadline_ms,
            stage: Stage::Reading,
        });
        actions.push(Action::ReadRecord { request, deadline_ms });
    }

    /// The attempt is over; the next one may begin after `pause_ms`.
    fn conclude(&mut self, pause_ms: u64) {
        self.attempt = None;
        self.next_attempt_ms = self.now_ms + pause_ms;
        self.next_observe_ms = self.now_ms + self.timing.observe_ms;
    }

    /// Gives up an attempt that has not yet sent its swap.
    pub(super) fn cancel_attempt(&mut self) {
        if !self.attempt.as_ref().is_some_and(Attempt::is_swapping) {
            self.attempt = None;
            self.next_attempt_ms = self.now_ms;
        }
    }

    pub(super) fn expire_attempt(&mut self, actions: &mut Vec<Action>) {
        let Some(attempt) = self.attempt.take_if(|attempt| self.now_ms > attempt.deadline_ms) else {
            return;
        };
        self.arbiter = ArbiterState::Unreachable;
        match attempt.stage {
            Stage::Reading | Stage::Asking { .. } => {
                self.conclude(self.timing.retry_ms);
                self.refuse(Refusal::ArbiterUnreachable, actions);
            }
            Stage::Swapping { goal, uid, version, .. } => self.swap_unknown(goal, uid, version, actions),
        }
    }

    /// The stage that waits for the answer to this request, if any does.
    fn waits_for(&self, request: RequestId) -> Option<&Stage> {
        let attempt = self.attempt.as_ref()?;
        (attempt.request == request).then_some(&attempt.stage)
    }

    pub(super) fn on_read(&mut self, request: RequestId, outcome: ReadOutcome, actions: &mut Vec<Action>) {
        if !matches!(self.waits_for(request), Some(Stage::Reading)) {
            actions.push(Action::Refused(Refusal::StaleAnswer));
            return;
        }
        match outcome {
            ReadOutcome::Unreachable => {
                self.arbiter = ArbiterState::Unreachable;
                self.conclude(self.timing.retry_ms);
                self.refuse(Refusal::ArbiterUnreachable, actions);
            }
            ReadOutcome::Gone => {
                // A write names the UID: it can't re-create the record, nor land in another one.
                self.settled();
                self.arbiter = ArbiterState::Gone;
                self.conclude(self.timing.retry_ms);
                self.refuse(Refusal::RecordGone, actions);
            }
            ReadOutcome::Found(snapshot) => {
                // An older version comes from a cache, and says nothing of what may still land.
                let changed = self
                    .unsettled
                    .is_some_and(|(uid, version)| uid != snapshot.uid || version < snapshot.version);
                // Where it was our own that landed and made us alone, that right is neither taken nor given back by reading.
                if changed && !snapshot.record.members.is_only(self.me) {
                    self.settled();
                }
                self.arbiter = ArbiterState::Reachable;
                let decision = self.decide(&snapshot, None);
                self.carry_out(decision, snapshot, actions);
            }
        }
    }

    /// A write of unknown outcome can't land any more. That gives nothing back to an active: it stays in doubt.
    fn settled(&mut self) {
        self.unsettled = None;
        if let Role::Standby(standby) = &mut self.role {
            standby.unsettled_since_ms = None;
        }
    }

    pub(super) fn on_reports(&mut self, request: RequestId, reports: &[SeatReport], actions: &mut Vec<Action>) {
        let Some(Stage::Asking { snapshot, seats }) = self.waits_for(request) else {
            actions.push(Action::Refused(Refusal::StaleAnswer));
            return;
        };
        let snapshot = snapshot.clone();
        let reports: Vec<_> = reports
            .iter()
            .filter(|report| seats.contains(&report.seat))
            .cloned()
            .collect();
        let decision = match self.decide(&snapshot, Some(&reports)) {
            // What it takes has changed while we asked: begin anew.
            Decision::Ask(_) => Decision::Done,
            decision => decision,
        };
        self.carry_out(decision, snapshot, actions);
    }

    fn carry_out(&mut self, decision: Decision, snapshot: Snapshot, actions: &mut Vec<Action>) {
        match decision {
            Decision::Done => {
                self.refused = None;
                self.verified();
                let pause_ms = if self.is_wanting() { self.timing.retry_ms } else { 0 };
                self.conclude(pause_ms);
            }
            Decision::Refuse(refusal) => {
                if matches!(
                    refusal,
                    Refusal::RecordStrange | Refusal::TermBelowKnown | Refusal::RecordMalformed
                ) {
                    self.arbiter = ArbiterState::Strange;
                }
                if let Role::Starting(starting) = &mut self.role {
                    // Accepting a loss is for what the person saw then: a refusal answers it.
                    if starting.accept_loss.take().is_some() {
                        starting.loss_refused = Some(refusal);
                    }
                }
                self.conclude(self.timing.retry_ms);
                self.refuse(refusal, actions);
            }
            Decision::Prepare(header) => {
                if let Role::Starting(starting) = &mut self.role {
                    starting.prepare = Some(header);
                }
                self.conclude(0);
            }
            Decision::Adopt => {
                self.adopting = Some(Adopting {
                    uid: snapshot.uid,
                    term: snapshot.record.term,
                    with: snapshot.record.members.iter().find(|member| *member != self.me),
                });
                self.conclude(0);
            }
            Decision::End(reason) => self.end(reason, actions),
            Decision::Ask(seats) => {
                let request = self.next_request();
                let deadline_ms = self.now_ms + self.timing.arbiter_deadline_ms;
                actions.push(Action::AskSeats {
                    request,
                    seats: seats.clone(),
                    deadline_ms,
                });
                self.attempt = Some(Attempt {
                    request,
                    deadline_ms,
                    stage: Stage::Asking { snapshot, seats },
                });
            }
            Decision::Swap { goal, members, phase } => self.swap(goal, members, phase, snapshot, actions),
        }
    }

    fn swap(&mut self, goal: Goal, members: Members, phase: Phase, read: Snapshot, actions: &mut Vec<Action>) {
        let Snapshot {
            record: old,
            uid,
            version,
        } = read;
        let holder = if goal == Goal::WriteStopped {
            old.holder
        } else {
            // Rule 13: a stop that leaves this seat behind.
            let other = members.iter().next().filter(|_| !members.contains(self.me));
            other.unwrap_or(self.me)
        };
        let record = Record {
            holder,
            members,
            term: old.term.max(self.known_term) + 1,
            nonce: self.next_nonce(),
            phase,
            group: old.group,
            predecessor: old.predecessor,
        };
        if goal == Goal::Stop
            && let Role::Active(active) = &mut self.role
            && let Some(stop) = &mut active.stop
        {
            stop.written = true;
        }
        let request = self.next_request();
        let deadline_ms = self.now_ms + self.timing.arbiter_deadline_ms;
        actions.push(Action::SwapRecord {
            request,
            uid,
            version,
            record: record.clone(),
            deadline_ms,
        });
        let stage = Stage::Swapping {
            goal,
            uid,
            version,
            record,
        };
        self.attempt = Some(Attempt {
            request,
            deadline_ms,
            stage,
        });
    }

    pub(super) fn on_swapped(&mut self, request: RequestId, outcome: SwapOutcome, actions: &mut Vec<Action>) {
        let Some(Stage::Swapping {
            goal,
            uid,
            version,
            record,
        }) = self.waits_for(request)
        else {
            actions.push(Action::Refused(Refusal::StaleAnswer));
            return;
        };
        let (goal, uid, version, record) = (*goal, *uid, *version, record.clone());
        match outcome {
            SwapOutcome::Won(snapshot) if snapshot.uid == uid && snapshot.record == record => {
                // The follower needs a moment to see that a write settled its own.
                self.conclude(if goal == Goal::Settle {
                    2 * self.timing.retry_ms
                } else {
                    0
                });
                self.arbiter = ArbiterState::Reachable;
                self.refused = None;
                self.settled();
                self.known_term = record.term;
                self.known_uid = Some(uid);
                self.unseen = None;
                self.won(goal, &record, actions);
            }
            // Somebody answers for a write that is not ours.
            SwapOutcome::Won(_) | SwapOutcome::Unknown => self.swap_unknown(goal, uid, version, actions),
            SwapOutcome::Conflict => {
                self.conclude(self.timing.retry_ms / 4);
                self.refuse(Refusal::Conflict, actions);
            }
            SwapOutcome::NotSent => {
                self.arbiter = ArbiterState::Unreachable;
                self.conclude(self.timing.retry_ms);
                self.refuse(Refusal::ArbiterUnreachable, actions);
            }
        }
    }

    fn swap_unknown(&mut self, goal: Goal, uid: ArbiterUid, version: u64, actions: &mut Vec<Action>) {
        self.conclude(self.timing.retry_ms);
        self.refuse(Refusal::Unsettled, actions);
        // Whether a claim lands, and when, is all the same: both stay members, and nobody runs because of it.
        if goal == Goal::Claim {
            return;
        }
        self.unsettled = Some((uid, version));
        match &mut self.role {
            Role::Active(active) => active.doubt = true,
            Role::Frozen(frozen) => frozen.active.doubt = true,
            Role::Standby(standby) => standby.unsettled_since_ms = Some(self.now_ms),
            Role::Starting(_) | Role::Joining(_) | Role::Ended(_) => {}
        }
    }
}
