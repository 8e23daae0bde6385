//! The cluster's certificate authority, certificates and kubeconfigs. Keys are ECDSA on P-256.
use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use base64::Engine as _;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::PrivateKeyDer;
use serde_json::json;

/// Who a certificate speaks for.
#[derive(Debug, Clone)]
pub(super) struct Subject<'a> {
    /// Common name: Kubernetes' user.
    pub(super) user: &'a str,
    /// Organisation: Kubernetes' group. (Only one: rcgen keeps one value of a kind.)
    pub(super) group: Option<&'a str>,
}

/// A certificate and its key, as PEM files.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

/// Whose client certificates were signed so far, with their keys: a proxy that ends a connection can speak on in its client's name.
#[derive(Clone, Default)]
pub(super) struct Clients(Arc<Mutex<HashMap<Vec<u8>, Client>>>);

/// Who a certificate was made for.
pub(super) struct Client {
    pub(super) user: String,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Clients {
    /// Who presented this certificate (DER).
    pub(super) fn find(&self, certificate: &[u8]) -> Option<Client> {
        let clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        clients.get(certificate).map(|client| Client {
            user: client.user.clone(),
            key: client.key.clone_key(),
        })
    }

    fn add(&self, user: &str, certificate: &Certificate, key: &KeyPair) -> anyhow::Result<()> {
        let client = Client {
            user: user.to_owned(),
            key: PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?,
        };
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        clients.insert(certificate.der().to_vec(), client);
        Ok(())
    }
}

/// The authority; its certificate is in `ca.crt`, its key in `ca.key`.
pub(super) struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    clients: Clients,
}

impl Authority {
    /// Makes an authority, and the key pair of service account tokens (`service-accounts.key`, `.pub`).
    pub(super) fn new(folder: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        params.distinguished_name = name(&Subject {
            user: "lab authority",
            group: None,
        });
        let certificate = params.self_signed(&key)?.pem();
        fs::write(folder.join("ca.crt"), &certificate)?;
        secret(&folder.join("ca.key"), &key.serialize_pem())?;
        let tokens = KeyPair::generate()?;
        secret(&folder.join("service-accounts.key"), &tokens.serialize_pem())?;
        fs::write(folder.join("service-accounts.pub"), tokens.public_key_pem())?;
        Ok(Self {
            folder: folder.to_owned(),
            issuer: Issuer::new(params, key),
            certificate,
            clients: Clients::default(),
        })
    }

    /// Everyone for whom it signs a client certificate, now or later.
    pub(super) fn clients(&self) -> Clients {
        self.clients.clone()
    }

    /// A file in the authority's folder.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A certificate with which a server is reached under these names: files `BASE.crt` and `BASE.key`.
    pub(super) fn server(&self, base: &Path, user: &str, dns: &[&str], addresses: &[IpAddr]) -> anyhow::Result<Pair> {
        let mut params = CertificateParams::new(dns.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())?;
        params
            .subject_alt_names
            .extend(addresses.iter().copied().map(SanType::IpAddress));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.distinguished_name = name(&Subject { user, group: None });
        let (certificate, key) = self.sign(params)?;
        store(base, &certificate.pem(), &key.serialize_pem())
    }

    /// A certificate with which a client proves who it is: files `BASE.crt` and `BASE.key`.
    pub(super) fn client(&self, base: &Path, subject: &Subject) -> anyhow::Result<Pair> {
        let (certificate, key) = self.sign_client(subject)?;
        store(base, &certificate, &key)
    }

    /// Writes a kubeconfig with everything in it.
    pub(super) fn kubeconfig(&self, path: &Path, server: &str, subject: &Subject) -> anyhow::Result<()> {
        let (certificate, key) = self.sign_client(subject)?;
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        // JSON is YAML, too.
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {
                "server": server,
                "certificate-authority-data": encode(&self.certificate),
            }}],
            "users": [{"name": subject.user, "user": {
                "client-certificate-data": encode(&certificate),
                "client-key-data": encode(&key),
            }}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": subject.user}}],
            "current-context": "lab",
        });
        secret(path, &serde_json::to_string_pretty(&config)?)
    }

    fn sign_client(&self, subject: &Subject) -> anyhow::Result<(String, String)> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.distinguished_name = name(subject);
        let (certificate, key) = self.sign(params)?;
        self.clients.add(subject.user, &certificate, &key)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    fn sign(&self, mut params: CertificateParams) -> anyhow::Result<(Certificate, KeyPair)> {
        let key = KeyPair::generate()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate, key))
    }
}

fn store(base: &Path, certificate: &str, key: &str) -> anyhow::Result<Pair> {
    let pair = Pair {
        certificate: base.with_extension("crt"),
        key: base.with_extension("key"),
    };
    fs::write(&pair.certificate, certificate)?;
    secret(&pair.key, key)?;
    Ok(pair)
}

fn name(subject: &Subject) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, subject.user);
    if let Some(group) = subject.group {
        name.push(DnType::OrganizationName, group);
    }
    name
}

/// Writes a file that only its owner can read.
fn secret(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, "")
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o600)))
        .and_then(|()| fs::write(path, text))
        .with_context(|| format!("cannot write {}", path.display()))
}
