//! The benchmark's part with a fleet as a test, with few VMs: everything can be measured, every promised key is there, and an operator at rest
//! asks for nothing. Never how long anything took: that is for `cargo xtask bench` on a quiet machine.
use std::path::Path;

use ftvm_e2e::bench::kubernetes::measure;
use ftvm_e2e::bench::{Options, Part, tables};
use ftvm_e2e::demo::programs::Profile;
use ftvm_e2e::report::Progress;

/// Every figure that must be above zero, whatever the machine does besides.
const ABOVE_ZERO: &[&str] = &[
    "/fleet/vms",
    "/fleet/nodes",
    "/fleet/protected_ms",
    "/fleet/start/reads",
    "/fleet/start/writes",
    "/fleet/start/cpu_ms",
    "/fleet/start/reconciles",
    "/fleet/start/reconcile_ms",
    "/fleet/rest/took_ms",
    "/fleet/rest_writes_per_vm_hour",
    "/fleet/lost_seats",
    "/fleet/not_ready_ms",
    "/fleet/reprotect_ms",
    "/fleet/loss/writes",
    "/fleet/loss/reconciles",
    "/fleet/memory/pss_bytes",
    "/fleet/peak_bytes",
    "/took_s",
];

#[test]
fn a_fleet_is_protected_rests_and_loses_a_node() {
    let options = Options {
        parts: vec![Part::Fleet],
        profile: Profile::Dev,
        ..Options::short()
    };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let report = measure(&options, "test".to_owned(), folder, &Progress::new());
    println!("{}", tables::text(&report));
    assert!(report.complaints.is_empty(), "{:#?}", report.complaints);
    let json = serde_json::to_value(&report).expect("plain data");
    for path in ABOVE_ZERO {
        let value = json.pointer(path).and_then(serde_json::Value::as_f64);
        assert!(value.is_some_and(|value| value > 0.0), "{path}: {value:?} in {json:#}");
    }
    report.fleet.expect("measured").rest.judge_rest().expect("rest");
    assert!(
        !report.goals.is_empty() && report.goals.iter().all(|goal| goal.met == Some(true)),
        "{:#?}",
        report.goals
    );
}
