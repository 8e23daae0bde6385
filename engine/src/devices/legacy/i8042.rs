//! Keyboard controller at ports 0x60 and 0x64: nothing but its reset pulse. The firmware tables say that there is no
//! keyboard.

use std::sync::Arc;

use crate::devices::bus::BusDevice;
use crate::devices::event::{DeviceEvent, DeviceEvents};

/// The command and status port.
pub const COMMAND_PORT: u64 = 0x64;

const PULSE_RESET: u8 = 0xfe;

/// The controller's command port.
pub struct I8042(Arc<dyn DeviceEvents>);

impl I8042 {
    /// A controller that reports resets to `events`.
    pub fn new(events: Arc<dyn DeviceEvents>) -> Self {
        Self(events)
    }
}

impl BusDevice for I8042 {
    /// Input and output buffers are empty.
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            self.0.report(DeviceEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Events;

    #[test]
    fn only_the_reset_pulse_does_something() {
        let events = Events::new();
        let mut i8042 = I8042::new(events.clone());
        i8042.write(0, &[0xaa]);
        i8042.write(0, &[0xfe, 0xfe]);
        assert_eq!(events.take(), []);
        i8042.write(0, &[0xfe]);
        assert_eq!(events.take(), [DeviceEvent::Reset]);
        let mut status = [0xff];
        i8042.read(0, &mut status);
        assert_eq!(status, [0], "a guest that waits for an empty input buffer goes on");
    }
}
