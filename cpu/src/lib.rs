//! The CPU that a guest sees: one baseline that all hosts of its seats can provide. Pure: nothing here asks a CPU or KVM.
//!
//! The baseline of a host is what KVM supports there, less what can't be saved or differs between two runs
//! ([`CpuBaseline::of_supported`]); [`CpuBaseline::intersect`] reduces it to what another host has as well. It carries no numbers of
//! a single vCPU. As text ([`CpuBaseline::to_text`]) it is what the objects of a cluster keep.

mod names;
mod shown;
mod text;

pub use shown::Register;
use shown::mask;
pub use text::{TEXT_BYTES_MAX, TextError};

use names::feature_name;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// TSC frequencies that differ by more can't be hidden from a guest's clock (what KVM itself tolerates).
const TSC_TOLERANCE_PPM: u64 = 250;
/// Most leaves that a baseline from elsewhere may have.
pub const MAX_LEAVES: usize = 256;

/// One answer of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidLeaf {
    /// Value of EAX when asking.
    pub leaf: u32,
    /// Value of ECX when asking; 0 where it does not matter.
    pub subleaf: u32,
    /// Whether ECX matters.
    pub indexed: bool,
    /// EAX, EBX, ECX, EDX of the answer.
    pub registers: [u32; 4],
}

/// The CPU of a guest, apart from what numbers the single vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuBaseline {
    /// All leaves, ascending.
    pub leaves: Vec<CpuidLeaf>,
    /// Frequency of the time stamp counter in kHz.
    pub tsc_khz: u32,
}

/// Why a host can't provide a baseline.
#[derive(Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)] // the texts say it
pub enum CpuError {
    #[error(
        "CPU: this host lacks {feature}, which the VM's CPU has: use hosts with like CPUs, or start the VM anew on this pair"
    )]
    Feature { feature: String },
    #[error("CPU: vendor {theirs} there, {ours} here: both hosts of a pair need CPUs of one vendor")]
    Vendor { ours: String, theirs: String },
    #[error("CPU: {what} is {theirs:#x} there and {ours:#x} here: use hosts with like CPUs")]
    Layout { what: &'static str, ours: u32, theirs: u32 },
    #[error(
        "CPU: the VM's time stamp counter runs at {wanted_khz} kHz, this host's at {host_khz} kHz, and it can't scale: use hosts whose frequencies differ by less than 250 ppm"
    )]
    TscFrequency { wanted_khz: u32, host_khz: u32 },
    #[error(
        "CPU: this seat's machine has no {feature}, which the VM's CPU has, though this host has it: give both seats one CPU"
    )]
    NotGiven { feature: String },
    #[error(
        "CPU: this seat's machine has {feature}, which the VM's CPU has not, for it runs on a host without it: give both seats one CPU"
    )]
    Beyond { feature: String },
    #[error(
        "CPU: leaf {leaf:#x}.{subleaf} of CPUID is {theirs:x?} there and {ours:x?} here: use hosts with like CPUs, or give both seats one CPU"
    )]
    Leaf {
        leaf: u32,
        subleaf: u32,
        ours: [u32; 4],
        theirs: [u32; 4],
    },
    #[error("CPU: a baseline of {leaves} leaves is more than any CPU has; the sender is broken or hostile")]
    TooLarge { leaves: usize },
}

/// What a seat has to offer to a guest that runs elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuOffer {
    /// The most that its host can give.
    pub host: CpuBaseline,
    /// What its machine was made with.
    pub machine: CpuBaseline,
    /// Its host can give any frequency of the time stamp counter.
    pub tsc_scaling: bool,
}

impl CpuOffer {
    /// Whether a guest with the CPU `theirs` can be loaded into this seat's machine; otherwise the first thing that is in
    /// the way.
    pub fn check(&self, theirs: &CpuBaseline) -> Result<(), CpuError> {
        theirs.check(&self.host, self.tsc_scaling)?;
        if let Err(CpuError::Feature { feature }) = theirs.check(&self.machine, true) {
            return Err(CpuError::NotGiven { feature });
        }
        if let Err(CpuError::Feature { feature }) = self.machine.check(theirs, true) {
            return Err(CpuError::Beyond { feature });
        }
        let ours = &self.machine;
        for (one, other) in [(theirs, ours), (ours, theirs)] {
            for CpuidLeaf { leaf, subleaf, .. } in one.leaves() {
                let registers = |of: &CpuBaseline| of.find(*leaf, *subleaf).map(|found| found.registers);
                if registers(one) != registers(other) {
                    return Err(CpuError::Leaf {
                        leaf: *leaf,
                        subleaf: *subleaf,
                        ours: registers(ours).unwrap_or_default(),
                        theirs: registers(theirs).unwrap_or_default(),
                    });
                }
            }
        }
        Ok(())
    }
}

const REGISTERS: [Register; 4] = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx];

impl CpuBaseline {
    /// The answers to CPUID, in order.
    pub fn leaves(&self) -> &[CpuidLeaf] {
        &self.leaves
    }

    /// The answer for this leaf, if there is one.
    pub fn find(&self, leaf: u32, subleaf: u32) -> Option<&CpuidLeaf> {
        self.leaves
            .iter()
            .find(|entry| (entry.leaf, entry.subleaf) == (leaf, subleaf))
    }

    /// One register of an answer, 0 where there is none.
    pub fn register(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.find(leaf, subleaf)
            .map_or(0, |entry| entry.registers[register as usize])
    }

    /// Bits of a guest physical address.
    pub fn physical_address_bits(&self) -> u32 {
        self.register(0x8000_0008, 0, Register::Eax) & 0xFF
    }

    /// The maker, as its CPUs say it.
    pub fn vendor(&self) -> String {
        let [_, ebx, ecx, edx] = self.find(0, 0).map_or([0; 4], |leaf| leaf.registers);
        let bytes: Vec<u8> = [ebx, edx, ecx].into_iter().flat_map(u32::to_le_bytes).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What both of two hosts can give. Model, caches and frequency are those of `self`.
    pub fn intersect(&self, other: &Self) -> Result<Self, CpuError> {
        other.check_like(self)?;
        let mut leaves = self.leaves.clone();
        for leaf in &mut leaves {
            for register in REGISTERS {
                if mask(leaf.leaf, leaf.subleaf, register).is_some() {
                    leaf.registers[register as usize] &= other.register(leaf.leaf, leaf.subleaf, register);
                }
            }
            // Physical and virtual address bits.
            if leaf.leaf == 0x8000_0008 {
                let theirs = other.register(0x8000_0008, 0, Register::Eax);
                let least = |shift: u32| ((leaf.registers[0] >> shift) & 0xFF).min((theirs >> shift) & 0xFF) << shift;
                leaf.registers[0] = (leaf.registers[0] & !0xFFFF) | least(0) | least(8);
            }
        }
        let kept = leaves
            .iter()
            .find(|leaf| (leaf.leaf, leaf.subleaf) == (0xD, 0))
            .map_or(3, |leaf| leaf.registers[0]);
        leaves.retain(|leaf| leaf.leaf != 0xD || leaf.subleaf < 2 || kept & (1 << leaf.subleaf) != 0);
        Ok(Self {
            leaves,
            tsc_khz: self.tsc_khz,
        })
    }

    /// Whether the host whose most is `host` can provide this baseline; otherwise the first thing it lacks.
    pub fn check(&self, host: &Self, tsc_scaling: bool) -> Result<(), CpuError> {
        host.check_like(self)?;
        for leaf in &self.leaves {
            for register in REGISTERS {
                if mask(leaf.leaf, leaf.subleaf, register).is_none() {
                    continue;
                }
                let lacking = leaf.registers[register as usize] & !host.register(leaf.leaf, leaf.subleaf, register);
                if lacking != 0 {
                    let feature = feature_name(leaf.leaf, leaf.subleaf, register, lacking.trailing_zeros());
                    return Err(CpuError::Feature { feature });
                }
            }
        }
        let (ours, theirs) = (
            host.register(0x8000_0008, 0, Register::Eax) & 0xFF,
            self.register(0x8000_0008, 0, Register::Eax) & 0xFF,
        );
        if theirs > ours {
            return Err(CpuError::Layout {
                what: "number of physical address bits",
                ours,
                theirs,
            });
        }
        if !tsc_scaling && !tsc_alike(self.tsc_khz, host.tsc_khz) {
            return Err(CpuError::TscFrequency {
                wanted_khz: self.tsc_khz,
                host_khz: host.tsc_khz,
            });
        }
        Ok(())
    }

    /// What has to be equal on two hosts: vendor, and the places of extended state in memory.
    fn check_like(&self, other: &Self) -> Result<(), CpuError> {
        if other.leaves.len() > MAX_LEAVES {
            return Err(CpuError::TooLarge {
                leaves: other.leaves.len(),
            });
        }
        let (ours, theirs) = (self.vendor(), other.vendor());
        if ours != theirs {
            return Err(CpuError::Vendor { ours, theirs });
        }
        let common = self.register(0xD, 0, Register::Eax) & other.register(0xD, 0, Register::Eax);
        for subleaf in (2..32).filter(|subleaf| common & (1 << subleaf) != 0) {
            let (ours, theirs) = (
                self.register(0xD, subleaf, Register::Ebx),
                other.register(0xD, subleaf, Register::Ebx),
            );
            if ours != theirs {
                return Err(CpuError::Layout {
                    what: "offset of an extended register state",
                    ours,
                    theirs,
                });
            }
        }
        Ok(())
    }
}

/// Whether two frequencies are within the tolerance.
pub fn tsc_alike(one_khz: u32, other_khz: u32) -> bool {
    u64::from(one_khz.abs_diff(other_khz)) * 1_000_000 <= u64::from(one_khz) * TSC_TOLERANCE_PPM
}

#[cfg(test)]
mod tests;
