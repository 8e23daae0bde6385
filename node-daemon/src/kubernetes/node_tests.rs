use std::time::Instant;

use ftvm_crds::seat::{SeatPublished, StorageKind, StoragePart, StorageTrouble};
use ftvm_protocol::core::GuestReport;
use kube::Resource;
use serde_json::json;

use super::*;
use crate::arbiter::Server;
use crate::disks::Step;
use crate::seat::testing::Rig;
use crate::seat_socket::{DiskProgress, Peer};
use crate::state::{EngineRecord, boot_id, start_time};
use crate::testing::{Folder, daemon};

const POD: &str = "00000000-0000-4000-8000-00000000000a";
const OTHER: &str = "00000000-0000-4000-8000-00000000000b";

/// A daemon of a node without an API server, and without an engine: no seat's program comes.
pub(in crate::kubernetes) fn node(folder: &Folder) -> Node {
    node_in(folder, Hierarchies::read().unwrap())
}

/// The same with these cgroups.
fn node_in(folder: &Folder, hierarchies: Hierarchies) -> Node {
    let config = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
    let leases = Leases::new(Server::new(&config).unwrap()).unwrap();
    let machine = Some("machine".to_owned());
    Node::new("one".to_owned(), machine, daemon(folder), leases, hierarchies)
}

/// A seat of this node whose engine says what a test wants.
pub(in crate::kubernetes) fn add_running(node: &Node, rig: &Rig) -> Arc<NodeSeat> {
    let mut vm = vm(POD);
    Arc::make_mut(&mut vm).spec.networks.push(card());
    let known = book::seat(&pod(POD), &vm, "one", Some("machine")).unwrap();
    let id = known.seat_id;
    let seat = Arc::new(NodeSeat {
        publisher: Publisher::new(Some(&pod(POD))),
        requests: Requests::new(rig.seat.folder().clone()),
        pod: rig.pod(),
        machine: node.machine.clone(),
        known: Mutex::new(known),
        refusal: Mutex::default(),
        gone: AtomicBool::new(false),
    });
    node.lock().insert(id, seat.clone());
    seat
}

fn card() -> ftvm_crds::Network {
    serde_json::from_value(json!({"name": "front", "bridge": {"name": "br0"}})).unwrap()
}

/// A seat of this node whose program has not come.
pub(in crate::kubernetes) fn add_waiting(node: &Node) {
    node.reconcile(&[pod(POD)], &[vm(POD)]);
}

fn vm(pod: &str) -> Arc<FaultTolerantVM> {
    let vm = json!({
        "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM",
        "metadata": {"name": "web", "namespace": "shop", "uid": "00000000-0000-4000-8000-000000000001"},
        "spec": {
            "machine": {"memory": "64Mi", "cpuBaseline": "Host"}, "boot": {"image": {"reference": "web:1"}},
            "disks": [{"name": "root", "size": "64Mi"}],
        },
        "status": {"seats": [{"name": "web-a", "podUid": pod, "node": "one", "podIP": "10.0.0.1", "hostIP": "192.0.2.1"}]},
    });
    Arc::new(serde_json::from_value(vm).unwrap())
}

fn pod(uid: &str) -> Arc<Pod> {
    let pod = json!({
        "metadata": {"name": "web-a", "namespace": "shop", "uid": uid, "labels": {"ftvm.dev/vm": "web"}},
        "spec": {"nodeName": "one", "containers": []},
    });
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn seats(node: &Node) -> Vec<String> {
    let seats = node.seats();
    seats.iter().map(|seat| seat.known().seat_id.to_string()).collect()
}

/// Looks until the node has these seats: one is forgotten only once it is known that an earlier daemon left no engine of it.
fn reconcile_until(node: &Node, (pods, vms): (&[Arc<Pod>], &[Arc<FaultTolerantVM>]), expected: &[&str]) {
    let end = Instant::now() + Duration::from_secs(60);
    while seats(node) != expected {
        assert!(Instant::now() < end, "{:?}, {expected:?} expected", seats(node));
        node.reconcile(pods, vms);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A list from before the seat's pod was made ends nothing: only the API server's own word does.
#[test]
fn a_seat_that_is_missing_in_a_list_stays_until_it_is_proven_to_be_gone() {
    let folder = Folder::new("node");
    let node = node(&folder);
    node.reconcile(&[pod(POD)], &[vm(POD)]);
    assert_eq!(seats(&node), [POD]);
    assert!(node.missing(&[pod(POD)]).is_empty());
    for vms in [vec![vm(POD)], vec![vm(OTHER)], Vec::new()] {
        node.reconcile(&[], &vms);
        assert_eq!(seats(&node), [POD], "{vms:?}");
        assert!(!node.seats()[0].pod.ends());
    }
    let missing = node.missing(&[]);
    assert_eq!(missing.len(), 1);
    node.reconcile(&[pod(POD)], &[vm(POD)]);
    assert!(node.missing(&[pod(POD)]).is_empty());
    missing[0].is_gone();
    reconcile_until(&node, (&[], &[vm(POD)]), &[]);
}

/// A list, and a book, from before a pod was made anew under its name end nothing of the new one.
#[test]
fn an_old_pod_does_not_end_its_successor_of_the_same_name() {
    let folder = Folder::new("node");
    let node = node(&folder);
    node.reconcile(&[pod(POD)], &[vm(POD)]);
    node.reconcile(&[pod(OTHER)], &[vm(OTHER)]);
    assert_eq!(seats(&node), [POD]);
    assert!(!node.seats()[0].pod.ends());
    let why = node.find(OTHER.parse().unwrap()).err().unwrap();
    assert!(why.contains(POD), "who waits is told for whom: {why}");
    // Where the other one is the newer one, its turn comes.
    node.missing(&[pod(OTHER)])[0].is_gone();
    reconcile_until(&node, (&[pod(OTHER)], &[vm(OTHER)]), &[OTHER]);
}

/// A machine whose seat had other pods before.
fn vm_with_former(former: &serde_json::Value) -> Arc<FaultTolerantVM> {
    let mut vm = serde_json::to_value(&*vm(OTHER)).unwrap();
    vm["status"]["seats"][0]["former"] = former.clone();
    Arc::new(serde_json::from_value(vm).unwrap())
}

/// The record may name them: what the disk says, says the pod that has it now, and that they have ended, whoever can know it.
#[test]
fn of_earlier_pods_it_is_told_whether_they_have_ended() {
    let folder = Folder::new("node");
    let node = node(&folder);
    let since = "2026-11-27T00:00:00Z";
    let (here, elsewhere, ended): (SeatId, SeatId, SeatId) = (POD.parse().unwrap(), SeatId(0x1), SeatId(0x2));
    let vm = vm_with_former(&json!([
        {"uid": here.to_string(), "node": "one", "boot": "machine/1", "missingSince": since},
        {"uid": elsewhere.to_string(), "node": "two", "missingSince": since},
        {"uid": ended.to_string(), "node": "two", "missingSince": since, "ended": true},
    ]));
    let guest = |of: SeatId| Some(node.daemon.local_report(of, Duration::ZERO)?.guest);
    node.reconcile(&[pod(OTHER)], &[vm]);
    assert_eq!(guest(here), Some(GuestReport::None));
    assert_eq!(guest(elsewhere), Some(GuestReport::Unknown));
    assert_eq!(guest(ended), Some(GuestReport::None));
    assert_eq!(guest(SeatId(0x3)), None, "nobody's");
    // A pod that this node has not forgotten may have an engine that nobody could read of.
    node.daemon.state().pod(here).unwrap();
    node.daemon.state().pod(ended).unwrap();
    assert_eq!(
        (guest(here), guest(ended)),
        (Some(GuestReport::Unknown), Some(GuestReport::Unknown))
    );
    node.daemon.state().forget_pod(here).unwrap();
    assert_eq!(guest(here), Some(GuestReport::None));
    // The book learns of it while the seat is there.
    let known = json!([{"uid": elsewhere.to_string(), "node": "two", "missingSince": since, "ended": true}]);
    node.reconcile(&[pod(OTHER)], &[vm_with_former(&known)]);
    assert_eq!((guest(elsewhere), guest(here)), (Some(GuestReport::None), None));
}

/// While the former pod's engine may be there its successor is no seat, and the former one speaks for itself.
#[test]
fn a_pod_that_is_there_is_no_earlier_one() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    let former = json!([{"uid": POD, "node": "one", "missingSince": "2026-11-27T00:00:00Z"}]);
    node.reconcile(&[pod(OTHER)], &[vm_with_former(&former)]);
    assert_eq!(seats(&node), [POD]);
    let report = seat.pod.seat.report(seat.known().seat_id, Duration::from_secs(90));
    assert_eq!(report.guest, GuestReport::Present);
}

/// A watch may lag by more than its program waits, and then nobody would be told that it ended in order.
#[test]
fn a_pod_whose_program_is_told_to_end_is_asked_for() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    assert!(node.missing(&[pod(POD)]).is_empty());
    seat.pod.end_with(&Arc::new(Peer::own(POD.parse().unwrap())));
    assert_eq!(node.missing(&[pod(POD)]).len(), 1);
    seat.pod.end();
    assert!(node.missing(&[pod(POD)]).is_empty(), "it is known");
}

/// Nobody else has the guest, and no peer reaches it: a person has to do something, and is told what.
#[test]
fn an_engine_that_is_cut_off_is_published_with_a_code() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    let (_, published) = seat.publisher.due(&seat).unwrap();
    assert_eq!((published.code, published.why.as_str()), (0, "protected by b"));
    seat.pod
        .set_progress(|progress| progress.cut_off = Some("halt and start it".to_owned()));
    let (_, published) = seat.publisher.due(&seat).unwrap();
    assert_eq!(
        (published.code, published.why.as_str()),
        (17, "halt and start it; protected by b")
    );
}

/// What is said on the pod last: once its engine has ended, and never while one may be there.
#[test]
fn a_deleted_pod_says_when_its_engine_has_ended_for_good() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    seat.pod.is_published();
    let said = || seat.publisher.due(&seat).map(|(_, published)| published);
    assert!(!said().unwrap().over);
    seat.pod.end();
    assert!(!said().unwrap().over, "its engine runs");
    rig.seat.kill();
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    let published = said().unwrap();
    assert!(published.over && published.incarnation.is_none());
    assert_eq!(published.machine.as_deref(), Some("machine"), "of which it is said");
    seat.publisher.written(published, None);
    assert_eq!(said(), None, "it is there");
}

/// Whoever was told that its pod is gone forgets it only once none is on its way.
#[test]
fn a_seat_whose_pod_is_gone_is_forgotten_once_it_can_have_no_engine() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    seat.is_gone();
    node.reconcile(&[], &[]);
    assert_eq!(seats(&node), [POD], "its engine runs");
    rig.seat.kill();
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    node.reconcile(&[], &[]);
    assert_eq!(seats(&node), [""; 0]);
    assert!(seat.pod.seat.is_retired());
}

/// Whatever the state folder says, or does not say any more.
#[test]
fn nothing_is_said_of_an_earlier_pod_while_a_process_is_where_its_engine_lives() {
    let (folder, cgroups) = (Folder::new("node"), Folder::new("cgroups"));
    let leaf = cgroups.path().join(format!("kubepods/pod{POD}/ftvm-engine"));
    std::fs::create_dir_all(&leaf).unwrap();
    let running = |runs: bool| std::fs::write(leaf.join("cgroup.procs"), if runs { "4711\n" } else { "" }).unwrap();
    running(true);
    let id: SeatId = POD.parse().unwrap();
    let path = folder.path().join("state/seats").join(POD);
    std::fs::create_dir_all(&path).unwrap();
    let node = node_in(&folder, Hierarchies::at(cgroups.path()));
    let state = node.daemon.state();
    assert!(state.has_pod(id), "its daemon begins, and knows nothing of it");
    let since = "2026-11-27T00:00:00Z";
    let former = json!([{"uid": POD, "node": "one", "boot": "machine/1", "missingSince": since}]);
    let vms = [vm_with_former(&former)];
    node.reconcile(&[pod(OTHER)], &vms);
    assert!(state.has_pod(id));
    // Somebody removes it by hand.
    state.forget_pod(id).unwrap();
    let guest = || node.daemon.local_report(id, Duration::ZERO).unwrap().guest;
    assert_eq!(guest(), GuestReport::Unknown);
    running(false);
    assert_eq!(guest(), GuestReport::None);
    state.pod(id).unwrap();
    node.reconcile(&[pod(OTHER)], &vms);
    assert!(!state.has_pod(id));
}

/// Else its VM would wait until the next daemon.
#[test]
fn a_folder_that_cant_be_removed_is_tried_again() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    rig.seat.kill();
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    let id: SeatId = POD.parse().unwrap();
    let path = folder.path().join("state/seats").join(POD);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    // A file can't be removed as a folder.
    std::fs::write(&path, "").unwrap();
    seat.is_gone();
    node.reconcile(&[], &[]);
    assert_eq!(seats(&node), [""; 0]);
    assert!(node.daemon.state().has_pod(id));
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let former = vm_with_former(&json!([{"uid": POD, "node": "one", "missingSince": "2026-11-27T00:00:00Z"}]));
    node.reconcile(&[], &[former]);
    assert!(!node.daemon.state().has_pod(id));
}

/// What can't be read keeps nobody waiting once nothing of it can run, and not before.
#[test]
fn a_pod_that_cant_be_read_is_forgotten_once_it_and_its_engine_are_gone() {
    let folder = Folder::new("node");
    let path = folder.path().join("state/seats").join(POD);
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join(REMEMBERED), "{").unwrap();
    let node = node(&folder);
    let id: SeatId = POD.parse().unwrap();
    let former = vm_with_former(&json!([{"uid": POD, "node": "one", "missingSince": "2026-11-27T00:00:00Z"}]));
    let pid = std::process::id().cast_signed();
    let mut engine = EngineRecord {
        incarnation: ftvm_protocol::identity::Incarnation { seat: id, start: 1 },
        pid,
        start_time: start_time(pid).unwrap(),
        boot_id: boot_id().unwrap(),
        uid: None,
    };
    let state = node.daemon.state();
    let look = |vm: Arc<FaultTolerantVM>, engine: &EngineRecord| {
        state.pod(id).unwrap().set_engine(engine).unwrap();
        node.reconcile(&[], &[vm]);
        state.has_pod(id)
    };
    assert!(look(former.clone(), &engine), "its engine runs");
    engine.start_time += 1;
    assert!(look(vm(OTHER), &engine), "its pod may be there");
    assert!(!look(former, &engine));
}

/// A seat that only tries again and again does not count as one that joins, and is not told of anew at each attempt.
#[test]
fn a_disk_that_cant_be_prepared_is_told_once_and_is_no_progress() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    rig.seat.kill();
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    let due = || seat.publisher.due(&seat).map(|(_, published)| published);
    let at = |name: &str, mib: u64| {
        let disk = DiskProgress {
            disk: name.to_owned(),
            step: Step::Writing,
            done_bytes: mib << 20,
            total_bytes: 64 << 20,
        };
        seat.pod.set_progress(|progress| progress.preparing(disk));
    };
    let fails = || {
        seat.pod
            .set_progress(|progress| progress.trouble = Some("no room".to_owned()))
    };
    // Of the second one nothing is done yet.
    for (name, mib) in [("root", 0), ("data", 0), ("root", 32), ("data", 0)] {
        at(name, mib);
    }
    let published = due().unwrap();
    assert_eq!(published.resync_percent, Some(50));
    assert!(published.why.contains("disk root"), "{}", published.why);
    fails();
    let published = due().unwrap();
    assert_eq!((published.resync_percent, published.why.as_str()), (None, "no room"));
    let code = ftvm_engine::control::exit_code::DISK;
    assert_eq!(published.code, code, "a person has to mend it");
    seat.publisher.written(published, None);
    for _ in 0..3 {
        for mib in [0, 8, 32] {
            at("root", mib);
            assert_eq!(due(), None, "at {mib} MiB once more");
        }
        fails();
        assert_eq!(due(), None);
    }
    at("root", 33);
    assert_eq!(due().unwrap().resync_percent, Some(51), "it goes on");
}

/// A machine whose disk and network share a name.
fn vm_with_one_name_twice() -> Arc<FaultTolerantVM> {
    let mut vm = serde_json::to_value(&*vm(POD)).unwrap();
    vm["spec"]["networks"] = json!([{"name": "root", "bridge": {"name": "vm-front"}}]);
    Arc::new(serde_json::from_value(vm).unwrap())
}

/// It was nowhere to be read but in the log of the pod's program, which waited for ever.
#[test]
fn a_pod_that_can_be_no_seat_says_why() {
    let folder = Folder::new("node");
    let node = node(&folder);
    let (pods, wrong, good) = ([pod(POD)], [vm_with_one_name_twice()], [vm(POD)]);
    node.reconcile(&pods, &[vm(OTHER)]);
    assert!(node.words(&pods).is_empty(), "the book may have it soon");
    node.reconcile(&pods, &wrong);
    assert_eq!(seats(&node), [""; 0]);
    let words = node.words(&pods);
    let [word] = &words[..] else { panic!("{words:?}") };
    assert_eq!((word.namespace.as_str(), word.pod.as_str()), ("shop", "web-a"));
    let metadata = &word.patch["metadata"];
    assert_eq!(metadata["uid"], POD);
    let text = metadata["annotations"]["ftvm.dev/seat-status"].as_str().unwrap();
    let published: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(published["code"], 10);
    let why = published["why"].as_str().unwrap();
    assert!(why.contains("`root` appears twice"), "{why}");
    assert!(node.words(&pods).is_empty(), "not again at once");
    // Once it is mended, a seat's status is written by its publisher.
    node.reconcile(&pods, &good);
    assert_eq!(seats(&node), [POD]);
    node.reconcile(&pods, &wrong);
    assert!(node.words(&pods).is_empty());
    let seat = node.seats().remove(0);
    let said = || seat.publisher.due(&seat).unwrap().1;
    assert_eq!(said().code, 10);
    assert!(said().why.contains("`root` appears twice"), "{}", said().why);
    node.reconcile(&pods, &good);
    assert_eq!(said().code, 0);
}

/// A daemon that begins while the VM can't be read goes on with the seats that the former one had: they get engines as before.
#[test]
fn a_vm_that_cant_be_read_changes_nothing_for_its_seats() {
    let folder = Folder::new("node");
    node(&folder).reconcile(&[pod(POD)], &[vm(POD)]);
    let mut later = node(&folder);
    let unreadable = ftvm_watch::Unreadable {
        object: vm(POD).object_ref(&()),
        why: "spec.runStrategy: unknown variant".to_owned(),
    };
    later.unreadable = [unreadable].into_iter().collect();
    // Of a pod that nobody remembers nothing is known.
    let pods = [pod(POD), pod(OTHER)];
    later.reconcile(&pods, &[]);
    assert_eq!(seats(&later), [POD]);
    let seat = later.seats().remove(0);
    assert_eq!(seat.publisher.due(&seat).unwrap().1.code, 0);
    assert!(!seat.pod.handed.allow(true), "it is allowed");
    // Whereas one whose VM is gone gets no engine any more.
    later.unreadable = UnreadableObjects::default();
    later.reconcile(&pods, &[]);
    assert!(seat.pod.handed.allow(true), "it is not allowed");
}

/// What is there already is not written again, by a later daemon either.
#[test]
fn what_a_pod_says_is_said_once() {
    let folder = Folder::new("node");
    let (first, wrong) = (node(&folder), [vm_with_one_name_twice()]);
    let pods = [pod(POD)];
    first.reconcile(&pods, &wrong);
    let word = first.words(&pods).remove(0);
    let text = word.patch["metadata"]["annotations"]["ftvm.dev/seat-status"].as_str();
    let mut told = (*pods[0]).clone();
    let annotation = ("ftvm.dev/seat-status".to_owned(), text.unwrap().to_owned());
    told.metadata.annotations = Some([annotation].into());
    let folder = Folder::new("node");
    let later = node(&folder);
    later.reconcile(&pods, &wrong);
    assert!(later.words(&[Arc::new(told)]).is_empty());
    assert_eq!(later.words(&pods).len(), 1);
}

/// Over another version nobody may say that a failure is begun: it may have been taken back. All else that is published is written over any.
#[test]
fn a_failure_is_said_to_be_begun_over_the_pod_that_asks_for_it_alone() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    let version = |patch: &serde_json::Value| patch["metadata"]["resourceVersion"].clone();
    let (patch, published) = seat.publisher.due(&seat).unwrap();
    assert_eq!((version(&patch), published.begun.clone()), (json!(null), None));
    seat.publisher.written(published, None);
    let mut asks = Pod::clone(&pod(POD));
    asks.metadata.resource_version = Some("41".to_owned());
    let request = json!({"id": "failover-x", "do": "failover"}).to_string();
    asks.metadata.annotations = Some([("ftvm.dev/request".to_owned(), request)].into());
    seat.requests.noticed(&asks, &seat.pod);
    let (patch, published) = seat.publisher.due(&seat).unwrap();
    let begun = Some("failover-x".to_owned());
    assert_eq!((version(&patch), published.begun.clone()), (json!("41"), begun.clone()));
    // One that an earlier daemon wrote says nothing of the pod as it is now.
    seat.publisher.written(published.clone(), None);
    let (patch, again) = seat.publisher.due(&seat).unwrap();
    assert_eq!((version(&patch), &again.begun), (json!("41"), &begun));
    seat.requests.granted("failover-x", Instant::now());
    assert_eq!(seat.publisher.due(&seat).map(|(_, published)| published), None);
    rig.say(|status| status.term += 1);
    let (patch, published) = seat.publisher.due(&seat).unwrap();
    assert_eq!((version(&patch), published.begun), (json!(null), begun));
    rig.assert_alive();
}

/// The guest has the errors; who keeps its disks has to hear of them, too.
#[test]
fn a_failing_disk_is_published_by_its_name() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    let storage = || seat.publisher.due(&seat).unwrap().1.storage_troubles;
    assert!(storage().is_empty());
    let why = "writing 512 bytes at 0: I/O error";
    rig.say(|status| {
        status.failing_disks = vec![ftvm_engine::control::FailingDisk {
            disk: 0,
            kind: ftvm_engine::control::StorageKind::Full,
            why: why.to_owned(),
        }];
    });
    let told = storage().remove(0);
    assert_eq!(
        (told.part.clone(), told.kind),
        (StoragePart::Disk("root".to_owned()), StorageKind::Full)
    );
    assert!(told.why == why && told.under_guest, "{told:?}");
    assert_eq!(
        storage()[0].since_unix_ms,
        told.since_unix_ms,
        "also where it could not be written"
    );
    rig.say(|status| status.failing_disks.clear());
    assert!(storage().is_empty());
}

/// The pod is all that a daemon which is started anew knows of it.
#[test]
fn what_an_earlier_daemon_said_of_storage_is_gone_on_with() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    let before = SeatPublished {
        storage_troubles: vec![StorageTrouble {
            part: StoragePart::Journal,
            kind: StorageKind::Failed,
            under_guest: false,
            since_unix_ms: 7,
            why: "syncing: I/O error".to_owned(),
        }],
        storage_failures: 2,
        ..SeatPublished::default()
    };
    let publisher = Publisher::new(Some(&says(41, &before, None)));
    for _ in 0..2 {
        let published = publisher.due(&seat).unwrap().1;
        assert_eq!(
            (published.storage_troubles, published.storage_failures),
            (before.storage_troubles.clone(), 2)
        );
    }
    // A third one.
    seat.pod.seat.had_storage_failures(1);
    assert_eq!(publisher.due(&seat).unwrap().1.storage_failures, 3);
}

/// The pod of [`POD`] as the API server has it.
fn says(version: u64, published: &SeatPublished, role: Option<&str>) -> Pod {
    let mut pod = Pod::clone(&pod(POD));
    pod.metadata.resource_version = Some(version.to_string());
    let text = serde_json::to_string(published).unwrap();
    pod.metadata.annotations = Some([("ftvm.dev/seat-status".to_owned(), text)].into());
    let labels = role.map(|role| ("ftvm.dev/role".to_owned(), role.to_owned()));
    pod.metadata.labels.get_or_insert_default().extend(labels);
    pod
}

/// Nothing changes about the seat, and yet somebody who reads the pod would be told what was.
#[test]
fn what_was_changed_on_a_pod_is_written_again() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    let due = || seat.publisher.due(&seat).map(|(_, published)| published);
    let (patch, published) = seat.publisher.due(&seat).unwrap();
    let role = patch["metadata"]["labels"]["ftvm.dev/role"].as_str();
    assert_eq!(role, Some("active"));
    seat.publisher.written(published.clone(), Some(57));
    // What was there before: the watch has not told the own write yet.
    let before = SeatPublished::default();
    seat.publisher.noticed(&says(41, &before, None));
    assert_eq!(due(), None);
    for version in [57, 58] {
        seat.publisher.noticed(&says(version, &published, role));
        assert_eq!(due(), None, "it says what was written, whoever wrote else");
    }
    // The label alone counts, too.
    seat.publisher.noticed(&says(59, &published, Some("standby")));
    let (again, same) = seat.publisher.due(&seat).unwrap();
    assert_eq!(
        (again["metadata"]["labels"]["ftvm.dev/role"].as_str(), &same),
        (role, &published)
    );
    seat.publisher.written(same, Some(60));
    seat.publisher.noticed(&says(61, &before, role));
    assert_eq!(due(), None, "somebody goes on: later and later");
    // What changes by itself waits for nobody.
    rig.say(|status| status.term += 1);
    assert_eq!(due().unwrap().term, published.term + 1);
}

/// It is no word of anybody else, so nothing waits because of it.
#[test]
fn an_own_write_that_lands_late_is_known() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    let due = || seat.publisher.due(&seat).map(|(_, published)| published);
    let first = due().unwrap();
    seat.publisher.written(first.clone(), Some(57));
    rig.say(|status| status.term += 1);
    let late = due().unwrap();
    seat.publisher.failed(late.clone());
    rig.say(|status| status.term -= 1);
    seat.publisher.noticed(&says(58, &late, Some("active")));
    rig.wait("the pause after the failure is over", |_| due().is_some());
    assert_eq!(due().unwrap(), first);
    seat.publisher.written(first.clone(), Some(59));
    seat.publisher.noticed(&says(60, &late, Some("active")));
    assert_eq!(due(), Some(first), "that was somebody, and the first time");
}

/// Whoever drew it knows that all of this was said since.
#[test]
fn a_look_is_repeated_by_a_daemon_that_knows_its_engine() {
    let folder = Folder::new("node");
    let (node, rig) = (node(&folder), Rig::new());
    let seat = add_running(&node, &rig);
    let published = seat.publisher.due(&seat).unwrap().1;
    assert_eq!(published.look, None);
    let asks = |look: &str| {
        let mut pod = says(58, &published, Some("active"));
        let annotations = pod.metadata.annotations.as_mut().unwrap();
        annotations.insert("ftvm.dev/look".to_owned(), look.to_owned());
        pod
    };
    seat.publisher.written(published.clone(), Some(57));
    seat.publisher.noticed(&asks("1f"));
    let answer = seat.publisher.due(&seat).unwrap().1;
    assert_eq!(answer.look.as_deref(), Some("1f"));
    seat.publisher.written(answer, Some(59));
    seat.publisher.noticed(&asks("2e"));
    // While the engine does not answer, what it was is repeated, and no more than that.
    rig.say(|_| {
        let repeated = seat.publisher.due(&seat).unwrap().1;
        assert_eq!((repeated.look.as_deref(), repeated.term), (Some("1f"), published.term));
    });
    let answer = seat.publisher.due(&seat).unwrap().1;
    assert_eq!(answer.look.as_deref(), Some("2e"));
}
