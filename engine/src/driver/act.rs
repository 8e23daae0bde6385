//! Does what the core says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_protocol::core::{Action, EndReason, Event, Gate, Refusal};
use ftvm_protocol::identity::{Epoch, Incarnation, LinkId, RequestId, SessionId};
use ftvm_protocol::message::Message;
use ftvm_protocol::wire::{Kind, VERSION_WORK};

use super::late::Route;
use super::seat::Work;
use super::{Driver, Ended, Following, Guest, Link, follow, lead};
use crate::checkpoint::Pacer;
use crate::control::{Ask, Reply, exit_code};
use crate::memory::DirtyPages;
use crate::replication::changed::Stream;
use crate::replication::epoch::{EpochSender, Port, PortData, encode_input};
use crate::replication::link::{Frame, LinkEvent, LinkSender, SessionSink};
use crate::replication::pages::PageEncoder;

impl Driver {
    pub(super) fn act(&mut self, action: Action) {
        match action {
            Action::SetGate(gate) => self.set_gate(gate),
            Action::Send { link, message } => self.send(link, &message),
            Action::WriteHeader { request, header } => self.header.write(request, header),
            Action::ReadRecord { request, deadline_ms } => self.ask(request, Ask::ReadRecord, deadline_ms),
            Action::SwapRecord {
                request,
                uid,
                version,
                record,
                deadline_ms,
            } => self.ask(request, Ask::SwapRecord { uid, version, record }, deadline_ms),
            Action::AskSeats {
                request,
                seats,
                deadline_ms,
            } => self.ask(request, Ask::AskSeats { seats }, deadline_ms),
            Action::BootFromDisk { first_epoch, .. } => self.boot(first_epoch),
            Action::LoadAndRun {
                epoch, resend_after, ..
            } => self.take_over(epoch, resend_after),
            Action::Resume => self.go_on(),
            Action::BeginResync { session, link, peer } => self.begin_leading(session, link, peer, None),
            Action::StreamResync { session } => self.stream_resync(session),
            Action::LeadFrom {
                session,
                link,
                peer,
                base,
            } => self.begin_leading(session, link, peer, Some(base)),
            Action::Seal(seal) => self.seal_as_asked(seal),
            Action::EndSession { session } => self.end_session(session),
            Action::ReceiveResync { session, link, leader } => self.begin_following(session, link, leader, None),
            Action::FollowFrom {
                session,
                link,
                leader,
                base,
            } => self.follow_from(session, link, leader, base),
            Action::ReportStopped { term } => tracing::info!("stopped as of term {term}"),
            Action::End(reason) => self.end(reason),
            Action::Refused(refusal) => self.refused(refusal),
        }
    }

    pub(super) fn set_gate(&mut self, gate: Gate) {
        self.gate = gate;
        let gate = if self.holds_now() { Gate::Closed } else { gate };
        match gate {
            Gate::Closed => self.seat.outbox.close(),
            Gate::Through(epoch) => self.seat.outbox.release_through(self.but_the_last(epoch)),
            Gate::Open => self.seat.outbox.open(),
        }
        self.takeover.gate_set(gate);
    }

    /// What a source that stands still for a switchover said last is left to its target, which says it once more in any case. A client
    /// that got it from here would answer at once, to a seat that listens no more, and wait for its retransmission timer.
    fn but_the_last(&self, epoch: Epoch) -> Epoch {
        match &self.sealed_state {
            Some(last) if last.epoch == epoch && self.stands_for_switchover() => epoch.saturating_sub(1),
            _ => epoch,
        }
    }

    /// The guest goes on where it stood: what was left to the target of a switchover leaves from here, what arrived meanwhile is
    /// looked at, and the network is told, for the target may have called the guest's frames.
    pub(super) fn go_on(&mut self) {
        self.sealed_state = None;
        self.seat.inbox.goes_on();
        self.set_gate(self.gate);
        self.seat.machine.after_takeover();
        self.resume_guest();
        self.ask_to_announce();
    }

    fn send(&mut self, link: LinkId, message: &Message) {
        let Some(link) = self.links.get(&link) else { return };
        match message.encode(link.version) {
            // A link that refuses is down or about to be; its event follows.
            Ok(payload) => drop(link.sender.try_send(Kind::Control, 0, 0, payload)),
            Err(error) => tracing::error!("{error}"),
        }
    }

    fn ask(&mut self, request: RequestId, ask: Ask, deadline_ms: u64) {
        let left = deadline_ms.saturating_sub(self.now_ms());
        let number = self.control.request(ask, Duration::from_millis(left));
        self.requests.insert(number, request);
    }

    fn refused(&mut self, refusal: Refusal) {
        match self.commanding.take() {
            Some(id) => self.control.reply(
                id,
                Reply::Refused {
                    why: refusal.to_string(),
                },
            ),
            None => tracing::debug!("refused: {refusal}"),
        }
    }

    // ---- guest

    pub(super) fn guest_failed(&mut self, error: &dyn std::error::Error) {
        let error = crate::error_chain(error);
        tracing::error!("{error}");
        // Inside a step: the core hears of it next.
        self.queue.machine(crate::machine::VmEvent::Fatal(error));
    }

    fn boot(&mut self, first_epoch: Epoch) {
        if let Err(why) = self.seat.recover_disks() {
            self.queue.machine(crate::machine::VmEvent::Fatal(why));
            return;
        }
        self.seat.gate().set_epoch(first_epoch);
        match self.seat.machine.boot() {
            Ok(()) => self.resume_guest(),
            Err(error) => self.guest_failed(&error),
        }
    }

    /// Runs the guest, unless it has to stand still for want of a standby.
    pub(super) fn resume_guest(&mut self) {
        self.limit_over();
        if self.holds_now() {
            return self.hold_guest();
        }
        // Before: a vCPU may reach its limit at once.
        self.resumed = Instant::now();
        match self.seat.machine.resume() {
            Ok(()) => {
                self.guest = Guest::Running;
                self.hold_over();
            }
            Err(error) => self.guest_failed(&error),
        }
    }

    /// What stood still because the guest had written all that it may does so no more, or for another reason.
    pub(super) fn limit_over(&mut self) {
        if let Some(since) = self.limited_since.take() {
            self.figures.braked += since.elapsed();
        }
    }

    /// Lets vCPUs go on that stand still because the guest has written all that it may.
    pub(super) fn release_limited(&mut self) {
        if self.limited_since.is_some() && self.guest == Guest::Running {
            self.pause_guest();
            self.resume_guest();
        }
    }

    /// Stops the guest where it is; whoever calls this says when it goes on.
    pub(super) fn pause_guest(&mut self) {
        if self.guest == Guest::Running {
            self.count_pause();
            self.seat.machine.pause();
        }
        if self.guest.is_here() {
            self.guest = Guest::Paused;
        }
    }

    /// From now on every write of the guest is found and every change of its disks recorded.
    pub(super) fn start_recording(&mut self) {
        let running = self.guest == Guest::Running;
        if running {
            self.pause_guest();
        }
        self.seat.disk_log.record(true);
        if let Err(error) = self.seat.machine.set_tracking(true) {
            self.guest_failed(&error);
        }
        if running {
            self.resume_guest();
        }
    }

    pub(super) fn stop_recording(&mut self) {
        self.seat.disk_log.record(false);
        self.seat.machine.limit_writes(usize::MAX);
        if let Err(error) = self.seat.machine.set_tracking(false) {
            self.guest_failed(&error);
        }
        self.release_limited();
    }

    // ---- sessions

    fn begin_leading(&mut self, session: SessionId, link: LinkId, peer: Incarnation, base: Option<Epoch>) {
        tracing::info!("session {} over link {}: leads {peer}", session.0, link.0);
        let Some(sender) = self.links.get(&link).map(|link| link.sender.clone()) else {
            return self.session_failed(session, "the link is gone");
        };
        let sink = Arc::new(SessionSink::new(sender.clone(), session));
        let sending = PageEncoder::new(self.seat.encoder)
            .map_err(|error| error.to_string())
            .and_then(|encoder| {
                let sender = EpochSender::new(sink.clone(), encoder);
                let memory = self.seat.page_memory();
                let started = lead::Sending::start(
                    session,
                    sender,
                    sink,
                    memory,
                    self.queue.clone(),
                    self.seat.enter(Work::Worker),
                );
                started.map_err(|error| error.to_string())
            });
        let sending = match sending {
            Ok(sending) => sending,
            Err(why) => return self.session_failed(session, &why),
        };
        self.copy_input(sender, session);
        let stage = if base.is_some() {
            self.takeover.reached_first(super::trace::Step::Followed);
            self.seat.machine.limit_writes(self.seat.pacer.first_room());
            lead::Stage::Streaming
        } else {
            lead::Stage::Prepared
        };
        // A guest that was handed over has run its first epoch for a while.
        let began = base.map_or_else(Instant::now, |_| self.resumed);
        self.leading = Some(lead::Leading {
            session,
            stream: Stream {
                leader: self.core.status().incarnation,
                session,
            },
            peer,
            confirms_work: self.links.get(&link).is_some_and(|link| link.version >= VERSION_WORK),
            stage,
            sending,
            pacer: Pacer::new(self.seat.pacer, began),
            dirty: DirtyPages::new(self.seat.machine.ram().pages()),
            base,
            window: None,
            in_flight: std::collections::VecDeque::new(),
            flushed: None,
        });
    }

    /// Frames to the guest go to the follower too, as they come.
    fn copy_input(&self, sender: LinkSender, session: SessionId) {
        self.seat.inbox.set_copy(Some(Box::new(move |nic, epoch, frame| {
            let item = PortData {
                port: Port::Nic(u16::from(nic)),
                bytes: frame.to_vec(),
            };
            for payload in encode_input(&[item]) {
                // Full or down: the network may lose frames, and the client asks again.
                let _ = sender.try_send(Kind::Input, epoch, session.0, payload);
            }
        })));
    }

    fn stream_resync(&mut self, session: SessionId) {
        let leading = self.leading.as_ref().filter(|leading| leading.session == session);
        let Some((by, confirms_work)) = leading.map(|leading| (leading.peer.seat, leading.confirms_work)) else {
            return;
        };
        self.troubles.session_works();
        // What the guest writes from here on is found, and comes behind the copy that begins now.
        self.start_recording();
        let changed = self.seat.changed.clone();
        let source = self.seat.resync_source();
        let source = source.asking(move |claim| changed.since(by, claim));
        let source = source.with_work_confirmed(confirms_work);
        if let Some(leading) = self.leading.as_mut() {
            leading.stage = lead::Stage::Bulk { passes: 0 };
            leading.window = Some(source.window());
            leading.sending.give(lead::Job::Resync(Box::new(source)));
        }
    }

    fn end_session(&mut self, session: SessionId) {
        if self.leading.as_ref().is_some_and(|leading| leading.session == session) {
            self.seat.inbox.set_copy(None);
            if let Some(leading) = self.leading.take() {
                leading.abandon();
            }
            self.seat.changed.over();
            self.troubles.session_over(session);
            self.fail_digest("the session with the standby ended");
        }
        if self
            .following
            .as_ref()
            .is_some_and(|following| following.session == session)
        {
            self.set_route(Route::Nowhere);
            self.following = None;
        }
    }

    pub(super) fn session_failed(&mut self, session: SessionId, why: &str) {
        tracing::warn!("session {}: {why}", session.0);
        self.queue.lead(lead::Report {
            session,
            done: lead::Done::Failed { why: why.to_owned() },
        });
    }

    fn begin_following(&mut self, session: SessionId, link: LinkId, leader: Incarnation, last: Option<follow::Base>) {
        tracing::info!("session {} over link {}: follows {leader}", session.0, link.0);
        let applied = last.as_ref().map_or(0, |last| last.epoch);
        let Some(credit) = self.links.get(&link).map(|link| link.sender.clone()) else {
            return self.session_failed(session, "the link is gone");
        };
        let leader_link = credit.clone();
        let stream = Stream { leader, session };
        let place = self.seat.follower_place(credit, stream);
        let started = self.seat.disks_to_follow(last.is_none()).and_then(|disks| {
            let enter = self.seat.enter(Work::Storage);
            let started = follow::Receiving::start(session, place, disks, last, self.queue.clone(), enter);
            started.map_err(|error| error.to_string())
        });
        match started {
            Ok(receiving) => {
                self.set_route(Route::Follower(receiving.clone()));
                // This leader was told nothing yet.
                self.follower_watch.forget();
                self.following = Some(Following {
                    session,
                    leader: leader_link,
                    receiving,
                    applied,
                });
            }
            Err(why) => self.session_failed(session, &why),
        }
    }

    fn follow_from(&mut self, session: SessionId, link: LinkId, leader: Incarnation, base: Epoch) {
        let began = Instant::now();
        let led = self.leading.take().map(|leading| {
            let session = leading.session;
            leading.abandon();
            session
        });
        self.seat.changed.forget();
        self.seat.inbox.set_copy(None);
        // From the switchover that brought the guest here nothing more is taken.
        self.set_route(Route::Nowhere);
        self.seat.inbox.forget();
        self.seat.outbox.discard();
        self.seat.disk_log.record(false);
        self.guest = Guest::None;
        let last = self.sealed_state.take();
        let stood_still = last.as_ref().map_or(began, |last| last.since);
        match last.filter(|last| last.epoch == base) {
            Some(last) => self.begin_following(session, link, leader, Some(last)),
            None => self.session_failed(session, "this seat's last sealed epoch is not the one to follow from"),
        }
        if let Some(led) = led {
            self.pass_late_input_on(led, base);
        }
        let ms = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        tracing::info!(
            "followed from epoch {base} on within {:.1} ms, {:.1} ms after the guest stood still here",
            ms(began),
            ms(stood_still)
        );
    }

    pub(super) fn set_route(&self, route: Route) {
        *self
            .seat
            .route
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = route;
    }

    // ---- links

    pub(super) fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up {
                link,
                peer,
                version,
                sender,
            } => {
                tracing::info!("link {} to {peer} is up", link.0);
                let up = Link {
                    peer,
                    version,
                    sender,
                    received: 0,
                };
                self.links.insert(link, up);
                self.troubles.link_up();
                self.tell_link(true, format!("connected to {peer}"));
                self.step(Event::Connected { link, peer, version });
                self.ask_to_announce();
            }
            LinkEvent::Down { link, reason } => {
                if let Some(gone) = self.links.remove(&link) {
                    tracing::warn!("link {} to {} is down: {reason}", link.0, gone.peer);
                }
                self.tell_link(false, reason.to_string());
                self.step(Event::Disconnected { link });
            }
            LinkEvent::Refused { address, reason } => {
                let from = address.map_or_else(|| "unknown".to_owned(), |address| address.to_string());
                tracing::info!("connection with {from} refused: {reason}");
                let text = format!("connection with {from}: {reason}");
                if let Some(code) = reason.exit_code() {
                    self.link_trouble(code, &text);
                }
                // Beside a link that stands it is none.
                if self.links.is_empty() {
                    self.troubles.connection = Some(text);
                }
            }
            LinkEvent::Frame { link, frame } => match frame.kind {
                Kind::Control => self.control_arrived(link, &frame),
                Kind::Credit | Kind::ResyncHolds => self.resync_answered(link, &frame),
                Kind::Trouble => self.follower_trouble(&frame),
                kind => self.close_link(link, &format!("frame of kind {kind:?} does not belong here")),
            },
        }
    }

    fn control_arrived(&mut self, link: LinkId, frame: &Frame) {
        let Some(version) = self.links.get(&link).map(|link| link.version) else {
            return;
        };
        match Message::decode(&frame.payload, version) {
            Ok(message) => self.received(link, message),
            Err(error) => self.close_link(link, &error.to_string()),
        }
    }

    /// Told once: attempts go on, and fail in the same way until somebody mends it.
    fn link_trouble(&mut self, code: u8, text: &str) {
        let known = self.troubles.link.as_ref().is_some_and(|(known, _)| *known == code);
        if !known && self.links.is_empty() {
            self.warn(text.to_owned());
            self.troubles.link = Some((code, text.to_owned()));
        }
    }

    /// The joiner says what its disks hold, or how much it has taken.
    fn resync_answered(&mut self, link: LinkId, frame: &Frame) {
        let leading = self
            .leading
            .as_ref()
            .filter(|leading| leading.session.0 == frame.session);
        let Some(window) = leading.and_then(|leading| leading.window.as_ref()) else {
            return;
        };
        let taken = match frame.kind {
            Kind::ResyncHolds => window.told(&frame.payload),
            _ => window.credited(&frame.payload),
        };
        if let Err(error) = taken {
            self.close_link(link, &error.to_string());
        }
    }

    /// The follower says why it can't follow. The words are a peer's: for people, and for nothing else.
    fn follower_trouble(&mut self, frame: &Frame) {
        let ours = self
            .leading
            .as_ref()
            .is_some_and(|leading| leading.session.0 == frame.session);
        if !ours {
            return;
        }
        let session = SessionId(frame.session);
        if frame.payload.is_empty() {
            return self.troubles.follower_goes_on(session);
        }
        let text = format!("the other side can't follow: {}", printable(&frame.payload));
        self.troubles.follower_said(session, text.clone());
        self.warn(text);
    }

    /// Tells the leader of a followed session why it can't go on; that it does not, the core says. Without words: it goes on after all.
    pub(super) fn tell_leader(&mut self, why: &str) {
        let Some(following) = &self.following else { return };
        let max = Kind::Trouble.max_len() as usize;
        let end = (0..=max.min(why.len())).rev().find(|at| why.is_char_boundary(*at));
        let text = &why[..end.unwrap_or(0)];
        // A link that refuses is down: nobody is there to be told.
        let _ = following
            .leader
            .try_send(Kind::Trouble, 0, following.session.0, text.as_bytes().to_vec());
    }

    fn close_link(&mut self, link: LinkId, why: &str) {
        if let Some(link) = self.links.get(&link) {
            link.sender.close(why);
        }
    }

    // ---- the end

    fn end(&mut self, reason: EndReason) {
        self.seat.outbox.close();
        self.pause_guest();
        // No epoch ends any more: a disk that waits for one would never end.
        self.seat.disk_log.record(false);
        let message = match reason {
            EndReason::Stopped => "the virtual machine is stopped".to_owned(),
            EndReason::LostToSuccessor => {
                "another seat holds the arbiter's record: this engine is out of date, a new one may join".to_owned()
            }
            EndReason::Ejected => "the active seat ejected this one: a new engine may join".to_owned(),
            EndReason::SessionOver => match &self.troubles.session {
                Some(trouble) => format!("this seat can't join: {trouble}"),
                None => "the session ended before this seat became a member: a new engine may join".to_owned(),
            },
            EndReason::HeaderFailed => "the seat's header could not be written: check the seat's storage".to_owned(),
            EndReason::StorageFailed => match self.failing_disks.first().as_ref().or(self.troubles.session.as_ref()) {
                Some(trouble) => format!("this seat's storage failed: {trouble}; a new engine may join"),
                None => "this seat's storage failed or hangs, and the other seat has the guest: a new engine may join"
                    .to_owned(),
            },
            EndReason::GuestFailed => {
                let text = self.core.status().failure.unwrap_or_default();
                format!("the guest could not be loaded or run on this host: {text}")
            }
        };
        let code = match reason {
            EndReason::SessionOver => self.troubles.session_code,
            _ => None,
        };
        let code = code.unwrap_or(exit_code::of_end(reason));
        let storage = if code == exit_code::STORAGE {
            self.failing_storage()
        } else {
            Vec::new()
        };
        self.ended = Some(Ended {
            code,
            message,
            term: self.core.status().term,
            storage,
        });
    }
}

/// What a peer says, without what would change how a terminal shows it.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control()).collect()
}
