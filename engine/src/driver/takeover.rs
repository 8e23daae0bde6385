//! A takeover: what is done ahead while the arbiter is asked, the takeover itself, and what each part of it took.
//!
//! ```text
//!   leader lost ─► arbiter: record read ─► swap won ─► guest runs ────────────────► first new output
//!        └─► epochs applied ─► state loaded ─┘    └─► header durable ─► gate open ─► output sent again
//! ```
//!
//! What is done ahead gives no right to anything: pages of acknowledged epochs go where they belong, and the virtual
//! machine is loaded as at the join. Whether it runs is the core's decision alone.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_protocol::core::{Event, Gate, RoleName, Status as CoreStatus};
use ftvm_protocol::identity::{Epoch, Term};
use serde_json::{Map, Value};

use super::{Driver, Guest};
use crate::control::Ask;
use crate::machine::VmEvent;
use crate::outbox::Output;
use crate::replication::epoch::{Port, PortData};

/// What a takeover consists of; the order is the usual one.
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
    /// Output may leave.
    Released,
    /// The first output left that the guest produced here.
    Answered,
}

impl Step {
    const ALL: [Step; 8] = [
        Step::Applied,
        Step::Loaded,
        Step::Read,
        Step::Swapped,
        Step::Running,
        Step::Header,
        Step::Released,
        Step::Answered,
    ];

    fn name(self) -> &'static str {
        match self {
            Step::Applied => "applied",
            Step::Loaded => "loaded",
            Step::Read => "read",
            Step::Swapped => "swapped",
            Step::Running => "running",
            Step::Header => "header",
            Step::Released => "released",
            Step::Answered => "answered",
        }
    }
}

const SILENCE: &str = "its silence";

/// How the leader's loss was noticed.
pub fn cause(event: &Event) -> &'static str {
    match event {
        Event::Disconnected { .. } => "its closed connection",
        Event::PeerGone { .. } => "its daemon's word",
        Event::Received { .. } => "its own word",
        _ => SILENCE,
    }
}

/// When a takeover reached its steps.
#[derive(Debug, Clone)]
pub struct Trace {
    noticed: Instant,
    by: &'static str,
    /// Without contact when it was noticed.
    silence: Duration,
    epoch: Epoch,
    term: Term,
    reached: [Option<Duration>; Step::ALL.len()],
    told: bool,
}

impl Trace {
    fn new(noticed: Instant, by: &'static str, silence: Duration) -> Self {
        Self {
            noticed,
            by,
            silence,
            epoch: 0,
            term: 0,
            reached: [None; Step::ALL.len()],
            told: false,
        }
    }

    /// A step that is reached again counts from its last time, up to the moment at which output may leave.
    fn reached(&mut self, step: Step, at: Instant) {
        if self.at(Step::Released).is_none() || self.at(step).is_none() {
            self.reached[step as usize] = Some(at.saturating_duration_since(self.noticed));
        }
    }

    fn at(&self, step: Step) -> Option<Duration> {
        self.reached[step as usize]
    }

    /// For the status: `takeover_us` from the loss being noticed until output may leave, and each step, counted from there; how it was
    /// noticed.
    pub fn counters(&self, into: &mut Map<String, Value>) {
        let us = |duration: Duration| Value::from(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
        into.insert(
            "takeover_us".to_owned(),
            self.at(Step::Released).map_or(Value::Null, us),
        );
        into.insert("takeover_silence_us".to_owned(), us(self.silence));
        into.insert("takeover_noticed_by".to_owned(), self.by.into());
        for step in Step::ALL {
            let at = self.at(step).map_or(Value::Null, us);
            into.insert(format!("takeover_{}_us", step.name()), at);
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let took = self.at(Step::Released).unwrap_or_default();
        write!(
            f,
            "takeover at epoch {}, term {}, took {:.1} ms: leader lost by {}, {:.0} ms after the last contact; then",
            self.epoch,
            self.term,
            ms(took),
            self.by,
            ms(self.silence)
        )?;
        let mut steps: Vec<_> = Step::ALL
            .into_iter()
            .filter_map(|step| Some((self.at(step)?, step.name())))
            .collect();
        steps.sort();
        let texts: Vec<String> = steps
            .into_iter()
            .map(|(at, name)| format!("{name} {:.1}", ms(at)))
            .collect();
        write!(f, " {} ms", texts.join(", "))
    }
}

/// What the driver knows of a takeover under way, or of the last one.
#[derive(Debug, Default)]
pub struct Takeover {
    trace: Option<Trace>,
    /// The epoch whose state was loaded ahead, or could not be.
    prepared: Option<(Epoch, bool)>,
    /// The term of the record that the arbiter's client has seen.
    seen_term: Option<Term>,
    /// Frames were called to this seat for the switchover that is asked for.
    called: bool,
}

impl Takeover {
    /// A step was reached just now.
    pub fn reached(&mut self, step: Step) {
        if let Some(trace) = &mut self.trace {
            trace.reached(step, Instant::now());
        }
    }

    /// The gate was set.
    pub fn gate_set(&mut self, gate: Gate) {
        let runs = |trace: &Trace| trace.at(Step::Running).is_some() && trace.at(Step::Released).is_none();
        if gate != Gate::Closed && self.trace.as_ref().is_some_and(runs) {
            self.reached(Step::Released);
        }
    }

    /// The guest stood still for want of a standby, and runs now.
    pub fn runs_after_all(&mut self) {
        if self
            .trace
            .as_ref()
            .is_some_and(|trace| trace.at(Step::Running).is_none())
        {
            self.reached(Step::Running);
        }
    }

    /// The takeover under way, or the last one.
    pub fn trace(&self) -> Option<&Trace> {
        self.trace.as_ref()
    }
}

/// Frames that a standby's taps gather are kept once the leader is lost, or there was no contact for so long, and no longer
/// than the second: the guest gets them after a takeover, and no client has to wait for its retransmission timer. Shorter
/// than any silence that loses a leader, and longer than the time between two heartbeats.
const KEEP_INPUT_MS: std::ops::Range<u64> = 100..2_000;

/// How long a look at the record may take that nobody waits for.
const LOOK: Duration = Duration::from_secs(2);

/// A guest that says nothing for so long after its takeover need not be waited for.
const TELL_AFTER: Duration = Duration::from_secs(1);

impl Driver {
    /// Called after every step: gets ready for a takeover as soon as the leader is lost, and tells what one took.
    pub(super) fn watch_leader(&mut self, status: &CoreStatus, stepped: Instant, cause: &'static str) {
        // Whoever stands still for a switchover reads its taps no more.
        if status.switching && !self.takeover.called {
            self.call_frames_here();
        }
        self.takeover.called = status.switching;
        if status.role != RoleName::Standby {
            return self.tell_takeover();
        }
        if !status.leader_lost {
            self.takeover.trace = None;
            self.takeover.prepared = None;
            return self.show_record(status.term);
        }
        let silence = Duration::from_millis(status.contact_age_ms.unwrap_or_default());
        let noticed = self.takeover.trace.is_none();
        let trace = self
            .takeover
            .trace
            .get_or_insert_with(|| Trace::new(stepped, cause, silence));
        (trace.epoch, trace.term) = (status.epoch, status.term);
        if noticed && cause != SILENCE {
            self.call_frames_here();
        }
        self.prepare_takeover(status.epoch);
    }

    /// Lets the arbiter's client look at a record that is new to this seat, so that it need not look for it, nor make its
    /// folder durable, when the leader is lost. Nobody waits for the answer, and nothing is decided by it.
    fn show_record(&mut self, term: Term) {
        if self.takeover.seen_term.replace(term) != Some(term) {
            self.control.request(Ask::ReadRecord, LOOK);
        }
    }

    /// The arbiter was asked before this is done, and answers meanwhile.
    fn prepare_takeover(&mut self, epoch: Epoch) {
        if self.takeover.prepared.is_some_and(|(prepared, _)| prepared == epoch) {
            return;
        }
        let Some(following) = &self.following else { return };
        self.takeover.prepared = Some((epoch, false));
        let state = match following.receiving.prepare(epoch) {
            Ok(state) => state,
            // The takeover, if it comes to that, finds the same and says it.
            Err(why) => return tracing::warn!("not ready for a takeover yet: {why}"),
        };
        self.takeover.reached(Step::Applied);
        match self.seat.machine.load(&state) {
            Ok(()) => {
                self.takeover.reached(Step::Loaded);
                self.takeover.prepared = Some((epoch, true));
            }
            Err(error) => tracing::warn!("not ready for a takeover yet: {}", crate::error_chain(&error)),
        }
    }

    pub(super) fn take_over(&mut self, epoch: Epoch, resend_after: Epoch) {
        let Some(following) = self.following.take() else {
            // The frozen source goes on where it stands.
            self.seat.gate().set_epoch(epoch + 1);
            return self.go_on();
        };
        let taken = match following.receiving.take_over(epoch) {
            Ok(taken) => taken,
            Err(why) => return self.queue.machine(VmEvent::Fatal(why)),
        };
        if self.takeover.prepared != Some((epoch, true)) {
            self.takeover.reached(Step::Applied);
            if let Err(error) = self.seat.machine.load(&taken.state) {
                return self.guest_failed(&error);
            }
            self.takeover.reached(Step::Loaded);
        }
        if let Err(error) = self.seat.take_disks_over(taken.disks, self.queue.clone()) {
            return self.guest_failed(&error);
        }
        self.seat.gate().set_epoch(epoch + 1);
        self.hold.took_over_from(self.core.status().peer);
        tracing::info!(
            "{} frames go to the guest again; output of epochs after {resend_after} is sent once more, {} items",
            taken.inputs.len(),
            taken.outputs.len()
        );
        for PortData { port, bytes } in taken.inputs {
            if let Port::Nic(nic) = port {
                self.seat.inbox.inject(nic, bytes);
            }
        }
        self.announce(epoch);
        self.seat.outbox.watch_after(epoch);
        for output in taken.outputs {
            self.seat.outbox.put(epoch, output_of(output));
        }
        // After a switchover somebody follows from this very epoch.
        if self.core.status().peer.is_some() {
            self.start_recording();
        }
        self.seat.machine.after_takeover();
        self.resume_guest();
        if self.guest == Guest::Running {
            self.takeover.reached(Step::Running);
        }
    }

    /// A seat without a guest throws away what its taps gather, unless the guest may soon be here.
    pub(super) fn forget_old_input(&self) {
        let status = self.core.status();
        let kept = if status.leader_lost || status.switching {
            0..KEEP_INPUT_MS.end
        } else {
            KEEP_INPUT_MS
        };
        let keeps =
            status.role == RoleName::Standby && status.contact_age_ms.is_some_and(|age_ms| kept.contains(&age_ms));
        if self.guest == Guest::None && !keeps {
            self.seat.discard_input();
        }
    }

    /// One line for a takeover, once it is over.
    fn tell_takeover(&mut self) {
        let Some(trace) = &mut self.takeover.trace else { return };
        if trace.told || trace.at(Step::Released).is_none() {
            return;
        }
        let answered = self.seat.outbox.first_watched();
        if let Some(at) = answered {
            trace.reached(Step::Answered, at);
        }
        if answered.is_some() || self.guest != Guest::Running || trace.noticed.elapsed() > TELL_AFTER {
            trace.told = true;
            tracing::info!("{trace}");
        }
    }
}

fn output_of(data: PortData) -> Output {
    let bytes = Arc::from(data.bytes.as_slice());
    match data.port {
        Port::Nic(nic) => Output::Frame { nic: nic as u8, bytes },
        Port::Console => Output::Console(bytes),
    }
}
