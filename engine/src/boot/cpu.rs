//! Registers of the first vCPU where a kernel takes over.

use super::{BootError, write};
use crate::kvm::{KvmError, failed, ioctl, refused};
use crate::memory::{GuestMem, HIGH_RAM_START, LOW_RAM_END, PAGE_SIZE};
use crate::vcpu::VcpuCore;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs2};

const GDT_ADDRESS: u64 = 0x500;
/// Page tables of the 64-bit entry: one PML4, one table of directory pointers, four directories.
const PAGE_TABLES_ADDRESS: u64 = 0x9000;
const DIRECTORIES: u64 = 4;

/// Selectors that Linux's boot protocol names.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 2;

/// How and where the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Linux's 64-bit entry: long mode, the first 4 GiB mapped to themselves, RSI at the zero page.
    Linux64 {
        /// Where to begin.
        rip: u64,
        /// The zero page.
        zero_page: u64,
    },
    /// PVH: 32-bit protected mode without paging, EBX at the start info.
    Pvh {
        /// Where to begin.
        eip: u32,
        /// The start info.
        start_info: u32,
    },
}

/// A flat segment; `kind` as in a descriptor's type field.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// A busy 32-bit (or, in long mode, 64-bit) TSS that nobody uses; the CPU demands one.
fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: 11,
        present: 1,
        ..Default::default()
    }
}

/// A segment as an entry of the descriptor table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xFFFF) | (limit >> 16) << 48 | (segment.base & 0xFF_FFFF) << 16 | (segment.base >> 24) << 56 | flags << 40
}

/// Writes descriptor table and page tables for the entry.
pub(super) fn prepare(mem: &GuestMem, entry: &Entry) -> Result<(), BootError> {
    let long = matches!(entry, Entry::Linux64 { .. });
    let table = [
        0,
        0,
        descriptor(&segment(CODE_SELECTOR, 11, long)),
        descriptor(&segment(DATA_SELECTOR, 3, false)),
        descriptor(&task_segment()),
        0,
    ];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write(mem, GDT_ADDRESS, &bytes)?;
    if !long {
        return Ok(());
    }
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let page = |index: u64| PAGE_TABLES_ADDRESS + index * PAGE_SIZE as u64;
    let mut tables = vec![0u64; (2 + DIRECTORIES as usize) * PAGE_SIZE / 8];
    tables[0] = page(1) | PRESENT_WRITABLE;
    for directory in 0..DIRECTORIES {
        tables[PAGE_SIZE / 8 + directory as usize] = page(2 + directory) | PRESENT_WRITABLE;
    }
    for (index, slot) in tables[2 * PAGE_SIZE / 8..].iter_mut().enumerate() {
        *slot = (index as u64) << 21 | PRESENT_WRITABLE | LARGE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write(mem, PAGE_TABLES_ADDRESS, &bytes)
}

/// Sets the registers of a vCPU that is in its power-on state.
pub fn set_up_first_vcpu(vcpu: &VcpuCore, entry: &Entry) -> Result<(), KvmError> {
    let mut sregs = ioctl::get_sregs2(vcpu.fd()).map_err(failed("reading special registers"))?;
    let mut regs = kvm_regs {
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    let long = match *entry {
        Entry::Linux64 { rip, zero_page } => {
            regs.rip = rip;
            regs.rsi = zero_page;
            true
        }
        Entry::Pvh { eip, start_info } => {
            regs.rip = eip.into();
            regs.rbx = start_info.into();
            false
        }
    };
    set_segments(&mut sregs, long);
    ioctl::set_sregs2(vcpu.fd(), &sregs).map_err(failed("setting special registers"))?;
    vcpu.fd().set_regs(&regs).map_err(refused("setting registers"))
}

/// Sets the memory types of a vCPU as firmware would (Intel SDM volume 3, 12.11): everything write-back, the last GiB
/// below 4 GiB, where devices are, uncached. Without them Linux does without PAT.
pub fn set_up_memory_types(vcpu: &VcpuCore, physical_address_bits: u32) -> Result<(), KvmError> {
    const MTRR_PHYS_BASE_0: u32 = 0x200;
    const MTRR_PHYS_MASK_0: u32 = 0x201;
    const MTRR_DEF_TYPE: u32 = 0x2FF;
    const VALID: u64 = 1 << 11;
    const ENABLE: u64 = 3 << 10;
    const WRITE_BACK: u64 = 6;
    const UNCACHED: u64 = 0;
    let addresses = (1u64 << physical_address_bits.clamp(36, 52)) - 1;
    let mask = addresses & !(HIGH_RAM_START - LOW_RAM_END - 1);
    vcpu.set_msr(MTRR_PHYS_BASE_0, LOW_RAM_END | UNCACHED)?;
    vcpu.set_msr(MTRR_PHYS_MASK_0, mask | VALID)?;
    vcpu.set_msr(MTRR_DEF_TYPE, ENABLE | WRITE_BACK)
}

fn set_segments(sregs: &mut kvm_sregs2, long: bool) {
    let data = segment(DATA_SELECTOR, 3, false);
    sregs.cs = segment(CODE_SELECTOR, 11, long);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task_segment();
    sregs.gdt.base = GDT_ADDRESS;
    sregs.gdt.limit = 6 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    if long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = PAGE_TABLES_ADDRESS;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_manual_says() {
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 11, true)), 0x00AF_9B00_0000_FFFF);
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 11, false)), 0x00CF_9B00_0000_FFFF);
        assert_eq!(descriptor(&segment(DATA_SELECTOR, 3, false)), 0x00CF_9300_0000_FFFF);
        assert_eq!(descriptor(&task_segment()), 0x0000_8B00_0000_0067);
    }
}
