//! One virtual machine of KVM: interrupt controllers, memory slots, signals.

use super::dirty::{self, DirtySource};
use super::{Capabilities, Kvm, KvmError, failed, ioctl, refused};
use crate::devices::irq::{GuestClock, IrqLine, MsiSender, NotifyRegistrar};
use crate::memory::{DirtyPages, GuestRam, MemoryLayout};
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Three pages that Intel's KVM needs for real mode, and its identity map; both below 4 GiB and beyond the IOAPIC,
/// where nothing else is.
const TSS_ADDRESS: usize = 0xFFFB_D000;
const IDENTITY_MAP_ADDRESS: u64 = 0xFFFB_C000;

/// A virtual machine of KVM with its RAM plugged in.
#[derive(Debug)]
pub struct Vm {
    // The slots refer to the RAM: the file is closed first.
    fd: VmFd,
    ram: Arc<GuestRam>,
    capabilities: Capabilities,
    ring_entries: u32,
    dirty: Mutex<Dirty>,
    /// What the clock shows while it stands; `RUNNING` while KVM's own runs.
    held_clock_ns: AtomicU64,
}

#[derive(Debug)]
struct Dirty {
    source: DirtySource,
    /// Harvested by a vCPU whose ring was full, not yet asked for.
    spilled: DirtyPages,
    /// Pages that may be spilled before the next harvest.
    spilled_max: usize,
    tracking: bool,
}

/// Value of `held_clock_ns` while time runs; no clock reaches it.
const RUNNING: u64 = u64::MAX;

impl Vm {
    /// Makes a machine without vCPUs. `ring_entries` is the size of each vCPU's dirty ring, 0 for the dirty log.
    pub fn new(kvm: &Kvm, ram: Arc<GuestRam>, ring_entries: u32) -> Result<Self, KvmError> {
        let fd = kvm
            .device()
            .create_vm()
            .map_err(refused("creating a virtual machine"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(refused("setting the TSS address"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(refused("setting the identity map address"))?;
        fd.create_irq_chip()
            .map_err(refused("creating the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(refused("creating the timer (PIT)"))?;
        let capabilities = *kvm.capabilities();
        enable_event_capabilities(&fd, &capabilities)?;
        let ring_entries = dirty::enable_rings(&fd, &capabilities, ring_entries)?;
        let dirty = Dirty {
            source: DirtySource::new(ram.layout(), ring_entries),
            spilled: DirtyPages::new(ram.pages()),
            spilled_max: usize::MAX,
            tracking: false,
        };
        let vm = Self {
            fd,
            ram,
            capabilities,
            ring_entries,
            dirty: Mutex::new(dirty),
            held_clock_ns: AtomicU64::new(RUNNING),
        };
        vm.set_slots(0)?;
        Ok(vm)
    }

    /// The file of the machine.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The RAM that is plugged in.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What the host offers.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Makes a vCPU and maps its dirty ring.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        let vcpu = self.fd.create_vcpu(index.into()).map_err(refused("creating a vCPU"))?;
        self.dirty().source.add_vcpu(&vcpu, self.ring_entries)?;
        Ok(vcpu)
    }

    fn set_slots(&self, flags: u32) -> Result<(), KvmError> {
        for (slot, (region, userspace_addr)) in self.ram.mappings().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.gpa,
                memory_size: region.size_bytes,
                userspace_addr,
            };
            // SAFETY: the mapping is owned by `self.ram`, which is dropped after the file that refers to it.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(refused("plugging in guest memory"))?;
        }
        Ok(())
    }

    /// Starts or stops tracking of the guest's writes. After a start every page counts as not yet written.
    pub fn set_tracking(&self, on: bool) -> Result<(), KvmError> {
        let mut dirty = self.dirty();
        if dirty.tracking == on {
            return Ok(());
        }
        self.set_slots(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        dirty.tracking = on;
        Ok(())
    }

    /// Whether the guest's writes are tracked.
    pub fn is_tracking(&self) -> bool {
        self.dirty().tracking
    }

    /// Adds all pages that the guest or this program wrote since the last harvest; see [`DirtySource::harvest`].
    pub fn harvest(&self, into: &mut DirtyPages) -> Result<(), KvmError> {
        let mut dirty = self.dirty();
        dirty.source.harvest(&self.fd, into)?;
        into.merge(&dirty.spilled);
        dirty.spilled.clear();
        self.ram.written().collect(into);
        Ok(())
    }

    /// Empties full rings; what was in them is part of the next harvest. For the vCPU that met a full ring: it may run
    /// on if this is true, otherwise the guest has written all that [`Vm::limit_writes`] lets it.
    pub fn spill_rings(&self) -> Result<bool, KvmError> {
        let mut dirty = self.dirty();
        let Dirty { source, spilled, .. } = &mut *dirty;
        source.harvest(&self.fd, spilled)?;
        Ok(dirty.spilled.len() < dirty.spilled_max)
    }

    /// Between two harvests the guest's vCPUs may write about so many pages: a vCPU that meets a full ring after that
    /// stands still until the machine is paused and resumed. They may exceed it by what their rings hold. Without rings
    /// nothing is limited.
    pub fn limit_writes(&self, pages: usize) {
        self.dirty().spilled_max = pages;
    }

    /// Whether the host has dirty rings, without which [`Vm::limit_writes`] does nothing.
    pub fn limits_writes(&self) -> bool {
        self.ring_entries > 0
    }

    /// A line of the interrupt controllers.
    pub fn irq_line(self: &Arc<Self>, gsi: u32) -> GsiLine {
        GsiLine { vm: self.clone(), gsi }
    }

    /// Placement of the RAM.
    pub fn layout(&self) -> &MemoryLayout {
        self.ram.layout()
    }

    /// Makes [`GuestClock`] show `now_ns` until time runs again (`None`).
    pub fn hold_clock(&self, now_ns: Option<u64>) {
        self.held_clock_ns
            .store(now_ns.map_or(RUNNING, |now| now.min(RUNNING - 1)), Ordering::SeqCst);
    }

    /// What the clock shows if it stands.
    pub fn held_clock_ns(&self) -> Option<u64> {
        match self.held_clock_ns.load(Ordering::SeqCst) {
            RUNNING => None,
            now => Some(now),
        }
    }

    fn dirty(&self) -> std::sync::MutexGuard<'_, Dirty> {
        // A panic while harvesting leaves a set with some pages more, never less.
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets KVM tell and take pending exceptions with their payload, and a pending triple fault.
fn enable_event_capabilities(fd: &VmFd, capabilities: &Capabilities) -> Result<(), KvmError> {
    let wanted = [
        (capabilities.exception_payload, kvm_bindings::KVM_CAP_EXCEPTION_PAYLOAD),
        (
            capabilities.triple_fault_event,
            kvm_bindings::KVM_CAP_X86_TRIPLE_FAULT_EVENT,
        ),
    ];
    for (_, cap) in wanted.into_iter().filter(|(there, _)| *there) {
        fd.enable_cap(&kvm_enable_cap {
            cap,
            args: [1, 0, 0, 0],
            ..Default::default()
        })
        .map_err(refused("enabling the saving of pending exceptions"))?;
    }
    Ok(())
}

impl MsiSender for Vm {
    fn send(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // The message comes from the guest's own table; one that KVM can't deliver is lost as it is on real hardware.
        if let Err(error) = self.fd.signal_msi(msi) {
            tracing::debug!("MSI {address:#x}/{data:#x} was not delivered: {error}");
        }
    }
}

impl NotifyRegistrar for Vm {
    fn register(&self, address: u64, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.fd
            .register_ioevent(&borrow(eventfd), &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(os_error)
    }

    fn unregister(&self, address: u64, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.fd
            .unregister_ioevent(&borrow(eventfd), &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(os_error)
    }
}

/// The descriptor as the type that `kvm-ioctls` wants, without owning it.
fn borrow(eventfd: BorrowedFd<'_>) -> ManuallyDrop<EventFd> {
    // SAFETY: the descriptor is open as long as it is borrowed, and the wrapper does not close it.
    ManuallyDrop::new(unsafe { EventFd::from_raw_fd(eventfd.as_raw_fd()) })
}

fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl GuestClock for Vm {
    fn now_ns(&self) -> u64 {
        self.held_clock_ns().unwrap_or_else(
            || match ioctl::get_clock(&self.fd).map_err(failed("reading the clock")) {
                Ok(clock) => clock.clock,
                Err(error) => {
                    tracing::error!("{error}");
                    0
                }
            },
        )
    }
}

/// An input of the in-kernel PIC and IOAPIC.
#[derive(Debug, Clone)]
pub struct GsiLine {
    vm: Arc<Vm>,
    gsi: u32,
}

impl IrqLine for GsiLine {
    fn set(&self, asserted: bool) {
        if let Err(error) = self.vm.fd.set_irq_line(self.gsi, asserted) {
            tracing::error!("interrupt line {} could not be set: {error}", self.gsi);
        }
    }
}
