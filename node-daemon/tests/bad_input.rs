//! Bad input, bad days: each ends in a message that says what, where, why and what to do, and in its exit code.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use ftvm_node_daemon::config::NicConfig;
use support::Node;

/// `check` must end with this code and these words.
fn refused(node: &Node, code: i32, words: &[&str]) {
    let output = node.check();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "{text} should say {word}");
    }
}

/// How `check` ends, and what it says, in a namespace of its own of this kind. `script` gets these places and then the program, as `$@`.
fn check_in(node: &Node, kind: &str, script: &str, places: &[&Path]) -> (Option<i32>, String) {
    let check = node.command("check");
    let output = Command::new("unshare")
        .args([kind, "sh", "-c", script, "sh"])
        .args(places)
        .arg(check.get_program())
        .args(check.get_args())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn node(change: impl FnOnce(&mut Node)) -> Node {
    let mut node = Node::new(|_| {});
    change(&mut node);
    node.write_config();
    node
}

#[test]
fn a_good_configuration_has_no_findings() {
    let output = node(|_| {}).check();
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn kernels_and_initrds() {
    refused(
        &node(|n| std::fs::write(n.folder.join("kernel"), "#!/bin/sh").unwrap()),
        15,
        &["kernel", "not a kernel"],
    );
    refused(
        &node(|n| std::fs::write(n.folder.join("kernel"), "").unwrap()),
        15,
        &["kernel", "not a file with contents"],
    );
    refused(
        &node(|n| n.config.seats[0].boot.kernel = "/nowhere".into()),
        15,
        &["/nowhere", "No such file", "boot.kernel"],
    );
    let large = node(|n| {
        let path = n.folder.join("initrd");
        std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        n.config.seats[0].boot.initrd = Some(path);
    });
    refused(
        &large,
        15,
        &[
            "initrd",
            "67108864 bytes do not fit",
            "64 MiB",
            "raise machine.memory_mib",
        ],
    );
}

#[test]
fn more_memory_than_the_host_has() {
    let node = node(|n| n.config.seats[0].machine.memory_mib = 1 << 20);
    refused(
        &node,
        14,
        &["vm/a needs 1048576 MiB", "available", "lower machine.memory_mib"],
    );
}

#[test]
fn disks() {
    refused(
        &node(|n| n.config.seats[0].disks[0].path = "/nowhere".into()),
        16,
        &["disk root", "/nowhere", "does not exist", "fallocate"],
    );
    refused(
        &node(|n| std::fs::write(n.folder.join("disk"), "short").unwrap()),
        16,
        &["5 bytes", "512-byte sectors"],
    );
    refused(
        &node(|n| n.config.seats[0].disks[0].size_mib = Some(2)),
        16,
        &["1048576 bytes", "2 MiB", "one size"],
    );
    refused(
        &node(|n| n.config.seats[0].disks[0].path = n.folder.clone()),
        16,
        &["disk root", "can't be opened"],
    );
}

#[test]
fn a_disk_in_use_is_refused() {
    let node = node(|_| {});
    let file = std::fs::File::open(node.folder.join("disk")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    refused(&node, 16, &["disk root", "in use by another seat or program"]);
}

#[test]
fn a_disk_on_a_read_only_file_system_is_refused() {
    let node = node(|_| {});
    let script = "mount --bind $1 $1 && mount -o remount,ro,bind $1 && shift && exec \"$@\"";
    let (code, text) = check_in(&node, "--mount", script, &[&node.folder.join("disk")]);
    assert_eq!(code, Some(16), "{text}");
    assert!(text.contains("read-only") && text.contains("read_only: true"), "{text}");
}

#[test]
fn missing_kvm() {
    let node = node(|_| {});
    let script = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$@\"";
    let (code, text) = check_in(&node, "--mount", script, &[]);
    assert_eq!(code, Some(13), "{text}");
    assert!(
        text.contains("/dev/kvm") && text.contains("kvm-intel or kvm-amd"),
        "{text}"
    );
}

#[test]
fn unknown_fields_and_missing_files() {
    let node = node(|_| {});
    let text = std::fs::read_to_string(node.config_path()).unwrap();
    std::fs::write(node.config_path(), text.replace("vcpus:", "cpus:")).unwrap();
    refused(&node, 10, &["unknown field `cpus`", "line", "docs/standalone.md"]);
    std::fs::remove_file(node.config_path()).unwrap();
    refused(&node, 10, &["can't be read", "No such file"]);
}

#[test]
fn identities() {
    refused(
        &node(|n| n.config.seats[0].identity = "/nowhere".into()),
        18,
        &["/nowhere/seat.json", "ftvm standalone identities"],
    );
    refused(
        &node(|n| n.config.seats[0].identity = n.folder.join("b")),
        18,
        &["belongs to seat vm/b", "says vm/a"],
    );
    refused(
        &node(|n| std::fs::write(n.folder.join("a/key.pem"), "x").unwrap()),
        18,
        &["key.pem", "no PEM"],
    );
    refused(
        &node(|n| n.config.seats[0].link.peers[0].seat = "z".into()),
        18,
        &["peer z", "seat_id"],
    );
}

#[test]
fn both_seats_configured_as_the_same() {
    refused(
        &node(|n| n.config.seats[0].link.peers[0].seat = "a".into()),
        10,
        &["is this seat itself", "different names"],
    );
    refused(
        &node(|n| n.config.seats.push(n.config.seats[0].clone())),
        10,
        &["both have the same name", "its own"],
    );
}

#[test]
fn the_arbiters_folder() {
    refused(
        &node(|n| n.config.arbiter.folder = "/nowhere".into()),
        12,
        &["/nowhere/vm", "No such file", "shared"],
    );
    let empty = node(|n| std::fs::create_dir(n.folder.join("arbiter/vm")).unwrap());
    refused(&empty, 12, &["is not set up", "mounted"]);
}

#[test]
fn link_addresses() {
    refused(
        &node(|n| n.config.seats[0].link.listen = "192.0.2.77:1".parse().unwrap()),
        17,
        &["192.0.2.77:1", "must be an address of this node"],
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    refused(
        &node(|n| n.config.seats[0].link.listen = address),
        17,
        &[&address.to_string(), "in use", "a free port"],
    );
}

/// In a network namespace of its own, so that the machine's devices are left alone.
fn check_with_taps(node: &Node, before: &str) -> (Option<i32>, String) {
    let script = format!("ip link set lo up; {before}; exec \"$@\"");
    check_in(node, "--net", &script, &[])
}

fn with_nic(bridge: Option<&str>, existing: bool) -> Node {
    node(|n| {
        n.config.seats[0].nics.push(NicConfig {
            name: "eth0".into(),
            mac: "02:00:00:00:00:01".into(),
            addresses: Vec::new(),
            tap: "ftvmtest0".into(),
            bridge: bridge.map(str::to_owned),
            mtu: Some(1400),
            existing,
        });
    })
}

#[test]
fn taps() {
    let plain = with_nic(None, false);
    assert_eq!(check_with_taps(&plain, "true"), (Some(0), String::new()));
    let (code, text) = check_with_taps(&plain, "ip tuntap add ftvmtest0 mode tap");
    assert_eq!(code, Some(17), "{text}");
    assert!(
        text.contains("ftvmtest0 exists already") && text.contains("existing: true"),
        "{text}"
    );
    let bridged = with_nic(Some("br7"), false);
    assert_eq!(check_with_taps(&bridged, "ip link add br7 type bridge").0, Some(0));
    let (code, text) = check_with_taps(&bridged, "true");
    assert_eq!(code, Some(17), "{text}");
    assert!(
        text.contains("MTU of bridge br7") && text.contains("check the bridge"),
        "{text}"
    );
    // A card with an MTU of 1400 on what carries less.
    let (code, text) = check_with_taps(&bridged, "ip link add br7 mtu 1300 type bridge");
    assert_eq!(code, Some(17), "{text}");
    for words in [
        "bridge br7 carries 1300 bytes",
        "an MTU of 1400",
        "raise the MTU of bridge br7",
    ] {
        assert!(text.contains(words), "{text}");
    }
    let existing = with_nic(None, true);
    let (code, text) = check_with_taps(
        &existing,
        "ip tuntap add ftvmtest0 mode tap && ip link set ftvmtest0 mtu 1399",
    );
    assert_eq!(code, Some(17), "{text}");
    assert!(text.contains("that tap carries 1399 bytes"), "{text}");
    assert_eq!(
        check_with_taps(&existing, "ip tuntap add ftvmtest0 mode tap").0,
        Some(0)
    );
    let (code, text) = check_with_taps(&existing, "true");
    assert_eq!(code, Some(17), "{text}");
    assert!(text.contains("does not exist, although"), "{text}");
}

#[test]
fn a_second_daemon_on_the_state_folder_or_the_socket() {
    let mut node = Node::new(|_| {});
    node.start();
    let output = node.command("run").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(11), "{text}");
    let pid = node.daemon.as_ref().unwrap().id();
    assert!(
        text.contains(&format!("in use by another daemon (process {pid})")),
        "{text}"
    );
    node.config.state_folder = node.folder.join("other");
    node.write_config();
    let output = node.command("run").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(11), "{text}");
    assert!(text.contains("another daemon's"), "{text}");
    assert!(
        node.try_ask(&ftvm_node_daemon::api::Request::Status).is_some(),
        "the first one goes on"
    );
}

#[test]
fn a_full_disk_under_the_state_folder_is_told() {
    let node = node(|_| {});
    let script = "mkdir -p $1 && mount -t tmpfs -o size=4k,nr_inodes=8 none $1 && shift && exec \"$@\"";
    let (code, text) = check_in(&node, "--mount", script, &[&node.config.state_folder]);
    assert!(matches!(code, Some(11 | 16)), "{text}");
    assert!(text.contains("No space left") && text.contains("space"), "{text}");
}

#[test]
fn a_seat_that_cannot_start_says_so_in_status_and_starts_once_mended() {
    let mut node = Node::new(|_| {});
    let disk = node.folder.join("disk");
    std::fs::rename(&disk, node.folder.join("away")).unwrap();
    node.start();
    node.ask(&ftvm_node_daemon::api::Request::SetUp {
        vm: "vm".into(),
        seat: "a".into(),
    });
    let seat = node.wait("the seat fails", |node| node.seat().filter(|seat| seat.code != 0));
    assert_eq!(seat.code, 16);
    assert!(seat.why.contains("does not exist"), "{}", seat.why);
    std::fs::rename(node.folder.join("away"), &disk).unwrap();
    node.wait_running();
}

#[test]
fn exit_codes_are_documented() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/exit-codes.md");
    let text = std::fs::read_to_string(path).unwrap();
    for (code, name) in ftvm_engine::control::exit_code::ALL {
        assert!(
            text.contains(&format!("| {code} | {name} |")),
            "docs/exit-codes.md has no line for {code} {name}"
        );
    }
    let lines = text
        .lines()
        .filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit())
        .count();
    assert_eq!(lines, ftvm_engine::control::exit_code::ALL.len(), "and no others");
}
