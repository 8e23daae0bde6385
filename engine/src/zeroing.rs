//! Zeroing a range of a disk without giving up a block of it.
//!
//! `FALLOC_FL_ZERO_RANGE` (fallocate(2)) promises what is read afterwards, not that the blocks are the same ones. Where a file system gives
//! them back and takes others, another file may have them in between, and a disk that was thick is no longer so:
//!
//! | file system | what it does |
//! |---|---|
//! | ext4 | marks extents as unwritten where they are (`ext4_zero_range`) |
//! | XFS | punches a hole, then allocates (`xfs_falloc_zero_range`): the second fails where another file took what the first gave back |
//! | btrfs | allocates elsewhere and then gives the old blocks back (`btrfs_zero_range`): fails where nothing else is free |
//! | block device | zeroes without unmapping (`BLKDEV_ZERO_NOUNMAP`), which is what `BLKZEROOUT` does |
//!
//! So the kernel is asked only where blocks are known to stay, and zeros are written elsewhere: onto blocks that are there. What is
//! known is shown, and XFS' way for comparison, by `node-daemon/tests/disks.rs`.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

use rustix::fs::{FallocateFlags, fallocate, fstatfs};

/// File systems that zero a range in place, by their magic number (linux/magic.h).
///
/// That of ext4 is also that of ext2 and ext3. A file without extents, which is all that those two have, is refused by ext4's driver
/// (`EOPNOTSUPP`, as by one that knows no fallocate), and zeros are written.
const IN_PLACE: [i64; 1] = [0xef53];

/// Written at once.
const PIECE_BYTES: usize = 1 << 20;
static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];

/// How ranges of a file or block device are zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// By the kernel, which keeps the blocks where [`Zeroing::of`] chooses it; by writing what it refuses.
    ByKernel,
    /// By writing.
    Written,
}

impl Zeroing {
    /// How `file` is to be zeroed. Asks for its file system, which no thread may that is in its system call filter.
    pub fn of(file: &File) -> Self {
        let device = file.metadata().is_ok_and(|data| data.file_type().is_block_device());
        if device || fstatfs(file).is_ok_and(|system| IN_PLACE.contains(&system.f_type)) {
            Self::ByKernel
        } else {
            Self::Written
        }
    }

    /// Makes a range read as zeros. Its blocks stay, if this is what [`Zeroing::of`] gave, and those that are missing are allocated.
    ///
    /// The kernel may refuse for many reasons: it does not know the call, the range is no whole number of a device's blocks, or there
    /// is no room to note that an extent is now two or three (a guest that gives back every other block of a disk, on an ext4 that
    /// is full; an XFS that is full does not even begin). Whatever it is, writing needs none of that, and its error is the one that counts.
    pub fn zero(self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if self == Self::ByKernel && fallocate(file, flags, offset, len).is_ok() {
            return Ok(());
        }
        write_zeros(file, offset, len)
    }
}

/// Writes zeros.
pub fn write_zeros(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let piece = len.min(PIECE_BYTES as u64);
        file.write_all_at(&ZEROS[..piece as usize], offset)?;
        offset += piece;
        len -= piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    /// A file on a tmpfs, which is not known to keep its blocks and does not know the call either.
    fn file() -> File {
        memfd_create("zeroing", MemfdFlags::CLOEXEC).expect("a file").into()
    }

    #[test]
    fn what_is_not_known_to_keep_its_blocks_is_written() {
        assert_eq!(Zeroing::of(&file()), Zeroing::Written);
    }

    #[test]
    fn a_range_is_zeroed_to_the_byte_whether_the_kernel_does_it_or_not() {
        let piece = PIECE_BYTES as u64;
        let (start, len, size) = (piece - 512, 2 * piece + 1024, 4 * piece);
        for zeroing in [Zeroing::ByKernel, Zeroing::Written] {
            let file = file();
            file.write_all_at(&vec![7; size as usize], 0).expect("written");
            zeroing.zero(&file, start, len).expect("zeroed");
            let mut found = vec![9; size as usize];
            file.read_exact_at(&mut found, 0).expect("read");
            let zeroed = |at: u64| (start..start + len).contains(&at);
            let right = |(at, byte): (u64, &u8)| *byte == if zeroed(at) { 0 } else { 7 };
            assert!((0..).zip(&found).all(right), "{zeroing:?}");
            assert_eq!(file.metadata().expect("its length").len(), size);
        }
    }
}
