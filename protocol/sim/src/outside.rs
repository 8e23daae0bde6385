//! Everything outside the seats: the arbiter's answers, the operator, the user.

use std::cmp::Reverse;

use ftvm_protocol::core::{Command, Event, ReadOutcome, RoleName, SwapOutcome};
use ftvm_protocol::identity::{ArbiterUid, Incarnation, RequestId};
use ftvm_protocol::record::{Phase, Record, Snapshot};
use ftvm_protocol::recreation::{self, Vouched};

use crate::arbiter::Put;
use crate::checks::Kind;
use crate::coverage::Fault;
use crate::mutation::Mutation;
use crate::world::{Claimed, Engine, Input, Published, What, World};

impl World {
    // ---- arbiter

    fn answer(&mut self, slot: usize, life: u64, event: Event) {
        if self.rng.percent(self.profile.answer_lost_percent) {
            self.meet(Fault::AnswerLost, slot);
            // Its daemon may say so before the deadline, or not at all.
            let delay_ms = self.mutated_loss_notice_ms().unwrap_or(20);
            let unknown = match event {
                Event::RecordSwapped { request, .. } => Some(Event::RecordSwapped {
                    request,
                    outcome: SwapOutcome::Unknown,
                }),
                Event::RecordRead { request, .. } => Some(Event::RecordRead {
                    request,
                    outcome: ReadOutcome::Unreachable,
                }),
                _ => None,
            };
            if let Some(unknown) = unknown.filter(|_| delay_ms > 20 || self.rng.percent(50)) {
                self.after(
                    delay_ms,
                    What::Input {
                        slot,
                        life,
                        input: Input::Core(unknown),
                    },
                );
            }
            return;
        }
        let delay_ms = self.rng.range(1, self.profile.arbiter_delay_ms);
        self.after(
            delay_ms,
            What::Input {
                slot,
                life,
                input: Input::Core(event),
            },
        );
    }

    pub(crate) fn arbiter_reads(&mut self, slot: usize, life: u64, request: RequestId) {
        let outcome = if self.slots[slot].arbiter_down_until_ms > self.now_ms {
            self.meet(Fault::ArbiterUnreachable, slot);
            ReadOutcome::Unreachable
        } else {
            self.arbiter
                .get()
                .cloned()
                .map_or(ReadOutcome::Gone, ReadOutcome::Found)
        };
        self.answer(slot, life, Event::RecordRead { request, outcome });
    }

    pub(crate) fn send_put(
        &mut self,
        slot: usize,
        request: RequestId,
        (uid, version): (ArbiterUid, u64),
        record: Record,
    ) {
        let Some(life) = self.slots[slot].engine.as_ref().map(|engine| engine.life) else {
            return;
        };
        if self.slots[slot].arbiter_down_until_ms > self.now_ms && self.rng.percent(60) {
            self.meet(Fault::ArbiterUnreachable, slot);
            let outcome = if self.rng.percent(50) {
                SwapOutcome::NotSent
            } else {
                SwapOutcome::Unknown
            };
            self.answer(slot, life, Event::RecordSwapped { request, outcome });
            return;
        }
        let late = self.rng.percent(self.profile.put_late_percent);
        let mut delay_ms = self.rng.range(1, self.profile.arbiter_delay_ms);
        if late {
            self.meet(Fault::PutLate, slot);
            delay_ms += self.rng.range(20, 500);
            if self.rng.percent(50) && self.mutation != Some(Mutation::NoDeadline) {
                let unknown = Event::RecordSwapped {
                    request,
                    outcome: SwapOutcome::Unknown,
                };
                self.input_after(40, slot, Input::Core(unknown));
            }
        }
        self.after(
            delay_ms,
            What::Put {
                slot,
                life,
                request,
                uid,
                version,
                record,
                late,
            },
        );
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn arbiter_writes(
        &mut self,
        slot: usize,
        life: u64,
        request: RequestId,
        uid: ArbiterUid,
        version: u64,
        record: Record,
        late: bool,
    ) {
        let before = self.arbiter.get().map(|snapshot| snapshot.record.clone());
        let put = match self.mutated_put(&record, uid, version) {
            Some(put) => put,
            None => self.arbiter.put(uid, version, record),
        };
        self.log(|| format!("arbiter: write of {slot} (life {life}, late {late}): {put:?}"));
        let outcome = match put {
            Put::Won(snapshot) => {
                self.landed(before, &snapshot);
                SwapOutcome::Won(snapshot)
            }
            Put::Conflict => SwapOutcome::Conflict,
            Put::Gone => SwapOutcome::NotSent,
        };
        self.answer(slot, life, Event::RecordSwapped { request, outcome });
    }

    /// A record was written: whoever holds it now may start from this moment on.
    fn landed(&mut self, before: Option<Record>, now: &Snapshot) {
        let holder = now.record.holder;
        let role = self.engine_of(holder).map(|engine| engine.core.status().role);
        // A source that goes on after a switchover has come further than when it became active.
        let known = self.checks.active() == Some(holder) && role != Some(RoleName::Frozen);
        // A standby that becomes holder beside its leader runs nothing yet.
        let claims = role == Some(RoleName::Standby) && !now.record.members.is_only(holder);
        self.claimed = claims.then(|| {
            let of_source = match (self.claimed, &before) {
                (Some(claim), Some(before)) if before.term == claim.term => claim.of_source,
                (_, before) => before.as_ref().map_or(0, |before| before.term),
            };
            Claimed {
                term: now.record.term,
                of_source,
            }
        });
        if now.record.phase != Phase::Running || known || claims {
            return;
        }
        let overridden = before.as_ref().map(|before| before.holder);
        if self
            .user
            .overrides
            .is_some_and(|(by, of)| by == holder && Some(of) == overridden)
        {
            self.user.overrides = None;
            let slot = self.slots.iter().position(|slot| slot.seat == holder.seat);
            match slot.and_then(|slot| self.slots[slot].disk.volatile) {
                None if self.slot_of(holder).is_none() => self.checks.forget(),
                disk => {
                    let result = self.checks.accept_loss(holder, disk);
                    self.check(result);
                }
            }
            return;
        }
        let Some(slot) = self.slot_of(holder) else { return };
        let Some(engine) = &self.slots[slot].engine else { return };
        if engine.core.status().role == RoleName::Starting {
            let disk = self.slots[slot].disk.volatile;
            let living = before.and_then(|before| {
                let other = self.slots[1 - slot].engine.as_ref()?;
                before.members.contains(other.incarnation).then_some(other.incarnation)
            });
            if let Some(living) = living {
                let text = format!("{holder:?} boots while {living:?} has the running guest");
                self.check(Err((Kind::BootedBesideLiving, text)));
            }
            let result = self.checks.boot(&self.history, holder, disk);
            self.check(result);
        } else {
            let state = engine.driver.state();
            let result = self.checks.take_over(&self.history, holder, state);
            self.check(result);
        }
    }

    pub(crate) fn engine_of(&self, incarnation: Incarnation) -> Option<&Engine> {
        self.slot_of(incarnation)
            .and_then(|slot| self.slots[slot].engine.as_ref())
    }

    pub(crate) fn slot_of(&self, incarnation: Incarnation) -> Option<usize> {
        self.slots.iter().position(|slot| {
            slot.engine
                .as_ref()
                .is_some_and(|engine| engine.incarnation == incarnation)
        })
    }

    pub(crate) fn restore(&mut self, back: usize) {
        let back = back.min(self.arbiter.backups());
        if self.arbiter.restore(back) {
            self.log(|| format!("arbiter: restored, {back} writes back"));
            self.checks.stopped = false;
            self.checks.rights_lapse();
            // Whatever was on its way to the old arbiter is gone with its connections.
            self.queue
                .retain(|Reverse(entry)| !matches!(entry.what, What::Put { .. } | What::Read { .. }));
            for slot in 0..2 {
                self.meet(Fault::Restored, slot);
            }
        }
    }

    // ---- operator and user

    /// A daemon tells what its engine vouches for: when it looks, and if the API server takes it. What was told stays until then.
    pub(crate) fn publish(&mut self, slot: usize) {
        let delay_ms = self.rng.range(5, 40);
        self.after(delay_ms, What::Publish { slot });
        if !self.slots[slot].node_up || self.slots[slot].arbiter_down_until_ms > self.now_ms {
            return;
        }
        let status = self.slots[slot].engine.as_ref().map(|engine| engine.core.status());
        let vouched = status.as_ref().and_then(|status| {
            let by = status.incarnation;
            let record = self.mutated_published(status).or_else(|| status.recreate.clone());
            record.map(|record| Vouched { by, record })
        });
        self.slots[slot].published = Published {
            uid: status.and_then(|status| status.uid),
            vouched,
        };
    }

    pub(crate) fn operator(&mut self) {
        self.after(25, What::Operator);
        self.mutated_operator();
        if let Some(snapshot) = self.arbiter.get().cloned() {
            self.operator_reads(&snapshot);
        } else if self.now_ms >= self.operator.waits_until_ms
            && let Some(record) = self.operator_plan()
        {
            let mut delay_ms = self.rng.range(1, 20);
            self.operator.waits_until_ms = self.now_ms + delay_ms;
            if let Some(slot) = self.twice.take() {
                self.after(delay_ms + 1, What::Pause { slot });
                let again_ms = delay_ms + self.rng.range(60, 300);
                self.after(again_ms, What::Delete { copy_percent: 0 });
                let late_ms = again_ms + self.rng.range(1, 200);
                self.after(late_ms, What::Create { record: record.clone() });
            } else if self.rng.percent(self.profile.put_late_percent) {
                // Nobody waits for the answer any more, and the next operator may decide anew.
                delay_ms += self.rng.range(20, 800);
            }
            self.after(delay_ms, What::Create { record });
        }
    }

    /// A successor replaces the record that the operator knows once every member goes by it.
    fn operator_reads(&mut self, read: &Snapshot) {
        if read.uid != self.operator.uid && read.record.predecessor != Some(self.operator.uid) {
            return;
        }
        let adopted = read.record.members.iter().all(|member| {
            let slot = self.slots.iter().find(|slot| slot.seat == member.seat);
            slot.is_some_and(|slot| slot.published.uid == Some(read.uid))
        });
        if adopted || read.uid == self.operator.uid {
            self.operator.uid = read.uid;
            self.operator.term = self.operator.term.max(read.record.term);
        }
    }

    pub(crate) fn operator_plan(&self) -> Option<Record> {
        if let Some(record) = self.mutated_plan() {
            return Some(record);
        }
        let mut vouched: Vec<_> = self
            .slots
            .iter()
            .filter_map(|slot| slot.published.vouched.clone())
            .collect();
        self.mutate_vouched(&mut vouched);
        recreation::successor(self.operator.uid, self.operator.term, &vouched).ok()
    }

    pub(crate) fn create(&mut self, record: Record) {
        if self.arbiter.get().is_some() {
            return;
        }
        let snapshot = self.arbiter.recreate(record);
        self.log(|| format!("operator: creates {snapshot:?}"));
        // A seat that goes by another record already never goes by this one.
        let holder = self.engine_of(snapshot.record.holder);
        if holder.is_some_and(|engine| engine.core.status().uid == snapshot.record.predecessor) {
            self.landed(None, &snapshot);
        }
    }

    pub(crate) fn user_acts(&mut self) {
        self.after(30, What::User);
        let phase = self
            .arbiter
            .get()
            .map(|snapshot| (snapshot.record.phase, snapshot.record.term));
        if let (true, false, Some((Phase::Stopped, term))) = (self.healing, self.user.wants_stop, phase)
            && !self.user.powered_off
        {
            self.checks.stopped = false;
            self.user.start_over = Some(term);
        }
        for slot in 0..2 {
            let Some(engine) = &self.slots[slot].engine else {
                continue;
            };
            let status = engine.core.status();
            let command = if self.user.wants_stop && !self.checks.stopped && !status.stopping {
                // Every daemon passes it on; who can't do it refuses.
                self.meet(Fault::UserStop, slot);
                Command::Stop
            } else if let (Some(over_stopped_term), false) = (self.user.start_over, self.user.wants_stop) {
                self.meet(Fault::UserStart, slot);
                Command::Start { over_stopped_term }
            } else if self.rng.percent(self.profile.switch_percent) {
                self.meet(Fault::UserSwitchover, slot);
                Command::Switchover
            } else {
                continue;
            };
            let delay_ms = self.rng.range(0, 5);
            self.input_after(delay_ms, slot, Input::Core(Event::Command(command)));
        }
    }
}
