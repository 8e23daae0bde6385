//! Which model-specific registers belong to a vCPU's state.
//!
//! KVM lists those that it saves; to these come the memory type and machine check registers, which it leaves out of the
//! list. What a vCPU can't read, or what belongs to a feature that no guest is offered, is left out.

use crate::kvm::{Kvm, KvmError, refused};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

/// Time stamp counter: carried as offset and time of the machine.
pub(super) const IA32_TSC: u32 = 0x10;
/// Deadline of the local APIC's timer: loaded last.
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6E0;
/// Writing these makes KVM write the host's time of day to guest memory; see `VcpuCore::load_wall_clock`.
pub(super) const KVM_WALL_CLOCKS: [u32; 2] = [0x11, 0x4B56_4D00];

/// Read with the others, since a call costs more than many registers, but saved apart.
pub(super) const WITH_A_PLACE_OF_THEIR_OWN: [u32; 2] = [IA32_TSC_DEADLINE, KVM_WALL_CLOCKS[1]];

/// Registers that `KVM_GET_MSR_INDEX_LIST` leaves out: MTRRs, machine check.
const ADDITIONAL: &[RangeInclusive<u32>] = &[
    0x200..=0x20F,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26F,
    0x2FF..=0x2FF,
    0x17A..=0x17B,
    0x400..=0x47F,
];

/// Registers of what is hidden from guests (performance counters, VMX, Hyper-V, PT, architectural LBR, stolen time,
/// asynchronous page faults, EOI in memory, SGX), and those that have a place of their own in the state.
const LEFT_OUT: &[RangeInclusive<u32>] = &[
    IA32_TSC..=IA32_TSC,
    IA32_TSC_DEADLINE..=IA32_TSC_DEADLINE,
    0x11..=0x11,
    0x4B56_4D00..=0x4B56_4D00,
    0x4B56_4D02..=0x4B56_4D04,
    0x4B56_4D06..=0x4B56_4D08,
    0x3A..=0x3A,
    0x8C..=0x8F,
    0xC1..=0xC8,
    0xE7..=0xE8,
    0x186..=0x18D,
    0x1C8..=0x1C9,
    0x1CE..=0x1CE,
    0x309..=0x30C,
    0x329..=0x329,
    0x345..=0x345,
    0x38D..=0x392,
    0x3F1..=0x3F2,
    0x480..=0x493,
    0x4C1..=0x4C8,
    0x560..=0x587,
    0x1200..=0x121F,
    0x14CE..=0x14CF,
    0x1500..=0x16FF,
    0x4000_0000..=0x4000_FFFF,
    0xC000_0300..=0xC000_0303,
    0xC001_0000..=0xC001_0007,
    0xC001_0114..=0xC001_0117,
    0xC001_0200..=0xC001_020F,
];

/// The registers of every vCPU of a machine, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MsrList {
    indices: Vec<u32>,
}

impl MsrList {
    /// Finds the registers by trying them on a vCPU that has its CPUID and was not run yet: kept is what can be read
    /// and written back.
    pub(crate) fn probe(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let listed = kvm
            .device()
            .get_msr_index_list()
            .map_err(refused("reading the list of MSRs"))?;
        let candidates: BTreeSet<u32> = listed
            .as_slice()
            .iter()
            .copied()
            .chain(ADDITIONAL.iter().cloned().flatten())
            .collect();
        let indices = candidates
            .into_iter()
            .filter(|index| !LEFT_OUT.iter().any(|range| range.contains(index)))
            .filter(|&index| read_one(vcpu, index).is_ok_and(|value| write_one(vcpu, index, value).is_ok()))
            .collect();
        Ok(Self { indices })
    }

    /// The registers.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// A buffer to read all registers into, and behind them [`WITH_A_PLACE_OF_THEIR_OWN`].
    pub(super) fn buffer(&self) -> Result<Msrs, KvmError> {
        let indices = self.indices.iter().copied().chain(WITH_A_PLACE_OF_THEIR_OWN);
        entries_of(indices.map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        }))
    }
}

/// KVM's structure for several registers.
pub(super) fn entries_of(entries: impl Iterator<Item = kvm_msr_entry>) -> Result<Msrs, KvmError> {
    let entries: Vec<kvm_msr_entry> = entries.collect();
    Msrs::from_entries(&entries).map_err(|_| KvmError::Short {
        what: "accessing MSRs in one call",
        done: 256,
        asked: entries.len(),
    })
}

/// Reads all registers of the buffer.
pub(super) fn read_all(vcpu: &VcpuFd, buffer: &mut Msrs) -> Result<(), KvmError> {
    let asked = buffer.as_slice().len();
    let done = vcpu.get_msrs(buffer).map_err(refused("reading MSRs"))?;
    if done == asked {
        Ok(())
    } else {
        Err(KvmError::Short {
            what: "reading MSRs",
            done,
            asked,
        })
    }
}

/// Writes all registers.
pub(super) fn write_all(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let done = vcpu
        .set_msrs(&entries_of(entries.iter().copied())?)
        .map_err(refused("writing MSRs"))?;
    if done == entries.len() {
        return Ok(());
    }
    let refused = entries.get(done).copied().unwrap_or_default();
    tracing::error!(
        "MSR {:#x} can't be set to {:#x} on this host",
        refused.index,
        refused.data
    );
    Err(KvmError::Short {
        what: "writing MSRs",
        done,
        asked: entries.len(),
    })
}

/// Reads one register.
pub(super) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<u64, KvmError> {
    let mut buffer = entries_of(
        [kvm_msr_entry {
            index,
            ..Default::default()
        }]
        .into_iter(),
    )?;
    read_all(vcpu, &mut buffer)?;
    Ok(buffer.as_slice()[0].data)
}

/// Writes one register.
pub(super) fn write_one(vcpu: &VcpuFd, index: u32, data: u64) -> Result<(), KvmError> {
    let buffer = entries_of(
        [kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }]
        .into_iter(),
    )?;
    match vcpu.set_msrs(&buffer).map_err(refused("writing an MSR"))? {
        1 => Ok(()),
        done => Err(KvmError::Short {
            what: "writing an MSR",
            done,
            asked: 1,
        }),
    }
}
