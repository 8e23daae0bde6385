//! `cargo xtask cluster`: the options are parsed here, `ftvm_e2e::cluster` does the work.
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, Subcommand};
use ftvm_e2e::cluster::holder::{self, Status};
use ftvm_e2e::cluster::{Options, Say, programs};

use crate::demo::{Build, ClusterDemo};
use crate::packages;

/// Options of `cargo xtask cluster`.
#[derive(Args)]
pub struct Cluster {
    /// Several clusters can be up at once, under different names
    #[arg(long, default_value = "default", global = true)]
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a cluster with the chart installed and leave it running
    Up(Up),
    /// Say what runs
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Run kubectl as the cluster's administrator
    Kubectl {
        /// kubectl's own arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// On a cluster of its own: install the chart, apply a VM, kill its node before the eyes of a client
    Demo(ClusterDemo),
    /// Take the cluster down: nothing of it is left
    Down,
    /// Only build its programs, if they are not in the cache, and say where they are
    Build,
    /// Keep a cluster: what `up` starts in the background
    #[command(hide = true)]
    Hold(Size),
}

#[derive(Args)]
struct Up {
    #[command(flatten)]
    size: Size,
    /// Print JSON; progress goes to standard error
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Size {
    /// How many nodes [default: 3, or 2 emulated ones]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: Option<u8>,
    /// Emulated machines as nodes, with kernels and a KVM of their own, and a native one for the operator: for Linux guests, and slow
    #[arg(long)]
    emulated: bool,
    /// Let the API server write down who asks for what, in log/audit.log of the cluster's folder
    #[arg(long)]
    audit: bool,
    /// Only Kubernetes: without the chart
    #[arg(long)]
    bare: bool,
    #[command(flatten)]
    api: Api,
    #[command(flatten)]
    build: Build,
}

/// What a cluster is asked by.
#[derive(Args, Clone, Copy)]
pub struct Api {
    /// How many API servers: the second one runs on the node n1, and dies with it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub api_servers: u8,
}

impl Cluster {
    /// Runs the command. `kubectl` ends with kubectl's own exit code; `status` with 1 if no cluster is up.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Up(up) => up.run(&self.name),
            Command::Demo(demo) => demo.run(),
            Command::Status { json } => show(&self.name, json),
            Command::Kubectl { arguments } => {
                let status = holder::kubectl(&self.name, &arguments)?;
                Ok(ExitCode::from(
                    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
                ))
            }
            Command::Down => {
                if holder::down(&self.name)? {
                    println!("the cluster is down");
                } else {
                    println!("no cluster {:?} was up", self.name);
                }
                Ok(ExitCode::SUCCESS)
            }
            Command::Build => {
                println!("{}", programs::folder(&progress(false))?.display());
                Ok(ExitCode::SUCCESS)
            }
            Command::Hold(size) => {
                let kind = match size.emulated {
                    true => Options::emulated(size.nodes.unwrap_or(2)),
                    false => Options {
                        nodes: size.nodes.unwrap_or(3),
                        ..Options::default()
                    },
                };
                let options = Options {
                    audit: size.audit,
                    api_servers: size.api.api_servers,
                    ..kind
                };
                let chart = (!size.bare).then(|| size.build.profile());
                holder::hold(&self.name, options, chart)?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Up {
    fn run(self, name: &str) -> anyhow::Result<ExitCode> {
        packages::ensure(packages::CLUSTER)?;
        if self.size.emulated {
            packages::ensure(packages::EMULATED)?;
        }
        let this = std::env::current_exe().context("cannot find this program")?;
        let mut command = process::Command::new(this);
        command.args(["cluster", "--name", name, "hold"]);
        if let Some(nodes) = self.size.nodes {
            command.args(["--nodes", &nodes.to_string()]);
        }
        command.args(["--api-servers", &self.size.api.api_servers.to_string()]);
        let flags = [
            (self.size.audit, "--audit"),
            (self.size.bare, "--bare"),
            (self.size.emulated, "--emulated"),
        ];
        command.args(flags.iter().filter_map(|(given, word)| given.then_some(word)));
        command.args(self.size.build.words());
        let (status, already) = holder::up(name, command, &progress(self.json))?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&status)?);
        } else {
            if already {
                println!("a cluster is up already; take it down with `cargo xtask cluster down`");
            }
            print(&status);
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Lines with the time since the start; where standard output is for a program, on standard error.
fn progress(json: bool) -> Say {
    let start = Instant::now();
    Arc::new(move |text| {
        let line = format!("[{:7.1} s] {text}", start.elapsed().as_secs_f64());
        if json {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    })
}

fn show(name: &str, json: bool) -> anyhow::Result<ExitCode> {
    let status = holder::status(name)?;
    match &status {
        Some(status) if !json => print(status),
        None if !json => println!("no cluster {name:?} is up: start one with `cargo xtask cluster up`"),
        _ => println!("{}", serde_json::to_string_pretty(&status)?),
    }
    Ok(if status.is_some() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print(status: &Status) {
    println!(
        "\ncluster {}, server {}, kept by process {}",
        status.name, status.server, status.holder_pid
    );
    for node in &status.nodes {
        let state = match (node.running, node.ready) {
            (true, true) => "ready",
            (true, false) => "not ready",
            (false, _) => "off",
        };
        println!("  {:<4} {:<12} {:<8} {state}", node.name, node.address, node.zone);
    }
    println!("folder {}", status.folder.display());
    println!(
        "kubeconfig {} (reached by `cargo xtask cluster kubectl`)",
        status.kubeconfig.display()
    );
}
