//! A FaultTolerantVM on a real cluster, through everything that happens to one. One client's one TCP connection lives through all of it.
mod boots;
mod drains;
mod small;

use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::install::NAMESPACE as SYSTEM;
use ftvm_e2e::cluster::{Cluster, Component, NodeProgram, Plugin, wait_for};
use ftvm_e2e::demo::cluster::acts::{Acts, wait_condition};
use ftvm_e2e::demo::cluster::looks::{self, wait_event};
use ftvm_e2e::demo::cluster::{NAMESPACE, Setting, VM, on_stage};
use ftvm_e2e::demo::rounds::Pair;
use ftvm_e2e::demo::{Fault, Options, place};
use ftvm_e2e::hosts::CutDirection;
use ftvm_e2e::lab::Network;
use ftvm_e2e::lab::binaries::Profile;
use ftvm_e2e::report::Progress;
use serde_json::{Value, json};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);
/// What the chart is upgraded to.
const NEXT_TAG: &str = "next";

#[test]
fn a_machine_lives_through_everything() -> anyhow::Result<()> {
    let options = Options {
        fault: Fault::None,
        // Each replaced seat leaves a volume behind, each `helm test` and each small machine two, and ten machines at once need twenty.
        rounds: 24,
        // A machine that is busy for a while must not count as dead: it is judged who takes over when.
        peer_lost_ms: Some(3_000),
        ..Options::default()
    };
    // Not while the machine runs.
    Plugin::build()?;
    let progress = Progress::new();
    let folder = place::new_folder("cluster-failover")?;
    let setting = Setting::new(Profile::Dev);
    on_stage(&options, setting, &folder, &progress, |stage, cluster| {
        let mut acts = Acts::new(stage, cluster, &progress);
        acts.act("kill -9 of the engine", killed_engine)?;
        acts.act("a failure is asked for", asked_failure)?;
        acts.act("a node's plug is pulled", killed_node)?;
        acts.act("only kubelet dies", killed_kubelet)?;
        acts.act("the node-daemons are replaced one by one", restarted_daemons)?;
        acts.act("the operator dies during a failover", killed_operator)?;
        acts.act("the active's node is drained", drains::active)?;
        acts.act("a person asks for a switchover", drains::asked)?;
        acts.act("the standby's node is drained", drains::standby)?;
        acts.act("both nodes are drained at once", drains::both)?;
        acts.act("the API server is away", absent_api_server)?;
        acts.act(
            "the API server is away, and the standby dies",
            absent_api_server_and_standby,
        )?;
        acts.act("both seats reach the API server, not each other", partition)?;
        acts.act("the Lease is deleted, then the engine killed", deleted_lease)?;
        acts.act("the chart is upgraded", upgraded_chart)?;
        acts.act("only two nodes are left", two_nodes)?;
        let Acts { stage, cluster, .. } = acts;
        let (report, books) = stage.end();
        ensure!(report.passed(), "{:?}", report.complaints);
        boots::again(&cluster, books.ledger.journal_seq(), &progress)?;
        small::deleted(&cluster, &progress)
    })
}

/// A merge patch of something in the machine's namespace.
fn patch(cluster: &Cluster, kind: &str, name: &str, change: &Value) -> anyhow::Result<()> {
    let change = change.to_string();
    let words = [
        "patch",
        kind,
        name,
        "--namespace",
        NAMESPACE,
        "--type=merge",
        "--patch",
        &change,
    ];
    cluster.kubectl(&words).map(drop)
}

fn killed_engine(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let pods = |acts: &Acts<'_>| -> anyhow::Result<Value> {
        let vm = acts.vm()?;
        let seats = vm["status"]["seats"].as_array().context("no book")?;
        Ok(seats.iter().map(|seat| seat["podUid"].clone()).collect())
    };
    let pods_before = pods(acts)?;
    let failover = last_failover(acts)?;
    ensure!(failover.is_null(), "nothing failed yet: {failover}");
    bold_pods_are_refused(&acts.cluster)?;
    looks::probes(&acts.cluster)?;
    let seats = looks::shows(acts, before)?;
    looks::console(&acts.cluster, &seats)?;
    acts.kill_engine(before.active)?;
    acts.standby_takes_over(before)?;
    let now = acts.stage.pair()?;
    ensure!(now.standby == before.active, "the engine came back elsewhere: {now:?}");
    ensure!(pods(acts)? == pods_before, "its pods were replaced");
    let swapped = looks::shows(acts, now)?;
    ensure!(
        swapped.active == seats.standby && swapped.standby == seats.active,
        "{seats:?} became {swapped:?}"
    );
    took_over(acts, &swapped.active)?;
    let (from, to) = (acts.node(before.active), acts.node(now.active));
    let words = format!("the guest runs on node {to}, before: {from}");
    wait_event(&acts.cluster, VM, "ActiveChanged", &words)?;
    let lost = looks::events(&acts.cluster, VM, "SeatLost")?;
    ensure!(lost.is_empty(), "an engine that comes back is no lost seat: {lost:?}");
    Ok(())
}

/// The seats' namespace takes no pod that asks for more than they do.
fn bold_pods_are_refused(cluster: &Cluster) -> anyhow::Result<()> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bold", "namespace": NAMESPACE},
        "spec": {"containers": [{"name": "main", "image": "lab.ftvm.dev/none:1"}]},
    });
    let refused = cluster.apply(&pod.to_string()).err().context("it was taken")?;
    let refused = format!("{refused:#}");
    ensure!(refused.contains("violates PodSecurity \"restricted:"), "{refused}");
    Ok(())
}

fn last_failover(acts: &Acts<'_>) -> anyhow::Result<Value> {
    Ok(acts.vm()?["status"]["lastFailover"].clone())
}

/// Status and event tell of a takeover by this seat, after one by another.
fn took_over(acts: &Acts<'_>, seat: &str) -> anyhow::Result<()> {
    let words = wait_for("the status tells of the failover", PATIENCE, || {
        let failover = last_failover(acts)?;
        let reason = failover["reason"].as_str().context("it does not")?;
        let gap_us = failover["gapMicroseconds"].as_u64().unwrap_or_default();
        ensure!(
            failover["seat"] == seat && reason.contains("lost") && gap_us > 0,
            "{failover}"
        );
        Ok(format!("seat {seat} took over ({reason}), gap {gap_us} µs"))
    })?;
    wait_event(&acts.cluster, VM, "TookOver", &words)
}

/// Asks for a failure of the active by annotation and waits for its outcome and the event; why it was refused, if it was.
fn ask_failure(acts: &Acts<'_>, text: &str, outcome: &str) -> anyhow::Result<String> {
    let annotation = format!("ftvm.dev/failover={text}");
    acts.cluster.kubectl(&[
        "annotate",
        "ftvm",
        VM,
        "--namespace",
        NAMESPACE,
        "--overwrite",
        &annotation,
    ])?;
    wait_for("the status tells what came of it", PATIENCE, || {
        let asked = acts.vm()?["status"]["failover"].clone();
        ensure!(asked["request"] == text && asked["outcome"] != "Pending", "{asked}");
        Ok(())
    })?;
    let asked = acts.vm()?["status"]["failover"].clone();
    ensure!(asked["outcome"] == outcome, "{asked}");
    wait_event(&acts.cluster, VM, &format!("Failover{outcome}"), text)?;
    Ok(asked["why"].as_str().unwrap_or_default().to_owned())
}

/// It is a crash like any other, and one text is one crash.
fn asked_failure(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let text = format!("on-{}", acts.node(before.active));
    ask_failure(acts, &text, "Done")?;
    acts.standby_takes_over(before)?;
    let now = acts.stage.pair()?;
    ensure!(now.standby == before.active, "the engine came back elsewhere: {now:?}");
    wait_for("the status tells of the failover", PATIENCE, || {
        let failover = acts.vm()?["status"]["lastFailover"].clone();
        ensure!(failover["node"] == acts.node(before.standby), "{failover}");
        Ok(())
    })?;
    // Who has the guest now was not asked to die.
    acts.holds_for(now, Duration::from_secs(5))
}

fn killed_node(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let node = acts.node(before.active);
    let seats = looks::shows(acts, before)?;
    acts.cluster.node(&node)?.kill()?;
    acts.standby_takes_over(before)?;
    let now = acts.stage.pair()?;
    ensure!(now.standby != before.active, "{now:?}");
    took_over(acts, &seats.standby)?;
    let lost = format!("seat {} on {node} is given up and replaced", seats.active);
    wait_event(&acts.cluster, VM, "SeatLost", &lost)?;
    acts.cluster.node(&node)?.start()?;
    acts.stage.system().make_spare(before.active)
}

fn killed_kubelet(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let node = acts.node(before.active);
    acts.cluster.node(&node)?.kill_program(NodeProgram::Kubelet)?;
    acts.cluster.wait_node_not_ready(&node)?;
    // Longer than a seat in trouble is borne.
    acts.holds_for(before, Duration::from_secs(15))?;
    acts.cluster.node(&node)?.start_program(NodeProgram::Kubelet)?;
    acts.cluster.wait_node_ready(&node)?;
    acts.nothing_changed(before)
}

fn rollout(cluster: &Cluster) -> anyhow::Result<()> {
    for kind in ["daemonset/ftvm-node-daemon", "deployment/ftvm-operator"] {
        cluster.kubectl(&["rollout", "status", kind, "--namespace", SYSTEM, "--timeout=180s"])?;
    }
    Ok(())
}

fn restarted_daemons(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let words = [
        "rollout",
        "restart",
        "daemonset/ftvm-node-daemon",
        "--namespace",
        SYSTEM,
    ];
    acts.cluster.kubectl(&words)?;
    rollout(&acts.cluster)?;
    acts.nothing_changed(before)
}

fn killed_operator(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let label = "--selector=app.kubernetes.io/name=ftvm-operator";
    let words = [
        "delete",
        "pod",
        "--namespace",
        SYSTEM,
        label,
        "--force",
        "--grace-period=0",
    ];
    let told = acts.cluster.kubectl(&words)?;
    ensure!(
        told.lines().filter(|line| line.contains("deleted")).count() == 2,
        "{told}"
    );
    acts.kill_engine(before.active)?;
    acts.standby_takes_over(before)?;
    rollout(&acts.cluster)
}

fn absent_api_server(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    acts.cluster.pause_component(Component::ApiServer)?;
    acts.holds_for(before, Duration::from_secs(30))?;
    acts.kill_engine(before.active)?;
    // Nobody may decide now: the standby waits, and so does the client.
    let early = acts.stage.taken_over_within(before, Duration::from_secs(5));
    ensure!(early.is_err(), "{early:?} without an arbiter");
    acts.cluster.resume_component(Component::ApiServer)?;
    acts.standby_takes_over(before).map(drop)
}

/// Who runs the guest does not go on alone before the record says so.
fn absent_api_server_and_standby(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    acts.cluster.pause_component(Component::ApiServer)?;
    acts.kill_engine(before.standby)?;
    let silent = acts.falls_silent(Duration::from_secs(5));
    acts.cluster.resume_component(Component::ApiServer)?;
    silent.context("with neither arbiter nor standby")?;
    let waited_ms = acts.stage.answers_go_on()?;
    acts.say(format_args!("the client waited {waited_ms:.1} ms"));
    let now = acts.stage.pair()?;
    ensure!(now.active == before.active, "{before:?} became {now:?}");
    Ok(())
}

fn partition(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let (active, standby) = (acts.node(before.active), acts.node(before.standby));
    let cluster = Rc::clone(&acts.cluster);
    let (active, standby) = (cluster.node(&active)?, cluster.node(&standby)?);
    cluster.cut_link(active, standby, Network::Management, CutDirection::Both)?;
    let (winner, _) = acts.stage.taken_over(before)?;
    ensure!([before.active, before.standby].contains(&winner), "host {winner} won");
    cluster.mend_links()
}

/// To an image with another name, and what the programs log. From here on guest images are copied into new pods.
fn upgraded_chart(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let cluster = Rc::clone(&acts.cluster);
    let daemons = cluster.get(&["daemonset", "ftvm-node-daemon", "--namespace", SYSTEM])?;
    let old = image(&daemons["spec"]["template"])?;
    let (repository, _) = old.rsplit_once(':').context("an image without a tag")?;
    let new = format!("{repository}:{NEXT_TAG}");
    for node in cluster.nodes() {
        let tag = ["images", "tag", old, &new];
        node.exec(&[&["/run/programs/ctr", "--namespace", "k8s.io"], &tag[..]].concat())?;
    }
    let tag = format!("image.tag={NEXT_TAG}");
    let others = "nodeDaemon.log=debug,operator.log=debug,imageVolumes=never";
    cluster.helm_install("upgrade", &["--set", &tag, "--set", others])?;
    rollout(&cluster)?;
    for (name, count) in [("ftvm-node-daemon", cluster.nodes().len()), ("ftvm-operator", 2)] {
        let selector = format!("--selector=app.kubernetes.io/name={name}");
        wait_for(&format!("every {name} is of the new image"), PATIENCE, || {
            let pods = cluster.get(&["pods", "--namespace", SYSTEM, &selector])?;
            let pods = pods["items"].as_array().context("no pods")?;
            let images = pods.iter().map(image).collect::<anyhow::Result<Vec<_>>>()?;
            ensure!(images == vec![new.as_str(); count], "{images:?}");
            Ok(())
        })?;
    }
    acts.nothing_changed(before)?;
    ensure!(copied(&cluster)? == 0, "pods that were there are other ones");
    Ok(())
}

/// What the one container of a pod, or of those that are made by a template, runs.
fn image(pod: &Value) -> anyhow::Result<&str> {
    pod["spec"]["containers"][0]["image"].as_str().context("no image")
}

/// How many pods of the machine got the guest image as a copy, instead of as an image volume.
fn copied(cluster: &Cluster) -> anyhow::Result<usize> {
    let pods = cluster.get(&[
        "pods",
        "--namespace",
        NAMESPACE,
        &format!("--selector=ftvm.dev/vm={VM}"),
    ])?;
    let pods = pods["items"].as_array().context("no list")?;
    let is_copied = |pod: &Value| {
        let volumes = pod["spec"]["volumes"].as_array().context("no volumes")?;
        let guest = volumes.iter().find(|volume| volume["name"] == "guest");
        let guest = guest.context("no volume with the guest")?;
        let ended = pod["status"]["initContainerStatuses"].as_array().map_or(0, |all| {
            all.iter()
                .filter(|one| one["state"]["terminated"]["exitCode"] == 0)
                .count()
        });
        let ways = (guest["image"].is_object(), guest["emptyDir"].is_object(), ended);
        ensure!([(true, false, 0), (false, true, 2)].contains(&ways), "{ways:?}: {pod}");
        Ok(guest["emptyDir"].is_object())
    };
    let ways = pods.iter().map(is_copied).collect::<anyhow::Result<Vec<bool>>>()?;
    Ok(ways.into_iter().filter(|way| *way).count())
}

/// Deletes a VM's Lease and waits until every seat goes by the one that the operator makes anew.
fn lease_comes_back(cluster: &Cluster, vm: &str) -> anyhow::Result<()> {
    let uid = || -> anyhow::Result<Value> {
        let lease = cluster.get(&["lease", vm, "--namespace", NAMESPACE])?;
        Ok(lease["metadata"]["uid"].clone())
    };
    let before = uid()?;
    cluster.kubectl(&["delete", "lease", vm, "--namespace", NAMESPACE])?;
    wait_for("the Lease is made anew", PATIENCE, || {
        let (now, vm) = (uid()?, cluster.get(&["ftvm", vm, "--namespace", NAMESPACE])?);
        ensure!(
            now != before && vm["status"]["leaseUid"] == now,
            "{before}, {now}, {}",
            vm["status"]
        );
        Ok(())
    })?;
    wait_event(cluster, vm, "LeaseRecreated", "made anew")?;
    wait_condition(cluster, vm, "ArbiterReachable", "True", "Reachable").map(drop)
}

fn deleted_lease(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    lease_comes_back(&acts.cluster, VM)?;
    // The new one has a term of its own.
    let now = acts.stage.pair()?;
    let hosts = |pair: Pair| (pair.active, pair.standby);
    ensure!(hosts(now) == hosts(before), "{before:?} became {now:?}");
    acts.stage.answers_go_on()?;
    acts.kill_engine(now.active)?;
    acts.standby_takes_over(now).map(drop)
}

fn two_nodes(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let third = (0..3).find(|host| ![before.active, before.standby].contains(host));
    let third = acts.node(third.context("no third node")?);
    acts.cluster.kubectl(&["cordon", &third])?;
    let node = acts.node(before.active);
    acts.cluster.node(&node)?.kill()?;
    acts.standby_takes_over(before)?;
    let said = acts.wait_condition("Protected", "False", "TooFewNodes")?;
    ensure!(said.contains("add a node"), "{said}");
    let why = ask_failure(acts, "alone", "Refused")?;
    ensure!(why.contains("not protected"), "{why}");
    acts.stage.answers_go_on()?;
    // Who is alone needs nobody's word for another Lease.
    lease_comes_back(&acts.cluster, VM)?;
    acts.stage.answers_go_on()?;
    acts.cluster.kubectl(&["uncordon", &third])?;
    acts.stage.pair()?;
    // Whoever is made after an upgrade is of its image.
    let of_vm = format!("--selector=ftvm.dev/vm={VM}");
    let there = format!("--field-selector=spec.nodeName={third}");
    let seat = acts.cluster.get(&["pods", "--namespace", NAMESPACE, &of_vm, &there])?;
    let made_of = image(&seat["items"][0])?;
    ensure!(made_of.ends_with(NEXT_TAG), "{made_of}");
    ensure!(copied(&acts.cluster)? == 1, "the new seat's guest image was not copied");
    acts.cluster.node(&node)?.start()?;
    acts.stage.system().make_spare(before.active)
}
