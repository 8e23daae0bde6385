//! `cargo xtask check`: what must hold before a change lands.
use std::process::{Command, ExitCode};

use clap::Args;

/// Options of `cargo xtask check`.
#[derive(Args)]
pub struct Check {}

impl Check {
    /// Runs all checks and names those that failed.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        for arguments in [
            &["fmt", "--all", "--check"][..],
            &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        ] {
            if !Command::new("cargo")
                .args(arguments)
                .current_dir(crate::root())
                .status()?
                .success()
            {
                return Ok(ExitCode::FAILURE);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
