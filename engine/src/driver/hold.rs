//! Keeps a guest still while no standby would take over (`when_unprotected: pause`).
//!
//! ```text
//!   boots, takes over ─► Held ─── protected ───► Running ─┐
//!                         ▲  └─ its join checkpoint,      │
//!                         │     stop, reset, power-off    │
//!                         └─────── not protected ◄────────┘
//! ```
//!
//! Standing still is always safe, so this is the driver's alone: the core knows nothing of it, and what it lets leave still
//! leaves no earlier. Roles, swaps, joins and stops go on as they would.
//!
//! Invariant: with `pause`, nothing that the guest said leaves unless its state then is on two seats.

use std::time::{Duration, Instant};

use ftvm_protocol::core::{RoleName, Status as CoreStatus};
use ftvm_protocol::identity::Incarnation;

use super::{Driver, Guest};
use crate::control::WhenUnprotected;

/// Why a guest that would run does not.
pub const WHY: &str = "the guest stands still until a standby has joined (when unprotected: pause)";

/// What the driver knows of it.
#[derive(Debug)]
pub struct Hold {
    when_unprotected: WhenUnprotected,
    /// Since when the guest stands still.
    since: Option<Instant>,
    /// Whether the outbox is shut although the core may let it be open.
    withholds: bool,
    /// The source of a switchover, which has this guest's state and follows next.
    source: Option<Incarnation>,
}

impl Hold {
    /// For a seat that has not begun.
    pub fn new(when_unprotected: WhenUnprotected) -> Self {
        Self {
            when_unprotected,
            since: None,
            withholds: false,
            source: None,
        }
    }

    /// Another policy, from now on.
    pub fn set(&mut self, when_unprotected: WhenUnprotected) {
        self.when_unprotected = when_unprotected;
    }

    /// A guest is taken over: from a source that will follow, or from a leader that is lost.
    pub fn took_over_from(&mut self, source: Option<Incarnation>) {
        self.source = source;
    }

    /// How long the guest has stood still by now.
    pub fn lasts(&self) -> Duration {
        self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Driver {
    /// Whether a guest has to stand still, and its output has to wait, when the core is so.
    pub(super) fn holds(&self, status: &CoreStatus) -> bool {
        match self.hold.when_unprotected {
            WhenUnprotected::Continue => false,
            // A source that stands still for a switchover has its target's state, and the target has the source's.
            WhenUnprotected::Pause => {
                !status.protected && status.role != RoleName::Frozen && !self.source_follows_next(status)
            }
        }
    }

    /// [`Driver::holds`] as the core is now; asked at the end of every pause, and most guests never hold.
    pub(super) fn holds_now(&self) -> bool {
        self.hold.when_unprotected == WhenUnprotected::Pause && self.holds(&self.core.status())
    }

    fn source_follows_next(&self, status: &CoreStatus) -> bool {
        let source = self.hold.source.filter(|_| status.peer == self.hold.source);
        source.is_some_and(|source| self.links.values().any(|link| link.peer == source))
    }

    /// After every step: stops the guest, or lets it go on, and shuts the outbox or gives it back to the core's gate.
    pub(super) fn settle_hold(&mut self, status: &CoreStatus) {
        if status.protected || status.peer != self.hold.source {
            self.hold.source = None;
        }
        let holds = self.holds(status);
        match self.guest {
            Guest::Running if holds => self.hold_guest(),
            Guest::Held if !holds => self.resume_guest(),
            _ => {}
        }
        if self.hold.withholds != holds {
            self.hold.withholds = holds;
            self.set_gate(self.gate);
        }
    }

    /// The guest stands still from here on, and so does its time if it ever ran here: it does not notice. That of a guest that was
    /// taken over stands still already; one that has not booted yet is to find the right time.
    pub(super) fn hold_guest(&mut self) {
        let ran = self.guest != Guest::None;
        self.pause_guest();
        self.guest = Guest::Held;
        if ran && let Err(error) = self.seat.machine.hold_time() {
            return self.guest_failed(&error);
        }
        self.limit_over();
        if self.hold.since.is_none() {
            self.hold.since = Some(Instant::now());
            self.tell_guest("stands still until a standby has joined");
        }
    }

    /// The guest runs: if it stood still it may be that the network has forgotten where it is.
    pub(super) fn hold_over(&mut self) {
        let Some(since) = self.hold.since.take() else { return };
        self.figures.unprotected += since.elapsed();
        let why = if self.core.status().protected {
            "it is protected"
        } else {
            "it may run alone now"
        };
        self.tell_guest(&format!("goes on: {why}"));
        self.takeover.runs_after_all();
        self.ask_to_announce();
    }
}
