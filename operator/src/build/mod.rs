//! The objects of a VM: pure functions of its spec and book.

mod guest;
mod identity;
mod pod;
mod shared;

use std::collections::BTreeMap;

use ftvm_crds::names::{LABEL_MANAGED_BY, LABEL_SEAT, LABEL_VM, MANAGED_BY, claim_name};
use ftvm_crds::quantity::{self, QuantityError};
use ftvm_crds::{FaultTolerantVM, SeatEntry};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};

pub use guest::{GuestFiles, image_volume_probe, judge_probe};
pub use identity::{Authority, IdentityError, authority, identity_secret, secret_of_authority};
pub use pod::pod;
pub use shared::{budget, network_policy};

/// How seats' pods are made, from the operator's command line.
#[derive(Debug, Clone, Default)]
pub struct SeatImage {
    /// The image with the seat program.
    pub image: String,
    /// When nodes pull it.
    pub pull_policy: String,
    /// Names of Secrets with the registry's passwords.
    pub pull_secrets: Vec<String>,
}

/// Beside a disk's own bytes: file system, header.
const CLAIM_EXTRA_BYTES: u64 = 64 << 20;
/// In the first disk's volume: the redo journal.
const JOURNAL_BYTES: u64 = 64 << 20;

/// Reference to the VM as the controller of an object.
pub fn owner(vm: &FaultTolerantVM) -> Option<OwnerReference> {
    vm.controller_owner_ref(&())
}

/// Labels of everything that belongs to a VM.
pub fn labels(vm: &FaultTolerantVM) -> BTreeMap<String, String> {
    [
        (LABEL_MANAGED_BY.to_owned(), MANAGED_BY.to_owned()),
        (LABEL_VM.to_owned(), vm.name_any()),
    ]
    .into()
}

/// Labels of everything that belongs to a seat.
pub fn seat_labels(vm: &FaultTolerantVM, seat: &str) -> BTreeMap<String, String> {
    let mut labels = labels(vm);
    labels.insert(LABEL_SEAT.to_owned(), seat.to_owned());
    labels
}

fn metadata(vm: &FaultTolerantVM, name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: vm.namespace(),
        labels: Some(labels(vm)),
        owner_references: owner(vm).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}

/// Claim of one disk of a seat. Without an owner: what becomes of it is the VM's `volumePolicy`.
///
/// # Errors
/// If the disk's size is none, which the API server's rules prevent.
pub fn claim(vm: &FaultTolerantVM, entry: &SeatEntry, disk: usize) -> Result<PersistentVolumeClaim, QuantityError> {
    let Some(disk_spec) = vm.spec.disks.get(disk) else {
        return Err(QuantityError {
            text: format!("disk {disk}"),
        });
    };
    let size_bytes = quantity::bytes(&disk_spec.size)?;
    let journal_bytes = if disk == 0 { JOURNAL_BYTES } else { 0 };
    // A file system takes a share of its device.
    let whole_bytes = size_bytes + size_bytes / 32 + CLAIM_EXTRA_BYTES + journal_bytes;
    let request = Quantity(quantity::text(whole_bytes));
    Ok(PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(claim_name(&entry.name, &disk_spec.name)),
            namespace: vm.namespace(),
            labels: Some(seat_labels(vm, &entry.name)),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            storage_class_name: disk_spec.storage_class(entry.slot).map(str::to_owned),
            volume_mode: Some("Filesystem".to_owned()),
            resources: Some(VolumeResourceRequirements {
                requests: Some([("storage".to_owned(), request)].into()),
                limits: None,
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    })
}

#[cfg(test)]
mod tests;
