//! `cargo xtask check`: what must hold before a change lands.
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;

mod dependencies;
mod errors;
pub mod generated;
mod tidy;

/// Options of `cargo xtask check`.
#[derive(Args)]
pub struct Check {}

type Rule = (&'static str, fn(&Path) -> anyhow::Result<()>);

/// Cheap ones first.
const RULES: &[Rule] = &[
    ("formatting", formatting),
    ("tidy rules", tidy::check),
    ("table of errors", errors::check),
    ("Helm chart and image", crate::chart::check),
    ("licences and duplicate dependencies", dependencies::check),
    ("generated files", generated::check),
    ("lints", lints),
    ("documentation", documentation),
];

impl Check {
    /// Runs all checks and names those that failed.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let root = crate::root();
        let mut failed = 0;
        for (name, rule) in RULES {
            let begin = Instant::now();
            let result = rule(&root);
            let seconds = begin.elapsed().as_secs_f64();
            match result {
                Ok(()) => println!("check {name} ... ok ({seconds:.1} s)"),
                Err(error) => {
                    failed += 1;
                    println!("check {name} ... FAILED ({seconds:.1} s)\n{error:#}");
                }
            }
        }
        // In the words of the test programs, so that one reader counts both.
        let word = if failed == 0 { "ok" } else { "FAILED" };
        println!(
            "check result: {word}. {} passed; {failed} failed; 0 ignored;",
            RULES.len() - failed
        );
        Ok(if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// The workspace, and the packages outside of it that have flags of their own (bare-metal guests).
fn packages(root: &Path) -> Vec<PathBuf> {
    let outside = root.join("e2e/guests/embedded");
    let outside = outside.join("Cargo.toml").exists().then_some(outside);
    std::iter::once(root.to_path_buf()).chain(outside).collect()
}

fn cargo(folder: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> anyhow::Result<()> {
    let mut command = ftvm_e2e::cargo::cargo();
    command
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir(folder)
        .stdin(Stdio::null());
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!(
            "in {}: cargo {} ended with {status}",
            folder.display(),
            arguments.join(" ")
        );
    }
    Ok(())
}

fn formatting(root: &Path) -> anyhow::Result<()> {
    packages(root)
        .iter()
        .try_for_each(|folder| cargo(folder, &["fmt", "--all", "--check"], &[]))
}

fn lints(root: &Path) -> anyhow::Result<()> {
    cargo(
        root,
        &[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
        &[],
    )?;
    // Without Kubernetes people build these three, and no other package then asks for a feature that they forgot to name. (The image's programs
    // are built like that for the tests on clusters.)
    cargo(
        root,
        &[
            "check",
            "--quiet",
            "--package",
            "ftvm-engine",
            "--package",
            "ftvm-node-daemon",
            "--package",
            "ftvm-cli",
            "--bins",
        ],
        &[],
    )?;
    // A bare-metal program has no test harness.
    packages(root)
        .iter()
        .skip(1)
        .try_for_each(|folder| cargo(folder, &["clippy", "--quiet", "--", "-D", "warnings"], &[]))
}

fn documentation(root: &Path) -> anyhow::Result<()> {
    cargo(
        root,
        &["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"],
        &[("RUSTDOCFLAGS", "-D warnings")],
    )
}
