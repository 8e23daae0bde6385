//! virtio-blk, without waiting: one request at a time of the disk's own, and beside it those of whoever brings buffers
//! (blocks.rs). (Virtio 1.2, section 5.2.)

use crate::guest_blocks::DEPTH_MAX;
use crate::guest_journal::{MAX_DISKS, SECTOR_BYTES};
use crate::net::begin;
use crate::statics::Once;
use crate::virtio::{GuestHal, PciTransport, wants_kick};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

const QUEUE_SIZE: usize = 128;
/// Header, data, status.
const REQUEST_DESCRIPTORS: usize = 3;
const REQUESTS: u16 = 0;
const VERSION_1: u64 = 1 << 32;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
/// Sectors that one request of the disk's own moves at most.
pub const REQUEST_SECTORS: usize = 128;

const _: () = assert!((DEPTH_MAX + 1) * REQUEST_DESCRIPTORS <= QUEUE_SIZE);

type Queue = VirtQueue<GuestHal, QUEUE_SIZE>;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Fills its data.
    Read,
    /// Takes its data.
    Write,
    /// Makes durable what was written before. It has no data.
    Flush,
}

/// What stands around a request's data.
pub struct Frame {
    header: [u8; 16],
    status: [u8; 1],
}

impl Frame {
    /// Of a request that is yet to come.
    pub const NEW: Self = Self {
        header: [0; 16],
        status: [0],
    };
}

/// A request that the device has.
#[derive(Clone, Copy)]
pub struct Running {
    /// What it does.
    pub kind: Kind,
    token: u16,
}

/// One request's buffers, which the device uses while the request runs.
struct Buffers {
    frame: Frame,
    data: [u8; REQUEST_SECTORS * SECTOR_BYTES],
}

static BUFFERS: [Once<Buffers>; MAX_DISKS] = [const {
    Once::new(Buffers {
        frame: Frame::NEW,
        data: [0; REQUEST_SECTORS * SECTOR_BYTES],
    })
}; MAX_DISKS];

/// A disk.
pub struct Disk {
    transport: PciTransport,
    queue: Queue,
    buffers: &'static mut Buffers,
    sectors: u64,
    features: u64,
    running: Option<(Running, usize)>,
}

impl Disk {
    /// Opens disk `number` of those that are opened.
    pub fn open(mut transport: PciTransport, number: usize) -> Result<Self, virtio_drivers::Error> {
        let features = begin(&mut transport, VERSION_1 | READ_ONLY | FLUSH);
        let low: u32 = transport.read_config_space(0)?;
        let high: u32 = transport.read_config_space(4)?;
        let queue = VirtQueue::new(&mut transport, REQUESTS, false, false)?;
        transport.finish_init();
        let sectors = u64::from(low) | u64::from(high) << 32;
        Ok(Self {
            transport,
            queue,
            buffers: BUFFERS[number].take(),
            sectors,
            features,
            running: None,
        })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether the device refuses writes.
    pub fn read_only(&self) -> bool {
        self.features & READ_ONLY != 0
    }

    /// Starts reading. The sectors are in [`Disk::data`] when [`Disk::poll`] says so.
    pub fn read(&mut self, sector: u64, sectors: usize) {
        self.start(Kind::Read, sector, sectors * SECTOR_BYTES);
    }

    /// Starts writing what was put into [`Disk::data_mut`].
    pub fn write(&mut self, sector: u64, sectors: usize) {
        self.start(Kind::Write, sector, sectors * SECTOR_BYTES);
    }

    /// Whether the device offers a flush; one that does not writes through.
    pub fn can_flush(&self) -> bool {
        self.features & FLUSH != 0
    }

    /// Starts a flush: what was written before is durable when it is done.
    pub fn flush(&mut self) {
        if self.can_flush() {
            self.start(Kind::Flush, 0, 0);
        }
    }

    /// The data of the last read.
    pub fn data(&self) -> &[u8] {
        assert!(self.running.is_none(), "the device may be writing it");
        &self.buffers.data
    }

    /// Room for the data of the next write.
    pub fn data_mut(&mut self) -> &mut [u8] {
        assert!(self.running.is_none(), "the device may be reading it");
        &mut self.buffers.data
    }

    fn start(&mut self, kind: Kind, sector: u64, bytes: usize) {
        assert!(self.running.is_none(), "one request at a time");
        let Buffers { frame, data } = &mut *self.buffers;
        // SAFETY: the buffers are static; `data` and `data_mut` refuse, and `start` too, until `poll` pops the request.
        let running = unsafe { add(&mut self.queue, kind, sector, frame, &mut data[..bytes]) };
        self.running = Some((running, bytes));
        self.kick();
    }

    /// `None` while a request runs; then whether it succeeded. Without a request: success. A request of somebody else's that
    /// was done before has to be taken first.
    pub fn poll(&mut self) -> Option<bool> {
        let Some((running, bytes)) = self.running else {
            return Some(true);
        };
        let Buffers { frame, data } = &mut *self.buffers;
        // SAFETY: the same buffers as in `start`.
        let done = unsafe { pop(&mut self.queue, running, frame, &mut data[..bytes]) }?;
        self.running = None;
        Some(done)
    }

    /// Puts a request into the queue; the device hears of it by [`Disk::kick`]. There is room for [`DEPTH_MAX`].
    ///
    /// # Safety
    /// Nobody touches `frame` and `data`, nor do they cease to be, until [`Disk::take`] has taken the request.
    pub unsafe fn put(&mut self, kind: Kind, sector: u64, frame: &mut Frame, data: &mut [u8]) -> Running {
        // SAFETY: the caller's promise.
        unsafe { add(&mut self.queue, kind, sector, frame, data) }
    }

    /// Tells the device of new requests.
    pub fn kick(&mut self) {
        if wants_kick(&self.queue) {
            self.transport.notify(REQUESTS);
        }
    }

    /// Takes a request back, if it is the next one that the device has done; says whether it succeeded.
    ///
    /// # Safety
    /// `frame` and `data` are those of [`Disk::put`].
    pub unsafe fn take(&mut self, running: Running, frame: &mut Frame, data: &mut [u8]) -> Option<bool> {
        // SAFETY: the caller's promise.
        unsafe { pop(&mut self.queue, running, frame, data) }
    }
}

/// # Safety
/// As for [`Disk::put`].
unsafe fn add(queue: &mut Queue, kind: Kind, sector: u64, frame: &mut Frame, data: &mut [u8]) -> Running {
    let code: u32 = match kind {
        Kind::Read => 0,
        Kind::Write => 1,
        Kind::Flush => 4,
    };
    frame.header[..4].copy_from_slice(&code.to_le_bytes());
    frame.header[8..].copy_from_slice(&sector.to_le_bytes());
    frame.status = [0xFF];
    let Frame { header, status } = frame;
    // SAFETY: the caller's promise.
    let token = unsafe {
        match kind {
            Kind::Read => queue.add(&[header], &mut [data, status]),
            Kind::Write => queue.add(&[header, data], &mut [status]),
            Kind::Flush => queue.add(&[header], &mut [status]),
        }
    };
    let token = token.expect("the queue has room for all that there may be");
    Running { kind, token }
}

/// # Safety
/// As for [`Disk::take`].
unsafe fn pop(queue: &mut Queue, running: Running, frame: &mut Frame, data: &mut [u8]) -> Option<bool> {
    if queue.peek_used() != Some(running.token) {
        return None;
    }
    let Frame { header, status } = frame;
    // SAFETY: the caller's promise.
    let popped = unsafe {
        match running.kind {
            Kind::Read => queue.pop_used(running.token, &[header], &mut [data, status]),
            Kind::Write => queue.pop_used(running.token, &[header, data], &mut [status]),
            Kind::Flush => queue.pop_used(running.token, &[header], &mut [status]),
        }
    };
    popped.expect("it was there just now");
    Some(frame.status == [0])
}
