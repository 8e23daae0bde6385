//! Which paths a node has: a pure function of what is configured and what the kernel tells.
//!
//! The two paths of a role have two interfaces. Where each network could have several, those are taken with which most paths work;
//! then the one that was made first, so that the same is found again.

use std::net::IpAddr;

use ftvm_crds::networks::{NetworkRole, NodeNetworks, NodePath, PathState};

use super::{Network, Roles, may_be_of_other_nodes};

/// An interface of the node, as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its number, which no other one has as long as it is there.
    pub index: u32,
    /// Its name, without what would change how a terminal shows it.
    pub name: String,
    /// It leads back to the node.
    pub loopback: bool,
    /// Whoever administers the node has set it up.
    pub set_up: bool,
    /// Its cable, or what stands for it, carries something.
    pub carrier: bool,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The node's own.
    pub ip: IpAddr,
    /// It is no duplicate, nor still checked for being one.
    pub usable: bool,
    /// It came first in its network, and stays: not added to another one, not temporary, and not a single address as virtual ones are, which
    /// move from node to node.
    pub main: bool,
}

/// An interface that could be a path of a network.
struct Candidate<'a> {
    interface: &'a Interface,
    address: Option<IpAddr>,
    state: PathState,
}

/// The paths of each role that is configured.
pub fn find(roles: &Roles, interfaces: &[Interface]) -> NodeNetworks {
    let found = roles.0.iter();
    NodeNetworks(
        found
            .map(|(role, networks)| (*role, paths(*role, networks, interfaces)))
            .collect(),
    )
}

fn paths(role: NetworkRole, networks: &[Network], interfaces: &[Interface]) -> Vec<NodePath> {
    let of = |network: &Network| candidates(role, network, interfaces);
    let candidates: Vec<Vec<Candidate<'_>>> = networks.iter().map(of).collect();
    let chosen: Vec<Option<&Candidate<'_>>> = match &candidates[..] {
        [one, other] => apart(one, other).into(),
        all => all.iter().map(|candidates| candidates.first()).collect(),
    };
    let all = networks.iter().zip(&candidates).zip(chosen);
    all.map(|((network, candidates), chosen)| path(network, candidates, chosen))
        .collect()
}

/// In the order in which they are taken: what works first.
fn candidates<'a>(role: NetworkRole, network: &Network, interfaces: &'a [Interface]) -> Vec<Candidate<'a>> {
    // What leads back to the node works always, and is no path.
    let interfaces = interfaces.iter().filter(|interface| !interface.loopback);
    let mut found: Vec<_> = interfaces
        .filter_map(|interface| candidate(role, network, interface))
        .collect();
    found.sort_by_key(|candidate| (candidate.state != PathState::Up, candidate.interface.index));
    found
}

fn candidate<'a>(role: NetworkRole, network: &Network, interface: &'a Interface) -> Option<Candidate<'a>> {
    let address = match network {
        Network::Interface(name) if *name != interface.name => return None,
        Network::Interface(_) => best(interface, may_be_of_other_nodes),
        Network::Cidr(cidr) => Some(best(interface, |ip| cidr.contains(ip) && may_be_of_other_nodes(ip))?),
    };
    let state = match address {
        _ if !interface.set_up => PathState::SetDown,
        _ if !interface.carrier => PathState::NoCarrier,
        Some(address) if !address.usable => PathState::AddressUnusable,
        // Guests' frames pass a bridge that has none.
        None if role != NetworkRole::Client => PathState::NoAddress,
        _ => PathState::Up,
    };
    Some(Candidate {
        interface,
        address: address.map(|address| address.ip),
        state,
    })
}

/// Of its addresses that are wanted the one that stays, in whatever order they are told.
fn best(interface: &Interface, wanted: impl Fn(IpAddr) -> bool) -> Option<Address> {
    let addresses = interface.addresses.iter().filter(|address| wanted(address.ip));
    addresses
        .min_by_key(|address| (!address.usable, !address.main, address.ip))
        .copied()
}

/// One of each, on two interfaces: whoever chooses first must not take the only one that the other could have.
fn apart<'a>(one: &'a [Candidate<'a>], other: &'a [Candidate<'a>]) -> [Option<&'a Candidate<'a>>; 2] {
    let (first, second) = (one.first(), other.first());
    let straight = [first, beside(other, first)];
    let crossed = [beside(one, second), second];
    if worth(&crossed) > worth(&straight) {
        crossed
    } else {
        straight
    }
}

/// The first on another interface than this one.
fn beside<'a>(candidates: &'a [Candidate<'a>], taken: Option<&Candidate<'_>>) -> Option<&'a Candidate<'a>> {
    candidates
        .iter()
        .find(|candidate| taken.is_none_or(|taken| taken.interface.index != candidate.interface.index))
}

/// How many of them work, and how many there are.
fn worth(pair: &[Option<&Candidate<'_>>; 2]) -> (usize, usize) {
    let found = pair.iter().flatten();
    let works = found.clone().filter(|candidate| candidate.state == PathState::Up);
    (works.count(), found.count())
}

fn path(network: &Network, candidates: &[Candidate<'_>], chosen: Option<&Candidate<'_>>) -> NodePath {
    let (of, state) = match (chosen, candidates.first()) {
        (Some(chosen), _) => (Some(chosen), chosen.state),
        // The only one that there is was taken.
        (None, Some(taken)) => (Some(taken), PathState::SameInterface),
        (None, None) => (
            None,
            match network {
                Network::Interface(_) => PathState::NoInterface,
                Network::Cidr(_) => PathState::NoAddress,
            },
        ),
    };
    NodePath {
        network: network.to_string(),
        interface: of.map(|candidate| candidate.interface.name.clone()),
        address: of.and_then(|candidate| candidate.address),
        state,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::roles;
    use super::*;

    /// An interface that works, with these addresses.
    fn interface(index: u32, name: &str, addresses: &[&str]) -> Interface {
        let address = |text: &&str| Address {
            ip: text.parse().unwrap(),
            usable: true,
            main: true,
        };
        Interface {
            index,
            name: name.to_owned(),
            loopback: false,
            set_up: true,
            carrier: true,
            addresses: addresses.iter().map(address).collect(),
        }
    }

    /// A node with two cables.
    fn two() -> Vec<Interface> {
        let mut lo = interface(1, "lo", &["127.0.0.1", "::1"]);
        lo.loopback = true;
        vec![
            lo,
            interface(2, "eth1", &["fe80::1", "10.1.0.7", "fd00:1::7"]),
            interface(3, "eth2", &["fe80::2", "10.2.0.7", "fd00:2::7"]),
        ]
    }

    /// State, interface and address of each path of the role replication.
    fn found(networks: &[&str], interfaces: &[Interface]) -> Vec<String> {
        let named: Vec<String> = networks
            .iter()
            .map(|network| format!("replication={network}"))
            .collect();
        let named: Vec<&str> = named.iter().map(String::as_str).collect();
        let mut found = find(&roles(&named), interfaces).0;
        let paths = found.remove(&NetworkRole::Replication).unwrap();
        assert!(found.is_empty());
        let told = paths.iter().zip(networks).map(|(path, network)| {
            assert_eq!(path.network, *network);
            let interface = path.interface.as_deref().unwrap_or("-");
            let address = path.address.map_or("-".to_owned(), |address| address.to_string());
            format!("{:?} {interface} {address}", path.state)
        });
        told.collect()
    }

    #[test]
    fn one_and_two_paths_by_address_and_by_name() {
        let node = two();
        assert_eq!(found(&["10.1.0.0/24"], &node), ["Up eth1 10.1.0.7"]);
        assert_eq!(found(&["eth2"], &node), ["Up eth2 10.2.0.7"]);
        assert_eq!(
            found(&["10.2.0.0/24", "10.1.0.0/24"], &node),
            ["Up eth2 10.2.0.7", "Up eth1 10.1.0.7"]
        );
        assert_eq!(
            found(&["fd00:1::/64", "eth2"], &node),
            ["Up eth1 fd00:1::7", "Up eth2 10.2.0.7"]
        );
        assert_eq!(found(&["10.1.0.0/24"], &[]), ["NoAddress - -"]);
        assert_eq!(find(&roles(&[]), &node), NodeNetworks::default());
        // A CIDR so wide that addresses of a link are among its own, too.
        let of_a_link = interface(2, "eth1", &["fe80::1"]);
        assert_eq!(found(&["fc00::/6"], &[of_a_link]), ["NoAddress - -"]);
        // A network that only the way back to the node itself has.
        let mut lonely = two();
        lonely[0].addresses = interface(1, "lo", &["10.9.0.1"]).addresses;
        assert_eq!(found(&["10.9.0.0/24"], &lonely), ["NoAddress - -"]);
    }

    #[test]
    fn each_role_has_its_own_paths() {
        let roles = roles(&[
            "replication=10.1.0.0/24",
            "migration=10.1.0.0/24",
            "client=eth2",
            "client=eth9",
        ]);
        let found = find(&roles, &two()).0;
        let states = |role: NetworkRole| found[&role].iter().map(|path| path.state).collect::<Vec<_>>();
        assert_eq!(found.len(), 3);
        assert_eq!(states(NetworkRole::Replication), [PathState::Up]);
        // Roles may share: it is a role's own two paths that may not.
        assert_eq!(states(NetworkRole::Migration), [PathState::Up]);
        assert_eq!(states(NetworkRole::Client), [PathState::Up, PathState::NoInterface]);
    }

    /// What is told of the first of two paths after its interface changed so.
    fn after(change: impl FnOnce(&mut Interface)) -> String {
        let mut node = two();
        change(&mut node[1]);
        let found = found(&["10.1.0.0/24", "10.2.0.0/24"], &node);
        assert_eq!(found[1], "Up eth2 10.2.0.7");
        found[0].clone()
    }

    #[test]
    fn what_is_missing_or_down_is_told_and_the_other_path_stays() {
        assert_eq!(after(|eth1| eth1.carrier = false), "NoCarrier eth1 10.1.0.7");
        assert_eq!(after(|eth1| eth1.set_up = false), "SetDown eth1 10.1.0.7");
        let both = |eth1: &mut Interface| (eth1.set_up, eth1.carrier) = (false, false);
        assert_eq!(after(both), "SetDown eth1 10.1.0.7");
        assert_eq!(after(|eth1| eth1.addresses.clear()), "NoAddress - -");
        let unusable = |eth1: &mut Interface| eth1.addresses[1].usable = false;
        assert_eq!(after(unusable), "AddressUnusable eth1 10.1.0.7");
        assert_eq!(found(&["eth1", "eth7"], &two())[1], "NoInterface - -");
    }

    #[test]
    fn an_interface_without_an_address_is_a_path_of_guests_alone() {
        let bare = [interface(2, "br0", &["fe80::1", "169.254.3.4"])];
        assert_eq!(found(&["br0"], &bare), ["NoAddress br0 -"]);
        let found = find(&roles(&["client=br0"]), &bare).0;
        assert_eq!(found[&NetworkRole::Client][0].state, PathState::Up);
    }

    /// Two networks on one cable are one path.
    #[test]
    fn two_paths_have_two_interfaces() {
        let one = [interface(2, "eth1", &["10.1.0.7", "10.2.0.7"])];
        for networks in [
            ["10.1.0.0/24", "10.2.0.0/24"],
            ["10.1.0.0/24", "eth1"],
            ["10.1.0.0/24", "10.0.0.0/8"],
        ] {
            let found = found(&networks, &one);
            assert_eq!(found[0], "Up eth1 10.1.0.7", "{networks:?}");
            assert!(found[1].starts_with("SameInterface eth1 "), "{networks:?} {found:?}");
        }
    }

    /// An address in both CIDRs: the wider one takes the other interface, whichever of them is named first.
    #[test]
    fn where_networks_overlap_each_has_an_interface_of_its_own() {
        let node = two();
        assert_eq!(
            found(&["10.0.0.0/8", "10.1.0.0/24"], &node),
            ["Up eth2 10.2.0.7", "Up eth1 10.1.0.7"]
        );
        assert_eq!(
            found(&["10.1.0.0/24", "10.0.0.0/8"], &node),
            ["Up eth1 10.1.0.7", "Up eth2 10.2.0.7"]
        );
        let mut down = two();
        down[1].carrier = false;
        assert_eq!(
            found(&["10.0.0.0/8", "10.1.0.0/24"], &down),
            ["Up eth2 10.2.0.7", "NoCarrier eth1 10.1.0.7"]
        );
    }

    #[test]
    fn of_several_interfaces_that_would_do_one_that_works_is_taken() {
        let mut node = vec![interface(4, "eth4", &["10.1.0.9"]), interface(3, "eth3", &["10.1.0.8"])];
        assert_eq!(found(&["10.1.0.0/24"], &node), ["Up eth3 10.1.0.8"]);
        node[1].carrier = false;
        assert_eq!(found(&["10.1.0.0/24"], &node), ["Up eth4 10.1.0.9"]);
        node[0].carrier = false;
        assert_eq!(found(&["10.1.0.0/24"], &node), ["NoCarrier eth3 10.1.0.8"]);
    }

    /// The order in which the kernel tells addresses makes no difference.
    #[test]
    fn of_several_addresses_the_same_one_is_taken() {
        let mut eth1 = interface(2, "eth1", &["fd00:1::7", "10.1.0.9", "10.1.0.8"]);
        assert_eq!(found(&["eth1"], std::slice::from_ref(&eth1)), ["Up eth1 10.1.0.8"]);
        eth1.addresses.reverse();
        assert_eq!(found(&["eth1"], std::slice::from_ref(&eth1)), ["Up eth1 10.1.0.8"]);
        eth1.addresses[0].usable = false;
        assert_eq!(found(&["eth1"], std::slice::from_ref(&eth1)), ["Up eth1 10.1.0.9"]);
        // An address that moves from node to node is not the node's, however low it is; where there is no other one it has to do.
        let mut virtual_too = interface(2, "eth1", &["10.1.0.1", "10.1.0.7"]);
        virtual_too.addresses[0].main = false;
        assert_eq!(
            found(&["10.1.0.0/24"], std::slice::from_ref(&virtual_too)),
            ["Up eth1 10.1.0.7"]
        );
        virtual_too.addresses.pop();
        assert_eq!(found(&["10.1.0.0/24"], &[virtual_too]), ["Up eth1 10.1.0.1"]);
    }
}
