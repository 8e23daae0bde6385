//! The demonstration on a real Kubernetes: the chart is installed, a VM applied, and then a node dies.
//!
//! Nothing here mends anything: the operator finds the third node, kubelet starts what it started before. The embedded guest runs on three
//! native nodes, Debian on two emulated ones (the operator has a native one): there the killed node comes back, and with it protection.
pub mod acts;
mod groups;
pub mod looks;
mod machines;
pub mod own;
mod system;

use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use self::machines::Nodes;
use self::system::Kubernetes;
pub use self::system::story;
use super::linux::witness::RedisWitness;
use super::prerequisites;
use super::rounds::{Patience, Stage};
use super::witness::{EmbeddedWitness, Witness};
use super::{GUEST_MAC, Guest, Options, place};
use crate::cluster::install::Images;
use crate::cluster::{self, Cluster};
use crate::hosts::namespace;
use crate::lab::binaries::Profile;
use crate::lab::guest;
use crate::report::{Progress, Report};

/// Of the VM.
pub const NAMESPACE: &str = "demo";
/// The VM.
pub const VM: &str = "demo";
/// The guest's address on the client network.
pub const GUEST_ADDRESS: [u8; 4] = [10, 79, 0, 100];
/// Names of the VM's disks, where it is on datastores ([`Setting::datastores`]). Elsewhere it has the first one alone.
pub const DISKS: &[&str] = &["root", "data"];
/// Where the logs of a play that failed are kept, below `target`.
const FOLDER: &str = "cluster-demo";

const NATIVE: Patience = Patience {
    protected: Duration::from_secs(180),
    calm: Duration::from_secs(1),
    stalled: Duration::from_secs(45),
    hold: Duration::from_secs(1),
    look: Duration::from_millis(20),
};
/// A disk that hangs counts as that after 30 s, in which its guest may not answer.
const ON_DATASTORES: Patience = Patience {
    stalled: Duration::from_secs(180),
    ..NATIVE
};
/// There is no room on two processors for a third one.
const EMULATED_NODES: u8 = 2;
/// Everything is slower by a factor of ten to a hundred in emulated nodes.
const EMULATED: Patience = Patience {
    // Debian answered 15 minutes after it was applied on one day, and had not booted after 20 on another.
    protected: Duration::from_secs(3600),
    calm: Duration::from_secs(5),
    stalled: Duration::from_secs(240),
    hold: Duration::from_secs(10),
    look: Duration::from_millis(500),
};

/// What the play is set on.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// How the programs are built.
    pub profile: Profile,
    /// Whether nodes and pods reach the API server through a [`cluster::ApiProxy`].
    pub api_proxy: bool,
    /// How many API servers ([`cluster::Options::api_servers`]).
    pub api_servers: u8,
    /// Whether the machine has two disks, and each seat's copies of both lie on its node's datastore of the seat's class
    /// ([`cluster::datastores::CLASSES`], by slot). For the embedded guest.
    pub datastores: bool,
}

impl Setting {
    /// One API server that all reach directly, and one disk.
    #[must_use]
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            api_proxy: false,
            api_servers: 1,
            datastores: false,
        }
    }

    fn patience(self) -> Patience {
        if self.datastores { ON_DATASTORES } else { NATIVE }
    }
}

/// Runs the demonstration and prints its report.
///
/// # Errors
/// If the report can't be written; what goes wrong in the play itself is in the report.
pub fn run(options: &Options, setting: Setting) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    if options.guest == Guest::Embedded && !prerequisites::native_hosts_can_be_made(&progress) {
        return Ok(ExitCode::from(2));
    }
    let folder = place::new_folder(FOLDER)?;
    let mut report = play(options, setting, &folder, &progress);
    options.fault.name_of_nodes().clone_into(&mut report.fault);
    report.conclude(
        options,
        &progress,
        Some(&format!("frames and logs: {}", folder.display())),
    )
}

/// The whole play; an error outside of a round is a complaint too.
pub fn play(options: &Options, setting: Setting, folder: &Path, progress: &Progress) -> Report {
    play_on_stage(options, setting, folder, progress).unwrap_or_else(|error| Report::failed(options, &error, progress))
}

fn play_on_stage(options: &Options, setting: Setting, folder: &Path, progress: &Progress) -> anyhow::Result<Report> {
    match options.guest {
        Guest::Embedded => on_stage(options, setting, folder, progress, |stage, cluster| {
            Ok(act(stage, cluster, folder, progress))
        }),
        Guest::Linux => {
            let client =
                |cluster: &Cluster| RedisWitness::start(cluster.sandbox(), EMULATED.protected, EMULATED.stalled);
            prepare(options, setting, folder, progress, client, |stage, cluster| {
                Ok(act(stage, cluster, folder, progress))
            })
        }
    }
}

/// All rounds; logs of a play that fails are kept.
fn act<W: Witness>(stage: Stage<'_, W>, cluster: &Cluster, folder: &Path, progress: &Progress) -> Report {
    let (report, _) = stage.keep_frames(folder).play();
    if !report.passed() {
        progress.say(story(cluster));
        keep_logs(cluster, folder);
    }
    report
}

/// Installs the chart on a new cluster, applies the machine with the embedded guest, waits until it is protected, and calls `acts`. After an
/// error logs are in `folder`.
///
/// # Errors
/// What went wrong, with what the machine's objects and pods say; those of `acts`.
pub fn on_stage<T>(
    options: &Options,
    setting: Setting,
    folder: &Path,
    progress: &Progress,
    acts: impl FnOnce(Stage<'_, EmbeddedWitness>, &Rc<Cluster>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let client = |cluster: &Cluster| {
        let network = cluster.sandbox().network().try_clone()?;
        let entrance = move || namespace::enter_network(&network);
        EmbeddedWitness::start(GUEST_ADDRESS, options, setting.patience(), entrance)
    };
    prepare(options, setting, folder, progress, client, acts)
}

fn prepare<W: Witness, T>(
    options: &Options,
    setting: Setting,
    folder: &Path,
    progress: &Progress,
    client: impl FnOnce(&Cluster) -> anyhow::Result<W>,
    acts: impl FnOnce(Stage<'_, W>, &Rc<Cluster>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    on_cluster(options, setting, folder, progress, |cluster| {
        let nodes = Nodes(Rc::clone(cluster));
        let (patience, mac) = match options.guest {
            Guest::Embedded => (setting.patience(), GUEST_MAC),
            Guest::Linux => (EMULATED, guest::MAC),
        };
        let mut system = Kubernetes::new(Rc::clone(cluster), options, setting.datastores);
        let stage = Stage::prepare(options, patience, progress, (&nodes, mac), &mut system, || {
            client(cluster)
        })?;
        acts(stage, cluster)
    })
}

/// Installs the chart on a new cluster and calls `acts`, which have machines of their own ([`own`]). After an error logs are in `folder`.
///
/// # Errors
/// What went wrong, with what the machines' objects and pods say; those of `acts`.
pub fn on_cluster<T>(
    options: &Options,
    setting: Setting,
    folder: &Path,
    progress: &Progress,
    acts: impl FnOnce(&Rc<Cluster>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let cluster = Rc::new(start(options, setting, folder, progress)?);
    // Seats need no exception.
    cluster.make_namespace(NAMESPACE, &json!({"pod-security.kubernetes.io/enforce": "restricted"}))?;
    acts(&cluster).map_err(|error| {
        keep_logs(&cluster, folder);
        error.context(story(&cluster))
    })
}

/// A cluster with the chart.
fn start(options: &Options, setting: Setting, folder: &Path, progress: &Progress) -> anyhow::Result<Cluster> {
    progress.say("building what is not fresh (the first time takes many minutes)");
    let images = Images::make(folder, setting.profile, options.guest)?;
    let lines = progress.clone();
    // A seat that is replaced leaves its volume behind; nobody makes it fresh.
    let volumes = u8::try_from(options.rounds).unwrap_or(u8::MAX).saturating_add(2);
    let kind = match options.guest {
        Guest::Embedded => cluster::Options::default(),
        Guest::Linux => cluster::Options::emulated(EMULATED_NODES),
    };
    let cluster = Cluster::start(cluster::Options {
        images: images.archives(),
        volumes_per_node: volumes,
        datastores: setting.datastores,
        api_proxy: setting.api_proxy,
        api_servers: setting.api_servers,
        say: Arc::new(move |text| lines.say(text)),
        ..kind
    })?;
    cluster.install(&images)?;
    progress.say("the chart is installed: operator and node-daemons are ready");
    Ok(cluster)
}

/// Logs of nodes and engines outlive the cluster.
fn keep_logs(cluster: &Cluster, folder: &Path) {
    for node in cluster.nodes().iter().filter(|node| node.is_running()) {
        if let Err(error) = node.save_logs() {
            eprintln!("the logs of node {} were not kept: {error:#}", node.name());
        }
    }
    let script = "cp -r \"$0/log\" \"$1/\"; cd \"$0/nodes\" && find . -type f -name '*.log' -size -4M -exec cp --parents {} \"$1/\" ';'";
    let mut copy = std::process::Command::new("sh");
    copy.args(["-c", script]).arg(cluster.folder()).arg(folder);
    match copy.status() {
        Ok(status) if status.success() => {}
        other => eprintln!("not all logs were kept: {other:?}"),
    }
}
