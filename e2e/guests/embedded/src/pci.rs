//! PCI through ports 0xCF8 and 0xCFC: finding virtio devices, and their registers.

use crate::apic;
use crate::cpu::{in32, out32};
use core::fmt;

const ADDRESS_PORT: u16 = 0xCF8;
const DATA_PORT: u16 = 0xCFC;
const VIRTIO_VENDOR: u32 = 0x1AF4;
/// A modern virtio device's PCI identifier is this plus its type.
const MODERN_DEVICE: u32 = 0x1040;
const COMMAND: u8 = 0x04;
const MEMORY_SPACE: u32 = 1 << 1;
const BUS_MASTER: u32 = 1 << 2;
const CAPABILITIES: u32 = 1 << (16 + 4);
const BAR_0: u8 = 0x10;
const CAPABILITY_POINTER: u8 = 0x34;
const VENDOR_CAPABILITY: u8 = 0x09;
const MSIX_CAPABILITY: u8 = 0x11;
const MSIX_ENABLE: u32 = 1 << 31;
const MSIX_MASK_ALL: u32 = 1 << 30;
/// BARs that neither firmware nor VMM placed go below this, downwards.
const BAR_WINDOW_END: u64 = 0xFEB0_0000;

/// A device's place on bus 0.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    device: u8,
    function: u8,
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pci 00:{:02x}.{}", self.device, self.function)
    }
}

impl Function {
    fn select(self, register: u8) {
        let place = u32::from(self.device) << 11 | u32::from(self.function) << 8;
        out32(ADDRESS_PORT, 1 << 31 | place | u32::from(register & 0xFC));
    }

    /// Reads a configuration register, a multiple of 4.
    pub fn read(self, register: u8) -> u32 {
        self.select(register);
        in32(DATA_PORT)
    }

    fn write(self, register: u8, value: u32) {
        self.select(register);
        out32(DATA_PORT, value);
    }

    /// Offsets of its capabilities, at most as many as fit.
    fn capabilities(self) -> impl Iterator<Item = (u8, u32)> {
        let mut next = match self.read(COMMAND) & CAPABILITIES {
            0 => 0,
            _ => self.read(CAPABILITY_POINTER) as u8 & 0xFC,
        };
        core::iter::from_fn(move || {
            let at = Some(next).filter(|&at| at >= 0x40)?;
            let header = self.read(at);
            next = (header >> 8) as u8 & 0xFC;
            Some((at, header))
        })
        .take(48)
    }

    /// The address of a memory BAR, which is placed first if nobody did.
    fn bar(self, index: u8, window_end: &mut u64) -> Option<u64> {
        let register = BAR_0 + 4 * index;
        let low = self.read(register);
        let wide = low & 0b110 == 0b100;
        if index > 5 || low & 1 != 0 || (wide && index == 5) {
            return None;
        }
        let high = if wide {
            u64::from(self.read(register + 4)) << 32
        } else {
            0
        };
        let address = u64::from(low & !0xF) | high;
        if address != 0 {
            return Some(address).filter(|&address| address < 1 << 32);
        }
        self.write(register, u32::MAX);
        let size = u64::from(!(self.read(register) & !0xF)) + 1;
        let place = window_end.checked_sub(size)? & !(size - 1);
        *window_end = place;
        self.write(register, place as u32);
        if wide {
            self.write(register + 4, 0);
        }
        Some(place)
    }
}

/// The registers of one virtio device, and its identity. (Virtio 1.2, section 4.1.4.)
pub struct VirtioFunction {
    /// Its place.
    pub function: Function,
    /// Virtio device type: 1 network, 2 block.
    pub kind: u32,
    /// Address of the common configuration.
    pub common: u64,
    /// Address of the notification area.
    pub notify: u64,
    /// Its size.
    pub notify_bytes: u32,
    /// Bytes between the queues' notification registers.
    pub notify_multiplier: u32,
    /// Address of the device's own configuration.
    pub device: u64,
    /// Its size.
    pub device_bytes: u32,
}

/// Calls `found` for every modern virtio device of these kinds on bus 0, set up to be used: BARs placed, memory and bus mastering on,
/// MSI-X on with its first entry delivering `vector` to the first vCPU.
pub fn for_each_virtio(kinds: &[u32], mut found: impl FnMut(VirtioFunction, u8)) {
    let mut window_end = BAR_WINDOW_END;
    let mut vector = apic::DEVICE_VECTOR;
    for device in 0..32 {
        for function in 0..8 {
            let function = Function { device, function };
            let identity = function.read(0);
            if identity == u32::MAX {
                if function.function == 0 {
                    break;
                }
                continue;
            }
            let kind = (identity >> 16).wrapping_sub(MODERN_DEVICE);
            if identity & 0xFFFF == VIRTIO_VENDOR && kinds.contains(&kind) {
                match set_up(function, kind, vector, &mut window_end) {
                    Some(virtio) => {
                        found(virtio, vector);
                        // Devices may share one: a vCPU that wakes looks at all of them.
                        vector = match vector {
                            apic::LAST_DEVICE_VECTOR => apic::DEVICE_VECTOR,
                            vector => vector + 1,
                        };
                    }
                    None => log!("{function}: virtio type {kind} lacks capabilities, left alone"),
                }
            }
            let single = function.read(0x0C) >> 16 & 0x80 == 0;
            if function.function == 0 && single {
                break;
            }
        }
    }
}

fn set_up(function: Function, kind: u32, vector: u8, window_end: &mut u64) -> Option<VirtioFunction> {
    let (mut common, mut notify, mut device, mut msix) = (None, None, None, None);
    for (at, header) in function.capabilities() {
        match header as u8 {
            VENDOR_CAPABILITY => {
                let bar = function.read(at + 4) as u8;
                let (offset, bytes) = (function.read(at + 8), function.read(at + 12));
                let area = Some((bar, offset, bytes));
                match header >> 24 {
                    1 => common = common.or(area),
                    2 => notify = notify.or(area.map(|area| (area, function.read(at + 16)))),
                    4 => device = device.or(area),
                    _ => {}
                }
            }
            MSIX_CAPABILITY => msix = Some((at, header, function.read(at + 4))),
            _ => {}
        }
    }
    let (common, (notify, notify_multiplier), device) = (common?, notify?, device?);
    let (msix_at, msix_header, msix_table) = msix?;
    let mut address = |bar: u8| function.bar(bar, window_end);
    let virtio = VirtioFunction {
        function,
        kind,
        common: address(common.0)? + u64::from(common.1),
        notify: address(notify.0)? + u64::from(notify.1),
        notify_bytes: notify.2,
        notify_multiplier,
        device: address(device.0)? + u64::from(device.1),
        device_bytes: device.2,
    };
    let table = address(msix_table as u8 & 7)? + u64::from(msix_table & !7);
    function.write(COMMAND, (function.read(COMMAND) & 0xFFFF) | MEMORY_SPACE | BUS_MASTER);
    let message = [0xFEE0_0000 | apic::id() << 12, 0, u32::from(vector), 0];
    for (index, value) in message.into_iter().enumerate() {
        // SAFETY: the first entry of the device's MSI-X table, 16 bytes of MMIO in a BAR below 4 GiB, which boot.s maps.
        unsafe { ((table + 4 * index as u64) as *mut u32).write_volatile(value) };
    }
    function.write(msix_at, (msix_header | MSIX_ENABLE) & !MSIX_MASK_ALL);
    Some(virtio)
}
