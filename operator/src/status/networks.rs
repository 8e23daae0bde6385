//! Whether the nodes of the VM's seats have two paths for each role of a network that is configured.

use std::collections::BTreeSet;

use ftvm_crds::SeatEntry;
use ftvm_crds::networks::{NetworkRole, NodeNetworks, NodePath, PATHS_MAX, PathState};

use super::{NETWORKS_REDUNDANT, Said, said};
use crate::observe::Observed;

/// Reason of a path that does not work.
const PATH_DOWN: &str = "PathDown";
/// Reason of a role that has one path alone.
pub(super) const ONE_PATH: &str = "OnePath";

/// What a node's daemon says.
enum Told {
    /// No networks.
    Nothing,
    /// Something that says nothing of now, and why.
    Useless(String),
    Paths(NodeNetworks),
}

fn told(seen: &Observed, node: &str) -> Told {
    let known = seen.nodes.get(node);
    let Some((known, text)) = known.and_then(|known| Some((known, known.networks.as_ref()?))) else {
        return Told::Nothing;
    };
    if !known.ready {
        return Told::Useless("it is not ready".to_owned());
    }
    match NodeNetworks::read(text) {
        Ok(networks) if networks.0.is_empty() => Told::Nothing,
        Ok(networks) => Told::Paths(networks),
        Err(error) => Told::Useless(error.to_string()),
    }
}

/// A role on a node, with its paths.
struct OnNode<'a> {
    role: NetworkRole,
    node: &'a str,
    paths: &'a [NodePath],
}

impl OnNode<'_> {
    /// Its paths that do not work, and why.
    fn down(&self) -> Vec<String> {
        let down = self.paths.iter().filter(|path| is_down(path.state));
        down.map(|path| {
            let interface = path.interface.as_deref().filter(|name| *name != path.network);
            let interface = interface.map_or_else(String::new, |name| format!(" ({name})"));
            let words = path.state.words();
            format!(
                "{} on node {}: {}{interface} {words}",
                self.role, self.node, path.network
            )
        })
        .collect()
    }

    fn is_single(&self) -> bool {
        let up = self.paths.iter().filter(|path| path.state == PathState::Up);
        up.count() < PATHS_MAX
    }
}

fn is_down(state: PathState) -> bool {
    match state {
        PathState::Up | PathState::SameInterface => false,
        PathState::SetDown
        | PathState::NoCarrier
        | PathState::AddressUnusable
        | PathState::NoInterface
        | PathState::NoAddress => true,
    }
}

/// The condition: what is worst comes first.
pub(super) fn networks(seen: &Observed, book: &[SeatEntry]) -> Said {
    let stay = book.iter().filter(|entry| !entry.leaving);
    let nodes: BTreeSet<&str> = stay.filter_map(|entry| entry.node.as_deref()).collect();
    if nodes.is_empty() {
        return unknown("NotKnown", "no seat of the VM has a node yet".to_owned());
    }
    let all: Vec<(&str, Told)> = nodes.into_iter().map(|node| (node, told(seen, node))).collect();
    if all.iter().all(|(_, told)| matches!(told, Told::Nothing)) {
        let message =
            "no node of the VM's seats tells of networks: name them by role in networks of the chart's values";
        return unknown("NotConfigured", message.to_owned());
    }
    let on_nodes: Vec<OnNode<'_>> = all.iter().flat_map(|(node, told)| on_node(node, told)).collect();
    let down: Vec<String> = on_nodes.iter().flat_map(OnNode::down).collect();
    if !down.is_empty() {
        let message = format!(
            "{}: look at the interface, its cable and what it leads to",
            down.join("; ")
        );
        return said(NETWORKS_REDUNDANT, false, PATH_DOWN, message);
    }
    let single = on_nodes.iter().filter(|on_node| on_node.is_single());
    let single: Vec<String> = single.map(named).collect();
    if !single.is_empty() {
        let message = format!(
            "one path alone: {}; name a second network in networks of the chart's values, which is on another interface of the nodes",
            single.join(", ")
        );
        return said(NETWORKS_REDUNDANT, false, ONE_PATH, message);
    }
    let silent = all.iter().find_map(|(node, told)| match told {
        Told::Nothing => Some(format!("node {node} tells of no networks, as others do")),
        Told::Useless(why) => Some(format!(
            "what node {node} told of its networks says nothing of now: {why}"
        )),
        Told::Paths(_) => None,
    });
    if let Some(message) = silent {
        return unknown("NotKnown", message);
    }
    let both: Vec<String> = on_nodes.iter().map(named).collect();
    let message = format!("two paths that work: {}", both.join(", "));
    said(NETWORKS_REDUNDANT, true, "TwoPaths", message)
}

fn on_node<'a>(node: &'a str, told: &'a Told) -> Vec<OnNode<'a>> {
    let Told::Paths(networks) = told else { return Vec::new() };
    let roles = networks.0.iter();
    roles
        .map(|(role, paths)| OnNode {
            role: *role,
            node,
            paths,
        })
        .collect()
}

fn named(on_node: &OnNode<'_>) -> String {
    format!("{} on node {}", on_node.role, on_node.node)
}

fn unknown(reason: &str, message: String) -> Said {
    Said {
        holds: None,
        ..said(NETWORKS_REDUNDANT, false, reason, message)
    }
}
