//! `cargo xtask`: the project's own commands, the same on a developer's machine and in CI.
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod chart;
mod check;
mod cluster;
mod demo;
mod generate;
mod lab;
mod packages;
mod sim;
mod test;

/// Build, check, test and try the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Formatting, lints, tidy rules, licences, documentation: what must hold before a change lands
    Check(check::Check),
    /// Write the files that are made of others: the chart's copy of the definitions, its table of values
    Generate(generate::Generate),
    /// Run the tests, tier by tier
    Test(test::Test),
    /// Protect a virtual machine, kill its host, and show what the client saw
    Demo(demo::Demo),
    /// Measure what protection costs, beside QEMU's answers to the same questions
    Bench(bench::Bench),
    /// Run the protocol's seeded simulator
    Sim(sim::Sim),
    /// A real Kubernetes on this machine: etcd, control plane and nodes made of namespaces
    Cluster(cluster::Cluster),
    /// Emulated machines: build their images, start one
    Lab(lab::Lab),
}

/// The root of the source tree.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

fn main() -> ExitCode {
    if let Err(error) = ftvm_e2e::interrupt::end_everything_on_signals() {
        eprintln!("error: preparing for ctrl-C: {error}");
        return ExitCode::FAILURE;
    }
    let result = match Cli::parse().command {
        Command::Check(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Test(command) => command.run(),
        Command::Demo(command) => command.run(),
        Command::Bench(command) => command.run(),
        Command::Sim(command) => command.run(),
        Command::Cluster(command) => command.run(),
        Command::Lab(command) => command.run(),
    };
    // What a command says of children that a signal has killed is of no use.
    ftvm_e2e::interrupt::hold_if_ending();
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of what people copy from a page, its indented blocks, the lines that call this program, without their comments.
    fn commands(page: &str) -> impl Iterator<Item = &str> {
        let lines = page.lines().filter_map(|line| line.strip_prefix("    cargo xtask "));
        lines.filter_map(|line| line.split(" #").next())
    }

    fn parse(command: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("cargo xtask").chain(command.split_whitespace()))
    }

    #[test]
    fn commands_of_the_pages_are_understood() {
        for (page, text) in [
            ("README.md", include_str!("../../README.md")),
            ("docs/benchmarks.md", include_str!("../../docs/benchmarks.md")),
            ("docs/testing.md", include_str!("../../docs/testing.md")),
        ] {
            assert!(commands(text).count() > 0, "{page}");
            for command in commands(text) {
                if let Err(error) = parse(command) {
                    panic!("{page}: cargo xtask {command}: {error}");
                }
            }
        }
        for wrong in ["tests", "test --longer", "demo --fault none --rounds"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
