use serde_json::json;

use super::*;
use crate::arbiter::Server;
use crate::bridges::AllowedBridges;
use crate::config::JailConfig;
use crate::daemon::Settings;
use crate::seat::testing::Rig;
use crate::state::StateFolder;
use crate::testing::Folder;

const POD: &str = "00000000-0000-4000-8000-00000000000a";
const OTHER: &str = "00000000-0000-4000-8000-00000000000b";

/// A daemon of a node without an API server, and without an engine: no seat's program comes.
pub(in crate::kubernetes) fn node(folder: &Folder) -> Node {
    let state = folder.path().join("state");
    let settings = Settings {
        node: "one".to_owned(),
        state_folder: state.clone(),
        control_socket: folder.path().join("daemon.sock"),
        peer_listen: None,
        engine: "/bin/false".into(),
        jail: JailConfig::default(),
        bridges: AllowedBridges::Listed(Vec::new()),
        arbiter_folder: None,
    };
    let daemon = Daemon::new(settings, StateFolder::open(&state).unwrap());
    let config = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
    let leases = Leases::new(Server::new(&config).unwrap()).unwrap();
    Node::new("one".to_owned(), daemon, leases, Hierarchies::read().unwrap())
}

/// A seat of this node whose engine says what a test wants.
pub(in crate::kubernetes) fn add_running(node: &Node, rig: &Rig) -> Arc<NodeSeat> {
    let known = book::seat(&pod(POD), &vm(POD), "one").unwrap();
    let id = known.seat_id;
    let seat = Arc::new(NodeSeat {
        publisher: Publisher::new(Some(&pod(POD))),
        requests: Requests::new(rig.seat.folder().clone()),
        pod: rig.pod(),
        known: Mutex::new(known),
        gone: AtomicBool::new(false),
    });
    node.lock().insert(id, seat.clone());
    seat
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
    node.reconcile(&[], &[vm(POD)]);
    assert_eq!(seats(&node), [""; 0]);
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
    // Where the other one is the newer one, its turn comes.
    node.missing(&[pod(OTHER)])[0].is_gone();
    node.reconcile(&[pod(OTHER)], &[vm(OTHER)]);
    node.reconcile(&[pod(OTHER)], &[vm(OTHER)]);
    assert_eq!(seats(&node), [OTHER]);
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
