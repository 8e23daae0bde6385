//! `cargo xtask bench` itself. Outside, what is missing is named and what is needed is built; inside namespaces of its own
//! everything is measured; outside again, the disks are removed.
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::facts::{BusyTime, Facts, own_ticks};
use super::pair::Pair;
use super::qemu::{EMULATOR, Setup, colo, migration};
use super::report::{Latency, Report, Speed};
use super::{Load, Options, Part, block, gap, kubernetes, resync, tables};
use crate::demo::place::{folder, new_folder, remove_disks, show_at_short_path};
use crate::demo::prerequisites;
use crate::demo::programs::{self, Profile, Programs};
use crate::hosts::outer;
use crate::lab::binaries;
use crate::report::Progress;

/// Tells the inner program where the outer one put things.
const BUILT: &str = "FTVM_BENCH_BUILT";
/// Name of the benchmark's folder.
const FOLDER: &str = "bench";

/// Everything that is built before the namespaces are entered: there is no network in them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Built {
    /// How, as Cargo names it.
    pub profile: String,
    /// Engine, daemon, command and guest.
    pub programs: Programs,
    /// The program that measures a plain TLS stream.
    pub streams: PathBuf,
}

impl Built {
    /// Builds what is not fresh.
    ///
    /// # Errors
    /// If something does not compile.
    pub fn build(profile: Profile) -> anyhow::Result<Self> {
        let programs = programs::build(profile)?;
        let streams = binaries::build_example("ftvm-engine", "replication_rates", profile)?;
        Ok(Self {
            profile: profile.name().to_owned(),
            programs,
            streams,
        })
    }
}

/// Runs the benchmark. `arguments` are those with which this program would do the same again.
///
/// # Errors
/// If it can't even begin.
pub fn run(options: &Options, arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    options.check()?;
    if options.parts.iter().all(|part| part.is_of_kubernetes()) {
        return kubernetes::run(options, command_line(arguments));
    }
    if outer::inside() {
        // Its second half: the loopback comes up, which the plain stream and QEMU's monitors and guests need.
        outer::enter(arguments)?;
        return run_inside(options, arguments);
    }
    let progress = Progress::new();
    let mut missing = prerequisites::missing_for_native(&mut |text| progress.say(text));
    if options.wants(Part::Migration) || options.wants(Part::Colo) {
        missing.extend(prerequisites::missing_program(
            EMULATOR,
            "qemu-system-x86",
            &mut |text| {
                progress.say(text);
            },
        ));
    }
    if !missing.is_empty() {
        missing.iter().for_each(|missing| progress.bad(missing.to_string()));
        return Ok(ExitCode::from(2));
    }
    progress.say("building what is not fresh, optimised (the first time takes some minutes)");
    let built = Built::build(options.profile)?;
    let folder = new_folder(FOLDER)?;
    let ended = outer::enter_with(arguments, &[(BUILT, serde_json::to_string(&built)?)])?;
    // An interrupted pair has left its own.
    for part in ["pair", "block", "gap/kill-engine", "gap/kill-host"] {
        let part = folder.join(part);
        if part.exists() {
            remove_disks(&part)?;
        }
    }
    Ok(ended.exit_code())
}

fn run_inside(options: &Options, arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    let built: Built = serde_json::from_str(&std::env::var(BUILT).context("started by hand inside")?)?;
    let place = folder(FOLDER);
    let report = measure(options, &built, &place, command_line(arguments), &progress);
    tables::conclude(&report, options, &place)
}

fn command_line(arguments: &[OsString]) -> String {
    let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
    format!("cargo xtask {}", words.join(" "))
}

/// Measures everything that was asked for, inside outer namespaces; disks and logs are in `folder`. What can't be measured
/// is a complaint of the report.
pub fn measure(options: &Options, built: &Built, folder: &Path, command: String, progress: &Progress) -> Report {
    let began = Instant::now();
    let mut report = Report::new(options, &built.profile, command);
    report.machine = Facts::read();
    let busy = BusyTime::read();
    let shown = show_at_short_path(folder);
    let Some(short) = report.note(progress, "folder", shown) else {
        return report;
    };
    let place = |name: &str| -> anyhow::Result<PathBuf> {
        let path = short.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    };
    let result = place("pair").and_then(|place| of_pair(options, built, &place, progress, &mut report));
    report.note(progress, "pair", result);
    if options.wants(Part::Block) {
        let block = place("block").and_then(|place| block::measure(options, &built.programs, &place, progress));
        report.block = report.note(progress, "block", block);
    }
    if options.wants(Part::Gap) {
        let gap = place("gap").and_then(|place| gap::gaps(options, &built.programs, &place, progress));
        report.gap = report.note(progress, "gap", gap);
    }
    let setup = |name: &str| {
        place(name).map(|folder| Setup {
            kernel: built.programs.guest.clone(),
            folder,
            memory_mib: options.memory_mib,
        })
    };
    if options.wants(Part::Migration) {
        let points = setup("migration").and_then(|setup| migration::downtimes(options, &setup, progress));
        report.migration = report.note(progress, "migration", points);
    }
    if options.wants(Part::Colo) {
        let points = setup("colo").and_then(|setup| colo::checkpoints(options, &setup, progress));
        report.colo = report.note(progress, "colo", points);
    }
    let others = |before: BusyTime| BusyTime::read()?.others_since(before, own_ticks());
    report.machine.others_share = busy.and_then(others);
    report.took_s = began.elapsed().as_secs_f64();
    report.sum_up();
    report
}

/// All parts that one pair can show. First with a standby, then without, then standbys come back.
fn of_pair(
    options: &Options,
    built: &Built,
    folder: &Path,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<()> {
    let wants = |part| options.wants(part);
    let of_pair = [Part::Pause, Part::Latency, Part::Speed, Part::Memory, Part::Resync];
    if !of_pair.into_iter().any(wants) {
        return Ok(());
    }
    let mut pair = Pair::start(options, &built.programs, folder, progress)?;
    if wants(Part::Pause) {
        let idle = Load::PAGES.into_iter().map(Load::idle);
        let busy = Load::PAGES.into_iter().map(Load::busy);
        let loads = idle.chain([Load::whole(2048)]).chain(busy);
        let measured: Vec<_> = loads.map(|load| pair.costs(load)).collect::<anyhow::Result<_>>()?;
        let (pauses, costs) = measured.into_iter().unzip();
        (report.pause, report.costs) = (Some(pauses), Some(costs));
    }
    let memory = match wants(Part::Memory) {
        true => Some(resync::memory(options, &mut pair)?),
        false => None,
    };
    let protected_speed = match wants(Part::Speed) {
        true => Some(pair.speed(Load::busy(0))?),
        false => None,
    };
    let protected_latency = match wants(Part::Latency) {
        true => Some(pair.latency()?),
        false => None,
    };
    if protected_speed.is_some() || protected_latency.is_some() || wants(Part::Pause) {
        pair.be_alone()?;
        progress.say("the standby's host was killed: the guest goes on unprotected");
    }
    if let Some(protected) = protected_latency {
        let unprotected = pair.latency()?;
        let difference = |one: u64, other: u64| one as i64 - other as i64;
        report.latency = Some(Latency {
            protected,
            unprotected,
            added_us_p50: protected
                .latency_us_p50
                .zip(unprotected.latency_us_p50)
                .map(|(with, without)| difference(with, without)),
        });
        progress.say("latency: measured with and without protection");
    }
    if let Some(protected) = protected_speed {
        let alone = pair.speed(Load::busy(0))?;
        report.speed = Some(Speed {
            protected_per_s: protected.work_per_s,
            unprotected_per_s: alone.work_per_s,
            share: protected.work_per_s / alone.work_per_s.max(1e-9),
        });
    }
    if wants(Part::Pause) {
        let loads = Load::PAGES.into_iter().map(Load::busy);
        report.unprotected = Some(loads.map(|load| pair.speed(load)).collect::<anyhow::Result<_>>()?);
    }
    if wants(Part::Resync) || wants(Part::Memory) {
        let (resync, peak_bytes) = resync::resyncs(options, &mut pair, &built.streams, progress)?;
        report.resync = Some(resync);
        report.memory = memory.map(|memory| resync::with_join(memory, options, peak_bytes));
    }
    Ok(())
}
