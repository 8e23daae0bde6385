//! `cargo xtask generate`: writes the files that are made of others. `cargo xtask check` says when one is old.
use std::process::ExitCode;

use clap::Args;

/// Options of `cargo xtask generate`.
#[derive(Args)]
pub struct Generate {}

impl Generate {
    /// Writes them.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let root = crate::root();
        // The chart has copies of what is written first.
        crate::check::generated::generate(&root)?;
        crate::chart::generate(&root)?;
        Ok(ExitCode::SUCCESS)
    }
}
