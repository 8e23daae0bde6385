//! Names of CPU features for messages, as Linux shows them in /proc/cpuinfo.

use crate::Register;

/// (leaf, subleaf, register, bit, name)
const NAMES: &[(u32, u32, Register, u32, &str)] = {
    use Register::{Eax, Ebx, Ecx, Edx};
    &[
        (0x1, 0, Ecx, 0, "sse3"),
        (0x1, 0, Ecx, 1, "pclmulqdq"),
        (0x1, 0, Ecx, 9, "ssse3"),
        (0x1, 0, Ecx, 12, "fma"),
        (0x1, 0, Ecx, 13, "cx16"),
        (0x1, 0, Ecx, 17, "pcid"),
        (0x1, 0, Ecx, 19, "sse4_1"),
        (0x1, 0, Ecx, 20, "sse4_2"),
        (0x1, 0, Ecx, 21, "x2apic"),
        (0x1, 0, Ecx, 22, "movbe"),
        (0x1, 0, Ecx, 23, "popcnt"),
        (0x1, 0, Ecx, 24, "tsc_deadline_timer"),
        (0x1, 0, Ecx, 25, "aes"),
        (0x1, 0, Ecx, 26, "xsave"),
        (0x1, 0, Ecx, 28, "avx"),
        (0x1, 0, Ecx, 29, "f16c"),
        (0x1, 0, Ecx, 30, "rdrand"),
        (0x1, 0, Edx, 0, "fpu"),
        (0x1, 0, Edx, 4, "tsc"),
        (0x1, 0, Edx, 6, "pae"),
        (0x1, 0, Edx, 8, "cx8"),
        (0x1, 0, Edx, 9, "apic"),
        (0x1, 0, Edx, 16, "pat"),
        (0x1, 0, Edx, 19, "clflush"),
        (0x1, 0, Edx, 23, "mmx"),
        (0x1, 0, Edx, 25, "sse"),
        (0x1, 0, Edx, 26, "sse2"),
        (0x7, 0, Ebx, 0, "fsgsbase"),
        (0x7, 0, Ebx, 3, "bmi1"),
        (0x7, 0, Ebx, 5, "avx2"),
        (0x7, 0, Ebx, 7, "smep"),
        (0x7, 0, Ebx, 8, "bmi2"),
        (0x7, 0, Ebx, 9, "erms"),
        (0x7, 0, Ebx, 10, "invpcid"),
        (0x7, 0, Ebx, 16, "avx512f"),
        (0x7, 0, Ebx, 17, "avx512dq"),
        (0x7, 0, Ebx, 18, "rdseed"),
        (0x7, 0, Ebx, 19, "adx"),
        (0x7, 0, Ebx, 20, "smap"),
        (0x7, 0, Ebx, 23, "clflushopt"),
        (0x7, 0, Ebx, 24, "clwb"),
        (0x7, 0, Ebx, 28, "avx512cd"),
        (0x7, 0, Ebx, 29, "sha_ni"),
        (0x7, 0, Ebx, 30, "avx512bw"),
        (0x7, 0, Ebx, 31, "avx512vl"),
        (0x7, 0, Ecx, 2, "umip"),
        (0x7, 0, Ecx, 3, "pku"),
        (0x7, 0, Ecx, 8, "gfni"),
        (0x7, 0, Ecx, 9, "vaes"),
        (0x7, 0, Ecx, 10, "vpclmulqdq"),
        (0x7, 0, Ecx, 11, "avx512_vnni"),
        (0x7, 0, Ecx, 16, "la57"),
        (0x7, 0, Ecx, 22, "rdpid"),
        (0x7, 0, Edx, 26, "spec_ctrl"),
        (0x7, 0, Edx, 29, "arch_capabilities"),
        (0x7, 1, Eax, 4, "avx_vnni"),
        (0xD, 0, Eax, 1, "xsave state sse"),
        (0xD, 0, Eax, 2, "xsave state avx"),
        (0xD, 0, Eax, 5, "xsave state avx512 opmask"),
        (0xD, 0, Eax, 9, "xsave state pkru"),
        (0xD, 1, Eax, 0, "xsaveopt"),
        (0xD, 1, Eax, 1, "xsavec"),
        (0xD, 1, Eax, 3, "xsaves"),
        (0x4000_0001, 0, Eax, 0, "kvmclock"),
        (0x4000_0001, 0, Eax, 3, "kvmclock (new)"),
        (0x4000_0001, 0, Eax, 24, "kvmclock stable"),
        (0x8000_0001, 0, Ecx, 5, "abm (lzcnt)"),
        (0x8000_0001, 0, Ecx, 6, "sse4a"),
        (0x8000_0001, 0, Ecx, 22, "topoext"),
        (0x8000_0001, 0, Edx, 11, "syscall"),
        (0x8000_0001, 0, Edx, 20, "nx"),
        (0x8000_0001, 0, Edx, 26, "pdpe1gb"),
        (0x8000_0001, 0, Edx, 27, "rdtscp"),
        (0x8000_0001, 0, Edx, 29, "lm"),
        (0x8000_0008, 0, Ebx, 0, "clzero"),
        (0x8000_0008, 0, Ebx, 12, "ibpb"),
        (0x8000_0008, 0, Ebx, 14, "ibrs"),
        (0x8000_0008, 0, Ebx, 15, "stibp"),
        (0x8000_0008, 0, Ebx, 24, "ssbd"),
    ]
};

/// The feature's name, or where its bit is.
pub(crate) fn feature_name(leaf: u32, subleaf: u32, register: Register, bit: u32) -> String {
    let place = format!("CPUID leaf {leaf:#x}.{subleaf} {register:?} bit {bit}");
    NAMES
        .iter()
        .find(|(l, s, r, b, _)| (*l, *s, *r, *b) == (leaf, subleaf, register, bit))
        .map_or_else(|| place.clone(), |(.., name)| format!("{name} ({place})"))
}
