//! Linux bzImage by the 64-bit boot protocol, `Documentation/arch/x86/boot.rst`.

use super::memory_map::memory_map;
use super::{
    BootError, BootSource, CMDLINE_ADDRESS, Entry, KERNEL_MIN_ADDRESS, acpi, copy_file, cpu, low_ram_end, write,
};
use crate::memory::GuestRam;
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use std::os::unix::fs::FileExt;

const ZERO_PAGE_ADDRESS: u64 = 0x7000;
/// Where the header begins in the file.
const HEADER_AT: u64 = 0x1F1;
/// Oldest protocol that tells whether there is a 64-bit entry (Linux 3.8).
const MIN_PROTOCOL: u16 = 0x020C;
/// `xloadflags`: the kernel has the 64-bit entry at 0x200.
const HAS_ENTRY_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// `loadflags`: loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// "Boot loader without a number of its own".
const LOADER_UNDEFINED: u8 = 0xFF;
const SECTOR: u64 = 512;

/// Loads the kernel and what it wants to know.
pub(super) fn load(ram: &GuestRam, source: &BootSource) -> Result<Entry, BootError> {
    let mem = ram.mem();
    let header = read_header(source)?;
    // Packed fields: copied out before use.
    let (pref_address, init_size, initrd_addr_max, cmdline_size) = (
        header.pref_address,
        header.init_size,
        header.initrd_addr_max,
        header.cmdline_size,
    );
    let setup_sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let setup_bytes = (setup_sectors + 1) * SECTOR;
    let file_bytes = source
        .kernel
        .metadata()
        .map_err(|error| source.kernel_unreadable(error))?
        .len();
    let kernel_bytes = file_bytes
        .checked_sub(setup_bytes)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| source.not_a_kernel("the file ends before its header says"))?;
    if pref_address < KERNEL_MIN_ADDRESS {
        return Err(source.not_a_kernel("it wants to lie below 1 MiB"));
    }
    let kernel_end = pref_address
        .checked_add(kernel_bytes.max(init_size.into()))
        .ok_or_else(|| source.not_a_kernel("its size overflows"))?;
    if kernel_end > low_ram_end(ram) {
        return Err(source.no_room(ram, kernel_end));
    }
    copy_file(mem, &source.kernel, setup_bytes, pref_address, kernel_bytes, |error| {
        source.kernel_unreadable(error)
    })?;
    source.load_cmdline(mem, cmdline_size as usize)?;
    let initrd = source.load_initrd(ram, kernel_end, u64::from(initrd_addr_max) + 1)?;
    write(mem, ZERO_PAGE_ADDRESS, &zero_page(ram, header, initrd))?;
    let entry = Entry::Linux64 {
        rip: pref_address + ENTRY_64,
        zero_page: ZERO_PAGE_ADDRESS,
    };
    cpu::prepare(mem, &entry)?;
    Ok(entry)
}

fn read_header(source: &BootSource) -> Result<setup_header, BootError> {
    let mut bytes = [0; size_of::<setup_header>()];
    source
        .kernel
        .read_exact_at(&mut bytes, HEADER_AT)
        .map_err(|error| source.kernel_unreadable(error))?;
    // SAFETY: a packed structure of integers, for which any bytes are a value, and the buffer has its size.
    let header: setup_header = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) };
    let (version, xloadflags) = (header.version, header.xloadflags);
    if version < MIN_PROTOCOL {
        return Err(source.not_a_kernel(format!(
            "boot protocol {}.{:02}, at least 2.12 (Linux 3.8) is needed",
            version >> 8,
            version & 0xFF
        )));
    }
    if header.loadflags & LOADED_HIGH == 0 || xloadflags & HAS_ENTRY_64 == 0 {
        return Err(source.not_a_kernel("it is a 32-bit kernel: use one for x86-64"));
    }
    Ok(header)
}

/// The page that tells the kernel about machine, command line and initrd.
fn zero_page(ram: &GuestRam, header: setup_header, initrd: Option<(u64, u64)>) -> Vec<u8> {
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE_ADDRESS as u32;
    if let Some((address, size_bytes)) = initrd {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size_bytes as u32;
    }
    params.acpi_rsdp_addr = acpi::TABLES_START;
    let map = memory_map(ram.layout());
    params.e820_entries = map.len() as u8;
    for (slot, range) in map.iter().enumerate() {
        params.e820_table[slot] = boot_e820_entry {
            addr: range.start,
            size: range.size_bytes,
            r#type: range.kind as u32,
        };
    }
    // SAFETY: a packed structure of integers has no padding, so all its bytes are initialised.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const params).cast::<u8>(), size_of::<boot_params>()) };
    bytes.to_vec()
}
