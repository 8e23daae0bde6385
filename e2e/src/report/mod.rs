//! What a demonstration found: as JSON for programs, as a table for people, and lines of progress while it runs.
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use crate::demo::Options;

mod progress;
mod table;

pub use progress::Progress;
pub use table::table;

/// One fault and what came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Round {
    /// Counted from 1.
    pub round: u32,
    /// Host that was active when the fault struck.
    pub active_before: String,
    /// Host that is active afterwards.
    pub active_after: String,
    /// Host of the standby once protection had returned.
    pub standby_after: String,
    /// Longest time without an answer while nothing was wrong, just before the fault, in milliseconds.
    pub calm_gap_ms: f64,
    /// Longest time without an answer from the fault until the guest ran on, in milliseconds.
    pub gap_ms: f64,
    /// Longest time without an answer from then until protection had returned, in milliseconds.
    pub rebuild_gap_ms: f64,
    /// From the fault until the machine was protected again, in milliseconds; none if protection was never lost.
    pub reprotect_ms: Option<f64>,
    /// Answers that turned out lost in this round, of any kind.
    pub lost_answers: u64,
    /// Answers that came twice, and requests carried out twice, in this round.
    pub duplicated_answers: u64,
    /// Frames with new content from two hosts at once, or rewritten streams, in this round.
    pub dual_active: u64,
    /// Frames that the deposed host sent after it was deposed; all of them repetitions unless `dual_active` says so.
    pub late_frames: u64,
    /// Median pause of the guest by a checkpoint on the host that was active before the fault, in microseconds.
    pub pause_us_p50: Option<f64>,
    /// Pause that 99 of 100 checkpoints there did not exceed, in microseconds.
    pub pause_us_p99: Option<f64>,
    /// Epochs cut since the machine's start, as of this round's end.
    pub epochs: u64,
    /// Bytes sent over the replication link by the host that was active before the fault, since it was started.
    pub sent_bytes: u64,
    /// When the change of sides reached its steps where the guest runs now, in microseconds: `takeover_*` or `switchover_*` of that seat's
    /// status.
    pub change_us: serde_json::Map<String, serde_json::Value>,
    /// The guest's self-check passed, and both sides had the same memory and the same disks.
    pub examined: bool,
}

/// Everything that a demonstration found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The fault, as on the command line.
    pub fault: String,
    /// The guest, as on the command line.
    pub guest: String,
    /// Guest memory.
    pub memory_mib: u32,
    /// Guest CPUs.
    pub vcpus: u32,
    /// Rounds completed.
    pub rounds: u32,
    /// From the beginning (on a cluster: from `kubectl apply`) until the machine was protected for the first time, in milliseconds.
    pub protected_ms: Option<f64>,
    /// Longest gap of all rounds.
    pub gap_ms: f64,
    /// Median of the rounds' gaps.
    pub gap_ms_p50: f64,
    /// Answers received in all.
    pub answers: u64,
    /// Answers lost in all.
    pub lost_answers: u64,
    /// Answers duplicated in all.
    pub duplicated_answers: u64,
    /// Signs of two active hosts in all.
    pub dual_active: u64,
    /// Median of the rounds' medians, in microseconds.
    pub pause_us_p50: Option<f64>,
    /// Worst of the rounds' 99th percentiles, in microseconds.
    pub pause_us_p99: Option<f64>,
    /// Longest time until protection returned, in milliseconds.
    pub reprotect_ms: Option<f64>,
    /// Epochs cut.
    pub epochs: u64,
    /// Bytes sent over replication links by active hosts.
    pub sent_bytes: u64,
    /// Median time from request to answer, in microseconds.
    pub latency_us_p50: Option<u64>,
    /// Time from request to answer that 99 of 100 did not exceed, in microseconds.
    pub latency_us_p99: Option<u64>,
    /// Everything that must not be, one line each; empty if the demonstration succeeded.
    pub complaints: Vec<String>,
    /// Each round.
    pub per_round: Vec<Round>,
    /// The engine's own counters at the end, by host.
    pub counters: BTreeMap<String, serde_json::Map<String, serde_json::Value>>,
}

impl Report {
    /// A report without rounds.
    pub fn new(options: &Options) -> Self {
        Self {
            fault: options.fault.name().to_owned(),
            guest: options.guest.name().to_owned(),
            memory_mib: options.memory_mib,
            vcpus: options.vcpus,
            ..Self::default()
        }
    }

    /// A play that failed outside of any round, which is told, too.
    pub fn failed(options: &Options, error: &anyhow::Error, progress: &Progress) -> Self {
        progress.bad(format!("{error:#}"));
        let mut report = Self::new(options);
        report.complaints.push(format!("{error:#}"));
        report
    }

    /// Prints the table, writes JSON if that was asked for, and says where `logs` are if it did not pass; returns the exit code.
    ///
    /// # Errors
    /// If the JSON can't be written.
    pub fn conclude(&self, options: &Options, progress: &Progress, logs: Option<&str>) -> anyhow::Result<ExitCode> {
        print!("{}", table(self, progress.colours()));
        if let Some(path) = &options.json {
            self.write_json(path)
                .with_context(|| format!("writing {}", path.display()))?;
            println!("  written to {}\n", path.display());
        }
        if self.passed() {
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(logs) = logs {
            println!("  {logs}\n");
        }
        Ok(ExitCode::FAILURE)
    }

    /// Derives the totals from the rounds.
    pub fn sum_up(&mut self) {
        self.rounds = self.per_round.len() as u32;
        let of = |value: fn(&Round) -> Option<f64>| -> Vec<f64> {
            let mut values: Vec<f64> = self.per_round.iter().filter_map(value).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let gaps = of(|round| Some(round.gap_ms));
        let (medians, worst) = (of(|round| round.pause_us_p50), of(|round| round.pause_us_p99));
        self.reprotect_ms = of(|round| round.reprotect_ms).last().copied();
        self.gap_ms = gaps.last().copied().unwrap_or(0.0);
        self.gap_ms_p50 = middle(&gaps).unwrap_or(0.0);
        self.pause_us_p50 = middle(&medians);
        self.pause_us_p99 = worst.last().copied();
        self.epochs = self.per_round.iter().map(|round| round.epochs).max().unwrap_or(0);
        self.sent_bytes = self.per_round.iter().map(|round| round.sent_bytes).sum();
    }

    /// True if nothing was lost, doubled or wrong.
    pub fn passed(&self) -> bool {
        self.complaints.is_empty() && self.lost_answers == 0 && self.dual_active == 0
    }

    /// Writes it as JSON.
    pub fn write_json(&self, path: &Path) -> std::io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(path, text)
    }
}

/// The middle of sorted values.
fn middle(sorted: &[f64]) -> Option<f64> {
    sorted.get(sorted.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(number: u32, gap_ms: f64, pause: f64) -> Round {
        Round {
            round: number,
            gap_ms,
            pause_us_p50: Some(pause),
            pause_us_p99: Some(pause * 2.0),
            epochs: u64::from(number) * 100,
            sent_bytes: 1000,
            reprotect_ms: Some(gap_ms * 10.0),
            ..Round::default()
        }
    }

    #[test]
    fn totals_follow_from_the_rounds() {
        let mut report = Report {
            per_round: vec![round(1, 20.0, 5.0), round(2, 10.0, 7.0), round(3, 30.0, 6.0)],
            ..Report::default()
        };
        report.sum_up();
        assert_eq!((report.rounds, report.gap_ms, report.gap_ms_p50), (3, 30.0, 20.0));
        assert_eq!(
            (report.pause_us_p50, report.pause_us_p99, report.reprotect_ms),
            (Some(6.0), Some(14.0), Some(300.0))
        );
        assert_eq!((report.epochs, report.sent_bytes), (300, 3000));
    }

    #[test]
    fn json_has_the_promised_keys() {
        let mut report = Report {
            per_round: vec![round(1, 1.0, 2.0)],
            ..Report::default()
        };
        report.sum_up();
        let value = serde_json::to_value(&report).unwrap();
        for key in [
            "gap_ms",
            "lost_answers",
            "dual_active",
            "pause_us_p50",
            "pause_us_p99",
            "reprotect_ms",
            "rounds",
        ] {
            assert!(value[key].is_number(), "{key}: {}", value[key]);
        }
        assert_eq!(value["per_round"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn any_loss_fails() {
        assert!(Report::default().passed());
        assert!(
            !Report {
                lost_answers: 1,
                ..Report::default()
            }
            .passed()
        );
        assert!(
            !Report {
                dual_active: 1,
                ..Report::default()
            }
            .passed()
        );
        assert!(
            !Report {
                complaints: vec!["x".to_owned()],
                ..Report::default()
            }
            .passed()
        );
    }
}
