//! `ftvm.dev/failover`: a failure that is not wanted any more before it was begun never comes; one that goes on being wanted does.
use std::rc::Rc;

use anyhow::ensure;
use ftvm_e2e::cluster::{Cluster, Stopped, wait_for};
use ftvm_e2e::demo::cluster::looks::wait_event;
use ftvm_e2e::demo::cluster::own::{Own, PATIENCE};
use serde_json::{Value, json};

/// Kills the engine of the active seat, where it is told to.
const DAEMON: &str = "ftvm-node-daemon";

/// The daemon stands still when it is told, so that it has not begun. Both times the same is asked for; one time it is taken back.
pub fn taken_back(cluster: &Rc<Cluster>) -> anyhow::Result<()> {
    let own = Own::apply(cluster, "asked", 5, |spec| {
        // The engine's own questions wait longer than its daemon stands still.
        spec["faultTolerance"]["detectionMs"] = json!(3000);
        // However long its next engine takes, the seat whose engine was killed joins again: no other node gets it.
        spec["faultTolerance"]["replaceAfterSeconds"] = json!(600);
    })?;
    let (active, standby) = own.protected()?;
    let client = own.client()?;
    client.answers_go_on()?;
    let before = own.record()?;

    let stopped = told_while_it_stands(cluster, &own, &active, "regretted")?;
    own.annotate("ftvm.dev/failover-")?;
    let why = came_to(&own, "regretted", "Refused")?;
    let words = "taken back before it was begun, nothing was done";
    drop(stopped);
    ensure!(why.contains(words), "{why}");
    wait_event(cluster, own.name(), "FailoverRefused", words)?;
    wait_for("its daemon knows that it was taken back", PATIENCE, || {
        let said = own.said("ftvm.dev/seat-status")?;
        let mut done = said.iter().map(|published| &published["doneRequest"]);
        let refused = done.any(|done| done["id"] == "failover-regretted" && done["refused"].is_string());
        ensure!(refused, "{said:?}");
        Ok(())
    })?;
    client.answers_go_on()?;
    nothing_happened(&own, &before)?;

    // The negative control: nobody takes it back.
    let stopped = told_while_it_stands(cluster, &own, &active, "meant")?;
    nothing_happened(&own, &before)?;
    drop(stopped);
    came_to(&own, "meant", "Done")?;
    wait_event(cluster, own.name(), "FailoverDone", "failover meant")?;
    wait_for("the standby took over", PATIENCE, || {
        let failover = own.status()?["lastFailover"].clone();
        ensure!(failover["node"] == standby.as_str(), "{failover}");
        Ok(())
    })?;
    let pair = own.protected()?;
    ensure!(pair == (standby, active), "{pair:?}");
    client.answers_go_on()?;
    client.end().map(drop)
}

/// Asks for a failure while the active's daemon stands still, and waits until its pod is told.
fn told_while_it_stands(cluster: &Cluster, own: &Own, active: &str, text: &str) -> anyhow::Result<Stopped> {
    let stopped = cluster.node(active)?.native()?.stop_in_pods(DAEMON)?;
    own.annotate(&format!("ftvm.dev/failover={text}"))?;
    let id = format!("failover-{text}");
    wait_for("the active's pod is told", PATIENCE, || {
        let requests = own.said("ftvm.dev/request")?;
        let told = requests
            .iter()
            .any(|request| request["id"] == id.as_str() && request["do"] == "failover");
        ensure!(told, "{requests:?}");
        Ok(())
    })?;
    let asked = own.status()?["failover"].clone();
    ensure!(asked["request"] == text && asked["outcome"] == "Pending", "{asked}");
    Ok(stopped)
}

/// Waits for the outcome of what was asked for with this text; why it is so.
fn came_to(own: &Own, text: &str, outcome: &str) -> anyhow::Result<String> {
    let asked = wait_for("the status tells what came of it", PATIENCE, || {
        let asked = own.status()?["failover"].clone();
        ensure!(asked["request"] == text && asked["outcome"] != "Pending", "{asked}");
        Ok(asked)
    })?;
    ensure!(asked["outcome"] == outcome, "{asked}");
    Ok(asked["why"].as_str().unwrap_or_default().to_owned())
}

/// The same engines go by the same record, and none has taken over.
fn nothing_happened(own: &Own, before: &Value) -> anyhow::Result<()> {
    let (now, status) = (own.record()?, own.status()?);
    ensure!(now == *before, "{before} became {now}");
    ensure!(status["lastFailover"].is_null(), "{}", status["lastFailover"]);
    Ok(())
}
