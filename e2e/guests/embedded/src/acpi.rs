//! The little of ACPI that the guest needs: its vCPUs (MADT) and the way to power off (FADT and `_S5`).

use crate::cpu::{self, MAX_VCPUS};
use core::ptr::read_unaligned;

const MAX_TABLES: u32 = 64;
const MAX_TABLE_BYTES: u32 = 1 << 20;
const HARDWARE_REDUCED: u32 = 1 << 20;
const SLEEP_ENABLE: u16 = 1 << 13;

/// How to enter S5.
#[derive(Clone, Copy, Debug)]
enum PowerOff {
    /// PM1a (and PM1b) control registers: 16-bit ports.
    Pm1 { a: u16, b: Option<u16>, sleep_type: u16 },
    /// Hardware-reduced ACPI: the sleep control register, an 8-bit port.
    SleepControl { port: u16, sleep_type: u8 },
}

/// What was found.
pub struct Acpi {
    apic_ids: [u32; MAX_VCPUS],
    vcpus: usize,
    power_off: Option<PowerOff>,
}

impl Acpi {
    /// Reads the tables. `rsdp` is the root pointer's address if the loader gave it; else it is looked for where firmware
    /// puts it.
    pub fn read(rsdp: Option<u64>) -> Self {
        let mut acpi = Self {
            apic_ids: [0; MAX_VCPUS],
            vcpus: 0,
            power_off: None,
        };
        if let Some(rsdp) = rsdp.or_else(find_root) {
            acpi.read_tables(rsdp);
        }
        acpi
    }

    /// The APIC identifiers of the vCPUs that may be started, the first one's included.
    pub fn apic_ids(&self) -> &[u32] {
        &self.apic_ids[..self.vcpus]
    }

    /// Powers the machine off; returns if ACPI does not say how.
    pub fn power_off(&self) {
        match self.power_off {
            Some(PowerOff::Pm1 { a, b, sleep_type }) => {
                for port in [Some(a), b].into_iter().flatten() {
                    cpu::out16(port, (cpu::in16(port) & !0x3C00) | sleep_type << 10 | SLEEP_ENABLE);
                }
            }
            Some(PowerOff::SleepControl { port, sleep_type }) => cpu::out8(port, sleep_type << 2 | 1 << 5),
            None => {}
        }
    }

    fn read_tables(&mut self, rsdp: u64) {
        // SAFETY: the root pointer's fields, ACPI 6.5 section 5.2.5.3; revision 2 and up has the 64-bit address.
        let (revision, rsdt, xsdt) = unsafe { (byte(rsdp + 15), u64::from(word(rsdp + 16)), long(rsdp + 24)) };
        let (root, width) = if revision >= 2 && xsdt != 0 {
            (xsdt, 8)
        } else {
            (rsdt, 4)
        };
        let Some(root_bytes) = table_bytes(root) else { return };
        let entries = ((root_bytes - 36) / width).min(MAX_TABLES);
        for index in 0..entries {
            let at = root + 36 + u64::from(index * width);
            // SAFETY: inside the root table, by its own length.
            let table = unsafe { if width == 8 { long(at) } else { u64::from(word(at)) } };
            let Some(bytes) = table_bytes(table) else { continue };
            // SAFETY: a table's signature is its first four bytes.
            match &unsafe { word(table) }.to_le_bytes() {
                b"APIC" => self.read_madt(table, bytes),
                b"FACP" => self.power_off = read_fadt(table, bytes),
                _ => {}
            }
        }
    }

    fn read_madt(&mut self, table: u64, bytes: u32) {
        let mut at = 44;
        while at + 8 <= bytes {
            // SAFETY: inside the table, by its own length.
            let (kind, length, id, flags) = unsafe {
                let entry = table + u64::from(at);
                (byte(entry), byte(entry + 1), byte(entry + 3), word(entry + 4))
            };
            // Local APIC, enabled.
            if kind == 0 && flags & 1 != 0 && self.vcpus < MAX_VCPUS {
                self.apic_ids[self.vcpus] = u32::from(id);
                self.vcpus += 1;
            }
            at += u32::from(length).max(2);
        }
    }
}

fn read_fadt(table: u64, bytes: u32) -> Option<PowerOff> {
    // SAFETY: offsets of ACPI 6.5 table 5.9, each inside the table by its own length.
    unsafe {
        let dsdt = match (bytes >= 148).then(|| long(table + 140)) {
            Some(address) if address != 0 => address,
            _ => u64::from(word(table + 40)),
        };
        let sleep_type = find_s5(dsdt, table_bytes(dsdt)?)?;
        if bytes >= 256 && word(table + 112) & HARDWARE_REDUCED != 0 {
            let port = u16::try_from(long(table + 244 + 4)).ok().filter(|&port| port != 0)?;
            return Some(PowerOff::SleepControl { port, sleep_type });
        }
        let a = u16::try_from(word(table + 64)).ok().filter(|&port| port != 0)?;
        let b = u16::try_from(word(table + 68)).ok().filter(|&port| port != 0);
        Some(PowerOff::Pm1 {
            a,
            b,
            sleep_type: u16::from(sleep_type),
        })
    }
}

/// Finds `Name(_S5_, Package(){type, …})` in the DSDT's byte code, without an interpreter, as small loaders do.
fn find_s5(dsdt: u64, bytes: u32) -> Option<u8> {
    const PACKAGE: u8 = 0x12;
    const BYTE_PREFIX: u8 = 0x0A;
    // SAFETY: every address is inside the table, by its own length.
    unsafe {
        let name = (36..bytes.saturating_sub(12)).find(|&at| word(dsdt + u64::from(at)).to_le_bytes() == *b"_S5_")?;
        let package = dsdt + u64::from(name) + 4;
        if byte(package) != PACKAGE {
            return None;
        }
        // The length takes one to four bytes (the lead byte's top two bits say how many more), the element count one.
        let element = package + 1 + u64::from(byte(package + 1) >> 6) + 2;
        Some(
            if byte(element) == BYTE_PREFIX {
                byte(element + 1)
            } else {
                byte(element)
            } & 7,
        )
    }
}

/// The table's length, if it can be one.
fn table_bytes(table: u64) -> Option<u32> {
    if table == 0 || table >= 1 << 32 {
        return None;
    }
    // SAFETY: below 4 GiB everything is mapped; whether it is a table shows in its length.
    let bytes = unsafe { word(table + 4) };
    (36..=MAX_TABLE_BYTES).contains(&bytes).then_some(bytes)
}

/// Looks for the root pointer in the firmware's segment.
fn find_root() -> Option<u64> {
    // SAFETY: the firmware's segment is mapped, and readable on any PC.
    (0xE_0000u64..0x10_0000)
        .step_by(16)
        .find(|&at| unsafe { long(at) }.to_le_bytes() == *b"RSD PTR ")
}

/// # Safety
/// `at` must be readable.
unsafe fn byte(at: u64) -> u8 {
    // SAFETY: the caller's promise.
    unsafe { (at as *const u8).read() }
}

/// # Safety
/// Four bytes at `at` must be readable.
unsafe fn word(at: u64) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { read_unaligned(at as *const u32) }
}

/// # Safety
/// Eight bytes at `at` must be readable.
unsafe fn long(at: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { read_unaligned(at as *const u64) }
}
