//! What seats refuse, or can't answer, holds nothing up for ever.

use ftvm_crds::RunStrategy;
use ftvm_crds::names::ANNOTATION_ACCEPT_DATA_LOSS;
use ftvm_crds::seat::{DoneRequest, Order, SeatPublished, SeatRequest, SeatRole};
use ftvm_protocol::identity::Term;
use ftvm_protocol::record::{Members, Phase};
use k8s_openapi::api::core::v1::Taint;

use super::rig::World;
use super::*;
use crate::observe::PodPhase;

pub(super) fn protected() -> World {
    let mut world = World::new(3);
    assert!(world.settle(60) && world.is_protected(), "{:#?}", world.vm.status);
    world
}

/// The entries of the active and of the standby.
pub(super) fn seats(world: &World) -> (SeatEntry, SeatEntry) {
    let holder = world.record().unwrap().holder.seat.to_string();
    let (active, standby): (Vec<_>, Vec<_>) = world.book().into_iter().partition(|entry| entry.had_uid(&holder));
    (active[0].clone(), standby[0].clone())
}

/// The record names a holder that is no seat: a hand, or another release, wrote it.
fn name_a_stranger(world: &mut World) {
    let (snapshot, _) = world.lease.as_mut().unwrap();
    let other = Incarnation {
        seat: SeatId(7),
        start: 1,
    };
    (snapshot.record.holder, snapshot.record.members) = (other, Members::one(other));
}

pub(super) fn asked(world: &mut World) -> Vec<(String, SeatRequest)> {
    let actions = decide(&world.observe()).actions;
    let asked = actions.into_iter().filter_map(|action| match action {
        Action::Request { seat, request, .. } => Some((seat, request)),
        _ => None,
    });
    asked.collect()
}

fn deleted(world: &mut World) -> Vec<String> {
    let actions = decide(&world.observe()).actions;
    let deleted = actions.into_iter().filter_map(|action| match action {
        Action::DeletePod { seat, force: false, .. } => Some(seat),
        _ => None,
    });
    deleted.collect()
}

/// Its daemon answers what it was asked last.
fn answers(world: &mut World, seat: &str, refused: Option<&str>) {
    let pod = world.pods.get_mut(seat).unwrap();
    let id = pod.request.clone().unwrap().id;
    let refused = refused.map(str::to_owned);
    pod.published.as_mut().unwrap().done_request = Some(DoneRequest { id, refused });
}

/// There is no engine, or one that waits for its turn.
pub(super) fn says(world: &mut World, seat: &str, role: Option<SeatRole>) {
    let pod = world.pods.get_mut(seat).unwrap();
    let known = pod.published.as_ref().unwrap();
    pod.published = Ok(SeatPublished {
        incarnation: known.incarnation.filter(|_| role.is_some()),
        role,
        done_request: known.done_request.clone(),
        ..SeatPublished::default()
    });
}

/// Its engine waits to boot, and this is its header's term.
pub(super) fn waits(world: &mut World, seat: &str, term: Term) {
    let lease_uid = world.lease.as_ref().map(|(lease, _)| lease.uid);
    says(world, seat, Some(SeatRole::Starting));
    let published = world.pods.get_mut(seat).unwrap().published.as_mut().unwrap();
    (published.term, published.lease_uid) = (term, lease_uid);
}

#[test]
fn a_stop_that_is_refused_is_asked_for_again_and_not_at_once() {
    let mut world = protected();
    let (active, _) = seats(&world);
    world.want(RunStrategy::Halted);
    world.step();
    let first = world.pods[&active.name].request.clone().unwrap();
    assert_eq!(first.order, Order::Stop);
    assert!(asked(&mut world).is_empty(), "it is under way");
    let mut id = first.id;
    for pause in [5, 10, 20, 40, 80, 160, 320, 600, 600] {
        answers(&mut world, &active.name, Some("a switchover is under way"));
        world.pass(pause - 1);
        let decision = decide(&world.observe());
        let rest = Some(Duration::from_secs(1));
        assert!(
            decision.actions.is_empty() && decision.recheck == rest,
            "{pause}: {decision:?}"
        );
        world.pass(1);
        let again = asked(&mut world);
        assert!(again[0].1.id != id && again[0].1.order == Order::Stop, "{again:?}");
        world.step();
        id = world.pods[&active.name].request.clone().unwrap().id;
        assert!(asked(&mut world).is_empty(), "it is under way");
    }
    answers(&mut world, &active.name, None);
    world.pass(3600);
    assert!(asked(&mut world).is_empty(), "it is done");
}

/// Neither seat's engine can have a guest, and the record says that one runs: there is nothing to stop.
#[test]
fn a_vm_without_any_guest_is_halted_by_taking_its_pods() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    says(&mut world, &active.name, None);
    says(&mut world, &standby.name, Some(SeatRole::Starting));
    world.want(RunStrategy::Halted);
    assert_eq!(asked(&mut world).len(), 1, "it may be able to, for all that is known");
    world.step();
    answers(&mut world, &active.name, Some("no engine"));
    assert_eq!(deleted(&mut world).len(), 2);
    // Whoever has a guest, or may have one where nobody hears of it, keeps the pods.
    let node = standby.node.clone().unwrap();
    world.nodes.get_mut(&node).unwrap().ready = false;
    assert!(deleted(&mut world).is_empty());
    world.nodes.get_mut(&node).unwrap().ready = true;
    says(&mut world, &standby.name, Some(SeatRole::Standby));
    assert!(deleted(&mut world).is_empty());
    // Who can't be asked is not waited for.
    says(&mut world, &standby.name, Some(SeatRole::Starting));
    let pod = world.pods.get_mut(&active.name).unwrap();
    (pod.phase, pod.request) = (PodPhase::Pending, None);
    assert_eq!(deleted(&mut world).len(), 2);
}

fn halted() -> World {
    let mut world = protected();
    world.want(RunStrategy::Halted);
    assert!(world.settle(60), "{:#?}", world.vm.status);
    assert_eq!(world.record().unwrap().phase, Phase::Stopped);
    world.want(RunStrategy::Always);
    for _ in 0..20 {
        world.step();
        for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
            world.schedule(&seat);
            world.kubelet(&seat);
        }
        if world.pods.values().any(|pod| pod.request.is_some()) {
            return world;
        }
    }
    panic!("nobody is asked to start: {:#?}", world.vm.status);
}

#[test]
fn a_start_that_is_refused_is_asked_for_again() {
    let mut world = halted();
    let seat = world.pods.keys().next().cloned().unwrap();
    world.step();
    let first = world.pods[&seat].request.clone().unwrap();
    answers(&mut world, &seat, Some("no program within 120 s"));
    world.pass(5);
    let again = asked(&mut world);
    assert!(
        again
            .iter()
            .any(|(of, request)| *of == seat && request.id != first.id && request.order == first.order),
        "{again:?}"
    );
}

/// The engine that was told is gone, and the next one knows nothing of it.
#[test]
fn a_start_is_asked_for_again_while_a_seat_waits() {
    let mut world = halted();
    let seat = world.pods.keys().next().cloned().unwrap();
    world.step();
    says(&mut world, &seat, Some(SeatRole::Starting));
    answers(&mut world, &seat, None);
    let of_seat = |world: &mut World| asked(world).into_iter().filter(|(of, _)| *of == seat).count();
    assert_eq!(of_seat(&mut world), 0);
    world.pass(5);
    assert_eq!(of_seat(&mut world), 1);
    says(&mut world, &seat, Some(SeatRole::Active));
    assert_eq!(of_seat(&mut world), 0);
}

/// A stop was begun, and can't be written: the other seat's header is lost.
#[test]
fn a_stop_that_waits_for_ever_ends_with_the_pods() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    says(&mut world, &active.name, Some(SeatRole::Starting));
    world.pods.remove(&standby.name);
    world.want(RunStrategy::Halted);
    while world.step() {}
    answers(&mut world, &active.name, None);
    world.pass(10);
    assert!(deleted(&mut world).is_empty(), "it may only need its time");
    assert_eq!(asked(&mut world).len(), 1);
    while world.step() {}
    assert!(world.pods[&active.name].deleting);
}

/// It was asked to start and can't: it is told that it shall not, and its pod goes once it has answered.
#[test]
fn a_start_that_comes_to_nothing_keeps_nobody_from_halting() {
    let mut world = halted();
    let names: Vec<String> = world.pods.keys().cloned().collect();
    for seat in &names {
        world.step();
        let incarnation = Incarnation {
            seat: world.pods[seat].uid.parse().unwrap(),
            start: 1,
        };
        let pod = world.pods.get_mut(seat).unwrap();
        pod.published.as_mut().unwrap().incarnation = Some(incarnation);
        pod.published.as_mut().unwrap().role = Some(SeatRole::Starting);
        answers(&mut world, seat, None);
    }
    world.want(RunStrategy::Halted);
    assert!(deleted(&mut world).is_empty());
    let stops = asked(&mut world);
    assert!(
        stops.len() == 2 && stops.iter().all(|(_, request)| request.order == Order::Stop),
        "{stops:?}"
    );
    world.step();
    assert!(deleted(&mut world).is_empty(), "nobody has answered");
    for seat in &names {
        answers(&mut world, seat, None);
    }
    assert_eq!(deleted(&mut world).len(), 2);
}

pub(super) fn accept(world: &mut World, text: &str) {
    let (holder, term) = (world.record().unwrap().holder, world.record().unwrap().term);
    let annotations = world.vm.metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_ACCEPT_DATA_LOSS.to_owned(), format!("{holder}@{term}{text}"));
}

#[test]
fn a_loss_is_accepted_once_nodes_that_are_away_are_proven_to_be_off() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    let holder = world.record().unwrap().holder;
    world.kill_node_of(&standby);
    accept(&mut world, " it burnt");
    assert!(asked(&mut world).is_empty(), "the guest runs");
    says(&mut world, &active.name, Some(SeatRole::Starting));
    world.step();
    world.pass_for_words();
    assert!(asked(&mut world).is_empty());
    world.pods.remove(&standby.name);
    world.step();
    for entry in &mut world.vm.status.as_mut().unwrap().seats {
        entry.former.iter_mut().for_each(|former| former.ended = true);
    }
    let asked = asked(&mut world);
    // The holder's own seat is who is left.
    let order = Order::AcceptDataLoss {
        holder,
        term: world.record().map(|record| record.term),
        over_stopped_term: None,
    };
    let [(seat, request)] = &asked[..] else {
        panic!("{asked:?}")
    };
    assert!(
        *seat == active.name && request.order == order && request.id.contains("-it burnt~0-"),
        "{request:?}"
    );
}

/// The record names the active alone, and may be an old one: the other seat's engine may run where nobody hears of it.
#[test]
fn a_loss_is_accepted_once_every_seat_of_the_book_is_proven_to_be_off() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    let node = world.kill_node_of(&standby);
    world.swap_out(&standby.name);
    says(&mut world, &active.name, Some(SeatRole::Starting));
    accept(&mut world, "");
    world.pass_for_words();
    assert!(asked(&mut world).is_empty());
    world.pods.remove(&standby.name);
    world.step();
    assert!(
        asked(&mut world).is_empty(),
        "a pod that was deleted by force proves nothing"
    );
    world.nodes.get_mut(&node).unwrap().taints = vec![Taint {
        key: OUT_OF_SERVICE.to_owned(),
        ..Taint::default()
    }];
    world.step();
    let asked = asked(&mut world);
    let [(seat, request)] = &asked[..] else {
        panic!("{asked:?}")
    };
    assert_eq!(*seat, active.name);
    assert!(matches!(request.order, Order::AcceptDataLoss { .. }), "{request:?}");
}

/// The holder's seat has the most: others are asked once it was asked in vain for more than a minute, or where there is no room for it.
#[test]
fn the_holders_own_seat_goes_first() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    for entry in [&active, &standby] {
        says(&mut world, &entry.name, Some(SeatRole::Starting));
    }
    accept(&mut world, "");
    let names = |world: &mut World| {
        let asked = asked(world).into_iter().map(|(seat, _)| seat);
        asked.collect::<Vec<_>>().join(" ")
    };
    for pause in [5, 10, 20, 40, 80] {
        assert_eq!(names(&mut world), active.name, "{pause}");
        world.step();
        answers(&mut world, &active.name, Some("the seat has no running engine"));
        if pause < 80 {
            world.pass(pause);
        }
    }
    assert_eq!(names(&mut world), standby.name);
    // A pod that is only just made anew, or gone for a moment, is one that could boot.
    let pod = world.pods.get_mut(&active.name).unwrap();
    (pod.phase, pod.request) = (PodPhase::Pending, None);
    assert_eq!(names(&mut world), active.name);
    world.pods.get_mut(&active.name).unwrap().unschedulable = Some("no room".to_owned());
    assert!(names(&mut world).contains(&standby.name));
}

/// The active was alone when it died, too: the disk of its former standby may be all that is left.
#[test]
fn the_last_disk_is_kept_while_nobody_has_the_guest() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    world.kill_node_of(&standby);
    world.swap_out(&standby.name);
    world.pods.get_mut(&standby.name).unwrap().published = Ok(SeatPublished::default());
    world.kill_node_of(&active);
    for _ in 0..60 {
        world.step();
        world.pass(60);
    }
    assert!(world.book().iter().all(|entry| !entry.leaving), "{:#?}", world.book());
    assert!(world.claims.values().all(|claim| !claim.deleting));
    assert!(world.pods.contains_key(&standby.name));
    // Also one that was to go already when the active died.
    let book = &mut world.vm.status.as_mut().unwrap().seats;
    let entry = book.iter_mut().find(|entry| entry.name == standby.name).unwrap();
    entry.leaving = true;
    for _ in 0..10 {
        world.step();
    }
    assert!(world.claims.values().all(|claim| !claim.deleting) && world.pods.contains_key(&standby.name));
    // While it leaves nobody could ask what it has.
    assert!(world.book().iter().all(|entry| !entry.leaving), "{:#?}", world.book());
    // The holder waits for that seat's word: its own disk is there.
    let node = active.node.clone().unwrap();
    world.nodes.get_mut(&node).unwrap().ready = true;
    let term = world.record().unwrap().term;
    waits(&mut world, &active.name, term);
    for _ in 0..10 {
        world.step();
        world.repeat_looks();
        world.volumes();
    }
    assert!(world.entry(&standby.name).is_none(), "{:#?}", world.book());
}

/// What was accepted of a record says nothing of one that was written since.
#[test]
fn an_acceptance_does_not_outlive_its_record() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    accept(&mut world, "");
    let (snapshot, _) = world.lease.as_mut().unwrap();
    snapshot.record.term += 1;
    for entry in [&active, &standby] {
        says(&mut world, &entry.name, Some(SeatRole::Starting));
    }
    assert!(asked(&mut world).is_empty());
}

/// A Stopped record needs a start as well.
#[test]
fn a_loss_is_accepted_over_a_stop() {
    let mut world = halted();
    let (holder, term) = (world.record().unwrap().holder, world.record().unwrap().term);
    accept(&mut world, "");
    world.pass_for_words();
    let order = Order::AcceptDataLoss {
        holder,
        term: Some(term),
        over_stopped_term: Some(term),
    };
    let asked = asked(&mut world);
    assert!(
        !asked.is_empty() && asked.iter().all(|(_, request)| request.order == order),
        "{asked:?}"
    );
}

/// Two engines that wait for each other have a link, and no guest.
#[test]
fn seats_that_wait_for_each_other_tell_of_no_guest() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    for entry in [&active, &standby] {
        says(&mut world, &entry.name, Some(SeatRole::Starting));
        world
            .pods
            .get_mut(&entry.name)
            .unwrap()
            .published
            .as_mut()
            .unwrap()
            .peer_connected = true;
    }
    accept(&mut world, "");
    assert!(!asked(&mut world).is_empty());
    world
        .pods
        .get_mut(&standby.name)
        .unwrap()
        .published
        .as_mut()
        .unwrap()
        .holds_guest = true;
    assert!(asked(&mut world).is_empty());
}

#[test]
fn nothing_of_a_vm_goes_whose_holder_nobody_knows() {
    let mut world = protected();
    let (active, _) = seats(&world);
    name_a_stranger(&mut world);
    world.kill_node_of(&active);
    for _ in 0..20 {
        world.step();
        world.pass(60);
    }
    assert!(world.book().iter().all(|entry| !entry.leaving), "{:#?}", world.book());
    assert!(world.claims.values().all(|claim| !claim.deleting));
    world.want(RunStrategy::Halted);
    assert!(
        !decide(&world.observe())
            .actions
            .iter()
            .any(|action| matches!(action, Action::DeletePod { force: true, .. }))
    );
}

fn ready(world: &World) -> (String, String) {
    let told = world
        .vm
        .status
        .as_ref()
        .unwrap()
        .condition(crate::status::READY)
        .unwrap();
    (told.reason.clone(), told.message.clone())
}

#[test]
fn a_stop_that_is_refused_is_told() {
    let mut world = protected();
    let (active, _) = seats(&world);
    world.want(RunStrategy::Halted);
    world.step();
    answers(&mut world, &active.name, Some("a switchover is under way"));
    world.step();
    let (reason, message) = ready(&world);
    let words = format!("seat {} refused to stop: a switchover is under way", active.name);
    assert!(reason == "Stopping" && message.contains(&words), "{reason}: {message}");
    answers(&mut world, &active.name, None);
    world.step();
    assert!(!ready(&world).1.contains("refused"), "{:?}", ready(&world));
}

#[test]
fn whoever_has_the_guest_is_asked_when_a_vm_goes_whose_holder_nobody_knows() {
    let mut world = protected();
    let (active, _) = seats(&world);
    name_a_stranger(&mut world);
    world.want(RunStrategy::Halted);
    world.step();
    let (reason, message) = ready(&world);
    let advice = "put a former copy of the Lease back";
    assert!(
        reason == "HolderUnknown" && message.contains(advice),
        "{reason}: {message}"
    );
    assert!(asked(&mut world).is_empty());
    world.delete();
    let stops = asked(&mut world);
    assert!(
        matches!(&stops[..], [(seat, request)] if *seat == active.name && request.order == Order::Stop),
        "{stops:?}"
    );
    world.step();
    answers(&mut world, &active.name, Some("the record names another holder"));
    world.step();
    let (reason, message) = ready(&world);
    assert_eq!(reason, "HolderUnknown", "{message}");
    let refused = "refused to stop: the record names another holder";
    for words in [refused, "delete the VM's pods"] {
        assert!(message.contains(words), "{words}: {message}");
    }
}
