//! What the core tells about itself: for status files, metrics, conditions.

use crate::identity::{ArbiterUid, Epoch, Incarnation, SessionId, Term};
use crate::record::Record;

use super::action::Gate;
use super::refusal::Refusal;

/// Role in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RoleName {
    /// Waits: for its turn to boot, or for a leader to join.
    Starting,
    /// Receives a resync.
    Joining,
    /// Warm standby.
    Standby,
    /// Runs the guest.
    Active,
    /// Handed the guest over and waits for the outcome.
    Frozen,
    /// Ended.
    Ended,
}

/// How the seat stands to the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ArbiterState {
    /// Not asked yet.
    Unknown,
    /// Last answer was fine.
    Reachable,
    /// Last request was not answered.
    Unreachable,
    /// The record is gone.
    Gone,
    /// Other UID, or a term below a confirmed one, or malformed.
    Strange,
}

/// A snapshot of the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// This engine.
    pub incarnation: Incarnation,
    /// Its role.
    pub role: RoleName,
    /// Has a running or paused guest or a checkpoint that it may run: what the daemon answers other seats with
    /// ([`super::event::GuestReport::Present`]).
    pub holds_guest: bool,
    /// Confirmed by the arbiter: both seats are members and the session streams.
    pub protected: bool,
    /// Highest term known.
    pub term: Term,
    /// The record's UID that this seat belongs to.
    pub uid: Option<ArbiterUid>,
    /// The peer of the session.
    pub peer: Option<Incarnation>,
    /// The session.
    pub session: Option<SessionId>,
    /// The gate.
    pub gate: Gate,
    /// The running epoch (active), or the last staged one (standby).
    pub epoch: Epoch,
    /// Last acknowledged epoch.
    pub acked: Epoch,
    /// Arbiter.
    pub arbiter: ArbiterState,
    /// A write of unknown outcome.
    pub unsettled: bool,
    /// Since when there was no contact with the session's peer, in ms; `None` without a session.
    pub contact_age_ms: Option<u64>,
    /// A stop is under way.
    pub stopping: bool,
    /// Why the last attempt or command was refused; what a person sees when it waits.
    pub refused: Option<Refusal>,
    /// The record that the operator may create if it is gone: this seat's consent. For `members` of two, both seats
    /// must give the same consent (term: the larger one).
    pub recreate: Option<Record>,
    /// Text of a guest failure.
    pub failure: Option<String>,
}
