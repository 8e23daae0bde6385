//! The project's goals, and how far the figures of a run are from them.
use serde::Serialize;

use super::{block, kubernetes, report::Report};

/// A goal beside its figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// What is measured; a stable key.
    pub name: &'static str,
    /// For people.
    pub what: String,
    /// Unit of figure and goal.
    pub unit: &'static str,
    /// At most this, or at least this if `at_least`.
    pub goal: f64,
    /// The goal is a lower bound.
    pub at_least: bool,
    /// What this run found; none if it was not measured.
    pub figure: Option<f64>,
    /// Whether the goal is met.
    pub met: Option<bool>,
    /// How far the figure is on the wrong side, in percent of the goal; 0 if it is met.
    pub missed_by_percent: Option<f64>,
}

impl Verdict {
    pub(super) fn new(
        name: &'static str,
        what: impl Into<String>,
        (bound, goal, unit): (Bound, f64, &'static str),
        figure: Option<f64>,
    ) -> Self {
        let at_least = bound == Bound::AtLeast;
        let over = |figure: f64| if at_least { goal - figure } else { figure - goal };
        Self {
            name,
            what: what.into(),
            unit,
            goal,
            at_least,
            figure,
            met: figure.map(|figure| over(figure) <= 0.0),
            missed_by_percent: figure.map(|figure| (over(figure) / goal * 100.0).max(0.0)),
        }
    }
}

/// Which side of a goal is the right one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bound {
    AtMost,
    AtLeast,
}

const MIB: f64 = (1u64 << 20) as f64;

/// Every goal of the parts that a run was to measure, beside what it found.
pub fn verdicts(report: &Report) -> Vec<Verdict> {
    if report.settings.kubernetes {
        return kubernetes::shown::verdicts(report);
    }
    of_engine(report)
}

fn of_engine(report: &Report) -> Vec<Verdict> {
    use Bound::{AtLeast, AtMost};
    // The goal is for idle guests and for busy ones; whole pages are a harder load, shown without a goal.
    let points: Vec<_> = report
        .pause
        .iter()
        .flatten()
        .filter(|point| !point.load.whole_pages)
        .collect();
    let p99 = |busy: bool| {
        let of = points.iter().filter(|point| point.load.busy == busy);
        of.filter_map(|point| point.pauses.pause_us_p99.map(|us| us as f64))
            .reduce(f64::max)
    };
    let median_at = |pages: u32| {
        let point = points
            .iter()
            .find(|point| !point.load.busy && point.load.dirty_pages == pages);
        point.and_then(|point| point.pauses.pause_us_p50).map(|us| us as f64)
    };
    let flat = match (median_at(0), median_at(8192)) {
        (Some(none), Some(many)) if none > 0.0 => Some(many / none),
        _ => None,
    };
    let gap = report.gap.as_ref();
    let mut verdicts = vec![
        Verdict::new(
            "pause_us_p99",
            "pause p99, worst of all dirty sets, guest otherwise idle",
            (AtMost, 500.0, "µs"),
            p99(false),
        ),
        Verdict::new(
            "pause_us_p99_busy",
            "pause p99, worst of all dirty sets, guest computing",
            (AtMost, 500.0, "µs"),
            p99(true),
        ),
        Verdict::new(
            "pause_flatness",
            "pause p50 at 8,192 dirty pages by that at none",
            (AtMost, 1.5, "times"),
            flat,
        ),
        Verdict::new(
            "speed_share",
            "guest speed, CPU-bound, of that without protection",
            (AtLeast, 0.97, "of 1"),
            report.speed.map(|speed| speed.share),
        ),
        Verdict::new(
            "gap_ms_kill_engine",
            "gap on a killed engine, longest",
            (AtMost, 20.0, "ms"),
            gap.map(|gap| gap.kill_engine.gap_ms_max),
        ),
        Verdict::new(
            "gap_ms_kill_host",
            "gap on a killed host, longest",
            (AtMost, 500.0, "ms"),
            gap.map(|gap| gap.kill_host.gap_ms_max),
        ),
        Verdict::new(
            "engine_mib",
            "active engine beside guest memory and delta cache",
            (AtMost, 20.0, "MiB"),
            report.memory.map(|memory| memory.active_beside_bytes as f64 / MIB),
        ),
        Verdict::new(
            "standby_peak_share",
            "standby's peak by guest memory",
            (AtMost, 1.1, "times"),
            report.memory.map(|memory| memory.standby_peak_share),
        ),
        Verdict::new(
            "resync_share",
            "full resync by a plain TLS stream",
            (AtLeast, 0.7, "of 1"),
            report.resync.as_ref().map(|resync| resync.share),
        ),
    ];
    verdicts.extend(block::verdicts(report));
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_say_by_how_much_they_are_missed() {
        let at_most = |figure| Verdict::new("x", "x", (Bound::AtMost, 500.0, "µs"), figure);
        assert_eq!(
            (at_most(Some(400.0)).met, at_most(Some(400.0)).missed_by_percent),
            (Some(true), Some(0.0))
        );
        assert_eq!(
            (at_most(Some(600.0)).met, at_most(Some(600.0)).missed_by_percent),
            (Some(false), Some(20.0))
        );
        assert_eq!((at_most(None).met, at_most(None).missed_by_percent), (None, None));
        let at_least = Verdict::new("x", "x", (Bound::AtLeast, 0.8, "of 1"), Some(0.6));
        assert_eq!(at_least.met, Some(false));
        assert!((at_least.missed_by_percent.unwrap() - 25.0).abs() < 1e-9);
    }

    #[test]
    fn an_empty_run_judges_nothing() {
        let verdicts = verdicts(&Report::default());
        assert!(verdicts.iter().all(|verdict| verdict.met.is_none()), "{verdicts:?}");
        assert_eq!(verdicts.len(), 13);
    }
}
