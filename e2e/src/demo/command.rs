//! `cargo xtask demo` itself. Outside, what is missing is named and what is needed is built; inside namespaces of its own
//! the play runs; outside again, the disks are removed.
use std::ffi::{CString, OsString};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::{Context, ensure};

use super::programs::{self, Profile, Programs};
use super::rounds::{Patience, Stage};
use super::standalone::Standalone;
use super::witness::EmbeddedWitness;
use super::{GUEST_ADDRESS, GUEST_MAC, Guest, Options, linux, prerequisites};
use crate::guest_protocol::DEFAULT_PORT;
use crate::hosts::outer::{self, Outer};
use crate::hosts::{Lab, LabPlan};
use crate::judge::{Judge, JudgePlan};
use crate::report::{Progress, Report, table};

/// Tells the inner program where the outer one put things.
const PROGRAMS: &str = "FTVM_DEMO_PROGRAMS";
/// Where the inner program sees the demonstration's folder.
const SHORT_FOLDER: &str = "/mnt";

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
    let missing = prerequisites::missing_for_native(&mut |text| progress.say(text));
    if !missing.is_empty() {
        for missing in missing {
            progress.bad(missing.to_string());
        }
        return Ok(ExitCode::from(2));
    }
    progress.say("building what is not fresh (the first time takes some minutes)");
    let programs = programs::build(profile)?;
    let folder = new_folder()?;
    let ended = outer::enter_with(arguments, &[(PROGRAMS, serde_json::to_string(&programs)?)])?;
    remove_disks(&folder)?;
    match ended {
        Outer::Ended(status) => Ok(status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .map_or(ExitCode::FAILURE, ExitCode::from)),
        Outer::Inside => Ok(ExitCode::FAILURE),
    }
}

/// The demonstration's folder, `target/demo`: empty at first, logs stay in it afterwards.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/demo")
}

fn new_folder() -> anyhow::Result<PathBuf> {
    let path = folder();
    if path.exists() {
        fs::remove_dir_all(&path).with_context(|| format!("removing the last demonstration's {}", path.display()))?;
    }
    fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    path.canonicalize()
        .with_context(|| format!("looking at {}", path.display()))
}

/// Disks are large and of no use afterwards; logs are small and may be.
fn remove_disks(folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)?.filter_map(Result::ok) {
        let disk = entry.path().join(super::standalone::DISK);
        if disk.exists() {
            fs::remove_file(&disk).with_context(|| format!("removing {}", disk.display()))?;
        }
    }
    Ok(())
}

fn run_inside(options: &Options) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    let programs: Programs = serde_json::from_str(&std::env::var(PROGRAMS).context("started by hand inside")?)?;
    let report = play(options, &programs, &folder(), &progress);
    print!("{}", table(&report, progress.colours()));
    if let Some(path) = &options.json {
        report
            .write_json(path)
            .with_context(|| format!("writing {}", path.display()))?;
        println!("  written to {}\n", path.display());
    }
    if report.passed() {
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "  logs of daemons, engines and the guest's console: {}\n",
        folder().display()
    );
    Ok(ExitCode::FAILURE)
}

/// The whole play with three hosts, inside outer namespaces; disks and logs are in `folder`. An error before the first
/// round is a report of its own.
pub fn play(options: &Options, programs: &Programs, folder: &Path, progress: &Progress) -> Report {
    show_at_short_path(folder)
        .and_then(|short| play_on_stage(options, programs, &short, progress))
        .unwrap_or_else(|error| {
            progress.bad(format!("{error:#}"));
            let mut report = Report::new(options);
            report.complaints.push(format!("{error:#}"));
            report
        })
}

fn play_on_stage(options: &Options, programs: &Programs, folder: &Path, progress: &Progress) -> anyhow::Result<Report> {
    let lab = Rc::new(Lab::new(&LabPlan::three_hosts(folder))?);
    progress.say("three hosts, a client network and a replication network are up");
    let patience = Patience::default();
    let mut system = Standalone::new(Rc::clone(&lab), programs, folder, options);
    let client = || {
        let guest = SocketAddr::from((GUEST_ADDRESS, DEFAULT_PORT));
        let plan = JudgePlan {
            connect_within: patience.protected,
            stalled_after: patience.stalled,
            ..JudgePlan::new(guest)
        };
        let judge = Judge::start(plan, lab.client_entrance()?)?;
        Ok(EmbeddedWitness {
            judge,
            churn_pages: options.churn_pages,
            churn_rate: options.churn_rate,
        })
    };
    let stage = Stage::prepare(options, patience, progress, (&*lab, GUEST_MAC), &mut system, client)?;
    let (report, _) = stage.play();
    Ok(report)
}

/// Shows a folder at a short path too, in this mount namespace only, and returns that: Unix sockets need short paths.
pub fn show_at_short_path(folder: &Path) -> anyhow::Result<PathBuf> {
    let short = Path::new(SHORT_FOLDER);
    bind(folder, short)?;
    Ok(short.to_owned())
}

fn bind(folder: &Path, short: &Path) -> anyhow::Result<()> {
    let folder = folder
        .canonicalize()
        .with_context(|| format!("looking at {}", folder.display()))?;
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).context("a path with a NUL byte");
    let (from, to) = (text(&folder)?, text(short)?);
    // SAFETY: NUL-terminated paths; the other pointers may be null for a bind mount.
    let result = unsafe {
        libc::mount(
            from.as_ptr(),
            to.as_ptr(),
            std::ptr::null(),
            libc::MS_BIND,
            std::ptr::null(),
        )
    };
    ensure!(
        result == 0,
        "mounting {} on {}: {}",
        folder.display(),
        short.display(),
        std::io::Error::last_os_error()
    );
    Ok(())
}
