//! What is left out of the objects that the operator keeps in memory: everything that no decision reads.
//!
//! A pod's specification, a node's images and the field managers of everything are most of what the API server tells. What is read past
//! the caches comes whole, so [`crate::observe`] must make the same of both: its test takes whole objects and trimmed ones.

use ftvm_crds::FaultTolerantVM;
use ftvm_crds::names::{
    ANNOTATION_CPU, ANNOTATION_LOOK, ANNOTATION_NETWORKS, ANNOTATION_REQUEST, ANNOTATION_SEAT_STATUS, RESOURCE_SEAT,
};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateTerminated, ContainerStatus, Node, NodeCondition, NodeSpec, NodeStatus,
    NodeSystemInfo, PersistentVolumeClaim, PersistentVolumeClaimStatus, Pod, PodCondition, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::observe::HAS_SANDBOX;

/// Written by `kubectl apply`: the whole object once more.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Leaves these annotations alone.
fn keep_annotations(metadata: &mut ObjectMeta, kept: &[&str]) {
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|name, _| kept.contains(&name.as_str()));
    }
}

/// A VM is written back as it was read (its status, or its finalizers in a patch), so all that is its own stays.
pub fn vm(vm: &mut FaultTolerantVM) {
    vm.metadata.managed_fields = None;
    if let Some(annotations) = &mut vm.metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
}

/// A Lease: the record is all that it has.
pub fn lease(lease: &mut Lease) {
    lease.metadata.managed_fields = None;
}

/// A pod of a seat.
pub fn pod(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    let read = [ANNOTATION_SEAT_STATUS, ANNOTATION_REQUEST, ANNOTATION_LOOK];
    keep_annotations(&mut pod.metadata, &read);
    pod.spec = pod.spec.take().map(|spec| PodSpec {
        node_name: spec.node_name,
        ..PodSpec::default()
    });
    pod.status = pod.status.take().map(pod_status);
}

fn pod_status(status: PodStatus) -> PodStatus {
    let conditions = status.conditions.into_iter().flatten();
    let read = ["PodScheduled", HAS_SANDBOX, "Ready"];
    let conditions = conditions.filter(|condition| read.contains(&condition.type_.as_str()));
    let conditions = conditions.map(|condition| PodCondition {
        type_: condition.type_,
        status: condition.status,
        message: condition.message,
        ..PodCondition::default()
    });
    let first = status.container_statuses.into_iter().flatten().next();
    let first = first.map(|container| ContainerStatus {
        restart_count: container.restart_count,
        state: container.state.map(|state| ContainerState {
            running: state.running,
            waiting: state.waiting,
            ..ContainerState::default()
        }),
        ..ContainerStatus::default()
    });
    let inits = status
        .init_container_statuses
        .map(|inits| inits.into_iter().filter_map(init).collect());
    PodStatus {
        phase: status.phase,
        reason: status.reason,
        message: status.message,
        pod_ip: status.pod_ip,
        host_ip: status.host_ip,
        conditions: Some(conditions.collect()),
        container_statuses: first.map(|first| vec![first]),
        init_container_statuses: inits,
        ..PodStatus::default()
    }
}

/// An init container that has not ended well.
fn init(container: ContainerStatus) -> Option<ContainerStatus> {
    let ended = |state: Option<ContainerState>| {
        let ended = state?.terminated?;
        Some(ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: ended.exit_code,
                message: ended.message,
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        })
    };
    let waiting = container.state.as_ref().and_then(|state| state.waiting.clone());
    let state = ContainerState {
        waiting,
        ..ended(container.state).unwrap_or_default()
    };
    let done = state.terminated.as_ref().is_some_and(|ended| ended.exit_code == 0);
    (!done).then(|| ContainerStatus {
        name: container.name,
        state: Some(state),
        last_state: ended(container.last_state),
        ..ContainerStatus::default()
    })
}

/// A claim of a seat.
pub fn claim(claim: &mut PersistentVolumeClaim) {
    claim.metadata.managed_fields = None;
    claim.metadata.annotations = None;
    claim.spec = None;
    claim.status = claim.status.take().map(|status| PersistentVolumeClaimStatus {
        phase: status.phase,
        ..PersistentVolumeClaimStatus::default()
    });
}

/// A node.
pub fn node(node: &mut Node) {
    node.metadata.managed_fields = None;
    keep_annotations(&mut node.metadata, &[ANNOTATION_CPU, ANNOTATION_NETWORKS]);
    node.spec = node.spec.take().map(|spec| NodeSpec {
        taints: spec.taints,
        unschedulable: spec.unschedulable,
        ..NodeSpec::default()
    });
    node.status = node.status.take().map(|mut status| {
        for resources in [&mut status.allocatable, &mut status.capacity].into_iter().flatten() {
            resources.retain(|name, _| name == RESOURCE_SEAT);
        }
        let conditions = status.conditions.into_iter().flatten();
        let ready = conditions.filter(|condition| condition.type_ == "Ready");
        let ready = ready.map(|condition| NodeCondition {
            type_: condition.type_,
            status: condition.status,
            ..NodeCondition::default()
        });
        NodeStatus {
            allocatable: status.allocatable,
            capacity: status.capacity,
            conditions: Some(ready.collect()),
            node_info: status.node_info.map(|info| NodeSystemInfo {
                system_uuid: info.system_uuid,
                boot_id: info.boot_id,
                ..NodeSystemInfo::default()
            }),
            ..NodeStatus::default()
        }
    });
}

#[cfg(test)]
mod tests {
    use ftvm_crds::names::{LABEL_SEAT, LABEL_VM};
    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;
    use crate::observe;

    fn metadata(name: &str) -> Value {
        json!({
            "name": name, "namespace": "shop", "uid": "0000abcd-0000-4000-8000-000000000001", "resourceVersion": "77",
            "creationTimestamp": "2026-01-02T03:04:05Z", "deletionTimestamp": "2026-01-02T03:04:06Z",
            "finalizers": ["example.com/keep"],
            "labels": {LABEL_VM: "web", LABEL_SEAT: name, "zone": "a"},
            "annotations": {
                "example.com/long": "x".repeat(4000),
                LAST_APPLIED: "y".repeat(4000),
                ANNOTATION_SEAT_STATUS: json!({"role": "active", "protected": true, "term": 7, "why": "protected", "code": 3}).to_string(),
                ANNOTATION_REQUEST: json!({"id": "stop-1", "do": "stop"}).to_string(),
                ANNOTATION_LOOK: "0123456789abcdef",
                ANNOTATION_CPU: "anything",
                ANNOTATION_NETWORKS: "{}",
            },
            "ownerReferences": [{"apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM", "name": "web", "uid": "0000abcd-0000-4000-8000-0000000000ff", "controller": true}],
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsType": "FieldsV1", "fieldsV1": {"f:status": {"f:conditions": {}}}}],
        })
    }

    /// The whole object, and what the operator keeps of it.
    fn both<K: Serialize + DeserializeOwned + Clone>(object: Value, trim: fn(&mut K)) -> (K, K) {
        let whole: K = serde_json::from_value(object).unwrap();
        let mut trimmed = whole.clone();
        trim(&mut trimmed);
        let bytes = |object: &K| serde_json::to_vec(object).unwrap().len();
        assert!(
            bytes(&trimmed) * 2 < bytes(&whole),
            "{} of {}",
            bytes(&trimmed),
            bytes(&whole)
        );
        (whole, trimmed)
    }

    fn vm_of_pods() -> FaultTolerantVM {
        let mut vm: FaultTolerantVM = serde_json::from_value(json!({
            "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM", "metadata": metadata("web"),
            "spec": {"machine": {"memory": "64Mi"}, "boot": {"image": {"reference": "a"}}, "disks": [{"name": "root", "size": "1Gi"}]},
            "status": {"phase": "Running", "seats": []},
        }))
        .unwrap();
        vm.metadata.uid = Some("0000abcd-0000-4000-8000-0000000000ff".to_owned());
        vm
    }

    #[test]
    fn a_pod_looks_the_same() {
        let state = |kind: &str| json!({kind: {"reason": "ErrImagePull", "message": "no such image"}});
        let running = json!({"running": {"startedAt": "2026-01-02T03:04:05Z"}});
        for (phase, restarts, state) in [
            ("Pending", 0, state("waiting")),
            ("Running", 0, running.clone()),
            ("Running", 3, running),
            ("Failed", 3, json!({"terminated": {"exitCode": 1}})),
        ] {
            let object = json!({
                "metadata": metadata("web-x"),
                "spec": {
                    "nodeName": "n1", "serviceAccountName": "none",
                    "containers": [{"name": "seat", "image": "z".repeat(500), "volumeMounts": [{"name": "a", "mountPath": "/a"}]}],
                },
                "status": {
                    "phase": phase, "reason": "Evicted", "message": "the node was low", "podIP": "10.0.0.1", "hostIP": "10.1.0.1", "qosClass": "Guaranteed",
                    "conditions": [
                        {"type": "PodReadyToStartContainers", "status": "False"},
                        {"type": "Initialized", "status": "True"},
                        {"type": "PodScheduled", "status": "False", "message": "0/3 nodes", "reason": "Unschedulable"},
                        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-02T03:04:05Z"},
                    ],
                    "containerStatuses": [{"name": "seat", "image": "z", "imageID": "q".repeat(300), "ready": true, "restartCount": restarts, "state": state}],
                },
            });
            let (whole, trimmed) = both(object, pod);
            let vm = vm_of_pods();
            let (name, seen) = observe::pod(&vm, &whole).expect("its pod");
            let (name_trimmed, seen_trimmed) = observe::pod(&vm, &trimmed).expect("its pod");
            assert_eq!((name, format!("{seen:?}")), (name_trimmed, format!("{seen_trimmed:?}")));
            assert_eq!(seen.first_start.is_some(), phase == "Running" && restarts == 0);
            assert!(
                seen.request.is_some()
                    && seen.look.is_some()
                    && seen.published.is_ok_and(|published| published.term == 7)
            );
        }
    }

    /// What keeps an init container from its end is seen of whole pods and of trimmed ones, and nothing of those that have ended well.
    #[test]
    fn init_containers_look_the_same() {
        let turn = json!({"waiting": {"reason": "PodInitializing"}});
        let done = json!({"terminated": {"exitCode": 0, "reason": "Completed"}});
        let unknown = json!({"waiting": {"reason": "ErrImagePull", "message": "no such image"}});
        let again = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}});
        let broken = json!({"waiting": {"reason": "CreateContainerError", "message": "not a directory"}});
        let said = "seat: copies /disk/root.raw: 1 of 2 MiB\nseat: no room\n\n";
        let failed = json!({"terminated": {"exitCode": 30, "reason": "Error", "message": said, "startedAt": "2026-01-02T03:04:05Z"}});
        let pull = Some(("ErrImagePull", "no such image"));
        let no_room = Some("init container guest: seat: no room (code 30)");
        let of_it = Some("init container guest: CreateContainerError: not a directory");
        for (tools, guest, last, waiting, unprepared) in [
            (&unknown, &turn, json!({}), pull, None),
            (&done, &unknown, json!({}), pull, None),
            (
                &done,
                &again,
                failed.clone(),
                Some(("CrashLoopBackOff", "back-off 10s")),
                no_room,
            ),
            (&done, &failed, json!({}), None, no_room),
            // The next attempt, and one that came to its end.
            (&done, &json!({"running": {}}), failed.clone(), None, no_room),
            (&done, &done, failed.clone(), None, None),
            (
                &done,
                &broken,
                json!({}),
                Some(("CreateContainerError", "not a directory")),
                of_it,
            ),
        ] {
            let status = |name: &str, state: &Value, last: &Value| json!({"name": name, "image": "z".repeat(200), "imageID": "q".repeat(300), "ready": false, "restartCount": 1, "state": state, "lastState": last});
            let object = json!({
                "metadata": metadata("web-x"),
                "status": {
                    "phase": "Pending",
                    "containerStatuses": [status("seat", &turn, &json!({}))],
                    "initContainerStatuses": [status("tools", tools, &json!({})), status("guest", guest, &last)],
                },
            });
            let (whole, trimmed) = both(object, pod);
            let vm = vm_of_pods();
            let (_, seen) = observe::pod(&vm, &whole).expect("its pod");
            let (_, seen_trimmed) = observe::pod(&vm, &trimmed).expect("its pod");
            assert_eq!(format!("{seen:?}"), format!("{seen_trimmed:?}"));
            let waits = seen
                .waiting
                .as_ref()
                .map(|(reason, message)| (reason.as_str(), message.as_str()));
            assert_eq!((waits, seen.unprepared.as_deref()), (waiting, unprepared));
        }
    }

    #[test]
    fn a_claim_looks_the_same() {
        let object = json!({
            "metadata": metadata("web-x"),
            "spec": {"accessModes": ["ReadWriteOnce"], "volumeName": "v".repeat(100), "resources": {"requests": {"storage": "1Gi"}}},
            "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"]},
        });
        let (whole, trimmed) = both(object, claim);
        let seen = observe::claim(&whole).expect("a seat's");
        assert!(seen.1.bound && seen.1.deleting);
        assert_eq!(Some(seen), observe::claim(&trimmed));
    }

    #[test]
    fn a_node_looks_the_same() {
        let resources = json!({"cpu": "8", "memory": "64Gi", RESOURCE_SEAT: "12"});
        let object = json!({
            "metadata": metadata("n1"),
            "spec": {"unschedulable": true, "podCIDR": "10.0.0.0/24", "taints": [{"key": "a", "effect": "NoSchedule"}]},
            "status": {
                "allocatable": resources, "capacity": resources,
                "conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": "True"}],
                "images": [{"names": ["i".repeat(2000)], "sizeBytes": 1}],
                "nodeInfo": {"architecture": "amd64", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "", "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "operatingSystem": "linux", "osImage": "", "systemUUID": ""},
            },
        });
        let (whole, trimmed) = both(object, node);
        let seen = observe::node(&whole);
        assert!(seen.1.ready && !seen.1.schedulable && seen.1.seats == 12 && seen.1.seats_in_all == 12);
        assert!(
            seen.1.cpu.is_some()
                && seen.1.networks.is_some()
                && seen.1.labels.contains_key("zone")
                && seen.1.taints.len() == 1
        );
        assert_eq!(seen, observe::node(&trimmed));
    }

    /// Of a VM nothing goes but what the API server adds, and what `kubectl apply` keeps for itself.
    #[test]
    fn a_vm_is_whole_but_for_its_field_managers() {
        let whole = vm_of_pods();
        let mut trimmed = whole.clone();
        vm(&mut trimmed);
        assert_eq!((&trimmed.spec, &trimmed.status), (&whole.spec, &whole.status));
        assert_eq!(trimmed.metadata.managed_fields, None);
        let annotations = trimmed.metadata.annotations.unwrap();
        assert!(!annotations.contains_key(LAST_APPLIED) && annotations.contains_key("example.com/long"));
        assert_eq!(trimmed.metadata.finalizers, whole.metadata.finalizers);
        assert_eq!(trimmed.metadata.resource_version, whole.metadata.resource_version);
    }
}
