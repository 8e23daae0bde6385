//! The play itself: protect, strike, watch, mend; round after round.
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::machines::Machines;
use super::system::{Role, Seat, System};
use super::witness::{Tally, Witness};
use super::{Fault, Options};
use crate::hosts::CutDirection;
use crate::judge::emission::EmissionReport;
use crate::judge::packet::Mac;
use crate::judge::sniffer::Sniffer;
use crate::report::{Progress, Report, Round};

/// How long to wait for things that take their time on a small machine. Waits are generous; what is measured is not.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the machine to become protected, boot or resync included.
    pub protected: Duration,
    /// Undisturbed time before each fault.
    pub calm: Duration,
    /// Without an answer for this long the client gives its connection up.
    pub stalled: Duration,
    /// How long a host stays frozen, or a link cut, after the failover.
    pub hold: Duration,
    /// Between two looks at the daemons' states.
    pub look: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            protected: Duration::from_secs(120),
            calm: Duration::from_secs(1),
            stalled: Duration::from_secs(30),
            hold: Duration::from_secs(1),
            look: Duration::from_millis(5),
        }
    }
}

/// Two hosts that protect the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Host of the active.
    pub active: usize,
    /// Host of the standby.
    pub standby: usize,
    /// Term in force.
    pub term: u64,
}

/// Whether a seat follows again, or is about to.
fn came_back(seat: Seat) -> bool {
    matches!(seat.role, Role::Joining | Role::Standby) && !seat.leaving
}

/// What a comparison of both sides came to.
enum Sides {
    Equal,
    Differ {
        error: anyhow::Error,
        /// The pair is still what it was: nothing but a difference explains it.
        still: bool,
    },
}

/// Compares until it is known of a pair that stays what it is; what differs at the end of all patience counts, too.
fn judge_sides(patience: Duration, mut compare: impl FnMut() -> anyhow::Result<Sides>) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match compare()? {
            Sides::Equal => return Ok(()),
            Sides::Differ { error, still } if still || Instant::now() > deadline => return Err(error),
            Sides::Differ { .. } => {}
        }
    }
}

/// What the client and the observer of its network found must be nothing.
fn judge_books(tally: Tally, emitted: &EmissionReport) -> anyhow::Result<()> {
    ensure!(tally == Tally::default(), "lost, doubled or otherwise wrong: {tally:?}");
    let dual = emitted.violations();
    ensure!(dual == 0, "{dual} frames of a deposed host, or rewritten");
    Ok(())
}

/// Answers that must come after a failover before the gap counts as over.
const ANSWERS_AFTER: u64 = 20;

/// Everything that takes part.
pub struct Stage<'a, W: Witness> {
    options: &'a Options,
    patience: Patience,
    progress: &'a Progress,
    machines: &'a dyn Machines,
    names: Vec<String>,
    system: &'a mut dyn System,
    sniffer: Sniffer,
    witness: W,
    report: Report,
    tally_before: Tally,
    /// A machine that stands still and can't be asked.
    frozen: Option<usize>,
    /// Where the frames of each round go.
    frames: Option<PathBuf>,
}

impl<'a, W: Witness> Stage<'a, W> {
    /// Starts everything and waits until the guest answers and, if the system protects it, until it is protected.
    pub fn prepare(
        options: &'a Options,
        patience: Patience,
        progress: &'a Progress,
        (machines, guest): (&'a dyn Machines, Mac),
        system: &'a mut dyn System,
        witness: impl FnOnce() -> anyhow::Result<W>,
    ) -> anyhow::Result<Self> {
        let sniffer = machines.sniff(guest).context("listening on the client network")?;
        let begin = Instant::now();
        system.start()?;
        let mut stage = Self {
            options,
            patience,
            progress,
            machines,
            names: machines.names(),
            system,
            sniffer,
            witness: witness()?,
            report: Report::new(options),
            tally_before: Tally::default(),
            frozen: None,
            frames: None,
        };
        let answered = stage.wait_for_answers(1);
        answered.with_context(|| format!("waiting for the guest's first answer; {}", stage.describe()))?;
        stage.progress.say("the guest answers its client");
        if stage.system.protects() {
            let pair = stage.pair()?;
            stage.report.protected_ms = Some(begin.elapsed().as_secs_f64() * 1e3);
            let (active, standby) = (&stage.names[pair.active], &stage.names[pair.standby]);
            stage
                .progress
                .good(format!("protected: {active} active, {standby} standby"));
        }
        stage.witness.load()?;
        Ok(stage)
    }

    /// Has the guest's frames around each fault written to files in `folder`, which say what a gap consists of.
    #[must_use]
    pub fn keep_frames(mut self, folder: &Path) -> Self {
        self.frames = Some(folder.to_owned());
        self
    }

    fn write_frames(&self, round: u32) {
        let Some(folder) = &self.frames else { return };
        let text = self.sniffer.timeline().text(&self.names);
        if let Err(error) = fs::write(folder.join(format!("frames-{round}.txt")), text) {
            self.progress
                .bad(format!("the frames of round {round} were not written: {error}"));
        }
    }

    /// Plays all rounds. What goes wrong ends the play and becomes a complaint: the report is always complete.
    pub fn play(mut self) -> (Report, W::Books) {
        for number in 1..=self.options.rounds {
            let mut round = Round {
                round: number,
                ..Round::default()
            };
            let result = self.round(&mut round);
            self.close_round(&mut round);
            self.report.per_round.push(round);
            if let Err(error) = result {
                self.progress.bad(format!("{error:#}"));
                self.report.complaints.push(format!("round {number}: {error:#}"));
                break;
            }
        }
        self.end()
    }

    fn round(&mut self, round: &mut Round) -> anyhow::Result<()> {
        let (before, seat, standby) = self.calm(round)?;
        // The counters of an engine that is about to die are read while it lives.
        round.pause_us_p50 = seat.counter("pause_us_p50");
        round.pause_us_p99 = seat.counter("pause_us_p99");
        round.sent_bytes = seat.counter("link_sent_bytes").map_or(0, |bytes| bytes as u64);

        let at = self.strike(before, standby)?;
        let after = self.wait_failover(before, seat.term)?;
        // After a cut either side may win, otherwise the one that was hit has lost. (Later another failover may bring it back.)
        let was_hit = matches!(
            self.options.fault,
            Fault::KillEngine | Fault::KillHost | Fault::PauseHost
        );
        ensure!(
            after != before || !was_hit || !self.system.protects(),
            "{} was hit, and runs the guest again",
            self.names[before]
        );
        round.active_after.clone_from(&self.names[after]);
        let goal = self.witness.answers() + ANSWERS_AFTER;
        let resumed = self.wait_for_answers(goal);
        round.gap_ms = self.witness.phase().gap_ms;
        self.write_frames(round.round);
        resumed.context("after the fault")?;
        let gap = round.gap_ms;
        self.progress.say(format!(
            "{} runs the guest; the client waited {gap:.1} ms",
            self.names[after]
        ));
        self.relent(before, after)?;
        if !self.system.protects() {
            return Ok(());
        }
        if after != before {
            round.change_us = self.seat(after).map(Seat::change_us).unwrap_or_default();
        }
        // After a cut it may be the standby that lost.
        let lost = if before == after {
            standby.unwrap_or(before)
        } else {
            before
        };
        self.rebuild(round, at, (after, lost))
    }

    /// An undisturbed while. A pair that lost its protection in it, as a machine without time for its heartbeats may, is
    /// waited for: killing the only seat of an unprotected guest would prove nothing. Gives the active, what it says, and its standby.
    fn calm(&mut self, round: &mut Round) -> anyhow::Result<(usize, Seat, Option<usize>)> {
        let deadline = Instant::now() + self.patience.protected;
        loop {
            if self.system.protects() {
                self.pair()?;
            }
            self.witness.phase();
            std::thread::sleep(self.patience.calm);
            ensure!(
                !self.witness.has_ended(),
                "the client's connection ended before anything was done"
            );
            round.calm_gap_ms = self.witness.phase().gap_ms;
            // An engine whose machine is busy may have no time for an answer.
            if let Some((active, seat)) = self.active() {
                let standby = self.standby_beside(active);
                if !self.system.protects() || (seat.protected && standby.is_some()) {
                    round.active_before.clone_from(&self.names[active]);
                    return Ok((active, seat, standby));
                }
                if !seat.protected {
                    self.progress
                        .bad(format!("protection was lost without a fault: {}", seat.why));
                }
            }
            ensure!(
                Instant::now() < deadline,
                "the machine does not stay protected: {}",
                self.describe()
            );
        }
    }

    /// Compares both sides, whichever they are by then: a pair that lost its protection meanwhile is waited for.
    fn compare(&mut self) -> anyhow::Result<()> {
        judge_sides(self.patience.protected, || {
            let Pair { active, standby, .. } = self.pair()?;
            let Err(error) = self.system.compare_sides(active, standby) else {
                return Ok(Sides::Equal);
            };
            let roles = format!("comparing {} with {}", self.names[active], self.names[standby]);
            let still =
                self.seat(active).is_some_and(|seat| seat.protected) && self.standby_beside(active) == Some(standby);
            if !still {
                self.progress
                    .say(format!("{roles}: {error:#}; the pair has changed meanwhile, once more"));
            }
            Ok(Sides::Differ {
                error: error.context(roles),
                still,
            })
        })
    }

    /// A third machine takes the place of the lost one, which comes back as the spare; if there is no third, the lost one
    /// comes back first and takes its own place. A seat whose machine lives may have come back by itself: then it stays.
    fn rebuild(&mut self, round: &mut Round, at: Instant, (after, lost): (usize, usize)) -> anyhow::Result<()> {
        if self.options.fault == Fault::None {
            return self.await_protection(round, at);
        }
        let spare = (0..self.names.len()).find(|&host| host != after && host != lost && self.machines.is_running(host));
        if self.seat(lost).is_some_and(came_back) {
            self.await_protection(round, at)
        } else if let Some(spare) = spare {
            self.system.replace(lost, spare)?;
            self.await_protection(round, at)?;
            if round.standby_after == self.names[lost] {
                // It was faster, and is not replaced.
                return Ok(());
            }
            self.bring_back(lost)
        } else {
            self.bring_back(lost)?;
            self.await_protection(round, at)
        }
    }

    fn await_protection(&mut self, round: &mut Round, struck_at: Instant) -> anyhow::Result<()> {
        let Pair { active, standby, .. } = self.pair()?;
        let seconds = struck_at.elapsed().as_secs_f64();
        round.rebuild_gap_ms = self.witness.phase().gap_ms;
        round.active_after.clone_from(&self.names[active]);
        round.standby_after.clone_from(&self.names[standby]);
        let roles = format!("{} active, {} standby", self.names[active], self.names[standby]);
        if self.options.fault == Fault::None {
            self.progress.good(format!("still protected: {roles}"));
        } else {
            round.reprotect_ms = Some(seconds * 1e3);
            self.progress
                .good(format!("protected again after {seconds:.1} s: {roles}"));
        }
        self.witness.examine()?;
        match self.compare() {
            Ok(()) => {
                round.examined = true;
                self.progress
                    .say("the guest's self-check passed; both sides have the same memory and the same disk");
            }
            // Worth a complaint, but what follows can be played and judged.
            Err(error) => {
                let complaint = format!("round {}: {error:#}", round.round);
                self.progress.bad(&complaint);
                self.report.complaints.push(complaint);
            }
        }
        self.witness.load()
    }

    /// The fault itself. Returns when it struck.
    fn strike(&mut self, active: usize, standby: Option<usize>) -> anyhow::Result<Instant> {
        let name = self.names[active].clone();
        self.witness.phase();
        match self.options.fault {
            Fault::KillEngine => {
                let program = self.system.engine_program();
                let (killed, at) = self.machines.kill_program(active, program)?;
                self.progress.strike(format!("killed the engine on {name} (SIGKILL)"));
                ensure!(killed == 1, "{killed} processes named {program} ran on {name}");
                Ok(at)
            }
            Fault::KillHost => {
                let at = self.machines.kill(active)?;
                self.progress.strike(format!("pulled the plug of {name}"));
                Ok(at)
            }
            Fault::PauseHost => {
                let at = self.machines.freeze(active)?;
                self.frozen = Some(active);
                self.progress.strike(format!("froze everything on {name} (SIGSTOP)"));
                Ok(at)
            }
            Fault::CutLink | Fault::CutLinkOneWay => {
                let standby = standby.context("there is no standby to cut off")?;
                let (direction, how) = match self.options.fault {
                    Fault::CutLink => (CutDirection::Both, "both ways"),
                    _ => (CutDirection::FirstToSecond, "one way"),
                };
                let at = Instant::now();
                self.machines.cut_link(active, standby, direction)?;
                self.progress
                    .strike(format!("cut the link from {name} to {} {how}", self.names[standby]));
                Ok(at)
            }
            Fault::HandOver => {
                let at = Instant::now();
                self.system.hand_over(active)?;
                self.progress.strike(format!("{name} was asked to hand over"));
                Ok(at)
            }
            Fault::None => {
                self.progress.say("no fault this time");
                Ok(Instant::now())
            }
        }
    }

    /// Waits until a host is active in a later term; after a cut that may be the same one, now alone.
    fn wait_failover(&mut self, before: usize, term: u64) -> anyhow::Result<usize> {
        if self.options.fault == Fault::None || !self.system.protects() {
            std::thread::sleep(self.patience.hold);
            return Ok(before);
        }
        self.wait_successor(term, self.patience.protected)
    }

    /// Waits until a host is active in a later term.
    fn wait_successor(&mut self, term: u64, patience: Duration) -> anyhow::Result<usize> {
        let deadline = Instant::now() + patience;
        loop {
            let successor = |seat: Seat| seat.role == Role::Active && seat.term > term;
            if let Some(host) = (0..self.names.len()).find(|&host| self.seat(host).is_some_and(successor)) {
                return Ok(host);
            }
            if Instant::now() > deadline {
                let state = self.describe();
                bail!("no host took over within {patience:?}; {state}");
            }
            std::thread::sleep(self.patience.look);
        }
    }

    /// Ends faults that last: thaws, mends. The side that lost must have nothing new to say.
    fn relent(&mut self, before: usize, after: usize) -> anyhow::Result<()> {
        match self.options.fault {
            Fault::PauseHost => {
                std::thread::sleep(self.patience.hold);
                self.machines.thaw(before)?;
                self.frozen = None;
                self.progress
                    .strike(format!("{} goes on where it stood (SIGCONT)", self.names[before]));
                std::thread::sleep(self.patience.hold);
            }
            Fault::CutLink | Fault::CutLinkOneWay => {
                std::thread::sleep(self.patience.hold);
                self.machines.mend_links()?;
                self.progress
                    .strike(format!("mended the link; {} is active", self.names[after]));
            }
            Fault::KillEngine | Fault::KillHost | Fault::HandOver | Fault::None => {}
        }
        Ok(())
    }

    /// The host that lost its seat gets an empty one; a dead one is started first.
    fn bring_back(&mut self, host: usize) -> anyhow::Result<()> {
        let was_dead = !self.machines.is_running(host);
        if was_dead {
            self.machines.start(host)?;
        }
        self.system.make_spare(host)?;
        let how = if was_dead {
            "was started again"
        } else {
            "has an empty seat"
        };
        self.progress
            .say(format!("{} {how} and waits to be used", self.names[host]));
        Ok(())
    }

    /// What the client and the sniffer found since the round before.
    fn close_round(&mut self, round: &mut Round) {
        let now = self.witness.tally();
        round.lost_answers = now.lost - self.tally_before.lost;
        round.duplicated_answers = now.doubled - self.tally_before.doubled;
        self.tally_before = now;
        let emitted = self.sniffer.emissions().report().clone();
        let earlier = |value: fn(&Round) -> u64| self.report.per_round.iter().map(value).sum::<u64>();
        round.dual_active = emitted.violations() - earlier(|round| round.dual_active);
        round.late_frames = emitted.late_repeats + emitted.dual_active - earlier(|round| round.late_frames);
        round.epochs = self.active().map_or(0, |(_, seat)| seat.epoch);
    }

    /// Waits until the machine is protected.
    ///
    /// # Errors
    /// If that does not come about, with what every host says.
    pub fn pair(&mut self) -> anyhow::Result<Pair> {
        let pair = self.wait_protected()?;
        // Its engine is a new incarnation, built from the active's state.
        self.sniffer.emissions().rebuilt(pair.standby);
        Ok(pair)
    }

    /// Waits until a host is active in a later term than the pair's; returns it, and how long the client was without an answer
    /// since it was asked last, in milliseconds.
    ///
    /// # Errors
    /// If nobody takes over, or the guest does not answer.
    pub fn taken_over(&mut self, before: Pair) -> anyhow::Result<(usize, f64)> {
        let after = self.wait_successor(before.term, self.patience.protected)?;
        Ok((after, self.answers_go_on()?))
    }

    /// Waits until a host is active in a later term than the pair's, for so long.
    ///
    /// # Errors
    /// If nobody is by then, with what every host says.
    pub fn taken_over_within(&mut self, before: Pair, patience: Duration) -> anyhow::Result<usize> {
        self.wait_successor(before.term, patience)
    }

    /// Answers that the client got so far.
    pub fn answers(&self) -> u64 {
        self.witness.answers()
    }

    /// Waits for some more answers; returns the longest time without one since it was asked last, in milliseconds.
    ///
    /// # Errors
    /// If they don't come.
    pub fn answers_go_on(&self) -> anyhow::Result<f64> {
        self.wait_for_answers(self.witness.answers() + ANSWERS_AFTER)?;
        Ok(self.witness.phase().gap_ms)
    }

    /// The guest's self-check, and both sides compared. The client is quiet meanwhile.
    ///
    /// # Errors
    /// What is wrong with the guest, what differs, or what the client lost.
    pub fn examine(&mut self) -> anyhow::Result<()> {
        self.witness.examine()?;
        self.compare()?;
        self.witness.load()?;
        self.nothing_lost()
    }

    /// Tells the observer who held the arbiter's record when ([`crate::judge::emission::Emissions::explain`]).
    pub fn explain(&mut self, held: impl Fn(usize, Instant) -> bool) {
        self.sniffer.emissions().explain(held);
    }

    /// What client and observer found so far is nothing.
    ///
    /// # Errors
    /// What they found.
    pub fn nothing_lost(&self) -> anyhow::Result<()> {
        judge_books(self.witness.tally(), self.sniffer.emissions().report())
    }

    /// Lets time pass in which the machine may be protected or not, and hosts may take over from each other.
    pub fn let_pass(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            std::thread::sleep(self.patience.look);
            let protected = self.active().filter(|(_, seat)| seat.protected);
            if let Some(standby) = protected.and_then(|(active, _)| self.standby_beside(active)) {
                self.sniffer.emissions().rebuilt(standby);
            }
        }
    }

    /// What keeps the guest alive.
    pub fn system(&mut self) -> &mut dyn System {
        self.system
    }

    /// Ends the client and the observer of its network, and sums up.
    pub fn end(mut self) -> (Report, W::Books) {
        for host in 0..self.names.len() {
            if let Some(seat) = self.seat(host) {
                self.report.counters.insert(self.names[host].clone(), seat.counters);
            }
        }
        let Self {
            witness,
            sniffer,
            mut report,
            ..
        } = self;
        let (testimony, books) = witness.finish();
        report.sum_up();
        report.answers = testimony.answers;
        report.latency_us_p50 = testimony.latency_us_p50;
        report.latency_us_p99 = testimony.latency_us_p99;
        report.lost_answers = testimony.tally.lost;
        report.duplicated_answers = testimony.tally.doubled;
        report.complaints.extend(testimony.complaints);
        let emissions = sniffer.emissions().report().clone();
        report.dual_active = emissions.violations();
        if report.dual_active > 0 {
            report.complaints.push(format!(
                "{} frames with news from a deposed host, {} frames that rewrite what was sent",
                emissions.dual_active, emissions.rewritten
            ));
        }
        if emissions.frames.is_empty() {
            report
                .complaints
                .push("the observer of the client network saw none of the guest's frames".to_owned());
        }
        match sniffer.finish() {
            Ok(0) => {}
            Ok(missed) => report.complaints.push(format!(
                "the observer of the client network missed {missed} frames: its verdict on two active hosts is void"
            )),
            Err(error) => report
                .complaints
                .push(format!("the observer of the client network failed: {error}")),
        }
        (report, books)
    }

    /// What a host says of its seat; nobody asks one that is known to be dead or frozen.
    fn seat(&mut self, host: usize) -> Option<Seat> {
        if self.frozen == Some(host) || !self.machines.is_running(host) {
            return None;
        }
        self.system.seat(host)
    }

    /// The host that says it is active; of several the one with the highest term.
    fn active(&mut self) -> Option<(usize, Seat)> {
        (0..self.names.len())
            .filter_map(|host| Some((host, self.seat(host)?)))
            .filter(|(_, seat)| seat.role == Role::Active)
            .max_by_key(|(_, seat)| seat.term)
    }

    fn standby_beside(&mut self, active: usize) -> Option<usize> {
        let is_standby = |seat: Seat| seat.role == Role::Standby;
        (0..self.names.len()).find(|&host| host != active && self.seat(host).is_some_and(is_standby))
    }

    /// Waits until the active says that it is protected and another host says that it is its standby.
    fn wait_protected(&mut self) -> anyhow::Result<Pair> {
        let patience = self.patience.protected;
        let deadline = Instant::now() + patience;
        let mut told = None;
        loop {
            if let Some((active, seat)) = self.active() {
                if seat.protected
                    && let Some(standby) = self.standby_beside(active)
                {
                    let term = seat.term;
                    return Ok(Pair { active, standby, term });
                }
                let quarter = seat.resync_percent.map(|percent| percent / 25 * 25);
                if let Some(percent) = quarter.filter(|_| quarter != told) {
                    self.progress.say(format!("resync {percent} %"));
                    told = quarter;
                }
            }
            ensure!(
                !self.witness.has_ended(),
                "the client's connection ended while protection was awaited"
            );
            if let Some(trouble) = self.system.trouble() {
                // A lost seat may come back between the look at it and its replacement, which is refused then.
                let hosts = 0..self.names.len();
                let back = hosts.into_iter().any(|host| self.seat(host).is_some_and(came_back));
                ensure!(back, "{trouble}; {}", self.describe());
                self.progress.say(&trouble);
            }
            if Instant::now() > deadline {
                bail!("not protected within {patience:?}; {}", self.describe());
            }
            std::thread::sleep(self.patience.look);
        }
    }

    fn wait_for_answers(&self, count: u64) -> anyhow::Result<()> {
        let patience = self.patience.protected;
        let deadline = Instant::now() + patience;
        while self.witness.answers() < count {
            ensure!(!self.witness.has_ended(), "the client's connection ended");
            ensure!(
                Instant::now() < deadline,
                "the guest did not answer within {patience:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// What every host says, for an error message.
    fn describe(&mut self) -> String {
        let mut lines = Vec::new();
        for host in 0..self.names.len() {
            let seat = self.seat(host);
            let state = seat.map(|seat| format!("{:?}, term {}, {}", seat.role, seat.term, seat.why));
            lines.push(format!(
                "{}: {}",
                self.names[host],
                state.as_deref().unwrap_or("no answer")
            ));
        }
        lines.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::judge::Findings;

    fn differ(text: &'static str, still: bool) -> Sides {
        let error = anyhow!(text);
        Sides::Differ { error, still }
    }

    #[test]
    fn sides_of_a_standing_pair_may_not_differ() {
        let patience = Duration::from_secs(3600);
        judge_sides(patience, || Ok(Sides::Equal)).unwrap();
        let mut looks = 0;
        let found = judge_sides(patience, || {
            looks += 1;
            Ok(differ("memory differs at epoch 9", true))
        });
        assert_eq!(
            (found.unwrap_err().to_string().as_str(), looks),
            ("memory differs at epoch 9", 1)
        );
    }

    #[test]
    fn a_pair_that_changed_meanwhile_is_compared_again() {
        let patience = Duration::from_secs(3600);
        let mut looks = vec![Sides::Equal, differ("no answer", false), differ("no answer", false)];
        judge_sides(patience, || Ok(looks.pop().unwrap())).unwrap();
        assert!(looks.is_empty());
        // That it changed once excuses nothing later.
        let mut looks = vec![Sides::Equal, differ("memory differs", true), differ("no answer", false)];
        let found = judge_sides(patience, || Ok(looks.pop().unwrap()));
        assert_eq!(
            (found.unwrap_err().to_string().as_str(), looks.len()),
            ("memory differs", 1)
        );
        // Nor is a pair that never stands still called equal.
        let found = judge_sides(Duration::from_millis(1), || Ok(differ("the disks differ", false)));
        assert_eq!(found.unwrap_err().to_string(), "the disks differ");
        let found = judge_sides(patience, || bail!("not protected"));
        assert_eq!(found.unwrap_err().to_string(), "not protected");
    }

    #[test]
    fn nothing_that_was_lost_doubled_wrong_or_said_by_two_passes() {
        let clean = EmissionReport {
            frames: [(0, 900), (1, 300)].into(),
            handovers: 1,
            // Allowed: what a deposed host repeats.
            late_repeats: 3,
            ..EmissionReport::default()
        };
        judge_books((&Findings::default()).into(), &clean).unwrap();
        let none = Findings::default();
        type Wrong = (fn(&mut Findings), &'static str);
        let wrongs: [Wrong; 12] = [
            (|found| found.lost_answers = 3, "lost: 3"),
            (|found| found.lost_journal_records = 3, "lost: 3"),
            (|found| found.contradictions = 3, "lost: 3"),
            (|found| found.duplicated_answers = 3, "doubled: 3"),
            (|found| found.applied_twice = 3, "doubled: 3"),
            (|found| found.reboots = 3, "other: 3"),
            (|found| found.time_steps_back = 3, "other: 3"),
            (|found| found.out_of_step = 3, "other: 3"),
            (|found| found.refused = 3, "other: 3"),
            (|found| found.corrupt_payloads = 3, "other: 3"),
            (|found| found.memory_errors = 3, "other: 3"),
            (|found| found.journal_errors = 3, "other: 3"),
        ];
        for (change, words) in wrongs {
            let mut found = none.clone();
            change(&mut found);
            let error = judge_books((&found).into(), &clean).unwrap_err().to_string();
            assert!(error.contains(words), "{found:?}: {error}");
        }
        let changes: [fn(&mut EmissionReport); 2] = [|seen| seen.dual_active = 2, |seen| seen.rewritten = 2];
        for change in changes {
            let mut seen = clean.clone();
            change(&mut seen);
            let error = judge_books(Tally::default(), &seen).unwrap_err().to_string();
            assert!(error.starts_with("2 frames"), "{seen:?}: {error}");
        }
    }
}
