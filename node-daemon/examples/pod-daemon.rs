//! A daemon whose seats are pods by the word of a file instead of an API server's, for this package's tests: the seat socket,
//! the seat program, cgroups and namespaces are the real ones. Not part of the product.
//!
//! `pod-daemon FOLDER ENGINE [BRIDGE]…`: reads `FOLDER/pods.json`, keeps its state in `FOLDER/state`, listens on `FOLDER/run/seat.sock` and
//! `FOLDER/daemon.sock`, and has its records in `FOLDER/arbiter`. Guests may be connected to these bridges.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ftvm_node_daemon::arbiter::FileArbiter;
use ftvm_node_daemon::bridges::{AllowedBridges, BridgePattern};
use ftvm_node_daemon::config::{JailConfig, SeatConfig};
use ftvm_node_daemon::daemon::{Daemon, Settings};
use ftvm_node_daemon::seat_socket::message::Recipe;
use ftvm_node_daemon::seat_socket::{Expected, Handed, Hierarchies, PodSeat, Pods, bind, serve};
use ftvm_node_daemon::state::StateFolder;
use ftvm_protocol::identity::{SeatId, VmId};
use serde::Deserialize;

#[derive(Deserialize)]
struct Pod {
    uid: SeatId,
    vm_id: VmId,
    seat: SeatConfig,
    recipe: Recipe,
}

struct Known(BTreeMap<SeatId, Arc<PodSeat>>);

impl Pods for Known {
    fn find(&self, pod: SeatId) -> Result<Arc<PodSeat>, String> {
        self.0
            .get(&pod)
            .cloned()
            .ok_or_else(|| format!("pod {pod} is no seat of this node"))
    }
}

fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let folder = PathBuf::from(std::env::args().nth(1).expect("a folder"));
    let engine = std::env::args().nth(2).expect("an engine");
    let state = StateFolder::open(&folder.join("state")).expect("the state folder");
    let settings = Settings {
        node: "test".to_owned(),
        state_folder: folder.join("state"),
        control_socket: folder.join("daemon.sock"),
        peer_listen: None,
        engine: engine.into(),
        jail: JailConfig::default(),
        bridges: AllowedBridges::Listed(std::env::args().skip(3).map(pattern).collect()),
        arbiter_folder: None,
    };
    let daemon = Daemon::new(settings, state);
    let known = Arc::new(Known(
        pods(&folder)
            .into_iter()
            .map(|pod| add(&daemon, &folder, pod))
            .collect(),
    ));
    serve(bind(&folder.join("run")).expect("the seat socket"), known).expect("a thread");
    daemon.serve().expect("the control socket");
}

#[allow(clippy::needless_pass_by_value)] // as it comes
fn pattern(text: String) -> BridgePattern {
    text.parse().expect("a bridge")
}

fn pods(folder: &Path) -> Vec<Pod> {
    let text = std::fs::read(folder.join("pods.json")).expect("pods.json");
    serde_json::from_slice(&text).expect("pods")
}

fn add(daemon: &Arc<Daemon>, folder: &Path, pod: Pod) -> (SeatId, Arc<PodSeat>) {
    let expected = Expected {
        vm: pod.seat.vm.clone(),
        vm_id: pod.vm_id,
        seat: pod.seat.seat.clone(),
        seat_id: pod.uid,
    };
    let handed = Arc::new(Handed::new(expected, Hierarchies::read().expect("cgroups")));
    let arbiter = Arc::new(FileArbiter::new(folder.join("arbiter").join(&pod.seat.vm)));
    let folder = daemon.state().pod(pod.uid).expect("the seat's folder");
    let seat = daemon.add(pod.seat, folder, handed.clone(), arbiter).expect("a seat");
    (pod.uid, Arc::new(PodSeat::new(seat, handed, pod.recipe)))
}
