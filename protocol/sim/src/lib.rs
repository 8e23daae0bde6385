//! Seeded simulator that attacks the protocol core.
//!
//! Both seats run the real [`ftvm_protocol::core::Core`], unchanged; the world around them is a model: a guest that is a
//! history of steps, disks with a page cache, processes that are paused, killed and restarted, a network that loses,
//! delays, reorders, duplicates and cuts one way, an arbiter that is slow, unreachable, forgetful or gone, daemons,
//! an operator, a user and the person who is called when nothing else helps. General invariants ([`checks`]) are
//! evaluated whenever something leaves a seat or the record changes; at the end faults stop and service must come back.
//!
//! The same seed gives the same run. `cargo xtask sim --seeds N [--seed S]` prints seed and trace of a failure.

pub mod arbiter;
pub mod checks;
pub mod coverage;
mod disk;
mod faults;
pub mod history;
mod liveness;
pub mod mutation;
mod outside;
mod profile;
pub mod rng;
mod seat;
mod stream;
mod world;

pub use checks::{Kind, Violation};
pub use coverage::{Coverage, Fault, RoleClass};
pub use liveness::PersonNeeded;
pub use mutation::Mutation;
pub use world::{TIMING, World};

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All invariants held and service came back (or the stop was confirmed).
    Clean,
    /// All invariants held and the VM waits for a person, as documented.
    Person(PersonNeeded),
    /// An invariant was violated.
    Violated(Violation),
}

/// What one run gave.
#[derive(Debug, Clone)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Which fault met which role.
    pub coverage: Coverage,
    /// Core steps.
    pub steps: u64,
    /// Releases of output.
    pub releases: u64,
    /// What happened, if it was asked for.
    pub trace: Vec<String>,
}

/// Runs one seed.
pub fn run(seed: u64, mutation: Option<Mutation>, trace: bool) -> Report {
    let mut world = World::new(seed, mutation, trace);
    let faulty_ms = world.profile.faulty_ms;
    world.run_until(faulty_ms);
    let person = if world.violation().is_none() {
        world.heal()
    } else {
        None
    };
    let outcome = match (world.violation(), person) {
        (Some(violation), _) => Outcome::Violated(violation.clone()),
        (None, Some(person)) => Outcome::Person(person),
        (None, None) => Outcome::Clean,
    };
    Report {
        seed,
        outcome,
        coverage: world.coverage.clone(),
        steps: world.steps(),
        releases: world.checks.releases,
        trace: world.trace().to_vec(),
    }
}

/// Runs seeds one after another until one fails; `progress` is called after each.
pub fn run_many(
    seeds: std::ops::Range<u64>,
    mutation: Option<Mutation>,
    mut progress: impl FnMut(&Report),
) -> Option<Report> {
    for seed in seeds {
        let report = run(seed, mutation, false);
        progress(&report);
        if matches!(report.outcome, Outcome::Violated(_)) {
            return Some(run(seed, mutation, true));
        }
    }
    None
}
