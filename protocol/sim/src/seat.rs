//! The driver of a simulated seat: executes the core's actions on a model guest, disk and replication stream.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use ftvm_protocol::core::{Action, Config, Core, EndReason, Event, Gate, Refusal, Seal, StoredHeader};
use ftvm_protocol::identity::{Epoch, Incarnation, LinkId, SeatId, SessionId, Term};
use ftvm_protocol::message::Message;
use ftvm_protocol::record::Phase;

use crate::checks::Kind;
use crate::coverage::Fault;
use crate::disk::Disk;
use crate::history::Node;
use crate::world::{Engine, Input, TIMING, What, World};

/// One epoch on the wire. It travels in several parts and is nothing until all are there.
#[derive(Debug, Clone)]
pub(crate) struct Bulk {
    pub(crate) link: LinkId,
    pub(crate) session: SessionId,
    pub(crate) epoch: Epoch,
    pub(crate) parts: u8,
    /// The join checkpoint: a whole state; others build on the epoch before.
    pub(crate) join: bool,
    pub(crate) state: Node,
    pub(crate) flush: bool,
    pub(crate) outputs: Vec<Node>,
    pub(crate) leader_acked: Epoch,
}

#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) state: Node,
    pub(crate) running: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Leading {
    pub(crate) session: SessionId,
    pub(crate) link: LinkId,
    /// After the cut: epochs stream.
    pub(crate) live: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Following {
    pub(crate) session: SessionId,
    /// Parts that arrived, by epoch.
    pub(crate) arrived: BTreeMap<Epoch, (u8, Rc<Bulk>)>,
    /// The next epoch; unknown until the join checkpoint.
    pub(crate) next: Option<Epoch>,
    /// What is being staged, and whether all its parts are there.
    pub(crate) staging: Option<(bool, Rc<Bulk>)>,
}

impl Following {
    fn new(session: SessionId, next: Option<Epoch>) -> Self {
        Self {
            session,
            arrived: BTreeMap::new(),
            next,
            staging: None,
        }
    }
}

/// What a driver holds.
#[derive(Debug, Clone)]
pub(crate) struct Driver {
    pub(crate) gate: Gate,
    pub(crate) guest: Option<Guest>,
    pub(crate) guest_scheduled: bool,
    pub(crate) seal_scheduled: bool,
    /// The last epoch was asked for: no ordinary ones until the guest is resumed.
    pub(crate) last_epoch: bool,
    /// The running epoch.
    pub(crate) epoch: Epoch,
    /// Output that waits at the NIC, with the epoch that produced it.
    pub(crate) waiting: VecDeque<(Epoch, Node)>,
    /// Output of the running epoch.
    pub(crate) produced: Vec<Node>,
    pub(crate) last_sealed: Option<Node>,
    /// The last staged epoch and its state.
    pub(crate) checkpoint: Option<(Epoch, Node)>,
    /// Those before it that are not applied yet: the core may know of no later one, or want none.
    pub(crate) checkpoints_before: Vec<(Epoch, Node)>,
    pub(crate) stored_outputs: BTreeMap<Epoch, Vec<Node>>,
    pub(crate) leading: Option<Leading>,
    pub(crate) following: Option<Following>,
}

impl Driver {
    fn new() -> Self {
        Self {
            gate: Gate::Closed,
            guest: None,
            guest_scheduled: false,
            seal_scheduled: false,
            last_epoch: false,
            epoch: 0,
            waiting: VecDeque::new(),
            produced: Vec::new(),
            last_sealed: None,
            checkpoint: None,
            checkpoints_before: Vec::new(),
            stored_outputs: BTreeMap::new(),
            leading: None,
            following: None,
        }
    }

    /// The state that this seat would run, or runs.
    pub(crate) fn state(&self) -> Option<Node> {
        self.guest
            .as_ref()
            .map(|guest| guest.state)
            .or(self.checkpoint.map(|(_, state)| state))
    }
}

impl World {
    // ---- the process

    pub(crate) fn start_engine(&mut self, slot: usize) {
        if let Some(left_ms) = self.occupied_ms(slot).filter(|_| !self.mutated_next_life()) {
            self.after(left_ms, What::Start { slot });
            return;
        }
        self.slots[slot].node_up = true;
        self.slots[slot].fenced = false;
        if self.slots[slot].engine.is_some() {
            return;
        }
        self.lives += 1;
        let life = self.lives;
        let incarnation = Incarnation {
            seat: self.slots[slot].seat,
            start: self.mutated_start(life),
        };
        let header = match self.mutated_stored_header(slot) {
            Some(header) => StoredHeader::Found(header),
            None => StoredHeader::Absent,
        };
        let config = Config {
            incarnation,
            header,
            other_seats: vec![self.slots[1 - slot].seat],
            timing: self.mutated_timing(TIMING),
            now_ms: self.now_ms,
        };
        let core = Core::new(config);
        let driver = Driver::new();
        let version = self.draw_version();
        let engine = Engine {
            life,
            incarnation,
            version,
            core,
            driver,
            paused: false,
            inbox: Vec::new(),
            tick_at_ms: 0,
            known_term: 0,
        };
        self.slots[slot].engine = Some(engine);
        self.log(|| format!("{slot}: engine starts as {incarnation:?}, wire version {version}"));
        self.step(slot, Event::Tick);
    }

    /// The process is gone. `orderly`: its connections are closed at once by the node's kernel, unless it has writes under way.
    pub(crate) fn kill_engine(&mut self, slot: usize, orderly: bool) {
        let Some(engine) = self.slots[slot].engine.take() else {
            return;
        };
        let orderly = orderly && !self.leave_disk(slot);
        for at in 0..self.links.len() {
            for end in 0..2 {
                if self.links[at].ends[end] != (slot, engine.life) {
                    continue;
                }
                let silent_ms = self.rng.range(60, 400);
                let notice_ms = if orderly { self.rng.range(1, 4) } else { silent_ms };
                let mut delays_ms = [Some(notice_ms); 2];
                delays_ms[end] = None;
                self.links[at].open[end] = false;
                if orderly || self.rng.percent(70) {
                    self.break_link(at, delays_ms);
                }
            }
        }
        if orderly && self.rng.percent(50) {
            let hint = Event::PeerGone {
                peer: engine.incarnation,
            };
            let delay_ms = self.rng.range(1, 30);
            self.input_after(delay_ms, 1 - slot, Input::Core(hint));
        }
    }

    // ---- inputs

    pub(crate) fn handle(&mut self, slot: usize, input: Input) {
        match input {
            Input::Core(event) => self.step(slot, event),
            Input::Bulk(bulk, part) => {
                self.bulk_arrives(slot, &bulk, part);
                // The driver looks now and then whether something came.
                if self.rng.percent(30) {
                    self.step(slot, Event::Heard { link: bulk.link });
                }
            }
            Input::Nic => self.nic(slot),
            Input::Guest => self.guest_steps(slot),
            Input::Seal => self.seal_due(slot),
            Input::Cut(session) => self.cut_due(slot, session),
            Input::Captured(seal) => self.seal(slot, seal),
            Input::Staged(session, epoch) => self.staged(slot, session, epoch),
            Input::DiskWaits => self.disk_waited(slot),
            Input::HeaderDone(request, header) => {
                if let Some(wait_ms) = self.disk_waits(slot) {
                    self.input_after(wait_ms, slot, Input::HeaderDone(request, header));
                    return;
                }
                if self.disk_fails(slot) || self.rng.percent(self.profile.header_fails_percent) {
                    self.meet(Fault::HeaderFailed, slot);
                    self.step(slot, Event::HeaderFailed { request });
                    return;
                }
                if !self.mutated_header_is_lost(&header) {
                    self.slots[slot].disk.header = Some(header);
                }
                self.step(slot, Event::HeaderWritten { request });
            }
        }
    }

    /// The NIC's thread: looks at the gate for every frame, at the moment of sending.
    fn nic(&mut self, slot: usize) {
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let by = engine.incarnation;
        let gate = engine.driver.gate;
        let mut send = Vec::new();
        engine.driver.waiting.retain(|(epoch, state)| {
            let admitted = gate.admits(*epoch);
            if admitted {
                send.push(*state);
            }
            !admitted
        });
        for state in send {
            self.log(|| format!("{slot}: releases {state}"));
            let result = self.checks.release(&self.history, state, by);
            self.check(result);
            let disk = self.slots[slot].disk.durable;
            let result = self.checks.flushed_here(&self.history, state, by, disk);
            self.check(result);
            if gate == Gate::Open {
                self.creates(by);
            }
        }
    }

    /// A seat that calls the VM protected: the peer could take over with everything that was released.
    fn check_protected(&mut self, slot: usize) {
        let Some(status) = self.slots[slot].engine.as_ref().map(|engine| engine.core.status()) else {
            return;
        };
        let peer = status
            .peer
            .filter(|_| status.protected)
            .and_then(|peer| self.engine_of(peer));
        if let Some(engine) = peer {
            let state = engine.driver.state();
            let peer = engine.incarnation;
            let result = self.checks.covered(&self.history, status.incarnation, state);
            self.check(result);
            let disk = self.slot_of(peer).and_then(|slot| self.slots[slot].disk.durable);
            let result = self.checks.flushed_there(&self.history, status.incarnation, peer, disk);
            self.check(result);
        }
    }

    fn creates(&mut self, by: Incarnation) {
        // In the term that the seat goes by: the arbiter's record may be another successor, which nobody goes by.
        if let Some(engine) = self.engine_of(by) {
            let (generation, known) = (self.arbiter.generation, engine.core.status().term);
            // A source knows its target's term before the target runs.
            let term = match self.claimed {
                Some(claim) if claim.term == known => claim.of_source,
                _ => known,
            };
            let result = self.checks.create(generation, term, by);
            self.check(result);
        }
    }

    fn guest_steps(&mut self, slot: usize) {
        let flush = self.rng.percent(20);
        let output = self.rng.percent(70);
        let delay_ms = self.rng.range(4, 14);
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        engine.driver.guest_scheduled = false;
        let running = engine.driver.guest.as_ref().is_some_and(|guest| guest.running);
        if !running {
            return;
        }
        let (done, told) = if flush {
            self.guest_flushes(slot)
        } else {
            (false, false)
        };
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let Some(guest) = &mut engine.driver.guest else { return };
        let state = self.history.step(guest.state, told);
        guest.state = state;
        self.slots[slot].disk.volatile = Some(state);
        if done {
            self.slots[slot].disk.durable = Some(state);
        }
        if output {
            engine.driver.waiting.push_back((engine.driver.epoch, state));
            engine.driver.produced.push(state);
            let nic_ms = self.rng.range(0, 2);
            self.input_after(nic_ms, slot, Input::Nic);
        }
        self.schedule_guest(slot, delay_ms);
    }

    pub(crate) fn schedule_guest(&mut self, slot: usize, delay_ms: u64) {
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        if !engine.driver.guest_scheduled {
            engine.driver.guest_scheduled = true;
            self.input_after(delay_ms, slot, Input::Guest);
        }
    }

    // ---- actions

    pub(crate) fn execute(&mut self, slot: usize, action: Action) {
        match action {
            Action::SetGate(gate) => {
                let gate = self.mutated_gate(slot, gate);
                if let Some(engine) = &mut self.slots[slot].engine {
                    engine.driver.gate = gate;
                }
                self.check_protected(slot);
                let delay_ms = self.rng.range(0, 2);
                self.input_after(delay_ms, slot, Input::Nic);
            }
            Action::Send { link, message } => self.send(slot, link, message),
            Action::WriteHeader { request, header } => {
                let delay_ms = self.rng.range(1, 4);
                // It may be on the disk before anybody hears of it.
                let troubled = self.disk_fails(slot) || self.disk_waits(slot).is_some();
                if self.rng.percent(20) && !troubled && !self.mutated_header_is_lost(&header) {
                    self.slots[slot].disk.header = Some(header.clone());
                }
                self.input_after(delay_ms, slot, Input::HeaderDone(request, header));
            }
            Action::ReadRecord { request, .. } => {
                let delay_ms = self.rng.range(1, self.profile.arbiter_delay_ms);
                let Some(life) = self.slots[slot].engine.as_ref().map(|engine| engine.life) else {
                    return;
                };
                self.after(delay_ms, What::Read { slot, life, request });
            }
            Action::SwapRecord {
                request,
                uid,
                version,
                record,
                ..
            } => {
                if !self.mutated_swap(slot, request, (uid, version), &record) {
                    self.send_put(slot, request, (uid, version), record);
                }
            }
            Action::AskSeats { request, seats, .. } => {
                let delay_ms = self.rng.range(1, 6);
                let Some(life) = self.slots[slot].engine.as_ref().map(|engine| engine.life) else {
                    return;
                };
                self.after(
                    delay_ms,
                    What::Ask {
                        slot,
                        life,
                        request,
                        seats,
                    },
                );
            }
            action => self.execute_on_guest(slot, action),
        }
    }

    /// Actions that concern the guest and its sessions.
    fn execute_on_guest(&mut self, slot: usize, action: Action) {
        match action {
            Action::BootFromDisk { first_epoch, .. } => self.boot(slot, first_epoch),
            Action::LoadAndRun {
                epoch,
                resend_after,
                term,
            } => self.load_and_run(slot, epoch, resend_after, term),
            Action::Resume => {
                if let Some(engine) = &mut self.slots[slot].engine {
                    engine.driver.last_epoch = false;
                }
                let engine = self.slots[slot].engine.as_ref();
                if let Some((me, state)) = engine.map(|engine| (engine.incarnation, engine.driver.state())) {
                    // The record by which a frozen source goes on may have been deleted since.
                    if self.is_new_active(me) {
                        let result = self.checks.take_over(&self.history, me, state);
                        self.check(result);
                    }
                    self.checks.runs(me);
                }
                if let Some(guest) = self.slots[slot]
                    .engine
                    .as_mut()
                    .and_then(|engine| engine.driver.guest.as_mut())
                {
                    guest.running = true;
                }
                self.schedule_guest(slot, 1);
                self.schedule_seal(slot);
            }
            Action::BeginResync { session, link, .. } => {
                if let Some(engine) = &mut self.slots[slot].engine {
                    engine.driver.leading = Some(Leading {
                        session,
                        link,
                        live: false,
                    });
                }
            }
            Action::StreamResync { session } => {
                let delay_ms = self.rng.range(5, 30);
                self.input_after(delay_ms, slot, Input::Cut(session));
            }
            Action::LeadFrom { session, link, .. } => {
                if let Some(engine) = &mut self.slots[slot].engine {
                    engine.driver.leading = Some(Leading {
                        session,
                        link,
                        live: true,
                    });
                }
                self.schedule_seal(slot);
            }
            Action::Seal(seal) => self.pause_and_seal(slot, seal),
            Action::EndSession { .. } => {
                if let Some(engine) = &mut self.slots[slot].engine {
                    engine.driver.leading = None;
                }
            }
            Action::ReceiveResync { session, .. } => {
                if let Some(engine) = &mut self.slots[slot].engine {
                    engine.driver.checkpoint = None;
                    engine.driver.following = Some(Following::new(session, None));
                }
                self.slots[slot].disk.overwrite();
            }
            Action::FollowFrom { session, base, .. } => self.follow_from(slot, session, base),
            Action::ReportStopped { .. } => self.report_stopped(slot),
            Action::End(reason) => self.ended(slot, reason),
            Action::Refused(refusal) => {
                if refusal == Refusal::ContactTooOld {
                    self.meet(Fault::ContactTooOld, slot);
                }
                self.mutate_refused(slot, refusal);
            }
            Action::SetGate(_)
            | Action::Send { .. }
            | Action::WriteHeader { .. }
            | Action::ReadRecord { .. }
            | Action::SwapRecord { .. }
            | Action::AskSeats { .. } => unreachable!("done by `execute`"),
        }
    }

    pub(crate) fn send(&mut self, slot: usize, link: LinkId, message: Message) {
        self.check_words(slot, link, &message);
        if let Message::Probe { n, .. } = message {
            self.probes_sent.insert((slot, link), n);
        }
        if let Message::Ack { leader, .. } = message
            && self.slot_of(leader).is_some()
        {
            // From here on the leader may release: that is when output comes into being.
            self.creates(leader);
        }
        self.carry(
            slot,
            link,
            || {
                Input::Core(Event::Received {
                    link,
                    message: message.clone(),
                })
            },
            false,
        );
    }

    fn boot(&mut self, slot: usize, first_epoch: Epoch) {
        let disk = self.slots[slot].disk.volatile;
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let me = engine.incarnation;
        if let Some(state) = disk {
            engine.driver.guest = Some(Guest { state, running: true });
            engine.driver.epoch = first_epoch;
        }
        if self.is_new_active(me) || disk.is_none() || self.checks.stopped {
            let result = self.checks.boot(&self.history, me, disk);
            self.check(result);
        }
        self.checks.runs(me);
        self.schedule_guest(slot, 2);
    }

    fn load_and_run(&mut self, slot: usize, epoch: Epoch, resend_after: Epoch, term: Term) {
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let me = engine.incarnation;
        let driver = &mut engine.driver;
        let before = std::mem::take(&mut driver.checkpoints_before);
        let mut staged = driver.checkpoint.into_iter().chain(before);
        let state = staged.find(|(staged, _)| *staged == epoch).map(|(_, state)| state);
        driver.following = None;
        driver.last_epoch = false;
        driver.epoch = epoch + 1;
        driver.last_sealed = None;
        if let Some(state) = state {
            driver.guest = Some(Guest { state, running: true });
            driver.checkpoint = None;
            self.slots[slot].disk.volatile = Some(state);
        }
        for (of, outputs) in std::mem::take(&mut driver.stored_outputs) {
            if of > resend_after && of <= epoch {
                driver.waiting.extend(outputs.into_iter().map(|output| (of, output)));
            }
        }
        // Whoever claimed the record in time may run, even if it was deleted since.
        let claimed = self.claimed.take_if(|claim| claim.term == term);
        if claimed.is_some() || self.is_new_active(me) || state.is_none() || self.checks.stopped {
            let result = self.checks.take_over(&self.history, me, state);
            self.check(result);
        }
        self.checks.runs(me);
        self.schedule_guest(slot, 1);
    }

    /// The record names that incarnation as holder, and the checks have not yet seen it become so.
    fn is_new_active(&self, me: Incarnation) -> bool {
        let holds = self.arbiter.get().is_some_and(|snapshot| snapshot.record.holder == me);
        (holds || self.checks.has_lapsed(me)) && self.checks.active() != Some(me)
    }

    fn pause_and_seal(&mut self, slot: usize, seal: Seal) {
        let goes_on = self.mutated_no_pause(seal);
        let delay_ms = self.rng.range(0, 3);
        if let Some(engine) = &mut self.slots[slot].engine {
            engine.driver.last_epoch = true;
        }
        if let Some(guest) = self.slots[slot]
            .engine
            .as_mut()
            .and_then(|engine| engine.driver.guest.as_mut())
        {
            guest.running = goes_on;
        }
        self.input_after(delay_ms, slot, Input::Captured(seal));
    }

    fn follow_from(&mut self, slot: usize, session: SessionId, base: Epoch) {
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let driver = &mut engine.driver;
        driver.leading = None;
        driver.checkpoint = driver.guest.take().map(|guest| (base, guest.state));
        driver.following = Some(Following::new(session, Some(base + 1)));
        driver.stored_outputs.clear();
        driver.produced.clear();
    }

    fn report_stopped(&mut self, slot: usize) {
        self.log(|| format!("{slot}: the user is told: stopped"));
        if self
            .arbiter
            .get()
            .is_none_or(|snapshot| snapshot.record.phase == Phase::Stopped)
            || self.mutation.is_some()
            || !self.arbiter.disturbed
        {
            let engine = self.slots[slot].engine.as_ref();
            let me = engine.map(|engine| engine.incarnation);
            let state = engine.and_then(|engine| engine.driver.state());
            // Where nobody else has it, what a disk that failed did not take is lost as with a power cut.
            let others = self
                .arbiter
                .get()
                .is_some_and(|snapshot| snapshot.record.members.iter().any(|member| Some(member) != me));
            let kept = others || state == self.slots[slot].disk.durable;
            self.checks.tell_stopped(&self.history, state.is_some() && kept);
        }
        self.user.powered_off |= !self.user.wants_stop;
        self.user.start_over = None;
    }

    fn ended(&mut self, slot: usize, reason: EndReason) {
        let Some(engine) = &self.slots[slot].engine else { return };
        let me = engine.incarnation;
        let holds = self
            .arbiter
            .get()
            .is_some_and(|snapshot| snapshot.record.holder == me && snapshot.record.phase == Phase::Running);
        let gives_up = matches!(
            reason,
            EndReason::LostToSuccessor | EndReason::Ejected | EndReason::SessionOver
        );
        let known = engine.known_term;
        let older = self
            .arbiter
            .get()
            .is_some_and(|snapshot| snapshot.record.term < known && self.checks.active() == Some(me));
        if older && gives_up {
            self.check(Err((
                Kind::GaveUp,
                format!("{me:?} ends ({reason:?}) for a record older than term {known}, which it had confirmed"),
            )));
        }
        if holds && gives_up && !self.arbiter.disturbed {
            self.check(Err((
                Kind::GaveUp,
                format!("{me:?} ends ({reason:?}) though the record names it as holder"),
            )));
        }
        self.kill_engine(slot, true);
        let delay_ms = self.rng.range(5, 30);
        self.after(delay_ms, What::Start { slot });
    }

    pub(crate) fn lose_disk(&mut self, slot: usize) {
        self.slots[slot].disk = Disk::default();
        self.slots[slot].published = crate::world::Published::default();
        self.disks_lost += 1;
        self.lives += 1;
        let seat = SeatId(0xb000 + u128::from(self.lives));
        self.slots[slot].seat = seat;
        // The other one's daemon learns of it.
        let delay_ms = self.rng.range(1, 300);
        self.input_after(delay_ms, 1 - slot, Input::Core(Event::OtherSeats(vec![seat])));
    }
}
