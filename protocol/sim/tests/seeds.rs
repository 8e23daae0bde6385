//! Thousands of seeds against the unchanged core: no invariant is violated, and every fault met every role.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ftvm_protocol_sim::{Coverage, Outcome, Report, run};

const SEEDS: u64 = 60_000;

/// Runs the seeds on all cores; the reports come in no particular order.
fn run_all(seeds: u64, take: impl Fn(&mut Total, Report) + Sync) -> Total {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let totals = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut total = Total::default();
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= seeds {
                            return total;
                        }
                        take(&mut total, run(seed, None, false));
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("a worker"))
            .collect::<Vec<_>>()
    });
    totals.into_iter().fold(Total::default(), |mut sum, total| {
        sum.coverage.add(&total.coverage);
        sum.persons += total.persons;
        sum.releases += total.releases;
        sum.violated.extend(total.violated);
        sum
    })
}

#[derive(Default)]
struct Total {
    coverage: Coverage,
    persons: u64,
    releases: u64,
    violated: Vec<(u64, String)>,
}

#[test]
fn all_invariants_hold_and_every_fault_meets_every_role() {
    let start = Instant::now();
    let total = run_all(SEEDS, |total, report| {
        total.coverage.add(&report.coverage);
        total.releases += report.releases;
        match report.outcome {
            Outcome::Clean => {}
            Outcome::Person(_) => total.persons += 1,
            Outcome::Violated(violation) => total.violated.push((report.seed, violation.to_string())),
        }
    });
    println!("{}", total.coverage);
    println!(
        "{SEEDS} seeds in {:.1} s, {} releases, {} runs wait for a person",
        start.elapsed().as_secs_f64(),
        total.releases,
        total.persons
    );
    assert!(
        total.violated.is_empty(),
        "cargo xtask sim --seeds 1 --trace --seed N: {:?}",
        total.violated
    );
    let empty = total.coverage.empty_cells();
    assert!(empty.is_empty(), "faults that met no such role: {empty:?}");
    // Negative control of the counters: something was released, and waiting for a person stays the exception.
    assert!(total.releases > SEEDS * 10, "only {} releases", total.releases);
    assert!(
        total.persons * 4 < SEEDS,
        "{} of {SEEDS} runs wait for a person",
        total.persons
    );
}

#[test]
fn a_seed_always_gives_the_same_run() {
    for seed in [1, 77, 4_711] {
        let (first, second) = (run(seed, None, true), run(seed, None, true));
        assert_eq!(first.outcome, second.outcome);
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert!(first.trace.len() > 20);
    }
}
