//! Nodes that do not exist: what their kubelets and node-daemons would write, for measurements of the operator with many VMs. API server,
//! scheduler and controllers are real; no pod runs anywhere and no guest.
//!
//! Kubelets: a Node that is ready, its heartbeat, pods that run at once and end when they are deleted. Daemons and engines: the record is
//! swapped and seats are published as `docs/kubernetes.md` says, each join done at once.
//!
//! Reads `kill NODE` from standard input and ends with it. Writes one JSON object a line: `{"madeNodes"}`, `{"vms", "protected"}` on change,
//! `{"notReady"}` once the control plane says so of a killed node.

use std::collections::BTreeSet;
use std::io::BufRead;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Parser;
use ftvm_crds::names::{ANNOTATION_SEAT_STATUS, CONTAINER, LABEL_ROLE, RESOURCE_SEAT, ROLE_ACTIVE, ROLE_STANDBY};
use ftvm_crds::seat::{SeatPublished, SeatRole, Takeover};
use ftvm_crds::{FaultTolerantVM, lease};
use ftvm_operator::caches::{Caches, Triggers};
use ftvm_operator::observe::{Observed, PodPhase, PodSeen};
use ftvm_operator::status::PROTECTED;
use ftvm_protocol::identity::{Incarnation, Nonce, SeatId};
use ftvm_protocol::record::{Members, Record, Snapshot};
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::controller::{self, Action as Next};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{Controller, WatchStreamExt, watcher};
use kube::{Api, Client, Config, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// Far more often than a node may be silent.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// VMs that are looked at at a time.
const CONCURRENCY: u16 = 16;
/// After a conflict or a failure.
const AGAIN: Duration = Duration::from_millis(200);
/// Every engine's start: none is ever started twice.
const START: u64 = 1;

#[derive(Parser)]
struct Options {
    /// How many nodes.
    #[arg(long)]
    nodes: u32,
    /// Seats that each of them offers.
    #[arg(long)]
    seats: u32,
    /// Volumes of the storage class `hollow`, for all nodes.
    #[arg(long)]
    volumes: u32,
}

/// What all looks share.
struct Fleet {
    client: Client,
    caches: Caches,
    dead: Mutex<BTreeSet<String>>,
    told: Mutex<BTreeSet<String>>,
    addresses: AtomicU32,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn say(line: &Value) {
    println!("{line}");
}

fn name(number: u32) -> String {
    format!("hollow-{number}")
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let mut config = Config::infer().await?;
    let agent = hyper::header::HeaderValue::from_static("hollow-nodes");
    config.headers.push((hyper::header::USER_AGENT, agent));
    let client = Client::try_from(config)?;
    make_nodes(&client, &options).await?;
    make_volumes(&client, &options).await?;
    let (triggers, mut triggered) = mpsc::unbounded_channel();
    let (vms, kept) = reflector::store();
    let caches = Caches::watch(&client, &triggers, vms.clone());
    let fleet = Arc::new(Fleet {
        client: client.clone(),
        caches,
        dead: Mutex::default(),
        told: Mutex::default(),
        addresses: AtomicU32::new(0),
    });
    beat(&fleet, options.nodes).await;
    tokio::spawn(heartbeats(Arc::clone(&fleet), options.nodes));
    fleet.caches.ready().await?;
    let settings = controller::Config::default().concurrency(CONCURRENCY);
    let watched = watcher(Api::<FaultTolerantVM>::all(client), watcher::Config::default());
    let watched = watched.reflect(kept).applied_objects();
    let controller =
        Controller::for_stream(watched, vms.clone()).with_config(settings.debounce(Duration::from_millis(5)));
    listen(Arc::clone(&fleet), vms.clone(), triggers);
    say(&json!({"madeNodes": options.nodes}));
    let triggered = futures::stream::poll_fn(move |context| triggered.poll_recv(context));
    let mut results = controller
        .reconcile_on(triggered)
        .run(look, |_, _, _| Next::requeue(AGAIN), Arc::clone(&fleet))
        .boxed();
    let mut last = (0, 0);
    while let Some(result) = results.next().await {
        if let Err(error) = result {
            tracing::debug!(%error, "a look failed");
        }
        let all = vms.state();
        let now = (all.len(), all.iter().filter(|vm| is_protected(vm)).count());
        if now != last {
            last = now;
            say(&json!({"vms": now.0, "protected": now.1}));
        }
    }
    Ok(())
}

fn is_protected(vm: &FaultTolerantVM) -> bool {
    let condition = vm.status.as_ref().and_then(|status| status.condition(PROTECTED));
    condition.is_some_and(|condition| condition.status == "True")
}

/// Follows standard input until its end, which is this program's.
fn listen(fleet: Arc<Fleet>, vms: Store<FaultTolerantVM>, triggers: Triggers) {
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if let Some(node) = line.strip_prefix("kill ") {
                lock(&fleet.dead).insert(node.trim().to_owned());
                for vm in vms.state() {
                    // Nobody listens any more only when the process ends.
                    let _ = triggers.send(ObjectRef::from_obj(&*vm));
                }
            }
        }
        std::process::exit(0);
    });
}

async fn make_nodes(client: &Client, options: &Options) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    for number in 1..=options.nodes {
        let name = name(number);
        let metadata = json!({"name": name, "labels": {"kubernetes.io/hostname": name}});
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata});
        nodes
            .create(&PostParams::default(), &serde_json::from_value(node)?)
            .await
            .with_context(|| format!("making node {name}"))?;
        let offers = json!({"cpu": "4000", "memory": "64Ti", "pods": "1000", RESOURCE_SEAT: options.seats.to_string()});
        let now = Timestamp::now().to_string();
        let condition = |kind: &str, status: &str| {
            json!({
                "type": kind, "status": status, "reason": "Hollow", "message": "",
                "lastHeartbeatTime": now, "lastTransitionTime": now,
            })
        };
        let status = json!({
            "capacity": offers, "allocatable": offers,
            "conditions": [
                condition("Ready", "True"), condition("MemoryPressure", "False"), condition("DiskPressure", "False"),
                condition("PIDPressure", "False"),
            ],
            "addresses": [{"type": "InternalIP", "address": host_ip(&name)}],
        });
        let patch = Patch::Merge(json!({"status": status}));
        nodes.patch_status(&name, &PatchParams::default(), &patch).await?;
    }
    Ok(())
}

async fn make_volumes(client: &Client, options: &Options) -> anyhow::Result<()> {
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let made = futures::stream::iter(0..options.volumes).map(|number| {
        let volumes = volumes.clone();
        let volume = json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": format!("hollow-{number}")},
            "spec": {
                "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "hollow",
                "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": "/hollow"},
            },
        });
        async move {
            let volume = serde_json::from_value(volume)?;
            volumes.create(&PostParams::default(), &volume).await?;
            anyhow::Ok(())
        }
    });
    let made: Vec<_> = made.buffer_unordered(CONCURRENCY.into()).collect().await;
    made.into_iter().collect()
}

fn host_ip(node: &str) -> String {
    let number: u32 = node.rsplit('-').next().and_then(|text| text.parse().ok()).unwrap_or(0);
    format!("10.90.{}.{}", number / 250, number % 250 + 1)
}

async fn heartbeats(fleet: Arc<Fleet>, nodes: u32) {
    loop {
        tokio::time::sleep(HEARTBEAT).await;
        beat(&fleet, nodes).await;
    }
}

async fn beat(fleet: &Fleet, nodes: u32) {
    let leases: Api<Lease> = Api::namespaced(fleet.client.clone(), "kube-node-lease");
    let dead = lock(&fleet.dead).clone();
    for name in (1..=nodes).map(name).filter(|name| !dead.contains(name)) {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": format!("{:.6}", Timestamp::now())},
        });
        let params = PatchParams::apply("hollow-nodes").force();
        if let Err(error) = leases.patch(&name, &params, &Patch::Apply(lease)).await {
            eprintln!("heartbeat of {name}: {error}");
        }
    }
}

/// One look at one VM with the eyes of all kubelets, daemons and engines. Each change is seen by a watch and looked at again.
async fn look(vm: Arc<FaultTolerantVM>, fleet: Arc<Fleet>) -> Result<Next, kube::Error> {
    let seen = fleet.caches.observe(&vm);
    let dead = lock(&fleet.dead).clone();
    for node in dead.iter().filter(|node| !seen.node_ready(node)) {
        if lock(&fleet.told).insert(node.clone()) {
            say(&json!({"notReady": node}));
        }
    }
    let namespace = vm.namespace().unwrap_or_default();
    let pods: Api<Pod> = Api::namespaced(fleet.client.clone(), &namespace);
    for (name, pod) in &seen.pods {
        let Some(node) = pod.node.as_deref().filter(|node| !dead.contains(*node)) else {
            continue;
        };
        if pod.deleting {
            pods.delete(name, &DeleteParams::default().grace_period(0)).await?;
        } else if pod.phase == PodPhase::Pending {
            run(&pods, name, node, &fleet.addresses).await?;
        }
    }
    let Some(found) = seen.record() else {
        return Ok(Next::await_change());
    };
    let alive = alive(&seen, &dead);
    let ids: Vec<SeatId> = alive.iter().map(|(id, ..)| *id).collect();
    if let Some(next) = next(&found.snapshot.record, &ids) {
        let leases: Api<Lease> = Api::namespaced(fleet.client.clone(), &namespace);
        let mut lease = leases.get(&vm.name_any()).await?;
        if lease.resource_version() == Some(found.snapshot.version.to_string()) {
            lease::set_record(&mut lease, &next, Timestamp::now());
            leases.replace(&vm.name_any(), &PostParams::default(), &lease).await?;
        }
        return Ok(Next::await_change());
    }
    for (id, name, pod) in alive {
        publish(&pods, &found.snapshot, id, name, pod).await?;
    }
    Ok(Next::await_change())
}

async fn run(pods: &Api<Pod>, name: &str, node: &str, addresses: &AtomicU32) -> Result<(), kube::Error> {
    let number = addresses.fetch_add(1, Ordering::Relaxed);
    let ip = format!(
        "10.{}.{}.{}",
        100 + number / 62_500,
        number / 250 % 250,
        number % 250 + 1
    );
    let now = Timestamp::now().to_string();
    let kinds = ["PodScheduled", "Initialized", "ContainersReady", "Ready"];
    let conditions = kinds.map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": now}));
    let container = json!({
        "name": CONTAINER, "image": "hollow", "imageID": "", "ready": true, "started": true, "restartCount": 0,
        "state": {"running": {"startedAt": now}},
    });
    let status = json!({
        "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": host_ip(node), "startTime": now,
        "conditions": conditions, "containerStatuses": [container],
    });
    let patch = Patch::Merge(json!({"status": status}));
    pods.patch_status(name, &PatchParams::default(), &patch).await.map(drop)
}

/// Seats whose engines run: their pods are admitted, and their nodes live.
fn alive<'a>(seen: &'a Observed, dead: &BTreeSet<String>) -> Vec<(SeatId, &'a str, &'a PodSeen)> {
    let book = seen.vm.status.iter().flat_map(|status| &status.seats);
    let admitted = book.filter_map(|entry| {
        let (name, pod) = seen.pods.get_key_value(&entry.name)?;
        let lives = pod.node.as_ref().is_some_and(|node| !dead.contains(node)) && !pod.deleting;
        let admitted = entry.pod_uid.as_deref() == Some(&pod.uid) && !entry.leaving;
        let runs = admitted && lives && pod.phase == PodPhase::Running;
        let id = pod.uid.parse().ok().filter(|_| runs)?;
        Some((id, name.as_str(), pod))
    });
    admitted.collect()
}

/// What the engines would make of the record next; none if it is as it should be.
fn next(record: &Record, alive: &[SeatId]) -> Option<Record> {
    let engine = |seat| Incarnation { seat, start: START };
    let swapped = |holder, members| Record {
        holder,
        members,
        term: record.term + 1,
        nonce: Nonce((record.term + 1).into()),
        ..record.clone()
    };
    let other = record.members.iter().find(|member| *member != record.holder);
    if !alive.contains(&record.holder.seat) {
        // The standby takes over.
        let heir = other.filter(|other| alive.contains(&other.seat))?;
        return Some(swapped(heir, Members::one(heir)));
    }
    let holder = engine(record.holder.seat);
    if record.holder != holder {
        return Some(swapped(holder, Members::one(holder)));
    }
    match other {
        Some(other) if !alive.contains(&other.seat) => Some(swapped(holder, Members::one(holder))),
        Some(_) => None,
        None => {
            let joins = alive.iter().find(|seat| **seat != holder.seat)?;
            Some(swapped(holder, Members::pair(holder, engine(*joins))))
        }
    }
}

async fn publish(
    pods: &Api<Pod>,
    Snapshot { record, uid, .. }: &Snapshot,
    id: SeatId,
    name: &str,
    pod: &PodSeen,
) -> Result<(), kube::Error> {
    let incarnation = Incarnation { seat: id, start: START };
    if !record.members.contains(incarnation) {
        return Ok(());
    }
    let before = pod.published.clone().unwrap_or_default();
    let active = record.holder == incarnation;
    let pair = record.members.iter().count() > 1;
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let took_over = active && before.role == Some(SeatRole::Standby);
    let takeover = took_over.then(|| Takeover {
        unix_ms: unix_ms.as_millis() as u64,
        reason: "peer lost".to_owned(),
        microseconds: 5_000,
    });
    let now = SeatPublished {
        incarnation: Some(incarnation),
        role: Some(if active { SeatRole::Active } else { SeatRole::Standby }),
        protected: pair,
        holds_guest: true,
        term: record.term,
        why: if pair { "the standby follows" } else { "alone" }.to_owned(),
        peer_connected: pair,
        arbiter_reachable: true,
        lease_uid: Some(*uid),
        last_takeover: takeover.or(before.last_takeover.clone()),
        look: pod.look.clone(),
        ..SeatPublished::default()
    };
    if now == before {
        return Ok(());
    }
    let text = serde_json::to_string(&now).map_err(kube::Error::SerdeError)?;
    let role = if active { ROLE_ACTIVE } else { ROLE_STANDBY };
    let metadata = json!({
        "uid": pod.uid, "annotations": {ANNOTATION_SEAT_STATUS: text}, "labels": {LABEL_ROLE: role},
    });
    let patch = Patch::Merge(json!({"metadata": metadata}));
    pods.patch(name, &PatchParams::default(), &patch).await.map(drop)
}
