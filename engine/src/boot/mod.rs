//! Puts a kernel, its initrd, its command line and the firmware tables into guest memory.
//!
//! ```text
//!   0x500    GDT                       0x9000   page tables (64-bit entry): the first 4 GiB, identity
//!   0x6000   PVH start info            0x20000  command line
//!   0x7000   Linux zero page           0xE0000  ACPI tables
//!   1 MiB    kernel …                  … initrd at the top of low RAM
//! ```
//!
//! Two ways in: an ELF with a PVH note is entered in 32-bit protected mode (Xen's `docs/misc/pvh.pandoc`), a bzImage at
//! its 64-bit entry (the kernel's `Documentation/arch/x86/boot.rst`).
//!
//! Invariant: the RAM is zero before [`load`]; a reset clears it first, so a second boot sees what the first one saw.

pub mod acpi;
mod start;

pub use start::BspStart;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::memory::{GuestMem, GuestRam, HIGH_RAM_START, LOW_RAM_END};

/// Where the GDT of the first vCPU is.
pub const GDT_START: u64 = 0x500;
const PVH_INFO: u64 = 0x6000;
const PVH_MODULES: u64 = 0x6040;
const PVH_MEMMAP: u64 = 0x6080;
const ZERO_PAGE: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
/// Longest command line, with its final zero byte: what x86 Linux takes.
pub const CMDLINE_BYTES_MAX: usize = 2048;
const LOW_MEMORY_END: u64 = 0x9_FC00;
/// Where a kernel may be loaded.
pub const KERNEL_START: u64 = 0x10_0000;

const E820_RAM: u32 = 1;
const PVH_MAGIC: u32 = 0x336e_c578;
const XLF_KERNEL_64: u16 = 1;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 2;

/// Why a guest can't be booted. The texts name the image by its role; the caller knows the path.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither ELF nor bzImage.
    #[error(
        "kernel: not a kernel image ({size_bytes} bytes, begins with {begin:02x?}): give a bzImage (such as /boot/vmlinuz-…) \
         or an ELF with a PVH note"
    )]
    NotAKernel {
        /// Size of the file.
        size_bytes: u64,
        /// Its first bytes.
        begin: [u8; 4],
    },
    /// An ELF without the note.
    #[error(
        "kernel: the ELF has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY): build the kernel with CONFIG_PVH, or give its bzImage"
    )]
    NoPvhNote,
    /// A bzImage without 64-bit entry.
    #[error("kernel: the bzImage has no 64-bit entry point: a 32-bit kernel can't be booted here, give an x86-64 one")]
    Not64Bit,
    /// The loader refused the image.
    #[error(
        "kernel: the image is damaged or does not fit the guest's memory ({ram_mib} MiB): check the file, or give the guest more memory"
    )]
    Image {
        /// Guest memory.
        ram_mib: u64,
        /// What the loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// A file can't be read.
    #[error("{what}: can't be read")]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// No room for the initrd.
    #[error(
        "initrd: {size_mib} MiB do not fit between the kernel (which needs memory up to {kernel_end_mib} MiB) and the end of the \
         guest's low memory at {limit_mib} MiB: give the guest more memory or a smaller initrd"
    )]
    InitrdTooLarge {
        /// Size of the initrd.
        size_mib: u64,
        /// End of what the kernel needs.
        kernel_end_mib: u64,
        /// Upper bound.
        limit_mib: u64,
    },
    /// Too long a command line.
    #[error("command line: {0} bytes, the kernel takes {max}", max = CMDLINE_BYTES_MAX - 1)]
    CmdlineTooLong(usize),
    /// A byte that a command line can't have.
    #[error("command line: contains a zero byte")]
    CmdlineZero,
    /// Too little memory for the tables of the firmware.
    #[error("guest memory: {0:#x} can't be written; the guest needs at least 2 MiB of RAM")]
    Memory(u64, #[source] vm_memory::GuestMemoryError),
    /// A guest can't have that many vCPUs.
    #[error("vCPUs: {0} asked for, 1 to {max} are possible", max = acpi::VCPUS_MAX)]
    Vcpus(u32),
}

/// What is booted.
pub struct BootSource<'a> {
    /// A bzImage or an ELF with a PVH note.
    pub kernel: &'a mut File,
    /// The initial RAM disk.
    pub initrd: Option<&'a mut File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Number of vCPUs; their APIC ids are 0 to n-1.
    pub vcpus: u32,
}

/// Loads everything into zeroed RAM and says where the first vCPU begins.
pub fn load(ram: &GuestRam, source: BootSource<'_>) -> Result<BspStart, BootError> {
    let mem = ram.mem();
    let low_end = LOW_RAM_END.min(ram.layout().size_bytes());
    write_cmdline(mem, source.cmdline)?;
    let rsdp = acpi::write_tables(mem, source.vcpus)?;
    let kernel = load_kernel(mem, source.kernel, low_end)?;
    let initrd = match source.initrd {
        Some(file) => Some(load_initrd(mem, file, &kernel, low_end)?),
        None => None,
    };
    let boot = Boot {
        mem,
        memory_map: memory_map(ram),
        rsdp,
        initrd,
        cmdline_bytes: source.cmdline.len() as u32,
    };
    match kernel {
        Kernel::Pvh { entry, .. } => boot.pvh(entry),
        Kernel::Linux64 { load, header, .. } => boot.linux64(load, header),
    }
}

fn write_all(mem: &GuestMem, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    let written = mem.write_slice(bytes, GuestAddress(address));
    written.map_err(|source| BootError::Memory(address, source))
}

fn write_cmdline(mem: &GuestMem, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_BYTES_MAX {
        return Err(BootError::CmdlineTooLong(cmdline.len()));
    }
    if cmdline.as_bytes().contains(&0) {
        return Err(BootError::CmdlineZero);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write_all(mem, CMDLINE, &bytes)
}

/// RAM as (start, length).
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64)> {
    let size = ram.layout().size_bytes();
    let low_end = LOW_RAM_END.min(size);
    let mut map = vec![(0, LOW_MEMORY_END), (KERNEL_START, low_end - KERNEL_START)];
    if size > low_end {
        map.push((HIGH_RAM_START, size - low_end));
    }
    map
}

enum Kernel {
    Pvh {
        entry: u32,
        end: u64,
    },
    Linux64 {
        load: u64,
        header: setup_header,
        end: u64,
        initrd_max: u64,
    },
}

impl Kernel {
    /// First byte behind what the kernel needs before it knows of the initrd.
    fn end(&self) -> u64 {
        match self {
            Kernel::Pvh { end, .. } | Kernel::Linux64 { end, .. } => *end,
        }
    }
}

fn read_error(what: &'static str) -> impl FnOnce(std::io::Error) -> BootError {
    move |source| BootError::Read { what, source }
}

fn load_kernel(mem: &GuestMem, file: &mut File, low_end: u64) -> Result<Kernel, BootError> {
    let size_bytes = file.seek(SeekFrom::End(0)).map_err(read_error("kernel"))?;
    let mut begin = [0; 4];
    let mut magic = [0; 4];
    let not_a_kernel = |begin| BootError::NotAKernel { size_bytes, begin };
    if size_bytes < 0x300 {
        return Err(not_a_kernel(begin));
    }
    file.rewind().map_err(read_error("kernel"))?;
    file.read_exact(&mut begin).map_err(read_error("kernel"))?;
    file.seek(SeekFrom::Start(0x202)).map_err(read_error("kernel"))?;
    file.read_exact(&mut magic).map_err(read_error("kernel"))?;
    let image = |source| BootError::Image {
        ram_mib: low_end >> 20,
        source,
    };
    if begin == *b"\x7fELF" {
        let loaded = Elf::load(mem, None, file, Some(GuestAddress(0))).map_err(image)?;
        return pvh_kernel(&loaded);
    }
    if magic != *b"HdrS" {
        return Err(not_a_kernel(begin));
    }
    let start = Some(GuestAddress(KERNEL_START));
    let loaded = BzImage::load(mem, None, file, start).map_err(image)?;
    linux64_kernel(&loaded)
}

fn pvh_kernel(loaded: &KernelLoaderResult) -> Result<Kernel, BootError> {
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhNote);
    };
    Ok(Kernel::Pvh {
        entry: u32::try_from(entry.0).map_err(|_| BootError::NoPvhNote)?,
        end: loaded.kernel_end,
    })
}

fn linux64_kernel(loaded: &KernelLoaderResult) -> Result<Kernel, BootError> {
    let header = loaded.setup_header.ok_or(BootError::Not64Bit)?;
    // Version 2.12 brought xloadflags.
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Not64Bit);
    }
    let load = loaded.kernel_load.0;
    // The kernel unpacks itself at its preferred address or above where it lies, and needs init_size there.
    let base = load.max(header.pref_address);
    let end = (base + u64::from(header.init_size)).max(loaded.kernel_end);
    let above_4g = header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
    let initrd_max = if above_4g {
        u64::MAX
    } else {
        u64::from(header.initrd_addr_max) + 1
    };
    Ok(Kernel::Linux64 {
        load,
        header,
        end,
        initrd_max,
    })
}

/// Puts the initrd as high in low RAM as the kernel allows; gives its address and size.
fn load_initrd(mem: &GuestMem, file: &mut File, kernel: &Kernel, low_end: u64) -> Result<(u64, u64), BootError> {
    let size = file.seek(SeekFrom::End(0)).map_err(read_error("initrd"))?;
    file.rewind().map_err(read_error("initrd"))?;
    let limit = match kernel {
        Kernel::Linux64 { initrd_max, .. } => low_end.min(*initrd_max),
        Kernel::Pvh { .. } => low_end,
    };
    let start = limit.checked_sub(size).map(|start| start & !0xfff);
    let Some(start) = start.filter(|start| *start >= kernel.end()) else {
        return Err(BootError::InitrdTooLarge {
            size_mib: size.div_ceil(1 << 20),
            kernel_end_mib: kernel.end().div_ceil(1 << 20),
            limit_mib: limit >> 20,
        });
    };
    mem.read_exact_volatile_from(GuestAddress(start), file, size as usize)
        .map_err(|source| BootError::Memory(start, source))?;
    Ok((start, size))
}

/// The generated structures have no padding and any bit pattern is valid, but are foreign to `vm-memory`.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Plain<T>(T);

// SAFETY: `hvm_start_info` is repr(C), 56 bytes of integers without padding.
unsafe impl ByteValued for Plain<hvm_start_info> {}
// SAFETY: `hvm_modlist_entry` is repr(C), four u64.
unsafe impl ByteValued for Plain<hvm_modlist_entry> {}
// SAFETY: `hvm_memmap_table_entry` is repr(C), two u64 and two u32.
unsafe impl ByteValued for Plain<hvm_memmap_table_entry> {}
// SAFETY: `boot_params` is repr(C, packed) and made of integers and arrays of them.
unsafe impl ByteValued for Plain<boot_params> {}

struct Boot<'a> {
    mem: &'a GuestMem,
    memory_map: Vec<(u64, u64)>,
    rsdp: u64,
    initrd: Option<(u64, u64)>,
    cmdline_bytes: u32,
}

impl Boot<'_> {
    fn pvh(&self, entry: u32) -> Result<BspStart, BootError> {
        for (index, (addr, size)) in self.memory_map.iter().enumerate() {
            let entry = hvm_memmap_table_entry {
                addr: *addr,
                size: *size,
                type_: E820_RAM,
                reserved: 0,
            };
            let at = PVH_MEMMAP + (index * size_of::<hvm_memmap_table_entry>()) as u64;
            write_all(self.mem, at, Plain(entry).as_slice())?;
        }
        let mut info = hvm_start_info {
            magic: PVH_MAGIC,
            version: 1,
            cmdline_paddr: CMDLINE,
            rsdp_paddr: self.rsdp,
            memmap_paddr: PVH_MEMMAP,
            memmap_entries: self.memory_map.len() as u32,
            ..Default::default()
        };
        if let Some((paddr, size)) = self.initrd {
            let module = hvm_modlist_entry {
                paddr,
                size,
                ..Default::default()
            };
            write_all(self.mem, PVH_MODULES, Plain(module).as_slice())?;
            info.nr_modules = 1;
            info.modlist_paddr = PVH_MODULES;
        }
        write_all(self.mem, PVH_INFO, Plain(info).as_slice())?;
        start::write_gdt(self.mem)?;
        Ok(BspStart::Pvh {
            entry,
            start_info: PVH_INFO as u32,
        })
    }

    fn linux64(&self, load: u64, header: setup_header) -> Result<BspStart, BootError> {
        let mut params = boot_params {
            hdr: header,
            acpi_rsdp_addr: self.rsdp,
            e820_entries: self.memory_map.len() as u8,
            ..Default::default()
        };
        // "Undefined" boot loader; we load high.
        params.hdr.type_of_loader = 0xff;
        params.hdr.loadflags |= 1;
        params.hdr.cmd_line_ptr = CMDLINE as u32;
        params.hdr.cmdline_size = self.cmdline_bytes;
        if let Some((start, size)) = self.initrd {
            // Low RAM ends below 4 GiB.
            params.hdr.ramdisk_image = start as u32;
            params.hdr.ramdisk_size = size as u32;
        }
        let mut table = params.e820_table;
        for (entry, (addr, size)) in table.iter_mut().zip(&self.memory_map) {
            *entry = boot_e820_entry {
                addr: *addr,
                size: *size,
                r#type: E820_RAM,
            };
        }
        params.e820_table = table;
        write_all(self.mem, ZERO_PAGE, Plain(params).as_slice())?;
        start::write_gdt(self.mem)?;
        start::write_page_tables(self.mem, PAGE_TABLES)?;
        Ok(BspStart::Linux64 {
            // The 64-bit entry is 0x200 behind the start of the protected-mode kernel.
            entry: load + 0x200,
            zero_page: ZERO_PAGE,
            page_tables: PAGE_TABLES,
        })
    }
}

#[cfg(test)]
mod tests;
