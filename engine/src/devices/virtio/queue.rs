//! The device's side of a split virtqueue (virtio 1.2, section 2.7).
//!
//! Everything in the rings belongs to the guest and may be wrong or change at any time: each value is read once,
//! checked, and an error leaves the queue as it was. An error means that the driver broke the rules; the transport then
//! sets DEVICE_NEEDS_RESET. Work is bounded: at most [`MAX_CHAIN`] descriptors a chain, and never more chains than the
//! queue has entries.
//!
//! Invariant: `next_avail - next_used` (mod 65536) is the number of chains that were taken and not given back, at most `size`.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use crate::memory::GuestMem;

/// Most descriptors of one chain, whether direct or indirect.
pub const MAX_CHAIN: usize = 1024;

const DESC_BYTES: u64 = 16;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// How a driver broke the rules of a queue.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The size the driver chose is no power of two, zero or too large.
    #[error("queue size {size} is not a power of two up to {max}")]
    Size {
        /// What the driver wrote.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// A ring is misaligned or not in RAM.
    #[error("{what} of the queue at {address:#x} ({len} bytes) is misaligned or outside guest memory")]
    Ring {
        /// Which part.
        what: &'static str,
        /// Guest physical address.
        address: u64,
        /// Size in bytes.
        len: u64,
    },
    /// More chains were published than the queue has entries.
    #[error("available index {published} is more than {size} ahead of {done}")]
    AvailIndex {
        /// The driver's index.
        published: u16,
        /// Chains given back so far.
        done: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A descriptor index is outside its table.
    #[error("descriptor index {index} is outside a table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// A chain has too many descriptors, or is a loop.
    #[error("descriptor chain at {head} is longer than {limit} or a loop")]
    TooLong {
        /// Head of the chain.
        head: u16,
        /// The limit that applies.
        limit: usize,
    },
    /// An indirect table where none is allowed, or of a wrong length.
    #[error("indirect descriptor ({len} bytes) is nested, chained, or not a whole number of descriptors")]
    Indirect {
        /// Length of the table in bytes.
        len: u32,
    },
    /// A buffer is not in RAM.
    #[error("buffer at {address:#x} ({len} bytes) is outside guest memory")]
    Buffer {
        /// Guest physical address.
        address: u64,
        /// Size in bytes.
        len: u32,
    },
    /// Buffers for the device to read must come before those to write.
    #[error("descriptor chain at {head} has a readable buffer after a writable one")]
    Order {
        /// Head of the chain.
        head: u16,
    },
    /// The chain is not what a request of this device looks like.
    #[error("request at descriptor {head} {what}")]
    Request {
        /// Head of the chain.
        head: u16,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A ring could not be accessed, although it was checked when the queue was enabled.
    #[error("queue memory can't be accessed")]
    Memory(#[from] GuestMemoryError),
}

/// A piece of guest memory that lies in RAM completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: u64,
    /// Size in bytes.
    pub len: u32,
}

/// The buffers of one chain. Reused between chains, so that walking allocates nothing once it has grown.
#[derive(Debug, Default)]
pub struct Chain {
    /// Index of the first descriptor: what is given back.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<Segment>,
    /// What the device may write, in order.
    pub writable: Vec<Segment>,
}

impl Chain {
    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Copies from the readable buffers, beginning `skip` bytes into them; returns how many bytes there were.
    pub fn read(&self, mem: &GuestMem, skip: u64, into: &mut [u8]) -> Result<usize, QueueError> {
        copy(&self.readable, skip, into.len(), |address, range| {
            mem.read_slice(&mut into[range], address)
        })
    }

    /// Copies into the writable buffers, beginning `skip` bytes into them; returns how many bytes had room.
    pub fn write(&self, mem: &GuestMem, skip: u64, from: &[u8]) -> Result<usize, QueueError> {
        copy(&self.writable, skip, from.len(), |address, range| {
            mem.write_slice(&from[range], address)
        })
    }
}

/// Walks `segments` from byte `skip` on for up to `len` bytes, calling `each` with an address and the range of the
/// private buffer that belongs there.
fn copy(
    segments: &[Segment],
    mut skip: u64,
    len: usize,
    mut each: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), GuestMemoryError>,
) -> Result<usize, QueueError> {
    let mut done = 0;
    for segment in segments {
        if done == len {
            break;
        }
        let size = u64::from(segment.len);
        if skip >= size {
            skip -= size;
            continue;
        }
        let part = ((size - skip) as usize).min(len - done);
        each(GuestAddress(segment.address + skip), done..done + part)?;
        done += part;
        skip = 0;
    }
    Ok(done)
}

/// What is saved of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries that the driver chose.
    pub size: u16,
    /// The driver switched it on.
    pub enabled: bool,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the driver area.
    pub avail: u64,
    /// Address of the device area.
    pub used: u64,
    /// Chains taken so far.
    pub next_avail: u16,
    /// Chains given back so far.
    pub next_used: u16,
}

/// One virtqueue.
#[derive(Debug)]
pub struct Queue {
    max_size: u16,
    state: QueueState,
    /// `next_used` when the driver was last asked whether it wants an interrupt.
    signalled: u16,
    event_idx: bool,
}

impl Queue {
    /// A queue as it is after a reset. `max_size` is a power of two up to 32768, which the devices of this crate guarantee.
    pub fn new(max_size: u16) -> Self {
        assert!(max_size.is_power_of_two(), "queue sizes are powers of two");
        let state = QueueState {
            size: max_size,
            enabled: false,
            desc: 0,
            avail: 0,
            used: 0,
            next_avail: 0,
            next_used: 0,
        };
        Self {
            max_size,
            state,
            signalled: 0,
            event_idx: false,
        }
    }

    /// Back to the state after [`Self::new`].
    pub fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// What the driver sees in the common configuration.
    pub fn state(&self) -> &QueueState {
        &self.state
    }

    /// Largest size that the device offers.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// The driver switched the queue on.
    pub fn enabled(&self) -> bool {
        self.state.enabled
    }

    /// Chains taken and not given back.
    pub fn outstanding(&self) -> u16 {
        self.state.next_avail.wrapping_sub(self.state.next_used)
    }

    /// Forgets what was taken and not given back: nobody will work on it any more.
    pub fn abandon(&mut self) {
        self.state.next_avail = self.state.next_used;
    }

    /// Lets the driver set size and addresses; ignored once the queue is enabled.
    pub fn configure(&mut self, change: impl FnOnce(&mut QueueState)) {
        if !self.state.enabled {
            let mut state = self.state;
            change(&mut state);
            self.state = QueueState {
                enabled: false,
                next_avail: 0,
                next_used: 0,
                ..state
            };
        }
    }

    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub fn set_event_idx(&mut self, event_idx: bool) {
        self.event_idx = event_idx;
    }

    /// Switches the queue on after checking what the driver set.
    pub fn enable(&mut self, mem: &GuestMem) -> Result<(), QueueError> {
        check_layout(&self.state, self.max_size, mem)?;
        self.state.enabled = true;
        Ok(())
    }

    /// Checks a saved state against this queue and the guest's memory without changing anything.
    pub fn check(&self, state: &QueueState, mem: &GuestMem) -> Result<(), QueueError> {
        if !state.enabled {
            return match (state.next_avail, state.next_used) {
                (0, 0) => Ok(()),
                (published, done) => Err(QueueError::AvailIndex {
                    published,
                    done,
                    size: 0,
                }),
            };
        }
        check_layout(state, self.max_size, mem)?;
        if state.next_avail.wrapping_sub(state.next_used) > state.size {
            return Err(QueueError::AvailIndex {
                published: state.next_avail,
                done: state.next_used,
                size: state.size,
            });
        }
        Ok(())
    }

    /// Takes over a state that [`Self::check`] accepted.
    pub fn load(&mut self, state: &QueueState, event_idx: bool) {
        self.state = *state;
        self.signalled = state.next_used;
        self.event_idx = event_idx;
    }

    /// Whether the driver has published a chain that was not taken yet.
    pub fn has_available(&self, mem: &GuestMem) -> Result<bool, QueueError> {
        if !self.state.enabled {
            return Ok(false);
        }
        let published = u16::from_le(mem.load(GuestAddress(self.state.avail + 2), Ordering::Acquire)?);
        if published.wrapping_sub(self.state.next_used) > self.state.size
            || published.wrapping_sub(self.state.next_avail) > self.state.size
        {
            return Err(QueueError::AvailIndex {
                published,
                done: self.state.next_used,
                size: self.state.size,
            });
        }
        Ok(published != self.state.next_avail)
    }

    /// Takes the next chain into `chain`; false if there is none. After an error nothing was taken.
    pub fn pop(&mut self, mem: &GuestMem, chain: &mut Chain) -> Result<bool, QueueError> {
        if !self.has_available(mem)? {
            return Ok(false);
        }
        let slot = u64::from(self.state.next_avail % self.state.size);
        let head = u16::from_le(mem.read_obj(GuestAddress(self.state.avail + 4 + 2 * slot))?);
        self.walk(mem, head, chain)?;
        self.state.next_avail = self.state.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Reads the chain at `head` into `chain` without taking anything: for chains that were taken before.
    pub fn walk(&self, mem: &GuestMem, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        let (mut table, mut entries, mut indirect) = (self.state.desc, u32::from(self.state.size), false);
        let mut index = head;
        for _ in 0..=MAX_CHAIN {
            if u32::from(index) >= entries {
                return Err(QueueError::DescriptorIndex { index, size: entries });
            }
            let desc = Descriptor::read(mem, table + DESC_BYTES * u64::from(index))?;
            if desc.flags & DESC_INDIRECT != 0 {
                let whole = desc.len != 0 && u64::from(desc.len).is_multiple_of(DESC_BYTES);
                if indirect || desc.flags & DESC_NEXT != 0 || !whole {
                    return Err(QueueError::Indirect { len: desc.len });
                }
                check_buffer(mem, desc.address, desc.len)?;
                (table, entries, indirect, index) = (desc.address, desc.len / DESC_BYTES as u32, true, 0);
                continue;
            }
            chain.add(mem, &desc)?;
            if desc.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
            if chain.readable.len() + chain.writable.len() >= MAX_CHAIN {
                break;
            }
        }
        Err(QueueError::TooLong { head, limit: MAX_CHAIN })
    }

    /// Gives the chain at `head` back; the device wrote its first `written` writable bytes.
    pub fn push_used(&mut self, mem: &GuestMem, head: u16, written: u32) -> Result<(), QueueError> {
        debug_assert!(self.outstanding() > 0, "a chain is given back that was not taken");
        let slot = u64::from(self.state.next_used % self.state.size);
        let element = u64::from(head) | u64::from(written) << 32;
        mem.write_obj(element.to_le(), GuestAddress(self.state.used + 4 + 8 * slot))?;
        self.state.next_used = self.state.next_used.wrapping_add(1);
        mem.store(
            self.state.next_used.to_le(),
            GuestAddress(self.state.used + 2),
            Ordering::Release,
        )?;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was given back since the last call.
    pub fn needs_interrupt(&mut self, mem: &GuestMem) -> Result<bool, QueueError> {
        let (old, new) = (self.signalled, self.state.next_used);
        if old == new {
            return Ok(false);
        }
        self.signalled = new;
        // The used index must be visible before the driver's wish is read (2.7.7.2).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let address = self.state.avail + 4 + 2 * u64::from(self.state.size);
            let event = u16::from_le(mem.load(GuestAddress(address), Ordering::Relaxed)?);
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        let flags = u16::from_le(mem.load(GuestAddress(self.state.avail), Ordering::Relaxed)?);
        Ok(flags & AVAIL_NO_INTERRUPT == 0)
    }

    /// Asks the driver to notify when it publishes the next chain. True if it has published one meanwhile: it must be
    /// taken now, for no notification will come.
    pub fn enable_notification(&mut self, mem: &GuestMem) -> Result<bool, QueueError> {
        if !self.state.enabled {
            return Ok(false);
        }
        if self.event_idx {
            self.set_avail_event(mem, self.state.next_avail)?;
        } else {
            mem.store(0u16, GuestAddress(self.state.used), Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        self.has_available(mem)
    }

    /// Tells the driver that notifications are not needed now; it may send some all the same.
    pub fn disable_notification(&mut self, mem: &GuestMem) -> Result<(), QueueError> {
        if self.state.enabled && !self.event_idx {
            mem.store(USED_NO_NOTIFY.to_le(), GuestAddress(self.state.used), Ordering::Relaxed)?;
        }
        Ok(())
    }

    fn set_avail_event(&self, mem: &GuestMem, value: u16) -> Result<(), QueueError> {
        let address = self.state.used + 4 + 8 * u64::from(self.state.size);
        Ok(mem.store(value.to_le(), GuestAddress(address), Ordering::Relaxed)?)
    }
}

impl Chain {
    fn add(&mut self, mem: &GuestMem, desc: &Descriptor) -> Result<(), QueueError> {
        if desc.len > 0 {
            check_buffer(mem, desc.address, desc.len)?;
        }
        let segment = Segment {
            address: desc.address,
            len: desc.len,
        };
        if desc.flags & DESC_WRITE != 0 {
            self.writable.push(segment);
        } else if self.writable.is_empty() {
            self.readable.push(segment);
        } else {
            return Err(QueueError::Order { head: self.head });
        }
        Ok(())
    }
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(mem: &GuestMem, at: u64) -> Result<Self, QueueError> {
        let mut raw = [0u8; DESC_BYTES as usize];
        mem.read_slice(&mut raw, GuestAddress(at))?;
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let double = |at: usize| u64::from(word(at)) | u64::from(word(at + 2)) << 16;
        Ok(Self {
            address: double(0) | double(4) << 32,
            len: double(8) as u32,
            flags: word(12),
            next: word(14),
        })
    }
}

fn check_buffer(mem: &GuestMem, address: u64, len: u32) -> Result<(), QueueError> {
    if in_ram(mem, address, u64::from(len)) {
        Ok(())
    } else {
        Err(QueueError::Buffer { address, len })
    }
}

fn in_ram(mem: &GuestMem, address: u64, len: u64) -> bool {
    address.checked_add(len).is_some() && mem.check_range(GuestAddress(address), len as usize, Permissions::ReadWrite)
}

fn check_layout(state: &QueueState, max: u16, mem: &GuestMem) -> Result<(), QueueError> {
    if !state.size.is_power_of_two() || state.size > max {
        return Err(QueueError::Size { size: state.size, max });
    }
    let size = u64::from(state.size);
    let parts = [
        ("descriptor table", state.desc, DESC_BYTES * size, 16),
        ("driver area", state.avail, 6 + 2 * size, 2),
        ("device area", state.used, 6 + 8 * size, 4),
    ];
    for (what, address, len, align) in parts {
        if !address.is_multiple_of(align) || !in_ram(mem, address, len) {
            return Err(QueueError::Ring { what, address, len });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
