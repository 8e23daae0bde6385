//! VMs that can't be as their specs want it: each is told what to do, by a condition and an event, and none keeps the operator busy.

use std::time::Duration;

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::{Cluster, wait_for};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::{PATIENCE, condition, example, merge, patch_status, requests, wait_event, wait_reason};

/// (the VM, changes to it, reason, what condition and event say)
const SPECS: &[(&str, &str, &str, &str)] = &[
    (
        "unpulled",
        "boot: {image: {reference: 'lab.ftvm.dev/none:1'}}",
        "ImagePullFailed",
        "lab.ftvm.dev/none:1",
    ),
    (
        "large",
        "machine: {memory: 1Ti}",
        "InsufficientMemory",
        "no node has 1Ti and the engine's overhead free",
    ),
    (
        "elsewhere",
        "placement: {seats: [{nodeSelector: {rack: none}}, {nodeSelector: {rack: none}}]}",
        "Unschedulable",
        "no node with KVM has the labels rack=none",
    ),
];

/// The one node offers seats, although nobody is there who could run them; kubelet keeps that.
pub fn offer_seats(cluster: &Cluster) -> anyhow::Result<()> {
    let seats = json!({"ftvm.dev/seat": "4"});
    let offer = json!({"capacity": seats, "allocatable": seats});
    patch_status(cluster, "node", "n1", &offer)
}

/// A small VM that has the CPU of its node, for no daemon publishes any.
pub fn small(name: &str, class: &str) -> Value {
    let mut vm = example(name, Some(class));
    merge(
        &mut vm["spec"],
        &json!({"machine": {"memory": "64Mi", "cpuBaseline": "Host"}, "resources": {"cpuRequest": "20m"}}),
    );
    vm
}

/// Asks for what can't be.
pub fn apply(cluster: &Cluster) -> anyhow::Result<()> {
    SPECS.iter().try_for_each(|(name, change, _, _)| {
        let mut vm = small(name, "local");
        merge(&mut vm["spec"], &super::yaml(change));
        cluster.apply(&vm.to_string()).map(drop)
    })
}

/// It is told.
pub fn told(cluster: &Cluster) -> anyhow::Result<()> {
    for (name, _, reason, words) in SPECS {
        let advice = wait_reason(cluster, name, "Protected", reason)?;
        ensure!(advice.contains(words), "{name}: {advice}");
        wait_reason(cluster, name, "Ready", reason)?;
        wait_event(cluster, name, reason, words)?;
    }
    Ok(())
}

/// Waits until a VM has two pods, all of them in its book and none of them this one; returns the book.
fn wait_pods(cluster: &Cluster, vm: &str, gone: &Value) -> anyhow::Result<Value> {
    wait_for(&format!("both seats of {vm} have their pods"), PATIENCE, || {
        let pods = cluster.get(&["pods", &format!("--selector=ftvm.dev/vm={vm}")])?;
        let pods = pods["items"].as_array().context("no list")?;
        let uids: Vec<&Value> = pods.iter().map(|pod| &pod["metadata"]["uid"]).collect();
        let book = cluster.get(&["ftvm", vm])?["status"]["seats"].clone();
        let seats = book.as_array().context("no book")?;
        let admitted = seats.len() == 2 && seats.iter().all(|seat| uids.contains(&&seat["podUid"]));
        ensure!(uids.len() == 2 && admitted && !uids.contains(&gone), "{uids:?} {book}");
        Ok(book)
    })
}

/// What kubelet writes of a pod that it evicts: it will never run again, and another one takes its place.
pub fn evicted(cluster: &Cluster, vm: &str) -> anyhow::Result<()> {
    let book = wait_pods(cluster, vm, &Value::Null)?;
    let seat = book[0]["name"].as_str().context("no seat")?;
    let failed = json!({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."});
    patch_status(cluster, "pod", seat, &failed)?;
    wait_pods(cluster, vm, &book[0]["podUid"])?;
    wait_event(cluster, vm, "SeatFailed", "Evicted: The node was low on resource")
}

/// When the operator asked for the pod that the API server refused first: it asks for both at each attempt.
fn refusals(cluster: &Cluster) -> anyhow::Result<Vec<Timestamp>> {
    let events = cluster.audit_events()?.into_iter();
    let refused = events.filter(|event| {
        let pods = event
            .object_ref
            .as_ref()
            .is_some_and(|object| object.resource == "pods");
        let code = event.response_status.as_ref().and_then(|status| status.code);
        let ours = event.user_agent.starts_with("ftvm-operator");
        ours && event.verb == "create" && pods && code == Some(403)
    });
    let refused: Vec<_> = refused.collect();
    let of_first = refused.iter().filter(|event| event.object_ref == refused[0].object_ref);
    let times = of_first.map(|event| event.request_received_timestamp.parse::<Timestamp>());
    times.map(|time| time.context("no time")).collect()
}

/// What the API server refuses is told, tried again later and later, and no longer told once it is made.
pub fn refused(cluster: &Cluster) -> anyhow::Result<()> {
    let mut vm = small("refused", "local");
    vm["spec"]["placement"] = json!({"priorityClassName": "none"});
    let before = requests(cluster)?.len();
    cluster.apply(&vm.to_string())?;
    for kind in ["Protected", "Ready"] {
        let advice = wait_reason(cluster, "refused", kind, "ApiServerRefuses")?;
        for words in [
            "refuses Pod refused-",
            "in namespace default",
            "no PriorityClass with name none was found",
            "correct spec.placement.priorityClassName",
        ] {
            ensure!(advice.contains(words), "no `{words}` in {advice}");
        }
    }
    wait_event(
        cluster,
        "refused",
        "ApiServerRefuses",
        "no PriorityClass with name none",
    )?;
    let attempts = wait_for("it was tried three times", PATIENCE, || {
        let attempts = refusals(cluster)?;
        ensure!(attempts.len() >= 3, "{attempts:?}");
        Ok(attempts)
    })?;
    let after = requests(cluster)?;
    // 1, 2, 4, … seconds lie between them, three quarters of that at least, whatever else happens to the VM meanwhile.
    for (times, pair) in attempts.windows(2).enumerate() {
        let gap = Duration::try_from(pair[1].duration_since(pair[0]))?;
        ensure!(gap >= Duration::from_millis(750) * (1_u32 << times), "{attempts:?}");
    }
    // The first looks and each attempt read all that the VM has; making it is a dozen requests.
    let asked = &after[before..];
    ensure!(asked.len() <= 30 + 10 * attempts.len(), "{asked:?}");
    let book = cluster.get(&["ftvm", "refused"])?["status"]["seats"].clone();
    let class = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "none"}, "value": 1});
    cluster.apply(&class.to_string())?;
    let made = wait_pods(cluster, "refused", &Value::Null)?;
    for seat in [0, 1] {
        ensure!(
            made[seat]["name"] == book[seat]["name"],
            "other seats than {book}: {made}"
        );
    }
    wait_for("nothing is said of a refusal any more", PATIENCE, || {
        let vm = cluster.get(&["ftvm", "refused"])?;
        for kind in ["Protected", "Ready"] {
            let (reason, message) = condition(&vm, kind);
            ensure!(
                !reason.is_empty() && reason != "ApiServerRefuses",
                "{kind}: {reason}: {message}"
            );
        }
        Ok(())
    })?;
    cluster
        .kubectl(&["delete", "ftvm", "refused", "--timeout=180s"])
        .map(drop)
}
