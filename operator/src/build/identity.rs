//! Certificates: one authority a VM, one identity a pod.
//!
//! They do not expire: a clock that is wrong must not end a protected pair. A seat that is replaced has another UID, and the
//! name in a certificate is the UID's.

use std::collections::BTreeMap;

use ftvm_crds::names::{
    FILE_AUTHORITY, FILE_CERTIFICATE, FILE_KEY, FILE_SEAT, authority_secret_name, identity_secret_name,
};
use ftvm_crds::{FaultTolerantVM, SeatEntry};
use ftvm_protocol::identity::{SeatId, SeatIdentity, VmId, identity_name};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;
use kube::api::ObjectMeta;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::{metadata, seat_labels};

/// Errors of making identities.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A certificate could not be made.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The authority's Secret is not one.
    #[error(
        "Secret {name} has no usable {key}: restore it from a backup; or delete it, set spec.runStrategy to Halted, wait until the VM is halted, and start it: a new one is made then"
    )]
    Authority {
        /// Its name.
        name: String,
        /// Which part.
        key: &'static str,
    },
    /// The VM or pod has no UID.
    #[error("`{0}` is no UID: the object was not read from an API server")]
    Uid(String),
}

/// A VM's certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    pub certificate_pem: String,
    /// Its private key.
    pub key_pem: String,
}

fn vm_id(vm: &FaultTolerantVM) -> Result<VmId, IdentityError> {
    let uid = vm.uid().unwrap_or_default();
    uid.parse().map_err(|_| IdentityError::Uid(uid))
}

/// The authority of a VM: a new one, or the one in its Secret. Its parameters follow from its name and key.
///
/// # Errors
/// If the Secret is none, or a key can't be made.
pub fn authority(vm: &FaultTolerantVM, secret: Option<&Secret>) -> Result<Authority, IdentityError> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name = name(&format!("authority of {} {}", vm.name_any(), vm_id(vm)?));
    let (key, certificate_pem) = match secret {
        None => {
            let key = KeyPair::generate()?;
            let certificate = params.self_signed(&key)?.pem();
            (key, certificate)
        }
        Some(secret) => {
            let unusable = |key: &'static str| IdentityError::Authority {
                name: secret.name_any(),
                key,
            };
            let part = |key: &'static str| {
                let bytes = secret.data.as_ref().and_then(|data| data.get(key));
                let text = bytes.and_then(|bytes| String::from_utf8(bytes.0.clone()).ok());
                text.ok_or_else(|| unusable(key))
            };
            let key = KeyPair::from_pem(&part("tls.key")?).map_err(|_| unusable("tls.key"))?;
            (key, part("tls.crt")?)
        }
    };
    Ok(Authority {
        certificate_pem,
        key_pem: key.serialize_pem(),
        issuer: Issuer::new(params, key),
    })
}

/// The Secret that keeps an authority. It is never mounted anywhere.
pub fn secret_of_authority(vm: &FaultTolerantVM, authority: &Authority) -> Secret {
    let data = [
        ("tls.crt", authority.certificate_pem.clone()),
        ("tls.key", authority.key_pem.clone()),
    ];
    Secret {
        metadata: metadata(vm, &authority_secret_name(&vm.name_any())),
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(bytes(data)),
        ..Secret::default()
    }
}

/// The Secret with the identity of a pod, which owns it.
///
/// # Errors
/// If a UID is none, or a key can't be made.
pub fn identity_secret(
    vm: &FaultTolerantVM,
    entry: &SeatEntry,
    pod_uid: &str,
    authority: &Authority,
) -> Result<Secret, IdentityError> {
    let vm_id = vm_id(vm)?;
    let seat_id: SeatId = pod_uid.parse().map_err(|_| IdentityError::Uid(pod_uid.to_owned()))?;
    let status = vm.status.clone().unwrap_or_default();
    let known = status.seats.iter().filter_map(|seat| {
        let id = seat.pod_uid.as_deref()?.parse().ok()?;
        Some((seat.name.clone(), id))
    });
    let mut seats: BTreeMap<String, SeatId> = known.collect();
    seats.insert(entry.name.clone(), seat_id);
    let who = SeatIdentity {
        vm: vm.name_any(),
        vm_id,
        seat: entry.name.clone(),
        seat_id,
        seats,
    };
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![identity_name(vm_id, seat_id)])?;
    params.distinguished_name = name(&format!("seat {} of {}", entry.name, vm.name_any()));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &authority.issuer)?;
    let data = [
        // Plain data with text keys always encodes.
        (FILE_SEAT, serde_json::to_string_pretty(&who).unwrap_or_default()),
        (FILE_CERTIFICATE, certificate.pem()),
        (FILE_KEY, key.serialize_pem()),
        (FILE_AUTHORITY, authority.certificate_pem.clone()),
    ];
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(identity_secret_name(&entry.name)),
            namespace: vm.namespace(),
            labels: Some(seat_labels(vm, &entry.name)),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Pod".to_owned(),
                name: entry.name.clone(),
                uid: pod_uid.to_owned(),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        type_: Some("Opaque".to_owned()),
        data: Some(bytes(data)),
        ..Secret::default()
    })
}

fn bytes<const N: usize>(data: [(&str, String); N]) -> BTreeMap<String, ByteString> {
    data.map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes())))
        .into()
}

fn name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}
