//! What a client waits when a fault strikes: some rounds of the demonstration itself.
use std::path::Path;

use anyhow::bail;

use super::Options;
use super::report::{Gap, GapFigures};
use crate::demo::programs::Programs;
use crate::demo::{Fault, Options as DemoOptions, command};
use crate::report::Progress;

/// Plays both faults that have a goal.
///
/// # Errors
/// If something was lost: then the gap does not matter.
pub fn gaps(options: &Options, programs: &Programs, folder: &Path, progress: &Progress) -> anyhow::Result<Gap> {
    Ok(Gap {
        kill_engine: gap(Fault::KillEngine, options, programs, folder, progress)?,
        kill_host: gap(Fault::KillHost, options, programs, folder, progress)?,
    })
}

fn gap(
    fault: Fault,
    options: &Options,
    programs: &Programs,
    folder: &Path,
    progress: &Progress,
) -> anyhow::Result<GapFigures> {
    let folder = folder.join(fault.name());
    std::fs::create_dir_all(&folder)?;
    let play = DemoOptions {
        fault,
        rounds: options.plan().faults,
        ..DemoOptions::default()
    };
    let report = command::play_on_stage(&play, programs, &folder, progress)?;
    if !report.passed() {
        bail!("{}: {}", fault.name(), report.complaints.join("; "));
    }
    progress.say(format!("gap: {} → worst {:.1} ms", fault.name(), report.gap_ms));
    Ok(GapFigures {
        rounds: report.rounds,
        gap_ms_max: report.gap_ms,
        gap_ms_p50: report.gap_ms_p50,
        lost_answers: report.lost_answers,
        reprotect_ms: report.reprotect_ms,
    })
}
