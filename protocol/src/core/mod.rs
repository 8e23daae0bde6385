//! The core of one seat.

mod action;
mod config;
mod event;
mod refusal;
mod status;

pub use action::{Action, EndReason, Gate};
pub use config::{Config, StoredHeader, Timing};
pub use event::{Command, Event, GuestReport, HeaderReport, ReadOutcome, Seal, SeatReport, SwapOutcome};
pub use refusal::Refusal;
pub use status::{ArbiterState, RoleName, Status};

use crate::identity::RequestId;

/// The protocol core of one engine process.
#[derive(Debug, Clone)]
pub struct Core {
    config: Config,
    now_ms: u64,
    requests: u64,
    gate: Gate,
}

impl Core {
    /// A core that has just started: no guest, no peer, gate closed. The driver calls `step` with [`Event::Tick`] next.
    pub fn new(config: Config) -> Self {
        Self {
            now_ms: config.now_ms,
            requests: 0,
            gate: Gate::Closed,
            config,
        }
    }

    /// Handles one event. `now_ms` never steps back (if it does, the last value is used); `actions` is appended to and
    /// executed in order before the next step.
    pub fn step(&mut self, now_ms: u64, event: Event, actions: &mut Vec<Action>) {
        self.now_ms = self.now_ms.max(now_ms);
        if event == Event::Tick {
            let request = self.next_request();
            let deadline_ms = self.now_ms + self.config.timing.arbiter_deadline_ms;
            actions.push(Action::ReadRecord { request, deadline_ms });
        }
    }

    fn next_request(&mut self) -> RequestId {
        self.requests += 1;
        RequestId(self.requests)
    }

    /// When the next [`Event::Tick`] is due at the latest, in the core's clock.
    pub fn next_wake_ms(&self) -> u64 {
        self.now_ms + self.config.timing.heartbeat_ms
    }

    /// The gate as of the last step.
    pub fn gate(&self) -> Gate {
        self.gate
    }

    /// Snapshot for status, metrics and the daemon's answers to other seats.
    pub fn status(&self) -> Status {
        Status {
            incarnation: self.config.incarnation,
            role: RoleName::Starting,
            holds_guest: false,
            protected: false,
            term: 0,
            uid: None,
            peer: None,
            session: None,
            gate: self.gate,
            epoch: 0,
            acked: 0,
            arbiter: ArbiterState::Unknown,
            unsettled: false,
            contact_age_ms: None,
            stopping: false,
            refused: None,
            recreate: None,
            failure: None,
        }
    }
}
