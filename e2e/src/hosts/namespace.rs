//! The system calls behind a host: its init, entering its namespaces, starting programs in it.
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

use super::{HostsError, io as failed};

/// Namespaces that a host has to itself.
const NAMESPACES: libc::c_int =
    libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;

/// Steps of an init's set-up, in order; a failure is reported as (index, errno).
const STEPS: [&str; 7] = [
    "setting the host name",
    "making mounts private",
    "mounting /proc",
    "mounting /sys",
    "mounting /run",
    "mounting the host's own boot id",
    "blocking SIGCHLD",
];

/// First process of a host. Dropping it kills the host.
#[derive(Debug)]
pub(crate) struct Init {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    ended: bool,
}

/// An init that was started but not heard of yet.
#[derive(Debug)]
pub(crate) struct Born {
    name: String,
    pidfd: OwnedFd,
    report: OwnedFd,
}

impl Init {
    /// Starts an init in new namespaces and waits until they are set up.
    pub(crate) fn start(name: &str, boot_id_file: &Path) -> Result<Self, HostsError> {
        Self::bear(name, boot_id_file)?.settle()
    }

    /// The first half of [`Init::start`]: this thread decides below which namespaces the new ones are.
    pub(crate) fn bear(name: &str, boot_id_file: &Path) -> Result<Born, HostsError> {
        let name_c = CString::new(name).map_err(|_| HostsError::State {
            host: name.to_owned(),
            what: "a host name must not contain a NUL byte".to_owned(),
        })?;
        let boot_id = CString::new(boot_id_file.as_os_str().as_bytes()).map_err(|_| HostsError::Malformed {
            path: boot_id_file.to_owned(),
            what: "the path contains a NUL byte".to_owned(),
        })?;
        let making = || failed(format!("making the namespaces of host {name}"));
        let (report, writer) = pipe()?;
        let (handles, handle_writer) = pipe()?;
        // The kernel refuses a new pid namespace to who is not itself in the one that its children get. So a child of this thread
        // makes the init, as its own sibling; it shares this process's descriptors, where the handle appears.
        // SAFETY: without CLONE_VM this is a fork: the child has a copy of everything. It makes system calls only (this
        // process may have threads, whose locks the child must not touch) and never returns.
        let middle = unsafe { clone(libc::CLONE_FILES | libc::SIGCHLD, None) };
        if middle == 0 {
            make_init(&name_c, &boot_id, writer.as_raw_fd(), handle_writer.as_raw_fd());
        }
        if middle < 0 {
            return Err(making()(io::Error::last_os_error()));
        }
        reap(middle);
        drop((writer, handle_writer));
        let mut answer = [0; 8];
        File::from(handles).read_exact(&mut answer).map_err(making())?;
        let [handle, errno] = [0, 4].map(|at| i32::from_ne_bytes([0, 1, 2, 3].map(|byte| answer[at + byte])));
        if handle < 0 {
            return Err(making()(io::Error::from_raw_os_error(errno)));
        }
        // SAFETY: the child has just made this descriptor for us, and nobody else knows of it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(handle) };
        Ok(Born {
            name: name.to_owned(),
            pidfd,
            report,
        })
    }
}

impl Born {
    /// The second half of [`Init::start`], for a thread that has this process's own /proc.
    pub(crate) fn settle(self) -> Result<Init, HostsError> {
        let host = self.name;
        let info = format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd());
        let text = std::fs::read_to_string(&info).map_err(failed(format!("reading {info}")))?;
        let pid = text
            .lines()
            .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
        let pid = pid.ok_or_else(|| HostsError::Malformed {
            path: info.into(),
            what: format!("names no process: {text}"),
        })?;
        let init = Init {
            pid,
            pidfd: self.pidfd,
            ended: false,
        };
        let mut report = Vec::new();
        File::from(self.report)
            .read_to_end(&mut report)
            .map_err(failed(format!("hearing from the init of host {host}")))?;
        match *report {
            [] => Ok(init),
            [step, errno, ..] => Err(HostsError::Init {
                host,
                step: STEPS.get(usize::from(step)).copied().unwrap_or("an unknown step"),
                source: io::Error::from_raw_os_error(i32::from(errno)),
            }),
            [_] => Err(HostsError::State {
                host,
                what: "its init died during set-up".to_owned(),
            }),
        }
    }
}

impl Init {
    /// Its pid as this process sees it.
    pub(crate) fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// Kills every process of the host in one step and waits until they are gone.
    pub(crate) fn kill(&mut self) {
        if self.ended {
            return;
        }
        self.ended = true;
        signal(&self.pidfd, libc::SIGKILL).ok();
        // The init of a pid namespace ends after all others in it.
        reap(self.pid);
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.kill();
    }
}

/// clone(2) as a fork, with these flags; a handle on the child goes to `pidfd`.
///
/// # Safety
/// The child has only the calling thread: it may make system calls, but neither allocate nor take locks, before it execs or exits.
unsafe fn clone(flags: libc::c_int, pidfd: Option<&mut RawFd>) -> libc::pid_t {
    let (flags, pidfd) = match pidfd {
        None => (flags, std::ptr::null_mut()),
        Some(pidfd) => (flags | libc::CLONE_PIDFD, std::ptr::from_mut(pidfd)),
    };
    // SAFETY: no new stack: the child gets a copy of this one. `pidfd` is null or where the kernel may put a descriptor.
    unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::c_long::from(flags),
            0usize,
            pidfd,
            0usize,
            0usize,
        ) as libc::pid_t
    }
}

/// Waits for the end of a child of this process.
fn reap(pid: libc::pid_t) {
    let mut status = 0;
    // SAFETY: waits for our own child; `status` is ours.
    while unsafe { libc::waitpid(pid, &mut status, 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

/// Makes the init as a sibling of this process, says to `answer` which descriptor is its handle (or -1 and the error), and ends.
fn make_init(name: &CStr, boot_id: &CStr, report: RawFd, answer: RawFd) -> ! {
    let mut handle = -1;
    // SAFETY: the child, like this process, makes system calls only, and never returns. With its own copy of the descriptors.
    let pid = unsafe { clone(NAMESPACES | libc::CLONE_PARENT | libc::SIGCHLD, Some(&mut handle)) };
    if pid == 0 {
        init_main(name, boot_id, report);
    }
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
    let handle = if pid < 0 { -1 } else { handle };
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&handle.to_ne_bytes());
    bytes[4..].copy_from_slice(&errno.to_ne_bytes());
    // SAFETY: writes bytes of the stack, then ends this process without running destructors.
    unsafe {
        libc::write(answer, bytes.as_ptr().cast(), bytes.len());
        libc::_exit(0);
    }
}

/// The life of a host's first process: set up, say so by closing `report`, then reap until killed.
fn init_main(name: &CStr, boot_id: &CStr, report: RawFd) -> ! {
    let steps: [&dyn Fn() -> bool; STEPS.len()] = [
        // SAFETY: (this and the following) plain system calls on constant or owned NUL-terminated strings.
        &|| unsafe { libc::sethostname(name.as_ptr(), name.to_bytes().len()) == 0 },
        &|| mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE),
        &|| {
            mount(
                c"proc",
                c"/proc",
                Some(c"proc"),
                libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            )
        },
        &|| {
            mount(
                c"sysfs",
                c"/sys",
                Some(c"sysfs"),
                libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            )
        },
        &|| mount(c"tmpfs", c"/run", Some(c"tmpfs"), libc::MS_NOSUID | libc::MS_NODEV),
        &|| mount(boot_id, c"/proc/sys/kernel/random/boot_id", None, libc::MS_BIND),
        &block_sigchld,
    ];
    for (index, step) in steps.iter().enumerate() {
        if !step() {
            let message = [
                index as u8,
                io::Error::last_os_error().raw_os_error().unwrap_or(0) as u8,
            ];
            // SAFETY: writes two bytes that live on the stack, then ends the process without running destructors.
            unsafe {
                libc::write(report, message.as_ptr().cast(), message.len());
                libc::_exit(1);
            }
        }
    }
    // SAFETY: plain system calls. Closing everything also closes `report`, which tells the parent that all is set up.
    unsafe {
        libc::chdir(c"/".as_ptr());
        libc::setsid();
        libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32);
    }
    loop {
        let mut status = 0;
        // SAFETY: reaps whatever child has ended; `status` is ours.
        while unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } > 0 {}
        wait_for_sigchld();
    }
}

fn mount(source: &CStr, target: &CStr, kind: Option<&CStr>, flags: libc::c_ulong) -> bool {
    let kind = kind.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: all pointers are NUL-terminated strings or null, as mount(2) allows.
    unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind, flags, std::ptr::null()) == 0 }
}

fn sigchld_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data that sigemptyset initialises.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        set
    }
}

fn block_sigchld() -> bool {
    // SAFETY: changes this single-threaded process's signal mask.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &sigchld_set(), std::ptr::null_mut()) == 0 }
}

fn wait_for_sigchld() {
    // SAFETY: waits for a blocked signal; the info pointer may be null.
    unsafe { libc::sigwaitinfo(&sigchld_set(), std::ptr::null_mut()) };
}

/// A program that was started inside a host.
#[derive(Debug)]
pub(crate) struct Started {
    /// Its pid as this process sees it.
    pub(crate) pid: libc::pid_t,
    /// A handle that can't mean another process later; none if it had ended by then.
    pub(crate) pidfd: Option<OwnedFd>,
    /// Our own child, which waits for the program and ends with its exit code (128 + signal if it was killed).
    pub(crate) keeper: Child,
}

/// Starts `command` in the namespaces of `init`; its working directory is the host's root.
pub(crate) fn start_inside(init: &Init, mut command: Command) -> Result<Started, HostsError> {
    let what = format!("starting {:?} in a host", command.get_program());
    let (reader, writer) = pipe()?;
    let (pidfd, report) = (init.pidfd.as_raw_fd(), writer.as_raw_fd());
    // SAFETY: the closure runs between fork and exec and makes system calls only; both descriptors live until spawn ends.
    unsafe { command.pre_exec(move || enter_and_fork(pidfd, report)) };
    let keeper = command.spawn().map_err(failed(what.clone()))?;
    drop(writer);
    let mut pid = [0; 4];
    File::from(reader).read_exact(&mut pid).map_err(failed(what))?;
    let pid = libc::pid_t::from_ne_bytes(pid);
    Ok(Started {
        pid,
        pidfd: pidfd_open(pid).ok(),
        keeper,
    })
}

/// Enters the host and forks: the child goes on to exec inside the host's pid namespace, the parent stays outside as its
/// keeper. System calls only.
fn enter_and_fork(pidfd: RawFd, report: RawFd) -> io::Result<()> {
    // SAFETY: plain system calls. After the fork the child returns to exec; the parent closes everything that could keep
    // pipes open, waits, and ends without running destructors.
    unsafe {
        if libc::setns(pidfd, NAMESPACES) < 0 {
            return Err(io::Error::last_os_error());
        }
        let child = clone(libc::SIGCHLD, None);
        if child < 0 {
            return Err(io::Error::last_os_error());
        }
        if child == 0 {
            return Ok(());
        }
        let bytes = child.to_ne_bytes();
        libc::write(report, bytes.as_ptr().cast(), bytes.len());
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32);
        let mut status = 0;
        while libc::waitpid(child, &mut status, 0) < 0 {
            if *libc::__errno_location() != libc::EINTR {
                libc::_exit(127);
            }
        }
        libc::_exit(if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            128 + libc::WTERMSIG(status)
        });
    }
}

/// Moves the calling thread, and only it, into a network namespace given as an open file of nsfs.
pub(crate) fn enter_network(network: &File) -> Result<(), HostsError> {
    // SAFETY: setns with CLONE_NEWNET concerns the calling thread alone.
    if unsafe { libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
        return Err(failed("entering a host's network namespace")(io::Error::last_os_error()));
    }
    Ok(())
}

/// Sends a signal to exactly the process behind `pidfd`.
pub(crate) fn signal(pidfd: &OwnedFd, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: a system call on an open pidfd; the info pointer may be null.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0u32,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Opens a handle on a process.
pub(crate) fn pidfd_open(pid: libc::pid_t) -> Result<OwnedFd, HostsError> {
    // SAFETY: a system call without pointers; the result is a new descriptor that nobody else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0u32);
        if fd < 0 {
            return Err(failed(format!("opening process {pid}"))(io::Error::last_os_error()));
        }
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), HostsError> {
    let mut fds = [0; 2];
    // SAFETY: pipe2 fills the array with two new descriptors that nobody else owns.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) < 0 {
            return Err(failed("making a pipe")(io::Error::last_os_error()));
        }
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}
