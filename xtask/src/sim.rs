//! `cargo xtask sim`: the options are parsed here, the protocol's simulator does the work.
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Args;
use ftvm_protocol_sim::{Coverage, Mutation, Outcome, Report, run};

/// Options of `cargo xtask sim`.
#[derive(Args)]
pub struct Sim {
    /// How many seeds to run
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first seed; with `--trace` and `--seeds 1` the way to look at one run
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Remove a rule and see which seed catches it; `list` names them all
    #[arg(long)]
    mutation: Option<String>,
    /// Print what happened also when nothing is wrong
    #[arg(long)]
    trace: bool,
    /// Print which fault met which role
    #[arg(long)]
    coverage: bool,
}

/// What all threads found.
#[derive(Default)]
struct Found {
    next: u64,
    done: u64,
    steps: u64,
    outcomes: BTreeMap<String, u64>,
    coverage: Coverage,
    failure: Option<u64>,
}

impl Sim {
    /// Runs the simulator. Exit code 1 if an invariant was violated (with `--mutation`: if none was).
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mutation = match self.mutation.as_deref() {
            None => None,
            Some("list") => {
                for mutation in Mutation::ALL {
                    println!(
                        "{:<22} rule {:>2}: {}",
                        format!("{mutation:?}"),
                        mutation.rule(),
                        mutation.text()
                    );
                }
                return Ok(ExitCode::SUCCESS);
            }
            Some(name) => Some(find(name)?),
        };
        let seeds = self.seed..self.seed.saturating_add(self.seeds);
        let start = Instant::now();
        let found = hunt(&seeds, mutation);
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{} of {} seeds from {}: {} core steps in {seconds:.1} s ({:.0} seeds/s)",
            found.done,
            self.seeds,
            self.seed,
            found.steps,
            found.done as f64 / seconds
        );
        for (outcome, count) in &found.outcomes {
            println!("{count:>9} {outcome}");
        }
        if self.coverage {
            println!("{}", found.coverage);
        }
        if self.trace || found.failure.is_some() {
            print_run(&run(found.failure.unwrap_or(self.seed), mutation, true));
        }
        Ok(if found.failure.is_some() == mutation.is_some() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

fn find(name: &str) -> anyhow::Result<Mutation> {
    let wanted = Mutation::ALL
        .iter()
        .copied()
        .find(|mutation| format!("{mutation:?}").eq_ignore_ascii_case(name));
    wanted.ok_or_else(|| anyhow::anyhow!("there is no mutation `{name}`: `--mutation list` names them"))
}

/// Runs the seeds on all cores until one fails; reports the lowest seed that failed.
fn hunt(seeds: &Range<u64>, mutation: Option<Mutation>) -> Found {
    let found = Mutex::new(Found {
        next: seeds.start,
        ..Found::default()
    });
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let begin = Instant::now();
    let lock = || found.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = {
                        let mut found = lock();
                        if found.next >= seeds.end || found.failure.is_some() {
                            return;
                        }
                        found.next += 1;
                        found.next - 1
                    };
                    let report = run(seed, mutation, false);
                    let mut found = lock();
                    found.take(&report);
                    if found.done % 512 == 0 && begin.elapsed() > Duration::from_secs(2) {
                        progress(found.done, seeds.end - seeds.start);
                    }
                }
            });
        }
    });
    if begin.elapsed() > Duration::from_secs(2) && std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
    found.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Found {
    fn take(&mut self, report: &Report) {
        self.done += 1;
        self.steps += report.steps;
        self.coverage.add(&report.coverage);
        let outcome = match &report.outcome {
            Outcome::Clean => "clean".to_string(),
            Outcome::Person(person) => format!("clean, and waits for a person: {person:?}"),
            Outcome::Violated(violation) => {
                self.failure = Some(self.failure.map_or(report.seed, |seed| seed.min(report.seed)));
                format!("VIOLATED: {:?}", violation.kind)
            }
        };
        *self.outcomes.entry(outcome).or_default() += 1;
    }
}

fn progress(done: u64, of: u64) {
    let mut out = std::io::stderr();
    if out.is_terminal() {
        let _ = write!(out, "\r{done} of {of} seeds");
        let _ = out.flush();
    }
}

fn print_run(report: &Report) {
    for line in &report.trace {
        println!("{line}");
    }
    println!("seed {}: {:?}", report.seed, report.outcome);
    println!("again with: cargo xtask sim --seed {} --seeds 1 --trace", report.seed);
}
