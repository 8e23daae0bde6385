//! The arbiter's record in a Lease (`docs/kubernetes.md`): the annotation [`ANNOTATION_RECORD`] is the truth, `spec` is for
//! people. The node-daemon swaps it by a PUT of the object as read after [`set_record`].

use ftvm_protocol::identity::{ArbiterUid, SeatId, VmId};
use ftvm_protocol::record::{Phase, Record, Snapshot};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::core::ObjectMeta;

use crate::names::{ANNOTATION_NODES, ANNOTATION_RECORD, LABEL_MANAGED_BY, LABEL_VM, MANAGED_BY, nodes_text};

/// Most bytes of a record's text.
pub const RECORD_BYTES_MAX: usize = 4096;

/// A Lease that can't be used as an arbiter's record. None of these is mended by guessing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// Read from nowhere: an object that the API server gave has a UID.
    #[error("the Lease has no metadata.uid: it was not read from an API server")]
    NoUid,
    /// The UID is none.
    #[error("the Lease's metadata.uid `{0}` is not a UUID: this API server can't be used as an arbiter")]
    Uid(String),
    /// Read from nowhere: an object that the API server gave has a version.
    #[error("the Lease has no metadata.resourceVersion: it was not read from an API server")]
    NoVersion,
    /// The version is no number.
    #[error(
        "the Lease's metadata.resourceVersion `{0}` is not a number below 2^64: this API server can't be used as an arbiter"
    )]
    Version(String),
    /// Not made by the operator for this VM.
    #[error(
        "the Lease is not the operator's: label {label} is `{found}`, `{expected}` expected; rename or remove that Lease, or give the VM another name"
    )]
    Foreign {
        /// Which label.
        label: &'static str,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// Made for another VM of this name.
    #[error(
        "the Lease belongs to another object than this VM ({found}): wait until the deleted VM of this name is gone, or remove that Lease"
    )]
    OtherOwner {
        /// UID of the owner, or `no owner`.
        found: String,
    },
    /// No record in it.
    #[error(
        "the Lease has no annotation ftvm.dev/record: it was edited; put its former value back, or delete the Lease: it is made anew from what the seats know (docs/kubernetes.md, \"Lease\")"
    )]
    NoRecord,
    /// The record's text is too long.
    #[error(
        "the Lease's record has {0} bytes, at most {RECORD_BYTES_MAX} are read: it was edited; put its former value back, or delete the Lease: it is made anew from what the seats know"
    )]
    TooLong(usize),
    /// The record does not decode.
    #[error(
        "the Lease's record is malformed ({0}): it was edited, or written by a later version; put its former value back, or delete the Lease: it is made anew from what the seats know"
    )]
    Malformed(String),
    /// The record contradicts itself.
    #[error(
        "the Lease's record names a holder that is no member: it was edited; put its former value back, or delete the Lease: it is made anew from what the seats know"
    )]
    HolderIsNoMember,
}

/// The record of a VM as it was read.
///
/// # Errors
/// [`LeaseError`] says what is wrong with the Lease. Who the VM is stays the caller's to check: [`check_owner`].
pub fn snapshot(lease: &Lease) -> Result<Snapshot, LeaseError> {
    let uid = lease.metadata.uid.as_deref().ok_or(LeaseError::NoUid)?;
    let uid: ArbiterUid = uid.parse().map_err(|_| LeaseError::Uid(clip(uid)))?;
    let version = lease.metadata.resource_version.as_deref();
    let version = version.filter(|text| !text.is_empty()).ok_or(LeaseError::NoVersion)?;
    let version = parse_version(version).ok_or_else(|| LeaseError::Version(clip(version)))?;
    let annotations = lease.metadata.annotations.as_ref();
    let text = annotations.and_then(|annotations| annotations.get(ANNOTATION_RECORD));
    let text = text.ok_or(LeaseError::NoRecord)?;
    if text.len() > RECORD_BYTES_MAX {
        return Err(LeaseError::TooLong(text.len()));
    }
    let record: Record = crate::from_json_object(text).map_err(LeaseError::Malformed)?;
    if !record.is_sane() {
        return Err(LeaseError::HolderIsNoMember);
    }
    Ok(Snapshot { record, uid, version })
}

/// Is this Lease the one that the operator made for this VM?
///
/// # Errors
/// [`LeaseError::Foreign`] or [`LeaseError::OtherOwner`].
pub fn check_owner(lease: &Lease, vm: &str, vm_id: VmId) -> Result<(), LeaseError> {
    let labels = lease.metadata.labels.as_ref();
    for (label, expected) in [(LABEL_MANAGED_BY, MANAGED_BY), (LABEL_VM, vm)] {
        let found = labels.and_then(|labels| labels.get(label)).map_or("", String::as_str);
        if found != expected {
            return Err(LeaseError::Foreign {
                label,
                found: clip(found),
                expected: expected.to_owned(),
            });
        }
    }
    let owners = lease.metadata.owner_references.as_deref().unwrap_or_default();
    let vm_uid = vm_id.to_string();
    if owners.iter().any(|owner| owner.uid.eq_ignore_ascii_case(&vm_uid)) {
        return Ok(());
    }
    let found = owners
        .first()
        .map_or_else(|| "no owner".to_owned(), |owner| clip(&owner.uid));
    Err(LeaseError::OtherOwner { found })
}

/// A new Lease of a VM with this record. `nodes` is the annotation [`ANNOTATION_NODES`].
pub fn new(namespace: &str, vm: &str, owner: OwnerReference, record: &Record, nodes: String, now: Timestamp) -> Lease {
    let labels = [(LABEL_MANAGED_BY, MANAGED_BY), (LABEL_VM, vm)];
    let mut lease = Lease {
        metadata: ObjectMeta {
            name: Some(vm.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            annotations: Some([(ANNOTATION_NODES.to_owned(), nodes)].into()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: None,
    };
    set_record(&mut lease, record, now);
    lease
}

/// The Lease of a VM that never ran: this seat has the original disks.
pub fn genesis(namespace: &str, vm: &str, owner: OwnerReference, seat: SeatId, node: &str, now: Timestamp) -> Lease {
    let record = Record::genesis(seat, Phase::Running);
    new(namespace, vm, owner, &record, nodes_text([node]), now)
}

/// Puts a record into a Lease that was read; identity, version and everything else stay.
pub fn set_record(lease: &mut Lease, record: &Record, now: Timestamp) {
    // Plain data with text keys always encodes.
    let text = serde_json::to_string(record).unwrap_or_default();
    let annotations = lease.metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_RECORD.to_owned(), text);
    let spec = lease.spec.get_or_insert_default();
    spec.holder_identity = Some(record.holder.to_string());
    spec.lease_transitions = Some((record.term & 0x7fff_ffff) as i32);
    spec.renew_time = Some(MicroTime(now));
}

/// The one spelling of a number: no sign, no leading zero, so that equal versions have equal texts.
fn parse_version(text: &str) -> Option<u64> {
    let version: u64 = text.parse().ok()?;
    (version.to_string() == text).then_some(version)
}

fn clip(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
