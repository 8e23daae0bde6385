//! What a VM has once: disruption budget and network policy.

use std::collections::BTreeSet;
use std::iter;

use ftvm_crds::names::PORT_LINK;
use ftvm_crds::{Contents, FaultTolerantVM};
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

/// Seats of a VM talk to each other, and to nobody else: the guest's own traffic does not pass through the pod. Until the guest
/// `ran`, they may also ask for what they download.
pub fn network_policy(vm: &FaultTolerantVM, ran: bool) -> NetworkPolicy {
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
            egress: Some(
                iter::once(NetworkPolicyEgressRule {
                    to: Some(vec![peer]),
                    ports: Some(vec![port]),
                })
                .chain((!ran).then(|| downloads(vm)).flatten())
                .collect(),
            ),
        }),
    }
}

/// Names, and the ports of web servers, wherever those are: a network policy knows no names. Redirections may lead to the usual ports.
fn downloads(vm: &FaultTolerantVM) -> Option<NetworkPolicyEgressRule> {
    let mut ports: BTreeSet<i32> = urls(vm).map(|url| port_of(&url)).collect();
    if ports.is_empty() {
        return None;
    }
    ports.extend([80, 443]);
    let port = |(protocol, port): (&str, i32)| NetworkPolicyPort {
        port: Some(IntOrString::Int(port)),
        protocol: Some(protocol.to_owned()),
        end_port: None,
    };
    let names = [("UDP", 53), ("TCP", 53)].into_iter();
    let all = names.chain(ports.into_iter().map(|port| ("TCP", port)));
    Some(NetworkPolicyEgressRule {
        to: None,
        ports: Some(all.map(port).collect()),
    })
}

/// Addresses of first contents that are downloaded.
pub(super) fn urls(vm: &FaultTolerantVM) -> impl Iterator<Item = String> {
    vm.spec.disks.iter().filter_map(|disk| match disk.contents() {
        Contents::Http(file) => Some(file.url),
        Contents::Blank | Contents::File(..) | Contents::Claim(_) => None,
    })
}

/// Port of an address, as the API server's rules let it be written.
pub(super) fn port_of(url: &str) -> i32 {
    let usual = if url.starts_with("https:") { 443 } else { 80 };
    let host = url.split('/').nth(2).unwrap_or_default();
    let port = host.rsplit_once(':').filter(|(_, port)| !port.contains(']'));
    port.and_then(|(_, port)| port.parse().ok())
        .filter(|port| (1..=65535).contains(port))
        .unwrap_or(usual)
}
