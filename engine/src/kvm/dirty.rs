//! Which pages the guest wrote to, from KVM.
//!
//! With a dirty ring every vCPU has a buffer of (slot, page) entries that KVM appends to and we consume; without it KVM
//! keeps a bitmap per slot. See "KVM_CAP_DIRTY_LOG_RING" in the kernel's `virt/kvm/api.rst`.
//!
//! Invariant: harvesting write-protects the pages *before* it returns, so whoever copies a page afterwards copies at
//! least what the harvest reported, and a later write is reported by a later harvest.
//!
//! What KVM itself writes to guest memory (kvmclock pages, descriptor accessed bits, page table bits) it writes in the
//! context of a vCPU and reports in that vCPU's ring. Features that write without one, or after the vCPU has stopped
//! (asynchronous page faults, stolen time), are not offered to the guest, see [`super::CpuBaseline`]. So the rings of
//! parked vCPUs are complete.

use super::ioctl;
use super::{Capabilities, KvmError, failed, refused};
use crate::memory::{DirtyPages, MemoryLayout, PAGE_SIZE, RamRegion};
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Entries of each vCPU's ring unless configured: room for 128 MiB of writes between two harvests in 512 KiB.
pub const DEFAULT_RING_ENTRIES: u32 = 32768;
/// KVM keeps some entries in reserve; smaller rings would be full at once.
const MIN_RING_ENTRIES: u32 = 1024;

const ENTRY_DIRTY: u32 = 1;
const ENTRY_RESET: u32 = 2;

/// Where the guest's writes are learnt from; owned by whoever harvests.
#[derive(Debug)]
pub struct DirtySource {
    regions: Vec<RamRegion>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Rings(Vec<Ring>),
    Log(Vec<u64>),
}

/// One vCPU's ring, mapped.
#[derive(Debug)]
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    next: u32,
}

// SAFETY: the mapping belongs to the ring alone and is valid from any thread.
unsafe impl Send for Ring {}

/// Turns dirty rings on; must happen before the first vCPU is made. Returns the entries of each ring, 0 if this host
/// has none and the dirty log is used.
pub(super) fn enable_rings(vm: &VmFd, capabilities: &Capabilities, wanted_entries: u32) -> Result<u32, KvmError> {
    let entries = wanted_entries
        .next_power_of_two()
        .max(MIN_RING_ENTRIES)
        .min(capabilities.dirty_ring_max_entries);
    if wanted_entries == 0 || entries < MIN_RING_ENTRIES {
        return Ok(0);
    }
    let cap = if capabilities.dirty_ring_acq_rel {
        kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    } else {
        kvm_bindings::KVM_CAP_DIRTY_LOG_RING
    };
    let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [bytes, 0, 0, 0],
        ..Default::default()
    })
    .map_err(refused("enabling dirty rings"))?;
    Ok(entries)
}

impl DirtySource {
    /// The source of a machine whose rings have `ring_entries` entries (0: dirty log).
    pub(super) fn new(layout: &MemoryLayout, ring_entries: u32) -> Self {
        let regions: Vec<RamRegion> = layout.regions().collect();
        let kind = if ring_entries > 0 {
            Kind::Rings(Vec::new())
        } else {
            let largest = regions.iter().map(|region| region.size_bytes).max().unwrap_or(0);
            Kind::Log(vec![0; (largest / PAGE_SIZE as u64).div_ceil(64) as usize])
        };
        Self { regions, kind }
    }

    /// Maps the ring of a new vCPU.
    pub(super) fn add_vcpu(&mut self, vcpu: &VcpuFd, ring_entries: u32) -> Result<(), KvmError> {
        if let Kind::Rings(rings) = &mut self.kind {
            rings.push(Ring::map(vcpu, ring_entries).map_err(failed("mapping a dirty ring"))?);
        }
        Ok(())
    }

    /// Whether KVM's dirty rings are in use, rather than the bitmap.
    pub fn uses_rings(&self) -> bool {
        matches!(self.kind, Kind::Rings(_))
    }

    /// Adds all pages that the guest wrote since the last harvest, and write-protects them again. May be called while
    /// vCPUs run; when they are parked nothing is left behind.
    pub fn harvest(&mut self, vm: &VmFd, into: &mut DirtyPages) -> Result<(), KvmError> {
        match &mut self.kind {
            Kind::Rings(rings) => {
                let regions = &self.regions;
                let taken: u32 = rings.iter_mut().map(|ring| ring.collect(regions, into)).sum();
                if taken > 0 {
                    ioctl::reset_dirty_rings(vm).map_err(failed("resetting the dirty rings"))?;
                }
            }
            Kind::Log(bitmap) => {
                for (slot, region) in self.regions.iter().enumerate() {
                    harvest_log(vm, slot as u32, region, bitmap, into)?;
                }
            }
        }
        Ok(())
    }
}

fn harvest_log(
    vm: &VmFd,
    slot: u32,
    region: &RamRegion,
    bitmap: &mut [u64],
    into: &mut DirtyPages,
) -> Result<(), KvmError> {
    let words = (region.size_bytes / PAGE_SIZE as u64).div_ceil(64) as usize;
    match ioctl::get_dirty_log(vm, slot, &mut bitmap[..words]) {
        // Not tracked at present.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
        result => result.map_err(failed("reading the dirty log"))?,
    }
    for (index, &bits) in bitmap[..words].iter().enumerate().filter(|(_, bits)| **bits != 0) {
        // Regions begin at multiples of 64 pages, so words of the slot are words of the set.
        into.insert_word(region.first_page / 64 + index as u32, bits);
    }
    Ok(())
}

impl Ring {
    fn map(vcpu: &VcpuFd, count: u32) -> io::Result<Self> {
        let bytes = count as usize * size_of::<kvm_dirty_gfn>();
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        // SAFETY: a new shared mapping of the vCPU's ring at an address that the kernel chooses.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(mapping.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self {
            entries,
            count,
            next: 0,
        })
    }

    /// Takes all published entries; returns their number.
    fn collect(&mut self, regions: &[RamRegion], into: &mut DirtyPages) -> u32 {
        let mut taken = 0;
        while taken < self.count {
            // SAFETY: the index is below the number of entries that are mapped.
            let entry = unsafe { self.entries.as_ptr().add((self.next % self.count) as usize) };
            // SAFETY: `flags` is an aligned 32-bit field that the kernel writes with release order.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & ENTRY_DIRTY == 0 {
                break;
            }
            // SAFETY: the kernel does not touch an entry between publishing it and our reset mark.
            let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
            if let Some(region) = regions.get((slot & 0xFFFF) as usize)
                && offset < region.size_bytes / PAGE_SIZE as u64
            {
                into.insert(region.first_page + offset as u32);
            }
            flags.store(ENTRY_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            taken += 1;
        }
        taken
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `map` made, used by nobody else.
        unsafe {
            libc::munmap(
                self.entries.as_ptr().cast(),
                self.count as usize * size_of::<kvm_dirty_gfn>(),
            )
        };
    }
}
