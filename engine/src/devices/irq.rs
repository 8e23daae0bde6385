//! How devices interrupt the guest, and how the machine wakes devices. The machine implements these over KVM.

use std::io;
use std::os::fd::BorrowedFd;

/// Delivers message-signalled interrupts (KVM_SIGNAL_MSI).
pub trait MsiSender: Send + Sync {
    /// Delivers the message `data` at `address` as the guest programmed it. A message that the interrupt controller
    /// refuses (masked, no such vCPU) is dropped, as on hardware.
    fn send(&self, address: u64, data: u32);
}

/// One line into the interrupt controllers (KVM_IRQ_LINE on a fixed GSI).
pub trait IrqLine: Send + Sync {
    /// Drives the line: true is asserted. Repeating a level is harmless.
    fn set(&self, asserted: bool);
}

/// Lets writes to a guest address signal an eventfd without leaving the kernel (KVM_IOEVENTFD).
///
/// Registration may fail: the write then arrives on the MMIO bus and the device signals the eventfd itself.
pub trait NotifyRegistrar: Send + Sync {
    /// Signals `eventfd` at every write to `address`, whatever its size and value.
    fn register(&self, address: u64, eventfd: BorrowedFd<'_>) -> io::Result<()>;
    /// Undoes [`Self::register`] with the same arguments.
    fn unregister(&self, address: u64, eventfd: BorrowedFd<'_>) -> io::Result<()>;
}

/// The guest's own time, which goes on without a step when another host takes over (kvmclock, not the host's clock).
pub trait GuestClock: Send + Sync {
    /// Nanoseconds since the machine was created. Never steps back, and stands still while the machine is paused.
    fn now_ns(&self) -> u64;
}
