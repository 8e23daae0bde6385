//! The bytes of a vCPU's state.
//!
//! Version 1: KVM's structures one after the other without gaps: `kvm_mp_state`, `kvm_regs`, `kvm_sregs2`, `kvm_xcrs`,
//! `kvm_debugregs`, `kvm_vcpu_events`, `kvm_lapic_state`; TSC offset, TSC deadline, address of kvmclock's wall clock
//! (u64 each); TSC frequency in kHz, number of MSRs (u32 each); that many `kvm_msr_entry`; 4096 bytes of XSAVE.

use super::MsrList;
use crate::kvm::ioctl::Abi;
use crate::kvm::tsc_alike;
use crate::state::{Section, StateError};
use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};

/// Versions of the layout above.
pub struct VcpuStateVersion;

impl VcpuStateVersion {
    /// What this program writes and reads.
    pub const CURRENT: u16 = 1;
}

/// Words of XSAVE that KVM_GET_XSAVE gives.
const XSAVE_WORDS: usize = 1024;
/// Registers of the local APIC: initial and current count of the timer (Intel SDM volume 3, 12.5.4).
const APIC_TMICT: usize = 0x380;
const APIC_TMCCT: usize = 0x390;

/// A vCPU's state, checked as far as that is possible without KVM.
#[derive(Clone)]
pub struct VcpuState {
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs2,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debugregs: kvm_debugregs,
    pub(super) events: kvm_vcpu_events,
    pub(super) lapic: kvm_lapic_state,
    pub(super) time: VcpuTime,
    pub(super) wall_clock: u64,
    /// Frequency of the TSC that the guest was told.
    pub(super) tsc_khz: u32,
    pub(super) msrs: Vec<kvm_msr_entry>,
    pub(super) xsave: Box<[u32; XSAVE_WORDS]>,
}

/// What of a vCPU's state is bound to the host's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuTime {
    /// The guest's TSC less the host's.
    pub tsc_offset: u64,
    /// When the local APIC's timer fires, in the guest's TSC; 0 if it is not armed.
    pub tsc_deadline: u64,
}

/// The counts of a local APIC's timer.
#[derive(Debug, Clone, Copy)]
pub(super) struct ApicTimer {
    initial: [u8; 4],
    current: [u8; 4],
}

impl ApicTimer {
    /// Takes the counts out of a local APIC and leaves it with a timer that stands.
    pub(super) fn take(lapic: &mut kvm_lapic_state) -> Self {
        let mut take = |at: usize| {
            let field = &mut lapic.regs[at..at + 4];
            let bytes = [field[0] as u8, field[1] as u8, field[2] as u8, field[3] as u8];
            field.fill(0);
            bytes
        };
        Self {
            initial: take(APIC_TMICT),
            current: take(APIC_TMCCT),
        }
    }

    /// Puts the counts back.
    pub(super) fn put(&self, lapic: &mut kvm_lapic_state) {
        for (at, bytes) in [(APIC_TMICT, self.initial), (APIC_TMCCT, self.current)] {
            for (field, byte) in lapic.regs[at..at + 4].iter_mut().zip(bytes) {
                *field = byte as _;
            }
        }
    }
}

/// Appends all parts.
pub(super) fn encode(out: &mut Vec<u8>, parts: &[&[u8]]) {
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// Takes fields off the front of a section.
struct Fields<'a> {
    section: Section<'a>,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize, what: &str) -> Result<&'a [u8], StateError> {
        let (bytes, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or_else(|| self.section.invalid(format!("it ends before or in {what}")))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn abi<T: Abi>(&mut self, what: &str) -> Result<T, StateError> {
        let bytes = self.bytes(T::SIZE, what)?;
        Ok(T::from_bytes(bytes).expect("as many bytes as the type has"))
    }

    fn u64(&mut self, what: &str) -> Result<u64, StateError> {
        Ok(u64::from_le_bytes(
            self.bytes(8, what)?.try_into().expect("eight bytes"),
        ))
    }

    fn u32(&mut self, what: &str) -> Result<u32, StateError> {
        Ok(u32::from_le_bytes(self.bytes(4, what)?.try_into().expect("four bytes")))
    }
}

impl VcpuState {
    /// Checks a section: complete, made for a CPU with the same registers, and with a TSC that this host can give: one that
    /// runs like the machine's `tsc_khz` (hosts measure theirs, so that equal ones differ by some kHz), or any with `scaling`.
    pub fn parse(section: Section<'_>, msrs: &MsrList, tsc_khz: u32, scaling: bool) -> Result<Self, StateError> {
        let mut fields = Fields {
            section,
            rest: section.bytes,
        };
        let mp_state = fields.abi("the MP state")?;
        let regs = fields.abi("the registers")?;
        let sregs = fields.abi("the special registers")?;
        let xcrs = fields.abi("XCR0")?;
        let debugregs = fields.abi("the debug registers")?;
        let events = fields.abi("the events")?;
        let lapic = fields.abi("the local APIC")?;
        let time = VcpuTime {
            tsc_offset: fields.u64("the TSC offset")?,
            tsc_deadline: fields.u64("the TSC deadline")?,
        };
        let wall_clock = fields.u64("the wall clock's address")?;
        let khz = fields.u32("the TSC frequency")?;
        if khz == 0 || !(scaling || tsc_alike(khz, tsc_khz)) {
            return Err(section.invalid(format!(
                "its TSC runs at {khz} kHz, that of this host at {tsc_khz} kHz, and its KVM can't scale it: use like hosts"
            )));
        }
        let msrs = parse_msrs(&mut fields, msrs)?;
        let xsave = fields.bytes(XSAVE_WORDS * 4, "the extended registers")?;
        if !fields.rest.is_empty() {
            return Err(section.invalid(format!("{} bytes follow its last field", fields.rest.len())));
        }
        let mut words = Box::new([0; XSAVE_WORDS]);
        for (word, bytes) in words.iter_mut().zip(xsave.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xcrs,
            debugregs,
            events,
            lapic,
            time,
            wall_clock,
            tsc_khz: khz,
            msrs,
            xsave: words,
        })
    }
}

fn parse_msrs(fields: &mut Fields<'_>, known: &MsrList) -> Result<Vec<kvm_msr_entry>, StateError> {
    let count = fields.u32("the number of MSRs")? as usize;
    let section = fields.section;
    if count != known.indices().len() {
        let here = known.indices().len();
        return Err(section.invalid(format!(
            "it has {count} MSRs, this host {here}: use the same kernel and like CPUs on both hosts"
        )));
    }
    let mut entries = Vec::with_capacity(count);
    for &index in known.indices() {
        let entry: kvm_msr_entry = fields.abi("the MSRs")?;
        if entry.index != index || entry.reserved != 0 {
            return Err(section.invalid(format!(
                "it has MSR {:#x} where this host has {index:#x}: use the same kernel and like CPUs on both hosts",
                entry.index
            )));
        }
        entries.push(entry);
    }
    Ok(entries)
}
