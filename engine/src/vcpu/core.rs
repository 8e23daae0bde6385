//! One vCPU of KVM: made with the guest's CPU, saved and loaded.

use super::msrs::{self, IA32_TSC, IA32_TSC_DEADLINE, KVM_WALL_CLOCKS, MsrList};
use super::state::{ApicTimer, VcpuState, VcpuTime, encode};
use crate::kvm::ioctl::{self, Abi};
use crate::kvm::{CpuBaseline, Kvm, KvmError, Vm, cpuid_of_vcpu, failed, refused, tsc_alike};
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_mp_state, kvm_xsave};
use kvm_ioctls::VcpuFd;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of a wall clock structure of kvmclock, `virt/kvm/x86/msr.rst`.
const WALL_CLOCK_BYTES: usize = 12;

/// Everything that belongs to one vCPU.
#[derive(Debug)]
pub struct VcpuCore {
    pub(super) fd: VcpuFd,
    pub(super) index: u8,
    /// The last exit's answer was not yet taken by KVM.
    pub(super) incomplete: bool,
    vm: Arc<Vm>,
    msr_list: MsrList,
    msr_buffer: Msrs,
    /// The frequency that the guest was told.
    tsc_khz: u32,
    /// KVM scales the host's TSC to the guest's frequency.
    tsc_scaled: bool,
    /// Bytes of the state as last saved.
    saved: Vec<u8>,
    /// What a load or [`VcpuCore::hold_time`] left to [`VcpuCore::start_time`].
    held: Option<Held>,
}

/// Parts of a loaded or held state that move with time: they are set when the guest runs on.
#[derive(Debug, Clone, Copy)]
struct Held {
    time: VcpuTime,
    timer: ApicTimer,
}

impl VcpuCore {
    /// Makes vCPU `index` of `count` with the CPU of `baseline`. `msr_list` is that of the first vCPU, which finds it.
    pub fn new(
        kvm: &Kvm,
        vm: &Arc<Vm>,
        index: u8,
        count: u8,
        baseline: &CpuBaseline,
        msr_list: Option<&MsrList>,
    ) -> Result<Self, KvmError> {
        let fd = vm.create_vcpu(index)?;
        let host_khz = fd.get_tsc_khz().map_err(refused("reading the TSC frequency"))?;
        let tsc_scaled = host_khz != baseline.tsc_khz && vm.capabilities().tsc_scaling;
        if tsc_scaled {
            fd.set_tsc_khz(baseline.tsc_khz)
                .map_err(refused("setting the TSC frequency"))?;
        }
        fd.set_cpuid2(&cpuid_of_vcpu(baseline, index, count)?)
            .map_err(refused("setting the CPU's features"))?;
        // As few machine check banks as KVM allows: errors of the host's memory are not passed on.
        if let Err(error) = ioctl::setup_mce(&fd, 1) {
            tracing::debug!("machine check banks stay as they are: {error}");
        }
        let msr_list = msr_list.map_or_else(|| MsrList::probe(kvm, &fd), |list| Ok(list.clone()))?;
        let core = Self {
            msr_buffer: msr_list.buffer()?,
            fd,
            index,
            incomplete: false,
            vm: vm.clone(),
            msr_list,
            tsc_khz: baseline.tsc_khz,
            tsc_scaled,
            saved: Vec::new(),
            held: None,
        };
        core.tsc_offset()?;
        Ok(core)
    }

    /// The vCPU's file.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The registers that the state carries.
    pub fn msr_list(&self) -> &MsrList {
        &self.msr_list
    }

    pub(super) fn immediate_exit_ptr(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }

    /// The state as [`VcpuCore::save`] left it.
    pub fn saved(&self) -> &[u8] {
        &self.saved
    }

    fn tsc_offset(&self) -> Result<u64, KvmError> {
        ioctl::get_device_attr_u64(&self.fd, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into())
            .map_err(failed("reading the TSC offset (needs Linux 5.16)"))
    }

    fn set_tsc_offset(&self, offset: u64) -> Result<(), KvmError> {
        ioctl::set_device_attr_u64(&self.fd, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into(), offset)
            .map_err(failed("setting the TSC offset"))
    }

    /// The TSC of the host as this vCPU counts it: scaled, without the guest's offset.
    pub fn host_tsc(&self) -> Result<u64, KvmError> {
        if !self.tsc_scaled {
            // SAFETY: every x86-64 CPU has this instruction, and user mode may use it.
            return Ok(unsafe { std::arch::x86_64::_rdtsc() });
        }
        Ok(msrs::read_one(&self.fd, IA32_TSC)?.wrapping_sub(self.tsc_offset()?))
    }

    /// Sets a model-specific register.
    pub fn set_msr(&self, index: u32, value: u64) -> Result<(), KvmError> {
        msrs::write_one(&self.fd, index, value)
    }

    /// Whether a loaded state waits for [`VcpuCore::start_time`].
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Reads the whole state into the vCPU's own buffer. The vCPU must be parked.
    ///
    /// The MP state comes first, because reading it makes KVM act on pending INIT and start-up messages; events come
    /// last, because KVM folds pending NMIs into them.
    pub fn save(&mut self) -> Result<(), KvmError> {
        let fd = &self.fd;
        let mp_state = fd.get_mp_state().map_err(refused("reading the MP state"))?;
        let regs = fd.get_regs().map_err(refused("reading registers"))?;
        let sregs = ioctl::get_sregs2(fd).map_err(failed("reading special registers"))?;
        let xcrs = fd.get_xcrs().map_err(refused("reading XCR0"))?;
        let xsave = fd.get_xsave().map_err(refused("reading extended registers"))?;
        let debugregs = fd.get_debug_regs().map_err(refused("reading debug registers"))?;
        let mut lapic = fd.get_lapic().map_err(refused("reading the local APIC"))?;
        msrs::read_all(fd, &mut self.msr_buffer)?;
        let (entries, own) = self.msr_buffer.as_slice().split_at(self.msr_list.indices().len());
        let (tsc_deadline, wall_clock) = (own[0].data, own[1].data);
        let time = match self.held {
            Some(held) => {
                held.timer.put(&mut lapic);
                held.time
            }
            None => VcpuTime {
                tsc_offset: self.tsc_offset()?,
                tsc_deadline,
            },
        };
        let events = fd.get_vcpu_events().map_err(refused("reading pending events"))?;
        self.saved.clear();
        let out = &mut self.saved;
        encode(
            out,
            &[
                mp_state.as_bytes(),
                regs.as_bytes(),
                sregs.as_bytes(),
                xcrs.as_bytes(),
                debugregs.as_bytes(),
            ],
        );
        encode(out, &[events.as_bytes(), lapic.as_bytes()]);
        encode(
            out,
            &[
                &time.tsc_offset.to_le_bytes(),
                &time.tsc_deadline.to_le_bytes(),
                &wall_clock.to_le_bytes(),
            ],
        );
        encode(out, &[&self.tsc_khz.to_le_bytes()]);
        encode(out, &[&(entries.len() as u32).to_le_bytes()]);
        entries.iter().for_each(|entry| out.extend_from_slice(entry.as_bytes()));
        xsave
            .region
            .iter()
            .for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
        Ok(())
    }

    /// Loads a state that [`VcpuState::parse`] accepted. What moves with time is held until [`VcpuCore::start_time`].
    ///
    /// The order is the one that KVM wants: special registers before the local APIC (its mode is in them), the TSC's
    /// offset before the APIC, the deadline after it, and events last, since other calls may change them.
    pub fn load(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        let fd = &self.fd;
        fd.set_mp_state(state.mp_state)
            .map_err(refused("setting the MP state"))?;
        ioctl::set_sregs2(fd, &state.sregs).map_err(failed("setting special registers"))?;
        fd.set_regs(&state.regs).map_err(refused("setting registers"))?;
        fd.set_xcrs(&state.xcrs).map_err(refused("setting XCR0"))?;
        let xsave = kvm_xsave {
            region: *state.xsave,
            ..Default::default()
        };
        // SAFETY: no feature with more than 4096 bytes of state is in any baseline, so KVM reads no further.
        unsafe { fd.set_xsave(&xsave) }.map_err(refused("setting extended registers"))?;
        fd.set_debug_regs(&state.debugregs)
            .map_err(refused("setting debug registers"))?;
        if state.tsc_khz != self.tsc_khz {
            self.follow_tsc(state.tsc_khz)?;
        }
        let fd = &self.fd;
        self.set_tsc_offset(state.time.tsc_offset)?;
        let mut lapic = state.lapic;
        let timer = ApicTimer::take(&mut lapic);
        msrs::write_one(fd, IA32_TSC_DEADLINE, 0)?;
        fd.set_lapic(&lapic).map_err(refused("setting the local APIC"))?;
        msrs::write_all(fd, &state.msrs)?;
        self.load_wall_clock(state.wall_clock)?;
        fd.set_vcpu_events(&state.events)
            .map_err(refused("setting pending events"))?;
        self.held = Some(Held {
            time: state.time,
            timer,
        });
        self.incomplete = false;
        Ok(())
    }

    /// The guest keeps the frequency that its first host told it: scaled where this host's differs by more than hosts do
    /// that are equal. What is saved again is the first host's, so that small differences do not add up over many hosts.
    fn follow_tsc(&mut self, khz: u32) -> Result<(), KvmError> {
        let here = self.fd.get_tsc_khz().map_err(refused("reading the TSC frequency"))?;
        if !tsc_alike(khz, here) {
            self.fd.set_tsc_khz(khz).map_err(refused("setting the TSC frequency"))?;
            self.tsc_scaled = true;
        }
        self.tsc_khz = khz;
        Ok(())
    }

    /// Sets where kvmclock's wall clock lies. KVM writes the host's time of day there at once; the guest's memory keeps
    /// what the guest had.
    fn load_wall_clock(&self, address: u64) -> Result<(), KvmError> {
        if address == 0 || msrs::read_one(&self.fd, KVM_WALL_CLOCKS[1])? == address {
            return Ok(());
        }
        let mem = self.vm.ram().mem();
        let mut content = [0; WALL_CLOCK_BYTES];
        let in_ram = mem.read_slice(&mut content, GuestAddress(address)).is_ok();
        msrs::write_one(&self.fd, KVM_WALL_CLOCKS[1], address)?;
        if in_ram {
            mem.write_slice(&content, GuestAddress(address))
                .expect("it was readable");
        }
        Ok(())
    }

    /// Lets time stand still for a parked vCPU, until [`VcpuCore::start_time`]. Does nothing if it stands still already.
    pub fn hold_time(&mut self) -> Result<(), KvmError> {
        if self.held.is_some() {
            return Ok(());
        }
        let fd = &self.fd;
        let time = VcpuTime {
            tsc_offset: self.tsc_offset()?,
            tsc_deadline: msrs::read_one(fd, IA32_TSC_DEADLINE)?,
        };
        let mut lapic = fd.get_lapic().map_err(refused("reading the local APIC"))?;
        let timer = ApicTimer::take(&mut lapic);
        msrs::write_one(fd, IA32_TSC_DEADLINE, 0)?;
        fd.set_lapic(&lapic)
            .map_err(refused("stopping the local APIC's timer"))?;
        self.held = Some(Held { time, timer });
        Ok(())
    }

    /// Lets time run on after a load: the guest's TSC is moved by `shift` (the host's TSC at the save less the host's
    /// TSC now), then the timers start with what they had left.
    pub fn start_time(&mut self, shift: u64) -> Result<(), KvmError> {
        let Some(held) = self.held.take() else { return Ok(()) };
        self.set_tsc_offset(held.time.tsc_offset.wrapping_add(shift))?;
        // Read again: interrupts may have come in since the load.
        let mut lapic = self.fd.get_lapic().map_err(refused("reading the local APIC"))?;
        held.timer.put(&mut lapic);
        self.fd
            .set_lapic(&lapic)
            .map_err(refused("starting the local APIC's timer"))?;
        if held.time.tsc_deadline != 0 {
            msrs::write_one(&self.fd, IA32_TSC_DEADLINE, held.time.tsc_deadline)?;
        }
        Ok(())
    }

    /// Brings the vCPU back to its power-on state; its TSC runs on.
    pub fn reset(&mut self, power_on: &VcpuState) -> Result<(), KvmError> {
        let (tsc_offset, tsc_khz) = (self.tsc_offset()?, self.tsc_khz);
        self.load(power_on)?;
        self.held = None;
        if self.tsc_khz != tsc_khz {
            self.follow_tsc(tsc_khz)?;
        }
        self.set_tsc_offset(tsc_offset)
    }

    /// Whether the vCPU waits for a start-up message or sleeps, as KVM numbers it.
    pub fn mp_state(&self) -> Result<kvm_mp_state, KvmError> {
        self.fd.get_mp_state().map_err(refused("reading the MP state"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::cpu_of_host;
    use crate::memory::GuestRam;

    /// What the instruction reads is what KVM counts with.
    #[test]
    fn both_ways_to_read_the_hosts_tsc_agree() {
        let kvm = Kvm::open().expect("KVM");
        let ram = Arc::new(GuestRam::new(2 << 20, false).expect("RAM"));
        let vm = Arc::new(Vm::new(&kvm, ram, 0).expect("VM"));
        let baseline = cpu_of_host(&kvm).expect("baseline");
        let mut core = VcpuCore::new(&kvm, &vm, 0, 1, &baseline, None).expect("vCPU");
        assert!(!core.tsc_scaled);
        for _ in 0..100 {
            let before = core.host_tsc().expect("TSC");
            core.tsc_scaled = true;
            let between = core.host_tsc().expect("TSC");
            core.tsc_scaled = false;
            let after = core.host_tsc().expect("TSC");
            assert!(before <= between && between <= after, "{before} {between} {after}");
        }
    }
}
