//! How much an epoch may hold: one set of numbers for both sides of a pair, from what both are configured with.
//!
//! ```text
//!   RAM ─► staging ─┬─ pages: what vCPUs write before they are stopped, their rings, and what is sent again
//!                   ├─ disk changes: disks wait when so much is recorded (`DiskLog`); fits half of the journal
//!                   └─ output, state
//! ```
//!
//! The active keeps below these by ending epochs early, by stopping vCPUs and by letting disks wait; the standby refuses
//! more. Two epochs wait on a standby at most (`PacerConfig::in_flight_max`): together a tenth of the guest's memory.

use crate::devices::virtio::blk::BATCH_MAX_BYTES;
use crate::memory::PAGE_SIZE;

/// One epoch of the smallest guests, in bytes.
const STAGING_MIN_BYTES: usize = 32 << 20;
/// The same for each vCPU, whose ring has 1,024 entries at least.
const STAGING_VCPU_MIN_BYTES: usize = 48 << 20;
/// Part of RAM that an epoch may hold.
const STAGING_SHARE: usize = 20;
/// What a page takes on the standby until it is applied, at most: itself, its record, its share of a chunk.
const STAGED_PAGE_BYTES: usize = PAGE_SIZE + 64;
/// Half of the journal with one disk; what a batch may exceed its limit by comes on top for each further disk.
const JOURNAL_HALF_BYTES: usize = 32 << 20;
/// What waits to be taken on a standby beside two epochs: the window of a resync, input frames, frames on their way.
const UNDER_WAY_BYTES: usize = 16 << 20;

/// What an epoch may hold, and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochLimits {
    /// Bytes of one epoch on the standby.
    pub staging_bytes: usize,
    /// Pages of an epoch without what is in the rings at its end; a page that is sent twice counts twice.
    pub pages: usize,
    /// Entries of each vCPU's dirty ring: a power of two.
    pub ring_entries: u32,
    /// Output and disk changes with which an epoch ends early, in bytes.
    pub recorded_bytes: usize,
    /// Disk changes with which the disks wait, in bytes.
    pub disk_bytes: usize,
    /// Size of the journal in bytes.
    pub journal_bytes: u64,
}

impl EpochLimits {
    /// For a guest with so many pages of RAM, vCPUs and disks.
    pub fn new(ram_pages: u32, vcpus: u8, disks: usize) -> Self {
        let (vcpus, disks) = (usize::from(vcpus.max(1)), disks.max(1));
        let share = ram_pages as usize * PAGE_SIZE / STAGING_SHARE;
        let epoch_bytes = share.max(STAGING_MIN_BYTES).max(vcpus * STAGING_VCPU_MIN_BYTES);
        let pages = epoch_bytes / 4 * 3 / STAGED_PAGE_BYTES;
        let per_vcpu = (pages / 8 / vcpus).max(1024) as u32;
        let ring_entries = 1 << per_vcpu.ilog2();
        let disk_bytes = (epoch_bytes / 8).min(JOURNAL_HALF_BYTES / 2);
        let batches = disks * BATCH_MAX_BYTES;
        Self {
            staging_bytes: epoch_bytes + batches,
            pages: pages - Self::in_rings(vcpus, ring_entries),
            ring_entries,
            recorded_bytes: disk_bytes / 2,
            disk_bytes,
            // Records have headers: at most one for each of the sectors that a change has at least, a tenth.
            journal_bytes: 2 * (JOURNAL_HALF_BYTES + (disks - 1) * BATCH_MAX_BYTES / 10 * 11) as u64,
        }
    }

    /// Pages that vCPUs write after they have written all that they may, once before the last harvest of an epoch and once
    /// until they are paused.
    fn in_rings(vcpus: usize, ring_entries: u32) -> usize {
        2 * vcpus * ring_entries as usize
    }

    /// Bytes of frames that may wait for the thread that takes them.
    pub fn waiting_bytes(&self) -> usize {
        2 * self.staging_bytes + UNDER_WAY_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB_PAGES: u32 = 1 << 18;

    #[test]
    fn two_epochs_are_a_tenth_of_memory() {
        for (gib, vcpus) in [(1, 1), (2, 2), (4, 4), (16, 16), (64, 16)] {
            let limits = EpochLimits::new(gib * GIB_PAGES, vcpus, 1);
            let ram = gib as usize * GIB_PAGES as usize * PAGE_SIZE;
            let two = 2 * (limits.staging_bytes - BATCH_MAX_BYTES);
            assert!(two <= ram / 10, "{gib} GiB, {vcpus} vCPUs: {limits:?}");
        }
    }

    /// Whatever the guest does, the parts together are no more than the whole that the standby takes.
    #[test]
    fn the_parts_fit_the_whole_and_the_journal() {
        for ram_pages in [1 << 14, 1 << 16, 1 << 18, 1 << 22] {
            for vcpus in [1, 2, 3, 5, 16] {
                for disks in [0, 1, 3, 8] {
                    let limits = EpochLimits::new(ram_pages, vcpus, disks);
                    let rings = EpochLimits::in_rings(vcpus.into(), limits.ring_entries);
                    let batches = disks * BATCH_MAX_BYTES;
                    let held = (limits.pages + rings) * STAGED_PAGE_BYTES + limits.disk_bytes + batches;
                    let context = format!("{ram_pages} pages, {vcpus} vCPUs, {disks} disks: {limits:?}");
                    assert!(held + limits.recorded_bytes <= limits.staging_bytes, "{context}");
                    assert!(limits.ring_entries >= 1024, "{context}");
                    // Changes of one sector each have the most headers.
                    let journalled = (limits.disk_bytes + batches) / 512 * (512 + 48);
                    assert!(journalled as u64 + 4096 < limits.journal_bytes / 2, "{context}");
                }
            }
        }
    }
}
