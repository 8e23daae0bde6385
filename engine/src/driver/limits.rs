//! How much an epoch may hold: one set of numbers for both sides of a pair, from what both are configured with.
//!
//! ```text
//!   RAM ─► staging ─┬─ pages: what vCPUs write before they are stopped, their rings, and what is sent again
//!                   ├─ disk changes: disks wait when so much is recorded (`DiskLog`); fits half of the journal
//!                   └─ output, state
//! ```
//!
//! The active keeps below these by ending epochs early, by stopping vCPUs and by letting disks wait; the standby refuses
//! more. Two epochs wait on a standby at most (`PacerConfig::in_flight_max`) unless it is slow to apply them: together a tenth of the guest's
//! memory, and their pages with the rest of the process a tenth from 1 GiB on. For less memory, and for vCPUs that have less than 1 GiB each, an
//! epoch is larger than its share, because rings, rounds and passes need some room: two of a guest with 512 MiB may be a fifth of it.
//!
//! How large an epoch may be, and what that makes of an engine at most, is in `ftvm_protocol::room`: pods are given as much.

use ftvm_protocol::room;
use kvm_bindings::kvm_dirty_gfn;

use super::follow::LOG_BYTES;
use crate::control::DELTA_CACHE_BYTES;
use crate::devices::virtio::blk::{BATCH_MAX_BYTES, REQUEST_BYTES};
use crate::kvm::DEFAULT_RING_ENTRIES;
use crate::memory::PAGE_SIZE;
use crate::replication::KEPT_BUFFERS_BYTES;
use crate::replication::changed::GRAIN_BYTES;
use crate::replication::link::QueueLimits;
use crate::replication::standby_disks::WAITING_MAX_BYTES;
use crate::seat_io::{FRAME_BYTES_MAX, KEPT_BYTES_MAX};

/// What a page takes on the standby until it is applied, at most: itself, its record, its share of a chunk.
const STAGED_PAGE_BYTES: usize = PAGE_SIZE + 64;
/// Half of the journal with one disk; what a batch may exceed its limit by comes on top for each further disk.
const JOURNAL_HALF_BYTES: usize = 32 << 20;

/// What the kernel keeps of a link at most: its buffers, 6 MiB received and 4 MiB to be sent (tcp(7), `tcp_rmem` and `tcp_wmem`).
const SOCKET_BYTES: usize = 10 << 20;

// What the parts of an engine may hold is no more than `room` counts for them, or nothing is compiled.
const _: () = {
    assert!(BATCH_MAX_BYTES as u64 == room::DISK_BATCH_BYTES);
    let link = QueueLimits::DEFAULT.bytes() + SOCKET_BYTES;
    assert!(2 * link + KEPT_BUFFERS_BYTES <= room::LINKS_BYTES as usize);
    assert!(DEFAULT_RING_ENTRIES as usize * size_of::<kvm_dirty_gfn>() < room::VCPU_BYTES as usize);
    // A change is added while no more than the limit waits.
    let volumes = WAITING_MAX_BYTES + REQUEST_BYTES as usize;
    assert!(2 * LOG_BYTES + volumes <= room::STANDBY_BYTES as usize);
    // So is a frame.
    let kept = KEPT_BYTES_MAX + FRAME_BYTES_MAX;
    assert!(DELTA_CACHE_BYTES as usize + kept <= room::ACTIVE_BYTES as usize);
    assert!(kept <= room::NIC_BYTES as usize);
    // Two sets, what both are together for a standby that comes back, and one more.
    assert!(8 * GRAIN_BYTES / 4 >= room::DISK_SHARE);
};

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
        let ram_bytes = u64::from(ram_pages) * PAGE_SIZE as u64;
        let epoch_bytes = room::epoch_bytes(ram_bytes, vcpus) as usize;
        let staging_bytes = room::staging_bytes(ram_bytes, vcpus, disks) as usize;
        let (vcpus, disks) = (usize::from(vcpus.max(1)), disks.max(1));
        let pages = epoch_bytes / 4 * 3 / STAGED_PAGE_BYTES;
        let per_vcpu = (pages / 8 / vcpus).max(1024) as u32;
        let ring_entries = 1 << per_vcpu.ilog2();
        let disk_bytes = (epoch_bytes / 8).min(JOURNAL_HALF_BYTES / 2);
        Self {
            staging_bytes,
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
        room::waiting_bytes(self.staging_bytes as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::PacerConfig;
    use crate::machine::MAX_VCPUS;
    use crate::outbox::HELD_BYTES_MAX;

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

    /// What a standby has beside the pages of two epochs, and the guest's memory.
    const PROCESS_BYTES: usize = 24 << 20;

    /// What `e2e/tests/bounded_join.rs` sees of a real standby: small guests cost more, so it has one of 1 GiB.
    #[test]
    fn the_pages_of_two_epochs_and_the_process_are_a_tenth_of_memory_from_one_gib_on() {
        let are = |mib: usize, vcpus: u8| {
            let limits = EpochLimits::new((mib << 8) as u32, vcpus, 1);
            let pages = limits.pages + EpochLimits::in_rings(vcpus.into(), limits.ring_entries);
            2 * pages * STAGED_PAGE_BYTES + PROCESS_BYTES <= (mib << 20) / 10
        };
        let usual = [
            (1, 1),
            (2, 1),
            (2, 2),
            (4, 2),
            (4, 4),
            (8, 4),
            (16, 4),
            (16, 8),
            (16, 16),
            (64, 16),
        ];
        for (gib, vcpus) in usual {
            assert!(are(gib << 10, vcpus), "{gib} GiB, {vcpus} vCPUs");
        }
        for (mib, vcpus) in [(128, 1), (512, 1), (1024, 2), (2048, 4)] {
            assert!(!are(mib, vcpus), "{mib} MiB, {vcpus} vCPUs");
        }
    }

    /// Why an epoch has its least size. What is in the rings when the vCPUs have written all that they may must still be sent while the guest
    /// runs (`Pacer::harvested`). And a resync ends once a pass leaves half of the room or less: each leaves half of what the one before it left,
    /// and what is in the rings.
    #[test]
    fn what_rings_hold_fits_a_round_and_the_last_pass() {
        for ram_pages in [1 << 12, 1 << 16, 1 << 17, 1 << 18, 3 << 17, 1 << 20, 1 << 22, 1 << 28] {
            for vcpus in 1..=MAX_VCPUS {
                let limits = EpochLimits::new(ram_pages, vcpus, 1);
                let rings = usize::from(vcpus) * limits.ring_entries as usize;
                let pacer = PacerConfig {
                    pages_max: limits.pages,
                    ..PacerConfig::default()
                };
                let context = format!("{ram_pages} pages, {vcpus} vCPUs: {limits:?}");
                assert!(pacer.first_room() + rings <= limits.pages / 16 * 15, "{context}");
                assert!(2 * rings <= pacer.first_room() / 2, "{context}");
            }
        }
    }

    /// An active has two epochs that are not acknowledged, each no more than a standby takes, and of the running one, or of a guest whose
    /// output waits for an arbiter, no more than that either.
    #[test]
    fn what_an_active_records_is_no_more_than_an_epoch() {
        for ram_pages in [1 << 12, 1 << 18, 1 << 22, 1 << 28] {
            for vcpus in 1..=MAX_VCPUS {
                for disks in [1, 8] {
                    let limits = EpochLimits::new(ram_pages, vcpus, disks);
                    let recorded = limits.disk_bytes + disks * BATCH_MAX_BYTES + HELD_BYTES_MAX;
                    assert!(recorded <= limits.staging_bytes, "{ram_pages} pages: {limits:?}");
                }
            }
        }
    }
}
