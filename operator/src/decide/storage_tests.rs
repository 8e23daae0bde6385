//! A seat whose storage fails at every join is none that joins, whatever each engine copies before it ends.

use ftvm_crds::names::claim_name;
use ftvm_crds::seat::{SeatRole, StorageKind, StoragePart, StorageTrouble};
use k8s_openapi::jiff::Timestamp;

use super::rig::World;
use super::stuck_tests::{seats, waits};
use super::*;
use crate::status::{PROTECTED, STORAGE_HEALTHY};

/// Protected until the active ejects the standby, whose storage has failed.
fn ejected(nodes: usize) -> (World, SeatEntry, SeatEntry) {
    let mut world = World::new(nodes);
    assert!(world.settle(60) && world.is_protected(), "{:#?}", world.vm.status);
    let (active, standby) = seats(&world);
    world.swap_out(&standby.name);
    world.bad_storage.extend(standby.node.clone());
    (world, active, standby)
}

fn failures(world: &World, seat: &str) -> u32 {
    let published = world.pods[seat].published.as_ref().unwrap();
    published.storage_failures
}

fn leaving(world: &World) -> usize {
    world.book().iter().filter(|entry| entry.leaving).count()
}

/// When seats were marked, one round after the other.
fn given_up(world: &mut World, rounds: usize) -> Vec<Timestamp> {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let before = leaving(world);
        world.settle(1);
        if leaving(world) > before {
            times.push(world.now);
        }
    }
    times
}

fn storage_failed_on(world: &World) -> Vec<String> {
    world.vm.status.clone().unwrap().storage_failed_on
}

#[test]
fn a_seat_whose_storage_fails_at_every_join_is_made_anew_on_another_node() {
    let (mut world, _, standby) = ejected(4);
    let begin = world.now;
    while leaving(&world) == 0 {
        world.settle(1);
        let waited = world.now.duration_since(begin).as_secs();
        assert!(waited < 60, "it is borne for ever: {:#?}", world.book());
    }
    assert!(world.now.duration_since(begin).as_secs() >= 20, "given up too early");
    assert!(failures(&world, &standby.name) > 2, "there were tries enough");
    let node = standby.node.clone().unwrap();
    assert_eq!(storage_failed_on(&world), [node]);
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(world.entry(&standby.name).is_none());
    assert!(!world.claims.values().any(|claim| claim.seat == standby.name));
    assert_eq!(world.vm.status.as_ref().unwrap().standby.as_deref(), Some("node-2"));
    assert!(storage_failed_on(&world).is_empty(), "what it was for is over");
}

/// A node that stood still for a moment, or the engine that had the guest before.
#[test]
fn one_failure_costs_no_disk() {
    let (mut world, _, standby) = ejected(4);
    while failures(&world, &standby.name) == 0 {
        world.settle(1);
    }
    world.bad_storage.clear();
    // The next one joins, and takes its time.
    world.engine(&standby.name);
    let role = |world: &World| world.pods[&standby.name].published.as_ref().unwrap().role;
    assert_eq!(role(&world), Some(SeatRole::Joining));
    for _ in 0..100 {
        world.step();
        world.repeat_looks();
        world.pass(30);
    }
    assert_eq!(failures(&world, &standby.name), 1);
    assert!(world.entry(&standby.name).is_some_and(|entry| !entry.leaving));
    assert!(world.settle(60) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(world.entry(&standby.name).is_some());
    assert_eq!(failures(&world, &standby.name), 0);
}

/// The node that failed before comes last, and not at all while there is another one.
#[test]
fn earlier_nodes_come_last() {
    let (mut world, _, standby) = ejected(4);
    world.bad_storage.insert("node-2".to_owned());
    let mut tried = vec![standby.node.unwrap()];
    for _ in 0..200 {
        world.settle(1);
        let node = storage_failed_on(&world).pop();
        tried.extend(node.filter(|node| tried.last() != Some(node)));
    }
    assert_eq!(tried, ["node-1", "node-2"]);
    assert!(world.is_protected(), "{:#?}", world.vm.status);
    assert_eq!(world.vm.status.as_ref().unwrap().standby.as_deref(), Some("node-3"));
}

/// Its disks can't even be opened any more, so none is ended by them.
#[test]
fn a_node_whose_storage_lets_no_second_engine_begin_comes_last_too() {
    let (mut world, _, standby) = ejected(4);
    assert!(world.fails_to_join(&standby.name));
    let begin = world.now;
    while leaving(&world) == 0 {
        world.step();
        world.repeat_looks();
        world.pass(2);
        let waited = world.now.duration_since(begin).as_secs();
        assert!(waited < 120, "it is borne for ever: {:#?}", world.book());
    }
    assert_eq!(failures(&world, &standby.name), 1);
    assert_eq!(storage_failed_on(&world), [standby.node.unwrap()]);
}

/// A datastore that all nodes share: seats are made anew less and less often, and what fails is told.
#[test]
fn storage_that_fails_everywhere_is_tried_less_and_less_often_and_told() {
    let (mut world, active, _) = ejected(4);
    world.bad_storage = world.nodes.keys().cloned().collect();
    let times = given_up(&mut world, 1900);
    assert!((6..10).contains(&times.len()), "{times:?}");
    let pairs = times.windows(2);
    let waits: Vec<i64> = pairs.map(|pair| pair[1].duration_since(pair[0]).as_secs()).collect();
    assert!(waits.windows(2).all(|pair| pair[1] >= pair[0]), "{waits:?}");
    assert!(waits[4] >= 5 * waits[0], "{waits:?}");
    let holder = world.record().unwrap().holder.seat.to_string();
    assert!(active.had_uid(&holder), "the guest goes on");
    let mut failed_on = storage_failed_on(&world);
    failed_on.sort();
    assert_eq!(failed_on, ["node-1", "node-2", "node-3"]);
    let fails = |entry: &SeatEntry| world.pods.contains_key(&entry.name) && failures(&world, &entry.name) > 2;
    assert!(world.book().iter().any(fails), "{:#?}", world.pods);
    let status = world.vm.status.clone().unwrap();
    let told = status.condition(STORAGE_HEALTHY).unwrap();
    assert_eq!((told.status.as_str(), told.reason.as_str()), ("False", "DiskFailed"));
    for words in [
        "storage class the cluster's default",
        "node-1",
        "node-2",
        "node-3",
        "at every join",
    ] {
        assert!(told.message.contains(words), "{words}: {}", told.message);
    }
    world.bad_storage.clear();
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
}

/// As one whose node is away is kept: it joins by itself once its storage is mended.
#[test]
fn while_no_other_node_could_have_it_the_seat_is_kept() {
    let (mut world, _, standby) = ejected(2);
    assert!(given_up(&mut world, 300).is_empty());
    let kept = world.entry(&standby.name).unwrap();
    assert!(kept.lost_since.is_none() && failures(&world, &standby.name) > 2);
    let status = world.vm.status.clone().unwrap();
    let told = status.condition(STORAGE_HEALTHY).unwrap();
    assert!(
        told.message.contains("no other ready node could have it"),
        "{}",
        told.message
    );
    // Another node comes: from now on there is a reason to give it up.
    let spare = world.nodes["node-0"].clone();
    world.nodes.insert("node-2".to_owned(), spare);
    let now = world.now;
    let times = given_up(&mut world, 40);
    assert!(
        times.len() == 1 && times[0].duration_since(now).as_secs() >= 20,
        "{times:?}"
    );
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);

    let (mut world, _, standby) = ejected(2);
    given_up(&mut world, 300);
    world.bad_storage.clear();
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(world.entry(&standby.name).is_some());
}

/// What the other seat has may be all that can still be read.
#[test]
fn while_the_guests_own_disk_fails_the_other_seat_is_kept() {
    let (mut world, _, standby) = ejected(4);
    let fails = |kind| StorageTrouble {
        part: StoragePart::Disk("root".to_owned()),
        kind,
        under_guest: true,
        since_unix_ms: 7,
        why: "no".to_owned(),
    };
    for kind in [StorageKind::Failed, StorageKind::Hangs] {
        world.guest_troubles = vec![fails(kind)];
        assert!(given_up(&mut world, 100).is_empty());
        let kept = world.entry(&standby.name).unwrap();
        assert!(kept.lost_since.is_none() && failures(&world, &standby.name) > 2);
        let status = world.vm.status.clone().unwrap();
        let told = &status.condition(PROTECTED).unwrap().message;
        assert!(told.contains("may be all that is left"), "{told}");
    }
    // One that is full can be copied.
    world.guest_troubles = vec![fails(StorageKind::Full)];
    assert_eq!(given_up(&mut world, 40).len(), 1);
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(world.entry(&standby.name).is_none());
}

/// Nobody has the guest: there is nothing to join, and what the seat has may be all that is left.
#[test]
fn without_a_guest_no_seat_goes_for_its_storage() {
    let (mut world, active, standby) = ejected(4);
    while failures(&world, &standby.name) < 3 {
        world.settle(1);
    }
    let term = world.record().unwrap().term;
    waits(&mut world, &active.name, term);
    for _ in 0..60 {
        world.step();
        world.repeat_looks();
        world.volumes();
        world.pass(120);
    }
    let kept = world.entry(&standby.name).unwrap();
    assert!(!kept.leaving && kept.lost_since.is_none(), "{kept:?}");
    let claim = &world.claims[&claim_name(&standby.name, "root")];
    assert!(!claim.deleting && world.pods.contains_key(&standby.name));
}
