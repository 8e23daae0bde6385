//! Between the devices and the host: backends that hold output back, copy input to the standby and record disk changes.
//!
//! ```text
//!   frontend NIC  ── transmit ──► Guard ──► Outbox ── gate ──► tap    tap ── receive ──► copy to the standby ──► frontend
//!   frontend disk ── write ─────► volume, at once; completed() ──► DiskLog of the running epoch
//! ```
//!
//! Frontends see the ordinary backend traits. Everything that has to do with an epoch happens inside the pause gate.

mod claims;
mod disk;
mod nic;

pub use claims::{Claims, Guard, Reason, Refused};
pub use disk::{DiskLog, EpochChanges, SeatDisk};
pub(crate) use nic::{FRAME_BYTES_MAX, KEPT_BYTES_MAX};
pub use nic::{HostSink, Inbox, InputCopy, NicPlace, SeatConsole, SeatNic, discard_queued, queued_for};
