//! A test's play: acts, each from a protected machine to a protected machine.
use std::process::Child;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::{NAMESPACE, VM, system};
use crate::cluster::{Cluster, wait_for};
use crate::demo::rounds::{Pair, Stage};
use crate::demo::witness::EmbeddedWitness;
use crate::report::Progress;

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(540);

/// The stage, and how far the play is.
pub struct Acts<'a> {
    /// Client, observer, machine.
    pub stage: Stage<'a, EmbeddedWitness>,
    /// The nodes.
    pub cluster: Rc<Cluster>,
    progress: Progress,
    number: u32,
}

impl<'a> Acts<'a> {
    /// Before the first act.
    #[must_use]
    pub fn new(stage: Stage<'a, EmbeddedWitness>, cluster: &Rc<Cluster>, progress: &Progress) -> Self {
        Self {
            stage,
            cluster: Rc::clone(cluster),
            progress: progress.clone(),
            number: 0,
        }
    }

    /// One act: from a protected machine to a protected machine, then everything is compared.
    ///
    /// # Errors
    /// What went wrong, and in which act.
    pub fn act(&mut self, name: &str, act: impl FnOnce(&mut Self, Pair) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let begin = Instant::now();
        self.number += 1;
        let pair = self.stage.pair().with_context(|| format!("before {name}"))?;
        self.stage.answers_go_on()?;
        act(self, pair).with_context(|| name.to_owned())?;
        self.stage.pair().with_context(|| format!("after {name}"))?;
        self.stage.examine().with_context(|| format!("after {name}"))?;
        let seconds = begin.elapsed().as_secs_f64();
        self.progress
            .good(format!("act {}, {name}: {seconds:.0} s", self.number));
        Ok(())
    }

    /// A line of progress.
    pub fn say(&self, text: impl std::fmt::Display) {
        self.progress.say(text.to_string());
    }

    /// Waits until another host than before is active; it must be the standby. Returns how long the client waited, in milliseconds.
    ///
    /// # Errors
    /// If nobody takes over, or another.
    pub fn standby_takes_over(&mut self, before: Pair) -> anyhow::Result<f64> {
        let (after, gap_ms) = self.stage.taken_over(before)?;
        ensure!(after == before.standby, "host {after} took over from {before:?}");
        self.say(format_args!("the client waited {gap_ms:.1} ms"));
        Ok(gap_ms)
    }

    /// The machine is as it was: the same host, the same term, still protected.
    ///
    /// # Errors
    /// If it is not.
    pub fn nothing_changed(&mut self, before: Pair) -> anyhow::Result<()> {
        let now = self.stage.pair()?;
        ensure!(now == before, "{before:?} became {now:?}");
        self.stage.answers_go_on().map(drop)
    }

    /// While this lasts, the guest answers and stays protected by the same two hosts.
    ///
    /// # Errors
    /// If it does not.
    pub fn holds_for(&mut self, before: Pair, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(500));
            self.nothing_changed(before)?;
        }
        Ok(())
    }

    /// The name of a host's node.
    #[must_use]
    pub fn node(&self, host: usize) -> String {
        self.cluster.nodes()[host].name()
    }

    /// SIGKILL to the engine of a host.
    ///
    /// # Errors
    /// If not exactly one ran there.
    pub fn kill_engine(&self, host: usize) -> anyhow::Result<()> {
        let (killed, _) = self.cluster.nodes()[host].kill_processes("ftvm-engine")?;
        ensure!(killed == 1, "{killed} engines ran on {}", self.node(host));
        Ok(())
    }

    /// Begins to drain a host's node; it takes no pods until it is uncordoned.
    ///
    /// # Errors
    /// If kubectl can't be started.
    pub fn start_drain(&self, host: usize) -> anyhow::Result<Child> {
        system::start_drain(&self.cluster, &self.node(host))
    }

    /// Waits until the guest has said nothing for so long.
    ///
    /// # Errors
    /// If it goes on answering.
    pub fn falls_silent(&self, time: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + 6 * time;
        let (mut known, mut since) = (self.stage.answers(), Instant::now());
        while since.elapsed() < time {
            ensure!(Instant::now() < deadline, "the guest goes on answering");
            std::thread::sleep(Duration::from_millis(20));
            let answers = self.stage.answers();
            if answers != known {
                (known, since) = (answers, Instant::now());
            }
        }
        Ok(())
    }

    /// The machine's object.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn vm(&self) -> anyhow::Result<Value> {
        self.cluster.get(&["ftvm", "--namespace", NAMESPACE, VM])
    }

    /// Waits for a condition's status and reason; returns its message.
    ///
    /// # Errors
    /// If it does not come about, with the condition that was there.
    pub fn wait_condition(&self, kind: &str, status: &str, reason: &str) -> anyhow::Result<String> {
        wait_condition(&self.cluster, VM, kind, status, reason)
    }
}

/// Waits for a status and reason of a machine's condition; returns its message.
///
/// # Errors
/// If it does not come about, with the condition that was there.
pub fn wait_condition(cluster: &Cluster, vm: &str, kind: &str, status: &str, reason: &str) -> anyhow::Result<String> {
    wait_for(&format!("{vm}: {kind} is {status} ({reason})"), PATIENCE, || {
        let vm = cluster.get(&["ftvm", "--namespace", NAMESPACE, vm])?;
        let conditions = vm["status"]["conditions"].as_array().context("no conditions")?;
        let found = conditions.iter().find(|condition| condition["type"] == kind);
        let found = found.context("no such condition")?;
        ensure!(found["status"] == status && found["reason"] == reason, "{found}");
        Ok(found["message"].as_str().unwrap_or_default().to_owned())
    })
}
