//! A raw disk in a file or on a block device.
//!
//! Disks are thick: every block is allocated before a guest runs, by whoever starts the engine, and stays so, therefore
//! discarding and zeroing give no block back ([`crate::zeroing`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use thiserror::Error;

use super::{DiskBackend, DiskOp};
use crate::zeroing::Zeroing;

const SECTOR_BYTES: u64 = 512;

// linux/fs.h
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// Why there is no disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Nothing there.
    #[error("disk {}: no such file or device: check the path, or make it with `truncate -s SIZE {}`", path.display(), path.display())]
    Missing {
        /// The disk.
        path: PathBuf,
    },
    /// Opening failed.
    #[error("disk {}: can't be opened for {access}: check its permissions and its file system", path.display())]
    Open {
        /// The disk.
        path: PathBuf,
        /// "reading" or "writing".
        access: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Open for reading only, but the guest is to write.
    #[error("disk {} is read-only: make it writable, or configure it with read_only", path.display())]
    ReadOnly {
        /// The disk.
        path: PathBuf,
    },
    /// A directory, a socket, ...
    #[error("disk {} is neither a regular file nor a block device", path.display())]
    NotADisk {
        /// The disk.
        path: PathBuf,
    },
    /// Size zero or no multiple of 512.
    #[error("disk {} has {size_bytes} bytes: a disk is a positive multiple of 512; extend it with `truncate`", path.display())]
    Size {
        /// The disk.
        path: PathBuf,
        /// Its size in bytes.
        size_bytes: u64,
    },
    /// Not the size that was expected.
    #[error(
        "disk {} has {size_bytes} bytes where {expected_bytes} are expected: it was cut, or is another disk; restore it or build the seat anew",
        path.display()
    )]
    Short {
        /// The disk.
        path: PathBuf,
        /// Its size in bytes.
        size_bytes: u64,
        /// What was expected.
        expected_bytes: u64,
    },
    /// Another process has locked it.
    #[error("disk {} is in use by another process: stop the virtual machine that uses it (`fuser {}`)", path.display(), path.display())]
    InUse {
        /// The disk.
        path: PathBuf,
    },
    /// Something else went wrong.
    #[error("disk {}: {what} failed", path.display())]
    Io {
        /// The disk.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// An open and locked disk. The lock belongs to the open file description, so it travels with the descriptor.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    path: PathBuf,
    size_bytes: u64,
    read_only: bool,
    zeroing: Zeroing,
}

impl FileDisk {
    /// Opens and locks the disk at `path`.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(!read_only).open(path);
        let file = file.map_err(|source| open_error(path, read_only, source))?;
        Self::from_file(file, path, read_only)
    }

    /// Takes over an open file. `path` is for messages.
    pub fn from_file(file: File, path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let path = path.to_owned();
        let failed = |what| {
            let path = path.clone();
            move |source| DiskError::Io { path, what, source }
        };
        let kind = file.metadata().map_err(failed("stat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { path });
        }
        let mode = rustix::fs::fcntl_getfl(&file).map_err(|errno| failed("fcntl")(errno.into()))?;
        if !read_only && mode & OFlags::ACCMODE != OFlags::RDWR {
            return Err(DiskError::ReadOnly { path });
        }
        let block_device = kind.is_block_device();
        let size_bytes = size(&file, block_device).map_err(failed("finding its size"))?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size { path, size_bytes });
        }
        if let Err(source) = lock(&file, read_only) {
            return Err(match source.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => DiskError::InUse { path },
                _ => failed("locking")(source),
            });
        }
        Ok(Self {
            zeroing: Zeroing::of(&file),
            file,
            path,
            size_bytes,
            read_only,
        })
    }

    /// Refuses a disk that has not the size that a header or the peer names.
    pub fn expect_size(self, expected_bytes: u64) -> Result<Self, DiskError> {
        if self.size_bytes == expected_bytes {
            return Ok(self);
        }
        Err(DiskError::Short {
            path: self.path,
            size_bytes: self.size_bytes,
            expected_bytes,
        })
    }

    /// Where it is, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn open_error(path: &Path, read_only: bool, source: io::Error) -> DiskError {
    let path = path.to_owned();
    let access = if read_only { "reading" } else { "writing" };
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ENXIO) => DiskError::Missing { path },
        Some(libc::EROFS) => DiskError::ReadOnly { path },
        // Opening a directory for writing.
        Some(libc::EISDIR) => DiskError::NotADisk { path },
        _ => DiskError::Open { path, access, source },
    }
}

fn size(file: &File, block_device: bool) -> io::Result<u64> {
    if !block_device {
        return Ok(file.metadata()?.len());
    }
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one 64-bit number.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64 as _, &raw mut bytes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}

/// Locks the whole file: several may read, one may write.
fn lock(file: &File, read_only: bool) -> io::Result<()> {
    // SAFETY: an all-zero flock is a valid value of the plain C structure.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = if read_only { libc::F_RDLCK } else { libc::F_WRLCK } as _;
    whole.l_whence = libc::SEEK_SET as _;
    // SAFETY: F_OFD_SETLK reads an flock.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl DiskBackend for FileDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.zeroing.zero(&self.file, offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.zeroing.zero(&self.file, offset, len)
    }

    fn completed(&mut self, _: &DiskOp<'_>, _: bool) {}
}

#[cfg(test)]
#[path = "file_disk_tests.rs"]
mod tests;
