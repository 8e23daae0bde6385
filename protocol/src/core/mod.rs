//! The protocol core of one seat: a state machine that decides, and does nothing.
//!
//! ```text
//!                 ┌──────────────────────── Starting ◄─ a new engine process (new incarnation)
//!                 │ Join from a leader         │ won cold start (rule 8) or override (rule 9)
//!                 ▼                            ▼
//!              Joining                       Active ──── alone: members {A}, gate open
//!                 │ join checkpoint staged,    │ ▲  │ ▲   └─ joining: after the cut, acknowledged epochs only
//!                 │ header durable             │ │  │ │   └─ pair: members {A,B}, acknowledged epochs only
//!                 ▼        won takeover (3)    │ │  │ │
//!              Standby ──── Switch, claimed (6)┘ │  │ │ won swap of its own (6)
//!                 ▲                              │  │ │
//!                 └──── Follow from the target ──┼─ Frozen ◄─ the target has claimed the record
//!                                                │
//!   every role ──► Ended(reason): lost, ejected, stopped, storage or guest failed; the process exits
//! ```
//!
//! Every change of who may be active goes through one *attempt*: read the record uncached, decide on what was read,
//! perhaps ask the other seats' daemons, swap (modules `attempt` and `decide`). A step first takes its event in, then works out
//! level-triggered what is wanted now (module `drive`), so a lost or late event delays and never misleads.
//!
//! Invariant: the gate is derived from the state at the end of every step, never set by an event.
//! Invariant: nothing is released, reported or acknowledged that depends on a header which is not durable.
//! Invariant: a write of unknown outcome is settled by an own later swap; reading it only ever takes rights away.

mod action;
mod attempt;
mod config;
mod decide;
mod drive;
mod event;
mod follower;
mod leader;
mod links;
mod refusal;
mod role;
mod silence;
mod status;
mod storage;

pub use action::{Action, EndReason, Gate};
pub use config::{Config, StoredHeader, Timing};
pub use event::{Command, Event, GuestReport, HeaderReport, ReadOutcome, Seal, SeatReport, StorageHealth, SwapOutcome};
pub use refusal::Refusal;
pub use status::{AcceptedLoss, ArbiterState, RoleName, Status};

use crate::header::SeatHeader;
use crate::identity::{ArbiterUid, Incarnation, LinkId, Nonce, RequestId, SeatId, SessionId, Term};
use crate::message::{Message, PeerRole, SessionEnd, View};
use attempt::Attempt;
use links::Link;
use role::{Confirmed, JoinStage, LeadStage, Role, Starting};
use silence::Silence;
use storage::OwnStorage;

/// A re-created record that is being made this seat's own.
#[derive(Debug, Clone, Copy)]
struct Adopting {
    uid: ArbiterUid,
    term: Term,
    /// The other member, if there is one.
    with: Option<Incarnation>,
}

/// The protocol core of one engine process.
#[derive(Debug, Clone)]
pub struct Core {
    me: Incarnation,
    timing: Timing,
    other_seats: Vec<SeatId>,
    now_ms: u64,
    silence: Silence,
    requests: u64,
    nonces: u64,
    sessions: u64,
    /// The header on disk.
    durable: Option<SeatHeader>,
    writing: Option<(RequestId, SeatHeader)>,
    /// How long that has been under way, in time in which this process ran.
    writing_for_ms: u64,
    header_retry_ms: u64,
    /// This seat's disks and journal.
    storage: OwnStorage,
    known_term: Term,
    known_uid: Option<ArbiterUid>,
    /// A re-created record that names us: its UID is being written to the header.
    adopting: Option<Adopting>,
    /// The other member of a record that was adopted, until it is known to have adopted the same one (rule 10).
    unseen: Option<Incarnation>,
    links: Vec<Link>,
    role: Role,
    attempt: Option<Attempt>,
    next_attempt_ms: u64,
    next_observe_ms: u64,
    next_join_ms: u64,
    /// UID and version that a write of unknown outcome expects: while the record has them it may still land.
    unsettled: Option<(ArbiterUid, u64)>,
    arbiter: ArbiterState,
    refused: Option<Refusal>,
    gate: Gate,
    failure: Option<String>,
}

impl Core {
    /// A core that has just started: no guest, no peer, gate closed. The driver calls `step` with [`Event::Tick`] next.
    pub fn new(config: Config) -> Self {
        let Config {
            incarnation,
            header,
            other_seats,
            timing,
            now_ms,
        } = config;
        let durable = match header {
            StoredHeader::Found(header) => Some(header),
            StoredHeader::Absent | StoredHeader::Damaged => None,
        };
        Self {
            me: incarnation,
            timing,
            other_seats,
            now_ms,
            silence: Silence::default(),
            requests: 0,
            nonces: 0,
            sessions: 0,
            known_term: durable.as_ref().map_or(0, |header| header.term),
            known_uid: durable.as_ref().map(|header| header.uid),
            durable,
            writing: None,
            writing_for_ms: 0,
            header_retry_ms: 0,
            storage: OwnStorage::new(timing),
            adopting: None,
            unseen: None,
            links: Vec::new(),
            role: Role::Starting(Starting {
                stop: false,
                start_over: None,
                accept_loss: None,
                loss_refused: None,
                holder_could_since_ms: None,
                prepare: None,
                stopped: None,
            }),
            attempt: None,
            next_attempt_ms: now_ms,
            next_observe_ms: now_ms + timing.observe_ms,
            next_join_ms: now_ms,
            unsettled: None,
            arbiter: ArbiterState::Unknown,
            refused: None,
            gate: Gate::Closed,
            failure: None,
        }
    }

    /// Handles one event. `now_ms` never steps back (if it does, the last value is used); `actions` is appended to and
    /// executed in order before the next step.
    pub fn step(&mut self, now_ms: u64, event: Event, actions: &mut Vec<Action>) {
        if matches!(self.role, Role::Ended(_)) {
            return;
        }
        let peer = self.role.session().map(|(peer, ..)| peer);
        let on_time_ms = self.timing.heartbeat_ms + self.timing.heartbeat_ms / 2;
        let elapsed_ms = now_ms.saturating_sub(self.now_ms);
        self.silence
            .pass(peer, elapsed_ms, on_time_ms, self.timing.peer_lost_ms);
        if self.writing.is_some() {
            self.writing_for_ms += elapsed_ms.min(on_time_ms);
        }
        self.now_ms = self.now_ms.max(now_ms);
        let first = actions.len();
        self.expire_attempt(actions);
        self.take_in(event, actions);
        self.drive(actions);
        let gate = self.wanted_gate();
        if gate != self.gate {
            let opens = match (self.gate, gate) {
                (_, Gate::Open) | (Gate::Closed, _) => true,
                (Gate::Through(old), Gate::Through(new)) => new > old,
                (Gate::Open | Gate::Through(_), _) => false,
            };
            self.gate = gate;
            actions.insert(if opens { actions.len() } else { first }, Action::SetGate(gate));
        }
        // Sealing may report at once: nothing of this step may be left to do then, an older gate least of all.
        if let Some(at) = actions
            .iter()
            .skip(first)
            .position(|action| matches!(action, Action::Seal(_)))
        {
            let seal = actions.remove(first + at);
            actions.push(seal);
        }
    }

    fn take_in(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Tick => {}
            Event::Connected { link, peer, version } => self.on_connected(link, peer, version),
            Event::Disconnected { link } => self.on_disconnected(link, actions),
            Event::Received { link, message } => self.on_message(link, message, actions),
            Event::Heard { link } => self.on_heard(link),
            Event::PeerGone { peer } => self.on_peer_gone(peer, actions),
            Event::EpochSealed { epoch, seal } => self.on_sealed(epoch, seal, actions),
            Event::EpochStaged {
                session,
                epoch,
                leader_acked,
            } => {
                self.on_staged(session, epoch, leader_acked, actions);
            }
            Event::SessionFailed { session } => self.on_session_failed(session, actions),
            Event::HeaderWritten { request } => self.on_header_written(request, actions),
            Event::HeaderFailed { request } => self.on_header_failed(request, actions),
            Event::Storage(health) => self.on_storage(health, actions),
            Event::RecordRead { request, outcome } => self.on_read(request, outcome, actions),
            Event::RecordSwapped { request, outcome } => self.on_swapped(request, outcome, actions),
            Event::SeatsReported { request, reports } => self.on_reports(request, &reports, actions),
            Event::OtherSeats(seats) => self.other_seats = seats,
            Event::GuestPoweredOff => self.on_powered_off(actions),
            Event::GuestFailed { error } => {
                self.failure = Some(error);
                self.end(EndReason::GuestFailed, actions);
            }
            Event::Command(command) => self.on_command(command, actions),
        }
    }

    /// When the next [`Event::Tick`] is due at the latest, in the core's clock.
    pub fn next_wake_ms(&self) -> u64 {
        let mut wake = self.now_ms + self.timing.heartbeat_ms;
        let mut at = |time: u64| wake = wake.min(time);
        for link in &self.links {
            at(link.next_probe_ms());
        }
        if let Some((peer, ..)) = self.role.session()
            && let Some(left_ms) = self.silence.left_ms(peer, self.timing.peer_lost_ms)
        {
            at(self.now_ms + left_ms + 1);
        }
        if let Some(deadline_ms) = self.attempt.as_ref().map(Attempt::deadline_ms) {
            at(deadline_ms + 1);
        } else if self.next_attempt_ms > self.now_ms {
            at(self.next_attempt_ms);
        }
        wake.max(self.now_ms + 1)
    }

    /// The gate as of the last step.
    pub fn gate(&self) -> Gate {
        self.gate
    }

    fn next_request(&mut self) -> RequestId {
        self.requests += 1;
        RequestId(self.requests)
    }

    fn next_nonce(&mut self) -> Nonce {
        self.nonces += 1;
        Nonce(u128::from(self.me.start) << 64 | u128::from(self.nonces))
    }

    fn next_session(&mut self) -> SessionId {
        self.sessions += 1;
        SessionId(self.sessions)
    }

    fn refuse(&mut self, refusal: Refusal, actions: &mut Vec<Action>) {
        self.refused = Some(refusal);
        actions.push(Action::Refused(refusal));
    }

    fn link(&self, id: LinkId) -> Option<&Link> {
        self.links.iter().find(|link| link.id == id)
    }

    fn send(&self, link: LinkId, message: Message, actions: &mut Vec<Action>) {
        if let Some(link) = self.link(link) {
            link.say(message, actions);
        }
    }

    /// A write of this seat that takes something from the other side is on its way or may still land.
    fn has_tried(&self) -> bool {
        self.unsettled.is_some() || self.attempt.as_ref().is_some_and(Attempt::is_taking)
    }

    /// Nothing of its own is under way: no write that takes something, no adoption, no header.
    fn is_free(&self) -> bool {
        !self.has_tried() && self.adopting.is_none() && self.header_is_current()
    }

    fn contact_age_ms(&self) -> Option<u64> {
        self.role
            .session()
            .map(|(_, _, _, contact_ms)| self.now_ms.saturating_sub(contact_ms))
    }

    /// Has the session's peer been silent too long? Silence during which this process itself did not run is none.
    fn is_silent(&self) -> bool {
        self.role
            .session()
            .is_some_and(|(peer, ..)| self.silence.left_ms(peer, self.timing.peer_lost_ms).is_none())
    }

    /// Rule 11: no contact for longer than T.
    fn is_contact_too_old(&self) -> bool {
        self.contact_age_ms()
            .is_some_and(|age_ms| age_ms > self.timing.contact_limit_ms)
    }

    /// Does the session that this seat leads work?
    fn is_lead_healthy(&self) -> bool {
        self.role.lead().is_some_and(|lead| lead.broken.is_none()) && !self.is_silent()
    }

    fn header_is_current(&self) -> bool {
        self.needed_header()
            .is_none_or(|needed| self.durable.as_ref() == Some(&needed))
    }

    fn wanted_gate(&self) -> Gate {
        let (active, frozen) = match &self.role {
            Role::Active(active) => (active, false),
            Role::Frozen(frozen) => (&frozen.active, true),
            Role::Starting(_) | Role::Joining(_) | Role::Standby(_) | Role::Ended(_) => return Gate::Closed,
        };
        if !self.header_is_current() {
            return Gate::Closed;
        }
        let live = active
            .lead
            .as_ref()
            .is_some_and(|lead| !matches!(lead.stage, LeadStage::Offered { .. } | LeadStage::Streaming));
        if active.confirmed == Confirmed::Alone && !active.doubt && !live && !frozen {
            return Gate::Open;
        }
        let acked = active.lead.as_ref().map_or(0, |lead| lead.acked);
        Gate::Through(active.floor.max(acked))
    }

    fn view(&self) -> View {
        let role = match &self.role {
            Role::Starting(_) => PeerRole::Starting,
            Role::Joining(_) => PeerRole::Joining,
            Role::Standby(_) => PeerRole::Standby,
            Role::Active(_) => PeerRole::Active,
            Role::Frozen(_) => PeerRole::Frozen,
            Role::Ended(_) => PeerRole::Ended,
        };
        let session = match &self.role {
            Role::Joining(joining) => Some((joining.leader, joining.session)),
            Role::Standby(standby) => Some((standby.leader, standby.session)),
            Role::Active(_) | Role::Frozen(_) => self.role.lead().map(|lead| (self.me, lead.session)),
            Role::Starting(_) | Role::Ended(_) => None,
        };
        View {
            role,
            term: self.known_term,
            uid: self.known_uid,
            session,
            with: self.role.session().map(|(peer, ..)| peer),
            unsettled: self.has_tried(),
        }
    }

    /// Ends for good. Tells the other side of a session if it can.
    fn end(&mut self, reason: EndReason, actions: &mut Vec<Action>) {
        if let Role::Joining(_) | Role::Standby(_) = &self.role
            && let Some((_, session, link, _)) = self.role.session()
        {
            self.send(
                link,
                Message::End {
                    session,
                    reason: SessionEnd::FollowerLeft,
                },
                actions,
            );
        }
        let reason = match reason {
            EndReason::Ejected | EndReason::SessionOver if !self.storage.works() => EndReason::StorageFailed,
            reason => reason,
        };
        self.attempt = None;
        self.role = Role::Ended(reason);
        actions.push(Action::End(reason));
    }

    // ---- header

    /// The header that this role needs on disk, if it needs any.
    fn needed_header(&self) -> Option<SeatHeader> {
        let uid = self.adopting.map(|adopting| adopting.uid).or(self.known_uid);
        match &self.role {
            Role::Starting(starting) => starting.prepare.clone(),
            Role::Joining(joining) => Some(SeatHeader {
                term: if joining.stage == JoinStage::Completing {
                    self.known_term
                } else {
                    self.durable.as_ref().map_or(0, |header| header.term)
                },
                uid: joining.uid,
                incarnations: vec![self.me],
                complete: joining.stage == JoinStage::Completing,
            }),
            Role::Standby(standby) => self.durable.as_ref().map(|header| SeatHeader {
                uid: uid.unwrap_or(header.uid),
                term: standby.claim.and_then(|claim| claim.term).unwrap_or(0).max(header.term),
                ..header.clone()
            }),
            Role::Active(active) | Role::Frozen(role::Frozen { active, .. }) => Some(SeatHeader {
                term: active.term.max(self.adopting.map_or(0, |adopting| adopting.term)),
                uid: uid?,
                incarnations: vec![self.me],
                complete: !self.is_left_behind(active),
            }),
            Role::Ended(_) => None,
        }
    }

    /// The header says what an acknowledgment promises. A term that is only claimed may still be on its way to the disk.
    fn may_acknowledge(&self) -> bool {
        match (self.needed_header(), &self.durable) {
            (Some(needed), Some(durable)) => {
                SeatHeader {
                    term: durable.term,
                    ..needed
                } == *durable
            }
            _ => false,
        }
    }

    fn write_header(&mut self, actions: &mut Vec<Action>) {
        if self.writing.is_some() || self.now_ms < self.header_retry_ms || self.header_is_current() {
            return;
        }
        if let Some(header) = self.needed_header() {
            let request = self.next_request();
            self.writing = Some((request, header.clone()));
            self.writing_for_ms = 0;
            actions.push(Action::WriteHeader { request, header });
        }
    }

    fn on_header_written(&mut self, request: RequestId, actions: &mut Vec<Action>) {
        match self.writing.take_if(|(writing, _)| *writing == request) {
            Some((_, header)) => self.durable = Some(header),
            None => actions.push(Action::Refused(Refusal::StaleAnswer)),
        }
        if let Some(adopting) = self.adopting
            && self.durable.as_ref().is_some_and(|header| header.uid == adopting.uid)
        {
            self.finish_adoption(adopting);
        }
    }

    fn on_header_failed(&mut self, request: RequestId, actions: &mut Vec<Action>) {
        if self.writing.take_if(|(writing, _)| *writing == request).is_none() {
            actions.push(Action::Refused(Refusal::StaleAnswer));
            return;
        }
        self.header_retry_ms = self.now_ms + self.timing.retry_ms;
        self.refuse(Refusal::HeaderNotWritten, actions);
        let peer_can_do_it = match &self.role {
            Role::Joining(_) => true,
            Role::Active(active) => self.is_replaceable(active),
            Role::Starting(_) | Role::Standby(_) | Role::Frozen(_) | Role::Ended(_) => false,
        };
        if peer_can_do_it {
            self.end(EndReason::HeaderFailed, actions);
        }
    }

    fn finish_adoption(&mut self, Adopting { uid, term, with }: Adopting) {
        self.adopting = None;
        let seen = |peer: &Incarnation| {
            let mut views = self.links.iter().filter(|link| link.peer == *peer);
            views.any(|link| link.view.is_some_and(|view| view.uid == Some(uid)))
        };
        self.unseen = with.filter(|peer| !seen(peer));
        self.known_uid = Some(uid);
        self.known_term = self.known_term.max(term);
        // Writes for the old record can't land in the new one.
        self.unsettled = None;
        match &mut self.role {
            Role::Active(active) | Role::Frozen(role::Frozen { active, .. }) => active.term = active.term.max(term),
            Role::Standby(standby) => standby.unsettled_since_ms = None,
            Role::Starting(_) | Role::Joining(_) | Role::Ended(_) => {}
        }
    }
}
