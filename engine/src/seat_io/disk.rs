//! The disk backend of a seat: writes go to its own volume at once and are recorded for the epoch.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backends::{DiskBackend, DiskOp};
use crate::replication::epoch::DiskChange;
use crate::replication::storage::Storage;

/// What happened to the disks in one epoch.
#[derive(Debug, Default)]
pub struct EpochChanges {
    /// Completed changes, in the order of completion.
    pub changes: Vec<DiskChange>,
    /// Their bytes.
    pub bytes: usize,
    /// A flush completed.
    pub contains_flush: bool,
}

#[derive(Default)]
struct Books {
    recording: bool,
    epoch: EpochChanges,
}

/// The changes of all disks in the running epoch.
#[derive(Default)]
pub struct DiskLog(Mutex<Books>);

impl DiskLog {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records from now on, or stops and forgets. Called while the pause gate is closed, or before anything runs.
    pub fn record(&self, recording: bool) {
        *self.books() = Books {
            recording,
            epoch: EpochChanges::default(),
        };
    }

    /// Takes the changes of the epoch that ends; called while the pause gate is closed.
    pub fn take(&self) -> EpochChanges {
        std::mem::take(&mut self.books().epoch)
    }

    /// Bytes recorded in the running epoch: an epoch with many of them ends early.
    pub fn bytes(&self) -> usize {
        self.books().epoch.bytes
    }

    fn completed(&self, disk: u16, op: &DiskOp<'_>) {
        let mut books = self.books();
        if !books.recording {
            return;
        }
        let change = match *op {
            DiskOp::Read { .. } => return,
            DiskOp::Flush => {
                books.epoch.contains_flush = true;
                return;
            }
            DiskOp::Write { offset, data } => DiskChange::written(disk, offset, data),
            DiskOp::Discard { offset, len } | DiskOp::WriteZeroes { offset, len, .. } => {
                DiskChange::zeroed(disk, offset, len)
            }
        };
        books.epoch.bytes += change.staged_bytes();
        books.epoch.changes.push(change);
    }
}

/// A disk whose changes are recorded. The volume is shared with the resync, which reads it while the guest writes.
pub struct SeatDisk {
    disk: u16,
    volume: Arc<dyn Storage>,
    read_only: bool,
    log: Arc<DiskLog>,
}

impl SeatDisk {
    /// Disk `disk` of the machine on `volume`.
    pub fn new(disk: u16, volume: Arc<dyn Storage>, read_only: bool, log: Arc<DiskLog>) -> Self {
        Self {
            disk,
            volume,
            read_only,
            log,
        }
    }
}

impl DiskBackend for SeatDisk {
    fn size_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.volume.read_at(offset, buf)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.volume.write_at(offset, data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.volume.sync()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.volume.zero(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.volume.zero(offset, len)
    }

    fn completed(&mut self, op: &DiskOp<'_>, _ok: bool) {
        // A failed write may have changed some of its blocks. The guest was told that it failed, so either content is
        // right; the range is recorded as it was meant, and the sides agree again when the guest tries once more.
        self.log.completed(self.disk, op);
    }
}
