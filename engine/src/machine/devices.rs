//! Joins the machine and its devices.

use super::{DeviceSet, Platform};
use crate::devices::legacy::acpi_pm::SCI_GSI;
use crate::devices::legacy::serial::COM1_GSI;
use crate::devices::set;
use crate::state::{StateError, StateReader, StateWriter};
use std::sync::Arc;

impl Platform {
    /// What [`set::DeviceSet::new`] wants of the machine. `prepare_thread` runs first on every device thread.
    pub fn for_devices(&self, prepare_thread: Arc<dyn Fn(set::DeviceThread) + Send + Sync>) -> set::Platform {
        set::Platform {
            ram: self.ram.clone(),
            gate: self.gate.clone(),
            buses: self.buses.clone(),
            msi: self.msi.clone(),
            serial_irq: self.irq_line(COM1_GSI),
            sci_irq: self.irq_line(SCI_GSI),
            notify: self.notify.clone(),
            clock: self.clock.clone(),
            events: self.events.clone(),
            prepare_thread,
        }
    }
}

impl DeviceSet for Arc<set::DeviceSet> {
    fn save(&mut self, writer: &mut StateWriter) {
        set::DeviceSet::save(self, writer);
    }

    fn check(&self, reader: &StateReader<'_>) -> Result<(), StateError> {
        set::DeviceSet::check(self, reader)
    }

    fn load(&mut self, reader: &StateReader<'_>) -> Result<(), StateError> {
        set::DeviceSet::load(self, reader)
    }

    fn reset(&mut self) {
        set::DeviceSet::reset(self);
    }

    fn kick(&mut self) {
        set::DeviceSet::kick(self);
    }
}
