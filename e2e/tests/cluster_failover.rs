//! A FaultTolerantVM on a real cluster, through everything that happens to one. One client's one TCP connection lives through all of it.
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use ftvm_crds::cpu::NodeCpu;
use ftvm_e2e::cluster::install::{GUEST_IMAGE, NAMESPACE as SYSTEM, RELEASE};
use ftvm_e2e::cluster::plan::CLIENT_BRIDGE;
use ftvm_e2e::cluster::{Cluster, Component, NodeProgram, wait_for};
use ftvm_e2e::demo::cluster::acts::{Acts, wait_condition};
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
/// Bridge of a node's pods (`e2e/cluster/cni.json`).
const POD_BRIDGE: &str = "cni0";

#[test]
fn a_machine_lives_through_everything() -> anyhow::Result<()> {
    let options = Options {
        fault: Fault::None,
        // Each replaced seat leaves a volume behind, each `helm test` and each small machine two, and ten machines at once need twenty.
        rounds: 20,
        // A machine that is busy for a while must not count as dead: it is judged who takes over when.
        peer_lost_ms: Some(1_500),
        ..Options::default()
    };
    let progress = Progress::new();
    let folder = place::new_folder("cluster-failover")?;
    let setting = Setting {
        profile: Profile::Dev,
        api_proxy: false,
    };
    on_stage(&options, setting, &folder, &progress, |stage, cluster| {
        let mut acts = Acts::new(stage, cluster, &progress);
        acts.act("kill -9 of the engine", killed_engine)?;
        acts.act("a failure is asked for", asked_failure)?;
        acts.act("a node's plug is pulled", killed_node)?;
        acts.act("only kubelet dies", killed_kubelet)?;
        acts.act("the node-daemons are replaced one by one", restarted_daemons)?;
        acts.act("the operator dies during a failover", killed_operator)?;
        acts.act("the active's node is drained", drained_node)?;
        acts.act("the API server is away", absent_api_server)?;
        acts.act("both seats reach the API server, not each other", partition)?;
        acts.act("the Lease is deleted, then the engine killed", deleted_lease)?;
        acts.act("the chart is upgraded", upgraded_chart)?;
        acts.act("only two nodes are left", two_nodes)?;
        let Acts { stage, cluster, .. } = acts;
        let (report, _) = stage.end();
        ensure!(report.passed(), "{:?}", report.complaints);
        deleted(&cluster)
    })
}

fn killed_engine(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let pods = |acts: &Acts<'_>| -> anyhow::Result<Value> {
        let vm = acts.vm()?;
        let seats = vm["status"]["seats"].as_array().context("no book")?;
        Ok(seats.iter().map(|seat| seat["podUid"].clone()).collect())
    };
    let pods_before = pods(acts)?;
    let failover = acts.vm()?["status"]["lastFailover"].clone();
    ensure!(failover.is_null(), "nothing failed yet: {failover}");
    acts.kill_engine(before.active)?;
    acts.standby_takes_over(before)?;
    let now = acts.stage.pair()?;
    wait_for("the status tells of the failover", PATIENCE, || {
        let failover = acts.vm()?["status"]["lastFailover"].clone();
        let reason = failover["reason"].as_str().context("it does not")?;
        ensure!(
            reason.contains("lost") && failover["gapMicroseconds"].as_u64() > Some(0),
            "{failover}"
        );
        Ok(())
    })?;
    ensure!(now.standby == before.active, "the engine came back elsewhere: {now:?}");
    ensure!(pods(acts)? == pods_before, "its pods were replaced");
    Ok(())
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
    let object = format!("involvedObject.name={VM},reason=Failover{outcome}");
    wait_for("an event tells it", PATIENCE, || {
        let told = acts
            .cluster
            .kubectl(&["get", "events", "--namespace", NAMESPACE, "--field-selector", &object])?;
        ensure!(told.contains(text), "{told}");
        Ok(())
    })?;
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
    acts.cluster.node(&node)?.kill()?;
    acts.standby_takes_over(before)?;
    let now = acts.stage.pair()?;
    ensure!(now.standby != before.active, "{now:?}");
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

fn drained_node(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    acts.stage.system().hand_over(before.active)?;
    acts.standby_takes_over(before)?;
    let now = acts.stage.pair()?;
    ensure!(now.standby != before.active, "{now:?}");
    acts.stage.system().make_spare(before.active)
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

fn partition(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let (active, standby) = (acts.node(before.active), acts.node(before.standby));
    let cluster = Rc::clone(&acts.cluster);
    let (active, standby) = (cluster.node(&active)?, cluster.node(&standby)?);
    cluster.cut_link(active, standby, Network::Management, CutDirection::Both)?;
    let (winner, _) = acts.stage.taken_over(before)?;
    ensure!([before.active, before.standby].contains(&winner), "host {winner} won");
    cluster.mend_links()
}

fn upgraded_chart(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    // From here on guest images are copied into new pods.
    let values = "nodeDaemon.log=debug,operator.log=debug,imageVolumes=never";
    let values = ["--set", values];
    acts.cluster.helm_install("upgrade", &values)?;
    rollout(&acts.cluster)?;
    acts.nothing_changed(before)?;
    ensure!(copied(&acts.cluster)? == 0, "pods that were there are other ones");
    Ok(())
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
    let object = format!("involvedObject.name={vm},reason=LeaseRecreated");
    wait_for("an event tells it", PATIENCE, || {
        let told = cluster.kubectl(&["get", "events", "--namespace", NAMESPACE, "--field-selector", &object])?;
        ensure!(told.contains("made anew"), "{told}");
        Ok(())
    })?;
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
    ensure!(copied(&acts.cluster)? == 1, "the new seat's guest image was not copied");
    acts.cluster.node(&node)?.start()?;
    acts.stage.system().make_spare(before.active)
}

fn deleted(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["delete", "ftvm", VM, "--namespace", NAMESPACE, "--timeout=120s"])?;
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
    missing_image(cluster)?;
    forbidden_bridge(cluster)?;
    strange_lease(cluster)?;
    helm_test(cluster)?;
    ten_at_once(cluster)?;
    common_cpu(cluster)
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
    cluster.kubectl(&["delete", "ftvm", "less", "--namespace", NAMESPACE, "--timeout=120s"])?;
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
    cluster.kubectl(&["delete", "ftvm", "none", "--namespace", NAMESPACE, "--timeout=120s"])?;
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
    cluster.kubectl(&["delete", "ftvm", "nosy", "--namespace", NAMESPACE, "--timeout=120s"])?;
    Ok(())
}

/// The Lease is edited, and deleted, by hand: it is said what to do, the pair goes on, and what can be made anew is.
fn strange_lease(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(&small("edited", GUEST_IMAGE).to_string())?;
    wait_condition(cluster, "edited", "Protected", "True", "StandbyFollows")?;
    let record = |text: &str| {
        let patch = json!({"metadata": {"annotations": {"ftvm.dev/record": text}}}).to_string();
        let words = [
            "patch",
            "lease",
            "edited",
            "--namespace",
            NAMESPACE,
            "--type=merge",
            "--patch",
            &patch,
        ];
        cluster.kubectl(&words).map(drop)
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
    cluster.kubectl(&["delete", "ftvm", "edited", "--namespace", NAMESPACE, "--timeout=120s"])?;
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
    std::thread::sleep(Duration::from_secs(25));
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
    let test = |guest: &str, seconds: u32| -> anyhow::Result<String> {
        // As by default, after what the upgrade said.
        let bridge = format!("imageVolumes=auto,test.bridge={CLIENT_BRIDGE},test.timeoutSeconds={seconds}");
        let guest = format!("test.guestImage={guest},test.memory=32Mi,test.storageClassName=local");
        cluster.helm_install("upgrade", &["--reuse-values", "--set", &guest, "--set", &bridge])?;
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
    let Err(error) = test("lab.ftvm.dev/none:1", 20) else {
        bail!("helm test passed with a guest image that nobody has");
    };
    let told = format!("{error:#}");
    for words in [
        "error: waiting until the VM is protected: not so",
        "Protected is False (ImagePullFailed)",
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
