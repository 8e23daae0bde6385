//! How the files of a guest image come into a seat's pod: as an image volume or, where the cluster has none, as a copy.
//!
//! ```text
//!   init container `tools`  our image         /seat install ──────────────────► volume `tools`
//!   init container `guest`  the guest image   /ftvm-tools/seat copy FILES ────► volume `guest` ──► /guest of the seat, read-only
//! ```
//!
//! A guest image has no program that could copy, so it is given one; nothing of its own is run. Init containers ask for no
//! [`RESOURCE_SEAT`], so they get no folder with the daemon's socket: no daemon takes one for the seat.

use std::collections::BTreeMap;

use ftvm_crds::names::{
    INIT_GUEST, INIT_TOOLS, LABEL_MANAGED_BY, MANAGED_BY, PATH_COPY, PATH_GUEST, PATH_TOOLS, RESOURCE_SEAT,
};
use ftvm_crds::quantity::QuantityError;
use ftvm_crds::{Contents, DEFAULT_INITRD, FaultTolerantVM, GuestImage, PullPolicy};
use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, ImageVolumeSource, PersistentVolumeClaimVolumeSource, Pod, PodSpec,
    ResourceRequirements, Volume,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::ObjectMeta;

use super::SeatImage;
use super::pod::{mount, pod_security, pull_policy, resources, security};

/// Volume with the guest's files, however they come there.
pub(super) const VOLUME: &str = "guest";
/// Volume with the program that copies.
const TOOLS: &str = "tools";

/// How the guest image comes into a seat's pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestFiles {
    /// As an image volume.
    Mounted,
    /// Copied by an init container onto the node's disk.
    Copied,
}

fn policy_of(image: &GuestImage) -> String {
    match image.pull_policy {
        PullPolicy::Always => "Always",
        PullPolicy::IfNotPresent => "IfNotPresent",
        PullPolicy::Never => "Never",
    }
    .to_owned()
}

fn empty_folder(name: &str) -> Volume {
    Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    }
}

fn image_volume(reference: &str, pull_policy: Option<String>) -> Volume {
    Volume {
        name: VOLUME.to_owned(),
        image: Some(ImageVolumeSource {
            reference: Some(reference.to_owned()),
            pull_policy,
        }),
        ..Volume::default()
    }
}

/// The volumes that bring the guest's files.
pub(super) fn volumes(vm: &FaultTolerantVM, files: GuestFiles) -> Vec<Volume> {
    let boot = &vm.spec.boot;
    match (&boot.image, files) {
        (Some(image), GuestFiles::Mounted) => vec![image_volume(&image.reference, Some(policy_of(image)))],
        // Without a limit: the copy takes no more than the image does on the same disk, and a pod that passed one would be evicted.
        (Some(_), GuestFiles::Copied) => vec![empty_folder(VOLUME), empty_folder(TOOLS)],
        (None, _) => vec![Volume {
            name: VOLUME.to_owned(),
            persistent_volume_claim: boot.volume.as_ref().map(|volume| PersistentVolumeClaimVolumeSource {
                claim_name: volume.claim_name.clone(),
                read_only: Some(true),
            }),
            ..Volume::default()
        }],
    }
}

/// The containers that copy the guest's files, if there is anything to copy.
pub(super) fn init_containers(
    vm: &FaultTolerantVM,
    image: &SeatImage,
    files: GuestFiles,
    ran: bool,
) -> Result<Option<Vec<Container>>, QuantityError> {
    let (Some(guest), GuestFiles::Copied) = (&vm.spec.boot.image, files) else {
        return Ok(None);
    };
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let own = resources_of_copies(resources(vm)?);
    let tools = Container {
        name: INIT_TOOLS.to_owned(),
        image: Some(image.image.clone()),
        image_pull_policy: pull_policy(image),
        command: Some(words(&["/seat", "install", &format!("{PATH_TOOLS}/seat")])),
        resources: Some(own.clone()),
        security_context: Some(security()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(vec![mount(TOOLS, PATH_TOOLS, false)]),
        ..Container::default()
    };
    let program = format!("{PATH_TOOLS}/seat");
    let mut command = words(&[&program, "copy", "--to", PATH_COPY]);
    command.extend(wanted(vm, ran));
    let copy = Container {
        name: INIT_GUEST.to_owned(),
        image: Some(guest.reference.clone()),
        image_pull_policy: Some(policy_of(guest)),
        command: Some(command),
        // Whatever the image has for it.
        working_dir: Some("/".to_owned()),
        resources: Some(own),
        security_context: Some(security()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(vec![mount(TOOLS, PATH_TOOLS, true), mount(VOLUME, PATH_COPY, false)]),
        ..Container::default()
    };
    Ok(Some(vec![tools, copy]))
}

/// What the seat will ask for, as arguments of `seat copy`. Once the guest `ran` nothing is imported any more. Paths are of plain
/// letters (the API server's rule), so that nothing in them means anything to kubelet.
fn wanted(vm: &FaultTolerantVM, ran: bool) -> Vec<String> {
    let boot = &vm.spec.boot;
    let mut paths = vec![boot.kernel.clone()];
    paths.extend(boot.initrd.clone());
    if !ran {
        paths.extend(vm.spec.disks.iter().flat_map(|disk| match disk.contents() {
            Contents::File(path, backing) => [vec![path], backing].concat(),
            Contents::Blank | Contents::Claim(_) | Contents::Http(_) => Vec::new(),
        }));
    }
    paths.sort();
    paths.dedup();
    if boot.initrd.is_none() {
        paths.extend(["--optional".to_owned(), DEFAULT_INITRD.to_owned()]);
    }
    paths
}

/// As much as the seat's, which runs when they have ended: the pod asks for no more than with an image volume, and is in the same class of
/// quality of service.
fn resources_of_copies(mut resources: ResourceRequirements) -> ResourceRequirements {
    for list in [&mut resources.limits, &mut resources.requests].into_iter().flatten() {
        list.remove(RESOURCE_SEAT);
    }
    resources
}

/// A pod with an image volume that nobody means to make: what the API server would make of it tells whether the cluster has such volumes.
/// It is of a seat's shape, which is all that the operator may make.
pub fn image_volume_probe(image: &SeatImage) -> Pod {
    let memory: BTreeMap<_, _> = [("memory".to_owned(), Quantity("64Mi".to_owned()))].into();
    Pod {
        metadata: ObjectMeta {
            name: Some("ftvm-image-volumes".to_owned()),
            labels: Some([(LABEL_MANAGED_BY.to_owned(), MANAGED_BY.to_owned())].into()),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            containers: vec![Container {
                name: "probe".to_owned(),
                image: Some(image.image.clone()),
                command: Some(vec!["/seat".to_owned()]),
                // A quota of the namespace may want them.
                resources: Some(ResourceRequirements {
                    limits: Some(memory.clone()),
                    requests: Some(memory),
                    claims: None,
                }),
                security_context: Some(security()),
                volume_mounts: Some(vec![mount(VOLUME, PATH_GUEST, true)]),
                ..Container::default()
            }],
            volumes: Some(vec![image_volume(&image.image, None)]),
            restart_policy: Some("Never".to_owned()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod_security()),
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// What such an answer says; none if it is about something else. Whoever injects containers and volumes into pods may have added theirs.
pub fn judge_probe(sent: &Pod, answer: &Pod) -> Option<GuestFiles> {
    let containers = |pod: &Pod| -> Option<Vec<String>> {
        let containers = &pod.spec.as_ref()?.containers;
        Some(containers.iter().map(|container| container.name.clone()).collect())
    };
    let (ours, theirs) = (containers(sent)?, containers(answer)?);
    let same = answer.metadata.name == sent.metadata.name && ours.iter().all(|name| theirs.contains(name));
    let volumes = answer.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    // Without the feature the volume is left out; a version that knows none takes the volume for an empty folder.
    let kept = volumes
        .into_iter()
        .any(|volume| volume.name == VOLUME && volume.image.is_some());
    same.then_some(if kept { GuestFiles::Mounted } else { GuestFiles::Copied })
}
