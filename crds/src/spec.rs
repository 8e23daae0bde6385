//! What a user asks for. Everything here is what `kubectl explain ftvm.spec` shows.
#![allow(clippy::duplicated_attributes)] // columns of one type

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rules;
use crate::status::FaultTolerantVMStatus;

/// A virtual machine that keeps running when the machine under it dies.
#[derive(CustomResource, Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "ftvm.dev",
    version = "v1alpha1",
    kind = "FaultTolerantVM",
    plural = "faulttolerantvms",
    singular = "faulttolerantvm",
    shortname = "ftvm",
    category = "all",
    namespaced,
    status = "FaultTolerantVMStatus",
    derive = "PartialEq",
    doc = "A virtual machine that keeps running, with its memory and its open connections, when the machine under it dies.",
    printcolumn(name = "Status", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Protected",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Protected\")].status"
    ),
    printcolumn(name = "Active", type_ = "string", json_path = ".status.active"),
    printcolumn(name = "Standby", type_ = "string", json_path = ".status.standby"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".status.mode"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Term", type_ = "integer", json_path = ".status.term", priority = 1),
    printcolumn(name = "Interval", type_ = "integer", json_path = ".status.intervalMs", priority = 1),
    printcolumn(name = "Lag", type_ = "integer", json_path = ".status.lagMs", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::spec()))]
pub struct FaultTolerantVMSpec {
    /// Whether the guest runs. A guest that powers itself off under Always is started again.
    #[serde(default)]
    pub run_strategy: RunStrategy,
    /// CPUs and memory. May be changed only while the VM is halted.
    pub machine: Machine,
    /// What the guest boots. May be changed only while the VM is halted.
    pub boot: Boot,
    /// Disks, in the order in which the guest sees them. Each seat has a volume of its own for each. Names, sizes and sources are fixed for the VM's life.
    #[schemars(length(min = 1, max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub disks: Vec<Disk>,
    /// Network cards, in the order in which the guest sees them. Names, order and MAC addresses are fixed for the VM's life, the rest may be changed only while the VM is halted.
    #[serde(default)]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub networks: Vec<Network>,
    /// How the guest is protected.
    #[serde(default)]
    pub fault_tolerance: FaultTolerance,
    /// Where the seats may run.
    #[serde(default)]
    pub placement: Placement,
    /// What the seats' pods ask for beside the guest's own memory and CPUs.
    #[serde(default)]
    pub resources: SeatResources,
    /// What happens to the volumes when the VM is deleted. A seat that is replaced loses its volumes in any case: its peer has the data.
    #[serde(default)]
    pub volume_policy: VolumePolicy,
}

/// Whether the guest runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RunStrategy {
    /// The guest runs, on two seats.
    #[default]
    Always,
    /// The guest is stopped; its disks are kept.
    Halted,
}

/// CPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// Virtual CPUs, 1 to 16.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 16))]
    pub vcpus: u8,
    /// Guest memory: a whole number with Mi, Gi or Ti. Both seats' nodes must have it free, and some more for the engine.
    #[schemars(length(max = 12), extend("x-kubernetes-validations" = rules::memory()))]
    pub memory: String,
    /// The CPU that the guest sees. It is chosen when the guest starts, and anew when it is started after the VM was halted.
    #[serde(default)]
    pub cpu_baseline: CpuBaseline,
}

fn one() -> u8 {
    1
}

/// The CPU that a guest sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CpuBaseline {
    /// What the nodes that may have a seat have in common. Seats are placed on nodes that have it.
    #[default]
    Common,
    /// That of the node where the guest starts. A seat on a node that lacks one of its features can't join and names it.
    Host,
}

/// What the guest boots: kernel and initrd out of an image or a volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::boot()))]
pub struct Boot {
    /// An OCI image with /boot/vmlinuz, /boot/initrd and the contents of disks. Either this or volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<GuestImage>,
    /// A volume with the same files. Either this or image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<GuestVolume>,
    /// Path of the kernel in the image or volume: a bzImage or a PVH ELF file.
    #[serde(default = "default_kernel")]
    #[schemars(length(max = 255), extend("x-kubernetes-validations" = rules::path()))]
    pub kernel: String,
    /// Path of the initial RAM disk. If missing: /boot/initrd if there is such a file, else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), extend("x-kubernetes-validations" = rules::path()))]
    pub initrd: Option<String>,
    /// The kernel's command line.
    #[serde(default)]
    #[schemars(length(max = 2047))]
    pub cmdline: String,
}

fn default_kernel() -> String {
    DEFAULT_KERNEL.to_owned()
}

/// Path of the kernel if none is named.
pub const DEFAULT_KERNEL: &str = "/boot/vmlinuz";
/// Path of the initial RAM disk if none is named and it exists.
pub const DEFAULT_INITRD: &str = "/boot/initrd";

/// An OCI image with a guest's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestImage {
    /// The image, as in a pod. A digest makes sure that both seats get the same.
    #[schemars(length(min = 1, max = 512))]
    pub reference: String,
    /// When nodes pull the image.
    #[serde(default)]
    pub pull_policy: PullPolicy,
    /// Name of a Secret (type kubernetes.io/dockerconfigjson) in the VM's namespace with the registry's password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub pull_secret: Option<String>,
}

/// When nodes pull an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)] // Kubernetes' own words
pub enum PullPolicy {
    #[default]
    IfNotPresent,
    Always,
    Never,
}

/// A volume with a guest's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestVolume {
    /// Name of a claim in the VM's namespace that both seats' nodes can mount for reading.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
}

/// A disk. Each seat has a volume of its own for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::disk()))]
pub struct Disk {
    /// Name, part of the claims' names and the disk's serial number in the guest.
    #[schemars(length(min = 1, max = 20), extend("x-kubernetes-validations" = rules::disk_name()))]
    pub name: String,
    /// Size that the guest sees: a whole number with Mi, Gi or Ti. Every block is allocated on both seats before the guest starts.
    #[schemars(length(max = 12), extend("x-kubernetes-validations" = rules::size()))]
    pub size: String,
    /// Storage class of the seats' volumes; the cluster's default if missing. A change is for seats made from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
    /// Storage classes of the first and the second seat's volume, in the place of storageClassName, so that the two copies lie on different storage. With one name the second seat's is the cluster's default. A change is for seats made from then on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 2), inner(length(min = 1, max = 253)))]
    pub storage_class_names: Vec<String>,
    /// First contents.
    #[serde(default)]
    pub source: DiskSource,
}

/// First contents of a disk, expanded to its whole size before the guest starts for the first time. Blank if nothing is named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = rules::source()))]
pub struct DiskSource {
    /// A file of the guest image or volume; what it does not fill is zeros.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageFile>,
    /// A file of an existing claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimFile>,
    /// A file of a web server. Needs sha256.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpFile>,
    /// Zeros.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blank: Option<Blank>,
    /// What the file is written in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<FileFormat>,
    /// What the file is compressed with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<FileCompression>,
    /// SHA-256 of the file as it lies there, compared before anything in it is believed: 64 hexadecimal digits in lower case.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = rules::sha256()))]
    pub sha256: Option<String>,
}

/// A file of an existing claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimFile {
    /// Name of a claim (volumeMode Filesystem) in the VM's namespace. Until the guest starts for the first time, both seats' nodes must be able to mount it for reading.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
    /// Path of the file in the volume; group 65532 must be able to read it.
    #[serde(default = "default_claim_path")]
    #[schemars(length(max = 255), extend("x-kubernetes-validations" = rules::path()))]
    pub path: String,
    /// Paths in the same volume of the files that a qcow2 file is the difference from, nearest first: its backing file, that one's, and so on to the last. Nothing is opened by a name that stands in a file; number and formats must be those of the files' headers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 8), inner(length(max = 255)), extend("x-kubernetes-validations" = rules::backing()))]
    pub backing: Vec<String>,
}

/// Most backing files of a disk's first contents, as the schema has it.
pub const BACKING_MAX: usize = 8;

fn default_claim_path() -> String {
    "/disk.img".to_owned()
}

/// A file of a web server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpFile {
    /// Where it is, without user and password. The seat's pod asks for it, from its own network.
    #[schemars(length(max = 1024), extend("x-kubernetes-validations" = rules::url()))]
    pub url: String,
    /// Certificates (PEM) that vouch for an https server instead of the public authorities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16384), extend("x-kubernetes-validations" = rules::authority()))]
    pub authority: Option<String>,
}

/// What the file is written in, within its compression. If missing: Qcow2 if its name ends in .qcow2, else Raw. What a qcow2 file names is never opened: its backing files are those in backing of source.image or source.claim, and one with an external data file is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FileFormat {
    /// As the guest sees it.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// What the file is compressed with. If missing, its name says so: .gz, .xz, .zst, else None. A compressed file has format Raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)] // their own names
pub enum FileCompression {
    None,
    Gzip,
    Xz,
    Zstd,
}

/// A file of the guest image or volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageFile {
    /// Its path; /disk/NAME.raw, with the disk's name, if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), extend("x-kubernetes-validations" = rules::path()))]
    pub path: Option<String>,
    /// Paths in the same image or volume of the files that a qcow2 file is the difference from, nearest first: its backing file, that one's, and so on to the last. Nothing is opened by a name that stands in a file; number and formats must be those of the files' headers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 8), inner(length(max = 255)), extend("x-kubernetes-validations" = rules::backing()))]
    pub backing: Vec<String>,
}

/// No contents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Blank {}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = rules::network()))]
pub struct Network {
    /// Name in messages and metrics.
    #[schemars(length(min = 1, max = 20), extend("x-kubernetes-validations" = rules::name()))]
    pub name: String,
    /// MAC address. If missing it follows from the VM's UID and the card's place in the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 17), extend("x-kubernetes-validations" = rules::mac()))]
    pub mac: Option<String>,
    /// The guest's IP addresses there, IPv4 and IPv6, without prefixes. The guest speaks with no others, and they are announced with its MAC address where it takes over. If missing, nobody knows which it has, and its MAC address alone is seen to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 39)), extend("x-kubernetes-list-type" = "set", "x-kubernetes-validations" = rules::addresses()))]
    pub addresses: Vec<String>,
    /// A bridge of the nodes. The one kind of network so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<Bridge>,
}

/// Most IP addresses of a card, as its schema has it.
pub const ADDRESSES_MAX: usize = 16;

/// A bridge of the nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Bridge {
    /// Name of the bridge's interface, the same on all nodes that may have a seat.
    #[schemars(length(min = 1, max = 15), extend("x-kubernetes-validations" = rules::interface()))]
    pub name: String,
}

/// How the guest is protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = rules::fault_tolerance()))]
pub struct FaultTolerance {
    /// How the standby keeps up.
    pub mode: Mode,
    /// Bounds of an epoch's length. The guest's output waits for the end of its epoch.
    pub interval: Interval,
    /// Added latency in milliseconds that is aimed at within the bounds of interval. If missing, epochs are as short as the load allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub target_latency_ms: Option<u32>,
    /// A side that was silent for so many milliseconds is taken for dead.
    #[schemars(range(min = 100, max = 10_000))]
    pub detection_ms: u32,
    /// A disk whose request is under way for more milliseconds than these hangs: of the active seat, the guest goes to the standby. An engine takes it when it starts.
    #[schemars(range(min = 500, max = 60_000))]
    pub disk_hang_ms: u32,
    /// An error of the active seat's disk is kept from the guest for so many milliseconds in which that runs, so that the standby can take over and do what failed. With 0, and without a standby, the guest is told at once. An engine takes it when it starts.
    #[schemars(range(max = 60_000))]
    pub disk_hold_ms: u32,
    /// What the guest does while there is no standby.
    pub when_unprotected: WhenUnprotected,
    /// A seat that has been without a joining engine for so many seconds, while the other runs alone, is replaced on another node.
    #[schemars(range(min = 5, max = 86_400))]
    pub replace_after_seconds: u32,
}

impl Default for FaultTolerance {
    fn default() -> Self {
        FaultTolerance {
            mode: Mode::Checkpoint,
            interval: Interval::default(),
            target_latency_ms: None,
            detection_ms: 300,
            disk_hang_ms: 30_000,
            disk_hold_ms: 10_000,
            when_unprotected: WhenUnprotected::Continue,
            replace_after_seconds: 20,
        }
    }
}

/// How the standby keeps up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// The standby gets the changes of every epoch before the epoch's output leaves. For any guest.
    #[default]
    Checkpoint,
}

/// Bounds of an epoch's length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = rules::interval()))]
pub struct Interval {
    /// Shortest epoch in milliseconds.
    #[schemars(range(min = 1, max = 1000))]
    pub min_ms: u32,
    /// Longest epoch in milliseconds.
    #[schemars(range(min = 1, max = 1000))]
    pub max_ms: u32,
}

impl Default for Interval {
    fn default() -> Self {
        Interval { min_ms: 2, max_ms: 50 }
    }
}

/// What the guest does while there is no standby.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WhenUnprotected {
    /// It runs on.
    #[default]
    Continue,
    /// It stands still, and nothing that it said leaves, until a standby has joined; it does not boot before, either.
    Pause,
}

/// Where the seats may run. The two seats are never on one node, nor in one topology domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Placement {
    /// Label of nodes whose values tell apart what may fail together: the node's name, a zone, a rack. A node without it gets no seat.
    #[schemars(length(min = 1, max = 316))]
    pub topology_key: String,
    /// Wishes of the first and the second seat.
    #[schemars(length(max = 2))]
    pub seats: Vec<SeatPlacement>,
    /// Taints that the seats' pods tolerate, beside those of nodes that are not ready.
    #[schemars(length(max = 16))]
    pub tolerations: Vec<Toleration>,
    /// Priority class of the seats' pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
}

impl Default for Placement {
    fn default() -> Self {
        Placement {
            topology_key: "kubernetes.io/hostname".to_owned(),
            seats: Vec::new(),
            tolerations: Vec::new(),
            priority_class_name: None,
        }
    }
}

/// Wishes of one seat.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SeatPlacement {
    /// Labels that the seat's node must have.
    #[schemars(extend("maxProperties" = 16))]
    pub node_selector: BTreeMap<String, String>,
}

/// What the seats' pods ask for beside the guest's own memory and CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SeatResources {
    /// CPU that a seat requests, such as 500m or 2; as many as there are vCPUs if missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 12), extend("x-kubernetes-validations" = rules::cpu()))]
    pub cpu_request: Option<String>,
    /// CPU that a seat can't exceed; none if missing. A side that is held back looks dead to the other one: leave room.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 12), extend("x-kubernetes-validations" = rules::cpu()))]
    pub cpu_limit: Option<String>,
    /// Memory of a seat beyond the guest's: a whole number with Mi, Gi or Ti. If missing, 256Mi and a quarter of the guest's, or more where an engine may hold more (little memory, or several vCPUs with less than 1Gi each); with less its pod may be killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 12), extend("x-kubernetes-validations" = rules::size()))]
    pub memory_overhead: Option<String>,
}

/// What happens to the volumes when the VM is deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VolumePolicy {
    /// They are deleted with it.
    #[default]
    Delete,
    /// The claims stay, without an owner.
    Retain,
}

/// Where a network card is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment<'a> {
    /// To a bridge of the node, by name.
    Bridge(&'a str),
}

/// Where a disk's first contents are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contents {
    /// Zeros.
    Blank,
    /// A file of the guest image or volume, by its path there, and its backing files.
    File(String, Vec<String>),
    /// A file of a claim.
    Claim(ClaimFile),
    /// A file of a web server.
    Http(HttpFile),
}

impl Network {
    /// Where the card is attached; none: an object that the API server's rules would have refused.
    pub fn attachment(&self) -> Option<Attachment<'_>> {
        self.bridge.as_ref().map(|bridge| Attachment::Bridge(&bridge.name))
    }
}

impl Disk {
    /// Storage class of the volume of a seat in this slot; none: the cluster's default.
    pub fn storage_class(&self, slot: u8) -> Option<&str> {
        if self.storage_class_names.is_empty() {
            return self.storage_class_name.as_deref();
        }
        self.storage_class_names.get(usize::from(slot)).map(String::as_str)
    }

    /// Where the first contents are.
    pub fn contents(&self) -> Contents {
        let source = &self.source;
        match (&source.image, &source.claim, &source.http) {
            (Some(file), ..) => {
                let path = file.path.clone();
                let path = path.unwrap_or_else(|| format!("/disk/{}.raw", self.name));
                Contents::File(path, file.backing.clone())
            }
            (None, Some(file), _) => Contents::Claim(file.clone()),
            (None, None, Some(file)) => Contents::Http(file.clone()),
            (None, None, None) => Contents::Blank,
        }
    }
}
