//! One protected VM to which nothing happens: what operator and daemons still write, and what the operator takes of memory.
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::json;

use super::super::process::ProcessMemory;
use super::figures::OperatorFigures;
use super::requests::Requests;
use super::{NAMESPACE, Options, say, vm, wait_protected};
use crate::cluster::install::Images;
use crate::cluster::{self, Cluster};
use crate::demo::Guest;
use crate::report::Progress;

/// A daemon writes interval and lag of an active seat so often (`docs/kubernetes.md`), and the operator copies them into the status.
pub const REFRESH: Duration = Duration::from_secs(20 * 60);
const WRITES_A_REFRESH: f64 = 2.0;
/// The operator applies the budget and the network policy of a VM anew so often.
pub const SHARED: Duration = Duration::from_secs(3600);
/// Budget and network policy.
pub const WRITES_A_SHARED: f64 = 2.0;
/// After a VM became protected its daemons tell interval and lag for the first time.
const SETTLE: Duration = Duration::from_secs(20);
/// Replicas of the chart's operator.
const REPLICAS: usize = 2;

/// Protects a VM and looks on.
///
/// # Errors
/// If it is not protected in the end, or the operator does not run as the chart says.
pub fn measure(options: &Options, folder: &Path, progress: &Progress) -> anyhow::Result<OperatorFigures> {
    let images = Images::make(folder, options.profile, Guest::Embedded)?;
    let cluster = Cluster::start(cluster::Options {
        audit: true,
        say: say(progress),
        ..cluster::Options::default()
    })?;
    cluster.install(&images)?;
    cluster.make_namespace(NAMESPACE, &json!({}))?;
    cluster.apply(&vm("rest", "128Mi", "local").to_string())?;
    wait_protected(&cluster, "rest")?;
    progress.say("operator: the VM is protected and left alone");
    std::thread::sleep(SETTLE);
    let before = cluster.audit_events()?.len();
    let begin = Instant::now();
    std::thread::sleep(options.rest_window());
    let window = begin.elapsed();
    let events = cluster.audit_events()?;
    wait_protected(&cluster, "rest").context("at the end of the window")?;
    let requests = Requests::count(events.get(before..).unwrap_or_default());
    ensure!(
        requests.kubelet_writes > 0 && requests.election_writes > 0,
        "the audit log has nothing of kubelets or of the election in {:.0} s: it can't be believed: {requests:?}",
        window.as_secs_f64()
    );
    figures(window, requests, replicas(&cluster)?)
}

/// Memory of all replicas, wherever they run.
fn replicas(cluster: &Cluster) -> anyhow::Result<Vec<ProcessMemory>> {
    let mut found = Vec::new();
    for node in cluster.nodes() {
        for pid in node.native()?.processes_in_pods("ftvm-operator")? {
            found.push(ProcessMemory::of(pid)?);
        }
    }
    ensure!(
        found.len() == REPLICAS,
        "{} operators run instead of {REPLICAS}",
        found.len()
    );
    Ok(found)
}

fn figures(window: Duration, requests: Requests, replicas: Vec<ProcessMemory>) -> anyhow::Result<OperatorFigures> {
    let an_hour = 3600.0 / window.as_secs_f64();
    let measured = (requests.operator_writes + requests.daemon_writes) as f64 * an_hour;
    let periodic = periodic_writes_per_vm_hour(window);
    let most = replicas.iter().map(|memory| memory.pss_bytes).max();
    Ok(OperatorFigures {
        window_s: window.as_secs_f64(),
        measured_writes_per_vm_hour: measured,
        periodic_writes_per_vm_hour: periodic,
        writes_per_vm_hour: measured + periodic,
        election_writes_per_hour: requests.election_writes as f64 * an_hour,
        requests,
        pss_bytes_max: most.context("no replica")?,
        replicas,
    })
}

/// What a window of this length need not have, an hour: of each thing that comes once in a longer time.
fn periodic_writes_per_vm_hour(window: Duration) -> f64 {
    let rare = [(REFRESH, WRITES_A_REFRESH), (SHARED, WRITES_A_SHARED)];
    let rare = rare.into_iter().filter(|(period, _)| window < *period);
    rare.map(|(period, writes)| writes * 3600.0 / period.as_secs_f64())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rare_is_computed_only_where_it_can_be_missed() {
        assert_eq!(periodic_writes_per_vm_hour(Duration::from_secs(120)), 8.0);
        assert_eq!(periodic_writes_per_vm_hour(REFRESH), 2.0);
        assert_eq!(periodic_writes_per_vm_hour(SHARED), 0.0);
        let requests = Requests {
            operator_writes: 1,
            daemon_writes: 2,
            election_writes: 30,
            ..Requests::default()
        };
        let figures = figures(Duration::from_secs(120), requests, vec![ProcessMemory::default()]).unwrap();
        assert_eq!(
            (figures.measured_writes_per_vm_hour, figures.writes_per_vm_hour),
            (90.0, 98.0)
        );
        assert_eq!(figures.election_writes_per_hour, 900.0);
    }
}
