//! A seat's disk: a page cache over a medium that fails, hangs, comes back, and takes late what was under way.

use ftvm_protocol::core::{Event, StorageHealth};
use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::{Epoch, SessionId};

use crate::coverage::Fault;
use crate::history::Node;
use crate::world::{Input, What, World};

/// A request that waits for so long is told to the core.
const HANGS_AFTER_MS: u64 = 40;
/// What was under way lands at most so long after the disk has come back.
const LATE_MS: u64 = 120;

/// Disk of a slot: what survives its process, and what survives its node.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    pub(crate) header: Option<SeatHeader>,
    /// State in the volume and the page cache; `None` while it is no whole state.
    pub(crate) volatile: Option<Node>,
    /// State that survives a power cut.
    pub(crate) durable: Option<Node>,
    /// What reaches the medium before then fails.
    pub(crate) fails_until_ms: u64,
    /// What reaches the medium before then waits.
    pub(crate) hangs_until_ms: u64,
    /// A flush failed. Pages count as clean from then on that never got to the medium, so flushes that succeed later say nothing, until
    /// the disk is written whole, or is read anew by another process.
    pub(crate) unsure: bool,
    /// A process that is to end is not gone before then: it has writes under way.
    pub(crate) occupied_until_ms: u64,
    /// How often it was written whole.
    pub(crate) copies: u64,
}

impl Disk {
    /// A resync begins: the disk is no whole state until it is complete.
    pub(crate) fn overwrite(&mut self) {
        self.volatile = None;
        self.durable = None;
        self.unsure = false;
        self.copies += 1;
    }

    /// The process that used it is gone; the next one reads what the medium has.
    fn drop_cache(&mut self) {
        if self.unsure {
            self.volatile = self.durable;
            self.unsure = false;
        }
    }

    /// The node lost its power. `keeps`: by luck everything got to the medium.
    pub(crate) fn cut_power(&mut self, keeps: bool) {
        if !keeps || self.unsure {
            self.volatile = self.durable;
        }
        self.durable = self.volatile;
        self.unsure = false;
        self.occupied_until_ms = 0;
    }
}

/// What became of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flush {
    /// Everything written before it is on the medium.
    Done,
    /// The kernel says that it failed, or an earlier one did.
    Failed,
    /// It is under way for so long.
    Hangs(u64),
}

impl World {
    /// The disk fails whatever reaches its medium, for a while.
    pub(crate) fn fail_disk(&mut self, slot: usize) {
        self.meet(Fault::DiskFails, slot);
        let for_ms = self.rng.range(30, 600);
        self.slots[slot].disk.fails_until_ms = self.now_ms + for_ms;
    }

    /// The disk answers nothing for a while.
    pub(crate) fn hang_disk(&mut self, slot: usize) {
        self.meet(Fault::DiskHangs, slot);
        let for_ms = self.rng.range(20, 400);
        self.slots[slot].disk.hangs_until_ms = self.now_ms + for_ms;
        self.after(for_ms, What::DiskBack { slot });
    }

    pub(crate) fn disk_back(&mut self, slot: usize) {
        if self.slots[slot].disk.hangs_until_ms <= self.now_ms {
            self.input_after(0, slot, Input::Core(Event::Storage(StorageHealth::Works)));
        }
    }

    /// How long what reaches the medium now waits. Should that be long, the core is told when it has been.
    pub(crate) fn disk_waits(&mut self, slot: usize) -> Option<u64> {
        let wait_ms = self.slots[slot].disk.hangs_until_ms.checked_sub(self.now_ms + 1)? + 1;
        self.input_after(HANGS_AFTER_MS, slot, Input::DiskWaits);
        Some(wait_ms)
    }

    pub(crate) fn disk_waited(&mut self, slot: usize) {
        if self.slots[slot].disk.hangs_until_ms > self.now_ms {
            self.step(slot, Event::Storage(StorageHealth::Hangs));
        }
    }

    pub(crate) fn disk_fails(&self, slot: usize) -> bool {
        self.slots[slot].disk.fails_until_ms > self.now_ms
    }

    /// A flush. One that failed stays failed for as long as this process uses the disk.
    pub(crate) fn flush(&mut self, slot: usize) -> Flush {
        if let Some(wait_ms) = self.disk_waits(slot) {
            return Flush::Hangs(wait_ms);
        }
        if !self.slots[slot].disk.unsure && !self.disk_fails(slot) {
            return Flush::Done;
        }
        self.slots[slot].disk.unsure = true;
        self.input_after(0, slot, Input::Core(Event::Storage(StorageHealth::Failed)));
        Flush::Failed
    }

    /// The last flush before a stop. One that hangs for too long is given up: nobody knows whether it was done.
    pub(crate) fn last_flush(&mut self, slot: usize) -> Flush {
        match self.flush(slot) {
            Flush::Hangs(wait_ms) if wait_ms > HANGS_AFTER_MS => {
                self.slots[slot].disk.unsure = true;
                Flush::Failed
            }
            flush => flush,
        }
    }

    /// The guest flushes: is that done, and is the guest told so? If not it waits for the answer, or is told an error.
    pub(crate) fn guest_flushes(&mut self, slot: usize) -> (bool, bool) {
        let failed_before = self.slots[slot].disk.unsure;
        let done = self.flush(slot) == Flush::Done;
        (done, done || self.mutated_answer(failed_before))
    }

    /// The journal of an epoch is flushed. False: it is not, or not yet.
    pub(crate) fn journal_flushes(&mut self, slot: usize, session: SessionId, epoch: Epoch) -> bool {
        let failed_before = self.slots[slot].disk.unsure;
        match self.flush(slot) {
            Flush::Done => true,
            Flush::Hangs(wait_ms) => {
                self.input_after(wait_ms, slot, Input::Staged(session, epoch));
                false
            }
            Flush::Failed if self.mutated_follower_is_sure(failed_before) => true,
            Flush::Failed => {
                if let Some(engine) = &mut self.slots[slot].engine {
                    engine.driver.following = None;
                }
                self.step(slot, Event::Storage(StorageHealth::Failed));
                self.step(slot, Event::SessionFailed { session });
                false
            }
        }
    }

    /// The process is told to end. Where it has writes under way it is not gone before they have landed. True: that is so.
    pub(crate) fn leave_disk(&mut self, slot: usize) -> bool {
        let late_ms = self.rng.range(0, LATE_MS);
        let now_ms = self.now_ms;
        let disk = &mut self.slots[slot].disk;
        disk.drop_cache();
        if disk.hangs_until_ms <= now_ms {
            return false;
        }
        let until_ms = disk.hangs_until_ms + late_ms;
        disk.occupied_until_ms = until_ms;
        let copies = disk.copies;
        self.after(until_ms - now_ms, What::LateWrite { slot, until_ms, copies });
        true
    }

    /// What a process that has ended left under way reaches the medium.
    pub(crate) fn late_write(&mut self, slot: usize, until_ms: u64, copies: u64) {
        let disk = &mut self.slots[slot].disk;
        if disk.occupied_until_ms != until_ms || disk.copies == copies {
            return;
        }
        disk.volatile = None;
        disk.durable = None;
        self.log(|| format!("{slot}: a late write lands in a disk that was copied since"));
    }

    /// How long the seat's former process is still there.
    pub(crate) fn occupied_ms(&self, slot: usize) -> Option<u64> {
        let left_ms = self.slots[slot].disk.occupied_until_ms.checked_sub(self.now_ms)?;
        (left_ms > 0).then_some(left_ms)
    }
}
