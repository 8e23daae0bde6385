//! Links, messages, and the follower's side: joining, staging, following after a switchover.

use crate::identity::{ArbiterUid, Epoch, Incarnation, LinkId, SessionId, Term};
use crate::message::{Message, PeerRole, SessionEnd, View};

use super::links::Link;
use super::role::{Claim, JoinStage, Joining, Role, Standby, SwitchRequest};
use super::{Action, Core, EndReason, Refusal};

impl Core {
    // ---- links

    pub(super) fn on_connected(&mut self, link: LinkId, peer: Incarnation, version: u16) {
        if self.link(link).is_none() && peer.seat != self.me.seat {
            self.links.push(Link::new(link, peer, version, self.now_ms));
        }
    }

    pub(super) fn on_disconnected(&mut self, link: LinkId, actions: &mut Vec<Action>) {
        self.links.retain(|known| known.id != link);
        match self.role.session() {
            Some((peer, _, of_session, _)) if of_session == link => self.session_lost(peer, actions),
            _ => {}
        }
    }

    /// Counts only from a peer that said it is in a session with us, as contact does: a Join that got lost, or an ejected
    /// follower that still talks, must not look like a session that works.
    pub(super) fn on_heard(&mut self, link: LinkId) {
        let with_us = |link: &&Link| link.view.is_some_and(|view| view.with == Some(self.me));
        if let Some(peer) = self.link(link).filter(with_us).map(|link| link.peer) {
            self.silence.heard(peer);
        }
    }

    pub(super) fn on_peer_gone(&mut self, peer: Incarnation, actions: &mut Vec<Action>) {
        match self.role.session() {
            Some((of_session, ..)) if of_session == peer => self.session_lost(peer, actions),
            _ => {}
        }
    }

    fn session_lost(&mut self, peer: Incarnation, actions: &mut Vec<Action>) {
        match &mut self.role {
            Role::Joining(_) => self.end(EndReason::SessionOver, actions),
            Role::Standby(standby) => standby.lost = true,
            Role::Active(_) | Role::Frozen(_) => self.break_lead(Refusal::PeerLost(peer), actions),
            Role::Starting(_) | Role::Ended(_) => {}
        }
    }

    pub(super) fn on_session_failed(&mut self, session: SessionId, actions: &mut Vec<Action>) {
        let Some((peer, current, link, _)) = self.role.session() else {
            actions.push(Action::Refused(Refusal::WrongRole));
            return;
        };
        if current != session {
            actions.push(Action::Refused(Refusal::OtherSession));
            return;
        }
        let failed = self.follower_failed(session);
        match &mut self.role {
            Role::Joining(_) => {
                self.send(link, failed, actions);
                self.end(EndReason::SessionOver, actions);
            }
            Role::Standby(standby) => {
                standby.failed = true;
                standby.claim = None;
                self.send(link, failed, actions);
            }
            Role::Active(_) | Role::Frozen(_) => self.break_lead(Refusal::PeerLost(peer), actions),
            Role::Starting(_) | Role::Ended(_) => {}
        }
    }

    /// What a follower that can't go on tells its leader.
    fn follower_failed(&self, session: SessionId) -> Message {
        let reason = if self.storage.works() {
            SessionEnd::FollowerFailed
        } else {
            SessionEnd::FollowerStorage
        };
        Message::End { session, reason }
    }

    // ---- messages

    pub(super) fn on_message(&mut self, link: LinkId, message: Message, actions: &mut Vec<Action>) {
        if self.link(link).is_none() {
            actions.push(Action::Refused(Refusal::UnknownLink));
            return;
        }
        self.on_heard(link);
        let refusal = match message {
            Message::Probe { n, view } => {
                self.send(link, Message::ProbeReply { n, view: self.view() }, actions);
                self.repeat_ack(link, actions);
                self.on_view(link, view, actions);
                Ok(())
            }
            Message::ProbeReply { n, view } => {
                self.on_contact(link, n, view.with);
                self.on_view(link, view, actions);
                Ok(())
            }
            Message::Join { session, term, uid } => self.on_join(link, session, term, uid),
            Message::JoinReady { session } => {
                self.on_join_ready(link, session, actions);
                Ok(())
            }
            Message::Ack { leader, session, epoch } => self.on_ack(link, leader, session, epoch),
            Message::End { session, reason } => self.on_end(link, session, reason, actions),
            Message::Claim { session } => self.on_claim(link, session, actions),
            Message::Claimed { session, term } => self.on_claimed(link, session, term, actions),
            Message::Switch { session, epoch, term } => self.on_switch(link, session, epoch, term, actions),
            Message::SwitchRefused { session } => self.on_switch_refused(link, session, actions),
            Message::Follow {
                session,
                previous,
                epoch,
                term,
            } => self.on_follow(link, session, previous, epoch, term, actions),
            Message::Following { session } => {
                self.on_following(link, session, actions);
                Ok(())
            }
            Message::Leave { session } => self.on_leave(link, session),
            Message::Stopped { .. } => {
                if let Role::Standby(standby) = &mut self.role {
                    standby.verify = true;
                }
                Ok(())
            }
        };
        if let Err(refusal) = refusal {
            actions.push(Action::Refused(refusal));
        }
    }

    fn on_contact(&mut self, id: LinkId, n: u64, with: Option<Incarnation>) {
        let me = self.me;
        let Some(link) = self.links.iter_mut().find(|link| link.id == id) else {
            return;
        };
        let peer = link.peer;
        let Some(sent_ms) = link.answered(n) else { return };
        if let Some((of_session, contact_ms)) = self.role.contact_mut()
            && of_session == peer
            && with == Some(me)
        {
            *contact_ms = (*contact_ms).max(sent_ms);
            self.silence.answered(peer, self.now_ms.saturating_sub(sent_ms));
        }
    }

    /// An acknowledgment may have been held back while a write of ours was unsettled, or got lost: say it again. So may the word
    /// that there will be none any more.
    fn repeat_ack(&mut self, link: LinkId, actions: &mut Vec<Action>) {
        let tried = self.has_tried();
        let Role::Standby(standby) = &self.role else { return };
        if standby.link != link {
            return;
        }
        if standby.failed {
            self.send(link, self.follower_failed(standby.session), actions);
        } else if standby.acked > 0 && !tried {
            let ack = Message::Ack {
                leader: standby.leader,
                session: standby.session,
                epoch: standby.acked,
            };
            self.send(link, ack, actions);
        }
    }

    fn on_view(&mut self, id: LinkId, view: View, actions: &mut Vec<Action>) {
        let Some(link) = self.links.iter_mut().find(|link| link.id == id) else {
            return;
        };
        link.view = Some(view);
        let peer = link.peer;
        if self.unseen == Some(peer) && view.uid.is_some() && view.uid == self.known_uid {
            self.unseen = None;
        }
        let Some((of_session, session, ..)) = self.role.session() else {
            return;
        };
        if of_session != peer {
            return;
        }
        match &mut self.role {
            Role::Joining(_) | Role::Standby(_) if view.session == Some((peer, session)) => {
                self.known_term = self.known_term.max(view.term);
            }
            // The leader does not lead us any more and its word of it got lost: read the record.
            Role::Standby(standby) => standby.verify = true,
            // The peer became active by a swap above all that we confirmed: we lost, whether the arbiter answers or not.
            Role::Active(_) if view.role == PeerRole::Active && view.term > self.known_term => {
                self.end(EndReason::LostToSuccessor, actions);
            }
            // The same, unless it is the target of our switchover that will ask us to follow.
            Role::Frozen(_)
                if view.role == PeerRole::Active && view.term > self.known_term && view.session.is_none() =>
            {
                self.end(EndReason::LostToSuccessor, actions);
            }
            Role::Active(_) | Role::Frozen(_) | Role::Joining(_) | Role::Starting(_) | Role::Ended(_) => {}
        }
    }

    // ---- joining

    fn on_join(&mut self, link: LinkId, session: SessionId, term: Term, uid: ArbiterUid) -> Result<(), Refusal> {
        let (leader, contact_ms) = match self.link(link) {
            Some(link) => (link.peer, link.contact_ms.ok_or(Refusal::WrongRole)?),
            None => return Err(Refusal::UnknownLink),
        };
        let Role::Starting(starting) = &self.role else {
            return Err(Refusal::WrongRole);
        };
        if self.has_tried() || starting.stopped.is_some() || starting.accept_loss.is_some() {
            return Err(Refusal::Unsettled);
        }
        if !self.storage.works() {
            return Err(Refusal::OwnStorage);
        }
        if self
            .durable
            .as_ref()
            .is_some_and(|header| header.complete && header.term > term)
        {
            // This disk is newer than the leader: overwriting it is a person's decision.
            return Err(Refusal::OwnHeaderAbove);
        }
        self.cancel_attempt();
        self.known_term = term;
        self.role = Role::Joining(Joining {
            leader,
            link,
            session,
            uid,
            stage: JoinStage::Preparing,
            staged: 0,
            leader_acked: 0,
            contact_ms,
        });
        Ok(())
    }

    pub(super) fn on_staged(
        &mut self,
        session: SessionId,
        epoch: Epoch,
        leader_acked: Epoch,
        actions: &mut Vec<Action>,
    ) {
        let refusal = match &mut self.role {
            Role::Joining(joining) if joining.session == session => {
                let next = match joining.stage {
                    JoinStage::Preparing => Err(Refusal::WrongRole),
                    JoinStage::Receiving => Ok(()),
                    JoinStage::Completing if epoch == joining.staged + 1 => Ok(()),
                    JoinStage::Completing => Err(Refusal::EpochGap),
                };
                if next.is_ok() {
                    joining.stage = JoinStage::Completing;
                    joining.staged = epoch;
                    joining.leader_acked = joining.leader_acked.max(leader_acked);
                }
                next
            }
            Role::Standby(standby) if standby.session == session => {
                if standby.failed || epoch != standby.staged + 1 {
                    Err(Refusal::EpochGap)
                } else {
                    standby.staged = epoch;
                    standby.leader_acked = standby.leader_acked.max(leader_acked);
                    Ok(())
                }
            }
            Role::Joining(_) | Role::Standby(_) => Err(Refusal::OtherSession),
            Role::Starting(_) | Role::Active(_) | Role::Frozen(_) | Role::Ended(_) => Err(Refusal::WrongRole),
        };
        actions.extend(refusal.err().map(Action::Refused));
    }

    // ---- the end of a session

    fn on_end(
        &mut self,
        link: LinkId,
        session: SessionId,
        reason: SessionEnd,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        match self.role.session() {
            Some((_, current, of_session, _)) if current == session && of_session == link => {}
            Some(_) => return Err(Refusal::OtherSession),
            None => return Err(Refusal::WrongRole),
        }
        match (&mut self.role, reason) {
            (Role::Joining(_), SessionEnd::JoinAborted | SessionEnd::Ejected) => {
                self.end(EndReason::SessionOver, actions);
            }
            (Role::Standby(standby), SessionEnd::JoinAborted | SessionEnd::Ejected) => standby.verify = true,
            (
                Role::Active(_) | Role::Frozen(_),
                SessionEnd::FollowerFailed | SessionEnd::FollowerStorage | SessionEnd::FollowerLeft,
            ) => {
                if let Some((peer, ..)) = self.role.session() {
                    let refusal = match reason {
                        SessionEnd::FollowerFailed => Refusal::FollowerFailed(peer),
                        SessionEnd::FollowerStorage => Refusal::FollowerStorage(peer),
                        _ => Refusal::PeerLost(peer),
                    };
                    self.break_lead(refusal, actions);
                }
            }
            _ => return Err(Refusal::WrongRole),
        }
        Ok(())
    }

    /// This seat is to go.
    pub(super) fn command_leave(&mut self) -> Result<(), Refusal> {
        let now_ms = self.now_ms;
        let Role::Standby(standby) = &mut self.role else {
            return Err(Refusal::WrongRole);
        };
        if standby.claim.is_some() || standby.switch.is_some() {
            return Err(Refusal::Busy);
        }
        standby.leave_ms.get_or_insert(now_ms);
        Ok(())
    }

    // ---- switchover

    fn on_claim(&mut self, link: LinkId, session: SessionId, actions: &mut Vec<Action>) -> Result<(), Refusal> {
        let now_ms = self.now_ms;
        let Role::Standby(standby) = &mut self.role else {
            return Err(Refusal::WrongRole);
        };
        if standby.session != session || standby.link != link {
            return Err(Refusal::OtherSession);
        }
        if standby.failed || standby.leave_ms.is_some() {
            self.send(link, Message::SwitchRefused { session }, actions);
            return Ok(());
        }
        standby.claim.get_or_insert(Claim::new(now_ms));
        self.tell_claim(true, actions);
        Ok(())
    }

    fn on_switch(
        &mut self,
        link: LinkId,
        session: SessionId,
        epoch: Epoch,
        term: Term,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let now_ms = self.now_ms;
        let Role::Standby(standby) = &mut self.role else {
            return Err(Refusal::WrongRole);
        };
        if standby.session != session || standby.link != link {
            return Err(Refusal::OtherSession);
        }
        if standby.staged > epoch {
            return Err(Refusal::EpochGap);
        }
        if standby.failed || standby.switch_refused == epoch {
            self.send(link, Message::SwitchRefused { session }, actions);
            return Ok(());
        }
        // A source freezes at a later epoch each time.
        standby.switch.take_if(|switch| switch.epoch < epoch);
        standby.switch.get_or_insert(SwitchRequest {
            epoch,
            term,
            since_ms: now_ms,
        });
        Ok(())
    }

    fn on_switch_refused(
        &mut self,
        link: LinkId,
        session: SessionId,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let (peer, of_session) = match self.role.lead() {
            Some(lead) => (lead.peer, lead.session == session && lead.link == link),
            None => return Err(Refusal::WrongRole),
        };
        if !of_session {
            return Err(Refusal::OtherSession);
        }
        match &mut self.role {
            Role::Frozen(frozen) => frozen.give_up = true,
            Role::Active(active) => {
                if active.hand_over.take().is_none() {
                    return Err(Refusal::StaleAnswer);
                }
                self.next_observe_ms = self.now_ms;
                self.refuse(Refusal::SwitchFailed(peer), actions);
            }
            Role::Starting(_) | Role::Joining(_) | Role::Standby(_) | Role::Ended(_) => return Err(Refusal::WrongRole),
        }
        Ok(())
    }

    /// Rule 6: the frozen source follows the target that runs.
    fn on_follow(
        &mut self,
        link: LinkId,
        session: SessionId,
        previous: SessionId,
        epoch: Epoch,
        term: Term,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        if let Role::Standby(standby) = &self.role
            && standby.session == session
            && standby.link == link
        {
            self.send(link, Message::Following { session }, actions);
            return Ok(());
        }
        let Role::Frozen(frozen) = &self.role else {
            return Err(Refusal::WrongRole);
        };
        let Some(lead) = &frozen.active.lead else {
            return Err(Refusal::WrongRole);
        };
        if lead.session != previous || lead.link != link || frozen.sealed != Some(epoch) {
            return Err(Refusal::OtherSession);
        }
        if self.attempt.as_ref().is_some_and(super::attempt::Attempt::is_swapping) {
            return Err(Refusal::Unsettled);
        }
        // Not of a record that this seat has written over.
        let stale = term < frozen.claimed || term < self.known_term;
        if stale {
            return Err(Refusal::TermBelowKnown);
        }
        if !self.storage.works() && self.unsettled.is_some() {
            // A write of its own may have made this seat the holder: it does not go before it knows.
            return Err(Refusal::Unsettled);
        }
        if !self.storage.works() {
            // Rule 13: whatever this seat would acknowledge, nobody knows what its disks hold.
            self.send(link, self.follower_failed(session), actions);
            self.end(EndReason::StorageFailed, actions);
            return Ok(());
        }
        if !self.header_is_current() || self.adopting.is_some() {
            return Err(Refusal::TermBelowKnown);
        }
        let leader = lead.peer;
        let standby = Standby {
            leader,
            link,
            session,
            staged: epoch,
            acked: epoch,
            leader_acked: epoch,
            failed: false,
            lost: lead.broken.is_some(),
            verify: false,
            claim: None,
            switch: None,
            switch_refused: 0,
            leave_ms: None,
            contact_ms: lead.contact_ms,
            unsettled_since_ms: self.unsettled.is_some().then_some(self.now_ms),
        };
        self.cancel_attempt();
        self.known_term = term;
        self.role = Role::Standby(standby);
        self.next_observe_ms = self.now_ms + self.timing.observe_ms;
        actions.push(Action::FollowFrom {
            session,
            link,
            leader,
            base: epoch,
        });
        self.send(link, Message::Following { session }, actions);
        Ok(())
    }
}
