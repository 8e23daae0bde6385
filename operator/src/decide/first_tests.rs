//! Before the guest ran for the first time: which seat begins.

use super::rig::World;

/// Everybody but engines does what they can; no node takes this seat.
fn without(world: &mut World, seat: &str) {
    for _ in 0..8 {
        world.step();
        for other in world.pods.keys().cloned().collect::<Vec<_>>() {
            if other != seat {
                world.schedule(&other);
                world.kubelet(&other);
            }
        }
        world.volumes();
        world.pass(2);
    }
}

fn holder(world: &World) -> Option<String> {
    world.record().map(|record| record.holder.seat.to_string())
}

#[test]
fn the_guest_begins_on_a_seat_that_a_node_has_taken() {
    let mut world = World::new(3);
    while world.book().len() < 2 {
        world.step();
    }
    let [first, second] = [0, 1].map(|index| world.book()[index].name.clone());
    without(&mut world, &first);
    assert!(world.pods[&first].node.is_none());
    assert_eq!(holder(&world), Some(world.pods[&second].uid.clone()));
    assert!(
        world
            .book()
            .iter()
            .all(|entry| !entry.leaving && entry.pod_uid.is_some())
    );
    // While no node takes any, there is no record yet.
    let mut world = World::new(0);
    world.settle(10);
    assert!(world.pods.len() == 2 && world.record().is_none());
}

/// The original is gone, and so is the room for the seat that comes first now.
#[test]
fn the_record_follows_a_pod_that_a_node_has_taken() {
    let mut world = World::new(3);
    while world.record().is_none() {
        without(&mut world, "");
    }
    let former = world.book();
    let original = holder(&world);
    let entry = former.iter().find(|entry| entry.pod_uid == original).unwrap();
    world.pods.remove(&entry.name);
    // Both leave and two others are entered.
    for _ in 0..40 {
        world.step();
        for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
            world.kubelet(&seat);
        }
        world.volumes();
    }
    let book = world.book();
    assert!(
        book.len() == 2 && former.iter().all(|entry| world.entry(&entry.name).is_none()),
        "{book:#?}"
    );
    assert_eq!(holder(&world), original, "no pod is placed");
    assert!(book.iter().all(|entry| entry.pod_uid.is_none()));
    without(&mut world, &book[0].name);
    assert_eq!(holder(&world), Some(world.pods[&book[1].name].uid.clone()));
    assert!(
        world
            .book()
            .iter()
            .all(|entry| !entry.leaving && entry.pod_uid.is_some())
    );
}
