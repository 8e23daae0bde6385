//! A person accepts that what only some seats have is lost (`ftvm.dev/accept-data-loss`): the guest is booted from what the others have, or it is said
//! why it is not.
use std::rc::Rc;

use anyhow::ensure;
use ftvm_e2e::cluster::{Cluster, wait_for};
use ftvm_e2e::demo::cluster::looks::{self, wait_event};
use ftvm_e2e::demo::cluster::own::{Own, PATIENCE, message};
use serde_json::json;

use crate::{OUT_OF_SERVICE, cordon, is_away, third, uncordon};

/// The program that runs guests.
const ENGINE: &str = "ftvm-engine";
/// Nobody has the guest, and a node is away that may have more than the others.
const NODE_NEEDED: &[(&str, &str, &str)] = &[("Ready", "False", "NodeNeeded")];
/// The guest runs.
const RUNS: &[(&str, &str, &str)] = &[("Ready", "True", "GuestRuns")];

/// A protected machine whose client was told that so many records are durable.
fn with_records(cluster: &Rc<Cluster>, name: &'static str, number: u8) -> anyhow::Result<(Own, u64)> {
    let own = Own::apply(cluster, name, number, |_| {})?;
    own.protected()?;
    let client = own.client()?;
    client.answers_go_on()?;
    let told = client.end()?;
    Ok((own, told))
}

/// Waits until it is said that this node is needed, and how to go on without it, in words like these; returns the annotation that accepts the loss.
fn node_needed(own: &Own, node: &str, words: impl Fn(&str) -> bool) -> anyhow::Result<String> {
    wait_for(&format!("node {node} is needed"), PATIENCE, || {
        let (status, accept) = (own.shows("Starting", NODE_NEEDED)?, own.acceptance()?);
        let said = message(&status, "Ready")?;
        let whole = said.contains(&format!("node {node} is away")) && said.contains(&accept);
        ensure!(whole && words(said), "{said}");
        Ok(accept)
    })
}

/// The machine is halted, and then the standby's node lost for good: nobody knows what its disk says, but nothing runs there. The holder's own seat
/// starts over the stop, and has all that was told.
pub fn over_a_stop(cluster: &Rc<Cluster>) -> anyhow::Result<()> {
    let (own, told) = with_records(cluster, "stopped", 2)?;
    let (holder, lost) = own.protected()?;
    own.patch(&json!({"spec": {"runStrategy": "Halted"}}))?;
    own.shows("Halted", &[("Ready", "False", "Halted")])?;
    let stopped = own.record()?;
    ensure!(stopped["phase"] == "Stopped", "{stopped}");
    cluster.node(&lost)?.kill()?;
    is_away(cluster, &lost)?;
    own.patch(&json!({"spec": {"runStrategy": "Always"}}))?;
    // The pod there had ended in order: nobody has to say that the node is off.
    let accept = node_needed(&own, &lost, |said| !said.contains("kubectl taint"))?;
    ensure!(
        own.record()? == stopped,
        "the record was written before a person said anything"
    );
    own.annotate(&accept)?;
    own.has_booted_again(&(told..=u64::MAX))?;
    let status = own.shows("Running", RUNS)?;
    ensure!(status["active"] == holder.as_str(), "{status}");
    Ok(())
}

/// Both pods were deleted by force, and one can't be made anew: its former one may run. What an engine finds out after it took the command is told.
pub fn refused_late(cluster: &Rc<Cluster>) -> anyhow::Result<()> {
    let (own, told) = with_records(cluster, "doubted", 3)?;
    let (active, standby) = own.protected()?;
    // Nor is the seat replaced then.
    for node in [&standby, &third(cluster, (&active, &standby))?] {
        cordon(cluster, node)?;
    }
    own.delete_pods_by_force()?;
    let accept = wait_for("a seat waits for a person", PATIENCE, || {
        let (status, accept) = (own.status()?, own.acceptance()?);
        let said = message(&status, "Ready")?;
        let roles = own.said("ftvm.dev/seat-status")?;
        let waits = roles.iter().any(|published| published["role"] == "starting");
        // The former ones may still write the record while they go.
        let left = cluster.node(&standby)?.native()?.processes_in_pods(ENGINE)?;
        ensure!(
            said.contains(&accept) && waits && left.is_empty(),
            "{said}, {roles:?}, {left:?}"
        );
        Ok(accept)
    })?;
    let early = looks::events(cluster, own.name(), "DataLossRefused")?;
    ensure!(early.is_empty(), "nobody has accepted anything: {early:?}");
    let before = own.record()?;
    own.annotate(&accept)?;
    // A busy machine may take longer for the first answer than the daemon waits, which says that and asks again.
    wait_for("the loss is refused, and why", PATIENCE, || {
        let status = own.shows("Starting", &[("Ready", "False", "DataLossRefused")])?;
        let said = message(&status, "Ready")?;
        ensure!(said.contains("a guest runs or may run on seat"), "{said}");
        Ok(())
    })?;
    ensure!(own.record()? == before, "it was refused, and the record written");
    let words = "does not boot over the loss that was accepted";
    wait_event(cluster, own.name(), "DataLossRefused", words)?;
    // Once the pod is there its daemon knows what became of the former one.
    uncordon(cluster, &standby)?;
    own.has_booted_again(&(told..=u64::MAX))?;
    own.shows("Running", RUNS).map(drop)
}

/// The standby is lost, the active goes on alone, and then is lost for good: only what it did alone is lost with it, and all of that.
pub fn of_a_dead_holder(cluster: &Rc<Cluster>) -> anyhow::Result<()> {
    let own = Own::apply(cluster, "outlived", 4, |spec| {
        // As long as nobody knows that the active is dead, too, a standby that is back and can't join would be replaced.
        spec["faultTolerance"]["replaceAfterSeconds"] = json!(600);
    })?;
    let (active, standby) = own.protected()?;
    cordon(cluster, &third(cluster, (&active, &standby))?)?;
    let client = own.client()?;
    client.answers_go_on()?;
    let shared = client.told()?;
    cluster.node(&standby)?.kill()?;
    wait_for("the active is alone", PATIENCE, || {
        let record = own.record()?;
        let alone = record["members"].as_array().is_some_and(|members| members.len() == 1);
        ensure!(alone, "{record}");
        Ok(())
    })?;
    client.answers_go_on()?;
    let alone = client.end()?;
    ensure!(alone > shared, "it did nothing alone: {shared}, then {alone}");
    cluster.node(&active)?.kill()?;
    cluster.node(&standby)?.start()?;
    cluster.wait_node_ready(&standby)?;
    let (left, taint) = (own.record()?, format!("{OUT_OF_SERVICE}=nodeshutdown:NoExecute"));
    let command = format!("kubectl taint node {active} {taint}");
    node_needed(&own, &active, |said| said.contains(&command))?;
    cluster.kubectl(&["taint", "node", &active, &taint])?;
    // That it is off does not boot the other disk, which lacks something: a person has to say that, too.
    let accept = node_needed(&own, &active, |said| !said.contains("kubectl taint"))?;
    ensure!(own.record()? == left, "the record was written before it was accepted");
    own.annotate(&accept)?;
    own.has_booted_again(&(shared..=shared))?;
    let status = own.shows("Running", RUNS)?;
    ensure!(status["active"] == standby.as_str(), "{status}");
    Ok(())
}
