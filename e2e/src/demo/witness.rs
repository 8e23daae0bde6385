//! The client of the guest, as the play sees it: it keeps asking, it checks, it never forgives.
use std::net::SocketAddr;

use anyhow::{Context, ensure};

use super::Options;
use super::rounds::Patience;
use crate::guest_protocol::{CHURN_WORD_ONLY, DEFAULT_PORT, Op};
use crate::judge::{Findings, Judge, JudgePlan, Outcome, PhaseReport};

/// What was found wrong so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answers lost, of any kind.
    pub lost: u64,
    /// Answers, or requests carried out, more than once.
    pub doubled: u64,
    /// Everything else that must not be, such as restarts of the guest, or answers out of turn.
    pub other: u64,
}

impl From<&Findings> for Tally {
    fn from(findings: &Findings) -> Self {
        let (lost, doubled) = (
            findings.lost_in_all(),
            findings.duplicated_answers + findings.applied_twice,
        );
        let all: u64 = findings.complaints().iter().map(|(_, count)| count).sum();
        Self {
            lost,
            doubled,
            other: all - lost - doubled,
        }
    }
}

/// What a client says at its end.
#[derive(Clone, Debug, Default)]
pub struct Testimony {
    /// Answers received.
    pub answers: u64,
    /// What was found wrong.
    pub tally: Tally,
    /// Median time from request to answer.
    pub latency_us_p50: Option<u64>,
    /// Its 99th percentile.
    pub latency_us_p99: Option<u64>,
    /// Everything that must not be, one line each.
    pub complaints: Vec<String>,
}

/// A client that runs. It stands outside all machines and never renews its connection.
pub trait Witness {
    /// What it hands out at its end, for closer looks.
    type Books;

    /// Answers received so far.
    fn answers(&self) -> u64;

    /// True once it has ended by itself: its connection is gone.
    fn has_ended(&self) -> bool;

    /// Ends a phase of gap measurement.
    fn phase(&self) -> PhaseReport;

    /// What was found so far.
    fn tally(&self) -> Tally;

    /// Gives the guest its load (again).
    fn load(&self) -> anyhow::Result<()>;

    /// Lets the guest check itself, then leaves it without load until [`Witness::load`]. An error says what it found.
    fn examine(&self) -> anyhow::Result<()>;

    /// Waits for the open answers and ends.
    fn finish(self) -> (Testimony, Self::Books);
}

/// The judge of the embedded guest, with the memory churn that it orders.
#[derive(Debug)]
pub struct EmbeddedWitness {
    /// The judge.
    pub judge: Judge,
    /// Pages that the guest keeps dirtying.
    pub churn_pages: u64,
    /// Pages that each of its CPUs dirties per second.
    pub churn_rate: u64,
}

impl EmbeddedWitness {
    /// Connects to the guest at `address` from the network that `entrance` leads to.
    ///
    /// # Errors
    /// If its thread can't be started.
    pub fn start<E: std::fmt::Display>(
        address: [u8; 4],
        options: &Options,
        patience: Patience,
        entrance: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let plan = JudgePlan {
            connect_within: patience.protected,
            stalled_after: patience.stalled,
            ..JudgePlan::new(SocketAddr::from((address, DEFAULT_PORT)))
        };
        Ok(Self {
            judge: Judge::start(plan, entrance)?,
            churn_pages: options.churn_pages,
            churn_rate: options.churn_rate,
        })
    }

    fn order(&self, op: Op, arg: u64, arg2: u64) -> anyhow::Result<crate::guest_protocol::Answer> {
        let answer = self
            .judge
            .ask(op, arg, arg2)
            .with_context(|| format!("the connection ended before {op:?}"))?;
        ensure!(!answer.refused(), "the guest refused {op:?} with {arg} and {arg2}");
        Ok(answer)
    }
}

impl Witness for EmbeddedWitness {
    type Books = Outcome;

    fn answers(&self) -> u64 {
        self.judge.answers()
    }

    fn has_ended(&self) -> bool {
        self.judge.has_ended()
    }

    fn phase(&self) -> PhaseReport {
        self.judge.phase()
    }

    fn tally(&self) -> Tally {
        (&self.judge.findings()).into()
    }

    fn load(&self) -> anyhow::Result<()> {
        self.order(Op::SetChurn, self.churn_pages, self.churn_rate | CHURN_WORD_ONLY)?;
        self.judge.go_on();
        Ok(())
    }

    fn examine(&self) -> anyhow::Result<()> {
        self.order(Op::SetChurn, 0, 0)?;
        let answer = self.order(Op::Verify, 0, 0)?;
        let (pages, records) = (answer.memory_errors, answer.journal_errors);
        ensure!(
            pages == 0 && records == 0,
            "the guest found {pages} faulty pages and {records} faulty journal records"
        );
        Ok(())
    }

    fn finish(self) -> (Testimony, Outcome) {
        let outcome = self.judge.finish();
        let testimony = Testimony {
            answers: outcome.answers,
            tally: outcome.findings().into(),
            latency_us_p50: outcome.latency.quantile_us(0.5),
            latency_us_p99: outcome.latency.quantile_us(0.99),
            complaints: outcome.complaints(),
        };
        (testimony, outcome)
    }
}
