//! The devices of a machine: what a guest finds on its buses.
//!
//! Frontends (this module) know no backends: they move frames, blocks and characters through the traits of
//! [`crate::backends`]. Interrupts leave through [`irq::MsiSender`] and [`irq::IrqLine`], and what concerns the whole
//! machine (reset, power-off, a failing disk) is reported through [`event::DeviceEvents`].

pub mod bus;
pub mod event;
pub mod irq;
