//! The configuration space of a type-0 function: 256 bytes, each with a mask of what the guest may write.

use serde::{Deserialize, Serialize};

/// Size of a function's configuration space in bytes.
pub const CONFIG_BYTES: usize = 256;
/// Offset of the command register.
pub const COMMAND: usize = 0x04;
/// Command register: the function answers in its memory ranges.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Offset of the first base address register.
pub const BAR0: usize = 0x10;
/// Capability ID of vendor-specific data, which virtio uses.
pub const CAP_VENDOR: u8 = 0x09;
/// Capability ID of MSI-X.
pub const CAP_MSIX: u8 = 0x11;

const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAP_POINTER: usize = 0x34;
const FIRST_CAP: usize = 0x40;

/// What identifies a function.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code: base class, subclass, programming interface, as 0xBBSSPP.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// One function's configuration space.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bar_size: u32,
    next_cap: usize,
    last_cap: usize,
}

/// What the guest can change in a configuration space: the writable bits of every byte that has some.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// The writable bytes, in order of their offsets.
    pub writable: Vec<u8>,
}

impl ConfigSpace {
    /// A function without base address registers and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bar_size: 0,
            next_cap: FIRST_CAP,
            last_cap: 0,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(
            0x08,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        // Cache line size and interrupt line are scratch registers for software.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Makes BAR 0 a 32-bit memory range of `size` bytes (a power of two from 4 KiB on) at `base`, answering from the start.
    pub fn add_bar0(&mut self, base: u32, size: u32) {
        assert!(
            size.is_power_of_two() && size >= 0x1000 && base.is_multiple_of(size),
            "bad BAR {base:#x}+{size:#x}"
        );
        self.bar_size = size;
        self.put(BAR0, &base.to_le_bytes());
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
        self.put(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    }

    /// Appends a capability whose bytes after ID and pointer are `body`; `writable` masks what the guest may write of
    /// them. Returns the capability's offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_cap;
        let end = offset + 2 + body.len();
        assert!(end <= CONFIG_BYTES, "capabilities do not fit the configuration space");
        if self.last_cap == 0 {
            self.put(CAP_POINTER, &[offset as u8]);
            self.put(0x06, &STATUS_CAPABILITIES.to_le_bytes());
        } else {
            self.put(self.last_cap + 1, &[offset as u8]);
        }
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        self.last_cap = offset;
        self.next_cap = end.next_multiple_of(4);
        offset
    }

    /// Where BAR 0 answers now: `None` while memory decoding is off.
    pub fn bar0(&self) -> Option<(u64, u64)> {
        let decodes = self.word(COMMAND) & COMMAND_MEMORY != 0;
        let base = self.double(BAR0) & !(self.bar_size.wrapping_sub(1));
        (decodes && self.bar_size > 0).then_some((u64::from(base), u64::from(self.bar_size)))
    }

    /// A guest read; beyond the end there are ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// A guest write: changes what it may.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..CONFIG_BYTES).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    /// The 16-bit register at `offset`.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The 32-bit register at `offset`.
    pub fn double(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// What the guest changed.
    pub fn save(&self) -> ConfigState {
        let bytes = self.bytes.iter().zip(&self.writable);
        ConfigState {
            writable: bytes
                .filter(|(_, mask)| **mask != 0)
                .map(|(byte, mask)| byte & mask)
                .collect(),
        }
    }

    /// Whether `state` has the shape of this configuration space and sets only bits that a guest can set.
    pub fn accepts(&self, state: &ConfigState) -> bool {
        let masks: Vec<u8> = self.writable.iter().copied().filter(|mask| *mask != 0).collect();
        masks.len() == state.writable.len() && masks.iter().zip(&state.writable).all(|(mask, byte)| byte & !mask == 0)
    }

    /// Takes over a state that [`Self::accepts`] approved.
    pub fn load(&mut self, state: &ConfigState) {
        let masks = self.writable.iter().enumerate().filter(|(_, mask)| **mask != 0);
        for ((at, mask), byte) in masks.zip(&state.writable) {
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: 0x02_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        space.add_bar0(0xc000_8000, 0x8000);
        space
    }

    fn double(space: &ConfigSpace, offset: usize) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_and_class_are_where_pci_puts_them() {
        let mut space = space();
        assert_eq!(double(&space, 0), 0x1041_1af4);
        assert_eq!(double(&space, 8), 0x0200_0001);
        assert_eq!(double(&space, 0x2c), 0x0040_1af4);
        space.write(0, &[0xff; 4]);
        space.write(8, &[0; 4]);
        assert_eq!(
            (double(&space, 0), double(&space, 8)),
            (0x1041_1af4, 0x0200_0001),
            "read-only"
        );
    }

    #[test]
    fn a_bar_is_sized_and_moved_by_the_guest() {
        let mut space = space();
        assert_eq!(space.bar0(), Some((0xc000_8000, 0x8000)));
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(double(&space, BAR0), 0xffff_8000);
        space.write(BAR0, &0xd012_3456u32.to_le_bytes());
        assert_eq!(space.bar0(), Some((0xd012_0000, 0x8000)));
        space.write(COMMAND, &[0, 0]);
        assert_eq!(space.bar0(), None);
        space.write(BAR0 + 4, &[0xff; 20]);
        assert!(
            (BAR0 + 4..BAR0 + 24).step_by(4).all(|bar| double(&space, bar) == 0),
            "there are no other BARs"
        );
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(CAP_MSIX, &[1; 10], &[0, 0xc0]);
        let second = space.add_capability(CAP_VENDOR, &[2; 14], &[]);
        assert_eq!(double(&space, CAP_POINTER) as u8, first as u8);
        assert_ne!(double(&space, COMMAND) >> 16 & u32::from(STATUS_CAPABILITIES), 0);
        assert_eq!(
            double(&space, first) & 0xffff,
            (second as u32) << 8 | u32::from(CAP_MSIX)
        );
        assert_eq!(double(&space, second) & 0xffff, u32::from(CAP_VENDOR));
        space.write(first, &[0xff; 4]);
        assert_eq!(double(&space, first) >> 16, 0xc101);
    }

    #[test]
    fn a_state_comes_back_and_one_of_another_function_is_refused() {
        let mut space = space();
        let fresh = space.clone();
        space.write(BAR0, &0xd000_0000u32.to_le_bytes());
        space.write(0x3c, &[11]);
        let state = space.save();
        let mut other = fresh.clone();
        assert!(other.accepts(&state));
        other.load(&state);
        assert_eq!((other.bytes, other.save()), (space.bytes, state.clone()));
        let mut longer = state.clone();
        longer.writable.push(0);
        let mut impossible = state;
        impossible.writable[0] |= 0x80;
        assert!(!fresh.accepts(&longer) && !fresh.accepts(&impossible));
    }

    #[test]
    fn accesses_beyond_the_end_are_harmless() {
        let mut space = space();
        let mut data = [0; 4];
        space.read(254, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        space.write(254, &[0xff; 4]);
        space.write(usize::MAX - 1, &[0xff; 4]);
    }
}
