//! An unmodified Debian guest in an emulated node with real KVM is saved and loaded into a new machine while it serves:
//! whatever of CPU, interrupts, clocks and devices is missing in a state shows here, before replication is added to it.
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ftvm_e2e::lab::binaries;
use ftvm_e2e::lab::guest::{self, Redis};
use ftvm_e2e::lab::image::Image;
use ftvm_e2e::lab::session::{Event, Session};
use ftvm_e2e::lab::wire::Start;
use ftvm_e2e::lab::{Lab, Node, NodeConfig};

/// How long the guest may take to do something: emulation is slow, and slower beside other work.
const PATIENCE: Duration = Duration::from_secs(900);

/// Builds the engine's example that runs one machine.
fn solo() -> PathBuf {
    binaries::build_example("ftvm-engine", "solo", binaries::Profile::Dev).unwrap()
}

/// A running guest: everything that it and its machine have said.
struct Running {
    session: Session,
    said: String,
}

impl Running {
    fn start(node: &Node, more: &[&str]) -> Self {
        let words = [
            "/lab/solo",
            "--kernel",
            "/lab/vmlinuz",
            "--initrd",
            "/lab/initrd.img",
            "--memory",
            "320",
        ];
        let rest = ["--tap", "guest0", "--disk", "/dev/vdd", "--cmdline", guest::CMDLINE];
        let argv = words
            .iter()
            .chain(&rest)
            .chain(more)
            .map(|word| (*word).to_owned())
            .collect();
        let start = Start {
            argv,
            ..Start::default()
        };
        Self {
            session: node.start(&start).unwrap(),
            said: String::new(),
        }
    }

    /// Listens until `done` says so or the machine ends; its exit code then.
    fn listen(&mut self, what: &str, mut done: impl FnMut(&str) -> bool) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while !done(&self.said) {
            match self.session.next(deadline) {
                Ok(Event::Stdout(bytes) | Event::Stderr(bytes)) => self.said += &String::from_utf8_lossy(&bytes),
                Ok(Event::Exit(code)) => return Some(code),
                Err(error) => panic!("waited for {what}: {error}\n{}", self.said),
            }
        }
        None
    }

    fn wait_for(&mut self, words: &str) {
        let end = self.listen(words, |said| said.contains(words));
        assert_eq!(end, None, "the machine ended before it said {words:?}:\n{}", self.said);
    }

    fn wait_end(&mut self) -> i32 {
        self.listen("the machine's end", |_| false).unwrap()
    }
}

#[test]
fn debian_moves_between_machines_while_it_serves() {
    let image = Image::guest().unwrap();
    let lab = Lab::new(&[solo(), image.kernel.clone(), image.initrd.clone()]).unwrap();
    let disk = lab.folder().join("guest.img");
    guest::make_disk(&image, &disk).unwrap();
    let config = NodeConfig {
        disks: vec![disk.clone()],
        ..NodeConfig::default()
    };
    let node = lab.node("one", 1, config).unwrap();
    node.client_bridge().unwrap();
    node.client_tap("guest0").unwrap();
    let begin = Instant::now();
    let mut running = Running::start(&node, &["--vcpus", "2", "--obey"]);
    running.wait_for(guest::READY);
    eprintln!("ready after {:.1} s", begin.elapsed().as_secs_f64());
    serve(&lab, &mut running);
    guest::ssh(lab.sandbox(), "poweroff").unwrap();
    assert_eq!(running.wait_end(), 0, "{}", running.said);
    assert!(running.said.contains("guest stopped: halt"), "{}", running.said);
    for bad in ["BUG:", "Oops", "Call Trace", "I/O error", "broke the virtio rules"] {
        assert!(!running.said.contains(bad), "{bad}:\n{}", running.said);
    }
    eprintln!("{}", running.said);
    drop(node);
    guest::examine_disk(&disk, lab.folder()).unwrap();
}

/// One connection to Redis goes on while the machine moves.
fn serve(lab: &Lab, running: &mut Running) {
    let moves = |said: &str| said.matches("moved in").count();
    let mut redis = Redis::connect(lab.sandbox(), Instant::now() + PATIENCE).unwrap();
    let begin = Instant::now();
    let first = redis.increment("n", PATIENCE).unwrap();
    let stop = AtomicBool::new(false);
    let last = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut last = first;
            while !stop.load(Ordering::SeqCst) {
                let next = redis.increment("n", PATIENCE).unwrap();
                assert_eq!(next, last + 1);
                last = next;
            }
            last
        });
        for round in 1..=4 {
            running.session.feed(b"move\n").unwrap();
            assert_eq!(
                running.listen("a move", |said| moves(said) >= round),
                None,
                "{}",
                running.said
            );
        }
        stop.store(true, Ordering::SeqCst);
        client.join().unwrap()
    });
    guest::download(lab.sandbox(), 20_000, PATIENCE).unwrap();
    eprintln!(
        "{} increments, 4 moves in {:.1} s",
        last - first,
        begin.elapsed().as_secs_f64()
    );
    let time = guest::ssh(
        lab.sandbox(),
        "date +%s; cat /sys/devices/system/clocksource/clocksource0/current_clocksource; dmesg -l err,warn",
    );
    let time = String::from_utf8(time.unwrap().stdout).unwrap();
    eprintln!("{time}");
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let theirs: u64 = time.lines().next().unwrap().parse().unwrap();
    // Time stands while the guest is moved, and never gains.
    let stood: u64 = running
        .said
        .split("moved in ")
        .skip(1)
        .filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok())
        .sum();
    let behind = now as i64 - theirs as i64;
    let most = stood as i64 / 1000 + 30;
    assert!(
        (-5..=most).contains(&behind),
        "the guest's clock is {behind} s behind, moving took {stood} ms"
    );
}
