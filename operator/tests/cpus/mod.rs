//! Nodes that are objects alone: they offer seats, and publish a CPU.

use ftvm_cpu::CpuBaseline;
use ftvm_crds::cpu::NodeCpu;
use ftvm_e2e::cluster::Cluster;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use super::patch_status;

/// A CPU that nobody makes.
const CPU: &str = "tsc=2400000 0:d,756e6547,6c65746e,49656e69 1:806e8,800,80982201,781fbff 7.0:1,1807ab,0,0 \
    80000000:80000008,0,0,0 80000001:0,0,1,2c100800 80000008:3028,0,0,0";

/// It with something else in its place.
fn changed(from: &str, to: &str) -> NodeCpu {
    NodeCpu {
        baseline: CpuBaseline::from_text(&CPU.replace(from, to)).expect("a baseline"),
        tsc_scaling: true,
    }
}

pub fn rich() -> NodeCpu {
    changed(" ", " ")
}

/// Without AVX2.
pub fn poor() -> NodeCpu {
    changed("7.0:1,1807ab", "7.0:1,18078b")
}

/// Of the other maker.
pub fn amd() -> NodeCpu {
    changed("0:d,756e6547,6c65746e,49656e69", "0:d,68747541,444d4163,69746e65")
}

/// What a daemon does.
pub fn publish(cluster: &Cluster, node: &str, annotation: &str, label: &str) -> anyhow::Result<()> {
    let text = json!({"metadata": {"annotations": {"ftvm.dev/cpu": annotation}, "labels": {"ftvm.dev/cpu": label}}});
    let text = text.to_string();
    let words = ["patch", "node", node, "--type=merge", "--patch", &text];
    cluster.kubectl(&words).map(drop)
}

/// What a kubelet does again and again: a node that is not heard of for long is not ready.
pub fn beat(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let condition = json!({
        "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "", "lastHeartbeatTime": Timestamp::now().to_string(),
    });
    let seats = json!({"ftvm.dev/seat": "8"});
    let status = json!({"conditions": [condition], "allocatable": seats, "capacity": seats});
    patch_status(cluster, "node", node, &status)
}

pub fn make(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    cluster.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}).to_string())?;
    beat(cluster, node)
}
