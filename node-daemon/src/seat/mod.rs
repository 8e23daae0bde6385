//! One seat: a thread that starts, adopts, watches and restarts its engine.
//!
//! ```text
//!              set up, or no original disk
//!   NotSetUp ─────────────────────────────► start ──► Running ──► ended ──► Waiting ──(pause)──► start
//!                                            ▲                       └─ code 0: Stopped ──(Start)──► start
//!                   an engine of an earlier daemon lives: adopt
//! ```
//!
//! Invariant: the engine is remembered in the state folder before it gets its launch message. An engine whose daemon dies
//! before that sees its control connection close and ends by itself, so no engine runs that the next daemon doesn't know.
//!
//! Invariant: nothing here ends an engine because the daemon ends.

mod attend;
pub mod failover;
mod former;
mod informed;
mod over;
mod peers;
mod start;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ftvm_engine::control::{Command, Connection, Event, ExitReport, Protection, Reply, Role, Status, ToEngine};
use ftvm_protocol::core::{GuestReport, HeaderReport, SeatReport, StoredHeader};
use ftvm_protocol::identity::{Incarnation, SeatId};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::api::{Phase, SeatStatus, TimedEvent};
use crate::arbiter::Bounded;
use crate::bridges::AllowedBridges;
use crate::config::{JailConfig, LinkConfig, PeerConfig, SeatConfig};
use crate::netns::Netns;
use crate::prepare::Source;
use crate::state::{SeatFolder, StateError};
pub use former::Former;
use informed::Informed;

/// Events kept for status.
const EVENTS_MAX: usize = 64;
/// Engine log: renamed at the start of an engine once it is larger.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// After so long an engine counts as one that ran well.
const RAN_WELL: Duration = Duration::from_secs(30);
/// Whether a doubt is over is looked at this often.
const DOUBT: Duration = Duration::from_secs(2);
/// Requests of one engine that are worked on at a time; more are refused.
const REQUESTS_MAX: usize = 8;

/// Asks the daemons of these seats of a virtual machine, within this time; seats that nobody answers for are missing.
pub type AskSeats = dyn Fn(&str, &[SeatId], Duration) -> Vec<SeatReport> + Send + Sync;
/// Tells other daemons that this incarnation of the seat has ended.
pub type TellGone = dyn Fn(&SeatConfig, Incarnation) + Send + Sync;

/// What a seat needs of its daemon.
pub struct Surroundings {
    /// The engine program.
    pub engine: PathBuf,
    /// Where engines mount their root.
    pub jail_mount_point: PathBuf,
    /// The jail's settings.
    pub jail: JailConfig,
    /// Bridges that guests may be connected to.
    pub bridges: AllowedBridges,
    /// Asks about other seats.
    pub ask_seats: Box<AskSeats>,
    /// Tells of an engine's end.
    pub tell_gone: Box<TellGone>,
}

/// One seat.
pub struct Seat {
    folder: SeatFolder,
    source: Arc<dyn Source>,
    arbiter: Arc<Bounded>,
    surroundings: Arc<Surroundings>,
    /// Position among the seats of this daemon, for its user id.
    slot: u32,
    inner: Mutex<Inner>,
    /// Held while configuration and remembered peers change: not `inner`, which must never wait for a file.
    changing: Mutex<()>,
    wake: OwnedFd,
}

struct Inner {
    /// With the peers in force, which may have been set by request.
    config: SeatConfig,
    /// The peers that the configuration names.
    configured_peers: Vec<PeerConfig>,
    seat_id: Option<SeatId>,
    /// Earlier pods of this seat and of the others of its virtual machine.
    former: Vec<Former>,
    phase: Phase,
    why: String,
    code: u8,
    engine: Option<Engine>,
    /// An engine may be running that could not be reached or read of: nothing is started and nothing is said of it.
    doubt: bool,
    /// It was looked for an engine of an earlier daemon.
    looked: bool,
    /// An engine is being launched.
    launching: bool,
    /// No engine is begun any more.
    retired: bool,
    /// That is remembered for later daemons.
    over: bool,
    starts: u64,
    /// Failures in a row, for the pause before the next start.
    failures: u32,
    /// Engines in a row that ended because of the seat's storage, none of which served well before.
    storage_failures: u32,
    next_start: Option<Instant>,
    removing: bool,
    last_exit: Option<ExitReport>,
    last_role: Option<Role>,
    events: VecDeque<TimedEvent>,
    replies: BTreeMap<u64, Sender<Reply>>,
    next_command: u64,
    requests: usize,
    /// The engine whose swaps of the record are not sent.
    swaps_held: Option<Incarnation>,
}

/// A running engine.
struct Engine {
    incarnation: Incarnation,
    pid: i32,
    pidfd: Arc<OwnedFd>,
    adopted: bool,
    /// Whether it has a user id of its own.
    own_user: bool,
    since: Instant,
    /// Since when it has been a standby or had the guest, as far as this daemon was told.
    serves_since: Option<Instant>,
    connection: Option<Arc<Connection>>,
    introduced: Informed<LinkConfig>,
    protection: Informed<Protection>,
}

impl Engine {
    /// Has it been a standby, or had the guest, for so long that its storage works? A resync alone is no proof, however long it takes.
    fn served_well(&self) -> bool {
        self.serves_since.is_some_and(|since| since.elapsed() >= RAN_WELL)
    }
}

impl Inner {
    fn has_engine(&self) -> bool {
        self.engine.is_some() || self.doubt || self.launching || !self.looked
    }

    fn storage_failures(&self) -> u32 {
        let served_well = self.engine.as_ref().is_some_and(Engine::served_well);
        if served_well { 0 } else { self.storage_failures }
    }

    fn holds_swaps(&self) -> bool {
        let engine = self.engine.as_ref().map(|engine| engine.incarnation);
        self.swaps_held.is_some() && self.swaps_held == engine
    }

    /// Sends a command; gives its number.
    fn tell(&mut self, connection: &Connection, command: Command) -> Option<u64> {
        let id = self.next_command;
        self.next_command += 1;
        let sent = connection.send(&ToEngine::Command { id, command }, &[]);
        sent.is_ok().then_some(id)
    }

    /// A reply of the engine; true if it was to something that it was told.
    fn informed(&mut self, id: u64, reply: &Reply) -> bool {
        let Some(engine) = &mut self.engine else { return false };
        engine.introduced.replied(id, reply) || engine.protection.replied(id, reply)
    }
}

/// Why a command was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// There is no engine.
    #[error("seat {seat} has no running engine ({why})")]
    NoEngine {
        /// The seat.
        seat: String,
        /// Its state.
        why: String,
    },
    /// It does not answer.
    #[error("the engine of seat {seat} did not answer within {after_ms} ms: it may be stopped (SIGSTOP) or overloaded")]
    NoAnswer {
        /// The seat.
        seat: String,
        /// How long it was waited for.
        after_ms: u128,
    },
}

impl Seat {
    /// A seat; [`Seat::run`] is its thread.
    pub fn new(
        mut config: SeatConfig,
        folder: SeatFolder,
        source: Arc<dyn Source>,
        arbiter: Arc<Bounded>,
        surroundings: Arc<Surroundings>,
        slot: u32,
    ) -> Result<Arc<Seat>, StateError> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| {
            StateError::Io {
                what: "eventfd for",
                path: folder.path().to_owned(),
                source: errno.into(),
            }
        })?;
        let in_force = peers::in_force(&config, &folder);
        let configured_peers = std::mem::replace(&mut config.link.peers, in_force);
        let over = folder.has(over::FILE)?;
        let inner = Inner {
            config,
            configured_peers,
            seat_id: None,
            former: Vec::new(),
            phase: Phase::Waiting,
            why: "not started yet".to_owned(),
            code: 0,
            engine: None,
            doubt: false,
            looked: false,
            launching: false,
            retired: over,
            over,
            starts: 0,
            failures: 0,
            storage_failures: 0,
            next_start: None,
            removing: false,
            last_exit: None,
            last_role: None,
            events: VecDeque::new(),
            replies: BTreeMap::new(),
            next_command: 1,
            requests: 0,
            swaps_held: None,
        };
        Ok(Arc::new(Seat {
            folder,
            source,
            arbiter,
            surroundings,
            slot,
            inner: Mutex::new(inner),
            changing: Mutex::new(()),
            wake,
        }))
    }

    /// The supervising thread; returns when the seat was removed.
    pub fn run(self: &Arc<Seat>) {
        self.adopt();
        self.inner().looked = true;
        loop {
            let (removing, has_engine) = {
                let inner = self.inner();
                (inner.removing, inner.engine.is_some())
            };
            if has_engine {
                self.attend();
            } else if removing {
                return;
            } else if self.doubts() {
                self.sleep(Some(DOUBT));
                self.adopt();
            } else {
                match self.pause_before_start() {
                    Some(Duration::ZERO) => self.launch(),
                    pause => self.sleep(pause),
                }
            }
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Changed in single steps, so a panic elsewhere leaves it whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Only a full counter can refuse, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits until the seat is woken or the pause is over.
    fn sleep(&self, pause: Option<Duration>) {
        let mut fds = [PollFd::new(&self.wake, PollFlags::IN)];
        // An interrupted wait is a wake-up without news.
        let _ = rustix::event::poll(&mut fds, timespec(pause).as_ref());
        self.drain_wake();
    }

    fn drain_wake(&self) {
        let mut counter = [0u8; 8];
        // Non-blocking; an empty counter only means that nobody woke us.
        let _ = rustix::io::read(&self.wake, &mut counter);
    }

    /// How long to wait before the engine may be started; none: until something changes.
    fn pause_before_start(&self) -> Option<Duration> {
        let missing = self.source.missing(&self.config());
        let mut inner = self.inner();
        if inner.doubt || inner.phase == Phase::Stopped {
            return None;
        }
        let retired = inner.retired.then(|| (Phase::Waiting, "its pod ends".to_owned()));
        if let Some(missing) = missing.or(retired) {
            (inner.phase, inner.why) = missing;
            return None;
        }
        Some(
            inner
                .next_start
                .map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now())),
        )
    }

    // ---- what the daemon asks of it

    /// The configuration in force for the next start.
    pub fn config(&self) -> SeatConfig {
        self.inner().config.clone()
    }

    /// The folder of the seat.
    pub fn folder(&self) -> &SeatFolder {
        &self.folder
    }

    /// Where its files come from.
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// Its arbiter.
    pub fn arbiter(&self) -> &Arc<Bounded> {
        &self.arbiter
    }

    /// Its position among the daemon's seats.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The seat, once its identity was read.
    pub fn seat_id(&self) -> Option<SeatId> {
        self.inner().seat_id
    }

    /// Remembers the identity.
    pub fn set_seat_id(&self, seat_id: SeatId) {
        self.inner().seat_id = Some(seat_id);
    }

    /// Replaces the configuration; a waiting seat is tried again at once. Peers that were set hold as long as the
    /// configured ones stay as they were.
    pub fn reconfigure(&self, mut config: SeatConfig) {
        let changing = self.changing();
        let in_force = peers::in_force(&config, &self.folder);
        let configured = std::mem::replace(&mut config.link.peers, in_force);
        let mut inner = self.inner();
        inner.configured_peers = configured;
        inner.config = config;
        inner.next_start = None;
        drop((inner, changing));
        self.wake();
    }

    /// Tries to start at once, also after a stop.
    pub fn start_now(&self) {
        let mut inner = self.inner();
        if inner.engine.is_none() {
            inner.phase = Phase::Waiting;
            inner.next_start = None;
        }
        drop(inner);
        self.wake();
    }

    /// So many engines in a row ended because of the seat's storage before this daemon began to count.
    pub fn had_storage_failures(&self, failures: u32) {
        let mut inner = self.inner();
        inner.storage_failures = inner.storage_failures.saturating_add(failures);
    }

    /// Something that a start needs has come: tries at once, unless the virtual machine is stopped.
    pub fn try_soon(&self) {
        self.inner().next_start = None;
        self.wake();
    }

    /// Ends the engine and then the thread.
    pub fn remove(&self) {
        self.inner().removing = true;
        peers::forget(&self.folder);
        self.end_engine();
    }

    /// The incarnation of the running engine.
    pub fn incarnation(&self) -> Option<Incarnation> {
        self.inner().engine.as_ref().map(|engine| engine.incarnation)
    }

    /// Whether an engine runs, or may be running, or is about to.
    pub fn has_engine(&self) -> bool {
        self.inner().has_engine()
    }

    /// Tells the engine to end, without touching the record.
    pub fn end_engine(&self) {
        let quit = self.send_command(Command::Quit);
        if quit.is_err() {
            // It does not read: it is to go all the same.
            self.kill();
        }
        self.wake();
    }

    /// Kills the engine.
    pub fn kill(&self) {
        let pidfd = self.inner().engine.as_ref().map(|engine| engine.pidfd.clone());
        if let Some(pidfd) = pidfd {
            // Only an ended process refuses.
            let _ = rustix::process::pidfd_send_signal(&*pidfd, rustix::process::Signal::KILL);
        }
    }

    /// Hands a command to the engine and waits for its reply.
    pub fn command(&self, command: Command, patience: Duration) -> Result<Reply, CommandError> {
        let (id, receiver) = self.send_command(command)?;
        let reply = receiver.recv_timeout(patience);
        self.inner().replies.remove(&id);
        let after_ms = patience.as_millis();
        reply.map_err(|_| CommandError::NoAnswer {
            seat: self.config().label(),
            after_ms,
        })
    }

    fn send_command(&self, command: Command) -> Result<(u64, Receiver<Reply>), CommandError> {
        let (sender, receiver) = channel();
        let (id, connection) = {
            let mut inner = self.inner();
            let id = inner.next_command;
            inner.next_command += 1;
            let connection = inner.engine.as_ref().and_then(|engine| engine.connection.clone());
            let seat = inner.config.label();
            let connection = connection.ok_or_else(|| CommandError::NoEngine {
                seat,
                why: inner.why.clone(),
            })?;
            inner.replies.insert(id, sender);
            (id, connection)
        };
        if connection.send(&ToEngine::Command { id, command }, &[]).is_err() {
            let mut inner = self.inner();
            inner.replies.remove(&id);
            return Err(CommandError::NoAnswer {
                seat: inner.config.label(),
                after_ms: 0,
            });
        }
        Ok((id, receiver))
    }

    /// The running engine and the network namespace that it lives in, as far as that can be known.
    pub fn engine_netns(&self) -> Option<(Incarnation, Netns)> {
        let (incarnation, pid, pidfd) = {
            let inner = self.inner();
            let engine = inner.engine.as_ref()?;
            (engine.incarnation, engine.pid, engine.pidfd.clone())
        };
        let netns = Netns::of_process(pid).inspect_err(|error| tracing::debug!(pid, "its network namespace: {error}"));
        let netns = netns.ok()?;
        // Only now is it sure that the number still meant the engine.
        (!start::has_ended(&pidfd)).then_some((incarnation, netns))
    }

    /// Holds back what this engine would write into the record; none: everything passes. Whether nothing is under way to the arbiter.
    pub fn hold_swaps(&self, of: Option<Incarnation>) -> bool {
        let mut inner = self.inner();
        inner.swaps_held = of;
        inner.requests == 0
    }

    /// Whether the daemons of all these seats say that an engine there has the guest, or a checkpoint that it may run.
    pub fn guest_is_at(&self, seats: &[SeatId], deadline: Duration) -> bool {
        let reports = (self.surroundings.ask_seats)(&self.config().vm, seats, deadline);
        let is_at = |seat: &SeatId| {
            let mut of_seat = reports.iter().filter(|report| report.seat == *seat);
            of_seat.any(|report| report.guest == GuestReport::Present)
        };
        seats.iter().all(is_at)
    }

    /// The engine's own status, asked now.
    pub(crate) fn engine_status(&self, patience: Duration) -> Option<Status> {
        match self.command(Command::Status, patience) {
            Ok(Reply::Status(status)) => Some(*status),
            _ => None,
        }
    }

    /// Header and guest of this seat, for another seat's cold start (rules 8 and 11).
    pub fn report(&self, seat_id: SeatId, patience: Duration) -> SeatReport {
        let header = self.header_report();
        let (doubt, running) = {
            let inner = self.inner();
            let running = inner.engine.is_some();
            // Before it was looked for one of an earlier daemon nothing is known.
            (inner.doubt || (!inner.looked && !running), running)
        };
        let guest = match (doubt, running) {
            (true, _) => GuestReport::Unknown,
            (false, false) => GuestReport::None,
            (false, true) => match self.engine_status(patience) {
                // One that is about to end, or wants to, has the guest no longer than it takes: nobody else shall end because of it.
                Some(status) if status.holds_guest && (status.leaving || self.inner().holds_swaps()) => {
                    GuestReport::Unknown
                }
                Some(status) if status.holds_guest => GuestReport::Present,
                Some(_) => GuestReport::None,
                None => GuestReport::Unknown,
            },
        };
        SeatReport {
            seat: seat_id,
            header,
            guest,
        }
    }

    fn header_report(&self) -> HeaderReport {
        match self.source.header(&self.config()) {
            Ok(StoredHeader::Found(header)) => HeaderReport::Found(header),
            Ok(StoredHeader::Absent) => HeaderReport::Absent,
            Ok(StoredHeader::Damaged) | Err(_) => HeaderReport::Unreadable,
        }
    }

    /// Everything for people.
    pub fn status(&self, patience: Duration) -> SeatStatus {
        let engine = self.engine_status(patience);
        let inner = self.inner();
        let own_user = inner
            .engine
            .as_ref()
            .map_or(self.may_change_user(), |engine| engine.own_user);
        SeatStatus {
            vm: inner.config.vm.clone(),
            seat: inner.config.seat.clone(),
            seat_id: inner.seat_id,
            original_disk: inner.config.original_disk,
            link_address: inner.config.link.listen,
            peers: inner.config.link.peers.clone(),
            phase: inner.phase,
            why: inner.why.clone(),
            code: inner.code,
            pid: inner.engine.as_ref().map(|engine| engine.pid),
            adopted: inner.engine.as_ref().is_some_and(|engine| engine.adopted),
            jail: if own_user { "full" } else { "reduced" }.to_owned(),
            starts: inner.starts,
            storage_failures: inner.storage_failures(),
            console: self.folder.file("console.log"),
            log: self.folder.file("engine.log"),
            engine,
            last_exit: inner.last_exit.clone(),
            events: inner.events.iter().cloned().collect(),
        }
    }

    fn note(&self, event: Event) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let mut inner = self.inner();
        tracing::info!(seat = inner.config.label(), "{}", describe(&event));
        if let Event::Role { role, .. } = event {
            inner.last_role = Some(role);
            // What it served before this counts; it is copied anew now.
            inner.storage_failures = inner.storage_failures();
            if let Some(engine) = &mut inner.engine {
                match role {
                    Role::Standby | Role::Active | Role::Frozen => {
                        engine.serves_since.get_or_insert_with(Instant::now);
                    }
                    Role::Starting | Role::Joining => engine.serves_since = None,
                    Role::Ended => {}
                }
            }
        }
        inner.events.push_back(TimedEvent { unix_ms, event });
        if inner.events.len() > EVENTS_MAX {
            inner.events.pop_front();
        }
    }
}

fn describe(event: &Event) -> String {
    serde_json::to_string(event).unwrap_or_default()
}

fn timespec(duration: Option<Duration>) -> Option<Timespec> {
    duration.map(|duration| Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    })
}

#[cfg(test)]
pub(crate) mod testing;
