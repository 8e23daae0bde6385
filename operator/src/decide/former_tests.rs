use ftvm_crds::FormerPod;
use ftvm_crds::seat::{SeatExit, SeatPublished, SeatRole};
use ftvm_protocol::identity::Term;
use ftvm_protocol::record::{Members, Phase};
use k8s_openapi::api::core::v1::Taint;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::former::{FORMER_MAX, engine_ended, forget, prove};
use super::rig::World;
use super::stuck_tests::{seats, waits};
use super::*;
use crate::observe::PodPhase;
use crate::status::READY;

/// A pod that was on this node and is gone.
pub fn former(uid: &str, node: &str, since: Timestamp) -> FormerPod {
    FormerPod {
        uid: uid.to_owned(),
        node: Some(node.to_owned()),
        boot: None,
        older: false,
        missing_since: Time(since),
        ended: false,
    }
}

impl World {
    /// Can daemons, or the book, prove of all pods that are gone and that the record names that no engine of them runs any more?
    pub fn are_proven(&self, record: &Record) -> bool {
        record.members.iter().all(|member| self.is_proven(member))
    }

    fn is_proven(&self, member: Incarnation) -> bool {
        let uid = member.seat.to_string();
        let book = self.book();
        let mut formers = book
            .iter()
            .flat_map(|entry| entry.former.iter().map(move |former| (entry, former)));
        let found = formers.find(|(_, former)| former.uid == uid);
        let current = book.iter().any(|entry| entry.pod_uid.as_deref() == Some(&uid));
        current
            || found.is_some_and(|(entry, former)| {
                let node = self.pods.get(&entry.name).and_then(|pod| pod.node.clone());
                former.ended || self.alive(&entry.name) && node == former.node
            })
    }
}

fn protected() -> World {
    let mut world = World::new(3);
    assert!(world.settle(60) && world.is_protected(), "{:#?}", world.vm.status);
    world
}

fn active(world: &World) -> SeatEntry {
    let holder = world.record().unwrap().holder.seat.to_string();
    let found = world.book().into_iter().find(|entry| entry.had_uid(&holder));
    found.unwrap()
}

/// The active's pod is gone without having ended, and the node of its claims takes no other one.
fn vanished() -> (World, String, String) {
    let mut world = protected();
    let active = active(&world);
    let node = active.node.clone().unwrap();
    world.nodes.get_mut(&node).unwrap().schedulable = false;
    world.pods.remove(&active.name);
    assert!(world.step());
    (world, active.name, node)
}

fn ended(world: &World, seat: &str) -> Vec<bool> {
    let entry = world.entry(seat).unwrap();
    entry.former.iter().map(|former| former.ended).collect()
}

#[test]
fn earlier_pods_are_bounded_and_named_ones_stay() {
    let mut world = protected();
    let mut entry = active(&world);
    let record = world.record().unwrap().clone();
    let seen = world.observe();
    let named = entry.pod_uid.clone().unwrap();
    for number in 0..30 {
        let uid = SeatId(number).to_string();
        let uid = if number == 0 { named.clone() } else { uid };
        entry.node = Some("node-0".to_owned());
        forget(&mut entry, uid, &seen, Some(&record));
    }
    assert_eq!(entry.former.len(), FORMER_MAX);
    assert!(is_named(&entry, &record));
    assert!(entry.former.iter().all(|former| !former.ended));
}

/// That a node once took a pod is what says that the seat's disk may have something, however many came after it.
#[test]
fn pods_that_no_node_took_are_forgotten_first() {
    let mut entry = SeatEntry {
        node: Some("node-0".to_owned()),
        ..SeatEntry::default()
    };
    let seen = World::new(1).observe();
    for number in 0..30 {
        forget(&mut entry, SeatId(number).to_string(), &seen, None);
    }
    assert_eq!(entry.former.len(), FORMER_MAX);
    let first = SeatId(0).to_string();
    assert_eq!(entry.asked_as().collect::<Vec<_>>(), [first.as_str()]);
}

#[test]
fn a_pod_that_was_bound_to_no_node_had_no_engine() {
    let mut entry = SeatEntry::default();
    forget(&mut entry, SeatId(1).to_string(), &World::new(1).observe(), None);
    assert!(entry.former[0].ended);
}

/// The daemon's word alone says it, and only of a pod that is being deleted.
#[test]
fn an_engine_has_ended_when_its_daemon_says_so() {
    let world = protected();
    let mut pod = world.pods[&active(&world).name].clone();
    let incarnation = pod.published.as_ref().unwrap().incarnation.unwrap();
    let last_exit = Some(SeatExit {
        incarnation,
        code: 0,
        message: String::new(),
        unix_ms: 1,
    });
    (pod.deleting, pod.phase) = (true, PodPhase::Finished);
    pod.published = Ok(SeatPublished {
        last_exit,
        over: true,
        ..SeatPublished::default()
    });
    assert!(engine_ended(&pod));
    pod.phase = PodPhase::Running;
    pod.published.as_mut().unwrap().last_exit = None;
    assert!(engine_ended(&pod), "there was none, and the program waits to be told");
    pod.phase = PodPhase::Finished;
    for change in [
        (|pod: &mut PodSeen| pod.deleting = false) as fn(&mut PodSeen),
        |pod| pod.published.as_mut().unwrap().over = false,
        |pod| {
            let published = pod.published.as_mut().unwrap();
            let seat = pod.uid.parse().unwrap();
            published.incarnation = Some(Incarnation { seat, start: 1 });
            published.role = Some(SeatRole::Starting);
        },
    ] {
        let mut pod = pod.clone();
        change(&mut pod);
        assert!(!engine_ended(&pod), "{pod:?}");
    }
}

/// It ended, and the record says Stopped: its daemon may begin another engine before it is told of the deletion, and that one may join a guest that
/// somebody else is asked to start.
#[test]
fn an_engine_that_ended_under_a_stop_proves_nothing() {
    let mut world = protected();
    let active = active(&world);
    world.lease.as_mut().unwrap().0.record.phase = Phase::Stopped;
    let pod = world.pods.get_mut(&active.name).unwrap();
    let incarnation = pod.published.as_ref().unwrap().incarnation.unwrap();
    pod.deleting = true;
    pod.published = Ok(SeatPublished {
        last_exit: Some(SeatExit {
            incarnation,
            code: 0,
            message: String::new(),
            unix_ms: 1,
        }),
        ..SeatPublished::default()
    });
    world.step();
    assert!(!world.entry(&active.name).unwrap().engine_ended);
    let pod = world.pods.get_mut(&active.name).unwrap();
    pod.published.as_mut().unwrap().over = true;
    assert!(world.step());
    assert!(world.entry(&active.name).unwrap().engine_ended);
    // Whatever becomes of the record.
    world.lease.as_mut().unwrap().0.record.phase = Phase::Running;
    world.pods.remove(&active.name);
    assert!(world.step());
    assert_eq!(ended(&world, &active.name), [true]);
}

#[test]
fn a_pod_that_ended_in_order_is_proven_at_once() {
    let mut world = protected();
    let active = active(&world);
    world.pods.get_mut(&active.name).unwrap().deleting = true;
    world.kubelet(&active.name);
    assert!(world.step());
    assert!(world.entry(&active.name).unwrap().engine_ended);
    world.kubelet(&active.name);
    assert!(world.step());
    assert_eq!(ended(&world, &active.name), [true]);
    // The next pod is another one.
    assert!(!world.entry(&active.name).unwrap().engine_ended);
}

/// Only another boot of the same machine does: not time, not silence, not that it is heard of again, nor another machine of that name.
#[test]
fn a_machine_that_was_booted_since_proves_it() {
    let mut world = protected();
    let entry = active(&world);
    let (seat, node) = (entry.name, entry.node.unwrap());
    world.nodes.get_mut(&node).unwrap().schedulable = false;
    world.pods.remove(&seat);
    assert!(world.step());
    let mut look = |ready, boot: Option<&str>| {
        world.pass(3600);
        let seen = world.nodes.get_mut(&node).unwrap();
        (seen.ready, seen.boot) = (ready, boot.map(str::to_owned));
        world.step();
        ended(&world, &seat)
    };
    assert_eq!(look(false, Some("machine/first")), [false]);
    assert_eq!(look(true, Some("machine/first")), [false]);
    assert_eq!(look(true, Some("other/second")), [false]);
    assert_eq!(look(true, None), [false]);
    assert_eq!(look(true, Some("machine/second")), [true]);
}

/// A machine was set up under the name of the one where the pod was, before that was missed: its boots prove nothing of the former one, which may only be cut
/// off, and its daemon is not asked for it.
#[test]
fn another_machine_of_the_nodes_name_proves_nothing() {
    let mut world = protected();
    let entry = active(&world);
    assert_eq!(entry.machine.as_deref(), Some("machine"));
    let (seat, node) = (entry.name, entry.node.unwrap());
    let tell = |world: &mut World, boot: &str| {
        world.nodes.get_mut(&node).unwrap().boot = Some(boot.to_owned());
        world.step();
    };
    tell(&mut world, "other/first");
    assert_eq!(world.entry(&seat).unwrap().machine.as_deref(), Some("machine"));
    world.nodes.values_mut().for_each(|node| node.schedulable = false);
    world.pods.remove(&seat);
    assert!(world.step());
    assert_eq!(world.entry(&seat).unwrap().former[0].boot, None);
    tell(&mut world, "other/second");
    assert_eq!(ended(&world, &seat), [false]);
}

/// What a node proves may be old in a cache.
#[test]
fn a_proof_is_looked_at_past_every_cache() {
    let (mut world, seat, node) = vanished();
    let before = world.entry(&seat).unwrap().former[0].boot.clone();
    assert_eq!(before.as_deref(), Some("machine/first"));
    world.nodes.get_mut(&node).unwrap().boot = Some("machine/second".to_owned());
    let seen = world.observe();
    assert!(decide(&seen).needs_certainty(&seen));
    let asked: Vec<_> = nodes_to_ask(&seen.status().seats).map(str::to_owned).collect();
    assert!(asked.contains(&node) && asked.len() == 2, "{asked:?}");
}

#[test]
fn a_node_that_is_gone_proves_nothing_and_one_out_of_service_does() {
    let (mut world, seat, node) = vanished();
    let gone = world.nodes.remove(&node).unwrap();
    world.pass(3600);
    world.step();
    assert_eq!(ended(&world, &seat), [false]);
    world.nodes.insert(node.clone(), gone);
    let node = world.nodes.get_mut(&node).unwrap();
    node.ready = false;
    node.taints = vec![Taint {
        key: "node.kubernetes.io/out-of-service".to_owned(),
        effect: "NoExecute".to_owned(),
        ..Taint::default()
    }];
    // Whoever answers is not out of service.
    let mut contradicted = world.observe();
    contradicted.nodes.values_mut().for_each(|node| node.ready = true);
    let found = decide(&contradicted).book;
    assert!(found.iter().flat_map(|entry| &entry.former).all(|former| !former.ended));
    world.step();
    assert_eq!(ended(&world, &seat), [true]);
}

/// The record names somebody else. A seat without a pod that could be asked is asked after as its earlier ones; any other one answers for itself.
#[test]
fn of_pods_that_nobody_asks_after_nothing_is_proven() {
    let (mut world, seat, node) = vanished();
    let mut record = world.record().unwrap().clone();
    let other = Incarnation {
        seat: SeatId(7),
        start: 1,
    };
    (record.holder, record.members) = (other, Members::one(other));
    world.nodes.get_mut(&node).unwrap().boot = Some("machine/second".to_owned());
    let seen = world.observe();
    let proven = |change: fn(&mut SeatEntry)| {
        let mut book = world.book();
        let at = book.iter().position(|entry| entry.name == seat).unwrap();
        change(&mut book[at]);
        prove(&seen, &record, &mut book);
        book[at].former[0].ended
    };
    assert!(proven(|_| {}));
    let admit = |entry: &mut SeatEntry| entry.pod_uid = Some(SeatId(8).to_string());
    assert!(proven(admit), "it has no address yet");
    assert!(!proven(|entry| entry.leaving = true), "it is out of the book soon");
    assert!(!proven(|entry| {
        entry.pod_uid = Some(SeatId(8).to_string());
        entry.pod_ip = Some("10.1.2.3".to_owned());
    }));
}

/// A person says once that the other seat's node is lost; the VM is started by itself from then on, until that seat has run again.
#[test]
fn what_ended_before_another_seat_was_alone_keeps_nobody_waiting() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    world.swap_out(&standby.name);
    let node = world.kill_node_of(&standby);
    world.pods.remove(&standby.name);
    while world.step() {}
    let asked = |world: &mut World| {
        while world.step() {}
        let entry = world.entry(&standby.name).unwrap();
        entry.asked_as().map(str::to_owned).collect::<Vec<_>>()
    };
    let uid = standby.pod_uid.clone().unwrap();
    assert_eq!(asked(&mut world), [uid.as_str()], "it may run there");
    let record = world.record().unwrap().clone();
    waits(&mut world, &active.name, record.term);
    world.nodes.get_mut(&node).unwrap().taints = vec![Taint {
        key: OUT_OF_SERVICE.to_owned(),
        ..Taint::default()
    }];
    assert_eq!(asked(&mut world), [uid.as_str()], "nobody has the guest");
    let says_active = |world: &mut World, term: Term| {
        let published = world.pods.get_mut(&active.name).unwrap().published.as_mut().unwrap();
        (published.role, published.term) = (Some(SeatRole::Active), term);
    };
    says_active(&mut world, record.term - 1);
    assert_eq!(asked(&mut world), [uid.as_str()], "by another record");
    says_active(&mut world, record.term);
    let seen = world.observe();
    assert!(decide(&seen).needs_certainty(&seen));
    assert!(asked(&mut world).is_empty());
    waits(&mut world, &active.name, record.term);
    assert!(asked(&mut world).is_empty(), "it stays so");
    // A later pod of the seat may have joined.
    let book = &mut world.vm.status.as_mut().unwrap().seats;
    let entry = book.iter_mut().find(|entry| entry.name == standby.name).unwrap();
    entry.former.push(FormerPod {
        ended: true,
        ..former("later", "node-9", world.now)
    });
    assert_eq!(asked(&mut world), ["later"]);
}

/// Whoever deletes a Node object removes the pods there, too, while the object is missing; the same machine joins again.
#[test]
fn of_a_node_that_is_gone_the_machine_is_kept() {
    let mut world = protected();
    let entry = active(&world);
    let (seat, node) = (entry.name, entry.node.unwrap());
    let mut back = world.nodes.remove(&node).unwrap();
    world.pods.remove(&seat);
    assert!(world.step());
    let boot = world.entry(&seat).unwrap().former[0].boot.clone();
    assert_eq!(boot.as_deref(), Some("machine/"));
    // Its daemon can tell; its boots can't, for nobody knows in which one the pod was.
    back.schedulable = false;
    for boot in ["machine/first", "machine/second", "machine/", "other/first"] {
        back.boot = Some(boot.to_owned());
        world.nodes.insert(node.clone(), back.clone());
        world.step();
        assert_eq!(ended(&world, &seat), [false], "{boot}");
    }
}

fn ready_reason(world: &World) -> (String, String) {
    let status = world.vm.status.as_ref().unwrap();
    let told = status.condition(READY).unwrap();
    (told.reason.clone(), told.message.clone())
}

/// Both pods are gone, without having ended, and made anew; nobody proves anything of the former ones.
#[test]
fn a_proof_that_is_missing_is_told() {
    let mut world = protected();
    world.pods.clear();
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    for _ in 0..4 {
        world.step();
        for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
            world.schedule(&seat);
            world.kubelet(&seat);
        }
    }
    assert!(world.pods.values().all(|pod| pod.phase == PodPhase::Running));
    assert_eq!(ready_reason(&world).0, "Starting", "their daemons may know");
    assert!(decide(&world.observe()).recheck.is_some());
    let mut unknown = world.vm.clone();
    world.pass(61);
    world.step();
    let (reason, message) = ready_reason(&world);
    assert_eq!(reason, "EndNotProven");
    assert!(message.contains(": boot node node-"), "{message}");
    assert_eq!(decide(&world.observe()).recheck, None);
    // Nobody knows on which machine it was: no daemon will prove it, and no boot.
    world.pass(-61);
    for entry in &mut unknown.status.as_mut().unwrap().seats {
        entry.former.iter_mut().for_each(|former| former.boot = None);
    }
    world.vm = unknown;
    world.step();
    let (reason, message) = ready_reason(&world);
    assert_eq!(reason, "EndNotProven");
    assert!(message.contains(OUT_OF_SERVICE), "{message}");
}
