//! Builds the embedded guest.

use anyhow::{Context, bail};
use std::path::{Path, PathBuf};

use crate::cargo::cargo;

/// Where the guest's package is, below the repository's root.
const PACKAGE: &str = "e2e/guests/embedded";
/// Where its build goes: a folder of its own, since its flags are not the workspace's.
const TARGET: &str = "target/guest";
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Builds the embedded guest of the repository at `root` and returns the path of its ELF file. Cargo does nothing if it
/// is up to date; several callers at a time wait for one another.
///
/// # Errors
/// Where cargo can't be run or the build fails; the message has cargo's own.
pub fn build_embedded_guest(root: &Path) -> anyhow::Result<PathBuf> {
    let root = root
        .canonicalize()
        .with_context(|| format!("no repository at {}", root.display()))?;
    let package = root.join(PACKAGE);
    let target = root.join(TARGET);
    // Flags from the environment would replace those of the package's own .cargo/config.toml.
    let output = cargo()
        .args(["build", "--release", "--locked", "--target", TRIPLE, "--target-dir"])
        .arg(&target)
        .current_dir(&package)
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_RUSTFLAGS")
        .output()
        .context("cargo can't be run: is the Rust toolchain installed and on PATH?")?;
    if !output.status.success() {
        let messages = String::from_utf8_lossy(&output.stderr);
        bail!(
            "the embedded guest in {} does not build ({}):\n{messages}",
            package.display(),
            output.status
        );
    }
    let elf = target.join(TRIPLE).join("release/ftvm-guest");
    if !elf.is_file() {
        bail!("cargo built the embedded guest, but {} is not there", elf.display());
    }
    Ok(elf)
}
