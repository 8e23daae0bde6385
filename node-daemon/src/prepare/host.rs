//! What an engine needs of its host.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use super::SeatError;
use crate::config::SeatConfig;

pub(super) fn check_memory(config: &SeatConfig) -> Result<(), SeatError> {
    let available_mib = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? >> 10)
    });
    let needed_mib = config.machine.memory_mib;
    match available_mib {
        Some(available_mib) if available_mib < needed_mib => Err(SeatError::Memory {
            seat: config.label(),
            needed_mib,
            available_mib,
        }),
        _ => Ok(()),
    }
}

/// `KVM_GET_API_VERSION` of linux/kvm.h, and the one version there is.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_API_VERSION: i32 = 12;

pub(super) fn open_kvm(path: &str) -> Result<File, SeatError> {
    let refuse = |why: String| SeatError::Kvm { why };
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        refuse(match error.kind() {
            ErrorKind::NotFound => {
                "does not exist: load kvm-intel or kvm-amd, switch virtualisation on in the firmware, \
                                    or on a virtual machine allow nested virtualisation"
                    .to_owned()
            }
            ErrorKind::PermissionDenied => "permission denied: add the daemon's user to the group kvm".to_owned(),
            _ => error.to_string(),
        })
    })?;
    // SAFETY: an ioctl without an argument.
    let version = unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION as _, 0) };
    if version != KVM_API_VERSION {
        return Err(refuse(format!(
            "is no KVM of API version {KVM_API_VERSION} (it answers {version})"
        )));
    }
    Ok(file)
}

/// Not every kernel has it, and the engine works without.
pub(super) fn open_userfaultfd() -> Option<File> {
    OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").ok()
}
