//! What this node publishes of its CPU: an annotation and a label of its Node, for the operator to choose what guests see.
//!
//! Written once, at the daemon's start. A patch that changes nothing is no write for the API server, so it need not be read before.

use std::time::Duration;

use ftvm_crds::cpu::NodeCpu;
use ftvm_crds::names::{ANNOTATION_CPU, LABEL_CPU};
use ftvm_engine::kvm::{Kvm, cpu_of_host};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use super::kvm_test::Tested;
use super::machine::other_than_kubelets;
use crate::{explain, random};

/// First and longest pause after a failure.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// A write that takes longer is taken for failed.
const WRITE_MAX: Duration = Duration::from_secs(5);

/// Publishes the CPU as soon as KVM works; tries until that is done. The Node as it is then also says which machine kubelet takes it for.
pub async fn publish(config: kube::Config, node: String, machine: Option<String>, mut tested: Tested) {
    while tested.trouble().is_some() {
        tested.changed().await;
    }
    let mut pause = PAUSE_MIN;
    loop {
        match write(&config, &node, machine.as_deref()).await {
            Ok(label) => return tracing::info!(label, "this node's CPU is published"),
            Err(why) => tracing::warn!("this node's CPU is not published, no VM is placed for it: {why}"),
        }
        let part = (random::nonzero_u64() % 1000) as f64 / 1000.0;
        tokio::time::sleep(pause.mul_f64(0.75 + part / 2.0)).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn write(config: &kube::Config, node: &str, machine: Option<&str>) -> Result<String, String> {
    let read = tokio::task::spawn_blocking(of_host).await;
    let cpu = read.map_err(|error| error.to_string())??;
    let client = ftvm_watch::client(config.clone()).map_err(|error| explain(&error))?;
    let label = cpu.label();
    let patch = json!({"metadata": {"annotations": {ANNOTATION_CPU: cpu.annotation()}, "labels": {LABEL_CPU: label}}});
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
    let nodes: Api<Node> = Api::all(client);
    let writing = nodes.patch(node, &parameters, &patch);
    match tokio::time::timeout(WRITE_MAX, writing).await {
        Ok(Ok(written)) => {
            let info = written.status.and_then(|status| status.node_info);
            let told = info.map(|info| info.system_uuid).unwrap_or_default();
            if let Some(why) = other_than_kubelets(machine, &told) {
                tracing::warn!("{why}");
            }
            Ok(label)
        }
        Ok(Err(error)) => Err(explain(&error)),
        Err(_) => Err(format!("the API server has not answered for {} s", WRITE_MAX.as_secs())),
    }
}

fn of_host() -> Result<NodeCpu, String> {
    let kvm = Kvm::open().map_err(|error| explain(&error))?;
    let baseline = cpu_of_host(&kvm).map_err(|error| explain(&error))?;
    Ok(NodeCpu {
        baseline,
        tsc_scaling: kvm.capabilities().tsc_scaling,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_can_read_what_this_host_publishes() {
        let cpu = of_host().unwrap();
        assert_eq!(NodeCpu::read(&cpu.annotation(), Some(&cpu.label())), Ok(cpu.clone()));
        assert_eq!(cpu.gives(&cpu.baseline), Ok(()));
    }
}
