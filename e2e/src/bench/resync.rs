//! Full resyncs of a filled guest, each beside a plain TLS stream; and what engines take of memory meanwhile.
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use super::pair::Pair;
use super::report::{Memory, Resync, ResyncRound, median};
use super::{Load, Options};
use crate::report::Progress;

const PAGE_BYTES: u64 = 4096;
/// The guest's own image and stacks, which it can't fill.
const GUEST_IMAGE_BYTES: u64 = 24 << 20;

/// Pages of the guest that are filled before a resync: all but what it needs itself.
fn filled_pages(options: &Options) -> u64 {
    ((u64::from(options.memory_mib) << 20) - GUEST_IMAGE_BYTES) / PAGE_BYTES
}

/// Memory of both engines under the largest load.
///
/// # Errors
/// If they can't be looked at.
pub fn memory(options: &Options, pair: &mut Pair<'_>) -> anyhow::Result<Memory> {
    pair.pauses(Load::idle(Load::PAGES[Load::PAGES.len() - 1]))?;
    let standby = pair.standby().context("there is no standby")?;
    let active = pair.engine_memory(pair.active())?;
    let standby = pair.engine_memory(standby)?;
    let cache = pair.active_seat()?.counter("delta_cache_bytes").unwrap_or(0.0) as u64;
    Ok(Memory {
        guest_bytes: u64::from(options.memory_mib) << 20,
        filled_bytes: 0,
        active,
        delta_cache_bytes: cache,
        active_beside_bytes: active.pss_bytes.saturating_sub(cache),
        standby,
        standby_peak_bytes: standby.peak_bytes,
        standby_peak_share: 0.0,
    })
}

/// Loses and replaces standbys of a filled guest. Returns the figures and the most that a joining standby had resident.
///
/// # Errors
/// If a standby does not come back, or the stream can't be measured.
pub fn resyncs(
    options: &Options,
    pair: &mut Pair<'_>,
    streams: &Path,
    progress: &Progress,
) -> anyhow::Result<(Resync, u64)> {
    let plan = options.plan();
    pair.fill(filled_pages(options))?;
    let mut rounds = Vec::new();
    let mut peak = 0;
    for _ in 0..plan.resyncs.max(1) {
        pair.be_alone()?;
        let stream = stream_bytes_per_s(streams, plan.stream_mib)?;
        let (standby, took) = pair.replace()?;
        peak = peak.max(pair.engine_memory(standby)?.peak_bytes);
        let seat = pair.active_seat()?;
        let counter = |name: &str| {
            seat.counter(name)
                .with_context(|| format!("the engine has no counter {name:?}"))
        };
        let seconds = counter("resync_us")? / 1e6;
        let sent = counter("resync_sent_bytes")?;
        ensure!(
            seconds > 0.0 && sent > 0.0,
            "the engine tells nothing of a resync that it did"
        );
        let round = ResyncRound {
            resync_ms: seconds * 1e3,
            protected_ms: took.as_secs_f64() * 1e3,
            copied_bytes: counter("resync_copied_bytes")? as u64,
            sent_bytes: sent as u64,
            sent_bytes_per_s: sent / seconds,
            stream_bytes_per_s: stream,
        };
        progress.say(format!(
            "resync: {:.0} MB in {seconds:.2} s, {:.0} MB/s; plain TLS stream {:.0} MB/s; protected after {:.2} s",
            sent / 1e6,
            round.sent_bytes_per_s / 1e6,
            stream / 1e6,
            took.as_secs_f64()
        ));
        rounds.push(round);
    }
    let sent = median(rounds.iter().map(|round| round.sent_bytes_per_s)).unwrap_or(0.0);
    let stream = median(rounds.iter().map(|round| round.stream_bytes_per_s)).unwrap_or(0.0);
    let resync = Resync {
        rounds,
        sent_bytes_per_s: sent,
        stream_bytes_per_s: stream,
        share: if stream > 0.0 { sent / stream } else { 0.0 },
    };
    Ok((resync, peak))
}

/// Completes what was measured of memory by what a join took.
pub fn with_join(memory: Memory, options: &Options, peak_bytes: u64) -> Memory {
    let peak = memory.standby_peak_bytes.max(peak_bytes);
    Memory {
        filled_bytes: filled_pages(options) * PAGE_BYTES,
        standby_peak_bytes: peak,
        standby_peak_share: peak as f64 / memory.guest_bytes as f64,
        ..memory
    }
}

/// One plain stream between two threads, over the loopback, with the engine's TLS library and settings.
fn stream_bytes_per_s(program: &Path, mebibytes: u32) -> anyhow::Result<f64> {
    let output = Command::new(program)
        .args(["plain", &mebibytes.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} ended with {}",
        program.display(),
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim()
        .parse()
        .with_context(|| format!("{} said {text:?} instead of a number", program.display()))
}
