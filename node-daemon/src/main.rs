//! The daemon process of one node.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ftvm_engine::control::exit_code;
use ftvm_node_daemon::bridges::BridgePattern;
use ftvm_node_daemon::check;
use ftvm_node_daemon::config::Config;
use ftvm_node_daemon::daemon::Daemon;
use ftvm_node_daemon::import::Import;
use ftvm_node_daemon::kubernetes::{self, Options, health};
use ftvm_node_daemon::networks::{RoleNetwork, Roles};

/// Starts, jails and supervises the engines of this node.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run until SIGTERM or SIGINT; engines go on without the daemon and are adopted by the next one.
    Run {
        /// The configuration (docs/standalone.md).
        #[arg(long)]
        config: PathBuf,
    },
    /// Run as the daemon of a Kubernetes node (docs/kubernetes.md), until SIGTERM or SIGINT.
    Kubernetes(NodeArguments),
    /// Ask the daemon of this pod whether it is well.
    Probe {
        /// Folder with its socket.
        #[arg(long, default_value = PROBE)]
        folder: PathBuf,
    },
    /// Check a configuration and everything that it names, and start nothing.
    Check {
        /// The configuration (docs/standalone.md).
        #[arg(long)]
        config: PathBuf,
    },
    /// Make a thick disk out of an image (docs/disks.md). It goes on where an earlier call was interrupted.
    Import(Import),
    /// Print the JSON schema of the configuration.
    Schema,
}

const PROBE: &str = "/run/ftvm-node-daemon";

#[derive(clap::Args)]
struct NodeArguments {
    /// Name of the node; $NODE_NAME if missing.
    #[arg(long)]
    node: Option<String>,
    /// Address of the node; $NODE_IP if missing.
    #[arg(long)]
    node_ip: Option<IpAddr>,
    /// State folder, mounted under its own name of the node.
    #[arg(long, default_value = "/var/lib/ftvm")]
    state: PathBuf,
    /// kubelet's folder, whose `device-plugins` is mounted under its own name.
    #[arg(long, default_value = "/var/lib/kubelet")]
    kubelet: PathBuf,
    /// Port for daemons of other nodes.
    #[arg(long, default_value_t = 7400)]
    listen_peers: u16,
    /// Port for metrics.
    #[arg(long, default_value_t = 7401)]
    listen_metrics: u16,
    /// Folder of this pod alone, for `probe`.
    #[arg(long, default_value = PROBE)]
    probe: PathBuf,
    /// The static engine program; `ftvm-engine` beside the daemon if missing.
    #[arg(long)]
    engine: Option<PathBuf>,
    /// Seats that may be placed here; by the node's memory if missing.
    #[arg(long)]
    seats: Option<u32>,
    /// A bridge of the node that guests may be connected to, or its beginning followed by `*`; once for each. None: no bridge.
    #[arg(long = "allowed-bridge", value_name = "PATTERN")]
    allowed_bridges: Vec<BridgePattern>,
    /// A network of the node for `management`, `replication`, `migration` or `client`, by its CIDR or by the name of an interface; up to two a
    /// role, in the same order on each node.
    #[arg(long = "network", value_name = "ROLE=NETWORK")]
    networks: Vec<RoleNetwork>,
}

fn main() -> ExitCode {
    // Usage errors are clap's own exit code, 2.
    let code = match Arguments::parse().command {
        Command::Run { config } => run(&config),
        Command::Kubernetes(arguments) => run_node(arguments),
        Command::Probe { folder } => health::probe(&folder),
        Command::Check { config } => check::report(&config),
        Command::Import(import) => import.run(),
        Command::Schema => {
            println!("{:#}", Config::schema());
            exit_code::OK
        }
    };
    ExitCode::from(code)
}

fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FTVM_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}

fn run(path: &std::path::Path) -> u8 {
    log();
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => return fail(&error, exit_code::CONFIG),
    };
    until_signalled(move || {
        let daemon = match Daemon::start(config) {
            Ok(daemon) => daemon,
            Err(error) => return fail(&error, error.exit_code()),
        };
        match daemon.serve() {
            Ok(()) => exit_code::OK,
            // Without its socket the daemon is of no use; engines go on.
            Err(error) => fail(&error, error.exit_code()),
        }
    })
}

fn run_node(arguments: NodeArguments) -> u8 {
    log();
    let from_environment = |name| std::env::var(name).ok();
    let node = arguments.node.or_else(|| from_environment("NODE_NAME"));
    let node_ip = arguments.node_ip.or_else(|| from_environment("NODE_IP")?.parse().ok());
    let (Some(node), Some(node_ip)) = (node, node_ip) else {
        eprintln!("ftvm-node-daemon: --node and --node-ip, or $NODE_NAME and $NODE_IP, must say which node this is");
        return exit_code::USAGE;
    };
    let networks = match Roles::new(arguments.networks) {
        Ok(networks) => networks,
        Err(error) => return fail(&error, exit_code::USAGE),
    };
    let options = Options {
        node,
        node_ip,
        state: arguments.state,
        kubelet: arguments.kubelet,
        listen_peers: arguments.listen_peers,
        listen_metrics: arguments.listen_metrics,
        engine: arguments.engine,
        probe: arguments.probe,
        seats: arguments.seats,
        allowed_bridges: arguments.allowed_bridges,
        networks,
    };
    until_signalled(move || match kubernetes::run(&options) {
        Ok(()) => exit_code::OK,
        Err(error) => fail(&error, error.exit_code()),
    })
}

/// Runs `work` in a thread, until it ends or a signal comes.
fn until_signalled(work: impl FnOnce() -> u8 + Send + 'static) -> u8 {
    // Blocked before there are threads, so that this thread alone gets them.
    let signals = block_signals();
    let worker = std::thread::Builder::new()
        .name("main-work".to_owned())
        .spawn(move || std::process::exit(i32::from(work())));
    if let Err(error) = worker {
        return fail(&error, exit_code::INTERNAL);
    }
    wait_for(&signals);
    tracing::info!("ending; engines go on");
    exit_code::OK
}

fn fail(error: &(dyn std::error::Error + 'static), code: u8) -> u8 {
    eprintln!("ftvm-node-daemon: {}", ftvm_node_daemon::explain(error));
    code
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: an initialised set, changed for this thread and those that it will start.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    }
}

fn wait_for(signals: &libc::sigset_t) {
    let mut signal = 0;
    // SAFETY: waits for a blocked signal of a valid set.
    while unsafe { libc::sigwait(signals, &mut signal) } != 0 {}
}
