//! CPUs as KVM has them: what this host can give ([`cpu_of_host`]), and a baseline as one vCPU gets it.

use super::{Kvm, KvmError, refused};
use ftvm_cpu::{CpuBaseline, CpuidLeaf, Register};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

/// The most that this host can give to a guest.
///
/// # Errors
/// If KVM refuses to tell.
pub fn cpu_of_host(kvm: &Kvm) -> Result<CpuBaseline, KvmError> {
    let supported = kvm
        .device()
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("reading the supported CPU features"))?;
    let mut leaves: Vec<CpuidLeaf> = supported.as_slice().iter().map(leaf_of_entry).collect();
    if kvm.capabilities().tsc_deadline {
        let leaf_1 = leaves.iter_mut().filter(|leaf| leaf.leaf == 0x1);
        leaf_1.for_each(|leaf| leaf.registers[2] |= 1 << 24);
    }
    Ok(CpuBaseline::of_supported(leaves, host_tsc_khz(kvm)?))
}

fn leaf_of_entry(entry: &kvm_cpuid_entry2) -> CpuidLeaf {
    let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    CpuidLeaf {
        leaf: entry.function,
        subleaf: if indexed { entry.index } else { 0 },
        indexed,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    }
}

/// The complete answers for vCPU `index` of `count`: one package, a core each, APIC IDs as numbered.
pub(crate) fn cpuid_of_vcpu(baseline: &CpuBaseline, index: u8, count: u8) -> Result<CpuId, KvmError> {
    let mut entries: Vec<kvm_cpuid_entry2> = baseline
        .leaves()
        .iter()
        .map(|leaf| {
            let mut registers = leaf.registers;
            number_vcpu(leaf, &mut registers, index, count);
            entry(leaf.leaf, leaf.subleaf, leaf.indexed, registers)
        })
        .collect();
    if baseline.register(0, 0, Register::Eax) >= 0xB {
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
        cpu_of_host(&Kvm::open().expect("KVM")).expect("baseline")
    }

    #[test]
    fn a_host_provides_its_own_baseline() {
        let host = host();
        assert_eq!(host.check(&host, false), Ok(()));
        assert_eq!(host.intersect(&host).as_ref(), Ok(&host));
        assert!(host.tsc_khz > 100_000);
        let text = serde_json::to_string(&host).expect("JSON");
        assert_eq!(serde_json::from_str::<CpuBaseline>(&text).expect("JSON"), host);
        let text = host.to_text();
        assert_eq!(CpuBaseline::from_text(&text).as_ref(), Ok(&host), "{text}");
        assert!(text.len() < 4096, "{} bytes", text.len());
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
        assert_eq!(
            host.register(1, 0, Register::Ecx) & (1 << 5 | 1 << 30),
            0,
            "vmx, rdrand"
        );
        assert_eq!(
            host.register(7, 0, Register::Ebx) & (1 << 18 | 1 << 4 | 1 << 11),
            0,
            "rdseed, tsx"
        );
        assert_eq!(host.register(0x8000_0001, 0, Register::Ecx) & (1 << 2), 0, "svm");
        assert_eq!(
            host.register(0x4000_0001, 0, Register::Eax) & (1 << 4 | 1 << 5),
            0,
            "async page faults, steal time"
        );
        assert!(host.find(0xA, 0).is_none(), "performance counters");
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        let host = host();
        for index in [0u8, 3] {
            let cpuid = cpuid_of_vcpu(&host, index, 4).expect("cpuid");
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
