//! How much an epoch may hold, and an engine beside its guest's RAM: sums that both sides of a pair go by, and whoever gives their
//! processes memory.
//!
//! ```text
//!   a standby: 4 epochs ── two are here whole, but not applied; frames of two more wait behind them: an epoch is acknowledged
//!                │          before it is applied, and the active may have two unacknowledged
//!                └ what is kept for a takeover, what waits for the volumes, a resync's window
//!   an active: 3 epochs ── two are sealed and not acknowledged; disk changes and output of the running one
//!                └ versions of pages that were sent last, frames for a guest that stands still
//!   either:    the program and its links; per vCPU a dirty ring; per page what the kernel and the engine keep of it
//! ```
//!
//! What the parts of an engine may hold, and that it is no more than this, is compared in `engine/src/driver/limits.rs`. On hosts whose KVM
//! has no dirty rings (before Linux 5.11) nothing limits what a guest writes in an epoch.

/// Of each vCPU: one epoch of guests with little memory for each of them, in bytes. What is in the rings (1,024 entries at least) when the guest
/// has written all that it may must still fit a round, and the pass of a resync before its last: neither does in half of this.
const EPOCH_VCPU_MIN_BYTES: u64 = 48 << 20;
/// Part of RAM that an epoch may hold.
const EPOCH_SHARE: u64 = 20;
/// What a disk's batch may exceed the limit of an epoch by.
pub const DISK_BATCH_BYTES: u64 = 4288 << 10;
/// What waits to be taken on a standby beside two epochs: the window of a resync, input frames, frames on their way.
pub const UNDER_WAY_BYTES: u64 = 16 << 20;

/// Epochs that a standby may have beside those whose frames wait.
const STAGED_EPOCHS: u64 = 2;
/// Epochs of which an active has pages, disk changes and output.
const ACTIVE_EPOCHS: u64 = 3;

/// The program, its heap and stacks, and what the kernel keeps for a process and a machine.
const PROCESS_BYTES: u64 = 32 << 20;
/// A link that ends and one that begins: their queues, buffers of large frames, and what the kernel keeps of Linux' default sizes.
pub const LINKS_BYTES: u64 = 56 << 20;
/// Of each vCPU: its ring, its thread.
pub const VCPU_BYTES: u64 = 1 << 20;
/// Of each 4 KiB of RAM: entries of two page tables and of the file's index, sets of pages, numbers of a resync, hashes of a digest.
const PAGE_BYTES: u64 = 64;
/// Of so many bytes of disks: sets of blocks that have changed.
pub const DISK_SHARE: u64 = 1 << 17;
/// Of a standby alone: input and output for a takeover, changes that wait for the volumes.
pub const STANDBY_BYTES: u64 = 40 << 20;
/// Of an active alone: versions of pages that were sent last, frames that the links' threads received for the guest.
pub const ACTIVE_BYTES: u64 = 80 << 20;
/// Of an active, for each network card: frames that wait for a guest that stands still.
pub const NIC_BYTES: u64 = 9 << 20;

/// Bytes that an epoch may hold, apart from what the disks' batches may exceed it by.
pub fn epoch_bytes(ram_bytes: u64, vcpus: u8) -> u64 {
    (ram_bytes / EPOCH_SHARE).max(u64::from(vcpus.max(1)) * EPOCH_VCPU_MIN_BYTES)
}

/// Bytes of one epoch on a standby.
pub fn staging_bytes(ram_bytes: u64, vcpus: u8, disks: usize) -> u64 {
    epoch_bytes(ram_bytes, vcpus) + disks.max(1) as u64 * DISK_BATCH_BYTES
}

/// Bytes of frames that may wait on a standby for the thread that takes them.
pub fn waiting_bytes(staging_bytes: u64) -> u64 {
    2 * staging_bytes + UNDER_WAY_BYTES
}

/// What says how much an engine may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// RAM in bytes.
    pub ram_bytes: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Disks.
    pub disks: usize,
    /// What all disks have together, in bytes.
    pub disk_bytes: u64,
    /// Network cards.
    pub nics: usize,
}

impl Machine {
    /// The most that an engine may hold beside its guest's RAM, in bytes, whatever side it is of.
    pub fn engine_bytes(&self) -> u64 {
        let staging = staging_bytes(self.ram_bytes, self.vcpus, self.disks);
        let standby = STAGED_EPOCHS * staging + waiting_bytes(staging) + STANDBY_BYTES;
        let active = ACTIVE_EPOCHS * staging + ACTIVE_BYTES + self.nics as u64 * NIC_BYTES;
        let vcpus = u64::from(self.vcpus.max(1)) * VCPU_BYTES;
        let pages = self.ram_bytes / 4096 * PAGE_BYTES;
        let blocks = self.disk_bytes / DISK_SHARE;
        PROCESS_BYTES + LINKS_BYTES + vcpus + pages + blocks + standby.max(active)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn machine(ram_mib: u64, vcpus: u8, disks: usize, nics: usize) -> Machine {
        Machine {
            ram_bytes: ram_mib * MIB,
            vcpus,
            disks,
            disk_bytes: GIB,
            nics,
        }
    }

    #[test]
    fn what_an_engine_may_hold_is_known() {
        for (ram_mib, vcpus, disks, nics, mib) in [
            (16, 1, 1, 0, 355),
            (1 << 10, 1, 1, 1, 383),
            (1 << 10, 4, 1, 1, 949),
            (4 << 10, 4, 1, 1, 1048),
            (2 << 10, 16, 1, 1, 3281),
            // With many cards it is the active that holds more.
            (16, 1, 1, 8, 398),
        ] {
            let machine = machine(ram_mib, vcpus, disks, nics);
            assert_eq!(machine.engine_bytes().div_ceil(MIB), mib, "{machine:?}");
        }
        let small = machine(1 << 10, 1, 1, 1);
        let large = Machine {
            disk_bytes: GIB << 10,
            ..small
        };
        assert_eq!((large.engine_bytes() - small.engine_bytes()).div_ceil(MIB), 8);
    }

    #[test]
    fn a_larger_machine_has_no_less_room() {
        for ram_mib in [16, 100, 512, 1 << 10, 3000, 16 << 10, 1 << 20] {
            for vcpus in 1..16 {
                for number in 0..8 {
                    let least = machine(ram_mib, vcpus, number, number).engine_bytes();
                    assert!(least <= machine(ram_mib + 1, vcpus, number, number).engine_bytes());
                    assert!(least <= machine(ram_mib, vcpus + 1, number, number).engine_bytes());
                    assert!(least <= machine(ram_mib, vcpus, number + 1, number).engine_bytes());
                    assert!(least <= machine(ram_mib, vcpus, number, number + 1).engine_bytes());
                }
            }
        }
    }
}
