//! Identities of a virtual machine's seats: one authority, one certificate a seat.
//!
//! ```text
//!   OUT/vm.json, authority.pem, authority.key      stay with whoever adds seats later
//!   OUT/SEAT/seat.json, certificate.pem, key.pem, authority.pem      go to the seat's node
//! ```
//!
//! Certificates do not expire: a clock that is wrong must not end a protected pair. A seat is shut out by making new
//! identities in another folder.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ftvm_node_daemon::config::check_name;
use ftvm_node_daemon::random;
use ftvm_protocol::identity::{SeatId, SeatIdentity, VmId, identity_name};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde::{Deserialize, Serialize};

/// Errors of making identities.
#[derive(Debug, thiserror::Error)]
pub enum IdentitiesError {
    /// A name is none.
    #[error(transparent)]
    Name(#[from] ftvm_node_daemon::config::ConfigError),
    /// A file could not be written or read.
    #[error("identity file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The folder is another virtual machine's.
    #[error("folder {folder} has the identities of {found}: choose another --out for {vm}")]
    OtherVm {
        /// The folder.
        folder: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose it should be.
        vm: String,
    },
    /// A file is not what it should be.
    #[error("identity file {path} is damaged ({why}): make the identities anew in another folder")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A certificate could not be made.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// Contents of `vm.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Vm {
    vm: String,
    vm_id: VmId,
    seats: BTreeMap<String, SeatId>,
}

/// Makes identities for those of these seats that have none, and tells all seats of each other. Returns the new ones.
pub fn make(vm: &str, seats: &[String], out: &Path) -> Result<Vec<String>, IdentitiesError> {
    check_name("vm", vm)?;
    seats.iter().try_for_each(|seat| check_name("seat", seat))?;
    folder(out)?;
    let mut book = load(vm, out)?;
    let issuer = authority(&book, out)?;
    let mut made = Vec::new();
    for seat in seats {
        if !book.seats.contains_key(seat) {
            let seat_id = SeatId(random::u128());
            certify(&book, seat, seat_id, &issuer, out)?;
            book.seats.insert(seat.clone(), seat_id);
            made.push(seat.clone());
        }
    }
    write(&out.join("vm.json"), &pretty(&book))?;
    for (seat, seat_id) in &book.seats {
        let who = SeatIdentity {
            vm: book.vm.clone(),
            vm_id: book.vm_id,
            seat: seat.clone(),
            seat_id: *seat_id,
            seats: book.seats.clone(),
        };
        folder(&out.join(seat))?;
        write(&out.join(seat).join("seat.json"), &pretty(&who))?;
    }
    Ok(made)
}

fn load(vm: &str, out: &Path) -> Result<Vm, IdentitiesError> {
    let path = out.join("vm.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Vm {
                vm: vm.to_owned(),
                vm_id: VmId(random::u128()),
                seats: BTreeMap::new(),
            });
        }
        Err(source) => return Err(IdentitiesError::File { path, source }),
    };
    let book: Vm = serde_json::from_str(&text).map_err(|error| IdentitiesError::Damaged {
        path,
        why: error.to_string(),
    })?;
    if book.vm != vm {
        return Err(IdentitiesError::OtherVm {
            folder: out.to_owned(),
            found: book.vm,
            vm: vm.to_owned(),
        });
    }
    Ok(book)
}

/// The authority of a virtual machine: read, or made. Its parameters follow from its name and key.
fn authority(book: &Vm, out: &Path) -> Result<Issuer<'static, KeyPair>, IdentitiesError> {
    let path = out.join("authority.key");
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name = name(&format!("authority of {} {}", book.vm, book.vm_id));
    let key = match std::fs::read_to_string(&path) {
        Ok(text) => KeyPair::from_pem(&text)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && book.seats.is_empty() => {
            let key = KeyPair::generate()?;
            // The book first: with the key alone the next attempt would draw another identity.
            write(&out.join("vm.json"), &pretty(book))?;
            write(&out.join("authority.pem"), &params.self_signed(&key)?.pem())?;
            write(&path, &key.serialize_pem())?;
            key
        }
        Err(source) => return Err(IdentitiesError::File { path, source }),
    };
    Ok(Issuer::new(params, key))
}

fn certify(
    book: &Vm,
    seat: &str,
    seat_id: SeatId,
    issuer: &Issuer<'_, KeyPair>,
    out: &Path,
) -> Result<(), IdentitiesError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![identity_name(book.vm_id, seat_id)])?;
    params.distinguished_name = name(&format!("seat {seat} of {}", book.vm));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, issuer)?;
    let folder_path = out.join(seat);
    folder(&folder_path)?;
    let authority_path = out.join("authority.pem");
    let authority = std::fs::read_to_string(&authority_path).map_err(|source| IdentitiesError::File {
        path: authority_path,
        source,
    })?;
    write(&folder_path.join("certificate.pem"), &certificate.pem())?;
    write(&folder_path.join("key.pem"), &key.serialize_pem())?;
    write(&folder_path.join("authority.pem"), &authority)
}

fn name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

fn pretty<T: Serialize>(value: &T) -> String {
    // Plain data with text keys always encodes.
    serde_json::to_string_pretty(value).unwrap_or_default()
}

fn folder(path: &Path) -> Result<(), IdentitiesError> {
    let file_error = |source| IdentitiesError::File {
        path: path.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(file_error)
}

/// Replaces a file in one step; only its owner may read it.
fn write(path: &Path, text: &str) -> Result<(), IdentitiesError> {
    let temporary = path.with_extension("new");
    let work = || -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    work().map_err(|source| IdentitiesError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
#[path = "identities_tests.rs"]
mod tests;
