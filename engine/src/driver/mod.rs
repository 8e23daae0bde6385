//! The one thread that owns a seat: it runs the protocol core and does what the core says.
//!
//! ```text
//!   control thread ─┐
//!   link threads  ──┤                 ┌─► arbiter requests, header writes, control messages
//!   vCPUs, devices ─┼─► queue ─► core ─► actions ─► machine: boot, pause, load, run
//!   sender, receiver┤                 └─► outbox: gate
//!   header writer ──┘
//! ```
//!
//! Invariant: everything that may change the seat's role is an event in the queue; the core decides, the driver executes
//! all actions of a step in order before it takes the next event.
//!
//! Invariant: the driver never waits for a peer, a disk or the daemon. What may take long has a thread of its own that
//! reports back. The one exception is a takeover, which waits for what was received to be applied to memory, and, just after
//! this seat gave the guest away, for the disks that its receiver opens.

mod act;
mod announce;
mod command;
mod epochs;
mod figures;
mod follow;
mod guest;
mod hand_over;
mod header;
mod hold;
mod jobs;
mod late;
mod lead;
mod leave;
mod limits;
mod nics;
pub mod process;
mod seat;
mod seat_watch;
mod status;
mod storage;
mod takeover;
mod trace;

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use ftvm_protocol::core::{Core, Event, Gate, RoleName, Status as CoreStatus};
use ftvm_protocol::identity::{Epoch, Incarnation, LinkId, RequestId, Term};

use crate::clock::Moment;
use crate::control::{self, CommandId, FailingStorage, Handle};
use crate::machine::VmEvent;
use crate::replication::link::{LinkEvent, LinkHub, LinkSender};

pub use figures::{FIGURES, Figure, is_figure};
pub use seat::{Prepared, Seat, SeatError, prepare, start_links};

/// What reaches the driver.
#[derive(Debug)]
enum Input {
    Control(control::Input),
    Link(LinkEvent),
    Machine(VmEvent),
    Lead(lead::Report),
    Follow(follow::Report),
    Header {
        request: RequestId,
        written: Result<(), String>,
    },
    Warning(String),
    /// A disk or the journal failed.
    StorageFailed(String),
    /// The disks were flushed for a stop, or could not be.
    Flushed(Result<(), String>),
    /// Output of the running epoch began to wait.
    OutputWaits,
    /// The seat's program is gone, and its time to come back is over; told again and again.
    SeatGone,
    /// A frame with the guest's own address came from outside.
    AddressElsewhere,
    /// The inbox was offered what the source of a switchover passes on.
    LateFrames,
}

/// Where everybody else puts what the driver has to know. Never blocks.
#[derive(Clone, Debug)]
pub struct Queue(Sender<Input>);

impl Queue {
    fn put(&self, input: Input) {
        // The driver is gone only when the process ends.
        let _ = self.0.send(input);
    }

    /// From the control thread.
    pub fn control(&self, input: control::Input) {
        self.put(Input::Control(input));
    }

    /// From a link's thread.
    pub fn link(&self, event: LinkEvent) {
        self.put(Input::Link(event));
    }

    /// From the machine's threads.
    pub fn machine(&self, event: VmEvent) {
        self.put(Input::Machine(event));
    }

    fn lead(&self, report: lead::Report) {
        self.put(Input::Lead(report));
    }

    fn follow(&self, report: follow::Report) {
        self.put(Input::Follow(report));
    }

    fn output_waits(&self) {
        self.put(Input::OutputWaits);
    }

    fn address_elsewhere(&self) {
        self.put(Input::AddressElsewhere);
    }

    fn late_input(&self) {
        self.put(Input::LateFrames);
    }

    fn warn(&self, text: String) {
        self.put(Input::Warning(text));
    }

    fn storage_failed(&self, why: String) {
        self.put(Input::StorageFailed(why));
    }

    fn header(&self, request: RequestId, written: Result<(), String>) {
        self.put(Input::Header { request, written });
    }
}

/// A queue and the driver's end of it.
pub fn queue() -> (Queue, Inputs) {
    let (sender, receiver) = channel();
    (Queue(sender), Inputs(receiver))
}

/// How often the taps of a guest that stands still for a switchover, or has just moved by one, are looked at.
const LOOK_FOR_INPUT: Duration = Duration::from_millis(1);

/// The driver's end of its queue.
pub struct Inputs(Receiver<Input>);

/// A link that is up.
struct Link {
    peer: Incarnation,
    /// Wire version agreed on.
    version: u16,
    sender: LinkSender,
    /// Frames received when it was looked last.
    received: u64,
}

/// How the engine ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit code, see `docs/exit-codes.md`.
    pub code: u8,
    /// What, where, why, what to do.
    pub message: String,
    /// Last term known to be in force.
    pub term: Term,
    /// What failed, where that was the seat's storage.
    pub storage: Vec<FailingStorage>,
}

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// There is none, or only a checkpoint of it.
    None,
    /// Its vCPUs run.
    Running,
    /// It stands still at the end of an epoch.
    Paused,
    /// It would run, and stands still because no standby would take over.
    Held,
}

impl Guest {
    /// Whether it is this seat's to run, and nobody has asked for its last epoch.
    fn is_here(self) -> bool {
        matches!(self, Guest::Running | Guest::Held)
    }
}

/// The owner of a seat.
pub struct Driver {
    core: Core,
    seat: Seat,
    control: Handle,
    hub: LinkHub,
    queue: Queue,
    /// Zero of the core's clock, which runs on while the host sleeps.
    began: Moment,
    links: BTreeMap<LinkId, Link>,
    guest: Guest,
    /// When the guest was resumed last.
    resumed: Instant,
    /// Since when a vCPU stands still because the guest has written all that it may.
    limited_since: Option<Instant>,
    /// When the guest was let write more for the last pass of a resync.
    pass_began: Option<Instant>,
    leading: Option<lead::Leading>,
    following: Option<Following>,
    /// The end of the last sealed epoch: what a frozen source follows from.
    sealed_state: Option<follow::Base>,
    /// Where frames for the guest go that has just moved by a switchover.
    passed_on: Option<late::PassedOn>,
    /// As the core decided last.
    gate: Gate,
    hold: hold::Hold,
    header: header::HeaderWriter,
    /// Requests of the core by the control thread's number.
    requests: BTreeMap<u64, RequestId>,
    /// The command whose step is being executed.
    commanding: Option<CommandId>,
    digest: Option<epochs::PendingDigest>,
    takeover: takeover::Takeover,
    /// What the target of a switchover said, and the core has not heard yet.
    claimed: Option<hand_over::Claimed>,
    announcer: announce::Announcer,
    pause_over: Option<epochs::PauseOver>,
    figures: status::Figures,
    troubles: status::Troubles,
    failing_disks: status::FailingDisks,
    watch: storage::Watch,
    follower_watch: storage::FollowerWatch,
    /// The disks are being flushed for a stop, for so long by now.
    flushing: Option<Duration>,
    told: status::Told,
    leaving: Option<leave::Leaving>,
    ended: Option<Ended>,
}

/// The session that this seat follows.
struct Following {
    session: ftvm_protocol::identity::SessionId,
    /// Where its leader is.
    leader: LinkSender,
    receiving: follow::Receiving,
    applied: Epoch,
}

impl Driver {
    /// A driver for a prepared seat.
    pub fn new(core: Core, mut seat: Seat, control: Handle, hub: LinkHub, queue: Queue) -> std::io::Result<Self> {
        let hold = hold::Hold::new(seat.when_unprotected);
        let failing_disks = status::FailingDisks::new(seat.hangs_after);
        let file = seat.take_header_file()?;
        let (failures, enter) = (seat.failures.clone(), seat.enter(seat::Work::Storage));
        let header = header::HeaderWriter::start(file, queue.clone(), failures, enter)?;
        Ok(Self {
            core,
            seat,
            control,
            hub,
            queue,
            began: Moment::now(),
            links: BTreeMap::new(),
            guest: Guest::None,
            resumed: Instant::now(),
            limited_since: None,
            pass_began: None,
            leading: None,
            following: None,
            sealed_state: None,
            passed_on: None,
            gate: Gate::Closed,
            hold,
            header,
            requests: BTreeMap::new(),
            commanding: None,
            digest: None,
            takeover: takeover::Takeover::default(),
            claimed: None,
            announcer: announce::Announcer::default(),
            pause_over: None,
            figures: status::Figures::default(),
            troubles: status::Troubles::default(),
            failing_disks,
            watch: storage::Watch::default(),
            follower_watch: storage::FollowerWatch::default(),
            flushing: None,
            told: status::Told::default(),
            leaving: None,
            ended: None,
        })
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Runs until the seat ends.
    pub fn run(&mut self, inputs: &Inputs) -> Ended {
        self.step(Event::Tick);
        loop {
            if let Some(ended) = self.ended.take() {
                return ended;
            }
            self.announce_if_due();
            self.drive_epochs();
            self.drive_hand_over();
            self.drive_late_input();
            let wait = self.next_wake();
            match inputs.0.recv_timeout(wait) {
                Ok(input) => self.take(input),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Ended {
                        code: control::exit_code::INTERNAL,
                        message: "every thread of the engine has ended: a defect".to_owned(),
                        term: self.core.status().term,
                        storage: Vec::new(),
                    };
                }
            }
            if self.now_ms() >= self.core.next_wake_ms() {
                self.forget_old_input();
                self.hear();
                self.watch_disks();
                self.step(Event::Tick);
            }
            self.drive_leaving();
        }
    }

    /// The guest stands still until its standby has taken over, or refuses: nobody else reads its taps.
    fn stands_for_switchover(&self) -> bool {
        self.sealed_state.is_some() && self.core.status().role == RoleName::Frozen
    }

    /// How long until something is due although nobody enqueues anything.
    fn next_wake(&mut self) -> Duration {
        let tick = Duration::from_millis(self.core.next_wake_ms()).saturating_sub(self.began.elapsed());
        let announcement = self.announcer.due().filter(|_| self.guest.is_here());
        let looks = self.stands_for_switchover() || self.passes_late_input_on();
        let look = looks.then(|| Instant::now() + LOOK_FOR_INPUT);
        let claimed = self.claimed.as_ref().map(hand_over::Claimed::due);
        let times = [self.epoch_due(), announcement, look, claimed];
        let due = times.into_iter().flatten().min();
        due.map_or(tick, |due| tick.min(due.saturating_duration_since(Instant::now())))
    }

    /// Tells the core of links on which something came that did not pass through here: the data of sessions.
    fn hear(&mut self) {
        let mut heard = Vec::new();
        for (id, link) in &mut self.links {
            let received = link.sender.received_frames();
            if received != std::mem::replace(&mut link.received, received) {
                heard.push(*id);
            }
        }
        for link in heard {
            self.step(Event::Heard { link });
        }
    }

    /// One step of the core, its actions included.
    fn step(&mut self, event: Event) {
        let (stepped, cause) = (Instant::now(), takeover::cause(&event));
        let mut actions = Vec::new();
        self.core.step(self.now_ms(), event, &mut actions);
        for action in actions {
            if self.ended.is_some() {
                return;
            }
            self.act(action);
        }
        let status = self.core.status();
        self.watch_leader(&status, stepped, cause);
        self.after_step(&status);
    }

    fn after_step(&mut self, status: &CoreStatus) {
        self.settle_hold(status);
        self.apply_what_counts(status);
        self.settle_tracking(status);
        self.tell_changes(status);
    }

    /// Lets the receiver bring memory to what the core counts as this seat's state.
    fn apply_what_counts(&mut self, status: &CoreStatus) {
        if let Some(following) = &mut self.following
            && status.role == RoleName::Standby
            && status.epoch > following.applied
        {
            following.applied = status.epoch;
            following.receiving.give(follow::Job::Apply(status.epoch));
        }
    }

    /// A guest without a follower needs no tracking; it is switched on again before a session begins. The source of a
    /// switchover follows before its session begins here. A standby needs none, until it is about to get the guest.
    fn settle_tracking(&mut self, status: &CoreStatus) {
        let followed = self.leading.is_some() || status.peer.is_some();
        let needless = match status.role {
            RoleName::Active => self.guest.is_here() && !followed,
            RoleName::Standby => !status.claiming,
            _ => false,
        };
        if needless && self.seat.machine.is_tracking() {
            self.stop_recording();
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Control(control::Input::Command { id, command }) => self.command(id, command),
            Input::Control(control::Input::Answer {
                request,
                answer,
                why,
                deadline,
            }) => self.answered(request, answer, why, deadline),
            Input::Control(control::Input::DaemonConnected) => self.told.forget(),
            Input::Control(control::Input::DaemonLost) => {
                tracing::warn!("the node daemon is gone; the guest goes on without it");
            }
            Input::Link(event) => self.link_event(event),
            Input::Machine(event) => self.machine_event(event),
            Input::Lead(report) => self.lead_report(report),
            Input::Follow(report) => self.follow_report(report),
            Input::Header { request, written } => match written {
                Ok(()) => {
                    self.takeover.reached(trace::Step::Header);
                    self.step(Event::HeaderWritten { request });
                }
                Err(why) => {
                    tracing::error!("{why}");
                    self.step(Event::HeaderFailed { request });
                }
            },
            Input::Warning(text) => self.warn(text),
            Input::StorageFailed(why) => self.storage_failed(why),
            Input::Flushed(flushed) => self.flushed(flushed),
            // The loop decides anew when the epoch ends.
            Input::OutputWaits => {}
            Input::SeatGone => self.seat_gone(),
            Input::LateFrames => self.seat.inbox.take_offered(),
            Input::AddressElsewhere => {
                self.seat.inbox.elsewhere_taken();
                self.ask_to_announce();
            }
        }
    }

    fn machine_event(&mut self, event: VmEvent) {
        match event {
            // The guest stood still before the event was taken: the state that a successor loads asks for it again.
            VmEvent::Reset | VmEvent::TripleFault | VmEvent::PowerOff if !self.guest.is_here() => {}
            VmEvent::Reset => self.reset_guest("resets"),
            VmEvent::TripleFault => self.reset_guest("resets by a triple fault"),
            VmEvent::DirtyRingFull => self.ring_full(),
            // Before it was resumed last: it goes on already.
            VmEvent::WritesLimited { since } if self.guest != Guest::Running || since < self.resumed => {}
            VmEvent::WritesLimited { since } => {
                self.limited_since.get_or_insert(since);
                self.writes_limited();
            }
            VmEvent::PowerOff => {
                self.tell_guest("switched itself off");
                self.pause_guest();
                self.step(Event::GuestPoweredOff);
            }
            VmEvent::Fatal(error) => self.step(Event::GuestFailed { error }),
            VmEvent::Device(event) => self.device_event(&event),
        }
    }

    fn reset_guest(&mut self, what: &str) {
        self.tell_guest(what);
        match self.seat.machine.reset() {
            Ok(()) => self.resume_guest(),
            Err(error) => self.guest_failed(&error),
        }
    }
}
