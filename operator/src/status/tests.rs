use std::time::Duration;

use ftvm_crds::SeatEntry;
use ftvm_crds::lease::LeaseError;
use ftvm_crds::seat::{DoneRequest, SeatPublished};

use super::*;
use crate::decide::rig::World;
use crate::decide::{Action, decide};
use crate::observe::{PodPhase, Refusal};
use k8s_openapi::api::core::v1::Taint;

fn started() -> World {
    let mut world = World::new(3);
    for _ in 0..4 {
        world.step();
    }
    world
}

pub(super) fn said(world: &mut World, kind: &str) -> Condition {
    let seen = world.observe();
    said_of(&seen, kind)
}

fn said_of(seen: &Observed, kind: &str) -> Condition {
    let status = status(seen, &decide(seen));
    status
        .conditions
        .into_iter()
        .find(|condition| condition.type_ == kind)
        .unwrap()
}

fn first(world: &World) -> SeatEntry {
    world.book()[0].clone()
}

/// Reason, and that the message says what to do.
pub(super) fn expect(condition: &Condition, reason: &str, advice: &str) {
    assert_eq!(
        (condition.status.as_str(), condition.reason.as_str()),
        ("False", reason),
        "{}",
        condition.message
    );
    assert!(condition.message.contains(advice), "{}", condition.message);
}

#[test]
fn each_obstacle_says_what_to_do() {
    let mut world = started();
    let name = first(&world).name;
    let pods = world.pods.clone();
    let mut with = |change: &dyn Fn(&mut World), reason: &str, advice: &str| {
        change(&mut world);
        expect(&said(&mut world, PROTECTED), reason, advice);
        world.pods = pods.clone();
        world
            .nodes
            .values_mut()
            .for_each(|node| (node.seats, node.ready) = (10, true));
    };
    let pod = |world: &mut World, text: &str| world.pods.get_mut(&name).unwrap().unschedulable = Some(text.to_owned());
    with(
        &|world| pod(world, "0/3 nodes are available: 3 Insufficient memory"),
        "InsufficientMemory",
        "add a node",
    );
    with(
        &|world| {
            let text = "0/3 nodes: 1 node(s) didn't match pod anti-affinity rules, 2 node(s) didn't find available persistent volumes to bind";
            pod(world, text);
        },
        "NoVolume",
        "add volumes there",
    );
    with(
        &|world| pod(world, "0/3 nodes: 1 node(s) didn't match pod anti-affinity rules"),
        "TooFewNodes",
        "add a node",
    );
    with(
        &|world| pod(world, "0/3 nodes: 3 didn't match node selector"),
        "Unschedulable",
        "spec.placement",
    );
    with(
        &|world| {
            world.nodes.values_mut().for_each(|node| node.seats = 0);
            pod(world, "3 Insufficient ftvm.dev/seat");
        },
        "NoKvmNode",
        "/dev/kvm",
    );
    with(
        &|world| pod(world, "pod has unbound immediate PersistentVolumeClaims"),
        "VolumeNotBound",
        "storageClassName",
    );
    with(
        &|world| {
            let waiting = ("ImagePullBackOff".to_owned(), "not found".to_owned());
            world.pods.get_mut(&name).unwrap().waiting = Some(waiting);
        },
        "ImagePullFailed",
        "spec.boot.image",
    );
    with(
        &|world| {
            let why = "init container guest: seat: the guest image has no file /boot/vmlinuz (code 30)".to_owned();
            world.pods.get_mut(&name).unwrap().unprepared = Some(why);
        },
        "GuestImageNotCopied",
        "correct spec.boot",
    );
    with(
        &|world| {
            let pod = world.pods.get_mut(&name).unwrap();
            (pod.phase, pod.failed) = (PodPhase::Finished, Some("UnexpectedAdmissionError: x".to_owned()));
        },
        "SeatFailed",
        "made again",
    );
    with(
        &|world| {
            world.schedule(&name);
            world.nodes.get_mut("node-0").unwrap().ready = false;
        },
        "NodeNotReady",
        "replaced",
    );
}

/// While no guest ever ran there is nobody but the seats' programs who says anything.
#[test]
fn what_any_seat_says_is_told_while_nobody_has_the_guest() {
    let mut world = started();
    let name = world.book()[1].name.clone();
    let say = |world: &mut World, why: &str, code: u8| {
        world.pods.get_mut(&name).unwrap().published = Ok(SeatPublished {
            why: why.to_owned(),
            code,
            ..SeatPublished::default()
        });
    };
    say(&mut world, "its program is not connected", 0);
    for kind in [READY, PROTECTED] {
        let told = said(&mut world, kind);
        expect(&told, "Starting", &format!("seat {name}: its program is not connected"));
    }
    // A disk that can't be prepared.
    say(&mut world, "disk root: no room", 16);
    for kind in [READY, PROTECTED] {
        expect(&said(&mut world, kind), "SeatNeedsHelp", "disk root: no room");
    }
    expect(&said(&mut world, STORAGE_HEALTHY), "DiskFailed", "disk root: no room");
}

/// The scheduler joins what it says of nodes, in any order.
#[test]
fn what_to_mend_does_not_depend_on_the_order_of_what_is_said() {
    let mut world = started();
    let name = first(&world).name;
    let apart = "1 node(s) didn't match pod anti-affinity rules";
    for (other, reason) in [
        ("2 Insufficient memory", "InsufficientMemory"),
        ("2 node(s) didn't find available persistent volumes to bind", "NoVolume"),
    ] {
        for parts in [[other, apart], [apart, other]] {
            let text = format!("0/3 nodes are available: {}.", parts.join(", "));
            world.pods.get_mut(&name).unwrap().unschedulable = Some(text);
            expect(&said(&mut world, PROTECTED), reason, other);
        }
    }
    // While no node offers seats, everything else that is said of nodes is beside the point.
    world.nodes.values_mut().for_each(|node| node.seats = 0);
    for text in [
        "1 Insufficient memory, 2 Insufficient ftvm.dev/seat",
        "2 Insufficient ftvm.dev/seat, 1 Insufficient memory",
    ] {
        world.pods.get_mut(&name).unwrap().unschedulable = Some(text.to_owned());
        expect(&said(&mut world, PROTECTED), "NoKvmNode", "/dev/kvm");
    }
}

/// That there is no second node keeps no guest from starting.
#[test]
fn a_missing_second_node_is_told_last() {
    for [waits, unplaced] in [[0, 1], [1, 0]] {
        let mut world = started();
        let name = |index: usize| world.book()[index].name.clone();
        let (waits, unplaced) = (name(waits), name(unplaced));
        let text = "0/1 nodes are available: 1 node(s) didn't match pod anti-affinity rules";
        world.pods.get_mut(&unplaced).unwrap().unschedulable = Some(text.to_owned());
        expect(&said(&mut world, PROTECTED), "TooFewNodes", "add a node");
        let waiting = ("ErrImagePull".to_owned(), "not found".to_owned());
        world.pods.get_mut(&waits).unwrap().waiting = Some(waiting);
        expect(&said(&mut world, PROTECTED), "ImagePullFailed", &waits);
        expect(&said(&mut world, READY), "ImagePullFailed", &waits);
    }
}

#[test]
fn labels_that_no_node_has_are_named() {
    let mut world = started();
    let entry = first(&world);
    let rack = serde_json::json!({"seats": [{"nodeSelector": {"rack": "two"}}]});
    world.vm.spec.placement = serde_json::from_value(rack).unwrap();
    // With one node, too, for another one would be as useless.
    for nodes in [3, 1] {
        world.nodes = World::new(nodes).nodes;
        let selects = "didn't match Pod's node affinity/selector";
        for text in [
            format!("2 node(s) {selects}, 1 Insufficient memory"),
            format!("1 Insufficient memory, 2 node(s) {selects}"),
        ] {
            world.pods.get_mut(&entry.name).unwrap().unschedulable = Some(text);
            let told = said(&mut world, PROTECTED);
            expect(&told, "Unschedulable", "the labels rack=two");
            assert!(
                told.message.contains("spec.placement.seats[0].nodeSelector"),
                "{}",
                told.message
            );
        }
    }
    let labels = [("rack".to_owned(), "two".to_owned())];
    world
        .nodes
        .values_mut()
        .for_each(|node| node.labels.extend(labels.clone()));
    assert_ne!(said(&mut world, PROTECTED).reason, "Unschedulable");
}

/// kubelet alternates between an attempt and the wait for the next one, and each attempt has another port.
#[test]
fn an_image_that_stays_away_is_told_once() {
    let mut world = started();
    while world.step() {}
    let name = first(&world).name;
    let refused = |port: u16, why: &str| {
        format!(
            "failed to pull and unpack image \"lab.ftvm.dev/none:1\": dial tcp: lookup lab.ftvm.dev on [::1]:53: read udp [::1]:{port}->[::1]:53: {why}"
        )
    };
    let mut step = |reason: &str, text: &str| {
        let waiting = (reason.to_owned(), text.to_owned());
        world.pods.get_mut(&name).unwrap().waiting = Some(waiting);
        let changed = world.step();
        let status = world.vm.status.clone().unwrap();
        (changed, status.condition(PROTECTED).unwrap().clone())
    };
    let first = refused(42389, "connection refused");
    let (changed, told) = step("ErrImagePull", &first);
    assert!(changed);
    expect(&told, "ImagePullFailed", &first);
    for port in [42390, 1, 65535] {
        let again = refused(port, "connection refused");
        assert_eq!(step("ErrImagePull", &again), (false, told.clone()));
        let waits = format!("Back-off pulling image \"lab.ftvm.dev/none:1\": ErrImagePull: {again}");
        assert_eq!(step("ImagePullBackOff", &waits), (false, told.clone()));
    }
    // Another reason is told.
    let (changed, told) = step("ErrImagePull", &refused(42391, "i/o timeout"));
    assert!(changed && told.message.contains("i/o timeout"), "{}", told.message);
    let (one, other) = ("seat web-a1: an image", "seat web-b2: an image");
    assert!(!is_no_news("ImagePullFailed", one, other));
    let unavailable = "Back-off pulling image \"lab.ftvm.dev/none:1\": RegistryUnavailable: image pull failed for lab.ftvm.dev/none:1";
    let (_, told) = step("ImagePullBackOff", unavailable);
    let end = "can't be pulled (image pull failed for lab.ftvm.dev/none:1): correct spec.boot.image";
    assert!(told.message.contains(end), "{}", told.message);
    // A kubelet that was started anew does not know why.
    let (_, told) = step("ImagePullBackOff", "Back-off pulling image \"lab.ftvm.dev/none:1\"");
    expect(&told, "ImagePullFailed", "Back-off pulling image");
}

#[test]
fn what_is_refused_is_told_until_it_is_made() {
    let mut world = started();
    let before = world.vm.status.clone().unwrap();
    let mut seen = world.observe();
    seen.refused = Some(Refusal {
        reason: API_SERVER_REFUSES,
        message: "the API server refuses Pod a: pay first".to_owned(),
        wait: Duration::ZERO,
    });
    let after = status(&seen, &decide(&seen));
    for kind in [READY, PROTECTED] {
        expect(after.condition(kind).unwrap(), API_SERVER_REFUSES, "pay first");
    }
    let told = changes(&before, &after);
    let events = told.iter().filter(|change| change.reason == API_SERVER_REFUSES);
    assert!(
        events
            .clone()
            .all(|event| event.warning && event.note.contains("pay first"))
    );
    assert_eq!(events.count(), 2, "{told:?}");
    // A Lease that is not the VM's keeps anything from being made.
    seen.lease = LeaseSeen::Unusable(LeaseError::OtherOwner {
        found: "no owner".to_owned(),
    });
    expect(&said_of(&seen, PROTECTED), "LeaseUnusable", "remove that Lease");
    let mut world = World::new(3);
    assert!(world.settle(60));
    let mut seen = world.observe();
    seen.refused = Some(Refusal {
        reason: API_SERVER_REFUSES,
        message: "pay first".to_owned(),
        wait: Duration::ZERO,
    });
    assert_eq!(
        said_of(&seen, PROTECTED).status,
        "True",
        "whoever is protected stays so"
    );
}

/// Webhooks name ports and requests, quotas what is used: a status that is written for that brings the next look.
#[test]
fn a_refusal_that_differs_in_numbers_is_told_once() {
    let mut world = started();
    while world.step() {}
    let mut step = |pod: &str, why: &str| {
        let mut seen = world.observe();
        seen.refused = Some(Refusal {
            reason: API_SERVER_REFUSES,
            message: format!("the API server refuses Pod {pod} in namespace shop ({why}): pay"),
            wait: Duration::from_secs(1),
        });
        let decision = decide(&seen);
        let version = world.version;
        let changed = world.carry_out(&seen, version, &decision);
        let status = world.vm.status.clone().unwrap();
        (changed, status.condition(PROTECTED).unwrap().clone())
    };
    let why = |port: u16, used: &str, id: &str| {
        format!("exceeded quota: small, used: pods={used}; dial tcp 10.0.0.1:{port}: refused; request {id}")
    };
    let (changed, told) = step("web-a1", &why(1, "4", "00c0ffee-1234-4aaa-8bbb-0123456789ab"));
    assert!(changed && told.reason == API_SERVER_REFUSES, "{told:?}");
    for (port, used, id) in [(2, "3", "deadbeef-abcd-4aaa-8bbb-0123456789ab"), (65535, "12Gi", "9")] {
        assert_eq!(step("web-a1", &why(port, used, id)), (false, told.clone()));
    }
    // Another object, and another reason, are told.
    let (changed, told) = step("web-b2", &why(1, "4", "9"));
    assert!(changed && told.message.contains("Pod web-b2 in"), "{told:?}");
    let (changed, told) = step("web-b2", "exceeded quota: large");
    assert!(changed && told.message.contains("large"), "{told:?}");
}

#[test]
fn a_volume_that_does_not_come_is_told_after_a_while() {
    let mut world = started();
    assert_eq!(said(&mut world, PROTECTED).reason, "Starting");
    world.pass(31);
    expect(&said(&mut world, PROTECTED), "VolumeNotBound", "storageClassName ");
    world.vm.spec.disks[0].storage_class_names = vec!["fast".to_owned(), "slow".to_owned()];
    expect(&said(&mut world, PROTECTED), "VolumeNotBound", "class: fast");
}

#[test]
fn a_claim_that_stays_unbound_is_looked_at_again_later_and_later() {
    let mut world = started();
    while world.step() {}
    let begin = world.now;
    let mut looks = Vec::new();
    while world.now.duration_since(begin).as_secs() < 7200 {
        let decision = decide(&world.observe());
        assert_eq!(decision.actions, []);
        let wait = decision.recheck.unwrap().as_secs();
        assert!((1..=600).contains(&wait), "{wait}");
        looks.push(wait);
        world.pass(wait as i64);
    }
    assert!(looks.is_sorted() && looks.len() < 20, "{looks:?}");
    // The first of these looks is the one that tells it.
    assert_eq!(looks[0], 30, "{looks:?}");
    world.claims.values_mut().for_each(|claim| claim.bound = true);
    assert_eq!(decide(&world.observe()).recheck, None);
}

#[test]
fn volumes_that_are_kept_are_named_once_the_vm_goes() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let holder = world.record().unwrap().holder.seat.to_string();
    let holder = world.book().into_iter().find(|entry| entry.had_uid(&holder)).unwrap();
    assert_eq!(kept(&world.observe()), None, "by default they go");
    world.vm.spec.volume_policy = ftvm_crds::VolumePolicy::Retain;
    let note = kept(&world.observe()).unwrap().note;
    for name in world.claims.keys() {
        assert!(note.contains(name), "{name} in {note}");
    }
    assert!(
        note.contains("kubectl get pvc --namespace shop --selector ftvm.dev/vm=web"),
        "{note}"
    );
    assert!(
        note.contains(&format!("seat {} was active last", holder.name)),
        "{note}"
    );
}

#[test]
fn what_a_seat_needs_help_with_is_told_with_its_code() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let standby = world.book()[1].name.clone();
    world.swap_out(&standby);
    let pod = world.pods.get_mut(&standby).unwrap();
    pod.published = Ok(SeatPublished {
        code: 20,
        why: "CPU: this host lacks avx2".to_owned(),
        ..SeatPublished::default()
    });
    expect(&said(&mut world, PROTECTED), "SeatNeedsHelp", "avx2 (code 20");
    let pod = world.pods.get_mut(&standby).unwrap();
    pod.published.as_mut().unwrap().code = 21;
    expect(&said(&mut world, STORAGE_HEALTHY), "DiskFailed", "avx2");
}

/// Whatever the scheduler was told: made by an earlier release, or with a label that somebody changed since.
#[test]
fn two_seats_on_one_node_are_no_protection() {
    let mut world = World::new(3);
    assert!(world.settle(60) && world.is_protected());
    let before = world.vm.status.clone().unwrap();
    let nodes: Vec<_> = world.book().into_iter().map(|entry| entry.node.unwrap()).collect();
    let standby = world.book()[1].name.clone();
    world.pods.get_mut(&standby).unwrap().node = Some(nodes[0].clone());
    let seen = world.observe();
    let after = status(&seen, &decide(&seen));
    let told = after.condition(PROTECTED).unwrap();
    expect(told, "SameNode", "delete pod web-");
    assert!(told.message.contains(&nodes[0]), "{}", told.message);
    let events = changes(&before, &after);
    let event = events.iter().find(|change| change.reason == "SameNode");
    assert!(event.is_some_and(|event| event.warning), "{events:?}");
}

/// A node without the label gets no seat.
#[test]
fn nodes_that_lack_the_topologys_label_are_told_to_be_too_few() {
    let mut world = started();
    let name = first(&world).name;
    world.vm.spec.placement.topology_key = "example.com/rack".to_owned();
    let text = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector";
    world.pods.get_mut(&name).unwrap().unschedulable = Some(text.to_owned());
    expect(&said(&mut world, PROTECTED), "TooFewNodes", "example.com/rack");
}

/// What a daemon says of a bridge that is not for guests (`node-daemon/tests/seat_pod.rs`) reaches condition and event whole.
#[test]
fn a_bridge_that_is_not_for_guests_is_told_by_condition_and_event() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let before = world.vm.status.clone().unwrap_or_default();
    let standby = world.book()[1].name.clone();
    world.swap_out(&standby);
    let why = "guests of this node may not be connected to the bridge mgmt (allowed: vm-*): name an allowed one in spec.networks[].bridge, or ask whoever \
               installed the chart to add it to its value nodeDaemon.allowedBridges";
    let pod = world.pods.get_mut(&standby).unwrap();
    pod.published = Ok(SeatPublished {
        code: 17,
        why: why.to_owned(),
        ..SeatPublished::default()
    });
    let condition = said(&mut world, PROTECTED);
    expect(&condition, "SeatNeedsHelp", why);
    assert!(condition.message.contains("(code 17"), "{}", condition.message);
    let seen = world.observe();
    let after = status(&seen, &decide(&seen));
    let told = changes(&before, &after);
    let event = told
        .iter()
        .find(|change| change.reason == "SeatNeedsHelp")
        .expect("an event");
    assert!(event.warning && event.note.contains(why), "{event:?}");
}

#[test]
fn leases_that_are_not_ours_are_told() {
    let mut world = started();
    let mut seen = world.observe();
    seen.lease = LeaseSeen::Unusable(LeaseError::OtherOwner {
        found: "no owner".to_owned(),
    });
    expect(&said_of(&seen, ARBITER_REACHABLE), "LeaseUnusable", "remove that Lease");
    expect(&said_of(&seen, READY), "LeaseUnusable", "remove that Lease");
    let mut world = World::new(3);
    assert!(world.settle(60));
    assert_eq!(said(&mut world, ARBITER_REACHABLE).status, "True");
    world.lease = None;
    expect(
        &said(&mut world, ARBITER_REACHABLE),
        "LeaseGone",
        "put a copy of the Lease back",
    );
}

#[test]
fn times_of_conditions_are_of_their_last_change() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let before = said(&mut world, PROTECTED).last_transition_time;
    world.pass(1000);
    assert_eq!(said(&mut world, PROTECTED).last_transition_time, before);
    let standby = world.book()[1].name.clone();
    world.swap_out(&standby);
    let after = said(&mut world, PROTECTED);
    assert_eq!(after.status, "False");
    assert_ne!(after.last_transition_time, before);
}

#[test]
fn events_tell_of_roles_and_troubles() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let old = world.vm.status.clone().unwrap();
    let mut new = old.clone();
    new.active = Some("node-9".to_owned());
    new.seats[1].leaving = true;
    let protected = new
        .conditions
        .iter_mut()
        .find(|condition| condition.type_ == PROTECTED)
        .unwrap();
    (protected.status, protected.reason) = ("False".to_owned(), "NodeNotReady".to_owned());
    let told = changes(&old, &new);
    let reasons: Vec<(&str, bool)> = told
        .iter()
        .map(|change| (change.reason.as_str(), change.warning))
        .collect();
    assert_eq!(
        reasons,
        [("ActiveChanged", false), ("SeatLost", true), ("NodeNotReady", true)]
    );
}

#[test]
fn a_guest_that_stands_still_for_want_of_a_standby_is_told() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let old = world.vm.status.clone().unwrap();
    assert_eq!(old.phase, Some(VmPhase::Running));
    let (active, standby) = (world.book()[0].name.clone(), world.book()[1].name.clone());
    world.swap_out(&standby);
    let published = world.pods.get_mut(&active).unwrap().published.as_mut().unwrap();
    (published.protected, published.paused) = (false, true);
    published.why = "the guest stands still".to_owned();
    let seen = world.observe();
    let new = status(&seen, &decide(&seen));
    assert_eq!(new.phase, Some(VmPhase::Paused));
    expect(new.condition(READY).unwrap(), PAUSED, "whenUnprotected");
    expect(new.condition(PROTECTED).unwrap(), PAUSED, "stands still");
    let told = |from: &FaultTolerantVMStatus| {
        let told = changes(from, &new).into_iter();
        told.filter(|change| change.warning && change.reason == PAUSED).count()
    };
    assert_eq!(told(&old), 2, "{:?}", changes(&old, &new));
    // The first start waits for a standby, too: that is no news.
    let mut starting = old;
    for condition in &mut starting.conditions {
        (condition.status, condition.reason) = ("False".to_owned(), "Starting".to_owned());
    }
    assert_eq!(told(&starting), 0);
}

#[test]
fn messages_are_bounded() {
    let mut world = started();
    let name = first(&world).name;
    world.pods.get_mut(&name).unwrap().unschedulable = Some("x".repeat(10_000));
    assert_eq!(said(&mut world, PROTECTED).message.chars().count(), MESSAGE_LENGTH_MAX);
    let decision = decide(&world.observe());
    assert!(
        !decision
            .actions
            .iter()
            .any(|action| matches!(action, Action::DeletePod { .. }))
    );
}

/// It is asked again, later and later, and each attempt is refused: that is one event.
#[test]
fn a_loss_that_an_engine_decides_against_is_told_once() {
    let mut world = started();
    assert!(world.settle(60) && world.is_protected());
    for pod in world.pods.values_mut() {
        let published = pod.published.as_mut().unwrap();
        (published.role, published.peer_connected) = (Some(SeatRole::Starting), false);
    }
    let seat = first(&world).name;
    let now = |world: &mut World| {
        let seen = world.observe();
        status(&seen, &decide(&seen))
    };
    let mut before = now(&mut world);
    for attempt in 0..3 {
        let pod = world.pods.get_mut(&seat).unwrap();
        pod.published.as_mut().unwrap().done_request = Some(DoneRequest {
            id: format!("accept-data-loss-3-1-~{attempt}-9"),
            refused: Some("a guest may run on the other seat".to_owned()),
        });
        let after = now(&mut world);
        expect(
            after.condition(READY).unwrap(),
            "DataLossRefused",
            "a guest may run on the other seat",
        );
        let events = changes(&before, &after);
        let told = events.iter().any(|change| change.reason == "DataLossRefused");
        assert_eq!(told, attempt == 0, "attempt {attempt}: {events:?}");
        before = after;
    }
}

/// Both commands, while they are of use, in whatever order they are given; and nothing of it while the guest runs.
#[test]
fn a_node_that_is_lost_for_good_is_told_with_what_to_do() {
    let mut world = started();
    assert!(world.settle(60) && world.is_protected());
    let holder = world.record().unwrap().holder;
    let is_active = |entry: &ftvm_crds::SeatEntry| entry.had_uid(&holder.seat.to_string());
    let (active, standby): (Vec<_>, Vec<_>) = world.book().into_iter().partition(is_active);
    let (active, standby) = (active[0].clone(), standby[0].clone());
    let node = world.kill_node_of(&active);
    assert_eq!(
        said(&mut world, READY).reason,
        "GuestRuns",
        "the standby's link to it lives"
    );
    let published = world.pods.get_mut(&standby.name).unwrap().published.as_mut().unwrap();
    (published.role, published.peer_connected) = (Some(SeatRole::Starting), false);
    let accept = format!("ftvm.dev/accept-data-loss={holder}@{}", world.record().unwrap().term);
    let taint = format!("kubectl taint node {node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute");
    let told = said(&mut world, READY);
    expect(&told, "NodeNeeded", &accept);
    expect(&told, "NodeNeeded", &taint);
    // Its object is gone.
    let object = world.nodes.remove(&node).unwrap();
    expect(
        &said(&mut world, READY),
        "NodeNeeded",
        "make one of that name with the taint",
    );
    world.nodes.insert(node.clone(), object);
    // Tainted: its pods go, and what is left to do is the other half.
    world.nodes.get_mut(&node).unwrap().taints = vec![Taint {
        key: "node.kubernetes.io/out-of-service".to_owned(),
        ..Taint::default()
    }];
    world.pods.remove(&active.name);
    while world.step() {}
    let told = said(&mut world, READY);
    expect(&told, "NodeNeeded", &accept);
    assert!(!told.message.contains("kubectl taint"), "{told:?}");
    // Everybody is silent: that is the control plane.
    world.nodes.values_mut().for_each(|node| node.ready = false);
    let published = world.pods.get_mut(&standby.name).unwrap().published.as_mut().unwrap();
    published.role = Some(SeatRole::Active);
    assert_ne!(said(&mut world, READY).reason, "NodeNeeded");
}

/// The active was alone when its engine ended, and the other seat is not there: a record that names the active alone may be an old one. Of two nodes, so that
/// the seat is not replaced.
fn alone() -> (World, SeatEntry, String) {
    let mut world = World::new(2);
    assert!(world.settle(60) && world.is_protected());
    let holder = world.record().unwrap().holder.seat.to_string();
    let (active, standby): (Vec<_>, Vec<_>) = world.book().into_iter().partition(|entry| entry.had_uid(&holder));
    let standby = standby[0].clone();
    world.swap_out(&standby.name);
    let published = world.pods.get_mut(&active[0].name).unwrap().published.as_mut().unwrap();
    (published.role, published.peer_connected) = (Some(SeatRole::Starting), false);
    let (holder, term) = (world.record().unwrap().holder, world.record().unwrap().term);
    (world, standby, format!("ftvm.dev/accept-data-loss={holder}@{term}"))
}

#[test]
fn the_node_of_a_seat_that_the_record_does_not_name_is_waited_for() {
    let (mut world, standby, accept) = alone();
    let node = world.kill_node_of(&standby);
    let told = said(&mut world, READY);
    expect(&told, "NodeNeeded", &accept);
    expect(&told, "NodeNeeded", &format!("kubectl taint node {node}"));
    world.nodes.get_mut(&node).unwrap().taints = vec![Taint {
        key: "node.kubernetes.io/out-of-service".to_owned(),
        ..Taint::default()
    }];
    world.pods.remove(&standby.name);
    while world.step() {}
    let told = said(&mut world, READY);
    expect(&told, "NodeNeeded", &accept);
    assert!(!told.message.contains("kubectl taint"), "{told:?}");
    // Where another node could have the seat it is replaced, and nobody waits for this one.
    let (mut world, standby, _) = alone();
    let third = World::new(3).nodes.remove("node-2").unwrap();
    world.nodes.insert("node-2".to_owned(), third);
    world.kill_node_of(&standby);
    expect(&said(&mut world, READY), "NodeNotReady", "replaced");
}

/// Only while nobody has the guest, and the seat may have had it.
#[test]
fn a_pod_that_does_not_start_is_told_to_hold_the_guest_up() {
    let (mut world, standby, accept) = alone();
    world.pods.remove(&standby.name);
    while world.step() {}
    let text = "0/2 nodes are available: 1 Insufficient memory";
    world.pods.get_mut(&standby.name).unwrap().unschedulable = Some(text.to_owned());
    let told = said(&mut world, READY);
    expect(&told, "InsufficientMemory", &accept);
    let boot = format!("boot node {}", standby.node.as_deref().unwrap());
    expect(&told, "InsufficientMemory", &boot);
    // However much the scheduler says.
    let long = format!("{text}{}", "x".repeat(10_000));
    world.pods.get_mut(&standby.name).unwrap().unschedulable = Some(long);
    expect(&said(&mut world, READY), "InsufficientMemory", &accept);
    // A quota may have no room for it.
    let mut lacking = world.observe();
    lacking.pods.remove(&standby.name);
    lacking.refused = Some(Refusal {
        reason: API_SERVER_REFUSES,
        message: "no room".to_owned(),
        wait: Duration::ZERO,
    });
    expect(&said_of(&lacking, READY), API_SERVER_REFUSES, &accept);
    let mut fresh = world.observe();
    for entry in &mut fresh.vm.status.as_mut().unwrap().seats {
        entry.former.clear();
    }
    assert!(!said_of(&fresh, READY).message.contains(&accept));
    let mut published = world.pods.values_mut().filter_map(|pod| pod.published.as_mut().ok());
    let active = published.find(|published| published.role.is_some());
    active.unwrap().role = Some(SeatRole::Active);
    let told = said(&mut world, PROTECTED);
    expect(&told, "InsufficientMemory", "free memory");
    assert!(!told.message.contains(&accept), "{told:?}");
}
