//! The resource and the operator at a real API server. No node offers seats here: what daemons do is tested elsewhere.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::{Cluster, Options, leadership, wait_for};
use serde_json::{Value, json};

mod cpus;
mod newer;
mod plugin;
mod refused;
mod rest;
mod troubles;
mod zones;

use rest::{requests, rests, rests_beside};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);
const DEFINITION: &str = include_str!("../../crds/ftvm.dev_faulttolerantvms.yaml");
const EXAMPLE: &str = include_str!("../../docs/examples/web.yaml");
const IMPORT: &str = include_str!("../../docs/examples/import.yaml");

fn yaml(text: &str) -> Value {
    ftvm_crds::yaml::read(text).expect("YAML")
}

/// The example under another name, its disk of this class.
fn example(name: &str, class: Option<&str>) -> Value {
    let mut vm = yaml(EXAMPLE);
    vm["metadata"]["name"] = json!(name);
    if let Some(class) = class {
        vm["spec"]["disks"][0]["storageClassName"] = json!(class);
    }
    vm
}

/// RFC 7396.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, change) in changes {
        if change.is_null() {
            into.as_object_mut().expect("an object").remove(key);
        } else {
            merge(&mut into[key], change);
        }
    }
}

fn cluster() -> anyhow::Result<Cluster> {
    defined(Options {
        nodes: 1,
        audit: true,
        ..Options::default()
    })
}

/// A cluster that knows the resource.
fn defined(options: Options) -> anyhow::Result<Cluster> {
    let cluster = Cluster::start(options)?;
    cluster.apply(DEFINITION)?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd/faulttolerantvms.ftvm.dev",
        "--timeout=180s",
    ])?;
    Ok(cluster)
}

fn write(cluster: &Cluster, name: &str, object: &Value) -> anyhow::Result<String> {
    let path = cluster.folder().join(name);
    std::fs::write(&path, object.to_string())?;
    Ok(path.display().to_string())
}

fn run_strategy(cluster: &Cluster, strategy: &str) -> anyhow::Result<()> {
    let patch = json!({"spec": {"runStrategy": strategy}}).to_string();
    cluster.kubectl(&["patch", "ftvm", "web", "--type=merge", "-p", &patch])?;
    Ok(())
}

/// What an operator or a kubelet would write.
fn patch_status(cluster: &Cluster, kind: &str, name: &str, status: &Value) -> anyhow::Result<()> {
    let patch = json!({"status": status}).to_string();
    let words = [
        "patch",
        kind,
        name,
        "--subresource=status",
        "--type=merge",
        "--patch",
        &patch,
    ];
    cluster.kubectl(&words).map(drop)
}

/// Says so if the message is missing, or nothing is refused.
fn expect_refusal(answer: anyhow::Result<String>, change: &str, message: &str) -> Option<String> {
    match answer {
        Ok(_) => Some(format!("{change}: accepted")),
        Err(error) if format!("{error:#}").contains(message) => None,
        Err(error) => Some(format!("{change}: `{message}` expected: {error:#}")),
    }
}

#[test]
fn every_rule_refuses_its_example_and_says_what_to_write() -> anyhow::Result<()> {
    let cluster = defined(Options {
        nodes: 0,
        ..Options::default()
    })?;
    let mut wrong = Vec::new();
    for (change, message) in refused::AT_CREATION {
        let mut object = yaml(EXAMPLE);
        merge(&mut object, &yaml(change));
        let file = write(&cluster, "refused.json", &object)?;
        wrong.extend(expect_refusal(
            cluster.kubectl(&["create", "-f", &file]),
            change,
            message,
        ));
    }
    cluster.apply(EXAMPLE)?;
    cluster.apply(IMPORT)?;
    let patch = |change: &str| {
        let text = yaml(change).to_string();
        cluster.kubectl(&["patch", "ftvm", "web", "--type=merge", "--dry-run=server", "-p", &text])
    };
    for (change, message) in refused::AFTERWARDS {
        wrong.extend(expect_refusal(patch(change), change, message));
    }
    for change in refused::ACCEPTED {
        wrong.extend(patch(change).err().map(|error| format!("{change}: {error:#}")));
    }
    assert_eq!(wrong, Vec::<String>::new());
    // Every rule has an example.
    let examples = || refused::AT_CREATION.iter().chain(refused::AFTERWARDS);
    let untried = ftvm_crds::messages()
        .into_iter()
        .filter(|rule| !examples().any(|(_, message)| rule.contains(message)));
    assert_eq!(untried.collect::<Vec<_>>(), Vec::<String>::new());
    // Halted, machine, boot and networks may change.
    run_strategy(&cluster, "Halted")?;
    let before_it_has_stopped = "spec: {machine: {memory: 1Gi}}";
    let rule = "spec.machine changes only while the VM is halted";
    let accepted = expect_refusal(patch(before_it_has_stopped), before_it_has_stopped, rule);
    assert_eq!(accepted, None);
    let halted = json!({"phase": "Halted", "seats": [], "conditions": []});
    patch_status(&cluster, "ftvm", "web", &halted)?;
    patch("spec: {machine: {memory: 1Gi, vcpus: 2}, boot: {cmdline: quiet}}")?;
    patch("spec: {networks: [{name: front, bridge: {name: br1}}]}")?;
    let other_disk = "spec: {machine: {memory: 1Gi}, disks: [{name: other, size: 1Gi}]}";
    let accepted = expect_refusal(patch(other_disk), other_disk, "spec.disks: names and order are fixed");
    assert_eq!(accepted, None);
    let explained = cluster.kubectl(&["explain", "ftvm.spec.faultTolerance.replaceAfterSeconds"])?;
    assert!(explained.contains("is replaced on another node"), "{explained}");
    let explained = cluster.kubectl(&["explain", "ftvm.spec.disks.source.format"])?;
    // kubectl breaks lines.
    let explained = explained.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        explained.contains("neither a backing file nor an external data file"),
        "{explained}"
    );
    columns(&cluster)
}

/// What `kubectl get ftvm` shows of a VM, and with `--output=wide`.
fn columns(cluster: &Cluster) -> anyhow::Result<()> {
    let protected = json!({
        "type": "Protected", "status": "True", "reason": "StandbyFollows", "message": "", "lastTransitionTime": "2026-01-02T03:04:05Z",
    });
    let status = json!({
        "phase": "Running", "active": "n1", "standby": "n2", "mode": "Checkpoint", "term": 7, "intervalMs": 20, "lagMs": 3,
        "conditions": [protected], "seats": [],
    });
    patch_status(cluster, "ftvm", "web", &status)?;
    let shown = |more: &[&str]| {
        let text = cluster.kubectl(&[&["get", "ftvm", "web"], more].concat())?;
        let lines = text
            .lines()
            .map(|line| line.split_whitespace().map(str::to_owned).collect());
        anyhow::Ok(lines.collect::<Vec<Vec<String>>>())
    };
    let names = ["NAME", "STATUS", "PROTECTED", "ACTIVE", "STANDBY", "MODE", "AGE"];
    let values = ["web", "Running", "True", "n1", "n2", "Checkpoint"];
    let narrow = shown(&[])?;
    ensure!(
        narrow.len() == 2 && narrow[0] == names && narrow[1].starts_with(&values.map(str::to_owned)),
        "{narrow:?}"
    );
    let wide = shown(&["--output=wide"])?;
    ensure!(
        wide.len() == 2 && wide[0] == [&names[..], &["TERM", "INTERVAL", "LAG"]].concat(),
        "{wide:?}"
    );
    let (row, age) = (&wide[1], names.len() - 1);
    ensure!(row[..age] == values && row[age + 1..] == ["7", "20", "3"], "{wide:?}");
    Ok(())
}

struct Operator(Child);

impl Operator {
    fn start(cluster: &Cluster, replica: &str) -> anyhow::Result<Operator> {
        Self::start_with(cluster, replica, &[])
    }

    fn start_with(cluster: &Cluster, replica: &str, more: &[&str]) -> anyhow::Result<Operator> {
        let log = std::fs::File::create(cluster.folder().join("log").join(format!("{replica}.log")))?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_ftvm-operator"));
        command
            .args(["run", "--seat-image", "localhost/seat:test", "--listen", "127.0.0.1:0"])
            .args(more)
            .env("KUBECONFIG", cluster.admin_kubeconfig())
            .envs([("POD_NAME", replica), ("POD_NAMESPACE", "ftvm-system")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(Operator(cluster.sandbox().spawn(command)?))
    }

    fn kill(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.kill();
    }
}

fn condition(vm: &Value, kind: &str) -> (String, String) {
    let conditions = vm["status"]["conditions"].as_array().into_iter().flatten();
    let found = conditions.into_iter().find(|condition| condition["type"] == kind);
    let text = |key: &str| {
        found
            .and_then(|found| found[key].as_str())
            .unwrap_or_default()
            .to_owned()
    };
    (text("reason"), text("message"))
}

fn wait_reason(cluster: &Cluster, vm: &str, kind: &str, reason: &str) -> anyhow::Result<String> {
    wait_for(&format!("{vm}: {kind} says {reason}"), PATIENCE, || {
        let (found, message) = condition(&cluster.get(&["ftvm", vm])?, kind);
        ensure!(found == reason, "{found}: {message}");
        Ok(message)
    })
}

fn leader(cluster: &Cluster) -> anyhow::Result<String> {
    let lease = cluster.get(&["lease", "-n", "ftvm-system", "ftvm-operator"])?;
    let holder = lease["spec"]["holderIdentity"]
        .as_str()
        .filter(|holder| !holder.is_empty());
    Ok(holder.context("nobody leads")?.to_owned())
}

#[test]
fn the_operator_makes_its_objects_says_what_is_missing_and_rests() -> anyhow::Result<()> {
    let cluster = cluster()?;
    cluster.kubectl(&["create", "namespace", "ftvm-system"])?;
    let mut replicas = ["one", "two"].map(|name| (name, Operator::start(&cluster, name)));
    // The cluster has no default class.
    cluster.apply(&example("unbound", None).to_string())?;
    let advice = wait_reason(&cluster, "unbound", "Protected", "VolumeNotBound")?;
    assert!(advice.contains("name a class that provisions"), "{advice}");
    cluster.kubectl(&["delete", "ftvm", "unbound", "--timeout=180s"])?;
    classes_by_slot(&cluster)?;
    cluster.apply(&example("web", Some("local")).to_string())?;
    let advice = wait_reason(&cluster, "web", "Protected", "NoKvmNode")?;
    assert!(advice.contains("/dev/kvm"), "{advice}");
    // A pod can be called unschedulable before it is in the book.
    let vm = wait_for("both seats have their pods", PATIENCE, || {
        let vm = cluster.get(&["ftvm", "web"])?;
        let seats = vm["status"]["seats"].as_array().context("no book")?;
        let admitted = seats.iter().filter(|seat| seat["podUid"].is_string()).count();
        ensure!(admitted == 2, "{}", vm["status"]);
        Ok(vm)
    })?;
    let seats = vm["status"]["seats"].as_array().context("no book")?.clone();
    assert_eq!(seats.len(), 2);
    for seat in &seats {
        let name = seat["name"].as_str().context("no name")?;
        let pod = cluster.get(&["pod", name])?;
        assert_eq!(pod["metadata"]["uid"], seat["podUid"], "a seat is its pod's UID");
        // This version has image volumes.
        assert!(guest_of(&pod)["image"].is_object(), "{pod}");
        assert!(pod["spec"]["initContainers"].is_null(), "{pod}");
        let identity = cluster.get(&["secret", &format!("{name}-identity")])?;
        assert_eq!(identity["metadata"]["ownerReferences"][0]["uid"], seat["podUid"]);
        cluster.get(&["pvc", &format!("{name}-root")])?;
    }
    no_lease(&cluster, "web").context("its record would name a seat that no node has taken")?;
    for object in ["secret/web-authority", "pdb/web", "networkpolicy/web"] {
        let found = cluster.get(&[object])?;
        assert_eq!(
            found["metadata"]["ownerReferences"][0]["uid"], vm["metadata"]["uid"],
            "{object}"
        );
    }
    rests(&cluster)?;
    // Not again from a cache that does not have it yet.
    let asked = requests(&cluster)?.into_iter();
    let finalizers = asked.filter(|asked| asked == "patch faulttolerantvms web");
    assert_eq!(finalizers.count(), 1, "the finalizer is put on once");
    let plugin = plugin::Plugin::new(&cluster)?;
    plugin.shows_the_objects()?;
    plugin.asks_for_a_switchover()?;
    newer::apply(&cluster)?;
    plugin.bears_a_newer_one()?;
    // Another replica takes over; nothing is made twice.
    let first = leader(&cluster)?;
    for (name, operator) in &mut replicas {
        if *name == leadership::pod_of(&first) {
            operator.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?.kill();
        }
    }
    wait_for("another replica leads", PATIENCE, || {
        let now = leader(&cluster)?;
        ensure!(now != first, "{now} still leads");
        Ok(())
    })?;
    newer::correct(&cluster)?;
    rests(&cluster)?;
    assert_eq!(cluster.get(&["ftvm", "web"])?["status"]["seats"], Value::Array(seats));
    halt_and_delete(&cluster, &plugin)
}

#[test]
fn what_vms_are_in_want_of_is_told_and_mended_and_the_operator_rests_beside_them() -> anyhow::Result<()> {
    let cluster = cluster()?;
    cluster.kubectl(&["create", "namespace", "ftvm-system"])?;
    let _operator = Operator::start(&cluster, "one")?;
    foreign_lease(&cluster)?;
    former_authority(&cluster)?;
    troubles::refused(&cluster)?;
    kept_volumes(&cluster)?;
    troubles::offer_seats(&cluster)?;
    lease_made_anew(&cluster, &plugin::Plugin::new(&cluster)?)?;
    absent_provisioner(&cluster)
}

/// The volume of a seat's pod with the guest's files.
fn guest_of(pod: &Value) -> &Value {
    let mut volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    volumes.find(|volume| volume["name"] == "guest").unwrap_or(&Value::Null)
}

/// An API server without image volumes takes a pod that has one and leaves it out, so that a seat would start without a guest: the operator
/// asks it first and has the files copied.
#[test]
fn without_image_volumes_guest_images_are_copied() -> anyhow::Result<()> {
    let cluster = defined(Options {
        nodes: 0,
        audit: true,
        // The last one in which the feature is off.
        api_version: Some("1.34"),
        ..Options::default()
    })?;
    cluster.kubectl(&["create", "namespace", "ftvm-system"])?;
    let _operator = Operator::start(&cluster, "one")?;
    cluster.apply(&example("web", Some("local")).to_string())?;
    let pods = wait_for("both seats have their pods", PATIENCE, || {
        let pods = cluster.get(&["pods", "--selector=ftvm.dev/vm=web"])?;
        let pods = pods["items"].as_array().context("no list")?.clone();
        ensure!(pods.len() == 2, "{} pods", pods.len());
        Ok(pods)
    })?;
    for pod in &pods {
        assert!(guest_of(pod)["emptyDir"].is_object(), "{pod}");
        let inits = pod["spec"]["initContainers"].as_array().context("no init containers")?;
        let names: Vec<&Value> = inits.iter().map(|init| &init["name"]).collect();
        assert_eq!(names, ["tools", "guest"]);
        assert_eq!(inits[1]["image"], "registry.example/guests/web:1");
    }
    let asked = requests(&cluster)?;
    let probes = asked
        .iter()
        .filter(|asked| asked.ends_with("pods ftvm-image-volumes"))
        .count();
    assert_eq!(probes, 1, "asked once: {asked:?}");
    assert!(
        cluster
            .get(&["pod", "ftvm-image-volumes", "-n", "ftvm-system"])
            .is_err(),
        "it was made"
    );
    // The same pods with an image volume would come without it.
    let mut bare = pods[0].clone();
    bare["metadata"] = json!({"name": "bare", "labels": bare["metadata"]["labels"]});
    let volumes = bare["spec"]["volumes"].as_array_mut().context("no volumes")?;
    volumes.retain(|volume| volume["name"] != "guest");
    volumes.push(json!({"name": "guest", "image": {"reference": "registry.example/guests/web:1"}}));
    let file = write(&cluster, "bare.json", &bare)?;
    let made = cluster.kubectl(&["create", "--validate=false", "--output=json", "--filename", &file])?;
    let made: Value = serde_json::from_str(&made)?;
    assert!(guest_of(&made).is_null(), "{made}");
    let mounts = made["spec"]["containers"][0]["volumeMounts"]
        .as_array()
        .context("no mounts")?;
    assert!(mounts.iter().all(|mount| mount["name"] != "guest"), "{made}");
    Ok(())
}

/// Waits for an event of a VM that says this.
fn wait_event(cluster: &Cluster, vm: &str, reason: &str, words: &str) -> anyhow::Result<()> {
    wait_for(&format!("an event of {vm} tells {reason}"), PATIENCE, || {
        let of_vm = format!("--field-selector=involvedObject.name={vm},reason={reason}");
        let events = cluster.kubectl(&["get", "events", &of_vm, "--output=jsonpath={.items[*].message}"])?;
        ensure!(events.contains(words), "{events}");
        Ok(())
    })
}

/// The VM stays: [`absent_provisioner`] sees that the operator rests beside it.
fn foreign_lease(cluster: &Cluster) -> anyhow::Result<()> {
    let lease =
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "taken"}, "spec": {}});
    cluster.apply(&lease.to_string())?;
    cluster.apply(&example("taken", Some("local")).to_string())?;
    let advice = wait_reason(cluster, "taken", "ArbiterReachable", "LeaseUnusable")?;
    assert!(advice.contains("remove that Lease"), "{advice}");
    wait_event(cluster, "taken", "LeaseUnusable", "remove that Lease")
}

/// What a VM of the same name had is not taken, and the VM gets its own once that is gone.
fn former_authority(cluster: &Cluster) -> anyhow::Result<()> {
    let labels = json!({"app.kubernetes.io/managed-by": "ftvm-operator", "ftvm.dev/vm": "heir"});
    let secret =
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "heir-authority", "labels": labels}});
    cluster.apply(&secret.to_string())?;
    cluster.apply(&example("heir", Some("local")).to_string())?;
    let advice = wait_reason(cluster, "heir", "Protected", "AuthorityUnusable")?;
    ensure!(advice.contains("(no owner): wait"), "{advice}");
    wait_event(cluster, "heir", "AuthorityUnusable", "remove that Secret")?;
    cluster.kubectl(&["delete", "secret", "heir-authority"])?;
    wait_reason(cluster, "heir", "Protected", "NoKvmNode")?;
    let made = cluster.get(&["secret", "heir-authority"])?;
    let vm = cluster.get(&["ftvm", "heir"])?;
    assert_eq!(made["metadata"]["ownerReferences"][0]["uid"], vm["metadata"]["uid"]);
    cluster.kubectl(&["delete", "ftvm", "heir", "--timeout=180s"])?;
    Ok(())
}

/// The API server says that there is no such Lease.
fn no_lease(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let error = cluster.get(&["lease", name]).err().context("there is one")?;
    ensure!(format!("{error:#}").contains("(NotFound)"), "{error:#}");
    Ok(())
}

/// What daemons publish is written by hand: there is no engine that could vouch. The one node has one of the seats.
fn lease_made_anew(cluster: &Cluster, plugin: &plugin::Plugin<'_>) -> anyhow::Result<()> {
    cluster.apply(&zones::volumes().to_string())?;
    cluster.apply(&troubles::small("gone", "anywhere").to_string())?;
    wait_reason(cluster, "gone", "ArbiterReachable", "Reachable")?;
    let (first, vm) = (cluster.get(&["lease", "gone"])?, cluster.get(&["ftvm", "gone"])?);
    let gone = first["metadata"]["uid"].clone();
    let seats = vm["status"]["seats"].as_array().context("no book")?;
    let seats: Vec<(&str, String)> = seats
        .iter()
        .filter_map(|seat| {
            Some((
                seat["name"].as_str()?,
                format!("{}/0000000000000001", seat["podUid"].as_str()?),
            ))
        })
        .collect();
    ensure!(seats.len() == 2, "{vm}");
    let text = first["metadata"]["annotations"]["ftvm.dev/record"].as_str();
    let mut record: Value = serde_json::from_str(text.context("no record")?)?;
    let mut members = [&seats[0].1, &seats[1].1];
    members.sort();
    merge(
        &mut record,
        &json!({"holder": seats[0].1, "members": members, "term": 7, "predecessor": gone}),
    );
    let publish = |(pod, incarnation): &(&str, String), uid: &Value| {
        let said = json!({"incarnation": incarnation, "role": "standby", "leaseUid": uid, "vouches": record, "arbiterReachable": true});
        let patch = json!({"metadata": {"annotations": {"ftvm.dev/seat-status": said.to_string()}}}).to_string();
        cluster.kubectl(&["patch", "pod", pod, "--type=merge", "-p", &patch])
    };
    let says = |words: &str| {
        wait_for(&format!("the condition says {words:?}"), PATIENCE, || {
            let (reason, message) = condition(&cluster.get(&["ftvm", "gone"])?, "ArbiterReachable");
            ensure!(reason == "LeaseGone" && message.contains(words), "{reason}: {message}");
            Ok(())
        })
    };
    cluster.kubectl(&["delete", "lease", "gone"])?;
    says("no seat vouches")?;
    publish(&seats[0], &gone)?;
    says("of the pair only")?;
    no_lease(cluster, "gone").context("made anew for one seat of a pair")?;
    publish(&seats[1], &gone)?;
    wait_reason(cluster, "gone", "ArbiterReachable", "LeaseRecreated")?;
    let second = cluster.get(&["lease", "gone"])?;
    assert_ne!(second["metadata"]["uid"], gone);
    for key in ["labels", "ownerReferences"] {
        assert_eq!(second["metadata"][key], first["metadata"][key], "{key}");
    }
    let text = second["metadata"]["annotations"]["ftvm.dev/record"].as_str();
    let made: Value = serde_json::from_str(text.context("no record")?)?;
    assert_eq!((&made["members"], &made["predecessor"]), (&record["members"], &gone));
    assert_eq!(second["spec"]["leaseTransitions"], 7);
    assert_eq!(
        cluster.get(&["ftvm", "gone"])?["status"]["leaseUid"],
        gone,
        "not every seat goes by it yet"
    );
    for seat in &seats {
        publish(seat, &second["metadata"]["uid"])?;
    }
    wait_reason(cluster, "gone", "ArbiterReachable", "Reachable")?;
    assert_eq!(
        cluster.get(&["ftvm", "gone"])?["status"]["leaseUid"],
        second["metadata"]["uid"]
    );
    plugin.accepts_a_loss("gone", &seats[0].1)?;
    // What was vouched for then is old now.
    cluster.kubectl(&["delete", "lease", "gone"])?;
    says("succeeds another record")?;
    no_lease(cluster, "gone").context("made anew from what is old")?;
    cluster.kubectl(&["delete", "ftvm", "gone", "--timeout=180s"])?;
    Ok(())
}

fn halt_and_delete(cluster: &Cluster, plugin: &plugin::Plugin<'_>) -> anyhow::Result<()> {
    let watching = plugin.watch("web")?;
    plugin.stops_and_starts()?;
    wait_reason(cluster, "web", "Protected", "NoKvmNode")?;
    cluster.kubectl(&["delete", "ftvm", "web", "--timeout=180s"])?;
    watching.end()?;
    wait_for("everything is gone", PATIENCE, || {
        let left = cluster.kubectl(&[
            "get",
            "pods,pvc,secrets,pdb,networkpolicies",
            "-l",
            "ftvm.dev/vm=web",
            "-o",
            "name",
        ])?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })?;
    assert!(Path::new(&cluster.folder()).exists());
    Ok(())
}

/// Waits until the VM's CPU is chosen, or not, for this reason; the nodes are alive meanwhile.
fn wait_cpu(cluster: &Cluster, nodes: &[&str], reason: &str, words: &str) -> anyhow::Result<Value> {
    wait_for(&format!("CpuChosen says {reason}: {words}"), PATIENCE, || {
        for node in nodes {
            cpus::beat(cluster, node)?;
        }
        let vm = cluster.get(&["ftvm", "web"])?;
        let (found, message) = condition(&vm, "CpuChosen");
        ensure!(found == reason && message.contains(words), "{found}: {message}");
        Ok(vm)
    })
}

/// Waits for pods of two seats, other ones than these; they keep away from the node of the other maker.
fn wait_seats(cluster: &Cluster, before: &[String]) -> anyhow::Result<Vec<String>> {
    wait_for("seats are made where they can be", PATIENCE, || {
        let pods = cluster.get(&["pods", "--selector=ftvm.dev/vm=web"])?;
        let pods = pods["items"].as_array().context("no list")?;
        let uids: Vec<String> = pods.iter().map(|pod| pod["metadata"]["uid"].to_string()).collect();
        ensure!(
            uids.len() == 2 && !uids.iter().any(|uid| before.contains(uid)),
            "{uids:?}"
        );
        for pod in pods {
            let terms = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
            let expected = json!([
                {"key": "ftvm.dev/cpu", "operator": "Exists"},
                {"key": "ftvm.dev/cpu", "operator": "NotIn", "values": [cpus::amd().label()]},
            ]);
            assert_eq!(terms["nodeSelectorTerms"][0]["matchExpressions"], expected);
        }
        Ok(uids)
    })
}

/// Nodes that are objects alone: what they publish decides what the guest sees, before anything is made for it.
#[test]
fn the_guests_cpu_is_what_the_nodes_have_in_common() -> anyhow::Result<()> {
    let cluster = cluster()?;
    cluster.kubectl(&["create", "namespace", "ftvm-system"])?;
    let mut operator = Operator::start(&cluster, "one")?;
    let names = ["rich", "amd", "late"];
    for (name, cpu) in [("rich", cpus::rich()), ("amd", cpus::amd())] {
        cpus::make(&cluster, name)?;
        cpus::publish(&cluster, name, &cpu.annotation(), &cpu.label())?;
    }
    cluster.apply(&example("web", Some("local")).to_string())?;
    let vm = wait_cpu(&cluster, &names[..2], "NoCommonCpu", "amd (AuthenticAMD")?;
    assert_eq!(condition(&vm, "Protected").0, "NoCommonCpu");
    let pods = || cluster.kubectl(&["get", "pods,pvc", "--selector=ftvm.dev/vm=web", "--output=name"]);
    assert_eq!(pods()?, "", "nothing is made in vain");
    wait_for("an event tells it, too", PATIENCE, || {
        let events = cluster.kubectl(&["get", "events", "--field-selector", "involvedObject.name=web"])?;
        ensure!(events.contains("NoCommonCpu"), "{events}");
        Ok(())
    })?;
    // That nodes are heard of again and again is no news.
    rests_beside(&cluster, || {
        names[..2].iter().try_for_each(|node| cpus::beat(&cluster, node))
    })?;
    wait_cpu(&cluster, &names[..2], "NoCommonCpu", "amd (AuthenticAMD")?;
    // A damaged annotation is named, and no more believed than none.
    let poor = cpus::poor();
    cpus::make(&cluster, "late")?;
    cpus::publish(&cluster, "late", &poor.annotation(), &cpus::rich().label())?;
    wait_cpu(&cluster, &names, "NoCommonCpu", "late (its label ftvm.dev/cpu is not")?;
    cpus::publish(&cluster, "late", &poor.annotation(), &poor.label())?;
    let vm = wait_cpu(&cluster, &names, "Common", "common to 2 nodes: late, rich")?;
    let chosen = vm["status"]["cpu"]["baseline"].clone();
    assert_eq!(chosen, json!(poor.baseline.to_text()));
    let first = wait_seats(&cluster, &[])?;
    // Another operator finds other nodes, and keeps what was chosen.
    operator.kill();
    cpus::publish(&cluster, "late", &cpus::rich().annotation(), &cpus::rich().label())?;
    let _operator = Operator::start_with(&cluster, "two", &["--image-volumes", "never"])?;
    cluster.kubectl(&["delete", "pods", "--selector=ftvm.dev/vm=web"])?;
    wait_seats(&cluster, &first)?;
    let pods = cluster.get(&["pods", "--selector=ftvm.dev/vm=web"])?;
    let copied = |pod: &Value| guest_of(pod)["emptyDir"].is_object();
    assert!(
        pods["items"].as_array().is_some_and(|pods| pods.iter().all(copied)),
        "{pods}"
    );
    let vm = wait_cpu(&cluster, &names, "Common", "common to 2 nodes: late, rich")?;
    assert_eq!(vm["status"]["cpu"]["baseline"], chosen);
    // Halted and started it chooses anew.
    run_strategy(&cluster, "Halted")?;
    wait_cpu(&cluster, &names, "NotChosen", "")?;
    run_strategy(&cluster, "Always")?;
    let vm = wait_cpu(&cluster, &names, "Common", "common to 2 nodes: late, rich")?;
    assert_eq!(vm["status"]["cpu"]["baseline"], json!(cpus::rich().baseline.to_text()));
    zones::seats_are_in_different_ones(&cluster)
}

/// Names of what is left of a VM.
fn left(cluster: &Cluster, kinds: &str, vm: &str) -> anyhow::Result<Vec<String>> {
    let selector = format!("--selector=ftvm.dev/vm={vm}");
    let names = cluster.kubectl(&["get", kinds, &selector, "--output=name"])?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// `volumePolicy: Retain`: claims stay, labelled, and an event names them.
fn kept_volumes(cluster: &Cluster) -> anyhow::Result<()> {
    let mut vm = example("kept", Some("local"));
    vm["spec"]["volumePolicy"] = json!("Retain");
    cluster.apply(&vm.to_string())?;
    wait_reason(cluster, "kept", "Protected", "NoKvmNode")?;
    let claims = left(cluster, "pvc", "kept")?;
    assert_eq!(claims.len(), 2, "{claims:?}");
    cluster.kubectl(&["delete", "ftvm", "kept", "--timeout=180s"])?;
    wait_for("all but the claims is gone", PATIENCE, || {
        let left = left(cluster, "pods,leases,secrets,pdb,networkpolicies", "kept")?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })?;
    assert_eq!(left(cluster, "pvc", "kept")?, claims);
    for claim in &claims {
        let found = cluster.get(&[claim])?;
        assert!(found["metadata"]["deletionTimestamp"].is_null(), "{found}");
        let (seat, name) = (
            &found["metadata"]["labels"]["ftvm.dev/seat"],
            &found["metadata"]["name"],
        );
        let (seat, name) = (seat.as_str().context("no seat")?, name.as_str().context("no name")?);
        assert_eq!(name, format!("{seat}-root"));
        wait_event(cluster, "kept", "VolumesRetained", name)?;
    }
    wait_event(cluster, "kept", "VolumesRetained", "--selector ftvm.dev/vm=kept")
}

/// Each seat's volume is of a class of its own.
fn classes_by_slot(cluster: &Cluster) -> anyhow::Result<()> {
    let classes = ["local", "elsewhere"];
    let mut vm = example("classes", None);
    vm["spec"]["disks"][0]["storageClassNames"] = json!(classes);
    cluster.apply(&vm.to_string())?;
    wait_for("both seats have claims of their classes", PATIENCE, || {
        let seats = cluster.get(&["ftvm", "classes"])?["status"]["seats"].clone();
        let seats = seats.as_array().context("no book")?;
        ensure!(seats.len() == 2, "{seats:?}");
        for seat in seats {
            let (name, slot) = (&seat["name"], &seat["slot"]);
            let claim = format!("{}-root", name.as_str().context("no name")?);
            let class = classes.get(slot.as_u64().context("no slot")? as usize);
            let found = cluster.get(&["pvc", &claim])?["spec"]["storageClassName"].clone();
            ensure!(class.is_some_and(|class| found == *class), "{claim}: {found}");
        }
        Ok(())
    })?;
    cluster.kubectl(&["delete", "ftvm", "classes", "--timeout=180s"])?;
    Ok(())
}

/// Nobody serves the class, and the scheduler says nothing while it waits: the operator looks again by itself, says what to do, and
/// doing that helps. Beside it is everything else that VMs can be in want of, and the operator rests beside all of them.
fn absent_provisioner(cluster: &Cluster) -> anyhow::Result<()> {
    let class = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "unserved"},
        "provisioner": "nobody.example/volumes", "volumeBindingMode": "WaitForFirstConsumer",
    });
    cluster.apply(&class.to_string())?;
    cluster.apply(&troubles::small("waiting", "unserved").to_string())?;
    troubles::apply(cluster)?;
    troubles::told(cluster)?;
    troubles::evicted(cluster, "large")?;
    troubles::told(cluster)?;
    let advice = wait_reason(cluster, "waiting", "Protected", "VolumeNotBound")?;
    assert!(advice.contains("storage class: unserved"), "{advice}");
    wait_event(cluster, "waiting", "VolumeNotBound", "mend what provisions")?;
    wait_reason(cluster, "taken", "ArbiterReachable", "LeaseUnusable")?;
    rests(cluster)?;
    // The others would take what it needs.
    let others = ["taken", "unpulled", "large", "elsewhere"];
    cluster.kubectl(&[&["delete", "ftvm", "--timeout=180s"], &others[..]].concat())?;
    let local = json!([{"op": "replace", "path": "/spec/disks/0/storageClassName", "value": "local"}]).to_string();
    cluster.kubectl(&["patch", "ftvm", "waiting", "--type=json", "-p", &local])?;
    let seats = cluster.get(&["ftvm", "waiting"])?["status"]["seats"].clone();
    let seats = seats.as_array().context("no book")?;
    let names: Vec<&str> = seats.iter().filter_map(|seat| seat["name"].as_str()).collect();
    let told = |seat: &&str| advice.contains(&format!("delete claim {seat}-root and pod {seat}"));
    assert!(names.len() == 2 && names.iter().any(told), "{names:?}: {advice}");
    // Only one node is there: the other seat, which had none, would take it with its claim of the old class.
    for seat in names {
        cluster.kubectl(&[
            "delete",
            "pvc",
            &format!("{seat}-root"),
            "--ignore-not-found",
            "--timeout=180s",
        ])?;
        cluster.kubectl(&["delete", "pod", seat, "--ignore-not-found", "--timeout=180s"])?;
    }
    wait_for("a seat has a volume of the other class", PATIENCE, || {
        let claims = cluster.get(&["pvc", "--selector=ftvm.dev/vm=waiting"])?;
        let bound = |claim: &Value| claim["spec"]["storageClassName"] == "local" && claim["status"]["phase"] == "Bound";
        ensure!(
            claims["items"]
                .as_array()
                .is_some_and(|claims| claims.iter().any(bound)),
            "{}",
            claims["items"]
        );
        Ok(())
    })?;
    cluster.kubectl(&["delete", "ftvm", "waiting", "--timeout=180s"])?;
    Ok(())
}
