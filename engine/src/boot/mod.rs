//! Putting a kernel into guest memory and pointing the first vCPU at it, as firmware and boot loader would.
//!
//! Two kinds of kernel: a Linux bzImage by the 64-bit boot protocol (`Documentation/arch/x86/boot.rst`), and a 64-bit
//! ELF file with a PVH entry point (Xen's `docs/misc/pvh.pandoc`). The kernel's own file says which it is.
//!
//! ```text
//!   0x0500 GDT   0x6000 PVH start info, modules, memory map   0x7000 Linux's zero page   0x9000 page tables (64-bit)
//!   0x20000 command line   0x9FC00 … reserved … 0xE0000 ACPI tables   1 MiB kernel …   … initrd, at the end of low RAM
//! ```

pub mod acpi;
mod bzimage;
mod cpu;
mod elf;
mod memory_map;

pub use cpu::{Entry, set_up_first_vcpu, set_up_memory_types};
pub use memory_map::{MemoryRange, RangeKind, memory_map};

use crate::memory::{GuestMem, GuestRam, LOW_RAM_END, PAGE_SIZE};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

/// Where the command line lies.
const CMDLINE_ADDRESS: u64 = 0x2_0000;
/// Most bytes of a command line, with the zero at the end (what Linux takes at most on x86).
pub const MAX_CMDLINE_BYTES: usize = 2048;
/// Kernels lie above everything that this module writes.
const KERNEL_MIN_ADDRESS: u64 = 0x10_0000;
/// Magic bytes.
const ELF_MAGIC: &[u8; 4] = b"\x7fELF";
const BZIMAGE_MAGIC: &[u8; 4] = b"HdrS";
const BZIMAGE_MAGIC_AT: u64 = 0x202;

/// What to boot. The files stay open: a guest reset reads them again.
#[derive(Debug)]
pub struct BootSource {
    /// A bzImage, or an ELF file with a PVH note.
    pub kernel: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// Command line.
    pub cmdline: String,
    /// Name of the kernel in messages.
    pub kernel_name: String,
    /// Name of the initrd in messages.
    pub initrd_name: String,
}

/// Why a kernel can't be booted.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the texts say it
pub enum BootError {
    #[error(
        "kernel {name}: it is neither a Linux bzImage nor a 64-bit ELF file with a PVH entry point ({why}): give the file that the distribution installs as /boot/vmlinuz-VERSION, or a vmlinux with CONFIG_PVH"
    )]
    NotAKernel { name: String, why: String },
    #[error("kernel {name}: it needs guest memory up to {} MiB, the guest has {} MiB below 3 GiB: give the guest more memory", needed >> 20, available >> 20)]
    NoRoomForKernel { name: String, needed: u64, available: u64 },
    #[error(
        "initrd {name}: {size_bytes} bytes do not fit into the {available} bytes between the kernel and {} MiB: give the guest more memory or use a smaller initrd",
        limit >> 20
    )]
    InitrdTooLarge {
        name: String,
        size_bytes: u64,
        available: u64,
        limit: u64,
    },
    #[error("initrd {name}: the file is empty: give a complete initrd, or none")]
    InitrdEmpty { name: String },
    #[error("command line: {length} bytes are more than the {limit} that the kernel takes: shorten it")]
    CmdlineTooLong { length: usize, limit: usize },
    #[error("command line: it contains a zero byte")]
    CmdlineZero,
    #[error("{what} {name} can't be read")]
    Read {
        what: &'static str,
        name: String,
        source: io::Error,
    },
    #[error("guest memory at {address:#x} can't be written while booting: the machine's memory is too small")]
    Memory { address: u64 },
}

/// Loads kernel, initrd, command line and tables; returns where the first vCPU begins.
pub fn load(ram: &GuestRam, source: &BootSource, vcpus: u8) -> Result<Entry, BootError> {
    let mem = ram.mem();
    write(mem, acpi::TABLES_START, &acpi::tables(vcpus))?;
    let mut head = [0; 0x206];
    let length = read_at_most(&source.kernel, &mut head).map_err(|error| source.kernel_unreadable(error))?;
    if length >= 4 && head[..4] == *ELF_MAGIC {
        return elf::load(ram, source);
    }
    if length == head.len() && head[BZIMAGE_MAGIC_AT as usize..] == *BZIMAGE_MAGIC {
        return bzimage::load(ram, source);
    }
    let why = match length {
        0 => "the file is empty".to_string(),
        _ => format!("it begins with {:02x?}", &head[..length.min(4)]),
    };
    Err(source.not_a_kernel(why))
}

impl BootSource {
    fn not_a_kernel(&self, why: impl Into<String>) -> BootError {
        BootError::NotAKernel {
            name: self.kernel_name.clone(),
            why: why.into(),
        }
    }

    fn kernel_unreadable(&self, source: io::Error) -> BootError {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return self.not_a_kernel("the file ends before its header says");
        }
        BootError::Read {
            what: "kernel",
            name: self.kernel_name.clone(),
            source,
        }
    }

    fn no_room(&self, ram: &GuestRam, needed: u64) -> BootError {
        BootError::NoRoomForKernel {
            name: self.kernel_name.clone(),
            needed,
            available: low_ram_end(ram),
        }
    }

    /// Writes the command line with its zero byte.
    fn load_cmdline(&self, mem: &GuestMem, limit: usize) -> Result<(), BootError> {
        let limit = limit.min(MAX_CMDLINE_BYTES - 1);
        let mut bytes = self.cmdline.clone().into_bytes();
        if bytes.len() > limit {
            return Err(BootError::CmdlineTooLong {
                length: bytes.len(),
                limit,
            });
        }
        if bytes.contains(&0) {
            return Err(BootError::CmdlineZero);
        }
        bytes.push(0);
        write(mem, CMDLINE_ADDRESS, &bytes)
    }

    /// Puts the initrd as high as it may lie below `limit`, above `kernel_end`; returns address and size.
    fn load_initrd(&self, ram: &GuestRam, kernel_end: u64, limit: u64) -> Result<Option<(u64, u64)>, BootError> {
        let Some(file) = &self.initrd else { return Ok(None) };
        let unreadable = |source| BootError::Read {
            what: "initrd",
            name: self.initrd_name.clone(),
            source,
        };
        let size_bytes = file.metadata().map_err(unreadable)?.len();
        if size_bytes == 0 {
            return Err(BootError::InitrdEmpty {
                name: self.initrd_name.clone(),
            });
        }
        let limit = limit.min(low_ram_end(ram));
        let available = limit.saturating_sub(kernel_end.next_multiple_of(PAGE_SIZE as u64));
        let address = limit.saturating_sub(size_bytes) & !(PAGE_SIZE as u64 - 1);
        if size_bytes > available || address < kernel_end {
            return Err(BootError::InitrdTooLarge {
                name: self.initrd_name.clone(),
                size_bytes,
                available,
                limit,
            });
        }
        copy_file(ram.mem(), file, 0, address, size_bytes, unreadable)?;
        Ok(Some((address, size_bytes)))
    }
}

/// End of the RAM that lies below the hole.
fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.layout().size_bytes().min(LOW_RAM_END)
}

fn write(mem: &GuestMem, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(address))
        .map_err(|_| BootError::Memory { address })
}

/// Reads from the beginning of a file as much as there is.
fn read_at_most(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// Copies part of a file into guest memory, in pieces; the caller has checked that the guest has the memory.
fn copy_file(
    mem: &GuestMem,
    file: &File,
    offset: u64,
    address: u64,
    length: u64,
    unreadable: impl Fn(io::Error) -> BootError,
) -> Result<(), BootError> {
    let mut buffer = vec![0; (1usize << 20).min(length as usize)];
    let mut done = 0;
    while done < length {
        let piece = buffer.len().min((length - done) as usize);
        file.read_exact_at(&mut buffer[..piece], offset + done)
            .map_err(&unreadable)?;
        write(mem, address + done, &buffer[..piece])?;
        done += piece as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
