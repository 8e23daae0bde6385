//! Volumes and the journal as replication sees them: bytes at offsets, and durability.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use twox_hash::XxHash3_128;

use crate::zeroing::{Zeroing, write_zeros};

/// A volume or file of fixed size. Shared between threads; concurrent changes of the same range leave either content.
pub trait Storage: Send + Sync {
    /// Size in bytes.
    fn size_bytes(&self) -> u64;
    /// Fills `buf` from `offset`; a short read is an error.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes a range read as zeroes; its blocks stay allocated.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Like [`Self::zero`], in a volume that is being filled and that no guest relies on yet: after an error blocks may be missing.
    fn zero_anew(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }
    /// Returns when everything written before is durable.
    fn sync(&self) -> io::Result<()>;
    /// What tells it from another that takes its place later, under the same name; none if nothing does.
    fn identity(&self) -> Option<u128> {
        None
    }
}

/// What tells these volumes from others, or the same ones in another order; none if nothing does.
pub fn identity_of(volumes: &[Arc<dyn Storage>]) -> Option<u128> {
    let mut bytes = Vec::new();
    for volume in volumes {
        bytes.extend_from_slice(&volume.identity()?.to_le_bytes());
        bytes.extend_from_slice(&volume.size_bytes().to_le_bytes());
    }
    Some(XxHash3_128::oneshot(&bytes))
}

/// A file or block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    size_bytes: u64,
    identity: Option<u128>,
    zeroing: Zeroing,
}

impl FileStorage {
    /// Takes over an open file or block device of at least `size_bytes`; `None` takes its own size. Asks for its file system, so not
    /// in a thread that is in its system call filter.
    pub fn new(mut file: File, size_bytes: Option<u64>) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let has = if metadata.file_type().is_block_device() {
            file.seek(SeekFrom::End(0))?
        } else {
            metadata.len()
        };
        let size_bytes = size_bytes.unwrap_or(has);
        if has < size_bytes {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("it has {has} bytes, {size_bytes} are needed"),
            ));
        }
        // Where a flush of the process before failed, the cache may have what never got to the medium, and call it clean: it is read anew.
        // What keeps no cache knows no such advice.
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
        Ok(Self {
            zeroing: Zeroing::of(&file),
            file,
            size_bytes,
            identity: identity(&metadata),
        })
    }

    /// Like [`Self::new`] for a regular file that is made longer if it is too short: all of it is allocated, so that
    /// writing to it later can't find the file system full.
    pub fn allocated(file: File, size_bytes: u64) -> io::Result<Self> {
        if file.metadata()?.len() < size_bytes {
            match fallocate(&file, FallocateFlags::empty(), 0, size_bytes) {
                Ok(()) => {}
                // A file system without it: written instead.
                Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(&file, 0, size_bytes)?,
                Err(error) => return Err(error.into()),
            }
            file.sync_all()?;
        }
        Self::new(file, Some(size_bytes))
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size_bytes) {
            return Ok(());
        }
        let what = format!(
            "{len} bytes at {offset} are outside the {} bytes of the volume",
            self.size_bytes
        );
        Err(io::Error::new(io::ErrorKind::InvalidInput, what))
    }
}

/// A file that is made anew may get the number of the one before, and never its time of birth. Contents that somebody writes into
/// the file don't show. The node of a device tells nothing of the device behind it.
fn identity(metadata: &Metadata) -> Option<u128> {
    let born = metadata.created().ok().filter(|_| metadata.is_file())?;
    let born_ns = born.duration_since(UNIX_EPOCH).ok()?.as_nanos();
    let [inode, born] = [u128::from(metadata.ino()), born_ns].map(u128::to_le_bytes);
    (born_ns > 0).then(|| XxHash3_128::oneshot(&[inode, born].concat()))
}

impl Storage for FileStorage {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        self.zeroing.zero(&self.file, offset, len)
    }

    fn zero_anew(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        // In no time, on most file systems: a disk that is copied may be zeros for the most part, and its source waits.
        Zeroing::ByKernel.zero(&self.file, offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn identity(&self) -> Option<u128> {
        self.identity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(path: &std::path::Path) -> Option<u128> {
        let file = File::open(path).expect("it is there");
        FileStorage::new(file, Some(0)).expect("it is long enough").identity()
    }

    /// A node in /dev may lead to another device after the next start.
    #[test]
    fn only_a_regular_file_is_known_again() {
        let folder = std::env::temp_dir().join(format!("ftvm-identity-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("disk");
        let make = || std::fs::write(&path, "disk").expect("written");
        make();
        let first = of(&path);
        assert_eq!(first, of(&path));
        let keeps_births = path.metadata().expect("it is there").created().is_ok();
        assert_eq!(first.is_some(), keeps_births);
        std::fs::remove_file(&path).expect("removed");
        make();
        if keeps_births {
            assert_ne!(of(&path), first, "made anew");
        }
        std::fs::remove_dir_all(&folder).expect("removed");
        assert_eq!(of("/dev/null".as_ref()), None, "no file");
    }
}
