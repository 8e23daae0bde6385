//! `cargo xtask test`: every test of the project, in tiers; the cheap ones first.
//!
//! A tier is a list of commands with a budget of time for all of them. Tests find their tier by their place: what is in a package's `src` is
//! `unit`; integration tests are `native`, unless their file's name begins with `cluster_`, `emulated_` or `long_`.
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use ftvm_e2e::cargo::cargo;

use crate::packages::{self, ALERTS, CLUSTER, EMULATED, NAMESPACES, NATIVE, Package};

mod room;
mod runner;
mod tally;

use tally::Tally;

/// Test programs with two tests at a time: each test has a cluster, a machine or a folder of its own, and uses one core or waits most of the
/// time; nothing that it judges is how long something took, nor what is left on this machine. All others share what they have, or measure.
const TWO_AT_A_TIME: &[&str] = &[
    "alerts",
    "cluster_chart",
    "cluster_operator",
    "disks",
    "disks_killed",
    "emulated_guest",
];

/// Options of `cargo xtask test`.
#[derive(Args)]
pub struct Test {
    /// Only what runs in under two minutes without emulated nodes
    #[arg(long)]
    quick: bool,
    /// What takes long and is not part of every run as well
    #[arg(long, conflicts_with = "quick")]
    long: bool,
    /// Only this tier (may be given several times)
    #[arg(long = "tier", value_name = "NAME")]
    tiers: Vec<String>,
}

/// Tests that are run together.
struct Tier {
    name: &'static str,
    /// What it shows, in a few words.
    about: &'static str,
    /// Time for its tests once everything is built, on two cores.
    budget: Duration,
    /// Time to build them on a new machine.
    build: Duration,
    runs: Runs,
    /// What its tests start.
    packages: &'static [&'static [Package]],
    commands: Vec<Vec<String>>,
}

/// When a tier is run that was not asked for by its name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Runs {
    /// Also with `--quick`.
    Always,
    /// Without `--quick`.
    Usually,
    /// With `--long`.
    Rarely,
}

struct Outcome {
    tier: &'static str,
    about: &'static str,
    tally: Tally,
    took: Duration,
    budget: Duration,
}

impl Test {
    /// Runs the tiers, then prints a table and how many tests passed and failed.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let root = crate::root();
        let all = tiers(&root)?;
        if let Some(unknown) = self
            .tiers
            .iter()
            .find(|name| !all.iter().any(|tier| tier.name == **name))
        {
            let names: Vec<&str> = all.iter().map(|tier| tier.name).collect();
            anyhow::bail!("there is no tier {unknown:?}; there are: {}", names.join(", "));
        }
        let chosen: Vec<Tier> = all.into_iter().filter(|tier| self.wants(tier)).collect();
        packages::ensure(&wanted(&chosen))?;
        let outcomes = chosen
            .iter()
            .map(|tier| run_tier(tier, &root))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(report(&outcomes))
    }

    fn wants(&self, tier: &Tier) -> bool {
        if self.tiers.is_empty() {
            match tier.runs {
                Runs::Always => true,
                Runs::Usually => !self.quick,
                Runs::Rarely => self.long,
            }
        } else {
            self.tiers.iter().any(|name| name == tier.name)
        }
    }
}

/// The packages of these tiers.
fn wanted<'a>(tiers: impl IntoIterator<Item = &'a Tier>) -> Vec<Package> {
    let lists = tiers.into_iter().flat_map(|tier| tier.packages);
    lists.copied().flatten().copied().collect()
}

fn tiers(root: &Path) -> anyhow::Result<Vec<Tier>> {
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    let cargo = |words: &[&str]| {
        std::iter::once("cargo")
            .chain(words.iter().copied())
            .map(str::to_owned)
            .collect()
    };
    let this = std::env::current_exe().context("cannot find this program")?;
    let this = this.to_str().context("this program's path is not text")?;
    let (emulated, others): (Vec<String>, Vec<String>) = integration_tests(root)?
        .into_iter()
        .partition(|name| name.starts_with("emulated_"));
    let (long, others): (Vec<String>, Vec<String>) = others.into_iter().partition(|name| name.starts_with("long_"));
    let (cluster, native): (Vec<String>, Vec<String>) =
        others.into_iter().partition(|name| name.starts_with("cluster_"));
    let tiers = vec![
        Tier {
            name: "check",
            about: "formatting, lints, tidy rules, licences, documentation",
            // Lints, documentation and generators each build what the workspace depends on.
            budget: minutes(14),
            build: minutes(8),
            runs: Runs::Usually,
            packages: &[],
            commands: vec![vec![this.to_owned(), "check".to_owned()]],
        },
        Tier {
            name: "unit",
            about: "each module by itself",
            // Two where the machine has its usual pace.
            budget: minutes(5),
            build: minutes(10),
            runs: Runs::Always,
            packages: &[NAMESPACES],
            commands: vec![
                cargo(&["test", "--workspace", "--no-fail-fast", "--lib", "--bins"]),
                cargo(&["test", "--workspace", "--no-fail-fast", "--doc"]),
            ],
        },
        Tier {
            name: "native",
            about: "real processes and sockets, this machine's KVM, the protocol in its simulator",
            budget: minutes(25),
            build: minutes(8),
            runs: Runs::Usually,
            packages: &[NAMESPACES, NATIVE, ALERTS],
            // The tests start the programs of other packages.
            commands: [cargo(&["build", "--workspace", "--bins", "--examples"])]
                .into_iter()
                .chain(test_commands(&native))
                .collect(),
        },
        Tier {
            name: "cluster",
            about: "a real Kubernetes, its nodes made of namespaces",
            budget: minutes(40),
            build: minutes(25),
            runs: Runs::Usually,
            packages: &[NAMESPACES, NATIVE, CLUSTER],
            commands: with_kubernetes(this, &cluster),
        },
        Tier {
            name: "emulated",
            about: "Linux guests under kvm-amd, on emulated machines",
            // 25 minutes where the images of the machines are there; a new machine builds them, with packages from the network, here.
            budget: minutes(45),
            build: minutes(12),
            runs: Runs::Usually,
            packages: &[NAMESPACES, NATIVE, EMULATED],
            commands: test_commands(&emulated),
        },
        Tier {
            name: "long",
            about: "what takes too long for every run",
            budget: minutes(45),
            build: minutes(25),
            runs: Runs::Rarely,
            packages: &[NAMESPACES, NATIVE, CLUSTER],
            commands: with_kubernetes(this, &long),
        },
    ];
    Ok(tiers.into_iter().filter(|tier| !tier.commands.is_empty()).collect())
}

/// Commands that run these test programs, if there are any; before that Kubernetes itself is built from source, by this program.
fn with_kubernetes(this: &str, tests: &[String]) -> Vec<Vec<String>> {
    if tests.is_empty() {
        return Vec::new();
    }
    let build = [this, "cluster", "build"].map(str::to_owned).to_vec();
    std::iter::once(build).chain(test_commands(tests)).collect()
}

/// Commands that run these test programs: together those whose tests go one at a time, then those of [`TWO_AT_A_TIME`].
fn test_commands(names: &[String]) -> Vec<Vec<String>> {
    let (two, one): (Vec<_>, Vec<_>) = names
        .iter()
        .cloned()
        .partition(|name| TWO_AT_A_TIME.contains(&name.as_str()));
    [(one, 1), (two, 2)]
        .into_iter()
        .filter(|(names, _)| !names.is_empty())
        .map(|(names, threads)| {
            let words = ["cargo", "test", "--workspace", "--no-fail-fast"].map(str::to_owned);
            let names = names.into_iter().flat_map(|name| ["--test".to_owned(), name]);
            let options = ["--".to_owned(), format!("--test-threads={threads}")];
            words.into_iter().chain(names).chain(options).collect()
        })
        .collect()
}

/// The names of all integration tests of the workspace.
fn integration_tests(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = cargo()
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .context("cannot start cargo")?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).with_context(|| {
        format!(
            "cannot read cargo's metadata: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )
    })?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let targets = packages.flat_map(|package| package["targets"].as_array().into_iter().flatten());
    let tests = targets
        .filter(|target| target["kind"][0] == "test")
        .filter_map(|target| target["name"].as_str());
    let mut names: Vec<String> = tests.map(str::to_owned).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

fn run_tier(tier: &Tier, root: &Path) -> anyhow::Result<Outcome> {
    let free_gib = room::ensure_for_a_tier(root)?;
    println!("\n== {}: {} == ({free_gib} GiB free)", tier.name, tier.about);
    let begin = Instant::now();
    let deadline = begin + tier.budget + tier.build;
    let mut tally = Tally::default();
    let mut built = Duration::ZERO;
    for command in &tier.commands {
        if command.get(1).is_some_and(|word| word == "test") && !command.iter().any(|word| word == "--doc") {
            let build = Instant::now();
            let options = command.iter().position(|word| word == "--").unwrap_or(command.len());
            let mut words = command[..options].to_vec();
            words.push("--no-run".to_owned());
            runner::run(tier.name, &words, root, deadline, &mut Tally::default())?;
            built += build.elapsed();
        }
        let mut found = Tally::default();
        let ending = runner::run(tier.name, command, root, deadline, &mut found)?;
        found.close(&command.join(" "), ending);
        tally += found;
    }
    let took = begin.elapsed() - built;
    if took > tier.budget {
        tally.fail(format!(
            "the tier took {:.0} s, its budget is {} s",
            took.as_secs_f64(),
            tier.budget.as_secs()
        ));
    }
    Ok(Outcome {
        tier: tier.name,
        about: tier.about,
        tally,
        took,
        budget: tier.budget,
    })
}

/// Prints what happened; the last line is for programs.
fn report(outcomes: &[Outcome]) -> ExitCode {
    println!(
        "\n{:<10} {:>7} {:>7} {:>8} {:>8}  what",
        "tier", "passed", "failed", "seconds", "budget"
    );
    for outcome in outcomes {
        let (passed, failed) = (outcome.tally.passed, outcome.tally.failures.len());
        let (seconds, budget) = (outcome.took.as_secs(), outcome.budget.as_secs());
        println!(
            "{:<10} {passed:>7} {failed:>7} {seconds:>8} {budget:>8}  {}",
            outcome.tier, outcome.about
        );
    }
    let failures: Vec<&String> = outcomes.iter().flat_map(|outcome| &outcome.tally.failures).collect();
    if !failures.is_empty() {
        println!("\nfailed:");
        failures.iter().for_each(|failure| println!("  {failure}"));
    }
    let passed: usize = outcomes.iter().map(|outcome| outcome.tally.passed).sum();
    println!("\n{passed} passed, {} failed", failures.len());
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_go_together_by_how_many_of_their_tests_run_at_a_time() {
        let names = ["cluster_bench", "cluster_chart", "cluster_up"].map(str::to_owned);
        let commands: Vec<String> = test_commands(&names).iter().map(|words| words.join(" ")).collect();
        let cargo = "cargo test --workspace --no-fail-fast";
        let one = format!("{cargo} --test cluster_bench --test cluster_up -- --test-threads=1");
        let two = format!("{cargo} --test cluster_chart -- --test-threads=2");
        assert_eq!(commands, [one.clone(), two]);
        let without = [&names[..1], &names[2..]].concat();
        assert_eq!(test_commands(&without)[0].join(" "), one);
        assert_eq!(test_commands(&without).len(), 1);
        assert!(test_commands(&[]).is_empty());
    }

    #[test]
    fn long_tests_are_run_for_those_alone_who_ask_for_them() {
        let tiers = tiers(&crate::root()).unwrap();
        for tier in &tiers {
            let has_long = tier.commands.iter().flatten().any(|word| word.starts_with("long_"));
            assert_eq!(has_long, tier.name == "long", "{}", tier.name);
        }
        let chosen = |quick: bool, long: bool, names: &[&str]| -> Vec<&'static str> {
            let test = Test {
                quick,
                long,
                tiers: names.iter().copied().map(str::to_owned).collect(),
            };
            let wanted = tiers.iter().filter(|tier| test.wants(tier));
            wanted.map(|tier| tier.name).collect()
        };
        let usual = ["check", "unit", "native", "cluster", "emulated"];
        assert_eq!(chosen(true, false, &[]), ["unit"]);
        assert_eq!(chosen(false, false, &[]), usual);
        assert_eq!(chosen(false, true, &[]), [&usual[..], &["long"][..]].concat());
        assert_eq!(chosen(false, false, &["long"]), ["long"]);
    }

    #[test]
    fn each_tier_asks_for_the_packages_that_it_needs() {
        let tiers = tiers(&crate::root()).unwrap();
        for (tier, package, asked) in [
            ("check", "nftables", false),
            ("unit", "nftables", true),
            ("unit", "qemu-system-x86", false),
            ("native", "qemu-system-x86", true),
            ("native", "prometheus", true),
            ("cluster", "prometheus", false),
            ("native", "buildah", false),
            ("cluster", "buildah", true),
            ("emulated", "buildah", false),
            ("emulated", "mmdebstrap", true),
            ("long", "buildah", true),
        ] {
            let all = wanted(tiers.iter().filter(|one| one.name == tier));
            assert_eq!(all.iter().any(|(_, name)| *name == package), asked, "{tier}: {package}");
        }
    }

    #[test]
    fn programs_with_two_tests_at_a_time_are_there() {
        let all = integration_tests(&crate::root()).unwrap();
        for name in TWO_AT_A_TIME {
            assert!(all.iter().any(|one| one == name), "{name}");
        }
    }
}
