//! Programs at the seat socket that are not what they should be.
//!
//! Each case runs in a process of its own in the pod's cgroups: this program again, told by its environment what to do.

mod support;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ftvm_engine::control::{Connection, SocketError};
use ftvm_node_daemon::disks::Step;
use ftvm_node_daemon::seat_socket::message::{FromSeat, ToSeat, VERSION};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{CWD, Mode, OFlags};
use support::pod::{DISK_BYTES, Pod};

const CASE: &str = "FTVM_TEST_CASE";
const FOLDER: &str = "FTVM_TEST_FOLDER";

/// Runs a case in the pod and gives what it printed.
fn in_pod(pod: &Pod, case: &str) -> String {
    let mut command = pod.command(&std::env::current_exe().unwrap());
    let output = command
        .args(["--exact", "the_case", "--nocapture"])
        .env(CASE, case)
        .env(FOLDER, &pod.folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{case}: {text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn connect(folder: &Path) -> Connection {
    Connection::connect(&folder.join("run/seat.sock")).unwrap()
}

/// The next message, or how the connection ended.
fn next(connection: &Connection) -> Result<ToSeat, SocketError> {
    let mut fds = [PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN)];
    let patience = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&patience)), Ok(1), "no answer");
    connection.receive::<ToSeat>(false).map(|message| message.body)
}

/// Says hello and gets the recipe.
fn greeted(folder: &Path) -> Connection {
    let connection = connect(folder);
    connection.send(&FromSeat::Hello { version: VERSION }, &[]).unwrap();
    let answer = next(&connection).unwrap();
    assert!(matches!(answer, ToSeat::Prepare(_)), "{answer:?}");
    connection
}

/// Reads until the connection ends; gives the last refusal.
fn until_end(connection: &Connection) -> String {
    let mut said = "closed".to_owned();
    loop {
        match next(connection) {
            Ok(ToSeat::Refused { why }) => said = why,
            Ok(_) => {}
            Err(SocketError::Closed) => return said,
            Err(error) => panic!("{error}"),
        }
    }
}

fn open(path: &Path, flags: OFlags) -> OwnedFd {
    rustix::fs::open(path, flags | OFlags::CREATE | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR).unwrap()
}

/// What an honest program hands over, in its order; made here, so that a case can spoil one of it.
fn honest(folder: &Path) -> Vec<OwnedFd> {
    let root = folder.join("root");
    let reading = |path: &str| -> OwnedFd { File::open(root.join(path)).unwrap().into() };
    let mut fds: Vec<OwnedFd> = ["seat.json", "certificate.pem", "key.pem", "authority.pem"]
        .map(|name| reading(&format!("identity/{name}")))
        .into();
    fds.push(reading("guest/boot/vmlinuz"));
    let disk = open(&root.join("disks/root/disk.raw"), OFlags::RDWR);
    rustix::fs::ftruncate(&disk, DISK_BYTES).unwrap();
    fds.push(disk);
    fds.push(open(&root.join("disks/root/ftvm-header"), OFlags::RDWR));
    fds.push(open(&root.join("disks/root/ftvm-journal"), OFlags::RDWR));
    let fifo = root.join("disks/root/ftvm-console");
    let _ = rustix::fs::mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR);
    // Held open for reading as long as this process lives.
    std::mem::forget(rustix::fs::open(&fifo, OFlags::RDWR, Mode::empty()).unwrap());
    fds.push(rustix::fs::open(&fifo, OFlags::WRONLY, Mode::empty()).unwrap());
    fds
}

fn hand(connection: &Connection, fds: &[OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    connection.send(&FromSeat::Ready { initrd: false }, &fds).unwrap();
}

/// Hands over with one descriptor exchanged, and gives the refusal.
fn spoiled(folder: &Path, at: usize, with: OwnedFd) -> String {
    let connection = greeted(folder);
    let mut fds = honest(folder);
    fds[at] = with;
    hand(&connection, &fds);
    until_end(&connection)
}

const KEY: usize = 2;
const KERNEL: usize = 4;
const DISK: usize = 5;
const HEADER: usize = 6;
const JOURNAL: usize = 7;
const CONSOLE: usize = 8;

/// Not a test of its own: what a hostile program does.
#[test]
fn the_case() {
    let (Some(case), Some(folder)) = (std::env::var_os(CASE), std::env::var_os(FOLDER)) else {
        return;
    };
    let folder = PathBuf::from(folder);
    let said = match case.to_str().unwrap() {
        "oversized" => {
            let connection = greeted(&folder);
            let text = vec![b'x'; 200 * 1024];
            rustix::net::send(connection.as_fd(), &text, rustix::net::SendFlags::empty()).unwrap();
            until_end(&connection)
        }
        "malformed" => {
            let connection = greeted(&folder);
            rustix::net::send(connection.as_fd(), b"{\"type\":", rustix::net::SendFlags::empty()).unwrap();
            until_end(&connection)
        }
        "no hello" => {
            let connection = connect(&folder);
            connection.send(&FromSeat::Terminate {}, &[]).unwrap();
            until_end(&connection)
        }
        "other version" => {
            let connection = connect(&folder);
            connection.send(&FromSeat::Hello { version: VERSION + 1 }, &[]).unwrap();
            until_end(&connection)
        }
        "second hello" => {
            let connection = greeted(&folder);
            connection.send(&FromSeat::Hello { version: VERSION }, &[]).unwrap();
            until_end(&connection)
        }
        "strange progress" => {
            let connection = greeted(&folder);
            let progress = FromSeat::Progress {
                step: Step::Writing,
                disk: "another".into(),
                done_bytes: 1,
                total_bytes: 2,
            };
            connection.send(&progress, &[]).unwrap();
            until_end(&connection)
        }
        "flood" => {
            let connection = greeted(&folder);
            let why = "x".repeat(50_000);
            // Until the daemon ends it; a full socket is waited for.
            while !matches!(
                connection.send(&FromSeat::Failed { why: why.clone() }, &[]),
                Err(SocketError::Closed)
            ) {}
            "closed".to_owned()
        }
        "descriptors beside progress" => {
            let connection = greeted(&folder);
            let fds = honest(&folder);
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            connection.send(&FromSeat::Failed { why: String::new() }, &fds).unwrap();
            until_end(&connection)
        }
        "too many connections" => {
            let held = [greeted(&folder), greeted(&folder)];
            let said = until_end(&connect(&folder));
            drop(held);
            said
        }
        "too few" => {
            let connection = greeted(&folder);
            hand(&connection, &honest(&folder)[1..]);
            until_end(&connection)
        }
        "twice" => {
            let connection = greeted(&folder);
            let fds = honest(&folder);
            hand(&connection, &fds);
            hand(&connection, &fds);
            until_end(&connection)
        }
        descriptor => spoiled_case(&folder, descriptor),
    };
    println!("said: {said}");
}

/// One descriptor is not what it should be.
fn spoiled_case(folder: &Path, case: &str) -> String {
    let disk = folder.join("root/disks/root/disk.raw");
    match case {
        "disk of another size" => {
            let other = open(&folder.join("root/small"), OFlags::RDWR);
            rustix::fs::ftruncate(&other, 4096).unwrap();
            spoiled(folder, DISK, other)
        }
        "disk for reading" => spoiled(
            folder,
            DISK,
            rustix::fs::open(&disk, OFlags::RDONLY, Mode::empty()).unwrap(),
        ),
        "disk by path only" => spoiled(
            folder,
            DISK,
            rustix::fs::open(&disk, OFlags::PATH, Mode::empty()).unwrap(),
        ),
        "disk for appending" => spoiled(folder, DISK, open(&disk, OFlags::RDWR | OFlags::APPEND)),
        "device as disk" => spoiled(
            folder,
            DISK,
            File::options().read(true).write(true).open("/dev/zero").unwrap().into(),
        ),
        "folder as kernel" => spoiled(folder, KERNEL, File::open(folder).unwrap().into()),
        "file of proc as journal" => {
            let comm = File::options().read(true).write(true).open("/proc/self/comm").unwrap();
            spoiled(folder, JOURNAL, comm.into())
        }
        // What the daemon reads before anything is started, and what would be read with its rights.
        "file of proc as kernel" => spoiled(folder, KERNEL, File::open("/proc/self/mountinfo").unwrap().into()),
        "file of sysfs as kernel" => {
            let online = File::open("/sys/devices/system/cpu/online").unwrap();
            spoiled(folder, KERNEL, online.into())
        }
        "namespace as kernel" => spoiled(folder, KERNEL, File::open("/proc/self/ns/net").unwrap().into()),
        "process as kernel" => {
            let pidfd = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
            spoiled(folder, KERNEL, pidfd.unwrap())
        }
        // Whoever reads it would wait.
        "FIFO as kernel" => {
            let fifo = folder.join("root/silent");
            let _ = rustix::fs::mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR);
            spoiled(
                folder,
                KERNEL,
                rustix::fs::open(&fifo, OFlags::RDWR, Mode::empty()).unwrap(),
            )
        }
        "device as key" => spoiled(folder, KEY, File::open("/dev/zero").unwrap().into()),
        "kernel by path only" => {
            let path = folder.join("root/guest/boot/vmlinuz");
            spoiled(
                folder,
                KERNEL,
                rustix::fs::open(path, OFlags::PATH, Mode::empty()).unwrap(),
            )
        }
        "socket as header" => spoiled(folder, HEADER, Connection::pair().unwrap().0.into_fd()),
        "disk as header too" => spoiled(folder, HEADER, open(&disk, OFlags::RDWR)),
        "disk as journal too" => spoiled(folder, JOURNAL, open(&disk, OFlags::RDWR)),
        "file as console" => spoiled(folder, CONSOLE, open(&folder.join("root/small"), OFlags::WRONLY)),
        "console for reading" => {
            let fifo = folder.join("root/disks/root/ftvm-console");
            let _ = honest(folder);
            spoiled(
                folder,
                CONSOLE,
                rustix::fs::open(fifo, OFlags::RDWR, Mode::empty()).unwrap(),
            )
        }
        "console that nobody reads" => {
            let fifo = folder.join("root/unread");
            let _ = rustix::fs::mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR);
            let reader = rustix::fs::open(&fifo, OFlags::RDWR, Mode::empty()).unwrap();
            let writer = rustix::fs::open(&fifo, OFlags::WRONLY, Mode::empty()).unwrap();
            drop(reader);
            spoiled(folder, CONSOLE, writer)
        }
        "no key" => spoiled(
            folder,
            KEY,
            File::open(folder.join("root/guest/boot/vmlinuz")).unwrap().into(),
        ),
        "identity without end" => spoiled(folder, 0, {
            let long = open(&folder.join("root/long"), OFlags::RDWR);
            rustix::fs::ftruncate(&long, 1 << 20).unwrap();
            long
        }),
        other => panic!("unknown case {other}"),
    }
}

/// A pod that is known, with a record that names another seat's incarnation, so that nothing is copied.
fn known_pod() -> Pod {
    let mut pod = Pod::new();
    pod.make_record();
    pod.start_daemon();
    pod
}

#[test]
fn hostile_programs_are_refused_and_harm_nobody() {
    let pod = known_pod();
    let cases: &[(&str, &str)] = &[
        ("oversized", "closed"),
        ("malformed", "closed"),
        ("no hello", "closed"),
        ("other version", "speaks version"),
        ("second hello", "closed"),
        ("strange progress", "closed"),
        ("flood", "closed"),
        ("descriptors beside progress", "closed"),
        ("too many connections", "too many connections"),
        ("too few", "8 descriptors came"),
        ("disk of another size", "has 4096 bytes"),
        ("disk for reading", "not opened for what"),
        ("disk by path only", "O_PATH"),
        ("disk for appending", "appending"),
        ("device as disk", "no regular file"),
        ("folder as kernel", "no regular file"),
        ("file of proc as journal", "a file of proc"),
        ("file of proc as kernel", "kernel: a file of proc"),
        ("file of sysfs as kernel", "kernel: a file of sysfs"),
        ("namespace as kernel", "kernel: a file of nsfs"),
        // Of a file system of its own (Linux 6.9), or of none.
        ("process as kernel", "is refused: kernel: "),
        ("FIFO as kernel", "kernel: no regular file"),
        ("device as key", "key.pem: no regular file"),
        ("kernel by path only", "kernel: opened for its path only"),
        ("socket as header", "no regular file"),
        ("disk as header too", "header: more than"),
        ("disk as journal too", "one file was handed over as two"),
        ("file as console", "no FIFO"),
        ("console for reading", "not its writing end"),
        ("console that nobody reads", "does anybody read it"),
        ("no key", "no PEM of a PRIVATE KEY"),
        ("identity without end", "more than 16384 bytes"),
    ];
    for (case, expected) in cases {
        let said = in_pod(&pod, case);
        assert!(said.contains("said: ") && said.contains(expected), "{case}: {said}");
        // Whoever was refused left nothing behind: no engine, and the daemon answers.
        let status = pod.status().unwrap();
        assert_eq!(status.pid, None, "{case}: {status:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_was_handed_over_once_is_not_taken_again() {
    let pod = known_pod();
    assert!(in_pod(&pod, "twice").contains("said: closed"));
}

#[test]
fn another_seats_identity_is_refused() {
    let pod = known_pod();
    let path = pod.root().join("identity/seat.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("vm-a", "vm-b");
    std::fs::write(&path, text).unwrap();
    let mut pod = pod;
    pod.start_seat();
    pod.wait("the seat is refused", |pod| {
        let said = std::fs::read_to_string(pod.folder.join("seat.err")).unwrap();
        said.contains("another seat's").then_some(())
    });
}

#[test]
fn a_program_outside_of_pods_and_a_pod_that_nobody_knows_are_refused() {
    let pod = known_pod();
    let said = until_end(&connect(&pod.folder));
    assert!(said.contains("is in no pod's cgroup"), "{said}");
    // A pod of another UID, with this pod's files.
    let stranger = Pod::new();
    let mut command = stranger.command(Path::new(env!("CARGO_BIN_EXE_seat")));
    let log = File::create(pod.folder.join("stranger.err")).unwrap();
    let mut seat = command.arg("--root").arg(pod.root()).stderr(log).spawn().unwrap();
    let mut pod = pod;
    pod.wait("the stranger is refused", |pod| {
        let said = std::fs::read_to_string(pod.folder.join("stranger.err")).unwrap();
        said.contains("is no seat of this node").then_some(())
    });
    seat.kill().unwrap();
    seat.wait().unwrap();
    assert_eq!(pod.status().unwrap().pid, None);
}
