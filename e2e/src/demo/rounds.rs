//! The play itself: protect, strike, watch, mend; round after round.
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::system::{Role, Seat, System};
use super::{Fault, Options};
use crate::guest_protocol::{CHURN_WORD_ONLY, DEFAULT_PORT, Op};
use crate::hosts::{CutDirection, Host, Lab};
use crate::judge::packet::Mac;
use crate::judge::sniffer::Sniffer;
use crate::judge::{Findings, Judge, JudgePlan, Outcome};
use crate::report::{Progress, Report, Round};

/// The guest's address on the client network.
pub const GUEST_ADDRESS: [u8; 4] = [10, 77, 0, 2];
/// The guest's MAC address, the same wherever it runs.
pub const GUEST_MAC: Mac = [0x02, 0xF7, 0x00, 0x00, 0x00, 0x01];

/// How long to wait for things that take their time on a small machine. Waits are generous; what is measured is not.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the machine to become protected, boot or resync included.
    pub protected: Duration,
    /// For another host to take over.
    pub failover: Duration,
    /// Undisturbed time before each fault.
    pub calm: Duration,
    /// Without an answer for this long the client gives its connection up.
    pub stalled: Duration,
    /// How long a host stays frozen, or a link cut, after the failover.
    pub hold: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            protected: Duration::from_secs(120),
            failover: Duration::from_secs(20),
            calm: Duration::from_secs(1),
            stalled: Duration::from_secs(30),
            hold: Duration::from_secs(1),
        }
    }
}

/// Everything that takes part.
pub struct Stage<'a> {
    options: &'a Options,
    patience: Patience,
    progress: &'a Progress,
    lab: Lab,
    system: &'a mut dyn System,
    sniffer: Sniffer,
    judge: Judge,
    report: Report,
    findings_before: Findings,
}

/// What remains after the last round: the report, the client's own books, and the lab, in which the hosts still live.
pub struct Ending {
    /// The report, complete.
    pub report: Report,
    /// What the client says.
    pub outcome: Outcome,
    /// The lab.
    pub lab: Lab,
}

impl<'a> Stage<'a> {
    /// Starts everything and waits until the guest answers and, if the system protects it, until it is protected.
    pub fn prepare(
        options: &'a Options,
        patience: Patience,
        progress: &'a Progress,
        lab: Lab,
        system: &'a mut dyn System,
    ) -> anyhow::Result<Self> {
        let ports = lab.hosts().iter().map(Host::client_port).collect();
        let sniffer = Sniffer::start(GUEST_MAC, ports).context("listening on the client network")?;
        system.start(&lab)?;
        let plan = JudgePlan {
            connect_within: patience.protected,
            stalled_after: patience.stalled,
            ..JudgePlan::new(SocketAddr::from((GUEST_ADDRESS, DEFAULT_PORT)))
        };
        let judge = Judge::start(plan, lab.client_entrance()?)?;
        let report = Report {
            fault: options.fault.name().to_owned(),
            guest: "embedded".to_owned(),
            memory_mib: options.memory_mib,
            vcpus: options.vcpus,
            ..Report::default()
        };
        let findings_before = Findings::default();
        let mut stage = Self {
            options,
            patience,
            progress,
            lab,
            system,
            sniffer,
            judge,
            report,
            findings_before,
        };
        stage
            .wait_for_answers(1, patience.protected)
            .context("waiting for the guest's first answer")?;
        stage.progress.say("the guest answers its client");
        if stage.system.protects() {
            let (active, standby) = stage.wait_protected(patience.protected)?;
            stage.progress.good(format!(
                "protected: {} active, {} standby",
                stage.lab.host(active).name(),
                stage.lab.host(standby).name()
            ));
        }
        stage.load()?;
        Ok(stage)
    }

    /// Plays all rounds. What goes wrong ends the play and becomes a complaint: the report is always complete.
    pub fn play(mut self) -> Ending {
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

    /// Memory churn in the guest, so that checkpoints have something to carry.
    fn load(&mut self) -> anyhow::Result<()> {
        let (pages, rate) = (self.options.churn_pages, self.options.churn_rate);
        let answer = self.judge.ask(Op::SetChurn, pages, rate | CHURN_WORD_ONLY);
        ensure!(
            answer.is_some_and(|answer| !answer.refused()),
            "the guest refused to churn {pages} pages of its memory"
        );
        self.judge.go_on();
        Ok(())
    }

    fn round(&mut self, round: &mut Round) -> anyhow::Result<()> {
        let before = self.active().context("no host says that it is active")?;
        round.active_before = self.name(before.0);
        self.judge.phase();
        std::thread::sleep(self.patience.calm);
        ensure!(
            !self.judge.has_ended(),
            "the client's connection ended before anything was done"
        );
        round.calm_gap_ms = self.judge.phase().gap_ms;
        // The counters of an engine that is about to die are read while it lives.
        let last = self.system.seat(&self.lab, before.0).unwrap_or(before.1.clone());
        round.pause_us_p50 = last.counter("pause_us_p50");
        round.pause_us_p99 = last.counter("pause_us_p99");
        round.sent_bytes = last.counter("link_sent_bytes").map_or(0, |bytes| bytes as u64);

        let at = self.strike(before.0)?;
        let after = self.wait_failover(before.0, last.term)?;
        round.active_after = self.name(after);
        let answers = self.judge.answers();
        let resumed = self.wait_for_answers(answers + 20, self.patience.failover);
        round.gap_ms = self.judge.phase().gap_ms;
        resumed.context("after the fault")?;
        self.progress.say(format!(
            "{} runs the guest; the client waited {:.1} ms",
            self.name(after),
            round.gap_ms
        ));
        self.relent(before.0, after)?;

        if self.system.protects() {
            let (active, standby) = self.wait_protected(self.patience.protected)?;
            if self.options.fault != Fault::None {
                round.reprotect_ms = Some(at.elapsed().as_secs_f64() * 1e3);
            }
            round.rebuild_gap_ms = self.judge.phase().gap_ms;
            round.active_after = self.name(active);
            round.standby_after = self.name(standby);
            // Its engine is a new incarnation, built from the winner's state.
            self.sniffer.emissions().rebuilt(standby);
            self.progress.good(format!(
                "protected again after {:.1} s: {} active, {} standby",
                at.elapsed().as_secs_f64(),
                self.name(active),
                self.name(standby)
            ));
            self.examine(round, active, standby)?;
        }
        self.bring_back(before.0)
    }

    /// The guest checks itself; both sides are compared while nobody asks it for anything.
    fn examine(&mut self, round: &mut Round, active: usize, standby: usize) -> anyhow::Result<()> {
        let answer = self
            .judge
            .ask(Op::Verify, 0, 0)
            .context("the connection ended during the guest's self-check")?;
        round.self_check_errors = u64::from(answer.memory_errors) + u64::from(answer.journal_errors);
        ensure!(
            round.self_check_errors == 0 && !answer.refused(),
            "the guest found {} faulty pages and {} faulty journal records in itself",
            answer.memory_errors,
            answer.journal_errors
        );
        let stopped = self.judge.ask(Op::SetChurn, 0, 0).context("the connection ended")?;
        ensure!(!stopped.refused(), "the guest refused to stop its memory churn");
        self.system
            .compare_sides(&self.lab, active, standby)
            .with_context(|| format!("comparing {} with {}", self.name(active), self.name(standby)))?;
        round.sides_compared = true;
        self.progress
            .say("the guest's self-check passed; both sides have the same memory and the same disk");
        self.load()
    }

    /// The fault itself. Returns when it struck.
    fn strike(&mut self, active: usize) -> anyhow::Result<Instant> {
        let name = self.name(active);
        let standby = (0..self.lab.hosts().len()).find(|&host| {
            self.system
                .seat(&self.lab, host)
                .is_some_and(|seat| seat.role == Role::Standby)
        });
        self.judge.phase();
        match self.options.fault {
            Fault::KillEngine => {
                let (killed, at) = self.lab.host(active).kill_program(self.system.engine_program())?;
                self.progress.strike(format!("killed the engine on {name} (SIGKILL)"));
                ensure!(
                    killed == 1,
                    "{killed} processes named {} ran on {name}",
                    self.system.engine_program()
                );
                Ok(at)
            }
            Fault::KillHost => {
                let at = self.lab.host_mut(active).kill()?;
                self.progress.strike(format!("pulled the plug of {name}"));
                Ok(at)
            }
            Fault::PauseHost => {
                let at = self.lab.host(active).freeze()?;
                self.progress.strike(format!("froze every process on {name} (SIGSTOP)"));
                Ok(at)
            }
            Fault::CutLink | Fault::CutLinkOneWay => {
                let standby = standby.context("there is no standby to cut off")?;
                let one_way = self.options.fault == Fault::CutLinkOneWay;
                let direction = if one_way {
                    CutDirection::FirstToSecond
                } else {
                    CutDirection::Both
                };
                let at = Instant::now();
                self.lab.cut_link(active, standby, direction)?;
                let how = if one_way { "one way" } else { "both ways" };
                self.progress
                    .strike(format!("cut the link between {name} and {} {how}", self.name(standby)));
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
            return Ok(before);
        }
        let deadline = Instant::now() + self.patience.failover;
        loop {
            for host in 0..self.lab.hosts().len() {
                let seat = self.system.seat(&self.lab, host);
                if seat.is_some_and(|seat| seat.role == Role::Active && seat.term > term) {
                    return Ok(host);
                }
            }
            if Instant::now() > deadline {
                let state = self.describe();
                bail!("no host took over within {:?}; {state}", self.patience.failover);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends faults that last: thaws, mends. The side that lost must have nothing new to say.
    fn relent(&mut self, before: usize, after: usize) -> anyhow::Result<()> {
        match self.options.fault {
            Fault::PauseHost => {
                std::thread::sleep(self.patience.hold);
                self.lab.host(before).thaw()?;
                self.progress
                    .strike(format!("{} goes on where it stood (SIGCONT)", self.name(before)));
                std::thread::sleep(self.patience.hold);
            }
            Fault::CutLink | Fault::CutLinkOneWay => {
                std::thread::sleep(self.patience.hold);
                self.lab.mend_links()?;
                self.progress
                    .strike(format!("mended the link; {} is active", self.name(after)));
            }
            Fault::KillEngine | Fault::KillHost | Fault::None => {}
        }
        Ok(())
    }

    /// A dead host comes back, empty, and is the spare one from now on.
    fn bring_back(&mut self, host: usize) -> anyhow::Result<()> {
        if self.lab.host(host).is_running() {
            return Ok(());
        }
        self.lab.host_mut(host).start()?;
        if self.system.protects() {
            self.system.host_started(&self.lab, host)?;
            self.progress
                .say(format!("{} is back, as the spare host", self.name(host)));
        }
        Ok(())
    }

    /// What the client and the sniffer found since the round before.
    fn close_round(&mut self, round: &mut Round) {
        let now = self.judge.findings();
        let before = std::mem::replace(&mut self.findings_before, now.clone());
        let doubled = |findings: &Findings| findings.duplicated_answers + findings.applied_twice;
        round.lost_answers = now.lost_in_all() - before.lost_in_all();
        round.duplicated_answers = doubled(&now) - doubled(&before);
        let emitted = self.sniffer.emissions().report().clone();
        let earlier = |value: fn(&Round) -> u64| self.report.per_round.iter().map(value).sum::<u64>();
        round.dual_active = emitted.dual_active + emitted.rewritten - earlier(|round| round.dual_active);
        round.late_frames = emitted.late_repeats + emitted.dual_active - earlier(|round| round.late_frames);
        round.epochs = self.active().map_or(0, |(_, seat)| seat.epoch);
    }

    fn end(mut self) -> Ending {
        for host in 0..self.lab.hosts().len() {
            if let Some(seat) = self.system.seat(&self.lab, host) {
                self.report
                    .counters
                    .insert(self.lab.host(host).name().to_owned(), seat.counters);
            }
        }
        let Self {
            judge,
            sniffer,
            mut report,
            lab,
            ..
        } = self;
        let outcome = judge.finish();
        let emissions = sniffer.emissions().report().clone();
        report.sum_up();
        report.answers = outcome.answers;
        report.latency_us_p50 = outcome.latency.quantile_us(0.5);
        report.latency_us_p99 = outcome.latency.quantile_us(0.99);
        let findings = outcome.findings();
        report.lost_answers = findings.lost_in_all();
        report.duplicated_answers = findings.duplicated_answers + findings.applied_twice;
        report.dual_active = emissions.dual_active + emissions.rewritten;
        report.complaints.extend(outcome.complaints());
        if report.dual_active > 0 {
            report.complaints.push(format!(
                "{} frames with news from a deposed host, {} frames that rewrite what was sent",
                emissions.dual_active, emissions.rewritten
            ));
        }
        match sniffer.finish() {
            Ok(0) => {}
            Ok(missed) => report.complaints.push(format!(
                "the observer of the client network missed {missed} frames, so its verdict on two active hosts is void"
            )),
            Err(error) => report
                .complaints
                .push(format!("the observer of the client network failed: {error}")),
        }
        if emissions.frames.is_empty() {
            report
                .complaints
                .push("the observer of the client network saw none of the guest's frames".to_owned());
        }
        Ending { report, outcome, lab }
    }

    fn name(&self, host: usize) -> String {
        self.lab.host(host).name().to_owned()
    }

    /// The host that says it is active; of several the one with the highest term.
    fn active(&mut self) -> Option<(usize, Seat)> {
        (0..self.lab.hosts().len())
            .filter_map(|host| Some((host, self.system.seat(&self.lab, host)?)))
            .filter(|(_, seat)| seat.role == Role::Active)
            .max_by_key(|(_, seat)| seat.term)
    }

    /// Waits until the active says that it is protected and another host says that it is its standby.
    fn wait_protected(&mut self, patience: Duration) -> anyhow::Result<(usize, usize)> {
        let deadline = Instant::now() + patience;
        let mut told = None;
        loop {
            if let Some((active, seat)) = self.active() {
                if seat.protected {
                    let standby = (0..self.lab.hosts().len()).find(|&host| {
                        host != active
                            && self
                                .system
                                .seat(&self.lab, host)
                                .is_some_and(|seat| seat.role == Role::Standby)
                    });
                    if let Some(standby) = standby {
                        return Ok((active, standby));
                    }
                }
                let percent = seat.resync_percent.map(|percent| percent / 25 * 25);
                if percent.is_some() && percent != told {
                    self.progress.say(format!("resync {} %", percent.unwrap_or(0)));
                    told = percent;
                }
            }
            ensure!(
                !self.judge.has_ended(),
                "the client's connection ended while protection was awaited"
            );
            if Instant::now() > deadline {
                bail!("not protected within {patience:?}; {}", self.describe());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_for_answers(&self, count: u64, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        while self.judge.answers() < count {
            ensure!(!self.judge.has_ended(), "the client's connection ended");
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
        let of = |host: usize| match self.system.seat(&self.lab, host) {
            Some(seat) => format!(
                "{}: {:?}, term {}, {}",
                self.lab.host(host).name(),
                seat.role,
                seat.term,
                seat.why
            ),
            None => format!("{}: no answer", self.lab.host(host).name()),
        };
        (0..self.lab.hosts().len()).map(of).collect::<Vec<_>>().join("; ")
    }
}
