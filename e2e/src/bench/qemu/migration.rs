//! Live migration: the guest moves from one QEMU to the next, again and again, and stands still at the end of each move.
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::trace::What;
use super::{BANDWIDTH_BYTES_PER_S, Emulator, LOOK, PATIENCE, Setup};
use crate::bench::pair::describe;
use crate::bench::report::MigrationPoint;
use crate::bench::window::Pauses;
use crate::bench::{Load, Options};
use crate::report::Progress;

/// QEMU ends a migration when it expects to be done within this time. The lower, the shorter the guest stands still; too low,
/// and a migration never ends. So it begins low and is raised until it does.
const DOWNTIME_LIMIT_MS: u64 = 1;
/// How long QEMU tries with one limit.
const TRY: Duration = Duration::from_secs(2);

/// Downtimes under every load.
///
/// # Errors
/// If QEMU can't run or move the guest.
pub fn downtimes(options: &Options, setup: &Setup, progress: &Progress) -> anyhow::Result<Vec<MigrationPoint>> {
    let mut number = 0;
    let mut current = Emulator::start(setup, "host-0", None)?;
    current.wait_booted()?;
    let mut points = Vec::new();
    for load in Load::PAGES.map(Load::idle) {
        let rate = set_load(options, load, &mut current)?;
        let mut downtimes = Vec::new();
        for _ in 0..options.plan().migrations {
            number += 1;
            let (next, downtime_us) = migrate(setup, number, &mut current)?;
            // The source is over; the guest lives on in the next one.
            current = next;
            downtimes.push(downtime_us);
        }
        let downtimes = Pauses::from_values(downtimes);
        let point = MigrationPoint {
            load: load.into(),
            migrations: downtimes.count(),
            downtime_us_p50: downtimes.quantile_us(0.5),
            downtime_us_max: downtimes.quantile_us(1.0),
            dirty_pages_per_s: rate,
        };
        progress.say(format!(
            "migration: {} → downtime p50 {} µs, longest {} µs",
            describe(load),
            point.downtime_us_p50.unwrap_or(0),
            point.downtime_us_max.unwrap_or(0)
        ));
        points.push(point);
    }
    Ok(points)
}

/// Gives the guest its load; returns the pages that it writes a second.
fn set_load(options: &Options, load: Load, current: &mut Emulator) -> anyhow::Result<f64> {
    let plan = options.plan();
    let mut client = current.client()?;
    client.load(load, options.epoch_ms)?;
    let (before, began) = (client.status()?, Instant::now());
    std::thread::sleep(plan.settle);
    let written = client.status()?.churned_pages - before.churned_pages;
    Ok(written as f64 / began.elapsed().as_secs_f64())
}

fn migrate(setup: &Setup, number: u32, source: &mut Emulator) -> anyhow::Result<(Emulator, u64)> {
    let socket = setup.folder.join(format!("move-{number}.sock"));
    let target = Emulator::start(setup, &format!("host-{number}"), Some(&socket))?;
    let mut limit_ms = DOWNTIME_LIMIT_MS;
    let set = |source: &mut Emulator, limit_ms: u64| {
        let parameters = json!({ "downtime-limit": limit_ms, "max-bandwidth": BANDWIDTH_BYTES_PER_S });
        source.order("migrate-set-parameters", parameters)
    };
    set(source, limit_ms)?;
    source.order("migrate", json!({ "uri": format!("unix:{}", socket.display()) }))?;
    let began = Instant::now();
    let mut tried = Instant::now();
    loop {
        let state = source.order("query-migrate", json!({}))?;
        match state["status"].as_str() {
            Some("completed") => break,
            Some("failed" | "cancelled") => bail!("the migration failed: {}; {}", state, target.last_words()),
            _ => {}
        }
        ensure!(began.elapsed() < PATIENCE, "the migration does not end: {state}");
        if tried.elapsed() > TRY {
            limit_ms *= 4;
            set(source, limit_ms)?;
            tried = Instant::now();
        }
        std::thread::sleep(LOOK);
    }
    let downtime_us = downtime_us(source, &target)?;
    Ok((target, downtime_us))
}

/// From the source's order to stop until the target runs: QEMU's own figure has whole milliseconds only.
fn downtime_us(source: &Emulator, target: &Emulator) -> anyhow::Result<u64> {
    let stopped = source
        .traced()?
        .iter()
        .rev()
        .find(|line| line.what == What::Stopping)
        .copied();
    let stopped = stopped.context("QEMU did not trace that it stopped the guest")?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let lines = target.traced()?;
        if let Some(started) = lines
            .iter()
            .find(|line| line.what == What::Starting && line.unix_us >= stopped.unix_us)
        {
            return Ok(started.unix_us - stopped.unix_us);
        }
        ensure!(
            Instant::now() < deadline,
            "the target does not run: {}",
            target.last_words()
        );
        std::thread::sleep(LOOK);
    }
}
