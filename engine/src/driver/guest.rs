//! The machine with its devices and what it boots from, as the driver uses it.

use std::sync::Arc;
use std::time::Instant;

use crate::boot::BootSource;
use crate::devices::set::{DeviceCounts, DeviceSet, DisksInUse};
use crate::kvm::CpuOffer;
use crate::machine::{Machine, MachineError};
use crate::memory::{DirtyPages, GuestRam};
use crate::pause::PauseGate;
use crate::pause::clock::{PauseClock, Step};
use crate::state::{StateReader, StateWriter};

/// The guest of a seat, running, paused, or not there yet.
pub struct SeatMachine {
    machine: Machine,
    devices: Arc<DeviceSet>,
    boot: BootSource,
    tracking: bool,
}

impl SeatMachine {
    /// A machine that stands still.
    pub fn new(machine: Machine, devices: Arc<DeviceSet>, boot: BootSource) -> Self {
        Self {
            machine,
            devices,
            boot,
            tracking: false,
        }
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.machine.ram()
    }

    /// What the machine has to offer to a guest that runs elsewhere.
    pub fn cpu_offer(&self) -> &CpuOffer {
        self.machine.cpu_offer()
    }

    /// The MTU that the guest was told, by network card.
    pub fn mtus(&self) -> Vec<u16> {
        self.devices.mtus()
    }

    /// What its devices have done.
    pub fn device_counts(&self) -> DeviceCounts {
        self.devices.counts()
    }

    /// The pause gate, whose epoch number is the running epoch.
    pub fn gate(&self) -> &Arc<PauseGate> {
        self.machine.gate()
    }

    /// Loads the kernel; [`Self::resume`] runs it.
    pub fn boot(&mut self) -> Result<(), MachineError> {
        self.machine.boot(&self.boot)
    }

    /// Resets in place; the guest stands still at its kernel's entry.
    pub fn reset(&mut self) -> Result<(), MachineError> {
        self.machine.reset(&self.boot)
    }

    /// Runs the guest.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.machine.resume()
    }

    /// Time stands still for a paused guest until it is resumed.
    pub fn hold_time(&mut self) -> Result<(), MachineError> {
        self.machine.hold_time()
    }

    /// Since when all vCPUs run; none while one has not begun to.
    pub fn running_since(&self) -> Option<Instant> {
        self.machine.running_since()
    }

    /// Stops the guest at a clean point.
    pub fn pause(&mut self) {
        self.machine.pause();
    }

    /// Stops the guest at a clean point and gives its state.
    pub fn pause_and_save(&mut self, clock: &mut PauseClock) -> Result<Vec<u8>, MachineError> {
        let mut writer = StateWriter::new();
        if self.machine.gate().is_closed() {
            self.machine.save(&mut writer)?;
        } else {
            self.machine.pause_and_save(clock);
            self.machine.save_paused(&mut writer)?;
        }
        let state = writer.finish().to_vec();
        clock.done(Step::State);
        Ok(state)
    }

    /// Checks that a state could be loaded.
    pub fn check(&self, state: &[u8]) -> Result<(), MachineError> {
        let reader = StateReader::parse(state)?;
        Ok(self.machine.check(&reader)?)
    }

    /// Loads a state; the guest stands still.
    pub fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        let reader = StateReader::parse(state)?;
        self.machine.load(&reader)
    }

    /// Whether the guest's writes are found.
    pub fn is_tracking(&self) -> bool {
        self.tracking
    }

    /// Starts or stops finding the guest's writes. After a start every page counts as clean.
    pub fn set_tracking(&mut self, on: bool) -> Result<(), MachineError> {
        self.tracking = on;
        self.machine.set_tracking(on)
    }

    /// Adds every page that was written since the last harvest.
    pub fn harvest(&self, into: &mut DirtyPages) -> Result<(), MachineError> {
        self.machine.harvest(into)
    }

    /// Between two harvests the guest may write about so many pages, then its vCPUs stand still.
    pub fn limit_writes(&self, pages: usize) {
        self.machine.limit_writes(pages);
    }

    /// Whether this host can limit it.
    pub fn limits_writes(&self) -> bool {
        self.machine.limits_writes()
    }

    /// After a takeover: every queue is looked at once.
    pub fn after_takeover(&mut self) {
        self.machine.after_takeover();
    }

    /// Since when the request that each disk has under way has been so; none where there is none.
    pub fn requests_since(&self) -> Vec<Option<Instant>> {
        self.devices.requests_since()
    }

    /// The disks' requests that a paused guest has under way.
    pub fn disks_in_use(&self) -> DisksInUse {
        self.devices.disks_in_use()
    }

    /// Types into the serial console; gives how many bytes had room. The guest must run.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.devices.console_input(bytes)
    }

    /// Presses the power button. The guest must run.
    pub fn press_power_button(&self) {
        self.devices.press_power_button();
    }
}
