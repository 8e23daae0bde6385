//! Files that are made from types: are they what these types make today?
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use ftvm_e2e::cargo::cargo;

/// (file, what prints it)
const GENERATED: &[(&str, &[&str])] = &[(
    "crds/ftvm.dev_faulttolerantvms.yaml",
    &["run", "--quiet", "-p", "ftvm-crds", "--bin", "crd-yaml"],
)];

/// Makes each file anew and writes it.
///
/// # Errors
/// If its program does not build or fails, or the file can't be written.
pub fn generate(root: &Path) -> anyhow::Result<()> {
    for (file, command) in GENERATED {
        fs::write(root.join(file), print(root, command)?).with_context(|| format!("writing {file}"))?;
    }
    Ok(())
}

/// Makes each file anew and compares.
///
/// # Errors
/// Every file that differs.
pub fn check(root: &Path) -> anyhow::Result<()> {
    let mut complaints = Vec::new();
    for (file, command) in GENERATED {
        let published = fs::read(root.join(file)).with_context(|| format!("reading {file}"))?;
        if published != print(root, command)? {
            complaints.push(format!("{file} is not what its types make: run `cargo xtask generate`"));
        }
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// What a program of cargo prints.
fn print(root: &Path, command: &[&str]) -> anyhow::Result<Vec<u8>> {
    let output = cargo()
        .args(command)
        .current_dir(root)
        .output()
        .context("cannot start cargo")?;
    ensure!(
        output.status.success(),
        "cargo {}: {}",
        command.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}
