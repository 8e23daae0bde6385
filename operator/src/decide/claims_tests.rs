//! What is on a seat's disks when a guest begins there.

use ftvm_protocol::record::Phase;

use super::rig::World;
use super::rig_disks::Disk;
use super::*;

/// The other seat's disks were made to get everything by replication: a guest that began there would find zeros.
#[test]
fn no_guest_begins_on_disks_that_were_not_the_originals() {
    let mut world = World::new(3);
    while world.record().is_none() {
        world.step();
        for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
            world.schedule(&seat);
            world.kubelet(&seat);
        }
    }
    let original = world.record().unwrap().holder.seat.to_string();
    let (first, others): (Vec<_>, Vec<_>) = world.book().into_iter().partition(|entry| entry.had_uid(&original));
    let (first, other) = (first[0].name.clone(), others[0].name.clone());
    world.engine(&other);
    assert_eq!(world.contents_of(&other), [Some(Disk::Blank); 2]);
    world.pods.remove(&first);
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(world.entry(&first).is_none() && world.entry(&other).is_none());
}

/// Whoever is admitted prepares its disks by what the record says then.
#[test]
fn the_record_follows_a_pod_before_it_is_admitted() {
    let mut world = World::new(3);
    assert!(world.settle(60) && world.is_protected());
    // As if nobody had begun yet.
    let genesis = Record::genesis(SeatId(7), Phase::Running);
    world.lease.as_mut().unwrap().0.record = genesis;
    let mut rewritten = false;
    for _ in 0..60 {
        let before = world.book();
        world.step();
        let holder = world.record().unwrap().holder.seat.to_string();
        let is_there = world.pods.values().any(|pod| pod.uid == holder);
        let admitted = |book: &[SeatEntry]| {
            let uids = book.iter().filter_map(|entry| entry.pod_uid.clone());
            uids.collect::<Vec<String>>()
        };
        let (old, new) = (admitted(&before), admitted(&world.book()));
        let early = !is_there && new.iter().any(|uid| !old.contains(uid));
        assert!(!early, "admitted before the record names a pod that is there");
        rewritten |= is_there;
        for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
            world.schedule(&seat);
            world.kubelet(&seat);
        }
        world.volumes();
    }
    assert!(rewritten && world.book().iter().all(|entry| entry.pod_uid.is_some()));
}
