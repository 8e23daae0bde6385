//! `cargo xtask cluster`: up, status, kubectl, down, and that nothing is left behind, whichever way it ends.
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use ftvm_e2e::interrupt::living_descendants;
use serde_json::Value;

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(300);

/// A cluster of one node under a name of its own; dropping it takes it down.
struct Named(String);

impl Named {
    fn new(test: &str) -> Self {
        Self(format!("{test}-{}", std::process::id()))
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command
            .args(["cluster", "--name", &self.0])
            .args(words)
            .stdin(Stdio::null());
        command
    }

    fn try_run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    fn run(&self, words: &[&str]) -> String {
        let output = self.try_run(words);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{words:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.try_run(&["down"]);
    }
}

/// What a cluster consists of, as the machine sees it.
struct Traces {
    processes: BTreeSet<u32>,
    namespaces: BTreeSet<u64>,
    folder: PathBuf,
    groups: Vec<PathBuf>,
}

impl Traces {
    fn of(status: &Value) -> Self {
        let holder = u32::try_from(status["holder_pid"].as_u64().unwrap()).unwrap();
        let processes: BTreeSet<u32> = living_descendants(holder).into_iter().collect();
        let own = namespaces_of(std::process::id());
        let namespaces = processes
            .iter()
            .flat_map(|pid| namespaces_of(*pid))
            .filter(|one| !own.contains(one));
        let folder = PathBuf::from(status["folder"].as_str().unwrap());
        let groups = fs::read_to_string(folder.join("control-groups")).unwrap();
        let traces = Self {
            namespaces: namespaces.collect(),
            groups: groups.lines().map(PathBuf::from).collect(),
            processes,
            folder,
        };
        // They are there to be missed later: network, mounts and process ids of the lab and of a node, at least.
        assert!(traces.namespaces.len() >= 6, "{:?}", traces.namespaces);
        assert!(traces.processes.len() >= 8, "{:?}", traces.processes);
        assert!(traces.groups.iter().all(|group| group.exists()) && !traces.groups.is_empty());
        traces
    }

    /// Waits until nothing is left; the kernel takes its time with the dead.
    fn gone(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {left:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let folder = self.folder.to_str().unwrap();
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(folder))
                .map(|line| format!("mount {line}")),
        );
        let paths = self.groups.iter().chain([&self.folder]).filter(|path| path.exists());
        left.extend(paths.map(|path| path.display().to_string()));
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A number may have been used again: a process is the cluster's if it lives in one of its namespaces.
            if namespaces_of(pid).iter().any(|one| self.namespaces.contains(one)) {
                left.push(format!("process {pid}"));
            }
        }
        left
    }
}

/// Network, mounts and process ids of a process; none if it has ended.
fn namespaces_of(pid: u32) -> Vec<u64> {
    ["net", "mnt", "pid"]
        .iter()
        .filter_map(|kind| fs::metadata(format!("/proc/{pid}/ns/{kind}")).ok())
        .map(|namespace| namespace.ino())
        .collect()
}

#[test]
fn a_cluster_comes_up_is_used_and_leaves_nothing() {
    let cluster = Named::new("command");
    assert_eq!(cluster.try_run(&["status"]).status.code(), Some(1));
    let up: Value = serde_json::from_str(&cluster.run(&["up", "--nodes", "1", "--dev", "--json"])).unwrap();
    assert_eq!(up["nodes"][0]["ready"], true, "{up}");
    let shown = cluster.run(&["kubectl", "get", "ftvm,daemonsets,deployments", "--all-namespaces"]);
    assert!(
        shown.contains("ftvm-node-daemon") && shown.contains("ftvm-operator"),
        "{shown}"
    );
    let traces = Traces::of(&up);

    assert!(cluster.run(&["up", "--nodes", "1"]).contains("is up already"));
    let status: Value = serde_json::from_str(&cluster.run(&["status", "--json"])).unwrap();
    assert_eq!(status["holder_pid"], up["holder_pid"]);
    assert!(cluster.run(&["status"]).contains("n1"));
    let version: Value = serde_json::from_str(&cluster.run(&["kubectl", "version", "-o", "json"])).unwrap();
    assert_eq!(version["serverVersion"]["minor"], "37", "{version}");
    assert!(cluster.run(&["kubectl", "get", "nodes"]).contains("n1"));
    let refused = cluster.try_run(&["kubectl", "get", "nonsense"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");

    assert!(cluster.run(&["down"]).contains("is down"));
    traces.gone();
    assert_eq!(cluster.try_run(&["status"]).status.code(), Some(1));
    assert!(cluster.run(&["down"]).contains("was up"));
}

#[test]
fn a_killed_or_ended_holder_takes_its_cluster_along() {
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let cluster = Named::new("holder");
        let up: Value = serde_json::from_str(&cluster.run(&["up", "--nodes", "1", "--bare", "--json"])).unwrap();
        let traces = Traces::of(&up);
        let holder = libc::pid_t::try_from(up["holder_pid"].as_i64().unwrap()).unwrap();
        // SAFETY: the holder of this test's own cluster, which lives.
        assert_eq!(unsafe { libc::kill(holder, signal) }, 0);
        let deadline = Instant::now() + PATIENCE;
        while cluster.try_run(&["status"]).status.code() != Some(1) || fs::exists(format!("/proc/{holder}")).unwrap() {
            assert!(Instant::now() < deadline, "the holder lives on after signal {signal}");
            std::thread::sleep(Duration::from_millis(50));
        }
        if signal == libc::SIGKILL {
            // Then control groups and folder wait for the next command.
            cluster.run(&["down"]);
        }
        traces.gone();
    }
}

#[test]
fn bad_options_are_refused() {
    let cluster = Named::new("bad");
    for (words, expected) in [
        (&["up", "--nodes", "0"][..], "1..=9"),
        (&["kubectl", "get", "pods"][..], "cluster up"),
    ] {
        let output = cluster.try_run(words);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(expected), "{words:?}: {text}");
    }
    let unnamed = Named("no/name".to_owned()).try_run(&["status"]);
    assert!(
        String::from_utf8_lossy(&unnamed.stderr).contains("no name of a cluster"),
        "{unnamed:?}"
    );
}
