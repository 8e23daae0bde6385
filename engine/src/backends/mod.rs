//! What stands behind the devices: host interfaces, files, consoles. Frontends in [`crate::devices`] know only these
//! traits, so replication can wrap a backend without either side knowing.

pub mod console;
pub mod file_disk;
pub mod tap;

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// The host's side of a network interface. Both transfers are called inside the pause gate and must not block.
pub trait NetBackend: Send {
    /// Takes one Ethernet frame from the guest. A frame that can't be sent now is dropped, as on a wire.
    fn transmit(&mut self, frame: &[u8]);
    /// Takes the next frame for the guest into `buf`; `None` if there is none now. Called only when the guest has
    /// buffers, so a frame that was received is delivered in the same epoch. A frame longer than `buf` is cut.
    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>>;
    /// A descriptor that polls readable while [`Self::receive`] would give a frame. Stays the same for the life of the backend.
    fn wake_fd(&self) -> RawFd;
}

/// One request of a disk, as executed. Offsets and lengths are in bytes and multiples of 512.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp<'a> {
    /// Blocks read; changes nothing.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Blocks written.
    Write {
        /// First byte.
        offset: u64,
        /// What was written.
        data: &'a [u8],
    },
    /// Everything that completed before is durable.
    Flush,
    /// The guest doesn't need the range any more; it reads as zeroes afterwards.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range is filled with zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The guest allows unmapping.
        unmap: bool,
    },
}

/// The host's side of a disk. All but [`Self::completed`] are called outside the pause gate, by the disk's one thread, and may block.
/// Ranges are inside the disk: the frontend checks them.
pub trait DiskBackend: Send {
    /// The disk's size in bytes, a multiple of 512; does not change.
    fn size_bytes(&self) -> u64;
    /// The guest may not write.
    fn read_only(&self) -> bool;
    /// Fills `buf` from `offset`; a short read is an error.
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes everything durable that was written.
    fn flush(&mut self) -> io::Result<()>;
    /// Makes the range read as zeroes; the blocks stay allocated (disks are thick).
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Fills the range with zeroes; the blocks stay allocated.
    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// The request was executed (`ok`: without error) and the guest is told next. Called inside the pause gate and in the
    /// order of execution, just before the used ring is updated, so it belongs to the current epoch. Must not block.
    fn completed(&mut self, op: &DiskOp<'_>, ok: bool);
    /// Waits until the disk may be changed again. Called outside the pause gate, before each request that changes it: time that passes
    /// here is not the disk's.
    fn wait_for_room(&mut self) {}
    /// What failed here need not be the guest's error for so long: another disk with the same content may take the place of this one
    /// meanwhile. Zero: none may, or the guest is to be told at once.
    fn held_for(&self) -> Duration {
        Duration::ZERO
    }
}

/// Where the characters of the guest's serial console go. Called on a vCPU thread: must not block for long.
pub trait ConsoleBackend: Send {
    /// Takes characters from the guest.
    fn write(&mut self, bytes: &[u8]);
}
