//! When the guest's CPU is chosen, how long it stays, and what waits for it.

use ftvm_crds::{CpuBaseline, RunStrategy};

use super::rig::{CPU, World, amd, node, node_cpu, poor};
use super::*;
use crate::status::{self, CPU_CHOSEN, PROTECTED};

fn cpu(world: &World) -> Option<ChosenCpu> {
    world.vm.status.as_ref()?.cpu.clone()
}

fn baseline(world: &World) -> Option<String> {
    cpu(world)?.baseline
}

/// Reason and message.
fn condition(world: &World, kind: &str) -> (String, String) {
    let status = world.vm.status.as_ref().unwrap();
    let found = status.condition(kind).unwrap();
    (found.reason.clone(), found.message.clone())
}

fn set(world: &mut World, name: &str, cpu: &ftvm_crds::cpu::NodeCpu) {
    world.nodes.insert(name.to_owned(), node(cpu));
}

#[test]
fn it_is_chosen_before_any_pod_and_stays_until_the_vm_is_halted() {
    let mut world = World::new(3);
    set(&mut world, "node-2", &poor());
    while world.pods.is_empty() {
        assert!(world.step());
        assert!(world.pods.is_empty() || cpu(&world).is_some());
    }
    assert_eq!(baseline(&world), Some(poor().baseline.to_text()));
    assert!(world.settle(60) && world.is_protected());
    assert_eq!(condition(&world, CPU_CHOSEN).0, "Common");
    // All nodes become better, or say nothing any more: the guest keeps what it has.
    set(&mut world, "node-2", &node_cpu());
    world.nodes.get_mut("node-1").unwrap().cpu = None;
    world.settle(20);
    assert_eq!(baseline(&world), Some(poor().baseline.to_text()));
    set(&mut world, "node-1", &node_cpu());
    world.want(RunStrategy::Halted);
    assert!(world.settle(60));
    assert!(cpu(&world).unwrap().former);
    assert_eq!(condition(&world, CPU_CHOSEN).0, "NotChosen");
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    world.want(RunStrategy::Always);
    assert!(world.settle(80) && world.is_protected());
    assert_eq!(baseline(&world).as_deref(), Some(CPU));
}

/// Its volumes may be there, and nowhere else.
#[test]
fn a_vm_that_was_halted_goes_back_to_cpus_like_it_had() {
    let mut world = World::new(2);
    assert!(world.settle(60));
    world.want(RunStrategy::Halted);
    assert!(world.settle(60));
    for name in ["node-2", "node-3", "node-4"] {
        set(&mut world, name, &amd());
    }
    set(&mut world, "node-1", &poor());
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    world.want(RunStrategy::Always);
    assert!(world.settle(80) && world.is_protected());
    assert_eq!(baseline(&world), Some(poor().baseline.to_text()));
    // With one of them away it starts without a standby all the same.
    world.want(RunStrategy::Halted);
    assert!(world.settle(60));
    world.nodes.get_mut("node-1").unwrap().ready = false;
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    world.want(RunStrategy::Always);
    world.settle(80);
    assert_eq!(baseline(&world), Some(poor().baseline.to_text()));
    // Where there are none any more it starts on others.
    world.want(RunStrategy::Halted);
    assert!(world.settle(60), "{:#?}", world.vm.status);
    world.nodes.remove("node-0");
    world.nodes.remove("node-1");
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    world.want(RunStrategy::Always);
    world.settle(80);
    assert_eq!(baseline(&world), Some(amd().baseline.to_text()));
}

#[test]
fn silent_nodes_are_waited_for_and_then_the_guest_starts_without_them() {
    let mut world = World::new(3);
    world.nodes.values_mut().for_each(|node| node.cpu = None);
    let begin = world.now;
    for _ in 0..10 {
        world.step();
        world.pass(2);
    }
    assert!(world.pods.is_empty() && world.claims.is_empty());
    let (reason, message) = condition(&world, CPU_CHOSEN);
    assert_eq!(reason, "WaitsForNodes");
    assert!(message.contains("node-0 (nothing published)"), "{message}");
    assert_eq!(condition(&world, PROTECTED).0, "WaitsForNodes");
    assert!(world.settle(60) && world.is_protected());
    assert!(world.now.duration_since(begin).as_secs() >= 30);
    assert_eq!(cpu(&world).unwrap().source, CpuBaseline::Host);
    let (reason, message) = condition(&world, CPU_CHOSEN);
    assert_eq!(reason, "HostCpu");
    assert!(message.contains("node-daemon"), "{message}");
    // Once they have spoken in time nothing is waited for.
    let mut world = World::new(3);
    for _ in 0..5 {
        world.step();
    }
    assert!(!world.pods.is_empty());
}

#[test]
fn one_node_alone_starts_its_guest_after_a_moment() {
    let mut world = World::new(1);
    world.settle(10);
    assert!(world.pods.is_empty());
    world.settle(40);
    assert_eq!(baseline(&world).as_deref(), Some(CPU));
    assert_eq!(world.vm.status.as_ref().unwrap().active.as_deref(), Some("node-0"));
}

#[test]
fn nodes_that_share_nothing_hold_the_vm_until_one_comes_that_does() {
    let mut world = World::new(1);
    set(&mut world, "node-1", &amd());
    world.settle(200);
    assert!(world.pods.is_empty() && world.claims.is_empty() && cpu(&world).is_none());
    for kind in [CPU_CHOSEN, PROTECTED, status::READY] {
        let (reason, message) = condition(&world, kind);
        assert_eq!(reason, "NoCommonCpu");
        assert!(
            message.contains("node-1 (AuthenticAMD") && message.contains("add a node"),
            "{message}"
        );
    }
    let told = status::changes(&Default::default(), world.vm.status.as_ref().unwrap());
    assert!(
        told.iter()
            .any(|change| change.warning && change.reason == "NoCommonCpu"),
        "{told:?}"
    );
    assert!(!world.step(), "it is said once");
    set(&mut world, "node-2", &amd());
    assert!(world.settle(60) && world.is_protected());
    let status = world.vm.status.clone().unwrap();
    assert_eq!(
        [status.active, status.standby].map(|node| node.unwrap()),
        ["node-1", "node-2"]
    );
    // As its host's it runs, without a standby.
    let mut world = World::new(1);
    set(&mut world, "node-1", &amd());
    world.vm.spec.machine.cpu_baseline = CpuBaseline::Host;
    world.settle(3);
    assert_eq!((cpu(&world), world.pods.len()), (None, 2));
}

#[test]
fn a_seat_that_was_placed_before_the_choice_where_it_cant_be_is_replaced() {
    let mut world = World::new(0);
    world.settle(10);
    let before: Vec<String> = world.pods.keys().cloned().collect();
    assert_eq!((before.len(), cpu(&world)), (2, None));
    // The nodes come one after the other; the first is not like the others.
    set(&mut world, "node-0", &amd());
    world.schedule(&before[0]);
    world.kubelet(&before[0]);
    set(&mut world, "node-1", &node_cpu());
    set(&mut world, "node-2", &node_cpu());
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert_eq!(baseline(&world).as_deref(), Some(CPU));
    assert!(world.pods.values().all(|pod| pod.node.as_deref() != Some("node-0")));
}

#[test]
fn a_guest_that_ran_before_keeps_its_hosts_cpu() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    world.vm.status.as_mut().unwrap().cpu = None;
    let pods: Vec<String> = world.pods.values().map(|pod| pod.uid.clone()).collect();
    assert!(world.settle(5) && world.is_protected());
    assert_eq!(cpu(&world).unwrap().source, CpuBaseline::Host);
    assert_eq!(pods, world.pods.values().map(|pod| pod.uid.clone()).collect::<Vec<_>>());
    assert!(condition(&world, CPU_CHOSEN).1.contains("halt and start the VM"));
}

/// The time in the condition may be of a backup.
#[test]
fn a_new_leader_waits_for_silent_nodes_itself() {
    let mut world = World::new(3);
    world.nodes.values_mut().for_each(|node| node.cpu = None);
    let waits = |world: &World| {
        let status = world.vm.status.as_ref();
        let condition = status.and_then(|status| status.condition(CPU_CHOSEN));
        condition.is_some_and(|condition| condition.reason == "WaitsForNodes")
    };
    while !waits(&world) {
        assert!(world.step());
    }
    world.pass(3600);
    world.new_leader("second");
    world.step();
    assert!(waits(&world) && cpu(&world).is_none());
    world.pass(29);
    world.step();
    assert!(waits(&world) && cpu(&world).is_none());
    world.pass(1);
    world.step();
    assert_eq!(cpu(&world).unwrap().source, CpuBaseline::Host);
}
