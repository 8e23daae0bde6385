//! A takeover: what is done ahead while the arbiter is asked, the takeover itself, and what each part of it took.
//!
//! ```text
//!   leader lost ─► arbiter: record read ─► swap won ─► guest runs ────────────────► first new output
//!        └─► epochs applied ─► state loaded ─┘    └─► header durable ─► gate open ─► output sent again
//! ```
//!
//! What is done ahead gives no right to anything: pages of acknowledged epochs go where they belong, and the virtual
//! machine is loaded as at the join. Whether it runs is the core's decision alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_protocol::core::{Event, Gate, RoleName, Status as CoreStatus};
use ftvm_protocol::identity::{Epoch, Term};

use super::late::Route;
use super::trace::{Change, Step, Trace};
use super::{Driver, Guest, follow};
use crate::control::Ask;
use crate::machine::VmEvent;
use crate::outbox::Output;
use crate::replication::epoch::{Port, PortData};

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

/// What the driver knows of a takeover under way, or of the last one.
#[derive(Debug, Default)]
pub struct Takeover {
    trace: Option<Trace>,
    /// The epoch whose state was loaded ahead, or could not be.
    prepared: Option<(Epoch, bool)>,
    /// The term of the record that the arbiter's client has seen.
    seen_term: Option<Term>,
    /// What a switchover needs of this seat was begun when it was asked to claim the record.
    readied: bool,
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

    /// A step was reached just now, of which only the first time counts.
    pub fn reached_first(&mut self, step: Step) {
        if let Some(trace) = &mut self.trace {
            trace.reached_first(step, Instant::now());
        }
    }

    /// The gate was set.
    pub fn gate_set(&mut self, gate: Gate) {
        if let Some(trace) = &mut self.trace {
            trace.gate_set(gate, Instant::now());
        }
    }

    /// The trace of this kind of change; a new one if there is none yet. Whether it is new.
    fn trace_of(&mut self, change: Change, noticed: Instant) -> (&mut Trace, bool) {
        let planned = change == Change::Switchover;
        let known = self.trace.take_if(|trace| trace.is_planned() == planned);
        let new = known.is_none();
        let trace = self.trace.insert(known.unwrap_or_else(|| Trace::new(change, noticed)));
        (trace, new)
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
        if status.claiming && !self.takeover.readied {
            self.get_ready_for_switchover();
        }
        self.takeover.readied = status.claiming;
        if status.role != RoleName::Standby {
            return self.tell_takeover();
        }
        if !status.leader_lost {
            if status.switching {
                self.takeover.trace_of(Change::Switchover, stepped);
            } else {
                self.takeover.trace = None;
            }
            self.takeover.prepared = None;
            return self.show_record(status.term);
        }
        let silence = Duration::from_millis(status.contact_age_ms.unwrap_or_default());
        let change = Change::Takeover { by: cause, silence };
        let (trace, noticed) = self.takeover.trace_of(change, stepped);
        trace.stands_at(status.epoch, status.term);
        if noticed && cause != SILENCE {
            self.call_frames_here();
        }
        self.prepare_takeover(status.epoch);
    }

    /// The leader is to hand the guest over, and runs on until the record names this seat: what can be done before the guest stands
    /// still is done now. The kernel takes a while to begin with tracking, and disks that have taken everything durably are settled the sooner.
    fn get_ready_for_switchover(&mut self) {
        if let Err(error) = self.seat.machine.set_tracking(true) {
            // The takeover tries it again, and says so.
            tracing::warn!("not ready for a switchover yet: {}", crate::error_chain(&error));
        }
        if let Some(following) = &self.following {
            following.receiving.give(follow::Job::SyncAhead);
        }
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
        let status = self.core.status();
        // After a switchover somebody follows from this very epoch.
        let planned = status.peer.is_some();
        if planned {
            let (trace, _) = self.takeover.trace_of(Change::Switchover, Instant::now());
            trace.stands_at(epoch, status.term);
            self.take_late_input(following.session, epoch);
        } else {
            self.set_route(Route::Nowhere);
        }
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
        self.seat.changed.forget();
        self.seat.gate().set_epoch(epoch + 1);
        self.hold.took_over_from(status.peer);
        tracing::info!(
            "{} frames go to the guest again; output of epochs after {resend_after} is sent once more, {} items",
            taken.inputs.len(),
            taken.outputs.len()
        );
        let frames = taken
            .inputs
            .into_iter()
            .filter_map(|PortData { port, bytes }| match port {
                Port::Nic(nic) => Some((nic, bytes)),
                Port::Console => None,
            });
        self.seat.inbox.inject(frames.collect());
        self.announce(epoch);
        self.seat.outbox.watch_after(epoch);
        for output in taken.outputs {
            self.seat.outbox.put(epoch, output_of(output));
        }
        if planned {
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
        if self.guest == Guest::None && !keeps && self.passed_on.is_none() {
            self.seat.discard_input();
        }
    }

    /// One line for a takeover, once it is over.
    fn tell_takeover(&mut self) {
        let Some(trace) = &mut self.takeover.trace else { return };
        let answered = self.seat.outbox.first_watched();
        if trace.tells(answered, self.guest == Guest::Running, TELL_AFTER) {
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
