//! The root bus: configuration mechanism #1 at ports 0xCF8..0xCFF, and the host bridge.
//!
//! Port 0xCF9 lies inside the address register: byte accesses to it are the reset control register, as on PC chipsets.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::config::{ConfigSpace, Identity};
use crate::devices::bus::{BusDevice, lock};
use crate::devices::event::{DeviceEvent, DeviceEvents};

/// First port of the mechanism.
pub const CONFIG_PORTS: u64 = 0xcf8;
/// Number of ports.
pub const CONFIG_PORTS_LEN: u64 = 8;
/// The reset control register (FADT RESET_REG).
pub const RESET_PORT: u16 = 0xcf9;
/// What a guest writes to [`RESET_PORT`] to reset the machine (FADT RESET_VALUE).
pub const RESET_VALUE: u8 = 0x06;

const RESET_CPU: u8 = 1 << 2;
const ENABLE: u32 = 1 << 31;
const ADDRESS_BITS: u32 = 0x80ff_fffc;
const SLOTS: usize = 32;

/// One function on the root bus. `offset` is below 256.
pub trait PciFunction: Send {
    /// A guest read of the configuration space.
    fn config_read(&mut self, offset: usize, data: &mut [u8]);
    /// A guest write to the configuration space.
    fn config_write(&mut self, offset: usize, data: &[u8]);
}

/// The host bridge, device 0: identity only.
struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, _: usize, _: &[u8]) {}
}

/// The root bus with its functions.
pub struct PciRoot {
    address: u32,
    reset_control: u8,
    slots: [Option<Arc<Mutex<dyn PciFunction>>>; SLOTS],
    events: Arc<dyn DeviceEvents>,
}

/// What is saved of the root bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootState {
    /// The address register.
    pub address: u32,
    /// The reset control register.
    pub reset_control: u8,
}

impl PciRoot {
    /// A bus with nothing but the host bridge.
    pub fn new(events: Arc<dyn DeviceEvents>) -> Self {
        // The vendor and device of QEMU's generic host bridge, which no operating system has quirks for.
        let bridge = HostBridge(ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }));
        let mut slots = [const { None }; SLOTS];
        slots[0] = Some(Arc::new(Mutex::new(bridge)) as Arc<Mutex<dyn PciFunction>>);
        Self {
            address: 0,
            reset_control: 0,
            slots,
            events,
        }
    }

    /// Puts `function` into the first free slot and returns its number; `None` if the bus is full.
    pub fn add(&mut self, function: Arc<Mutex<dyn PciFunction>>) -> Option<usize> {
        let slot = self.slots.iter().position(Option::is_none)?;
        self.slots[slot] = Some(function);
        Some(slot)
    }

    /// What is saved.
    pub fn save(&self) -> RootState {
        RootState {
            address: self.address,
            reset_control: self.reset_control,
        }
    }

    /// Whether the state can be loaded.
    pub fn accepts(state: &RootState) -> bool {
        state.address & !ADDRESS_BITS == 0 && state.reset_control & !0x0e == 0
    }

    /// Takes over a state that [`Self::accepts`] approved.
    pub fn load(&mut self, state: &RootState) {
        self.address = state.address;
        self.reset_control = state.reset_control;
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.load(&RootState {
            address: 0,
            reset_control: 0,
        });
    }

    /// The function and register that a data port access means.
    fn target(&self, port_offset: u64) -> Option<(&Arc<Mutex<dyn PciFunction>>, usize)> {
        let (bus, slot, function) = (
            self.address >> 16 & 0xff,
            self.address >> 11 & 0x1f,
            self.address >> 8 & 7,
        );
        if self.address & ENABLE == 0 || bus != 0 || function != 0 {
            return None;
        }
        let offset = (self.address & 0xfc) as usize + port_offset as usize;
        self.slots[slot as usize].as_ref().map(|device| (device, offset))
    }
}

impl BusDevice for PciRoot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (1, 1) => data[0] = self.reset_control,
            (4..=7, 1 | 2 | 4) => {
                if let Some((function, register)) = self.target(offset - 4) {
                    lock(function).config_read(register, data);
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS,
            (1, &[value]) => {
                // Bits 1 and 3 say how to reset, a rising bit 2 does it.
                let rises = value & RESET_CPU != 0 && self.reset_control & RESET_CPU == 0;
                self.reset_control = value & 0x0e;
                if rises {
                    self.events.report(DeviceEvent::Reset);
                }
            }
            (4..=7, _) if matches!(data.len(), 1 | 2 | 4) => {
                if let Some((function, register)) = self.target(offset - 4) {
                    lock(function).config_write(register, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Events;

    fn address(root: &mut PciRoot, address: u32) {
        root.write(0, &address.to_le_bytes());
    }

    fn read<const N: usize>(root: &mut PciRoot, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        root.read(offset, &mut data);
        data
    }

    #[test]
    fn the_host_bridge_answers_in_every_width_and_nobody_else() {
        let mut root = PciRoot::new(Events::new());
        address(&mut root, 0x8000_0000);
        assert_eq!(read::<4>(&mut root, 0), 0x8000_0000u32.to_le_bytes());
        assert_eq!(read::<4>(&mut root, 4), 0x0008_1b36u32.to_le_bytes());
        assert_eq!(read::<2>(&mut root, 6), 0x0008u16.to_le_bytes());
        assert_eq!(read::<1>(&mut root, 5), [0x1b]);
        address(&mut root, 0x8000_0008);
        assert_eq!(read::<2>(&mut root, 6), 0x0600u16.to_le_bytes());
        for absent in [0x8000_0800, 0x8000_0100, 0x8001_0000, 0x0000_0000] {
            address(&mut root, absent);
            assert_eq!(read::<4>(&mut root, 4), [0xff; 4], "{absent:#x}");
            root.write(4, &[0; 4]);
        }
    }

    #[test]
    fn the_reset_register_does_not_disturb_the_address() {
        let events = Events::new();
        let mut root = PciRoot::new(events.clone());
        address(&mut root, 0x8000_1234);
        root.write(1, &[0x02]);
        assert_eq!(events.take(), []);
        root.write(1, &[RESET_VALUE]);
        root.write(1, &[RESET_VALUE]);
        assert_eq!(events.take(), [DeviceEvent::Reset], "only the rising bit");
        assert_eq!(read::<4>(&mut root, 0), 0x8000_1234u32.to_le_bytes());
        assert_eq!(read::<1>(&mut root, 1), [RESET_VALUE]);
        // Other byte writes to the address register mean nothing (Linux probes with one to 0xCFB).
        root.write(3, &[1]);
        assert_eq!(read::<4>(&mut root, 0), 0x8000_1234u32.to_le_bytes());
    }

    #[test]
    fn the_state_comes_back_and_a_wrong_one_is_refused() {
        let mut root = PciRoot::new(Events::new());
        address(&mut root, 0x8000_0840);
        let state = root.save();
        root.reset();
        assert_eq!(root.save().address, 0);
        assert!(PciRoot::accepts(&state));
        root.load(&state);
        assert_eq!(root.save(), state);
        assert!(!PciRoot::accepts(&RootState {
            address: 3,
            reset_control: 0
        }));
    }

    #[test]
    fn the_bus_has_31_free_slots() {
        let mut root = PciRoot::new(Events::new());
        let function = || {
            let space = ConfigSpace::new(Identity {
                vendor: 1,
                device: 2,
                revision: 0,
                class: 0,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            Arc::new(Mutex::new(HostBridge(space)))
        };
        assert_eq!(
            (0..31).map(|_| root.add(function()).unwrap()).collect::<Vec<_>>(),
            (1..32).collect::<Vec<_>>()
        );
        assert_eq!(root.add(function()), None);
    }
}
