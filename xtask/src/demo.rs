//! `cargo xtask demo` and `cargo xtask cluster demo`: the options are parsed here, `ftvm_e2e::demo` does the work.
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use ftvm_e2e::demo::cluster::{self, Setting};
use ftvm_e2e::demo::programs::Profile;
use ftvm_e2e::demo::{Fault, Guest, Options, command};

use crate::cluster::Api;
use crate::packages;

/// Options of `cargo xtask demo`.
#[derive(Args)]
pub struct Demo {
    /// What happens to the active host: kill-engine, kill-host, pause-host, cut-link, cut-link-one-way, hand-over or none
    #[arg(long, default_value = "kill-host", value_parser = fault)]
    fault: Fault,
    #[command(flatten)]
    play: Play,
}

/// Options of `cargo xtask cluster demo`.
#[derive(Args)]
pub struct ClusterDemo {
    /// What happens to the active's node: kill-engine, kill-node, pause-node, cut-link, cut-link-one-way, drain or none
    #[arg(long, default_value = "kill-node", value_parser = fault_of_nodes)]
    fault: Fault,
    #[command(flatten)]
    play: Play,
    #[command(flatten)]
    api: Api,
}

/// What both have.
#[derive(Args)]
struct Play {
    /// What runs in the machine: embedded (on this machine's KVM), or linux (Debian on emulated nodes, anywhere)
    #[arg(long, default_value = "embedded", value_parser = guest)]
    guest: Guest,
    /// Memory of the guest in MiB [default: 128, or 256 for linux]
    #[arg(long)]
    memory: Option<u32>,
    /// CPUs of the guest
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// How often the fault strikes; each time the dead host comes back as the next third seat
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Write the report to this file, too
    #[arg(long)]
    json: Option<PathBuf>,
    /// Pages that the guest keeps dirtying
    #[arg(long, default_value_t = 1024)]
    churn_pages: u64,
    /// Pages that each of its CPUs dirties a second
    #[arg(long, default_value_t = 2000)]
    churn_rate: u64,
    /// A seat that hears nothing from the other one for so many milliseconds counts it as lost [default: 300]
    #[arg(long)]
    peer_lost_ms: Option<u32>,
    #[command(flatten)]
    build: Build,
}

/// How programs are built: optimised in a short time, unless told otherwise.
#[derive(Args, Clone, Copy)]
pub struct Build {
    /// Run programs as users get them, which takes longer to build
    #[arg(long)]
    release: bool,
    /// Run programs as tests are built, with their assertions and without optimisation
    #[arg(long, conflicts_with = "release")]
    dev: bool,
}

impl Build {
    /// As the library names it.
    pub fn profile(self) -> Profile {
        match (self.release, self.dev) {
            (true, _) => Profile::Release,
            (_, true) => Profile::Dev,
            _ => Profile::Fast,
        }
    }

    /// As on the command line.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        let words = [(self.release, "--release"), (self.dev, "--dev")];
        words.into_iter().filter_map(|(given, word)| given.then_some(word))
    }
}

fn fault(name: &str) -> Result<Fault, String> {
    Fault::from_name(name).ok_or_else(|| format!("one of {}", Fault::ALL.map(Fault::name).join(", ")))
}

fn fault_of_nodes(name: &str) -> Result<Fault, String> {
    Fault::from_name_of_nodes(name).ok_or_else(|| format!("one of {}", Fault::ALL.map(Fault::name_of_nodes).join(", ")))
}

fn guest(name: &str) -> Result<Guest, String> {
    Guest::from_name(name).ok_or_else(|| "embedded or linux".to_owned())
}

impl Play {
    fn options(self, fault: Fault) -> (Options, Profile) {
        let profile = self.build.profile();
        let options = Options {
            fault,
            guest: self.guest,
            memory_mib: self.memory.unwrap_or(match self.guest {
                Guest::Embedded => 128,
                Guest::Linux => 256,
            }),
            vcpus: self.vcpus,
            rounds: self.rounds,
            json: self.json,
            churn_pages: self.churn_pages,
            churn_rate: self.churn_rate,
            peer_lost_ms: self.peer_lost_ms,
        };
        (options, profile)
    }
}

impl Demo {
    /// Runs the demonstration.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (options, profile) = self.play.options(self.fault);
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        command::run(&options, profile, &arguments)
    }
}

impl ClusterDemo {
    /// Runs the demonstration on a cluster of its own.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        packages::ensure(packages::CLUSTER)?;
        if self.play.guest == Guest::Linux {
            packages::ensure(packages::EMULATED)?;
        }
        let (options, profile) = self.play.options(self.fault);
        let setting = Setting {
            api_servers: self.api.api_servers,
            ..Setting::new(profile)
        };
        cluster::run(&options, setting)
    }
}
