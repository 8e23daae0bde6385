//! What happens in a machine and concerns its owner.

use crate::devices::event::{DeviceEvent, DeviceEvents};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

/// Something that only the machine's owner can deal with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// The guest asks for a reset: [`super::Machine::reset`].
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// A vCPU ran into a triple fault, which resets a PC: [`super::Machine::reset`].
    TripleFault,
    /// A dirty ring was full before anybody harvested; nothing is lost, but the epoch should end.
    DirtyRingFull,
    /// A vCPU stands still since then, because the guest has written all that [`super::Machine::limit_writes`] lets it; it
    /// goes on after the machine was paused and resumed.
    WritesLimited {
        /// When it stopped.
        since: Instant,
    },
    /// The machine can't go on; the text says why.
    Fatal(String),
    /// Something else that a device reports.
    Device(DeviceEvent),
}

/// Sends events from vCPU and device threads to the owner. Never blocks.
#[derive(Clone)]
pub struct EventSender(Arc<dyn Fn(VmEvent) + Send + Sync>);

impl EventSender {
    /// A sender that hands every event to `take`, which must not block.
    pub fn new(take: impl Fn(VmEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(take))
    }

    /// A sender with a channel behind it. Events that nobody receives any more are dropped.
    pub fn channel() -> (Self, Receiver<VmEvent>) {
        let (sender, receiver) = mpsc::channel();
        (Self::new(move |event| drop(sender.send(event))), receiver)
    }

    /// Sends an event.
    pub fn send(&self, event: VmEvent) {
        (self.0)(event);
    }
}

impl fmt::Debug for EventSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventSender")
    }
}

impl DeviceEvents for EventSender {
    fn report(&self, event: DeviceEvent) {
        self.send(match event {
            DeviceEvent::Reset => VmEvent::Reset,
            DeviceEvent::PowerOff => VmEvent::PowerOff,
            other => VmEvent::Device(other),
        });
    }
}
