//! Files that are made of code: are they what it makes today?
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use ftvm_e2e::lab::binaries::{self, Profile};

/// What prints a file: package and program.
#[derive(Clone, Copy)]
enum Printer {
    Program(&'static str, &'static str),
    /// One that is an example of its package.
    Example(&'static str, &'static str),
}

/// (file, what prints it)
const GENERATED: &[(&str, Printer)] = &[
    (
        "crds/ftvm.dev_faulttolerantvms.yaml",
        Printer::Program("ftvm-crds", "crd-yaml"),
    ),
    ("docs/metrics.md", Printer::Example("ftvm-e2e", "metrics-md")),
];

/// Makes each file anew and writes it.
///
/// # Errors
/// If its program does not build or fails, or the file can't be written.
pub fn generate(root: &Path) -> anyhow::Result<()> {
    for (file, printer) in GENERATED {
        fs::write(root.join(file), print(root, *printer)?).with_context(|| format!("writing {file}"))?;
    }
    Ok(())
}

/// Makes each file anew and compares.
///
/// # Errors
/// Every file that differs.
pub fn check(root: &Path) -> anyhow::Result<()> {
    let mut complaints = Vec::new();
    for (file, printer) in GENERATED {
        let published = fs::read(root.join(file)).with_context(|| format!("reading {file}"))?;
        if published != print(root, *printer)? {
            complaints.push(format!("{file} is not what the code makes: run `cargo xtask generate`"));
        }
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// What a program of the workspace prints. What it is made of is built as for the tests, which need it too.
fn print(root: &Path, printer: Printer) -> anyhow::Result<Vec<u8>> {
    let (built, name) = match printer {
        Printer::Program(package, name) => (binaries::build(&[(package, name)], Profile::Dev)?.pop(), name),
        Printer::Example(package, name) => (Some(binaries::build_example(package, name, Profile::Dev)?), name),
    };
    let output = Command::new(built.context("cargo built nothing")?)
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
