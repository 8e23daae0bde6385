//! The virtual machine: memory, vCPUs, interrupt controllers and devices as one thing that can be booted, paused,
//! saved, loaded and run on.
//!
//! ```text
//!   create ─► Still ─ boot ─► Still ─ resume ─► Running ─ pause ─► Still ─ save, harvest ─ resume ─► Running …
//!               └──── load (another machine's state; time stands) ────────────► resume: time runs on
//! ```
//!
//! A pause parks the vCPUs first and closes the gate for devices then; a resume goes the other way round. Between the
//! two nothing of the guest changes, so that saving and harvesting see one moment.
//!
//! Invariant: the harvest of an epoch comes after its pause, and pages are write-protected again before they are copied
//! (see [`crate::kvm::DirtySource`]), so no write is lost between two epochs.
//!
//! Invariant: time of a loaded machine, or of one whose time was held, stands until it is resumed: its TSC, clock and timers begin where they were saved,
//! and never step back.

mod chips;
mod config;
mod devices;
mod events;

pub use config::{MAX_VCPUS, MachineConfig};
pub use events::{EventSender, VmEvent};

use crate::boot::{self, BootError, BootSource};
use crate::devices::bus::Buses;
use crate::devices::event::DeviceEvents;
use crate::devices::irq::{GuestClock, IrqLine, MsiSender, NotifyRegistrar};
use crate::kvm::{CpuBaseline, CpuError, CpuOffer, Kvm, KvmError, Vm, cpu_of_host};
use crate::memory::{DirtyPages, GuestRam, MemoryError};
use crate::pause::PauseGate;
use crate::pause::clock::{PauseClock, Step};
use crate::seccomp::Filters;
use crate::state::{StateError, StateReader, StateWriter, kind};
use crate::vcpu::{MsrList, Vcpu, VcpuCore, VcpuState, VcpuStateVersion};
use chips::Chips;
use serde::{Deserialize, Serialize};
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Version of the section that says what the machine consists of.
const DESCRIPTION_VERSION: u16 = 1;

/// Why a machine can't be made, booted or changed.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the texts say it
pub enum MachineError {
    #[error("machine: {vcpus} vCPUs were asked for: choose 1 to {MAX_VCPUS}")]
    Vcpus { vcpus: u8 },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("machine: a device can't be made")]
    Devices(#[source] Box<dyn StdError + Send + Sync>),
    #[error("machine: {what} while the guest runs: pause it first")]
    Running { what: &'static str },
}

/// What devices are built on.
#[derive(Clone)]
pub struct Platform {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// Stops device threads; closed until the machine is resumed.
    pub gate: Arc<PauseGate>,
    /// Where devices are put.
    pub buses: Arc<Buses>,
    /// Message-signalled interrupts.
    pub msi: Arc<dyn MsiSender>,
    /// Wakes eventfds at guest writes.
    pub notify: Arc<dyn NotifyRegistrar>,
    /// Time of the guest.
    pub clock: Arc<dyn GuestClock>,
    /// What devices tell the machine's owner.
    pub events: Arc<dyn DeviceEvents>,
    vm: Arc<Vm>,
}

impl Platform {
    /// Input `gsi` of the interrupt controllers: interrupt of the ISA bus, or the ACPI interrupt.
    pub fn irq_line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(self.vm.irq_line(gsi))
    }
}

/// The devices of a machine, as it needs them. Called with the gate closed and all vCPUs parked.
pub trait DeviceSet: Send {
    /// Writes the state of all devices, in sections from [`kind::DEVICES`] on.
    fn save(&mut self, writer: &mut StateWriter);
    /// Checks that the state has all devices' sections and that loading them can't fail. Changes nothing.
    fn check(&self, reader: &StateReader<'_>) -> Result<(), StateError>;
    /// Loads a state that [`DeviceSet::check`] accepted.
    fn load(&mut self, reader: &StateReader<'_>) -> Result<(), StateError>;
    /// Brings all devices into the state after power-on.
    fn reset(&mut self);
    /// Has every queue looked at, and every driver interrupted, once: after a takeover nothing that was signalled before
    /// is lost. Takes effect when the gate opens.
    fn kick(&mut self);
}

/// A machine without devices.
#[derive(Debug, Default)]
pub struct NoDevices;

impl DeviceSet for NoDevices {
    fn save(&mut self, _: &mut StateWriter) {}

    fn check(&self, _: &StateReader<'_>) -> Result<(), StateError> {
        Ok(())
    }

    fn load(&mut self, _: &StateReader<'_>) -> Result<(), StateError> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn kick(&mut self) {}
}

/// What both machines of a pair must have alike; the first section of every state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    memory_bytes: u64,
    vcpus: u8,
    /// Checksum of the features in the CPU baseline. Not of the TSC's frequency: each vCPU's state has it.
    cpu: u32,
}

/// A virtual machine. Owned by one thread, the driver.
pub struct Machine {
    // Fields are dropped in this order: vCPU threads end before the devices and buses that they use.
    vcpus: Vec<Vcpu>,
    devices: Box<dyn DeviceSet>,
    vm: Arc<Vm>,
    gate: Arc<PauseGate>,
    offer: CpuOffer,
    description: Description,
    msr_list: MsrList,
    /// States of everything at power-on, for resets.
    power_on: PowerOn,
    time: Time,
}

struct PowerOn {
    vcpus: Vec<VcpuState>,
    chips: Chips,
}

/// Where the machine's time comes from.
enum Time {
    /// Timers started at this moment (CLOCK_MONOTONIC), with a phase of the PIT carried over.
    Running { since: Duration, phase_ns: u64 },
    /// Loaded, or stopped by [`Machine::hold_time`], and not yet resumed.
    Held(Box<Chips>),
}

impl Machine {
    /// Makes a machine that stands still: memory, vCPUs with their threads parked, and what `devices` builds.
    ///
    /// `filters` are the system call filters that the vCPU threads enter.
    pub fn create<E>(
        config: &MachineConfig,
        kvm: &Kvm,
        events: EventSender,
        filters: Option<Arc<Filters>>,
        devices: impl FnOnce(&Platform) -> Result<Box<dyn DeviceSet>, E>,
    ) -> Result<Self, MachineError>
    where
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        config.check()?;
        let host = cpu_of_host(kvm)?;
        let tsc_scaling = kvm.capabilities().tsc_scaling;
        let baseline = match &config.cpu {
            Some(baseline) => {
                baseline.check(&host, tsc_scaling)?;
                baseline.clone()
            }
            None => host.clone(),
        };
        let offer = CpuOffer {
            host,
            machine: baseline.clone(),
            tsc_scaling,
        };
        let ram = Arc::new(GuestRam::new(config.memory_bytes, config.prefault)?);
        let vm = Arc::new(Vm::new(kvm, ram.clone(), config.dirty_ring_entries)?);
        let cores = make_cores(kvm, &vm, config.vcpus, &baseline)?;
        let msr_list = cores[0].msr_list().clone();
        let platform = Platform {
            ram,
            gate: Arc::new(PauseGate::new_closed(0)),
            buses: Arc::new(Buses::default()),
            msi: vm.clone(),
            notify: vm.clone(),
            clock: vm.clone(),
            events: Arc::new(events.clone()),
            vm: vm.clone(),
        };
        let devices = devices(&platform).map_err(|error| MachineError::Devices(error.into()))?;
        let mut vcpus = Vec::new();
        for (index, core) in cores.into_iter().enumerate() {
            let buses = platform.buses.clone();
            vcpus.push(Vcpu::start(
                index as u8,
                core,
                vm.clone(),
                buses,
                events.clone(),
                filters.clone(),
            )?);
        }
        let description = Description {
            memory_bytes: config.memory_bytes,
            vcpus: config.vcpus,
            cpu: checksum(&baseline),
        };
        let power_on = read_power_on(&vcpus, &vm, &msr_list, baseline.tsc_khz)?;
        let time = Time::Running {
            since: chips::monotonic(),
            phase_ns: 0,
        };
        Ok(Self {
            vcpus,
            devices,
            vm,
            gate: platform.gate,
            offer,
            description,
            msr_list,
            power_on,
            time,
        })
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    /// The gate that stops devices; its epoch number belongs to the caller.
    pub fn gate(&self) -> &Arc<PauseGate> {
        &self.gate
    }

    /// The guest's time.
    pub fn clock(&self) -> Arc<dyn GuestClock> {
        self.vm.clone()
    }

    /// KVM's side, for harvesting from another thread.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// What this machine has to offer to a guest that runs elsewhere.
    pub fn cpu_offer(&self) -> &CpuOffer {
        &self.offer
    }

    /// The CPU that the guest sees.
    pub fn cpu(&self) -> &CpuBaseline {
        &self.offer.machine
    }

    /// The devices.
    pub fn devices(&mut self) -> &mut dyn DeviceSet {
        &mut *self.devices
    }

    fn is_running(&self) -> bool {
        !self.gate.is_closed()
    }

    fn require_still(&self, what: &'static str) -> Result<(), MachineError> {
        if self.is_running() {
            Err(MachineError::Running { what })
        } else {
            Ok(())
        }
    }

    /// Loads a kernel and sets the first vCPU to its entry. The machine must be new or reset, and stand still.
    pub fn boot(&mut self, source: &BootSource) -> Result<(), MachineError> {
        self.require_still("booting")?;
        let entry = boot::load(self.vm.ram(), source, self.vcpus.len() as u8)?;
        for vcpu in &self.vcpus {
            boot::set_up_memory_types(&vcpu.core(), self.offer.machine.physical_address_bits())?;
        }
        boot::set_up_first_vcpu(&self.vcpus[0].core(), &entry)?;
        Ok(())
    }

    /// Resets the machine in place and boots again, as the guest or a triple fault asked for. The clock and the TSC run
    /// on, RAM keeps its content (as after a warm reset of a PC) except where the kernel is loaded.
    ///
    /// The machine stands still afterwards; [`Machine::resume`] runs it.
    pub fn reset(&mut self, source: &BootSource) -> Result<(), MachineError> {
        self.pause();
        for (vcpu, state) in self.vcpus.iter().zip(&self.power_on.vcpus) {
            vcpu.core().reset(state)?;
        }
        self.power_on.chips.load(&self.vm)?;
        self.power_on.chips.start_timer(&self.vm)?;
        self.devices.reset();
        self.time = Time::Running {
            since: chips::monotonic(),
            phase_ns: 0,
        };
        self.vm.hold_clock(None);
        self.boot(source)
    }

    /// Runs the guest, from where it was paused, booted or loaded.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if self.is_running() {
            return Ok(());
        }
        if let Time::Held(chips) = &self.time {
            let shift = chips.clock.host_tsc.wrapping_sub(self.vcpus[0].core().host_tsc()?);
            for vcpu in &self.vcpus {
                vcpu.core().start_time(shift)?;
            }
            // After the TSCs: KVM's clock refers to them.
            chips.start_clock(&self.vm)?;
            let phase_ns = chips.start_timer(&self.vm)?;
            self.vm.hold_clock(None);
            self.time = Time::Running {
                since: chips::monotonic(),
                phase_ns,
            };
        }
        self.gate.open();
        self.vcpus.iter().for_each(Vcpu::resume);
        Ok(())
    }

    /// Lets time stand still for a paused guest until [`Machine::resume`], as for a loaded one: it never sees how long it was
    /// paused. Does nothing if time stands still already.
    pub fn hold_time(&mut self) -> Result<(), MachineError> {
        self.require_still("stopping its time")?;
        let Time::Running { since, phase_ns } = &self.time else {
            return Ok(());
        };
        let since_load = chips::monotonic().saturating_sub(*since);
        let chips = Chips::read(&self.vm, self.vcpus[0].core().host_tsc()?, since_load, *phase_ns)?;
        for vcpu in &self.vcpus {
            vcpu.core().hold_time()?;
        }
        chips.stop_timer(&self.vm)?;
        self.vm.hold_clock(Some(chips.clock.now_ns));
        self.time = Time::Held(Box::new(chips));
        Ok(())
    }

    /// Since when all vCPUs run; none while one has not begun to.
    pub fn running_since(&self) -> Option<Instant> {
        let since: Option<Vec<Instant>> = self.vcpus.iter().map(Vcpu::running_since).collect();
        since?.into_iter().max()
    }

    /// Stops the guest at a clean point: every vCPU's access completed, no device inside the gate. Does nothing to a
    /// machine that stands still.
    pub fn pause(&mut self) {
        self.pause_vcpus(false, &mut PauseClock::start());
    }

    /// Like [`Machine::pause`], and every vCPU saves its state in its own thread on the way; [`Machine::save_paused`]
    /// then only collects.
    pub fn pause_and_save(&mut self, clock: &mut PauseClock) {
        self.pause_vcpus(true, clock);
    }

    fn pause_vcpus(&mut self, save: bool, clock: &mut PauseClock) {
        self.vcpus.iter().for_each(|vcpu| vcpu.park(save));
        self.vcpus.iter().for_each(Vcpu::wait_parked);
        clock.parked(self.vcpus.iter().map(Vcpu::parking_time).max().unwrap_or_default());
        self.gate.close();
        clock.done(Step::Devices);
    }

    /// Writes the state of the paused machine.
    pub fn save(&mut self, writer: &mut StateWriter) -> Result<(), MachineError> {
        self.require_still("saving")?;
        for vcpu in &self.vcpus {
            vcpu.core().save()?;
        }
        self.save_paused(writer)
    }

    /// Writes the state of a machine that [`Machine::pause_and_save`] stopped.
    pub fn save_paused(&mut self, writer: &mut StateWriter) -> Result<(), MachineError> {
        self.require_still("saving")?;
        let description = postcard::to_allocvec(&self.description).expect("integers can be serialised");
        writer.put(kind::MACHINE, DESCRIPTION_VERSION, 0, &description);
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            writer.put(kind::VCPU, VcpuStateVersion::CURRENT, index as u32, vcpu.core().saved());
        }
        match &mut self.time {
            Time::Running { since, phase_ns } => {
                let host_tsc = self.vcpus[0].core().host_tsc()?;
                let since_load = chips::monotonic().saturating_sub(*since);
                Chips::read(&self.vm, host_tsc, since_load, *phase_ns)?.put(writer);
            }
            Time::Held(chips) => {
                chips.refresh(&self.vm)?;
                chips.put(writer);
            }
        }
        self.devices.save(writer);
        Ok(())
    }

    /// Loads a state. It is checked completely before anything changes, so a refused state leaves the machine as it was;
    /// only a value that KVM itself refuses ends half-way, and leaves a machine that must not run.
    ///
    /// Time stands until [`Machine::resume`].
    pub fn load(&mut self, reader: &StateReader<'_>) -> Result<(), MachineError> {
        self.require_still("loading")?;
        let (vcpus, chips) = self.check_state(reader)?;
        self.vm.hold_clock(Some(chips.clock.now_ns));
        // Controllers before vCPUs: setting the IOAPIC makes KVM deliver pending level interrupts to the local APICs,
        // whose own state then replaces what was delivered.
        chips.load(&self.vm)?;
        for (vcpu, state) in self.vcpus.iter().zip(&vcpus) {
            vcpu.core().load(state)?;
        }
        self.time = Time::Held(Box::new(chips));
        self.devices.load(reader)?;
        Ok(())
    }

    /// Checks that a state could be loaded; changes nothing.
    pub fn check(&self, reader: &StateReader<'_>) -> Result<(), StateError> {
        self.check_state(reader).map(drop)
    }

    fn check_state(&self, reader: &StateReader<'_>) -> Result<(Vec<VcpuState>, Chips), StateError> {
        let section = reader.require(kind::MACHINE, DESCRIPTION_VERSION, 0)?;
        let theirs: Description =
            postcard::from_bytes(section.bytes).map_err(|error| section.invalid(error.to_string()))?;
        if theirs != self.description {
            return Err(section.invalid(format!(
                "it is of a machine with {} bytes of memory, {} vCPUs and CPU {:08x}, this one has {}, {} and {:08x}: \
                 configure both seats alike",
                theirs.memory_bytes,
                theirs.vcpus,
                theirs.cpu,
                self.description.memory_bytes,
                self.description.vcpus,
                self.description.cpu
            )));
        }
        let known = |kind, instance| match kind {
            kind::VCPU => instance < u32::from(self.description.vcpus),
            kind::IRQCHIP => instance < 3,
            kind::MACHINE | kind::PIT | kind::CLOCK => instance == 0,
            _ => kind >= kind::DEVICES,
        };
        if let Some(section) = reader.sections().find(|section| !known(section.kind, section.instance)) {
            return Err(StateError::Unexpected {
                kind: section.kind,
                instance: section.instance,
            });
        }
        let scaling = self.vm.capabilities().tsc_scaling;
        let vcpus = (0..self.vcpus.len() as u32)
            .map(|index| {
                let section = reader.require(kind::VCPU, VcpuStateVersion::CURRENT, index)?;
                VcpuState::parse(section, &self.msr_list, self.offer.machine.tsc_khz, scaling)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let chips = Chips::parse(reader)?;
        self.devices.check(reader)?;
        Ok((vcpus, chips))
    }

    /// After a takeover: has every queue looked at once. Takes effect when the machine is resumed.
    pub fn after_takeover(&mut self) {
        self.devices.kick();
    }

    /// Starts or stops tracking of the guest's writes; after a start every page counts as clean.
    pub fn set_tracking(&self, on: bool) -> Result<(), MachineError> {
        Ok(self.vm.set_tracking(on)?)
    }

    /// Between two harvests the guest's vCPUs may write about so many pages, see [`Vm::limit_writes`].
    pub fn limit_writes(&self, pages: usize) {
        self.vm.limit_writes(pages);
    }

    /// Whether the guest's vCPUs can be limited.
    pub fn limits_writes(&self) -> bool {
        self.vm.limits_writes()
    }

    /// Adds all pages written since the last harvest, by the guest or by devices, and write-protects them again. May be
    /// called while the guest runs; after a pause nothing is left behind.
    pub fn harvest(&self, into: &mut DirtyPages) -> Result<(), MachineError> {
        Ok(self.vm.harvest(into)?)
    }
}

fn make_cores(kvm: &Kvm, vm: &Arc<Vm>, count: u8, baseline: &CpuBaseline) -> Result<Vec<VcpuCore>, KvmError> {
    let mut cores: Vec<VcpuCore> = Vec::new();
    for index in 0..count {
        let list = cores.first().map(|core| core.msr_list().clone());
        cores.push(VcpuCore::new(kvm, vm, index, count, baseline, list.as_ref())?);
    }
    Ok(cores)
}

/// Takes the states of a machine that never ran.
fn read_power_on(vcpus: &[Vcpu], vm: &Vm, msr_list: &MsrList, tsc_khz: u32) -> Result<PowerOn, MachineError> {
    let mut writer = StateWriter::new();
    for (index, vcpu) in vcpus.iter().enumerate() {
        let mut core = vcpu.core();
        core.save()?;
        writer.put(kind::VCPU, VcpuStateVersion::CURRENT, index as u32, core.saved());
    }
    let reader = StateReader::parse(writer.finish())?;
    let states = (0..vcpus.len() as u32)
        .map(|index| {
            VcpuState::parse(
                reader.require(kind::VCPU, VcpuStateVersion::CURRENT, index)?,
                msr_list,
                tsc_khz,
                false,
            )
        })
        .collect::<Result<_, StateError>>()?;
    let chips = Chips::read(vm, vcpus[0].core().host_tsc()?, Duration::ZERO, 0)?;
    Ok(PowerOn { vcpus: states, chips })
}

fn checksum(baseline: &CpuBaseline) -> u32 {
    crc32fast::hash(&postcard::to_allocvec(baseline.leaves()).expect("a baseline can be serialised"))
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Threads end at a clean point, before anything that they use goes.
        self.pause();
    }
}

#[cfg(test)]
pub(crate) mod test_guest;
#[cfg(test)]
mod tests;
