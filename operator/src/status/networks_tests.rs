//! What is told of the paths of the nodes that have a VM's seats.

use super::tests::{expect, said};
use super::*;
use crate::decide::rig::World;

/// Two paths of the role replication, of which the second one is in this state.
fn paths(second: &str) -> String {
    let first = r#"{"network":"10.1.0.0/24","interface":"eth1","address":"10.1.0.7","state":"Up"}"#;
    format!(r#"{{"replication":[{first},{{"network":"eth2","interface":"eth2","state":"{second}"}}]}}"#)
}

/// A protected VM on two of three nodes, and the names of these two.
fn protected() -> (World, [String; 2]) {
    let mut world = World::new(3);
    assert!(world.settle(60) && world.is_protected());
    let mut nodes: Vec<String> = world.book().into_iter().filter_map(|entry| entry.node).collect();
    nodes.sort();
    (world, nodes.try_into().unwrap())
}

fn tell(world: &mut World, node: &str, networks: &str) {
    world.nodes.get_mut(node).unwrap().networks = Some(networks.to_owned());
}

fn told(world: &mut World) -> Condition {
    said(world, NETWORKS_REDUNDANT)
}

fn is_unknown(condition: &Condition, reason: &str, words: &str) {
    assert_eq!(
        (condition.status.as_str(), condition.reason.as_str()),
        ("Unknown", reason)
    );
    assert!(condition.message.contains(words), "{}", condition.message);
}

#[test]
fn what_is_down_is_told_before_what_is_single() {
    let (mut world, [one, other]) = protected();
    is_unknown(&told(&mut world), "NotConfigured", "networks of the chart's values");
    // Daemons are replaced one after the other.
    tell(&mut world, &one, &paths("Up"));
    is_unknown(
        &told(&mut world),
        "NotKnown",
        &format!("node {other} tells of no networks"),
    );
    tell(&mut world, &other, &paths("Up"));
    let good = told(&mut world);
    assert_eq!((good.status.as_str(), good.reason.as_str()), ("True", "TwoPaths"));
    let both = format!("replication on node {one}, replication on node {other}");
    assert!(good.message.contains(&both), "{}", good.message);

    tell(&mut world, &other, &paths("SameInterface"));
    expect(
        &told(&mut world),
        "OnePath",
        &format!("one path alone: replication on node {other};"),
    );
    tell(&mut world, &one, &paths("NoCarrier"));
    let down = format!("replication on node {one}: eth2 has no carrier: look at");
    expect(&told(&mut world), "PathDown", &down);
    tell(
        &mut world,
        &other,
        r#"{"migration":[{"network":"10.3.0.0/24","state":"NoAddress"}]}"#,
    );
    let down = format!("has no carrier; migration on node {other}: 10.3.0.0/24 has no address of the node");
    expect(&told(&mut world), "PathDown", &down);
    // A role with one network has one path, whether that works or not.
    tell(&mut world, &one, "{}");
    let single = r#"{"client":[{"network":"br0","interface":"br0","state":"Up"}]}"#;
    tell(&mut world, &other, single);
    expect(&told(&mut world), "OnePath", &format!("client on node {other};"));
}

/// Of the other nodes nothing matters to this VM.
#[test]
fn only_the_nodes_of_its_seats_count() {
    let (mut world, nodes) = protected();
    for node in &nodes {
        tell(&mut world, node, &paths("Up"));
    }
    let third = world.nodes.keys().find(|name| !nodes.contains(name)).unwrap().clone();
    tell(&mut world, &third, &paths("NoCarrier"));
    assert_eq!(told(&mut world).reason, "TwoPaths");
}

/// Whoever has named networks is not told to name them because a VM is nowhere yet.
#[test]
fn without_a_seat_on_a_node_nothing_is_known() {
    let mut world = World::new(3);
    for node in world.nodes.values_mut() {
        node.networks = Some(paths("Up"));
    }
    is_unknown(&told(&mut world), "NotKnown", "no seat of the VM has a node");
}

/// What was told by a node that is away, or by nobody's daemon, is no reason to call anything redundant.
#[test]
fn what_says_nothing_of_now_is_not_known() {
    let (mut world, [one, other]) = protected();
    tell(&mut world, &one, &paths("Up"));
    for damaged in ["", "[]", r#"{"replication":[]}"#, &paths("Perhaps")] {
        tell(&mut world, &other, damaged);
        is_unknown(
            &told(&mut world),
            "NotKnown",
            "its annotation ftvm.dev/networks is malformed",
        );
    }
    tell(&mut world, &other, &paths("Up"));
    world.nodes.get_mut(&other).unwrap().ready = false;
    is_unknown(&told(&mut world), "NotKnown", &format!("node {other} told"));
    // Longer than what is read, and full of letters that move a terminal's cursor.
    let wordy = format!(
        r#"{{"replication":[{{"network":"{}","state":"Up"}}]}}"#,
        "\u{1b}[2J".repeat(500)
    );
    tell(&mut world, &one, &wordy);
    let condition = told(&mut world);
    is_unknown(&condition, "NotKnown", "malformed");
    assert!(
        !condition.message.contains('\u{1b}') && condition.message.len() < 512,
        "{}",
        condition.message
    );
}

/// One event for a path that is lost, one when there are two again; none for what is configured so.
#[test]
fn a_path_that_is_lost_is_an_event() {
    let (mut world, nodes) = protected();
    let mut after = |second: &str| {
        for node in &nodes {
            tell(&mut world, node, &paths(second));
        }
        let before = world.vm.status.clone().unwrap();
        let seen = world.observe();
        let now = status(&seen, &crate::decide::decide(&seen));
        let reasons = changes(&before, &now)
            .into_iter()
            .map(|change| (change.warning, change.reason));
        let reasons: Vec<_> = reasons.collect();
        world.vm.status = Some(now);
        reasons
    };
    assert!(after("SameInterface").is_empty());
    assert_eq!(after("Up"), [(false, "NetworksRedundant".to_owned())]);
    assert_eq!(after("NoCarrier"), [(true, "PathDown".to_owned())]);
    assert!(after("NoCarrier").is_empty());
    assert_eq!(after("Up"), [(false, "NetworksRedundant".to_owned())]);
}
