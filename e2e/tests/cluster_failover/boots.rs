//! The guest is booted again, from the disks that its seats have: after a halt, after its pods were taken away by force, and after a node was lost for
//! good together with the other one's memory. The pods are other ones then, and the record names those that are gone.
use std::time::Instant;

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::{Cluster, Component, wait_for};
use ftvm_e2e::demo::cluster::acts::wait_condition;
use ftvm_e2e::demo::cluster::looks::has_booted;
use ftvm_e2e::demo::cluster::{NAMESPACE, VM};
use ftvm_e2e::report::Progress;
use serde_json::{Value, json};

use crate::{PATIENCE, patch};

/// All of the above; `told` is the last record of the guest's journal that a client was told to be durable.
pub fn again(cluster: &Cluster, told: u64, progress: &Progress) -> anyhow::Result<()> {
    ensure!(told > 0, "nothing was told");
    let mut boot = 1;
    let mut act = |name: &str, act: fn(&Cluster) -> anyhow::Result<()>| {
        let begin = Instant::now();
        boot += 1;
        let played = act(cluster).and_then(|()| {
            wait_condition(cluster, VM, "Protected", "True", "StandbyFollows")?;
            has_booted(cluster, VM, boot, &(told..=u64::MAX))
        });
        let seconds = begin.elapsed().as_secs_f64();
        progress.good(format!("{name}: {seconds:.0} s"));
        played.with_context(|| name.to_owned())
    };
    act("halted and started", halted_and_started)?;
    act("both pods deleted by force", pods_deleted)?;
    act("a node lost for good", node_lost)
}

fn vm(cluster: &Cluster) -> anyhow::Result<Value> {
    cluster.get(&["ftvm", VM, "--namespace", NAMESPACE])
}

/// Selects the machine's pods.
fn of_vm() -> String {
    format!("--selector=ftvm.dev/vm={VM}")
}

fn pods(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let names = cluster.kubectl(&["get", "pods", "--namespace", NAMESPACE, &of_vm(), "--output=name"])?;
    Ok(names.lines().map(str::to_owned).collect())
}

fn run_strategy(cluster: &Cluster, strategy: &str) -> anyhow::Result<()> {
    patch(cluster, "ftvm", VM, &json!({"spec": {"runStrategy": strategy}}))
}

fn halted_and_started(cluster: &Cluster) -> anyhow::Result<()> {
    run_strategy(cluster, "Halted")?;
    wait_for("the machine is halted", PATIENCE, || {
        let (vm, pods) = (vm(cluster)?, pods(cluster)?);
        ensure!(
            vm["status"]["phase"] == "Halted" && pods.is_empty(),
            "{pods:?}, {}",
            vm["status"]
        );
        Ok(())
    })?;
    run_strategy(cluster, "Always")
}

/// Nobody can say of them that they ended in order, and the record says that they run.
fn pods_deleted(cluster: &Cluster) -> anyhow::Result<()> {
    let before = pods(cluster)?;
    let words = [
        "delete",
        "pods",
        "--namespace",
        NAMESPACE,
        &of_vm(),
        "--force",
        "--grace-period=0",
    ];
    cluster.kubectl(&words)?;
    ensure!(before.len() == 2, "{before:?}");
    has_booted(cluster, VM, 3, &(0..=u64::MAX)).context("by another pod")
}

/// Both nodes lose power, and only the standby's comes back: a person says that the other one is switched off, and what may be lost.
fn node_lost(cluster: &Cluster) -> anyhow::Result<()> {
    let status = vm(cluster)?["status"].clone();
    let node = |role: &str| status[role].as_str().with_context(|| format!("no {role}: {status}"));
    let (lost, back) = (node("active")?, node("standby")?);
    // Neither of them is seen alone by the arbiter.
    cluster.pause_component(Component::ApiServer)?;
    cluster.node(lost)?.kill()?;
    cluster.node(back)?.kill()?;
    cluster.resume_component(Component::ApiServer)?;
    cluster.node(back)?.start()?;
    cluster.wait_node_ready(back)?;
    let said = wait_condition(cluster, VM, "Ready", "False", "NodeNeeded")?;
    let lease = cluster.get(&["lease", VM, "--namespace", NAMESPACE])?;
    let holder = lease["spec"]["holderIdentity"].as_str().context("no holder")?;
    let term = vm(cluster)?["status"]["term"].clone();
    let accept = format!("ftvm.dev/accept-data-loss={holder}@{term}");
    let taint = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute";
    ensure!(
        said.contains(&format!("kubectl taint node {lost} {taint}")) && said.contains(&accept),
        "{said}"
    );
    let words = ["annotate", "ftvm", VM, "--namespace", NAMESPACE, "--overwrite", &accept];
    cluster.kubectl(&words)?;
    wait_for("it waits for the node's end", PATIENCE, || {
        let said = wait_condition(cluster, VM, "Ready", "False", "NodeNeeded")?;
        ensure!(said.contains("waits for the former"), "{said}");
        Ok(())
    })?;
    cluster.kubectl(&["taint", "node", lost, taint])?;
    wait_condition(cluster, VM, "Protected", "True", "StandbyFollows")?;
    cluster.node(lost)?.start()?;
    cluster.kubectl(&["taint", "node", lost, &format!("{taint}-")])?;
    cluster.wait_node_ready(lost)
}
