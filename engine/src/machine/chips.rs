//! Interrupt controllers, timer and clock of KVM: saved and loaded.
//!
//! The timer's phase: KVM does not tell when the PIT's next tick is due, and starts the period anew when the state is
//! loaded. So the machine keeps count of the time since the last load; what was lost of a period is carried, and when a
//! whole period has come together the tick is made up for.

use crate::kvm::ioctl::{self, Abi};
use crate::kvm::{KvmError, Vm, failed, refused};
use crate::state::{Section, StateError, StateReader, StateWriter, kind};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use std::time::Duration;

/// Versions of the sections.
const IRQCHIP_VERSION: u16 = 1;
const PIT_VERSION: u16 = 1;
const CLOCK_VERSION: u16 = 1;

/// Frequency of the PIT.
const PIT_HZ: u64 = 1_193_182;
/// GSI of the PIT's channel 0.
const PIT_GSI: u32 = 0;
/// A mode of channel 0 in which KVM runs no timer.
const PIT_MODE_STILL: u8 = 5;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// All of it, independent of the host's time.
#[derive(Clone)]
pub(super) struct Chips {
    irqchips: [kvm_irqchip; 3],
    pit: Pit,
    pub(super) clock: Clock,
}

/// The timer. `count_load_time` of the channels is the time since the count was loaded, in ns.
#[derive(Clone, Copy)]
struct Pit {
    state: kvm_pit_state2,
    /// Time of a period that has passed but is not in any count, in ns.
    phase_ns: u64,
}

/// Points of the guest's time at which the state was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clock {
    /// kvmclock.
    pub(super) now_ns: u64,
    /// The host's TSC as the first vCPU counts it: what the vCPUs' TSC offsets refer to.
    pub(super) host_tsc: u64,
}

/// CLOCK_MONOTONIC, the clock that KVM's timer uses.
pub(super) fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn monotonic_ns() -> i64 {
    monotonic().as_nanos() as i64
}

impl Pit {
    /// Length of channel 0's period, if it has one.
    fn period_ns(&self) -> Option<u64> {
        let channel = &self.state.channels[0];
        matches!(channel.mode, 2 | 3).then(|| (u64::from(channel.count).max(1) * 1_000_000_000 / PIT_HZ).max(1))
    }
}

impl Chips {
    /// Reads everything. `since_load` is how long the timer has run since its state was loaded, `phase_ns` what was
    /// carried then.
    pub(super) fn read(vm: &Vm, host_tsc: u64, since_load: Duration, phase_ns: u64) -> Result<Self, KvmError> {
        let mut state = vm.fd().get_pit2().map_err(refused("reading the timer (PIT)"))?;
        let now = monotonic_ns();
        for channel in &mut state.channels {
            channel.count_load_time = if channel.count_load_time == 0 {
                0
            } else {
                now - channel.count_load_time
            };
        }
        let mut pit = Pit { state, phase_ns: 0 };
        if let Some(period) = pit.period_ns() {
            pit.phase_ns = (since_load.as_nanos() as u64)
                .wrapping_rem(period)
                .wrapping_add(phase_ns)
                % (2 * period);
        }
        let clock = ioctl::get_clock(vm.fd()).map_err(failed("reading the guest's clock"))?;
        Ok(Self {
            irqchips: read_irqchips(vm)?,
            pit,
            clock: Clock {
                now_ns: clock.clock,
                host_tsc,
            },
        })
    }

    /// Reads again what does not move with time, so that a save of a loaded machine shows what KVM has.
    pub(super) fn refresh(&mut self, vm: &Vm) -> Result<(), KvmError> {
        self.irqchips = read_irqchips(vm)?;
        Ok(())
    }

    /// Writes the sections.
    pub(super) fn put(&self, writer: &mut StateWriter) {
        for (instance, chip) in self.irqchips.iter().enumerate() {
            writer.put(kind::IRQCHIP, IRQCHIP_VERSION, instance as u32, irqchip_bytes(chip));
        }
        writer.put_with(kind::PIT, PIT_VERSION, 0, |out| {
            out.extend_from_slice(self.pit.state.as_bytes());
            out.extend_from_slice(&self.pit.phase_ns.to_le_bytes());
        });
        writer.put_with(kind::CLOCK, CLOCK_VERSION, 0, |out| {
            out.extend_from_slice(&self.clock.now_ns.to_le_bytes());
            out.extend_from_slice(&self.clock.host_tsc.to_le_bytes());
        });
    }

    /// Checks the sections of a state.
    pub(super) fn parse(reader: &StateReader<'_>) -> Result<Self, StateError> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (instance, chip) in irqchips.iter_mut().enumerate() {
            let section = reader.require(kind::IRQCHIP, IRQCHIP_VERSION, instance as u32)?;
            *chip = parse_irqchip(CHIPS[instance], &section)?;
        }
        let section = reader.require(kind::PIT, PIT_VERSION, 0)?;
        let (state, phase) = split(&section, kvm_pit_state2::SIZE)?;
        let pit = Pit {
            state: kvm_pit_state2::from_bytes(state).expect("as many bytes as the type has"),
            phase_ns: u64_of(&section, phase)?,
        };
        let section = reader.require(kind::CLOCK, CLOCK_VERSION, 0)?;
        let (now, tsc) = split(&section, 8)?;
        let clock = Clock {
            now_ns: u64_of(&section, now)?,
            host_tsc: u64_of(&section, tsc)?,
        };
        Ok(Self { irqchips, pit, clock })
    }

    /// Loads what does not move with time; the timer stands until [`Chips::start_timer`].
    pub(super) fn load(&self, vm: &Vm) -> Result<(), KvmError> {
        self.stop_timer(vm)?;
        for chip in &self.irqchips {
            vm.fd()
                .set_irqchip(chip)
                .map_err(refused("setting an interrupt controller"))?;
        }
        Ok(())
    }

    /// The timer stands until [`Chips::start_timer`].
    pub(super) fn stop_timer(&self, vm: &Vm) -> Result<(), KvmError> {
        let mut still = self.pit.state;
        still.channels[0].mode = PIT_MODE_STILL;
        vm.fd().set_pit2(&still).map_err(refused("setting the timer (PIT)"))
    }

    /// Sets the guest's clock to where it was.
    pub(super) fn start_clock(&self, vm: &Vm) -> Result<(), KvmError> {
        let clock = kvm_clock_data {
            clock: self.clock.now_ns,
            ..Default::default()
        };
        vm.fd().set_clock(&clock).map_err(refused("setting the guest's clock"))
    }

    /// Starts the timer; returns the phase that remains to be carried.
    pub(super) fn start_timer(&self, vm: &Vm) -> Result<u64, KvmError> {
        let now = monotonic_ns();
        let mut state = self.pit.state;
        for channel in &mut state.channels {
            channel.count_load_time = if channel.count_load_time == 0 {
                0
            } else {
                now.saturating_sub(channel.count_load_time)
            };
        }
        vm.fd().set_pit2(&state).map_err(refused("starting the timer (PIT)"))?;
        match self.pit.period_ns() {
            Some(period) if self.pit.phase_ns >= period => {
                for level in [true, false] {
                    vm.fd()
                        .set_irq_line(PIT_GSI, level)
                        .map_err(refused("making up for a tick"))?;
                }
                Ok((self.pit.phase_ns - period) % period)
            }
            Some(_) => Ok(self.pit.phase_ns),
            None => Ok(0),
        }
    }
}

fn read_irqchips(vm: &Vm) -> Result<[kvm_irqchip; 3], KvmError> {
    let mut irqchips = [kvm_irqchip::default(); 3];
    for (chip, id) in irqchips.iter_mut().zip(CHIPS) {
        chip.chip_id = id;
        vm.fd()
            .get_irqchip(chip)
            .map_err(refused("reading an interrupt controller"))?;
    }
    Ok(irqchips)
}

/// The part of the union that the controller uses.
fn irqchip_bytes(chip: &kvm_irqchip) -> &[u8] {
    // SAFETY: the kernel fills the member that belongs to the controller; both are plain integers.
    unsafe {
        match chip.chip_id {
            KVM_IRQCHIP_IOAPIC => chip.chip.ioapic.as_bytes(),
            _ => chip.chip.pic.as_bytes(),
        }
    }
}

fn parse_irqchip(id: u32, section: &Section<'_>) -> Result<kvm_irqchip, StateError> {
    let mut chip = kvm_irqchip {
        chip_id: id,
        ..Default::default()
    };
    let wrong = || {
        section.invalid(format!(
            "it has {} bytes, which is not what the controller has",
            section.bytes.len()
        ))
    };
    if id == KVM_IRQCHIP_IOAPIC {
        chip.chip.ioapic = Abi::from_bytes(section.bytes).ok_or_else(wrong)?;
    } else {
        chip.chip.pic = Abi::from_bytes(section.bytes).ok_or_else(wrong)?;
    }
    Ok(chip)
}

fn split<'a>(section: &Section<'a>, at: usize) -> Result<(&'a [u8], &'a [u8]), StateError> {
    section
        .bytes
        .split_at_checked(at)
        .ok_or_else(|| section.invalid(format!("it has only {} bytes", section.bytes.len())))
}

fn u64_of(section: &Section<'_>, bytes: &[u8]) -> Result<u64, StateError> {
    let bytes = bytes
        .try_into()
        .map_err(|_| section.invalid(format!("it has {} bytes", section.bytes.len())))?;
    Ok(u64::from_le_bytes(bytes))
}
