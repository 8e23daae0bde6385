//! The disk backend of a seat: writes go to its own volume at once and are recorded for the epoch.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backends::{DiskBackend, DiskOp};
use crate::replication::changed::ChangedBlocks;
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

#[derive(Debug, Default)]
struct Books {
    recording: bool,
    /// How often recording was switched.
    number: u64,
    epoch: EpochChanges,
    /// What those who follow may have to write ([`DiskChange::work_bytes`]). The disks wait for it, and the guest does not.
    work_bytes: usize,
}

/// The changes of all disks in the running epoch. They are bounded: who is about to change a disk waits while they are
/// too many, until an epoch ends or a resync takes them.
pub struct DiskLog {
    books: Mutex<Books>,
    /// Every change is marked here, recorded or not.
    changed: Arc<ChangedBlocks>,
    /// Somebody took what was recorded, or nothing is recorded any more.
    room: Condvar,
    /// Bytes recorded, or to be written by those who follow, with which disks wait.
    bytes_max: usize,
    /// Bytes recorded with which `much` is called.
    bytes_much: usize,
    much: Box<dyn Fn() + Send + Sync>,
}

impl DiskLog {
    /// A log that records nothing yet. Disks wait once `bytes_max` are recorded; what they were executing then comes on
    /// top. `much` is called, from a disk's thread, when `bytes_much` are: the epoch should end. It must not block.
    pub fn new(
        changed: Arc<ChangedBlocks>,
        bytes_max: usize,
        bytes_much: usize,
        much: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            books: Mutex::default(),
            changed,
            room: Condvar::new(),
            bytes_max,
            bytes_much,
            much: Box::new(much),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records from now on, or stops and forgets. Called while the pause gate is closed, or before anything runs.
    pub fn record(&self, recording: bool) {
        let mut books = self.books();
        *books = Books {
            recording,
            number: books.number + 1,
            epoch: EpochChanges::default(),
            work_bytes: 0,
        };
        self.room.notify_all();
    }

    /// Waits until more may be recorded. Outside the pause gate, before a disk is changed.
    fn wait_for_room(&self) {
        let full = |books: &mut Books| books.recording && books.work_bytes >= self.bytes_max;
        let waited = self.room.wait_while(self.books(), full);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
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
        (books.epoch.bytes, books.work_bytes) = (0, 0);
        self.room.notify_all();
        std::mem::take(&mut books.epoch.changes)
    }

    /// Takes the changes of the epoch that ends; called while the pause gate is closed.
    pub fn take(&self) -> EpochChanges {
        let mut books = self.books();
        books.work_bytes = 0;
        self.room.notify_all();
        std::mem::take(&mut books.epoch)
    }

    /// Whether changes are recorded: somebody follows, or is about to.
    fn is_recording(&self) -> bool {
        self.books().recording
    }

    /// Bytes recorded in the running epoch: an epoch with many of them ends early.
    pub fn bytes(&self) -> usize {
        self.books().epoch.bytes
    }

    /// Whether a flush is recorded in the running epoch.
    pub fn contains_flush(&self) -> bool {
        self.books().epoch.contains_flush
    }

    fn completed(&self, disk: u16, op: &DiskOp<'_>, ok: bool) {
        match *op {
            DiskOp::Write { offset, data } => self.changed.mark(disk, offset, data.len() as u64),
            DiskOp::Discard { offset, len } | DiskOp::WriteZeroes { offset, len, .. } => {
                self.changed.mark(disk, offset, len);
            }
            DiskOp::Flush | DiskOp::Read { .. } => {}
        }
        // After a flush that failed the volume may have lost what it had taken.
        if !ok && !matches!(op, DiskOp::Read { .. }) {
            self.changed.failed();
        }
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
        let before = books.epoch.bytes;
        books.epoch.bytes += change.staged_bytes();
        books.work_bytes += change.work_bytes();
        books.epoch.changes.push(change);
        if (before..books.epoch.bytes).contains(&(self.bytes_much - 1)) {
            drop(books);
            (self.much)();
        }
    }
}

/// A disk whose changes are recorded. The volume is shared with the resync, which reads it while the guest writes.
pub struct SeatDisk {
    disk: u16,
    volume: Arc<dyn Storage>,
    read_only: bool,
    hold: Duration,
    log: Arc<DiskLog>,
}

impl SeatDisk {
    /// Disk `disk` of the machine on `volume`. What fails is kept from the guest for `hold`, as long as another seat may do it.
    pub fn new(disk: u16, volume: Arc<dyn Storage>, read_only: bool, hold: Duration, log: Arc<DiskLog>) -> Self {
        Self {
            disk,
            volume,
            read_only,
            hold,
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

    fn completed(&mut self, op: &DiskOp<'_>, ok: bool) {
        // A failed write may have changed some of its blocks. The guest was told that it failed, so either content is
        // right; the range is recorded as it was meant, and the sides agree again when the guest tries once more.
        self.log.completed(self.disk, op, ok);
    }

    fn wait_for_room(&mut self) {
        self.log.wait_for_room();
    }

    fn held_for(&self) -> Duration {
        if self.log.is_recording() {
            self.hold
        } else {
            Duration::ZERO
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;
    use crate::replication::testing::MemStorage;

    const NO_LIMIT: usize = usize::MAX;

    fn nothing_known() -> Arc<ChangedBlocks> {
        Arc::new(ChangedBlocks::new(&[1 << 20]))
    }

    fn seat_disk(hold: Duration, log: &Arc<DiskLog>) -> SeatDisk {
        SeatDisk::new(0, MemStorage::new(vec![0; 1 << 20]), false, hold, log.clone())
    }

    #[test]
    fn what_fails_is_held_as_long_as_was_asked_for_and_somebody_follows() {
        let log = Arc::new(DiskLog::new(nothing_known(), NO_LIMIT, NO_LIMIT, || {}));
        let hold = Duration::from_millis(250);
        let (disk, told_at_once) = (seat_disk(hold, &log), seat_disk(Duration::ZERO, &log));
        for (follows, held_for) in [(false, Duration::ZERO), (true, hold), (false, Duration::ZERO)] {
            log.record(follows);
            assert_eq!((disk.held_for(), told_at_once.held_for()), (held_for, Duration::ZERO));
        }
    }

    /// A guest that writes as fast as it can, and nobody takes what it writes: the log stays bounded, the owner is told, and
    /// the disk goes on when the log is taken, or is not kept any more.
    #[test]
    fn disks_wait_while_too_much_is_recorded() {
        const BYTES_MAX: usize = 64 << 10;
        let told = Arc::new(AtomicUsize::new(0));
        let tell = told.clone();
        let log = DiskLog::new(nothing_known(), BYTES_MAX, BYTES_MAX / 2, move || {
            tell.fetch_add(1, Ordering::SeqCst);
        });
        let log = Arc::new(log);
        log.record(true);
        let written = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let mut disk = seat_disk(Duration::ZERO, &log);
        let guest = std::thread::spawn({
            let (written, stop) = (written.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::SeqCst) {
                    let data = [1; 4096];
                    disk.wait_for_room();
                    disk.write_at(0, &data).expect("no fault");
                    disk.completed(&DiskOp::Write { offset: 0, data: &data }, true);
                    written.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        let mut taken = 0;
        for epoch in 1..=20 {
            // All that one epoch can hold is written, and told of once, before anybody takes it.
            while log.bytes() < BYTES_MAX {
                std::thread::yield_now();
            }
            assert_eq!(told.load(Ordering::SeqCst), epoch);
            let changes = log.take();
            assert!(changes.bytes < BYTES_MAX + 8192, "{} bytes recorded", changes.bytes);
            taken += changes.changes.len();
        }
        stop.store(true, Ordering::SeqCst);
        log.record(false);
        guest.join().expect("the disk waits no more");
        assert!(written.load(Ordering::SeqCst) >= taken);
    }

    /// Its own disk zeroes a range in no time, and the follower's may have to write it: the disk waits for that one. The guest does not
    /// stand still for it.
    #[test]
    fn what_is_zeroed_counts_like_what_is_written() {
        let log = DiskLog::new(nothing_known(), NO_LIMIT, NO_LIMIT, || {});
        let (offset, len, unmap) = (0, 64 << 10, false);
        for taken in [false, true] {
            log.record(true);
            log.completed(0, &DiskOp::Discard { offset, len }, true);
            assert!(log.books().work_bytes >= 64 << 10);
            log.completed(0, &DiskOp::WriteZeroes { offset, len, unmap }, true);
            assert!(log.books().work_bytes >= 128 << 10);
            assert!(log.bytes() < 4096);
            if taken {
                log.take_of(log.number());
            } else {
                log.take();
            }
            assert_eq!(log.books().work_bytes, 0);
        }
    }

    /// A resync that was given up takes nothing from its successor; the flush that an epoch contains is not forgotten
    /// when a resync takes the changes before it.
    #[test]
    fn changes_go_to_the_recording_that_they_belong_to() {
        let log = DiskLog::new(nothing_known(), NO_LIMIT, NO_LIMIT, || {});
        let write = |byte: u8| {
            log.completed(
                0,
                &DiskOp::Write {
                    offset: 512,
                    data: &[byte; 512],
                },
                true,
            )
        };
        log.record(true);
        let abandoned = log.number();
        write(1);
        assert_eq!(log.take_of(abandoned).len(), 1);
        log.record(true);
        write(2);
        log.completed(0, &DiskOp::Flush, true);
        assert!(log.take_of(abandoned).is_empty());
        assert_eq!(log.take_of(log.number()), [DiskChange::written(0, 512, &[2; 512])]);
        assert!(log.take().contains_flush);
    }

    /// What a returning standby would get: every change, recorded or not; nothing is known any more once one has failed.
    #[test]
    fn every_change_is_marked_whether_it_is_recorded_or_not() {
        use ftvm_protocol::identity::{Incarnation, SeatId, SessionId};

        use crate::replication::changed::{GRAIN_BYTES, Holds, Stream};
        let changed = nothing_known();
        let log = DiskLog::new(changed.clone(), NO_LIMIT, NO_LIMIT, || {});
        let by = SeatId(2);
        let held = Holds {
            stream: Stream {
                leader: Incarnation::genesis(SeatId(1)),
                session: SessionId(1),
            },
            epoch: 1,
        };
        changed.sealed(by, held, true);
        changed.acknowledged(held);
        let offset = |grain: u64| grain * GRAIN_BYTES;
        let (data, len) = ([1; 512], 512);
        log.completed(
            0,
            &DiskOp::Write {
                offset: offset(1),
                data: &data,
            },
            true,
        );
        log.record(true);
        log.completed(
            0,
            &DiskOp::Write {
                offset: offset(3),
                data: &data,
            },
            true,
        );
        log.completed(0, &DiskOp::Discard { offset: offset(5), len }, true);
        let unmap = false;
        log.completed(
            0,
            &DiskOp::WriteZeroes {
                offset: offset(7),
                len,
                unmap,
            },
            true,
        );
        log.completed(0, &DiskOp::Read { offset: offset(9), len }, false);
        log.completed(0, &DiskOp::Flush, true);
        log.record(false);
        let disks = changed.since(by, Some(held)).expect("known");
        let marked: Vec<_> = disks[0].extents().map(|extent| extent.start / GRAIN_BYTES).collect();
        assert_eq!(marked, [1, 3, 5, 7]);
        log.completed(0, &DiskOp::Flush, false);
        assert!(
            changed.since(by, Some(held)).is_err(),
            "the volume may have lost anything"
        );
    }
}
