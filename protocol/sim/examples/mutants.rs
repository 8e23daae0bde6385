//! Seeds until each mutation is caught.
use ftvm_protocol_sim::{Mutation, Outcome, run};
fn main() {
    let limit: u64 = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(20_000);
    for mutation in Mutation::ALL {
        let caught = (0..limit).find_map(|seed| match run(seed, Some(*mutation), false).outcome {
            Outcome::Violated(v) => Some((seed + 1, v.kind)),
            _ => None,
        });
        println!("{:<22} {:>2} {:?}", format!("{mutation:?}"), mutation.rule(), caught);
    }
}
