//! The project's own programs, built and found.
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, ensure};

use crate::cargo::{cargo, workspace};

/// How to build them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// As tests are built.
    Dev,
    /// Optimised, and built in a short time: what demonstrations run and measure.
    Fast,
    /// As users get them.
    Release,
}

impl Profile {
    /// As Cargo names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Fast => "fast",
            Self::Release => "release",
        }
    }
}

/// Builds programs, named as (package, binary), and returns where they are, in the same order. Cargo does nothing if they are fresh.
///
/// # Errors
/// If one does not compile; the compiler's messages go to standard error.
pub fn build(programs: &[(&str, &str)], profile: Profile) -> anyhow::Result<Vec<PathBuf>> {
    build_targets("--bin", programs, profile)
}

/// Builds a program that is an example of its package: one for tests and measurements.
///
/// # Errors
/// If it does not compile; the compiler's messages go to standard error.
pub fn build_example(package: &str, name: &str, profile: Profile) -> anyhow::Result<PathBuf> {
    let mut built = build_targets("--example", &[(package, name)], profile)?;
    built.pop().context("cargo built nothing")
}

fn build_targets(kind: &str, programs: &[(&str, &str)], profile: Profile) -> anyhow::Result<Vec<PathBuf>> {
    let mut cargo = cargo();
    cargo.args(["build", "--quiet", "--message-format=json-render-diagnostics"]);
    match profile {
        Profile::Dev => {}
        Profile::Fast => drop(cargo.args(["--profile", "fast"])),
        Profile::Release => drop(cargo.arg("--release")),
    }
    for (package, program) in programs {
        cargo.args(["--package", package, kind, program]);
    }
    let output = cargo
        .current_dir(workspace()?)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(output.status.success(), "cargo cannot build {programs:?}");
    let messages: Vec<serde_json::Value> = output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect();
    let find = |program: &str| {
        messages
            .iter()
            .find(|message| message["target"]["name"] == program && message["executable"].is_string())
    };
    programs
        .iter()
        .map(|(_, program)| {
            let path = find(program).and_then(|message| message["executable"].as_str());
            path.map(PathBuf::from)
                .with_context(|| format!("cargo did not say where {program} is"))
        })
        .collect()
}
