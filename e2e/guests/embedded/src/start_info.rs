//! What the loader tells: the PVH start-of-day structure (`hvm_start_info`, Xen's public/arch-x86/hvm/start_info.h).

use core::ptr::read_unaligned;

const MAGIC: u32 = 0x336E_C578;
const COMMAND_LINE_BYTES: usize = 1024;
const MAX_RANGES: usize = 32;
const RAM: u32 = 1;

// SAFETY: boot.s defines it as one word, and stores the loader's EBX there before any Rust runs.
unsafe extern "C" {
    static start_info_address: u64;
}

#[repr(C)]
struct HvmStartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// A range of physical addresses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

/// A copy of what the loader gave, so that its memory may be reused.
pub struct StartInfo {
    command_line: [u8; COMMAND_LINE_BYTES],
    command_line_bytes: usize,
    ram: [Range; MAX_RANGES],
    ram_ranges: usize,
    /// Physical address of the ACPI root pointer, if the loader knows it.
    pub rsdp: Option<u64>,
}

impl StartInfo {
    /// Copies the structure that the loader left. A wrong one ends the guest: nothing could go on without memory.
    pub fn read() -> Self {
        // SAFETY: boot.s stored the loader's EBX there; the PVH contract says that it is the structure's address, below
        // 4 GiB, and all of that is mapped. The magic is checked before anything else is believed.
        let info = unsafe { &*(start_info_address as *const HvmStartInfo) };
        assert!(
            info.magic == MAGIC,
            "EBX does not point to hvm_start_info: found {:#x}",
            info.magic
        );
        assert!(
            info.version >= 1,
            "hvm_start_info version {} has no memory map",
            info.version
        );
        let mut copy = Self {
            command_line: [0; COMMAND_LINE_BYTES],
            command_line_bytes: 0,
            ram: [Range::default(); MAX_RANGES],
            ram_ranges: 0,
            rsdp: Some(info.rsdp_paddr).filter(|&address| address != 0),
        };
        if info.cmdline_paddr != 0 {
            copy.copy_command_line(info.cmdline_paddr);
        }
        for entry in 0..u64::from(info.memmap_entries) {
            // SAFETY: the loader vouches for so many entries at this address.
            let entry = unsafe {
                read_unaligned(
                    (info.memmap_paddr + entry * size_of::<MemoryMapEntry>() as u64) as *const MemoryMapEntry,
                )
            };
            if entry.kind == RAM && copy.ram_ranges < MAX_RANGES {
                copy.ram[copy.ram_ranges] = Range {
                    start: entry.address,
                    end: entry.address.saturating_add(entry.size),
                };
                copy.ram_ranges += 1;
            }
        }
        copy
    }

    fn copy_command_line(&mut self, address: u64) {
        while self.command_line_bytes < COMMAND_LINE_BYTES {
            // SAFETY: the loader vouches for a string that ends with 0 at this address; reading stops there.
            let byte = unsafe { ((address + self.command_line_bytes as u64) as *const u8).read() };
            if byte == 0 {
                break;
            }
            self.command_line[self.command_line_bytes] = byte;
            self.command_line_bytes += 1;
        }
    }

    /// The command line; what is not UTF-8 ends it.
    pub fn command_line(&self) -> &str {
        let bytes = &self.command_line[..self.command_line_bytes];
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        }
    }

    /// The ranges of RAM.
    pub fn ram(&self) -> &[Range] {
        &self.ram[..self.ram_ranges]
    }
}
