//! A VM on a real cluster before the eyes of a client: its node is killed, or drained, and the third one takes a seat.
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::super::report::median;
use super::figures::{ClusterFigures, FaultFigures};
use super::{NAMESPACE, Options, delete, milliseconds, vm, wait_protected};
use crate::cluster::Cluster;
use crate::demo::cluster::{self as stage, on_stage};
use crate::demo::rounds::Stage;
use crate::demo::witness::EmbeddedWitness;
use crate::demo::{Fault, Options as DemoOptions};
use crate::report::Progress;

type ThisStage<'a> = Stage<'a, EmbeddedWitness>;

/// A drained node's seat goes within this time; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);
/// How often is looked where the standby is.
const LOOK: Duration = Duration::from_millis(50);

/// Plays all rounds on one cluster.
///
/// # Errors
/// If something was lost, or does not become protected: then times do not matter.
pub fn measure(options: &Options, folder: &Path, progress: &Progress) -> anyhow::Result<ClusterFigures> {
    let plan = options.plan();
    let play = DemoOptions {
        fault: Fault::None,
        // Each lost or deleted seat leaves a volume behind.
        rounds: 2 * plan.nodes_lost + 2 * plan.applies,
        ..DemoOptions::default()
    };
    let setting = stage::Setting::new(options.profile);
    on_stage(&play, setting, folder, progress, |mut stage, cluster| {
        let (mut killed, mut drained) = (Vec::new(), Vec::new());
        for _ in 0..plan.nodes_lost {
            killed.push(round(&mut stage, cluster, progress, kill).context("a killed node")?);
            drained.push(round(&mut stage, cluster, progress, drain).context("a drained node")?);
        }
        let (report, _) = stage.end();
        if !report.passed() {
            bail!("{}", report.complaints.join("; "));
        }
        let mut protected_ms = vec![report.protected_ms.context("it was never protected")?];
        let words = [
            "delete",
            "ftvm",
            stage::VM,
            "--namespace",
            stage::NAMESPACE,
            "--timeout=180s",
        ];
        cluster.kubectl(&words)?;
        cluster.make_namespace(NAMESPACE, &serde_json::json!({}))?;
        for number in 1..plan.applies {
            protected_ms.push(apply(cluster, &format!("applied-{number}"), progress)?);
        }
        let lost = report.lost_answers + report.duplicated_answers + report.dual_active;
        Ok(ClusterFigures {
            protected_ms_max: longest(&protected_ms),
            protected_ms,
            kill_node: figures(&killed),
            drain: figures(&drained),
            lost_answers: lost,
        })
    })
}

/// Applies a VM as the demonstration's; returns how long it took until it was protected, and takes it away.
fn apply(cluster: &Cluster, name: &str, progress: &Progress) -> anyhow::Result<f64> {
    let begin = Instant::now();
    cluster.apply(&vm(name, "128Mi", "local").to_string())?;
    wait_protected(cluster, name)?;
    let took = begin.elapsed();
    progress.say(format!(
        "cluster: protected {:.1} s after it was applied",
        took.as_secs_f64()
    ));
    delete(cluster, name)?;
    Ok(milliseconds(took))
}

type Strike = fn(&mut ThisStage<'_>, &Cluster, usize) -> anyhow::Result<Instant>;

fn kill(_: &mut ThisStage<'_>, cluster: &Cluster, node: usize) -> anyhow::Result<Instant> {
    cluster.nodes()[node].kill()
}

fn drain(stage: &mut ThisStage<'_>, _: &Cluster, node: usize) -> anyhow::Result<Instant> {
    let begin = Instant::now();
    stage.system().hand_over(node)?;
    Ok(begin)
}

/// Waits until the standby is on another node than this one, from which the guest came: after a hand-over its source follows until its pod ends.
fn protected_elsewhere(stage: &mut ThisStage<'_>, node: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while stage.pair()?.standby == node {
        ensure!(
            Instant::now() < deadline,
            "the seat came back on the node that it lost: nothing was measured"
        );
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Gap and time until protected again, in milliseconds. Afterwards everything is compared and the node is of use again.
fn round(
    stage: &mut ThisStage<'_>,
    cluster: &Rc<Cluster>,
    progress: &Progress,
    strike: Strike,
) -> anyhow::Result<(f64, f64)> {
    let before = stage.pair()?;
    stage.answers_go_on()?;
    let struck = strike(stage, cluster, before.active)?;
    let (after, gap_ms) = stage.taken_over(before)?;
    ensure!(after == before.standby, "node {after} took over from {before:?}");
    protected_elsewhere(stage, before.active)?;
    let reprotect_ms = milliseconds(struck.elapsed());
    progress.say(format!(
        "cluster: gap {gap_ms:.1} ms, protected again after {:.1} s",
        reprotect_ms / 1e3
    ));
    stage.examine()?;
    if !cluster.nodes()[before.active].is_running() {
        cluster.nodes()[before.active].start()?;
    }
    stage.system().make_spare(before.active)?;
    Ok((gap_ms, reprotect_ms))
}

fn figures(rounds: &[(f64, f64)]) -> FaultFigures {
    let (gap_ms, reprotect_ms): (Vec<f64>, Vec<f64>) = rounds.iter().copied().unzip();
    FaultFigures {
        gap_ms_max: longest(&gap_ms),
        gap_ms_p50: median(gap_ms.iter().copied()).unwrap_or_default(),
        reprotect_ms_max: longest(&reprotect_ms),
        gap_ms,
        reprotect_ms,
    }
}

fn longest(times: &[f64]) -> f64 {
    times.iter().copied().fold(0.0, f64::max)
}
