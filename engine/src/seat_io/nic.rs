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
        if frame.get(6..12) == Some(&mac[..]) && !self.elsewhere_told.swap(true, Ordering::SeqCst) {
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
        if let Some(copy) = &*self.copy.lock().unwrap_or_else(PoisonError::into_inner) {
            copy(nic, epoch, frame);
        }
    }
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

/// Throws away what a tap has queued. At most one queue's worth, so that a flooded network can't hold us here.
pub fn discard_queued(tap: &File) {
    const QUEUE_FRAMES_MAX: usize = 4096;
    let mut frame = [0u8; FRAME_BYTES_MAX];
    let mut tap = tap;
    for _ in 0..QUEUE_FRAMES_MAX {
        if !matches!(tap.read(&mut frame), Ok(1..)) {
            return;
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
