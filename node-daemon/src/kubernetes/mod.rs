//! The daemon of a Kubernetes node (docs/kubernetes.md).
//!
//! ```text
//!   pods of this node ─┐
//!   FaultTolerantVMs ──┴─► book ─► Node: seats ◄─► seat socket
//!                                   │    └─► engines ─► Leases (arbiter)
//!                                   └─► annotations and labels of the pods
//!   kubelet ◄─► device plugin ◄─ KVM self-test ─► CPU of the Node
//!   kernel ─► networks ─► networks of the Node
//! ```
//!
//! Without an API server the seats go on: what is genuine was remembered, and everything here is tried again. Two daemons may
//! run beside each other during an update: the newer one waits for the state folder's lock, ready to take over.

mod book;
mod cpu;
mod echo;
pub mod health;
mod kvm_test;
mod machine;
mod metrics;
mod missing;
mod networks;
mod node;
mod pace;
mod plugin;
mod publish;
mod refused;
mod request;
mod storage;
mod timing;
mod watch;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ftvm_engine::control::exit_code;

use crate::arbiter::{Leases, Server, follow_servers};
use crate::bridges::{AllowedBridges, BridgePattern};
use crate::config::JailConfig;
use crate::daemon::{Daemon, DaemonError, Settings, engine_path};
use crate::explain;
use crate::networks::{Roles, follow};
use crate::seat_socket::{self, Hierarchies};
use crate::state::{StateError, StateFolder};

use health::Health;
pub use metrics::METRICS;
use node::Node;

/// The folder with the seats' socket, below the state folder.
const SOCKET_FOLDER: &str = "seat-socket";
/// Pause before something is tried again that another daemon may hold.
const AGAIN: Duration = Duration::from_millis(300);

/// What the DaemonSet says.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the node.
    pub node: String,
    /// Where daemons of other nodes and monitors reach this one.
    pub node_ip: IpAddr,
    /// The state folder, under the same path on the node.
    pub state: PathBuf,
    /// kubelet's folder.
    pub kubelet: PathBuf,
    /// Port for daemons of other nodes.
    pub listen_peers: u16,
    /// Port for metrics.
    pub listen_metrics: u16,
    /// The engine program; beside the daemon if missing.
    pub engine: Option<PathBuf>,
    /// Folder of this pod alone, for its probe.
    pub probe: PathBuf,
    /// Seats that kubelet may place here; by the node's memory if missing.
    pub seats: Option<u32>,
    /// Bridges of the node that guests may be connected to.
    pub allowed_bridges: Vec<BridgePattern>,
    /// Networks of the node by role.
    pub networks: Roles,
}

/// Why the daemon can't run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The API server's address and the rights to use it.
    #[error("no API server: {0}; on a cluster the service account of the pod says where it is, elsewhere $KUBECONFIG")]
    Config(String),
    /// A part of the daemon.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}

impl StartError {
    /// The documented exit code for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            StartError::Config(_) => exit_code::ARBITER,
            StartError::Daemon(error) => error.exit_code(),
            StartError::System { .. } => exit_code::DAEMON,
        }
    }
}

impl From<StateError> for StartError {
    fn from(error: StateError) -> Self {
        StartError::Daemon(error.into())
    }
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::System { what, source }
}

/// Runs as long as the process does.
///
/// # Errors
/// What can't be had at the start. Later everything is tried again.
pub fn run(options: &Options) -> Result<(), StartError> {
    let health = Health::start(&options.probe)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(system("starting the runtime"))?;
    let config = runtime
        .block_on(kube::Config::infer())
        .map_err(|error| StartError::Config(explain(&error)))?;
    let server = Server::new(&config).map_err(|error| StartError::Config(explain(&error)))?;
    let leases = Leases::new(server).map_err(system("starting the arbiter's runtime"))?;
    // From here on it could take over; its predecessor may still be at work.
    let state = wait_for_state(options, &health)?;
    let settings = Settings {
        node: options.node.clone(),
        state_folder: options.state.clone(),
        control_socket: options.state.join("daemon.sock"),
        peer_listen: Some(SocketAddr::new(options.node_ip, options.listen_peers)),
        engine: engine_path(options.engine.as_deref())?,
        jail: JailConfig::default(),
        bridges: AllowedBridges::Listed(options.allowed_bridges.clone()),
        arbiter_folder: None,
    };
    let daemon = Daemon::new(settings, state);
    answer_others(&daemon);
    let hierarchies = Hierarchies::read().map_err(system("reading /proc/self/mountinfo"))?;
    let machine = machine::machine();
    let node = Arc::new(Node::new(
        options.node.clone(),
        machine.clone(),
        daemon.clone(),
        leases.clone(),
        hierarchies,
    ));
    let folder = options.state.join(SOCKET_FOLDER);
    let listener = seat_socket::bind(&folder)?;
    seat_socket::serve(listener, node.clone()).map_err(system("serving the seat socket"))?;
    health.leads();
    let control = daemon.clone();
    std::thread::Builder::new()
        .name("server".to_owned())
        .spawn(move || {
            if let Err(error) = control.serve() {
                // Seats do not need it; people do.
                tracing::error!("{}", explain(&error));
            }
        })
        .map_err(system("starting a thread"))?;
    let tested = kvm_test::Tested::start();
    let seen = follow(options.networks.clone()).map_err(system("starting a thread"))?;
    runtime.block_on(async {
        tokio::spawn(follow_servers(config.clone(), leases.server()));
        tokio::spawn(metrics::serve(
            SocketAddr::new(options.node_ip, options.listen_metrics),
            metrics::Sources {
                node: node.clone(),
                leases,
                tested: tested.clone(),
                health: health.clone(),
                networks: seen.clone(),
            },
        ));
        tokio::spawn(plugin::run(plugin::Options::new(options, folder), tested.clone()));
        tokio::spawn(cpu::publish(config.clone(), options.node.clone(), machine, tested));
        tokio::spawn(networks::publish(config.clone(), options.node.clone(), seen));
        watch::run(config, node, health).await;
    });
    Ok(())
}

/// Takes the state folder, from a predecessor once it has ended.
fn wait_for_state(options: &Options, health: &Health) -> Result<StateFolder, StartError> {
    let mut said = false;
    loop {
        match StateFolder::open(&options.state) {
            Ok(state) => return Ok(state),
            Err(error @ StateError::InUse { .. }) => {
                if !said {
                    tracing::info!("waits for its predecessor: {}", explain(&error));
                    said = true;
                }
                health.beat();
                std::thread::sleep(AGAIN);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Listens for the daemons of other nodes as soon as the port is free. What they would ask then, they ask again.
fn answer_others(daemon: &Arc<Daemon>) {
    let daemon = daemon.clone();
    let work = move || {
        let mut said = false;
        loop {
            let listening = daemon.listen_for_others().map_err(DaemonError::from);
            match listening.and_then(|listener| daemon.answer_others(listener)) {
                Ok(()) => return,
                Err(error) => {
                    if !said {
                        tracing::error!("{}; it is tried again", explain(&error));
                        said = true;
                    }
                    std::thread::sleep(AGAIN);
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("peers-bind".to_owned()).spawn(work) {
        tracing::error!("no thread to listen for other daemons: {error}");
    }
}
