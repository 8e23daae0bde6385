//! `cargo xtask test`: every test of the project, in tiers.
use std::process::{Command, ExitCode};

use clap::Args;

/// Options of `cargo xtask test`.
#[derive(Args)]
pub struct Test {
    /// Only what runs in under two minutes without emulated nodes
    #[arg(long)]
    quick: bool,
}

impl Test {
    /// Runs the tiers.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let _ = self.quick;
        let status = Command::new("cargo")
            .args(["test", "--workspace"])
            .current_dir(crate::root())
            .status()?;
        Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}
