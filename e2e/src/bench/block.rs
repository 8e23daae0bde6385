//! Throughput of the guest's disk, with protection and without: the guest's own load (`crate::guest_blocks`), each case in both
//! states, in turns.
//!
//! ```text
//!   turn      protected          alone             protected           alone      …
//!   pair      A ═ B              A, B's host dead  A ═ C (replaced)    A          …
//!   guest     write all, every case for a while, read all back    the same        …
//! ```
//!
//! The guest compares every byte that it reads with what it wrote: a wrong one is no figure but an error, as is a lost journal record.
use std::path::Path;

use anyhow::ensure;
use serde::Serialize;

use super::goals::{Bound, Verdict};
use super::pair::Pair;
use super::report::{Report, median};
use super::tables::{Table, percent, thousands};
use super::{Options, Plan};
use crate::demo::programs::Programs;
use crate::guest_blocks::{AREA_MAX_BYTES, BLOCK_MAX_BYTES, BlockLoad, BlockReport, UNIT_BYTES};
use crate::report::Progress;

/// Journal records that the guest has when the loads begin, and must have when they are over.
const RECORDS: u32 = 20;
const SIZES_KIB: [u32; 3] = [4, 64, 256];
const DEPTHS: [u32; 2] = [1, 32];
/// Sizes in KiB, depths and writes from flush to flush of the loads that flush.
const FLUSHED: [(u32, u32, u32); 2] = [(4, 1, 1), (64, 32, 32)];

/// What is measured: which requests, how many at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    /// `read` or `write`.
    pub access: &'static str,
    /// `sequential` or `random`.
    pub order: &'static str,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Requests in the queue at a time.
    pub depth: u32,
    /// A flush after so many writes; 0 for none.
    pub flush_every: u32,
}

impl Case {
    /// Reads and writes, in order and not, of every size at every depth, and writes with flushes.
    fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for order in ["sequential", "random"] {
            let case = |access, kib: u32, depth, flush_every| Self {
                access,
                order,
                block_bytes: kib << 10,
                depth,
                flush_every,
            };
            for access in ["read", "write"] {
                let sizes = SIZES_KIB.iter().flat_map(|kib| DEPTHS.map(|depth| (*kib, depth)));
                cases.extend(sizes.map(|(kib, depth)| case(access, kib, depth, 0)));
            }
            cases.extend(FLUSHED.map(|(kib, depth, flush_every)| case("write", kib, depth, flush_every)));
        }
        cases
    }

    fn load(self, plan: &Plan) -> BlockLoad {
        BlockLoad {
            writes: self.access == "write",
            random: self.order == "random",
            block_bytes: self.block_bytes,
            depth: self.depth,
            flush_every: self.flush_every,
            limit_ms: plan.block_window.as_millis() as u32,
            limit_requests: 0,
        }
    }

    fn describe(self) -> String {
        let flushes = match self.flush_every {
            0 => String::new(),
            1 => ", each flushed".to_owned(),
            every => format!(", flush every {every}"),
        };
        let kib = self.block_bytes >> 10;
        format!(
            "{} {}, {kib} KiB, depth {}{flushes}",
            self.order, self.access, self.depth
        )
    }
}

/// All of the area, one block behind the other.
fn whole_area(writes: bool) -> BlockLoad {
    BlockLoad {
        writes,
        random: false,
        block_bytes: BLOCK_MAX_BYTES as u32,
        depth: 8,
        flush_every: 0,
        limit_ms: 0,
        limit_requests: (AREA_MAX_BYTES / BLOCK_MAX_BYTES as u64) as u32,
    }
}

/// What one case did in one state, in all its windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BlockFigures {
    /// Reads or writes.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Flushes besides.
    pub flushes: u64,
    /// Requests a second; the median of the windows, as everything below but the longest.
    pub requests_per_s: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// Median of the time from a request's way into the queue until the guest saw it done.
    pub latency_us_p50: f64,
    /// 99 of 100 did not take longer.
    pub latency_us_p99: f64,
    /// The longest of all windows.
    pub latency_us_max: f64,
    /// Median of a flush; none without flushes.
    pub flush_us_p50: Option<f64>,
    /// 99 of 100 flushes did not take longer.
    pub flush_us_p99: Option<f64>,
}

impl BlockFigures {
    fn of(windows: &[BlockReport]) -> Self {
        let sum = |of: fn(&BlockReport) -> u64| windows.iter().map(of).sum::<u64>();
        let middle = |of: &dyn Fn(&BlockReport) -> f64| median(windows.iter().map(of)).unwrap_or(0.0);
        let rate = |count: u64, window: &BlockReport| count as f64 * 1e9 / window.elapsed_ns.max(1) as f64;
        let us = |ns: u64| ns as f64 / 1e3;
        let flushes = sum(|window| window.flushes);
        let flushed = |of: &dyn Fn(&BlockReport) -> f64| (flushes > 0).then(|| middle(of));
        let longest = windows.iter().map(|window| window.latency.max_ns).max();
        Self {
            requests: sum(|window| window.requests),
            bytes: sum(|window| window.bytes),
            flushes,
            requests_per_s: middle(&|window| rate(window.requests, window)),
            bytes_per_s: middle(&|window| rate(window.bytes, window)),
            latency_us_p50: middle(&|window| us(window.latency.p50_ns)),
            latency_us_p99: middle(&|window| us(window.latency.p99_ns)),
            latency_us_max: us(longest.unwrap_or(0)),
            flush_us_p50: flushed(&|window| us(window.flush_latency.p50_ns)),
            flush_us_p99: flushed(&|window| us(window.flush_latency.p99_ns)),
        }
    }
}

/// One case, with and without protection.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BlockPoint {
    /// What was asked for.
    #[serde(flatten)]
    pub case: Case,
    /// With a standby.
    pub protected: BlockFigures,
    /// The same engine alone.
    pub unprotected: BlockFigures,
    /// Bytes a second of the one as a share of the other's.
    pub share: f64,
}

/// Throughput of the guest's disk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Block {
    /// Windows of each case in each state.
    pub rounds: u32,
    /// Length of a window.
    pub window_ms: u64,
    /// The part of the disk that the loads have.
    pub area_bytes: u64,
    /// Each case.
    pub points: Vec<BlockPoint>,
}

/// Measures all cases, with protection and without, in turns, on a pair of its own.
///
/// # Errors
/// If the pair does not do what it should, or the guest reads other bytes than it wrote.
pub fn measure(options: &Options, programs: &Programs, folder: &Path, progress: &Progress) -> anyhow::Result<Block> {
    let plan = options.plan();
    let cases = Case::all();
    let mut pair = Pair::start(options, programs, folder, progress)?;
    pair.append(RECORDS)?;
    let (mut protected, mut alone) = (Vec::new(), Vec::new());
    for round in 0..plan.block_rounds.max(1) {
        if round > 0 {
            pair.replace()?;
        }
        protected.push(turn(&mut pair, &cases, &plan)?);
        ensure!(
            pair.active_seat()?.protected,
            "protection was lost while the disk's throughput was measured"
        );
        pair.be_alone()?;
        alone.push(turn(&mut pair, &cases, &plan)?);
        progress.say(format!(
            "block: round {} measured with and without protection",
            round + 1
        ));
    }
    pair.check(RECORDS)?;
    let windows =
        |turns: &[Vec<BlockReport>], case: usize| -> Vec<BlockReport> { turns.iter().map(|turn| turn[case]).collect() };
    let point = |(index, case): (usize, &Case)| {
        let [with, without] = [&protected, &alone].map(|turns| BlockFigures::of(&windows(turns, index)));
        BlockPoint {
            case: *case,
            protected: with,
            unprotected: without,
            share: with.bytes_per_s / without.bytes_per_s.max(1e-9),
        }
    };
    Ok(Block {
        rounds: plan.block_rounds.max(1),
        window_ms: plan.block_window.as_millis() as u64,
        area_bytes: alone[0][0].area_bytes,
        points: cases.iter().enumerate().map(point).collect(),
    })
}

/// Every case once, in the state that the pair is in. What was there before is written over first, and what is there in the end is read.
fn turn(pair: &mut Pair<'_>, cases: &[Case], plan: &Plan) -> anyhow::Result<Vec<BlockReport>> {
    let term = pair.active_seat()?.term;
    write_all(pair)?;
    let reports = cases.iter().map(|case| run(pair, case.load(plan)));
    let reports = reports.collect::<anyhow::Result<_>>()?;
    read_back(pair)?;
    let after = pair.active_seat()?.term;
    ensure!(
        after == term,
        "the machine changed its term from {term} to {after} while its disk's throughput was measured"
    );
    Ok(reports)
}

/// Has the guest write all of its area.
///
/// # Errors
/// If it does not, or its disk fails.
pub fn write_all(pair: &mut Pair<'_>) -> anyhow::Result<()> {
    run(pair, whole_area(true)).map(drop)
}

/// Has the guest read all of its area, and compare it with what it wrote.
///
/// # Errors
/// If anything differs, or its disk fails.
pub fn read_back(pair: &mut Pair<'_>) -> anyhow::Result<()> {
    run(pair, whole_area(false)).map(drop)
}

fn run(pair: &mut Pair<'_>, load: BlockLoad) -> anyhow::Result<BlockReport> {
    let report = pair.blocks(load)?;
    judge(&load, &report)?;
    Ok(report)
}

/// Judges what the guest tells of a load.
fn judge(load: &BlockLoad, report: &BlockReport) -> anyhow::Result<()> {
    ensure!(
        report.wrong_units == 0,
        "of what the guest read from its disk {} pieces of {UNIT_BYTES} bytes have other bytes than it wrote, the first one {} bytes \
         behind the begin of the load's area ({load:?}): the disk lost or changed data",
        report.wrong_units,
        report.first_wrong_unit * UNIT_BYTES as u64
    );
    ensure!(
        report.failed == 0,
        "{} of the {} requests and {} flushes to the guest's disk failed ({load:?})",
        report.failed,
        report.requests,
        report.flushes
    );
    let bytes = report.requests * u64::from(load.block_bytes);
    ensure!(
        report.requests > 0 && report.bytes == bytes && report.elapsed_ns > 0,
        "the guest tells of {} requests with {} bytes in {} ns ({load:?})",
        report.requests,
        report.bytes,
        report.elapsed_ns
    );
    ensure!(
        report.flushes > 0 || load.flush_every == 0,
        "the guest flushed nothing during {} writes ({load:?})",
        report.requests
    );
    Ok(())
}

/// The goals: a share for reads and writes, in order and not. The worst of all sizes, depths and flushes counts.
pub(super) fn verdicts(report: &Report) -> [Verdict; 4] {
    let worst = |order: &str, access: &str| {
        let points = report.block.iter().flat_map(|block| &block.points);
        let of = points.filter(|point| point.case.order == order && point.case.access == access);
        of.map(|point| point.share).reduce(f64::min)
    };
    let goal = |name, order: &str, access: &str| {
        let what = format!("{order} {access}s of the guest's disk, by those without protection, worst case");
        Verdict::new(name, what, (Bound::AtLeast, 0.9, "of 1"), worst(order, access))
    };
    [
        goal("block_sequential_read_share", "sequential", "read"),
        goal("block_sequential_write_share", "sequential", "write"),
        goal("block_random_read_share", "random", "read"),
        goal("block_random_write_share", "random", "write"),
    ]
}

/// The table of all cases.
pub(super) fn table(report: &Report) -> Table {
    let head = [
        "",
        "MB/s protected",
        "alone",
        "share",
        "p50 µs protected",
        "alone",
        "p99 µs protected",
        "alone",
        "requests/s protected",
        "alone",
    ];
    let mut table = Table::new("Throughput of the guest's disk", &head);
    for point in report.block.iter().flat_map(|block| &block.points) {
        let BlockPoint {
            protected, unprotected, ..
        } = point;
        let pair = |of: fn(&BlockFigures) -> f64| [protected, unprotected].map(|figures| thousands(of(figures)));
        let mut cells = vec![point.case.describe()];
        cells.extend(pair(|figures| figures.bytes_per_s / 1e6));
        cells.push(percent(point.share));
        cells.extend(pair(|figures| figures.latency_us_p50));
        cells.extend(pair(|figures| figures.latency_us_p99));
        cells.extend(pair(|figures| figures.requests_per_s));
        table.row(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_blocks::Latency;

    fn window(requests: u64, elapsed_ms: u64) -> BlockReport {
        BlockReport {
            requests,
            bytes: requests * 4096,
            elapsed_ns: elapsed_ms * 1_000_000,
            latency: Latency {
                p50_ns: requests * 1000,
                p99_ns: requests * 2000,
                max_ns: requests * 3000,
            },
            ..BlockReport::default()
        }
    }

    #[test]
    fn every_case_is_one_that_the_guest_takes() {
        let cases = Case::all();
        assert_eq!(cases.len(), 2 * (2 * 6 + 2));
        for plan in [Plan::SHORT, Plan::FULL] {
            let loads = cases.iter().map(|case| case.load(&plan));
            for load in loads.chain([whole_area(true), whole_area(false)]) {
                let (arg, arg2) = load.encode();
                assert_eq!(BlockLoad::decode(arg, arg2), Some(load));
            }
        }
        for (index, case) in cases.iter().enumerate() {
            assert!(!cases[..index].contains(case), "{case:?} twice");
        }
    }

    #[test]
    fn the_whole_area_is_written_and_read() {
        let load = whole_area(true);
        let bytes = u64::from(load.limit_requests) * u64::from(load.block_bytes);
        assert_eq!(bytes, AREA_MAX_BYTES);
    }

    #[test]
    fn other_bytes_than_were_written_are_no_figure() {
        let read = whole_area(false);
        let sound = BlockReport {
            bytes: 10 * u64::from(read.block_bytes),
            ..window(10, 5)
        };
        judge(&read, &sound).unwrap();
        let judged = |load: &BlockLoad, report: BlockReport| judge(load, &report).unwrap_err().to_string();
        let wrong = BlockReport {
            wrong_units: 1,
            first_wrong_unit: 2,
            ..sound
        };
        let found = judged(&read, wrong);
        assert!(
            found.contains("other bytes than it wrote") && found.contains("8192 bytes behind"),
            "{found}"
        );
        assert!(judged(&read, BlockReport { failed: 1, ..sound }).contains("failed"));
        for bad in [
            BlockReport { bytes: 1, ..sound },
            BlockReport { elapsed_ns: 0, ..sound },
            BlockReport::default(),
        ] {
            assert!(judged(&read, bad).contains("tells of"), "{bad:?}");
        }
        let flushing = BlockLoad {
            flush_every: 3,
            ..whole_area(true)
        };
        assert!(judged(&flushing, sound).contains("flushed nothing"));
        judge(&flushing, &BlockReport { flushes: 1, ..sound }).unwrap();
    }

    #[test]
    fn figures_are_medians_of_their_windows() {
        let figures = BlockFigures::of(&[window(100, 1000), window(900, 1000), window(300, 1000)]);
        assert_eq!((figures.requests, figures.bytes), (1300, 1300 * 4096));
        assert_eq!((figures.requests_per_s, figures.latency_us_p50), (300.0, 300.0));
        assert_eq!((figures.latency_us_p99, figures.latency_us_max), (600.0, 2700.0));
        assert_eq!((figures.flushes, figures.flush_us_p50), (0, None));
        let flushed = BlockReport {
            flushes: 1,
            flush_latency: Latency {
                p50_ns: 7000,
                p99_ns: 8000,
                max_ns: 9000,
            },
            ..window(1, 1)
        };
        let figures = BlockFigures::of(&[flushed]);
        assert_eq!((figures.flush_us_p50, figures.flush_us_p99), (Some(7.0), Some(8.0)));
    }

    #[test]
    fn the_worst_case_of_its_kind_is_judged() {
        let figures = BlockFigures::of(&[window(1, 1)]);
        let point = |case: Case, share| BlockPoint {
            case,
            protected: figures,
            unprotected: figures,
            share,
        };
        let cases = Case::all();
        let mut points: Vec<BlockPoint> = cases.iter().map(|case| point(*case, 0.95)).collect();
        let write = |point: &&mut BlockPoint| point.case.access == "write" && point.case.order == "random";
        points.iter_mut().rfind(write).unwrap().share = 0.5;
        let report = Report {
            block: Some(Block {
                rounds: 1,
                window_ms: 1,
                area_bytes: AREA_MAX_BYTES,
                points,
            }),
            ..Report::default()
        };
        let judged = verdicts(&report).map(|verdict| (verdict.figure, verdict.met));
        let (good, bad) = ((Some(0.95), Some(true)), (Some(0.5), Some(false)));
        assert_eq!(judged, [good, good, good, bad]);
        assert!(verdicts(&Report::default()).iter().all(|verdict| verdict.met.is_none()));
        // What is sorted out by its part's name has to begin with it.
        assert!(
            verdicts(&report)
                .iter()
                .all(|verdict| verdict.name.starts_with("block"))
        );
    }
}
