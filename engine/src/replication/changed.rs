//! What an active has changed on its disks since its last follower provably had the same: what that seat has to get when it
//! comes back, instead of whole disks.
//!
//! ```text
//!            sealed, durable there      acknowledged
//!   since ──────────┬─────────────────────────┬──────────────►      since: changed after `held`, a bit for each grain
//!   held            └─ cut   after ───────────┘ held, since = after  after: changed after the cut
//! ```
//!
//! The obligation: *whatever differs between the follower's disks and these, now or later, is marked.* It stands on this:
//! - `held` moves only to an epoch whose acknowledgment says that the follower has its disk changes, and all before them,
//!   durably: the join checkpoint, or an epoch with a guest flush (rule 5).
//! - A change is marked when it completes, before the epoch that contains it can end, whether a follower is there or not. What
//!   the follower may have got of epochs after `held`, acknowledged or not, is thus among what is marked.
//! - The record dies with its engine, and is forgotten when the guest leaves it: from the order to run (the freeze of a
//!   switchover) on the follower may change its disks by itself, and from then on nothing is known of them.
//!
//! What the follower has to prove in return is the [`Holds`] that its journal kept, see [`super::journal`].

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ftvm_protocol::identity::{Epoch, Incarnation, SeatId, SessionId};
use serde::{Deserialize, Serialize};

/// What one bit stands for. A disk of 1 TiB has 2 MiB of them, and twice that is kept.
pub const GRAIN_BYTES: u64 = 64 << 10;
/// A new cut is worth its cost, which is to clear a set, once a grain in so many is marked. So a guest that flushes all the time
/// has a cut every few epochs, and what comes twice is nothing beside the disk.
const GRAINS_PER_CUT: u64 = 4096;

/// A session, by a name that no other has: its leader counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// The leader.
    pub leader: Incarnation,
    /// Its session.
    pub session: SessionId,
}

/// What a seat's disks are: they have every change of a stream through an epoch, maybe some later ones of that stream, and
/// nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    /// The stream.
    pub stream: Stream,
    /// The epoch.
    pub epoch: Epoch,
}

/// A set of grains of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grains {
    words: Vec<u64>,
    size_bytes: u64,
    /// Bits set.
    count: u64,
}

impl Grains {
    fn of_disk(size_bytes: u64) -> Self {
        let words = size_bytes.div_ceil(GRAIN_BYTES).div_ceil(64);
        Self {
            words: vec![0; words as usize],
            size_bytes,
            count: 0,
        }
    }

    /// What lies outside the disk is not there to differ.
    fn mark(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size_bytes);
        for grain in offset / GRAIN_BYTES..end.div_ceil(GRAIN_BYTES) {
            let word = &mut self.words[(grain / 64) as usize];
            self.count += u64::from(*word >> (grain % 64) & 1 == 0);
            *word |= 1 << (grain % 64);
        }
    }

    fn has(&self, grain: u64) -> bool {
        self.words[(grain / 64) as usize] >> (grain % 64) & 1 == 1
    }

    fn add(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
        self.count = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
    }

    fn clear(&mut self) {
        if self.count > 0 {
            self.words.fill(0);
            self.count = 0;
        }
    }

    /// Bytes of the disk, in order, in as few pieces as there are. One after the other: there may be millions.
    pub fn extents(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let grains = self.size_bytes.div_ceil(GRAIN_BYTES);
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..grains).find(|grain| self.has(*grain))?;
            let end = (start..grains).find(|grain| !self.has(*grain)).unwrap_or(grains);
            next = end;
            Some(start * GRAIN_BYTES..(end * GRAIN_BYTES).min(self.size_bytes))
        })
    }

    /// Bytes of the disk in all of them.
    pub fn bytes(&self) -> u64 {
        self.extents().map(|extent| extent.end - extent.start).sum()
    }
}

/// What a follower provably has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    by: SeatId,
    stream: Stream,
    /// All changes through this epoch, durably.
    epoch: Epoch,
    /// The stream's last epoch: the follower can't have more.
    sealed: Epoch,
}

/// Why a returning seat's disks are copied whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// It says nothing of them.
    NoClaim,
    /// This engine has no record of what it has.
    NoRecord,
    /// It is another seat than the record's.
    OtherSeat,
    /// Its disks are those of another session.
    OtherStream,
    /// It has less than it acknowledged as durable.
    Less,
    /// It has more than there ever was.
    More,
    /// A disk failed to write here: what it has in that place is unknown.
    FailedHere,
}

impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NoClaim => "it does not say what they hold",
            Self::NoRecord => "this engine has not led it before, or the guest has been elsewhere since",
            Self::OtherSeat => "another seat was led before",
            Self::OtherStream => "they are another session's than the last one that this engine led",
            Self::Less => "they lack what was acknowledged as durable",
            Self::More => "they claim what there never was",
            Self::FailedHere => "a disk has failed to write here",
        })
    }
}

#[derive(Debug)]
struct Books {
    held: Option<Held>,
    /// Sealed, durable once it is acknowledged, and not acknowledged yet.
    cut: Option<Held>,
    since: Vec<Grains>,
    after: Vec<Grains>,
    failed: bool,
}

impl Books {
    fn marked(&self) -> u64 {
        self.since.iter().map(|grains| grains.count).sum()
    }

    /// Whether to begin a new cut in a stream.
    fn wants_cut(&self, stream: Stream) -> bool {
        let grains: u64 = self.since.iter().map(|grains| grains.words.len() as u64 * 64).sum();
        let known = self.held.is_some_and(|held| held.stream == stream);
        self.cut.is_none() && (!known || self.marked() > grains / GRAINS_PER_CUT)
    }
}

/// The record of what was changed, by disk index. Shared between the disks, which mark, and the driver.
#[derive(Debug)]
pub struct ChangedBlocks(Mutex<Books>);

impl ChangedBlocks {
    /// Of disks of these sizes, with no follower known.
    pub fn new(disk_bytes: &[u64]) -> Self {
        let none: Vec<_> = disk_bytes.iter().map(|&bytes| Grains::of_disk(bytes)).collect();
        Self(Mutex::new(Books {
            held: None,
            cut: None,
            since: none.clone(),
            after: none,
            failed: false,
        }))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change of a disk has completed. Before the epoch that contains it can end.
    pub fn mark(&self, disk: u16, offset: u64, len: u64) {
        let mut books = self.books();
        let Books { cut, since, after, .. } = &mut *books;
        let grains = if cut.is_some() { after } else { since };
        if let Some(grains) = grains.get_mut(usize::from(disk)) {
            grains.mark(offset, len);
        }
    }

    /// A change of a disk has failed here, and may succeed on the follower: from now on nobody knows where they differ.
    pub fn failed(&self) {
        self.books().failed = true;
    }

    /// An epoch of a stream to seat `by` has ended; called while the guest stands still. `durable`: whoever acknowledges it has
    /// its changes, and all before, durably.
    pub fn sealed(&self, by: SeatId, Holds { stream, epoch }: Holds, durable: bool) {
        let mut books = self.books();
        let Books { held, cut, .. } = &mut *books;
        for held in [held, cut].into_iter().flatten().filter(|held| held.stream == stream) {
            held.sealed = epoch;
        }
        if durable && books.wants_cut(stream) {
            books.cut = Some(Held {
                by,
                stream,
                epoch,
                sealed: epoch,
            });
        }
    }

    /// The follower has acknowledged the stream's epochs through `epoch`.
    pub fn acknowledged(&self, Holds { stream, epoch }: Holds) {
        let mut books = self.books();
        let known = |cut: &mut Held| cut.stream == stream && cut.epoch <= epoch;
        if let Some(cut) = books.cut.take_if(known) {
            books.held = Some(cut);
            let Books { since, after, .. } = &mut *books;
            std::mem::swap(since, after);
            after.iter_mut().for_each(Grains::clear);
        }
    }

    /// The stream is over. What it had not acknowledged counts as not there.
    pub fn over(&self) {
        let mut books = self.books();
        if books.cut.take().is_some() {
            let Books { since, after, .. } = &mut *books;
            since
                .iter_mut()
                .zip(&*after)
                .for_each(|(since, after)| since.add(after));
            after.iter_mut().for_each(Grains::clear);
        }
    }

    /// The guest leaves, or may run elsewhere from now on.
    pub fn forget(&self) {
        let mut books = self.books();
        let Books {
            held,
            cut,
            since,
            after,
            ..
        } = &mut *books;
        (*held, *cut) = (None, None);
        since.iter_mut().chain(after).for_each(Grains::clear);
    }

    /// By disk, what may differ from the disks of seat `by`, which says what they hold. Whatever changes from now on comes on
    /// top.
    pub fn since(&self, by: SeatId, claim: Option<Holds>) -> Result<Vec<Grains>, Unknown> {
        let books = self.books();
        let claim = claim.ok_or(Unknown::NoClaim)?;
        let held = books.held.ok_or(Unknown::NoRecord)?;
        if books.failed {
            return Err(Unknown::FailedHere);
        }
        if held.by != by {
            return Err(Unknown::OtherSeat);
        }
        if held.stream != claim.stream {
            return Err(Unknown::OtherStream);
        }
        if claim.epoch < held.epoch {
            return Err(Unknown::Less);
        }
        if claim.epoch > held.sealed {
            return Err(Unknown::More);
        }
        let disks = books.since.iter().zip(&books.after).map(|(since, after)| {
            let mut all = since.clone();
            all.add(after);
            all
        });
        Ok(disks.collect())
    }
}

#[cfg(test)]
#[path = "changed_tests.rs"]
mod tests;
