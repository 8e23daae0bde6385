//! Claims that are deleted, lost or gone: no disk that may be the last copy is taken away or replaced by an empty one, and
//! nothing waits without a word.

use ftvm_crds::names::{ANNOTATION_ACCEPT_DATA_LOSS, claim_name};
use ftvm_crds::seat::{Order, SeatPublished};
use ftvm_crds::{RunStrategy, VmPhase, VolumePolicy};
use ftvm_protocol::record::Phase;

use super::rig::World;
use super::rig_disks::Disk;
use super::stuck_tests::{protected, says, seats};
use super::*;
use crate::observe::PodPhase;
use crate::status::{PROTECTED, READY, STORAGE_HEALTHY};

fn halt(world: &mut World) {
    world.want(RunStrategy::Halted);
    assert!(world.settle(60), "{:#?}", world.vm.status);
    assert_eq!(world.vm.status.as_ref().unwrap().phase, Some(VmPhase::Halted));
    // The bound claims hold the seats to their nodes; the rig's scheduler needs them free.
    world.claims.values_mut().for_each(|claim| claim.bound = false);
}

/// A person deletes claims of these disks; those that no pod uses are gone at once.
fn delete_claims(world: &mut World, seat: &str, disks: &[&str]) {
    for disk in disks {
        world.delete_claim_by_hand(seat, disk);
    }
    world.volumes();
}

/// What the condition says: it fails for this reason, and tells all of this.
fn expect(world: &World, kind: &str, reason: &str, advice: &[&str]) {
    let status = world.vm.status.as_ref().unwrap();
    let told = status.condition(kind).unwrap();
    let said = (told.status.as_str(), told.reason.as_str());
    assert_eq!(said, ("False", reason), "{}", told.message);
    for words in advice {
        assert!(told.message.contains(words), "{words}: {}", told.message);
    }
}

fn is_healthy(world: &World) -> bool {
    let status = world.vm.status.as_ref().unwrap();
    status.condition(STORAGE_HEALTHY).unwrap().status == "True"
}

/// It kept its header, so it would boot with zeros on that disk, and its peer would get a copy of them.
#[test]
fn a_claim_that_is_gone_is_not_replaced_by_an_empty_one() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    halt(&mut world);
    let name = claim_name(&active.name, "data");
    let kept = world.claims[&name].clone();
    delete_claims(&mut world, &active.name, &["data"]);
    world.step();
    expect(&world, STORAGE_HEALTHY, "VolumeLost", &[&name]);
    world.want(RunStrategy::Always);
    world.without_engines(20);
    assert!(!world.claims.contains_key(&name), "an empty one took its place");
    assert!(!world.pods.contains_key(&active.name), "it can't run without its disk");
    assert!(world.pods.contains_key(&standby.name));
    let (holder, term) = (world.record().unwrap().holder, world.record().unwrap().term);
    let accept = format!("{ANNOTATION_ACCEPT_DATA_LOSS}={holder}@{term}");
    let labels = format!("ftvm.dev/seat={}", active.name);
    let advice = [
        name.as_str(),
        "put a claim of that name back",
        &labels,
        &accept,
        &standby.name,
    ];
    for kind in [READY, STORAGE_HEALTHY] {
        expect(&world, kind, "VolumeLost", &advice);
    }
    // Going on with the other seat's disks: the holder's own seat is not waited for.
    let annotations = world.vm.metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_ACCEPT_DATA_LOSS.to_owned(), format!("{holder}@{term}"));
    world.pass_for_words();
    let actions = decide(&world.observe()).actions;
    let order = Order::AcceptDataLoss {
        holder,
        term: Some(term),
        over_stopped_term: Some(term),
    };
    assert!(
        matches!(&actions[..], [Action::Request { seat, request, .. }] if *seat == standby.name && request.order == order),
        "{actions:?}"
    );
    // Or it is put back.
    let annotations = world.vm.metadata.annotations.get_or_insert_default();
    annotations.remove(ANNOTATION_ACCEPT_DATA_LOSS);
    world.claims.insert(name, kept);
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(is_healthy(&world));
}

/// Its header went with its disks: it can't boot, and the other one has all that it had.
#[test]
fn a_seat_that_lost_everything_is_made_anew_beside_one_that_has_it() {
    let mut world = protected();
    let (_, standby) = seats(&world);
    halt(&mut world);
    delete_claims(&mut world, &standby.name, &["root", "data"]);
    world.want(RunStrategy::Always);
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(is_healthy(&world) && world.entry(&standby.name).is_some());
}

/// The API server may make one claim and refuse the next one. The first disk's, where the header is, comes last.
#[test]
fn what_was_made_of_a_seats_claims_is_gone_on_with() {
    let mut world = protected();
    let (_, standby) = seats(&world);
    halt(&mut world);
    delete_claims(&mut world, &standby.name, &["root", "data"]);
    let (seat, version) = (standby.name.clone(), world.version);
    let disks = vec!["data".to_owned()];
    world.apply(&Action::CreateClaims { seat, disks }, version);
    world.want(RunStrategy::Always);
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(is_healthy(&world) && world.entry(&standby.name).is_some());
    let mut world = World::new(3);
    let made = loop {
        let actions = decide(&world.observe()).actions;
        if let Some(Action::CreateClaims { disks, .. }) = actions.first() {
            break disks.clone();
        }
        assert!(world.step());
    };
    assert_eq!(made, ["data", "root"]);
}

/// Claims that are there may have been made a moment ago, empty.
#[test]
fn nothing_is_made_anew_before_the_other_seat_says_that_it_has_it() {
    let mut world = protected();
    let (_, standby) = seats(&world);
    halt(&mut world);
    delete_claims(&mut world, &standby.name, &["root", "data"]);
    world.want(RunStrategy::Always);
    world.without_engines(20);
    assert!(world.claims.values().all(|claim| claim.seat != standby.name));
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(is_healthy(&world) && world.claims.len() == 4);
}

/// An empty claim would only be in the way of the one that a person puts back.
#[test]
fn the_only_disks_that_the_record_names_are_not_replaced() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    world.swap_out(&standby.name);
    halt(&mut world);
    assert_eq!(world.record().unwrap().members.iter().count(), 1);
    delete_claims(&mut world, &active.name, &["root", "data"]);
    world.want(RunStrategy::Always);
    world.without_engines(20);
    assert!(world.claims.values().all(|claim| claim.seat == standby.name));
    assert!(world.book().iter().all(|entry| !entry.leaving), "{:#?}", world.book());
    let advice = ["put a claim of that name back", ANNOTATION_ACCEPT_DATA_LOSS];
    expect(&world, READY, "VolumeLost", &advice);
}

#[test]
fn a_standby_whose_claims_are_deleted_is_told_and_mended_once_its_pod_goes() {
    for disks in [&["data"][..], &["root", "data"]] {
        let mut world = protected();
        let (_, standby) = seats(&world);
        delete_claims(&mut world, &standby.name, disks);
        assert_eq!(world.claims.len(), 4, "its pod holds them");
        world.step();
        assert!(world.is_protected());
        let advice = format!("delete pod {}", standby.name);
        expect(&world, STORAGE_HEALTHY, "ClaimBeingDeleted", &[&advice]);
        assert!(!world.step(), "it is told once");
        world.pods.get_mut(&standby.name).unwrap().deleting = true;
        assert!(world.settle(100), "{disks:?}: {:#?}", world.vm.status);
        assert!(world.is_protected() && is_healthy(&world), "{:#?}", world.vm.status);
        assert!(world.claims.len() == 4 && world.claims.values().all(|claim| !claim.deleting));
    }
}

/// A pod without a node keeps no claim from going.
#[test]
fn no_pod_is_made_beside_a_claim_that_is_being_deleted() {
    let mut world = protected();
    let (_, standby) = seats(&world);
    delete_claims(&mut world, &standby.name, &["data"]);
    world.pods.remove(&standby.name);
    for _ in 0..5 {
        world.step();
    }
    assert!(!world.pods.contains_key(&standby.name));
}

#[test]
fn a_claim_that_goes_under_a_pod_without_a_node_is_made_anew() {
    let mut world = World::new(0);
    world.settle(10);
    let seat = world.book()[0].name.clone();
    assert!(world.pods.contains_key(&seat));
    let name = claim_name(&seat, "root");
    delete_claims(&mut world, &seat, &["root"]);
    assert!(!world.claims.contains_key(&name));
    world.settle(10);
    assert!(world.claims.contains_key(&name));
}

/// What a seat without a joining engine waits for in vain.
#[test]
fn a_seat_without_its_claims_is_in_trouble() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    world.swap_out(&standby.name);
    // Its pod is on a node, and has no engine.
    let name = claim_name(&standby.name, "data");
    let kept = world.claims[&name].clone();
    let mut is_bound = |change: &dyn Fn(&mut World)| {
        change(&mut world);
        let seen = world.observe();
        let found = trouble(&seen, &world.entry(&standby.name).unwrap());
        world.claims.insert(name.clone(), kept.clone());
        found == Some(Trouble::Bound)
    };
    assert!(!is_bound(&|_| ()));
    assert!(is_bound(&|world| world.claims.get_mut(&name).unwrap().lost = true));
    assert!(is_bound(&|world| {
        world.claims.get_mut(&name).unwrap().deleting = true;
    }));
    assert!(is_bound(&|world| drop(world.claims.remove(&name))));
    // It is replaced, and the active's disks are not touched.
    world.claims.get_mut(&name).unwrap().lost = true;
    world.step();
    world.pass(60);
    for _ in 0..20 {
        world.without_engines(1);
        world.repeat_looks();
    }
    assert!(world.entry(&standby.name).is_none(), "{:#?}", world.book());
    assert!(world.entry(&active.name).is_some_and(|entry| !entry.leaving));
}

/// A halt would take away both copies.
#[test]
fn a_halt_waits_while_a_claim_is_being_deleted() {
    let mut world = protected();
    let (active, _) = seats(&world);
    delete_claims(&mut world, &active.name, &["data"]);
    world.step();
    expect(&world, STORAGE_HEALTHY, "ClaimBeingDeleted", &["switchover"]);
    world.want(RunStrategy::Halted);
    world.step();
    let decision = decide(&world.observe());
    assert!(decision.actions.is_empty(), "{:?}", decision.actions);
    let goes_on = "it waits, and the guest goes on: ";
    let advice = [goes_on, &active.name, "spec.runStrategy to Always"];
    expect(&world, READY, "ClaimBeingDeleted", &advice);
    assert!(world.is_protected(), "as before: {:#?}", world.vm.status);
    // A person does what is said: the guest goes on elsewhere, and the pod goes.
    world.want(RunStrategy::Always);
    world.step();
    world.pods.get_mut(&active.name).unwrap().deleting = true;
    assert!(world.settle(100) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(is_healthy(&world));
    halt(&mut world);
    assert_eq!(world.claims.len(), 4);
}

/// The guest that goes on is protected or not, whatever is wanted; nobody need protect one that was stopped.
#[test]
fn what_waits_says_whether_the_guest_runs() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    delete_claims(&mut world, &active.name, &["data"]);
    world.want(RunStrategy::Halted);
    world.swap_out(&standby.name);
    world.step();
    expect(&world, PROTECTED, "NoStandby", &[]);
    expect(&world, READY, "ClaimBeingDeleted", &["the guest goes on"]);
    // It powered itself off.
    world.lease.as_mut().unwrap().0.record.phase = Phase::Stopped;
    says(&mut world, &active.name, None);
    world.step();
    expect(&world, PROTECTED, "NotRunning", &[]);
    expect(&world, READY, "ClaimBeingDeleted", &["it waits: "]);
}

/// Whoever keeps volumes does not want them to go with the VM.
#[test]
fn a_deletion_waits_as_well_if_volumes_are_to_be_kept() {
    let mut world = protected();
    let (active, _) = seats(&world);
    delete_claims(&mut world, &active.name, &["data"]);
    world.vm.spec.volume_policy = VolumePolicy::Retain;
    world.delete();
    world.step();
    assert!(decide(&world.observe()).actions.is_empty());
    expect(&world, READY, "ClaimBeingDeleted", &["spec.volumePolicy to Delete"]);
    world.vm.spec.volume_policy = VolumePolicy::Delete;
    world.settle(60);
    assert!(world.gone && world.claims.is_empty());
}

/// What it leaves behind may be all that there is of a disk.
#[test]
fn a_failed_pod_stays_while_it_holds_a_claim_that_is_being_deleted() {
    let mut world = protected();
    let (active, _) = seats(&world);
    let created = world.now;
    let pod = world.pods.get_mut(&active.name).unwrap();
    (pod.phase, pod.created) = (PodPhase::Finished, Some(created));
    world.pass(600);
    let deletes = |world: &mut World| {
        let actions = decide(&world.observe()).actions;
        actions.iter().any(|action| matches!(action, Action::DeletePod { .. }))
    };
    assert!(deletes(&mut world));
    delete_claims(&mut world, &active.name, &["data"]);
    assert!(!deletes(&mut world));
    world.step();
    expect(&world, STORAGE_HEALTHY, "ClaimBeingDeleted", &[&active.name]);
}

/// Nobody has the guest: what else there is to do while it runs is no advice.
#[test]
fn what_a_failed_pod_keeps_is_told_with_what_to_do() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    let pod = world.pods.get_mut(&active.name).unwrap();
    (pod.phase, pod.failed) = (PodPhase::Finished, Some("NodeAffinity".to_owned()));
    for pod in world.pods.values_mut() {
        pod.published = Ok(Default::default());
    }
    delete_claims(&mut world, &active.name, &["data"]);
    world.pass(600);
    world.step();
    let delete = format!("to Retain, delete pod {}", active.name);
    let advice = [
        delete.as_str(),
        "put a claim of that name back",
        ANNOTATION_ACCEPT_DATA_LOSS,
        &standby.name,
    ];
    for kind in [READY, STORAGE_HEALTHY] {
        expect(&world, kind, "ClaimBeingDeleted", &advice);
    }
    assert!(world.pods.contains_key(&active.name));
}

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
    // And nobody knows of a later one.
    world.vm.status.as_mut().unwrap().term = None;
    for pod in world.pods.values_mut() {
        pod.published = Ok(SeatPublished::default());
    }
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
