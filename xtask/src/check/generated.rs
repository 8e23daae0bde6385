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

/// Makes each file anew and compares.
///
/// # Errors
/// Every file that differs, with the command that mends it.
pub fn check(root: &Path) -> anyhow::Result<()> {
    let mut complaints = Vec::new();
    for (file, command) in GENERATED {
        let output = cargo()
            .args(*command)
            .current_dir(root)
            .output()
            .context("cannot start cargo")?;
        ensure!(
            output.status.success(),
            "cargo {}: {}",
            command.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let published = fs::read(root.join(file)).with_context(|| format!("reading {file}"))?;
        if published != output.stdout {
            complaints.push(format!(
                "{file} is not what its types make: cargo {} > {file}",
                command.join(" ")
            ));
        }
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}
