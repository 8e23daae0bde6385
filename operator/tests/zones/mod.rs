//! Zones, made of nodes that are objects alone.

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::{Cluster, wait_for};
use serde_json::{Value, json};

use super::{PATIENCE, cpus, patch_status, troubles};

/// (name, zone, CPUs, memory). The scheduler prefers the emptier node: without a wish to be in different zones both seats would be in `a`.
const NODES: [(&str, &str, &str, &str); 3] = [
    ("a1", "a", "64", "256Gi"),
    ("a2", "a", "64", "256Gi"),
    ("b1", "b", "2", "4Gi"),
];

fn make(cluster: &Cluster) -> anyhow::Result<()> {
    for (name, zone, processors, memory) in NODES {
        let labels = json!({"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": zone});
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}});
        cluster.apply(&node.to_string())?;
        let room = json!({"cpu": processors, "memory": memory, "pods": "10"});
        let room = json!({"capacity": room, "allocatable": room});
        patch_status(cluster, "node", name, &room)?;
        cpus::beat(cluster, name)?;
    }
    Ok(())
}

/// A class whose volumes are everywhere, and a volume of it for each seat.
pub fn volumes() -> Value {
    let class = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "anywhere"},
        "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "Immediate",
    });
    let volume = |name: &str| {
        json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": "10Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "anywhere",
                "hostPath": {"path": "/nowhere"},
            },
        })
    };
    json!({"apiVersion": "v1", "kind": "List", "items": [class, volume("first"), volume("second")]})
}

/// Where two of three nodes are in one zone and have more room, the seats are in two zones.
pub fn seats_are_in_different_ones(cluster: &Cluster) -> anyhow::Result<()> {
    make(cluster)?;
    cluster.apply(&volumes().to_string())?;
    let mut vm = troubles::small("spread", "anywhere");
    // Whether a node is taken for ready at this moment makes no difference.
    vm["spec"]["placement"] = json!({"tolerations": [{"operator": "Exists"}]});
    vm["spec"]["resources"] = json!({"cpuRequest": "1"});
    cluster.apply(&vm.to_string())?;
    let nodes = wait_for("both seats have a node", PATIENCE, || {
        for (name, ..) in NODES {
            cpus::beat(cluster, name)?;
        }
        let pods = cluster.get(&["pods", "--selector=ftvm.dev/vm=spread"])?;
        let pods = pods["items"].as_array().context("no list")?;
        let nodes: Option<Vec<&str>> = pods.iter().map(|pod| pod["spec"]["nodeName"].as_str()).collect();
        let nodes = nodes.filter(|nodes| nodes.len() == 2).with_context(|| {
            let told = pods.iter().map(|pod| pod["status"]["conditions"].to_string());
            told.collect::<Vec<_>>().join(", ")
        })?;
        Ok(nodes.into_iter().map(str::to_owned).collect::<Vec<_>>())
    })?;
    let zone = |node: &String| NODES.iter().find(|(name, ..)| name == node).map(|(_, zone, ..)| *zone);
    let mut zones: Vec<_> = nodes.iter().map(zone).collect();
    zones.sort_unstable();
    ensure!(zones == [Some("a"), Some("b")], "the seats are on {nodes:?}");
    Ok(())
}
