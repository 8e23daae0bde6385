//! All links of an engine: listens, dials, and keeps one link to each incarnation.

use std::collections::BTreeMap;
use std::io;
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ftvm_protocol::identity::{Incarnation, LinkId, SeatId};
use rustix::event::{PollFd, PollFlags, poll};

use super::connection::{Connection, Side};
use super::queue::Queue;
use super::table::{self, Wake, Wakes};
use super::{DownReason, LinkConfig, LinkEvent, LinkSender};
use crate::replication::threads::{enter, spawn};
use crate::seccomp::ThreadKind;

/// Connections that may be in their handshake on the listening side.
const HANDSHAKES_MAX: usize = 16;
/// A listener that fails (no descriptors left) is tried again after this.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

type Events = Arc<dyn Fn(LinkEvent) + Send + Sync>;

/// A seat that may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PeerSeat {
    address: Option<SocketAddr>,
    /// Changes when the address does, which ends the dialler of the old one.
    generation: u64,
}

struct Link {
    peer: Incarnation,
    dialled_here: bool,
    queue: Arc<Queue>,
}

#[derive(Default)]
struct State {
    peers: BTreeMap<SeatId, PeerSeat>,
    links: BTreeMap<LinkId, Link>,
    /// Connections in their handshake, so that a stop ends them too.
    shaking: BTreeMap<u64, Arc<Queue>>,
    /// Diallers to be started by the hub's own thread: whoever asks may be under a filter that forbids connecting,
    /// which threads inherit.
    to_dial: Vec<(SeatId, PeerSeat)>,
    threads: Vec<JoinHandle<()>>,
    next: u64,
    stopping: bool,
}

struct Shared {
    config: LinkConfig,
    events: Events,
    state: Mutex<State>,
    changed: Condvar,
    handshakes: AtomicUsize,
    wakes: Arc<Wakes>,
    /// Of the hub's own thread.
    wake: Wake,
}

/// Listens and dials until it is dropped. Events come from the links' own threads; taking them must not block for
/// long, or the link stands still.
pub struct LinkHub {
    shared: Arc<Shared>,
    /// Owns the listening socket, which the hub's thread knows by its number; closed after that thread has ended.
    _listener: Option<TcpListener>,
}

impl LinkHub {
    /// Starts; `listener` is a bound, listening socket.
    pub fn start(
        config: LinkConfig,
        listener: Option<TcpListener>,
        events: impl Fn(LinkEvent) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let wakes = Wakes::new()?;
        let shared = Arc::new(Shared {
            config,
            events: Arc::new(events),
            state: Mutex::default(),
            changed: Condvar::new(),
            handshakes: AtomicUsize::new(0),
            wake: wakes.take()?,
            wakes,
        });
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        let number = listener.as_ref().map(AsRawFd::as_raw_fd);
        let hub = Self {
            shared: shared.clone(),
            _listener: listener,
        };
        shared.start_own_thread(number)?;
        Ok(hub)
    }

    /// Lets a seat connect and, with an address, dials it whenever there is no link to it. A new address replaces the
    /// old one.
    pub fn add_peer(&self, seat: SeatId, address: Option<SocketAddr>) {
        self.shared.config.identity.allow(seat);
        let mut state = self.shared.state();
        if state.peers.get(&seat).is_some_and(|peer| peer.address == address) {
            return;
        }
        let peer = PeerSeat {
            address,
            generation: state.take_number(),
        };
        state.peers.insert(seat, peer);
        state.to_dial.push((seat, peer));
        drop(state);
        self.shared.changed.notify_all();
        self.shared.wake.signal();
    }

    /// Lets a seat connect no more and closes its links.
    pub fn remove_peer(&self, seat: SeatId) {
        self.shared.config.identity.disallow(seat);
        let mut state = self.shared.state();
        state.peers.remove(&seat);
        for link in state.links.values().filter(|link| link.peer.seat == seat) {
            link.queue.close(DownReason::ClosedHere(
                "the seat is no longer part of this VM".to_owned(),
            ));
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Closes a link; its event says `reason`.
    pub fn close(&self, link: LinkId, reason: &str) {
        if let Some(link) = self.shared.state().links.get(&link) {
            link.queue.close(DownReason::ClosedHere(reason.to_owned()));
        }
    }

    /// Closes all links, and neither dials nor accepts any more. Waits for the threads: while one dials, until its deadline.
    pub fn end(&self) {
        let threads = {
            let mut state = self.shared.state();
            state.stopping = true;
            let closing = || DownReason::ClosedHere("the engine stops".to_owned());
            state.links.values().for_each(|link| link.queue.close(closing()));
            state.shaking.values().for_each(|queue| queue.close(closing()));
            std::mem::take(&mut state.threads)
        };
        self.shared.changed.notify_all();
        self.shared.wake.signal();
        for thread in threads {
            // A hub that is dropped by an event handler runs on one of these threads.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Drop for LinkHub {
    fn drop(&mut self) {
        self.end();
    }
}

impl State {
    fn take_number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(self: &Arc<Self>, name: String, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.remember(spawn(name, ThreadKind::Link, &self.config.filters, body)?);
        Ok(())
    }

    fn remember(&self, thread: JoinHandle<()>) {
        let mut state = self.state();
        state.threads.retain(|thread| !thread.is_finished());
        state.threads.push(thread);
    }

    /// Starts the thread that starts all others, and waits until it has its own table of descriptors.
    fn start_own_thread(self: &Arc<Self>, listener: Option<RawFd>) -> io::Result<()> {
        let (parted, outcome) = sync_channel(1);
        let shared = self.clone();
        let body = move || {
            let result = table::part(shared.wakes.numbers().chain(listener));
            let failed = result.is_err();
            // Whoever starts a hub waits for this.
            let _ = parted.send(result);
            if failed {
                return;
            }
            enter(ThreadKind::Link, shared.config.filters.as_ref());
            // SAFETY: the number is valid in both tables; what the hub's owner closes is its own, after this thread's end.
            let listener = listener.map(|number| ManuallyDrop::new(unsafe { TcpListener::from_raw_fd(number) }));
            shared.serve_requests(listener.as_deref());
        };
        let thread = std::thread::Builder::new().name("link-hub".to_owned()).spawn(body)?;
        self.remember(thread);
        outcome
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread of the links has ended")))
    }

    /// The hub's own thread: accepts, and starts diallers.
    fn serve_requests(self: &Arc<Self>, listener: Option<&TcpListener>) {
        loop {
            let mut fds = vec![PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
            fds.extend(listener.map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)));
            let _ = poll(&mut fds, None);
            self.wake.drain();
            let to_dial = {
                let mut state = self.state();
                if state.stopping {
                    return;
                }
                std::mem::take(&mut state.to_dial)
            };
            to_dial
                .into_iter()
                .for_each(|(seat, peer)| self.start_dialling(seat, peer));
            match listener.map(TcpListener::accept) {
                None => {}
                Some(Ok((stream, address))) => self.accepted(stream, address),
                Some(Err(error)) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Some(Err(error)) => {
                    (self.events)(LinkEvent::Refused {
                        address: None,
                        reason: DownReason::Resources(error),
                    });
                    std::thread::sleep(ACCEPT_RETRY);
                }
            }
        }
    }

    fn start_dialling(self: &Arc<Self>, seat: SeatId, peer: PeerSeat) {
        let Some(address) = peer.address else { return };
        let shared = self.clone();
        let name = format!("link-{}", seat.to_string().chars().take(8).collect::<String>());
        let started = self.spawn(name, move || shared.dial(seat, address, peer.generation));
        if let Err(error) = started {
            (self.events)(LinkEvent::Refused {
                address: Some(address),
                reason: DownReason::Resources(error),
            });
        }
    }

    fn accepted(self: &Arc<Self>, stream: TcpStream, address: SocketAddr) {
        if self.handshakes.fetch_add(1, Ordering::AcqRel) >= HANDSHAKES_MAX {
            // Whoever it is comes again.
            self.handshakes.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let shared = self.clone();
        let served = self.spawn("link-accepted".to_owned(), move || {
            shared.serve(stream, address, &Side::Accepted);
        });
        if let Err(error) = served {
            self.handshakes.fetch_sub(1, Ordering::AcqRel);
            (self.events)(LinkEvent::Refused {
                address: Some(address),
                reason: DownReason::Resources(error),
            });
        }
    }

    /// Dials `seat` whenever there is no link to it, until its address changes or the hub stops.
    fn dial(self: &Arc<Self>, seat: SeatId, address: SocketAddr, generation: u64) {
        let config = &self.config;
        // When both sides start at once, the smaller seat's connection is the one that stays.
        let mut pause = if seat < config.hello.from.seat {
            config.retry_min
        } else {
            Duration::ZERO
        };
        let mut next_pause = config.retry_min;
        while self.wait_to_dial(seat, generation, pause) {
            let begun = Instant::now();
            let was_up = match TcpStream::connect_timeout(&address, config.handshake_deadline) {
                Ok(stream) => self.serve(stream, address, &Side::Dialled(seat)),
                Err(error) => {
                    (self.events)(LinkEvent::Refused {
                        address: Some(address),
                        reason: DownReason::Connect(error),
                    });
                    false
                }
            };
            if was_up && begun.elapsed() > config.retry_max {
                next_pause = config.retry_min;
            }
            pause = next_pause;
            next_pause = (next_pause * 2).min(config.retry_max);
        }
    }

    /// Waits until there is no link to the seat and the pause is over. False when dialling is over.
    fn wait_to_dial(&self, seat: SeatId, generation: u64, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut state = self.state();
        loop {
            let wanted = state.peers.get(&seat).is_some_and(|peer| peer.generation == generation);
            if state.stopping || !wanted {
                return false;
            }
            let linked = state.is_linked(seat);
            let left = until.saturating_duration_since(Instant::now());
            state = match (linked, left.is_zero()) {
                (false, true) => return true,
                (true, _) => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                (false, false) => {
                    self.changed
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// Serves a connection from its handshake to its end. True if it became a link.
    fn serve(self: &Arc<Self>, stream: TcpStream, address: SocketAddr, side: &Side) -> bool {
        let accepted = matches!(side, Side::Accepted);
        let shaken = self.shake_hands(stream, side);
        if accepted {
            self.handshakes.fetch_sub(1, Ordering::AcqRel);
        }
        let (connection, sender) = match shaken {
            Ok(linked) => linked,
            Err(reason) => {
                (self.events)(LinkEvent::Refused {
                    address: Some(address),
                    reason,
                });
                return false;
            }
        };
        let link = sender.link;
        let reason = connection.run(|frame| (self.events)(LinkEvent::Frame { link, frame }));
        self.state().links.remove(&link);
        self.changed.notify_all();
        (self.events)(LinkEvent::Down { link, reason });
        true
    }

    fn shake_hands(&self, stream: TcpStream, side: &Side) -> Result<(Connection, LinkSender), DownReason> {
        let config = &self.config;
        let wake = self.wakes.take().map_err(DownReason::Resources)?;
        let queue = Arc::new(Queue::new(config.queue, wake));
        let number = {
            let mut state = self.state();
            if state.stopping {
                return Err(DownReason::ClosedHere("the engine stops".to_owned()));
            }
            let number = state.take_number();
            state.shaking.insert(number, queue.clone());
            number
        };
        let result = Connection::new(stream, side, config, queue.clone()).and_then(|mut connection| {
            // Meanwhile the other side may have dialled: a connection that comes about late, for a packet was lost or a machine
            // stood still, must not end the link that a session may use by now.
            let wanted = || match side {
                Side::Dialled(seat) => !self.state().is_linked(*seat),
                Side::Accepted => true,
            };
            match connection.shake_hands(&config.hello, &config.identity, config.handshake_deadline, wanted) {
                Ok(peer) => Ok((connection, peer)),
                Err(reason) => {
                    connection.refuse();
                    Err(reason)
                }
            }
        });
        let mut state = self.state();
        state.shaking.remove(&number);
        let (connection, peer) = result?;
        let dialled_here = matches!(side, Side::Dialled(_));
        if let Err(reason) = state.admit(peer.incarnation, dialled_here, config.hello.from.seat) {
            drop(state);
            connection.refuse();
            return Err(reason);
        }
        let link = LinkId(state.take_number());
        state.links.insert(
            link,
            Link {
                peer: peer.incarnation,
                dialled_here,
                queue: queue.clone(),
            },
        );
        drop(state);
        self.changed.notify_all();
        let sender = LinkSender { link, queue };
        (self.events)(LinkEvent::Up {
            link,
            peer: peer.incarnation,
            version: peer.version,
            sender: sender.clone(),
        });
        Ok((connection, sender))
    }
}

impl State {
    /// Whether there is a link to some incarnation of a seat.
    fn is_linked(&self, seat: SeatId) -> bool {
        self.links.values().any(|link| link.peer.seat == seat)
    }

    /// Whether a new link to `peer` may stand. Of two between the same incarnations the one that the smaller seat
    /// dialled stays; of two that the same side dialled the newer: nobody dials who knows of a link.
    fn admit(&mut self, peer: Incarnation, dialled_here: bool, own: SeatId) -> Result<(), DownReason> {
        if self.stopping {
            return Err(DownReason::ClosedHere("the engine stops".to_owned()));
        }
        if !self.peers.contains_key(&peer.seat) {
            return Err(DownReason::ClosedHere(
                "the seat is no longer part of this VM".to_owned(),
            ));
        }
        let preferred = |dialled_here: bool| dialled_here == (own < peer.seat);
        for link in self.links.values().filter(|link| link.peer == peer) {
            if preferred(link.dialled_here) && !preferred(dialled_here) {
                return Err(DownReason::Superseded);
            }
            link.queue.close(DownReason::Superseded);
        }
        Ok(())
    }
}
