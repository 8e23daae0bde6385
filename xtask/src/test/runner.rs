//! Runs one command: its output passes through, a quiet command says that it lives, a late one is killed with all it started.
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use ftvm_e2e::cargo::forget_caller;
use ftvm_e2e::interrupt;
use rustix::process::{Pid, Signal};

use super::tally::Tally;

/// After so long without a line of output, one is printed.
const QUIET: Duration = Duration::from_secs(20);

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With an exit code.
    Code(i32),
    /// By a signal.
    Signal,
    /// It did not end before the deadline.
    Late,
}

/// Runs `words` (program and arguments) in `folder` until it ends or the deadline passes.
///
/// # Errors
/// If it cannot be started.
pub fn run(
    tier: &str,
    words: &[String],
    folder: &Path,
    deadline: Instant,
    tally: &mut Tally,
) -> anyhow::Result<Ending> {
    let (program, arguments) = words.split_first().context("a command without a program")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    forget_caller(&mut command);
    // One backtrace is longer than a run's whole output.
    command.env("RUST_BACKTRACE", "0");
    interrupt::hold_if_ending();
    let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
    let (sender, lines) = mpsc::channel();
    forward(child.stdout.take(), &sender);
    forward(child.stderr.take(), &sender);
    drop(sender);
    let begin = Instant::now();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            kill_tree(&mut child);
            return Ok(Ending::Late);
        }
        match lines.recv_timeout(left.min(QUIET)) {
            Ok(line) => {
                tally.line(&line);
                if !is_noise(&line) {
                    println!("{line}");
                }
            }
            Err(RecvTimeoutError::Timeout) => println!("[{tier}: at work for {} s]", begin.elapsed().as_secs()),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = child.wait()?;
    Ok(status.code().map_or(Ending::Signal, Ending::Code))
}

/// Lines about test programs without tests.
fn is_noise(line: &str) -> bool {
    line.is_empty() || line == "running 0 tests" || line.contains(" 0 passed; 0 failed; 0 ignored;")
}

fn forward(stream: Option<impl Read + Send + 'static>, to: &Sender<String>) {
    let Some(stream) = stream else { return };
    let to = to.clone();
    thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if to.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
}

/// Kills a command and everything below it: cargo's own death would leave the test programs behind.
fn kill_tree(child: &mut Child) {
    let family = interrupt::living_descendants(child.id());
    let pids = family.into_iter().rev().chain([child.id()]);
    for pid in pids.filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
        // Who has just ended by itself need not be killed.
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_script(script: &str, timeout: Duration, tally: &mut Tally) -> Ending {
        let words = ["sh", "-c", script].map(str::to_owned);
        run("t", &words, Path::new("/"), Instant::now() + timeout, tally).unwrap()
    }

    #[test]
    fn lines_are_counted_and_codes_passed_on() {
        let mut tally = Tally::default();
        let script = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored;' >&2; exit 3";
        assert_eq!(run_script(script, Duration::from_secs(30), &mut tally), Ending::Code(3));
        assert_eq!(tally.passed, 2);
    }

    #[test]
    fn a_late_command_is_killed_with_its_children() {
        let begin = Instant::now();
        let ending = run_script(
            "sh -c 'sleep 600.25; true'; true",
            Duration::from_millis(300),
            &mut Tally::default(),
        );
        assert_eq!(ending, Ending::Late);
        assert!(begin.elapsed() < Duration::from_secs(60));
        let lives = || {
            std::fs::read_dir("/proc")
                .unwrap()
                .flatten()
                .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
                .any(|command| command.starts_with(b"sleep\x00600.25"))
        };
        // It was sent the signal; nobody waits for a grandchild's end.
        let deadline = Instant::now() + Duration::from_secs(20);
        while lives() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!lives(), "the grandchild lives");
    }
}
