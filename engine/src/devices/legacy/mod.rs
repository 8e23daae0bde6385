//! What remains of a PC: serial port, keyboard controller (reset only), clock, ACPI power management.

pub mod acpi_pm;
pub mod i8042;
pub mod rtc;
pub mod serial;
