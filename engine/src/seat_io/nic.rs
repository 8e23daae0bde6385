//! Network and console backends of a seat.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::backends::{ConsoleBackend, NetBackend};
use crate::outbox::{Outbox, Output, Sink};
use crate::pause::PauseGate;

/// Longest Ethernet frame that a tap delivers: 64 KiB of payload and a header.
const FRAME_BYTES_MAX: usize = 65_550;
/// What a flooded network can make us read at once.
const QUEUE_FRAMES_MAX: usize = 4096;
/// What it can make us keep for a guest that stands still, as much as its standby does.
const KEPT_BYTES_MAX: usize = 8 << 20;

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

/// What all NICs of a seat share on the way in.
pub struct Inbox {
    copy: Mutex<Option<InputCopy>>,
    injected: Mutex<Vec<VecDeque<Vec<u8>>>>,
    frames: AtomicU64,
    elsewhere: Box<dyn Fn() + Send + Sync>,
    elsewhere_told: AtomicBool,
}

impl Inbox {
    /// For `nics` NICs; copies go nowhere yet. `elsewhere` is called when the sender of a frame from outside has the
    /// guest's own address, for somebody else speaks, or spoke, with it; then not again before [`Self::elsewhere_taken`].
    /// It must not block.
    pub fn new(nics: usize, elsewhere: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            copy: Mutex::default(),
            injected: Mutex::new(vec![VecDeque::new(); nics]),
            frames: AtomicU64::new(0),
            elsewhere: Box::new(elsewhere),
            elsewhere_told: AtomicBool::new(false),
        }
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

    /// Puts a frame before everything that the tap has: the guest's predecessor had got it after the last checkpoint.
    pub fn inject(&self, nic: u16, frame: Vec<u8>) {
        let mut injected = self.injected.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = injected.get_mut(usize::from(nic)) {
            queue.push_back(frame);
        }
    }

    /// Reads what a tap has queued for a guest that stands still for a switchover: copied as what it gets in `epoch`, and kept for it,
    /// should it go on here. (Then it is copied a second time, as a network may do, too.)
    pub fn pass_on(&self, place: NicPlace, tap: &File, epoch: u64) {
        let mut kept_bytes = self.kept_bytes(place.nic);
        if kept_bytes > KEPT_BYTES_MAX {
            return;
        }
        read_queued(tap, |frame| {
            self.look(place.mac, frame);
            // Otherwise it is the target's call for the guest's frames.
            if !is_from(place.mac, frame) {
                self.copied(place.nic, epoch, frame);
                self.inject(u16::from(place.nic), frame.to_vec());
                kept_bytes += size_of::<Vec<u8>>() + frame.len();
            }
            kept_bytes <= KEPT_BYTES_MAX
        });
    }

    /// Forgets what was kept for a guest that runs elsewhere now.
    pub fn forget(&self) {
        let mut injected = self.injected.lock().unwrap_or_else(PoisonError::into_inner);
        injected.iter_mut().for_each(VecDeque::clear);
    }

    fn kept_bytes(&self, nic: u8) -> usize {
        let injected = self.injected.lock().unwrap_or_else(PoisonError::into_inner);
        let frames = injected.get(usize::from(nic)).into_iter().flatten();
        frames.map(|frame| size_of::<Vec<u8>>() + frame.len()).sum()
    }

    /// Frames given to the guest so far.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    fn take(&self, nic: u8) -> Option<Vec<u8>> {
        let mut injected = self.injected.lock().unwrap_or_else(PoisonError::into_inner);
        injected.get_mut(usize::from(nic))?.pop_front()
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
    gate: Arc<PauseGate>,
    outbox: Arc<Outbox>,
    inbox: Arc<Inbox>,
}

impl SeatNic {
    /// A backend on a non-blocking tap without any header.
    pub fn new(place: NicPlace, tap: File, gate: Arc<PauseGate>, outbox: Arc<Outbox>, inbox: Arc<Inbox>) -> Self {
        Self {
            nic: place.nic,
            mac: place.mac,
            tap,
            gate,
            outbox,
            inbox,
        }
    }
}

/// Throws away what a tap has queued.
pub fn discard_queued(tap: &File) {
    read_queued(tap, |_| true);
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
        self.tap.as_raw_fd()
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
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

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
        });
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

    #[test]
    fn a_flooded_network_fills_no_memory() {
        let (network, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        network.set_nonblocking(true).unwrap();
        let tap = File::from(OwnedFd::from(tap));
        let inbox = Inbox::new(1, || {});
        let large = [frame([2, 0, 0, 0, 0, 9], 1), vec![0; 9000]].concat();
        let mut sent_bytes = 0;
        while sent_bytes < 3 * KEPT_BYTES_MAX {
            // A socket's queue is short: read whenever it is full, until that is refused, too.
            let before = inbox.kept_bytes(0);
            match network.send(&large) {
                Ok(len) => sent_bytes += len,
                Err(_) => inbox.pass_on(NicPlace { nic: 0, mac: MAC }, &tap, 1),
            }
            if before > KEPT_BYTES_MAX {
                break;
            }
        }
        let kept_bytes = inbox.kept_bytes(0);
        assert!(
            (KEPT_BYTES_MAX..KEPT_BYTES_MAX + 2 * large.len()).contains(&kept_bytes),
            "{kept_bytes}"
        );
    }
}
