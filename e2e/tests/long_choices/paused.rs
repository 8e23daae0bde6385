//! `whenUnprotected: Pause`: the guest stands still while nobody could take over, and its status says so and what is missing.
use std::rc::Rc;
use std::time::Duration;

use anyhow::ensure;
use ftvm_e2e::cluster::{Cluster, wait_for};
use ftvm_e2e::demo::cluster::looks::{has_spoken, wait_event};
use ftvm_e2e::demo::cluster::own::{Client, Own, PATIENCE, message};
use serde_json::json;

use crate::{cordon, nodes, uncordon};

/// Who stands still has fallen silent long before.
const SOON: Duration = Duration::from_secs(4);

/// The guest begins on the first node, and there its successor stays: on the second one until that dies, then on the third.
pub fn stands_still_alone(cluster: &Rc<Cluster>) -> anyhow::Result<()> {
    let [first, second, third] = nodes(cluster)?;
    cordon(cluster, &second)?;
    cordon(cluster, &third)?;
    let own = Own::apply(cluster, "paused", 1, |spec| {
        // A CPU that several nodes have would wait for a second one.
        spec["machine"]["cpuBaseline"] = json!("Host");
        spec["faultTolerance"]["whenUnprotected"] = json!("Pause");
    })?;
    let client = own.client()?;
    stands_still(&own, &client)?;
    ensure!(
        !has_spoken(cluster, own.name())?,
        "it was booted before anybody could take over"
    );
    uncordon(cluster, &second)?;
    goes_on(&own, &client, (&first, &second))?;
    wait_for("its console has something", PATIENCE, || {
        ensure!(has_spoken(cluster, own.name())?, "not a word");
        Ok(())
    })?;

    cluster.node(&second)?.kill()?;
    stands_still(&own, &client)?;
    let words = "Ready: the guest stands still until a standby has joined";
    wait_event(cluster, own.name(), "Paused", words)?;

    // The negative control: the same machine, which may run alone.
    choose(&own, "Continue")?;
    client.answers_go_on()?;
    own.shows(
        "Running",
        &[("Ready", "True", "GuestRuns"), ("Protected", "False", "TooFewNodes")],
    )?;
    let silent = client.is_left_alone(SOON);
    ensure!(silent.is_err(), "silence was found where there is none");
    choose(&own, "Pause")?;
    stands_still(&own, &client)?;

    uncordon(cluster, &third)?;
    goes_on(&own, &client, (&first, &third))?;
    client.end().map(drop)
}

fn choose(own: &Own, when_unprotected: &str) -> anyhow::Result<()> {
    own.patch(&json!({"spec": {"faultTolerance": {"whenUnprotected": when_unprotected}}}))
}

/// No node could have the other seat: that is said, and the client gets no answer.
fn stands_still(own: &Own, client: &Client) -> anyhow::Result<()> {
    let conditions = [("Ready", "False", "Paused"), ("Protected", "False", "TooFewNodes")];
    let status = own.shows("Paused", &conditions)?;
    let (ready, protected) = (message(&status, "Ready")?, message(&status, "Protected")?);
    ensure!(
        ready.contains("stands still until a standby has joined") && protected.contains("add a node"),
        "{ready}; {protected}"
    );
    client.is_left_alone(PATIENCE)
}

fn goes_on(own: &Own, client: &Client, (active, standby): (&str, &str)) -> anyhow::Result<()> {
    let pair = own.protected()?;
    ensure!(pair == (active.to_owned(), standby.to_owned()), "{pair:?}");
    client.answers_go_on()
}
