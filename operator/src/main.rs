//! `ftvm-operator`: makes and keeps the Kubernetes objects of fault-tolerant VMs.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ftvm_operator::build::SeatImage;
use ftvm_operator::run::{Options, run};
use tracing_subscriber::EnvFilter;

/// Makes and keeps the Kubernetes objects of fault-tolerant VMs.
#[derive(Parser)]
#[command(name = "ftvm-operator", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the operator; one replica leads, the others wait.
    Run(Run),
}

#[derive(Args)]
struct Run {
    /// Image with the seat program, for the seats' pods.
    #[arg(long)]
    seat_image: String,
    /// When nodes pull that image: Always, IfNotPresent or Never.
    #[arg(long, default_value = "IfNotPresent")]
    seat_image_pull_policy: String,
    /// Name of a Secret with the registry's password, in the VMs' namespaces. May be given several times.
    #[arg(long)]
    seat_image_pull_secret: Vec<String>,
    /// Address and port of probes and metrics.
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// Name of this replica.
    #[arg(long, env = "POD_NAME")]
    pod_name: String,
    /// Namespace of the election's Lease.
    #[arg(long, env = "POD_NAMESPACE")]
    pod_namespace: String,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("FTVM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let Command::Run(arguments) = Cli::parse().command;
    let options = Options {
        image: SeatImage {
            image: arguments.seat_image,
            pull_policy: arguments.seat_image_pull_policy,
            pull_secrets: arguments.seat_image_pull_secret,
        },
        listen: arguments.listen,
        pod_name: arguments.pod_name,
        pod_namespace: arguments.pod_namespace,
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
