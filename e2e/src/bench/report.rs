//! Everything that a run found. Keys of the JSON are stable: new ones may be added, units come last. A part that was not
//! run, or failed, is `null`; then `complaints` says why.
use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::block::Block;
use super::facts::Facts;
use super::goals::Verdict;
use super::kubernetes::figures::{ClusterFigures, FleetFigures, OperatorFigures};
use super::process::ProcessMemory;
use super::window::Pauses;
use super::{Load, Options};
use crate::report::Progress;

/// How everything was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Settings {
    /// The command line.
    pub command: String,
    /// True for a run of seconds whose figures mean nothing.
    pub short: bool,
    /// True for a run of the parts that need a cluster.
    pub kubernetes: bool,
    /// How the engine was built: `fast` or `release`; `dev` for tests of the harness.
    pub profile: String,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Guest CPUs.
    pub vcpus: u32,
    /// Length of an idle epoch, and QEMU's delay between checkpoints.
    pub epoch_ms: u32,
    /// Length of a window in which pauses were counted.
    pub window_ms: u64,
}

/// A load as a key of the report.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LoadKey {
    /// Pages written once an epoch.
    pub dirty_pages: u32,
    /// Whole pages, incompressible, instead of a word of each.
    pub whole_pages: bool,
    /// The guest computes besides.
    pub busy: bool,
}

impl From<Load> for LoadKey {
    fn from(load: Load) -> Self {
        Self {
            dirty_pages: load.dirty_pages,
            whole_pages: load.whole_pages,
            busy: load.busy,
        }
    }
}

/// Pauses of the guest, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PauseFigures {
    /// How many.
    pub pauses: u64,
    /// Median.
    pub pause_us_p50: Option<u64>,
    /// 99 of 100 were not longer.
    pub pause_us_p99: Option<u64>,
    /// The longest.
    pub pause_us_max: Option<u64>,
}

impl From<&Pauses> for PauseFigures {
    fn from(pauses: &Pauses) -> Self {
        Self {
            pauses: pauses.count(),
            pause_us_p50: pauses.quantile_us(0.5),
            pause_us_p99: pauses.quantile_us(0.99),
            pause_us_max: pauses.quantile_us(1.0),
        }
    }
}

/// Our checkpoints under one load.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PausePoint {
    /// The load.
    #[serde(flatten)]
    pub load: LoadKey,
    /// Pauses.
    #[serde(flatten)]
    pub pauses: PauseFigures,
    /// Epochs a second.
    pub epochs_per_s: f64,
    /// Pages that the guest wrote a second.
    pub dirty_pages_per_s: f64,
    /// The same an epoch, each page counted once.
    pub dirty_pages_per_epoch: f64,
    /// Pages that were sent an epoch, those sent twice counted twice.
    pub sent_pages_per_epoch: f64,
    /// Of these, copied inside the pause.
    pub residue_pages_per_epoch: f64,
    /// Payload of an epoch.
    pub bytes_per_epoch: f64,
    /// Bytes on the link for each epoch, heartbeats and everything included, before TLS.
    pub link_bytes_per_epoch: f64,
    /// Share of the time that the guest stood still, for checkpoints.
    pub paused_share: f64,
    /// Share of the time that it was held back because it outran the link.
    pub braked_share: f64,
    /// Units of work a second; zero unless busy.
    pub work_per_s: f64,
    /// `work_per_s` as a share of that of the unprotected guest under the same load; none unless both were measured.
    pub speed_share: Option<f64>,
}

/// Where both engines' processor time goes under one load.
#[derive(Clone, Debug, Serialize)]
pub struct CostPoint {
    /// The load.
    #[serde(flatten)]
    pub load: LoadKey,
    /// Of the active engine, by thread, in microseconds an epoch.
    pub active_us_per_epoch: BTreeMap<String, f64>,
    /// The slowest pauses of the window, with the microseconds of each step.
    pub slowest_pauses: Vec<serde_json::Value>,
    /// Of the standby's, by thread, in microseconds an epoch.
    pub standby_us_per_epoch: BTreeMap<String, f64>,
}

/// Guest speed without protection under one load.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SpeedPoint {
    /// The load.
    #[serde(flatten)]
    pub load: LoadKey,
    /// Units of work a second.
    pub work_per_s: f64,
    /// Pages that the guest wrote a second.
    pub dirty_pages_per_s: f64,
}

/// Time from request to answer, one request at a time.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LatencyPoint {
    /// Requests answered.
    pub requests: u64,
    /// Median.
    pub latency_us_p50: Option<u64>,
    /// 99 of 100 were not longer.
    pub latency_us_p99: Option<u64>,
    /// The longest.
    pub latency_us_max: u64,
    /// Epochs a second meanwhile.
    pub epochs_per_s: f64,
    /// Pauses meanwhile.
    #[serde(flatten)]
    pub pauses: PauseFigures,
}

/// Latency with and without protection.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    /// With a standby.
    pub protected: LatencyPoint,
    /// The same engine alone.
    pub unprotected: LatencyPoint,
    /// What protection adds to the median.
    pub added_us_p50: Option<i64>,
}

/// Guest speed, CPU-bound, without dirtying memory.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Speed {
    /// Units of work a second with a standby.
    pub protected_per_s: f64,
    /// The same engine alone.
    pub unprotected_per_s: f64,
    /// The one as a share of the other.
    pub share: f64,
}

/// What engines take beside guest memory.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Guest memory as configured.
    pub guest_bytes: u64,
    /// Of that, what the guest had written when the standby joined.
    pub filled_bytes: u64,
    /// The active engine's process under the largest load.
    pub active: ProcessMemory,
    /// Its delta cache, part of it.
    pub delta_cache_bytes: u64,
    /// Proportional share without guest memory and delta cache.
    pub active_beside_bytes: u64,
    /// The standby engine's process at the same time.
    pub standby: ProcessMemory,
    /// The most that a standby ever had resident, guest memory, resync and join checkpoint included.
    pub standby_peak_bytes: u64,
    /// That as a multiple of guest memory.
    pub standby_peak_share: f64,
}

/// One full resync.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ResyncRound {
    /// From its begin until the last of the bulk was handed to the connection.
    pub resync_ms: f64,
    /// From the order to replace the seat until the machine was protected, start of the engine and join included.
    pub protected_ms: f64,
    /// Memory and disks, zeroes included.
    pub copied_bytes: u64,
    /// What was sent of it.
    pub sent_bytes: u64,
    /// `sent_bytes` a second.
    pub sent_bytes_per_s: f64,
    /// A plain TLS stream over the loopback, just before.
    pub stream_bytes_per_s: f64,
}

/// Full resyncs.
#[derive(Clone, Debug, Serialize)]
pub struct Resync {
    /// Each one.
    pub rounds: Vec<ResyncRound>,
    /// Median of `sent_bytes_per_s`.
    pub sent_bytes_per_s: f64,
    /// Median of `stream_bytes_per_s`.
    pub stream_bytes_per_s: f64,
    /// The one as a share of the other.
    pub share: f64,
}

/// What a client waits when a fault strikes: rounds of the demonstration.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct GapFigures {
    /// Rounds played.
    pub rounds: u32,
    /// Longest gap.
    pub gap_ms_max: f64,
    /// Median of the gaps.
    pub gap_ms_p50: f64,
    /// Answers lost, which must be none.
    pub lost_answers: u64,
    /// Longest time until protected again.
    pub reprotect_ms: Option<f64>,
}

/// Gaps by fault.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Gap {
    /// SIGKILL to the engine.
    pub kill_engine: GapFigures,
    /// Links down, then every process dies.
    pub kill_host: GapFigures,
}

/// QEMU's live migration under one load.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MigrationPoint {
    /// The load.
    #[serde(flatten)]
    pub load: LoadKey,
    /// Migrations.
    pub migrations: u64,
    /// Median of the downtime, from QEMU stopping the guest to QEMU running it on the other side.
    pub downtime_us_p50: Option<u64>,
    /// The longest.
    pub downtime_us_max: Option<u64>,
    /// Pages that the guest wrote a second before.
    pub dirty_pages_per_s: f64,
}

/// QEMU's COLO checkpoints under one load.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ColoPoint {
    /// The load.
    #[serde(flatten)]
    pub load: LoadKey,
    /// Pauses.
    #[serde(flatten)]
    pub pauses: PauseFigures,
    /// Checkpoints a second.
    pub checkpoints_per_s: f64,
    /// Pages that the guest wrote a second.
    pub dirty_pages_per_s: f64,
    /// The same a checkpoint, each page counted once.
    pub dirty_pages_per_epoch: f64,
    /// Share of the time that the guest stood still.
    pub paused_share: f64,
    /// Units of work a second; zero unless busy.
    pub work_per_s: f64,
    /// `work_per_s` as a share of that of QEMU without COLO; none unless busy.
    pub speed_share: Option<f64>,
}

/// QEMU's pauses as multiples of ours, under one load.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ratio {
    /// The load.
    #[serde(flatten)]
    pub load: LoadKey,
    /// Median of COLO's pauses by median of ours.
    pub colo_p50: Option<f64>,
    /// The same of the 99th percentiles.
    pub colo_p99: Option<f64>,
    /// Median of migration's downtimes by median of our pauses.
    pub migration_p50: Option<f64>,
}

/// A whole run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The machine.
    pub machine: Facts,
    /// How.
    pub settings: Settings,
    /// Our checkpoints.
    pub pause: Option<Vec<PausePoint>>,
    /// Where the engines' processor time goes.
    pub costs: Option<Vec<CostPoint>>,
    /// Guest speed without protection.
    pub unprotected: Option<Vec<SpeedPoint>>,
    /// Guest speed, CPU-bound.
    pub speed: Option<Speed>,
    /// Time from request to answer.
    pub latency: Option<Latency>,
    /// What engines take.
    pub memory: Option<Memory>,
    /// Full resyncs.
    pub resync: Option<Resync>,
    /// What a client waits.
    pub gap: Option<Gap>,
    /// Throughput of the guest's disk.
    pub block: Option<Block>,
    /// QEMU's live migration.
    pub migration: Option<Vec<MigrationPoint>>,
    /// QEMU's COLO.
    pub colo: Option<Vec<ColoPoint>>,
    /// One VM on a cluster and what happens to its nodes.
    pub cluster: Option<ClusterFigures>,
    /// Operator and daemons at rest.
    pub operator: Option<OperatorFigures>,
    /// The operator with many VMs.
    pub fleet: Option<FleetFigures>,
    /// QEMU against ours.
    pub ratios: Vec<Ratio>,
    /// Figures against goals.
    pub goals: Vec<Verdict>,
    /// What could not be measured, and why.
    pub complaints: Vec<String>,
    /// How long the run took.
    pub took_s: f64,
}

impl Report {
    /// An empty report.
    pub fn new(options: &Options, profile: &str, command: String) -> Self {
        Self {
            settings: Settings {
                command,
                short: options.short,
                kubernetes: options.parts.iter().all(|part| part.is_of_kubernetes()),
                profile: profile.to_owned(),
                memory_mib: options.memory_mib,
                vcpus: 1,
                epoch_ms: options.epoch_ms,
                window_ms: options.plan().window.as_millis() as u64,
            },
            ..Self::default()
        }
    }

    /// What could not be measured becomes a complaint.
    pub fn note<T>(&mut self, progress: &Progress, part: &str, result: anyhow::Result<T>) -> Option<T> {
        result
            .map_err(|error| {
                progress.bad(format!("{part}: {error:#}"));
                self.complaints.push(format!("{part}: {error:#}"));
            })
            .ok()
    }

    /// What follows from several parts: shares, ratios, goals.
    pub fn sum_up(&mut self) {
        let unprotected = self.unprotected.clone().unwrap_or_default();
        for point in self.pause.iter_mut().flatten().filter(|point| point.load.busy) {
            let alone = unprotected
                .iter()
                .find(|alone| same(alone.load, point.load) && alone.work_per_s > 0.0);
            point.speed_share = alone.map(|alone| point.work_per_s / alone.work_per_s);
        }
        self.ratios = self
            .pause
            .iter()
            .flatten()
            .map(|ours| self.ratio(ours))
            .filter(|ratio| ratio.colo_p50.is_some() || ratio.migration_p50.is_some())
            .collect();
        self.goals = super::goals::verdicts(self);
    }

    fn ratio(&self, ours: &PausePoint) -> Ratio {
        let by = |theirs: Option<u64>, ours: Option<u64>| match (theirs, ours) {
            (Some(theirs), Some(ours)) if ours > 0 => Some(theirs as f64 / ours as f64),
            _ => None,
        };
        let colo = self.colo.iter().flatten().find(|point| same(point.load, ours.load));
        let migration = self
            .migration
            .iter()
            .flatten()
            .find(|point| same(point.load, ours.load));
        let pauses = ours.pauses;
        Ratio {
            load: ours.load,
            colo_p50: by(colo.and_then(|point| point.pauses.pause_us_p50), pauses.pause_us_p50),
            colo_p99: by(colo.and_then(|point| point.pauses.pause_us_p99), pauses.pause_us_p99),
            migration_p50: by(migration.and_then(|point| point.downtime_us_p50), pauses.pause_us_p50),
        }
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn write_json(&self, path: &Path) -> std::io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(path, text)
    }
}

/// Whether two keys name one load.
pub fn same(one: LoadKey, other: LoadKey) -> bool {
    one.dirty_pages == other.dirty_pages && one.whole_pages == other.whole_pages && one.busy == other.busy
}

/// The middle of some values; of an even number the higher one. None if there are none.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
