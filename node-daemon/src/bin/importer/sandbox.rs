//! What this program may still do once it looks at a file.

use std::collections::BTreeMap;

use rustix::process::{Resource, Rlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::Failure;

/// Memory that an image may make us use: the windows of decompressors, tables of qcow2.
const MEMORY_BYTES: u64 = 512 << 20;
/// User and group of a program that was started by root: nobody's.
const NOBODY: u32 = 65534;

/// System calls that are allowed whatever their arguments: on descriptors that are open, and for memory. Nothing opens a file,
/// makes a socket or a process, or reaches another one.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// For `read`: from here on nothing but the open files and the pipe.
pub fn enter() -> Result<(), Failure> {
    limit(Resource::As, MEMORY_BYTES)?;
    limit(Resource::Core, 0)?;
    leave_root()?;
    let program = filter().map_err(|error| Failure::new(format!("its sandbox can't be built: {error}")))?;
    seccompiler::apply_filter(&program).map_err(|error| Failure::new(format!("its sandbox can't be entered: {error}")))
}

/// Started by root, it goes on as nobody; in any case it gains no rights.
pub fn leave_root() -> Result<(), Failure> {
    let failed = |what: &str, error: std::io::Error| Failure::new(format!("{what}: {error}"));
    rustix::thread::set_no_new_privs(true).map_err(|errno| failed("no_new_privs", errno.into()))?;
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    // SAFETY: system calls without memory; glibc's functions change all threads, and there is one.
    unsafe {
        if libc::setgroups(0, std::ptr::null()) != 0
            || libc::setresgid(NOBODY, NOBODY, NOBODY) != 0
            || libc::setresuid(NOBODY, NOBODY, NOBODY) != 0
        {
            return Err(failed("becoming nobody", std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn limit(resource: Resource, bytes: u64) -> Result<(), Failure> {
    let limit = Rlimit {
        current: Some(bytes),
        maximum: Some(bytes),
    };
    rustix::process::setrlimit(resource, limit).map_err(|errno| Failure::new(format!("its limits: {errno}")))
}

fn filter() -> Result<BpfProgram, seccompiler::Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // Memory, but none that can be executed.
    let executable = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(executable), 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![condition])?]);
    }
    // Which access a descriptor has, and (std in debug builds) whether it is one.
    let asks = [libc::F_GETFL, libc::F_GETFD].map(|ask| {
        let condition = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, ask as u64)?;
        SeccompRule::new(vec![condition])
    });
    rules.insert(libc::SYS_fcntl, asks.into_iter().collect::<Result<_, _>>()?);
    // Metadata of a descriptor, not of a path: the path is empty.
    let flags = libc::AT_EMPTY_PATH as u64;
    let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(flags), flags)?;
    rules.insert(libc::SYS_statx, vec![SeccompRule::new(vec![condition])?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    /// How a child ends that enters the sandbox and then acts.
    fn end_of(act: impl FnOnce()) -> std::process::ExitStatus {
        // SAFETY: the child calls nothing but `act` and `_exit`; what the parent's other threads held is not touched.
        let child = unsafe { libc::fork() };
        if child == 0 {
            if super::enter().is_ok() {
                act();
            }
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(3) };
        }
        let mut status = 0;
        // SAFETY: waits for our own child.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        std::process::ExitStatus::from_raw(status)
    }

    #[test]
    fn nothing_but_descriptors_and_memory_is_left() {
        let path = c"/etc/passwd".as_ptr() as libc::c_long;
        let executable = libc::c_long::from(libc::PROT_READ | libc::PROT_EXEC);
        let unnamed = libc::c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let calls: [(&str, libc::c_long, [libc::c_long; 6]); 8] = [
            ("open", libc::SYS_open, [path, 0, 0, 0, 0, 0]),
            ("openat", libc::SYS_openat, [libc::AT_FDCWD.into(), path, 0, 0, 0, 0]),
            (
                "socket",
                libc::SYS_socket,
                [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0, 0, 0, 0],
            ),
            ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
            ("fork", libc::SYS_fork, [0; 6]),
            ("exec", libc::SYS_execve, [path, 0, 0, 0, 0, 0]),
            ("writing at a place", libc::SYS_pwrite64, [0, path, 1, 0, 0, 0]),
            (
                "executable memory",
                libc::SYS_mmap,
                [0, 4096, executable, unnamed, -1, 0],
            ),
        ];
        for (name, call, [a, b, c, d, e, f]) in calls {
            // SAFETY: one system call in a child that is to be ended by it; its arguments are valid.
            let end = end_of(|| unsafe {
                libc::syscall(call, a, b, c, d, e, f);
            });
            assert_eq!(end.signal(), Some(libc::SIGSYS), "{name}");
        }
        let allowed = end_of(|| drop(vec![1u8; 8 << 20]));
        assert_eq!(allowed.code(), Some(3), "memory is not refused: {allowed}");
    }
}
