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
        judge_same(before, self.stage.pair()?)?;
        self.stage.answers_go_on().map(drop)
    }

    /// While this lasts, the guest answers and stays protected by the same two hosts.
    ///
    /// # Errors
    /// If it does not.
    pub fn holds_for(&mut self, before: Pair, time: Duration) -> anyhow::Result<()> {
        hold(time, Duration::from_millis(500), || self.nothing_changed(before))
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
        let mut silence = Silence::new(time, self.stage.answers(), Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let asked = Instant::now();
            let answers = self.stage.answers();
            if silence.lasts(asked, answers, Instant::now())? {
                return Ok(());
            }
        }
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
        judge_condition(&vm, kind, status, reason)
    })
}

/// The condition's message, if it is as it should be.
fn judge_condition(vm: &Value, kind: &str, status: &str, reason: &str) -> anyhow::Result<String> {
    let conditions = vm["status"]["conditions"].as_array().context("no conditions")?;
    let found = conditions.iter().find(|condition| condition["type"] == kind);
    let found = found.context("no such condition")?;
    ensure!(found["status"] == status && found["reason"] == reason, "{found}");
    Ok(found["message"].as_str().unwrap_or_default().to_owned())
}

fn judge_same(before: Pair, now: Pair) -> anyhow::Result<()> {
    ensure!(now == before, "{before:?} became {now:?}");
    Ok(())
}

/// Looks again and again; the last look begins when the time is over.
fn hold(time: Duration, pause: Duration, mut look: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let end = Instant::now() + time;
    loop {
        let last = Instant::now() >= end;
        look()?;
        if last {
            return Ok(());
        }
        std::thread::sleep(pause);
    }
}

/// Whether a guest has said nothing for so long, look by look.
struct Silence {
    time: Duration,
    deadline: Instant,
    answers: u64,
    since: Instant,
}

impl Silence {
    /// So many answers were known at this moment.
    fn new(time: Duration, answers: u64, since: Instant) -> Self {
        Self {
            time,
            deadline: since + 6 * time,
            answers,
            since,
        }
    }

    /// A look between two moments found so many answers. An answer counts for the later one, silence up to the earlier one: how long a look took
    /// never counts as silence.
    fn lasts(&mut self, asked: Instant, answers: u64, told: Instant) -> anyhow::Result<bool> {
        if answers != self.answers {
            (self.answers, self.since) = (answers, told);
        } else if asked.saturating_duration_since(self.since) >= self.time {
            return Ok(true);
        }
        ensure!(told < self.deadline, "the guest goes on answering");
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn fault<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
        format!("{:#}", result.unwrap_err())
    }

    /// Looks every 20 ms at answers that come as `answers` says of a time in milliseconds: when silence was found, or why not.
    fn silent_after_ms(time_ms: u32, answers: impl Fn(u32) -> u64) -> anyhow::Result<u32> {
        let begin = Instant::now();
        let mut silence = Silence::new(time_ms * MS, answers(0), begin);
        for at in (20..).step_by(20) {
            if silence.lasts(begin + at * MS, answers(at), begin + at * MS)? {
                return Ok(at);
            }
        }
        unreachable!("there is a deadline")
    }

    #[test]
    fn a_guest_that_goes_on_answering_is_not_silent() {
        assert_eq!(silent_after_ms(200, |_| 7).unwrap(), 200);
        // Its last answers are on their way; then it is silent.
        assert_eq!(silent_after_ms(200, |ms| ms.min(300).into()).unwrap(), 500);
        assert!(fault(silent_after_ms(200, u64::from)).contains("goes on answering"));
        // Neither is one that answers once in a while.
        assert!(fault(silent_after_ms(200, |ms| (ms / 180).into())).contains("goes on answering"));
    }

    #[test]
    fn a_look_that_took_long_is_no_silence() {
        let begin = Instant::now();
        let mut silence = Silence::new(200 * MS, 7, begin);
        // Whoever looked was not run between a look's two moments.
        assert!(!silence.lasts(begin + 20 * MS, 7, begin + 900 * MS).unwrap());
        assert!(!silence.lasts(begin + 920 * MS, 8, begin + 930 * MS).unwrap());
        assert!(!silence.lasts(begin + 1_120 * MS, 8, begin + 1_121 * MS).unwrap());
        assert!(silence.lasts(begin + 1_130 * MS, 8, begin + 1_131 * MS).unwrap());
    }

    #[test]
    fn another_host_or_term_is_a_change() {
        let before = Pair {
            active: 0,
            standby: 1,
            term: 7,
        };
        judge_same(before, before).unwrap();
        let changed = [
            Pair {
                active: 1,
                standby: 0,
                ..before
            },
            Pair { standby: 2, ..before },
            Pair { term: 8, ..before },
        ];
        for now in changed {
            assert!(fault(judge_same(before, now)).contains("became"), "{now:?}");
        }
    }

    #[test]
    fn what_holds_is_looked_at_until_the_end() {
        let begin = Instant::now();
        let mut last = begin;
        let held = hold(20 * MS, MS, || {
            last = Instant::now();
            Ok(())
        });
        held.unwrap();
        assert!(last >= begin + 20 * MS, "the last look came after {:?}", last - begin);
        let mut looks = 0;
        let broken = hold(3_600_000 * MS, MS, || {
            looks += 1;
            ensure!(looks < 3, "look {looks}");
            Ok(())
        });
        assert_eq!(fault(broken), "look 3");
        // What breaks at the very end does break.
        assert_eq!(fault(hold(Duration::ZERO, MS, || anyhow::bail!("broken"))), "broken");
    }

    #[test]
    fn a_condition_has_its_status_and_its_reason() {
        let condition = |kind: &str, status: &str, reason: &str| {
            json!({
                "type": kind, "status": status, "reason": reason, "message": "no standby", "observedGeneration": 1,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            })
        };
        let ready = condition("Ready", "True", "Running");
        let vm = |protected: Value| json!({"status": {"phase": "Running", "conditions": [ready, protected]}});
        let judge = |vm: &Value| judge_condition(vm, "Protected", "False", "SeatLost");
        assert_eq!(
            judge(&vm(condition("Protected", "False", "SeatLost"))).unwrap(),
            "no standby"
        );
        let due = fault(judge(&vm(condition("Protected", "True", "SeatLost"))));
        assert!(due.contains("\"True\""), "{due}");
        let other = fault(judge(&vm(condition("Protected", "False", "Resyncing"))));
        assert!(other.contains("Resyncing"), "{other}");
        // What another condition says does not count.
        let another = vm(condition("Degraded", "False", "SeatLost"));
        assert_eq!(fault(judge(&another)), "no such condition");
        assert_eq!(fault(judge(&json!({"status": {}}))), "no conditions");
    }
}
