//! State of the first vCPU at its first instruction.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::{BootError, GDT_START, write_all};
use crate::memory::GuestMem;

/// Where the first vCPU begins; the others wait for INIT and SIPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BspStart {
    /// 32-bit protected mode without paging, EBX points to the start info.
    Pvh {
        /// EIP.
        entry: u32,
        /// EBX.
        start_info: u32,
    },
    /// Long mode with an identity map of the first 4 GiB, RSI points to the zero page.
    Linux64 {
        /// RIP.
        entry: u64,
        /// RSI.
        zero_page: u64,
        /// CR3.
        page_tables: u64,
    },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// null, null, code, data, TSS. The code descriptor is replaced for 32-bit entry by what the vCPU has loaded.
const GDT: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];

pub(super) fn write_gdt(mem: &GuestMem) -> Result<(), BootError> {
    let bytes: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write_all(mem, GDT_START, &bytes)
}

/// PML4, PDPT and four page directories of 2 MiB pages at `at`: the first 4 GiB, identity.
pub(super) fn write_page_tables(mem: &GuestMem, at: u64) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    write_all(mem, at, &((at + 0x1000) | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..4u64 {
        let directory = at + 0x2000 + gib * 0x1000;
        write_all(
            mem,
            at + 0x1000 + gib * 8,
            &(directory | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        let entries = (0..512u64).map(|entry| ((gib << 30) + (entry << 21)) | PRESENT_WRITABLE | LARGE);
        let bytes: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        write_all(mem, directory, &bytes)?;
    }
    Ok(())
}

fn segment(selector: u16, type_: u8, long: bool, system: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if system { 0x67 } else { 0xffff_ffff },
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long && !system),
        s: u8::from(!system),
        l: u8::from(long),
        g: u8::from(!system),
        ..Default::default()
    }
}

impl BspStart {
    /// Registers at the first instruction, on top of those of a vCPU after reset.
    pub fn apply(&self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        const CODE: u8 = 0xb;
        const DATA: u8 = 0x3;
        const TSS: u8 = 0xb;
        let long = matches!(self, BspStart::Linux64 { .. });
        sregs.gdt.base = GDT_START;
        sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cs = segment(CODE_SELECTOR, CODE, long, false);
        let data = segment(DATA_SELECTOR, DATA, false, false);
        for slot in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *slot = data;
        }
        sregs.tr = segment(TSS_SELECTOR, TSS, false, true);
        // Bit 1 of RFLAGS is always set; interrupts are off.
        *regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        match *self {
            BspStart::Pvh { entry, start_info } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
                regs.rip = u64::from(entry);
                regs.rbx = u64::from(start_info);
            }
            BspStart::Linux64 {
                entry,
                zero_page,
                page_tables,
            } => {
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = page_tables;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                regs.rip = entry;
                regs.rsi = zero_page;
            }
        }
    }
}
