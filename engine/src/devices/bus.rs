//! Port and memory-mapped I/O: which device answers an access of a vCPU.
//!
//! Both buses work alike: disjoint ranges of addresses, each with one device. An access that no range contains
//! completely is absent hardware: reads give all ones, writes are dropped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;

/// A device that answers accesses to one range of a bus.
///
/// `offset` counts from the start of the range. `data` has 1, 2, 4 or 8 bytes, little-endian as on the wire of the
/// guest. Called on vCPU threads, one access at a time.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads. Bytes that mean nothing read as ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as a bus holds it; its owner may keep a clone for save and load.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range could not be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around the end of the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps")]
    BadRange {
        /// First address.
        base: u64,
        /// Size in bytes.
        len: u64,
    },
    /// Another device answers part of the range.
    #[error("bus range {base:#x}+{len:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Size in bytes.
        len: u64,
        /// First address of the device that is already there.
        other: u64,
    },
}

struct Entry {
    len: u64,
    device: SharedDevice,
}

/// A set of disjoint address ranges with their devices.
///
/// Lookups take a read lock for an instant and drop it before the device is called, so a device may change the bus
/// (a base address register that moves) while it answers an access.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    pub fn insert(&self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        let end = match base.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => return Err(BusError::BadRange { base, len }),
        };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((other, entry)) = ranges.range(..end).next_back()
            && other + entry.len > base
        {
            return Err(BusError::Overlap {
                base,
                len,
                other: *other,
            });
        }
        ranges.insert(base, Entry { len, device });
        Ok(())
    }

    /// Takes the device that starts at `base` off the bus; says whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base)
            .is_some()
    }

    /// A guest read of `data.len()` bytes at `address`; all ones where nothing answers. Says whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(&device).read(offset, data);
                true
            }
            None => false,
        }
    }

    /// A guest write at `address`; dropped where nothing answers. Says whether a device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(&device).write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, SharedDevice)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        let last = offset.checked_add(len as u64)?;
        (last <= entry.len).then(|| (offset, entry.device.clone()))
    }
}

/// Locks a device's mutex. A thread that panicked while it held the lock is a defect that ends the process anyway.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The two buses of a machine, as vCPU threads use them.
#[derive(Default)]
pub struct Buses {
    /// Port I/O, 0..=0xffff.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O, guest physical addresses outside RAM.
    pub mmio: Arc<Bus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64, Vec<u8>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = offset;
            self.1 = data.to_vec();
        }
    }

    fn echo() -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(0, Vec::new())))
    }

    #[test]
    fn an_access_reaches_the_device_that_contains_it() {
        let bus = Bus::new();
        let device = echo();
        bus.insert(0x3f8, 8, device.clone()).unwrap();
        let mut data = [0u8; 2];
        assert!(bus.read(0x3fa, &mut data));
        assert_eq!(data, [2, 2]);
        assert!(bus.write(0x3ff, &[7]));
        let seen = lock(&device);
        assert_eq!((seen.0, seen.1.as_slice()), (7, &[7][..]));
    }

    #[test]
    fn absent_hardware_reads_as_ones_and_straddling_accesses_are_absent() {
        let bus = Bus::new();
        bus.insert(0x10, 4, echo()).unwrap();
        for (address, len) in [(0x0f, 1), (0x14, 4), (0x12, 4), (u64::MAX, 8)] {
            let mut data = vec![0u8; len];
            assert!(!bus.read(address, &mut data));
            assert!(data.iter().all(|byte| *byte == 0xff));
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn ranges_must_be_disjoint() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, echo()).unwrap();
        for (base, len) in [(0x100, 1), (0xff, 2), (0x10f, 1), (0, 0x1000)] {
            assert_eq!(
                bus.insert(base, len, echo()),
                Err(BusError::Overlap {
                    base,
                    len,
                    other: 0x100
                })
            );
        }
        assert_eq!(bus.insert(5, 0, echo()), Err(BusError::BadRange { base: 5, len: 0 }));
        assert!(matches!(
            bus.insert(u64::MAX, 2, echo()),
            Err(BusError::BadRange { .. })
        ));
        bus.insert(0x110, 1, echo()).unwrap();
        assert!(bus.remove(0x100));
        assert!(!bus.remove(0x100));
        bus.insert(0x100, 0x10, echo()).unwrap();
    }
}
