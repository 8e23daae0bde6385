//! The programs that a demonstration runs, built if they are not fresh.
use std::path::PathBuf;

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

/// Builds the embedded guest.
pub fn build_guest() -> anyhow::Result<PathBuf> {
    crate::guest_build::build_embedded_guest(crate::cargo::workspace()?)
}
