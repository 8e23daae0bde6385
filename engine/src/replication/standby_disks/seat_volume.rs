//! The volumes of a seat, the same in every role: directly, and after a takeover through what waits for them.
//!
//! ```text
//!   Direct ── take_over(disks) ──► Through ── settled: volumes durable, journal empty, nothing waits ──► Direct
//! ```
//!
//! A takeover waits for no disk: the guest reads through the changes that are not applied yet, and writes behind them.
//!
//! Invariant: a guest's flush returns only after the journal is empty. A replay after a power cut puts the journal's old
//! contents over newer ones; what was not flushed may be lost that way, as on any disk with a volatile cache, and what was
//! flushed never.
//!
//! Invariant: after a sync that failed none succeeds in this life of the engine. The kernel tells of an error once, and calls the pages
//! clean that it could not write (fsync(2), "Errors"): a later sync would say nothing of them.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;

use super::{ReadThrough, StandbyDisks};
use crate::replication::journal::Journal;
use crate::replication::storage::Storage;
use crate::replication::threads::{ThreadFilters, spawn};
use crate::seccomp::ThreadKind;

/// How the settling after a takeover ended.
#[derive(Default)]
struct Settling {
    outcome: Mutex<Option<Result<(), String>>>,
    ended: Condvar,
}

impl Settling {
    fn outcome(&self) -> MutexGuard<'_, Option<Result<(), String>>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, outcome: Result<(), String>) {
        *self.outcome() = Some(outcome);
        self.ended.notify_all();
    }

    fn wait(&self) -> io::Result<()> {
        let mut outcome = self.outcome();
        loop {
            match &*outcome {
                Some(Ok(())) => return Ok(()),
                Some(Err(why)) => return Err(io::Error::other(why.clone())),
                None => outcome = self.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

struct Through {
    view: ReadThrough,
    settling: Arc<Settling>,
}

/// A volume for everybody but the standby's own disks.
pub struct SeatVolume {
    direct: Arc<dyn Storage>,
    through: RwLock<Option<Through>>,
    /// A sync failed.
    unsure: AtomicBool,
}

impl SeatVolume {
    /// Nothing waits for `direct`.
    pub fn new(direct: Arc<dyn Storage>) -> Self {
        Self {
            direct,
            through: RwLock::default(),
            unsure: AtomicBool::new(false),
        }
    }

    /// The volume itself, for the disks of a standby.
    pub fn direct(&self) -> Arc<dyn Storage> {
        self.direct.clone()
    }

    fn through(&self) -> RwLockReadGuard<'_, Option<Through>> {
        self.through.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn sync_once(&self) -> io::Result<()> {
        let settling = match &*self.through() {
            None => return self.direct.sync(),
            Some(through) => {
                // Under the lock: the thread that writes to the volumes lives as long as anybody can get here.
                through.view.sync()?;
                through.settling.clone()
            }
        };
        settling.wait()
    }

    fn set_through(&self) -> RwLockWriteGuard<'_, Option<Through>> {
        self.through.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for SeatVolume {
    fn size_bytes(&self) -> u64 {
        self.direct.size_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match &*self.through() {
            None => self.direct.read_at(offset, buf),
            Some(through) => through.view.read_at(offset, buf),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match &*self.through() {
            None => self.direct.write_at(offset, data),
            Some(through) => through.view.write_at(offset, data),
        }
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        match &*self.through() {
            None => self.direct.zero(offset, len),
            Some(through) => through.view.zero(offset, len),
        }
    }

    fn sync(&self) -> io::Result<()> {
        if self.unsure.load(Ordering::SeqCst) {
            return Err(io::Error::other(
                "an earlier flush failed, and what was written before it may be lost: this counts until the engine ends",
            ));
        }
        let synced = self.sync_once();
        if synced.is_err() {
            self.unsure.store(true, Ordering::SeqCst);
        }
        synced
    }
}

/// Lets a successor use its volumes at once, and brings them and the journal in order meanwhile.
pub struct Settler(JoinHandle<Result<Journal, String>>);

impl Settler {
    /// From now on `volumes` (by disk index) are seen through what waits in `disks`, until a thread has settled that.
    /// Nothing uses the volumes yet. `report` hears how it ended.
    pub fn start(
        volumes: &[Arc<SeatVolume>],
        disks: StandbyDisks,
        filters: &ThreadFilters,
        report: impl FnOnce(&Result<(), String>) + Send + 'static,
    ) -> io::Result<Self> {
        let settling = Arc::new(Settling::default());
        for (volume, disk) in volumes.iter().zip(0u16..) {
            *volume.set_through() = disks.volume(disk).map(|view| Through {
                view,
                settling: settling.clone(),
            });
        }
        let volumes = volumes.to_vec();
        let thread = spawn("settle".to_owned(), ThreadKind::Disk, filters, move || {
            let settled = settle(&volumes, disks, &settling);
            report(&settled.as_ref().map(|_| ()).map_err(String::clone));
            settled
        })?;
        Ok(Self(thread))
    }

    /// Whether [`Self::wait`] returns at once.
    pub fn has_ended(&self) -> bool {
        self.0.is_finished()
    }

    /// Waits for the end, and gives the emptied journal. After an error the journal still counts, and the volumes must not be used in
    /// another role.
    pub fn wait(self) -> Result<Journal, String> {
        let panicked = || "the thread that settles the disks is gone".to_owned();
        self.0.join().unwrap_or_else(|_| Err(panicked()))
    }
}

fn settle(volumes: &[Arc<SeatVolume>], mut disks: StandbyDisks, settling: &Settling) -> Result<Journal, String> {
    let settled = disks.settle().map_err(|error| crate::error_chain(&error));
    settling.end(settled.clone());
    // After an error the guest's flushes fail, and what it reads is still what was acknowledged: the views stay.
    if let Err(why) = settled {
        std::mem::forget(disks);
        return Err(why);
    }
    let mut all: Vec<_> = volumes.iter().map(|volume| volume.set_through()).collect();
    // Nobody can add anything now.
    if let Err(error) = disks.drain() {
        std::mem::forget(disks);
        return Err(crate::error_chain(&error));
    }
    all.iter_mut().for_each(|through| **through = None);
    drop(all);
    Ok(disks.into_journal())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::testing::MemStorage;

    #[test]
    fn a_sync_that_failed_is_not_forgotten() {
        let disk = MemStorage::new(vec![0; 512]);
        let volume = SeatVolume::new(disk.clone());
        volume.sync().expect("no fault");
        disk.fail_after(0, io::ErrorKind::StorageFull);
        assert_eq!(volume.sync().expect_err("a fault").kind(), io::ErrorKind::StorageFull);
        disk.work_again();
        disk.sync().expect("works again");
        volume
            .write_at(0, &[1; 512])
            .expect("what does not say that it is durable may go on");
        volume.sync().expect_err("nobody knows what got lost");
    }
}
