//! Files that are made from types: are they what these types make today?
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use ftvm_e2e::lab::binaries::{self, Profile};

/// (file, package and program that prints it)
const GENERATED: &[(&str, (&str, &str))] = &[("crds/ftvm.dev_faulttolerantvms.yaml", ("ftvm-crds", "crd-yaml"))];

/// Makes each file anew and writes it.
///
/// # Errors
/// If its program does not build or fails, or the file can't be written.
pub fn generate(root: &Path) -> anyhow::Result<()> {
    for (file, program) in GENERATED {
        fs::write(root.join(file), print(root, *program)?).with_context(|| format!("writing {file}"))?;
    }
    Ok(())
}

/// Makes each file anew and compares.
///
/// # Errors
/// Every file that differs.
pub fn check(root: &Path) -> anyhow::Result<()> {
    let mut complaints = Vec::new();
    for (file, program) in GENERATED {
        let published = fs::read(root.join(file)).with_context(|| format!("reading {file}"))?;
        if published != print(root, *program)? {
            complaints.push(format!("{file} is not what its types make: run `cargo xtask generate`"));
        }
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// What a program of the workspace prints. What it is made of is built as for the tests, which need it too.
fn print(root: &Path, program: (&str, &str)) -> anyhow::Result<Vec<u8>> {
    let built = binaries::build(&[program], Profile::Dev)?;
    let (_, name) = program;
    let output = Command::new(built.first().context("cargo built nothing")?)
        .current_dir(root)
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    ensure!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}
