//! 64-bit ELF kernels with a PVH entry point: `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`
//! of Xen.

use super::memory_map::memory_map;
use super::{
    BootError, BootSource, CMDLINE_ADDRESS, Entry, KERNEL_MIN_ADDRESS, MAX_CMDLINE_BYTES, acpi, copy_file, cpu,
    low_ram_end, write,
};
use crate::memory::{GuestMem, GuestRam};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use std::os::unix::fs::FileExt;

const START_INFO_ADDRESS: u64 = 0x6000;
const MODULES_ADDRESS: u64 = 0x6100;
const MEMORY_MAP_ADDRESS: u64 = 0x6200;
const START_INFO_MAGIC: u32 = 0x336E_C578;

/// Sizes and values of the ELF-64 format (System V ABI, chapter 4).
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Bounds against hostile files.
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// The note that holds the PVH entry point: name "Xen", this type, four or eight bytes.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Loads the kernel, and a start info that tells it what it wants to know.
pub(super) fn load(ram: &GuestRam, source: &BootSource) -> Result<Entry, BootError> {
    let segments = read_program_headers(source)?;
    let entry = find_entry(source, &segments)?
        .ok_or_else(|| source.not_a_kernel("the ELF file has no PVH entry point (note of type 18 by \"Xen\")"))?;
    let mut kernel_end = 0;
    for segment in segments
        .iter()
        .filter(|segment| segment.kind == PT_LOAD && segment.memory_bytes > 0)
    {
        let end = load_segment(ram, source, segment)?;
        kernel_end = kernel_end.max(end);
    }
    if !(KERNEL_MIN_ADDRESS..kernel_end).contains(&u64::from(entry)) {
        return Err(source.not_a_kernel(format!("its entry point {entry:#x} lies outside what is loaded")));
    }
    source.load_cmdline(ram.mem(), MAX_CMDLINE_BYTES)?;
    let initrd = source.load_initrd(ram, kernel_end, u64::MAX)?;
    write_start_info(ram, initrd)?;
    let entry = Entry::Pvh {
        eip: entry,
        start_info: START_INFO_ADDRESS as u32,
    };
    cpu::prepare(ram.mem(), &entry)?;
    Ok(entry)
}

fn read_program_headers(source: &BootSource) -> Result<Vec<Segment>, BootError> {
    let mut header = [0; HEADER_BYTES];
    source
        .kernel
        .read_exact_at(&mut header, 0)
        .map_err(|error| source.kernel_unreadable(error))?;
    let (class, order, machine) = (header[4], header[5], u16_at(&header, 18));
    if (class, order, machine) != (CLASS_64, LITTLE_ENDIAN, MACHINE_X86_64) {
        return Err(source.not_a_kernel("the ELF file is not one for x86-64"));
    }
    let (offset, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER_BYTES || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(source.not_a_kernel("the ELF file's program headers make no sense"));
    }
    let mut bytes = vec![0; usize::from(count) * PROGRAM_HEADER_BYTES];
    source
        .kernel
        .read_exact_at(&mut bytes, offset)
        .map_err(|error| source.kernel_unreadable(error))?;
    let segment = |bytes: &[u8]| Segment {
        kind: u32_at(bytes, 0),
        offset: u64_at(bytes, 8),
        address: u64_at(bytes, 24),
        file_bytes: u64_at(bytes, 32),
        memory_bytes: u64_at(bytes, 40),
    };
    Ok(bytes.chunks_exact(PROGRAM_HEADER_BYTES).map(segment).collect())
}

/// Copies one segment and clears the rest of it; returns its end.
fn load_segment(ram: &GuestRam, source: &BootSource, segment: &Segment) -> Result<u64, BootError> {
    if segment.address < KERNEL_MIN_ADDRESS || segment.file_bytes > segment.memory_bytes {
        return Err(source.not_a_kernel("a segment of the ELF file lies below 1 MiB or is larger than itself"));
    }
    let end = segment
        .address
        .checked_add(segment.memory_bytes)
        .ok_or_else(|| source.not_a_kernel("a segment of the ELF file overflows"))?;
    if end > low_ram_end(ram) {
        return Err(source.no_room(ram, end));
    }
    copy_file(
        ram.mem(),
        &source.kernel,
        segment.offset,
        segment.address,
        segment.file_bytes,
        |error| source.kernel_unreadable(error),
    )?;
    clear(ram.mem(), segment.address + segment.file_bytes, end)?;
    Ok(end)
}

fn clear(mem: &GuestMem, start: u64, end: u64) -> Result<(), BootError> {
    let zeroes = [0; 64 << 10];
    let mut at = start;
    while at < end {
        let piece = zeroes.len().min((end - at) as usize);
        write(mem, at, &zeroes[..piece])?;
        at += piece as u64;
    }
    Ok(())
}

/// Looks for the note with the entry point.
fn find_entry(source: &BootSource, segments: &[Segment]) -> Result<Option<u32>, BootError> {
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        if segment.file_bytes > MAX_NOTE_BYTES {
            return Err(source.not_a_kernel("a note segment of the ELF file is larger than 64 KiB"));
        }
        let mut notes = vec![0; segment.file_bytes as usize];
        source
            .kernel
            .read_exact_at(&mut notes, segment.offset)
            .map_err(|error| source.kernel_unreadable(error))?;
        if let Some(entry) = entry_in(&notes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Notes are: lengths of name and content, type (four bytes each), name, content, both padded to four bytes.
fn entry_in(mut notes: &[u8]) -> Option<u32> {
    while notes.len() >= 12 {
        let (name_bytes, content_bytes, kind) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8));
        let content_at = 12 + (name_bytes as usize).checked_next_multiple_of(4)?;
        let name = notes.get(12..12usize.checked_add(name_bytes as usize)?)?;
        let content = notes.get(content_at..content_at.checked_add(content_bytes as usize)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" && content.len() >= 4 {
            return Some(u32_at(content, 0));
        }
        notes = notes.get(content_at + (content_bytes as usize).checked_next_multiple_of(4)?..)?;
    }
    None
}

/// The bytes of one of the structures below.
fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: only used for PVH's structures, which consist of integers without padding between or behind them.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn write_start_info(ram: &GuestRam, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let mem = ram.mem();
    let map = memory_map(ram.layout());
    let mut info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE_ADDRESS,
        rsdp_paddr: acpi::TABLES_START,
        memmap_paddr: MEMORY_MAP_ADDRESS,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some((paddr, size)) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES_ADDRESS;
        write(
            mem,
            MODULES_ADDRESS,
            bytes_of(&hvm_modlist_entry {
                paddr,
                size,
                ..Default::default()
            }),
        )?;
    }
    for (slot, range) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.size_bytes,
            type_: range.kind as u32,
            reserved: 0,
        };
        let address = MEMORY_MAP_ADDRESS + (slot * size_of::<hvm_memmap_table_entry>()) as u64;
        write(mem, address, bytes_of(&entry))?;
    }
    write(mem, START_INFO_ADDRESS, bytes_of(&info))
}
