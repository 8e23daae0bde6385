//! The disks of a standby: epochs are journalled when they are staged, and written to the volumes when they commit.
//!
//! ```text
//!   stage(epoch, changes, durable) ─► journal (fsync if durable)          acknowledged after this
//!   commit(epoch)                  ─► applier thread ─► volumes ─► sync ─► the journal's older half is free again
//!   takeover: the guest reads through what waits (SeatVolume), a thread settles it meanwhile, and its emptied journal is kept
//!             for when this seat gives the guest away: then nobody waits for a disk ([`ClosedDisks::open_emptied`])
//! ```
//!
//! Invariant: nothing that was not committed reaches a volume while the engine lives; after it was killed,
//! [`StandbyDisks::open`] replays the journal, and the volumes have every epoch that was staged as durable.

mod applier;
mod overlay;
mod seat_volume;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::changed::{Holds, Stream};
use super::epoch::DiskChange;
use super::journal::{Journal, JournalError, Recovered};
use super::storage::Storage;
use super::threads::ThreadFilters;
use applier::Applier;

pub(crate) use applier::WAITING_MAX_BYTES;
pub use applier::{ReadThrough, VolumeError};
pub use seat_volume::{SeatVolume, Settler};

/// Why the standby's disks can't follow.
#[derive(Debug, thiserror::Error)]
pub enum StandbyDisksError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// An epoch was to be committed that was not staged, or out of order: a defect of the caller.
    #[error("epoch {0} was not staged before it was committed")]
    NotStaged(u64),
    /// The thread that writes to the volumes could not be started.
    #[error("can't start the thread that writes to the volumes: {0}")]
    Spawn(#[source] io::Error),
}

impl StandbyDisksError {
    /// A disk or the journal failed: what is on it is unknown.
    pub fn is_storage(&self) -> bool {
        match self {
            Self::Volume(_) => true,
            Self::Journal(error) => matches!(
                error,
                JournalError::Io { .. } | JournalError::Volume { .. } | JournalError::Failed
            ),
            Self::NotStaged(_) | Self::Spawn(_) => false,
        }
    }
}

/// Journal and volumes of one standby seat. One thread uses it.
pub struct StandbyDisks {
    journal: Journal,
    applier: Applier,
    staged: VecDeque<(u64, Vec<DiskChange>)>,
    /// Volumes may have something that no journal has and that is not durable: what a resync wrote, or this seat's own guest
    /// before it went to the other side.
    unsynced: bool,
    recovered: Recovered,
}

/// Disks of a seat that will follow: the thread that writes to the volumes is there, the journal is not open yet. Opening may take
/// long, and needs no thread.
pub struct ClosedDisks {
    journal: Arc<dyn Storage>,
    applier: Applier,
}

impl ClosedDisks {
    /// For these volumes, by disk index. Nothing of them is touched yet.
    pub fn new(
        journal: Arc<dyn Storage>,
        volumes: Vec<Arc<dyn Storage>>,
        filters: &ThreadFilters,
    ) -> Result<Self, StandbyDisksError> {
        let applier = Applier::start(volumes, filters).map_err(StandbyDisksError::Spawn)?;
        Ok(Self { journal, applier })
    }

    /// Replays the journal onto the volumes and starts empty. An engine does this before it uses its disks in any role.
    pub fn open(self) -> Result<StandbyDisks, StandbyDisksError> {
        let (journal, recovered) = Journal::recover(self.journal, self.applier.volumes())?;
        Ok(StandbyDisks::start(journal, recovered, self.applier))
    }

    /// As [`Self::open`], for a seat that gets everything from another one. Where the journal is damaged, or another machine's,
    /// nothing is known of the volumes: the resync that has to come empties it, and copies them whole.
    pub fn open_to_join(self) -> Result<StandbyDisks, StandbyDisksError> {
        let volumes = self.applier.volumes();
        let (journal, recovered) = match Journal::recover(self.journal.clone(), volumes) {
            Err(error @ (JournalError::Damaged { .. } | JournalError::Foreign { .. })) => {
                tracing::warn!("{error}; it counts for nothing, this seat's disks will be copied whole");
                (Journal::unusable(self.journal, volumes)?, Recovered::default())
            }
            recovered => recovered?,
        };
        Ok(StandbyDisks::start(journal, recovered, self.applier))
    }

    /// With the journal that [`StandbyDisks::settle`] emptied when this seat got the guest, and that nobody has used since: there
    /// is nothing to read or to replay.
    pub fn open_emptied(self, journal: Journal) -> StandbyDisks {
        StandbyDisks::start(journal, Recovered::default(), self.applier)
    }
}

impl StandbyDisks {
    /// [`ClosedDisks::open`], at once.
    pub fn open(
        journal: Arc<dyn Storage>,
        volumes: Vec<Arc<dyn Storage>>,
        filters: &ThreadFilters,
    ) -> Result<Self, StandbyDisksError> {
        ClosedDisks::new(journal, volumes, filters)?.open()
    }

    fn start(journal: Journal, recovered: Recovered, applier: Applier) -> Self {
        Self {
            journal,
            applier,
            staged: VecDeque::new(),
            unsynced: false,
            recovered,
        }
    }

    /// What the journal held when it was opened.
    pub fn recovered(&self) -> Recovered {
        self.recovered
    }

    /// Keeps an epoch's changes until it commits. With `durable` they, and those of all epochs before, survive a
    /// power cut when this returns: the epoch may be acknowledged. May wait for epochs that were committed, never for
    /// one that was not.
    pub fn stage(&mut self, epoch: u64, changes: &[DiskChange], durable: bool) -> Result<(), StandbyDisksError> {
        if durable && self.unsynced {
            self.applier.sync_now()?;
            self.unsynced = false;
        }
        if !changes.is_empty() || durable {
            self.append(epoch, changes, durable)?;
        }
        self.staged.push_back((epoch, changes.to_vec()));
        Ok(())
    }

    fn append(&mut self, epoch: u64, changes: &[DiskChange], durable: bool) -> Result<(), StandbyDisksError> {
        match self
            .journal
            .append(epoch, changes, durable, self.applier.synced_through())
        {
            Err(JournalError::Full) => {}
            result => return Ok(result?),
        }
        // Everything committed so far goes to the volumes first. What was staged and not committed is in the current
        // half, or the journal is too small.
        self.applier.sync_now()?;
        Ok(self
            .journal
            .append(epoch, changes, durable, self.applier.synced_through())?)
    }

    /// The epoch is this seat's state now: its changes go to the volumes. Epochs before it that were staged go with
    /// it. Waits while too much waits for the volumes.
    pub fn commit(&mut self, epoch: u64) -> Result<(), StandbyDisksError> {
        if self.staged.front().is_none_or(|(staged, _)| *staged > epoch) {
            return Err(StandbyDisksError::NotStaged(epoch));
        }
        while self.staged.front().is_some_and(|(staged, _)| *staged <= epoch) {
            let Some((staged, changes)) = self.staged.pop_front() else {
                break;
            };
            self.applier.apply(changes, staged)?;
        }
        if self.journal.wants_sync(self.applier.synced_through()).is_some() {
            self.applier.request_sync();
        }
        Ok(())
    }

    /// What the volumes held when they were opened, if the journal proves it.
    pub fn holds(&self) -> Option<Holds> {
        self.recovered.holds
    }

    /// A resync begins: the volumes become anything but consistent, and what the journal holds is of no use. If it brings just
    /// what changed since what they `hold`, that stays true: a resync that is given up has changed nothing else.
    pub fn begin_resync(&mut self, holds: Option<Holds>) -> Result<(), StandbyDisksError> {
        self.staged.clear();
        self.applier.drain()?;
        match holds {
            Some(holds) => self.journal.begin(holds.stream, Some(holds.epoch))?,
            None => self.journal.reset()?,
        }
        self.unsynced = true;
        Ok(())
    }

    /// From now on the volumes get the epochs of `stream` and nothing else. What they hold, the first of its epochs that is staged
    /// as durable will say: whatever is on the volumes already, written by whom it may, is durable before it.
    pub fn begin_stream(&mut self, stream: Stream) -> Result<(), StandbyDisksError> {
        self.unsynced = true;
        Ok(self.journal.begin(stream, None)?)
    }

    /// The volumes get epochs on top of what this seat's own guest left there: writes that failed, or that were under way when it
    /// stood still, and that nobody else knows of. So the journal says nothing of them until a resync has made them whole.
    pub fn begin_after_own_guest(&mut self) -> Result<(), StandbyDisksError> {
        self.unsynced = true;
        if self.journal.is_reset() {
            return Ok(());
        }
        Ok(self.journal.reset()?)
    }

    /// Writes what the guest changed during a resync, in the order of the calls. Waits while too much waits for the volumes.
    pub fn write_resync(&mut self, changes: Vec<DiskChange>) -> Result<(), StandbyDisksError> {
        self.unsynced = true;
        Ok(self.applier.write(changes)?)
    }

    /// The same with what a resync copies: most of many disks are zeros, which need not be written ([`Storage::zero_anew`]).
    pub fn copy_resync(&mut self, copied: Vec<DiskChange>) -> Result<(), StandbyDisksError> {
        self.unsynced = true;
        Ok(self.applier.copy(copied)?)
    }

    /// Returns when everything committed is durable on the volumes and the journal is empty, so that a
    /// guest may write to the volumes directly. What was staged and not committed is dropped.
    pub fn settle(&mut self) -> Result<(), StandbyDisksError> {
        self.staged.clear();
        self.applier.sync_now()?;
        self.unsynced = false;
        Ok(self.journal.reset()?)
    }

    /// The journal of settled disks, for [`ClosedDisks::open_emptied`].
    pub fn into_journal(self) -> Journal {
        self.journal
    }

    /// Begins to make durable what was committed, without waiting: a takeover that is about to come has the less to settle.
    pub fn sync_ahead(&self) {
        self.applier.request_sync();
    }

    /// Waits until everything that was committed, or written through [`Self::volume`], is on the volumes.
    pub fn drain(&self) -> Result<(), StandbyDisksError> {
        Ok(self.applier.drain()?)
    }

    /// A view of disk `disk` that reads through what waits for the volume and puts writes behind it, in order: for a
    /// takeover that doesn't wait. Its `sync` makes the volumes durable; the journal may be emptied
    /// ([`Self::settle`]) at any time after that, and has to be before the volume is written past this view.
    pub fn volume(&self, disk: u16) -> Option<ReadThrough> {
        self.applier.volume(disk)
    }

    /// Bytes that wait for the volumes.
    pub fn waiting_bytes(&self) -> usize {
        self.applier.waiting_bytes()
    }
}

#[cfg(test)]
mod takeover_tests;
#[cfg(test)]
mod tests;
