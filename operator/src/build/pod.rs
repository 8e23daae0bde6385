//! The pod of a seat.

use std::collections::{BTreeMap, BTreeSet};

use ftvm_crds::names::{
    CONTAINER, LABEL_CPU, LABEL_HOSTNAME, LABEL_VM, PATH_DISKS, PATH_GUEST, PATH_IDENTITY, PATH_SOURCES, PATH_STAGING,
    PORT_LINK, RESOURCE_SEAT, claim_name, identity_secret_name,
};
use ftvm_crds::quantity::{self, QuantityError};
use ftvm_crds::{ClaimFile, Contents, FaultTolerantVM, SeatEntry};
use ftvm_protocol::room;
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, Container, ContainerPort, EmptyDirVolumeSource, ExecAction, LocalObjectReference,
    NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PersistentVolumeClaimVolumeSource, Pod,
    PodAffinityTerm, PodAntiAffinity, PodSecurityContext, PodSpec, PreferredSchedulingTerm, Probe,
    ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, Toleration, Volume, VolumeMount,
    WeightedPodAffinityTerm,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt;
use kube::api::ObjectMeta;

use super::guest::{self, GuestFiles};
use super::shared::urls;
use super::{SeatImage, owner, seat_labels};

/// User and group of the seat program, as in the image.
const USER: i64 = 65532;
/// Time for a hand-over at the end of a pod.
const GRACE_SECONDS: i64 = 60;
/// Beside the guest's memory: this and a quarter of it, or what an engine may hold if that is more.
const OVERHEAD_MIN_BYTES: u64 = 256 << 20;
/// Label of nodes that says in which zone they are (Kubernetes, "Well-Known Labels").
const ZONE: &str = "topology.kubernetes.io/zone";

/// The pod of a seat. Its claims exist; its identity is made for its UID. Where a CPU was chosen, `unfit` has the values of the
/// label of nodes that can't give it. `files` is how the guest image comes into it. Once the guest `ran`, nothing is imported any more.
///
/// # Errors
/// If the VM's memory is no size, which the API server's rules prevent.
pub fn pod(
    vm: &FaultTolerantVM,
    entry: &SeatEntry,
    image: &SeatImage,
    files: GuestFiles,
    unfit: Option<&BTreeSet<String>>,
    ran: bool,
) -> Result<Pod, QuantityError> {
    let placement = &vm.spec.placement;
    let wishes = placement.seats.get(usize::from(entry.slot));
    let selector = wishes
        .map(|seat| seat.node_selector.clone())
        .filter(|labels| !labels.is_empty());
    let guest_secret = vm.spec.boot.image.iter().filter_map(|image| image.pull_secret.clone());
    let secrets: Vec<_> = image.pull_secrets.iter().cloned().chain(guest_secret).collect();
    Ok(Pod {
        metadata: ObjectMeta {
            name: Some(entry.name.clone()),
            namespace: vm.namespace(),
            labels: Some(seat_labels(vm, &entry.name)),
            owner_references: owner(vm).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            init_containers: guest::init_containers(vm, image, files, ran)?,
            containers: vec![container(vm, image, ran)?],
            volumes: Some(volumes(vm, entry, files, ran)),
            restart_policy: Some("Always".to_owned()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            termination_grace_period_seconds: Some(GRACE_SECONDS),
            node_selector: selector,
            affinity: Some(Affinity {
                node_affinity: node_affinity(vm, entry, unfit),
                ..apart(vm)
            }),
            tolerations: Some(tolerations(vm)),
            priority_class_name: placement.priority_class_name.clone(),
            image_pull_secrets: (!secrets.is_empty())
                .then(|| secrets.into_iter().map(|name| LocalObjectReference { name }).collect()),
            security_context: Some(pod_security()),
            ..PodSpec::default()
        }),
        status: None,
    })
}

/// What Pod Security calls restricted, of a pod.
pub(super) fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        fs_group_change_policy: Some("OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".to_owned(),
            localhost_profile: None,
        }),
        ..PodSecurityContext::default()
    }
}

/// The same of each of its containers.
pub(super) fn security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        privileged: Some(false),
        read_only_root_filesystem: Some(true),
        run_as_non_root: Some(true),
        capabilities: Some(Capabilities {
            add: None,
            drop: Some(vec!["ALL".to_owned()]),
        }),
        ..SecurityContext::default()
    }
}

/// When nodes pull the seat's image; none: as Kubernetes does by itself.
pub(super) fn pull_policy(image: &SeatImage) -> Option<String> {
    Some(image.pull_policy.clone()).filter(|policy| !policy.is_empty())
}

/// A volume in a container.
pub(super) fn mount(name: impl Into<String>, path: impl Into<String>, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

/// Between two looks at a seat's readiness, in seconds. A role changes no sooner than a silent side is taken for dead, and a look starts a
/// program on the node: where that takes long, so does the detection that the VM asks for.
fn probe_period_s(vm: &FaultTolerantVM) -> i32 {
    (vm.spec.fault_tolerance.detection_ms / 1000).clamp(2, 10).cast_signed()
}

fn container(vm: &FaultTolerantVM, image: &SeatImage, ran: bool) -> Result<Container, QuantityError> {
    let disks = vm.spec.disks.iter();
    let mut mounts: Vec<_> = disks
        .map(|disk| {
            mount(
                format!("disk-{}", disk.name),
                format!("{PATH_DISKS}/{}", disk.name),
                false,
            )
        })
        .collect();
    if !ran {
        let sources = claims_of_sources(vm);
        mounts.extend(sources.map(|(disk, _)| mount(format!("source-{disk}"), format!("{PATH_SOURCES}/{disk}"), true)));
        if downloads(vm) {
            mounts.push(mount("staging", PATH_STAGING, false));
        }
    }
    mounts.push(mount(guest::VOLUME, PATH_GUEST, true));
    mounts.push(mount("identity", PATH_IDENTITY, true));
    Ok(Container {
        name: CONTAINER.to_owned(),
        image: Some(image.image.clone()),
        image_pull_policy: pull_policy(image),
        command: Some(vec!["/seat".to_owned()]),
        ports: Some(vec![ContainerPort {
            name: Some("link".to_owned()),
            container_port: PORT_LINK.into(),
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        readiness_probe: Some(Probe {
            exec: Some(ExecAction {
                command: Some(vec!["/seat".to_owned(), "ready".to_owned()]),
            }),
            period_seconds: Some(probe_period_s(vm)),
            timeout_seconds: Some(probe_period_s(vm)),
            failure_threshold: Some(2),
            ..Probe::default()
        }),
        resources: Some(resources(vm)?),
        security_context: Some(security()),
        volume_mounts: Some(mounts),
        ..Container::default()
    })
}

/// What a pod has beside the guest's memory, in bytes: if its engine holds more it is killed, whatever side it is of.
fn overhead_bytes(vm: &FaultTolerantVM, guest_bytes: u64) -> Result<u64, QuantityError> {
    let spec = &vm.spec;
    let mut disk_bytes = 0_u64;
    for disk in &spec.disks {
        disk_bytes = disk_bytes.saturating_add(quantity::bytes(&disk.size)?);
    }
    let machine = room::Machine {
        ram_bytes: guest_bytes,
        vcpus: spec.machine.vcpus,
        disks: spec.disks.len(),
        disk_bytes,
        nics: spec.networks.len(),
    };
    Ok(machine.engine_bytes().max(OVERHEAD_MIN_BYTES + guest_bytes / 4))
}

/// Memory in full on both sides. CPU is limited only if the user says so: a side that is held back looks dead to the other.
pub(super) fn resources(vm: &FaultTolerantVM) -> Result<ResourceRequirements, QuantityError> {
    let wishes = &vm.spec.resources;
    let guest_bytes = quantity::bytes(&vm.spec.machine.memory)?;
    let overhead_bytes = match &wishes.memory_overhead {
        Some(text) => quantity::bytes(text)?,
        None => overhead_bytes(vm, guest_bytes)?,
    };
    let memory = Quantity(quantity::text(guest_bytes + overhead_bytes));
    let request = wishes
        .cpu_request
        .clone()
        .unwrap_or_else(|| vm.spec.machine.vcpus.to_string());
    let mut limits: BTreeMap<String, Quantity> = [
        ("memory".to_owned(), memory),
        (RESOURCE_SEAT.to_owned(), Quantity("1".to_owned())),
    ]
    .into();
    let mut requests = limits.clone();
    requests.insert("cpu".to_owned(), Quantity(request));
    if let Some(limit) = &wishes.cpu_limit {
        limits.insert("cpu".to_owned(), Quantity(limit.clone()));
    }
    Ok(ResourceRequirements {
        limits: Some(limits),
        requests: Some(requests),
        claims: None,
    })
}

/// Disks whose first contents are in a claim.
fn claims_of_sources(vm: &FaultTolerantVM) -> impl Iterator<Item = (&str, ClaimFile)> {
    vm.spec.disks.iter().filter_map(|disk| match disk.contents() {
        Contents::Claim(file) => Some((disk.name.as_str(), file)),
        Contents::Blank | Contents::File(..) | Contents::Http(_) => None,
    })
}

/// Whether first contents are downloaded.
fn downloads(vm: &FaultTolerantVM) -> bool {
    urls(vm).next().is_some()
}

fn volumes_of_sources(vm: &FaultTolerantVM) -> Vec<Volume> {
    let claims = claims_of_sources(vm).map(|(disk, file)| Volume {
        name: format!("source-{disk}"),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: file.claim_name,
            read_only: Some(true),
        }),
        ..Volume::default()
    });
    let staging = downloads(vm).then(|| Volume {
        name: "staging".to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    });
    claims.chain(staging).collect()
}

fn volumes(vm: &FaultTolerantVM, entry: &SeatEntry, files: GuestFiles, ran: bool) -> Vec<Volume> {
    let disks = vm.spec.disks.iter();
    let mut volumes: Vec<_> = disks
        .map(|disk| Volume {
            name: format!("disk-{}", disk.name),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(&entry.name, &disk.name),
                read_only: None,
            }),
            ..Volume::default()
        })
        .collect();
    if !ran {
        volumes.extend(volumes_of_sources(vm));
    }
    volumes.extend(guest::volumes(vm, files));
    volumes.push(Volume {
        name: "identity".to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(identity_secret_name(&entry.name)),
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    });
    volumes
}

/// The seats of a VM never share a node, nor what may fail together, and no zone either, if another one has room: not so strictly that they
/// would wait for it. The greatest weight outweighs how full nodes are. (A rule about a label says nothing of nodes that lack it.)
fn apart(vm: &FaultTolerantVM) -> Affinity {
    let term = |key: &str| PodAffinityTerm {
        label_selector: Some(LabelSelector {
            match_labels: Some([(LABEL_VM.to_owned(), vm.name_any())].into()),
            match_expressions: None,
        }),
        topology_key: key.to_owned(),
        ..PodAffinityTerm::default()
    };
    let key = vm.spec.placement.topology_key.as_str();
    let mut keys = vec![LABEL_HOSTNAME];
    if key != LABEL_HOSTNAME {
        keys.push(key);
    }
    let zones = (key != ZONE).then(|| WeightedPodAffinityTerm {
        weight: 100,
        pod_affinity_term: term(ZONE),
    });
    Affinity {
        pod_anti_affinity: Some(PodAntiAffinity {
            required_during_scheduling_ignored_during_execution: Some(keys.into_iter().map(term).collect()),
            preferred_during_scheduling_ignored_during_execution: zones.map(|zones| vec![zones]),
        }),
        ..Affinity::default()
    }
}

/// Where the seat's pods may be and better were.
fn node_affinity(vm: &FaultTolerantVM, entry: &SeatEntry, unfit: Option<&BTreeSet<String>>) -> Option<NodeAffinity> {
    // Only the daemon of its node can say what became of a pod that did not end in order.
    let open = entry.former.iter().rfind(|former| !former.ended);
    let there = open.and_then(|former| former.node.clone());
    // Less than what keeps seats in different zones.
    let there = there.map(|node| preferred(50, "In", std::slice::from_ref(&node)));
    let failed_on = vm.status.as_ref().map_or(&[][..], |status| &status.storage_failed_on);
    // As much as that: what comes from there does not last.
    let elsewhere = (!failed_on.is_empty()).then(|| preferred(100, "NotIn", failed_on));
    let preferred: Vec<_> = there.into_iter().chain(elsewhere).collect();
    let required = required(vm, unfit);
    (!preferred.is_empty() || required.is_some()).then(|| NodeAffinity {
        required_during_scheduling_ignored_during_execution: required,
        preferred_during_scheduling_ignored_during_execution: (!preferred.is_empty()).then_some(preferred),
    })
}

/// A node that is one of these, or none of them: each requirement takes one name.
fn preferred(weight: i32, operator: &str, nodes: &[String]) -> PreferredSchedulingTerm {
    let is = |node: &String| NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: operator.to_owned(),
        values: Some(vec![node.clone()]),
    };
    PreferredSchedulingTerm {
        weight,
        preference: NodeSelectorTerm {
            match_expressions: None,
            match_fields: Some(nodes.iter().map(is).collect()),
        },
    }
}

/// On nodes that say what they may fail together with: of one that does not, nobody knows whether the other seat is far enough from it. And on
/// nodes that have published their CPU, but for those that are known not to have what the guest needs. So a node that comes later
/// is tried; its engine says what it lacks.
fn required(vm: &FaultTolerantVM, unfit: Option<&BTreeSet<String>>) -> Option<NodeSelector> {
    let requirement = |key: &str, operator: &str, values: Option<Vec<String>>| NodeSelectorRequirement {
        key: key.to_owned(),
        operator: operator.to_owned(),
        values,
    };
    let mut expressions = Vec::new();
    let key = vm.spec.placement.topology_key.as_str();
    // Every node has a name.
    if key != LABEL_HOSTNAME {
        expressions.push(requirement(key, "Exists", None));
    }
    if let Some(unfit) = unfit {
        expressions.push(requirement(LABEL_CPU, "Exists", None));
        if !unfit.is_empty() {
            let values = unfit.iter().cloned().collect();
            expressions.push(requirement(LABEL_CPU, "NotIn", Some(values)));
        }
    }
    (!expressions.is_empty()).then(|| NodeSelector {
        node_selector_terms: vec![NodeSelectorTerm {
            match_expressions: Some(expressions),
            match_fields: None,
        }],
    })
}

/// The arbiter decides what a lost node means, not a timer on a taint.
fn tolerations(vm: &FaultTolerantVM) -> Vec<Toleration> {
    let taints = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
    let own = taints.map(|key| Toleration {
        key: Some(key.to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        ..Toleration::default()
    });
    own.into_iter()
        .chain(vm.spec.placement.tolerations.iter().cloned())
        .collect()
}
