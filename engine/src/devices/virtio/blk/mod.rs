//! virtio-blk (virtio 1.2, section 5.2): one queue, flush, discard, write zeroes.
//!
//! ```text
//!   inside the gate            outside the gate            inside the gate
//!   take a batch, copy data ─► execute on the backend ─► backend.completed(), used ring, interrupt, take the next batch
//! ```
//!
//! Invariant: the heads of the batch stand in [`Blk`]'s state from taking to giving back, in order. A state saved in
//! between names them, and whoever loads it executes them (again): block requests are idempotent, and the driver has
//! not been told anything.
//!
//! Invariant: `completed`, used ring and interrupt of a request happen inside one entry of the gate, so they belong to
//! one epoch.

mod request;
mod worker;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Frontend;
use super::queue::QueueState;
use crate::devices::kind;
pub(crate) use worker::{BlkWorker, Executing};

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Unit of the protocol, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// Most data segments of a request.
const SEGMENTS: u32 = 126;
/// Largest segment in bytes.
const SEGMENT_BYTES: u32 = 32 << 10;
/// Most data of one request, which the two limits above promise.
pub(crate) const REQUEST_BYTES: u64 = SEGMENTS as u64 * SEGMENT_BYTES as u64;
/// Most data of what a disk's thread executes at once: a batch is closed when it is full, by one more request.
pub const BATCH_MAX_BYTES: usize = BATCH_BYTES + REQUEST_BYTES as usize;
/// A batch is closed when it has this much data: it is copied inside the gate, so a pause may have to wait for it. A range that may have
/// to be written counts as data, for a hand-over waits until the batch is done.
const BATCH_BYTES: usize = 256 << 10;
/// Most sectors of one range to discard or zero: 64 MiB. Where zeros are written ([`crate::zeroing`]), that much is written.
const RANGE_SECTORS: u32 = 128 << 10;
/// Ranges of one request that are offered: what is taken together has to be done before a hand-over.
const RANGES: u32 = 1;
/// Ranges of one request that are taken. Earlier releases offered so many, and a driver keeps what it read when it started: a guest that
/// came from there sends them until it is started anew.
const RANGES_TAKEN: u32 = 16;
/// Longest identity string (5.2.6).
pub(crate) const SERIAL_BYTES: usize = 20;
const CONFIG_BYTES: usize = 60;

/// Configuration of one disk, apart from what the backend knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Serial number that the guest sees; what goes beyond 20 bytes is cut.
    pub serial: String,
    /// The guest may not write.
    pub read_only: bool,
}

/// What a disk has done since the engine started.
#[derive(Debug, Default)]
pub struct BlkMetrics {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    ranges: AtomicU64,
    errors: AtomicU64,
    held: AtomicU64,
    held_ms_max: AtomicU64,
}

/// [`BlkMetrics`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BlkCounts {
    /// Read requests that succeeded.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests that succeeded.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Ranges discarded or zeroed.
    pub ranges: u64,
    /// Requests that the guest was told have failed.
    pub errors: u64,
    /// Requests that failed and were kept from the guest at first, so that another side may do them.
    pub held: u64,
    /// The longest that one was, as far as the guest ran meanwhile, in milliseconds.
    pub held_ms_max: u64,
}

impl BlkMetrics {
    /// Reads all counters.
    pub fn counts(&self) -> BlkCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkCounts {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            flushes: get(&self.flushes),
            ranges: get(&self.ranges),
            errors: get(&self.errors),
            held: get(&self.held),
            held_ms_max: get(&self.held_ms_max),
        }
    }

    /// So many requests are kept from the guest from now on.
    fn hold_begins(&self, requests: usize) {
        self.held.fetch_add(requests as u64, Ordering::Relaxed);
    }

    /// A hold has lasted for so long.
    fn hold_lasts(&self, lasts: Duration) {
        let ms = u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX);
        self.held_ms_max.fetch_max(ms, Ordering::Relaxed);
    }
}

/// The frontend of a disk.
pub struct Blk {
    config: [u8; CONFIG_BYTES],
    serial: [u8; SERIAL_BYTES],
    size_bytes: u64,
    read_only: bool,
    /// Heads that were taken and not given back, in the order of taking.
    in_flight: Vec<u16>,
}

/// What is saved of a disk beside the transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    size_bytes: u64,
    read_only: bool,
    serial: [u8; SERIAL_BYTES],
    in_flight: Vec<u16>,
}

impl Blk {
    /// A disk of `size_bytes`, a multiple of 512.
    pub fn new(config: &DiskConfig, size_bytes: u64) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        let len = config.serial.len().min(SERIAL_BYTES);
        serial[..len].copy_from_slice(&config.serial.as_bytes()[..len]);
        Self {
            config: config_space(size_bytes),
            serial,
            size_bytes,
            read_only: config.read_only,
            in_flight: Vec::new(),
        }
    }
}

/// `struct virtio_blk_config` (5.2.4).
fn config_space(size_bytes: u64) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(size_bytes / SECTOR_BYTES).to_le_bytes());
    put(8, &SEGMENT_BYTES.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    // Discard: sectors, segments, alignment in sectors.
    put(36, &RANGE_SECTORS.to_le_bytes());
    put(40, &RANGES.to_le_bytes());
    put(44, &8u32.to_le_bytes());
    // Write zeroes: sectors, segments. `write_zeroes_may_unmap` is 0: nothing is ever unmapped.
    put(48, &RANGE_SECTORS.to_le_bytes());
    put(52, &RANGES.to_le_bytes());
    config
}

impl Frontend for Blk {
    const DEVICE_ID: u16 = 2;
    const PCI_CLASS: u32 = 0x01_8000;
    const QUEUES: &'static [u16] = &[128];
    const SECTION: (u16, u16) = (kind::BLK, 1);
    type State = BlkState;

    fn features(&self) -> u64 {
        let common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        common
            | if self.read_only {
                F_RO
            } else {
                F_DISCARD | F_WRITE_ZEROES
            }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn busy(&self) -> bool {
        !self.in_flight.is_empty()
    }

    fn reset(&mut self) {
        self.in_flight.clear();
    }

    fn save(&self) -> BlkState {
        BlkState {
            size_bytes: self.size_bytes,
            read_only: self.read_only,
            serial: self.serial,
            in_flight: self.in_flight.clone(),
        }
    }

    fn check(&self, state: &BlkState, queues: &[QueueState]) -> Result<(), String> {
        if state.size_bytes != self.size_bytes {
            let (there, here) = (state.size_bytes, self.size_bytes);
            return Err(format!(
                "the disk has {there} bytes there and {here} here: give both seats disks of one size"
            ));
        }
        if state.read_only != self.read_only || state.serial != self.serial {
            return Err("the disk's serial number or write protection differ: configure both seats alike".to_owned());
        }
        let queue = queues.first().ok_or("there is no queue")?;
        let taken = usize::from(queue.next_avail.wrapping_sub(queue.next_used));
        if taken != state.in_flight.len() {
            return Err(format!(
                "{taken} requests were taken from the queue, but {} are in flight",
                state.in_flight.len()
            ));
        }
        match state.in_flight.iter().find(|head| **head >= queue.size) {
            Some(head) => Err(format!("request {head} in flight is outside its queue")),
            None => Ok(()),
        }
    }

    fn load(&mut self, state: BlkState) {
        self.in_flight = state.in_flight;
    }
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
