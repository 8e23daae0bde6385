use ftvm_crds::RunStrategy;
use ftvm_crds::seat::SeatPublished;
use ftvm_protocol::identity::ArbiterUid;

use super::*;
use crate::decide::rig::World;
use crate::decide::{Action, decide};

fn protected() -> World {
    let mut world = World::new(3);
    assert!(world.settle(60), "{:#?}", world.vm.status);
    assert!(world.is_protected());
    world
}

fn wants(world: &mut World, annotation: &str, text: &str) {
    let annotations = world.vm.metadata.annotations.get_or_insert_default();
    annotations.insert(annotation.to_owned(), text.to_owned());
    world.version += 1;
}

fn failover(world: &World) -> AskedFor {
    world
        .vm
        .status
        .clone()
        .unwrap_or_default()
        .failover
        .expect("an outcome")
}

fn switchover(world: &World) -> AskedFor {
    world
        .vm
        .status
        .clone()
        .unwrap_or_default()
        .switchover
        .expect("an outcome")
}

fn refused(asked: &AskedFor, words: &str) {
    let why = asked.why.clone().unwrap_or_default();
    assert!(
        asked.outcome == Outcome::Refused && why.contains(words),
        "{words}: {asked:?}"
    );
    assert!(why.contains("another text"), "it does not say what to do: {why}");
}

/// The active's entry.
fn active(world: &World) -> SeatEntry {
    let holder = world.record().unwrap().holder.seat.to_string();
    world.book().into_iter().find(|entry| entry.had_uid(&holder)).unwrap()
}

#[test]
fn each_text_asks_for_one_failure_of_the_active() {
    let mut world = protected();
    for (number, text) in ["monday", "tuesday"].into_iter().enumerate() {
        let before = active(&world);
        wants(&mut world, ANNOTATION_FAILOVER, text);
        let asked = decide(&world.observe()).actions;
        assert!(
            matches!(&asked[..], [Action::Request { seat, request, .. }]
                if *seat == before.name && request.order == Order::Failover && request.id == format!("failover-{text}")),
            "{asked:?}"
        );
        world.step();
        assert_eq!(failover(&world).outcome, Outcome::Pending);
        assert!(decide(&world.observe()).actions.is_empty(), "asked once");
        assert!(world.settle(60) && world.is_protected());
        assert_eq!(
            (failover(&world).request.as_str(), failover(&world).outcome),
            (text, Outcome::Done)
        );
        assert_ne!(active(&world).name, before.name, "the other seat took over");
        assert_eq!(world.kills.len(), number + 1);
    }
    assert_eq!(world.kills, ["failover-monday", "failover-tuesday"]);
    assert!(!world.step(), "a request that is done leaves nothing to do");
}

#[test]
fn without_protection_it_is_refused_and_does_not_come_later() {
    let mut world = protected();
    let standby = world
        .book()
        .into_iter()
        .find(|entry| entry.name != active(&world).name)
        .unwrap();
    world.swap_out(&standby.name);
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    refused(&failover(&world), "not protected");
    assert!(world.settle(60) && world.is_protected());
    refused(&failover(&world), "not protected");
    assert!(world.kills.is_empty(), "{:?}", world.kills);
    // Nor if the object is made with it.
    let mut world = World::new(3);
    wants(&mut world, ANNOTATION_FAILOVER, "from the beginning");
    assert!(world.settle(60) && world.is_protected());
    refused(&failover(&world), "not protected");
    assert!(world.kills.is_empty(), "{:?}", world.kills);
}

#[test]
fn with_a_strange_lease_it_is_refused_and_does_not_come_later() {
    let mut world = protected();
    let (snapshot, nodes) = world.lease.clone().unwrap();
    let mut foreign = snapshot.clone();
    foreign.uid = ArbiterUid(999);
    world.lease = Some((foreign, nodes.clone()));
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    refused(&failover(&world), "Lease is not to be gone by");
    world.lease = Some((snapshot, nodes));
    world.settle(60);
    assert!(world.is_protected() && world.kills.is_empty(), "{:?}", world.kills);
    refused(&failover(&world), "Lease is not to be gone by");
}

/// Its link may be well while nothing else of the standby is: it would hold the guest and not be able to go on with it.
#[test]
fn while_a_seat_of_the_pair_has_no_place_to_stay_it_is_refused() {
    let spoils: [fn(&mut World, &SeatEntry); 2] = [
        |world, entry| drop(world.kill_node_of(entry)),
        |world, entry| world.pods.get_mut(&entry.name).unwrap().deleting = true,
    ];
    for (spoil, the_active) in spoils.into_iter().flat_map(|spoil| [(spoil, false), (spoil, true)]) {
        let mut world = protected();
        let active = active(&world).name;
        let book = world.book();
        let entry = book.iter().find(|entry| (entry.name == active) == the_active).unwrap();
        spoil(&mut world, entry);
        wants(&mut world, ANNOTATION_FAILOVER, "now");
        let decision = decide(&world.observe());
        let asked = decision.failover.expect("an outcome");
        refused(&asked, "to go, or its node is not ready");
        assert!(decision.settles, "from fresh reads");
    }
}

/// What was told before is not forgotten for it.
#[test]
fn with_a_strange_lease_what_was_told_stays() {
    let mut world = protected();
    wants(&mut world, ANNOTATION_FAILOVER, "told");
    world.step();
    let (snapshot, nodes) = world.lease.clone().unwrap();
    let mut foreign = snapshot.clone();
    foreign.uid = ArbiterUid(999);
    world.lease = Some((foreign, nodes.clone()));
    wants(&mut world, ANNOTATION_FAILOVER, "later");
    world.step();
    assert_eq!(
        (failover(&world).request.as_str(), failover(&world).outcome),
        ("told", Outcome::Pending)
    );
    world.lease = Some((snapshot, nodes));
    assert!(world.settle(60) && world.is_protected());
    assert_eq!(world.kills, ["failover-told"]);
    refused(&failover(&world), "not protected");
}

/// The standby might not go by the new record yet: it would not take over.
#[test]
fn while_not_everybody_goes_by_a_lease_that_was_made_anew_it_is_refused() {
    let mut world = protected();
    world.delete_lease();
    for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
        world.engine(&seat);
    }
    world.step();
    assert!(world.lease.is_some(), "made anew");
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    refused(&failover(&world), "made anew");
    assert!(world.settle(60) && world.is_protected() && world.kills.is_empty());
}

#[test]
fn one_of_both_is_under_way_at_a_time() {
    let mut world = protected();
    wants(&mut world, ANNOTATION_SWITCHOVER, "this");
    wants(&mut world, ANNOTATION_FAILOVER, "that");
    world.step();
    refused(&failover(&world), "a switchover is under way");
    assert!(world.settle(60) && world.kills.is_empty());
    assert_eq!(switchover(&world).outcome, Outcome::Done);
    wants(&mut world, ANNOTATION_FAILOVER, "again");
    world.step();
    wants(&mut world, ANNOTATION_SWITCHOVER, "behind it");
    wants(&mut world, ANNOTATION_FAILOVER, "beside it");
    world.step();
    assert_eq!(
        (failover(&world).request.as_str(), failover(&world).outcome),
        ("again", Outcome::Pending)
    );
    // The one that was told comes to its end; then there is no protection for another one.
    assert!(world.settle(60) && world.is_protected());
    refused(&failover(&world), "not protected");
    assert_eq!(failover(&world).request, "beside it");
    assert_eq!(world.kills, ["failover-again"]);
    assert_eq!(switchover(&world).outcome, Outcome::Done);
}

/// The order that the told pod has.
fn order(world: &World, told: &SeatEntry) -> Option<Order> {
    let request = world.pods[&told.name].request.as_ref();
    request.map(|request| request.order.clone())
}

fn removes(world: &mut World, annotation: &str) {
    world.vm.metadata.annotations.as_mut().unwrap().remove(annotation);
    world.version += 1;
}

/// The daemon of the active's node is away: whenever it is there again, nothing comes. A clock that was set back ends no time late.
#[test]
fn a_failure_that_no_daemon_begins_in_time_is_taken_back() {
    for seconds in [61, -1] {
        let mut world = protected();
        let told = active(&world);
        wants(&mut world, ANNOTATION_FAILOVER, "now");
        world.step();
        let until = u64::try_from(world.now.as_millisecond()).unwrap() + 60_000;
        let request = world.pods[&told.name].request.clone().unwrap();
        assert_eq!(
            (request.order, request.until_unix_ms),
            (Order::Failover, Some(until)),
            "the daemon is told until when"
        );
        world.pass(seconds.clamp(0, 60));
        let decision = decide(&world.observe());
        assert!(decision.actions.is_empty() && decision.recheck.is_some(), "in time");
        world.pass(seconds - seconds.clamp(0, 60));
        world.step();
        assert_eq!(order(&world, &told), Some(Order::TakeBack), "{seconds} s");
        assert_eq!(failover(&world).outcome, Outcome::Pending, "not before it is written");
        world.step();
        refused(&failover(&world), "nothing was done");
        assert!(world.settle(60) && world.is_protected() && world.kills.is_empty());
        refused(&failover(&world), "nothing was done");
        wants(&mut world, ANNOTATION_FAILOVER, "again");
        assert!(world.settle(60) && world.is_protected());
        assert_eq!(world.kills, ["failover-again"]);
    }
}

/// Nobody is told that it won't come as long as it may have been begun.
#[test]
fn what_was_begun_before_it_was_taken_back_is_waited_for() {
    let mut world = protected();
    let told = active(&world);
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    let published = |world: &mut World, change: fn(&mut SeatPublished)| {
        let pod = world.pods.get_mut(&told.name).unwrap();
        change(pod.published.as_mut().unwrap());
    };
    published(&mut world, |published| {
        published.begun = Some("failover-now".to_owned())
    });
    world.pass(61);
    for _ in 0..3 {
        world.step();
        assert_eq!(order(&world, &told), Some(Order::TakeBack));
        assert_eq!(failover(&world).outcome, Outcome::Pending);
    }
    let why = failover(&world).why.unwrap();
    assert!(why.contains("may have begun it"), "{why}");
    published(&mut world, |published| {
        published.begun = None;
        published.done_request = Some(DoneRequest {
            id: "failover-now".to_owned(),
            refused: None,
        });
    });
    world.step();
    assert_eq!(failover(&world).outcome, Outcome::Done);
}

#[test]
fn whoever_removes_the_annotation_takes_the_failure_back() {
    let mut world = protected();
    let told = active(&world);
    wants(&mut world, ANNOTATION_FAILOVER, "withdrawn");
    world.step();
    removes(&mut world, ANNOTATION_FAILOVER);
    world.step();
    assert_eq!(order(&world, &told), Some(Order::TakeBack));
    assert!(failover(&world).why.unwrap().contains("was removed"));
    assert!(world.settle(60) && world.is_protected() && world.kills.is_empty());
    assert_eq!(failover(&world).outcome, Outcome::Refused);
    // What a former leader wrote may be on its way: it has to find another version of the pod.
    wants(&mut world, ANNOTATION_FAILOVER, "not written");
    let seen = world.observe();
    world.vm.status = Some(crate::status::status(&seen, &decide(&seen)));
    removes(&mut world, ANNOTATION_FAILOVER);
    let decision = decide(&world.observe());
    assert!(
        matches!(&decision.actions[..], [Action::Request { seat, request, .. }]
            if *seat == told.name && request.order == Order::TakeBack && request.id == "failover-not written"),
        "{:?}",
        decision.actions
    );
    assert!(world.settle(60) && world.kills.is_empty());
    assert_eq!(failover(&world).outcome, Outcome::Refused);
    // A switchover that was told comes to its end.
    wants(&mut world, ANNOTATION_SWITCHOVER, "told");
    world.step();
    removes(&mut world, ANNOTATION_SWITCHOVER);
    assert!(world.settle(60));
    assert_eq!(switchover(&world).outcome, Outcome::Done);
}

/// Whatever else is the matter with the VM.
#[test]
fn with_a_strange_lease_what_is_too_late_is_taken_back() {
    let mut world = protected();
    let told = active(&world);
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    let (snapshot, nodes) = world.lease.clone().unwrap();
    let mut foreign = snapshot.clone();
    foreign.uid = ArbiterUid(999);
    world.lease = Some((foreign, nodes.clone()));
    world.pass(61);
    world.step();
    assert_eq!(order(&world, &told), Some(Order::TakeBack));
    world.step();
    refused(&failover(&world), "nothing was done");
    world.lease = Some((snapshot, nodes));
    assert!(world.settle(60) && world.is_protected() && world.kills.is_empty());
}

/// It set no time: that begins with the first look.
#[test]
fn what_an_earlier_operator_told_gets_its_time() {
    let mut world = protected();
    let told = active(&world);
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    let asked = world.vm.status.as_mut().unwrap().failover.as_mut().unwrap();
    asked.told.as_mut().unwrap().until = None;
    world.pass(100_000);
    world.step();
    assert_eq!(order(&world, &told), Some(Order::Failover));
    world.pass(61);
    world.step();
    assert_eq!(order(&world, &told), Some(Order::TakeBack));
}

#[test]
fn a_switchover_waits_for_a_failover() {
    let mut world = protected();
    wants(&mut world, ANNOTATION_FAILOVER, "first");
    world.step();
    wants(&mut world, ANNOTATION_SWITCHOVER, "then");
    world.step();
    let waits = switchover(&world);
    assert!(waits.outcome == Outcome::Pending && waits.why.unwrap().contains("status.failover"));
    assert!(world.settle(60) && world.is_protected());
    assert_eq!(
        (failover(&world).outcome, switchover(&world).outcome),
        (Outcome::Done, Outcome::Done)
    );
    assert_eq!(world.kills, ["failover-first"]);
}

#[test]
fn what_the_daemon_says_against_it_is_told() {
    let mut world = protected();
    let told = active(&world);
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    // The standby dies before the daemon looks.
    let standby = world.book().into_iter().find(|entry| entry.name != told.name).unwrap();
    world.kill_node_of(&standby);
    world.engine(&told.name);
    world.step();
    let outcome = failover(&world);
    assert_eq!(outcome.outcome, Outcome::Refused, "{outcome:?}");
    assert_eq!(outcome.why.as_deref(), Some("nobody would take over"));
    assert!(world.kills.is_empty());
}

/// The pod that was told goes without an answer: its successor is not failed instead of it.
#[test]
fn nobody_is_failed_in_place_of_a_pod_that_was_told_and_is_gone() {
    let mut world = protected();
    let told = active(&world);
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    world.kill_node_of(&told);
    assert!(world.settle(400), "{:#?}", world.vm.status);
    assert!(world.is_protected(), "it was replaced");
    refused(&failover(&world), "not known whether it was done");
    assert!(world.kills.is_empty(), "{:?}", world.kills);
    // A switchover has the same code.
    let told = active(&world);
    wants(&mut world, ANNOTATION_SWITCHOVER, "now");
    world.step();
    world.nodes.values_mut().for_each(|node| node.ready = true);
    world.kill_node_of(&told);
    assert!(world.settle(400), "{:#?}", world.vm.status);
    refused(&switchover(&world), "not known whether it was done");
}

/// Another request took the place of this one on the pod before anybody answered: it is not written again.
#[test]
fn what_may_have_been_done_is_not_asked_for_again() {
    let mut world = protected();
    let told = active(&world);
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    world.want(RunStrategy::Halted);
    world.step();
    assert_eq!(
        world.pods[&told.name].request.as_ref().map(|request| &request.order),
        Some(&Order::Stop)
    );
    world.want(RunStrategy::Always);
    assert!(world.settle(60) && world.is_protected());
    refused(&failover(&world), "not known whether it was done");
    assert!(world.kills.is_empty(), "{:?}", world.kills);
}

/// An operator that died after it wrote whom it tells, and before it told: the next one tells the same pod.
#[test]
fn an_operator_that_died_before_it_told_is_succeeded() {
    for earlier in [false, true] {
        let mut world = protected();
        let told = active(&world);
        if earlier {
            world.pods.get_mut(&told.name).unwrap().request = Some(SeatRequest {
                id: "switchover-earlier".to_owned(),
                order: Order::Switchover,
                until_unix_ms: None,
            });
        }
        wants(&mut world, ANNOTATION_FAILOVER, "now");
        let seen = world.observe();
        let status = crate::status::status(&seen, &decide(&seen));
        world.vm.status = Some(status);
        world.version += 1;
        let asked = decide(&world.observe()).actions;
        assert!(
            matches!(&asked[..], [Action::Request { seat, .. }] if *seat == told.name),
            "earlier request: {earlier}: {asked:?}"
        );
        assert!(world.settle(60) && world.is_protected());
        assert_eq!(failover(&world).outcome, Outcome::Done);
        assert_eq!(world.kills, ["failover-now"]);
    }
}

/// The caches may not have the own write yet: what looks lost in them is read again past them.
#[test]
fn what_looks_lost_in_a_cache_is_looked_at_again() {
    let mut world = protected();
    let told = active(&world);
    let other = SeatRequest {
        id: "switchover-earlier".to_owned(),
        order: Order::Switchover,
        until_unix_ms: None,
    };
    wants(&mut world, ANNOTATION_FAILOVER, "now");
    world.step();
    let mut old = world.observe();
    old.pods.get_mut(&told.name).unwrap().request = Some(other);
    let decision = decide(&old);
    assert!(decision.needs_certainty(&old), "{:?}", decision.failover);
    let version = world.version;
    world.reconcile(old, version);
    assert_eq!(failover(&world).outcome, Outcome::Pending);
    assert!(world.settle(60) && failover(&world).outcome == Outcome::Done);
    assert_eq!(world.kills, ["failover-now"]);
}

/// Nobody is told that it was done when the answer is about another time.
#[test]
fn a_text_that_comes_again_is_refused() {
    let mut world = protected();
    for text in ["one", "two", "one"] {
        wants(&mut world, ANNOTATION_FAILOVER, text);
        assert!(world.settle(60) && world.is_protected());
    }
    refused(&failover(&world), "with this text before");
    assert_eq!(world.kills, ["failover-one", "failover-two"]);
}

/// As an operator of before left it: who was told is found by the request.
#[test]
fn a_pending_request_of_an_earlier_operator_is_followed() {
    let mut world = protected();
    wants(&mut world, ANNOTATION_SWITCHOVER, "now");
    world.step();
    world.vm.status.as_mut().unwrap().switchover.as_mut().unwrap().told = None;
    assert!(decide(&world.observe()).actions.is_empty(), "it is told already");
    assert!(world.settle(60));
    assert_eq!(switchover(&world).outcome, Outcome::Done);
}

#[test]
fn texts_are_bounded() {
    let mut world = protected();
    wants(&mut world, ANNOTATION_FAILOVER, &"x".repeat(10_000));
    assert!(world.settle(60));
    assert_eq!(failover(&world).request.len(), REQUEST_LENGTH_MAX);
    assert_eq!(world.kills.len(), 1);
}
