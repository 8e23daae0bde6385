//! Machines of acts' own, each with a client of its own: an act that fails takes nothing from the others.
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{GUEST_ADDRESS, NAMESPACE, looks};
use crate::cluster::install::GUEST_IMAGE;
use crate::cluster::plan::CLIENT_BRIDGE;
use crate::cluster::{Cluster, wait_for};
use crate::demo::{GUEST_MAC, mac_text};
use crate::guest_protocol::{Answer, DEFAULT_PORT, Op};
use crate::hosts::namespace;
use crate::judge::{Judge, JudgePlan};

/// Long enough for a busy machine; nothing is judged by it.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// Answers of a guest that runs.
const ANSWERS: u64 = 100;
/// A guest that runs answers within a fraction of this.
const SILENCE: Duration = Duration::from_secs(2);

/// A condition: type, status, reason.
pub type Condition<'a> = (&'a str, &'a str, &'a str);

/// A machine.
pub struct Own {
    cluster: Rc<Cluster>,
    name: &'static str,
    address: [u8; 4],
}

impl Own {
    /// Applies a small machine. `number` tells it from all others that are there, and is less than 100; `change` may change its spec.
    ///
    /// # Errors
    /// If the API server refuses it, with its reason.
    pub fn apply(
        cluster: &Rc<Cluster>,
        name: &'static str,
        number: u8,
        change: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Self> {
        let (mut address, mut mac) = (GUEST_ADDRESS, GUEST_MAC);
        address[3] += number;
        mac[5] += number;
        let ip = Ipv4Addr::from(address);
        let mut spec = json!({
            "machine": {"memory": "32Mi"},
            "boot": {"image": {"reference": GUEST_IMAGE, "pullPolicy": "Never"}, "cmdline": format!("ip={ip}/24 gw=none")},
            "disks": [{"name": "root", "size": "8Mi", "storageClassName": "local"}],
            "networks": [{"name": "front", "mac": mac_text(mac), "bridge": {"name": CLIENT_BRIDGE}}],
            // A machine that is busy for a while must not count as dead.
            "faultTolerance": {"replaceAfterSeconds": 5, "detectionMs": 1500},
            // The nodes share this machine's two processors.
            "resources": {"cpuRequest": "50m"},
        });
        change(&mut spec);
        let vm = json!({
            "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM",
            "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec,
        });
        cluster.apply(&vm.to_string())?;
        Ok(Self {
            cluster: Rc::clone(cluster),
            name,
            address,
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// A client that connects once the guest takes it, and asks and asks.
    ///
    /// # Errors
    /// If its thread can't be started.
    pub fn client(&self) -> anyhow::Result<Client> {
        let plan = JudgePlan {
            connect_within: PATIENCE,
            stalled_after: PATIENCE,
            ..JudgePlan::new(SocketAddr::from((self.address, DEFAULT_PORT)))
        };
        let network = self.cluster.sandbox().network().try_clone()?;
        let judge = Judge::start(plan, move || namespace::enter_network(&network))?;
        Ok(Client(judge))
    }

    /// Its status.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn status(&self) -> anyhow::Result<Value> {
        let vm = self.cluster.get(&["ftvm", "--namespace", NAMESPACE, self.name])?;
        Ok(vm["status"].clone())
    }

    /// Waits until its status shows this phase with these conditions; returns it.
    ///
    /// # Errors
    /// What it shows instead.
    pub fn shows(&self, phase: &str, conditions: &[Condition<'_>]) -> anyhow::Result<Value> {
        wait_for(&format!("{} is {phase}, {conditions:?}", self.name), PATIENCE, || {
            let status = self.status()?;
            judge_status(&status, phase, conditions)?;
            Ok(status)
        })
    }

    /// Waits until it runs and is protected; returns the nodes of active and standby.
    ///
    /// # Errors
    /// What its status shows instead.
    pub fn protected(&self) -> anyhow::Result<(String, String)> {
        let conditions = [("Ready", "True", "GuestRuns"), ("Protected", "True", "StandbyFollows")];
        let status = self.shows("Running", &conditions)?;
        let node = |role: &str| {
            let node = status[role].as_str();
            node.map(str::to_owned)
                .with_context(|| format!("it runs without {role}: {status}"))
        };
        Ok((node("active")?, node("standby")?))
    }

    /// A merge patch.
    ///
    /// # Errors
    /// If the API server refuses it, with its reason.
    pub fn patch(&self, change: &Value) -> anyhow::Result<()> {
        let change = change.to_string();
        let words = ["patch", "ftvm", self.name, "--namespace", NAMESPACE];
        let words = [&words[..], &["--type=merge", "--patch", &change]].concat();
        self.cluster.kubectl(&words).map(drop)
    }

    /// `KEY=VALUE`, or `KEY-` to remove it.
    ///
    /// # Errors
    /// If the API server refuses it, with its reason.
    pub fn annotate(&self, annotation: &str) -> anyhow::Result<()> {
        let words = ["annotate", "ftvm", self.name, "--namespace", NAMESPACE];
        let words = [&words[..], &["--overwrite", annotation]].concat();
        self.cluster.kubectl(&words).map(drop)
    }

    /// The arbiter's record.
    ///
    /// # Errors
    /// If there is none.
    pub fn record(&self) -> anyhow::Result<Value> {
        let lease = self.cluster.get(&["lease", "--namespace", NAMESPACE, self.name])?;
        let text = lease["metadata"]["annotations"]["ftvm.dev/record"].as_str();
        Ok(serde_json::from_str(text.context("no record")?)?)
    }

    /// The annotation by which a person accepts that what only others than whoever boots have is lost, for the record as it is.
    ///
    /// # Errors
    /// If there is no record.
    pub fn acceptance(&self) -> anyhow::Result<String> {
        let record = self.record()?;
        let holder = record["holder"].as_str().context("no holder")?;
        Ok(format!("ftvm.dev/accept-data-loss={holder}@{}", record["term"]))
    }

    /// Its pods.
    ///
    /// # Errors
    /// If they can't be read.
    pub fn pods(&self) -> anyhow::Result<Vec<Value>> {
        let of_vm = format!("--selector=ftvm.dev/vm={}", self.name);
        let pods = self.cluster.get(&["pods", "--namespace", NAMESPACE, &of_vm])?;
        Ok(pods["items"].as_array().context("no list")?.clone())
    }

    /// Takes its pods away without waiting for their nodes, which go on.
    ///
    /// # Errors
    /// If the API server refuses it, with its reason.
    pub fn delete_pods_by_force(&self) -> anyhow::Result<()> {
        let of_vm = format!("--selector=ftvm.dev/vm={}", self.name);
        let words = ["delete", "pods", "--namespace", NAMESPACE, &of_vm];
        let words = [&words[..], &["--force", "--grace-period=0"]].concat();
        self.cluster.kubectl(&words).map(drop)
    }

    /// What an annotation says, which is JSON, of each pod that has it.
    ///
    /// # Errors
    /// If it is none, or the pods can't be read.
    pub fn said(&self, annotation: &str) -> anyhow::Result<Vec<Value>> {
        let pods = self.pods()?;
        let texts = pods.iter();
        let texts = texts.filter_map(|pod| pod["metadata"]["annotations"][annotation].as_str());
        texts
            .map(|text| serde_json::from_str::<Value>(text).with_context(|| format!("{annotation}: {text}")))
            .collect()
    }

    /// Waits until its guest says that it was booted for the second time, with so many records in its journal.
    ///
    /// # Errors
    /// What it says instead.
    pub fn has_booted_again(&self, records: &RangeInclusive<u64>) -> anyhow::Result<()> {
        looks::has_booted(&self.cluster, self.name, 2, records)
    }
}

/// A client with one connection, which is never renewed.
pub struct Client(Judge);

impl Client {
    /// Waits for answers to what is asked from now on.
    ///
    /// # Errors
    /// If they don't come.
    pub fn answers_go_on(&self) -> anyhow::Result<()> {
        self.0.go_on();
        let goal = self.0.answers() + ANSWERS;
        wait_for("answers go on", PATIENCE, || {
            ensure!(self.0.answers() >= goal, "{} of {goal}", self.0.answers());
            Ok(())
        })
    }

    /// Waits, so long at most, until no answer comes any more; then not a single one comes for long, although it asks and asks.
    ///
    /// # Errors
    /// If it is answered.
    pub fn is_left_alone(&self, within: Duration) -> anyhow::Result<()> {
        self.0.go_on();
        wait_for("the guest falls silent", within, || {
            // What had left before may still come. A guest that never ran has not even taken the connection on which one waits.
            let silent = self.0.answers() == 0 || self.0.waiting() > SILENCE;
            ensure!(silent, "{} answers, and they go on", self.0.answers());
            Ok(())
        })?;
        let before = self.0.answers();
        std::thread::sleep(SILENCE);
        let after = self.0.answers();
        ensure!(after == before, "{before} answers became {after}");
        ensure!(!self.0.has_ended(), "the client gave up");
        Ok(())
    }

    /// The last record of the guest's journal that it was told to be durable; it asks for nothing more until answers are to go on.
    ///
    /// # Errors
    /// If the guest does not say it.
    pub fn told(&self) -> anyhow::Result<u64> {
        self.ask(Op::Status).map(|answer| answer.journal_seq)
    }

    /// Ends after the guest has checked itself: nothing was lost, doubled or contradicted. Returns the last record of the journal that it was told
    /// to be durable.
    ///
    /// # Errors
    /// What was found.
    pub fn end(self) -> anyhow::Result<u64> {
        let answer = self.ask(Op::Verify)?;
        let (pages, records) = (answer.memory_errors, answer.journal_errors);
        ensure!(
            pages == 0 && records == 0,
            "the guest found {pages} faulty pages and {records} faulty journal records"
        );
        let outcome = self.0.finish();
        ensure!(outcome.is_clean(), "{:?}: {:?}", outcome.end, outcome.complaints());
        ensure!(answer.journal_seq > 0, "nothing was told to be durable");
        Ok(answer.journal_seq)
    }

    fn ask(&self, op: Op) -> anyhow::Result<Answer> {
        let answer = self.0.ask(op, 0, 0);
        let answer = answer.with_context(|| format!("the connection ended before {op:?}"))?;
        ensure!(!answer.refused(), "the guest refused {op:?}");
        Ok(answer)
    }
}

/// Message of a condition of a status.
///
/// # Errors
/// If there is no such condition.
pub fn message<'a>(status: &'a Value, kind: &str) -> anyhow::Result<&'a str> {
    let message = condition(status, kind)?["message"].as_str();
    message.with_context(|| format!("{kind} has no message"))
}

fn condition<'a>(status: &'a Value, kind: &str) -> anyhow::Result<&'a Value> {
    let mut conditions = status["conditions"].as_array().into_iter().flatten();
    let found = conditions.find(|condition| condition["type"] == kind);
    found.with_context(|| format!("no condition {kind}: {status}"))
}

fn judge_status(status: &Value, phase: &str, conditions: &[Condition<'_>]) -> anyhow::Result<()> {
    for (kind, holds, reason) in conditions {
        let found = condition(status, kind)?;
        ensure!(found["status"] == *holds && found["reason"] == *reason, "{found}");
    }
    ensure!(status["phase"] == phase, "the phase is {}", status["phase"]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown() -> Value {
        json!({"phase": "Paused", "conditions": [
            {"type": "Ready", "status": "False", "reason": "Paused", "message": "it stands still"},
            {"type": "Protected", "status": "False", "reason": "TooFewNodes"},
        ]})
    }

    #[test]
    fn a_status_is_known_by_phase_and_conditions() {
        let conditions = [("Ready", "False", "Paused"), ("Protected", "False", "TooFewNodes")];
        judge_status(&shown(), "Paused", &conditions).unwrap();
        judge_status(&shown(), "Paused", &[]).unwrap();
        assert_eq!(message(&shown(), "Ready").unwrap(), "it stands still");
    }

    #[test]
    fn a_status_that_shows_something_else_is_found() {
        let fault = |phase: &str, condition: Condition<'_>| {
            let judged = judge_status(&shown(), phase, &[condition]);
            format!("{:#}", judged.unwrap_err())
        };
        assert!(fault("Running", ("Ready", "False", "Paused")).contains("the phase is \"Paused\""));
        assert!(fault("Paused", ("Ready", "True", "Paused")).contains("it stands still"));
        assert!(fault("Paused", ("Ready", "False", "Starting")).contains("it stands still"));
        assert!(fault("Paused", ("Resyncing", "True", "Joining")).contains("no condition Resyncing"));
        assert!(judge_status(&Value::Null, "Paused", &[]).is_err());
        assert!(message(&shown(), "Protected").is_err());
        assert!(message(&shown(), "Resyncing").is_err());
    }
}
