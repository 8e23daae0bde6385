//! What Ctrl-C does: a signal to `cargo xtask` alone ends it soon, with everything that it started.
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use ftvm_e2e::interrupt::living_descendants;

/// Long enough for a busy machine to build what is not built; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(600);
/// A person at a keyboard waits this long on a busy machine; what was interrupted would have gone on for many minutes.
const PROMPT: Duration = Duration::from_secs(60);

struct Started {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
    seen: String,
}

impl Started {
    fn new(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self {
            child,
            lines,
            seen: String::new(),
        }
    }

    /// Reads until a line has `words` in it.
    fn wait_for(&mut self, words: &str) {
        loop {
            let Some(line) = self.lines.next() else {
                panic!("it ended without {words:?}:\n{}", self.seen);
            };
            let line = line.unwrap();
            self.seen += &line;
            self.seen.push('\n');
            if line.contains(words) {
                return;
            }
        }
    }

    fn wait_for_descendants(&self, enough: usize) -> BTreeSet<u32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let family = living_descendants(self.child.id());
            if family.len() >= enough {
                return family.into_iter().collect();
            }
            assert!(Instant::now() < deadline, "it starts nothing:\n{}", self.seen);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends the signal to this one process and waits for its end.
    fn interrupt(&mut self) -> (ExitStatus, Duration) {
        let begin = Instant::now();
        // SAFETY: a process that this test started and has not waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGINT) };
        (self.child.wait().unwrap(), begin.elapsed())
    }
}

/// A process that lives, as one can tell by its start time from another that got its number.
fn identity(pid: u32) -> Option<(u32, String)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    (fields.first()? != &"Z").then(|| fields.get(19).map(|start| (pid, (*start).to_owned())))?
}

/// None of these processes may be left, once the kernel has had a moment to end them.
fn all_gone(family: &BTreeSet<(u32, String)>) {
    let deadline = Instant::now() + PROMPT;
    loop {
        let left: Vec<_> = family
            .iter()
            .filter(|known| identity(known.0).as_ref() == Some(known))
            .collect();
        if left.is_empty() {
            return;
        }
        let names: Vec<String> = left
            .iter()
            .map(|(pid, _)| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default())
            .collect();
        assert!(Instant::now() < deadline, "{left:?} are left: {names:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn interrupted_checks_end_with_all_that_they_started() {
    let mut started = Started::new(&["test", "--tier", "check"]);
    started.wait_for("== check");
    // `xtask check` below it, and a cargo below that.
    let family = started
        .wait_for_descendants(2)
        .into_iter()
        .filter_map(identity)
        .collect();
    let (status, took) = started.interrupt();
    assert_eq!(status.code(), Some(128 + libc::SIGINT), "{status}: {}", started.seen);
    assert!(took < PROMPT, "it took {took:?}");
    all_gone(&family);
}

#[test]
fn an_interrupted_demonstration_leaves_no_host_and_no_disk_behind() {
    // As slow and as patient as tests are.
    let options = ["--fault", "none", "--rounds", "1000", "--dev", "--peer-lost-ms", "3000"];
    let mut started = Started::new(&[&["demo"], &options[..]].concat());
    started.wait_for("protected: ");
    // Hosts' inits, daemons, engines.
    let family = started
        .wait_for_descendants(8)
        .into_iter()
        .filter_map(identity)
        .collect();
    let (status, took) = started.interrupt();
    assert!(
        !status.success() && status.signal().is_none(),
        "{status}: {}",
        started.seen
    );
    assert!(took < PROMPT, "it took {took:?}");
    all_gone(&family);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/demo");
    for host in ["h1", "h2", "h3"] {
        assert!(
            folder.join(host).exists() && !folder.join(host).join("disk.raw").exists(),
            "{host}"
        );
    }
}
