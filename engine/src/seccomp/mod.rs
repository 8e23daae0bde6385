//! System call filters, one per kind of thread.
//!
//! [`table`] says which calls a kind of thread may do and with which arguments; that is the one place to add a call. Every
//! thread enters its filter first thing ([`Filters::enter`]). Whatever the table does not name raises SIGSYS, which
//! [`install_handler`] turns into one line on standard error (thread, call, what to do) and exit code
//! [`SECCOMP`](crate::control::exit_code::SECCOMP).
//!
//! Filters are inherited by threads and stack up: a thread that is started by a filtered thread may do only what both
//! filters allow. So threads are started by the main thread before it enters the driver's filter, or by a thread whose
//! filter contains theirs.

pub mod table;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::control::exit_code;
use table::{Allow, Argument, Test};

/// Kinds of threads of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ThreadKind {
    /// Owns the virtual machine and the protocol core.
    Driver,
    /// Runs one vCPU.
    Vcpu,
    /// Serves one network card and its tap.
    Net,
    /// Serves one disk.
    Disk,
    /// Speaks with the peer.
    Link,
    /// Speaks with the daemon.
    Control,
    /// Compares and compresses pages.
    Worker,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: [ThreadKind; 7] = [
        ThreadKind::Driver,
        ThreadKind::Vcpu,
        ThreadKind::Net,
        ThreadKind::Disk,
        ThreadKind::Link,
        ThreadKind::Control,
        ThreadKind::Worker,
    ];
}

/// Errors of filters.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// A table does not compile.
    #[error("system call filter of {kind:?} threads does not compile: {source}")]
    Compile {
        /// Whose.
        kind: ThreadKind,
        /// The cause.
        source: seccompiler::BackendError,
    },
    /// The kernel refused a filter.
    #[error("system call filter of {kind:?} threads was refused: {source}; the kernel needs CONFIG_SECCOMP_FILTER")]
    Install {
        /// Whose.
        kind: ThreadKind,
        /// The cause.
        source: seccompiler::Error,
    },
    /// The signal handler could not be set.
    #[error("handler of SIGSYS could not be installed")]
    Handler(#[source] std::io::Error),
}

/// Calls that libc tries on its own and can do without: they fail with this error, and nobody is ended for them.
///
/// `clone3`: its flags lie in memory, where a filter can't see them; libc then uses `clone`. `openat`: malloc looks into /proc/sys
/// and /sys when it shrinks a heap or counts CPUs (glibc malloc/arena.c, sysdeps/unix/sysv/linux/malloc-sysdep.h), and takes a
/// missing file well. In the jail there is none anyway.
const QUIETLY_REFUSED: &[(i64, i32)] = &[(libc::SYS_clone3, libc::ENOSYS), (libc::SYS_openat, libc::ENOENT)];

/// The compiled filters of all kinds. Compile once, before threads start.
#[derive(Debug, Clone)]
pub struct Filters {
    programs: BTreeMap<ThreadKind, BpfProgram>,
    /// Filters beside that of the kind, each for one call that libc tries and can do without ([`QUIETLY_REFUSED`]).
    refusals: Vec<BpfProgram>,
}

impl Filters {
    /// Compiles the tables.
    pub fn compile() -> Result<Filters, SeccompError> {
        Filters::with_action(SeccompAction::Trap)
    }

    fn with_action(otherwise: SeccompAction) -> Result<Filters, SeccompError> {
        let mut programs = BTreeMap::new();
        for kind in ThreadKind::ALL {
            let program = compile(kind, otherwise.clone()).map_err(|source| SeccompError::Compile { kind, source })?;
            programs.insert(kind, program);
        }
        let mut refusals = Vec::new();
        for (call, errno) in QUIETLY_REFUSED {
            let answer = SeccompAction::Errno(errno.unsigned_abs());
            let rules = BTreeMap::from([(*call, vec![])]);
            let program = SeccompFilter::new(rules, SeccompAction::Allow, answer, TargetArch::x86_64)
                .and_then(BpfProgram::try_from)
                .map_err(|source| SeccompError::Compile {
                    kind: ThreadKind::Driver,
                    source,
                })?;
            refusals.push(program);
        }
        Ok(Filters { programs, refusals })
    }

    /// Puts the calling thread under the filter of this kind, for good.
    pub fn enter(&self, kind: ThreadKind) -> Result<(), SeccompError> {
        let refused = |source| SeccompError::Install { kind, source };
        for program in &self.refusals {
            seccompiler::apply_filter(program).map_err(refused)?;
        }
        // Present by construction: every kind was compiled.
        let program = self.programs.get(&kind).map(Vec::as_slice).unwrap_or_default();
        seccompiler::apply_filter(program).map_err(refused)
    }
}

fn compile(kind: ThreadKind, otherwise: SeccompAction) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut whole: Vec<i64> = Vec::new();
    for Allow { call, arguments } in table::of(kind) {
        if arguments.is_empty() {
            whole.push(*call);
        } else {
            rules.entry(*call).or_default().push(rule(arguments)?);
        }
    }
    // A call without conditions anywhere is allowed whatever other entries say of it.
    rules.extend(whole.into_iter().map(|call| (call, vec![])));
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

fn rule(arguments: &[Argument]) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions = arguments.iter().map(|Argument { index, test }| {
        let (length, operator, value) = match *test {
            Test::Is(value) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value),
            Test::Bits { mask, value } => (SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value),
            // The process id at the time of compilation; threads share it and the engine never forks.
            Test::OwnProcess => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(std::process::id())),
        };
        SeccompCondition::new(*index, length, operator, value)
    });
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}

static HANDLER_REPORTED: AtomicBool = AtomicBool::new(false);

/// Installs the handler that names a forbidden system call and ends the process. Call once, before the first filter.
pub fn install_handler() -> Result<(), SeccompError> {
    // SAFETY: an all-zero sigaction is a valid value of the plain C structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = forbidden_call as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is initialised; the handler does only what is allowed in signal handlers.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(SeccompError::Handler(std::io::Error::last_os_error()))
    }
}

/// Offset of `si_syscall` in `siginfo_t` (after si_signo, si_errno, si_code, padding and `_call_addr`; sigaction(2)).
const SI_SYSCALL_OFFSET: usize = 24;

extern "C" fn forbidden_call(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo of 128 bytes; for SIGSYS the call's number is at this offset.
    let call = unsafe { info.cast::<u8>().add(SI_SYSCALL_OFFSET).cast::<i32>().read_unaligned() };
    // SAFETY: with SA_SIGINFO the kernel passes the interrupted thread's context; RDI and RSI have the first arguments.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let arguments = [libc::REG_RDI, libc::REG_RSI].map(|register| registers[register as usize]);
    if !HANDLER_REPORTED.swap(true, Ordering::SeqCst) {
        let mut line = Line::default();
        line.push(b"ftvm-engine: a thread (");
        let mut name = [0u8; 16];
        // SAFETY: PR_GET_NAME writes at most 16 bytes into the buffer.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        line.push(&name[..name.iter().position(|byte| *byte == 0).unwrap_or(name.len())]);
        line.push(b") did the forbidden system call ");
        line.push_number(call.unsigned_abs());
        line.push(b" (");
        line.push(table::name(i64::from(call)).as_bytes());
        line.push(b", arguments ");
        line.push_number(arguments[0] as u32);
        line.push(b" ");
        line.push_number(arguments[1] as u32);
        line.push(b"): the engine ends, its peer takes over. Report this as a defect.\n");
        // SAFETY: the buffer is valid for its length; writing to standard error is allowed in a handler.
        unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.used) };
    }
    // SAFETY: ends the process at once, which is allowed in a handler.
    unsafe { libc::_exit(i32::from(exit_code::SECCOMP)) };
}

/// A line without allocation: a handler must not allocate.
struct Line {
    bytes: [u8; 256],
    used: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line {
            bytes: [0; 256],
            used: 0,
        }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        let fits = text.len().min(self.bytes.len() - self.used);
        self.bytes[self.used..self.used + fits].copy_from_slice(&text[..fits]);
        self.used += fits;
    }

    fn push_number(&mut self, number: u32) {
        let mut digits = [0u8; 10];
        let mut at = digits.len();
        let mut rest = number;
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.push(&digits[at..]);
    }
}

#[cfg(test)]
mod tests;
