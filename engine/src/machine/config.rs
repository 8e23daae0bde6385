//! What a machine is made of.

use super::MachineError;
use crate::kvm::{CpuBaseline, DEFAULT_RING_ENTRIES};
use serde::{Deserialize, Serialize};

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 16;

/// The parts of a machine that are not devices. Both seats of a VM have the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// RAM in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// The CPU that the guest sees; without one all that this host can give.
    #[serde(default)]
    pub cpu: Option<CpuBaseline>,
    /// Allocate all RAM before the guest runs.
    #[serde(default = "yes")]
    pub prefault: bool,
    /// Entries of each vCPU's dirty ring; 0 for the dirty log.
    #[serde(default = "default_ring_entries")]
    pub dirty_ring_entries: u32,
}

fn yes() -> bool {
    true
}

fn default_ring_entries() -> u32 {
    DEFAULT_RING_ENTRIES
}

impl MachineConfig {
    /// A machine with everything else as it is by default.
    pub fn new(memory_bytes: u64, vcpus: u8) -> Self {
        Self {
            memory_bytes,
            vcpus,
            cpu: None,
            prefault: yes(),
            dirty_ring_entries: default_ring_entries(),
        }
    }

    /// Checks what can be checked without a host.
    pub(super) fn check(&self) -> Result<(), MachineError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(MachineError::Vcpus { vcpus: self.vcpus });
        }
        Ok(())
    }
}
