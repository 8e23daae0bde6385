//! Getting KVM, and checking that it can do what this program needs.

use super::KvmError;
use kvm_ioctls::{Cap, Kvm as KvmDevice};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;

/// The version of KVM's interface that has been stable since 2007.
const API_VERSION: i32 = 12;

/// What must be there, with the words for the message.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::UserMemory, "memory slots"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::SetIdentityMapAddr, "identity map address"),
    (Cap::Pit2, "in-kernel timer (PIT)"),
    (Cap::PitState2, "saving the timer (PIT)"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::SignalMsi, "sending MSIs"),
    (Cap::MpState, "saving the MP state"),
    (Cap::VcpuEvents, "saving pending events"),
    (Cap::Debugregs, "saving debug registers"),
    (Cap::Xsave, "saving extended registers"),
    (Cap::Xcrs, "saving XCR0"),
    (Cap::AdjustClock, "setting the guest's clock"),
    (Cap::ImmediateExit, "leaving the guest at once"),
    (Cap::ExtCpuid, "reading supported CPU features"),
    (Cap::GetTscKhz, "reading the TSC frequency"),
];

/// An open and usable `/dev/kvm`.
#[derive(Debug)]
pub struct Kvm {
    device: KvmDevice,
    capabilities: Capabilities,
}

/// What this host's KVM offers beyond the necessary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Most entries that a vCPU's dirty ring may have; 0 without dirty rings.
    pub dirty_ring_max_entries: u32,
    /// Dirty rings are the acquire/release kind.
    pub dirty_ring_acq_rel: bool,
    /// Special registers carry the page directory pointers.
    pub sregs2: bool,
    /// Pending exceptions carry their payload.
    pub exception_payload: bool,
    /// A pending triple fault is part of the events.
    pub triple_fault_event: bool,
    /// The TSC can be scaled to another frequency.
    pub tsc_scaling: bool,
    /// The local APIC has a TSC deadline timer.
    pub tsc_deadline: bool,
    /// Most vCPUs of one machine.
    pub max_vcpus: usize,
    /// Bytes of a vCPU's extended registers (KVM_GET_XSAVE).
    pub xsave_bytes: usize,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self, KvmError> {
        Self::open_at(Path::new("/dev/kvm"))
    }

    /// Opens KVM's device at another path.
    pub fn open_at(path: &Path) -> Result<Self, KvmError> {
        let name = path.display().to_string();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => KvmError::Missing { path: name.clone() },
                io::ErrorKind::PermissionDenied => KvmError::NotPermitted { path: name.clone() },
                _ => KvmError::Open {
                    path: name.clone(),
                    source,
                },
            })?;
        Self::from_fd(file.into())
    }

    /// Uses a descriptor of `/dev/kvm` that someone else opened.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and given away; that it is KVM's is what the version check finds out.
        let device = unsafe { KvmDevice::from_raw_fd(fd.into_raw_fd()) };
        let version = device.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::NotKvm { version });
        }
        let missing: Vec<&str> = REQUIRED
            .iter()
            .filter(|(cap, _)| !device.check_extension(*cap))
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(KvmError::Capabilities {
                missing: missing.join(", "),
            });
        }
        let capabilities = Capabilities::probe(&device);
        Ok(Self { device, capabilities })
    }

    /// The device.
    pub fn device(&self) -> &KvmDevice {
        &self.device
    }

    /// What this host offers.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }
}

impl Capabilities {
    fn probe(device: &KvmDevice) -> Self {
        let ask = |number: u32| device.check_extension_raw(number.into()).max(0);
        let acq_rel = ask(kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
        let ring_bytes = if acq_rel > 0 {
            acq_rel
        } else {
            ask(kvm_bindings::KVM_CAP_DIRTY_LOG_RING)
        };
        Self {
            dirty_ring_max_entries: ring_bytes as u32 / size_of::<kvm_bindings::kvm_dirty_gfn>() as u32,
            dirty_ring_acq_rel: acq_rel > 0,
            sregs2: ask(kvm_bindings::KVM_CAP_SREGS2) > 0,
            exception_payload: ask(kvm_bindings::KVM_CAP_EXCEPTION_PAYLOAD) > 0,
            triple_fault_event: ask(kvm_bindings::KVM_CAP_X86_TRIPLE_FAULT_EVENT) > 0,
            tsc_scaling: ask(kvm_bindings::KVM_CAP_TSC_CONTROL) > 0,
            tsc_deadline: ask(kvm_bindings::KVM_CAP_TSC_DEADLINE_TIMER) > 0,
            max_vcpus: device.get_max_vcpus(),
            xsave_bytes: (ask(kvm_bindings::KVM_CAP_XSAVE2) as usize).max(4096),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        let missing = Kvm::open_at(Path::new("/nonexistent/kvm"))
            .expect_err("no such file")
            .to_string();
        assert!(
            missing.contains("/nonexistent/kvm") && missing.contains("modprobe"),
            "{missing}"
        );
        let wrong = Kvm::open_at(Path::new("/dev/null")).expect_err("not KVM").to_string();
        assert!(wrong.contains("not KVM"), "{wrong}");
    }

    #[test]
    fn this_host_is_usable() {
        let kvm = Kvm::open().expect("KVM");
        assert!(kvm.capabilities().max_vcpus >= 16);
        assert!(kvm.capabilities().dirty_ring_max_entries.is_power_of_two());
    }
}
