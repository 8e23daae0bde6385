//! KVM: what this program needs of it beyond what the `kvm-ioctls` crate offers.

mod cpuid;
mod dirty;
pub(crate) mod ioctl;
mod open;
mod vm;

pub use cpuid::cpu_of_host;
pub(crate) use cpuid::cpuid_of_vcpu;
pub use dirty::{DEFAULT_RING_ENTRIES, DirtySource};
pub(crate) use ftvm_cpu::tsc_alike;
pub use ftvm_cpu::{CpuBaseline, CpuError, CpuOffer};
pub use open::{Capabilities, Kvm};
pub use vm::{GsiLine, Vm};

use std::io;
use thiserror::Error;

/// Why KVM can't be used or refused something.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the texts say it
pub enum KvmError {
    #[error(
        "KVM: {path} does not exist: turn on virtualisation (VT-x or AMD-V) in the firmware, or nested virtualisation if this is a virtual machine, then `modprobe kvm_intel` or `modprobe kvm_amd`"
    )]
    Missing { path: String },
    #[error(
        "KVM: {path} may not be opened by this user: add it to the group that owns the file (`usermod -aG kvm USER`), or run as root"
    )]
    NotPermitted { path: String },
    #[error("KVM: {path} can't be opened")]
    Open { path: String, source: io::Error },
    #[error("KVM: the device is not KVM (interface version {version} instead of 12)")]
    NotKvm { version: i32 },
    #[error("KVM: this host's kernel lacks {missing}: use Linux 5.15 or newer with KVM for x86-64")]
    Capabilities { missing: String },
    #[error("KVM: {what} was refused by the kernel")]
    Call { what: &'static str, source: io::Error },
    #[error("KVM: {what} transferred {done} of {asked} items")]
    Short {
        what: &'static str,
        done: usize,
        asked: usize,
    },
}

/// Turns an errno of `kvm-ioctls` into a [`KvmError::Call`].
pub(crate) fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call {
        what,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// Turns an I/O error into a [`KvmError::Call`].
pub(crate) fn failed(what: &'static str) -> impl Fn(io::Error) -> KvmError {
    move |source| KvmError::Call { what, source }
}
