//! What a node publishes of its networks: for each role the paths that are configured, and which of them work (`docs/kubernetes.md`).

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::names::ANNOTATION_NETWORKS;

/// Most bytes of the annotation.
pub const BYTES_MAX: usize = 4096;
/// Most paths of a role.
pub const PATHS_MAX: usize = 2;
/// Most letters of a network or an interface: a CIDR of IPv6 has 43.
const NAME_CHARS_MAX: usize = 64;

/// What a network is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkRole {
    /// Daemons, API server, people.
    Management,
    /// The engines' links.
    Replication,
    /// Bulk: a seat that is brought up to date.
    Migration,
    /// What guests are connected to.
    Client,
}

impl NetworkRole {
    /// All of them.
    pub const ALL: [NetworkRole; 4] = [
        NetworkRole::Management,
        NetworkRole::Replication,
        NetworkRole::Migration,
        NetworkRole::Client,
    ];

    /// As the chart's values have it.
    pub fn name(self) -> &'static str {
        match self {
            NetworkRole::Management => "management",
            NetworkRole::Replication => "replication",
            NetworkRole::Migration => "migration",
            NetworkRole::Client => "client",
        }
    }
}

impl fmt::Display for NetworkRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a path works, and what it lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathState {
    /// It works, as far as the node's own end can tell.
    Up,
    /// Its interface was set down.
    SetDown,
    /// Its interface has no carrier.
    NoCarrier,
    /// Its address is not to be used: a duplicate, or still being checked for one.
    AddressUnusable,
    /// There is no interface of this name.
    NoInterface,
    /// The interface has no address; or no interface has one of the CIDR.
    NoAddress,
    /// The role's other path has the same interface.
    SameInterface,
}

impl PathState {
    /// What it lacks, after the name of its network.
    pub fn words(self) -> &'static str {
        match self {
            PathState::Up => "works",
            PathState::SetDown => "is set down",
            PathState::NoCarrier => "has no carrier",
            PathState::AddressUnusable => {
                "has an address that can't be used (another host has it, or it is still being checked)"
            }
            PathState::NoInterface => "is no interface of the node",
            PathState::NoAddress => "has no address of the node",
            PathState::SameInterface => "is on the same interface as the other one",
        }
    }
}

/// A path of a role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePath {
    /// As it is configured: a CIDR, or the name of an interface.
    pub network: String,
    /// Its interface, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// The node's address there, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Whether it works.
    pub state: PathState,
}

/// The networks of a node by role. A role that is not configured is not there; paths are in the order of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeNetworks(pub BTreeMap<NetworkRole, Vec<NodePath>>);

/// What a node publishes of its networks can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeNetworksError {
    /// Longer than [`BYTES_MAX`].
    #[error("its annotation {ANNOTATION_NETWORKS} has {length_bytes} bytes, at most {BYTES_MAX} are read")]
    TooLong {
        /// Its length.
        length_bytes: usize,
    },
    /// Not of the form.
    #[error("its annotation {ANNOTATION_NETWORKS} is malformed ({why})")]
    Malformed {
        /// Where and why.
        why: String,
    },
}

impl NodeNetworks {
    /// Value of [`ANNOTATION_NETWORKS`]: the same for the same.
    pub fn annotation(&self) -> String {
        // Plain data always encodes.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// From the value of [`ANNOTATION_NETWORKS`].
    ///
    /// # Errors
    /// If it is damaged, or no daemon's.
    pub fn read(annotation: &str) -> Result<NodeNetworks, NodeNetworksError> {
        let length_bytes = annotation.len();
        if length_bytes > BYTES_MAX {
            return Err(NodeNetworksError::TooLong { length_bytes });
        }
        // Such an error may have the whole text in it.
        let malformed = |why: String| NodeNetworksError::Malformed {
            why: why.chars().filter(|c| !c.is_control()).take(128).collect(),
        };
        let networks: NodeNetworks = crate::from_json_object(annotation).map_err(malformed)?;
        for (role, paths) in &networks.0 {
            if paths.is_empty() || paths.len() > PATHS_MAX {
                return Err(malformed(format!("{} paths of the role {role}", paths.len())));
            }
            let mut named = paths
                .iter()
                .flat_map(|path| path.interface.iter().chain([&path.network]));
            if !named.all(|name| is_plain(name)) {
                return Err(malformed(format!("a path of the role {role} has no name")));
            }
        }
        Ok(networks)
    }
}

/// Can it stand in a message?
fn is_plain(name: &str) -> bool {
    let length = name.chars().count();
    (1..=NAME_CHARS_MAX).contains(&length) && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks() -> NodeNetworks {
        let path = |network: &str, interface: Option<&str>, address: Option<&str>, state| NodePath {
            network: network.to_owned(),
            interface: interface.map(str::to_owned),
            address: address.map(|address| address.parse().unwrap()),
            state,
        };
        let replication = vec![
            path("10.1.0.0/24", Some("eth1"), Some("10.1.0.7"), PathState::Up),
            path("fd00:2::/64", None, None, PathState::NoAddress),
        ];
        let client = vec![path("eth3", Some("eth3"), None, PathState::NoCarrier)];
        NodeNetworks([(NetworkRole::Client, client), (NetworkRole::Replication, replication)].into())
    }

    #[test]
    fn what_is_published_is_read_and_keeps_its_form() {
        let networks = networks();
        // Other releases' daemons and operators must agree.
        assert_eq!(
            networks.annotation(),
            r#"{"replication":[{"network":"10.1.0.0/24","interface":"eth1","address":"10.1.0.7","state":"Up"},{"network":"fd00:2::/64","state":"NoAddress"}],"client":[{"network":"eth3","interface":"eth3","state":"NoCarrier"}]}"#
        );
        assert_eq!(NodeNetworks::read(&networks.annotation()), Ok(networks));
        assert_eq!(NodeNetworks::read("{}"), Ok(NodeNetworks::default()));
        for role in NetworkRole::ALL {
            let text = format!(r#"{{"{role}":[{{"network":"a","state":"Up"}}]}}"#);
            let read = NodeNetworks::read(&text).unwrap();
            assert_eq!(read.0.into_keys().collect::<Vec<_>>(), [role]);
        }
    }

    /// The longest that a daemon can publish is read: names of interfaces have 15 bytes, each of which may have to be escaped.
    #[test]
    fn all_that_fits_into_the_configuration_fits_into_the_annotation() {
        let path = NodePath {
            network: "1111:2222:3333:4444:5555:6666:7777:8888/128".to_owned(),
            interface: Some("\"".repeat(15)),
            address: Some("1111:2222:3333:4444:5555:6666:7777:8888".parse().unwrap()),
            state: PathState::AddressUnusable,
        };
        let paths = vec![path; PATHS_MAX];
        let networks = NodeNetworks(NetworkRole::ALL.map(|role| (role, paths.clone())).into());
        assert_eq!(NodeNetworks::read(&networks.annotation()), Ok(networks));
    }

    #[test]
    fn damage_is_a_named_error() {
        let long = " ".repeat(BYTES_MAX + 1);
        assert!(matches!(
            NodeNetworks::read(&long),
            Err(NodeNetworksError::TooLong { .. })
        ));
        let path = r#"{"network":"a","state":"Up"}"#;
        for text in [
            "",
            "[]",
            "{",
            r#"{"other":[]}"#,
            r#"{"client":[]}"#,
            r#"{"client":[{"network":"a"}]}"#,
            r#"{"client":[{"network":"","state":"Up"}]}"#,
            r#"{"client":[{"network":"a\u001b[2J","state":"Up"}]}"#,
            r#"{"client":[{"network":"a","interface":"b\n","state":"Up"}]}"#,
            r#"{"client":[{"network":"a","state":"Perhaps"}]}"#,
            r#"{"client":[{"network":"a","address":"nowhere","state":"Up"}]}"#,
            &format!(r#"{{"client":[{path},{path},{path}]}}"#),
            &format!(r#"{{"client":[{{"network":"{}","state":"Up"}}]}}"#, "n".repeat(65)),
        ] {
            let read = NodeNetworks::read(text);
            assert!(matches!(read, Err(NodeNetworksError::Malformed { .. })), "{text}");
        }
        let wordy = format!(r#"{{"client":[{{"network":"a","state":"{}"}}]}}"#, "x".repeat(3000));
        assert!(NodeNetworks::read(&wordy).unwrap_err().to_string().len() < 256);
    }
}
