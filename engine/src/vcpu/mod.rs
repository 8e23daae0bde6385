//! vCPU threads.
//!
//! Each vCPU has a thread that does what the last command says, and a lock around everything that belongs to it. The
//! driver gives commands and waits for the thread to be parked; while it is parked the driver may use the vCPU itself.
//!
//! ```text
//!            resume                        park (kick: immediate_exit + signal)
//!   Parked ─────────► Running ──────────────────────────────────────────► Parked
//!      ▲                 │  exits: port, MMIO → buses; ring full → harvest     ▲
//!      │                 └── shutdown, KVM error: event to the driver ─────────┘
//!      └ exit → thread ends
//! ```
//!
//! Invariant: a parked vCPU is at a clean point: what the last exit asked for is completed, nothing is half done in KVM.

mod core;
mod exit;
mod msrs;
mod state;

pub use self::core::VcpuCore;
pub use msrs::MsrList;
pub use state::{VcpuState, VcpuStateVersion, VcpuTime};

use crate::devices::bus::Buses;
use crate::kvm::{KvmError, Vm, failed};
use crate::machine::{EventSender, VmEvent};
use crate::pause::futex;
use crate::priority;
use crate::seccomp::{Filters, ThreadKind};
use exit::Outcome;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

const PARKED: u32 = 0;
const RUNNING: u32 = 1;

/// How often a thread looks for its next command, and the driver for a parked thread, before they sleep.
const SPINS: u32 = 2000;
/// After this long without a parked thread it is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(2);

/// What a thread shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Park,
    /// Park, and save the state into the vCPU's own buffer.
    ParkAndSave,
    Run,
    Exit,
}

impl Command {
    /// The command word's low bits; the rest is a number, so that two equal commands are two words.
    fn from_word(word: u32) -> Self {
        match word & 3 {
            0 => Self::Park,
            1 => Self::ParkAndSave,
            2 => Self::Run,
            _ => Self::Exit,
        }
    }
}

/// What the thread and the driver share.
#[derive(Debug)]
struct Shared {
    command: AtomicU32,
    state: AtomicU32,
    thread_id: AtomicI32,
    /// How long the last park took from where the thread saw the command, in nanoseconds.
    parking_ns: AtomicU64,
    /// When the thread last began to run the guest, in nanoseconds after `made`; 0 if it has not since it was told to.
    running_since_ns: AtomicU64,
    made: Instant,
    /// KVM's flag that makes KVM_RUN return at once, in the mapping that belongs to `core`.
    immediate_exit: *mut u8,
    core: Mutex<VcpuCore>,
}

// SAFETY: the pointer is used only for atomic bytes, and what it points to lives as long as `core`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: a byte of the vCPU's mapping, which lives as long as `self.core`; other accesses are the kernel's.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }

    fn core(&self) -> MutexGuard<'_, VcpuCore> {
        // A panic of a vCPU thread ends the machine; what it left can still be looked at.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_state(&self, state: u32) {
        self.state.store(state, Ordering::SeqCst);
        futex::wake_all(&self.state);
    }
}

/// A vCPU and its thread.
#[derive(Debug)]
pub struct Vcpu {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of a vCPU, parked.
    pub fn start(
        index: u8,
        mut core: VcpuCore,
        vm: Arc<Vm>,
        buses: Arc<Buses>,
        events: EventSender,
        filters: Option<Arc<Filters>>,
    ) -> Result<Self, KvmError> {
        install_kick_handler();
        let shared = Arc::new(Shared {
            command: AtomicU32::new(0),
            state: AtomicU32::new(RUNNING),
            thread_id: AtomicI32::new(0),
            parking_ns: AtomicU64::new(0),
            running_since_ns: AtomicU64::new(0),
            made: Instant::now(),
            immediate_exit: core.immediate_exit_ptr(),
            core: Mutex::new(core),
        });
        let worker = Worker {
            shared: shared.clone(),
            vm,
            buses,
            events,
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                // With the guest about to stand still the driver waits for this thread, which may sleep in a halted guest.
                priority::take_short_turns();
                // SAFETY: gettid has no arguments.
                worker
                    .shared
                    .thread_id
                    .store(unsafe { libc::gettid() }, Ordering::SeqCst);
                match filters.map(|filters| filters.enter(ThreadKind::Vcpu)) {
                    Some(Err(error)) => worker.events.send(VmEvent::Fatal(error.to_string())),
                    _ => worker.main(),
                }
            })
            .map_err(failed("starting a vCPU thread"))?;
        let vcpu = Self {
            shared,
            thread: Some(thread),
        };
        vcpu.wait_parked();
        Ok(vcpu)
    }

    fn command(&self, command: Command) {
        let bits = match command {
            Command::Park => 0,
            Command::ParkAndSave => 1,
            Command::Run => 2,
            Command::Exit => 3,
        };
        let word = self.shared.command.load(Ordering::Relaxed);
        self.shared
            .command
            .store((word & !3).wrapping_add(4) | bits, Ordering::SeqCst);
        futex::wake_all(&self.shared.command);
    }

    /// Lets a parked vCPU run.
    pub fn resume(&self) {
        self.shared.running_since_ns.store(0, Ordering::SeqCst);
        self.shared.state.store(RUNNING, Ordering::SeqCst);
        self.command(Command::Run);
    }

    /// Since when it runs the guest; none while its thread has not begun to.
    pub fn running_since(&self) -> Option<Instant> {
        let since = self.shared.running_since_ns.load(Ordering::SeqCst);
        (since != 0).then(|| self.shared.made + Duration::from_nanos(since))
    }

    /// Tells the vCPU to park, and with `save` to save its state on the way; [`Vcpu::wait_parked`] waits for it.
    pub fn park(&self, save: bool) {
        self.shared.state.store(RUNNING, Ordering::SeqCst);
        self.command(if save { Command::ParkAndSave } else { Command::Park });
        self.kick();
    }

    /// Makes KVM_RUN return, now or when it is entered next.
    fn kick(&self) {
        self.shared.immediate_exit().store(1, Ordering::SeqCst);
        let thread_id = self.shared.thread_id.load(Ordering::SeqCst);
        // SAFETY: sends a signal with a handler of ours to a thread of this process; one that ended is no longer found.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread_id, SIGRTMIN()) };
    }

    /// Waits until the thread is parked.
    pub fn wait_parked(&self) {
        for _ in 0..SPINS {
            if self.shared.state.load(Ordering::SeqCst) == PARKED {
                return;
            }
            std::hint::spin_loop();
        }
        while self.shared.state.load(Ordering::SeqCst) != PARKED {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                return;
            }
            futex::wait_timeout(&self.shared.state, RUNNING, KICK_AGAIN);
            if self.shared.state.load(Ordering::SeqCst) != PARKED {
                self.kick();
            }
        }
    }

    /// How long the thread took for the last park, once it had left the guest.
    pub fn parking_time(&self) -> Duration {
        Duration::from_nanos(self.shared.parking_ns.load(Ordering::Relaxed))
    }

    /// The vCPU itself. Waits while it runs: park it first.
    pub fn core(&self) -> MutexGuard<'_, VcpuCore> {
        self.shared.core()
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.command(Command::Exit);
        while let Some(thread) = self.thread.take_if(|thread| !thread.is_finished()) {
            self.kick();
            futex::wait_timeout(&self.shared.state, RUNNING, Duration::from_micros(100));
            if thread.is_finished() || self.shared.state.load(Ordering::SeqCst) == PARKED {
                // The thread has seen the command and only returns.
                let _ = thread.join();
            } else {
                self.thread = Some(thread);
            }
        }
    }
}

/// Gives the kick signal a handler that does nothing: its only effect is that KVM_RUN returns EINTR.
fn install_kick_handler() {
    static ONCE: Once = Once::new();
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    ONCE.call_once(|| {
        register_signal_handler(SIGRTMIN(), nothing).expect("a real-time signal can be handled");
    });
}

/// The thread's side.
struct Worker {
    shared: Arc<Shared>,
    vm: Arc<Vm>,
    buses: Arc<Buses>,
    events: EventSender,
}

impl Worker {
    fn main(&self) {
        let mut word = self.shared.command.load(Ordering::SeqCst);
        self.shared.set_state(PARKED);
        loop {
            let before = word;
            word = futex::wait_until(&self.shared.command, SPINS, |word| word != before);
            match Command::from_word(word) {
                Command::Run => {
                    // Parked is only who was told to park: the driver may be telling it right now, and would take a state
                    // for saved that is not.
                    if let Some(event) = self.run(word) {
                        self.events.send(event);
                    }
                }
                Command::Park => self.park(false),
                Command::ParkAndSave => self.park(true),
                Command::Exit => return self.shared.set_state(PARKED),
            }
        }
    }

    /// Runs the guest until there is another command (`None`) or something only the driver can deal with.
    fn run(&self, word: u32) -> Option<VmEvent> {
        let since = u64::try_from(self.shared.made.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.shared.running_since_ns.store(since.max(1), Ordering::SeqCst);
        let mut core = self.shared.core();
        // Before looking at the command: whoever gives one sets the flag after it.
        self.shared.immediate_exit().store(0, Ordering::SeqCst);
        while self.shared.command.load(Ordering::SeqCst) == word {
            match core.run_once(&self.buses) {
                Outcome::Continue => {}
                Outcome::RingFull => match self.vm.spill_rings() {
                    Ok(true) => self.events.send(VmEvent::DirtyRingFull),
                    Ok(false) => return Some(VmEvent::WritesLimited { since: Instant::now() }),
                    Err(error) => return Some(VmEvent::Fatal(error.to_string())),
                },
                Outcome::Stop(event) => return Some(event),
            }
        }
        None
    }

    fn park(&self, save: bool) {
        let began = Instant::now();
        let mut core = self.shared.core();
        self.shared.immediate_exit().store(1, Ordering::SeqCst);
        let result = core
            .complete_exit(&self.buses)
            .and_then(|()| if save { core.save() } else { Ok(()) });
        drop(core);
        if let Err(error) = result {
            self.events.send(VmEvent::Fatal(error.to_string()));
        }
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.shared.parking_ns.store(took, Ordering::Relaxed);
        self.shared.set_state(PARKED);
    }
}
