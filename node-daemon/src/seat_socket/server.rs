//! The listening side: one thread a connection, everything bounded.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Connection, Listener, Message, SocketError};
use ftvm_protocol::identity::SeatId;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::handed::Held;
use super::message::{DiskToPrepare, FromSeat, SOCKET, ToSeat, VERSION};
use super::pod::Peer;
use super::refusals::Refusals;
use super::seat::{DiskProgress, PodSeat};
use crate::disks::Step;
use crate::explain;
use crate::state::{StateError, remove_if_there};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 256;
/// Connections of one pod at a time: an old program may still be ending.
const CONNECTIONS_OF_POD_MAX: usize = 2;
/// A program says hello within this time.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether there is something to tell.
const LOOK: Duration = Duration::from_millis(250);
/// Messages that a program may send within a second.
const MESSAGES_MAX: u32 = 64;

/// Which pods are seats of this node.
pub trait Pods: Send + Sync + 'static {
    /// The seat that this pod is, or why it is none.
    fn find(&self, pod: SeatId) -> Result<Arc<PodSeat>, String>;
}

/// Binds the socket in this folder, which seats get mounted. Everybody may connect: who it is, the kernel tells.
pub fn bind(folder: &Path) -> Result<Listener, StateError> {
    let failed = |what| {
        let path = folder.to_owned();
        move |source| StateError::Io { what, path, source }
    };
    std::fs::create_dir_all(folder).map_err(failed("making"))?;
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).map_err(failed("opening up"))?;
    let path = folder.join(SOCKET);
    remove_if_there(&path)?;
    let listener =
        Listener::bind(&path).map_err(|error| failed("binding the seats' socket in")(std::io::Error::other(error)))?;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).map_err(failed("opening up"))?;
    Ok(listener)
}

/// Serves seats, in threads of its own, as long as the program runs.
///
/// # Errors
/// If there is no thread.
pub fn serve(listener: Listener, pods: Arc<dyn Pods>) -> std::io::Result<()> {
    let (open, refusals) = (Arc::new(Open::default()), Arc::new(Refusals::default()));
    let accept = move || {
        loop {
            match listener.accept() {
                Ok(connection) => welcome(connection, &pods, &open, &refusals),
                Err(error) => {
                    tracing::warn!("a seat can't connect: {error}");
                    // Out of descriptors or memory: those that are served now will end.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("seats".to_owned())
        .spawn(accept)
        .map(drop)
}

/// How many connections each pod has.
#[derive(Default)]
struct Open(Mutex<BTreeMap<SeatId, usize>>);

impl Open {
    fn enter(&self, pod: SeatId) -> bool {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = open.values().sum();
        let own = open.entry(pod).or_default();
        let fits = all < CONNECTIONS_MAX && *own < CONNECTIONS_OF_POD_MAX;
        *own += usize::from(fits);
        if *own == 0 {
            open.remove(&pod);
        }
        fits
    }

    fn leave(&self, pod: SeatId) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = open.get_mut(&pod) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                open.remove(&pod);
            }
        }
    }
}

/// Looks who it is before a thread is spent on it.
fn welcome(connection: Connection, pods: &Arc<dyn Pods>, open: &Arc<Open>, refusals: &Arc<Refusals>) {
    let peer = match Peer::of(&connection) {
        Ok(peer) => Arc::new(peer),
        Err(error) => {
            let why = explain(&error);
            if let Some(line) = refusals.line(None, &why, Instant::now()) {
                tracing::warn!("a connection to the seat socket is refused: {line}");
            }
            return refuse(&connection, why);
        }
    };
    let pod = peer.pod;
    if !open.enter(pod) {
        let why = "too many connections of this pod or node".to_owned();
        if let Some(line) = refusals.line(Some(pod), &why, Instant::now()) {
            tracing::warn!("pod {pod} is refused: {line}");
        }
        return refuse(&connection, why);
    }
    let (pods, counted, refusals) = (pods.clone(), open.clone(), refusals.clone());
    let work = move || {
        match pods.find(pod) {
            Ok(seat) => converse(&connection, &peer, &seat, &refusals),
            Err(why) => {
                if let Some(line) = refusals.line(Some(pod), &why, Instant::now()) {
                    tracing::info!("pod {pod} is refused: {line}");
                }
                refuse(&connection, why);
            }
        }
        counted.leave(pod);
    };
    if let Err(error) = std::thread::Builder::new().name("seat-socket".to_owned()).spawn(work) {
        open.leave(pod);
        tracing::warn!("no thread for pod {pod}: {error}");
    }
}

fn refuse(connection: &Connection, why: String) {
    // It may be gone already.
    let _ = connection.send(&ToSeat::Refused { why }, &[]);
}

fn converse(connection: &Connection, peer: &Arc<Peer>, seat: &Arc<PodSeat>, refusals: &Refusals) {
    seat.set_progress(|progress| progress.connected = true);
    let mut talk = Talk {
        connection,
        peer,
        seat,
        disks: None,
        told: None,
        messages: (Instant::now(), 0),
    };
    let ended = talk.run();
    seat.gone(peer);
    if let Err(why) = ended
        && let Some(line) = refusals.line(Some(peer.pod), &why, Instant::now())
    {
        tracing::info!(seat = seat.seat.config().label(), "the seat's program: {line}");
    }
}

struct Talk<'a> {
    connection: &'a Connection,
    peer: &'a Arc<Peer>,
    seat: &'a Arc<PodSeat>,
    /// What it was asked to prepare and has not handed over yet.
    disks: Option<Vec<DiskToPrepare>>,
    told: Option<ToSeat>,
    messages: (Instant, u32),
}

impl Talk<'_> {
    /// Until the connection ends; the error says why it did.
    fn run(&mut self) -> Result<(), String> {
        match self.receive(HELLO_PATIENCE)? {
            Some((FromSeat::Hello { version: VERSION }, _)) => {}
            Some((FromSeat::Hello { version }, _)) => {
                let why = format!("it speaks version {version}, the daemon {VERSION}: use one release");
                refuse(self.connection, why.clone());
                return Err(why);
            }
            Some(_) => return Err("its first message is no hello".to_owned()),
            None => return Err("it says nothing".to_owned()),
        }
        self.seat.came();
        let recipe = self
            .seat
            .recipe()
            .inspect_err(|why| refuse(self.connection, why.clone()))?;
        self.disks = Some(recipe.disks.clone());
        self.send(&ToSeat::Prepare(recipe))?;
        loop {
            if let Some((message, fds)) = self.receive(LOOK)? {
                self.handle(message, fds)?;
            }
            if self.disks.is_none() && !self.seat.handed.is_whole() {
                return Err("what it handed over is not used: it is asked anew".to_owned());
            }
            self.seat.follow_network();
            self.tell()?;
        }
    }

    fn send(&self, message: &ToSeat) -> Result<(), String> {
        self.connection.send(message, &[]).map_err(|error| explain(&error))
    }

    /// One message, or none within this time.
    fn receive(&mut self, patience: Duration) -> Result<Option<(FromSeat, Vec<OwnedFd>)>, String> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.connection.as_fd(), PollFlags::IN),
            PollFd::new(&self.peer.pidfd, PollFlags::IN),
        ];
        let timeout = Timespec {
            tv_sec: patience.as_secs().cast_signed(),
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        // An interrupted wait is one without news.
        let ready = rustix::event::poll(&mut fds, Some(&timeout)).unwrap_or(0);
        if ready == 0 {
            return Ok(None);
        }
        if fds[0].revents().is_empty() {
            // Whoever else has its end of the connection is not the program that connected.
            return Err("its process has ended".to_owned());
        }
        let Message { body, fds } = match self.connection.receive::<FromSeat>(false) {
            Ok(message) => message,
            Err(SocketError::WouldBlock) => return Ok(None),
            Err(error) => return Err(explain(&error)),
        };
        let (since, count) = &mut self.messages;
        if since.elapsed() >= Duration::from_secs(1) {
            (*since, *count) = (Instant::now(), 0);
        }
        *count += 1;
        if *count > MESSAGES_MAX {
            return Err("it sends too many messages".to_owned());
        }
        if !fds.is_empty() && !matches!(body, FromSeat::Ready { .. }) {
            return Err("descriptors beside a message that has none".to_owned());
        }
        Ok(Some((body, fds)))
    }

    fn handle(&mut self, message: FromSeat, fds: Vec<OwnedFd>) -> Result<(), String> {
        match message {
            FromSeat::Hello { .. } => Err("a second hello".to_owned()),
            FromSeat::Progress {
                disk,
                step,
                done_bytes,
                total_bytes,
            } => {
                let asked = self.disks.iter().flatten().find(|asked| asked.name == disk);
                // A file to download has a size of its own.
                let whole = |size_bytes| step != Step::Writing || size_bytes == total_bytes;
                let known = asked.is_some_and(|asked| whole(asked.size_bytes) && done_bytes <= total_bytes);
                if !known {
                    return Err("progress of something that it was not asked for".to_owned());
                }
                let disk = DiskProgress {
                    disk,
                    step,
                    done_bytes,
                    total_bytes,
                };
                self.seat.set_progress(|progress| progress.preparing(disk));
                Ok(())
            }
            FromSeat::Failed { why } => {
                let why: String = why.chars().filter(|c| !c.is_control()).take(500).collect();
                self.seat.set_progress(|progress| progress.trouble = Some(why));
                Ok(())
            }
            FromSeat::Ready { initrd } => {
                let disks = self
                    .disks
                    .take()
                    .ok_or("it was not asked for files, or gave them before")?;
                let expected = self.seat.handed.expected();
                let held = Held::check(expected, &disks, initrd, fds, self.peer.clone());
                match held {
                    Ok(held) => {
                        self.seat.ready(held);
                        Ok(())
                    }
                    Err(why) => {
                        let why = format!("what it handed over is refused: {why}");
                        self.seat.set_progress(|progress| progress.trouble = Some(why.clone()));
                        refuse(self.connection, why.clone());
                        Err(why)
                    }
                }
            }
            FromSeat::Terminate {} => {
                self.seat.end_with(self.peer);
                Ok(())
            }
        }
    }

    /// Tells the program what has changed.
    fn tell(&mut self) -> Result<(), String> {
        let outlook = self.seat.outlook();
        if self.told.as_ref() == Some(&outlook) {
            return Ok(());
        }
        match self.connection.send(&outlook, &[]) {
            Ok(()) => self.told = Some(outlook),
            // It does not read now; it is told later.
            Err(SocketError::WouldBlock) => {}
            Err(error) => return Err(explain(&error)),
        }
        Ok(())
    }
}

/// Whether the process of a pidfd has ended.
pub(super) fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}
