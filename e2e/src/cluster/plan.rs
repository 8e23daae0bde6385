//! Addresses, names and times of a cluster.
//!
//! With nodes of either kind:
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
//!
//! With two API servers the second one is a program of n1 and dies with it. Both have the same etcd, and pods reach them by the service
//! `kubernetes`; people, kubelets and the rest of the control plane ask the first one.
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;

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
/// Label of nodes that says what they run on.
pub const KIND_LABEL: &str = "machine-kind";
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

/// Where the second API server listens, if there is one: at the address of the node that it runs on, [`NodePlan::SECOND_API_SERVER`].
#[must_use]
pub fn second_api_address() -> Ipv4Addr {
    NodePlan::SECOND_API_SERVER.address(Network::Management)
}

/// What nodes run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NodeKind {
    /// Namespaces on this machine's kernel, with its KVM: fast, and no Linux guests where that KVM can't run them.
    #[default]
    Native,
    /// Emulated machines with a Debian kernel and a KVM of their own: any guest, on any machine, and slow.
    Emulated,
}

impl NodeKind {
    /// The value of the label [`KIND_LABEL`] of such nodes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Emulated => "emulated",
        }
    }

    /// How long to wait for what takes at most so long natively.
    #[must_use]
    pub fn patience(self, native: Duration) -> Duration {
        match self {
            Self::Native => native,
            Self::Emulated => 4 * native,
        }
    }
}

/// What a cluster consists of.
#[derive(Clone)]
pub struct Options {
    /// How many nodes, `n1` onwards; none: only the control plane.
    pub nodes: u8,
    /// How many of them are emulated, the first ones. Then seats are on these alone, and the operator on the others.
    pub emulated: u8,
    /// OCI archives of images that the nodes have from the start.
    pub images: Vec<PathBuf>,
    /// Local volumes of each node.
    pub volumes_per_node: u8,
    /// Whether each node has as many volumes of each of [`datastores::CLASSES`](super::datastores::CLASSES), too, on file systems of their
    /// own.
    pub datastores: bool,
    /// A node that was not heard of for so long is not ready. Its kubelet reports four times as often.
    pub node_grace: Duration,
    /// Whether the API server writes down who asked for what ([`Cluster::audit_events`](super::Cluster::audit_events)).
    pub audit: bool,
    /// An earlier version of Kubernetes, such as 1.34, that the API server behaves like (`--emulated-version`).
    pub api_version: Option<&'static str>,
    /// Whether nodes and pods reach the API server through an [`ApiProxy`](super::ApiProxy), which can falsify.
    pub api_proxy: bool,
    /// How many API servers, 1 or 2; the second one runs on `n1`, a native node, and dies with it.
    pub api_servers: u8,
    /// Gets lines of progress.
    pub say: Say,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 3,
            emulated: 0,
            images: Vec::new(),
            volumes_per_node: 4,
            datastores: false,
            node_grace: Duration::from_secs(10),
            audit: false,
            api_version: None,
            api_proxy: false,
            api_servers: 1,
            say: Arc::new(|line| eprintln!("cluster: {line}")),
        }
    }
}

impl Options {
    /// Emulated nodes, a native one beside them, and times for them: they stand still for seconds when their host is busy, which is not
    /// their death.
    #[must_use]
    pub fn emulated(nodes: u8) -> Self {
        Self {
            nodes: nodes + 1,
            emulated: nodes,
            node_grace: Duration::from_secs(40),
            ..Self::default()
        }
    }

    /// The address at which nodes and pods reach the API server; people and the control plane use [`api_address`].
    #[must_use]
    pub(super) fn api_advertised(&self) -> Ipv4Addr {
        if self.api_proxy {
            api_front_address()
        } else {
            api_address()
        }
    }

    /// Whether there is a second API server.
    #[must_use]
    pub(super) fn has_second_api_server(&self) -> bool {
        self.api_servers == 2
    }

    /// Options that no cluster can have.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.nodes <= NODES_MAX,
            "{} nodes: it must be 0 to {NODES_MAX}",
            self.nodes
        );
        ensure!(
            [1, 2].contains(&self.api_servers),
            "{} API servers: it must be 1 or 2",
            self.api_servers
        );
        ensure!(
            !self.datastores || self.emulated == 0,
            "datastores are native nodes': leave them out where nodes are emulated"
        );
        let alone = self.nodes > 0 && self.emulated == 0 && !self.api_proxy && !self.audit;
        ensure!(
            alone || !self.has_second_api_server(),
            "a second API server needs a native node n1, and does without audit log and proxy, which are the first one's: leave them out"
        );
        Ok(())
    }

    pub(super) fn plans(&self) -> Vec<NodePlan> {
        let kind = |index| match index <= self.emulated {
            true => NodeKind::Emulated,
            false => NodeKind::Native,
        };
        let plan = |index| NodePlan {
            index,
            kind: kind(index),
        };
        (1..=self.nodes).map(plan).collect()
    }
}

/// Names and addresses of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodePlan {
    /// 1 to [`NODES_MAX`].
    pub index: u8,
    /// What it runs on.
    pub kind: NodeKind,
}

impl NodePlan {
    /// The node with the second API server, if there is one.
    pub const SECOND_API_SERVER: Self = Self {
        index: 1,
        kind: NodeKind::Native,
    };

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_api_server_needs_a_node_of_its_kind() {
        let two = |options: Options| Options {
            api_servers: 2,
            ..options
        };
        assert!(two(Options::default()).check().is_ok());
        let refused = [
            two(Options::emulated(2)),
            two(Options {
                nodes: 0,
                ..Options::default()
            }),
            two(Options {
                audit: true,
                ..Options::default()
            }),
            two(Options {
                api_proxy: true,
                ..Options::default()
            }),
            Options {
                api_servers: 3,
                ..Options::default()
            },
        ];
        for options in refused {
            assert!(options.check().is_err());
        }
        assert!(Options::emulated(2).check().is_ok());
    }

    #[test]
    fn datastores_are_native_nodes() {
        let with_datastores = |options: Options| Options {
            datastores: true,
            ..options
        };
        assert!(with_datastores(Options::default()).check().is_ok());
        assert!(with_datastores(Options::emulated(2)).check().is_err());
    }

    #[test]
    fn the_first_nodes_are_emulated_and_one_beside_them_is_not() {
        let kinds = |options: Options| options.plans().iter().map(|plan| plan.kind).collect::<Vec<_>>();
        let (native, emulated) = (NodeKind::Native, NodeKind::Emulated);
        assert_eq!(kinds(Options::default()), [native; 3]);
        assert_eq!(kinds(Options::emulated(2)), [emulated, emulated, native]);
    }
}
