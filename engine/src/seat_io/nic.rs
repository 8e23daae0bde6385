//! Network and console backends of a seat.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, epoll, eventfd};

use super::claims::Guard;
use crate::backends::{ConsoleBackend, NetBackend};
use crate::outbox::{Outbox, Output, Sink};
use crate::pause::PauseGate;

/// Longest Ethernet frame that a tap delivers: 64 KiB of payload and a header.
pub(crate) const FRAME_BYTES_MAX: usize = 65_550;
/// What a flooded network can make us read at once.
const QUEUE_FRAMES_MAX: usize = 4096;
/// What it can make us keep for a guest that stands still, as much as its standby does.
pub(crate) const KEPT_BYTES_MAX: usize = 8 << 20;

/// The host's end of all outputs.
pub struct HostSink {
    /// Taps by NIC index; non-blocking.
    pub taps: Vec<File>,
    /// Where console bytes go.
    pub console: File,
    /// Output that the host did not take.
    pub dropped: Arc<AtomicU64>,
}

impl Sink for HostSink {
    fn emit(&self, output: &Output) {
        let sent = match output {
            Output::Frame { nic, bytes } => match self.taps.get(usize::from(*nic)) {
                Some(mut tap) => tap.write(bytes).map(|_| ()),
                None => return,
            },
            Output::Console(bytes) => (&self.console).write_all(bytes),
        };
        // A tap whose queue is full loses the frame as a wire does; the guest's peer asks again.
        if sent.is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Takes copies of what goes into the guest: NIC, epoch, frame. Must not block.
pub type InputCopy = Box<dyn Fn(u8, u64, &[u8]) + Send>;

/// A frame that waits for the guest outside of a tap.
struct Kept {
    frame: Vec<u8>,
    /// The target of a switchover that is under way has a copy.
    passed_on: bool,
}

impl Kept {
    fn cost(&self) -> usize {
        size_of::<Self>() + self.frame.len()
    }
}

/// The frames that wait for one NIC, before everything that its tap has.
struct Waiting {
    frames: VecDeque<Kept>,
    bytes: usize,
    /// An eventfd that is readable exactly while there are frames: the NIC's thread waits for it as for its tap.
    any: OwnedFd,
}

impl Waiting {
    fn new() -> io::Result<Self> {
        Ok(Self {
            frames: VecDeque::new(),
            bytes: 0,
            any: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn has_room(&self) -> bool {
        self.bytes <= KEPT_BYTES_MAX
    }

    /// Puts a frame at the end, or as the first; lost if there is no room.
    fn put(&mut self, kept: Kept, first: bool) {
        if !self.has_room() {
            return;
        }
        self.bytes += kept.cost();
        if self.frames.is_empty() {
            // It can fail only when the counter is full, and then it is readable anyway.
            let _ = rustix::io::write(&self.any, &1u64.to_ne_bytes());
        }
        if first {
            self.frames.push_front(kept);
        } else {
            self.frames.push_back(kept);
        }
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let kept = self.frames.pop_front()?;
        self.bytes -= kept.cost();
        if self.frames.is_empty() {
            self.not_readable();
        }
        Some(kept.frame)
    }

    fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
        self.not_readable();
    }

    fn not_readable(&self) {
        // It fails when there was nothing to read.
        let _ = rustix::io::read(&self.any, &mut [0; 8]);
    }
}

/// Frames that a link's thread has received, until somebody gives them to the NICs.
#[derive(Default)]
struct Offered {
    frames: Vec<(u16, Vec<u8>)>,
    bytes: usize,
}

/// What all NICs of a seat share on the way in.
pub struct Inbox {
    copy: Mutex<Option<InputCopy>>,
    waiting: Vec<Mutex<Waiting>>,
    offered: Mutex<Offered>,
    frames: AtomicU64,
    elsewhere: Box<dyn Fn() + Send + Sync>,
    elsewhere_told: AtomicBool,
}

impl Inbox {
    /// For `nics` NICs; copies go nowhere yet. `elsewhere` is called when the sender of a frame from outside has the
    /// guest's own address, for somebody else speaks, or spoke, with it; then not again before [`Self::elsewhere_taken`].
    /// It must not block.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(nics: usize, elsewhere: impl Fn() + Send + Sync + 'static) -> io::Result<Self> {
        let waiting = (0..nics).map(|_| Waiting::new().map(Mutex::new));
        Ok(Self {
            copy: Mutex::default(),
            waiting: waiting.collect::<io::Result<_>>()?,
            offered: Mutex::default(),
            frames: AtomicU64::new(0),
            elsewhere: Box::new(elsewhere),
            elsewhere_told: AtomicBool::new(false),
        })
    }

    /// Frames with the guest's own address are told again from now on.
    pub fn elsewhere_taken(&self) {
        self.elsewhere_told.store(false, Ordering::SeqCst);
    }

    /// Looks at a frame from outside for a NIC with address `mac`.
    fn look(&self, mac: [u8; 6], frame: &[u8]) {
        if is_from(mac, frame) && !self.elsewhere_told.swap(true, Ordering::SeqCst) {
            (self.elsewhere)();
        }
    }

    /// From now on every frame that the guest gets is copied to `copy`; `None` ends it.
    pub fn set_copy(&self, copy: Option<InputCopy>) {
        *self.copy.lock().unwrap_or_else(PoisonError::into_inner) = copy;
    }

    /// Puts frames before everything that waits, in this order: the guest's predecessor had got them after the last checkpoint.
    pub fn inject(&self, frames: Vec<(u16, Vec<u8>)>) {
        for (nic, frame) in frames.into_iter().rev() {
            self.put(nic, frame, false, true);
        }
    }

    /// Keeps a frame that came another way than through the tap; whether [`Self::take_offered`] is due. For the links' threads: they have
    /// a table of descriptors of their own, so they can't wake a NIC. What has no room is lost, as on a wire.
    pub fn offer(&self, nic: u16, frame: Vec<u8>) -> bool {
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        if offered.bytes > KEPT_BYTES_MAX {
            return false;
        }
        offered.bytes += size_of::<(u16, Vec<u8>)>() + frame.len();
        offered.frames.push((nic, frame));
        offered.frames.len() == 1
    }

    /// Gives the NICs what was offered, behind what waits for them already.
    pub fn take_offered(&self) {
        let offered = std::mem::take(&mut *self.offered.lock().unwrap_or_else(PoisonError::into_inner));
        for (nic, frame) in offered.frames {
            self.put(nic, frame, false, false);
        }
    }

    fn put(&self, nic: u16, frame: Vec<u8>, passed_on: bool, first: bool) {
        if let Some(mut waiting) = self.waiting(nic) {
            waiting.put(Kept { frame, passed_on }, first);
        }
    }

    fn waiting(&self, nic: u16) -> Option<MutexGuard<'_, Waiting>> {
        let waiting = self.waiting.get(usize::from(nic))?;
        Some(waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads what a tap has queued for a guest that stands still for a switchover: copied as what it gets in `epoch`, and kept for it,
    /// should it go on here. (Then it is copied a second time, as a network may do, too.) So is what it had not taken before.
    pub fn pass_on(&self, place: NicPlace, tap: &File, epoch: u64) {
        let nic = u16::from(place.nic);
        let Some(mut waiting) = self.waiting(nic) else { return };
        for kept in waiting.frames.iter_mut().filter(|kept| !kept.passed_on) {
            self.copied(place.nic, epoch, &kept.frame);
            kept.passed_on = true;
        }
        if !waiting.has_room() {
            return;
        }
        read_queued(tap, |frame| {
            self.look(place.mac, frame);
            // Otherwise it is the target's call for the guest's frames.
            if !is_from(place.mac, frame) {
                self.copied(place.nic, epoch, frame);
                let (frame, passed_on) = (frame.to_vec(), true);
                waiting.put(Kept { frame, passed_on }, false);
            }
            waiting.has_room()
        });
    }

    /// The guest goes on here after a switchover that came to nothing: the next target has no copy of what waits.
    pub fn goes_on(&self) {
        for nic in 0..self.waiting.len() {
            if let Some(mut waiting) = self.waiting(nic as u16) {
                waiting.frames.iter_mut().for_each(|kept| kept.passed_on = false);
            }
        }
    }

    /// Forgets what was kept for a guest that runs elsewhere now, and what was offered for it: nothing may reach it when it comes back
    /// some day.
    pub fn forget(&self) {
        *self.offered.lock().unwrap_or_else(PoisonError::into_inner) = Offered::default();
        for nic in 0..self.waiting.len() {
            if let Some(mut waiting) = self.waiting(nic as u16) {
                waiting.clear();
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn offered_bytes(&self) -> usize {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }

    /// Frames given to the guest so far.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    fn take(&self, nic: u8) -> Option<Vec<u8>> {
        self.waiting(u16::from(nic))?.take()
    }

    fn delivered(&self, nic: u8, epoch: u64, frame: &[u8]) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.copied(nic, epoch, frame);
    }

    fn copied(&self, nic: u8, epoch: u64, frame: &[u8]) {
        if let Some(copy) = &*self.copy.lock().unwrap_or_else(PoisonError::into_inner) {
            copy(nic, epoch, frame);
        }
    }
}

/// Whether an Ethernet frame has this source address.
fn is_from(mac: [u8; 6], frame: &[u8]) -> bool {
    frame.get(6..12) == Some(&mac[..])
}

/// Which NIC.
#[derive(Debug, Clone, Copy)]
pub struct NicPlace {
    /// Its number, in configuration order.
    pub nic: u8,
    /// Its address.
    pub mac: [u8; 6],
}

/// The backend of one NIC.
pub struct SeatNic {
    nic: u8,
    mac: [u8; 6],
    tap: File,
    /// An epoll set that is readable while the tap has frames, or the inbox has.
    readable: OwnedFd,
    guard: Guard,
    gate: Arc<PauseGate>,
    outbox: Arc<Outbox>,
    inbox: Arc<Inbox>,
}

impl SeatNic {
    /// A backend on a non-blocking tap without any header. What `guard` does not admit never becomes output.
    ///
    /// # Errors
    /// The process has no descriptor left, or the inbox has no such NIC.
    pub fn new(
        place: NicPlace,
        tap: File,
        guard: Guard,
        gate: Arc<PauseGate>,
        outbox: Arc<Outbox>,
        inbox: Arc<Inbox>,
    ) -> io::Result<Self> {
        let readable = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&readable, &tap, data, epoll::EventFlags::IN)?;
        let waiting = inbox.waiting(u16::from(place.nic)).ok_or(io::ErrorKind::InvalidInput)?;
        epoll::add(&readable, &waiting.any, data, epoll::EventFlags::IN)?;
        drop(waiting);
        Ok(Self {
            nic: place.nic,
            mac: place.mac,
            tap,
            readable,
            guard,
            gate,
            outbox,
            inbox,
        })
    }
}

/// Throws away what a tap has queued.
pub fn discard_queued(tap: &File) {
    read_queued(tap, |_| true);
}

/// Hands over what a tap has queued that is for this address alone. What is for everybody reaches the guest by itself.
pub fn queued_for(mac: [u8; 6], tap: &File, mut take: impl FnMut(&[u8])) {
    read_queued(tap, |frame| {
        if frame.get(..6) == Some(&mac[..]) && !is_from(mac, frame) {
            take(frame);
        }
        true
    });
}

/// Hands over what a tap has queued as long as `take` wants more. At most one queue's worth, so that a flooded network can't hold us
/// here.
fn read_queued(mut tap: &File, mut take: impl FnMut(&[u8]) -> bool) {
    let mut frame = [0u8; FRAME_BYTES_MAX];
    for _ in 0..QUEUE_FRAMES_MAX {
        match tap.read(&mut frame) {
            Ok(len @ 1..) if take(&frame[..len]) => {}
            _ => return,
        }
    }
}

impl NetBackend for SeatNic {
    fn transmit(&mut self, frame: &[u8]) {
        if !self.guard.admits(frame) {
            return;
        }
        let output = Output::Frame {
            nic: self.nic,
            bytes: Arc::from(frame),
        };
        self.outbox.put(self.gate.epoch(), output);
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let len = match self.inbox.take(self.nic) {
            Some(frame) => {
                let len = frame.len().min(buf.len());
                buf[..len].copy_from_slice(&frame[..len]);
                len
            }
            None => match self.tap.read(buf) {
                Ok(len) => {
                    self.inbox.look(self.mac, &buf[..len]);
                    // What another seat announces, or sends late, with the guest's address is not for the guest, which would see somebody
                    // else claim what it is about to claim. The tap stays readable if it has more.
                    if is_from(self.mac, &buf[..len]) {
                        return Ok(None);
                    }
                    len
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            },
        };
        self.inbox.delivered(self.nic, self.gate.epoch(), &buf[..len]);
        Ok(Some(len))
    }

    fn wake_fd(&self) -> RawFd {
        self.readable.as_raw_fd()
    }
}

/// The backend of the serial console.
pub struct SeatConsole {
    gate: Arc<PauseGate>,
    outbox: Arc<Outbox>,
}

impl SeatConsole {
    /// A console whose bytes go to the outbox.
    pub fn new(gate: Arc<PauseGate>, outbox: Arc<Outbox>) -> Self {
        Self { gate, outbox }
    }
}

impl ConsoleBackend for SeatConsole {
    fn write(&mut self, bytes: &[u8]) {
        // A vCPU thread that handles an exit: vCPUs are parked before the epoch changes.
        self.outbox.put(self.gate.epoch(), Output::Console(Arc::from(bytes)));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixDatagram;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::super::claims::{Claims, Refused};
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const MAC_BROADCAST: u8 = 0xff;

    struct Nowhere;

    impl Sink for Nowhere {
        fn emit(&self, _output: &Output) {}
    }

    fn guard() -> Guard {
        Guard::new(Claims::new(MAC, &[]), Arc::new(Refused::default()), |_| {})
    }

    fn frame(from: [u8; 6], content: u8) -> Vec<u8> {
        [&[0xff; 6][..], &from, &[content; 48]].concat()
    }

    #[test]
    fn what_arrives_during_a_switchover_is_copied_and_kept() {
        let (network, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let tap = File::from(OwnedFd::from(tap));
        let told = Arc::new(AtomicU64::new(0));
        let counter = told.clone();
        let inbox = Inbox::new(1, move || {
            counter.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
        let copies = Arc::new(Mutex::new(Vec::new()));
        let into = copies.clone();
        inbox.set_copy(Some(Box::new(move |nic, epoch, frame| {
            into.lock().unwrap().push((nic, epoch, frame.to_vec()));
        })));
        let (client, call) = (frame([2, 0, 0, 0, 0, 9], 1), frame(MAC, 2));
        network.send(&client).unwrap();
        network.send(&call).unwrap();
        inbox.pass_on(NicPlace { nic: 0, mac: MAC }, &tap, 7);
        assert_eq!(*copies.lock().unwrap(), [(0, 7, client.clone())]);
        assert_eq!(
            told.load(Ordering::SeqCst),
            1,
            "the call shows that the guest is looked for elsewhere"
        );
        assert_eq!((inbox.take(0), inbox.take(0)), (Some(client.clone()), None));
        network.send(&client).unwrap();
        inbox.pass_on(NicPlace { nic: 0, mac: MAC }, &tap, 7);
        inbox.forget();
        assert_eq!(inbox.take(0), None);
    }

    fn readable(fd: RawFd) -> bool {
        // SAFETY: the caller's descriptor, open for the time of the call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
    }

    /// The NIC's thread sleeps until its descriptor is readable: it must be while a frame waits anywhere, and no longer, or the
    /// thread would turn and turn.
    #[test]
    fn frames_come_in_order_from_everywhere_and_wake_the_nic() {
        let (network, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let inbox = Arc::new(Inbox::new(1, || {}).unwrap());
        let gate = Arc::new(PauseGate::new_closed(1));
        let outbox = Arc::new(Outbox::new(Box::new(Nowhere), crate::outbox::admitted));
        let place = NicPlace { nic: 0, mac: MAC };
        let mut nic = SeatNic::new(
            place,
            File::from(OwnedFd::from(tap)),
            guard(),
            gate,
            outbox,
            inbox.clone(),
        )
        .unwrap();
        assert!(!readable(nic.wake_fd()));
        network.send(&frame([2, 0, 0, 0, 0, 9], 4)).unwrap();
        assert!(readable(nic.wake_fd()), "the tap has a frame");
        assert!(inbox.offer(0, vec![3]));
        inbox.inject(vec![(0, vec![1]), (0, vec![2])]);
        assert!(!inbox.offer(1, vec![9]), "told once");
        inbox.take_offered();
        let mut buf = [0; 64];
        for (first, last) in [(1, 1), (2, 2), (3, 3), (MAC_BROADCAST, 4)] {
            assert!(readable(nic.wake_fd()));
            let len = nic.receive(&mut buf).unwrap().unwrap();
            assert_eq!((buf[0], buf[len - 1]), (first, last));
        }
        assert!(!readable(nic.wake_fd()));
        assert_eq!(nic.receive(&mut buf).unwrap(), None);
        assert!(inbox.offer(0, vec![3]));
        inbox.take_offered();
        assert!(readable(nic.wake_fd()));
        assert!(inbox.offer(0, vec![3]));
        inbox.forget();
        inbox.take_offered();
        assert!(!readable(nic.wake_fd()));
    }

    /// Nothing of it waits for a release, or is there to be sent once more after a takeover.
    #[test]
    fn a_frame_that_is_refused_is_in_no_epoch() {
        let (_network, tap) = UnixDatagram::pair().unwrap();
        let inbox = Arc::new(Inbox::new(1, || {}).unwrap());
        let gate = Arc::new(PauseGate::new_closed(1));
        let outbox = Arc::new(Outbox::new(Box::new(Nowhere), crate::outbox::admitted));
        let place = NicPlace { nic: 0, mac: MAC };
        let tap = File::from(OwnedFd::from(tap));
        let mut nic = SeatNic::new(place, tap, guard(), gate.clone(), outbox.clone(), inbox).unwrap();
        let (own, others) = (frame(MAC, 1), frame([2, 0, 0, 0, 0, 9], 2));
        nic.transmit(&others);
        assert!(outbox.of_epoch(gate.epoch()).is_empty());
        nic.transmit(&own);
        nic.transmit(&others);
        let held = outbox.of_epoch(gate.epoch());
        assert_eq!(
            held,
            [Output::Frame {
                nic: 0,
                bytes: Arc::from(own)
            }]
        );
    }

    #[test]
    fn what_is_said_elsewhere_as_the_guest_does_not_reach_it() {
        let (network, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let told = Arc::new(AtomicU64::new(0));
        let counter = told.clone();
        let inbox = Inbox::new(1, move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let inbox = Arc::new(inbox.unwrap());
        let gate = Arc::new(PauseGate::new_closed(1));
        let outbox = Arc::new(Outbox::new(Box::new(Nowhere), crate::outbox::admitted));
        let place = NicPlace { nic: 0, mac: MAC };
        let tap = File::from(OwnedFd::from(tap));
        let mut nic = SeatNic::new(place, tap, guard(), gate, outbox, inbox.clone()).unwrap();
        network.send(&frame(MAC, 1)).unwrap();
        network.send(&frame([2, 0, 0, 0, 0, 9], 2)).unwrap();
        let mut buf = [0; 64];
        assert_eq!(nic.receive(&mut buf).unwrap(), None);
        assert_eq!(
            (told.load(Ordering::SeqCst), inbox.frames()),
            (1, 0),
            "the driver hears of it"
        );
        assert!(readable(nic.wake_fd()), "the other one waits");
        let len = nic.receive(&mut buf).unwrap().unwrap();
        assert_eq!((buf[len - 1], inbox.frames()), (2, 1));
    }

    /// Two switchovers in a row: what came late for the first is passed on with the second.
    #[test]
    fn what_the_guest_has_not_taken_goes_with_it() {
        let (_network, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let tap = File::from(OwnedFd::from(tap));
        let inbox = Inbox::new(1, || {}).unwrap();
        let copies = Arc::new(Mutex::new(Vec::new()));
        let into = copies.clone();
        inbox.set_copy(Some(Box::new(move |_, epoch, frame| {
            into.lock().unwrap().push((epoch, frame.to_vec()));
        })));
        inbox.offer(0, vec![1]);
        inbox.take_offered();
        for _ in 0..2 {
            inbox.pass_on(NicPlace { nic: 0, mac: MAC }, &tap, 7);
            assert_eq!(*copies.lock().unwrap(), [(7, vec![1])], "once");
        }
        inbox.goes_on();
        inbox.pass_on(NicPlace { nic: 0, mac: MAC }, &tap, 9);
        assert_eq!(*copies.lock().unwrap(), [(7, vec![1]), (9, vec![1])], "another target");
        assert_eq!(
            inbox.take(0),
            Some(vec![1]),
            "and it stays, should the guest go on here"
        );
    }

    #[test]
    fn what_is_for_everybody_reaches_the_guest_by_itself() {
        let (network, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let tap = File::from(OwnedFd::from(tap));
        let client = [2, 0, 0, 0, 0, 9];
        let for_the_guest = [&MAC[..], &client, &[7; 48]].concat();
        let its_own = [&MAC[..], &MAC, &[8; 48]].concat();
        for frame in [&frame(client, 1), &for_the_guest, &its_own, &vec![0; 3]] {
            network.send(frame).unwrap();
        }
        let mut taken = Vec::new();
        queued_for(MAC, &tap, |frame| taken.push(frame.to_vec()));
        assert_eq!(taken, [for_the_guest]);
    }

    #[test]
    fn what_comes_late_fills_no_memory() {
        let inbox = Inbox::new(1, || {}).unwrap();
        for _ in 0..2 {
            for _ in 0..3 * KEPT_BYTES_MAX / 65_536 {
                inbox.offer(0, vec![0; 65_536]);
            }
            assert!(inbox.offered.lock().unwrap().bytes <= KEPT_BYTES_MAX + 2 * 65_536);
            inbox.take_offered();
        }
        assert!(inbox.waiting(0).unwrap().bytes <= KEPT_BYTES_MAX + 2 * 65_536);
    }

    #[test]
    fn a_flooded_network_fills_no_memory() {
        let (network, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        network.set_nonblocking(true).unwrap();
        let tap = File::from(OwnedFd::from(tap));
        let inbox = Inbox::new(1, || {}).unwrap();
        let kept_bytes = || inbox.waiting(0).unwrap().bytes;
        let large = [frame([2, 0, 0, 0, 0, 9], 1), vec![0; 9000]].concat();
        let mut sent_bytes = 0;
        while sent_bytes < 3 * KEPT_BYTES_MAX {
            // A socket's queue is short: read whenever it is full, until that is refused, too.
            let before = kept_bytes();
            match network.send(&large) {
                Ok(len) => sent_bytes += len,
                Err(_) => inbox.pass_on(NicPlace { nic: 0, mac: MAC }, &tap, 1),
            }
            if before > KEPT_BYTES_MAX {
                break;
            }
        }
        let kept_bytes = kept_bytes();
        assert!(
            (KEPT_BYTES_MAX..KEPT_BYTES_MAX + 2 * large.len()).contains(&kept_bytes),
            "{kept_bytes}"
        );
    }
}
