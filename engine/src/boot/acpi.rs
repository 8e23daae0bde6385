//! The ACPI tables that a guest finds, ACPI specification 6.5.
//!
//! A PC without firmware: local APICs, one IOAPIC, one PCI root bus with a 32-bit window, COM1, the fixed PM registers
//! (power button, S5, reset) and nothing else. No MCFG: configuration space goes through ports 0xCF8/0xCFC.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::{BootError, write_all};
use crate::memory::{GuestMem, PCI_MMIO_END, PCI_MMIO_START};

/// Most vCPUs of a guest.
pub const VCPUS_MAX: u32 = 64;
/// PM1a event block: status and enable, two bytes each.
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// PM1a control block, two bytes.
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// Reset register.
pub const RESET_PORT: u16 = 0xcf9;
/// What is written to the reset register to reset.
pub const RESET_VALUE: u8 = 0x06;
/// SLP_TYP of S5, as `_S5` says.
pub const S5_SLEEP_TYPE: u8 = 5;
/// The IOAPIC line of the system control interrupt.
pub const SCI_IRQ: u32 = 9;
/// The IOAPIC line of COM1.
pub const COM1_IRQ: u32 = 4;
/// Address of the IOAPIC.
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// Address of the local APICs.
pub const LAPIC_START: u32 = 0xfee0_0000;

const TABLES: u64 = 0xe_0000;
const TABLES_END: u64 = 0x10_0000;
const OEM: [u8; 6] = *b"FTVM  ";
const OEM_TABLE: [u8; 8] = *b"FTVMPC1 ";

/// Writes all tables and gives the address of the RSDP.
pub fn write_tables(mem: &GuestMem, vcpus: u32) -> Result<u64, BootError> {
    if !(1..=VCPUS_MAX).contains(&vcpus) {
        return Err(BootError::Vcpus(vcpus));
    }
    let mut writer = Writer {
        mem,
        // The RSDP comes first, where a guest also finds it by searching.
        next: TABLES + 64,
    };
    let facs = writer.table(&FACS::new())?;
    let dsdt = writer.table(&dsdt())?;
    let fadt = writer.table(&fadt(dsdt, facs))?;
    let madt = writer.table(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.table(&xsdt)?;
    write_all(mem, TABLES, &bytes(&Rsdp::new(OEM, xsdt)))?;
    Ok(TABLES)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

struct Writer<'a> {
    mem: &'a GuestMem,
    next: u64,
}

impl Writer<'_> {
    fn table(&mut self, table: &dyn Aml) -> Result<u64, BootError> {
        let bytes = bytes(table);
        let at = self.next;
        self.next = (at + bytes.len() as u64).next_multiple_of(64);
        debug_assert!(self.next <= TABLES_END, "64 vCPUs make tables of a few KiB");
        write_all(self.mem, at, &bytes)?;
        Ok(at)
    }
}

fn port(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(GasSpace::SystemIo, bits, 0, access, u64::from(port))
}

fn fadt(dsdt: u64, facs: u64) -> acpi_tables::fadt::FADT {
    // Legacy devices (COM1) and a keyboard controller that can reset; no VGA.
    const BOOT_ARCH: u16 = 1 | 1 << 2;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    // Both widths are filled in: readers of the old fields exist.
    fadt.dsdt = (dsdt as u32).into();
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.sci_int = (SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT_PORT).into();
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = port(PM1A_EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(PM1A_CONTROL_PORT, 16, AccessSize::WordAccess);
    fadt.p_lvl2_lat = 0xffff.into();
    fadt.p_lvl3_lat = 0xffff.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// Overrides the SCI to level, active high: bus ISA, IRQ 9 to GSI 9.
fn sci_override() -> [u8; 10] {
    const LEVEL_ACTIVE_HIGH: u8 = 0b1101;
    [2, 10, 0, SCI_IRQ as u8, SCI_IRQ as u8, 0, 0, 0, LEVEL_ACTIVE_HIGH, 0]
}

/// NMI on LINT1 of every local APIC.
fn lapic_nmi() -> [u8; 6] {
    [4, 6, 0xff, 0, 0, 1]
}

/// The MADT as bytes: `MADT` of the crate has no interrupt source overrides and no NMI entries.
fn madt(vcpus: u32) -> Sdt {
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, LocalInterruptController::Address(LAPIC_START));
    for id in 0..vcpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_START, 0));
    let bytes = bytes(&madt);
    let mut table = Sdt::new(*b"APIC", 36, 4, OEM, OEM_TABLE, 1);
    table.append_slice(&bytes[36..]);
    // PC-AT compatible: there is a dual 8259 too.
    table.write_u32(40, 1);
    table.append_slice(&sci_override());
    table.append_slice(&lapic_nmi());
    table.update_checksum();
    table
}

fn dsdt() -> Sdt {
    let pci_window = PCI_MMIO_START as u32..=(PCI_MMIO_END - 1) as u32;
    let pci = Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A03")) as &dyn Aml,
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(Path::new("_BBN"), &aml::ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0),
                    &IO::new(0xcf8, 0xcf8, 1, 8),
                    &AddressSpace::new_io(0u16, 0xcf7, None),
                    &AddressSpace::new_io(0xd00u16, 0xffff, None),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        *pci_window.start(),
                        *pci_window.end(),
                        None,
                    ),
                ]),
            ),
        ],
    )
    .to_bytes();
    let com1 = Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")) as &dyn Aml,
            &Name::new(Path::new("_UID"), &aml::ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(0x3f8, 0x3f8, 1, 8),
                    &Interrupt::new(true, true, false, false, COM1_IRQ),
                ]),
            ),
        ],
    )
    .to_bytes();
    let mut devices = pci;
    devices.extend(com1);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    dsdt.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    let s5 = Package::new(vec![&S5_SLEEP_TYPE as &dyn Aml, &S5_SLEEP_TYPE, &aml::ZERO, &aml::ZERO]);
    dsdt.append_slice(&bytes(&Name::new(Path::new("_S5_"), &s5)));
    dsdt.update_checksum();
    dsdt
}

trait ToBytes {
    fn to_bytes(&self) -> Vec<u8>;
}

impl<T: Aml> ToBytes for T {
    fn to_bytes(&self) -> Vec<u8> {
        bytes(self)
    }
}
