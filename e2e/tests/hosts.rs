//! Hosts as namespaces: that they are separate machines as far as the tests need it, that faults do what they say, and
//! that nothing is left.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ftvm_e2e::hosts::outer::{self, Outer, test_inside};
use ftvm_e2e::hosts::{CutDirection, Host, Lab, LabPlan, net};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(90);

/// A folder of this test's own, empty.
fn folder(test: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
    std::fs::remove_dir_all(&path).ok();
    std::fs::create_dir_all(&path).expect("the target folder is writable");
    path
}

fn lab(test: &str) -> Lab {
    Lab::new(&LabPlan::three_hosts(folder(test))).expect("a lab")
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).stdin(Stdio::null());
    command
}

/// Whether `from` reaches an address on the replication network: a neighbour answers ARP only if packets pass both ways.
fn reaches(from: &Host, to: &Host) -> bool {
    let script = format!(
        "ip neigh flush all; perl -MIO::Socket::INET -e 'IO::Socket::INET->new(Proto => \"udp\", \
         PeerAddr => \"{0}:9\")->send(\"x\")'; \
         for i in $(seq 40); do sleep 0.05; ip neigh show to {0} | grep lladdr && exit; done; exit 1",
        to.replication_address()
    );
    from.run(shell(&script)).is_ok()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn hosts_are_separate_and_restart_as_new_machines() {
    test_inside("hosts_are_separate_and_restart_as_new_machines", || {
        let lab = lab("separate");
        let boot_id = |host: &Host| {
            host.run(shell("hostname; cat /proc/sys/kernel/random/boot_id; ls /run"))
                .unwrap()
                .stdout
        };
        let (first, second) = (boot_id(lab.host(0)), boot_id(lab.host(1)));
        assert_ne!(first, second);
        assert!(first.starts_with(b"h1\n"), "{}", String::from_utf8_lossy(&first));

        let mut sleeper = lab
            .host(0)
            .spawn("sleep", shell("echo x >/run/mark; sleep 1000 & wait"))
            .unwrap();
        wait_until("the sleeper's child", || {
            lab.host(0).processes_named("sleep").unwrap().len() == 1
        });
        assert!(
            lab.host(1).processes().unwrap().is_empty(),
            "processes of one host show on another"
        );

        lab.host(0).kill().unwrap();
        assert_eq!(sleeper.wait().unwrap().code(), Some(128 + libc::SIGKILL));
        assert!(lab.host(0).run(shell("true")).is_err(), "a dead host runs programs");
        lab.host(0).start().unwrap();
        assert_ne!(first, boot_id(lab.host(0)), "a restarted host keeps its boot id");
        assert!(lab.host(0).processes().unwrap().is_empty());
    });
}

#[test]
fn a_killed_host_sends_no_farewell() {
    test_inside("a_killed_host_sends_no_farewell", || {
        let lab = lab("farewell");
        // A server on h1's replication address that only listens and holds what it accepted.
        let address = SocketAddr::from((lab.host(0).replication_address(), 4000));
        let server = "perl -MIO::Socket::INET -e 'my $l = IO::Socket::INET->new(LocalPort => 4000, Listen => 5, \
                      ReuseAddr => 1) or die; my $c = $l->accept; print $c \"x\"; $c->flush; sleep 1000'";
        let mut process = lab.host(0).spawn("server", shell(server)).unwrap();
        // The client stands on the replication bridge itself, in the outer namespace.
        net::ip("address add 10.99.0.200/24 dev ft\n").unwrap();
        let mut stream = None;
        wait_until("the server listens", || {
            stream = TcpStream::connect(address).ok();
            stream.is_some()
        });
        let mut stream = stream.unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        lab.host(0).kill().unwrap();
        process.wait().unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let error = stream
            .read(&mut byte)
            .expect_err("a FIN arrived from a host that lost its power");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}");
        stream
            .write_all(b"nobody hears this")
            .expect("an RST arrived from a host that lost its power");
    });
}

#[test]
fn a_frozen_host_stands_still_and_goes_on() {
    test_inside("a_frozen_host_stands_still_and_goes_on", || {
        let lab = lab("frozen");
        let counter = folder("frozen-counter").join("count");
        let script = format!(
            "n=0; while :; do n=$((n+1)); echo $n >{}.new; mv {0}.new {0}; done",
            counter.display()
        );
        let _process = lab.host(0).spawn("counter", shell(&script)).unwrap();
        let read = || {
            std::fs::read_to_string(&counter)
                .ok()
                .and_then(|text| text.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        wait_until("the counter counts", || read() > 3);
        lab.host(0).freeze().unwrap();
        let (frozen_at, states) = (read(), lab.host(0).processes().unwrap());
        assert!(states.iter().all(|process| process.stands_still(&states)), "{states:?}");
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(read(), frozen_at, "a frozen host computed");
        lab.host(0).thaw().unwrap();
        wait_until("the counter goes on", || read() > frozen_at + 3);
    });
}

#[test]
fn links_are_cut_both_ways_or_one_way() {
    test_inside("links_are_cut_both_ways_or_one_way", || {
        let lab = lab("cut");
        let (a, b, c) = (lab.host(0), lab.host(1), lab.host(2));
        assert!(reaches(a, b) && reaches(b, c) && reaches(a, c));
        lab.cut_link(0, 1, CutDirection::Both).unwrap();
        assert!(!reaches(a, b) && !reaches(b, a), "a cut link carries packets");
        assert!(reaches(b, c) && reaches(a, c), "a cut concerns two hosts only");
        lab.mend_links().unwrap();
        assert!(reaches(a, b));

        // One way: h2 still hears h1, nothing comes back.
        let received = |host: &Host| {
            let text = host
                .run(shell("cat /sys/class/net/ft0/statistics/rx_packets"))
                .unwrap()
                .stdout;
            String::from_utf8_lossy(&text).trim().parse::<u64>().unwrap()
        };
        lab.cut_link(1, 0, CutDirection::FirstToSecond).unwrap();
        let before = received(b);
        assert!(!reaches(a, b), "the cut direction is open");
        assert!(received(b) > before, "the open direction is closed");
    });
}

#[test]
fn programs_die_by_name_and_others_live() {
    test_inside("programs_die_by_name_and_others_live", || {
        let lab = lab("names");
        let start = |host: usize| {
            lab.host(host).spawn("sleep", {
                let mut command = Command::new("sleep");
                command.arg("1000");
                command
            })
        };
        let (mut victim, mut bystander) = (start(0).unwrap(), start(1).unwrap());
        wait_until("both run", || {
            (0..2).all(|host| lab.host(host).processes_named("sleep").unwrap().len() == 1)
        });
        assert_eq!(lab.host(0).kill_program("sleep").unwrap().0, 1);
        assert_eq!(victim.wait().unwrap().code(), Some(128 + libc::SIGKILL));
        assert!(
            bystander.try_wait().unwrap().is_none(),
            "another host's process of this name died too"
        );
        assert_eq!(lab.host(0).kill_program("sleep").unwrap().0, 0);
    });
}

#[test]
fn a_missing_program_is_an_error_that_names_it() {
    test_inside("a_missing_program_is_an_error_that_names_it", || {
        let lab = lab("missing");
        let error = lab
            .host(0)
            .spawn("nothing", Command::new("/nonexistent/program"))
            .map(drop)
            .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/program"), "{error}");
    });
}

/// Everything below the outer namespaces is gone when the inner program is, even if it does not tidy up.
#[test]
fn nothing_is_left_behind() {
    let list = folder("left").join("namespaces");
    match outer::enter(&["--exact", "nothing_is_left_behind", "--nocapture", "--test-threads=1"]).unwrap() {
        Outer::Inside => {
            let lab = lab("left");
            let list = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
                .join("left")
                .join("namespaces");
            let sleeper = lab.host(0).spawn("sleep", shell("sleep 1000 & sleep 1000")).unwrap();
            lab.host(1).add_tap("tap0").unwrap();
            let inode = |process: &str| std::fs::metadata(format!("/proc/{process}/ns/net")).unwrap().ino();
            let inodes = [inode("self"), inode(&sleeper.pid().to_string())];
            std::fs::write(list, inodes.map(|inode| format!("{inode}\n")).concat()).unwrap();
            // No destructor runs.
            std::process::exit(0);
        }
        Outer::Ended(status) => assert!(status.success(), "{status}"),
    }
    let inodes: Vec<u64> = std::fs::read_to_string(list)
        .unwrap()
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(inodes.len(), 2);
    for entry in std::fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path().join("ns/net");
        if let Ok(meta) = std::fs::metadata(&path) {
            assert!(
                !inodes.contains(&meta.ino()),
                "{} still lives in a namespace of the lab",
                path.display()
            );
        }
    }
}

#[test]
fn a_lab_outside_is_refused() {
    let error = Lab::new(&LabPlan::three_hosts(folder("outside")))
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("outer namespaces"), "{error}");
}
