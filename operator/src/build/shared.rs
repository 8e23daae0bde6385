//! What a VM has once: disruption budget and network policy.

use ftvm_crds::FaultTolerantVM;
use ftvm_crds::names::PORT_LINK;
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::{labels, metadata};

fn seats(vm: &FaultTolerantVM) -> LabelSelector {
    LabelSelector {
        match_labels: Some(labels(vm)),
        match_expressions: None,
    }
}

/// One seat stays when nodes are drained: an evicted active hands over first, and its successor can't be evicted meanwhile.
pub fn budget(vm: &FaultTolerantVM) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: metadata(vm, &vm.name_any()),
        spec: Some(PodDisruptionBudgetSpec {
            min_available: Some(IntOrString::Int(1)),
            selector: Some(seats(vm)),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}

/// Seats of a VM talk to each other, and to nobody else: the guest's own traffic does not pass through the pod.
pub fn network_policy(vm: &FaultTolerantVM) -> NetworkPolicy {
    let peer = NetworkPolicyPeer {
        pod_selector: Some(seats(vm)),
        ..NetworkPolicyPeer::default()
    };
    let port = NetworkPolicyPort {
        port: Some(IntOrString::Int(PORT_LINK.into())),
        protocol: Some("TCP".to_owned()),
        end_port: None,
    };
    NetworkPolicy {
        metadata: metadata(vm, &vm.name_any()),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(seats(vm)),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: Some(vec![peer.clone()]),
                ports: Some(vec![port.clone()]),
            }]),
            egress: Some(vec![NetworkPolicyEgressRule {
                to: Some(vec![peer]),
                ports: Some(vec![port]),
            }]),
        }),
    }
}
