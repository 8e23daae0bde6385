//! A record that may be an old copy costs no disk.

use ftvm_crds::RunStrategy;
use ftvm_crds::names::ANNOTATION_ACCEPT_DATA_LOSS;
use ftvm_crds::seat::{SeatPublished, SeatRole};
use ftvm_protocol::record::{Members, Phase};

use super::rig::World;
use super::stuck_tests::{accept, asked, protected, seats, waits};
use super::*;

/// The active is alone by the record, and the node of the other seat is away.
fn alone() -> (World, SeatEntry, SeatEntry) {
    let mut world = protected();
    let (active, standby) = seats(&world);
    world.swap_out(&standby.name);
    world.kill_node_of(&standby);
    (world, active, standby)
}

/// For hours nobody does anything but the operator, and the cluster with volumes. Daemons say again what they said.
fn hours(world: &mut World) {
    for _ in 0..60 {
        for _ in 0..3 {
            world.step();
            world.repeat_looks();
        }
        world.volumes();
        world.pass(120);
    }
}

fn is_kept(world: &World, seat: &SeatEntry) -> bool {
    let mut claims = world.claims.values().filter(|claim| claim.seat == seat.name);
    let there = claims.clone().next().is_some() && claims.all(|claim| !claim.deleting);
    there && world.entry(&seat.name).is_some_and(|entry| !entry.leaving) && world.pods.contains_key(&seat.name)
}

/// The holder waits with a header of this term: is the other seat kept?
fn is_kept_beside(change: impl Fn(&mut World, &SeatEntry)) -> bool {
    let (mut world, active, standby) = alone();
    let term = world.record().unwrap().term;
    waits(&mut world, &active.name, term);
    change(&mut world, &active);
    hours(&mut world);
    is_kept(&world, &standby)
}

fn published<'a>(world: &'a mut World, seat: &SeatEntry) -> &'a mut SeatPublished {
    world.pods.get_mut(&seat.name).unwrap().published.as_mut().unwrap()
}

#[test]
fn beside_a_record_that_may_be_an_old_copy_no_seat_is_replaced() {
    assert!(!is_kept_beside(|_, _| ()), "its holder ran by it as it is");
    let repeats = |world: &mut World, active: &SeatEntry| {
        let published = published(world, active);
        published.role = Some(SeatRole::Active);
        published.incarnation.as_mut().unwrap().start += 1;
    };
    assert!(is_kept_beside(repeats), "another engine said so");
    assert!(
        is_kept_beside(|world, active| published(world, active).term += 1),
        "went on since"
    );
    assert!(
        is_kept_beside(|world, active| published(world, active).term -= 1),
        "never ran by it"
    );
    assert!(
        is_kept_beside(|world, active| published(world, active).term = 0),
        "has no header"
    );
    let other = Some(ArbiterUid(7));
    assert!(is_kept_beside(
        |world, active| published(world, active).lease_uid = other
    ));
    assert!(is_kept_beside(
        |world, active| published(world, active).role = Some(SeatRole::Ended)
    ));
    // The status read a later one.
    assert!(is_kept_beside(|world, active| {
        world.step();
        world.lease.as_mut().unwrap().0.record.term -= 1;
        published(world, active).term -= 1;
    }));
}

/// The same holds of an active, which tells soon by which record it goes.
#[test]
fn no_seat_is_replaced_until_the_active_goes_by_the_record() {
    assert!(is_kept_beside(|world, active| {
        let published = published(world, active);
        (published.role, published.term) = (Some(SeatRole::Active), published.term + 1);
    }));
    let (mut world, active, standby) = alone();
    world.lease.as_mut().unwrap().0.record.term += 1;
    hours(&mut world);
    assert!(is_kept(&world, &standby));
    world.engine(&active.name);
    hours(&mut world);
    assert!(!is_kept(&world, &standby));
}

/// A record of before the guest ran for the first time says that no disk has anything.
#[test]
fn a_first_record_that_was_put_back_costs_no_disk() {
    for strategy in [RunStrategy::Always, RunStrategy::Halted] {
        let mut world = protected();
        let (active, standby) = seats(&world);
        let own: SeatId = active.pod_uid.as_deref().unwrap().parse().unwrap();
        let (snapshot, _) = world.lease.as_mut().unwrap();
        let holder = Incarnation::genesis(own);
        (snapshot.record.holder, snapshot.record.members, snapshot.record.term) = (holder, Members::one(holder), 1);
        // What the status knew was put back as well: seats' engines alone know better.
        world.vm.status.as_mut().unwrap().term = Some(1);
        world.kill_node_of(&standby);
        world.want(strategy);
        hours(&mut world);
        assert!(is_kept(&world, &standby), "{strategy:?}");
        assert!(world.claims.values().all(|claim| !claim.deleting), "{strategy:?}");
    }
}

/// A person goes on with what is newest, whoever the old copy names.
#[test]
fn the_seat_that_knows_the_latest_term_goes_first() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    let term = world.record().unwrap().term;
    for (terms, first) in [
        ([term, term], &active),
        ([term, term + 2], &standby),
        ([term + 3, term + 2], &active),
        ([term + 2, term + 2], &active),
    ] {
        waits(&mut world, &active.name, terms[0]);
        waits(&mut world, &standby.name, terms[1]);
        accept(&mut world, "");
        let asked: Vec<_> = asked(&mut world).into_iter().map(|(seat, _)| seat).collect();
        assert_eq!(asked, std::slice::from_ref(&first.name), "{terms:?}");
    }
}

#[test]
fn an_old_copy_is_told() {
    let (mut world, ..) = alone();
    world.step();
    let (snapshot, _) = world.lease.as_mut().unwrap();
    snapshot.record.term -= 2;
    while world.step() {}
    let status = world.vm.status.clone().unwrap();
    let told = status.condition(crate::status::ARBITER_REACHABLE).unwrap();
    let (says, knew) = (world.record().unwrap().term, status.term.unwrap());
    assert_eq!(knew, says + 2);
    let words = format!("says term {says}, and said {knew} before");
    assert!(told.reason == "LeaseOlder" && told.message.contains(&words), "{told:?}");
}

/// Its disk is not overwritten, and nobody but a person can say that it is not wanted.
#[test]
fn a_seat_that_is_newer_than_the_record_is_told() {
    let (mut world, active, standby) = alone();
    world.nodes.values_mut().for_each(|node| node.ready = true);
    let term = world.record().unwrap().term;
    let told = |world: &mut World| {
        while world.step() {}
        let status = world.vm.status.clone().unwrap();
        status.condition(crate::status::PROTECTED).unwrap().clone()
    };
    waits(&mut world, &standby.name, term + 1);
    let newer = told(&mut world);
    assert!(
        newer.reason == "SeatIsNewer" && newer.message.contains(&standby.name),
        "{newer:?}"
    );
    hours(&mut world);
    assert!(is_kept(&world, &standby));
    waits(&mut world, &standby.name, term);
    assert_ne!(told(&mut world).reason, "SeatIsNewer");
    // Nobody has the guest: it may be what is to go on.
    waits(&mut world, &standby.name, term + 1);
    waits(&mut world, &active.name, term);
    let newer = told(&mut world);
    assert!(newer.message.contains(ANNOTATION_ACCEPT_DATA_LOSS), "{newer:?}");
}

/// A halt takes no pod that the old copy does not name: it may have the guest.
#[test]
fn a_halt_by_an_old_copy_takes_nothing_from_the_active() {
    for phase in [Phase::Running, Phase::Stopped] {
        let mut world = protected();
        let (active, standby) = seats(&world);
        world.swap_out(&standby.name);
        // A copy of when the other one was alone.
        let (snapshot, _) = world.lease.as_mut().unwrap();
        let other = Incarnation {
            seat: standby.pod_uid.as_deref().unwrap().parse().unwrap(),
            start: 1,
        };
        let record = &mut snapshot.record;
        (record.holder, record.members, record.phase) = (other, Members::one(other), phase);
        record.term -= 1;
        world.want(RunStrategy::Halted);
        hours(&mut world);
        assert!(
            is_kept(&world, &active) && !world.pods[&active.name].deleting,
            "{phase:?}"
        );
        let status = world.vm.status.clone().unwrap();
        let told = status.condition(crate::status::READY).unwrap();
        assert!(told.message.contains("old copy: delete it"), "{phase:?}: {told:?}");
    }
}
