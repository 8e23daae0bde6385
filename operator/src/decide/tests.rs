use ftvm_crds::names::{ANNOTATION_ACCEPT_DATA_LOSS, ANNOTATION_SWITCHOVER};
use ftvm_crds::seat::{DoneRequest, Order, SeatRequest, SeatRole};
use ftvm_crds::{Outcome, RunStrategy, VmPhase};
use ftvm_protocol::record::Phase;

use super::former_tests::former;
use super::rig::World;
use super::*;
use crate::observe::{PodPhase, Refusal};

fn protected(nodes: usize) -> World {
    let mut world = World::new(nodes);
    assert!(world.settle(60), "{:#?}", world.vm.status);
    assert!(world.is_protected());
    world
}

fn phase(world: &World) -> Option<VmPhase> {
    world.vm.status.as_ref().unwrap().phase
}

/// The entries of the active and of the standby.
fn seats(world: &World) -> (SeatEntry, SeatEntry) {
    let holder = world.record().unwrap().holder.seat.to_string();
    let (active, standby): (Vec<_>, Vec<_>) = world.book().into_iter().partition(|entry| entry.had_uid(&holder));
    (active[0].clone(), standby[0].clone())
}

#[test]
fn the_finalizer_and_the_book_come_first() {
    let mut world = World::new(3);
    let seen = world.observe();
    assert_eq!(decide(&seen).actions, [Action::AddFinalizer]);
    world.step();
    let seen = world.observe();
    let decision = decide(&seen);
    assert_eq!(decision.book.len(), 2);
    assert_eq!(decision.book.iter().map(|entry| entry.slot).collect::<Vec<_>>(), [0, 1]);
    assert!(
        decision.actions.is_empty(),
        "nothing is made before the book is written"
    );
    world.step();
    let made = decide(&world.observe()).actions;
    assert!(matches!(made[0], Action::CreateClaims { ref disks, .. } if disks.len() == 2));
    assert!(matches!(made[1], Action::CreatePod { .. }));
}

/// What is refused may stay so for long. Only time, or another spec or book, brings the next attempt, and nothing else waits for it.
#[test]
fn after_a_refusal_pods_and_claims_wait_and_nothing_else() {
    let refused = |seconds| {
        let wait = Duration::from_secs(seconds);
        let (reason, message) = ("ApiServerRefuses", "no".to_owned());
        Some(Refusal { reason, message, wait })
    };
    let mut world = World::new(3);
    while !decide(&world.observe()).actions.iter().any(Action::waits) {
        assert!(world.step());
    }
    let mut seen = world.observe();
    let made = decide(&seen).actions;
    seen.refused = refused(7);
    let decision = decide(&seen);
    assert_eq!(
        (decision.actions, decision.recheck),
        (vec![], Some(Duration::from_secs(7)))
    );
    seen.refused = refused(0);
    assert_eq!(decide(&seen).actions, made);
    // A pod that is there is admitted, whatever becomes of the other one.
    let first = world.book()[0].name.clone();
    let of_first = |action: &&Action| matches!(action, Action::CreateClaims { seat, .. } | Action::CreatePod { seat } if *seat == first);
    for action in made.iter().filter(of_first) {
        world.apply(action, world.version);
    }
    let mut seen = world.observe();
    seen.refused = refused(300);
    let actions = decide(&seen).actions;
    assert!(
        matches!(&actions[..], [Action::Admit { seat, .. }] if *seat == first),
        "{actions:?}"
    );
}

/// What is left of a quota may be enough for one seat.
#[test]
fn the_seat_that_has_the_guest_is_made_first() {
    let mut world = protected(3);
    let (first, second) = seats(&world);
    assert_eq!(world.book()[0].name, first.name);
    world.pods.remove(&first.name);
    world.engine(&second.name);
    assert!(is_named(&second, world.record().unwrap()) && !is_named(&first, world.record().unwrap()));
    world.pods.clear();
    while !decide(&world.observe()).actions.iter().any(Action::waits) {
        assert!(world.step());
    }
    let actions = decide(&world.observe()).actions;
    let made: Vec<_> = actions.iter().filter_map(Action::makes_of).collect();
    assert_eq!(made, [second.name.as_str(), first.name.as_str()]);
}

#[test]
fn a_new_vm_becomes_protected_and_then_nothing_is_left_to_do() {
    let mut world = protected(3);
    assert_eq!(phase(&world), Some(VmPhase::Running));
    let status = world.vm.status.clone().unwrap();
    assert_ne!(status.active, status.standby);
    assert_eq!(world.lease.as_ref().unwrap().1, "node-0,node-1");
    for _ in 0..5 {
        world.pass(3600);
        assert!(!world.step(), "a converged VM is left alone");
    }
}

#[test]
fn a_dead_standby_is_replaced_on_a_third_node_after_a_while() {
    let mut world = protected(3);
    let (active, standby) = seats(&world);
    world.kill_node_of(&standby);
    world.engine(&active.name);
    let begin = world.now;
    world.settle(5);
    assert!(world.entry(&standby.name).is_some(), "given up too early");
    assert!(world.settle(80), "{:#?}", world.vm.status);
    assert!(world.is_protected() && world.entry(&standby.name).is_none());
    assert!(world.now.duration_since(begin).as_secs() >= 20);
    assert_eq!(world.vm.status.as_ref().unwrap().standby.as_deref(), Some("node-2"));
    assert!(!world.claims.values().any(|claim| claim.seat == standby.name));
    // What goes by slot (labels of nodes, storage classes) is as it was.
    assert_eq!(seats(&world).1.slot, standby.slot);
}

#[test]
fn the_successor_of_a_dead_active_gets_a_new_partner() {
    let mut world = protected(3);
    let (active, standby) = seats(&world);
    world.kill_node_of(&active);
    world.engine(&standby.name);
    assert!(world.settle(80), "{:#?}", world.vm.status);
    assert!(world.is_protected());
    assert_eq!(world.vm.status.as_ref().unwrap().active, standby.node);
    assert!(world.entry(&active.name).is_none());
    assert_eq!(seats(&world).1.slot, active.slot);
}

#[test]
fn what_a_dead_active_said_last_is_no_joining() {
    let mut world = protected(3);
    let (active, standby) = seats(&world);
    // Its node is silent and still taken for ready.
    let node = world.kill_node_of(&active);
    world.engine(&standby.name);
    world.nodes.get_mut(&node).unwrap().ready = true;
    let seen = world.observe();
    let last = seen.pods[&active.name].published.as_ref().unwrap();
    assert!(last.role == Some(SeatRole::Active) && last.peer_connected);
    assert_eq!(trouble(&seen, &active), Some(Trouble::NoEngine));
    assert!(decide(&seen).recheck.is_some(), "nobody would look again");
    let lost = decide(&seen).book.into_iter().find(|entry| entry.name == active.name);
    assert!(lost.unwrap().lost_since.is_some());
}

#[test]
fn with_both_nodes_dead_nothing_is_touched() {
    let mut world = protected(4);
    let book = world.book();
    world.nodes.iter_mut().take(2).for_each(|(_, node)| node.ready = false);
    for _ in 0..100 {
        world.step();
        world.pass(60);
    }
    let names = |book: &[SeatEntry]| {
        book.iter()
            .map(|entry| (entry.name.clone(), entry.leaving))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&world.book()), names(&book));
    assert_eq!(world.pods.len(), 2);
    world.nodes.values_mut().for_each(|node| node.ready = true);
    assert!(world.settle(60) && world.is_protected());
}

#[test]
fn two_nodes_alone_say_so_and_do_not_churn() {
    let mut world = protected(2);
    let (active, standby) = seats(&world);
    world.kill_node_of(&standby);
    world.engine(&active.name);
    world.settle(200);
    let conditions = &world.vm.status.as_ref().unwrap().conditions;
    let why = conditions
        .iter()
        .find(|condition| condition.type_ == crate::status::PROTECTED)
        .unwrap();
    assert_eq!(
        (why.status.as_str(), why.reason.as_str()),
        ("False", "TooFewNodes"),
        "{}",
        why.message
    );
    assert!(why.message.contains("add a node"));
    let before = world.book();
    for _ in 0..50 {
        world.pass(600);
        assert!(!world.step());
    }
    assert_eq!(world.book(), before);
}

/// Its node may only be starting again.
#[test]
fn a_dead_standbys_disks_are_kept_while_no_other_node_could_have_its_seat() {
    let mut world = protected(2);
    let (active, standby) = seats(&world);
    let die = |world: &mut World| {
        let node = world.kill_node_of(&standby);
        world.engine(&active.name);
        world.settle(200);
        let kept = world.entry(&standby.name).is_some_and(|entry| !entry.leaving);
        assert!(kept && world.claims.len() == 4, "{:#?}", world.book());
        node
    };
    let node = die(&mut world);
    world.nodes.get_mut(&node).unwrap().ready = true;
    assert!(world.settle(60) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(world.entry(&standby.name).is_some());
    // With another node there is a reason to give it up.
    die(&mut world);
    let spare = world.nodes[active.node.as_ref().unwrap()].clone();
    world.nodes.insert("node-2".to_owned(), spare);
    assert!(world.settle(80) && world.is_protected(), "{:#?}", world.vm.status);
    assert!(world.entry(&standby.name).is_none());
}

#[test]
fn what_does_not_help_is_tried_less_and_less_often() {
    let mut world = protected(3);
    let (_, standby) = seats(&world);
    // Its engine never joins, wherever it is.
    let mut given_up = Vec::new();
    world.swap_out(&standby.name);
    for _ in 0..2000 {
        let before = world.book();
        world.without_engines(1);
        world.repeat_looks();
        if before.iter().filter(|entry| entry.leaving).count()
            < world.book().iter().filter(|entry| entry.leaving).count()
        {
            given_up.push(world.now);
        }
    }
    assert!((4..10).contains(&given_up.len()), "{given_up:?}");
    let waits: Vec<i64> = given_up
        .windows(2)
        .map(|pair| pair[1].duration_since(pair[0]).as_secs())
        .collect();
    assert!(waits.windows(2).all(|pair| pair[1] >= pair[0]), "{waits:?}");
    assert!(waits[3] >= 5 * waits[0], "{waits:?}");
}

#[test]
fn a_seat_that_starts_slowly_has_its_time_to_join_from_its_start() {
    let mut world = protected(3);
    let (active, standby) = seats(&world);
    world.swap_out(&standby.name);
    let successor = loop {
        world.step();
        world.repeat_looks();
        world.kubelet(&standby.name);
        world.volumes();
        world.pass(2);
        let old = [&active.name, &standby.name];
        if let Some(name) = world.pods.keys().find(|name| !old.contains(name)) {
            break name.clone();
        }
    };
    world.schedule(&successor);
    let least = world.vm.spec.fault_tolerance.replace_after_seconds;
    // Replaced once: twice as long.
    let patience = i64::from(2 * least);
    for _ in 0..patience + 60 {
        world.step();
        world.pass(1);
    }
    world.kubelet(&successor);
    let leaves = |world: &mut World| {
        world.step();
        world.entry(&successor).is_none_or(|entry| entry.leaving)
    };
    for _ in 0..patience - 5 {
        assert!(!leaves(&mut world), "given up for the time before it started");
        world.pass(1);
    }
    world.pass(10);
    assert!(!leaves(&mut world), "nobody was asked");
    world.repeat_looks();
    assert!(leaves(&mut world), "it never joins");
}

#[test]
fn a_pod_that_was_deleted_is_made_again_with_its_claims() {
    let mut world = protected(3);
    let (_, standby) = seats(&world);
    let claims = world.claims.clone();
    world.pods.get_mut(&standby.name).unwrap().deleting = true;
    world.kubelet(&standby.name);
    world.kubelet(&standby.name);
    world.nodes.get_mut("node-2").unwrap().schedulable = false;
    assert!(world.step());
    let entry = world.entry(&standby.name).unwrap();
    assert_eq!((entry.pod_uid, entry.former.len()), (None, 1));
    world.step();
    assert!(world.pods.contains_key(&standby.name));
    assert_eq!(world.claims, claims);
}

#[test]
fn halting_stops_and_starting_finds_the_same_disks() {
    let mut world = protected(3);
    let claims: Vec<_> = world.claims.keys().cloned().collect();
    world.want(RunStrategy::Halted);
    let requests = decide(&world.observe()).actions;
    let (active, _) = seats(&world);
    assert!(
        matches!(&requests[..], [Action::Request { seat, request, .. }] if *seat == active.name && request.order == Order::Stop)
    );
    assert!(world.settle(60), "{:#?}", world.vm.status);
    assert_eq!(phase(&world), Some(VmPhase::Halted));
    assert!(world.pods.is_empty());
    assert_eq!(world.record().unwrap().phase, Phase::Stopped);
    assert_eq!(world.claims.keys().cloned().collect::<Vec<_>>(), claims);
    // The bound claims hold the seats to their nodes; the rig's scheduler needs them free.
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    world.want(RunStrategy::Always);
    assert!(world.settle(80), "{:#?}", world.vm.status);
    assert_eq!(phase(&world), Some(VmPhase::Running));
    assert!(world.is_protected());
}

#[test]
fn pods_stay_until_their_engines_are_proven_to_have_ended() {
    let mut world = protected(3);
    world.want(RunStrategy::Halted);
    world.step();
    for _ in 0..10 {
        world.pass(60);
        let actions = decide(&world.observe()).actions;
        assert!(
            !actions.iter().any(|action| matches!(action, Action::DeletePod { .. })),
            "{actions:?}"
        );
    }
    let (active, standby) = seats(&world);
    world.engine(&active.name);
    let actions = decide(&world.observe()).actions;
    assert!(
        matches!(&actions[..], [Action::DeletePod { seat, .. }] if *seat == active.name),
        "{actions:?}"
    );
    world.engine(&standby.name);
    assert_eq!(decide(&world.observe()).actions.len(), 2);
}

/// Its daemon could not read after the stop that it was one, and began an engine, which waits to be asked for a start.
#[test]
fn an_engine_that_was_begun_after_the_stop_keeps_nobody_waiting() {
    let mut world = protected(3);
    let (active, standby) = seats(&world);
    world.delete();
    world.step();
    let pod = world.pods.get_mut(&standby.name).unwrap();
    let mut begun = pod.published.clone().unwrap();
    begun.incarnation.as_mut().unwrap().start += 1;
    begun.role = Some(SeatRole::Starting);
    world.engine(&active.name);
    world.engine(&standby.name);
    world.pods.get_mut(&standby.name).unwrap().published = Ok(begun);
    assert!(has_engine(&world.pods[&standby.name]));
    let actions = decide(&world.observe()).actions;
    assert_eq!(actions.len(), 2, "{actions:?}");
    assert!(
        actions
            .iter()
            .all(|action| matches!(action, Action::DeletePod { force: false, .. })),
        "{actions:?}"
    );
    // A daemon that was asked for a start before goes on with it.
    world.pods.get_mut(&standby.name).unwrap().request = Some(SeatRequest {
        id: "start".to_owned(),
        order: Order::Start {
            over_stopped_term: world.record().unwrap().term,
        },
        until_unix_ms: None,
    });
    let actions = decide(&world.observe()).actions;
    assert!(
        matches!(&actions[..], [Action::DeletePod { seat, .. }, Action::Request { seat: told, request, .. }]
            if *seat == active.name && *told == standby.name && request.order == Order::Stop),
        "{actions:?}"
    );
}

#[test]
fn a_guest_that_powers_itself_off_is_started_again() {
    let mut world = protected(3);
    world.lease.as_mut().unwrap().0.record.phase = Phase::Stopped;
    world.lease.as_mut().unwrap().0.record.term += 1;
    let term = world.record().unwrap().term;
    let seen = world.observe();
    let order = Order::Start {
        over_stopped_term: term,
    };
    let asked = decide(&seen).actions;
    assert_eq!(asked.len(), 2);
    assert!(
        asked
            .iter()
            .all(|action| matches!(action, Action::Request { request, .. } if request.order == order))
    );
    // Not at once, should it do so again and again.
    let mut early = seen.clone();
    if let LeaseSeen::Found(record) = &mut early.lease {
        record.renewed = Some(early.now);
    }
    let decision = decide(&early);
    assert!(decision.actions.is_empty() && decision.recheck.is_some());
}

#[test]
fn deleting_takes_everything_and_the_object_last() {
    let mut world = protected(3);
    world.delete();
    for _ in 0..60 {
        world.settle(1);
        assert!(!world.gone || (world.pods.is_empty() && world.claims.is_empty()));
    }
    assert!(world.gone);
}

#[test]
fn retained_volumes_stay() {
    let mut world = protected(3);
    world.vm.spec.volume_policy = ftvm_crds::VolumePolicy::Retain;
    world.delete();
    world.settle(60);
    assert!(world.gone && world.pods.is_empty() && world.claims.len() == 4);
}

#[test]
fn a_vm_that_never_ran_goes_and_halts_without_a_stop() {
    let mut world = World::new(0);
    world.settle(10);
    world.want(RunStrategy::Halted);
    world.settle(20);
    assert_eq!(phase(&world), Some(VmPhase::Halted));
    world.delete();
    world.settle(20);
    assert!(world.gone);
}

#[test]
fn a_switchover_is_asked_for_once_and_its_outcome_is_kept() {
    let mut world = protected(3);
    let annotations = world.vm.metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_SWITCHOVER.to_owned(), "today".to_owned());
    let (active, _) = seats(&world);
    let decision = decide(&world.observe());
    assert!(
        matches!(&decision.actions[..], [Action::Request { seat, request, .. }] if *seat == active.name && request.order == Order::Switchover)
    );
    world.step();
    assert!(decide(&world.observe()).actions.is_empty(), "asked once");
    world.engine(&active.name);
    world.step();
    let outcome = world.vm.status.as_ref().unwrap().switchover.clone().unwrap();
    assert_eq!((outcome.request.as_str(), outcome.outcome), ("today", Outcome::Done));
    assert!(!world.step());
}

/// A text that was used before: the daemon says so, and the outcome is that, not a wait for ever.
#[test]
fn a_switchover_that_the_daemon_refuses_is_told_as_refused() {
    let mut world = protected(3);
    let annotations = world.vm.metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_SWITCHOVER.to_owned(), "today".to_owned());
    world.step();
    let (active, _) = seats(&world);
    let pod = world.pods.get_mut(&active.name).unwrap();
    pod.published.as_mut().unwrap().done_request = Some(DoneRequest {
        id: "switchover-today".to_owned(),
        refused: Some("asked for before".to_owned()),
    });
    world.step();
    let outcome = world.vm.status.as_ref().unwrap().switchover.clone().unwrap();
    assert_eq!(
        (outcome.outcome, outcome.why.as_deref()),
        (Outcome::Refused, Some("asked for before"))
    );
}

#[test]
fn a_data_loss_is_accepted_only_for_the_holder_that_was_named() {
    let mut world = protected(3);
    let (active, standby) = seats(&world);
    let (holder, term) = (world.record().unwrap().holder, world.record().unwrap().term);
    let mut with = |text: String| {
        let annotations = world.vm.metadata.annotations.get_or_insert_default();
        annotations.insert(ANNOTATION_ACCEPT_DATA_LOSS.to_owned(), text);
        decide(&world.observe()).actions
    };
    assert!(with("nonsense".to_owned()).is_empty());
    assert!(with(format!("{}@{term}", Incarnation { start: 99, ..holder })).is_empty());
    assert!(with(holder.to_string()).is_empty(), "of which record?");
    assert!(with(format!("{holder}@{term}")).is_empty(), "its guest runs");
    for entry in [&active, &standby] {
        let pod = world.pods.get_mut(&entry.name).unwrap();
        let published = pod.published.as_mut().unwrap();
        (published.role, published.peer_connected) = (Some(SeatRole::Starting), false);
    }
    let asked = decide(&world.observe()).actions;
    assert!(
        matches!(&asked[..], [Action::Request { request, .. }] if request.order == Order::AcceptDataLoss { holder, term: Some(term), over_stopped_term: None })
    );
}

#[test]
fn with_a_strange_lease_nothing_is_done() {
    let mut world = protected(3);
    let (snapshot, _) = world.lease.take().unwrap();
    world.step();
    assert!(lease_is_strange(&world.observe()));
    assert!(!world.step(), "nobody vouches for another one");
    let mut other = snapshot.clone();
    other.uid = ftvm_protocol::identity::ArbiterUid(999);
    world.lease = Some((other, String::new()));
    world.step();
    world.nodes.values_mut().for_each(|node| node.ready = false);
    world.pass(100_000);
    assert!(decide(&world.observe()).actions.is_empty());
    assert_eq!(
        decide(&world.observe())
            .book
            .iter()
            .filter(|entry| entry.leaving)
            .count(),
        0
    );
}

#[test]
fn a_seat_that_leaves_and_is_named_after_all_stays() {
    let mut world = protected(3);
    let (_, standby) = seats(&world);
    let seats = &mut world.vm.status.as_mut().unwrap().seats;
    seats
        .iter_mut()
        .find(|entry| entry.name == standby.name)
        .unwrap()
        .leaving = true;
    let decision = decide(&world.observe());
    assert!(decision.actions.is_empty());
    assert!(decision.book.iter().all(|entry| !entry.leaving));
}

#[test]
fn a_failed_pod_is_made_again_later_each_time() {
    let mut world = protected(3);
    let (_, standby) = seats(&world);
    let created = world.now;
    let pod = world.pods.get_mut(&standby.name).unwrap();
    (pod.phase, pod.created) = (PodPhase::Finished, Some(created));
    let decision = decide(&world.observe());
    assert!(decision.actions.is_empty() && decision.recheck.is_some());
    world.pass(6);
    assert!(matches!(
        &decide(&world.observe()).actions[..],
        [Action::DeletePod { force: false, .. }]
    ));
    let now = world.now;
    for entry in &mut world.vm.status.as_mut().unwrap().seats {
        entry.former = (0..3).map(|_| former("", "node-0", now)).collect();
    }
    assert!(decide(&world.observe()).actions.is_empty());
    world.pass(40);
    assert_eq!(decide(&world.observe()).actions.len(), 1);
}

#[test]
fn the_original_may_change_while_no_guest_ran() {
    let mut world = World::new(3);
    // Until the Lease is there; no engine runs.
    for _ in 0..6 {
        world.step();
        for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
            world.schedule(&seat);
            world.kubelet(&seat);
        }
    }
    let original = world.record().unwrap().holder.seat.to_string();
    let first = world.book().into_iter().find(|entry| entry.had_uid(&original)).unwrap();
    world.pods.remove(&first.name);
    assert!(world.settle(60), "{:#?}", world.vm.status);
    assert!(world.is_protected() && world.entry(&first.name).is_none());
}

#[test]
fn an_engine_that_has_ended_is_none() {
    let world = protected(3);
    let (active, _) = seats(&world);
    let mut pod = world.pods[&active.name].clone();
    assert!(has_engine(&pod));
    pod.published.as_mut().unwrap().role = Some(SeatRole::Ended);
    assert!(!has_engine(&pod));
    pod.published = Err(ftvm_crds::seat::AnnotationError::TooLong {
        annotation: "x",
        length_bytes: 1,
    });
    assert!(has_engine(&pod), "what can't be read proves nothing");
}

fn condition(world: &World) -> (String, String) {
    let status = world.vm.status.as_ref().unwrap();
    let said = status.condition(crate::status::ARBITER_REACHABLE).unwrap();
    (said.reason.clone(), said.message.clone())
}

/// A seat that joins does not ask: what it knew before says nothing of now.
#[test]
fn who_cannot_reach_the_lease_is_told_unless_it_joins() {
    let mut world = protected(3);
    let (_, standby) = seats(&world);
    for (role, reason) in [(SeatRole::Joining, "Reachable"), (SeatRole::Standby, "SeatCantReach")] {
        let published = world.pods.get_mut(&standby.name).unwrap().published.as_mut().unwrap();
        (published.role, published.arbiter_reachable) = (Some(role), false);
        world.step();
        assert_eq!(condition(&world).0, reason, "{role:?}");
    }
}

fn each_engine(world: &mut World) {
    for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
        world.engine(&seat);
    }
}

#[test]
fn a_lease_that_is_gone_is_made_anew_when_both_seats_agree() {
    let mut world = protected(3);
    let before = world.lease.clone().unwrap().0;
    let known = |world: &World| world.vm.status.as_ref().unwrap().lease_uid.clone();
    world.delete_lease();
    world.step();
    assert_eq!(condition(&world).0, "LeaseGone");
    assert!(
        condition(&world).1.contains("no seat vouches"),
        "{:?}",
        condition(&world)
    );
    let (active, standby) = seats_of(&world, &before.record);
    world.engine(&active.name);
    assert!(
        decide(&world.observe()).actions.is_empty(),
        "one of a pair is not enough"
    );
    world.step();
    assert!(
        condition(&world).1.contains("of the pair only"),
        "{:?}",
        condition(&world)
    );
    world.engine(&standby.name);
    world.step();
    let after = world.lease.clone().expect("made anew").0;
    assert_eq!(
        (after.record.holder, &after.record.members),
        (before.record.holder, &before.record.members)
    );
    assert_eq!(after.record.predecessor, Some(before.uid));
    assert_eq!(world.lease.as_ref().unwrap().1, "node-0,node-1");
    assert_ne!(after.uid, before.uid);
    // The former one is forgotten once both go by the new one, and not before.
    world.step();
    assert_eq!(condition(&world).0, "LeaseRecreated");
    world.engine(&active.name);
    world.step();
    assert_eq!(known(&world), Some(before.uid.to_string()));
    world.engine(&standby.name);
    world.step();
    assert_eq!(known(&world), Some(after.uid.to_string()));
    world.step();
    assert_eq!(condition(&world).0, "Reachable");
    assert!(world.settle(10) && world.is_protected());
}

fn seats_of(world: &World, record: &Record) -> (SeatEntry, SeatEntry) {
    let holder = record.holder.seat.to_string();
    let (active, standby): (Vec<_>, Vec<_>) = world.book().into_iter().partition(|entry| entry.had_uid(&holder));
    (active[0].clone(), standby[0].clone())
}

#[test]
fn an_operator_that_dies_after_making_a_lease_anew_knows_it_again() {
    let mut world = protected(3);
    world.delete_lease();
    each_engine(&mut world);
    // The status is never written: another operator begins with what the API server has.
    let decision = decide(&world.observe());
    let [Action::RecreateLease { record, nodes }] = &decision.actions[..] else {
        panic!("{:?}", decision.actions);
    };
    world.recreate_lease(record, nodes);
    assert!(!lease_is_strange(&world.observe()));
    // It is deleted once more before anybody goes by it: what was vouched for holds.
    world.lease = None;
    assert!(matches!(
        &decide(&world.observe()).actions[..],
        [Action::RecreateLease { .. }]
    ));
    assert!(world.settle(20) && world.is_protected());
}

#[test]
fn who_is_alone_gets_a_lease_again_by_itself() {
    let mut world = protected(2);
    let (active, standby) = seats(&world);
    world.kill_node_of(&standby);
    world.engine(&active.name);
    world.settle(5);
    world.delete_lease();
    world.engine(&active.name);
    world.settle(5);
    let record = world.record().expect("made anew").clone();
    assert_eq!(
        (record.members.iter().count(), record.holder.seat.to_string()),
        (1, active.pod_uid.unwrap())
    );
    assert_eq!(condition(&world).0, "Reachable");
}

#[test]
fn with_the_active_dead_a_lease_is_not_made_anew_and_a_copy_of_it_helps() {
    let mut world = protected(2);
    let (active, _) = seats(&world);
    world.kill_node_of(&active);
    world.delete_lease();
    world.settle(50);
    assert!(world.lease.is_none());
    let (reason, message) = condition(&world);
    assert_eq!(reason, "LeaseGone");
    assert!(message.contains("bring the other seat's node back"), "{message}");
    world.put_copy_back();
    world.nodes.values_mut().for_each(|node| node.ready = true);
    assert!(world.settle(60), "{:#?}", world.vm.status);
    assert!(world.is_protected());
}

#[test]
fn a_successor_of_something_else_is_foreign() {
    let mut world = protected(3);
    let mut other = world.lease.clone().unwrap().0;
    world.delete_lease();
    each_engine(&mut world);
    other.uid = ftvm_protocol::identity::ArbiterUid(999);
    other.record.predecessor = Some(ftvm_protocol::identity::ArbiterUid(998));
    world.lease = Some((other, String::new()));
    world.step();
    assert_eq!(condition(&world).0, "LeaseReplaced");
    assert!(condition(&world).1.contains("delete it"));
    assert!(decide(&world.observe()).actions.is_empty());
    world.lease = None;
    assert!(world.settle(20) && world.is_protected());
}

#[test]
fn a_vm_that_goes_gets_no_lease_again_and_one_that_halts_does() {
    let mut world = protected(3);
    world.delete_lease();
    each_engine(&mut world);
    world.want(RunStrategy::Halted);
    assert!(matches!(
        &decide(&world.observe()).actions[..],
        [Action::RecreateLease { .. }]
    ));
    world.delete();
    let actions = decide(&world.observe()).actions;
    assert!(
        !actions
            .iter()
            .any(|action| matches!(action, Action::RecreateLease { .. })),
        "{actions:?}"
    );
}
