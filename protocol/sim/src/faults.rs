//! Injected faults, and what daemons say about seats.

use ftvm_protocol::core::{Command, Event, GuestReport, HeaderReport, RoleName, SeatReport};
use ftvm_protocol::identity::{RequestId, SeatId};
use ftvm_protocol::record::Phase;

use crate::coverage::Fault;
use crate::world::{Input, TIMING, What, World};

/// A kind of injected fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injection {
    /// Pause a process for a while.
    Pause,
    /// Pause a process for longer than T.
    LongPause,
    /// Kill a process.
    Crash,
    /// Kill a node; its disk survives.
    PowerCut,
    /// Kill both nodes.
    PowerCutBoth,
    /// Kill a node and lose its disk.
    LoseDisk,
    /// Reset a connection.
    LinkReset,
    /// Nothing that one seat sends arrives for a while.
    Cut,
    /// Both directions are cut for a while.
    CutBoth,
    /// One seat can't reach the arbiter for a while.
    ArbiterAway,
    /// Nobody can reach the arbiter for a while.
    ArbiterDown,
    /// Cut of links and arbiter together: an isolated node.
    Isolate,
    /// The arbiter is away for longer than T and comes back from a backup.
    Restore,
    /// The record is deleted.
    Delete,
    /// The user stops the VM.
    Stop,
    /// The user starts it again.
    Start,
    /// The guest switches itself off.
    PowerOff,
    /// A switchover is asked for.
    Switchover,
    /// A seat is to go: if it follows, it asks to be ejected.
    Leave,
    /// A person overrides a dead holder.
    Override,
    /// Staging or streaming fails.
    SessionFails,
    /// A cut of links for longer than T.
    LongCut,
    /// The links are cut; soon after the arbiter goes away for longer than T and comes back from a backup.
    RestoreWhileCut,
    /// A seat is isolated; the record is deleted and an old copy applied.
    DeleteWhileCut,
    /// The record is deleted; when it is made anew a process pauses, it is deleted again, and the request arrives once more.
    DeleteTwice,
    /// A disk fails for a while.
    DiskFails,
    /// A disk answers nothing for a while.
    DiskHangs,
}

impl Injection {
    /// All kinds.
    pub const ALL: &'static [Injection] = &[
        Self::Pause,
        Self::LongPause,
        Self::Crash,
        Self::PowerCut,
        Self::PowerCutBoth,
        Self::LoseDisk,
        Self::LinkReset,
        Self::Cut,
        Self::CutBoth,
        Self::ArbiterAway,
        Self::ArbiterDown,
        Self::Isolate,
        Self::Restore,
        Self::Delete,
        Self::Stop,
        Self::Start,
        Self::PowerOff,
        Self::Switchover,
        Self::Leave,
        Self::Override,
        Self::SessionFails,
        Self::LongCut,
        Self::RestoreWhileCut,
        Self::DeleteWhileCut,
        Self::DeleteTwice,
        Self::DiskFails,
        Self::DiskHangs,
    ];

    /// In how many of 100 seeds it occurs.
    pub fn enabled_percent(self) -> u64 {
        match self {
            Self::DeleteWhileCut
            | Self::DeleteTwice
            | Self::RestoreWhileCut
            | Self::LoseDisk
            | Self::Restore
            | Self::Delete
            | Self::LongPause
            | Self::LongCut => 12,
            Self::Stop | Self::PowerOff | Self::Override => 20,
            Self::Start => 60,
            Self::PowerCutBoth | Self::ArbiterDown | Self::SessionFails | Self::DiskFails | Self::DiskHangs => 30,
            _ => 50,
        }
    }
}

impl World {
    pub(crate) fn plan_faults(&mut self) {
        for _ in 0..self.profile.faults {
            let at_ms = self.rng.range(10, self.profile.faulty_ms);
            self.after(at_ms, What::Fault);
        }
    }

    pub(crate) fn inject(&mut self) {
        let total: u64 = self.profile.weights.iter().sum();
        if self.healing || total == 0 {
            return;
        }
        let mut at = self.rng.range(0, total - 1);
        let chosen = self.profile.weights.iter().position(|weight| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here
        });
        let Some(kind) = chosen.map(|index| Injection::ALL[index]) else {
            return;
        };
        let slot = self.rng.range(0, 1) as usize;
        self.log(|| format!("fault: {kind:?} at {slot}"));
        match kind {
            Injection::Pause => self.pause(slot, 5, 300),
            Injection::LongPause => self.pause(slot, TIMING.contact_limit_ms, TIMING.contact_limit_ms + 300),
            Injection::Crash => self.crash(slot),
            Injection::PowerCut => self.power_cut(slot),
            Injection::PowerCutBoth => {
                self.power_cut(slot);
                self.power_cut(1 - slot);
            }
            Injection::LoseDisk => {
                self.meet(Fault::DiskLost, slot);
                self.power_cut(slot);
                self.lose_disk(slot);
            }
            Injection::LinkReset => self.reset_link(),
            Injection::Cut => self.cut(slot, 10, 250),
            Injection::CutBoth => {
                self.cut(slot, 10, 250);
                self.cut(1 - slot, 10, 250);
            }
            Injection::LongCut => {
                let limit_ms = TIMING.contact_limit_ms;
                self.cut(slot, limit_ms, limit_ms + 300);
                self.cut(1 - slot, limit_ms, limit_ms + 300);
            }
            Injection::ArbiterAway => self.arbiter_away(slot, 10, 300),
            Injection::ArbiterDown => {
                self.arbiter_away(slot, 10, 300);
                self.arbiter_away(1 - slot, 10, 300);
            }
            Injection::Isolate => {
                self.cut(slot, 10, 300);
                self.cut(1 - slot, 10, 300);
                self.arbiter_away(slot, 10, 500);
            }
            Injection::Restore => self.lose_arbiter_data(0),
            Injection::RestoreWhileCut => {
                let limit_ms = TIMING.contact_limit_ms;
                self.cut(1 - slot, limit_ms + 200, limit_ms + 320);
                self.arbiter_away(slot, limit_ms, limit_ms + 100);
                if self.rng.percent(50) {
                    self.cut(slot, limit_ms + 200, limit_ms + 320);
                }
                let delay_ms = self.rng.range(80, 200);
                self.lose_arbiter_data(delay_ms);
            }
            Injection::Delete => self.delete(30),
            Injection::DeleteWhileCut => {
                self.cut(slot, 200, 400);
                self.cut(1 - slot, 200, 400);
                self.arbiter_away(slot, 150, 300);
                let delay_ms = self.rng.range(90, 150);
                self.after(delay_ms, What::Delete { copy_percent: 80 });
            }
            Injection::DeleteTwice => {
                self.delete(0);
                self.twice = Some(slot);
            }
            Injection::Stop => self.user.wants_stop = true,
            Injection::Start => self.user_starts(),
            Injection::PowerOff => self.power_off(slot),
            Injection::Switchover => self.switchover(slot),
            Injection::Leave => {
                self.meet(Fault::AskedToLeave, slot);
                self.input_after(0, slot, Input::Core(Event::Command(Command::Leave)));
            }
            Injection::Override => self.override_holder(),
            Injection::SessionFails => self.fail_session(slot),
            Injection::DiskFails => self.fail_disk(slot),
            Injection::DiskHangs => self.hang_disk(slot),
        }
    }

    /// The record is deleted; in so many of 100 cases somebody applies an old copy a little later.
    pub(crate) fn delete(&mut self, copy_percent: u64) {
        for slot in 0..2 {
            self.meet(Fault::Deleted, slot);
        }
        let back = self.rng.range(0, 3) as usize;
        let copy = self.arbiter.delete(back);
        self.checks.rights_lapse();
        if let Some(record) = copy.filter(|_| self.rng.percent(copy_percent)) {
            let delay_ms = self.rng.range(1, 60);
            self.after(delay_ms, What::Copy { record });
        }
    }

    pub(crate) fn pause(&mut self, slot: usize, least_ms: u64, most_ms: u64) {
        let for_ms = self.rng.range(least_ms, most_ms);
        self.meet(Fault::Paused, slot);
        if let Some(engine) = &mut self.slots[slot].engine {
            engine.paused = true;
            let life = engine.life;
            self.after(for_ms, What::Resume { slot, life });
        }
    }

    fn crash(&mut self, slot: usize) {
        self.meet(Fault::Crashed, slot);
        self.kill_engine(slot, true);
        let delay_ms = self.rng.range(5, 200);
        self.after(delay_ms, What::Start { slot });
    }

    fn power_cut(&mut self, slot: usize) {
        self.meet(Fault::PowerCut, slot);
        self.kill_engine(slot, false);
        self.slots[slot].node_up = false;
        let keeps = self.rng.percent(30);
        self.slots[slot].disk.cut_power(keeps);
        let delay_ms = self.rng.range(20, 500);
        self.after(delay_ms, What::Start { slot });
    }

    fn reset_link(&mut self) {
        for slot in 0..2 {
            self.meet(Fault::LinkReset, slot);
        }
        for at in 0..self.links.len() {
            let delays_ms = [0, 1].map(|_| Some(self.rng.range(0, 60)));
            self.break_link(at, delays_ms);
        }
    }

    fn cut(&mut self, slot: usize, least_ms: u64, most_ms: u64) {
        self.meet(Fault::CutOneWay, slot);
        let for_ms = self.rng.range(least_ms, most_ms);
        self.slots[slot].cut_until_ms = self.now_ms + for_ms;
    }

    fn arbiter_away(&mut self, slot: usize, least_ms: u64, most_ms: u64) {
        let for_ms = self.rng.range(least_ms, most_ms);
        let until_ms = self.now_ms + for_ms;
        let down = &mut self.slots[slot].arbiter_down_until_ms;
        *down = until_ms.max(*down);
    }

    /// The documented procedure: the arbiter is away for longer than T, then an older record is there.
    fn lose_arbiter_data(&mut self, delay_ms: u64) {
        let back = self.rng.range(1, 6) as usize;
        if delay_ms == 0 {
            self.arbiter_outage(back);
        } else {
            self.after(delay_ms, What::Outage { back });
        }
    }

    pub(crate) fn arbiter_outage(&mut self, back: usize) {
        let for_ms = TIMING.contact_limit_ms + TIMING.arbiter_deadline_ms + 20;
        if self
            .slots
            .iter()
            .any(|slot| slot.arbiter_down_until_ms > self.now_ms + 400)
        {
            return;
        }
        for slot in &mut self.slots {
            slot.arbiter_down_until_ms = self.now_ms + for_ms;
        }
        self.after(for_ms - 1, What::Restore { back });
    }

    fn user_starts(&mut self) {
        let Some(snapshot) = self.arbiter.get() else { return };
        if self.checks.stopped && snapshot.record.phase == Phase::Stopped {
            self.user.start_over = Some(snapshot.record.term);
            self.user.wants_stop = false;
            self.user.powered_off = false;
            self.checks.stopped = false;
        }
    }

    fn power_off(&mut self, slot: usize) {
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        if engine.paused {
            return;
        }
        let Some(guest) = engine.driver.guest.as_mut().filter(|guest| guest.running) else {
            return;
        };
        guest.running = false;
        self.meet(Fault::PoweredOff, slot);
        self.step(slot, Event::GuestPoweredOff);
    }

    fn switchover(&mut self, slot: usize) {
        for slot in [slot, 1 - slot] {
            self.meet(Fault::UserSwitchover, slot);
            self.input_after(0, slot, Input::Core(Event::Command(Command::Switchover)));
        }
    }

    /// A person overrides a holder that he takes for dead. The record may name this seat, too: then he gives up what the other one's header may say.
    fn override_holder(&mut self) {
        let Some(record) = self.arbiter.get().map(|snapshot| snapshot.record.clone()) else {
            return;
        };
        if record.phase != Phase::Running {
            return;
        }
        for slot in 0..2 {
            let Some(engine) = &self.slots[slot].engine else {
                continue;
            };
            if engine.core.status().role != RoleName::Starting || self.slots[slot].seat == record.holder.seat {
                continue;
            }
            let by = engine.incarnation;
            if !self.slots[1 - slot].node_up && self.rng.percent(70) {
                self.slots[1 - slot].fenced = true;
            }
            self.meet(Fault::UserOverride, slot);
            self.user.overrides = Some((by, record.holder));
            let command = Command::AcceptDataLoss {
                holder: record.holder,
                term: Some(record.term).filter(|_| self.rng.percent(50)),
            };
            self.input_after(0, slot, Input::Core(Event::Command(command)));
            break;
        }
    }

    fn fail_session(&mut self, slot: usize) {
        let Some(engine) = &self.slots[slot].engine else { return };
        if engine.paused {
            return;
        }
        if let Some(session) = engine.core.status().session {
            self.meet(Fault::SessionFailed, slot);
            if let Some(engine) = &mut self.slots[slot].engine {
                engine.driver.following = None;
            }
            self.step(slot, Event::SessionFailed { session });
        }
    }

    // ---- daemons

    pub(crate) fn daemons_answer(&mut self, slot: usize, life: u64, request: RequestId, seats: &[SeatId]) {
        let reports = seats.iter().map(|seat| self.report(*seat)).collect();
        let delay_ms = self.rng.range(1, 6);
        let event = Event::SeatsReported { request, reports };
        self.after(
            delay_ms,
            What::Input {
                slot,
                life,
                input: Input::Core(event),
            },
        );
    }

    fn report(&mut self, seat: SeatId) -> SeatReport {
        let out_of_reach = !self.healing && self.rng.percent(5);
        let Some(slot) = self.slots.iter().find(|slot| slot.seat == seat) else {
            // A seat that was replaced: its pod is gone for good, and so is its disk.
            return SeatReport {
                seat,
                header: HeaderReport::Unreadable,
                guest: GuestReport::None,
            };
        };
        if !slot.node_up || out_of_reach {
            let guest = if slot.fenced && !slot.node_up {
                GuestReport::None
            } else {
                GuestReport::Unknown
            };
            return SeatReport {
                seat,
                header: HeaderReport::Unreadable,
                guest,
            };
        }
        let holds = slot
            .engine
            .as_ref()
            .is_some_and(|engine| engine.core.status().holds_guest);
        SeatReport {
            seat,
            header: slot
                .disk
                .header
                .clone()
                .map_or(HeaderReport::Absent, HeaderReport::Found),
            guest: if holds {
                GuestReport::Present
            } else if slot.engine.is_none() && slot.disk.occupied_until_ms > self.now_ms {
                // A process that was told to end, and can't.
                GuestReport::Unknown
            } else {
                GuestReport::None
            },
        }
    }
}
