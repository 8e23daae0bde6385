//! Why KVM_RUN returned, and what is done about it.

use super::VcpuCore;
use crate::devices::bus::Buses;
use crate::kvm::{KvmError, failed};
use crate::machine::VmEvent;
use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use std::fmt::Write;
use std::io;

/// What the thread does next.
pub(super) enum Outcome {
    /// Run on, after looking for a command.
    Continue,
    /// The dirty ring has to be emptied first.
    RingFull,
    /// The driver has to act.
    Stop(VmEvent),
}

impl VcpuCore {
    /// Enters the guest once and answers the exit.
    pub(super) fn run_once(&mut self, buses: &Buses) -> Outcome {
        let result = self.fd.run().map(drop);
        self.incomplete = false;
        match result {
            Ok(()) => self.handle_exit(buses),
            Err(error) => match error.errno() {
                // A kick, or a vCPU that waited for its start-up message.
                libc::EINTR | libc::EAGAIN => Outcome::Continue,
                errno => {
                    let cause = format!("KVM_RUN failed: {}", io::Error::from_raw_os_error(errno));
                    Outcome::Stop(VmEvent::Fatal(self.describe(&cause)))
                }
            },
        }
    }

    /// Completes what the last exit asked for, without running the guest: KVM takes the answer of a port or MMIO access
    /// only when it is entered again, and returns EINTR because of `immediate_exit`, which the caller has set.
    pub(super) fn complete_exit(&mut self, buses: &Buses) -> Result<(), KvmError> {
        while self.incomplete {
            match self.fd.run().map(drop) {
                // One instruction may make several accesses.
                Ok(()) => {
                    self.incomplete = false;
                    self.handle_exit(buses);
                }
                Err(error) if error.errno() == libc::EINTR => self.incomplete = false,
                Err(error) => {
                    return Err(failed("completing an access of the guest")(
                        io::Error::from_raw_os_error(error.errno()),
                    ));
                }
            }
        }
        Ok(())
    }

    fn handle_exit(&mut self, buses: &Buses) -> Outcome {
        let run = self.fd.get_kvm_run();
        match run.exit_reason {
            KVM_EXIT_IO => {
                port_access(run, buses);
                self.incomplete = true;
                Outcome::Continue
            }
            KVM_EXIT_MMIO => {
                mmio_access(run, buses);
                self.incomplete = true;
                Outcome::Continue
            }
            KVM_EXIT_DIRTY_RING_FULL => Outcome::RingFull,
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_HLT => Outcome::Continue,
            KVM_EXIT_SHUTDOWN => {
                tracing::warn!("{}", self.describe("triple fault"));
                Outcome::Stop(VmEvent::TripleFault)
            }
            KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: the exit reason says which member of the union is valid.
                match unsafe { run.__bindgen_anon_1.system_event.type_ } {
                    KVM_SYSTEM_EVENT_SHUTDOWN => Outcome::Stop(VmEvent::PowerOff),
                    KVM_SYSTEM_EVENT_RESET => Outcome::Stop(VmEvent::Reset),
                    other => Outcome::Stop(VmEvent::Fatal(self.describe(&format!("KVM system event {other}")))),
                }
            }
            reason => {
                let cause = failure(reason, run);
                Outcome::Stop(VmEvent::Fatal(self.describe(&cause)))
            }
        }
    }

    /// A text for people: what happened, and the registers at that moment.
    fn describe(&self, cause: &str) -> String {
        let mut text = format!("vCPU {}: {cause}", self.index);
        let _ = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => write!(
                text,
                " (rip {:#x} rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} \
                 cs {:#x}:{:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} idt {:#x} gdt {:#x})",
                r.rip,
                r.rsp,
                r.rflags,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                s.cs.selector,
                s.cs.base,
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer,
                s.idt.base,
                s.gdt.base,
            ),
            _ => write!(text, " (its registers can't be read)"),
        };
        text
    }
}

/// Words for an exit that means the end.
fn failure(reason: u32, run: &kvm_run) -> String {
    match reason {
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the exit reason says which member of the union is valid.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            format!(
                "the CPU refused to enter the guest (reason {:#x})",
                entry.hardware_entry_failure_reason
            )
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let count = (internal.ndata as usize).min(internal.data.len());
            format!(
                "KVM internal error {} (data {:x?})",
                internal.suberror,
                &internal.data[..count]
            )
        }
        other => format!("KVM exit {other}, which this program does not expect"),
    }
}

/// A string instruction may move several items; each is one access.
fn port_access(run: &mut kvm_run, buses: &Buses) {
    // SAFETY: the exit reason says which member of the union is valid.
    let io = unsafe { run.__bindgen_anon_1.io };
    let length = usize::from(io.size) * io.count as usize;
    // SAFETY: KVM guarantees that this many bytes at this offset lie in the mapping that begins with `run`.
    let data = unsafe {
        let start = std::ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(start, length)
    };
    for item in data.chunks_exact_mut(usize::from(io.size).max(1)) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            buses.pio.write(io.port.into(), item);
        } else {
            buses.pio.read(io.port.into(), item);
        }
    }
}

fn mmio_access(run: &mut kvm_run, buses: &Buses) {
    // SAFETY: the exit reason says which member of the union is valid.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let length = (mmio.len as usize).min(mmio.data.len());
    let data = &mut mmio.data[..length];
    if mmio.is_write != 0 {
        buses.mmio.write(mmio.phys_addr, data);
    } else {
        buses.mmio.read(mmio.phys_addr, data);
    }
}
