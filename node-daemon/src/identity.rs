//! The identity of a seat: a folder that `ftvm standalone identities` makes.
//!
//! ```text
//!   seat.json           who this is, and the seats that were made with it (SeatIdentity)
//!   certificate.pem     of this seat; its one name is SEAT-UUID.VM-UUID.ftvm
//!   key.pem             its private key
//!   authority.pem       who signed the seats of this virtual machine
//! ```

use std::path::{Path, PathBuf};

use ftvm_engine::control::{Identity, Secret};
pub use ftvm_protocol::identity::SeatIdentity;

/// Errors of identities.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file can't be read.
    #[error("identity file {path} can't be read ({source}); `ftvm standalone identities` makes identities")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("identity file {path}: {why}; `ftvm standalone identities` makes identities")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// It is another seat's.
    #[error(
        "identity folder {folder} belongs to seat {found}, but the configuration says {expected}: each seat needs its own"
    )]
    OtherSeat {
        /// The folder.
        folder: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose it should be.
        expected: String,
    },
}

/// Reads an identity and checks that it is this seat's.
pub fn load(folder: &Path, vm: &str, seat: &str) -> Result<(SeatIdentity, Identity), IdentityError> {
    let path = folder.join("seat.json");
    let who: SeatIdentity = serde_json::from_str(&read(&path)?).map_err(|error| IdentityError::Malformed {
        path,
        why: error.to_string(),
    })?;
    if (who.vm.as_str(), who.seat.as_str()) != (vm, seat) {
        let (found, expected) = (format!("{}/{}", who.vm, who.seat), format!("{vm}/{seat}"));
        return Err(IdentityError::OtherSeat {
            folder: folder.to_owned(),
            found,
            expected,
        });
    }
    let identity = Identity {
        certificate_pem: pem(folder, "certificate.pem", "CERTIFICATE")?,
        key_pem: Secret(pem(folder, "key.pem", "PRIVATE KEY")?),
        authority_pem: pem(folder, "authority.pem", "CERTIFICATE")?,
    };
    Ok((who, identity))
}

fn read(path: &Path) -> Result<String, IdentityError> {
    std::fs::read_to_string(path).map_err(|source| IdentityError::Read {
        path: path.to_owned(),
        source,
    })
}

fn pem(folder: &Path, name: &str, kind: &str) -> Result<String, IdentityError> {
    let path = folder.join(name);
    let text = read(&path)?;
    if text.len() > 16 * 1024 || !text.contains(&format!("-----BEGIN {kind}-----")) {
        return Err(IdentityError::Malformed {
            path,
            why: format!("no PEM of a {kind}"),
        });
    }
    Ok(text)
}
