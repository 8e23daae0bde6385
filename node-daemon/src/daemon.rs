//! The daemon: its seats, and its control socket.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Answer, Ask, Command, Connection, Listener, SocketError, exit_code};
use ftvm_protocol::core::ReadOutcome;
use ftvm_protocol::record::{self, Snapshot};

use crate::api::{DaemonStatus, Phase, Request, Response};
use crate::arbiter::{Arbiter, Bounded};
use crate::bridges::AllowedBridges;
use crate::config::{JailConfig, PeerConfig, SeatConfig};
use crate::explain;
use crate::peer::{self, PeerError};
use crate::prepare::Source;
use crate::seat::{CommandError, Seat, Surroundings};
use crate::state::{SeatFolder, StateError, StateFolder};

mod others;
mod standalone;

pub use standalone::engine_path;

/// Clients at a time.
const CLIENTS_MAX: usize = 32;
/// An engine answers a status within this time, or is said not to.
const STATUS_PATIENCE: Duration = Duration::from_millis(500);
/// An engine begins a command within this time.
const COMMAND_PATIENCE: Duration = Duration::from_secs(10);
/// How much of a guest's memory is digested in a second, at the very least: beside all else that a small and busy machine does.
const DIGEST_MIB_PER_S: u64 = 4;
/// No digest is waited for longer.
const DIGEST_PATIENCE_MAX: Duration = Duration::from_secs(600);
/// Deadline of an arbiter request of the daemon's own.
const ARBITER_PATIENCE: Duration = Duration::from_secs(5);

/// Errors of the daemon.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// The control socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Another daemon answers on the control socket.
    #[error("control socket {path} is another daemon's: stop that one, or choose another control_socket")]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The engine program can't be found.
    #[error("the path of this program is unknown ({source}): set `engine` in the configuration")]
    NoEngine {
        /// The cause.
        source: std::io::Error,
    },
    /// Other daemons can't be listened to.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// No thread.
    #[error("no thread for other daemons ({source}): this user's or the system's limit of threads is reached")]
    NoThread {
        /// The cause.
        source: std::io::Error,
    },
}

impl DaemonError {
    /// The documented exit code for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            DaemonError::State(_) | DaemonError::SocketInUse { .. } => exit_code::STATE_FOLDER,
            DaemonError::Socket(_) => exit_code::STATE_FOLDER,
            DaemonError::NoEngine { .. } | DaemonError::Peer(_) => exit_code::CONFIG,
            DaemonError::NoThread { .. } => exit_code::DAEMON,
        }
    }
}

/// What makes one daemon different from another.
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Its state folder, for messages.
    pub state_folder: PathBuf,
    /// Socket for `ftvm` and other daemons of this machine.
    pub control_socket: PathBuf,
    /// Where daemons of other machines may ask.
    pub peer_listen: Option<SocketAddr>,
    /// The engine program.
    pub engine: PathBuf,
    /// The jail of the engines.
    pub jail: JailConfig,
    /// Bridges that guests may be connected to.
    pub bridges: AllowedBridges,
    /// Standalone: the folder of the file arbiter. Only then may clients of the socket add, set up and remove seats.
    pub arbiter_folder: Option<PathBuf>,
}

/// A running daemon.
pub struct Daemon {
    settings: Settings,
    state: StateFolder,
    surroundings: Arc<Surroundings>,
    seats: Mutex<BTreeMap<(String, String), Arc<Seat>>>,
    clients: AtomicUsize,
}

impl Daemon {
    /// A daemon without seats.
    pub fn new(settings: Settings, state: StateFolder) -> Arc<Daemon> {
        Arc::new_cyclic(|weak: &Weak<Daemon>| {
            let (asking, telling) = (weak.clone(), weak.clone());
            let surroundings = Surroundings {
                engine: settings.engine.clone(),
                jail_mount_point: state.jail(),
                jail: settings.jail.clone(),
                bridges: settings.bridges.clone(),
                ask_seats: Box::new(move |vm, seats, deadline| {
                    asking
                        .upgrade()
                        .map(|daemon| daemon.ask_seats(vm, seats, deadline))
                        .unwrap_or_default()
                }),
                tell_gone: Box::new(move |seat, incarnation| {
                    if let Some(daemon) = telling.upgrade() {
                        daemon.tell_gone(seat, incarnation);
                    }
                }),
            };
            Daemon {
                settings,
                state,
                surroundings: Arc::new(surroundings),
                seats: Mutex::new(BTreeMap::new()),
                clients: AtomicUsize::new(0),
            }
        })
    }

    /// Its state folder.
    pub fn state(&self) -> &StateFolder {
        &self.state
    }

    /// Takes the address for other daemons: first, so that nobody starts a guest whose daemon others can't ask.
    pub fn listen_for_others(&self) -> Result<Option<TcpListener>, PeerError> {
        self.settings.peer_listen.map(peer::listen).transpose()
    }

    /// Answers other daemons, in threads of its own.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn answer_others(self: &Arc<Daemon>, listener: Option<TcpListener>) -> Result<(), DaemonError> {
        let Some(listener) = listener else { return Ok(()) };
        let answers = Arc::new(others::ForOthers(Arc::downgrade(self)));
        peer::serve(listener, answers).map_err(|source| DaemonError::NoThread { source })
    }

    /// Serves the control socket; returns only if it can't be had.
    pub fn serve(self: &Arc<Daemon>) -> Result<(), DaemonError> {
        let path = self.settings.control_socket.clone();
        let listener = bind(&path)?;
        tracing::info!(node = self.settings.node, socket = %path.display(), "ready");
        loop {
            match listener.accept() {
                Ok(connection) => self.welcome(connection),
                Err(error) => {
                    tracing::warn!("{error}");
                    // Out of descriptors or memory: those that are served now will end.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn welcome(self: &Arc<Daemon>, connection: Connection) {
        let own = rustix::process::geteuid().as_raw();
        match connection.peer() {
            Ok((_, uid)) if uid == 0 || uid == own => {}
            Ok((_, uid)) => {
                let message = format!("user {uid} may not command this daemon: run as root or as user {own}");
                // The caller may be gone already.
                let _ = connection.send(&refused(exit_code::DAEMON, message), &[]);
                return;
            }
            Err(error) => return tracing::warn!("client refused: {error}"),
        }
        if self.clients.fetch_add(1, Ordering::SeqCst) >= CLIENTS_MAX {
            self.clients.fetch_sub(1, Ordering::SeqCst);
            let message = format!("the daemon serves {CLIENTS_MAX} clients already: try again");
            let _ = connection.send(&refused(exit_code::DAEMON, message), &[]);
            return;
        }
        let daemon = self.clone();
        let thread = std::thread::Builder::new().name("client".to_owned()).spawn(move || {
            daemon.converse(&connection);
            daemon.clients.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(error) = thread {
            self.clients.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("no thread for a client: {error}");
        }
    }

    fn converse(self: &Arc<Daemon>, connection: &Connection) {
        loop {
            let response = match connection.receive::<Request>(true) {
                Ok(message) => self.handle(message.body),
                Err(SocketError::Malformed(error)) => refused(
                    exit_code::DAEMON,
                    format!("request not understood ({error}): use the ftvm of this release"),
                ),
                Err(_) => return,
            };
            if connection.send(&response, &[]).is_err() {
                return;
            }
        }
    }

    /// Works on one request.
    pub fn handle(self: &Arc<Daemon>, request: Request) -> Response {
        match request {
            Request::Status => Response::Status(Box::new(self.status())),
            Request::ApplySeat { .. } | Request::RemoveSeat { .. } | Request::SetUp { .. } => {
                self.change_seats(request)
            }
            Request::Command { vm, seat, command } => self.with_seat(&vm, &seat, |seat| command_seat(seat, command)),
            Request::Failover { vm, seat } => self.with_seat(&vm, &seat, |seat| match seat.fail() {
                Ok(_) => Response::Done,
                Err(error) => refused(exit_code::REFUSED, explain(&error)),
            }),
            Request::Start { vm, seat } => self.with_seat(&vm, &seat, start_stopped),
            Request::SetPeers { vm, seat, peers } => self.with_seat(&vm, &seat, |seat| set_peers(seat, peers)),
            Request::Record { vm } => match self.seats().values().find(|seat| seat.config().vm == vm).cloned() {
                Some(seat) => {
                    let (snapshot, why) = read_record(seat.arbiter());
                    Response::Record { snapshot, why }
                }
                None => refused(
                    exit_code::REFUSED,
                    format!("no seat of {vm} on node {}", self.settings.node),
                ),
            },
            Request::SeatReport { seat_id } => {
                let report = self.local_report(seat_id, STATUS_PATIENCE);
                Response::SeatReport {
                    report: report.unwrap_or_else(|| others::unknown(seat_id)),
                }
            }
            Request::PeerGone { vm, incarnation } => {
                self.tell_local(&vm, incarnation);
                Response::Done
            }
        }
    }

    fn seats(&self) -> MutexGuard<'_, BTreeMap<(String, String), Arc<Seat>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_seats(&self) -> Vec<Arc<Seat>> {
        self.seats().values().cloned().collect()
    }

    fn with_seat(&self, vm: &str, seat: &str, work: impl FnOnce(&Arc<Seat>) -> Response) -> Response {
        let found = self.seats().get(&(vm.to_owned(), seat.to_owned())).cloned();
        match found {
            Some(seat) => work(&seat),
            None => refused(
                exit_code::REFUSED,
                format!("no seat {vm}/{seat} on node {}", self.settings.node),
            ),
        }
    }

    /// Adds a seat and starts its thread.
    pub fn add(
        self: &Arc<Daemon>,
        config: SeatConfig,
        folder: SeatFolder,
        source: Arc<dyn Source>,
        arbiter: Arc<dyn Arbiter>,
    ) -> Result<Arc<Seat>, DaemonError> {
        let arbiter = Arc::new(Bounded::new(arbiter));
        let mut seats = self.seats();
        let slot = self.free_slot(&seats, folder.engine().ok().flatten().and_then(|engine| engine.uid));
        let key = (config.vm.clone(), config.seat.clone());
        let seat = Seat::new(config, folder, source, arbiter, self.surroundings.clone(), slot)?;
        if let Ok((who, _)) = seat.source().identity(&seat.config()) {
            seat.set_seat_id(who.seat_id);
        }
        seats.insert(key, seat.clone());
        drop(seats);
        let thread = seat.clone();
        // The handle is not needed: the thread ends when the seat is removed.
        let spawned = std::thread::Builder::new()
            .name("seat".to_owned())
            .spawn(move || thread.run());
        match spawned {
            Ok(_) => Ok(seat),
            Err(source) => Err(DaemonError::NoThread { source }),
        }
    }

    /// Ends a seat: its engine, its thread, and that others hear of it.
    pub fn forget(&self, seat: &Arc<Seat>) {
        let config = seat.config();
        let key = (config.vm, config.seat);
        let mut seats = self.seats();
        if seats.get(&key).is_some_and(|found| Arc::ptr_eq(found, seat)) {
            seats.remove(&key);
        }
        drop(seats);
        seat.remove();
    }

    /// A user id position that no other seat has; that of a running engine is kept.
    fn free_slot(&self, seats: &BTreeMap<(String, String), Arc<Seat>>, uid: Option<u32>) -> u32 {
        let jail = &self.settings.jail;
        let used: Vec<u32> = seats.values().map(|seat| seat.slot()).collect();
        let kept = uid
            .and_then(|uid| uid.checked_sub(jail.uid_first))
            .filter(|slot| *slot < jail.uid_count);
        kept.into_iter()
            .chain(0..jail.uid_count)
            .find(|slot| !used.contains(slot))
            .unwrap_or(0)
    }

    fn status(&self) -> DaemonStatus {
        let seats = self.all_seats();
        // Together: one engine that does not answer must not make the others wait.
        let seats = std::thread::scope(|scope| {
            let asking: Vec<_> = seats
                .iter()
                .map(|seat| scope.spawn(move || seat.status(STATUS_PATIENCE)))
                .collect();
            asking.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        DaemonStatus {
            node: self.settings.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state_folder: self.settings.state_folder.clone(),
            arbiter_folder: self.settings.arbiter_folder.clone(),
            peer_address: self.settings.peer_listen,
            seats,
        }
    }
}

fn refused(code: u8, message: String) -> Response {
    Response::Refused { code, message }
}

/// How long an engine may take to answer.
fn patience(command: &Command, memory_mib: u64) -> Duration {
    match command {
        Command::Digest => {
            let reading = Duration::from_secs(memory_mib / DIGEST_MIB_PER_S);
            (COMMAND_PATIENCE + reading).min(DIGEST_PATIENCE_MAX)
        }
        _ => COMMAND_PATIENCE,
    }
}

fn command_seat(seat: &Seat, command: Command) -> Response {
    let patience = patience(&command, seat.config().machine.memory_mib);
    match seat.command(command, patience) {
        Ok(reply) => Response::Reply { reply },
        Err(error @ CommandError::NoEngine { .. }) => refused(exit_code::REFUSED, explain(&error)),
        Err(error @ CommandError::NoAnswer { .. }) => refused(exit_code::TIMEOUT, explain(&error)),
    }
}

/// Done means remembered: an engine that starts, or does not answer now, is told when it can be.
fn set_peers(seat: &Seat, peers: Vec<PeerConfig>) -> Response {
    let mut config = seat.config();
    config.link.peers = peers;
    if let Err(error) = config.check() {
        return refused(exit_code::CONFIG, explain(&error));
    }
    let who = match seat.source().identity(&config) {
        Ok((who, _)) => who,
        Err(error) => return refused(error.exit_code(), explain(&error)),
    };
    if let Err(error) = crate::prepare::peers(&config, &who) {
        return refused(error.exit_code(), explain(&error));
    }
    match seat.set_peers(config.link.peers) {
        Ok(()) => Response::Done,
        Err(error) => refused(exit_code::STATE_FOLDER, explain(&error)),
    }
}

fn read_record(arbiter: &Bounded) -> (Option<Snapshot>, Option<String>) {
    match arbiter.ask(&Ask::ReadRecord, ARBITER_PATIENCE) {
        (Answer::Read(ReadOutcome::Found(snapshot)), _) => (Some(snapshot), None),
        (_, why) => (
            None,
            Some(why.unwrap_or_else(|| "the arbiter has no record".to_owned())),
        ),
    }
}

/// The term is read when the user asks, so that an old request can't undo a later stop (rule 7).
fn start_stopped(seat: &Arc<Seat>) -> Response {
    let snapshot = match read_record(seat.arbiter()) {
        (Some(snapshot), _) => snapshot,
        (None, why) => return refused(exit_code::ARBITER, why.unwrap_or_default()),
    };
    let was_stopped = snapshot.record.phase == record::Phase::Stopped;
    seat.start_now();
    if !was_stopped {
        return Response::Done;
    }
    let until = Instant::now() + COMMAND_PATIENCE;
    let start = Command::Start {
        over_stopped_term: snapshot.record.term,
    };
    loop {
        match seat.command(start.clone(), COMMAND_PATIENCE) {
            Ok(reply) => return Response::Reply { reply },
            Err(error) if Instant::now() >= until => return refused(exit_code::TIMEOUT, explain(&error)),
            // The engine is being started by the seat's thread.
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
        let status = seat.status(STATUS_PATIENCE);
        if status.phase == Phase::Waiting && status.code != 0 {
            return refused(status.code, status.why);
        }
    }
}

/// Binds the control socket; one that nobody answers is a dead daemon's and is replaced.
fn bind(path: &Path) -> Result<Listener, DaemonError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|source| StateError::Io {
            what: "making",
            path: folder.to_owned(),
            source,
        })?;
    }
    if Connection::connect(path).is_ok_and(|connection| belongs_to_the_living(&connection)) {
        return Err(DaemonError::SocketInUse { path: path.to_owned() });
    }
    crate::state::remove_if_there(path)?;
    Ok(Listener::bind(path)?)
}

/// Whether the process that listens is alive. A dead daemon's socket may still be open for a moment, in a child that was forked
/// and has not executed its engine yet.
fn belongs_to_the_living(connection: &Connection) -> bool {
    match connection
        .peer()
        .ok()
        .and_then(|(pid, _)| rustix::process::Pid::from_raw(pid?))
    {
        // Of another pid namespace: not to be judged from here.
        None => true,
        Some(pid) => rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH),
    }
}
