//! The seat program and the daemon, with the cgroups and the network namespace of a pod.

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use ftvm_node_daemon::disks::mark::{Mark, MarkFile};
use serde_json::json;
use support::pod::{CONTENTS, DISK_BYTES, Pod, network_of};

#[test]
fn a_seat_hands_its_files_over_and_its_engine_lives_in_the_pod() {
    let mut pod = Pod::new();
    let seat = pod.start();
    let pid = seat.pid.unwrap();
    assert_eq!(seat.jail, "full");
    // Charged to the pod in every hierarchy, and ended with it.
    for (processes, cgroup) in pod.processes("ftvm-engine").iter().zip(&pod.cgroups) {
        assert!(processes.contains(&pid), "{pid} in {}: {processes:?}", cgroup.display());
    }
    // In the pod's network, where its link listens.
    let program = pod.seat.as_ref().unwrap().id();
    assert_eq!(network_of(pid), network_of(program.cast_signed()));
    assert_ne!(network_of(pid), network_of(std::process::id().cast_signed()));
    let sockets = std::fs::read_to_string(format!("/proc/{program}/net/tcp")).unwrap();
    assert!(sockets.contains("0100007F:1B58"), "port 7000 listens: {sockets}");
    // The disk is whole: first contents, zeros, every block.
    let data = std::fs::metadata(pod.disk("disk.raw")).unwrap();
    assert_eq!(data.len(), DISK_BYTES);
    assert!(data.blocks() * 512 >= DISK_BYTES, "{} blocks", data.blocks());
    let disk = std::fs::read(pod.disk("disk.raw")).unwrap();
    assert_eq!(&disk[..CONTENTS.len()], CONTENTS);
    assert!(disk[CONTENTS.len()..].iter().all(|byte| *byte == 0));
    // The first record names this seat, so it got its first header.
    assert!(std::fs::metadata(pod.disk("ftvm-header")).unwrap().len() > 0);
    // The pod is not ready before the engine is; the test engine never is.
    pod.wait("the seat is told", |pod| {
        (pod.seat_ready() == (false, "starting: \n".to_owned())).then_some(())
    });
}

#[test]
fn the_engine_outlives_the_seats_program_and_the_daemon() {
    let mut pod = Pod::new();
    let first = pod.start().pid;
    for round in 0..3 {
        match round {
            0 => pod.kill_seat(),
            1 => pod.kill_daemon(),
            _ => {
                pod.kill_daemon();
                pod.kill_seat();
            }
        }
        assert_eq!(pod.processes("ftvm-engine")[0], [first.unwrap()], "round {round}");
        if pod.daemon.is_none() {
            pod.start_daemon();
        }
        if pod.seat.is_none() {
            pod.start_seat();
        }
        let seat = pod.wait_running();
        assert_eq!(seat.pid, first, "the same engine after round {round}");
        // Handed over anew: an engine that ends is replaced, so the files are there.
    }
    pod.wait("the files are handed over again", |pod| {
        pod.seat_ready().1.starts_with("starting").then_some(())
    });
    pod.script("exit 23");
    wait_another(&mut pod, first.unwrap());
}

/// Another engine than this one, once it answers.
fn wait_another(pod: &mut Pod, than: i32) -> i32 {
    let seat = pod.wait("another engine answers", |pod| {
        pod.status()
            .filter(|seat| seat.engine.is_some() && seat.pid != Some(than))
    });
    seat.pid.unwrap()
}

/// The pod is the same one by its UID; what was launched into its former network reaches nobody any more.
#[test]
fn a_pod_with_a_new_network_gets_an_engine_that_lives_in_it() {
    for daemon_too in [false, true] {
        let mut pod = Pod::new();
        let first = pod.start().pid.unwrap();
        let again = |pod: &mut Pod| {
            pod.kill_seat();
            if daemon_too {
                pod.kill_daemon();
                pod.start_daemon();
            }
            pod.start_seat();
        };
        // A program that comes again in the same network finds the engine that it had.
        again(&mut pod);
        handed_over(&mut pod, 2);
        for _ in 0..20 {
            assert_eq!(pod.processes("ftvm-engine")[0], [first]);
            std::thread::sleep(Duration::from_millis(50));
        }
        let former = pod.network();
        pod.renew_network();
        assert_ne!(pod.network(), former);
        assert_eq!(network_of(first), former, "the engine keeps it");
        again(&mut pod);
        let second = wait_another(&mut pod, first);
        assert_eq!(
            pod.processes("ftvm-engine")[0],
            [second],
            "one engine, and the former one is gone"
        );
        assert_eq!(network_of(second), pod.network());
        assert_eq!(
            network_of(second),
            network_of(pod.seat.as_ref().unwrap().id().cast_signed())
        );
        let ended = pod.status().unwrap().last_exit.unwrap();
        assert_eq!(ended.code, 0, "it was told to end: {ended:?}");
    }
}

/// Waits until the seat's files were handed over so often.
fn handed_over(pod: &mut Pod, times: usize) {
    pod.wait("the files are handed over", |pod| {
        let handed = pod.daemon_log().matches("its program handed its files over").count();
        (handed >= times).then_some(())
    });
}

/// Nobody else has the guest: it is not ended for the sake of a network.
#[test]
fn an_engine_that_is_alone_goes_on_in_the_former_network() {
    let mut pod = Pod::new();
    let first = pod.start().pid.unwrap();
    pod.script("swap");
    pod.wait("the record names the engine alone", |pod| {
        pod.status()?.engine.filter(|engine| engine.why.contains("Won"))
    });
    let former = pod.network();
    pod.kill_seat();
    pod.renew_network();
    pod.start_seat();
    pod.wait("it is told", |pod| {
        pod.daemon_log()
            .contains("nobody else has the guest: it goes on without protection")
            .then_some(())
    });
    assert_eq!(pod.processes("ftvm-engine")[0], [first]);
    assert_eq!(network_of(first), former);
    // Once it has ended for its own reasons, the next one lives where the pod is.
    pod.script("exit 23");
    let second = wait_another(&mut pod, first);
    assert_eq!(network_of(second), pod.network());
}

/// kubelet ends the program of a sandbox that died with SIGTERM and starts it anew in the next one: that is no end of the pod.
#[test]
fn a_program_that_comes_after_sigterm_gets_an_engine_again() {
    for new_network in [false, true] {
        let mut pod = Pod::new();
        let first = pod.start().pid.unwrap();
        let mut seat = pod.seat.take().unwrap();
        // SAFETY: signals a child that was not waited for.
        unsafe { libc::kill(seat.id().cast_signed(), libc::SIGTERM) };
        assert_eq!(seat.wait().unwrap().code(), Some(0));
        assert!(pod.processes("ftvm-engine").concat().is_empty());
        if new_network {
            pod.renew_network();
        }
        pod.start_seat();
        let second = wait_another(&mut pod, first);
        assert_eq!(network_of(second), pod.network());
        assert!(pod.seat.as_mut().unwrap().try_wait().unwrap().is_none(), "it stays");
    }
}

#[test]
fn without_a_record_nothing_is_prepared_and_with_one_everything_is() {
    let mut pod = Pod::new();
    pod.start_daemon();
    pod.start_seat();
    pod.wait("the seat says why it waits", |pod| {
        let said = std::fs::read_to_string(pod.folder.join("seat.err")).unwrap();
        said.contains("refuses").then_some(())
    });
    assert!(!pod.disk("disk.raw").exists());
    pod.make_record();
    pod.wait_running();
}

#[test]
fn sigterm_ends_the_engine_and_then_the_seat() {
    let mut pod = Pod::new();
    pod.start();
    let mut seat = pod.seat.take().unwrap();
    // SAFETY: signals a child that was not waited for.
    unsafe { libc::kill(seat.id().cast_signed(), libc::SIGTERM) };
    assert_eq!(seat.wait().unwrap().code(), Some(0));
    assert!(
        pod.processes("ftvm-engine").concat().is_empty(),
        "the engine went before"
    );
    let left: Vec<_> = pod
        .cgroups
        .iter()
        .filter(|pod| pod.join("ftvm-engine").exists())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let why = pod.status().unwrap().why;
    assert!(why.contains("pod ends"), "no other engine is started: {why}");
}

#[test]
fn a_copy_that_was_interrupted_goes_on_where_it_was() {
    let mut pod = Pod::new();
    // An image that fills the disk, and a mark that says that half of it is done: that half is not written again.
    let image: Vec<u8> = (0..DISK_BYTES).map(|n| (n >> 12) as u8 | 1).collect();
    let path = pod.root().join("guest/disk/root.raw");
    std::fs::write(&path, &image).unwrap();
    let mut half = vec![0xaa; DISK_BYTES as usize / 2];
    std::fs::write(pod.disk("disk.raw"), &half).unwrap();
    let data = std::fs::metadata(&path).unwrap();
    let changed = format!("{}.{:09}", data.mtime(), data.mtime_nsec());
    let marks = MarkFile::new(pod.disk("ftvm-disk"));
    let mark = Mark {
        size_bytes: DISK_BYTES,
        done_bytes: DISK_BYTES / 2,
        source: Some(format!("/disk/root.raw {DISK_BYTES} bytes of {changed} as Raw None")),
        ..Mark::default()
    };
    marks.write(&mark).unwrap();
    pod.start();
    let disk = std::fs::read(pod.disk("disk.raw")).unwrap();
    half.extend_from_slice(&image[half.len()..]);
    assert!(
        disk == half,
        "the second half is the image's, the first is what the mark vouched for"
    );
    assert!(marks.read().unwrap().unwrap().complete);
}

#[test]
fn what_is_half_done_of_another_source_does_not_count() {
    let mut pod = Pod::new();
    let marks = MarkFile::new(pod.disk("ftvm-disk"));
    std::fs::write(pod.disk("disk.raw"), vec![0xaa; DISK_BYTES as usize]).unwrap();
    let mark = Mark {
        size_bytes: DISK_BYTES,
        done_bytes: DISK_BYTES / 2,
        source: Some("/disk/root.raw 4 bytes of 1.000000000 as Raw None".to_owned()),
        ..Mark::default()
    };
    marks.write(&mark).unwrap();
    pod.start();
    let disk = std::fs::read(pod.disk("disk.raw")).unwrap();
    assert_eq!(&disk[..CONTENTS.len()], CONTENTS);
    assert!(disk[CONTENTS.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_qcow2_image_becomes_the_disk_of_a_running_engine() {
    let mut pod = Pod::with_image("/disk/root.qcow2");
    let image = pod.root().join("guest/disk/root.qcow2");
    qemu_img(
        &["convert", "-f", "raw", "-O", "qcow2"],
        &pod.root().join("guest/disk/root.raw"),
        &image,
    );
    pod.start();
    let disk = std::fs::read(pod.disk("disk.raw")).unwrap();
    assert_eq!(disk.len() as u64, DISK_BYTES);
    assert_eq!(&disk[..CONTENTS.len()], CONTENTS);
    assert!(disk[CONTENTS.len()..].iter().all(|byte| *byte == 0));
    assert!(MarkFile::new(pod.disk("ftvm-disk")).read().unwrap().unwrap().complete);
}

#[test]
fn a_hostile_image_starts_no_engine_and_is_told() {
    let mut pod = Pod::with_image("/disk/root.qcow2");
    let raw = pod.root().join("guest/disk/root.raw");
    std::fs::write(&raw, vec![7; 1 << 20]).unwrap();
    let image = pod.root().join("guest/disk/root.qcow2");
    let secret = raw.display().to_string();
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b"],
        secret.as_ref(),
        &image,
    );
    pod.make_record();
    pod.start_daemon();
    pod.start_seat();
    pod.wait("the seat says so", |pod| {
        let said = std::fs::read_to_string(pod.folder.join("seat.err")).unwrap();
        said.contains("disk root")
            .then_some(())
            .filter(|()| said.contains("another file"))
    });
    assert!(pod.status().unwrap().pid.is_none(), "no engine");
    assert!(!MarkFile::new(pod.disk("ftvm-disk")).read().unwrap().unwrap().complete);
}

/// The seat has the pod's secrets, and reads what the image names: a link that leads to them leads nowhere, and a guest never sees them.
#[test]
fn an_image_that_leads_out_of_itself_gets_nothing() {
    let mut pod = Pod::new();
    let image = pod.root().join("guest/disk/root.raw");
    std::fs::remove_file(&image).unwrap();
    std::os::unix::fs::symlink("../../identity/key.pem", &image).unwrap();
    let key = std::fs::read(&image).unwrap();
    assert!(
        key.starts_with(b"-----BEGIN PRIVATE KEY"),
        "whoever follows it has the key"
    );
    pod.make_record();
    pod.start_daemon();
    pod.start_seat();
    pod.wait("the seat says so", |pod| {
        let said = std::fs::read_to_string(pod.folder.join("seat.err")).unwrap();
        said.contains("it must be a file of the guest image").then_some(())
    });
    let disk = std::fs::read(pod.disk("disk.raw")).unwrap_or_default();
    assert!(!disk.starts_with(b"-----BEGIN"), "the key is on the guest's disk");
    // A link to another file of the image is as good as the file.
    std::fs::remove_file(&image).unwrap();
    std::fs::write(image.with_file_name("root-1.raw"), CONTENTS).unwrap();
    std::os::unix::fs::symlink("root-1.raw", &image).unwrap();
    pod.wait_running();
    assert_eq!(
        &std::fs::read(pod.disk("disk.raw")).unwrap()[..CONTENTS.len()],
        CONTENTS
    );
}

#[test]
fn backing_files_are_looked_up_in_the_guest_image_by_the_names_that_a_person_gave() {
    let mut pod = Pod::with_image("/disk/root.qcow2");
    pod.backing = vec!["/disk/base.raw".to_owned()];
    let named = pod.root().join("guest/disk/root.raw");
    let image = named.with_file_name("root.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b"], &named, &image);
    // What the header names is another file by now, and the person's name leads out of the image at first.
    let base = named.with_file_name("base.raw");
    std::fs::write(&named, vec![b's'; 512]).unwrap();
    std::os::unix::fs::symlink("../../identity/key.pem", &base).unwrap();
    assert!(
        std::fs::read(&base).unwrap().starts_with(b"-----BEGIN"),
        "whoever follows it has the key"
    );
    pod.make_record();
    pod.start_daemon();
    pod.start_seat();
    pod.wait("the seat says so", |pod| {
        let said = std::fs::read_to_string(pod.folder.join("seat.err")).unwrap();
        let told = said.contains("its backing file /disk/base.raw can't be read")
            && said.contains("it must be a file of the guest image");
        told.then_some(())
    });
    let disk = std::fs::read(pod.disk("disk.raw")).unwrap_or_default();
    assert!(disk.iter().all(|byte| *byte == 0), "something was imported");
    std::fs::remove_file(&base).unwrap();
    std::fs::write(&base, CONTENTS).unwrap();
    pod.wait_running();
    let disk = std::fs::read(pod.disk("disk.raw")).unwrap();
    assert_eq!(&disk[..CONTENTS.len()], CONTENTS);
    assert!(disk[CONTENTS.len()..].iter().all(|byte| *byte == 0));
}

fn qemu_img(words: &[&str], from: &Path, to: &Path) {
    let status = std::process::Command::new("qemu-img")
        .args(words)
        .arg(from)
        .arg(to)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_used_disk_is_never_made_anew() {
    let mut pod = Pod::new();
    pod.start();
    pod.kill_seat();
    std::fs::remove_file(pod.disk("ftvm-disk")).unwrap();
    pod.start_seat();
    pod.wait("the seat says so", |pod| {
        let said = std::fs::read_to_string(pod.folder.join("seat.err")).unwrap();
        said.contains("a person decides").then_some(())
    });
    let disk = std::fs::read(pod.disk("disk.raw")).unwrap();
    assert_eq!(&disk[..CONTENTS.len()], CONTENTS);
}

/// Whoever may make a virtual machine names its bridge: only one for guests is joined, and the node's other networks stay apart.
#[test]
fn a_guest_is_connected_to_no_bridge_but_those_for_guests() {
    let nic =
        |bridge: &str| json!([{"name": "front", "mac": "02:00:00:00:00:01", "tap": "ftvmtest0", "bridge": bridge}]);
    let devices = "for name in mgmt vm-front mgmt-and-storag; do ip link add $name type bridge || exit; done";
    for (allowed, bridge, reason) in [
        (vec!["vm-*"], "mgmt", "(allowed: vm-*)"),
        (vec![], "vm-front", "(allowed: none)"),
        // Cut at 15 bytes or at a zero, as the kernel reads it, these would be others.
        (vec!["*"], "mgmt-and-storage", "can't be the name of a bridge"),
        (vec!["*"], "mgmt\0", "can't be the name of a bridge"),
    ] {
        let mut pod = Pod::new();
        pod.devices = devices.to_owned();
        pod.nics = nic(bridge);
        pod.allowed_bridges = allowed.into_iter().map(str::to_owned).collect();
        pod.make_record();
        pod.start_daemon();
        pod.start_seat();
        let seat = pod.wait("it is refused", |pod| pod.status().filter(|seat| seat.code == 17));
        assert!(seat.why.contains(reason) && seat.engine.is_none(), "{}", seat.why);
        for bridge in ["mgmt", "vm-front", "mgmt-and-storag"] {
            assert_eq!(pod.taps_on(bridge), [], "on {bridge}");
        }
    }
    let mut pod = Pod::new();
    pod.devices = devices.to_owned();
    pod.nics = nic("vm-front");
    pod.allowed_bridges = vec!["br0".into(), "vm-*".into()];
    pod.start();
    assert_eq!(pod.taps_on("vm-front"), [("ftvmtest0".to_owned(), 1500)]);
}

/// The tap gets the MTU of the bridge: with a smaller one the kernel would make the bridge's smaller. The guest is told as much, up to what is tested.
#[test]
fn the_mtu_of_the_bridge_is_the_guests() {
    for (mtu, told) in [(1400, 1400), (9000, 9000), (20_000, 9216)] {
        let mut pod = Pod::new();
        // A bridge whose MTU was not set follows its ports.
        pod.devices = format!(
            "ip link add lan type bridge && ip link add up0 mtu {mtu} type veth peer name up1 mtu {mtu} && ip link set up0 master lan"
        );
        pod.nics = json!([{"name": "front", "mac": "02:00:00:00:00:01", "tap": "ftvmtest0", "bridge": "lan"}]);
        pod.allowed_bridges = vec!["lan".into()];
        let seat = pod.start();
        assert_eq!(pod.taps_on("lan"), [("ftvmtest0".to_owned(), mtu)]);
        assert_eq!(pod.links(&["dev", "lan"])[0]["mtu"], mtu, "the bridge's is as it was");
        let counters = seat.engine.expect("an engine").counters;
        assert_eq!(counters["nic_mtus"], json!([told]));
    }
}
