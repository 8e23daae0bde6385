//! `cargo xtask demo`: the options are parsed here, `ftvm_e2e::demo` does the work.
use std::process::ExitCode;

use clap::Args;

/// Options of `cargo xtask demo`.
#[derive(Args)]
pub struct Demo {}

impl Demo {
    /// Runs the demonstration.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        anyhow::bail!("the demonstration is not part of this build: it comes with e2e::demo")
    }
}
