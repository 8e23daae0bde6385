//! `hunt FIRST COUNT [MUTATION]`: runs seeds, prints the shortest trace among the first failures.
use ftvm_protocol_sim::{Mutation, Outcome, run};
use std::collections::BTreeMap;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let first: u64 = args[1].parse().expect("first seed");
    let count: u64 = args[2].parse().expect("count");
    let mutation = args
        .get(3)
        .and_then(|n| Mutation::ALL.iter().copied().find(|m| format!("{m:?}") == *n));
    let start = std::time::Instant::now();
    let mut kinds: BTreeMap<String, (u64, u64, String)> = BTreeMap::new();
    let (mut steps, mut releases) = (0, 0);
    for seed in first..first + count {
        let report = run(seed, mutation, false);
        steps += report.steps;
        releases += report.releases;
        let (key, text) = match &report.outcome {
            Outcome::Clean => ("Clean".to_string(), String::new()),
            Outcome::Person(p) => (format!("Person {p:?}"), String::new()),
            Outcome::Violated(v) => (format!("VIOLATED {:?}", v.kind), v.to_string()),
        };
        let entry = kinds.entry(key).or_insert((0, seed, text));
        entry.0 += 1;
    }
    for (kind, (n, seed, text)) in &kinds {
        println!("{n:>6} {kind} (first seed {seed}) {text}");
    }
    println!(
        "{steps} steps, {releases} releases, {:.1} seeds/s",
        count as f64 / start.elapsed().as_secs_f64()
    );
}
