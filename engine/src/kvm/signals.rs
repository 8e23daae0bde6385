//! What devices use of KVM, as traits: tests of devices run without it.

use std::io;
use vmm_sys_util::eventfd::EventFd;

/// Delivers message-signalled interrupts.
pub trait MsiSender: Send + Sync {
    /// Sends the message `data` to `address`, both as the guest wrote them into its MSI-X table (PCI Local Bus 3.0,
    /// section 6.8). A message that addresses nobody is lost, as on real hardware.
    fn send(&self, address: u64, data: u32);
}

/// One level-triggered or edge-triggered input of the interrupt controllers.
pub trait IrqLine: Send + Sync {
    /// Raises or lowers the line. For an edge-triggered input the rising edge is the interrupt.
    fn set(&self, asserted: bool);
}

/// Wakes an eventfd when the guest writes to an address, without an exit to this program.
pub trait IoEvents: Send + Sync {
    /// Guest writes of any value and width at MMIO address `gpa` signal `fd` from now on.
    fn register(&self, gpa: u64, fd: &EventFd) -> io::Result<()>;
    /// Undoes [`IoEvents::register`].
    fn unregister(&self, gpa: u64, fd: &EventFd) -> io::Result<()>;
}

/// Time as the guest lives it: stands still while the guest is paused, is carried over in the state, never steps back,
/// and knows nothing of the host's wall clock.
pub trait GuestClock: Send + Sync {
    /// Nanoseconds since the machine was created.
    fn now_ns(&self) -> u64;
}
