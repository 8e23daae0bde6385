//! The stream of an epoch: what a checkpoint of the active consists of, on the wire and on the standby.
//!
//! ```text
//! EpochBegin  EpochPages*  EpochState*  EpochDisk*  EpochOutput*  EpochEnd      each payload begins with its number
//! in the epoch
//!  └ base epoch, fence      └ in any mixture              └ counts and checksum over all payloads
//! ```
//!
//! Pages may be sent while the epoch still runs ([`EpochSender::pages`]) and again at its end: later ones win. The
//! receiver keeps everything to itself until the end arrived and agrees ([`EpochReceiver`]); only then there is a
//! [`StagedEpoch`] to acknowledge and to apply. Epochs may follow each other before the first is applied; each says
//! on which it builds.
//!
//! Invariant: a partial epoch never leaves the receiver.

mod input;
mod receiver;
mod sender;
pub(super) mod wire;

pub use input::{InputLog, OutputLog};
pub use receiver::{EpochError, EpochReceiver, StagedEpoch, StagingLimits};
pub(super) use sender::NumberedStream;
pub use sender::{EpochSender, EpochStats, FrameSink, SealedEpoch, SendError};
pub use wire::{PayloadError, decode_input, encode_input};

use std::sync::Arc;

/// Where bytes enter or leave the guest, besides disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Port {
    /// Network interface by its index in the machine.
    Nic(u16),
    /// The serial console.
    Console,
}

/// A frame, or console bytes, at a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortData {
    /// Which port.
    pub port: Port,
    /// One Ethernet frame, or any number of console bytes; 1 to [`PORT_DATA_MAX_BYTES`].
    pub bytes: Vec<u8>,
}

/// Most bytes of one frame or one piece of console output.
pub const PORT_DATA_MAX_BYTES: usize = 128 * 1024;

/// Disks have blocks of this size; changes of disks are multiples of it.
pub const SECTOR_BYTES: u64 = 512;

/// One completed change of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskChange {
    /// Index of the disk in the machine.
    pub disk: u16,
    /// First byte, a multiple of [`SECTOR_BYTES`].
    pub offset: u64,
    /// What happened there.
    pub what: DiskData,
}

/// Contents of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskData {
    /// These bytes were written: a positive multiple of [`SECTOR_BYTES`].
    Written(Arc<[u8]>),
    /// So many bytes read as zeroes now: discard and write zeroes alike, so that both sides stay byte-equal.
    Zeroed(u64),
}

impl DiskChange {
    /// A write.
    pub fn written(disk: u16, offset: u64, data: &[u8]) -> Self {
        Self {
            disk,
            offset,
            what: DiskData::Written(data.into()),
        }
    }

    /// A discard, or zeroes written.
    pub fn zeroed(disk: u16, offset: u64, len: u64) -> Self {
        Self {
            disk,
            offset,
            what: DiskData::Zeroed(len),
        }
    }

    /// Bytes of the disk that change.
    pub fn len(&self) -> u64 {
        match &self.what {
            DiskData::Written(data) => data.len() as u64,
            DiskData::Zeroed(len) => *len,
        }
    }

    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// First byte behind the change; saturates.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len())
    }

    /// Bytes of memory that the change holds.
    pub fn staged_bytes(&self) -> usize {
        let data = if let DiskData::Written(data) = &self.what {
            data.len()
        } else {
            0
        };
        size_of::<Self>() + data
    }

    /// Bytes by which those who follow are waited for: beside what the change holds, what one of them may have to write where
    /// others zero a range in no time.
    pub fn work_bytes(&self) -> usize {
        size_of::<Self>() + self.len() as usize
    }
}

#[cfg(test)]
mod tests;
