//! The whole benchmark as a test, in seconds: everything can be measured and every promised key is there. Never how long
//! anything took: that is for `cargo xtask bench` on a quiet machine.
use std::path::{Path, PathBuf};

use ftvm_e2e::bench::command::{Built, measure};
use ftvm_e2e::bench::{Options, tables};
use ftvm_e2e::demo::programs::Profile;
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::report::Progress;
use serde_json::Value;

/// Built before the namespaces are entered: there is no network in them.
fn built() -> Built {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-built.json");
    made_outside(&file, || Built::build(Profile::Dev)).expect("the programs build")
}

/// A path such as `resync.rounds.0.resync_ms` into the report.
fn at<'a>(report: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(report, |value, key| match key.parse::<usize>() {
        Ok(index) => &value[index],
        Err(_) => &value[key],
    })
}

/// Every figure that must be above zero, whatever the machine does besides.
const ABOVE_ZERO: &[&str] = &[
    "machine.cpus",
    "settings.memory_mib",
    "pause.0.pauses",
    "pause.0.pause_us_p50",
    "pause.0.pause_us_p99",
    "pause.0.epochs_per_s",
    "pause.0.bytes_per_epoch",
    "pause.0.link_bytes_per_epoch",
    "pause.3.dirty_pages_per_s",
    "pause.3.dirty_pages_per_epoch",
    "pause.3.sent_pages_per_epoch",
    "pause.4.dirty_pages_per_s",
    "pause.5.work_per_s",
    "pause.5.speed_share",
    "pause.8.dirty_pages_per_s",
    "unprotected.0.work_per_s",
    "speed.share",
    "latency.protected.requests",
    "latency.protected.latency_us_p50",
    "latency.protected.latency_us_p99",
    "latency.protected.pauses",
    "latency.unprotected.requests",
    "memory.guest_bytes",
    "memory.filled_bytes",
    "memory.active.pss_bytes",
    "memory.active.rss_bytes",
    "memory.active.guest_bytes",
    "memory.standby.pss_bytes",
    "memory.delta_cache_bytes",
    "memory.standby_peak_share",
    "resync.share",
    "resync.stream_bytes_per_s",
    "resync.rounds.0.resync_ms",
    "resync.rounds.0.sent_bytes",
    "block.area_bytes",
    "block.points.0.share",
    "block.points.0.protected.bytes_per_s",
    "block.points.0.unprotected.requests_per_s",
    "block.points.11.protected.latency_us_p50",
    "block.points.11.unprotected.latency_us_p99",
    "block.points.12.protected.flushes",
    "block.points.12.unprotected.flush_us_p50",
    "block.points.27.share",
    "gap.kill_engine.gap_ms_max",
    "gap.kill_host.gap_ms_p50",
    "gap.kill_host.rounds",
    "migration.0.migrations",
    "migration.0.downtime_us_p50",
    "migration.3.dirty_pages_per_s",
    "colo.0.pauses",
    "colo.0.pause_us_p50",
    "colo.3.dirty_pages_per_epoch",
    "colo.4.speed_share",
    "ratios.0.colo_p50",
    "ratios.0.migration_p50",
    "took_s",
];

#[test]
fn every_figure_can_be_measured() {
    let built = built();
    test_inside("every_figure_can_be_measured", || {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench");
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        let report = measure(&Options::short(), &built, &folder, "test".to_owned(), &Progress::new());
        println!("{}", tables::text(&report));
        assert!(report.complaints.is_empty(), "{:#?}", report.complaints);
        let json = serde_json::to_value(&report).expect("plain data");
        for path in ABOVE_ZERO {
            let value = at(&json, path);
            assert!(value.as_f64().is_some_and(|value| value > 0.0), "{path}: {value}");
        }
        let pauses = json["pause"].as_array().expect("a list");
        assert_eq!(pauses.len(), 9, "four loads idle, one of whole pages, four busy");
        let blocks = at(&json, "block.points").as_array().expect("a list");
        assert_eq!(blocks.len(), 28, "three sizes, two depths, two with flushes");
        assert!(
            report.goals.iter().all(|goal| goal.met.is_some()),
            "{:#?}",
            report.goals
        );
        assert_eq!(at(&json, "gap.kill_host.lost_answers"), 0);
        // All memory but the guest's own was filled, so a whole resync carries it.
        let (sent, filled) = (
            at(&json, "resync.rounds.0.sent_bytes"),
            at(&json, "memory.filled_bytes"),
        );
        assert!(sent.as_u64() >= filled.as_u64(), "{sent} bytes sent of {filled}");
        let (peak, guest) = (at(&json, "memory.standby_peak_bytes"), at(&json, "memory.guest_bytes"));
        assert!(
            peak.as_u64() > filled.as_u64(),
            "a standby of {guest} bytes had at most {peak}"
        );
    });
}
