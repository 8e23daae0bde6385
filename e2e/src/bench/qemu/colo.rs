//! COLO: QEMU's checkpoints of a running guest to a secondary, which runs the guest, too.
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::trace::{What, colo_pauses};
use super::{BANDWIDTH_BYTES_PER_S, Emulator, LOOK, PATIENCE, Setup};
use crate::bench::client::GuestClient;
use crate::bench::pair::describe;
use crate::bench::report::{ColoPoint, PauseFigures};
use crate::bench::window::Pauses;
use crate::bench::{Load, Options};
use crate::report::Progress;

/// Checkpoints under every load, one pair for all.
///
/// # Errors
/// If QEMU can't run the guest or COLO fails.
pub fn checkpoints(options: &Options, setup: &Setup, progress: &Progress) -> anyhow::Result<Vec<ColoPoint>> {
    let socket = setup.folder.join("colo.sock");
    let mut primary = Emulator::start(setup, "primary", None)?;
    primary.wait_booted()?;
    let mut client = primary.client()?;
    let alone = speeds(options, &mut client)?;
    client.load(Load::idle(0), options.epoch_ms)?;
    let mut secondary = Emulator::start(setup, "secondary", Some(&socket))?;
    let capability = json!({ "capabilities": [{ "capability": "x-colo", "state": true }] });
    secondary.order("migrate-set-capabilities", capability.clone())?;
    primary.order("migrate-set-capabilities", capability)?;
    let parameters = json!({ "x-checkpoint-delay": options.epoch_ms, "max-bandwidth": BANDWIDTH_BYTES_PER_S });
    primary.order("migrate-set-parameters", parameters)?;
    primary.order("migrate", json!({ "uri": format!("unix:{}", socket.display()) }))?;
    wait_checkpoints(&mut primary, &secondary)?;
    progress.say("colo: primary and secondary exchange checkpoints");
    let mut points = Vec::new();
    for load in loads() {
        let mut point = measure(options, load, &primary, &mut client)
            .with_context(|| secondary.last_words())
            .with_context(|| primary.last_words())?;
        point.speed_share = alone
            .iter()
            .find(|(other, _)| *other == load)
            .filter(|(_, speed)| *speed > 0.0)
            .map(|(_, speed)| point.work_per_s / speed);
        progress.say(format!(
            "colo: {} → p50 {} µs, p99 {} µs, {:.1} checkpoints/s",
            describe(load),
            point.pauses.pause_us_p50.unwrap_or(0),
            point.pauses.pause_us_p99.unwrap_or(0),
            point.checkpoints_per_s
        ));
        points.push(point);
    }
    Ok(points)
}

/// The same loads as ours.
fn loads() -> impl Iterator<Item = Load> {
    Load::PAGES
        .into_iter()
        .map(Load::idle)
        .chain(Load::PAGES.into_iter().map(Load::busy))
}

/// The guest's speed under each busy load, without COLO.
fn speeds(options: &Options, client: &mut GuestClient) -> anyhow::Result<Vec<(Load, f64)>> {
    let plan = options.plan();
    let mut speeds = Vec::new();
    for load in loads().filter(|load| load.busy) {
        client.load(load, options.epoch_ms)?;
        std::thread::sleep(plan.settle);
        let (before, began) = (client.status()?, Instant::now());
        std::thread::sleep(plan.speed_window / 2);
        let work = client.status()?.work - before.work;
        speeds.push((load, work as f64 / began.elapsed().as_secs_f64()));
    }
    Ok(speeds)
}

/// Until checkpoints really come: the first ones are slow.
fn wait_checkpoints(primary: &mut Emulator, secondary: &Emulator) -> anyhow::Result<()> {
    const ENOUGH: usize = 5;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = primary.order("query-migrate", json!({}))?;
        let status = status["status"].as_str().unwrap_or("none");
        if status == "failed" || status == "completed" {
            bail!("COLO did not begin ({status}): {}", secondary.last_words());
        }
        let runs = primary
            .traced()?
            .iter()
            .filter(|line| line.what == What::ColoRuns)
            .count();
        if runs >= ENOUGH {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{runs} checkpoints within {PATIENCE:?} ({status}): {}",
            secondary.last_words()
        );
        std::thread::sleep(LOOK);
    }
}

fn measure(options: &Options, load: Load, primary: &Emulator, client: &mut GuestClient) -> anyhow::Result<ColoPoint> {
    let plan = options.plan();
    client.load(load, options.epoch_ms)?;
    std::thread::sleep(plan.settle);
    let length = if load.busy { plan.speed_window } else { plan.window };
    let (before, began, from) = (client.status()?, Instant::now(), unix_us());
    std::thread::sleep(length);
    let (after, seconds, to) = (client.status()?, began.elapsed().as_secs_f64(), unix_us());
    // The last checkpoint of the window may still be under way.
    std::thread::sleep(Duration::from_millis(u64::from(options.epoch_ms)));
    let pauses = colo_pauses(&primary.traced()?, from, to);
    ensure!(
        !pauses.is_empty(),
        "no checkpoint came within {seconds:.1} s: COLO has ended"
    );
    let count = pauses.len() as f64;
    let paused: u64 = pauses.iter().sum();
    let written = (after.churned_pages - before.churned_pages) as f64;
    Ok(ColoPoint {
        load: load.into(),
        pauses: PauseFigures::from(&Pauses::from_values(pauses)),
        checkpoints_per_s: count / seconds,
        dirty_pages_per_s: written / seconds,
        dirty_pages_per_epoch: (written / count).min(load.dirty_pages.into()),
        paused_share: paused as f64 / 1e6 / seconds,
        work_per_s: (after.work - before.work) as f64 / seconds,
        speed_share: None,
    })
}

/// QEMU traces with the same clock.
fn unix_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
