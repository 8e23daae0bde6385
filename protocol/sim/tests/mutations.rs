//! Each rule removed is caught by the general invariants, on random seeds.

use std::sync::atomic::{AtomicU64, Ordering};

use ftvm_protocol_sim::{Mutation, Outcome, run};

/// Seeds after which a mutation counts as not caught. Seeds are fixed, so the result never changes by itself.
const LIMIT: u64 = 120_000;

/// The lowest seed that catches the mutation, and how.
fn caught(mutation: Mutation) -> Option<(u64, String)> {
    let next = AtomicU64::new(0);
    let best = AtomicU64::new(LIMIT);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= best.load(Ordering::Relaxed) {
                        return;
                    }
                    if matches!(run(seed, Some(mutation), false).outcome, Outcome::Violated(_)) {
                        best.fetch_min(seed, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let seed = best.into_inner();
    match run(seed, Some(mutation), false).outcome {
        Outcome::Violated(violation) if seed < LIMIT => Some((seed, format!("{:?}", violation.kind))),
        _ => None,
    }
}

#[test]
fn every_mutation_is_caught() {
    let mut escaped = Vec::new();
    println!("| rule | removed | seeds | caught by |\n|---|---|---|---|");
    for mutation in Mutation::ALL {
        match caught(*mutation) {
            Some((seed, kind)) => {
                println!(
                    "| {} | {} (`{mutation:?}`) | {} | {kind} |",
                    mutation.rule(),
                    mutation.text(),
                    seed + 1
                );
            }
            None => escaped.push(*mutation),
        }
    }
    assert!(escaped.is_empty(), "not caught in {LIMIT} seeds: {escaped:?}");
}

#[test]
fn every_rule_has_a_mutation() {
    for rule in 1..=13 {
        assert!(
            Mutation::ALL.iter().any(|mutation| mutation.rule() == rule),
            "rule {rule}"
        );
    }
}
