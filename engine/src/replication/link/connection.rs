//! One connection: a poll loop that owns the TLS state, from the handshake to the end.

use std::io::{self, BufRead, IoSlice, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_protocol::identity::{Incarnation, SeatId};
use ftvm_protocol::wire::{HEADER_BYTES, Hello, encode_header, negotiate};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::frames::{Assembler, Frame};
use super::queue::Queue;
use super::tls::{self, TlsIdentity};
use super::{DownReason, LinkConfig};
use crate::replication::buffers;

/// Ciphertext that may wait for the socket.
const CIPHERTEXT_BYTES: usize = 256 * 1024;
/// Read from the socket at once.
const RECEIVE_BYTES: usize = 256 * 1024;
/// Not yet sent bytes that the kernel may hold: what is queued there can't be overtaken by a heartbeat.
const KERNEL_UNSENT_BYTES: libc::c_int = 256 * 1024;
/// Rounds of sending before receiving gets its turn.
const SEND_ROUNDS: usize = 8;

/// Whom a connection leads to.
pub(super) enum Side {
    /// We dialled this seat.
    Dialled(SeatId),
    /// Somebody dialled us.
    Accepted,
}

/// What the handshake found out.
pub(super) struct Peer {
    pub incarnation: Incarnation,
    pub version: u16,
}

/// A frame on its way into the TLS state.
struct Outgoing {
    header: [u8; HEADER_BYTES],
    payload: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    /// What is left, as header and payload.
    fn rest(&self) -> [IoSlice<'_>; 2] {
        let in_header = self.sent.min(HEADER_BYTES);
        let in_payload = self.sent - in_header;
        [
            IoSlice::new(&self.header[in_header..]),
            IoSlice::new(&self.payload[in_payload..]),
        ]
    }

    fn is_done(&self) -> bool {
        self.sent == HEADER_BYTES + self.payload.len()
    }
}

/// A connection with everything that belongs to it.
pub(super) struct Connection {
    stream: TcpStream,
    tls: rustls::Connection,
    queue: Arc<Queue>,
    assembler: Assembler,
    outgoing: Option<Outgoing>,
    received: Box<[u8]>,
    /// Part of `received` that TLS has not taken yet.
    untaken: Range<usize>,
    /// 0 until the hellos were exchanged: nothing but the hello is sent before.
    version: u16,
    stall_deadline: Duration,
    /// When bytes last moved, or there were none to move.
    moved: Instant,
    peer_closed: bool,
}

impl Connection {
    /// Takes over a connected socket.
    pub fn new(stream: TcpStream, side: &Side, config: &LinkConfig, queue: Arc<Queue>) -> Result<Self, DownReason> {
        let mut tls = match side {
            Side::Dialled(seat) => config.identity.dial(*seat),
            Side::Accepted => config.identity.accept(),
        }
        .map_err(DownReason::Tls)?;
        tls.set_buffer_limit(Some(CIPHERTEXT_BYTES));
        tune(&stream, config.stall_deadline).map_err(DownReason::Broken)?;
        Ok(Self {
            stream,
            tls,
            queue,
            assembler: Assembler::new(),
            outgoing: None,
            received: vec![0; RECEIVE_BYTES].into_boxed_slice(),
            untaken: 0..0,
            version: 0,
            stall_deadline: config.stall_deadline,
            moved: Instant::now(),
            peer_closed: false,
        })
    }

    /// TLS and hellos, before the deadline. `wanted` is asked once, before this side says its hello: from there on the other side may
    /// count the connection as a link.
    pub fn shake_hands(
        &mut self,
        own: &Hello,
        identity: &TlsIdentity,
        limit: Duration,
        wanted: impl Fn() -> bool,
    ) -> Result<Peer, DownReason> {
        let deadline = Instant::now() + limit;
        let mut hello_queued = false;
        let mut theirs = None;
        loop {
            if let Some(reason) = self.queue.close_reason() {
                return Err(reason);
            }
            if theirs.is_none() {
                theirs = self.next_frame()?;
            }
            if !hello_queued && !self.tls.is_handshaking() {
                if !wanted() {
                    return Err(DownReason::Superseded);
                }
                let hello = own.to_frame()?;
                self.tls.writer().write_all(&hello).map_err(DownReason::Broken)?;
                hello_queued = true;
            }
            self.send_ciphertext()?;
            if hello_queued && let Some(frame) = theirs.take() {
                return self.greeted(own, identity, &frame);
            }
            self.check_open()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(DownReason::HandshakeTimeout(limit));
            }
            self.wait(Some(left))?;
            self.receive()?;
        }
    }

    fn greeted(&mut self, own: &Hello, identity: &TlsIdentity, frame: &Frame) -> Result<Peer, DownReason> {
        let hello = Hello::decode(&frame.payload)?;
        let version = negotiate(own, &hello)?;
        if identity
            .seat_of(self.tls.peer_certificates().unwrap_or_default())
            .map_err(DownReason::Tls)?
            != hello.from.seat
        {
            return Err(DownReason::OtherSeat(hello.from));
        }
        self.version = version;
        self.assembler.agree(version);
        Ok(Peer {
            incarnation: hello.from,
            version,
        })
    }

    /// Sends what is queued and delivers what arrives, until the connection ends.
    pub fn run(mut self, mut deliver: impl FnMut(Frame)) -> DownReason {
        let reason = loop {
            if let Err(reason) = self.turn(&mut deliver) {
                break reason;
            }
        };
        self.queue.shut();
        self.say_goodbye();
        reason
    }

    fn turn(&mut self, deliver: &mut impl FnMut(Frame)) -> Result<(), DownReason> {
        if let Some(reason) = self.queue.close_reason() {
            return Err(reason);
        }
        let more = self.transmit()?;
        while let Some(frame) = self.next_frame()? {
            self.queue.note_received();
            deliver(frame);
        }
        self.check_open()?;
        let idle = !self.tls.wants_write() && self.outgoing.is_none();
        if idle {
            self.moved = Instant::now();
        }
        let stalled_in = self.stall_deadline.saturating_sub(self.moved.elapsed());
        if stalled_in.is_zero() {
            return Err(DownReason::Stalled(self.stall_deadline));
        }
        self.wait(if more {
            Some(Duration::ZERO)
        } else {
            (!idle).then_some(stalled_in)
        })?;
        self.receive()
    }

    /// Moves frames into the socket; true if more could go at once.
    fn transmit(&mut self) -> Result<bool, DownReason> {
        for _ in 0..SEND_ROUNDS {
            self.encrypt_queued()?;
            if !self.send_ciphertext()? {
                return Ok(false);
            }
            if self.outgoing.is_none() && self.queue.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn encrypt_queued(&mut self) -> Result<(), DownReason> {
        loop {
            if self.outgoing.is_none() {
                let Some(frame) = self.queue.pop() else {
                    return Ok(());
                };
                let header = encode_header(self.version, frame.kind, frame.epoch, frame.session, &frame.payload)?;
                self.outgoing = Some(Outgoing {
                    header,
                    payload: frame.payload,
                    sent: 0,
                });
            }
            let Some(outgoing) = &mut self.outgoing else {
                return Ok(());
            };
            // Takes nothing when enough ciphertext waits.
            let taken = self
                .tls
                .writer()
                .write_vectored(&outgoing.rest())
                .map_err(DownReason::Broken)?;
            outgoing.sent += taken;
            if outgoing.is_done() {
                self.outgoing
                    .take()
                    .into_iter()
                    .for_each(|sent| buffers::give(sent.payload));
            } else {
                return Ok(());
            }
        }
    }

    /// True if all ciphertext is with the kernel.
    fn send_ciphertext(&mut self) -> Result<bool, DownReason> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.stream) {
                Ok(0) => return Err(DownReason::Closed),
                Ok(_) => self.moved = Instant::now(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(true)
    }

    /// A peer that refuses sends an alert and closes, so that writing fails before the alert was read: the alert says
    /// more.
    fn broken(&mut self, error: io::Error) -> DownReason {
        let _ = self.receive();
        loop {
            match self.decrypt() {
                Ok(true) => {}
                Err(reason @ DownReason::Tls(_)) => return reason,
                _ => return DownReason::Broken(error),
            }
        }
    }

    /// Waits until something can be done: bytes, room for bytes that wait, or the queue.
    fn wait(&mut self, limit: Option<Duration>) -> Result<(), DownReason> {
        let mut interest = PollFlags::IN;
        if self.tls.wants_write() {
            interest |= PollFlags::OUT;
        }
        let woken = {
            let wake = self.queue.wake_fd();
            let stream = self.stream.as_fd();
            let mut fds = [PollFd::new(&stream, interest), PollFd::new(&wake, PollFlags::IN)];
            let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
            match poll(&mut fds, limit.as_ref()) {
                Ok(_) => !fds[1].revents().is_empty(),
                Err(rustix::io::Errno::INTR) => false,
                Err(error) => return Err(DownReason::Broken(error.into())),
            }
        };
        if woken {
            self.queue.awake();
        }
        Ok(())
    }

    /// Reads what has arrived; an end of the stream is remembered, what came before it is delivered first.
    fn receive(&mut self) -> Result<(), DownReason> {
        if !self.untaken.is_empty() {
            return Ok(());
        }
        match self.stream.read(&mut self.received) {
            Ok(0) => self.peer_closed = true,
            Ok(bytes) => self.untaken = 0..bytes,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(DownReason::Broken(error)),
        }
        Ok(())
    }

    /// Gives TLS more of what was received; false if there is no more. Only when all decrypted bytes were fetched:
    /// TLS keeps few of them.
    fn decrypt(&mut self) -> Result<bool, DownReason> {
        let mut rest = &self.received[self.untaken.clone()];
        if rest.is_empty() {
            return Ok(false);
        }
        let taken = self.tls.read_tls(&mut rest).map_err(DownReason::Broken)?;
        // After the peer's goodbye nothing is taken any more.
        self.untaken.start = if taken == 0 {
            self.untaken.end
        } else {
            self.untaken.start + taken
        };
        self.tls
            .process_new_packets()
            .map_err(|error| DownReason::Tls(tls::explain(error)))?;
        Ok(true)
    }

    /// The next frame among what was received. After `None` everything was looked at.
    fn next_frame(&mut self) -> Result<Option<Frame>, DownReason> {
        loop {
            let mut reader = self.tls.reader();
            match reader.fill_buf() {
                Ok([]) => {
                    self.peer_closed = true;
                    return Ok(None);
                }
                Ok(chunk) => {
                    let mut rest = chunk;
                    let frame = self.assembler.take(&mut rest)?;
                    let used = chunk.len() - rest.len();
                    reader.consume(used);
                    if frame.is_some() {
                        return Ok(frame);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.decrypt()? {
                        return Ok(None);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    self.peer_closed = true;
                    return Ok(None);
                }
                Err(error) => return Err(DownReason::Broken(error)),
            }
        }
    }

    fn check_open(&self) -> Result<(), DownReason> {
        if self.peer_closed {
            Err(DownReason::Closed)
        } else {
            Ok(())
        }
    }

    /// Tells the peer, as far as that goes without waiting.
    fn say_goodbye(&mut self) {
        self.tls.send_close_notify();
        let _ = self.tls.write_tls(&mut self.stream);
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Ends a connection that did not become a link; the peer is told by TLS's own alert if there is one.
    pub fn refuse(mut self) {
        self.say_goodbye();
    }
}

fn tune(stream: &TcpStream, stall: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let stall_ms = u32::try_from(stall.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, stall_ms)?;
    let lowat = KERNEL_UNSENT_BYTES;
    // SAFETY: the descriptor is open, and the option's value is one int that lives across the call.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const lowat).cast(),
            size_of_val(&lowat) as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
