//! virtio-blk: one request at a time, without waiting. (Virtio 1.2, section 5.2.)

use crate::guest_journal::{MAX_DISKS, SECTOR_BYTES};
use crate::net::begin;
use crate::statics::Once;
use crate::virtio::{GuestHal, PciTransport};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

const QUEUE_SIZE: usize = 16;
const REQUESTS: u16 = 0;
const VERSION_1: u64 = 1 << 32;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
/// Sectors that one request moves at most.
pub const REQUEST_SECTORS: usize = 128;

/// One request's buffers, which the device uses while the request runs.
struct Buffers {
    header: [u8; 16],
    data: [u8; REQUEST_SECTORS * SECTOR_BYTES],
    status: [u8; 1],
}

static BUFFERS: [Once<Buffers>; MAX_DISKS] = [const {
    Once::new(Buffers {
        header: [0; 16],
        data: [0; REQUEST_SECTORS * SECTOR_BYTES],
        status: [0],
    })
}; MAX_DISKS];

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

#[derive(Clone, Copy)]
struct Running {
    kind: Kind,
    bytes: usize,
    token: u16,
}

/// A disk.
pub struct Disk {
    transport: PciTransport,
    queue: VirtQueue<GuestHal, QUEUE_SIZE>,
    buffers: &'static mut Buffers,
    sectors: u64,
    features: u64,
    running: Option<Running>,
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

    /// Starts a flush: what was written before is durable when it is done. A device that offers no flush writes through.
    pub fn flush(&mut self) {
        if self.features & FLUSH != 0 {
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
        let code: u32 = match kind {
            Kind::Read => 0,
            Kind::Write => 1,
            Kind::Flush => 4,
        };
        self.buffers.header[..4].copy_from_slice(&code.to_le_bytes());
        self.buffers.header[8..].copy_from_slice(&sector.to_le_bytes());
        self.buffers.status = [0xFF];
        let Buffers { header, data, status } = &mut *self.buffers;
        let data = &mut data[..bytes];
        // SAFETY: the buffers are static; `data` and `data_mut` refuse, and `start` too, until `poll` pops the request.
        let token = unsafe {
            match kind {
                Kind::Read => self.queue.add(&[header], &mut [data, status]),
                Kind::Write => self.queue.add(&[header, data], &mut [status]),
                Kind::Flush => self.queue.add(&[header], &mut [status]),
            }
        };
        let token = token.expect("the queue is empty");
        self.running = Some(Running { kind, bytes, token });
        if self.queue.should_notify() {
            self.transport.notify(REQUESTS);
        }
    }

    /// `None` while a request runs; then whether it succeeded. Without a request: success.
    pub fn poll(&mut self) -> Option<bool> {
        let Some(running) = self.running else { return Some(true) };
        self.queue.peek_used()?;
        let Buffers { header, data, status } = &mut *self.buffers;
        let data = &mut data[..running.bytes];
        // SAFETY: the same buffers as in `start`, under the same token.
        let popped = unsafe {
            match running.kind {
                Kind::Read => self.queue.pop_used(running.token, &[header], &mut [data, status]),
                Kind::Write => self.queue.pop_used(running.token, &[header, data], &mut [status]),
                Kind::Flush => self.queue.pop_used(running.token, &[header], &mut [status]),
            }
        };
        popped.expect("the device returns the only request");
        self.running = None;
        Some(self.buffers.status == [0])
    }
}
