//! An unmodified Debian under our VMM, without protection: does it boot, serve, keep time, reset in place and switch itself off?
use std::time::{Duration, Instant};

use ftvm_e2e::demo::mac_text;
use ftvm_e2e::lab::binaries::{self, Profile};
use ftvm_e2e::lab::guest::{self, Redis};
use ftvm_e2e::lab::image::Image;
use ftvm_e2e::lab::{Lab, Node, NodeConfig, Sandbox};

/// Enough for two emulations on top of each other on a busy machine; judgements never depend on it.
const PATIENCE: Duration = Duration::from_secs(900);
const ANSWER: Duration = Duration::from_secs(180);
const CONSOLE: &str = "/data/guest.log";

/// Waits for the services of a freshly booted guest; says what its console says if they don't come.
fn booted(sandbox: &Sandbox, node: &Node, boots: usize) -> Redis {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let console = String::from_utf8_lossy(&node.read(CONSOLE).unwrap()).into_owned();
        if console.matches(guest::READY).count() >= boots {
            return Redis::connect(sandbox, Instant::now() + ANSWER).unwrap();
        }
        let running = node.run(&["pidof", "ftvm-engine"]).unwrap().code == 0;
        assert!(running, "the engine ended:\n{console}");
        assert!(
            Instant::now() < deadline,
            "the guest does not come up (boot {boots}):\n{console}"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// What three clocks said at one moment, each as the earliest and latest it can have been, in seconds.
#[derive(Debug)]
struct Moment {
    ours: (f64, f64),
    date: (f64, f64),
    uptime: (f64, f64),
}

fn look_at_clocks(sandbox: &Sandbox, since: Instant) -> Moment {
    let begin = since.elapsed().as_secs_f64();
    let script = "cut -d' ' -f1 /proc/uptime; date +%s.%N; date +%s.%N; cut -d' ' -f1 /proc/uptime";
    let output = guest::ssh(sandbox, script).unwrap();
    let end = since.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let numbers: Vec<f64> = text.lines().map(|line| line.parse().unwrap()).collect();
    let [uptime, date, date_again, uptime_again] = numbers[..] else {
        panic!("{output:?}")
    };
    Moment {
        ours: (begin, end),
        date: (date, date_again),
        uptime: (uptime, uptime_again),
    }
}

/// Over some seconds, no clock of the guest may go backwards, and all must have gone equally far, within what can be said.
fn clocks_agree(sandbox: &Sandbox) {
    let since = Instant::now();
    let before = look_at_clocks(sandbox, since);
    std::thread::sleep(Duration::from_secs(5));
    let after = look_at_clocks(sandbox, since);
    let gone = |clock: fn(&Moment) -> (f64, f64)| {
        let ((earliest, latest), (from, to)) = (clock(&before), clock(&after));
        (from - latest, to - earliest)
    };
    let clocks = [
        gone(|moment| moment.ours),
        gone(|moment| moment.date),
        gone(|moment| moment.uptime),
    ];
    assert!(
        clocks.iter().all(|(least, _)| *least > 0.0),
        "a clock went backwards: {before:?}, then {after:?}"
    );
    for (least, _) in clocks {
        for (_, most) in clocks {
            assert!(
                least <= most * 1.02 + 0.02,
                "the clocks disagree: {before:?}, then {after:?}"
            );
        }
    }
}

pub fn debian_boots_serves_resets_and_stops(vcpus: u32) {
    let image = Image::guest().unwrap();
    let mut programs = binaries::build(&[("ftvm-engine", "ftvm-engine")], Profile::Dev).unwrap();
    programs.extend([image.kernel.clone(), image.initrd.clone()]);
    let lab = Lab::new(&programs).unwrap();
    let disk = lab.folder().join("guest.img");
    guest::make_disk(&image, &disk).unwrap();
    let node = lab
        .node(
            "one",
            1,
            NodeConfig {
                disks: vec![disk.clone()],
                ..NodeConfig::default()
            },
        )
        .unwrap();
    node.client_bridge().unwrap();
    node.client_tap("guest0").unwrap();

    let begin = Instant::now();
    let (tap, vcpus) = (format!("guest0,{}", mac_text(guest::MAC)), vcpus.to_string());
    let words = "/lab/ftvm-engine run --kernel /lab/vmlinuz --initrd /lab/initrd.img --memory 256M --disk /dev/vdd";
    let words: Vec<&str> = words.split(' ').collect();
    let rest = ["--cmdline", guest::CMDLINE, "--tap", &tap, "--vcpus", &vcpus];
    node.daemon(&[words.as_slice(), &rest].concat(), CONSOLE).unwrap();

    let mut redis = booted(lab.sandbox(), &node, 1);
    eprintln!(
        "guest with {vcpus} vCPU booted in {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    for expected in 1..=50 {
        assert_eq!(redis.increment("counter", ANSWER).unwrap(), expected);
    }
    for count in [1000, 150_000] {
        guest::download(lab.sandbox(), count, ANSWER).unwrap();
    }
    clocks_agree(lab.sandbox());

    // A reset happens in place: same engine, and what was acknowledged before is there after.
    let pid = node.sh("pidof ftvm-engine").unwrap();
    guest::ssh(lab.sandbox(), "reboot").unwrap();
    let mut redis = booted(lab.sandbox(), &node, 2);
    assert_eq!(redis.increment("counter", ANSWER).unwrap(), 51);
    assert_eq!(
        node.sh("pidof ftvm-engine").unwrap(),
        pid,
        "the engine did not survive the guest's reset"
    );

    guest::ssh(lab.sandbox(), "poweroff").unwrap();
    let deadline = Instant::now() + PATIENCE;
    while node.run(&["pidof", "ftvm-engine"]).unwrap().code == 0 {
        assert!(
            Instant::now() < deadline,
            "the engine lives on after the guest switched itself off"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    node.sh("sync").unwrap();
    node.kill().unwrap();
    guest::examine_disk(&disk, lab.folder()).unwrap();
}
