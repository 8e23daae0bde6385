//! `trace SEED [MUTATION]`: prints one run.
use ftvm_protocol_sim::{Mutation, run};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mutation = args
        .get(2)
        .and_then(|n| Mutation::ALL.iter().copied().find(|m| format!("{m:?}") == *n));
    let report = run(args[1].parse().expect("seed"), mutation, true);
    for line in &report.trace {
        println!("{line}");
    }
    println!("{:?}", report.outcome);
}
