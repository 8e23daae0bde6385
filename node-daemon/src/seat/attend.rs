//! Attending a running engine: its messages, its requests, its end.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use ftvm_engine::control::{
    Answer, Ask, Command, Connection, ExitReport, FromEngine, Message, Role, SocketError, ToEngine, exit_code,
};
use ftvm_protocol::core::{ReadOutcome, SwapOutcome};
use ftvm_protocol::identity::Incarnation;
use ftvm_protocol::record;
use rustix::event::{PollFd, PollFlags};

use super::informed::Informed;
use super::{REQUESTS_MAX, Seat};
use crate::api::Phase;
use crate::jail::{self, Ended};

/// Pause between attempts to connect to an adopted engine, or to tell one its peers.
const RECONNECT_MS: u64 = 200;
/// Longest deadline that an engine may ask for.
const DEADLINE_MS_MAX: u32 = 60_000;

impl Seat {
    /// Waits for one thing of a running engine and does it.
    pub(super) fn attend(self: &Arc<Seat>) {
        let (incarnation, pidfd, connection) = {
            let inner = self.inner();
            let Some(engine) = &inner.engine else { return };
            (engine.incarnation, engine.pidfd.clone(), engine.connection.clone())
        };
        let connection = match connection {
            Some(connection) => Some(connection),
            None if self.reconnect(incarnation) => return,
            None => None,
        };
        let introduced = connection
            .as_ref()
            .is_some_and(|connection| self.introduce_peers(connection) && self.tell_protection(connection));
        let mut fds = vec![
            PollFd::new(&*pidfd, PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        if let Some(connection) = &connection {
            fds.push(PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN));
        }
        let pause = (!introduced).then_some(Duration::from_millis(RECONNECT_MS));
        // An interrupted wait is a wake-up without news.
        let polled = rustix::event::poll(&mut fds, super::timespec(pause).as_ref()).unwrap_or(0);
        let ready = |index: usize| polled > 0 && fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (ended, woken, readable) = (ready(0), ready(1), ready(2));
        if woken {
            self.drain_wake();
        }
        if let Some(connection) = connection.filter(|_| readable) {
            self.receive(&connection);
        }
        if ended {
            self.engine_ended(incarnation, jail::wait(&pidfd));
        }
    }

    /// Tells a connected engine how its guest is protected if it is not known to go by that. False if that has to be tried again.
    fn tell_protection(&self, connection: &Connection) -> bool {
        let mut inner = self.inner();
        let what = inner.config.protection();
        if inner
            .engine
            .as_ref()
            .is_none_or(|engine| !engine.protection.lacks(&what))
        {
            return true;
        }
        let order = Command::SetProtection {
            protection: what.clone(),
        };
        let Some(command) = inner.tell(connection, order) else {
            return false;
        };
        if let Some(engine) = &mut inner.engine {
            engine.protection = Informed::Told { command, what };
        }
        true
    }

    /// Reads one message.
    fn receive(self: &Arc<Seat>, connection: &Arc<Connection>) {
        match connection.receive::<FromEngine>(false) {
            Ok(Message { body, .. }) => self.handle(body, connection),
            Err(SocketError::WouldBlock) => {}
            Err(SocketError::Malformed(error)) => {
                tracing::warn!(seat = self.config().label(), "message of the engine skipped: {error}");
            }
            Err(_) => {
                // The engine's end is told by its pidfd; until then it is connected to anew.
                let mut inner = self.inner();
                if let Some(engine) = &mut inner.engine {
                    engine.connection = None;
                    engine.introduced = Informed::Unknown;
                    engine.protection = Informed::Unknown;
                }
            }
        }
    }

    fn handle(self: &Arc<Seat>, message: FromEngine, connection: &Arc<Connection>) {
        match message {
            FromEngine::Hello(_) => {}
            FromEngine::Event(event) => self.note(event),
            FromEngine::Reply { id, reply } if self.inner().informed(id, &reply) => {}
            FromEngine::Reply { id, reply } => {
                let waiting = self.inner().replies.remove(&id);
                if let Some(waiting) = waiting {
                    // Whoever asked may have given up.
                    let _ = waiting.send(reply);
                }
            }
            FromEngine::Request {
                request,
                ask,
                deadline_ms,
            } => self.request(request, ask, deadline_ms, connection),
        }
    }

    /// Works on a request in a thread of its own: the arbiter may hang.
    fn request(self: &Arc<Seat>, request: u64, ask: Ask, deadline_ms: u32, connection: &Arc<Connection>) {
        let refused = {
            let mut inner = self.inner();
            inner.requests += 1;
            let held = inner.holds_swaps() && matches!(ask, Ask::SwapRecord { .. });
            let too_many = inner.requests > REQUESTS_MAX;
            held.then_some("the engine is about to be ended")
                .or(too_many.then_some("the daemon is busy with earlier requests of this engine"))
        };
        let deadline = Duration::from_millis(deadline_ms.min(DEADLINE_MS_MAX).into());
        let (seat, connection) = (self.clone(), connection.clone());
        let not_sent = not_sent(&ask);
        let work = {
            let connection = connection.clone();
            move || {
                let (answer, why) = seat.answer(&ask, deadline);
                seat.inner().requests -= 1;
                // The engine answers itself at its deadline.
                let _ = connection.send(&ToEngine::Answer { request, answer, why }, &[]);
            }
        };
        let spawn = || std::thread::Builder::new().name("request".to_owned()).spawn(work);
        let refused = refused.or_else(|| spawn().is_err().then_some("the daemon has no thread for it"));
        if let Some(why) = refused {
            self.inner().requests -= 1;
            let why = Some(why.to_owned());
            let _ = connection.send(
                &ToEngine::Answer {
                    request,
                    answer: not_sent,
                    why,
                },
                &[],
            );
        }
    }

    fn answer(&self, ask: &Ask, deadline: Duration) -> (Answer, Option<String>) {
        match ask {
            Ask::AskSeats { seats } => {
                let reports = (self.surroundings.ask_seats)(&self.config().vm, seats, deadline);
                (Answer::Seats(reports), None)
            }
            Ask::ReadRecord | Ask::SwapRecord { .. } => self.arbiter.ask(ask, deadline),
        }
    }

    fn engine_ended(&self, incarnation: Incarnation, how: Ended) {
        // First of all: its peer takes over the sooner.
        (self.surroundings.tell_gone)(&self.config(), incarnation);
        // What it said last, its exit report among it.
        let connection = self
            .inner()
            .engine
            .as_ref()
            .and_then(|engine| engine.connection.clone());
        while let Some(Ok(message)) = connection
            .as_ref()
            .map(|connection| connection.receive::<FromEngine>(false))
        {
            if let FromEngine::Event(event) = message.body {
                self.note(event);
            }
        }
        let report = self.collect_report(incarnation, how);
        tracing::info!(
            seat = self.config().label(),
            code = report.code,
            "engine ended: {}",
            report.message
        );
        if let Err(error) = self.folder.forget_engine() {
            // Its boot id and start time tell the next daemon that it is gone.
            tracing::warn!("{error}");
        }
        self.source.left();
        self.ended(report.message.clone(), report.code);
        if report.code == exit_code::OK && self.is_stopped() {
            self.inner().phase = Phase::Stopped;
        }
    }

    /// Whether the record says that the virtual machine is stopped. Unreachable: the next engine finds out.
    fn is_stopped(&self) -> bool {
        match self.arbiter.ask(&Ask::ReadRecord, Duration::from_secs(2)).0 {
            Answer::Read(ReadOutcome::Found(snapshot)) => snapshot.record.phase == record::Phase::Stopped,
            _ => false,
        }
    }

    /// How an engine ended: what it reported, or else what the system says of it.
    pub(super) fn collect_report(&self, incarnation: Incarnation, how: Ended) -> ExitReport {
        let written = self.folder.read_json::<ExitReport>("exit.json").ok().flatten();
        let report = match (written.filter(|report| report.incarnation == incarnation), how) {
            (Some(report), Ended::Unseen) => report,
            (Some(report), Ended::Code(code)) if code == report.code => report,
            (_, how) => self.unreported(incarnation, how),
        };
        self.inner().last_exit = Some(report.clone());
        report
    }

    fn unreported(&self, incarnation: Incarnation, how: Ended) -> ExitReport {
        let log = self.folder.file("engine.log").display().to_string();
        let (code, what) = match how {
            Ended::Code(code) => (code, format!("with code {code}")),
            Ended::Signal(signal) => (exit_code::INTERNAL, format!("by signal {signal}")),
            Ended::Unseen => (exit_code::INTERNAL, "while no daemon watched".to_owned()),
        };
        let inner = self.inner();
        ExitReport {
            vm: inner.config.vm.clone(),
            seat: inner.config.seat.clone(),
            incarnation,
            code,
            role: inner.last_role.unwrap_or(Role::Starting),
            term: 0,
            message: format!("the engine ended {what} and without a report: see {log}"),
            storage: Vec::new(),
        }
    }
}

/// What is true of a request that was never worked on.
fn not_sent(ask: &Ask) -> Answer {
    match ask {
        Ask::ReadRecord => Answer::Read(ReadOutcome::Unreachable),
        Ask::SwapRecord { .. } => Answer::Swap(SwapOutcome::NotSent),
        Ask::AskSeats { .. } => Answer::Seats(Vec::new()),
    }
}
