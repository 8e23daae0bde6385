//! When a change of sides reached its steps, for the status and the log.

use std::fmt;
use std::time::{Duration, Instant};

use ftvm_protocol::core::Gate;
use ftvm_protocol::identity::{Epoch, Term};
use serde_json::{Map, Value};

/// What a change of sides consists of; the order is the usual one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Memory is at the last acknowledged epoch.
    Applied,
    /// The machine has that epoch's state.
    Loaded,
    /// The arbiter gave the record.
    Read,
    /// The arbiter took the new record.
    Swapped,
    /// The guest runs.
    Running,
    /// The header is durable.
    Header,
    /// The source of a planned switchover follows.
    Followed,
    /// The first epoch ended that somebody follows.
    Sealed,
    /// That epoch was given to the link.
    Sent,
    /// Output of the guest may leave that it produces here.
    Released,
    /// The first output left that the guest produced here.
    Answered,
}

impl Step {
    const COUNT: usize = Step::Answered as usize + 1;

    fn name(self) -> &'static str {
        match self {
            Step::Applied => "applied",
            Step::Loaded => "loaded",
            Step::Read => "read",
            Step::Swapped => "swapped",
            Step::Running => "running",
            Step::Header => "header",
            Step::Followed => "followed",
            Step::Sealed => "sealed",
            Step::Sent => "sent",
            Step::Released => "released",
            Step::Answered => "answered",
        }
    }
}

/// Why the sides change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The leader is lost.
    Takeover {
        /// How that was noticed.
        by: &'static str,
        /// Without contact when it was noticed.
        silence: Duration,
    },
    /// The leader stands still and asked this seat to run.
    Switchover,
}

impl Change {
    fn name(self) -> &'static str {
        match self {
            Change::Takeover { .. } => "takeover",
            Change::Switchover => "switchover",
        }
    }

    fn is_planned(self) -> bool {
        self == Change::Switchover
    }

    /// What it consists of. Before a switchover begins its target has the record and a durable header already.
    fn steps(self) -> &'static [Step] {
        match self {
            Change::Takeover { .. } => &[
                Step::Applied,
                Step::Loaded,
                Step::Read,
                Step::Swapped,
                Step::Running,
                Step::Header,
                Step::Released,
                Step::Answered,
            ],
            Change::Switchover => &[
                Step::Applied,
                Step::Loaded,
                Step::Running,
                Step::Followed,
                Step::Sealed,
                Step::Sent,
                Step::Released,
                Step::Answered,
            ],
        }
    }
}

/// When a change of sides reached its steps.
#[derive(Debug, Clone)]
pub struct Trace {
    change: Change,
    noticed: Instant,
    /// What the guest starts from here.
    epoch: Epoch,
    term: Term,
    reached: [Option<Duration>; Step::COUNT],
    told: bool,
}

impl Trace {
    /// A change that was noticed, or asked for, at `noticed`.
    pub fn new(change: Change, noticed: Instant) -> Self {
        Self {
            change,
            noticed,
            epoch: 0,
            term: 0,
            reached: [None; Step::COUNT],
            told: false,
        }
    }

    /// Whether it was planned, rather than the loss of a leader.
    pub fn is_planned(&self) -> bool {
        self.change.is_planned()
    }

    /// What the guest will start from, and the last term that is known.
    pub fn stands_at(&mut self, epoch: Epoch, term: Term) {
        (self.epoch, self.term) = (epoch, term);
    }

    /// A step that is reached again counts from its last time, up to the moment at which output may leave.
    pub fn reached(&mut self, step: Step, at: Instant) {
        let counts = self.at(Step::Released).is_none() || self.at(step).is_none();
        if counts && self.change.steps().contains(&step) {
            self.reached[step as usize] = Some(at.saturating_duration_since(self.noticed));
        }
    }

    /// A step of which only its first time counts, and none after the end: a join much later seals and sends epochs, too.
    pub fn reached_first(&mut self, step: Step, at: Instant) {
        if !self.told && self.at(step).is_none() {
            self.reached(step, at);
        }
    }

    /// The gate was set. Output that is sent once more, as it was before, may leave a target at once, and is no answer.
    pub fn gate_set(&mut self, gate: Gate, at: Instant) {
        let admits = if self.is_planned() {
            gate.admits(self.epoch + 1)
        } else {
            gate != Gate::Closed
        };
        if admits && self.at(Step::Running).is_some() && self.at(Step::Released).is_none() {
            self.reached(Step::Released, at);
        }
    }

    /// When this step was reached, from the beginning.
    pub fn at(&self, step: Step) -> Option<Duration> {
        self.reached[step as usize]
    }

    /// Whether it is time to tell it, once: the first answer was given, or there is nobody who would wait for one.
    pub fn tells(&mut self, answered: Option<Instant>, waits: bool, patience: Duration) -> bool {
        if self.told || self.at(Step::Released).is_none() {
            return false;
        }
        if let Some(at) = answered {
            self.reached(Step::Answered, at);
        }
        self.told = answered.is_some() || !waits || self.noticed.elapsed() > patience;
        self.told
    }

    /// For the status: `takeover_us` or `switchover_us`, from the beginning until output may leave, and each step, counted from there;
    /// of a takeover how the loss was noticed.
    pub fn counters(&self, into: &mut Map<String, Value>) {
        let us = |duration: Duration| Value::from(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
        let name = self.change.name();
        into.insert(format!("{name}_us"), self.at(Step::Released).map_or(Value::Null, us));
        if let Change::Takeover { by, silence } = self.change {
            into.insert("takeover_silence_us".to_owned(), us(silence));
            into.insert("takeover_noticed_by".to_owned(), by.into());
        }
        for step in self.change.steps() {
            let at = self.at(*step).map_or(Value::Null, us);
            into.insert(format!("{name}_{}_us", step.name()), at);
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let took = self.at(Step::Released).unwrap_or_default();
        let name = self.change.name();
        write!(
            f,
            "{name} at epoch {}, term {}, took {:.1} ms: ",
            self.epoch,
            self.term,
            ms(took)
        )?;
        match self.change {
            Change::Takeover { by, silence } => {
                write!(
                    f,
                    "leader lost by {by}, {:.0} ms after the last contact; then",
                    ms(silence)
                )?;
            }
            Change::Switchover => write!(f, "the source stood still and asked this seat to run; then")?,
        }
        let mut steps: Vec<_> = self
            .change
            .steps()
            .iter()
            .filter_map(|step| Some((self.at(*step)?, step.name())))
            .collect();
        steps.sort();
        let texts: Vec<String> = steps
            .into_iter()
            .map(|(at, name)| format!("{name} {:.1}", ms(at)))
            .collect();
        write!(f, " {} ms", texts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_switchover_is_over_when_what_the_guest_says_here_may_leave() {
        let began = Instant::now();
        let mut trace = Trace::new(Change::Switchover, began);
        trace.stands_at(7, 3);
        trace.reached(Step::Running, began + MS);
        trace.reached_first(Step::Sealed, began + 2 * MS);
        trace.reached_first(Step::Sealed, began + 3 * MS);
        assert_eq!(trace.at(Step::Sealed), Some(2 * MS));
        trace.gate_set(Gate::Through(7), began + 2 * MS);
        assert_eq!(trace.at(Step::Released), None, "only the source's last words leave");
        assert!(!trace.tells(None, false, MS));
        trace.gate_set(Gate::Through(8), began + 3 * MS);
        assert_eq!(trace.at(Step::Released), Some(3 * MS));
        assert!(trace.tells(Some(began + 4 * MS), true, 1000 * MS));
        assert!(!trace.tells(Some(began + 4 * MS), true, 1000 * MS), "once");
        let mut counters = Map::new();
        trace.counters(&mut counters);
        assert_eq!(counters["switchover_us"], 3000);
        assert_eq!(counters["switchover_answered_us"], 4000);
        assert!(!counters.keys().any(|key| key.starts_with("takeover")), "{counters:?}");
        assert_eq!(
            trace.to_string(),
            "switchover at epoch 7, term 3, took 3.0 ms: the source stood still and asked this seat to run; then running 1.0, sealed 2.0, \
             released 3.0, answered 4.0 ms"
        );
    }

    #[test]
    fn a_takeover_is_over_when_anything_may_leave() {
        let began = Instant::now();
        let change = Change::Takeover {
            by: "its closed connection",
            silence: 2 * MS,
        };
        let mut trace = Trace::new(change, began);
        trace.stands_at(7, 3);
        trace.gate_set(Gate::Through(7), began + MS);
        assert_eq!(trace.at(Step::Released), None, "the guest does not run yet");
        trace.reached(Step::Running, began + 2 * MS);
        trace.gate_set(Gate::Closed, began + 2 * MS);
        trace.gate_set(Gate::Through(7), began + 3 * MS);
        assert_eq!(trace.at(Step::Released), Some(3 * MS));
        trace.reached_first(Step::Sealed, began + 9 * MS);
        assert_eq!(trace.at(Step::Sealed), None, "the epoch of a join, much later");
        let mut counters = Map::new();
        trace.counters(&mut counters);
        assert_eq!(counters["takeover_us"], 3000);
        assert_eq!(counters["takeover_noticed_by"], "its closed connection");
    }
}
