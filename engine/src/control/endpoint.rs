//! The engine's end: a thread that reads what the daemon says and enqueues it for the driver.
//!
//! ```text
//!   daemon ══► thread `control` ── Input ──► driver's queue
//!          ◄── Handle::{request, event, reply, set_status} ── driver
//! ```
//!
//! Invariant: every arbiter request gets exactly one [`Input::Answer`], in time or as unknown. An answer that is
//! read after its deadline counts as unknown too, for this process may have been stopped in between (rule 2).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ftvm_protocol::core::{ReadOutcome, SwapOutcome};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::message::{
    Answer, Ask, CONTROL_FD, Command, Event, Fd, FromEngine, Hello, Launch, Reply, ToEngine, VERSION,
};
use super::socket::{Connection, Listener, Message, SocketError};
use crate::clock::Moment;

/// Errors of the engine's control end.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The launch message did not come.
    #[error("no launch message on descriptor {CONTROL_FD}: the engine is started by ftvm-node-daemon, not by hand")]
    NoLaunch(#[source] SocketError),
    /// The first message is something else.
    #[error("the first message on the control socket is no launch message: daemon and engine differ in version")]
    NotALaunch,
    /// Another version.
    #[error(
        "the daemon speaks launch version {daemon}, this engine {VERSION}: install daemon and engine of one release"
    )]
    Version {
        /// The daemon's.
        daemon: u16,
    },
    /// A descriptor is named that did not come, or twice.
    #[error("launch message names descriptor {index} for {what}, which did not come or was named before")]
    MissingDescriptor {
        /// Its position.
        index: u16,
        /// What it is for.
        what: String,
    },
    /// Descriptors came that nothing names.
    #[error("launch message came with {count} descriptors that it does not name")]
    ExtraDescriptors {
        /// How many.
        count: usize,
    },
    /// Thread or event descriptor could not be made.
    #[error("control thread: {what}")]
    Start {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

/// The descriptors of a launch; each is taken once.
#[derive(Debug)]
pub struct LaunchFds(Vec<Option<OwnedFd>>);

impl LaunchFds {
    /// Takes the descriptor at this position; `what` names it in the error.
    pub fn take(&mut self, fd: Fd, what: &str) -> Result<OwnedFd, EndpointError> {
        let slot = self.0.get_mut(usize::from(fd.0)).and_then(Option::take);
        slot.ok_or_else(|| EndpointError::MissingDescriptor {
            index: fd.0,
            what: what.to_owned(),
        })
    }

    /// Call when all were taken: refuses leftovers.
    pub fn finish(self) -> Result<(), EndpointError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            count => Err(EndpointError::ExtraDescriptors { count }),
        }
    }
}

/// Takes the control socket ([`CONTROL_FD`]) over from the daemon; call once, first thing in `main`.
///
/// # Safety
/// Nothing else in the process owns descriptor [`CONTROL_FD`].
pub unsafe fn inherited_connection() -> Result<Connection, EndpointError> {
    // SAFETY: the caller promises that nobody else owns it; a wrong or closed descriptor is refused by `from_fd`.
    let fd = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).map_err(|source| EndpointError::Start {
        what: "descriptor 3 is not open",
        source: source.into(),
    })?;
    Connection::from_fd(fd).map_err(EndpointError::NoLaunch)
}

/// Waits for the launch message.
pub fn receive_launch(connection: &Connection) -> Result<(Launch, LaunchFds), EndpointError> {
    let Message { body, fds } = connection.receive(true).map_err(EndpointError::NoLaunch)?;
    let ToEngine::Launch(launch) = body else {
        return Err(EndpointError::NotALaunch);
    };
    if launch.version != VERSION {
        return Err(EndpointError::Version { daemon: launch.version });
    }
    Ok((*launch, LaunchFds(fds.into_iter().map(Some).collect())))
}

/// What the control thread enqueues for the driver.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A command; the driver replies by [`Handle::reply`] with this number.
    Command {
        /// Number for the reply. Unique over all connections.
        id: CommandId,
        /// What to do.
        command: Command,
    },
    /// The one answer to a request.
    Answer {
        /// Number that [`Handle::request`] gave.
        request: u64,
        /// The answer; the safe one of its kind if the deadline passed or the daemon went.
        answer: Answer,
        /// Why it is not what one would wish, for logs and status.
        why: Option<String>,
        /// An answer that is handled later than this counts as unknown.
        deadline: Moment,
    },
    /// A daemon connected (the first one is connected from the start and not told).
    DaemonConnected,
    /// No daemon is connected: requests are answered `Unreachable` until one is.
    DaemonLost,
}

/// Names a command; carries the connection, so that a reply never goes to another daemon than the one that asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommandId {
    connection: u64,
    id: u64,
}

struct Current {
    /// Counts connections; an answer or reply that belongs to an earlier one is dropped.
    generation: u64,
    connection: Option<Arc<Connection>>,
}

struct Pending {
    deadline: Moment,
    kind: Kind,
    generation: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Swap,
    Seats,
}

impl Kind {
    fn of(ask: &Ask) -> Kind {
        match ask {
            Ask::ReadRecord => Kind::Read,
            Ask::SwapRecord { .. } => Kind::Swap,
            Ask::AskSeats { .. } => Kind::Seats,
        }
    }

    fn fits(self, answer: &Answer) -> bool {
        matches!(
            (self, answer),
            (Kind::Read, Answer::Read(_)) | (Kind::Swap, Answer::Swap(_)) | (Kind::Seats, Answer::Seats(_))
        )
    }

    /// What is true when nobody answered. A read leaves nothing behind; a write may still land if it was sent.
    fn unanswered(self, sent: bool) -> Answer {
        match self {
            Kind::Read => Answer::Read(ReadOutcome::Unreachable),
            Kind::Swap if sent => Answer::Swap(SwapOutcome::Unknown),
            Kind::Swap => Answer::Swap(SwapOutcome::NotSent),
            Kind::Seats => Answer::Seats(Vec::new()),
        }
    }
}

struct Books {
    current: Current,
    pending: BTreeMap<u64, Pending>,
    next_request: u64,
    stopping: bool,
}

impl Books {
    fn take_pending(&mut self, which: impl Fn(&Pending) -> bool) -> Vec<(u64, Pending)> {
        let taken: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| which(pending))
            .map(|(request, _)| *request)
            .collect();
        taken
            .into_iter()
            .filter_map(|request| Some((request, self.pending.remove(&request)?)))
            .collect()
    }
}

struct Shared {
    hello: Hello,
    books: Mutex<Books>,
    wake: OwnedFd,
    sink: Box<dyn Fn(Input) + Send + Sync>,
}

impl Shared {
    fn books(&self) -> MutexGuard<'_, Books> {
        // The books are changed in single steps, so a panic elsewhere leaves them whole.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Only a full counter can refuse, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Sends on the connection of this moment; false if it could not be sent at all.
    fn send(&self, message: &FromEngine, only_generation: Option<u64>) -> bool {
        let connection = {
            let books = self.books();
            if only_generation.is_some_and(|generation| generation != books.current.generation) {
                return false;
            }
            books.current.connection.clone()
        };
        connection.is_some_and(|connection| connection.send(message, &[]).is_ok())
    }
}

/// The driver's side of the control connection; cheap to clone, usable from any thread, never blocks.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Asks the arbiter; exactly one [`Input::Answer`] with the returned number follows.
    pub fn request(&self, ask: Ask, deadline: Duration) -> u64 {
        let kind = Kind::of(&ask);
        let until = Moment::now() + deadline;
        let (request, generation) = {
            let mut books = self.0.books();
            let request = books.next_request;
            books.next_request += 1;
            let generation = books.current.generation;
            // Booked before it is sent: the answer may be quicker than this thread.
            books.pending.insert(
                request,
                Pending {
                    deadline: until,
                    kind,
                    generation,
                },
            );
            (request, generation)
        };
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        let sent = self.0.send(
            &FromEngine::Request {
                request,
                ask,
                deadline_ms,
            },
            Some(generation),
        );
        if !sent && self.0.books().pending.remove(&request).is_some() {
            let why = Some("no daemon takes the request: is ftvm-node-daemon running on this node?".to_owned());
            let answer = kind.unanswered(false);
            (self.0.sink)(Input::Answer {
                request,
                answer,
                why,
                deadline: until,
            });
        }
        // The thread sleeps until the earliest deadline it knew of.
        self.0.wake();
        request
    }

    /// Replies to a command; dropped if the daemon that asked is gone.
    pub fn reply(&self, id: CommandId, reply: Reply) {
        self.0
            .send(&FromEngine::Reply { id: id.id, reply }, Some(id.connection));
    }

    /// Tells what happened. False if nobody was told (no daemon, or one that does not read).
    pub fn event(&self, event: Event) -> bool {
        self.0.send(&FromEngine::Event(event), None)
    }
}

/// The running control thread. Dropping it ends the thread.
pub struct Endpoint {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// Starts the thread `control`. `sink` is called from it (and from [`Handle::request`]) and must not block;
    /// `enter` runs first in the thread, for its seccomp filter.
    pub fn start(
        connection: Connection,
        listener: Listener,
        daemon_uid: u32,
        hello: Hello,
        sink: Box<dyn Fn(Input) + Send + Sync>,
        enter: impl FnOnce() + Send + 'static,
    ) -> Result<Endpoint, EndpointError> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|source| {
            EndpointError::Start {
                what: "eventfd",
                source: source.into(),
            }
        })?;
        let connection = Arc::new(connection);
        let current = Current {
            generation: 1,
            connection: Some(connection),
        };
        let books = Books {
            current,
            pending: BTreeMap::new(),
            next_request: 1,
            stopping: false,
        };
        let shared = Arc::new(Shared {
            hello,
            books: Mutex::new(books),
            wake,
            sink,
        });
        let handle = Handle(shared.clone());
        shared.send(&FromEngine::Hello(shared.hello.clone()), None);
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                enter();
                Thread {
                    shared,
                    listener,
                    daemon_uid,
                }
                .run();
            })
            .map_err(|source| EndpointError::Start { what: "thread", source })?;
        Ok(Endpoint {
            handle,
            thread: Some(thread),
        })
    }

    /// The sending side.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.handle.0.books().stopping = true;
        self.handle.0.wake();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was already reported by its hook.
            let _ = thread.join();
        }
    }
}

struct Thread {
    shared: Arc<Shared>,
    listener: Listener,
    daemon_uid: u32,
}

impl Thread {
    fn run(&self) {
        loop {
            let (connection, generation, timeout) = {
                let books = self.shared.books();
                if books.stopping {
                    return;
                }
                let earliest = books.pending.values().map(|pending| pending.deadline).min();
                let timeout = earliest.map(|deadline| deadline.saturating_duration_since(Moment::now()));
                (books.current.connection.clone(), books.current.generation, timeout)
            };
            let ready = self.wait(connection.as_deref(), timeout);
            self.expire();
            if ready.wake {
                let mut counter = [0u8; 8];
                // Non-blocking; an empty counter only means that an earlier read took it.
                let _ = rustix::io::read(&self.shared.wake, &mut counter);
            }
            if let Some(connection) = connection.filter(|_| ready.connection) {
                self.receive(&connection, generation);
            }
            if ready.listener {
                self.accept();
            }
        }
    }

    fn wait(&self, connection: Option<&Connection>, timeout: Option<Duration>) -> Ready {
        let mut fds = vec![
            PollFd::new(&self.shared.wake, PollFlags::IN),
            PollFd::new(&self.listener, PollFlags::IN),
        ];
        if let Some(connection) = connection {
            fds.push(PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN));
        }
        // One millisecond more, so that a deadline has passed when the poll returns.
        let timeout = timeout.map(|timeout| timeout + Duration::from_millis(1));
        let timespec = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        // An interrupted poll is a wake-up without news.
        let polled = rustix::event::poll(&mut fds, timespec.as_ref()).unwrap_or(0);
        let ready = |index: usize| polled > 0 && fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ready {
            wake: ready(0),
            listener: ready(1),
            connection: ready(2),
        }
    }

    /// Answers what is past its deadline.
    fn expire(&self) {
        let now = Moment::now();
        let expired: Vec<(u64, Pending)> = {
            let mut books = self.shared.books();
            books.take_pending(|pending| pending.deadline <= now)
        };
        for (request, pending) in expired {
            self.fail(request, &pending, "no answer within the deadline");
        }
    }

    fn fail(&self, request: u64, pending: &Pending, why: &str) {
        let (answer, why) = (pending.kind.unanswered(true), Some(why.to_owned()));
        (self.shared.sink)(Input::Answer {
            request,
            answer,
            why,
            deadline: pending.deadline,
        });
    }

    fn receive(&self, connection: &Connection, generation: u64) {
        match connection.receive::<ToEngine>(false) {
            Ok(Message {
                body: ToEngine::Answer { request, answer, why },
                ..
            }) => self.answer(request, answer, why, generation),
            Ok(Message {
                body: ToEngine::Command { id, command },
                ..
            }) => {
                (self.shared.sink)(Input::Command {
                    id: CommandId {
                        connection: generation,
                        id,
                    },
                    command,
                });
            }
            // A second launch is refused by silence: the daemon that sends one is not the one that started us.
            Ok(Message {
                body: ToEngine::Launch(_),
                ..
            }) => {}
            Err(SocketError::WouldBlock) => {}
            Err(SocketError::Malformed(error)) => tracing::warn!("message of the daemon skipped: {error}"),
            Err(error) => {
                tracing::info!("daemon connection ended: {error}");
                self.disconnect(generation);
                (self.shared.sink)(Input::DaemonLost);
            }
        }
    }

    fn answer(&self, request: u64, answer: Answer, why: Option<String>, generation: u64) {
        let pending = {
            let mut books = self.shared.books();
            match books.pending.get(&request) {
                Some(pending) if pending.generation == generation => books.pending.remove(&request),
                // Late, doubled, or an answer to an earlier daemon's request: already settled.
                _ => None,
            }
        };
        let Some(pending) = pending else { return };
        if pending.deadline <= Moment::now() {
            self.fail(request, &pending, "the answer was read after the deadline");
        } else if !pending.kind.fits(&answer) {
            self.fail(request, &pending, "the daemon answered another question");
        } else {
            (self.shared.sink)(Input::Answer {
                request,
                answer,
                why,
                deadline: pending.deadline,
            });
        }
    }

    /// Ends this connection; what it was asked stays unsettled for good.
    fn disconnect(&self, generation: u64) {
        let orphans: Vec<(u64, Pending)> = {
            let mut books = self.shared.books();
            if books.current.generation == generation {
                books.current.connection = None;
            }
            books.take_pending(|pending| pending.generation == generation)
        };
        for (request, pending) in orphans {
            self.fail(request, &pending, "the daemon went away before it answered");
        }
    }

    fn accept(&self) {
        let connection = match self.listener.accept() {
            Ok(connection) => connection,
            Err(SocketError::WouldBlock) => return,
            Err(error) => return tracing::warn!("daemon could not connect: {error}"),
        };
        match connection.peer() {
            Ok((_, uid)) if uid == self.daemon_uid => {}
            Ok((_, uid)) => return tracing::warn!("control connection of user {uid} refused"),
            Err(error) => return tracing::warn!("control connection refused: {error}"),
        }
        let previous = self.shared.books().current.generation;
        self.disconnect(previous);
        {
            let mut books = self.shared.books();
            books.current = Current {
                generation: previous + 1,
                connection: Some(Arc::new(connection)),
            };
        }
        self.shared.send(&FromEngine::Hello(self.shared.hello.clone()), None);
        (self.shared.sink)(Input::DaemonConnected);
    }
}

struct Ready {
    wake: bool,
    listener: bool,
    connection: bool,
}

#[cfg(test)]
#[path = "endpoint_tests.rs"]
mod tests;
