//! ACPI tables: what the guest's firmware would tell about this machine (ACPI specification 6.5).
//!
//! ```text
//!   RSDP ─► XSDT ─┬─► FADT ─┬─► FACS
//!                 │         └─► DSDT: PCI root bus, COM1, RTC, S5, processors
//!                 └─► MADT: local APICs, IOAPIC, interrupt 9 is level-triggered
//! ```
//!
//! Power management is the fixed hardware of chapter 4: an event block with the power button, a control block with S5,
//! and a reset register. There is no SMI command port: the machine is always in ACPI mode.

use crate::devices::legacy::acpi_pm::{CONTROL_PORT, EVENT_PORT, S5_SLEEP_TYPE, SCI_GSI};
use crate::memory::{PCI_MMIO_END, PCI_MMIO_START};
use acpi_tables::Aml;
use acpi_tables::aml::{self, AddressSpace, AddressSpaceCacheable, Device, Name, Package, Path, ResourceTemplate};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

/// Where the tables lie; Linux looks for the RSDP here if nobody says where it is.
pub const TABLES_START: u64 = 0xE_0000;
/// End of the room for tables.
pub const TABLES_END: u64 = 0x10_0000;

/// Reset register and the value that resets.
pub const RESET_PORT: u16 = 0xCF9;
/// See [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x06;
/// Base address of the local APICs.
pub const LOCAL_APIC_ADDRESS: u32 = 0xFEE0_0000;
/// Base address of the IOAPIC.
pub const IOAPIC_ADDRESS: u32 = 0xFEC0_0000;

const OEM_ID: [u8; 6] = *b"FTVM  ";
const OEM_TABLE_ID: [u8; 8] = *b"FTVM1   ";
const OEM_REVISION: u32 = 1;

/// Bytes of a plain table header.
const HEADER_BYTES: u32 = 36;

/// All tables for `vcpus` vCPUs, as one block that belongs at [`TABLES_START`].
pub fn tables(vcpus: u8) -> Vec<u8> {
    let mut block = Block {
        bytes: vec![0; Rsdp::len()],
    };
    let facs = block.add(64, &bytes_of(&FACS::new()));
    let dsdt = block.add(16, dsdt(vcpus).as_slice());
    let fadt = block.add(16, &fadt(facs, dsdt));
    let madt = block.add(16, madt(vcpus).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = block.add(16, &bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    block.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    block.bytes
}

struct Block {
    bytes: Vec<u8>,
}

impl Block {
    /// Appends a table; returns its address.
    fn add(&mut self, align: usize, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(align), 0);
        let address = TABLES_START + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let port = |port: u16, bits, access| GAS::new(GasSpace::SystemIo, bits, 0, access, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The power button is fixed hardware (its flag stays clear), a sleep button does not exist.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::UsePlatformClock);
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.x_firmware_ctrl = 0.into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (SCI_GSI as u16).into();
    fadt.pm1a_evt_blk = u32::from(EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(CONTROL_PORT, 16, AccessSize::WordAccess);
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    // No C2, no C3 (values beyond the limits say so).
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = 0x32;
    // Legacy devices are there; no VGA. The keyboard controller only resets: drivers shall not look for it.
    fadt.iapc_boot_arch = 0b101.into();
    bytes_of(&fadt.finalize())
}

fn madt(vcpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", HEADER_BYTES, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut body = Vec::new();
    body.extend(LOCAL_APIC_ADDRESS.to_le_bytes());
    // The machine has two PICs as well.
    body.extend(1u32.to_le_bytes());
    for index in 0..vcpus {
        body.extend([0, 8, index, index, 1, 0, 0, 0]);
    }
    // Interrupt n of the ISA bus is input n of the IOAPIC, also the timer's: KVM wires it that way.
    body.extend([1, 12, vcpus, 0]);
    body.extend(IOAPIC_ADDRESS.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // The system control interrupt is level-triggered and active high.
    body.extend([2, 10, 0, SCI_GSI as u8]);
    body.extend(SCI_GSI.to_le_bytes());
    body.extend(0b1101u16.to_le_bytes());
    // NMI at input LINT1 of every local APIC.
    body.extend([4, 6, 0xFF, 0, 0, 1]);
    madt.append_slice(&body);
    madt
}

fn dsdt(vcpus: u8) -> Sdt {
    let mut code = Vec::new();
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&S5_SLEEP_TYPE, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut code);
    pci_root(&mut code);
    serial_port(&mut code);
    clock(&mut code);
    for index in 0..vcpus {
        processor(&mut code, index);
    }
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

/// The one PCI bus, with configuration by ports 0xCF8 and 0xCFC.
fn pci_root(code: &mut Vec<u8>) {
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let config = aml::IO::new(0xCF8, 0xCF8, 1, 8);
    let ports = [
        AddressSpace::new_io(0u16, 0x0CF7u16, None),
        AddressSpace::new_io(0x0D00u16, 0xFFFFu16, None),
    ];
    let (first, last) = (PCI_MMIO_START as u32, (PCI_MMIO_END - 1) as u32);
    let memory = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
    let resources = ResourceTemplate::new(vec![&buses, &config, &ports[0], &ports[1], &memory]);
    Device::new(
        Path::new("_SB_.PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(Path::new("_ADR"), &aml::ZERO),
            &Name::new(Path::new("_SEG"), &aml::ZERO),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(code);
}

fn serial_port(code: &mut Vec<u8>) {
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &aml::ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &aml::IO::new(0x3F8, 0x3F8, 1, 8),
                    &aml::Interrupt::new(true, true, false, false, 4),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

fn clock(code: &mut Vec<u8>) {
    Device::new(
        Path::new("_SB_.RTC_"),
        vec![
            &Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0B00")),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &aml::IO::new(0x70, 0x70, 1, 2),
                    &aml::Interrupt::new(true, true, false, false, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

fn processor(code: &mut Vec<u8>, index: u8) {
    Device::new(
        Path::new(&format!("_SB_.C{index:03}")),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0007"),
            &Name::new(Path::new("_UID"), &index),
        ],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"))
    }

    /// Follows the pointers as an operating system does; every table has its signature and sums up to zero.
    #[test]
    fn tables_hang_together() {
        let block = tables(16);
        assert!(TABLES_START + block.len() as u64 <= TABLES_END);
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let table = |address: u64, signature: &[u8; 4]| {
            let at = (address - TABLES_START) as usize;
            assert_eq!(&block[at..at + 4], signature);
            let length = u32_at(&block, at + 4) as usize;
            assert_eq!(
                sum(&block[at..at + length]),
                0,
                "{}",
                String::from_utf8_lossy(signature)
            );
            block[at..at + length].to_vec()
        };
        assert_eq!(&block[..8], b"RSD PTR ");
        assert_eq!((sum(&block[..20]), sum(&block[..36])), (0, 0));
        let xsdt = table(u64_at(&block, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(u64_at(&xsdt, 36), b"FACP");
        let madt = table(u64_at(&xsdt, 44), b"APIC");
        assert_eq!(madt.len(), 36 + 8 + 16 * 8 + 12 + 10 + 6);
        table(u64_at(&fadt, 140), b"DSDT");
        let facs = u32_at(&fadt, 36);
        assert_eq!(facs % 64, 0);
        let at = (u64::from(facs) - TABLES_START) as usize;
        assert_eq!(&block[at..at + 4], b"FACS");
        assert_eq!(u32_at(&fadt, 56), u32::from(EVENT_PORT));
        assert_eq!(u32_at(&fadt, 64), u32::from(CONTROL_PORT));
    }
}
