//! The CPU that a guest sees: one baseline that both hosts of a pair can provide.
//!
//! The baseline is what KVM supports on a host ([`CpuBaseline::of_host`]), less what can't be saved or differs between
//! two runs, reduced to what the other host has as well ([`CpuBaseline::intersect`]). It carries no numbers of a single
//! vCPU; those are filled in by [`CpuBaseline::for_vcpu`].

use super::cpuid_names::feature_name;
use super::{Kvm, KvmError, refused};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// TSC frequencies that differ by more can't be hidden from a guest's clock (what KVM itself tolerates).
const TSC_TOLERANCE_PPM: u64 = 250;
/// Most leaves that a baseline from elsewhere may have.
const MAX_LEAVES: usize = 256;

/// One register of CPUID's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

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

/// Registers of feature bits: what they hold is the intersection of two hosts. With each the bits that are shown to a
/// guest at all; see [`mask`].
const FEATURES: &[(u32, u32, Register, u32)] = {
    use Register::{Eax, Ebx, Ecx, Edx};
    &[
        // Not: DTES64, MONITOR, DS-CPL, VMX, SMX, EST, TM2, CNXT-ID, SDBG, xTPR, PDCM, DCA (no virtual counterpart or
        // state that can't be saved); RDRAND (differs between two sides that run in lockstep).
        (0x1, 0, Ecx, !(bits(&[2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18, 30]))),
        // Not: PSN, DS, ACPI, SS, TM, IA64, PBE. (HTT is set with the topology.)
        (0x1, 0, Edx, !(bits(&[18, 21, 22, 27, 28, 29, 30, 31]))),
        (0x6, 0, Eax, bits(&[2])),
        // Not: SGX, HLE, CQM, MPX, RDT, RTM, RDSEED, PT.
        (0x7, 0, Ebx, !(bits(&[2, 4, 11, 12, 14, 15, 18, 25]))),
        // Not: WAITPKG, shadow stacks, TME, KL, bus lock, ENQCMD, SGX-LC, PKS.
        (0x7, 0, Ecx, !(bits(&[5, 7, 13, 23, 24, 29, 30, 31]))),
        // Not: UINTR, TSXLDTRK, PCONFIG, architectural LBR, IBT, AMX.
        (0x7, 0, Edx, !(bits(&[5, 11, 13, 16, 18, 19, 20, 22, 24, 25]))),
        // Not: AMX-FP16, LAM, FRED, LKGS.
        (0x7, 1, Eax, !(bits(&[17, 18, 21, 26]))),
        (0x7, 1, Edx, !(bits(&[8, 18, 19]))),
        (0x7, 2, Edx, u32::MAX),
        // x87, SSE, AVX, AVX-512, PKRU: what fits the 4096 bytes of KVM_GET_XSAVE.
        (0xD, 0, Eax, bits(&[0, 1, 2, 5, 6, 7, 9])),
        // XSAVES stays (it is how Linux saves), without any supervisor state.
        (0xD, 1, Eax, bits(&[0, 1, 2, 3])),
        (0xD, 1, Ecx, 0),
        // kvmclock (both), no delay for port writes, send IPI, stable clock. Not: asynchronous page faults and stolen
        // time (KVM writes to memory without a running vCPU), what depends on stolen time, PV EOI, extended MSI
        // destinations.
        (0x4000_0001, 0, Eax, bits(&[0, 1, 3, 11, 24])),
        (0x4000_0001, 0, Edx, 0),
        // Not: SVM, IBS, SKINIT, WDT, LWP, NodeId, performance counters, MWAITX.
        (
            0x8000_0001,
            0,
            Ecx,
            !(bits(&[2, 3, 10, 12, 13, 15, 19, 23, 24, 27, 28, 29])),
        ),
        (0x8000_0001, 0, Edx, u32::MAX),
        // An invariant TSC would make guests trust it for years across hosts whose crystals differ; kvmclock corrects.
        (0x8000_0007, 0, Edx, 0),
        (0x8000_0008, 0, Ebx, u32::MAX),
        (0x8000_0021, 0, Eax, u32::MAX),
    ]
};

/// Leaves that are left out: thermal details beside ARAT, SGX, PT, AMX tiles, performance counters, topology (made anew), SVM, IBS, LWP,
/// memory encryption, quality of service, AMD's performance monitoring, Centaur.
const DROPPED: &[std::ops::RangeInclusive<u32>] = &[
    0x2..=0x3,
    0x5..=0x5,
    0x9..=0xB,
    0xF..=0x1F,
    0x20..=0x3FFF_FFFF,
    0x4000_0002..=0x7FFF_FFFF,
    0x8000_000A..=0x8000_0018,
    0x8000_001B..=0x8000_001C,
    0x8000_001F..=0x8000_0020,
    0x8000_0022..=0xFFFF_FFFF,
];

const fn bits(positions: &[u32]) -> u32 {
    let (mut mask, mut index) = (0, 0);
    while index < positions.len() {
        mask |= 1 << positions[index];
        index += 1;
    }
    mask
}

/// For a register of feature bits, those that may be shown.
fn mask(leaf: u32, subleaf: u32, register: Register) -> Option<u32> {
    FEATURES
        .iter()
        .find(|(l, s, r, _)| (*l, *s, *r) == (leaf, subleaf, register))
        .map(|(.., mask)| *mask)
}

const REGISTERS: [Register; 4] = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx];

impl CpuBaseline {
    /// The most that this host can give to a guest.
    pub fn of_host(kvm: &Kvm) -> Result<Self, KvmError> {
        let supported = kvm
            .device()
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("reading the supported CPU features"))?;
        let mut leaves: Vec<CpuidLeaf> = supported
            .as_slice()
            .iter()
            .filter(|entry| !DROPPED.iter().any(|range| range.contains(&entry.function)))
            .map(filtered)
            .filter(|leaf| leaf.leaf != 0xD || leaf.subleaf < 2 || is_kept_xsave_state(leaf.subleaf))
            .collect();
        leaves.sort_by_key(|leaf| (leaf.leaf, leaf.subleaf));
        leaves.dedup_by_key(|leaf| (leaf.leaf, leaf.subleaf));
        for leaf in &mut leaves {
            match leaf.leaf {
                // The highest leaf of each range that is left.
                0x0 => leaf.registers[0] = leaf.registers[0].min(0xD),
                0x8000_0000 => leaf.registers[0] = leaf.registers[0].min(0x8000_0021),
                0x1 if kvm.capabilities().tsc_deadline => leaf.registers[2] |= 1 << 24,
                _ => {}
            }
        }
        Ok(Self {
            leaves,
            tsc_khz: host_tsc_khz(kvm)?,
        })
    }

    /// The answers to CPUID, in order.
    pub(crate) fn leaves(&self) -> &[CpuidLeaf] {
        &self.leaves
    }

    fn find(&self, leaf: u32, subleaf: u32) -> Option<&CpuidLeaf> {
        self.leaves
            .iter()
            .find(|entry| (entry.leaf, entry.subleaf) == (leaf, subleaf))
    }

    fn register(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.find(leaf, subleaf)
            .map_or(0, |entry| entry.registers[register as usize])
    }

    /// Bits of a guest physical address.
    pub fn physical_address_bits(&self) -> u32 {
        self.register(0x8000_0008, 0, Register::Eax) & 0xFF
    }

    fn vendor(&self) -> String {
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

    /// The complete answers for vCPU `index` of `count`: one package, a core each, APIC IDs as numbered.
    pub(crate) fn for_vcpu(&self, index: u8, count: u8) -> Result<CpuId, KvmError> {
        let mut entries: Vec<kvm_cpuid_entry2> = self
            .leaves
            .iter()
            .map(|leaf| {
                let mut registers = leaf.registers;
                number_vcpu(leaf, &mut registers, index, count);
                entry(leaf.leaf, leaf.subleaf, leaf.indexed, registers)
            })
            .collect();
        if self.register(0, 0, Register::Eax) >= 0xB {
            let (bits, count) = (apic_id_bits(count), u32::from(count));
            let index = u32::from(index);
            // Threads, of which a core has one, then cores.
            entries.push(entry(0xB, 0, true, [0, 1, 0x100, index]));
            entries.push(entry(0xB, 1, true, [bits, count, 0x201, index]));
            entries.push(entry(0xB, 2, true, [0, 0, 2, index]));
        }
        CpuId::from_entries(&entries).map_err(|_| KvmError::Short {
            what: "setting the CPU's features",
            done: KVM_MAX_CPUID_ENTRIES,
            asked: entries.len(),
        })
    }
}

/// Bits of an APIC ID that number the vCPUs of one package.
fn apic_id_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

fn entry(function: u32, index: u32, indexed: bool, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    let flags = if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Fills in what differs between vCPUs or depends on their number.
fn number_vcpu(leaf: &CpuidLeaf, registers: &mut [u32; 4], index: u8, count: u8) {
    let [eax, ebx, ecx, edx] = registers;
    let (index, count) = (u32::from(index), u32::from(count));
    match leaf.leaf {
        0x1 => {
            // Initial APIC ID, number of logical CPUs, cache line size kept; HTT if there are several; hypervisor.
            *ebx = (*ebx & 0xFF00) | (index << 24) | (count << 16);
            *ecx |= 1 << 31;
            *edx = (*edx & !(1 << 28)) | (u32::from(count > 1) << 28);
        }
        // Cores of the package; every cache but the last level belongs to one core.
        0x4 if *eax & 0x1F != 0 => {
            let shared = if (*eax >> 5) & 7 >= 3 {
                count.next_power_of_two() - 1
            } else {
                0
            };
            *eax = (*eax & 0x3FFF) | (shared << 14) | ((count.next_power_of_two() - 1) << 26);
        }
        // Number of cores less one, bits of the APIC ID.
        0x8000_0008 => *ecx = (count - 1) | (apic_id_bits(count as u8) << 12),
        0x8000_001D if *eax & 0x1F != 0 => {
            let shared = if (*eax >> 5) & 7 >= 3 { count - 1 } else { 0 };
            *eax = (*eax & 0x3FFF) | (shared << 14);
        }
        0x8000_001E => *registers = [index, index, 0, 0],
        _ => {}
    }
}

/// One answer of KVM without what is not shown.
fn filtered(entry: &kvm_cpuid_entry2) -> CpuidLeaf {
    let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    let subleaf = if indexed { entry.index } else { 0 };
    let mut registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
    for register in REGISTERS {
        if let Some(mask) = mask(entry.function, subleaf, register) {
            registers[register as usize] &= mask;
        }
    }
    if entry.function == 0x6 {
        registers = [registers[0], 0, 0, 0];
    }
    match (entry.function, subleaf) {
        // Numbers of the physical CPU that answered: filled in for each vCPU.
        (0x1, _) => registers[1] &= 0xFF00,
        (0x8000_001E, _) => registers = [0; 4],
        // Sizes of the save area: KVM computes them for the state that is turned on.
        (0xD, 0) => registers[1] = 0,
        (0xD, 1) => (registers[1], registers[3]) = (0, 0),
        _ => {}
    }
    CpuidLeaf {
        leaf: entry.function,
        subleaf,
        indexed,
        registers,
    }
}

fn is_kept_xsave_state(subleaf: u32) -> bool {
    subleaf < 32 && mask(0xD, 0, Register::Eax).is_some_and(|mask| mask & (1 << subleaf) != 0)
}

/// Whether two frequencies are within the tolerance.
pub(crate) fn tsc_alike(one_khz: u32, other_khz: u32) -> bool {
    u64::from(one_khz.abs_diff(other_khz)) * 1_000_000 <= u64::from(one_khz) * TSC_TOLERANCE_PPM
}

/// The frequency that a vCPU's TSC has by default, from a vCPU made for the purpose.
fn host_tsc_khz(kvm: &Kvm) -> Result<u32, KvmError> {
    let vm = kvm
        .device()
        .create_vm()
        .map_err(refused("creating a virtual machine"))?;
    let vcpu = vm.create_vcpu(0).map_err(refused("creating a vCPU"))?;
    vcpu.get_tsc_khz().map_err(refused("reading the TSC frequency"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuBaseline {
        CpuBaseline::of_host(&Kvm::open().expect("KVM")).expect("baseline")
    }

    fn leaf_of(baseline: &mut CpuBaseline, leaf: u32, subleaf: u32) -> &mut CpuidLeaf {
        baseline
            .leaves
            .iter_mut()
            .find(|entry| (entry.leaf, entry.subleaf) == (leaf, subleaf))
            .expect("leaf")
    }

    #[test]
    fn a_host_provides_its_own_baseline() {
        let host = host();
        assert_eq!(host.check(&host, false), Ok(()));
        assert_eq!(host.intersect(&host).as_ref(), Ok(&host));
        assert!(host.tsc_khz > 100_000);
        let text = serde_json::to_string(&host).expect("JSON");
        assert_eq!(serde_json::from_str::<CpuBaseline>(&text).expect("JSON"), host);
    }

    /// What a seat offers on this host, and what of a guest's CPU it can't give: by its name, before anything is copied.
    #[test]
    fn what_a_seat_cant_give_is_named() {
        let host = host();
        let offer = CpuOffer {
            host: host.clone(),
            machine: host.clone(),
            tsc_scaling: false,
        };
        assert_eq!(offer.check(&host), Ok(()));

        // A feature that this host lacks, whichever that is: of leaf 7, where no host has all.
        let mut more = host.clone();
        let leaf = leaf_of(&mut more, 7, 0);
        let shown = mask(7, 0, Register::Ecx).expect("features");
        let bit = (shown & !leaf.registers[2]).trailing_zeros();
        leaf.registers[2] |= 1 << bit;
        let name = feature_name(7, 0, Register::Ecx, bit);
        let refused = offer.check(&more).expect_err("this host has no such feature");
        assert_eq!(refused, CpuError::Feature { feature: name.clone() });
        assert!(refused.to_string().contains(&name), "{refused}");

        // This host has it, but one of the machines was made without it.
        let mut less = host.clone();
        let leaf = leaf_of(&mut less, 1, 0);
        let bit = (leaf.registers[2] & mask(1, 0, Register::Ecx).expect("features")).trailing_zeros();
        leaf.registers[2] &= !(1 << bit);
        let feature = feature_name(1, 0, Register::Ecx, bit);
        let reduced = CpuOffer {
            machine: less.clone(),
            ..offer.clone()
        };
        assert_eq!(
            reduced.check(&host),
            Err(CpuError::NotGiven {
                feature: feature.clone()
            })
        );
        assert_eq!(offer.check(&less), Err(CpuError::Beyond { feature }));

        let mut faster = host.clone();
        faster.tsc_khz = host.tsc_khz / 1000 * 1001;
        assert!(matches!(offer.check(&faster), Err(CpuError::TscFrequency { .. })));
        let scaling = CpuOffer {
            tsc_scaling: true,
            ..offer.clone()
        };
        assert_eq!(scaling.check(&faster), Ok(()));

        let mut model = host.clone();
        leaf_of(&mut model, 1, 0).registers[0] ^= 0x10;
        assert!(matches!(offer.check(&model), Err(CpuError::Leaf { leaf: 1, .. })));
        model.leaves = vec![model.leaves[0]; 5000];
        assert!(matches!(offer.check(&model), Err(CpuError::TooLarge { leaves: 5000 })));
    }

    /// CPUID tells on which physical CPU it was asked; a baseline must not.
    #[test]
    fn the_baseline_is_the_same_on_every_cpu_of_a_host() {
        let baselines: Vec<CpuBaseline> = (0..std::thread::available_parallelism().map_or(1, usize::from))
            .map(|cpu| {
                let pinned = std::thread::spawn(move || {
                    let mut set = rustix::thread::CpuSet::new();
                    set.set(cpu);
                    // A CPU that this process may not use says nothing.
                    rustix::thread::sched_setaffinity(None, &set).ok().map(|()| host())
                });
                pinned.join().expect("thread")
            })
            .chain([Some(host())])
            .flatten()
            .collect();
        assert!(baselines.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn what_can_not_be_replicated_is_hidden() {
        let host = host();
        assert_eq!(host.register(1, 0, Register::Ecx) & bits(&[5, 30]), 0, "vmx, rdrand");
        assert_eq!(
            host.register(7, 0, Register::Ebx) & bits(&[18, 4, 11]),
            0,
            "rdseed, tsx"
        );
        assert_eq!(host.register(0x8000_0001, 0, Register::Ecx) & bits(&[2]), 0, "svm");
        assert_eq!(
            host.register(0x4000_0001, 0, Register::Eax) & bits(&[4, 5]),
            0,
            "async page faults, steal time"
        );
        assert!(host.find(0xA, 0).is_none(), "performance counters");
    }

    #[test]
    fn a_feature_that_one_host_lacks_is_named_and_left_out_of_the_intersection() {
        let rich = host();
        let mut poor = rich.clone();
        let (leaf, register) = (1, Register::Edx);
        assert_ne!(
            rich.register(leaf, 0, register) & (1 << 26),
            0,
            "SSE2 is part of x86-64"
        );
        leaf_of(&mut poor, leaf, 0).registers[register as usize] &= !(1 << 26);
        let error = rich.check(&poor, false).expect_err("lacks SSE2");
        assert_eq!(
            error,
            CpuError::Feature {
                feature: "sse2 (CPUID leaf 0x1.0 Edx bit 26)".into()
            }
        );
        assert_eq!(poor.check(&rich, false), Ok(()));
        for common in [
            rich.intersect(&poor).expect("alike"),
            poor.intersect(&rich).expect("alike"),
        ] {
            assert_eq!(common.check(&rich, false), Ok(()));
            assert_eq!(common.check(&poor, false), Ok(()));
        }
    }

    #[test]
    fn other_vendor_other_clock_and_absurd_baselines_are_refused() {
        let host = host();
        let mut other = host.clone();
        leaf_of(&mut other, 0, 0).registers[1] ^= 1;
        assert!(matches!(host.check(&other, false), Err(CpuError::Vendor { .. })));
        let mut fast = host.clone();
        fast.tsc_khz += fast.tsc_khz / 1000;
        assert!(matches!(fast.check(&host, false), Err(CpuError::TscFrequency { .. })));
        assert_eq!(fast.check(&host, true), Ok(()));
        fast.tsc_khz = host.tsc_khz + host.tsc_khz / 5000;
        assert_eq!(fast.check(&host, false), Ok(()));
        let mut absurd = host.clone();
        absurd.leaves = vec![host.leaves[0]; 1000];
        assert!(matches!(absurd.check(&host, false), Err(CpuError::TooLarge { .. })));
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        let host = host();
        for index in [0u8, 3] {
            let cpuid = host.for_vcpu(index, 4).expect("cpuid");
            let one = cpuid
                .as_slice()
                .iter()
                .find(|entry| entry.function == 1)
                .expect("leaf 1");
            assert_eq!((one.ebx >> 24, (one.ebx >> 16) & 0xFF), (index.into(), 4));
            assert_ne!(one.ecx & (1 << 31), 0, "hypervisor");
        }
    }
}
