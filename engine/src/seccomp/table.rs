//! Which kind of thread may do which system call: the one place to add a call.
//!
//! An entry with conditions allows the call only with such arguments; several entries of one call are alternatives.
//! No table gives a way to open a path, start a program, change credentials or map executable memory; a test holds
//! every kind to that.

use libc::{
    AF_INET, AF_INET6, CLONE_THREAD, CLONE_VM, FIONBIO, PROT_EXEC, SOL_SOCKET, SYS_accept4, SYS_brk, SYS_clock_getres,
    SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_close, SYS_connect, SYS_dup, SYS_epoll_create1,
    SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait, SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fcntl,
    SYS_fdatasync, SYS_fstat, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getpeername, SYS_getpid, SYS_getrandom,
    SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_gettimeofday, SYS_ioctl, SYS_lseek, SYS_madvise, SYS_membarrier,
    SYS_memfd_create, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_poll,
    SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read,
    SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_restart_syscall, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask,
    SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_yield, SYS_sendmsg, SYS_sendto, SYS_set_robust_list,
    SYS_setsockopt, SYS_shutdown, SYS_sigaltstack, SYS_socket, SYS_statx, SYS_tgkill, SYS_timerfd_create,
    SYS_timerfd_settime, SYS_write, SYS_writev,
};

use super::ThreadKind;

/// One allowed call.
#[derive(Debug, Clone, Copy)]
pub struct Allow {
    /// Number of the call.
    pub call: i64,
    /// All must hold; none means any arguments.
    pub arguments: &'static [Argument],
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy)]
pub struct Argument {
    /// Position, from 0.
    pub index: u8,
    /// What must hold for its low 32 bits.
    pub test: Test,
}

/// What must hold for an argument.
#[derive(Debug, Clone, Copy)]
pub enum Test {
    /// Equal.
    Is(u64),
    /// The bits of `mask` equal those of `value`.
    Bits {
        /// Which bits.
        mask: u64,
        /// Their values.
        value: u64,
    },
    /// The id of this process.
    OwnProcess,
}

const fn any(call: i64) -> Allow {
    Allow { call, arguments: &[] }
}

const fn with(call: i64, arguments: &'static [Argument]) -> Allow {
    Allow { call, arguments }
}

const fn is(index: u8, value: i64) -> Argument {
    Argument {
        index,
        test: Test::Is(value as u64 & 0xffff_ffff),
    }
}

const fn bits(index: u8, mask: i32, value: i32) -> Argument {
    Argument {
        index,
        test: Test::Bits {
            mask: mask as u64,
            value: value as u64,
        },
    }
}

/// Any ioctl of a driver's type byte (bits 8 to 15 of the request, `Documentation/userspace-api/ioctl`).
const fn ioctl_type(kind: u8) -> Argument {
    Argument {
        index: 1,
        test: Test::Bits {
            mask: 0xff00,
            value: (kind as u64) << 8,
        },
    }
}

/// One ioctl by type byte and number, whatever the size of its structure.
const fn ioctl(kind: u8, number: u8) -> Argument {
    Argument {
        index: 1,
        test: Test::Bits {
            mask: 0xffff,
            value: (kind as u64) << 8 | number as u64,
        },
    }
}

const KVM: u8 = 0xae;
const USERFAULTFD: u8 = 0xaa;
const BLOCK: u8 = 0x12;

/// The calls of a kind of thread.
pub fn of(kind: ThreadKind) -> impl Iterator<Item = &'static Allow> {
    let own: &[&'static [Allow]] = match kind {
        ThreadKind::Driver => &[DRIVER, FILE, STREAM],
        ThreadKind::Vcpu => &[VCPU],
        ThreadKind::Net => &[INTERRUPT],
        ThreadKind::Disk => &[INTERRUPT, FILE, DISK],
        ThreadKind::Link => &[STREAM, LINK],
        ThreadKind::Control => &[CONTROL],
        ThreadKind::Worker => &[VOLUME],
    };
    COMMON.iter().chain(own.iter().copied().flatten().collect::<Vec<_>>())
}

/// What every thread of a Rust program needs: memory, time, locks, signals, its own descriptors, its own end.
const COMMON: &[Allow] = &[
    any(SYS_read),
    any(SYS_write),
    any(SYS_readv),
    any(SYS_writev),
    any(SYS_close),
    any(SYS_poll),
    any(SYS_ppoll),
    any(SYS_epoll_wait),
    any(SYS_epoll_pwait),
    any(SYS_epoll_ctl),
    any(SYS_futex),
    any(SYS_membarrier),
    any(SYS_sched_yield),
    any(SYS_sched_getaffinity),
    any(SYS_brk),
    with(SYS_mmap, &[bits(2, PROT_EXEC, 0)]),
    with(SYS_mprotect, &[bits(2, PROT_EXEC, 0)]),
    any(SYS_mremap),
    any(SYS_munmap),
    any(SYS_madvise),
    any(SYS_clock_gettime),
    any(SYS_clock_getres),
    any(SYS_clock_nanosleep),
    any(SYS_nanosleep),
    any(SYS_gettimeofday),
    any(SYS_getrandom),
    any(SYS_gettid),
    any(SYS_getpid),
    any(SYS_rt_sigaction),
    any(SYS_rt_sigprocmask),
    any(SYS_rt_sigreturn),
    any(SYS_sigaltstack),
    with(
        SYS_tgkill,
        &[Argument {
            index: 0,
            test: Test::OwnProcess,
        }],
    ),
    any(SYS_restart_syscall),
    any(SYS_set_robust_list),
    any(SYS_rseq),
    with(SYS_prctl, &[is(0, libc::PR_SET_NAME as i64)]),
    with(SYS_prctl, &[is(0, libc::PR_GET_NAME as i64)]),
    // rustix looks for the vDSO at its first look at a clock, in whichever thread that is: PR_GET_AUXV (prctl(2)).
    with(SYS_prctl, &[is(0, 0x4155_5856)]),
    // glibc names the anonymous memory of its allocator.
    with(SYS_prctl, &[is(0, libc::PR_SET_VMA as i64)]),
    // A thread inside the filter may enter a narrower one.
    with(SYS_prctl, &[is(0, libc::PR_SET_NO_NEW_PRIVS as i64)]),
    with(libc::SYS_seccomp, &[is(0, libc::SECCOMP_SET_MODE_FILTER as i64)]),
    with(SYS_fcntl, &[is(1, libc::F_GETFD as i64)]),
    with(SYS_fcntl, &[is(1, libc::F_SETFD as i64)]),
    with(SYS_fcntl, &[is(1, libc::F_GETFL as i64)]),
    with(SYS_fcntl, &[is(1, libc::F_SETFL as i64)]),
    with(SYS_fcntl, &[is(1, libc::F_DUPFD_CLOEXEC as i64)]),
    // Allowed here and refused with an error by filters of their own: see `QUIETLY_REFUSED`.
    any(libc::SYS_openat),
    any(SYS_clone3),
    // `log` and panic messages go to standard error; the daemon's connection takes requests and events of any thread.
    any(SYS_sendmsg),
    any(SYS_exit),
    any(SYS_exit_group),
];

/// Interrupts to the guest.
const INTERRUPT: &[Allow] = &[
    with(SYS_ioctl, &[ioctl(KVM, 0xa5)]), // KVM_SIGNAL_MSI
    with(SYS_ioctl, &[ioctl(KVM, 0x61)]), // KVM_IRQ_LINE
    with(SYS_ioctl, &[ioctl(KVM, 0x67)]), // KVM_IRQ_LINE_STATUS
];

/// Running, saving and loading a vCPU.
const VCPU: &[Allow] = &[
    // KVM_RUN to KVM_SET_XCRS, KVM_SIGNAL_MSI and the rest of the vCPU's numbers (0x80 to 0xbf).
    with(SYS_ioctl, &[bits(1, 0xffc0, 0xae80)]),
    // KVM_RESET_DIRTY_RINGS to KVM_GET_SREGS2, KVM_SET_SREGS2, KVM_GET_XSAVE2 (0xc0 to 0xcf).
    with(SYS_ioctl, &[bits(1, 0xfff0, 0xaec0)]),
    with(SYS_ioctl, &[ioctl(KVM, 0x79)]), // KVM_IOEVENTFD (the guest moves a base address register)
    with(SYS_ioctl, &[ioctl(KVM, 0x7c)]), // KVM_GET_CLOCK (the guest reads its real-time clock)
    with(SYS_ioctl, &[ioctl(KVM, 0xe1)]), // KVM_SET_DEVICE_ATTR (TSC offset)
    with(SYS_ioctl, &[ioctl(KVM, 0xe2)]), // KVM_GET_DEVICE_ATTR
    with(SYS_ioctl, &[ioctl(KVM, 0xe3)]), // KVM_HAS_DEVICE_ATTR
    with(SYS_ioctl, &[ioctl(KVM, 0x61)]), // KVM_IRQ_LINE
    with(SYS_ioctl, &[ioctl(KVM, 0x67)]), // KVM_IRQ_LINE_STATUS
];

/// Files that came with the launch: disks, header, journal, exit report. Only by descriptor, never by path.
const FILE: &[Allow] = &[
    any(SYS_pread64),
    any(SYS_pwrite64),
    any(SYS_preadv),
    any(SYS_pwritev),
    any(SYS_preadv2),
    any(SYS_pwritev2),
    any(SYS_lseek),
    any(SYS_fsync),
    any(SYS_fdatasync),
    any(SYS_fallocate),
    any(SYS_ftruncate),
    any(SYS_fstat),
    // fstat in the form that newer C libraries and Rust use: an empty path.
    with(SYS_newfstatat, &[bits(3, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH)]),
    with(SYS_statx, &[bits(2, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH)]),
];

/// Reading volumes: a resync sends whole disks.
const VOLUME: &[Allow] = &[any(SYS_pread64), any(SYS_preadv)];

/// Block devices.
const DISK: &[Allow] = &[
    with(SYS_ioctl, &[ioctl(BLOCK, 114)]), // BLKGETSIZE64
    with(SYS_ioctl, &[ioctl(BLOCK, 97)]),  // BLKFLSBUF
];

/// Reading, writing and tuning sockets that exist.
const STREAM: &[Allow] = &[
    any(SYS_sendto),
    any(SYS_recvfrom),
    any(SYS_recvmsg),
    any(SYS_shutdown),
    any(SYS_getsockname),
    any(SYS_getpeername),
    with(SYS_getsockopt, &[is(1, SOL_SOCKET as i64)]),
    with(SYS_getsockopt, &[is(1, libc::IPPROTO_TCP as i64)]),
    with(SYS_setsockopt, &[is(1, SOL_SOCKET as i64)]),
    with(SYS_setsockopt, &[is(1, libc::IPPROTO_TCP as i64)]),
    with(SYS_ioctl, &[is(1, FIONBIO as i64)]),
];

/// Connections to and from the peer. Threads of a connection are started by the thread that made it.
const LINK: &[Allow] = &[
    with(SYS_socket, &[is(0, AF_INET as i64), bits(1, 0xff, libc::SOCK_STREAM)]),
    with(SYS_socket, &[is(0, AF_INET6 as i64), bits(1, 0xff, libc::SOCK_STREAM)]),
    any(SYS_connect),
    any(SYS_accept4),
    any(SYS_eventfd2),
    any(SYS_epoll_create1),
    any(SYS_dup),
    with(SYS_clone, THREAD),
];

const THREAD: &[Argument] = &[bits(0, CLONE_THREAD | CLONE_VM, CLONE_THREAD | CLONE_VM)];

/// The daemon's connection.
const CONTROL: &[Allow] = &[
    any(SYS_recvmsg),
    any(SYS_accept4),
    with(SYS_getsockopt, &[is(1, SOL_SOCKET as i64)]),
    // Replies and reports.
    any(SYS_fsync),
    any(SYS_shutdown),
];

/// The virtual machine, guest memory, threads.
const DRIVER: &[Allow] = &[
    with(SYS_ioctl, &[ioctl_type(KVM)]),
    with(SYS_ioctl, &[ioctl_type(USERFAULTFD)]),
    with(SYS_ioctl, &[ioctl(BLOCK, 114)]), // BLKGETSIZE64
    any(SYS_memfd_create),
    any(SYS_eventfd2),
    any(SYS_epoll_create1),
    any(SYS_timerfd_create),
    any(SYS_timerfd_settime),
    any(SYS_dup),
    with(SYS_clone, THREAD),
];

/// Name of a system call, for messages; "?" for those that no engine would try.
pub fn name(call: i64) -> &'static str {
    NAMES
        .iter()
        .find(|(number, _)| *number == call)
        .map_or("?", |(_, name)| name)
}

macro_rules! names {
    ($($name:ident)*) => { &[$((libc::$name, stringify!($name))),*] };
}

const NAMES: &[(i64, &str)] = names! {
    SYS_accept SYS_accept4 SYS_access SYS_arch_prctl SYS_bind SYS_brk SYS_capset SYS_chdir SYS_chmod SYS_chown SYS_chroot
    SYS_clock_getres SYS_clock_gettime SYS_clock_nanosleep SYS_clone SYS_clone3 SYS_close SYS_close_range SYS_connect SYS_dup
    SYS_dup2 SYS_dup3 SYS_epoll_create SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2 SYS_epoll_wait
    SYS_eventfd SYS_eventfd2 SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_faccessat SYS_fadvise64 SYS_fallocate
    SYS_fchmod SYS_fchown SYS_fcntl SYS_fdatasync SYS_flock SYS_fork SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_futex
    SYS_futex_waitv SYS_getcpu SYS_getcwd SYS_getdents64 SYS_getegid SYS_geteuid SYS_getgid SYS_getpeername SYS_getpid
    SYS_getppid SYS_getrandom SYS_getrlimit SYS_getrusage SYS_getsockname SYS_getsockopt SYS_gettid SYS_gettimeofday
    SYS_getuid SYS_io_uring_enter SYS_io_uring_setup SYS_ioctl SYS_kill SYS_link SYS_linkat SYS_listen SYS_lseek SYS_madvise
    SYS_membarrier SYS_memfd_create SYS_mkdir SYS_mlock SYS_mlock2 SYS_mlockall SYS_mmap SYS_mount SYS_mprotect SYS_mremap
    SYS_msync SYS_munlock SYS_munmap SYS_nanosleep SYS_newfstatat SYS_open SYS_openat SYS_openat2 SYS_pidfd_open SYS_pipe
    SYS_pipe2 SYS_pivot_root SYS_poll SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv SYS_preadv2 SYS_prlimit64
    SYS_process_vm_readv SYS_pselect6 SYS_ptrace SYS_pwrite64 SYS_pwritev SYS_pwritev2 SYS_read SYS_readlink SYS_readv
    SYS_recvfrom SYS_recvmmsg SYS_recvmsg SYS_rename SYS_restart_syscall SYS_rseq SYS_rt_sigaction SYS_rt_sigprocmask
    SYS_rt_sigreturn SYS_rt_sigtimedwait SYS_sched_getaffinity SYS_sched_setaffinity SYS_sched_setscheduler SYS_sched_yield
    SYS_seccomp SYS_select SYS_sendfile SYS_sendmmsg SYS_sendmsg SYS_sendto SYS_set_robust_list SYS_set_tid_address SYS_setgid
    SYS_setns SYS_setpriority SYS_setrlimit SYS_setsid SYS_setsockopt SYS_setuid SYS_shutdown SYS_sigaltstack SYS_socket
    SYS_socketpair SYS_splice SYS_stat SYS_statx SYS_symlink SYS_sync SYS_sync_file_range SYS_sysinfo SYS_tgkill SYS_time
    SYS_timerfd_create SYS_timerfd_gettime SYS_timerfd_settime SYS_tkill SYS_truncate SYS_umask SYS_umount2 SYS_uname
    SYS_unlink SYS_unshare SYS_userfaultfd SYS_vfork SYS_wait4 SYS_waitid SYS_write SYS_writev
};
