//! `cargo xtask lab`: emulated machines from the command line.
use std::process::ExitCode;

use clap::{Args, Subcommand};
use ftvm_e2e::lab::image::Image;

use crate::packages;

/// Options of `cargo xtask lab`.
#[derive(Args)]
pub struct Lab {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the images of nodes and of the Debian guest, if they are not there, and say where they are
    Images,
}

impl Lab {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Images => {
                packages::ensure(packages::EMULATED)?;
                for image in [Image::node()?, Image::guest()?] {
                    println!("{}", image.folder.display());
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
