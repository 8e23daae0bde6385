//! The jail of an engine: what is left of the machine for a program that a guest may have broken into.
//!
//! ```text
//!   daemon ── fork ──► own session, signals reset
//!                      cgroups joined, network namespace joined (if given)
//!                      own mount, IPC and UTS namespaces; root is an empty read-only tmpfs (pivot_root)
//!                      descriptors 0, 1, 2 (log), 3 (control) and nothing else
//!                      own uid and gid, no groups; no capability in any set, none to be gained
//!                      ── execveat(descriptor of the program) ──► engine
//! ```
//!
//! Without root the daemon makes a user namespace first and everything else inside it. Such a jail is reduced: the engine
//! keeps the daemon's uid (a user namespace made by a plain user maps one), its supplementary groups, and the network
//! namespace; engines of one user could signal each other. Mounts, descriptors, capabilities and system calls are as strict.
//!
//! The engine must be a static program: it is started by descriptor, and its root has no libraries.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::{Pid, PidfdFlags, WaitIdOptions};

/// What an engine is started in.
#[derive(Debug)]
pub struct Jail {
    /// User and group of the engine; none keeps the daemon's by way of a user namespace.
    pub user: Option<(u32, u32)>,
    /// An existing, empty folder to mount the new root on; only the engine sees what is mounted there.
    pub mount_point: PathBuf,
    /// Network namespace to join; none keeps the daemon's.
    pub network: Option<Arc<OwnedFd>>,
    /// `cgroup.procs` files, opened for writing, one a hierarchy.
    pub cgroups: Vec<File>,
    /// Most descriptors of the engine.
    pub descriptors_max: u64,
}

/// RLIMIT_NICE counts from here downwards (getrlimit(2)).
const NICE_BASE: u32 = 20;

/// What to start.
#[derive(Debug)]
pub struct Program<'a> {
    /// The static program.
    pub file: &'a File,
    /// Its arguments, the name first.
    pub arguments: &'a [String],
    /// Becomes descriptors 1 and 2.
    pub log: &'a File,
    /// Becomes descriptor 3.
    pub control: OwnedFd,
}

/// A started engine. Dropping it leaves the engine alone.
#[derive(Debug)]
pub struct Child {
    /// Process id.
    pub pid: i32,
    /// Readable when the process has ended.
    pub pidfd: OwnedFd,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Code(u8),
    /// By this signal.
    Signal(i32),
    /// It was adopted, so only its report can tell.
    Unseen,
}

/// Errors of the jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Before the process was made.
    #[error("the engine's jail could not be prepared: {what}")]
    Prepare {
        /// What was tried.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Within the new process.
    #[error("the engine's jail could not be built: {step}: {source}; {advice}")]
    Build {
        /// What was tried.
        step: &'static str,
        /// The cause.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
}

fn prepare(what: impl Into<String>) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Prepare {
        what: what.into(),
        source,
    }
}

/// Steps in the new process, in order; the child reports the one that failed by its position here.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Step {
    Session,
    Cgroup,
    Network,
    UserNamespace,
    Namespaces,
    PrivateMounts,
    Root,
    Pivot,
    ReadOnly,
    Limits,
    Descriptors,
    Capabilities,
    User,
    Execute,
}

const STEPS: &[(&str, &str)] = &[
    ("setsid", "this is a defect"),
    (
        "joining the cgroup",
        "check that the cgroup exists and that its cpuset has CPUs and memory nodes",
    ),
    (
        "joining the network namespace",
        "check that it exists and that the daemon runs as root",
    ),
    (
        "making a user namespace",
        "allow them (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, AppArmor) or run the daemon as root",
    ),
    ("making namespaces", "run the daemon as root, or allow user namespaces"),
    (
        "making mounts private",
        "the daemon needs CAP_SYS_ADMIN in its namespace: check the container's seccomp profile",
    ),
    (
        "mounting the engine's root",
        "the daemon needs CAP_SYS_ADMIN in its namespace: check the container's seccomp profile",
    ),
    (
        "pivot_root",
        "the daemon's own root must be a mount, not the initial ramfs",
    ),
    ("remounting the engine's root read-only", "this is a defect"),
    ("setting limits", "raise the daemon's limit of open files"),
    (
        "arranging descriptors",
        "the kernel must be 5.11 or newer (close_range)",
    ),
    ("dropping capabilities", "this is a defect"),
    ("changing the user", "check jail.uid_first in the configuration"),
    (
        "executing the engine",
        "check that `engine` in the configuration is a static program for this machine",
    ),
];

/// Starts the program in the jail; when this returns, it has been executed.
pub fn spawn(jail: &Jail, program: Program<'_>) -> Result<Child, JailError> {
    let plan = Plan::new(jail, program)?;
    let (report, report_end) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|errno| prepare("pipe")(errno.into()))?;
    let report_end = high(report_end)?;
    // SAFETY: the child calls only async-signal-safe functions on memory prepared before, and ends by exec or _exit.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => return Err(prepare("fork")(io::Error::last_os_error())),
        0 => plan.run(report_end.as_raw_fd()),
        _ => {}
    }
    drop(report_end);
    // The child is ours and not waited for, so its number can't have been given to another process.
    let pidfd = Pid::from_raw(pid)
        .ok_or_else(|| prepare("fork")(io::Error::other("no process id")))
        .and_then(|pid| {
            rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| prepare("pidfd_open")(errno.into()))
        })?;
    let mut failure = Vec::new();
    File::from(report)
        .read_to_end(&mut failure)
        .map_err(prepare("reading the jail's report"))?;
    let child = Child { pid, pidfd };
    match failure.split_first_chunk::<1>() {
        None => Ok(child),
        Some(([step], errno)) => {
            // It has said why and ends; nothing of it may stay.
            let _ = child.wait();
            let errno = errno.try_into().map(i32::from_ne_bytes).unwrap_or(libc::EIO);
            let (step, advice) = STEPS
                .get(usize::from(*step))
                .copied()
                .unwrap_or(("an unknown step", "this is a defect"));
            Err(JailError::Build {
                step,
                source: io::Error::from_raw_os_error(errno),
                advice,
            })
        }
    }
}

impl Child {
    /// Waits for the end of a child of this process.
    pub fn wait(&self) -> Ended {
        wait(&self.pidfd)
    }
}

/// Waits for the end of a process; [`Ended::Unseen`] at once if it is no child of this one.
pub fn wait(pidfd: &OwnedFd) -> Ended {
    loop {
        match rustix::process::waitid(rustix::process::WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) | Ok(None) => return Ended::Unseen,
            Ok(Some(status)) => {
                let code = status.exit_status().and_then(|code| u8::try_from(code & 0xff).ok());
                return match (code, status.terminating_signal()) {
                    (Some(code), _) => Ended::Code(code),
                    (None, Some(signal)) => Ended::Signal(signal),
                    (None, None) => Ended::Unseen,
                };
            }
        }
    }
}

/// A descriptor above those that the child arranges.
fn high(fd: OwnedFd) -> Result<OwnedFd, JailError> {
    rustix::io::fcntl_dupfd_cloexec(&fd, 10).map_err(|errno| prepare("dup")(errno.into()))
}

fn c_string(text: impl AsRef<OsStr>) -> Result<CString, JailError> {
    CString::new(text.as_ref().as_bytes())
        .map_err(|_| prepare("a name contains a zero byte")(io::ErrorKind::InvalidInput.into()))
}

/// Everything that the child needs, made before the fork: it must not allocate.
struct Plan {
    user: Option<(u32, u32)>,
    uid_map: CString,
    gid_map: CString,
    mount_point: CString,
    network: Option<OwnedFd>,
    cgroups: Vec<OwnedFd>,
    descriptors_max: u64,
    program: OwnedFd,
    /// Owns what `argv` points to.
    _arguments: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    null: OwnedFd,
    log: OwnedFd,
    control: OwnedFd,
}

impl Plan {
    fn new(jail: &Jail, program: Program<'_>) -> Result<Plan, JailError> {
        let clone =
            |fd: &dyn AsFd| rustix::io::fcntl_dupfd_cloexec(fd, 10).map_err(|errno| prepare("dup")(errno.into()));
        let arguments: Vec<CString> = program.arguments.iter().map(c_string).collect::<Result<_, _>>()?;
        let argv = arguments
            .iter()
            .map(|argument| argument.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let null = File::open("/dev/null").map_err(prepare("opening /dev/null"))?;
        Ok(Plan {
            user: jail.user,
            uid_map: c_string(format!("{uid} {uid} 1"))?,
            gid_map: c_string(format!("{gid} {gid} 1"))?,
            mount_point: c_string(&jail.mount_point)?,
            network: jail.network.as_ref().map(|fd| clone(&**fd)).transpose()?,
            cgroups: jail.cgroups.iter().map(|file| clone(file)).collect::<Result<_, _>>()?,
            descriptors_max: jail.descriptors_max,
            program: clone(program.file)?,
            _arguments: arguments,
            argv,
            null: high(null.into())?,
            log: clone(program.log)?,
            control: high(program.control)?,
        })
    }

    /// The child: never returns.
    fn run(&self, report: RawFd) -> ! {
        let (step, errno) = match self.steps() {
            Ok(never) => match never {},
            Err(failed) => failed,
        };
        let mut bytes = [0u8; 5];
        bytes[0] = step as u8;
        bytes[1..].copy_from_slice(&errno.to_ne_bytes());
        // SAFETY: a buffer of five bytes; then the process ends.
        unsafe {
            libc::write(report, bytes.as_ptr().cast(), bytes.len());
            libc::_exit(127)
        }
    }

    fn steps(&self) -> Result<std::convert::Infallible, (Step, i32)> {
        // SAFETY: plain system calls on numbers, on descriptors of this plan and on memory that outlives them.
        unsafe {
            check(Step::Session, libc::setsid() as i64)?;
            reset_signals();
            libc::umask(0o077);
            for cgroup in &self.cgroups {
                check(
                    Step::Cgroup,
                    libc::write(cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1) as i64,
                )?;
            }
            if let Some(network) = &self.network {
                check(
                    Step::Network,
                    libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET).into(),
                )?;
            }
        }
        if self.user.is_none() {
            self.user_namespace()?;
        }
        self.new_root()?;
        self.limits()?;
        self.descriptors()?;
        self.drop_rights()?;
        // SAFETY: program, argv and the empty environment live until the process image is replaced.
        unsafe {
            let environment = [std::ptr::null::<libc::c_char>()];
            let (fd, argv, envp) = (self.program.as_raw_fd(), self.argv.as_ptr(), environment.as_ptr());
            let result = libc::syscall(libc::SYS_execveat, fd, c"".as_ptr(), argv, envp, libc::AT_EMPTY_PATH);
            check(Step::Execute, result)?;
        }
        Err((Step::Execute, libc::EIO))
    }

    fn user_namespace(&self) -> Result<(), (Step, i32)> {
        // SAFETY: a system call on a number.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWUSER) };
        check(Step::UserNamespace, unshared.into())?;
        for (path, text) in [
            (c"/proc/self/setgroups", c"deny"),
            (c"/proc/self/uid_map", self.uid_map.as_c_str()),
            (c"/proc/self/gid_map", self.gid_map.as_c_str()),
        ] {
            // SAFETY: strings with a terminating zero, a descriptor of our own.
            unsafe {
                let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                check(Step::UserNamespace, fd.into())?;
                let length = text.to_bytes().len();
                check(
                    Step::UserNamespace,
                    libc::write(fd, text.as_ptr().cast(), length) as i64,
                )?;
                libc::close(fd);
            }
        }
        Ok(())
    }

    fn new_root(&self) -> Result<(), (Step, i32)> {
        let none = std::ptr::null();
        let quiet = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        // SAFETY: strings with a terminating zero and flags.
        unsafe {
            let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
            check(Step::Namespaces, libc::unshare(namespaces).into())?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let result = libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), private, none);
            check(Step::PrivateMounts, result.into())?;
            let (root, options) = (self.mount_point.as_ptr(), c"size=64k,nr_inodes=16,mode=0555");
            let result = libc::mount(
                c"ftvm".as_ptr(),
                root,
                c"tmpfs".as_ptr(),
                quiet,
                options.as_ptr().cast(),
            );
            check(Step::Root, result.into())?;
            check(Step::Root, libc::chdir(root).into())?;
            // The old root is stacked below the new one and then detached; see pivot_root(2), "pivot_root(".", ".")".
            check(
                Step::Pivot,
                libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()),
            )?;
            check(Step::Pivot, libc::umount2(c".".as_ptr(), libc::MNT_DETACH).into())?;
            check(Step::Pivot, libc::chdir(c"/".as_ptr()).into())?;
            let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | quiet;
            let result = libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), flags, none);
            check(Step::ReadOnly, result.into())
        }
    }

    fn limits(&self) -> Result<(), (Step, i32)> {
        let set = |resource, value: u64| {
            let limit = libc::rlimit {
                rlim_cur: value,
                rlim_max: value,
            };
            // SAFETY: a valid structure.
            check(Step::Limits, unsafe { libc::setrlimit(resource, &limit) }.into())
        };
        // A core would hold the guest's memory.
        set(libc::RLIMIT_CORE, 0)?;
        set(libc::RLIMIT_NOFILE, self.descriptors_max)?;
        // The engine's heartbeats may go before other work. Only root may allow that; without it they take their turn.
        let nice = u64::from(NICE_BASE.saturating_add_signed(-ftvm_engine::priority::NICE));
        let _ = set(libc::RLIMIT_NICE, nice);
        set(libc::RLIMIT_MSGQUEUE, 0)
    }

    fn descriptors(&self) -> Result<(), (Step, i32)> {
        // SAFETY: all sources are above 9, so no target overwrites a source; the rest is closed at exec.
        unsafe {
            for (source, target) in [(&self.null, 0), (&self.log, 1), (&self.log, 2), (&self.control, 3)] {
                check(Step::Descriptors, libc::dup2(source.as_raw_fd(), target).into())?;
            }
            let flags = libc::CLOSE_RANGE_CLOEXEC;
            check(
                Step::Descriptors,
                libc::syscall(libc::SYS_close_range, 4u32, u32::MAX, flags),
            )
        }
    }

    fn drop_rights(&self) -> Result<(), (Step, i32)> {
        // SAFETY: system calls on numbers and on valid structures.
        unsafe {
            let step = Step::Capabilities;
            check(
                step,
                libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0).into(),
            )?;
            for capability in 0..64 {
                // EINVAL: the kernel knows no capability of this number or above.
                if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 {
                    break;
                }
            }
            if let Some((uid, gid)) = self.user {
                // The calls of the kernel, not of libc: those would wait for threads that this child does not have.
                check(
                    Step::User,
                    libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()),
                )?;
                check(Step::User, libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
                check(Step::User, libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
            }
            let header = CapabilityHeader {
                version: CAPABILITY_VERSION_3,
                pid: 0,
            };
            let none = [CapabilityData::default(); 2];
            check(step, libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()))?;
            check(step, libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())
        }
    }
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct` of capget(2).
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct` of capget(2).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn check(step: Step, result: i64) -> Result<(), (Step, i32)> {
    if result < 0 {
        // SAFETY: reads a number of this thread.
        return Err((step, unsafe { *libc::__errno_location() }));
    }
    Ok(())
}

/// Handlers fall at exec; ignored and blocked signals would not.
///
/// # Safety
/// Only in a freshly forked child.
unsafe fn reset_signals() {
    // SAFETY: system calls on numbers and a valid signal set.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        for signal in 1..32 {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

/// Opens a program and checks that it is an ELF file that needs no interpreter.
pub fn open_static_program(path: &Path) -> Result<File, JailError> {
    let refuse =
        |why: &str| prepare(format!("engine program {}: {why}", path.display()))(io::ErrorKind::InvalidInput.into());
    let mut file = File::open(path).map_err(prepare(format!(
        "engine program {}: set `engine` in the configuration to the static ftvm-engine",
        path.display()
    )))?;
    let mut start = vec![0u8; 4096];
    let length = file
        .read(&mut start)
        .map_err(prepare(format!("reading {}", path.display())))?;
    start.truncate(length);
    if start.get(..5) != Some(b"\x7fELF\x02") {
        return Err(refuse("not a 64-bit ELF program"));
    }
    if has_interpreter(&start) {
        return Err(refuse(
            "a dynamically linked program; the jail has no libraries, so it must be static",
        ));
    }
    Ok(file)
}

/// Looks for PT_INTERP among the program headers (System V ABI, chapter 5) that lie in the first page.
fn has_interpreter(start: &[u8]) -> bool {
    let u16_at = |at: usize| {
        start
            .get(at..at + 2)
            .map_or(0, |b| usize::from(u16::from_le_bytes([b[0], b[1]])))
    };
    let u32_at = |at: usize| {
        start
            .get(at..at + 4)
            .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    let (offset, size, count) = (u32_at(32) as usize, u16_at(54), u16_at(56));
    (0..count).any(|n| {
        offset
            .checked_add(n * size)
            .is_some_and(|at| at < start.len() && u32_at(at) == 3)
    })
}
