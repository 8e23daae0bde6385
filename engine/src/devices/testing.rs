//! Stand-ins for what a machine offers to devices.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::bus::lock;
use super::event::{DeviceEvent, DeviceEvents};
use super::irq::{GuestClock, IrqLine, MsiSender, NotifyRegistrar};
use super::set::Platform;
use crate::backends::{ConsoleBackend, DiskBackend, DiskOp, NetBackend};
use crate::memory::GuestRam;
use crate::pause::PauseGate;

/// Collects events.
#[derive(Default)]
pub(crate) struct Events(Mutex<Vec<DeviceEvent>>);

impl Events {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn take(&self) -> Vec<DeviceEvent> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl DeviceEvents for Events {
    fn report(&self, event: DeviceEvent) {
        lock(&self.0).push(event);
    }
}

/// Remembers the level of a line.
#[derive(Default)]
pub(crate) struct Line(AtomicBool);

impl Line {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn asserted(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl IrqLine for Line {
    fn set(&self, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
}

/// A guest clock that the test moves.
#[derive(Default)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::SeqCst);
    }
}

impl GuestClock for Clock {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Collects console output.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    pub(crate) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl ConsoleBackend for Console {
    fn write(&mut self, bytes: &[u8]) {
        lock(&self.0).extend(bytes);
    }
}

/// Collects messages, and lets a test wait for them.
#[derive(Default)]
pub(crate) struct Msi {
    sent: Mutex<Vec<(u64, u32)>>,
    changed: Condvar,
}

impl MsiSender for Msi {
    fn send(&self, address: u64, data: u32) {
        lock(&self.sent).push((address, data));
        self.changed.notify_all();
    }
}

impl Msi {
    pub(crate) fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut lock(&self.sent))
    }

    /// Waits for a message with `data` and forgets all that were sent.
    pub(crate) fn wait_for(&self, data: u32) {
        let mut sent = lock(&self.sent);
        let deadline = Instant::now() + PATIENCE;
        while !sent.iter().any(|(_, found)| *found == data) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no interrupt {data}, only {sent:?}");
            sent = self.changed.wait_timeout(sent, left).unwrap().0;
        }
        sent.clear();
    }
}

/// How long a test waits for what has to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until `done` gives something.
pub(crate) fn wait_until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

/// Remembers what was registered; takes nothing over, unless `works`.
#[derive(Default)]
pub(crate) struct Registrar {
    pub(crate) works: AtomicBool,
    addresses: Mutex<Vec<u64>>,
    /// How often anything was asked of it.
    pub(crate) asked: AtomicU64,
}

impl Registrar {
    pub(crate) fn addresses(&self) -> Vec<u64> {
        let mut addresses = lock(&self.addresses).clone();
        addresses.sort_unstable();
        addresses
    }
}

impl NotifyRegistrar for Registrar {
    fn register(&self, address: u64, _: BorrowedFd<'_>) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if !self.works.load(Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        lock(&self.addresses).push(address);
        Ok(())
    }

    fn unregister(&self, address: u64, _: BorrowedFd<'_>) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        lock(&self.addresses).retain(|known| *known != address);
        Ok(())
    }
}

/// A network whose frames a test gives and takes.
pub(crate) struct Wire {
    pub(crate) sent: Arc<Mutex<Vec<Vec<u8>>>>,
    incoming: Arc<Mutex<VecDeque<io::Result<Vec<u8>>>>>,
    wake: Arc<OwnedFd>,
}

impl Wire {
    pub(crate) fn new() -> Self {
        let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::SEMAPHORE;
        Self {
            sent: Arc::default(),
            incoming: Arc::default(),
            wake: Arc::new(rustix::event::eventfd(0, flags).unwrap()),
        }
    }

    /// The other end: to be given to a device.
    pub(crate) fn backend(&self) -> Box<Self> {
        Box::new(Self {
            sent: self.sent.clone(),
            incoming: self.incoming.clone(),
            wake: self.wake.clone(),
        })
    }

    pub(crate) fn inject(&self, frame: io::Result<Vec<u8>>) {
        // As with a tap, a frame that can be read and the descriptor that says so are one.
        let mut incoming = lock(&self.incoming);
        incoming.push_back(frame);
        rustix::io::write(&self.wake, &1u64.to_ne_bytes()).unwrap();
    }

    pub(crate) fn waiting(&self) -> usize {
        lock(&self.incoming).len()
    }
}

impl NetBackend for Wire {
    fn transmit(&mut self, frame: &[u8]) {
        lock(&self.sent).push(frame.to_vec());
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut incoming = lock(&self.incoming);
        let Some(frame) = incoming.pop_front() else {
            return Ok(None);
        };
        rustix::io::read(&self.wake, &mut [0; 8]).unwrap();
        drop(incoming);
        let frame = frame?;
        let len = frame.len().min(buf.len());
        buf[..len].copy_from_slice(&frame[..len]);
        Ok(Some(len))
    }

    fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// What a [`MemoryDisk`] was told, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    Read(u64, u64),
    Write(u64, Vec<u8>),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
}

/// A disk in memory that a test can stop, break and look into.
#[derive(Clone)]
pub(crate) struct MemoryDisk {
    pub(crate) content: Arc<Mutex<Vec<u8>>>,
    pub(crate) completed: Arc<Mutex<Vec<(Seen, bool)>>>,
    pub(crate) executed: Arc<AtomicU64>,
    pub(crate) fails: Arc<AtomicBool>,
    /// Another disk may take its place.
    pub(crate) moves: Arc<AtomicBool>,
    /// Requests that change something wait for room while this is held.
    pub(crate) room: Arc<Mutex<()>>,
    /// Requests wait, outside the gate, while this is held.
    pub(crate) door: Arc<Mutex<()>>,
    pub(crate) gate: Arc<Mutex<Option<Arc<PauseGate>>>>,
}

impl MemoryDisk {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            content: Arc::new(Mutex::new(vec![0; size])),
            completed: Arc::default(),
            executed: Arc::default(),
            fails: Arc::default(),
            moves: Arc::default(),
            room: Arc::default(),
            door: Arc::default(),
            gate: Arc::default(),
        }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        lock(&self.completed).iter().map(|(seen, _)| seen.clone()).collect()
    }

    fn enter(&self) -> io::Result<()> {
        self.executed.fetch_add(1, Ordering::SeqCst);
        let _waits = lock(&self.door);
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

impl DiskBackend for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        lock(&self.content).len() as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.enter()?;
        buf.copy_from_slice(&lock(&self.content)[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.enter()?;
        lock(&self.content)[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.enter()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.enter()?;
        lock(&self.content)[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn completed(&mut self, op: &DiskOp<'_>, ok: bool) {
        if let Some(gate) = lock(&self.gate).as_ref() {
            assert!(!gate.is_closed(), "completed() is called inside the gate");
        }
        let seen = match *op {
            DiskOp::Read { offset, len } => Seen::Read(offset, len),
            DiskOp::Write { offset, data } => Seen::Write(offset, data.to_vec()),
            DiskOp::Flush => Seen::Flush,
            DiskOp::Discard { offset, len } => Seen::Discard(offset, len),
            DiskOp::WriteZeroes { offset, len, unmap } => Seen::WriteZeroes(offset, len, unmap),
        };
        lock(&self.completed).push((seen, ok));
    }

    fn wait_for_room(&mut self) {
        drop(lock(&self.room));
    }

    fn may_move(&self) -> bool {
        self.moves.load(Ordering::SeqCst)
    }
}

/// Everything that a device needs of a machine.
pub(crate) struct Bench {
    pub(crate) platform: Platform,
    pub(crate) msi: Arc<Msi>,
    pub(crate) events: Arc<Events>,
    pub(crate) registrar: Arc<Registrar>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) serial_line: Arc<Line>,
    pub(crate) sci_line: Arc<Line>,
}

/// RAM of a bench.
pub(crate) const RAM_BYTES: u64 = 8 << 20;

impl Bench {
    pub(crate) fn new() -> Self {
        let (msi, events, registrar, clock) = (Arc::<Msi>::default(), Events::new(), Arc::default(), Clock::new());
        let (serial_line, sci_line) = (Line::new(), Line::new());
        let registrar: Arc<Registrar> = registrar;
        let platform = Platform {
            ram: Arc::new(GuestRam::new(RAM_BYTES, false).unwrap()),
            gate: Arc::new(PauseGate::new_closed(1)),
            buses: Arc::default(),
            msi: msi.clone(),
            serial_irq: serial_line.clone(),
            sci_irq: sci_line.clone(),
            notify: registrar.clone(),
            clock: clock.clone(),
            events: events.clone(),
            prepare_thread: Arc::new(|_| ()),
        };
        Self {
            platform,
            msi,
            events,
            registrar,
            clock,
            serial_line,
            sci_line,
        }
    }
}

/// Random numbers that a seed determines (xorshift64*).
pub(crate) struct Seeded(u64);

impl Seeded {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
