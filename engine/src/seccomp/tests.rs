use super::*;
use std::io::Error;
use std::process::Command;
use std::sync::mpsc::channel;

/// Runs `work` in a thread of this kind; forbidden calls return EPERM there instead of ending the test program.
fn under<T: Send>(kind: ThreadKind, work: impl FnOnce() -> T + Send) -> T {
    let filters = Filters::with_action(SeccompAction::Errno(libc::EPERM.unsigned_abs())).unwrap();
    let (sender, receiver) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            filters.enter(kind).unwrap();
            sender.send(work()).unwrap();
        });
        receiver.recv().expect("the work ends under its filter")
    })
}

/// The error number of a system call with these arguments, 0 for success.
fn errno(call: i64, arguments: [u64; 6]) -> i32 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the callers pass numbers and null pointers that the kernel refuses with an error at most.
    let result = unsafe { libc::syscall(call, a, b, c, d, e, f) };
    if result < 0 {
        Error::last_os_error().raw_os_error().unwrap()
    } else {
        0
    }
}

const BAD_FD: u64 = 0xffff_ffff;

#[test]
fn no_kind_opens_executes_or_gains_rights() {
    let forbidden: &[(i64, [u64; 6])] = &[
        (libc::SYS_execve, [0; 6]),
        (libc::SYS_execveat, [BAD_FD, 0, 0, 0, 0, 0]),
        (libc::SYS_open, [0; 6]),
        (libc::SYS_openat2, [BAD_FD, 0, 0, 0, 0, 0]),
        (libc::SYS_fork, [0; 6]),
        (libc::SYS_ptrace, [0xffff, 0, 0, 0, 0, 0]),
        (libc::SYS_process_vm_readv, [0; 6]),
        (libc::SYS_kill, [0; 6]),
        (libc::SYS_setuid, [0; 6]),
        (libc::SYS_capset, [0; 6]),
        (libc::SYS_mount, [0; 6]),
        (libc::SYS_unshare, [0; 6]),
        (libc::SYS_setns, [BAD_FD, 0, 0, 0, 0, 0]),
        (libc::SYS_pivot_root, [0; 6]),
        (libc::SYS_bpf, [0; 6]),
        (libc::SYS_io_uring_setup, [0; 6]),
        (libc::SYS_bind, [BAD_FD, 0, 0, 0, 0, 0]),
        (
            libc::SYS_socket,
            [libc::AF_NETLINK as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0],
        ),
        (
            libc::SYS_socket,
            [libc::AF_PACKET as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0],
        ),
        // A process of its own instead of a thread.
        (libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]),
        // Executable memory.
        (
            libc::SYS_mmap,
            [
                0,
                4096,
                libc::PROT_EXEC as u64,
                libc::MAP_PRIVATE as u64 | libc::MAP_ANON as u64,
                BAD_FD,
                0,
            ],
        ),
        (
            libc::SYS_mprotect,
            [0, 0, libc::PROT_EXEC as u64 | libc::PROT_READ as u64, 0, 0, 0],
        ),
        // Signals to others.
        (libc::SYS_tgkill, [1, 1, 0, 0, 0, 0]),
        // The terminal of the daemon (TIOCSTI).
        (libc::SYS_ioctl, [BAD_FD, 0x5412, 0, 0, 0, 0]),
        (libc::SYS_fcntl, [BAD_FD, libc::F_SETOWN as u64, 0, 0, 0, 0]),
    ];
    for kind in ThreadKind::ALL {
        let results = under(kind, || {
            forbidden
                .iter()
                .map(|(call, arguments)| errno(*call, *arguments))
                .collect::<Vec<_>>()
        });
        for ((call, arguments), result) in forbidden.iter().zip(results) {
            assert_eq!(result, libc::EPERM, "{kind:?}: {} {arguments:x?}", table::name(*call));
        }
    }
}

#[test]
fn each_kind_reaches_the_kernel_with_its_own_calls() {
    use ThreadKind::*;
    let kvm = |number: u64| [BAD_FD, 0xae00 | number, 0, 0, 0, 0];
    let cases: &[(i64, [u64; 6], &[ThreadKind])] = &[
        (libc::SYS_ioctl, kvm(0x80), &[Driver, Vcpu]),
        (libc::SYS_ioctl, kvm(0xc7), &[Driver, Vcpu]),
        // Linux reads its real-time clock, which asks KVM.
        (libc::SYS_ioctl, kvm(0x7c), &[Driver, Vcpu]),
        (libc::SYS_ioctl, kvm(0x01), &[Driver]),
        (libc::SYS_ioctl, kvm(0xa5), &[Driver, Vcpu, Net, Disk]),
        // BLKDISCARD: nothing gives back a block.
        (libc::SYS_ioctl, [BAD_FD, 0x1277, 0, 0, 0, 0], &[]),
        (libc::SYS_ioctl, [BAD_FD, 0x1272, 0, 0, 0, 0], &[Driver, Disk]),
        (libc::SYS_pread64, [BAD_FD, 0, 0, 0, 0, 0], &[Driver, Disk, Worker]),
        (libc::SYS_pwrite64, [BAD_FD, 0, 0, 0, 0, 0], &[Driver, Disk]),
        (libc::SYS_fdatasync, [BAD_FD, 0, 0, 0, 0, 0], &[Driver, Disk]),
        (libc::SYS_connect, [BAD_FD, 0, 0, 0, 0, 0], &[Link]),
        (libc::SYS_accept4, [BAD_FD, 0, 0, 0, 0, 0], &[Link, Control]),
        (libc::SYS_recvfrom, [BAD_FD, 0, 0, 0, 0, 0], &[Driver, Link]),
        (libc::SYS_recvmsg, [BAD_FD, 0, 0, 0, 0, 0], &[Driver, Link, Control]),
        (libc::SYS_write, [BAD_FD, 0, 0, 0, 0, 0], &ThreadKind::ALL),
    ];
    for kind in ThreadKind::ALL {
        let results = under(kind, || {
            cases
                .iter()
                .map(|(call, arguments, _)| errno(*call, *arguments))
                .collect::<Vec<_>>()
        });
        for ((call, arguments, kinds), result) in cases.iter().zip(results) {
            let expected = if kinds.contains(&kind) {
                libc::EBADF
            } else {
                libc::EPERM
            };
            assert_eq!(result, expected, "{kind:?}: {} {arguments:x?}", table::name(*call));
        }
    }
}

#[test]
fn ordinary_rust_works_under_every_filter() {
    for kind in ThreadKind::ALL {
        let sum = under(kind, move || {
            let numbers: Vec<u64> = (0..200_000).collect();
            let map: std::collections::HashMap<u64, String> = (0..100).map(|n| (n, n.to_string())).collect();
            std::thread::sleep(std::time::Duration::from_millis(1));
            let lock = std::sync::Mutex::new(std::time::Instant::now());
            assert!(lock.lock().unwrap().elapsed() < std::time::Duration::from_secs(60));
            numbers.iter().sum::<u64>() + map.len() as u64
        });
        assert_eq!(sum, 19_999_900_100, "{kind:?}");
    }
}

#[test]
fn a_driver_starts_threads_with_narrower_filters() {
    let filters = Filters::with_action(SeccompAction::Errno(libc::EPERM.unsigned_abs())).unwrap();
    let inner = under(ThreadKind::Driver, move || {
        let worker = std::thread::spawn(move || {
            filters.enter(ThreadKind::Worker).unwrap();
            errno(libc::SYS_pwrite64, [BAD_FD, 0, 0, 0, 0, 0])
        });
        (
            worker.join().unwrap(),
            errno(libc::SYS_pwrite64, [BAD_FD, 0, 0, 0, 0, 0]),
        )
    });
    assert_eq!(inner, (libc::EPERM, libc::EBADF));
}

#[test]
fn many_threads_allocate_without_opening_files() {
    const MANY: &str = "FTVM_TEST_SECCOMP_MANY";
    if std::env::var_os(MANY).is_some() {
        install_handler().unwrap();
        let filters = Filters::compile().unwrap();
        let barrier = std::sync::Barrier::new(40);
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| {
                    filters.enter(ThreadKind::Worker).unwrap();
                    barrier.wait();
                    // All at once, so that they need arenas of their own.
                    let blocks: Vec<Vec<u8>> = (0..1000).map(|n| vec![1; n]).collect();
                    barrier.wait();
                    assert_eq!(blocks.len(), 1000);
                });
            }
        });
        return;
    }
    let this_test = "seccomp::tests::many_threads_allocate_without_opening_files";
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child
        .args(["--exact", this_test, "--nocapture"])
        .env(MANY, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_file_is_not_opened_and_nobody_dies_of_it() {
    for kind in ThreadKind::ALL {
        let error = under(kind, || std::fs::File::open("/proc/self/status").unwrap_err());
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{kind:?}");
    }
}

const CHILD: &str = "FTVM_TEST_SECCOMP_CHILD";

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    if std::env::var_os(CHILD).is_some() {
        install_handler().unwrap();
        let filters = Filters::compile().unwrap();
        let thread = std::thread::Builder::new().name("net-eth0".into()).spawn(move || {
            filters.enter(ThreadKind::Net).unwrap();
            let _ = std::fs::remove_file("/nonexistent");
        });
        thread.unwrap().join().unwrap();
        unreachable!("the call was done");
    }
    let this_test = "seccomp::tests::a_forbidden_call_ends_the_process_and_is_named";
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child
        .args(["--exact", this_test, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(i32::from(exit_code::SECCOMP)), "{text}");
    assert!(text.contains("net-eth0") && text.contains("SYS_unlink"), "{text}");
}

#[test]
fn the_first_look_at_a_clock_may_come_under_a_filter() {
    if std::env::var_os(CHILD).is_some() {
        install_handler().unwrap();
        let filters = Filters::compile().unwrap();
        let look = move || {
            filters.enter(ThreadKind::Control).unwrap();
            crate::clock::Moment::now()
        };
        std::thread::spawn(look).join().unwrap();
        return;
    }
    // A process of its own: in this one other tests have looked already.
    let this_test = "seccomp::tests::the_first_look_at_a_clock_may_come_under_a_filter";
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child
        .args(["--exact", this_test, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn every_allowed_call_has_a_name() {
    for kind in ThreadKind::ALL {
        for allow in table::of(kind) {
            assert_ne!(table::name(allow.call), "?", "call {} of {kind:?}", allow.call);
        }
    }
}
