//! The daemon: its seats, and its control socket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use ftvm_engine::control::header_file::HeaderFile;
use ftvm_engine::control::{Answer, Ask, Command, Connection, Listener, SocketError, exit_code};
use ftvm_protocol::core::{ReadOutcome, StoredHeader};
use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::ArbiterUid;
use ftvm_protocol::record::{self, Record, Snapshot};

use crate::api::{DaemonStatus, Phase, Request, Response};
use crate::arbiter::{Bounded, FileArbiter};
use crate::config::{Config, PeerConfig, SeatConfig};
use crate::explain;
use crate::identity;
use crate::peer::{self, PeerError};
use crate::prepare::{SeatError, header_path};
use crate::seat::{CommandError, Seat, Surroundings};
use crate::state::{StateError, StateFolder};

mod others;

/// Clients at a time.
const CLIENTS_MAX: usize = 32;
/// An engine answers a status within this time, or is said not to.
const STATUS_PATIENCE: Duration = Duration::from_millis(500);
/// An engine begins a command within this time.
const COMMAND_PATIENCE: Duration = Duration::from_secs(10);
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

/// A running daemon.
pub struct Daemon {
    config: Config,
    state: StateFolder,
    surroundings: Arc<Surroundings>,
    seats: Mutex<BTreeMap<(String, String), Arc<Seat>>>,
    clients: AtomicUsize,
}

/// Path of the engine program.
pub fn engine_path(config: &Config) -> Result<PathBuf, DaemonError> {
    match &config.engine {
        Some(path) => Ok(path.clone()),
        None => Ok(std::env::current_exe()
            .map_err(|source| DaemonError::NoEngine { source })?
            .with_file_name("ftvm-engine")),
    }
}

impl Daemon {
    /// Takes the state folder, adopts and starts the configured seats.
    pub fn start(config: Config) -> Result<Arc<Daemon>, DaemonError> {
        let state = StateFolder::open(&config.state_folder)?;
        let engine = engine_path(&config)?;
        let (jail, jail_mount_point) = (config.jail.clone(), state.jail());
        let daemon = Arc::new_cyclic(|weak: &Weak<Daemon>| {
            let (asking, telling) = (weak.clone(), weak.clone());
            let surroundings = Surroundings {
                engine,
                jail_mount_point,
                jail,
                ask_seats: Box::new(move |seats, deadline| {
                    asking
                        .upgrade()
                        .map(|daemon| daemon.ask_seats(seats, deadline))
                        .unwrap_or_default()
                }),
                tell_gone: Box::new(move |seat, incarnation| {
                    if let Some(daemon) = telling.upgrade() {
                        daemon.tell_gone(seat, incarnation);
                    }
                }),
            };
            let seats = Mutex::new(BTreeMap::new());
            Daemon {
                config,
                state,
                surroundings: Arc::new(surroundings),
                seats,
                clients: AtomicUsize::new(0),
            }
        });
        // First, so that nobody starts a guest whose daemon others can't ask.
        let listener = daemon.config.peer_listen.map(peer::listen).transpose()?;
        for seat in daemon.config.seats.clone() {
            daemon.add(seat)?;
        }
        if let Some(listener) = listener {
            let answers = Arc::new(others::ForOthers(Arc::downgrade(&daemon)));
            peer::serve(listener, answers).map_err(|source| DaemonError::NoThread { source })?;
        }
        Ok(daemon)
    }

    /// Serves the control socket; returns only if it can't be had.
    pub fn serve(self: &Arc<Daemon>) -> Result<(), DaemonError> {
        let path = self.config.control_socket();
        let listener = bind(&path)?;
        tracing::info!(node = self.config.node, socket = %path.display(), "ready");
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
                let _ = connection.send(
                    &Response::Refused {
                        code: exit_code::DAEMON,
                        message,
                    },
                    &[],
                );
                return;
            }
            Err(error) => return tracing::warn!("client refused: {error}"),
        }
        if self.clients.fetch_add(1, Ordering::SeqCst) >= CLIENTS_MAX {
            self.clients.fetch_sub(1, Ordering::SeqCst);
            let message = format!("the daemon serves {CLIENTS_MAX} clients already: try again");
            let _ = connection.send(
                &Response::Refused {
                    code: exit_code::DAEMON,
                    message,
                },
                &[],
            );
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
            Request::ApplySeat { seat } => self.apply(*seat),
            Request::RemoveSeat { vm, seat } => self.remove(vm, seat),
            Request::SetUp { vm, seat } => self.with_seat(&vm, &seat, |seat| self.set_up(seat)),
            Request::Command { vm, seat, command } => self.with_seat(&vm, &seat, |seat| command_seat(seat, command)),
            Request::Start { vm, seat } => self.with_seat(&vm, &seat, start_stopped),
            Request::SetPeers { vm, seat, peers } => self.with_seat(&vm, &seat, |seat| set_peers(seat, peers)),
            Request::Record { vm } => match self.seats().values().find(|seat| seat.config().vm == vm).cloned() {
                Some(seat) => {
                    let (snapshot, why) = read_record(seat.arbiter());
                    Response::Record { snapshot, why }
                }
                None => refused(
                    exit_code::REFUSED,
                    format!("no seat of {vm} on node {}", self.config.node),
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
                format!("no seat {vm}/{seat} on node {}", self.config.node),
            ),
        }
    }

    fn add(self: &Arc<Daemon>, config: SeatConfig) -> Result<(), DaemonError> {
        let folder = self.state.seat(&config.vm, &config.seat)?;
        let arbiter = Arc::new(FileArbiter::new(self.config.arbiter.folder.join(&config.vm)));
        let mut seats = self.seats();
        let slot = self.free_slot(&seats, folder.engine().ok().flatten().and_then(|engine| engine.uid));
        let key = (config.vm.clone(), config.seat.clone());
        let seat = Seat::new(
            config,
            folder,
            Arc::new(Bounded::new(arbiter)),
            self.surroundings.clone(),
            slot,
        )?;
        if let Ok((who, _)) = identity::load(&seat.config().identity, &key.0, &key.1) {
            seat.set_seat_id(who.seat_id);
        }
        seats.insert(key, seat.clone());
        drop(seats);
        // The handle is not needed: the thread ends when the seat is removed.
        let spawned = std::thread::Builder::new()
            .name("seat".to_owned())
            .spawn(move || seat.run());
        spawned.map(drop).map_err(|source| {
            StateError::Io {
                what: "starting a thread for",
                path: self.config.state_folder.clone(),
                source,
            }
            .into()
        })
    }

    /// A user id position that no other seat has; that of a running engine is kept.
    fn free_slot(&self, seats: &BTreeMap<(String, String), Arc<Seat>>, uid: Option<u32>) -> u32 {
        let jail = &self.config.jail;
        let used: Vec<u32> = seats.values().map(|seat| seat.slot()).collect();
        let kept = uid
            .and_then(|uid| uid.checked_sub(jail.uid_first))
            .filter(|slot| *slot < jail.uid_count);
        kept.into_iter()
            .chain(0..jail.uid_count)
            .find(|slot| !used.contains(slot))
            .unwrap_or(0)
    }

    fn apply(self: &Arc<Daemon>, config: SeatConfig) -> Response {
        if let Err(error) = config.check() {
            return refused(exit_code::CONFIG, explain(&error));
        }
        let key = (config.vm.clone(), config.seat.clone());
        for (other_key, other) in self.seats().iter() {
            if *other_key != key
                && let Err(error) = config.check_beside(&other.config())
            {
                return refused(exit_code::CONFIG, explain(&error));
            }
        }
        let existing = self.seats().get(&key).cloned();
        match existing {
            Some(seat) => seat.reconfigure(config),
            None => {
                if let Err(error) = self.add(config) {
                    return refused(error.exit_code(), explain(&error));
                }
            }
        }
        Response::Done
    }

    fn remove(&self, vm: String, seat: String) -> Response {
        match self.seats().remove(&(vm.clone(), seat.clone())) {
            Some(found) => {
                found.remove();
                Response::Done
            }
            None => refused(
                exit_code::REFUSED,
                format!("no seat {vm}/{seat} on node {}", self.config.node),
            ),
        }
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
            node: self.config.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state_folder: self.config.state_folder.clone(),
            arbiter_folder: self.config.arbiter.folder.clone(),
            peer_address: self.config.peer_listen,
            seats,
        }
    }

    /// First record and first header; either may exist from an earlier attempt.
    fn set_up(&self, seat: &Arc<Seat>) -> Response {
        let config = seat.config();
        match try_set_up(&config, seat, &self.config.arbiter.folder) {
            Ok(uid) => {
                seat.start_now();
                Response::SetUp { uid }
            }
            Err((code, message)) => refused(code, message),
        }
    }
}

fn refused(code: u8, message: String) -> Response {
    Response::Refused { code, message }
}

fn command_seat(seat: &Seat, command: Command) -> Response {
    match seat.command(command, COMMAND_PATIENCE) {
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
    let who = match identity::load(&config.identity, &config.vm, &config.seat) {
        Ok((who, _)) => who,
        Err(error) => return refused(exit_code::IDENTITY, explain(&error)),
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

fn try_set_up(config: &SeatConfig, seat: &Seat, arbiter_folder: &Path) -> Result<ArbiterUid, (u8, String)> {
    if !config.original_disk {
        let message = format!(
            "seat {} does not say `original_disk: true`: set up the one that does",
            config.label()
        );
        return Err((exit_code::REFUSED, message));
    }
    let (who, _) = identity::load(&config.identity, &config.vm, &config.seat)
        .map_err(|error| (exit_code::IDENTITY, explain(&error)))?;
    let path = header_path(config, seat.folder());
    let disk_error = |why: String| {
        let error = SeatError::Disk {
            what: "header".to_owned(),
            path: path.clone(),
            why,
        };
        (error.exit_code(), explain(&error))
    };
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let file = file.map_err(|error| disk_error(format!("can't be opened: {error}")))?;
    let (mut header, stored) = HeaderFile::open(file).map_err(|error| disk_error(explain(&error)))?;
    let arbiter = FileArbiter::new(arbiter_folder.join(&config.vm));
    match stored {
        StoredHeader::Found(stored) => return Ok(stored.uid),
        StoredHeader::Damaged => {
            return Err(disk_error(
                "is damaged: a person decides (docs/standalone.md, Damaged header)".to_owned(),
            ));
        }
        StoredHeader::Absent => {}
    }
    let first = Record::genesis(who.seat_id, record::Phase::Running);
    let uid = arbiter
        .set_up(&first)
        .map_err(|error| (exit_code::ARBITER, explain(&error)))?;
    header
        .write(&SeatHeader::genesis(who.seat_id, uid))
        .and_then(|()| header.complete())
        .map_err(|error| disk_error(explain(&error)))?;
    Ok(uid)
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
