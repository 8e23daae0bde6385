//! Addresses, names and times of a cluster.
//!
//! ```text
//!   outer namespaces of the lab (kept by one process)
//!   ┌────────────────────────────────────────────────────────────────────────────────┐
//!   │ etcd, kube-apiserver, kube-controller-manager, kube-scheduler                   │
//!   │ bridge mgmt 10.77.0.1   bridge repl 10.78.0.1   bridge client 10.79.0.1 (clients)│
//!   └────┬──────────────────────┬───────────────────────┬────────────────────────────┘
//!        │ eth0 10.77.0.11      │ eth1 10.78.0.11       │ eth2 ─ bridge `ftvm-client` ─ taps of guests
//!      ┌─┴──────────────────────┴───────────────────────┴─┐
//!      │ n1: containerd, kubelet, kube-proxy               │   n2 .12, n3 .13, …
//!      │ bridge cni0: pods 10.244.1.0/24                   │   10.244.2.0/24, …
//!      └───────────────────────────────────────────────────┘
//! ```
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use crate::lab::Network;

/// Takes a line of progress.
pub type Say = Arc<dyn Fn(&str) + Send + Sync>;

/// The API server's port, on [`api_address`].
pub const API_PORT: u16 = 6443;
/// Services' addresses; the first is the API server's.
pub const SERVICES: &str = "10.96.0.0/16";
/// Bridge of every node that joins guests' taps with the client network.
pub const CLIENT_BRIDGE: &str = "ftvm-client";
/// Where a node has its local volumes.
pub const VOLUMES_FOLDER: &str = "/var/lib/volumes";
/// More nodes than this have no names and addresses.
pub const NODES_MAX: u8 = 9;

/// The URL of an API server at this address.
#[must_use]
pub(super) fn api_url(address: Ipv4Addr) -> String {
    format!("https://{address}:{API_PORT}")
}

/// Where the API server listens.
#[must_use]
pub fn api_address() -> Ipv4Addr {
    Network::Management.address(1)
}

/// Where the [`ApiProxy`](super::ApiProxy) listens: the lab has this address too, and the server's certificate names it.
#[must_use]
pub fn api_front_address() -> Ipv4Addr {
    Network::Management.address(2)
}

/// What a cluster consists of.
#[derive(Clone)]
pub struct Options {
    /// How many nodes, `n1` onwards; none: only the control plane.
    pub nodes: u8,
    /// Local volumes of each node.
    pub volumes_per_node: u8,
    /// A node that was not heard of for so long is not ready. Its kubelet reports four times as often.
    pub node_grace: Duration,
    /// Whether the API server writes down who asked for what ([`Cluster::audit_events`](super::Cluster::audit_events)).
    pub audit: bool,
    /// Whether nodes and pods reach the API server through an [`ApiProxy`](super::ApiProxy), which can falsify.
    pub api_proxy: bool,
    /// Gets lines of progress.
    pub say: Say,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 3,
            volumes_per_node: 4,
            node_grace: Duration::from_secs(10),
            audit: false,
            api_proxy: false,
            say: Arc::new(|line| eprintln!("cluster: {line}")),
        }
    }
}

impl Options {
    /// The address at which nodes and pods reach the API server; people and the control plane use [`api_address`].
    #[must_use]
    pub(super) fn api_advertised(&self) -> Ipv4Addr {
        if self.api_proxy {
            api_front_address()
        } else {
            api_address()
        }
    }

    pub(super) fn plans(&self) -> Vec<NodePlan> {
        (1..=self.nodes).map(|index| NodePlan { index }).collect()
    }
}

/// Names and addresses of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodePlan {
    /// 1 to [`NODES_MAX`].
    pub index: u8,
}

impl NodePlan {
    /// Its name.
    #[must_use]
    pub fn name(self) -> String {
        format!("n{}", self.index)
    }

    /// Its failure domain: one of its own.
    #[must_use]
    pub fn zone(self) -> String {
        format!("zone-{}", self.index)
    }

    /// Its address in a network. On the client network it has none: that is the guests'.
    #[must_use]
    pub fn address(self, network: Network) -> Ipv4Addr {
        network.address(10 + self.index)
    }

    /// The addresses of its pods.
    #[must_use]
    pub fn pods(self) -> String {
        format!("10.244.{}.0/24", self.index)
    }

    /// The outer end of its cable.
    #[must_use]
    pub fn port(self, network: Network) -> String {
        format!("{}-{}", self.name(), network.bridge())
    }

    /// Its cards keep their hardware addresses when it starts again, so that neighbours need not learn them anew.
    pub(super) fn hardware_address(self, network: Network) -> String {
        let [_, second, _, host] = self.address(network).octets();
        format!("02:00:0a:{second:02x}:00:{host:02x}")
    }
}
