//! The demonstration on a real Kubernetes: the chart is installed, a VM applied, and then a node dies.
//!
//! Nothing here mends anything: the operator finds the third node, kubelet starts what it started before.
pub mod acts;
mod machines;
mod system;

use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use self::machines::Nodes;
use self::system::Kubernetes;
use super::prerequisites;
use super::rounds::{Patience, Stage};
use super::witness::EmbeddedWitness;
use super::{GUEST_MAC, Options, place};
use crate::cluster::install::Images;
use crate::cluster::{self, Cluster};
use crate::hosts::namespace;
use crate::lab::binaries::Profile;
use crate::report::{Progress, Report};

/// Of the VM.
pub const NAMESPACE: &str = "demo";
/// The VM.
pub const VM: &str = "demo";
/// The guest's address on the client network.
pub const GUEST_ADDRESS: [u8; 4] = [10, 79, 0, 100];
/// A lost seat is replaced after so many seconds.
const REPLACE_AFTER_S: u32 = 10;
/// Where the logs of a play that failed are kept, below `target`.
const FOLDER: &str = "cluster-demo";

const PATIENCE: Patience = Patience {
    protected: Duration::from_secs(180),
    failover: Duration::from_secs(20),
    calm: Duration::from_secs(1),
    stalled: Duration::from_secs(45),
    hold: Duration::from_secs(1),
    look: Duration::from_millis(20),
};

/// What the play is set on.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// How the programs are built.
    pub profile: Profile,
    /// Whether nodes and pods reach the API server through a [`cluster::ApiProxy`].
    pub api_proxy: bool,
}

/// Runs the demonstration and prints its report.
///
/// # Errors
/// If the report can't be written; what goes wrong in the play itself is in the report.
pub fn run(options: &Options, profile: Profile) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    if !prerequisites::native_hosts_can_be_made(&progress) {
        return Ok(ExitCode::from(2));
    }
    let folder = place::new_folder(FOLDER)?;
    let mut report = play(options, profile, &folder, &progress);
    options.fault.name_of_nodes().clone_into(&mut report.fault);
    report.conclude(
        options,
        &progress,
        Some(&format!("frames and logs: {}", folder.display())),
    )
}

/// The whole play; an error outside of a round is a complaint too.
pub fn play(options: &Options, profile: Profile, folder: &Path, progress: &Progress) -> Report {
    play_on_stage(options, profile, folder, progress).unwrap_or_else(|error| Report::failed(options, &error, progress))
}

fn play_on_stage(options: &Options, profile: Profile, folder: &Path, progress: &Progress) -> anyhow::Result<Report> {
    let setting = Setting {
        profile,
        api_proxy: false,
    };
    on_stage(options, setting, folder, progress, |stage, cluster| {
        let (report, _) = stage.keep_frames(folder).play();
        if !report.passed() {
            progress.say(system::story(cluster));
            keep_logs(cluster, folder);
        }
        Ok(report)
    })
}

/// Installs the chart on a new cluster, applies the machine, waits until it is protected, and calls `acts`. After an error logs are in
/// `folder`.
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
    let cluster = Rc::new(start(options, setting, folder, progress)?);
    cluster.make_namespace(NAMESPACE, &json!({}))?;
    let nodes = Nodes(Rc::clone(&cluster));
    let mut system = Kubernetes::new(Rc::clone(&cluster), options);
    let witness = || {
        let network = cluster.sandbox().network().try_clone()?;
        let entrance = move || namespace::enter_network(&network);
        EmbeddedWitness::start(GUEST_ADDRESS, options, PATIENCE, entrance)
    };
    Stage::prepare(options, PATIENCE, progress, (&nodes, GUEST_MAC), &mut system, witness)
        .and_then(|stage| acts(stage, &cluster))
        .map_err(|error| {
            keep_logs(&cluster, folder);
            error.context(system::story(&cluster))
        })
}

/// A cluster with the chart.
fn start(options: &Options, setting: Setting, folder: &Path, progress: &Progress) -> anyhow::Result<Cluster> {
    progress.say("building what is not fresh (the first time takes many minutes)");
    let images = Images::make(folder, setting.profile)?;
    let lines = progress.clone();
    // A seat that is replaced leaves its volume behind; nobody makes it fresh.
    let volumes = u8::try_from(options.rounds).unwrap_or(u8::MAX).saturating_add(2);
    let cluster = Cluster::start(cluster::Options {
        volumes_per_node: volumes,
        api_proxy: setting.api_proxy,
        say: Arc::new(move |text| lines.say(text)),
        ..cluster::Options::default()
    })?;
    cluster.install(&images)?;
    progress.say("the chart is installed: operator and node-daemons are ready");
    Ok(cluster)
}

/// Logs of nodes and engines outlive the cluster.
fn keep_logs(cluster: &Cluster, folder: &Path) {
    let script = "cp -r \"$0/log\" \"$1/\"; cd \"$0/nodes\" && find . -type f -name '*.log' -size -4M -exec cp --parents {} \"$1/\" ';'";
    let mut copy = std::process::Command::new("sh");
    copy.args(["-c", script]).arg(cluster.folder()).arg(folder);
    match copy.status() {
        Ok(status) if status.success() => {}
        other => eprintln!("not all logs were kept: {other:?}"),
    }
}
