//! What devices report to the owner of the machine.

use std::fmt;

/// Something that the machine's owner has to know or act upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The guest asked for a reset of the machine (reset register, keyboard controller).
    Reset,
    /// The guest switched the machine off (ACPI S5).
    PowerOff,
    /// A disk failed a request. Reported once until a request succeeds again.
    DiskError {
        /// Index of the disk in the machine's configuration.
        disk: usize,
        /// What failed, with the operating system's error.
        message: String,
    },
    /// A disk that had failed works again.
    DiskRecovered {
        /// Index of the disk in the machine's configuration.
        disk: usize,
    },
    /// A network interface's backend failed; frames may have been dropped. Reported once until it works again.
    NetError {
        /// Index of the interface in the machine's configuration.
        nic: usize,
        /// What failed, with the operating system's error.
        message: String,
    },
    /// The guest's driver broke the rules of virtio; the device stopped until the driver resets it.
    NeedsReset {
        /// Which device, for example `net0`.
        device: String,
        /// Which rule.
        message: String,
    },
}

impl fmt::Display for DeviceEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => write!(f, "the guest resets the machine"),
            Self::PowerOff => write!(f, "the guest switched the machine off"),
            Self::DiskError { disk, message } => write!(
                f,
                "disk {disk}: {message}; it is the guest's error where no standby takes over"
            ),
            Self::DiskRecovered { disk } => write!(f, "disk {disk} works again"),
            Self::NetError { nic, message } => write!(f, "network interface {nic}: {message}"),
            Self::NeedsReset { device, message } => {
                write!(
                    f,
                    "{device}: the guest's driver broke the virtio rules ({message}); the device waits for a reset"
                )
            }
        }
    }
}

/// Receives the events of all devices. Called on vCPU and device threads: must not block.
pub trait DeviceEvents: Send + Sync {
    /// Takes one event.
    fn report(&self, event: DeviceEvent);
}
