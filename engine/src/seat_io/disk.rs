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
    /// How often recording was switched.
    number: u64,
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
        let mut books = self.books();
        *books = Books {
            recording,
            number: books.number + 1,
            epoch: EpochChanges::default(),
        };
    }

    /// The recording that is under way, for [`DiskLog::take_of`].
    pub fn number(&self) -> u64 {
        self.books().number
    }

    /// Takes the changes so far, but only of recording `number`: a resync that was given up may still run for a moment,
    /// and what it took would be missing from the one that came after it.
    pub fn take_of(&self, number: u64) -> Vec<DiskChange> {
        let mut books = self.books();
        if books.number != number {
            return Vec::new();
        }
        books.epoch.bytes = 0;
        std::mem::take(&mut books.epoch.changes)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A resync that was given up takes nothing from its successor; the flush that an epoch contains is not forgotten
    /// when a resync takes the changes before it.
    #[test]
    fn changes_go_to_the_recording_that_they_belong_to() {
        let log = DiskLog::default();
        let write = |byte: u8| {
            log.completed(
                0,
                &DiskOp::Write {
                    offset: 512,
                    data: &[byte; 512],
                },
            )
        };
        log.record(true);
        let abandoned = log.number();
        write(1);
        assert_eq!(log.take_of(abandoned).len(), 1);
        log.record(true);
        write(2);
        log.completed(0, &DiskOp::Flush);
        assert!(log.take_of(abandoned).is_empty());
        assert_eq!(log.take_of(log.number()), [DiskChange::written(0, 512, &[2; 512])]);
        assert!(log.take().contains_flush);
    }
}
