//! The devices of a machine: what a guest finds on its buses.
//!
//! Frontends (this module) know no backends: they move frames, blocks and characters through the traits of
//! [`crate::backends`]. Interrupts leave through [`irq::MsiSender`] and [`irq::IrqLine`], and what concerns the whole
//! machine (reset, power-off, a failing disk) is reported through [`event::DeviceEvents`]. [`set::DeviceSet`] builds
//! them all and is what a machine holds.
//!
//! Invariant: a device thread takes the pause gate before a device's mutex and holds both only for bounded work; it
//! blocks outside. vCPU threads take the mutex alone. So once vCPUs are parked and the gate is closed, no device changes.
//!
//! Invariant: nothing that the guest writes can make a device panic, loop without bound or allocate without bound. A
//! driver that breaks the rules of virtio gets DEVICE_NEEDS_RESET.

pub mod bus;
pub mod event;
pub mod irq;
pub mod legacy;
pub mod pci;
pub mod set;
#[cfg(test)]
pub(crate) mod testing;
pub mod virtio;

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::state::{Section, StateError, StateWriter};

/// Kinds of the sections that devices are saved in; see [`crate::state::kind`].
pub mod kind {
    use crate::state::kind::DEVICES;

    /// The PCI root bus.
    pub const PCI_ROOT: u16 = DEVICES;
    /// virtio-net; the instance is the interface's index.
    pub const NET: u16 = DEVICES + 1;
    /// virtio-blk; the instance is the disk's index.
    pub const BLK: u16 = DEVICES + 2;
    /// virtio-rng.
    pub const RNG: u16 = DEVICES + 3;
    /// COM1.
    pub const SERIAL: u16 = DEVICES + 4;
    /// The CMOS clock.
    pub const RTC: u16 = DEVICES + 5;
    /// ACPI power management.
    pub const ACPI_PM: u16 = DEVICES + 6;
}

/// Why the devices of a machine could not be made.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// More devices than the bus has slots.
    #[error("{devices} network interfaces and disks are configured, the machine has slots for {slots}: remove some")]
    TooMany {
        /// Configured devices.
        devices: usize,
        /// Slots for them.
        slots: usize,
    },
    /// Configuration and backends are of different number.
    #[error("{configured} {what} are configured, but {given} backends were given")]
    Mismatch {
        /// Disks or network interfaces.
        what: &'static str,
        /// In the configuration.
        configured: usize,
        /// Backends.
        given: usize,
    },
    /// A disk's size is zero or no multiple of the sector size.
    #[error("disk {disk} has {size_bytes} bytes: its size must be a positive multiple of 512")]
    DiskSize {
        /// Index of the disk.
        disk: usize,
        /// Its size in bytes.
        size_bytes: u64,
    },
    /// A disk that the guest may write has a backend that can't.
    #[error("disk {disk} is configured for writing, but its file is read-only: make it writable or set read_only")]
    DiskReadOnly {
        /// Index of the disk.
        disk: usize,
    },
    /// An MTU that no Ethernet has.
    #[error("network interface {nic} has an MTU of {mtu}: choose one between 68 and 65521")]
    Mtu {
        /// Index of the interface.
        nic: usize,
        /// Its MTU in bytes.
        mtu: u16,
    },
    /// A MAC address that no interface can have.
    #[error("network interface {nic} has the multicast or zero MAC address {mac:02x?}: choose a unicast one")]
    Mac {
        /// Index of the interface.
        nic: usize,
        /// Its address.
        mac: [u8; 6],
    },
    /// Something else is on the buses where a device belongs.
    #[error("the buses are not free: a machine takes one set of devices")]
    Bus(#[from] bus::BusError),
    /// The host gave no eventfd.
    #[error("{device}: no eventfd: raise the limit of open files")]
    Wake {
        /// Which device.
        device: String,
        /// The cause.
        source: io::Error,
    },
    /// The host gave no thread.
    #[error("{device}: its thread can't be started: raise the limit of processes")]
    Thread {
        /// Which device.
        device: String,
        /// The cause.
        source: io::Error,
    },
}

/// Writes `value` as one section.
fn encode(writer: &mut StateWriter, kind: u16, version: u16, instance: u32, value: &impl Serialize) {
    writer.put_with(kind, version, instance, |out| {
        postcard::to_io(value, out).expect("memory takes all bytes and device states have no unsized parts");
    });
}

/// Reads the value that makes up the whole section.
fn decode<T: DeserializeOwned>(section: &Section<'_>) -> Result<T, StateError> {
    match postcard::take_from_bytes(section.bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(section.invalid(format!("{} bytes too many", rest.len()))),
        Err(error) => Err(section.invalid(error.to_string())),
    }
}
