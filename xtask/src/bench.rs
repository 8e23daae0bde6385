//! `cargo xtask bench`: the options are parsed here, `ftvm_e2e::bench` does the work.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use clap::Args;
use ftvm_e2e::bench::{Options, Part, command};

use crate::demo::Build;
use crate::packages;

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct Bench {
    /// Write every figure to this file, with stable keys
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the tables into the marked sections of this Markdown page; sections of other parts stay
    #[arg(long)]
    markdown: Option<PathBuf>,
    /// Only this part (may be given several times): pause, latency, speed, memory, resync, gap, migration, colo, block; or, as root and
    /// only when named, cluster, operator, fleet
    #[arg(long, value_name = "NAME", value_parser = part)]
    only: Vec<Part>,
    /// Seconds instead of minutes: shows that everything can be measured; the figures mean nothing
    #[arg(long)]
    short: bool,
    /// Seconds for which operator and daemons at rest are watched [default: 120, or 10 with --short]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    rest_s: Option<u64>,
    /// Memory of the guest in MiB [default: 1024, or 128 with --short]
    #[arg(long)]
    memory: Option<u32>,
    /// Length of an idle epoch, and QEMU's delay between checkpoints, in milliseconds [default: 50, or 20 with --short]
    #[arg(long)]
    epoch_ms: Option<u32>,
    #[command(flatten)]
    build: Build,
}

fn part(name: &str) -> Result<Part, String> {
    Part::from_name(name).ok_or_else(|| {
        let names: Vec<_> = Part::all().map(Part::name).collect();
        format!("one of {}", names.join(", "))
    })
}

impl Bench {
    /// Runs the benchmark. Exit code 1 if something could not be measured; a missed goal is a figure like any other.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut options = if self.short { Options::short() } else { Options::full() };
        options.json = self.json;
        options.markdown = self.markdown;
        options.rest_s = self.rest_s;
        options.memory_mib = self.memory.unwrap_or(options.memory_mib);
        options.epoch_ms = self.epoch_ms.unwrap_or(options.epoch_ms);
        ensure!(options.memory_mib >= 64, "the guest needs 64 MiB for the largest load");
        ensure!((1..=1000).contains(&options.epoch_ms), "an epoch lasts 1 to 1,000 ms");
        options.profile = self.build.profile();
        if !self.only.is_empty() {
            options.parts = self.only;
        }
        if options.parts.iter().any(|part| part.is_of_kubernetes()) {
            packages::ensure(packages::CLUSTER)?;
        }
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        command::run(&options, &arguments)
    }
}
