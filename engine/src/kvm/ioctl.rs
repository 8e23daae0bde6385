//! Requests of KVM that the `kvm-ioctls` crate does not offer, and plain-old-data helpers for their structures.

use kvm_bindings::{
    KVMIO, kvm_clock_data, kvm_device_attr, kvm_dirty_log, kvm_msrs, kvm_sregs2, kvm_userspace_memory_region,
};
use std::io;
use std::os::fd::AsRawFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iow_nr!(KVM_SET_USER_MEMORY_REGION, KVMIO, 0x46, kvm_userspace_memory_region);
ioctl_ior_nr!(KVM_GET_CLOCK, KVMIO, 0x7c, kvm_clock_data);
ioctl_iowr_nr!(KVM_GET_MSRS, KVMIO, 0x88, kvm_msrs);
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Makes the pages of all harvested ring entries trackable again; returns how many entries that were.
pub fn reset_dirty_rings(vm: &impl AsRawFd) -> io::Result<u32> {
    // SAFETY: the request takes no argument.
    checked(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) }).map(|count| count as u32)
}

/// Fetches and clears the dirty bitmap of a slot, and write-protects the pages in it.
pub fn get_dirty_log(vm: &impl AsRawFd, slot: u32, bitmap: &mut [u64]) -> io::Result<()> {
    let mut log = kvm_dirty_log {
        slot,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: the caller's bitmap has a bit for every page of the slot (see `DirtySource`), and lives through the call.
    checked(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) }).map(drop)
}

/// The guest's clock now, with the host's TSC of the same moment where KVM knows it.
pub fn get_clock(vm: &impl AsRawFd) -> io::Result<kvm_clock_data> {
    let mut clock = kvm_clock_data::default();
    // SAFETY: the kernel fills in the structure.
    checked(unsafe { ioctl_with_mut_ref(vm, KVM_GET_CLOCK(), &mut clock) })?;
    Ok(clock)
}

/// Special registers, with the page directory pointers of 32-bit PAE paging.
pub fn get_sregs2(vcpu: &impl AsRawFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel fills in the structure.
    checked(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// Loads what [`get_sregs2`] returned.
pub fn set_sregs2(vcpu: &impl AsRawFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the kernel only reads the structure.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) }).map(drop)
}

/// Sets the machine-check banks that the vCPU has; `mcg_cap` as in the MSR of that name.
pub fn setup_mce(vcpu: &impl AsRawFd, mcg_cap: u64) -> io::Result<()> {
    // SAFETY: the kernel only reads the number.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &mcg_cap) }).map(drop)
}

/// Reads a 64-bit device attribute.
pub fn get_device_attr_u64(device: &impl AsRawFd, group: u32, attr: u64) -> io::Result<u64> {
    let mut value = 0u64;
    let request = kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr: &raw mut value as u64,
    };
    // SAFETY: the kernel reads the structure and writes eight bytes to the address in it, which is `value`.
    checked(unsafe { ioctl_with_ref(device, KVM_GET_DEVICE_ATTR(), &request) })?;
    Ok(value)
}

/// Writes a 64-bit device attribute.
pub fn set_device_attr_u64(device: &impl AsRawFd, group: u32, attr: u64, value: u64) -> io::Result<()> {
    let request = kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr: &raw const value as u64,
    };
    // SAFETY: the kernel reads the structure, and eight bytes at the address in it, which is `value`.
    checked(unsafe { ioctl_with_ref(device, KVM_SET_DEVICE_ATTR(), &request) }).map(drop)
}

/// Structures of KVM's ABI that are saved as they are.
///
/// # Safety
/// The type has no padding that could hold stray bytes, no pointers, and every bit pattern is a value.
pub unsafe trait Abi: Copy {
    /// Size in bytes.
    const SIZE: usize = size_of::<Self>();

    /// The bytes of the structure.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: by the contract of this trait every byte is initialised.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }

    /// The structure from its bytes; `None` if the length is wrong.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was checked, alignment is not assumed, and every bit pattern is a value.
        Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
    }
}

macro_rules! abi {
    ($($name:ident),+ $(,)?) => { $(
        // SAFETY: a structure of integers that KVM documents as ABI; gaps are explicit padding fields.
        unsafe impl Abi for kvm_bindings::$name {}
    )+ };
}

abi!(
    kvm_regs,
    kvm_sregs2,
    kvm_lapic_state,
    kvm_xcrs,
    kvm_debugregs,
    kvm_vcpu_events,
    kvm_mp_state,
    kvm_msr_entry,
    kvm_pit_state2,
    kvm_pic_state,
    kvm_ioapic_state,
);
