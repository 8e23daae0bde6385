//! The jail, read from /proc of a running engine.

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use support::Node;

fn status_fields(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

/// What must be true of every jail, full or reduced.
fn check_common(pid: i32, threads_min: usize) {
    let proc = std::path::PathBuf::from(format!("/proc/{pid}"));
    let tasks: Vec<_> = std::fs::read_dir(proc.join("task"))
        .unwrap()
        .map(|task| task.unwrap().path())
        .collect();
    assert!(
        tasks.len() >= threads_min,
        "driver, control and one thread of each other kind: {}",
        tasks.len()
    );
    for task in &tasks {
        let status = status_fields(&task.join("status"));
        let name = &status["Name"];
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{set} of thread {name}");
        }
        assert_eq!(status["NoNewPrivs"], "1", "thread {name}");
        assert_eq!(status["Seccomp"], "2", "thread {name} has a filter");
        assert_eq!(status["SigBlk"], "0000000000000000", "thread {name}");
    }
    // Root: empty, read-only, one mount, nothing of the host below it.
    assert_eq!(std::fs::read_dir(proc.join("root")).unwrap().count(), 0);
    let mounts = std::fs::read_to_string(proc.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let fields: Vec<&str> = mounts.split_whitespace().collect();
    assert_eq!(fields[4], "/");
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(
            fields[5].split(',').any(|found| found == option),
            "{option} in {mounts}"
        );
    }
    assert!(std::fs::write(proc.join("root/file"), "x").is_err());
    assert_eq!(std::fs::read_link(proc.join("cwd")).unwrap(), Path::new("/"));
    for namespace in ["mnt", "ipc", "uts"] {
        let own = std::fs::metadata(format!("/proc/self/ns/{namespace}")).unwrap().ino();
        assert_ne!(
            std::fs::metadata(proc.join("ns").join(namespace)).unwrap().ino(),
            own,
            "{namespace}"
        );
    }
    // Nothing inherited.
    assert_eq!(std::fs::read(proc.join("environ")).unwrap(), b"");
    let limits = std::fs::read_to_string(proc.join("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    let stat = std::fs::read_to_string(proc.join("stat")).unwrap();
    let session = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(3)
        .unwrap()
        .to_owned();
    assert_eq!(session, pid.to_string(), "a session of its own");
}

/// Every descriptor of the engine is one that it was given or made itself.
fn check_descriptors(pid: i32, node: &Node) {
    let folder = node.folder.display().to_string();
    let known = [
        "/dev/null".to_owned(),
        "/dev/kvm".to_owned(),
        "/dev/userfaultfd".to_owned(),
        "anon_inode:[eventfd]".to_owned(),
        format!("{folder}/kernel"),
        format!("{folder}/disk"),
        format!("{folder}/state/seats/vm.a/header"),
        format!("{folder}/state/seats/vm.a/journal"),
        format!("{folder}/state/seats/vm.a/console.log"),
        format!("{folder}/state/seats/vm.a/engine.log"),
        format!("{folder}/state/seats/vm.a/exit.json"),
    ];
    let mut sockets = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        let target = std::fs::read_link(&path).unwrap().display().to_string();
        if target.starts_with("socket:") {
            sockets += 1;
        } else {
            assert!(known.contains(&target), "{} is {target}", path.display());
        }
    }
    assert_eq!(sockets, 3, "daemon's connection, control listener, link listener");
}

#[test]
fn the_full_jail_as_root() {
    let mut node = Node::new(|_| {});
    let seat = node.start_seat();
    let pid = seat.pid.unwrap();
    assert_eq!(seat.jail, "full");
    check_common(pid, 7);
    check_descriptors(pid, &node);
    let status = status_fields(Path::new(&format!("/proc/{pid}/status")));
    let uid = node.config.jail.uid_first;
    let all = format!("{uid} {uid} {uid} {uid}");
    assert_eq!(
        (&status["Uid"], &status["Gid"], &status["Groups"]),
        (&all, &all, &String::new())
    );
}

#[test]
fn the_reduced_jail_without_root() {
    const USER: u32 = 54_321;
    let mut node = Node::new(|_| {});
    give_to(&node.folder, USER);
    node.user = Some(USER);
    let seat = node.start_seat();
    let pid = seat.pid.unwrap();
    assert_eq!(seat.jail, "reduced");
    check_common(pid, 7);
    check_descriptors(pid, &node);
    let status = status_fields(Path::new(&format!("/proc/{pid}/status")));
    assert_eq!(status["Uid"], format!("{USER} {USER} {USER} {USER}"));
    let map = std::fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
    assert_eq!(
        map.split_whitespace().collect::<Vec<_>>(),
        [USER.to_string(), USER.to_string(), "1".to_owned()]
    );
}

fn give_to(path: &Path, user: u32) {
    std::os::unix::fs::chown(path, Some(user), Some(user)).unwrap();
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            give_to(&entry.unwrap().path(), user);
        }
    }
}

#[test]
fn a_program_that_is_no_static_engine_is_refused() {
    for (name, contents, words) in [
        ("script", &b"#!/bin/sh\n"[..], "not a 64-bit ELF program"),
        ("dynamic", &std::fs::read("/bin/sh").unwrap()[..], "dynamically linked"),
    ] {
        let mut node = Node::new(|_| {});
        let path = node.folder.join(name);
        std::fs::write(&path, contents).unwrap();
        node.config.engine = Some(path);
        node.write_config();
        let output = node.check();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(22), "{text}");
        assert!(text.contains(words), "{text}");
    }
}
