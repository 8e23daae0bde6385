//! What the operator says of a VM.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::spec::{CpuBaseline, Mode};

/// Observed state of a fault-tolerant VM. Written by the operator alone, always with the object's resourceVersion.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultTolerantVMStatus {
    /// Generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// What the VM does, in one word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<VmPhase>,
    /// Node of the active seat, which runs the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active: Option<String>,
    /// Node of the standby seat, which takes over when the active one dies. Missing while the VM is not protected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standby: Option<String>,
    /// How the guest is protected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Term of the arbiter's record: plus one at every change of roles.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub term: Option<u64>,
    /// Average length of an epoch in milliseconds when the active seat last reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u32>,
    /// Average time in milliseconds that output waited for the standby when the active seat last reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_ms: Option<u32>,
    /// Progress of a resync in percent; missing while there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resync_percent: Option<u8>,
    /// The book: every seat, entered before anything is made for it. Node-daemons run engines only for the pods in it.
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub seats: Vec<SeatEntry>,
    /// Seats that were replaced since the VM was last protected. What did not help is tried again after twice the time.
    #[serde(skip_serializing_if = "is_zero")]
    pub replacements: u32,
    /// Nodes where the storage of a seat failed at every join since the VM was last protected. Pods of other seats go there last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = STORAGE_FAILED_ON_MAX), inner(length(max = 253)))]
    pub storage_failed_on: Vec<String>,
    /// UID of the Lease with the arbiter's record, once it was made. Another Lease is never taken for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_uid: Option<String>,
    /// The CPU that the guest sees, chosen before it starts (machine.cpuBaseline Common). It stays until the VM is halted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<ChosenCpu>,
    /// The last time that the guest moved to the other seat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_failover: Option<Failover>,
    /// The last switchover that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switchover: Option<AskedFor>,
    /// The last failure of the active that was asked for, to see that the standby takes over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failover: Option<AskedFor>,
    /// Ready, Protected, Resyncing, StorageHealthy, ArbiterReachable, CpuChosen, NetworksRedundant. A reason and message say why, and what to do.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl FaultTolerantVMStatus {
    /// The CPU that the guest's engines have; none while it is not chosen.
    pub fn cpu_in_force(&self) -> Option<&ChosenCpu> {
        self.cpu.as_ref().filter(|cpu| !cpu.former)
    }

    /// The condition of this type.
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.type_ == kind)
    }
}

/// Most names in [`FaultTolerantVMStatus::storage_failed_on`].
pub const STORAGE_FAILED_ON_MAX: usize = 16;

pub(crate) fn is_zero(value: &u32) -> bool {
    *value == 0
}

/// What a VM does, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum VmPhase {
    /// Seats are being made, or wait for what the conditions name.
    Starting,
    /// The guest runs.
    Running,
    /// The guest stands still until a standby has joined (whenUnprotected: Pause).
    Paused,
    /// The guest was asked to stop, or stopped by itself and is started again soon.
    Stopping,
    /// No seat exists; disks are kept. Machine, boot and networks may be changed now.
    Halted,
    /// The VM is being deleted.
    Deleting,
}

impl VmPhase {
    /// Every phase.
    pub const ALL: [VmPhase; 6] = [
        VmPhase::Starting,
        VmPhase::Running,
        VmPhase::Paused,
        VmPhase::Stopping,
        VmPhase::Halted,
        VmPhase::Deleting,
    ];
}

/// One seat in the book.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SeatEntry {
    /// Name of the seat and of its pod.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Place among the VM's seats, 0 or 1: which entry of `placement.seats`, and of a disk's `storageClassNames`, it follows.
    #[serde(default)]
    pub slot: u8,
    /// UID of the pod, which is the seat's identity; entered once the seat's certificate exists. Missing: no such pod yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 36))]
    pub pod_uid: Option<String>,
    /// Earlier pods of this name: the record may name them, and the seat's header does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub former: Vec<FormerPod>,
    /// Node that the pod was bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// Which machine that node was when the pod was bound to it, as its kubelet tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub machine: Option<String>,
    /// IP of the pod, where the engine's link listens (port 7000).
    #[serde(default, rename = "podIP", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub pod_ip: Option<String>,
    /// IP of the node, where its daemon answers (port 7400).
    #[serde(default, rename = "hostIP", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub host_ip: Option<String>,
    /// The pod is being deleted, and its daemon said that no engine of it runs and that none is begun any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub engine_ended: bool,
    /// Since when the seat has been without an engine that joins, though the VM needs one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_since: Option<Time>,
    /// The seat is being removed: no engine is started for it, and no other engine accepts it as a peer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// An earlier pod of a seat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FormerPod {
    /// Its UID.
    #[schemars(length(max = 36))]
    pub uid: String,
    /// Node that it was bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// Which machine the node was when the pod was missed, and its boot: MACHINE/BOOT, as kubelet tells them. BOOT is empty if there was no Node object then. Missing if it was another one by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub boot: Option<String>,
    /// Since when it has been missing.
    pub missing_since: Time,
    /// No engine of it runs any more: it was deleted in order, its machine was booted since, or its node is out of service.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ended: bool,
    /// Once it had ended another seat had the guest alone: what this one left on the seat's disk is older.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub older: bool,
}

/// The CPU that was chosen for a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChosenCpu {
    /// Common, or Host where nothing could be chosen: then it is that of the node where the guest starts.
    pub source: CpuBaseline,
    /// Frequency of the time stamp counter in kHz and all leaves of CPUID, in hexadecimal. Missing with Host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16384))]
    pub baseline: Option<String>,
    /// How it came about.
    #[schemars(length(max = CHOSEN_WHY_LENGTH_MAX))]
    pub why: String,
    /// The VM was halted: at the next start another one is chosen, of the same vendor if nodes have that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub former: bool,
}

/// Longest [`ChosenCpu::why`], in characters.
pub const CHOSEN_WHY_LENGTH_MAX: usize = 1024;

/// The guest moved to the other seat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failover {
    /// When.
    pub time: Time,
    /// Why: the peer was lost, or a switchover was asked for.
    pub reason: String,
    /// Name of the seat that became active.
    pub seat: String,
    /// Its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How long no seat ran the guest, in microseconds.
    pub gap_microseconds: u64,
}

/// What was asked for by an annotation (ftvm.dev/switchover, ftvm.dev/failover), and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AskedFor {
    /// Value of the annotation, its first 64 characters.
    pub request: String,
    /// Pending, Done or Refused.
    pub outcome: Outcome,
    /// Why it was refused, or what it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The pod whose daemon was told: no other one is, whatever becomes of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub told: Option<Told>,
}

/// Whose daemon was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Told {
    /// UID of the pod.
    #[schemars(length(max = 36))]
    pub pod_uid: String,
    /// Id of the request that the pod had until then: as long as it has that one, this one is still to be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Of a failover: if its daemon has not begun it by then, it is taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Time>,
}

/// What came of something that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Outcome {
    /// It was told to the active seat, or waits for protection.
    Pending,
    /// It was done.
    Done,
    /// It was refused.
    Refused,
}

impl SeatEntry {
    /// UIDs of this seat's pods that whoever is to boot a disk of the VM asks after (rule 8 in docs/protocol.md): that of its present one, once it has an
    /// address, before which no daemon takes it for a seat. Until then earlier ones stand for it: the last one that a node took, whose disk it is, and those
    /// that are not proven to have ended. None: no engine ever ran here, or what is on the disk is known to be older than another one's.
    pub fn asked_as(&self) -> impl Iterator<Item = &str> {
        let present = self.pod_uid.as_deref().filter(|_| self.pod_ip.is_some());
        let earlier: &[FormerPod] = if present.is_some() { &[] } else { &self.former };
        // The operator keeps those longest that a node took.
        let last = earlier.iter().rposition(|former| former.node.is_some());
        let last = last.filter(|last| !earlier[*last].older);
        let asked = earlier.iter().enumerate().filter(move |(index, former)| {
            let open = former.node.is_some() && !former.ended;
            open || Some(*index) == last
        });
        present.into_iter().chain(asked.map(|(_, former)| former.uid.as_str()))
    }

    /// Was this UID ever a pod of this seat?
    pub fn had_uid(&self, uid: &str) -> bool {
        self.pod_uid.as_deref() == Some(uid) || self.former.iter().any(|former| former.uid == uid)
    }
}
