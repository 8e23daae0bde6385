//! What the operator sees of one VM: plain data, taken out of the objects of the API server.

use std::collections::BTreeMap;
use std::time::Duration;

use ftvm_crds::lease::{self, LeaseError};
use ftvm_crds::names::{ANNOTATION_CPU, ANNOTATION_NETWORKS, ANNOTATION_NODES, LABEL_SEAT, LABEL_VM, RESOURCE_SEAT};
use ftvm_crds::seat::{self, AnnotationError, DoneRequest, SeatPublished, SeatRequest};
use ftvm_crds::{FaultTolerantVM, FaultTolerantVMStatus};
use ftvm_protocol::identity::VmId;
use ftvm_protocol::record::Snapshot;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ContainerStatus, Node, NodeSystemInfo, PersistentVolumeClaim, Pod, Taint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::first_look::FirstLook;

/// Letters of what kubelet says of a node's machine and its boot: two UUIDs.
const BOOT_MAX: usize = 128;
/// The condition of a pod that kubelet has made a sandbox for, with volumes and network (Kubernetes 1.29).
pub const HAS_SANDBOX: &str = "PodReadyToStartContainers";
/// Letters of what a container said last.
const SAID_MAX: usize = 500;

/// Everything that decisions about one VM are made of.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The VM.
    pub vm: FaultTolerantVM,
    /// Its Lease.
    pub lease: LeaseSeen,
    /// Pods of its seats, by name.
    pub pods: BTreeMap<String, PodSeen>,
    /// Claims of its seats, by name.
    pub claims: BTreeMap<String, ClaimSeen>,
    /// All nodes.
    pub nodes: BTreeMap<String, NodeSeen>,
    /// When.
    pub now: Timestamp,
    /// Random numbers for names of new seats.
    pub draws: [u64; 2],
    /// What the API server refused to make when it was asked last.
    pub refused: Option<Refusal>,
    /// This leader's first look at the VM; none: nothing that is observed can be older than that.
    pub first_look: Option<FirstLook>,
    /// For how long this process has seen that nobody has the guest, and that a person accepts the loss that the annotation names.
    pub accepted_for: Option<Duration>,
}

/// Something could not be made, and won't be until a person does something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// In one word.
    pub reason: &'static str,
    /// What, where, why, what to do.
    pub message: String,
    /// No pod and claim is asked for before this time has passed; none if it was another spec or book that was refused.
    pub wait: Duration,
}

/// The VM's Lease.
#[derive(Debug, Clone, PartialEq)]
pub enum LeaseSeen {
    /// There is none.
    Missing,
    /// There is one that can't be used.
    Unusable(LeaseError),
    /// The arbiter's record.
    Found(Box<Record>),
}

/// The arbiter's record as it was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Record, identity and version.
    pub snapshot: Snapshot,
    /// The annotation `ftvm.dev/nodes`.
    pub nodes: String,
    /// When it was written last.
    pub renewed: Option<Timestamp>,
}

/// Phase of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodPhase {
    /// Not started.
    Pending,
    /// Its container was started.
    Running,
    /// It will never run (again).
    Finished,
}

/// Pod of a seat.
#[derive(Debug, Clone)]
pub struct PodSeen {
    /// Its UID: the seat's identity.
    pub uid: String,
    /// Its resourceVersion.
    pub version: String,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// Its node, once it was bound to one.
    pub node: Option<String>,
    /// Its IP.
    pub pod_ip: Option<String>,
    /// Its node's IP.
    pub host_ip: Option<String>,
    /// Phase.
    pub phase: PodPhase,
    /// Its readiness.
    pub ready: bool,
    /// kubelet says that it has no sandbox, which needs all its volumes, its identity among them.
    pub no_sandbox: bool,
    /// It is being deleted.
    pub deleting: bool,
    /// What the scheduler says of it.
    pub unschedulable: Option<String>,
    /// When its container started, if it never had to be started again. By its node's clock.
    pub first_start: Option<Timestamp>,
    /// What its container, or one that has to end before, waits for: (reason, message).
    pub waiting: Option<(String, String)>,
    /// Why a container that has to end before came to nothing the last time.
    pub unprepared: Option<String>,
    /// Why it failed.
    pub failed: Option<String>,
    /// What its daemon says.
    pub published: Result<SeatPublished, AnnotationError>,
    /// What it was asked for last.
    pub request: Option<SeatRequest>,
    /// What a leader drew that asked for its daemon's word last.
    pub look: Option<String>,
}

/// Claim of a seat.
#[derive(Debug, Clone, PartialEq)]
pub struct ClaimSeen {
    /// Its UID.
    pub uid: String,
    /// The seat.
    pub seat: String,
    /// It has a volume.
    pub bound: bool,
    /// Its volume is gone.
    pub lost: bool,
    /// It is being deleted.
    pub deleting: bool,
    /// When it was made.
    pub created: Option<Timestamp>,
}

/// A node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeSeen {
    /// Condition Ready is True.
    pub ready: bool,
    /// New pods may be bound to it.
    pub schedulable: bool,
    /// Seats that its device plugin offers.
    pub seats: i64,
    /// The same, and those that are out of order now.
    pub seats_in_all: i64,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// Which machine it is, and which boot of it: MACHINE/BOOT.
    pub boot: Option<String>,
    /// What its daemon says of its CPU: the annotation as it is, read when a CPU is chosen.
    pub cpu: Option<String>,
    /// What its daemon says of its networks: the annotation as it is.
    pub networks: Option<String>,
}

impl Observed {
    /// The VM's identity.
    pub fn vm_id(&self) -> Option<VmId> {
        self.vm.metadata.uid.as_deref().and_then(|uid| uid.parse().ok())
    }

    /// The VM's status, empty if it has none.
    pub fn status(&self) -> FaultTolerantVMStatus {
        self.vm.status.clone().unwrap_or_default()
    }

    /// The record, if there is one that can be used.
    pub fn record(&self) -> Option<&Record> {
        match &self.lease {
            LeaseSeen::Found(record) => Some(record),
            _ => None,
        }
    }

    /// How long no pod and claim is to be asked for, after a refusal; none: they may be.
    pub fn waits(&self) -> Option<Duration> {
        let wait = self.refused.as_ref().map(|refused| refused.wait);
        wait.filter(|wait| !wait.is_zero())
    }

    /// Is this node ready? One that is gone is not.
    pub fn node_ready(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|node| node.ready)
    }
}

impl PodSeen {
    /// What its daemon says, if it can be read.
    pub fn told(&self) -> Option<&SeatPublished> {
        self.published.as_ref().ok()
    }

    /// What its daemon says of the request that it executed or refused last; none, too, if what it published can't be read.
    pub fn last_answer(&self) -> Option<&DoneRequest> {
        self.told()?.done_request.as_ref()
    }
}

impl NodeSeen {
    /// Which machine it is, as its kubelet tells it.
    pub fn machine(&self) -> Option<&str> {
        self.boot.as_deref()?.split_once('/').map(|(machine, _)| machine)
    }

    /// Has it all of these labels?
    pub fn has_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        let mut labels = labels.iter();
        labels.all(|(key, value)| self.labels.get(key) == Some(value))
    }
}

/// The VM's Lease as read.
pub fn lease(vm: &FaultTolerantVM, lease: Option<&Lease>) -> LeaseSeen {
    let Some(lease) = lease else {
        return LeaseSeen::Missing;
    };
    let vm_id = vm.metadata.uid.as_deref().and_then(|uid| uid.parse().ok());
    let read = || {
        lease::check_owner(lease, &vm.name_any(), vm_id.unwrap_or_default())?;
        lease::snapshot(lease)
    };
    match read() {
        Err(error) => LeaseSeen::Unusable(error),
        Ok(snapshot) => LeaseSeen::Found(Box::new(Record {
            snapshot,
            nodes: lease.annotations().get(ANNOTATION_NODES).cloned().unwrap_or_default(),
            renewed: lease
                .spec
                .as_ref()
                .and_then(|spec| spec.renew_time.as_ref())
                .map(|time| time.0),
        })),
    }
}

/// A pod as read; none if it is no seat's pod of this VM.
pub fn pod(vm: &FaultTolerantVM, pod: &Pod) -> Option<(String, PodSeen)> {
    let labels = pod.labels();
    let name = pod.name_any();
    let owner = vm.metadata.uid.as_deref()?;
    let owned = pod.owner_references().iter().any(|reference| reference.uid == owner);
    if !owned || labels.get(LABEL_VM) != Some(&vm.name_any()) || labels.get(LABEL_SEAT) != Some(&name) {
        return None;
    }
    let status = pod.status.clone().unwrap_or_default();
    let condition = |kind: &str| {
        let conditions = status.conditions.iter().flatten();
        conditions
            .into_iter()
            .find(|condition| condition.type_ == kind)
            .cloned()
    };
    let unschedulable = condition("PodScheduled").filter(|condition| condition.status == "False");
    let container = status.container_statuses.iter().flatten().next();
    let inits = || status.init_container_statuses.iter().flatten();
    // Those before it first: it waits for them.
    let waiting = inits().find_map(waits).or_else(|| container.and_then(waits));
    let unprepared = inits().find_map(unprepared);
    let first_start = container
        .filter(|container| container.restart_count == 0)
        .and_then(|container| container.state.as_ref()?.running.as_ref()?.started_at.as_ref())
        .map(|time| time.0);
    let phase = match status.phase.as_deref() {
        Some("Running") => PodPhase::Running,
        Some("Failed" | "Succeeded") => PodPhase::Finished,
        _ => PodPhase::Pending,
    };
    let failed = (phase == PodPhase::Finished).then(|| {
        format!(
            "{}: {}",
            status.reason.unwrap_or_default(),
            status.message.unwrap_or_default()
        )
    });
    let ready = condition("Ready").is_some_and(|condition| condition.status == "True");
    let no_sandbox = condition(HAS_SANDBOX).is_some_and(|condition| condition.status == "False");
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    let seen = PodSeen {
        uid: pod.uid().unwrap_or_default(),
        version: pod.resource_version().unwrap_or_default(),
        created: pod.creation_timestamp().map(|time| time.0),
        node: filled(pod.spec.as_ref().and_then(|spec| spec.node_name.clone())),
        pod_ip: filled(status.pod_ip),
        host_ip: filled(status.host_ip),
        phase,
        ready,
        no_sandbox,
        deleting: pod.metadata.deletion_timestamp.is_some(),
        unschedulable: unschedulable.map(|condition| condition.message.unwrap_or_default()),
        first_start,
        waiting,
        unprepared,
        failed,
        published: SeatPublished::of(pod.annotations()),
        request: SeatRequest::of(pod.annotations()).unwrap_or_default(),
        look: seat::look(pod.annotations()).cloned(),
    };
    Some((name, seen))
}

/// What a container waits for, unless that is its turn.
fn waits(container: &ContainerStatus) -> Option<(String, String)> {
    let waiting = container.state.as_ref()?.waiting.clone()?;
    let reason = waiting.reason.unwrap_or_default();
    (reason != "PodInitializing").then(|| (reason, waiting.message.unwrap_or_default()))
}

/// Why an init container came to nothing the last time, as long as it has not come to an end since.
fn unprepared(container: &ContainerStatus) -> Option<String> {
    let mut states = [&container.state, &container.last_state].into_iter().flatten();
    if let Some(ended) = states.find_map(|state| state.terminated.as_ref()) {
        // Of what it printed, what it said last.
        let mut said = ended.message.iter().flat_map(|message| message.lines());
        let said = said.rfind(|line| !line.trim().is_empty());
        let said: String = said.unwrap_or_default().chars().take(SAID_MAX).collect();
        let (name, code) = (&container.name, ended.exit_code);
        return (code != 0).then(|| format!("init container {name}: {said} (code {code})"));
    }
    // It can't be made or started.
    let (reason, message) = waits(container).filter(|(reason, _)| reason.ends_with("Error"))?;
    let message: String = message.chars().take(SAID_MAX).collect();
    Some(format!("init container {}: {reason}: {message}", container.name))
}

/// A claim as read; none if it is no seat's.
pub fn claim(claim: &PersistentVolumeClaim) -> Option<(String, ClaimSeen)> {
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    let seen = ClaimSeen {
        uid: claim.uid().unwrap_or_default(),
        seat: claim.labels().get(LABEL_SEAT)?.clone(),
        bound: phase == Some("Bound"),
        lost: phase == Some("Lost"),
        deleting: claim.metadata.deletion_timestamp.is_some(),
        created: claim.creation_timestamp().map(|time| time.0),
    };
    Some((claim.name_any(), seen))
}

/// Of a node whose kubelet has said both.
fn boot(info: &NodeSystemInfo) -> Option<String> {
    let known = !info.system_uuid.is_empty() && !info.boot_id.is_empty();
    let text = format!("{}/{}", info.system_uuid, info.boot_id);
    (known && text.len() <= BOOT_MAX).then_some(text)
}

/// A node as read.
pub fn node(node: &Node) -> (String, NodeSeen) {
    let status = node.status.as_ref();
    let conditions = status
        .and_then(|status| status.conditions.as_ref())
        .into_iter()
        .flatten();
    let ready = conditions
        .into_iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let seats = |resources: Option<&BTreeMap<String, Quantity>>| {
        let seats = resources.and_then(|resources| resources.get(RESOURCE_SEAT)?.0.parse().ok());
        seats.unwrap_or(0)
    };
    let unschedulable = node.spec.as_ref().and_then(|spec| spec.unschedulable);
    let seen = NodeSeen {
        ready,
        schedulable: !unschedulable.unwrap_or(false),
        seats: seats(status.and_then(|status| status.allocatable.as_ref())),
        seats_in_all: seats(status.and_then(|status| status.capacity.as_ref())),
        labels: node.labels().clone(),
        taints: node
            .spec
            .as_ref()
            .and_then(|spec| spec.taints.clone())
            .unwrap_or_default(),
        boot: status.and_then(|status| status.node_info.as_ref()).and_then(boot),
        cpu: node.annotations().get(ANNOTATION_CPU).cloned(),
        networks: node.annotations().get(ANNOTATION_NETWORKS).cloned(),
    };
    (node.name_any(), seen)
}
