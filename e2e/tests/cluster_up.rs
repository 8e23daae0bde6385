//! A real Kubernetes of native nodes: pods, their network, Services, volumes, images, and what happens when a node dies.
use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::images::{self, POD_PROGRAM};
use ftvm_e2e::cluster::{Cluster, Component, NodeProgram, Options, wait_for};
use ftvm_e2e::hosts::CutDirection;
use ftvm_e2e::lab::Network;
use ftvm_e2e::lab::binaries::{self, Profile};
use serde_json::{Value, json};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(120);

/// A pod on a node; `more` is merged into its spec's single container, `volumes` are the pod's.
fn pod(name: &str, node: &str, image: &str, more: Value, volumes: Value) -> Value {
    let mut container =
        json!({"name": "main", "image": image, "imagePullPolicy": "Never", "command": [POD_PROGRAM, "serve", "80"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        container[key] = value.clone();
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "serve"}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
            "volumes": volumes,
        },
    })
}

fn address(cluster: &Cluster, pod: &str) -> anyhow::Result<String> {
    let pod = cluster.get(&["pod", pod])?;
    Ok(pod["status"]["podIP"]
        .as_str()
        .context("the pod has no address")?
        .to_owned())
}

/// Asks the service at `address` from inside a pod.
fn ask(cluster: &Cluster, from: &str, address: &str) -> anyhow::Result<String> {
    let answer = cluster.kubectl(&["exec", from, "--", POD_PROGRAM, "ask", &format!("{address}:80")])?;
    Ok(answer.trim().to_owned())
}

/// Asks it in vain, because nothing comes back: whatever else may go wrong with a question shows nothing.
fn expect_silence(cluster: &Cluster, from: &str, address: &str) -> anyhow::Result<()> {
    let asked = ask(cluster, from, address);
    let error = asked.err().context("it was answered")?.to_string();
    // The words of the program in the pod: while it connects, from the router, while it waits for the answer.
    let silence = [
        "connection timed out",
        "No route to host",
        "Resource temporarily unavailable",
    ];
    let told = silence
        .iter()
        .any(|reason| error.contains(&format!("ask {address}:80: {reason}")));
    ensure!(told, "{error}");
    Ok(())
}

fn wait_for_answer(cluster: &Cluster, from: &str, to: &str) -> anyhow::Result<()> {
    wait_for(&format!("{to} answers {from}"), PATIENCE, || {
        let answer = ask(cluster, from, &address(cluster, to)?)?;
        ensure!(answer == to, "{answer} answered");
        Ok(())
    })
}

#[test]
fn pods_services_volumes_images_and_the_death_of_a_node() -> anyhow::Result<()> {
    let options = Options {
        audit: true,
        ..Options::default()
    };
    let cluster = Cluster::start(options)?;
    pods_reach_each_other(&cluster)?;
    a_cut_link_is_noticed(&cluster)?;
    a_service_reaches_all_of_them(&cluster)?;
    guests_on_the_client_bridge_are_reached_from_outside(&cluster)?;
    a_claim_gets_a_volume_of_its_pods_node(&cluster)?;
    images_are_built_and_mounted(&cluster)?;
    a_node_is_killed_and_comes_back(&cluster)?;
    a_paused_node_is_silent(&cluster)?;
    only_kubelet_dies(&cluster)?;
    the_api_server_stops_and_goes_on(&cluster)?;
    requests_are_written_down(&cluster)
}

fn pods_reach_each_other(cluster: &Cluster) -> anyhow::Result<()> {
    let mut boot_ids = BTreeSet::new();
    for node in cluster.nodes() {
        let name = node.name();
        let manifest = pod(&format!("on-{name}"), &name, images::PAUSE, json!({}), json!([]));
        // The ServiceAccount that pods need is made a moment after its namespace.
        wait_for("the pod is accepted", PATIENCE, || cluster.apply(&manifest.to_string()))?;
        let object = cluster.get(&["node", &name])?;
        assert_eq!(
            object["metadata"]["labels"]["topology.kubernetes.io/zone"],
            node.plan().zone()
        );
        boot_ids.insert(object["status"]["nodeInfo"]["bootID"].to_string());
    }
    assert_eq!(boot_ids.len(), cluster.nodes().len(), "{boot_ids:?}");
    for node in cluster.nodes() {
        cluster.wait_pod_ready("default", &format!("on-{}", node.name()))?;
    }
    for from in cluster.nodes() {
        for to in cluster.nodes() {
            let (from, to) = (format!("on-{}", from.name()), format!("on-{}", to.name()));
            wait_for_answer(cluster, &from, &to)?;
        }
    }
    Ok(())
}

/// Without this, nobody knows whether the pods' answers came by the network that is to be tested.
fn a_cut_link_is_noticed(cluster: &Cluster) -> anyhow::Result<()> {
    let (first, second) = (cluster.node("n1")?, cluster.node("n2")?);
    cluster.cut_link(first, second, Network::Management, CutDirection::Both)?;
    let second_pod = address(cluster, "on-n2")?;
    let cut = ask(cluster, "on-n1", &second_pod).unwrap_err().to_string();
    assert!(cut.contains("timed out"), "{cut}");
    wait_for_answer(cluster, "on-n1", "on-n3")?;
    cluster.mend_links()?;
    wait_for_answer(cluster, "on-n1", "on-n2")
}

fn a_service_reaches_all_of_them(cluster: &Cluster) -> anyhow::Result<()> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "serve"},
        "spec": {"selector": {"app": "serve"}, "ports": [{"port": 80}]},
    });
    cluster.apply(&service.to_string())?;
    let service = cluster.get(&["service", "serve"])?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("the service has no address")?;
    let mut seen = BTreeSet::new();
    wait_for("the service leads to every pod", PATIENCE, || {
        seen.insert(ask(cluster, "on-n1", address)?);
        ensure!(seen.len() == cluster.nodes().len(), "answers of {seen:?}");
        Ok(())
    })
}

fn guests_on_the_client_bridge_are_reached_from_outside(cluster: &Cluster) -> anyhow::Result<()> {
    let node = cluster.node("n1")?;
    let guest = Network::Client.address(100);
    let address = format!("{guest}/24");
    let bridge = ftvm_e2e::cluster::plan::CLIENT_BRIDGE;
    node.exec(&["ip", "address", "add", &address, "dev", bridge])?;
    let enter = node.native()?.entrance()?;
    let listener = std::thread::spawn(move || -> anyhow::Result<TcpListener> {
        enter()?;
        Ok(TcpListener::bind((guest, 7))?)
    });
    let listener = listener.join().expect("the thread only binds")?;
    let port = listener.local_addr()?.port();
    cluster.sandbox().connect((guest, port).into(), PATIENCE)?;
    node.set_link(Network::Client, false)?;
    assert!(
        cluster
            .sandbox()
            .connect((guest, port).into(), Duration::from_secs(1))
            .is_err()
    );
    node.set_link(Network::Client, true)
}

fn a_claim_gets_a_volume_of_its_pods_node(cluster: &Cluster) -> anyhow::Result<()> {
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk"},
        "spec": {"storageClassName": "local", "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    });
    cluster.apply(&claim.to_string())?;
    let node = cluster.node("n3")?;
    for number in 1..=Options::default().volumes_per_node {
        fs::write(node.native()?.volume_folder(number).join("owner"), node.name())?;
    }
    let volumes = json!([{"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}]);
    let mounts = json!({"volumeMounts": [{"name": "disk", "mountPath": "/disk"}]});
    cluster.apply(&pod("with-disk", "n3", images::PAUSE, mounts, volumes).to_string())?;
    cluster.wait_pod_ready("default", "with-disk")?;
    let owner = cluster.kubectl(&["exec", "with-disk", "--", POD_PROGRAM, "show", "/disk/owner"])?;
    assert_eq!(owner, "n3");
    Ok(())
}

fn images_are_built_and_mounted(cluster: &Cluster) -> anyhow::Result<()> {
    let folder = cluster.folder().join("images");
    fs::create_dir(&folder)?;
    // As a shipped Dockerfile is: its first stage would compile.
    let dockerfile = folder.join("Dockerfile");
    fs::write(
        &dockerfile,
        "FROM docker.io/library/rust:1 AS builder\nRUN cargo build\n\
         FROM scratch\nCOPY --from=builder /ftvm-lab-pod /built\nENTRYPOINT [\"/built\", \"serve\", \"80\"]\n",
    )?;
    let programs = binaries::build(&[("ftvm-e2e", "ftvm-lab-pod")], Profile::Dev)?;
    let binaries = folder.join("binaries");
    fs::create_dir(&binaries)?;
    fs::copy(&programs[0], binaries.join("ftvm-lab-pod"))?;
    let built = folder.join("built.tar");
    images::build(&dockerfile, "lab.ftvm.dev/built:1", &binaries, &built)?;
    cluster.import_image(&built)?;
    let kernel = folder.join("kernel");
    fs::write(&kernel, "the guest's kernel")?;
    let guest = folder.join("guest.tar");
    images::pack_guest("lab.ftvm.dev/guest:1", &kernel, None, &[("root.img", &kernel)], &guest)?;
    cluster.import_image(&guest)?;
    let documented = folder.join("documented.tar");
    build_as_documented("lab.ftvm.dev/documented:1", &documented)?;
    cluster.import_image(&documented)?;

    let volumes = json!([
        {"name": "guest", "image": {"reference": "lab.ftvm.dev/guest:1", "pullPolicy": "Never"}},
        {"name": "documented", "image": {"reference": "lab.ftvm.dev/documented:1", "pullPolicy": "Never"}},
    ]);
    let mounts = json!({"command": ["/built", "serve", "80"], "volumeMounts": [
        {"name": "guest", "mountPath": "/guest", "readOnly": true},
        {"name": "documented", "mountPath": "/documented", "readOnly": true},
    ]});
    let manifest = pod("with-guest", "n2", "lab.ftvm.dev/built:1", mounts, volumes);
    cluster.apply(&manifest.to_string())?;
    cluster.wait_pod_ready("default", "with-guest")?;
    for file in ["/guest/boot/vmlinuz", "/guest/disk/root.img"] {
        let content = cluster.kubectl(&["exec", "with-guest", "--", "/built", "show", file])?;
        assert_eq!(content, "the guest's kernel", "{file}");
    }
    for (file, path) in DOCUMENTED {
        let content = cluster.kubectl(&[
            "exec",
            "with-guest",
            "--",
            "/built",
            "show",
            &format!("/documented{path}"),
        ])?;
        assert_eq!(content, file, "{path}");
    }
    cluster.kubectl(&["delete", "pod", "with-guest", "with-disk"])?;
    Ok(())
}

/// (a file beside the Dockerfile of docs/kubernetes.md, "Guest images"; where seats look for it in the image)
const DOCUMENTED: [(&str, &str); 3] = [
    ("vmlinuz", "/boot/vmlinuz"),
    ("initrd", "/boot/initrd"),
    ("root.raw", "/disk/root.raw"),
];

/// A guest image as people make it. Each file has its own name as its content.
fn build_as_documented(name: &str, archive: &Path) -> anyhow::Result<()> {
    let context = archive.with_extension("files");
    fs::create_dir(&context)?;
    for (file, _) in DOCUMENTED {
        fs::write(context.join(file), file)?;
    }
    let dockerfile = archive.with_extension("Dockerfile");
    fs::write(&dockerfile, include_str!("../../docs/examples/guest.Dockerfile"))?;
    images::build_from(&context, &dockerfile, name, archive)
}

fn a_node_is_killed_and_comes_back(cluster: &Cluster) -> anyhow::Result<()> {
    let node = cluster.node("n2")?;
    let boot_id = |cluster: &Cluster| {
        Ok::<_, anyhow::Error>(cluster.get(&["node", "n2"])?["status"]["nodeInfo"]["bootID"].clone())
    };
    let before = boot_id(cluster)?;
    node.kill()?;
    cluster.wait_node_not_ready("n2")?;
    expect_silence(cluster, "on-n1", &address(cluster, "on-n2")?)?;
    node.start()?;
    cluster.wait_node_ready("n2")?;
    wait_for("the API server knows the new boot id", PATIENCE, || {
        ensure!(boot_id(cluster)? != before, "it is the old one");
        Ok(())
    })?;
    // Its pod was bound to it: kubelet starts it again.
    wait_for_answer(cluster, "on-n1", "on-n2")
}

fn a_paused_node_is_silent(cluster: &Cluster) -> anyhow::Result<()> {
    let node = cluster.node("n3")?;
    let third_pod = address(cluster, "on-n3")?;
    node.pause()?;
    let silent = expect_silence(cluster, "on-n1", &third_pod);
    node.resume()?;
    silent?;
    wait_for_answer(cluster, "on-n1", "on-n3")?;
    cluster.wait_node_ready("n3")
}

fn only_kubelet_dies(cluster: &Cluster) -> anyhow::Result<()> {
    let node = cluster.node("n1")?;
    node.kill_program(NodeProgram::Kubelet)?;
    cluster.wait_node_not_ready("n1")?;
    // Its pods go on.
    wait_for_answer(cluster, "on-n2", "on-n1")?;
    node.start_program(NodeProgram::Kubelet)?;
    cluster.wait_node_ready("n1")
}

fn the_api_server_stops_and_goes_on(cluster: &Cluster) -> anyhow::Result<()> {
    let look = ["get", "--raw=/readyz", "--request-timeout=2s"];
    cluster.pause_component(Component::ApiServer)?;
    let paused = cluster.kubectl(&look);
    cluster.resume_component(Component::ApiServer)?;
    let silence = paused.err().context("a paused API server answered")?.to_string();
    // While it waits for the answer, or still connects.
    let words = ["Client.Timeout exceeded", "context deadline exceeded"];
    assert!(words.iter().any(|words| silence.contains(words)), "{silence}");
    wait_for("the API server answers again", PATIENCE, || cluster.kubectl(&look))?;
    cluster.kill_component(Component::ApiServer)?;
    let refused = cluster.kubectl(&look).unwrap_err().to_string();
    assert!(refused.contains("refused"), "{refused}");
    cluster.start_component(Component::ApiServer)?;
    wait_for("the API server answers again", PATIENCE, || cluster.kubectl(&look))?;
    Ok(())
}

fn requests_are_written_down(cluster: &Cluster) -> anyhow::Result<()> {
    let events = cluster.audit_events()?;
    let by = |agent: &str, user: &str| {
        events
            .iter()
            .any(|event| event.user_agent.starts_with(agent) && event.user.username == user)
    };
    assert!(by("kubectl/", "admin") && by("kubelet/", "system:node:n2"));
    let guest = cluster.kubeconfig("somebody", None)?;
    let refused = cluster.kubectl_as(&guest, &["get", "pods"]).unwrap_err().to_string();
    assert!(refused.contains("User \"somebody\" cannot list"), "{refused}");
    Ok(())
}
