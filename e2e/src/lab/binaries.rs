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

/// Who says which features the programs' dependencies have. Each choice compiles all dependencies once more that differ in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Features {
    /// All packages of the workspace, as when all tests are built: what one test builds, all others find.
    Workspace,
    /// The programs' packages alone, as when users build them.
    Own,
}

impl Features {
    fn of_tests(profile: Profile) -> Self {
        match profile {
            Profile::Dev => Self::Workspace,
            Profile::Fast | Profile::Release => Self::Own,
        }
    }
}

/// Builds programs, named as (package, binary), and returns where they are, in the same order. Cargo does nothing if they are fresh.
///
/// # Errors
/// If one does not compile; the compiler's messages go to standard error.
pub fn build(programs: &[(&str, &str)], profile: Profile) -> anyhow::Result<Vec<PathBuf>> {
    build_targets("--bin", programs, profile, Features::of_tests(profile))
}

/// The same, with the features that their users get, whatever the profile: a feature that another package asks for is not there.
///
/// # Errors
/// If one does not compile; the compiler's messages go to standard error.
pub fn build_as_shipped(programs: &[(&str, &str)], profile: Profile) -> anyhow::Result<Vec<PathBuf>> {
    build_targets("--bin", programs, profile, Features::Own)
}

/// Builds a program that is an example of its package: one for tests and measurements.
///
/// # Errors
/// If it does not compile; the compiler's messages go to standard error.
pub fn build_example(package: &str, name: &str, profile: Profile) -> anyhow::Result<PathBuf> {
    let mut built = build_targets("--example", &[(package, name)], profile, Features::of_tests(profile))?;
    built.pop().context("cargo built nothing")
}

fn build_targets(
    kind: &str,
    programs: &[(&str, &str)],
    profile: Profile,
    features: Features,
) -> anyhow::Result<Vec<PathBuf>> {
    let mut cargo = cargo();
    cargo.args(["build", "--quiet", "--message-format=json-render-diagnostics"]);
    match profile {
        Profile::Dev => {}
        Profile::Fast => drop(cargo.args(["--profile", "fast"])),
        Profile::Release => drop(cargo.arg("--release")),
    }
    if features == Features::Workspace {
        cargo.arg("--workspace");
    }
    for (package, program) in programs {
        if features == Features::Own {
            cargo.args(["--package", package]);
        }
        cargo.args([kind, program]);
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
