//! The model world: two nodes with a seat each, a network, an arbiter, a user, an operator.
//!
//! Virtual time in milliseconds; everything that happens is an entry of one queue, ordered by time and then by the order
//! of its making, so that a seed always gives the same run.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::rc::Rc;

use ftvm_protocol::core::{Action, Core, Event, Timing};
use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::{ArbiterUid, Incarnation, LinkId, RequestId, SeatId, SessionId, Term};
use ftvm_protocol::message::Message;
use ftvm_protocol::record::{Phase, Record, Snapshot};
use ftvm_protocol::recreation::Vouched;
use ftvm_protocol::wire::{VERSION_MAX, VERSION_MIN};

use crate::arbiter::Arbiter;
use crate::checks::{Checks, Kind, Violation};
use crate::coverage::{Coverage, Fault};
use crate::disk::Disk;
use crate::history::{History, ROOT};
use crate::mutation::Mutation;
use crate::profile::Profile;
use crate::rng::Rng;
use crate::seat::{Bulk, Driver};

/// Times of the simulated seats: as the defaults relate to each other, but short.
pub const TIMING: Timing = Timing {
    heartbeat_ms: 20,
    peer_lost_ms: 80,
    arbiter_deadline_ms: 60,
    retry_ms: 15,
    contact_limit_ms: 500,
    ack_stall_ms: 200,
    switch_ms: 120,
    observe_ms: 150,
    holder_first_ms: 60,
};

/// What reaches a process; held back while it is paused.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    Core(Event),
    Bulk(Rc<Bulk>, u8),
    /// The NIC's thread looks what it may send.
    Nic,
    /// The guest makes a step.
    Guest,
    /// An epoch's time is over.
    Seal,
    /// The resync has little left: cut.
    Cut(SessionId),
    /// The paused guest's last epoch is captured.
    Captured(ftvm_protocol::core::Seal),
    /// Staging of an epoch is done.
    Staged(SessionId, u64),
    /// A header is on its way to the disk.
    HeaderDone(RequestId, SeatHeader),
    /// A request may have been under way for too long.
    DiskWaits,
}

#[derive(Debug)]
pub(crate) enum What {
    Input {
        slot: usize,
        life: u64,
        input: Input,
    },
    Read {
        slot: usize,
        life: u64,
        request: RequestId,
    },
    Put {
        slot: usize,
        life: u64,
        request: RequestId,
        uid: ArbiterUid,
        version: u64,
        record: Record,
        late: bool,
    },
    Ask {
        slot: usize,
        life: u64,
        request: RequestId,
        seats: Vec<SeatId>,
    },
    Fault,
    Resume {
        slot: usize,
        life: u64,
    },
    Start {
        slot: usize,
    },
    Dial,
    Publish {
        slot: usize,
    },
    Operator,
    Create {
        record: Record,
    },
    /// A process stops running for a while.
    Pause {
        slot: usize,
    },
    User,
    Restore {
        back: usize,
    },
    Outage {
        back: usize,
    },
    Copy {
        record: Record,
    },
    Delete {
        copy_percent: u64,
    },
    /// A disk hangs no more, unless it began to anew.
    DiskBack {
        slot: usize,
    },
    /// What a process left under way lands.
    LateWrite {
        slot: usize,
        until_ms: u64,
        copies: u64,
    },
}

pub(crate) struct Entry {
    at_ms: u64,
    order: u64,
    pub(crate) what: What,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at_ms, self.order) == (other.at_ms, other.order)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ms, self.order).cmp(&(other.at_ms, other.order))
    }
}

pub(crate) struct Engine {
    pub(crate) life: u64,
    pub(crate) incarnation: Incarnation,
    /// Newest wire version that it speaks.
    pub(crate) version: u16,
    pub(crate) core: Core,
    pub(crate) driver: Driver,
    pub(crate) paused: bool,
    pub(crate) inbox: Vec<Input>,
    pub(crate) tick_at_ms: u64,
    /// Highest term that the core knew before its current step.
    pub(crate) known_term: u64,
}

pub(crate) struct Slot {
    pub(crate) seat: SeatId,
    pub(crate) node_up: bool,
    /// A person vouched that the node is dead.
    pub(crate) fenced: bool,
    pub(crate) disk: Disk,
    pub(crate) engine: Option<Engine>,
    /// Nothing that this seat sends arrives before then.
    pub(crate) cut_until_ms: u64,
    /// The arbiter is out of reach until then.
    pub(crate) arbiter_down_until_ms: u64,
    /// What its daemon published last, which may be long ago.
    pub(crate) published: Published,
}

/// What a seat's daemon tells the operator, through the API server.
#[derive(Debug, Clone, Default)]
pub(crate) struct Published {
    pub(crate) vouched: Option<Vouched>,
    /// The record's UID that the engine goes by.
    pub(crate) uid: Option<ArbiterUid>,
}

/// What the operator keeps in the VM's status.
#[derive(Debug, Clone)]
pub(crate) struct Operator {
    /// UID of the last record of which it knows that every member goes by it.
    pub(crate) uid: ArbiterUid,
    /// Highest term that it has read.
    pub(crate) term: Term,
    /// It waits for an answer to a creation until then; the request may arrive later.
    pub(crate) waits_until_ms: u64,
}

pub(crate) struct LinkState {
    pub(crate) id: LinkId,
    /// Wire version agreed on.
    pub(crate) version: u16,
    /// Slot and life at either end.
    pub(crate) ends: [(usize, u64); 2],
    pub(crate) open: [bool; 2],
    /// When the last message to either end arrives: order is kept unless the network reorders.
    last_ms: [u64; 2],
}

#[derive(Debug, Clone, Default)]
pub(crate) struct User {
    pub(crate) wants_stop: bool,
    pub(crate) start_over: Option<Term>,
    /// The incarnation that was told to accept the loss of that holder.
    pub(crate) overrides: Option<(Incarnation, Incarnation)>,
    /// The guest switched itself off: it need not come back.
    pub(crate) powered_off: bool,
}

/// A switchover's target had itself named by the record and does not run yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claimed {
    /// Of that record.
    pub(crate) term: Term,
    /// In which the source creates output meanwhile.
    pub(crate) of_source: Term,
}

/// Which releases a run has.
struct Releases {
    /// Numbers of its own: what else happens in a run does not depend on versions.
    rng: Rng,
    /// Engines of two releases meet.
    mixed: bool,
}

impl Releases {
    fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(!seed);
        let mixed = rng.percent(50);
        Self { rng, mixed }
    }
}

/// One run.
pub struct World {
    pub(crate) rng: Rng,
    releases: Releases,
    pub(crate) now_ms: u64,
    pub(crate) queue: BinaryHeap<Reverse<Entry>>,
    order: u64,
    pub(crate) lives: u64,
    pub(crate) slots: [Slot; 2],
    pub(crate) arbiter: Arbiter,
    pub(crate) links: Vec<LinkState>,
    next_link: u64,
    pub(crate) history: History,
    pub(crate) checks: Checks,
    pub(crate) claimed: Option<Claimed>,
    pub(crate) profile: Profile,
    pub(crate) user: User,
    pub(crate) mutation: Option<Mutation>,
    /// Counters.
    pub coverage: Coverage,
    trace: Option<Vec<String>>,
    pub(crate) violation: Option<Violation>,
    pub(crate) healing: bool,
    pub(crate) disks_lost: u64,
    pub(crate) operator: Operator,
    /// The next record that is made anew will be deleted again while this process is paused.
    pub(crate) twice: Option<usize>,
    steps: u64,
    /// Newest probe by slot and link (for mutations).
    pub(crate) probes_sent: HashMap<(usize, LinkId), u64>,
    /// Last write as it would look when won (for mutations).
    pub(crate) last_put: Option<(RequestId, Snapshot)>,
}

impl World {
    /// A new world; nothing has happened.
    pub fn new(seed: u64, mutation: Option<Mutation>, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let profile = Profile::draw(&mut rng);
        let seat = |n: u128| SeatId(0xa000 + n);
        let slot = |n: u128| Slot {
            seat: seat(n),
            node_up: true,
            fenced: false,
            disk: Disk::default(),
            engine: None,
            cut_until_ms: 0,
            arbiter_down_until_ms: 0,
            published: Published::default(),
        };
        let mut world = Self {
            rng,
            releases: Releases::draw(seed),
            now_ms: 0,
            queue: BinaryHeap::new(),
            order: 0,
            lives: 0,
            slots: [slot(0), slot(1)],
            arbiter: Arbiter::new(Record::genesis(seat(0), Phase::Running)),
            links: Vec::new(),
            next_link: 0,
            history: History::default(),
            checks: Checks::default(),
            claimed: None,
            profile,
            user: User::default(),
            mutation,
            coverage: Coverage::default(),
            trace: trace.then(Vec::new),
            violation: None,
            healing: false,
            disks_lost: 0,
            twice: None,
            operator: Operator {
                uid: ArbiterUid(1),
                term: 1,
                waits_until_ms: 0,
            },
            steps: 0,
            probes_sent: HashMap::new(),
            last_put: None,
        };
        world.slots[0].disk = Disk {
            header: Some(SeatHeader::genesis(seat(0), ArbiterUid(1))),
            volatile: Some(ROOT),
            durable: Some(ROOT),
            ..Disk::default()
        };
        for slot in 0..2 {
            world.after(slot as u64, What::Start { slot });
            world.after(11 + slot as u64, What::Publish { slot });
        }
        world.after(5, What::Dial);
        world.after(7, What::Operator);
        world.after(9, What::User);
        world.plan_faults();
        world
    }

    /// Core steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// What happened, line by line, if it was recorded.
    pub fn trace(&self) -> &[String] {
        self.trace.as_deref().unwrap_or(&[])
    }

    /// The invariant that was violated.
    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }

    pub(crate) fn log(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let line = format!("{:>6} {}", self.now_ms, text());
            trace.push(line);
        }
    }

    pub(crate) fn after(&mut self, delay_ms: u64, what: What) {
        self.order += 1;
        self.queue.push(Reverse(Entry {
            at_ms: self.now_ms + delay_ms,
            order: self.order,
            what,
        }));
    }

    pub(crate) fn input_after(&mut self, delay_ms: u64, slot: usize, input: Input) {
        if let Some(engine) = &self.slots[slot].engine {
            let life = engine.life;
            self.after(delay_ms, What::Input { slot, life, input });
        }
    }

    pub(crate) fn check(&mut self, result: Result<(), (Kind, String)>) {
        if let Err((kind, text)) = result
            && self.violation.is_none()
        {
            self.log(|| format!("VIOLATION {kind:?}: {text}"));
            self.violation = Some(Violation {
                kind,
                at_ms: self.now_ms,
                text,
            });
        }
    }

    /// Runs until that time, or a violation.
    pub fn run_until(&mut self, until_ms: u64) {
        while self.violation.is_none() {
            match self.queue.peek() {
                Some(Reverse(entry)) if entry.at_ms <= until_ms => {}
                _ => break,
            }
            if let Some(Reverse(entry)) = self.queue.pop() {
                self.now_ms = entry.at_ms;
                self.happen(entry.what);
            }
        }
        self.now_ms = self.now_ms.max(until_ms);
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Input { slot, life, input } => self.input(slot, life, input),
            What::Read { slot, life, request } => self.arbiter_reads(slot, life, request),
            What::Put {
                slot,
                life,
                request,
                uid,
                version,
                record,
                late,
            } => {
                self.arbiter_writes(slot, life, request, uid, version, record, late);
            }
            What::Ask {
                slot,
                life,
                request,
                seats,
            } => self.daemons_answer(slot, life, request, &seats),
            What::Fault => self.inject(),
            What::Resume { slot, life } => self.resume(slot, life),
            What::Start { slot } => self.start_engine(slot),
            What::Dial => self.dial(),
            What::Publish { slot } => self.publish(slot),
            What::Operator => self.operator(),
            What::Pause { slot } => self.pause(slot, 100, 400),
            What::Create { record } => self.create(record),
            What::User => self.user_acts(),
            What::Restore { back } => self.restore(back),
            What::Outage { back } => self.arbiter_outage(back),
            What::Delete { copy_percent } => self.delete(copy_percent),
            What::DiskBack { slot } => self.disk_back(slot),
            What::LateWrite { slot, until_ms, copies } => self.late_write(slot, until_ms, copies),
            What::Copy { record } => {
                if self.arbiter.get().is_none() {
                    self.log(|| format!("somebody applies an old copy: {record:?}"));
                    self.arbiter.apply_copy(record);
                }
            }
        }
    }

    // ---- processes

    fn input(&mut self, slot: usize, life: u64, input: Input) {
        let Some(engine) = self.slots[slot].engine.as_mut().filter(|engine| engine.life == life) else {
            return;
        };
        if engine.paused {
            engine.inbox.push(input);
            return;
        }
        self.handle(slot, input);
    }

    pub(crate) fn resume(&mut self, slot: usize, life: u64) {
        let Some(engine) = self.slots[slot]
            .engine
            .as_mut()
            .filter(|engine| engine.life == life && engine.paused)
        else {
            return;
        };
        engine.paused = false;
        let inbox = std::mem::take(&mut engine.inbox);
        self.log(|| format!("{slot}: resumes with {} inputs", inbox.len()));
        // The NIC's thread may be the first that runs, under the gate as it was.
        let nic_first = self.rng.percent(60);
        if nic_first {
            self.handle(slot, Input::Nic);
        }
        if self.rng.percent(30) {
            self.handle(slot, Input::Core(Event::Tick));
        }
        for input in inbox {
            if self.slots[slot]
                .engine
                .as_ref()
                .is_none_or(|engine| engine.life != life)
            {
                return;
            }
            self.handle(slot, input);
        }
        self.handle(slot, Input::Nic);
    }

    /// One step of a core, and everything that it wants done.
    pub(crate) fn step(&mut self, slot: usize, event: Event) {
        let now_ms = self.now_ms;
        let Some(event) = self.mutate_event(slot, event) else {
            return;
        };
        self.steps += 1;
        if self.trace.is_some() && !is_boring(&event) {
            self.log(|| format!("{slot}: <- {event:?}"));
        }
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let life = engine.life;
        let mut actions = Vec::new();
        engine.known_term = engine.core.status().term;
        engine.core.step(now_ms, event, &mut actions);
        let wake_ms = engine.core.next_wake_ms();
        if engine.tick_at_ms <= now_ms || wake_ms < engine.tick_at_ms {
            engine.tick_at_ms = wake_ms;
            self.after(
                wake_ms - now_ms,
                What::Input {
                    slot,
                    life,
                    input: Input::Core(Event::Tick),
                },
            );
        }
        for action in actions {
            if self.slots[slot]
                .engine
                .as_ref()
                .is_none_or(|engine| engine.life != life)
            {
                return;
            }
            if self.trace.is_some() && !matches!(&action, Action::Send { message, .. } if is_heartbeat(message)) {
                self.log(|| format!("{slot}: -> {action:?}"));
            }
            self.execute(slot, action);
        }
        self.mutate_after_step(slot);
    }

    // ---- network

    /// The newest wire version of an engine that starts: of this release or of the former one.
    pub(crate) fn draw_version(&mut self) -> u16 {
        let former = self.releases.mixed && self.releases.rng.percent(50);
        if former { VERSION_MIN } else { VERSION_MAX }
    }

    /// A driver of the former release closes a link that brings what its version lacks, and with it a session that works.
    pub(crate) fn check_words(&mut self, from: usize, id: LinkId, message: &Message) {
        let Some(version) = self.links.iter().find(|link| link.id == id).map(|link| link.version) else {
            return;
        };
        if version < VERSION_MAX {
            self.meet(Fault::FormerVersion, from);
        }
        if message.since() > version {
            let text = format!("{from} says {message:?} over a link of wire version {version}");
            self.check(Err((Kind::NotUnderstood, text)));
        }
    }

    pub(crate) fn dial(&mut self) {
        self.after(15, What::Dial);
        let [Some(a), Some(b)] = [&self.slots[0].engine, &self.slots[1].engine] else {
            return;
        };
        if a.paused || b.paused || self.slots.iter().any(|slot| slot.cut_until_ms > self.now_ms) {
            return;
        }
        let ends = [(0, a.life), (1, b.life)];
        if self
            .links
            .iter()
            .any(|link| link.ends == ends && link.open == [true, true])
        {
            return;
        }
        let peers = [b.incarnation, a.incarnation];
        let version = a.version.min(b.version);
        self.next_link += 1;
        let id = LinkId(self.next_link);
        self.links.retain(|link| link.open != [false, false]);
        self.links.push(LinkState {
            id,
            version,
            ends,
            open: [true, true],
            last_ms: [0, 0],
        });
        for (slot, peer) in peers.into_iter().enumerate() {
            let delay_ms = self.rng.range(1, 4);
            let connected = Event::Connected {
                link: id,
                peer,
                version,
            };
            self.input_after(delay_ms, slot, Input::Core(connected));
        }
    }

    /// Breaks a connection; either end learns of it in its own time.
    pub(crate) fn break_link(&mut self, at: usize, delays_ms: [Option<u64>; 2]) {
        let (id, ends) = (self.links[at].id, self.links[at].ends);
        for (end, delay_ms) in delays_ms.into_iter().enumerate() {
            if let Some(delay_ms) = delay_ms.filter(|_| self.links[at].open[end]) {
                self.links[at].open[end] = false;
                let (slot, life) = ends[end];
                let input = Input::Core(Event::Disconnected { link: id });
                self.after(delay_ms, What::Input { slot, life, input });
            }
        }
    }

    /// Carries something over a link, with everything that can happen on the way.
    pub(crate) fn carry(&mut self, from: usize, id: LinkId, what: impl Fn() -> Input, bulk: bool) {
        let Some(at) = self.links.iter().position(|link| link.id == id) else {
            return;
        };
        let to = if self.links[at].ends[0].0 == from { 1 } else { 0 };
        let (slot, life) = self.links[at].ends[to];
        let lost = self.rng.percent(self.profile.loss_percent);
        let cut_until_ms = self.slots[from].cut_until_ms;
        let cut = cut_until_ms > self.now_ms;
        if lost || (cut && !self.profile.cut_delays) {
            let fault = if bulk { Fault::EpochPartial } else { Fault::MessageLost };
            self.meet(fault, slot);
            return;
        }
        let mut delay_ms = self.rng.range(1, 3);
        let late = self.rng.percent(self.profile.late_percent);
        if late {
            delay_ms += self.rng.range(1, 40);
            self.meet(Fault::MessageLate, slot);
        }
        if cut {
            delay_ms += cut_until_ms - self.now_ms;
        }
        let mut at_ms = self.now_ms + delay_ms;
        if !late || !self.profile.reorders {
            at_ms = at_ms.max(self.links[at].last_ms[to]);
            self.links[at].last_ms[to] = at_ms;
        }
        let now_ms = self.now_ms;
        self.after(
            at_ms - now_ms,
            What::Input {
                slot,
                life,
                input: what(),
            },
        );
        if self.rng.percent(self.profile.twice_percent) {
            self.meet(Fault::MessageTwice, slot);
            let again_ms = at_ms - now_ms + self.rng.range(0, 30);
            self.after(
                again_ms,
                What::Input {
                    slot,
                    life,
                    input: what(),
                },
            );
        }
    }

    pub(crate) fn meet(&mut self, fault: Fault, slot: usize) {
        if let Some(engine) = &self.slots[slot].engine {
            self.coverage.met(fault, &engine.core.status());
        }
    }
}

fn is_heartbeat(message: &Message) -> bool {
    matches!(
        message,
        Message::Probe { .. } | Message::ProbeReply { .. } | Message::Ack { .. }
    )
}

fn is_boring(event: &Event) -> bool {
    match event {
        Event::Tick | Event::Heard { .. } => true,
        Event::Received { message, .. } => is_heartbeat(message),
        _ => false,
    }
}
