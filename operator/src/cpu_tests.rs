use ftvm_crds::names::LABEL_CPU;
use ftvm_crds::yaml;

use super::*;
use crate::decide::rig::{CPU, World, amd, changed_cpu, node, node_cpu, poor};

/// A world whose nodes have these CPUs; node 0 is the first.
fn world(cpus: &[NodeCpu]) -> World {
    let mut world = World::new(0);
    let nodes = cpus.iter().enumerate();
    world.nodes = nodes.map(|(index, cpu)| (format!("node-{index}"), node(cpu))).collect();
    world
}

fn change(world: &mut World, index: usize, change: impl FnOnce(&mut NodeSeen)) {
    change(world.nodes.get_mut(&format!("node-{index}")).unwrap());
}

fn common(world: &mut World) -> (String, String) {
    match choose(&world.observe()) {
        Choice::Common(chosen) => (chosen.baseline.unwrap(), chosen.why),
        other => panic!("{other:?}"),
    }
}

fn early(world: &mut World) -> (ChosenCpu, String) {
    match choose(&world.observe()) {
        Choice::Early { why, then } => (then, why),
        other => panic!("{other:?}"),
    }
}

#[test]
fn alike_nodes_have_their_whole_cpu_in_common() {
    let (baseline, why) = common(&mut world(&[node_cpu(), node_cpu(), node_cpu()]));
    assert_eq!(baseline, CPU);
    assert_eq!(why, "common to 3 nodes: node-0, node-1, node-2");
}

#[test]
fn what_one_node_lacks_no_guest_sees() {
    for cpus in [[poor(), node_cpu(), node_cpu()], [node_cpu(), node_cpu(), poor()]] {
        let (baseline, _) = common(&mut world(&cpus));
        assert_eq!(baseline, poor().baseline.to_text());
    }
    // A node that is away now comes back: it counts; one that could have no seat of this VM does not.
    let mut world = world(&[node_cpu(), node_cpu(), poor()]);
    change(&mut world, 2, |node| (node.ready, node.schedulable) = (false, false));
    let taint = |key: &str| Taint {
        key: key.to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Taint::default()
    };
    change(&mut world, 2, |node| {
        node.taints = vec![taint("node.kubernetes.io/unschedulable")]
    });
    assert_eq!(common(&mut world).0, poor().baseline.to_text());
    change(&mut world, 2, |node| node.taints = vec![taint("dedicated")]);
    assert_eq!(common(&mut world).0, CPU);
    let toleration = yaml::read("{key: dedicated, operator: Exists}").unwrap();
    world.vm.spec.placement.tolerations = vec![toleration];
    assert_eq!(common(&mut world).0, poor().baseline.to_text());
    change(&mut world, 2, |node| node.seats = 0);
    assert_eq!(common(&mut world).0, CPU);
}

#[test]
fn only_nodes_that_the_seats_select_count() {
    let mut world = world(&[node_cpu(), node_cpu(), poor()]);
    for (index, rack) in ["one", "two", "three"].into_iter().enumerate() {
        change(&mut world, index, |node| {
            node.labels.insert("rack".to_owned(), rack.to_owned());
        });
    }
    let seats = "[{nodeSelector: {rack: one}}, {nodeSelector: {rack: two}}]";
    world.vm.spec.placement.seats = yaml::read(seats).unwrap();
    assert_eq!(common(&mut world).0, CPU);
    // Both seats in one rack of one node: there is no pair.
    let seats = "[{nodeSelector: {rack: one}}, {nodeSelector: {rack: one}}]";
    world.vm.spec.placement.seats = yaml::read(seats).unwrap();
    assert_eq!(early(&mut world).0.why, "common to 1 node: node-0");
}

#[test]
fn the_maker_with_most_nodes_is_taken_if_they_can_be_told_apart() {
    let mut world = world(&[amd(), amd(), node_cpu(), node_cpu(), poor()]);
    assert_eq!(common(&mut world).0, poor().baseline.to_text());
    // Two nodes in one zone are no pair, three that are away are none either.
    world.vm.spec.placement.topology_key = "zone".to_owned();
    for index in 0..5 {
        let zone = if index < 2 { index } else { 7 };
        change(&mut world, index, |node| {
            node.labels.insert("zone".to_owned(), zone.to_string());
        });
    }
    assert_eq!(common(&mut world).0, amd().baseline.to_text());
    // Nor do nodes count that are in no zone: no seat is placed there.
    for index in 2..5 {
        change(&mut world, index, |node| {
            node.labels.remove("zone");
        });
    }
    assert_eq!(common(&mut world).0, amd().baseline.to_text());
    world.vm.spec.placement.topology_key = "kubernetes.io/hostname".to_owned();
    for index in 2..5 {
        change(&mut world, index, |node| node.ready = false);
    }
    assert_eq!(common(&mut world).0, amd().baseline.to_text());
}

#[test]
fn the_choice_does_not_depend_on_names_or_order() {
    let kinds = [amd(), amd(), node_cpu(), poor()];
    let texts: BTreeSet<String> = (0..kinds.len())
        .map(|turn| {
            let mut kinds = kinds.to_vec();
            kinds.rotate_left(turn);
            common(&mut world(&kinds)).0
        })
        .collect();
    // Two groups of two: the one with two alike.
    assert_eq!(texts, [amd().baseline.to_text()].into());
}

#[test]
fn frequencies_that_cant_be_scaled_part_nodes() {
    let rigid = |khz: &str| NodeCpu {
        tsc_scaling: false,
        ..changed_cpu("tsc=2400000", &format!("tsc={khz}"))
    };
    // A few ppm are nothing.
    let mut near = world(&[rigid("2400000"), rigid("2400100")]);
    assert!(common(&mut near).1.starts_with("common to 2 nodes"));
    let mut far = world(&[rigid("2400000"), rigid("3000000")]);
    let Choice::Unlike(why) = choose(&far.observe()) else {
        panic!("{:?}", choose(&far.observe()));
    };
    assert!(why.contains("3000000 kHz") && why.contains("2400000 kHz"), "{why}");
    // One that can scale follows the others, not they it.
    let mut mixed = world(&[rigid("3000000"), rigid("3000000"), node_cpu()]);
    let (baseline, why) = common(&mut mixed);
    assert!(
        baseline.starts_with("tsc=3000000 ") && why.starts_with("common to 3 nodes"),
        "{why}"
    );
}

#[test]
fn nodes_that_share_nothing_are_named_with_what_to_do() {
    let Choice::Unlike(why) = choose(&world(&[node_cpu(), amd()]).observe()) else {
        panic!("a pair of two makers");
    };
    for words in [
        "node-0 (GenuineIntel",
        "node-1 (AuthenticAMD",
        "add a node like",
        "cpuBaseline to Host",
    ] {
        assert!(why.contains(words), "no {words:?} in: {why}");
    }
}

#[test]
fn silent_and_damaged_nodes_are_waited_for_and_named() {
    let mut world = world(&[node_cpu(), node_cpu(), node_cpu()]);
    change(&mut world, 0, |node| {
        node.cpu = None;
        node.labels.clear();
    });
    change(&mut world, 1, |node| {
        node.cpu = Some("{\"tscScaling\":true,\"baseline\":\"tsc=1\"}".to_owned())
    });
    let (then, why) = early(&mut world);
    assert!(
        why.contains("node-0 (nothing published)") && why.contains("node-1 (its annotation"),
        "{why}"
    );
    // With one that speaks no pair is known of: the guest starts all the same.
    assert_eq!((then.source, then.baseline), (Source::Host, None));
    assert!(then.why.contains("node-daemon"), "{}", then.why);
    change(&mut world, 1, |other| *other = node(&poor()));
    let (then, why) = early(&mut world);
    assert_eq!(then.baseline, Some(poor().baseline.to_text()));
    assert!(why.contains("node-0") && !why.contains("node-1"), "{why}");
    // Whoever is silent and could have no seat now keeps nobody waiting.
    change(&mut world, 0, |node| node.ready = false);
    common(&mut world);
    // Everybody is silent, or nobody is there.
    world
        .nodes
        .values_mut()
        .for_each(|node| (node.ready, node.cpu) = (true, None));
    assert_eq!(early(&mut world).0.source, Source::Host);
    world.nodes.values_mut().for_each(|node| node.seats = 0);
    assert_eq!(choose(&world.observe()), Choice::Nobody);
}

#[test]
fn labels_of_nodes_that_cant_give_it_are_barred() {
    let mut world = world(&[node_cpu(), poor(), amd()]);
    let barred = unfit_labels(&world.observe(), &node_cpu().baseline);
    assert_eq!(barred, [poor().label(), amd().label()].into());
    assert_eq!(unfit_labels(&world.observe(), &poor().baseline), [amd().label()].into());
    // A label that is another's does not bar the other.
    change(&mut world, 1, |node| {
        node.labels.insert(LABEL_CPU.to_owned(), node_cpu().label());
    });
    assert_eq!(
        unfit_labels(&world.observe(), &node_cpu().baseline),
        [amd().label()].into()
    );
    change(&mut world, 0, |node| node.cpu = None);
    assert!(unfit_labels(&world.observe(), &node_cpu().baseline).contains(&node_cpu().label()));
}

#[test]
fn what_nodes_say_is_bounded() {
    let mut world = World::new(0);
    for index in 0..9 {
        let mut damaged = node(&node_cpu());
        damaged.cpu = Some(format!("{{\"tscScaling\":\"{}\"}}", "x".repeat(5000)));
        world.nodes.insert(format!("{index}{}", "n".repeat(252)), damaged);
    }
    let (then, why) = early(&mut world);
    assert!(why.contains("and 4 more"), "{why}");
    assert_eq!(then.why.chars().count(), CHOSEN_WHY_LENGTH_MAX);
}
