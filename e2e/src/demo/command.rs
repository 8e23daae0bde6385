//! `cargo xtask demo` itself. Outside, what is missing is named and what is needed is built; inside namespaces of its own
//! the play runs; outside again, the disks are removed.
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Context;

use super::place::{folder, new_folder, remove_disks, show_at_short_path};
use super::programs::{self, Profile, Programs};
use super::rounds::{Patience, Stage};
use super::standalone::Standalone;
use super::witness::EmbeddedWitness;
use super::{GUEST_ADDRESS, GUEST_MAC, Guest, Options, linux, prerequisites};
use crate::hosts::outer;
use crate::hosts::{Lab, LabPlan};
use crate::report::{Progress, Report};

/// Tells the inner program where the outer one put things.
const PROGRAMS: &str = "FTVM_DEMO_PROGRAMS";
/// Name of the demonstration's folder.
const FOLDER: &str = "demo";

/// Runs the demonstration with the embedded guest on this machine's KVM. `arguments` are those with which this program
/// would do the same again.
pub fn run(options: &Options, profile: Profile, arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    if options.guest == Guest::Linux {
        return linux::run(options, profile);
    }
    if outer::inside() {
        return run_inside(options);
    }
    let progress = Progress::new();
    if !prerequisites::native_hosts_can_be_made(&progress) {
        return Ok(ExitCode::from(2));
    }
    progress.say("building what is not fresh (the first time takes some minutes)");
    let programs = programs::build(profile)?;
    let folder = new_folder(FOLDER)?;
    let ended = outer::enter_with(arguments, &[(PROGRAMS, serde_json::to_string(&programs)?)])?;
    // An interrupted pair has left its own.
    remove_disks(&folder)?;
    Ok(ended.exit_code())
}

fn run_inside(options: &Options) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    let programs: Programs = serde_json::from_str(&std::env::var(PROGRAMS).context("started by hand inside")?)?;
    let report = play(options, &programs, &folder(FOLDER), &progress);
    let logs = format!(
        "logs of daemons, engines and the guest's console: {}",
        folder(FOLDER).display()
    );
    report.conclude(options, &progress, Some(&logs))
}

/// The whole play with three hosts, inside outer namespaces; disks and logs are in `folder`. An error before the first
/// round is a report of its own.
pub fn play(options: &Options, programs: &Programs, folder: &Path, progress: &Progress) -> Report {
    show_at_short_path(folder)
        .and_then(|short| play_on_stage(options, programs, &short, progress))
        .unwrap_or_else(|error| Report::failed(options, &error, progress))
}

/// The play in a folder with a short path.
///
/// # Errors
/// What went wrong before the first round; what goes wrong later is in the report.
pub fn play_on_stage(
    options: &Options,
    programs: &Programs,
    folder: &Path,
    progress: &Progress,
) -> anyhow::Result<Report> {
    let lab = Rc::new(Lab::new(&LabPlan::three_hosts(folder))?);
    progress.say("three hosts, a client network and a replication network are up");
    let patience = Patience::default();
    let mut system = Standalone::new(Rc::clone(&lab), programs, folder, options);
    let client = || EmbeddedWitness::start(GUEST_ADDRESS, options, patience, lab.client_entrance()?);
    let stage = Stage::prepare(options, patience, progress, (&*lab, GUEST_MAC), &mut system, client)?;
    let (report, _) = stage.keep_frames(folder).play();
    Ok(report)
}
