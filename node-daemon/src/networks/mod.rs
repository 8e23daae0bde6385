//! The networks of this node by role: which paths are configured, and which of them work.
//!
//! ```text
//!   options ─► Roles ──────────────┐
//!   kernel ──► netlink ─► watch ─► find ─► NodeNetworks ─► metrics, annotation of the Node
//! ```
//!
//! A path is the node's own end: an interface that is up, has a carrier and an address. What lies beyond its cable is not asked.

mod find;
mod netlink;
mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ftvm_crds::networks::{NetworkRole, PATHS_MAX};

use crate::bridges::is_name;

pub use find::{Address, Interface, find};
pub use watch::{Seen, follow};

/// Letters of what is no network that a message repeats.
const REPEATED_CHARS_MAX: usize = 64;

/// The addresses that begin alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    /// 1 to 32, or to 128.
    prefix_bits: u8,
}

impl Cidr {
    /// Is this one of them?
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let differing = own.to_bits() ^ other.to_bits();
                differing.leading_zeros() >= u32::from(self.prefix_bits)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let differing = own.to_bits() ^ other.to_bits();
                differing.leading_zeros() >= u32::from(self.prefix_bits)
            }
            _ => false,
        }
    }

    /// The same without what differs from address to address.
    fn masked(self) -> Cidr {
        let prefix_bits = u32::from(self.prefix_bits);
        let address = match self.address {
            IpAddr::V4(own) => IpAddr::V4((own.to_bits() & !u32::MAX.unbounded_shr(prefix_bits)).into()),
            IpAddr::V6(own) => IpAddr::V6((own.to_bits() & !u128::MAX.unbounded_shr(prefix_bits)).into()),
        };
        Cidr { address, ..self }
    }
}

impl FromStr for Cidr {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let none = || NetworkError::Cidr(repeated(text));
        let (address, prefix) = text.split_once('/').ok_or_else(none)?;
        let address: IpAddr = address.parse().map_err(|_| none())?;
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let prefix_bits: u8 = prefix.parse().ok().filter(|_| digits).ok_or_else(none)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        if !(1..=most).contains(&prefix_bits) {
            return Err(none());
        }
        let cidr = Cidr { address, prefix_bits };
        if cidr.masked() != cidr {
            return Err(NetworkError::HostBits {
                cidr: text.to_owned(),
                meant: cidr.masked().to_string(),
            });
        }
        if !may_be_of_other_nodes(address) {
            return Err(NetworkError::Local(text.to_owned()));
        }
        Ok(cidr)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

/// Can another node dial such an address as it is?
fn may_be_of_other_nodes(address: IpAddr) -> bool {
    let of_a_link = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local() || address.to_ipv4_mapped().is_some(),
    };
    !(of_a_link || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

/// A network, as whoever installs the chart names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Where the node has an address of it.
    Cidr(Cidr),
    /// This interface.
    Interface(String),
}

impl FromStr for Network {
    type Err = NetworkError;

    /// No interface's name has a slash; an address alone is a CIDR that is not finished.
    fn from_str(text: &str) -> Result<Self, NetworkError> {
        match text {
            "lo" => Err(NetworkError::Local(text.to_owned())),
            _ if text.contains('/') || text.parse::<IpAddr>().is_ok() => Ok(Network::Cidr(text.parse()?)),
            _ if is_name(text) => Ok(Network::Interface(text.to_owned())),
            _ => Err(NetworkError::Interface(repeated(text))),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Network::Cidr(cidr) => cidr.fmt(f),
            Network::Interface(name) => f.write_str(name),
        }
    }
}

/// `ROLE=NETWORK`, as an option has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleNetwork {
    role: NetworkRole,
    network: Network,
}

impl FromStr for RoleNetwork {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let (role, network) = text.split_once('=').unwrap_or((text, ""));
        let found = NetworkRole::ALL.into_iter().find(|known| known.name() == role);
        Ok(RoleNetwork {
            role: found.ok_or_else(|| NetworkError::Role(repeated(role)))?,
            network: network.parse()?,
        })
    }
}

/// What is no network, or not together with the others. The values of the chart are meant where none is named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Another word.
    #[error(
        "`{0}` is no role of a network: write management, replication, migration or client, `=`, and a CIDR or an interface"
    )]
    Role(String),
    /// Neither of IPv4 nor of IPv6.
    #[error(
        "`{0}` is no CIDR: write the network's address, `/` and the number of leading bits, as in 10.1.0.0/24 or fd00:1::/64"
    )]
    Cidr(String),
    /// An address of a network, mostly.
    #[error("the CIDR {cidr} is no network, for it has more bits set than its prefix covers: write {meant}")]
    HostBits {
        /// As it was written.
        cidr: String,
        /// As it was meant.
        meant: String,
    },
    /// Loopback, link-local, multicast, IPv4 in IPv6.
    #[error(
        "`{0}` leads to no other node: name a network that nodes reach each other by (not loopback, link-local, multicast or IPv4-mapped)"
    )]
    Local(String),
    /// No device can have this name.
    #[error(
        "`{0}` can't be the name of an interface: 1 to 15 letters, digits, `_`, `.` and `-`, no `.` or `-` at the beginning; a CIDR has a `/`"
    )]
    Interface(String),
    /// Nothing is done with a third one.
    #[error("{role} has more than {PATHS_MAX} networks: take some away from networks.{role} of the chart's values")]
    TooMany {
        /// Whose.
        role: NetworkRole,
    },
    /// One can't stand in for itself.
    #[error(
        "{role} has the network {network} twice, which makes no second path: name another one in networks.{role} of the chart's values"
    )]
    Twice {
        /// Whose.
        role: NetworkRole,
        /// Which.
        network: String,
    },
}

fn repeated(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(REPEATED_CHARS_MAX)
        .collect()
}

/// The networks of each role that has any, in the order in which they were named: it numbers the paths on all nodes alike.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles(BTreeMap<NetworkRole, Vec<Network>>);

impl Roles {
    /// Those that the options name.
    ///
    /// # Errors
    /// If a role has too many, or one twice.
    pub fn new(named: Vec<RoleNetwork>) -> Result<Roles, NetworkError> {
        let mut roles: BTreeMap<NetworkRole, Vec<Network>> = BTreeMap::new();
        for RoleNetwork { role, network } in named {
            let networks = roles.entry(role).or_default();
            if networks.contains(&network) {
                let network = network.to_string();
                return Err(NetworkError::Twice { role, network });
            }
            if networks.len() == PATHS_MAX {
                return Err(NetworkError::TooMany { role });
            }
            networks.push(network);
        }
        Ok(Roles(roles))
    }

    /// Is there nothing to look for?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn roles(named: &[&str]) -> Roles {
        Roles::new(named.iter().map(|text| text.parse().unwrap()).collect()).unwrap()
    }

    #[test]
    fn a_cidr_has_its_addresses_and_no_others() {
        for (cidr, inside, outside) in [
            ("10.1.0.0/24", "10.1.0.255", "10.1.1.0"),
            ("10.1.0.7/32", "10.1.0.7", "10.1.0.6"),
            ("128.0.0.0/1", "255.0.0.1", "127.0.0.1"),
            ("fd00:1::/64", "fd00:1::ffff:1", "fd00:1:0:1::1"),
            ("fd00:1::7/128", "fd00:1::7", "fd00:1::6"),
            ("10.1.0.0/24", "10.1.0.1", "::ffff:10.1.0.1"),
        ] {
            let parsed: Cidr = cidr.parse().unwrap();
            assert!(parsed.contains(inside.parse().unwrap()), "{cidr} {inside}");
            assert!(!parsed.contains(outside.parse().unwrap()), "{cidr} {outside}");
            assert_eq!(parsed.to_string(), cidr);
        }
    }

    #[test]
    fn what_is_no_network_is_refused_in_words() {
        for (text, words) in [
            ("", "is no role"),
            ("replication", "can't be the name of an interface"),
            ("storage=10.1.0.0/24", "`storage` is no role"),
            ("Client=eth0", "`Client` is no role"),
            ("client=", "can't be the name of an interface"),
            ("client=eth 0", "can't be the name of an interface"),
            ("client=a-name-that-is-too-long", "can't be the name of an interface"),
            ("client=10.1.0.0", "is no CIDR"),
            ("client=fd00:1::", "is no CIDR"),
            ("client=10.1.0.0/33", "is no CIDR"),
            ("client=10.1.0.0/0", "is no CIDR"),
            ("client=10.1.0.0/+8", "is no CIDR"),
            ("client=10.1.0.0/", "is no CIDR"),
            ("client=10.1.0/24", "is no CIDR"),
            ("client=fd00:1::/129", "is no CIDR"),
            ("client=fd00:1::/64/64", "is no CIDR"),
            ("client=10.1.0.7/24", "write 10.1.0.0/24"),
            ("client=fd00:1::7/64", "write fd00:1::/64"),
            ("client=127.0.0.0/8", "leads to no other node"),
            ("client=169.254.0.0/16", "leads to no other node"),
            ("client=224.0.0.0/4", "leads to no other node"),
            ("client=fe80::/10", "leads to no other node"),
            ("client=::ffff:10.1.0.0/112", "leads to no other node"),
            ("client=lo", "leads to no other node"),
        ] {
            let told = match text.parse::<RoleNetwork>() {
                Ok(_) => "ok".to_owned(),
                Err(error) => error.to_string(),
            };
            assert!(told.contains(words), "{text:?}: {told}");
        }
        let long: NetworkError = format!("client={}/1", "x\u{1b}".repeat(5000))
            .parse::<RoleNetwork>()
            .unwrap_err();
        let told = long.to_string();
        assert!(told.len() < 256 && !told.contains('\u{1b}'), "{told}");
    }

    #[test]
    fn a_role_has_up_to_two_networks_none_of_them_twice() {
        let roles_of = |named: &[&str]| Roles::new(named.iter().map(|text| text.parse().unwrap()).collect());
        let two = ["client=eth0", "replication=10.1.0.0/24", "client=eth1"];
        let roles = roles_of(&two).unwrap();
        assert_eq!(roles.0.len(), 2);
        assert!(!roles.is_empty() && roles_of(&[]).unwrap().is_empty());
        let error = roles_of(&["client=eth0", "client=eth1", "client=eth2"]).unwrap_err();
        assert!(error.to_string().contains("networks.client"), "{error}");
        let error = roles_of(&["client=eth0", "replication=eth0", "client=eth0"]).unwrap_err();
        assert!(
            error.to_string().contains("client has the network eth0 twice"),
            "{error}"
        );
    }
}
