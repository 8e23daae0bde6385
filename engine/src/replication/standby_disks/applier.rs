//! The thread that writes committed changes to the volumes.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::overlay::Overlay;
use crate::replication::epoch::{DiskChange, DiskData};
use crate::replication::storage::Storage;
use crate::replication::threads::{ThreadFilters, spawn};
use crate::seccomp::ThreadKind;

/// Bytes that may wait for the volumes; more makes the committing side wait.
pub(crate) const WAITING_MAX_BYTES: usize = 16 << 20;

/// A volume could not be written. The standby can't follow any more; what it acknowledged is in its journal.
#[derive(Debug, Clone, thiserror::Error)]
#[error("disk {disk}: {what} on the standby's volume failed: {error}; mend its storage, then let this seat join again")]
pub struct VolumeError {
    /// Disk index.
    pub disk: u16,
    /// Doing what.
    pub what: &'static str,
    /// The cause.
    #[source]
    pub error: Arc<io::Error>,
}

/// Whose changes they are.
#[derive(Clone, Copy)]
enum By {
    /// The last ones of this epoch.
    Epoch(u64),
    /// A guest's, outside an epoch.
    Guest,
    /// A disk that is copied: nobody relies on what is here before all of it has come.
    Copy,
}

enum Item {
    Change {
        number: u64,
        change: DiskChange,
        copied: bool,
    },
    /// All changes of this epoch are before it.
    Applied(u64),
}

#[derive(Default)]
struct State {
    items: VecDeque<Item>,
    waiting_bytes: usize,
    overlays: Vec<Overlay>,
    next_change: u64,
    /// The thread is writing the item that it took.
    busy: bool,
    sync_wanted: bool,
    syncs_begun: u64,
    syncs_done: u64,
    applied_through: Option<u64>,
    synced_through: Option<u64>,
    failed: Option<VolumeError>,
    stopping: bool,
}

struct Shared {
    volumes: Vec<Arc<dyn Storage>>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, changes: Vec<DiskChange>, by: By) -> Result<(), VolumeError> {
        let mut state = self.state();
        for change in changes {
            while state.failed.is_none() && state.waiting_bytes > WAITING_MAX_BYTES {
                state = self.wait(state);
            }
            state.check()?;
            let number = state.next_change;
            state.next_change += 1;
            state.waiting_bytes += change.work_bytes();
            if let Some(overlay) = state.overlays.get_mut(usize::from(change.disk)) {
                overlay.add(number, &change);
            }
            let copied = matches!(by, By::Copy);
            state.items.push_back(Item::Change { number, change, copied });
        }
        state.check()?;
        if let By::Epoch(epoch) = by {
            state.items.push_back(Item::Applied(epoch));
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until a sync that began after this call is done.
    fn sync_now(&self) -> Result<(), VolumeError> {
        let mut state = self.state();
        let wanted = state.syncs_begun + 1;
        while state.failed.is_none() && state.syncs_done < wanted {
            state.sync_wanted = true;
            self.changed.notify_all();
            state = self.wait(state);
        }
        state.check()
    }

    fn run(&self) {
        let mut state = self.state();
        loop {
            state = if state.failed.is_some() {
                if state.stopping {
                    return;
                }
                self.wait(state)
            } else if let Some(item) = state.items.pop_front() {
                self.take(state, item)
            } else if state.sync_wanted {
                self.sync(state)
            } else if state.stopping {
                return;
            } else {
                self.wait(state)
            };
        }
    }

    fn take<'a>(&'a self, mut state: MutexGuard<'a, State>, item: Item) -> MutexGuard<'a, State> {
        let (number, change, copied) = match item {
            Item::Applied(epoch) => {
                state.applied_through = Some(epoch);
                // It may have been the last that somebody waits for.
                self.changed.notify_all();
                return state;
            }
            Item::Change { number, change, copied } => (number, change, copied),
        };
        state.busy = true;
        drop(state);
        let result = self.write(&change, copied);
        let mut state = self.state();
        state.busy = false;
        state.waiting_bytes -= change.work_bytes();
        match result {
            Ok(()) => {
                if let Some(overlay) = state.overlays.get_mut(usize::from(change.disk)) {
                    overlay.remove(number, &change);
                }
            }
            Err(error) => state.failed = Some(error),
        }
        self.changed.notify_all();
        state
    }

    fn write(&self, change: &DiskChange, copied: bool) -> Result<(), VolumeError> {
        let disk = change.disk;
        let failed = |what| {
            move |error| VolumeError {
                disk,
                what,
                error: Arc::new(error),
            }
        };
        let Some(volume) = self.volumes.get(usize::from(disk)) else {
            return Err(failed("writing")(io::Error::new(
                io::ErrorKind::NotFound,
                "the machine has no such disk",
            )));
        };
        match &change.what {
            DiskData::Written(data) => volume.write_at(change.offset, data).map_err(failed("writing")),
            DiskData::Zeroed(len) if copied => volume.zero_anew(change.offset, *len).map_err(failed("zeroing")),
            DiskData::Zeroed(len) => volume.zero(change.offset, *len).map_err(failed("zeroing")),
        }
    }

    /// Makes everything written so far durable. Nothing waits: syncing comes after the items that were queued before
    /// it was asked for.
    fn sync<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.sync_wanted = false;
        state.syncs_begun += 1;
        state.busy = true;
        let through = state.applied_through;
        drop(state);
        let result = self.volumes.iter().zip(0u16..).try_for_each(|(volume, disk)| {
            volume.sync().map_err(|error| VolumeError {
                disk,
                what: "making writes durable",
                error: Arc::new(error),
            })
        });
        let mut state = self.state();
        state.busy = false;
        match result {
            Ok(()) => {
                state.syncs_done = state.syncs_begun;
                state.synced_through = through;
            }
            Err(error) => state.failed = Some(error),
        }
        self.changed.notify_all();
        state
    }
}

impl State {
    fn check(&self) -> Result<(), VolumeError> {
        self.failed.clone().map_or(Ok(()), Err)
    }
}

/// Owner of the thread. Dropping it writes what waits and ends the thread.
pub(super) struct Applier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Applier {
    pub fn start(volumes: Vec<Arc<dyn Storage>>, filters: &ThreadFilters) -> io::Result<Self> {
        let overlays = volumes.iter().map(|_| Overlay::default()).collect();
        let state = Mutex::new(State {
            overlays,
            ..State::default()
        });
        let shared = Arc::new(Shared {
            volumes,
            state,
            changed: Condvar::new(),
        });
        let thread = {
            let shared = shared.clone();
            spawn("apply-disks".to_owned(), ThreadKind::Disk, filters, move || {
                shared.run()
            })?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// What it writes to, by disk index.
    pub fn volumes(&self) -> &[Arc<dyn Storage>] {
        &self.shared.volumes
    }

    /// Queues changes, in order: the last ones of this epoch.
    pub fn apply(&self, changes: Vec<DiskChange>, epoch: u64) -> Result<(), VolumeError> {
        self.shared.push(changes, By::Epoch(epoch))
    }

    /// Queues what a guest changed while its disks are copied.
    pub fn write(&self, changes: Vec<DiskChange>) -> Result<(), VolumeError> {
        self.shared.push(changes, By::Guest)
    }

    /// Queues a piece of a disk that is copied.
    pub fn copy(&self, changes: Vec<DiskChange>) -> Result<(), VolumeError> {
        self.shared.push(changes, By::Copy)
    }

    /// Waits until everything queued is written.
    pub fn drain(&self) -> Result<(), VolumeError> {
        let mut state = self.shared.state();
        while state.failed.is_none() && (state.busy || !state.items.is_empty()) {
            state = self.shared.wait(state);
        }
        state.check()
    }

    /// Waits until everything queued is written and durable.
    pub fn sync_now(&self) -> Result<(), VolumeError> {
        self.shared.sync_now()
    }

    /// Asks for a sync without waiting.
    pub fn request_sync(&self) {
        self.shared.state().sync_wanted = true;
        self.shared.changed.notify_all();
    }

    /// Last epoch of which everything is durable on the volumes.
    pub fn synced_through(&self) -> Option<u64> {
        self.shared.state().synced_through
    }

    pub fn waiting_bytes(&self) -> usize {
        self.shared.state().waiting_bytes
    }

    pub fn volume(&self, disk: u16) -> Option<ReadThrough> {
        let size_bytes = self.shared.volumes.get(usize::from(disk))?.size_bytes();
        Some(ReadThrough {
            shared: self.shared.clone(),
            disk,
            size_bytes,
        })
    }
}

impl Drop for Applier {
    fn drop(&mut self) {
        self.shared.state().stopping = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// A volume seen through the changes that wait for it.
#[derive(Clone)]
pub struct ReadThrough {
    shared: Arc<Shared>,
    disk: u16,
    size_bytes: u64,
}

impl ReadThrough {
    fn volume(&self) -> &dyn Storage {
        &*self.shared.volumes[usize::from(self.disk)]
    }

    /// Whether nothing waits for this volume any more.
    pub fn is_settled(&self) -> bool {
        self.shared.state().overlays[usize::from(self.disk)].is_empty()
    }

    fn push(&self, change: DiskChange) -> io::Result<()> {
        if change.end() > self.size_bytes {
            let what = format!("{} bytes at {} are outside the volume", change.len(), change.offset);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        self.shared.push(vec![change], By::Guest).map_err(io::Error::other)
    }
}

impl Storage for ReadThrough {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // Taken before the volume is read: a change that is written in between is in both, one that was written
        // before is on the volume.
        let patch = self.shared.state().overlays[usize::from(self.disk)].patch(offset, buf.len() as u64);
        self.volume().read_at(offset, buf)?;
        patch.apply(offset, buf);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.push(DiskChange::written(self.disk, offset, data))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.push(DiskChange::zeroed(self.disk, offset, len))
    }

    fn sync(&self) -> io::Result<()> {
        self.shared.sync_now().map_err(io::Error::other)
    }
}
