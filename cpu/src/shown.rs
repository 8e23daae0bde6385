//! What of a CPU is shown to guests.

use crate::{CpuBaseline, CpuidLeaf, REGISTERS};

/// One register of CPUID's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the registers' names
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
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
pub(crate) fn mask(leaf: u32, subleaf: u32, register: Register) -> Option<u32> {
    FEATURES
        .iter()
        .find(|(l, s, r, _)| (*l, *s, *r) == (leaf, subleaf, register))
        .map(|(.., mask)| *mask)
}

impl CpuBaseline {
    /// What may be shown to a guest of all that a host supports; frequency in kHz.
    pub fn of_supported(supported: impl IntoIterator<Item = CpuidLeaf>, tsc_khz: u32) -> CpuBaseline {
        let mut leaves: Vec<CpuidLeaf> = supported
            .into_iter()
            .filter(|leaf| !DROPPED.iter().any(|range| range.contains(&leaf.leaf)))
            .filter(|leaf| leaf.leaf != 0xD || leaf.subleaf < 2 || is_kept_xsave_state(leaf.subleaf))
            .map(filtered)
            .collect();
        leaves.sort_by_key(|leaf| (leaf.leaf, leaf.subleaf));
        leaves.dedup_by_key(|leaf| (leaf.leaf, leaf.subleaf));
        for leaf in &mut leaves {
            match leaf.leaf {
                // The highest leaf of each range that is left.
                0x0 => leaf.registers[0] = leaf.registers[0].min(0xD),
                0x8000_0000 => leaf.registers[0] = leaf.registers[0].min(0x8000_0021),
                _ => {}
            }
        }
        CpuBaseline { leaves, tsc_khz }
    }
}

/// One answer without what is not shown.
fn filtered(leaf: CpuidLeaf) -> CpuidLeaf {
    let CpuidLeaf {
        leaf,
        subleaf,
        indexed,
        mut registers,
    } = leaf;
    for register in REGISTERS {
        if let Some(mask) = mask(leaf, subleaf, register) {
            registers[register as usize] &= mask;
        }
    }
    if leaf == 0x6 {
        registers = [registers[0], 0, 0, 0];
    }
    match (leaf, subleaf) {
        // Numbers of the physical CPU that answered: filled in for each vCPU.
        (0x1, _) => registers[1] &= 0xFF00,
        (0x8000_001E, _) => registers = [0; 4],
        // Sizes of the save area: KVM computes them for the state that is turned on.
        (0xD, 0) => registers[1] = 0,
        (0xD, 1) => (registers[1], registers[3]) = (0, 0),
        _ => {}
    }
    CpuidLeaf {
        leaf,
        subleaf,
        indexed,
        registers,
    }
}

fn is_kept_xsave_state(subleaf: u32) -> bool {
    subleaf < 32 && mask(0xD, 0, Register::Eax).is_some_and(|mask| mask & (1 << subleaf) != 0)
}
