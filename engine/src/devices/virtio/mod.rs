//! Virtio 1.2 devices over the modern PCI transport.
//!
//! ```text
//!   vCPU ── MMIO ──► pci_device::Window ─┐                      ┌─ worker thread ── gate.enter()
//!   vCPU ── 0xCFC ─► pci_device::Function┴─► Mutex<Transport, Frontend> ◄┘   │
//!   vCPU ── notify ─► ioeventfd ─────────────── poll ──────────────────────┘
//! ```
//!
//! Every device has one worker thread, which takes the pause gate first and the device's mutex second, never the other
//! way round. vCPU threads take the mutex alone: they are parked before the gate is closed.

pub mod blk;
pub mod net;
pub mod pci_device;
pub mod queue;
#[cfg(test)]
pub(crate) mod rig;
pub mod rng;
pub mod transport;
pub(crate) mod worker;

use serde::Serialize;
use serde::de::DeserializeOwned;

use queue::QueueState;

/// VIRTIO_F_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

/// What makes one kind of virtio device out of the transport.
pub trait Frontend: Send + 'static {
    /// Virtio device ID (section 5).
    const DEVICE_ID: u16;
    /// PCI class code, 0xBBSSPP.
    const PCI_CLASS: u32;
    /// Sizes of the queues that the device offers.
    const QUEUES: &'static [u16];
    /// Kind of the section that the state is saved in, and its version.
    const SECTION: (u16, u16);
    /// What is saved beside the transport.
    type State: Serialize + DeserializeOwned;

    /// Features of this device; the transport adds its own.
    fn features(&self) -> u64;
    /// The device configuration, read-only and constant.
    fn config(&self) -> &[u8];
    /// Requests were taken from the queues and not given back: a reset has to wait.
    fn busy(&self) -> bool;
    /// The driver reset the device.
    fn reset(&mut self);
    /// What is saved.
    fn save(&self) -> Self::State;
    /// Checks a state together with that of the queues; an error says what is wrong.
    fn check(&self, state: &Self::State, queues: &[QueueState]) -> Result<(), String>;
    /// Takes over a state that [`Self::check`] approved.
    fn load(&mut self, state: Self::State);
}
