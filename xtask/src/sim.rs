//! `cargo xtask sim`: the options are parsed here, the protocol's simulator does the work.
use std::process::ExitCode;

use clap::Args;

/// Options of `cargo xtask sim`.
#[derive(Args)]
pub struct Sim {}

impl Sim {
    /// Runs the simulator.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        anyhow::bail!("the simulator is not part of this build: it comes with the protocol crate")
    }
}
