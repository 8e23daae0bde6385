//! KVM: what this program needs of it beyond what the `kvm-ioctls` crate offers.

mod signals;

pub use signals::{GuestClock, IoEvents, IrqLine, MsiSender};
