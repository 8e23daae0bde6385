//! The ACPI fixed hardware that the firmware tables announce (ACPI 6.5, section 4.8): PM1a events and control.
//!
//! The machine is always in ACPI mode (SCI_EN reads as one). There is no PM timer and no general-purpose event block.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::devices::bus::BusDevice;
use crate::devices::event::{DeviceEvent, DeviceEvents};
use crate::devices::irq::IrqLine;

/// First port of the PM1a event block (FADT PM1a_EVT_BLK, 4 bytes).
pub const EVENT_PORT: u16 = 0x600;
/// Port of the PM1a control block (FADT PM1a_CNT_BLK, 2 bytes).
pub const CONTROL_PORT: u16 = 0x604;
/// Number of ports from [`EVENT_PORT`].
pub const PORTS: u64 = 6;
/// GSI of the system control interrupt (FADT SCI_INT): level-triggered, active high.
pub const SCI_GSI: u32 = 9;
/// Sleep type of S5, as `\_S5` has to name it.
pub const S5_SLEEP_TYPE: u8 = 5;

const POWER_BUTTON: u16 = 1 << 8;
const STATUS_BITS: u16 = POWER_BUTTON;
/// Global lock, power button, sleep button and clock alarm can be enabled; only the button ever happens.
const ENABLE_BITS: u16 = 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
const SCI_ENABLED: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_BITS: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Bus master reload and the sleep type are kept; sleep enable is write-only.
const CONTROL_BITS: u16 = 1 << 1 | SLEEP_TYPE_BITS;

/// What is saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    status: u16,
    enable: u16,
    control: u16,
}

/// The PM1a blocks.
pub struct AcpiPm {
    state: AcpiPmState,
    sci: Arc<dyn IrqLine>,
    events: Arc<dyn DeviceEvents>,
}

impl AcpiPm {
    /// Power management after power-on.
    pub fn new(sci: Arc<dyn IrqLine>, events: Arc<dyn DeviceEvents>) -> Self {
        Self {
            state: AcpiPmState::default(),
            sci,
            events,
        }
    }

    /// A person pressed the power button: the guest is asked to shut down.
    pub fn press_power_button(&mut self) {
        self.state.status |= POWER_BUTTON;
        self.drive();
    }

    /// Drives the interrupt line as the registers demand.
    pub fn drive(&self) {
        self.sci.set(self.state.status & self.state.enable != 0);
    }

    /// What is saved.
    pub fn save(&self) -> AcpiPmState {
        self.state
    }

    /// Whether the state can be loaded.
    pub fn accepts(state: &AcpiPmState) -> bool {
        state.status & !STATUS_BITS == 0 && state.enable & !ENABLE_BITS == 0 && state.control & !CONTROL_BITS == 0
    }

    /// Takes over a state that [`Self::accepts`] approved.
    pub fn load(&mut self, state: AcpiPmState) {
        self.state = state;
        self.drive();
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.load(AcpiPmState::default());
    }

    fn image(&self) -> [u8; PORTS as usize] {
        let mut image = [0; PORTS as usize];
        let control = self.state.control | SCI_ENABLED;
        for (bytes, register) in image
            .chunks_exact_mut(2)
            .zip([self.state.status, self.state.enable, control])
        {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        image
    }

    fn write_byte(&mut self, offset: u64, byte: u8) {
        let shift = 8 * (offset % 2);
        let (value, mask) = (u16::from(byte) << shift, 0xffu16 << shift);
        let merge = |old: u16, allowed: u16| old & !mask | value & mask & allowed;
        match offset / 2 {
            // Status bits are cleared by writing ones.
            0 => self.state.status &= !value,
            1 => self.state.enable = merge(self.state.enable, ENABLE_BITS),
            2 => {
                self.state.control = merge(self.state.control, CONTROL_BITS);
                let sleep_type = (self.state.control & SLEEP_TYPE_BITS) >> SLEEP_TYPE_SHIFT;
                if value & SLEEP_ENABLE != 0 && sleep_type == u16::from(S5_SLEEP_TYPE) {
                    self.events.report(DeviceEvent::PowerOff);
                }
            }
            _ => {}
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            self.write_byte(at, *byte);
        }
        self.drive();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Events, Line};

    fn word(pm: &mut AcpiPm, offset: u64) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_power_button_interrupts_until_the_guest_acknowledges() {
        let (line, events) = (Line::new(), Events::new());
        let mut pm = AcpiPm::new(line.clone(), events.clone());
        pm.press_power_button();
        assert!(!line.asserted(), "not enabled yet");
        pm.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(line.asserted());
        assert_eq!(word(&mut pm, 0), POWER_BUTTON);
        pm.write(0, &0xffffu16.to_le_bytes());
        assert!(!line.asserted());
        assert_eq!((word(&mut pm, 0), word(&mut pm, 2)), (0, POWER_BUTTON));
    }

    #[test]
    fn s5_switches_off_and_other_sleep_types_do_not() {
        let (line, events) = (Line::new(), Events::new());
        let mut pm = AcpiPm::new(line, events.clone());
        let sleep = |kind: u16| (kind << SLEEP_TYPE_SHIFT | SLEEP_ENABLE).to_le_bytes();
        pm.write(4, &(5u16 << SLEEP_TYPE_SHIFT).to_le_bytes());
        pm.write(4, &sleep(1));
        assert_eq!(events.take(), []);
        pm.write(4, &sleep(5));
        assert_eq!(events.take(), [DeviceEvent::PowerOff]);
        assert_eq!(word(&mut pm, 4), 5 << SLEEP_TYPE_SHIFT | SCI_ENABLED);
    }

    #[test]
    fn a_loaded_state_drives_the_line() {
        let (line, events) = (Line::new(), Events::new());
        let mut pm = AcpiPm::new(line.clone(), events.clone());
        pm.write(2, &POWER_BUTTON.to_le_bytes());
        pm.press_power_button();
        let state = pm.save();
        let other_line = Line::new();
        let mut other = AcpiPm::new(other_line.clone(), events);
        assert!(AcpiPm::accepts(&state));
        other.load(state);
        assert!(other_line.asserted());
        assert_eq!(other.save(), state);
        other.reset();
        assert!(!other_line.asserted());
        assert!(!AcpiPm::accepts(&AcpiPmState {
            status: 1,
            ..AcpiPmState::default()
        }));
    }
}
