//! `ftvm-operator`: makes and keeps the Kubernetes objects of fault-tolerant VMs.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ftvm_crds::PullPolicy;
use ftvm_operator::build::SeatImage;
use ftvm_operator::helm_test;
use ftvm_operator::image_volumes::Setting;
use ftvm_operator::run::{Options, run};
use ftvm_operator::uninstall;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::Error as PlainError;
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
    /// Make a VM, have its active killed, hand it over as planned, judge both, delete it: what `helm test` runs. Ends with 0 only if everything held.
    HelmTest(HelmTest),
    /// Ends with 0 only if there is no FaultTolerantVM: what `helm uninstall` runs before it deletes anything.
    UninstallCheck(UninstallCheck),
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
    /// Whether guest images come into seats' pods as image volumes: as the API server can (auto), always, or never: then an init container copies their files.
    #[arg(long, value_enum, default_value = "auto")]
    image_volumes: Setting,
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

impl Run {
    fn options(self) -> Options {
        Options {
            image: SeatImage {
                image: self.seat_image,
                pull_policy: self.seat_image_pull_policy,
                pull_secrets: self.seat_image_pull_secret,
            },
            image_volumes: self.image_volumes,
            listen: self.listen,
            pod_name: self.pod_name,
            pod_namespace: self.pod_namespace,
        }
    }
}

#[derive(Args)]
struct HelmTest {
    /// OCI image with the guest's /boot/vmlinuz.
    #[arg(long)]
    guest_image: String,
    /// When nodes pull that image: Always, IfNotPresent or Never.
    #[arg(long, default_value = "IfNotPresent", value_parser = pull_policy)]
    guest_image_pull_policy: PullPolicy,
    /// The guest's command line.
    #[arg(long, default_value = "")]
    cmdline: String,
    /// The guest's memory, such as 128Mi.
    #[arg(long)]
    memory: String,
    /// Storage class of the seats' volumes; the cluster's default if missing.
    #[arg(long)]
    storage_class_name: Option<String>,
    /// Bridge of the nodes for the guest's network card; it has none if missing.
    #[arg(long)]
    bridge: Option<String>,
    /// Time for everything but the VM's deletion.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout_seconds: u64,
    /// Namespace of the VM.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
}

impl HelmTest {
    fn options(self) -> helm_test::Options {
        helm_test::Options {
            namespace: self.namespace,
            guest_image: self.guest_image,
            pull_policy: self.guest_image_pull_policy,
            cmdline: self.cmdline,
            memory: self.memory,
            storage_class_name: self.storage_class_name,
            bridge: self.bridge,
            timeout: Duration::from_secs(self.timeout_seconds),
        }
    }
}

#[derive(Args)]
struct UninstallCheck {
    /// Name of the Helm release.
    #[arg(long)]
    release: String,
    /// Its revision.
    #[arg(long)]
    revision: u64,
    /// Its namespace.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
}

impl UninstallCheck {
    fn release(self) -> uninstall::Release {
        uninstall::Release {
            name: self.release,
            namespace: self.namespace,
            revision: self.revision,
        }
    }
}

/// By the names that the resource has for them.
fn pull_policy(text: &str) -> Result<PullPolicy, PlainError> {
    PullPolicy::deserialize(text.into_deserializer())
}

/// Exit code of what failed and has none of its own.
const FAILURE: u8 = 1;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("FTVM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let command = Cli::parse().command;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(FAILURE, &format!("no runtime: {error}")),
    };
    let failure = match command {
        Command::Run(arguments) => {
            let ended = runtime.block_on(run(arguments.options()));
            ended.err().map(|error| (FAILURE, error.to_string()))
        }
        Command::HelmTest(arguments) => {
            let ended = runtime.block_on(helm_test::run(arguments.options()));
            ended.err().map(|error| (FAILURE, error.to_string()))
        }
        Command::UninstallCheck(arguments) => {
            let ended = runtime.block_on(uninstall::check(arguments.release()));
            ended.err().map(|error| (error.exit_code(), error.to_string()))
        }
    };
    failure.map_or(ExitCode::SUCCESS, |(code, error)| failed(code, &error))
}

fn failed(code: u8, error: &str) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(code)
}
