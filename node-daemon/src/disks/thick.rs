//! Whether every block of a disk is allocated, and allocating those that are not.
//!
//! An extent that is allocated and not yet written (after fallocate) counts: nothing but its own disk can ever use it. `SEEK_HOLE`
//! calls it a hole, so the file system is asked with FIEMAP first (kernel documentation, filesystems/fiemap.rst), and only where it
//! does not know that by the number of blocks.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use ftvm_engine::zeroing::write_zeros;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::DiskError;

/// Extents that are asked for at a time.
const EXTENTS: usize = 128;
/// `FS_IOC_FIEMAP` (linux/fiemap.h).
const FIEMAP: libc::c_ulong = 0xC020_660B;

/// Magic number of btrfs (linux/magic.h).
const BTRFS: i64 = 0x9123_683e;
/// `FS_NOCOW_FL` (linux/fs.h): changes are written in place.
const IN_PLACE: libc::c_long = 0x0080_0000;

// Flags of an extent (linux/fiemap.h).
const LAST: u32 = 0x1;
const UNKNOWN: u32 = 0x2;
const DELAYED: u32 = 0x4;
const ENCODED: u32 = 0x8;
const INLINE: u32 = 0x200;
const SHARED: u32 = 0x2000;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved_64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with room for extents.
#[repr(C)]
struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// Length of a file or block device.
pub fn length(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// Whether it is a block device: nothing of it can be allocated by us.
pub fn is_device(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_block_device())
}

/// Checks that a disk has this size and all its blocks.
pub fn verify(file: &File, size_bytes: u64) -> Result<(), DiskError> {
    let found_bytes = length(file).map_err(DiskError::io("reading its size"))?;
    if found_bytes != size_bytes {
        return Err(DiskError::Size {
            found_bytes,
            size_bytes,
        });
    }
    if is_device(file).map_err(DiskError::io("looking at it"))? {
        return Ok(());
    }
    if is_btrfs(file)? && flags(file).map_err(DiskError::io("reading its flags"))? & IN_PLACE == 0 {
        return Err(DiskError::NotThick {
            at_bytes: 0,
            why: "is written elsewhere at every change (btrfs; without copy-on-write if the empty file is marked: chattr +C)",
        });
    }
    match first_gap(file, size_bytes).map_err(DiskError::io("asking for its extents"))? {
        Some(Ok(())) => Ok(()),
        Some(Err(gap)) => Err(DiskError::NotThick {
            at_bytes: gap.at_bytes,
            why: gap.why,
        }),
        None => count_blocks(file, size_bytes),
    }
}

/// For a file that is empty yet: changes are to be written in place. btrfs writes them elsewhere unless it is told so.
pub fn write_in_place(file: &File) -> Result<(), DiskError> {
    if !is_btrfs(file)? {
        return Ok(());
    }
    let flags = flags(file).map_err(DiskError::io("reading its flags"))? | IN_PLACE;
    // SAFETY: the request reads an integer (linux/fs.h) that outlives the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS as _, &raw const flags) } {
        0 => Ok(()),
        _ => Err(DiskError::io("switching copy-on-write off (chattr +C)")(
            io::Error::last_os_error(),
        )),
    }
}

fn is_btrfs(file: &File) -> Result<bool, DiskError> {
    let system =
        rustix::fs::fstatfs(file).map_err(|errno| DiskError::io("asking for its file system")(errno.into()))?;
    Ok(system.f_type == BTRFS)
}

fn flags(file: &File) -> io::Result<libc::c_long> {
    let mut flags = 0;
    // SAFETY: the request writes an integer (linux/fs.h) that outlives the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS as _, &raw mut flags) } {
        0 => Ok(flags),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The first place of a disk that is not its own.
struct Gap {
    at_bytes: u64,
    why: &'static str,
}

/// Where the first block is missing; none: the file system can't tell.
fn first_gap(file: &File, size_bytes: u64) -> io::Result<Option<Result<(), Gap>>> {
    let mut at_bytes = 0;
    while at_bytes < size_bytes {
        let Some(extents) = extents(file, at_bytes, size_bytes - at_bytes)? else {
            return Ok(None);
        };
        let gap = |at_bytes, why| Ok(Some(Err(Gap { at_bytes, why })));
        if extents.is_empty() {
            return gap(at_bytes, "is not allocated");
        }
        for extent in extents {
            if extent.logical > at_bytes {
                return gap(at_bytes, "is not allocated");
            }
            if let Some(why) = flaw(extent.flags) {
                return gap(at_bytes, why);
            }
            at_bytes = at_bytes.max(extent.logical.saturating_add(extent.length));
            if extent.flags & LAST != 0 && at_bytes < size_bytes {
                return gap(at_bytes, "is not allocated");
            }
        }
    }
    Ok(Some(Ok(())))
}

fn flaw(flags: u32) -> Option<&'static str> {
    if flags & (UNKNOWN | DELAYED) != 0 {
        return Some("is to be allocated later");
    }
    if flags & ENCODED != 0 {
        return Some("is compressed or encrypted by its file system, so that another content may need more room");
    }
    if flags & INLINE != 0 {
        return Some("has no block of its own");
    }
    (flags & SHARED != 0).then_some("is shared with another file (a copy by reference, a snapshot)")
}

/// Extents of a range, in order; none: this file system does not know FIEMAP.
fn extents(file: &File, start: u64, length: u64) -> io::Result<Option<Vec<Extent>>> {
    let mut map = Map {
        start,
        length,
        flags: 0,
        mapped: 0,
        count: EXTENTS as u32,
        reserved: 0,
        extents: [Extent::default(); EXTENTS],
    };
    // SAFETY: `map` is what the request reads and writes (linux/fiemap.h), with room for `count` extents, and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP as _, &raw mut map) };
    if result == 0 {
        let mapped = (map.mapped as usize).min(EXTENTS);
        return Ok(Some(map.extents[..mapped].to_vec()));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS | libc::EINVAL | libc::EBADR) => Ok(None),
        _ => Err(error),
    }
}

fn allocated_bytes(file: &File) -> Result<u64, DiskError> {
    let data = file
        .metadata()
        .map_err(DiskError::io("reading how much is allocated"))?;
    Ok(data.blocks().saturating_mul(512))
}

fn count_blocks(file: &File, size_bytes: u64) -> Result<(), DiskError> {
    let allocated_bytes = allocated_bytes(file)?;
    if allocated_bytes >= size_bytes {
        return Ok(());
    }
    Err(DiskError::NotThick {
        at_bytes: allocated_bytes,
        why: "is not allocated (counted in blocks)",
    })
}

/// Allocates what is not allocated yet, keeps what is there, and makes the disk this long; false if the file system knows no such
/// call. A disk for which there is no room is refused before any of the room is taken.
pub fn allocate(file: &File, size_bytes: u64) -> Result<bool, DiskError> {
    let missing_bytes = size_bytes.saturating_sub(allocated_bytes(file)?);
    let free_bytes = free_bytes(file)?;
    if missing_bytes > free_bytes {
        return Err(DiskError::NoRoom {
            missing_bytes,
            free_bytes,
        });
    }
    loop {
        return match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size_bytes) {
            Ok(()) => Ok(true),
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            // More than was free: reserved blocks, a quota, somebody else's writes.
            Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => Err(DiskError::NoRoom {
                missing_bytes,
                free_bytes,
            }),
            Err(errno) => Err(DiskError::io("allocating it")(errno.into())),
        };
    }
}

fn free_bytes(file: &File) -> Result<u64, DiskError> {
    let system = rustix::fs::fstatvfs(file).map_err(|errno| DiskError::io("reading what is free")(errno.into()))?;
    // Some report no sizes at all.
    Ok(match system.f_blocks {
        0 => u64::MAX,
        _ => system.f_bavail.saturating_mul(system.f_frsize),
    })
}

/// Makes a disk with contents thick and keeps them.
pub fn make(file: &File, size_bytes: u64) -> Result<(), DiskError> {
    if verify(file, size_bytes).is_ok() {
        return Ok(());
    }
    if !allocate(file, size_bytes)? {
        fill_holes(file, size_bytes).map_err(DiskError::write("filling its holes"))?;
    }
    file.sync_all().map_err(DiskError::write("making it durable"))?;
    verify(file, size_bytes)
}

/// Writes zeros where there is nothing.
fn fill_holes(file: &File, size_bytes: u64) -> io::Result<()> {
    let mut at = 0;
    while at < size_bytes {
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(at)) {
            Ok(hole) => hole.min(size_bytes),
            Err(Errno::NXIO) => size_bytes,
            Err(errno) => return Err(errno.into()),
        };
        let data = match rustix::fs::seek(file, SeekFrom::Data(hole)) {
            Ok(data) => data.min(size_bytes),
            // Nothing but the hole.
            Err(Errno::NXIO) => size_bytes,
            Err(errno) => return Err(errno.into()),
        };
        write_zeros(file, hole, data - hole)?;
        at = data;
    }
    Ok(())
}

#[cfg(test)]
#[path = "thick_tests.rs"]
mod tests;
