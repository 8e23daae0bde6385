//! A standalone pair as its user has it: two daemons, the real engine in its jail, a guest on real KVM, the `ftvm` command.
//!
//! Nothing here looks at what clients see (`judge` and `demo` do): it is about processes. Engines outlive daemons, each thread
//! of an engine is jailed, and the pair comes back from whatever dies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ftvm_e2e::demo::daemon;
use ftvm_e2e::demo::programs::{self, Profile, Programs};
use serde_json::{Value, json};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(120);
/// Seats of the machine: the third one has no part in it until somebody gives it one.
const SEATS: [&str; 3] = ["a", "b", "c"];
/// First user id of each daemon's engines.
const UIDS: [u32; 3] = [1_900_000_000, 1_900_001_000, 1_900_002_000];

fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| programs::build(Profile::Dev).expect("the programs build"))
}

/// Seats `a` and `b`, a daemon each, and a third daemon for who needs one.
struct Pair {
    folder: PathBuf,
    ports: [u16; 3],
    daemons: [Option<Child>; 3],
}

impl Pair {
    fn new(test: &str) -> Pair {
        // Sockets need short paths.
        let folder = std::env::temp_dir().join(format!("ftvm-{test}-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("arbiter")).unwrap();
        let pair = Pair {
            folder,
            ports: [free_port(), free_port(), free_port()],
            daemons: [None, None, None],
        };
        pair.make_identities(&pair.identities());
        for seat in SEATS {
            let disk = pair.folder.join(format!("{seat}.img"));
            std::fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
        }
        pair.configure(0, &[pair.seat_config(0, Some(1))]);
        pair.configure(1, &[pair.seat_config(1, Some(0))]);
        pair
    }

    fn identities(&self) -> PathBuf {
        self.folder.join("identities")
    }

    fn make_identities(&self, folder: &Path) {
        let made = self.ftvm(
            &["identities", "--vm", "demo", "--seats", "a,b,c", "--out"],
            Some(folder),
        );
        assert!(made.0, "{}", made.1);
    }

    fn seat_config(&self, n: usize, other: Option<usize>) -> Value {
        let peer = |n: usize| json!({ "seat": SEATS[n], "address": format!("127.0.0.1:{}", self.ports[n]), "daemon": self.socket(n) });
        json!({
            "vm": "demo",
            "seat": SEATS[n],
            "identity": self.identities().join(SEATS[n]),
            "original_disk": n == 0,
            // A host that is busy for a while must not count as dead: it is judged who is active.
            "timing": { "peer_lost_ms": 3000 },
            "machine": { "memory_mib": 32, "vcpus": 1 },
            "boot": { "kernel": programs().guest },
            "disks": [{ "name": "disk0", "path": self.folder.join(format!("{}.img", SEATS[n])) }],
            "link": {
                "listen": format!("127.0.0.1:{}", self.ports[n]),
                "peers": other.map(peer).into_iter().collect::<Vec<Value>>(),
            },
        })
    }

    fn pausing_seat_config(&self, n: usize, other: usize) -> Value {
        let mut config = self.seat_config(n, Some(other));
        config["when_unprotected"] = json!("pause");
        config
    }

    /// Waits until this seat's engine is alone, and its guest runs or stands still.
    fn wait_alone(&self, n: usize, paused: bool) {
        self.wait(if paused { "paused" } else { "running alone" }, |_| {
            let engine = &self.seat(n)["engine"];
            engine["role"] == "active"
                && engine["protected"] == false
                && engine["paused"] == paused
                && engine["counters"]["guest_running"] == !paused
        });
    }

    /// Writes the configuration of a daemon with these seats.
    fn configure(&self, n: usize, seats: &[Value]) {
        let config = json!({
            "node": format!("node-{}", SEATS[n]),
            "state_folder": self.folder.join(SEATS[n]),
            "engine": programs().folder.join("ftvm-engine"),
            "arbiter": { "folder": self.folder.join("arbiter") },
            "jail": { "uid_first": UIDS[n], "uid_count": 100 },
            "seats": seats,
        });
        std::fs::write(self.folder.join(format!("{}.yaml", SEATS[n])), config.to_string()).unwrap();
    }

    fn socket(&self, n: usize) -> PathBuf {
        self.folder.join(SEATS[n]).join("daemon.sock")
    }

    fn start_daemon(&mut self, n: usize) {
        let seat = SEATS[n];
        let mut options = std::fs::OpenOptions::new();
        let log = options
            .create(true)
            .append(true)
            .open(self.folder.join(format!("{seat}.log")))
            .unwrap();
        let mut command = Command::new(programs().folder.join("ftvm-node-daemon"));
        command
            .args(["run", "--config"])
            .arg(self.folder.join(format!("{seat}.yaml")));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.daemons[n] = Some(command.spawn().unwrap());
    }

    fn kill_daemon(&mut self, n: usize) {
        let mut daemon = self.daemons[n].take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Runs `ftvm standalone`; whether it succeeded, and what it said.
    fn ftvm(&self, arguments: &[&str], path: Option<&Path>) -> (bool, String) {
        let mut command = Command::new(programs().folder.join("ftvm"));
        command
            .arg("standalone")
            .args(arguments)
            .args(path)
            .stdin(Stdio::null());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text)
    }

    /// Control sockets of the daemons that run, as one argument.
    fn sockets(&self) -> String {
        let running = (0..SEATS.len()).filter(|&n| self.daemons[n].is_some());
        let sockets: Vec<String> = running.map(|n| self.socket(n).display().to_string()).collect();
        sockets.join(",")
    }

    /// A command of the controller, to every daemon that runs; must succeed.
    fn control(&self, arguments: &[&str]) {
        let sockets = self.sockets();
        let (done, text) = self.ftvm(&[arguments, &["--daemon", &sockets]].concat(), None);
        assert!(done, "ftvm standalone {arguments:?}: {text}\n{}", self.logs());
    }

    fn up(&self) {
        self.control(&["up", "--wait-s", "60"]);
    }

    fn status(&self) -> Value {
        let (_, text) = self.ftvm(&["status", "--json", "--daemon", &self.sockets()], None);
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    /// A seat's status as its daemon tells it.
    fn seat(&self, n: usize) -> Value {
        let status = self.status();
        let daemons = status["daemons"].as_array().cloned().unwrap_or_default();
        let seats = daemons.iter().filter_map(|daemon| daemon["seats"].as_array()).flatten();
        seats
            .into_iter()
            .find(|seat| seat["seat"] == SEATS[n])
            .cloned()
            .unwrap_or(Value::Null)
    }

    /// What a seat's engine says of itself; one that has no time for an answer is asked again.
    fn engine(&self, n: usize) -> Value {
        let mut engine = Value::Null;
        self.wait("an engine that answers", |_| {
            engine = self.seat(n)["engine"].take();
            engine.is_object()
        });
        engine
    }

    fn pid(&self, n: usize) -> i32 {
        let mut pid = None;
        self.wait("a seat with an engine", |_| {
            pid = self.seat(n)["pid"].as_i64();
            pid.is_some()
        });
        pid.and_then(|pid| pid.try_into().ok()).expect("a process id")
    }

    fn kill_engine(&self, n: usize) {
        // SAFETY: the process that the daemon says is this test's engine.
        unsafe { libc::kill(self.pid(n), libc::SIGKILL) };
    }

    /// Kills the engine of a seat whose daemon is gone, and waits until it is.
    fn kill_engine_of(&self, n: usize) {
        let log = self.folder.join(format!("{0}/seats/demo.{0}/engine.log", SEATS[n]));
        self.until("its engine is gone", || {
            let engines = self.engines().into_iter();
            let mut of_seat = engines
                .filter(|pid| std::fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|file| file == log))
                .peekable();
            let gone = of_seat.peek().is_none();
            for pid in of_seat {
                // SAFETY: a process that writes to this test's log.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            gone
        });
    }

    fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(
                Instant::now() < deadline,
                "not so within {PATIENCE:?}: {what}\n{}",
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the machine is protected with this seat active; `None`: either.
    fn wait_protected(&self, active: Option<usize>) {
        self.wait("protected", |status| {
            let vm = &status["vms"][0];
            let seat_fits = active.is_none_or(|n| vm["active"] == SEATS[n]);
            vm["protected"] == true && seat_fits && vm["standby"].is_string()
        });
    }

    fn wait(&self, what: &str, mut condition: impl FnMut(&Value) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if condition(&status) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "not {what} within {PATIENCE:?}: {status:#}\n{}",
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn logs(&self) -> String {
        let engine = |seat: &&str| format!("{seat}/seats/demo.{seat}/engine.log");
        let daemons = SEATS.iter().map(|seat| format!("{seat}.log"));
        let files: Vec<String> = daemons.chain(SEATS.iter().map(engine)).collect();
        let tail = |name: &String| {
            let text = std::fs::read_to_string(self.folder.join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("---- {name}\n{}\n", lines[lines.len().saturating_sub(15)..].join("\n"))
        };
        files.iter().map(tail).collect()
    }

    /// Engines that write to this pair's logs.
    fn engines(&self) -> Vec<i32> {
        let logs = SEATS.map(|seat| self.folder.join(format!("{seat}/seats/demo.{seat}/engine.log")));
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let ours = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| logs.contains(&log));
        pids.filter(ours).collect()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().flatten() {
            // It may have ended by itself.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for pid in self.engines() {
            // SAFETY: a process that writes to this test's log.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn fields(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let split = text.lines().filter_map(|line| line.split_once(':'));
    split
        .map(|(key, value)| (key.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

/// Every thread of a running engine: no capabilities, its own user, a system call filter, an empty root.
fn check_jail(pid: i32, uid: u32) {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let mut names = Vec::new();
    for task in std::fs::read_dir(proc.join("task")).unwrap() {
        let status = fields(&task.unwrap().path().join("status"));
        // A thread may end while it is looked at.
        let Some(name) = status.get("Name") else { continue };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{set} of {name}");
        }
        assert_eq!(status["Seccomp"], "2", "{name} has a filter");
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        assert_eq!(status["Uid"], format!("{uid} {uid} {uid} {uid}"), "{name}");
        assert_eq!(status["Gid"], format!("{uid} {uid} {uid} {uid}"), "{name}");
        assert_eq!(status["Groups"], "", "{name}");
        names.push(name.clone());
    }
    for expected in ["control", "vcpu0", "disk0", "link-hub"] {
        assert!(names.iter().any(|name| name == expected), "{expected} among {names:?}");
    }
    assert_eq!(std::fs::read_dir(proc.join("root")).unwrap().count(), 0);
    assert_eq!(
        std::fs::read_to_string(proc.join("mountinfo")).unwrap().lines().count(),
        1
    );
    assert_eq!(std::fs::read(proc.join("environ")).unwrap(), b"");
}

fn protected_pair(test: &str) -> Pair {
    let pair = Pair::new(test);
    start_protected(pair)
}

/// The same with guests that stand still while there is no standby.
fn protected_pair_that_pauses(test: &str) -> Pair {
    let pair = Pair::new(test);
    for (n, other) in [(0, 1), (1, 0)] {
        pair.configure(n, &[pair.pausing_seat_config(n, other)]);
    }
    start_protected(pair)
}

fn start_protected(mut pair: Pair) -> Pair {
    pair.start_daemon(0);
    pair.start_daemon(1);
    pair.wait("answering", |status| {
        status["daemons"].as_array().is_some_and(|daemons| daemons.len() == 2)
    });
    pair.up();
    pair
}

#[test]
fn both_engines_are_jailed_and_outlive_their_daemons() {
    let mut pair = protected_pair("jail");
    for n in [0, 1] {
        check_jail(pair.pid(n), UIDS[n]);
    }
    let before = [pair.pid(0), pair.pid(1)];
    for n in [0, 1] {
        pair.kill_daemon(n);
        pair.start_daemon(n);
        pair.wait("adopted", |_| {
            pair.seat(n)["adopted"] == true && pair.seat(n)["engine"].is_object()
        });
    }
    assert_eq!([pair.pid(0), pair.pid(1)], before, "the same engines");
    pair.wait_protected(Some(0));
    // The adopted engines still reach the arbiter: one takes over.
    pair.kill_engine(0);
    pair.wait_protected(Some(1));
    check_jail(pair.pid(0), UIDS[0]);
}

#[test]
fn an_engine_that_is_killed_is_taken_over_from_and_comes_back_as_standby() {
    let pair = protected_pair("kill");
    for active in [0, 1, 0] {
        pair.wait_protected(Some(active));
        pair.kill_engine(active);
        pair.wait_protected(Some(1 - active));
    }
    // A standby that dies leaves the active alone, and comes back.
    pair.kill_engine(0);
    pair.wait_protected(Some(1));
}

/// A failure that is asked for is a crash like any other; it comes only if the standby would take over.
#[test]
fn a_failure_on_request_is_taken_over_from_and_refused_without_a_standby() {
    let mut pair = protected_pair("failover");
    for active in [0, 1] {
        pair.wait_protected(Some(active));
        let before = pair.pid(active);
        pair.control(&["failover", "--vm", "demo"]);
        pair.wait_protected(Some(1 - active));
        assert_ne!(pair.pid(active), before, "another engine came");
        let engine = pair.engine(1 - active);
        assert!(
            engine["counters"]["takeover_us"].is_u64(),
            "the active was lost: {engine}"
        );
        let exit = pair.seat(active)["last_exit"].clone();
        assert!(
            exit["message"]
                .as_str()
                .is_some_and(|text| text.contains("by signal 9")),
            "{exit}"
        );
    }
    // The standby's engine stays away: its daemon is gone.
    pair.kill_daemon(1);
    pair.kill_engine_of(1);
    pair.wait_alone(0, false);
    let before = pair.pid(0);
    let (done, text) = pair.ftvm(&["failover", "--vm", "demo", "--daemon", &pair.sockets()], None);
    assert!(!done && text.contains("not protected"), "{text}");
    assert_eq!(pair.pid(0), before);
    pair.wait_alone(0, false);
}

#[test]
fn switchover_stop_and_start() {
    let pair = protected_pair("stop");
    // Each seat gives the guest away as it got it: booted, and taken over with the disks of one that had followed from its own.
    for to in [1, 0, 1, 0] {
        pair.control(&["switchover", "--vm", "demo"]);
        pair.wait_protected(Some(to));
        let mut engine = Value::Null;
        pair.wait("measured switchover", |_| {
            engine = pair.engine(to);
            engine["counters"]["switchover_us"].is_u64()
        });
        let counter = |name: &str| engine["counters"][name].as_u64();
        let steps = ["loaded", "running", "followed", "sealed", "sent", "released"];
        let steps: Vec<_> = steps
            .iter()
            .map(|step| counter(&format!("switchover_{step}_us")))
            .collect();
        assert!(steps.iter().all(Option::is_some) && steps.is_sorted(), "{steps:?}");
        assert_eq!(counter("takeover_us"), None, "nobody was lost");
    }
    // The embedded guest does not listen to it, but it is there to be pressed.
    pair.control(&["power-button", "--vm", "demo"]);
    let (shown, table) = pair.ftvm(&["status", "--daemon", &pair.sockets()], None);
    assert!(
        shown && table.contains("active") && table.contains("standby"),
        "{table}"
    );
    pair.control(&["stop", "--vm", "demo"]);
    pair.wait("stopped", |status| status["vms"][0]["stopped"] == true);
    assert!(pair.engines().is_empty());
    pair.control(&["start", "--vm", "demo"]);
    pair.wait_protected(None);
}

#[test]
fn a_guest_that_may_not_run_alone_is_stopped_and_started_while_it_stands_still() {
    let mut pair = protected_pair_that_pauses("pause");
    pair.wait("going on", |status| status["vms"][0]["paused"] == false);
    pair.kill_daemon(1);
    pair.kill_engine_of(1);
    pair.wait_alone(0, true);
    pair.wait("told as paused", |status| status["vms"][0]["paused"] == true);
    let (_, table) = pair.ftvm(&["status", "--daemon", &pair.sockets()], None);
    assert!(
        table.contains("no, paused") && table.contains("until a standby has joined"),
        "{table}"
    );
    let refused = |pair: &Pair, command: &str| {
        let (done, text) = pair.ftvm(&[command, "--vm", "demo", "--daemon", &pair.sockets()], None);
        assert!(!done, "{text}");
        text
    };
    assert!(refused(&pair, "power-button").contains("stands still"));
    refused(&pair, "switchover");
    assert!(refused(&pair, "failover").contains("stands still"));
    pair.control(&["stop", "--vm", "demo"]);
    pair.wait("stopped", |status| status["vms"][0]["stopped"] == true);
    // A cold start gives the guest back, and it runs once the other seat has joined.
    pair.start_daemon(1);
    pair.wait("answering", |status| {
        status["daemons"].as_array().is_some_and(|daemons| daemons.len() == 2)
    });
    pair.control(&["start", "--vm", "demo"]);
    pair.wait_protected(Some(0));
    pair.wait("running", |_| {
        pair.seat(0)["engine"]["counters"]["guest_running"] == true
    });
    // The successor stands still, too, until it has a standby.
    pair.kill_daemon(0);
    pair.kill_engine_of(0);
    pair.wait_alone(1, true);
    pair.start_daemon(0);
    pair.wait_protected(Some(1));
}

#[test]
fn a_running_engine_hears_that_its_guest_may_not_run_alone_any_more_and_that_it_may() {
    let mut pair = protected_pair("policy");
    pair.kill_daemon(1);
    pair.kill_engine_of(1);
    pair.wait_alone(0, false);
    let engine = pair.pid(0);
    for (config, paused) in [
        (pair.pausing_seat_config(0, 1), true),
        (pair.seat_config(0, Some(1)), false),
    ] {
        let request = json!({ "request": "apply_seat", "seat": config });
        let answer = daemon::ask(&pair.socket(0), &request, PATIENCE).unwrap();
        assert_eq!(answer["response"], "done", "{answer}");
        pair.wait_alone(0, paused);
    }
    assert_eq!(pair.pid(0), engine);
    pair.start_daemon(1);
    pair.wait_protected(Some(0));
}

#[test]
fn a_pair_that_lost_everything_but_its_disks_starts_cold() {
    let mut pair = protected_pair("cold");
    for n in [0, 1] {
        pair.kill_daemon(n);
    }
    for pid in pair.engines() {
        // SAFETY: a process that writes to this test's log.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    let deadline = Instant::now() + PATIENCE;
    while !pair.engines().is_empty() {
        assert!(Instant::now() < deadline, "killed engines remain");
        std::thread::sleep(Duration::from_millis(10));
    }
    for n in [0, 1] {
        pair.start_daemon(n);
    }
    pair.wait_protected(None);
}

/// The whole way of a lost seat: its identity, a daemon for it, and the command that makes it the peer.
#[test]
fn a_seat_that_is_lost_for_good_is_replaced() {
    let mut pair = protected_pair("replace");
    pair.kill_daemon(1);
    pair.kill_engine_of(1);
    pair.wait("alone", |status| status["vms"][0]["protected"] == false);
    pair.configure(2, &[pair.seat_config(2, None)]);
    pair.start_daemon(2);
    pair.wait("answering", |status| {
        status["daemons"].as_array().is_some_and(|all| all.len() == 2)
    });
    pair.control(&[
        "replace", "--vm", "demo", "--lost", "b", "--with", "c", "--wait-s", "60",
    ]);
    pair.wait_protected(Some(0));
    pair.wait("protected by the new seat", |status| status["vms"][0]["standby"] == "c");
    // It is worth as much as the first one: it takes over.
    pair.kill_engine(0);
    pair.wait_protected(Some(2));
}

#[test]
fn who_watches_introduces_the_seats_that_come() {
    let mut pair = Pair::new("watch");
    pair.configure(0, &[pair.seat_config(0, None)]);
    pair.configure(1, &[]);
    pair.start_daemon(0);
    pair.start_daemon(1);
    pair.wait("answering", |status| {
        status["daemons"].as_array().is_some_and(|all| all.len() == 2)
    });
    let mut watch = Command::new(programs().folder.join("ftvm"));
    watch.args([
        "standalone",
        "up",
        "--unprotected",
        "--watch",
        "--daemon",
        &pair.sockets(),
    ]);
    let mut watch = watch.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    pair.wait("running", |status| status["vms"][0]["active"] == "a");
    // The second seat comes later, and knows nobody.
    pair.kill_daemon(1);
    pair.configure(1, &[pair.seat_config(1, None)]);
    pair.start_daemon(1);
    pair.wait_protected(Some(0));
    assert!(watch.try_wait().unwrap().is_none(), "it stays");
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[test]
fn a_peer_with_another_authoritys_identity_is_named_by_up() {
    let mut pair = Pair::new("foreign");
    let foreign = pair.folder.join("foreign");
    pair.make_identities(&foreign);
    // The same names, but made apart: neither authority has signed for the other's seats.
    let mut config = pair.seat_config(1, Some(0));
    config["identity"] = json!(foreign.join("b"));
    pair.configure(1, &[config]);
    pair.start_daemon(0);
    pair.start_daemon(1);
    pair.wait("answering", |status| {
        status["daemons"].as_array().is_some_and(|all| all.len() == 2)
    });
    let mut up = Command::new(programs().folder.join("ftvm"));
    up.args(["standalone", "up", "--wait-s", "20", "--daemon", &pair.sockets()]);
    let output = up.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(18), "{text}\n{}", pair.logs());
    assert!(
        text.contains("certificate") && text.contains("identities that were made together"),
        "{text}"
    );
}

/// A seat that can't take the guest says so before anything is copied, and both sides tell why.
#[test]
fn a_seat_that_cant_take_the_guest_is_told_by_both_sides() {
    let mut pair = Pair::new("other");
    let mut config = pair.seat_config(1, Some(0));
    config["machine"]["memory_mib"] = json!(48);
    pair.configure(1, &[config]);
    pair.start_daemon(0);
    pair.start_daemon(1);
    pair.wait("answering", |status| {
        status["daemons"].as_array().is_some_and(|daemons| daemons.len() == 2)
    });
    pair.control(&["up", "--unprotected", "--wait-s", "60"]);
    let reason = "both seats need the same memory, disk sizes and network cards";
    let mut told = [false, false];
    // The joiner's engine ends and comes again, so that not every look finds both.
    pair.wait("told", |status| {
        let seats = status["daemons"].as_array().into_iter().flatten();
        let seats = seats.flat_map(|daemon| daemon["seats"].as_array().cloned().unwrap_or_default());
        for seat in seats {
            let text = seat.to_string();
            told[0] |= seat["seat"] == "a" && text.contains("the other side can't follow") && text.contains(reason);
            told[1] |= seat["seat"] == "b" && text.contains("this seat can't join") && text.contains(reason);
        }
        told == [true, true]
    });
}

#[test]
fn a_seats_disk_boots_over_a_dead_holder_only_when_a_person_says_so() {
    let mut pair = protected_pair("loss");
    // The standby dies, the active goes on alone, and then dies with a disk that is gone.
    pair.kill_daemon(1);
    pair.kill_engine_of(1);
    pair.wait("alone", |_| pair.seat(0)["engine"]["protected"] == false);
    let holder = pair.engine(0)["incarnation"].as_str().expect("a name").to_owned();
    pair.kill_daemon(0);
    pair.kill_engine_of(0);
    std::fs::remove_file(pair.folder.join("a.img")).unwrap();
    pair.start_daemon(0);
    pair.start_daemon(1);
    pair.wait("waiting", |_| {
        pair.seat(1)["engine"]["role"] == "starting" && pair.seat(0)["code"] == 16
    });
    pair.control(&["accept-data-loss", "--vm", "demo", "--seat", "b", "--holder", &holder]);
    pair.wait("running again", |status| status["vms"][0]["active"] == "b");
}

#[test]
fn an_arbiter_that_is_away_stops_nothing_and_is_used_again_when_it_is_back() {
    let pair = protected_pair("away");
    let (folder, hidden) = (pair.folder.join("arbiter"), pair.folder.join("hidden"));
    std::fs::rename(&folder, &hidden).unwrap();
    // The standby dies: without the arbiter the active may not go on alone, and with it nothing is taken from it.
    pair.kill_engine(1);
    pair.wait("told", |_| pair.seat(0)["engine"]["arbiter_reachable"] == false);
    assert_eq!(pair.engine(0)["protected"], false);
    std::fs::rename(&hidden, &folder).unwrap();
    pair.wait_protected(Some(0));
}
