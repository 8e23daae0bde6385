//! What is looked at once the machine is gone: others that lack something, `helm test`, many at once, and the end of the release.
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ftvm_crds::cpu::NodeCpu;
use ftvm_e2e::cluster::install::{GUEST_IMAGE, NAMESPACE as SYSTEM, RELEASE};
use ftvm_e2e::cluster::plan::CLIENT_BRIDGE;
use ftvm_e2e::cluster::{Cluster, wait_for};
use ftvm_e2e::demo::cluster::acts::wait_condition;
use ftvm_e2e::demo::cluster::looks::{self, wait_event};
use ftvm_e2e::demo::cluster::{NAMESPACE, VM};
use ftvm_e2e::report::Progress;
use serde_json::{Value, json};

use crate::{NEXT_TAG, PATIENCE, lease_comes_back, patch, rollout};

/// Bridge of a node's pods (`e2e/cluster/cni.json`).
const POD_BRIDGE: &str = "cni0";
/// The node-daemons.
const DAEMONS: &str = "--selector=app.kubernetes.io/name=ftvm-node-daemon";
/// Longer than two reports of a kubelet on its node take (`Options::node_grace`).
const TWO_REPORTS: Duration = Duration::from_secs(6);

/// Deletes the machine; then all of the above.
pub fn deleted(cluster: &Cluster, progress: &Progress) -> anyhow::Result<()> {
    cluster.kubectl(&["delete", "ftvm", VM, "--namespace", NAMESPACE, "--timeout=180s"])?;
    wait_for("nothing is left of the machine", PATIENCE, || {
        let kinds = "pods,pvc,leases,secrets,pdb,networkpolicies";
        let words = [
            "get",
            kinds,
            "--namespace",
            NAMESPACE,
            "--selector=ftvm.dev/vm",
            "--output=name",
        ];
        let left = cluster.kubectl(&words)?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })?;
    for node in cluster.nodes() {
        let (engines, _) = node.kill_processes("ftvm-engine")?;
        ensure!(engines == 0, "an engine ran on {}", node.name());
    }
    let look = |name: &'static str, look: fn(&Cluster) -> anyhow::Result<()>| {
        let begin = Instant::now();
        look(cluster).context(name)?;
        progress.good(format!("{name}: {:.0} s", begin.elapsed().as_secs_f64()));
        anyhow::Ok(())
    };
    look("an image that nobody can pull", missing_image)?;
    look("nodes whose KVM is none", |cluster| no_kvm(cluster, "edited"))?;
    look("a Lease that people edit and delete", strange_lease)?;
    look("helm test", helm_test)?;
    look("ten machines at once", ten_at_once)?;
    look("a CPU with less is away", common_cpu)?;
    look("helm uninstall", uninstalled)
}

/// A node that has less than the others is away: nobody knows when it comes back, so no guest is given what it lacks. (What the guest
/// sees can't be asked here: KVM without hardware behind it does not intercept CPUID.)
fn common_cpu(cluster: &Cluster) -> anyhow::Result<()> {
    let real = cluster.get(&["node", &cluster.nodes()[0].name()])?;
    let value = |of: &str| {
        real["metadata"][of]["ftvm.dev/cpu"]
            .as_str()
            .context("nothing published")
    };
    let mut cpu = NodeCpu::read(value("annotations")?, Some(value("labels")?))?;
    let leaf = cpu
        .baseline
        .leaves
        .iter_mut()
        .find(|leaf| (leaf.leaf, leaf.subleaf) == (7, 0));
    let registers = &mut leaf.context("no leaf 7")?.registers;
    let [_, all, ..] = *registers;
    // adx, smap, erms, bmi2, bmi1, clwb, clflushopt: whichever this machine's KVM gives.
    let bit = [19, 20, 9, 8, 3, 24, 23].into_iter().find(|bit| all & (1 << bit) != 0);
    registers[1] = all & !(1 << bit.context("this machine has nothing to leave out")?);
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "away", "labels": {"ftvm.dev/cpu": cpu.label()}, "annotations": {"ftvm.dev/cpu": cpu.annotation()}},
    });
    cluster.apply(&node.to_string())?;
    let offer =
        json!({"status": {"allocatable": {"ftvm.dev/seat": "1"}, "capacity": {"ftvm.dev/seat": "1"}}}).to_string();
    cluster.kubectl(&[
        "patch",
        "node",
        "away",
        "--subresource=status",
        "--type=merge",
        "--patch",
        &offer,
    ])?;
    cluster.apply(&small("less", GUEST_IMAGE).to_string())?;
    wait_condition(cluster, "less", "Protected", "True", "StandbyFollows")?;
    let said = wait_condition(cluster, "less", "CpuChosen", "True", "Common")?;
    ensure!(said.contains("common to 4 nodes"), "{said}");
    let vm = cluster.get(&["ftvm", "--namespace", NAMESPACE, "less"])?;
    ensure!(
        vm["status"]["cpu"]["baseline"] == json!(cpu.baseline.to_text()),
        "{}",
        vm["status"]
    );
    cluster.kubectl(&["delete", "ftvm", "less", "--namespace", NAMESPACE, "--timeout=180s"])?;
    cluster.kubectl(&["delete", "node", "away"])?;
    Ok(())
}

/// A small machine that nobody asks anything.
fn small(name: &str, image: &str) -> Value {
    json!({
        "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM", "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "machine": {"memory": "32Mi"},
            "boot": {"image": {"reference": image, "pullPolicy": "Never"}},
            "disks": [{"name": "root", "size": "8Mi", "storageClassName": "local"}],
            "networks": [{"name": "front", "bridge": {"name": CLIENT_BRIDGE}}],
            "resources": {"cpuRequest": "20m", "memoryOverhead": "256Mi"},
            // Twenty engines share this machine's processors.
            "faultTolerance": {"interval": {"minMs": 100, "maxMs": 500}, "detectionMs": 3000},
        },
    })
}

/// What nobody can pull is said, and nothing hot-loops.
fn missing_image(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(&small("none", "lab.ftvm.dev/none:1").to_string())?;
    let said = wait_condition(cluster, "none", "Protected", "False", "ImagePullFailed")?;
    ensure!(said.contains("correct spec.boot.image"), "{said}");
    wait_event(cluster, "none", "ImagePullFailed", "correct spec.boot.image")?;
    looks::operator_rests(cluster)?;
    cluster.kubectl(&["delete", "ftvm", "none", "--namespace", NAMESPACE, "--timeout=180s"])?;
    Ok(())
}

/// A machine that names one of the nodes' other networks is told why it does not start, and none of its taps is there. The bridge of the pods is on
/// every node that has one.
fn forbidden_bridge(cluster: &Cluster) -> anyhow::Result<()> {
    let mut vm = small("nosy", GUEST_IMAGE);
    vm["spec"]["networks"][0]["bridge"]["name"] = json!(POD_BRIDGE);
    cluster.apply(&vm.to_string())?;
    let said = wait_condition(cluster, "nosy", "Ready", "False", "SeatNeedsHelp")?;
    let words = format!("may not be connected to the bridge {POD_BRIDGE} (allowed: {CLIENT_BRIDGE})");
    ensure!(
        said.contains(&words) && said.contains("nodeDaemon.allowedBridges"),
        "{said}"
    );
    wait_for("an event tells it", PATIENCE, || {
        let events = cluster.get(&["events.events.k8s.io", "--namespace", NAMESPACE])?;
        let mut notes = events["items"].as_array().context("no events")?.iter();
        let told = notes.any(|event| event["note"].as_str().is_some_and(|note| note.contains(&words)));
        ensure!(told, "{events}");
        Ok(())
    })?;
    for node in cluster.nodes() {
        // Pods may be on it, taps of guests may not.
        let taps = node.exec(&["ip", "--json", "link", "show", "type", "tun", "master", POD_BRIDGE])?;
        let taps = String::from_utf8_lossy(&taps).trim().to_owned();
        ensure!(
            ["", "[]"].contains(&taps.as_str()),
            "on {POD_BRIDGE} of {}: {taps}",
            node.name()
        );
    }
    cluster.kubectl(&["delete", "ftvm", "nosy", "--namespace", NAMESPACE, "--timeout=180s"])?;
    Ok(())
}

/// Nodes have daemons, and a KVM that is none: they offer no seats, and a machine is told why it does not start. It does
/// once KVM works, and stays.
fn no_kvm(cluster: &Cluster, vm: &str) -> anyhow::Result<()> {
    for node in cluster.nodes() {
        node.exec(&["mount", "--bind", "/dev/null", "/dev/kvm"])?;
    }
    renew_daemons(cluster)?;
    wait_for("the daemons know, and kubelet knows them", PATIENCE, || {
        let pods = cluster.kubectl(&["get", "pods", "--namespace", SYSTEM, DAEMONS, "--output=name"])?;
        ensure!(pods.lines().count() == cluster.nodes().len(), "{pods}");
        for pod in pods.lines() {
            let log = cluster.kubectl(&["logs", "--namespace", SYSTEM, pod])?;
            for words in ["no new seats are placed here", "registered ftvm.dev/seat with kubelet"] {
                ensure!(log.contains(words), "no {words:?} in the log of {pod}: {log}");
            }
        }
        Ok(())
    })?;
    cluster.apply(&small(vm, GUEST_IMAGE).to_string())?;
    let said = wait_condition(cluster, vm, "Protected", "False", "NoKvmNode")?;
    ensure!(said.contains("nodes need /dev/kvm"), "{said}");
    // A plugin that is away has no seats either: those that are healthy would come with a kubelet's next report.
    let end = Instant::now() + TWO_REPORTS;
    while Instant::now() < end {
        let seats = "--output=jsonpath={.items[*].status.allocatable.ftvm\\.dev/seat}";
        let offered = cluster.kubectl(&["get", "nodes", seats])?;
        ensure!(offered.split(' ').eq(vec!["0"; cluster.nodes().len()]), "{offered}");
        std::thread::sleep(Duration::from_millis(500));
    }
    for node in cluster.nodes() {
        node.exec(&["umount", "/dev/kvm"])?;
    }
    renew_daemons(cluster)?;
    wait_for("KVM works", PATIENCE, || {
        let works = looks::kvm_works(cluster)?;
        ensure!(works.iter().all(|works| *works), "{works:?}");
        Ok(())
    })?;
    wait_condition(cluster, vm, "Protected", "True", "StandbyFollows").map(drop)
}

/// The DaemonSet makes new ones, which see the node as it is now.
fn renew_daemons(cluster: &Cluster) -> anyhow::Result<()> {
    cluster
        .kubectl(&["delete", "pods", "--namespace", SYSTEM, DAEMONS])
        .map(drop)
}

/// The Lease is edited, and deleted, by hand: it is said what to do, the pair goes on, and what can be made anew is.
fn strange_lease(cluster: &Cluster) -> anyhow::Result<()> {
    wait_condition(cluster, "edited", "Protected", "True", "StandbyFollows")?;
    let record = |text: &str| {
        let change = json!({"metadata": {"annotations": {"ftvm.dev/record": text}}});
        patch(cluster, "lease", "edited", &change)
    };
    let lease = cluster.get(&["lease", "edited", "--namespace", NAMESPACE])?;
    let good = lease["metadata"]["annotations"]["ftvm.dev/record"]
        .as_str()
        .context("no record")?;
    record("{}")?;
    let said = wait_condition(cluster, "edited", "ArbiterReachable", "False", "LeaseUnusable")?;
    ensure!(
        said.contains("put its former value back, or delete the Lease"),
        "{said}"
    );
    record(good)?;
    wait_condition(cluster, "edited", "ArbiterReachable", "True", "Reachable")?;
    wait_condition(cluster, "edited", "Protected", "True", "StandbyFollows")?;
    record("{}")?;
    lease_comes_back(cluster, "edited")?;
    wait_condition(cluster, "edited", "Protected", "True", "StandbyFollows")?;
    lease_goes_with_its_holder(cluster)?;
    cluster.kubectl(&["delete", "ftvm", "edited", "--namespace", NAMESPACE, "--timeout=180s"])?;
    Ok(())
}

/// The active dies with the Lease: nobody may decide, until a person puts a copy of the Lease back as documented.
fn lease_goes_with_its_holder(cluster: &Cluster) -> anyhow::Result<()> {
    let get = |kind: &str| cluster.get(&[kind, "edited", "--namespace", NAMESPACE]);
    let (mut copy, vm) = (get("lease")?, get("ftvm")?);
    let active = vm["status"]["active"].as_str().context("nobody is active")?;
    cluster.kubectl(&["delete", "lease", "edited", "--namespace", NAMESPACE])?;
    // The only machine there is.
    let (killed, _) = cluster.node(active)?.kill_processes("ftvm-engine")?;
    ensure!(killed == 1, "{killed} engines ran on {active}");
    let said = wait_condition(cluster, "edited", "ArbiterReachable", "False", "LeaseGone")?;
    ensure!(said.contains("put a copy of the Lease back"), "{said}");
    let long_enough = Instant::now() + Duration::from_secs(25);
    // Another machine, which the operator has to do with meanwhile.
    forbidden_bridge(cluster).context("a bridge that is not for guests")?;
    std::thread::sleep(long_enough.saturating_duration_since(Instant::now()));
    ensure!(get("lease").is_err(), "made anew although its holder is dead");
    let metadata = copy["metadata"].as_object_mut().context("no metadata")?;
    for key in ["uid", "resourceVersion", "creationTimestamp", "managedFields"] {
        metadata.remove(key);
    }
    let text = copy["metadata"]["annotations"]["ftvm.dev/record"].as_str();
    let mut record: Value = serde_json::from_str(text.context("no record")?)?;
    record["predecessor"] = vm["status"]["leaseUid"].clone();
    copy["metadata"]["annotations"]["ftvm.dev/record"] = json!(record.to_string());
    cluster.apply(&copy.to_string())?;
    wait_for("the standby takes over", PATIENCE, || {
        let now = get("ftvm")?;
        let other = now["status"]["active"].as_str().is_some_and(|now| now != active);
        ensure!(other, "{}", now["status"]);
        Ok(())
    })?;
    wait_condition(cluster, "edited", "Protected", "True", "StandbyFollows").map(drop)
}

/// `helm test` fails a machine over, by a failure and as planned; with a guest that nobody can pull it fails itself and says so. Either way nothing is left behind.
fn helm_test(cluster: &Cluster) -> anyhow::Result<()> {
    const MISSING: &str = "Protected is False (ImagePullFailed)";
    let test = |guest: &str, seconds: u32| -> anyhow::Result<String> {
        // As by default, after what the upgrade said.
        let bridge = format!("imageVolumes=auto,test.bridge={CLIENT_BRIDGE},test.timeoutSeconds={seconds}");
        let guest = format!("test.guestImage={guest},test.memory=32Mi,test.storageClassName=local");
        let tag = format!("image.tag={NEXT_TAG}");
        let values = ["--reuse-values", "--set", &tag, "--set", &guest, "--set", &bridge];
        cluster.helm_install("upgrade", &values)?;
        // What the pod said is part of what Helm says.
        let told = cluster.helm(&["test", RELEASE, "--namespace", SYSTEM, "--logs", "--timeout", "300s"]);
        let kinds = "ftvm,serviceaccounts,roles,rolebindings";
        let left = cluster.kubectl(&["get", kinds, "--namespace", SYSTEM, "--output=name"])?;
        let left: Vec<&str> = left.lines().filter(|name| name.ends_with("-test")).collect();
        ensure!(left.is_empty(), "{left:?} was left behind; {told:?}");
        told
    };
    let told = test(GUEST_IMAGE, 180)?;
    for words in [
        "] protected: active on node",
        "] failed over and protected again: active on node",
        "] switched over and protected again: active on node",
        "] passed",
    ] {
        ensure!(told.contains(words), "no {words:?} in what it said: {told}");
    }
    // It waits for all of its time. A machine this busy may need more of it until an image is known to be missing.
    let mut told = String::new();
    for seconds in [20, 60, 180] {
        let Err(error) = test("lab.ftvm.dev/none:1", seconds) else {
            bail!("helm test passed with a guest image that nobody has");
        };
        told = format!("{error:#}");
        if told.contains(MISSING) {
            break;
        }
    }
    for words in [
        "error: waiting until the VM is protected: not so",
        MISSING,
        "] the VM is gone",
    ] {
        ensure!(told.contains(words), "no {words:?} in what it said: {told}");
    }
    Ok(())
}

fn ten_at_once(cluster: &Cluster) -> anyhow::Result<()> {
    let names: Vec<String> = (0..10).map(|number| format!("many-{number}")).collect();
    let items: Vec<Value> = names.iter().map(|name| small(name, GUEST_IMAGE)).collect();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string())?;
    for name in &names {
        wait_condition(cluster, name, "Protected", "True", "StandbyFollows")?;
    }
    cluster.kubectl(&["delete", "ftvm", "--all", "--namespace", NAMESPACE, "--timeout=180s"])?;
    Ok(())
}

/// The release stays while a machine is left, though it be halted, and says which. Nothing is changed by that but what Helm has written down of the
/// release, and that is mended as people are told. Without machines it goes.
fn uninstalled(cluster: &Cluster) -> anyhow::Result<()> {
    let mut kept = small("kept", GUEST_IMAGE);
    kept["spec"]["runStrategy"] = json!("Halted");
    cluster.apply(&kept.to_string())?;
    let uninstall = || cluster.helm(&["uninstall", RELEASE, "--namespace", SYSTEM, "--timeout", "180s"]);
    let Err(error) = uninstall() else {
        bail!("the release went while there was a machine");
    };
    let told = format!("{error:#}");
    let log = cluster.kubectl(&["logs", "job/ftvm-uninstall", "--namespace", SYSTEM])?;
    let words = format!("not uninstalled because of 1 FaultTolerantVM: {NAMESPACE}/kept");
    ensure!(told.contains(&words), "no {words:?} in what Helm said: {told}");
    ensure!(log.contains(&words), "no {words:?} in the log: {log}");
    let job = "--selector=job-name=ftvm-uninstall";
    let pods = cluster.get(&["pods", "--namespace", SYSTEM, job])?;
    let ended = &pods["items"][0]["status"]["containerStatuses"][0]["state"]["terminated"];
    ensure!(ended["exitCode"] == 26, "{pods}");
    rollout(cluster)?;
    let rights = ["get", "clusterroles,clusterrolebindings", "--output=name"];
    let rights = cluster.kubectl(&rights)?;
    ensure!(!rights.contains("ftvm-uninstall"), "{rights}");
    goes_on(cluster, &log)?;
    cluster.kubectl(&["delete", "ftvm", "kept", "--namespace", NAMESPACE, "--timeout=180s"])?;
    uninstall()?;
    let kinds = [
        "deployments,daemonsets,jobs,serviceaccounts,networkpolicies",
        "clusterroles,clusterrolebindings,validatingadmissionpolicies",
    ];
    let kinds = kinds.join(",");
    let of_release = format!("--selector=app.kubernetes.io/instance={RELEASE}");
    wait_for("nothing is left of the release", PATIENCE, || {
        let left = cluster.kubectl(&["get", &kinds, "--namespace", SYSTEM, &of_release, "--output=name"])?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })?;
    cluster.kubectl(&["get", "crd", "faulttolerantvms.ftvm.dev"]).map(drop)
}

/// A release that is to be kept is upgraded again once Helm was told what the hook's log says.
fn goes_on(cluster: &Cluster, log: &str) -> anyhow::Result<()> {
    let tag = format!("image.tag={NEXT_TAG}");
    let upgrade = || cluster.helm_install("upgrade", &["--reuse-values", "--set", &tag, "--dry-run=server"]);
    let Err(error) = upgrade() else {
        bail!("Helm upgrades what it calls uninstalling: no rollback is needed any more");
    };
    let told = format!("{error:#}");
    ensure!(told.contains("has no deployed releases"), "{told}");
    let mut commands = log.split('`');
    let rollback = commands.find(|words| words.starts_with("helm rollback "));
    let rollback = rollback.context("no word of a rollback")?;
    let words: Vec<&str> = rollback.split(' ').skip(1).collect();
    cluster.helm(&words)?;
    upgrade()
}
