//! The programs that a demonstration runs, built if they are not fresh.
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

pub use crate::lab::binaries::Profile;

/// The programs and the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Programs {
    /// The folder of `ftvm-engine`, `ftvm-node-daemon` and `ftvm`.
    pub folder: PathBuf,
    /// The embedded guest, a PVH ELF.
    pub guest: PathBuf,
}

/// Builds everything, static, as this workspace says.
pub fn build(profile: Profile) -> anyhow::Result<Programs> {
    let programs = [
        ("ftvm-engine", "ftvm-engine"),
        ("ftvm-node-daemon", "ftvm-node-daemon"),
        ("ftvm-cli", "ftvm"),
    ];
    let paths = crate::lab::binaries::build(&programs, profile)?;
    let folder = paths[0].parent().context("cargo put the engine nowhere")?.to_owned();
    ensure!(
        paths.iter().all(|path| path.starts_with(&folder)),
        "cargo put the programs into several folders"
    );
    Ok(Programs {
        folder,
        guest: build_guest()?,
    })
}

/// Builds the embedded guest, which is a workspace of its own with flags of its own.
pub fn build_guest() -> anyhow::Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no workspace above this package")?;
    let source = root.join("e2e/guests/embedded");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--quiet", "--release"])
        .current_dir(&source)
        .stdin(Stdio::null());
    // What cargo tells this program's own build must not reach the other one.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_") && text != "CARGO_HOME" || text == "RUSTFLAGS" {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().context("starting cargo")?;
    ensure!(
        status.success(),
        "the embedded guest in {} does not build",
        source.display()
    );
    let guest = root.join("target/guest/x86_64-unknown-linux-gnu/release/ftvm-guest");
    ensure!(
        guest.is_file(),
        "cargo built the embedded guest, but not as {}",
        guest.display()
    );
    Ok(guest)
}
