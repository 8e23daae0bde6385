//! Figures of Kubernetes, on clusters of this machine (`crate::cluster`), which need root. They are runs of their own: nothing of them is
//! inside the namespaces of the engine's parts.
//!
//! ```text
//!   play      one cluster, one VM, one client: apply, killed nodes, drains
//!   rest      one VM at rest: who writes how often; memory of the operator
//!   fleet     the operator with many VMs on nodes that do not exist (operator/examples/hollow_nodes.rs)
//!   requests  the API server's audit log, counted
//! ```
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::facts::{BusyTime, Facts, own_ticks};
use super::report::Report;
use super::{Options, Part, tables};
use crate::cargo::workspace;
use crate::cluster::install::GUEST_IMAGE;
use crate::cluster::plan::CLIENT_BRIDGE;
use crate::cluster::{Cluster, Say, wait_for};
use crate::demo::place::new_folder;
use crate::demo::prerequisites;
use crate::report::Progress;

pub mod figures;
pub mod fleet;
pub mod play;
pub mod requests;
pub mod rest;
pub mod shown;

/// Name of the folder for images and logs, below `target`.
const FOLDER: &str = "bench-kubernetes";
/// Namespace of the VMs.
const NAMESPACE: &str = "bench";
/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(300);
/// A lost seat is replaced after so many seconds.
const REPLACE_AFTER_S: u32 = 10;

/// Runs the parts, prints the report and writes it where it was asked for. Exit code 1 if something could not be measured.
///
/// # Errors
/// If it can't even begin, or a file can't be written.
pub fn run(options: &Options, command: String) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    if !prerequisites::native_hosts_can_be_made(&progress) {
        return Ok(ExitCode::from(2));
    }
    let folder = new_folder(FOLDER)?;
    let report = measure(options, command, &folder, &progress);
    tables::conclude(&report, options, &folder)
}

/// Measures every part that was asked for. What can't be measured is a complaint of the report.
pub fn measure(options: &Options, command: String, folder: &Path, progress: &Progress) -> Report {
    let began = Instant::now();
    let mut report = Report::new(options, options.profile.name(), command);
    report.machine = Facts::read();
    let busy = BusyTime::read();
    for part in options.parts.iter().filter(|part| part.is_of_kubernetes()) {
        let result = match part {
            Part::Cluster => play::measure(options, folder, progress).map(|figures| report.cluster = Some(figures)),
            Part::Operator => rest::measure(options, folder, progress).map(|figures| report.operator = Some(figures)),
            _ => fleet::measure(options, progress).map(|figures| report.fleet = Some(figures)),
        };
        report.note(progress, part.name(), result);
    }
    let others = |before: BusyTime| BusyTime::read()?.others_since(before, own_ticks());
    report.machine.others_share = busy.and_then(others);
    report.took_s = began.elapsed().as_secs_f64();
    report.sum_up();
    report
}

fn say(progress: &Progress) -> Say {
    let lines = progress.clone();
    Arc::new(move |text| lines.say(text))
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A VM with the embedded guest.
fn vm(name: &str, memory: &str, class: &str) -> Value {
    json!({
        "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "machine": {"memory": memory},
            "boot": {"image": {"reference": GUEST_IMAGE, "pullPolicy": "Never"}},
            "disks": [{"name": "root", "size": "64Mi", "storageClassName": class}],
            "networks": [{"name": "front", "bridge": {"name": CLIENT_BRIDGE}}],
            "faultTolerance": {"replaceAfterSeconds": REPLACE_AFTER_S},
            "resources": {"cpuRequest": "100m"},
        },
    })
}

/// Waits until the operator says that a VM is protected.
fn wait_protected(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    wait_for(&format!("VM {name} is protected"), PATIENCE, || {
        let vm = cluster.get(&["ftvm", "--namespace", NAMESPACE, name])?;
        let conditions = vm["status"]["conditions"].as_array().context("no conditions yet")?;
        let found = conditions.iter().find(|condition| condition["type"] == "Protected");
        ensure!(found.is_some_and(|found| found["status"] == "True"), "{}", vm["status"]);
        Ok(())
    })
}

fn delete(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let words = ["delete", "ftvm", name, "--namespace", NAMESPACE, "--timeout=180s"];
    cluster.kubectl(&words).map(drop)
}

/// The definition of the resource, where no chart brings it.
fn define(cluster: &Cluster) -> anyhow::Result<()> {
    let path = workspace()?.join("crds/ftvm.dev_faulttolerantvms.yaml");
    let definition = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    cluster.apply(&definition)?;
    let name = "crd/faulttolerantvms.ftvm.dev";
    let words = ["wait", "--for=condition=Established", name, "--timeout=180s"];
    cluster.kubectl(&words).map(drop)
}
