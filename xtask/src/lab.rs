//! `cargo xtask lab`: emulated machines from the command line.
use std::process::ExitCode;

use clap::Args;

/// Options of `cargo xtask lab`.
#[derive(Args)]
pub struct Lab {}

impl Lab {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        anyhow::bail!("emulated machines are not part of this build: they come with e2e::lab")
    }
}
