//! A real pair under load: daemons and engines on hosts made of namespaces, and a client outside.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::client::GuestClient;
use super::process::{ProcessMemory, ThreadTimes, thread_times, times_since};
use super::report::{CostPoint, LatencyPoint, PauseFigures, PausePoint, SpeedPoint};
use super::window::{Look, Window};
use super::{Load, Options, Plan};
use crate::cluster::wait::wait_for;
use crate::demo::programs::Programs;
use crate::demo::standalone::Standalone;
use crate::demo::system::{Role, Seat, System};
use crate::demo::{GUEST_ADDRESS, Options as DemoOptions};
use crate::guest_blocks::{BlockLoad, BlockReport};
use crate::guest_protocol::{DEFAULT_PORT, Op};
use crate::hosts::{Lab, LabPlan};
use crate::report::Progress;

/// Waiting for protection, or for its end.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks while waiting.
const LOOK: Duration = Duration::from_millis(10);
/// A machine that does something else besides must not lose its standby in the middle of a window. What is measured does
/// not depend on it; gaps are measured with the default.
const PEER_LOST_MS: u32 = 3000;

/// The pair and its client.
pub struct Pair<'a> {
    plan: Plan,
    epoch_ms: u32,
    progress: &'a Progress,
    /// Where daemons and engines run; ends after them.
    system: Standalone,
    lab: Rc<Lab>,
    client: GuestClient,
    /// The host whose engine runs the guest; it stays the same, only standbys are killed.
    active: usize,
    /// The host of a standby that was lost and not replaced yet.
    lost: Option<usize>,
}

impl<'a> Pair<'a> {
    /// Starts everything in `folder`, which must have a short path, and waits until the guest is protected.
    ///
    /// # Errors
    /// What went wrong.
    pub fn start(
        options: &Options,
        programs: &Programs,
        folder: &Path,
        progress: &'a Progress,
    ) -> anyhow::Result<Self> {
        let lab = Rc::new(Lab::new(&LabPlan::three_hosts(folder))?);
        let machine = DemoOptions {
            memory_mib: options.memory_mib,
            vcpus: 1,
            ..DemoOptions::default()
        };
        let mut system = Standalone::new(Rc::clone(&lab), programs, folder, &machine)
            .with_checkpoint(json!({ "interval_max_us": options.epoch_ms * 1000 }))
            .with_timing(json!({ "peer_lost_ms": PEER_LOST_MS }));
        system.start()?;
        let guest = SocketAddr::from((GUEST_ADDRESS, DEFAULT_PORT));
        let client = GuestClient::connect_from(lab.client_entrance()?, guest, PATIENCE)?;
        let mut pair = Self {
            plan: options.plan(),
            epoch_ms: options.epoch_ms,
            progress,
            system,
            lab,
            client,
            active: 0,
            lost: None,
        };
        let standby = pair.wait_protected()?;
        pair.client.load(Load::idle(0), pair.epoch_ms)?;
        progress.say(format!(
            "pair: {} MiB guest protected, {} active, {} standby",
            options.memory_mib,
            pair.lab.host(pair.active).name(),
            pair.lab.host(standby).name()
        ));
        Ok(pair)
    }

    fn hosts(&self) -> usize {
        self.lab.hosts().len()
    }

    fn seat(&mut self, host: usize) -> Option<Seat> {
        self.lab.host(host).is_running().then(|| self.system.seat(host))?
    }

    /// The host that says it is a standby.
    pub fn standby(&mut self) -> Option<usize> {
        (0..self.hosts())
            .find(|&host| host != self.active && self.seat(host).is_some_and(|seat| seat.role == Role::Standby))
    }

    /// What the active engine says.
    ///
    /// # Errors
    /// If it says nothing, or is not active any more.
    pub fn active_seat(&mut self) -> anyhow::Result<Seat> {
        let active = self.active;
        let seat = wait_for("the active seat's answer", PATIENCE, || {
            self.seat(active).context("its daemon does not answer")
        })?;
        ensure!(
            seat.role == Role::Active,
            "the seat that was active is {:?} now: {}",
            seat.role,
            seat.why
        );
        Ok(seat)
    }

    /// Waits until the guest is protected; returns the standby's host.
    ///
    /// # Errors
    /// If that does not happen, and why.
    pub fn wait_protected(&mut self) -> anyhow::Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The first look finds who booted the guest.
            if let Some(active) = (0..self.hosts()).find(|&host| {
                self.seat(host)
                    .is_some_and(|seat| seat.role == Role::Active && seat.protected)
            }) {
                self.active = active;
                if let Some(standby) = self.standby() {
                    return Ok(standby);
                }
            }
            if let Some(trouble) = self.system.trouble() {
                bail!(trouble);
            }
            ensure!(Instant::now() < deadline, "not protected within {PATIENCE:?}");
            std::thread::sleep(LOOK);
        }
    }

    /// Cuts the standby's host off the power, and waits until the guest goes on alone. Nothing to do if it does already.
    ///
    /// # Errors
    /// If there is no standby, or the guest does not go on.
    pub fn be_alone(&mut self) -> anyhow::Result<()> {
        if self.lost.is_some() {
            return Ok(());
        }
        let lost = self.standby().context("there is no standby to lose")?;
        self.lab.host(lost).kill()?;
        self.lost = Some(lost);
        let deadline = Instant::now() + PATIENCE;
        while self.active_seat()?.protected {
            ensure!(Instant::now() < deadline, "still protected by a host that was killed");
            std::thread::sleep(LOOK);
        }
        // Output waits until the engine is confirmed to be alone: an answer shows that it is.
        self.client.status()?;
        Ok(())
    }

    /// Puts an empty seat on another host in the place of the lost one, and waits until the guest is protected. Returns the
    /// new standby's host and how long it took.
    ///
    /// # Errors
    /// If no standby was lost, there is no host to spare, or the guest is not protected in the end.
    pub fn replace(&mut self) -> anyhow::Result<(usize, Duration)> {
        let lost = self.lost.take().context("no standby was lost")?;
        let active = self.active;
        let spare = (0..self.hosts())
            .find(|&host| host != active && host != lost && self.lab.host(host).is_running())
            .context("no host is left to replace the lost one")?;
        let began = Instant::now();
        self.system.replace(lost, spare)?;
        let standby = self.wait_protected()?;
        let took = began.elapsed();
        ensure!(standby == spare, "another host than the spare became the standby");
        // The lost host comes back empty, as the next spare.
        self.lab.host(lost).start()?;
        self.system.make_spare(lost)?;
        Ok((standby, took))
    }

    /// Fills so many of the guest's pages with data that does not compress.
    ///
    /// # Errors
    /// If the guest does not.
    pub fn fill(&mut self, pages: u64) -> anyhow::Result<()> {
        self.client.fill(pages)
    }

    /// Gives the guest a load and leaves it at that.
    ///
    /// # Errors
    /// If the guest does not take it.
    pub fn load(&mut self, load: Load) -> anyhow::Result<()> {
        self.client.load(load, self.epoch_ms)
    }

    /// Has the guest run a block load; its report is not judged here.
    ///
    /// # Errors
    /// If the guest refuses, or does not answer.
    pub fn blocks(&mut self, load: BlockLoad) -> anyhow::Result<BlockReport> {
        self.client.blocks(load)
    }

    /// Has so many records appended to the guest's journal.
    ///
    /// # Errors
    /// If the guest does not.
    pub fn append(&mut self, records: u32) -> anyhow::Result<()> {
        for _ in 0..records {
            self.client.ask(Op::Journal, 0, 0)?;
        }
        Ok(())
    }

    /// Whether the guest's own check of its memory and its journal, which it reads back, finds nothing, and the journal has so many records.
    ///
    /// # Errors
    /// What it finds.
    pub fn check(&mut self, records: u32) -> anyhow::Result<()> {
        let found = self.client.ask(Op::Verify, 0, 0)?;
        let errors = (found.memory_errors, found.journal_errors);
        ensure!(
            errors == (0, 0) && found.journal_seq == u64::from(records),
            "the guest finds {} faulty pages and {} errors in its journal, which has {} records of {records}",
            errors.0,
            errors.1,
            found.journal_seq
        );
        Ok(())
    }

    /// The disk of a host's seat.
    pub fn disk(&self, host: usize) -> PathBuf {
        self.system.disk(host, 0)
    }

    /// Whether the active and this standby have the same memory at one epoch, and the same disks.
    ///
    /// # Errors
    /// Where they differ.
    pub fn compare(&mut self, standby: usize) -> anyhow::Result<()> {
        self.system.compare_sides(self.active, standby)
    }

    fn engine_pid(&self, host: usize) -> anyhow::Result<i32> {
        let host = self.lab.host(host);
        let engines = host.processes_named(self.system.engine_program())?;
        match engines.as_slice() {
            [engine] => Ok(engine.pid),
            _ => bail!("{} engines run on {} instead of one", engines.len(), host.name()),
        }
    }

    /// Memory of the engine on a host.
    ///
    /// # Errors
    /// If there is not exactly one engine, or it can't be looked at.
    pub fn engine_memory(&self, host: usize) -> anyhow::Result<ProcessMemory> {
        ProcessMemory::of(self.engine_pid(host)?)
    }

    /// The host of the active engine.
    pub fn active(&self) -> usize {
        self.active
    }

    fn look(&mut self) -> anyhow::Result<Look> {
        let guest = self.client.status()?;
        Ok(Look::new(self.active_seat()?, guest))
    }

    fn window(&mut self, load: Load, length: Duration) -> anyhow::Result<Window> {
        self.client.load(load, self.epoch_ms)?;
        std::thread::sleep(self.plan.settle);
        let before = self.look()?;
        std::thread::sleep(length);
        let after = self.look()?;
        Window::between(before, after)
    }

    /// Checkpoints under a load, and where both engines' processor time goes meanwhile.
    ///
    /// # Errors
    /// If the pair does not stay what it is, or tells too little.
    pub fn costs(&mut self, load: Load) -> anyhow::Result<(PausePoint, CostPoint)> {
        let standby = self.standby().context("there is no standby")?;
        let pids = [self.engine_pid(self.active)?, self.engine_pid(standby)?];
        let [active, standby] = pids;
        let before = (self.active_seat()?, thread_times(active)?, thread_times(standby)?);
        let point = self.pauses(load)?;
        let after = (self.active_seat()?, thread_times(active)?, thread_times(standby)?);
        let epochs = |seat: &Seat| seat.counter("epochs").unwrap_or(0.0);
        let epochs = (epochs(&after.0) - epochs(&before.0)).max(1.0);
        let by_epoch = |after: &ThreadTimes, before: &ThreadTimes| {
            let used = times_since(after, before).into_iter();
            used.map(|(name, ns)| (name, ns as f64 / 1e3 / epochs)).collect()
        };
        let of_window = |pause: &&Value| pause["epoch"].as_u64() > Some(before.0.epoch);
        let slowest = after.0.counters.get("pause_slowest").and_then(Value::as_array);
        let costs = CostPoint {
            load: load.into(),
            slowest_pauses: slowest.into_iter().flatten().filter(of_window).cloned().collect(),
            active_us_per_epoch: by_epoch(&after.1, &before.1),
            standby_us_per_epoch: by_epoch(&after.2, &before.2),
        };
        Ok((point, costs))
    }

    /// Checkpoints under a load.
    ///
    /// # Errors
    /// If the pair does not stay what it is, or tells too little.
    pub fn pauses(&mut self, load: Load) -> anyhow::Result<PausePoint> {
        let length = if load.busy {
            self.plan.speed_window
        } else {
            self.plan.window
        };
        let window = self.window(load, length)?;
        ensure!(
            self.active_seat()?.protected,
            "protection was lost while pauses were measured"
        );
        let paused = window.counted("pause_us_total")?;
        let braked = window.counted("braked_us")?;
        let written = window.written_pages as f64 / window.epochs.max(1) as f64;
        let point = PausePoint {
            load: load.into(),
            pauses: PauseFigures::from(&window.pauses),
            epochs_per_s: window.rate(window.epochs),
            dirty_pages_per_s: window.rate(window.written_pages),
            dirty_pages_per_epoch: written.min(load.dirty_pages.into()),
            sent_pages_per_epoch: window.per_epoch("pages_sent")?,
            residue_pages_per_epoch: window.per_epoch("residue_pages")?,
            bytes_per_epoch: window.per_epoch("epoch_sent_bytes")?,
            link_bytes_per_epoch: window.per_epoch("link_sent_bytes")?,
            paused_share: window.rate(paused) / 1e6,
            braked_share: window.rate(braked) / 1e6,
            work_per_s: window.rate(window.work),
            speed_share: None,
        };
        self.progress.say(format!(
            "pause: {} → p50 {} µs, p99 {} µs, {:.0} epochs/s, {:.0} pages/s dirtied",
            describe(load),
            point.pauses.pause_us_p50.unwrap_or(0),
            point.pauses.pause_us_p99.unwrap_or(0),
            point.epochs_per_s,
            point.dirty_pages_per_s
        ));
        Ok(point)
    }

    /// Guest speed under a load.
    ///
    /// # Errors
    /// If the engine does not stay what it is.
    pub fn speed(&mut self, load: Load) -> anyhow::Result<SpeedPoint> {
        let window = self.window(load, self.plan.speed_window)?;
        Ok(SpeedPoint {
            load: load.into(),
            work_per_s: window.rate(window.work),
            dirty_pages_per_s: window.rate(window.written_pages),
        })
    }

    /// Time from request to answer, with an idle guest.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn latency(&mut self) -> anyhow::Result<LatencyPoint> {
        self.client.load(Load::idle(0), self.epoch_ms)?;
        std::thread::sleep(self.plan.settle);
        let before = self.look()?;
        let times = self.client.latency(self.plan.speed_window)?;
        let after = self.look()?;
        let window = Window::between(before, after)?;
        Ok(LatencyPoint {
            requests: times.total(),
            latency_us_p50: times.quantile_us(0.5),
            latency_us_p99: times.quantile_us(0.99),
            latency_us_max: times.max_us(),
            epochs_per_s: window.rate(window.epochs),
            pauses: PauseFigures::from(&window.pauses),
        })
    }
}

/// A load in words.
pub fn describe(load: Load) -> String {
    let pages = if load.whole_pages { "whole pages" } else { "pages" };
    let cpu = if load.busy { "busy" } else { "idle" };
    format!("{} {pages} an epoch, CPU {cpu}", load.dirty_pages)
}
