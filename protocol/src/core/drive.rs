//! What a step does after it took its event in: works out from the state alone what is due now.

use crate::message::{Message, SessionEnd};

use super::attempt::Attempt;
use super::role::{Confirmed, JoinStage, Lead, LeadStage, Role, Standby, SwitchRequest};
use super::{Action, ArbiterState, Core, EndReason, Refusal, Seal};

impl Core {
    pub(super) fn drive(&mut self, actions: &mut Vec<Action>) {
        if matches!(self.role, Role::Ended(_)) {
            return;
        }
        self.drive_probes(actions);
        match &self.role {
            Role::Starting(_) => self.drive_starting(actions),
            Role::Joining(_) => self.drive_joining(actions),
            Role::Standby(_) => self.drive_standby(actions),
            Role::Active(_) => self.drive_active(actions),
            Role::Frozen(_) => self.drive_frozen(actions),
            Role::Ended(_) => {}
        }
        if matches!(self.role, Role::Ended(_)) {
            return;
        }
        self.write_header(actions);
        self.drop_claim();
        if self.attempt.is_none()
            && self.now_ms >= self.next_attempt_ms
            && self.adopting.is_none()
            && (self.is_wanting() || self.is_observing())
        {
            self.begin_attempt(actions);
        }
    }

    /// A claim on its way keeps nobody from taking over: whether it lands is all the same.
    fn drop_claim(&mut self) {
        if let Role::Standby(standby) = &self.role
            && self.is_leader_lost(standby)
        {
            self.attempt
                .take_if(|attempt| attempt.is_swapping() && !attempt.is_taking());
        }
    }

    fn drive_probes(&mut self, actions: &mut Vec<Action>) {
        let view = self.view();
        let (now_ms, interval_ms) = (self.now_ms, self.timing.heartbeat_ms);
        for link in &mut self.links {
            if let Some(n) = link.probe_due(now_ms, interval_ms) {
                link.say(Message::Probe { n, view }, actions);
            }
        }
    }

    /// Is it time to look at the record although nothing is wanted?
    fn is_observing(&self) -> bool {
        matches!(self.role, Role::Standby(_) | Role::Active(_)) && self.now_ms >= self.next_observe_ms
    }

    /// Does this role want something that takes the record?
    pub(super) fn is_wanting(&self) -> bool {
        match &self.role {
            Role::Starting(starting) => {
                let prepared = starting.prepare.as_ref().is_none_or(|_| self.header_is_current());
                starting.stopped.is_none() && prepared && {
                    self.unsettled.is_some() || starting.accept_loss.is_some() || !self.sees_active()
                }
            }
            Role::Standby(standby) => {
                standby.lost
                    || self.is_silent()
                    || standby.verify
                    || self.unsettled.is_some()
                    || standby.claim.is_some_and(|claim| claim.term.is_none())
            }
            Role::Active(active) => self.active_goal(active).is_some(),
            Role::Frozen(frozen) => {
                frozen.sealed.is_some() && (frozen.give_up || frozen.active.doubt || !self.is_lead_healthy())
            }
            Role::Joining(_) | Role::Ended(_) => false,
        }
    }

    /// The record was read and nothing came of it: doubts about membership are answered.
    pub(super) fn verified(&mut self) {
        if let Role::Standby(standby) = &mut self.role {
            standby.verify = false;
        }
    }

    // ---- starting

    /// A link to an active that answers: it will let this seat join.
    fn sees_active(&self) -> bool {
        self.links.iter().any(|link| {
            link.view
                .is_some_and(|view| view.role == crate::message::PeerRole::Active)
                && self.is_link_fresh(link)
        })
    }

    pub(super) fn is_link_fresh(&self, link: &super::links::Link) -> bool {
        link.contact_ms
            .is_some_and(|contact_ms| self.now_ms.saturating_sub(contact_ms) <= self.timing.peer_lost_ms)
    }

    fn drive_starting(&mut self, actions: &mut Vec<Action>) {
        let header_is_current = self.header_is_current();
        let now_ms = self.now_ms;
        let Role::Starting(starting) = &mut self.role else {
            return;
        };
        if self.refused == Some(Refusal::HolderFirst) {
            starting.holder_could_since_ms.get_or_insert(now_ms);
        } else if self.attempt.is_none() {
            starting.holder_could_since_ms = None;
        }
        if let (Some(term), true) = (starting.stopped, header_is_current) {
            actions.push(Action::ReportStopped { term });
            self.end(EndReason::Stopped, actions);
        }
    }

    // ---- following

    fn drive_joining(&mut self, actions: &mut Vec<Action>) {
        if self.is_silent() {
            self.end(EndReason::SessionOver, actions);
            return;
        }
        let current = self.header_is_current();
        let Role::Joining(joining) = &mut self.role else { return };
        match joining.stage {
            JoinStage::Preparing if current => {
                joining.stage = JoinStage::Receiving;
                let (session, link, leader) = (joining.session, joining.link, joining.leader);
                actions.push(Action::ReceiveResync { session, link, leader });
                self.send(link, Message::JoinReady { session }, actions);
            }
            JoinStage::Completing if current => {
                let standby = Standby {
                    leader: joining.leader,
                    link: joining.link,
                    session: joining.session,
                    staged: joining.staged,
                    acked: 0,
                    leader_acked: joining.leader_acked,
                    failed: false,
                    lost: false,
                    verify: false,
                    claim: None,
                    switch: None,
                    switch_refused: 0,
                    leave_ms: None,
                    contact_ms: joining.contact_ms,
                    unsettled_since_ms: None,
                };
                self.known_uid = Some(joining.uid);
                self.role = Role::Standby(standby);
                self.next_observe_ms = self.now_ms + self.timing.observe_ms;
                self.drive_standby(actions);
            }
            JoinStage::Preparing | JoinStage::Receiving | JoinStage::Completing => {}
        }
    }

    fn drive_standby(&mut self, actions: &mut Vec<Action>) {
        let tried = self.has_tried();
        let (now_ms, known_term) = (self.now_ms, self.known_term);
        let may_acknowledge = self.may_acknowledge();
        // Half of the source's time, so that the target gives up first.
        let limit_ms = self.timing.switch_ms / 2;
        let Role::Standby(standby) = &mut self.role else { return };
        let link = standby.link;
        let over = |since_ms: u64| now_ms.saturating_sub(since_ms) > limit_ms;
        let too_late = standby.claim.take_if(|claim| over(claim.since_ms));
        // Somebody wrote since: if the leader still wants it, it asks again.
        standby
            .claim
            .take_if(|claim| claim.term.is_some_and(|term| term < known_term));
        let expired = standby.switch.take_if(|switch| over(switch.since_ms));
        standby.switch.take_if(|switch| standby.staged > switch.epoch);
        let session = standby.session;
        let ack = (standby.staged > standby.acked && !standby.failed && !tried && may_acknowledge).then(|| {
            standby.acked = standby.staged;
            Message::Ack {
                leader: standby.leader,
                session,
                epoch: standby.staged,
            }
        });
        if let Some(switch) = expired {
            standby.switch_refused = switch.epoch;
        }
        if expired.is_some() || too_late.is_some() {
            self.send(link, Message::SwitchRefused { session }, actions);
        }
        if let Some(ack) = ack {
            self.send(link, ack, actions);
        }
        self.ask_to_leave(actions);
        self.tell_claim(false, actions);
        self.take_switch(actions);
    }

    fn ask_to_leave(&mut self, actions: &mut Vec<Action>) {
        let (now_ms, retry_ms) = (self.now_ms, self.timing.retry_ms);
        let Role::Standby(standby) = &mut self.role else { return };
        if let Some(leave_ms) = standby.leave_ms.as_mut().filter(|leave_ms| now_ms >= **leave_ms) {
            *leave_ms = now_ms + retry_ms;
            let (link, session) = (standby.link, standby.session);
            self.send(link, Message::Leave { session }, actions);
        }
    }

    /// Tells the leader that the record names this seat, once, or when it asks `again`.
    pub(super) fn tell_claim(&mut self, again: bool, actions: &mut Vec<Action>) {
        let header_is_current = self.header_is_current();
        let Role::Standby(standby) = &mut self.role else { return };
        let (link, session) = (standby.link, standby.session);
        if let Some(claim) = &mut standby.claim
            && let Some(term) = claim.term.filter(|_| header_is_current && (again || !claim.told))
        {
            claim.told = true;
            self.send(link, Message::Claimed { session, term }, actions);
        }
    }

    /// Rule 6: the source stands still at the end of an epoch that is here, and the record names this seat.
    fn take_switch(&mut self, actions: &mut Vec<Action>) {
        let Role::Standby(standby) = &self.role else { return };
        let Some(term) = standby.claim.and_then(|claim| claim.term) else {
            return;
        };
        let ordered = |switch: SwitchRequest| standby.staged == switch.epoch && switch.term == term;
        let here = standby.switch.is_some_and(ordered);
        // Whoever has read that the record is gone vouches for a new one that names the leader (rule 10).
        let gone = self.arbiter == ArbiterState::Gone;
        let free = !gone && self.is_free();
        let able = !standby.failed && !self.is_leader_lost(standby) && !self.is_contact_too_old();
        if here && free && able && term == self.known_term {
            self.cancel_attempt();
            self.switch_over(term, actions);
        }
    }

    // ---- leading

    /// Marks a session as broken whose follower makes no progress, and repeats what needs an answer.
    fn drive_lead(&mut self, actions: &mut Vec<Action>) {
        let now_ms = self.now_ms;
        let timing = self.timing;
        let Some(lead) = self.role.lead_mut() else { return };
        let over = |since_ms: u64, limit_ms: u64| now_ms.saturating_sub(since_ms) > limit_ms;
        let stalled = lead
            .waiting_since_ms
            .is_some_and(|since_ms| over(since_ms, timing.ack_stall_ms));
        let unanswered = match lead.stage {
            LeadStage::Offered { since_ms } => over(since_ms, timing.ack_stall_ms),
            LeadStage::AwaitFollowing { since_ms, .. } => over(since_ms, timing.switch_ms),
            LeadStage::Streaming | LeadStage::Live => false,
        };
        if (stalled || unanswered) && lead.broken.is_none() {
            let refusal = Refusal::FollowerStalled(lead.peer);
            lead.broken = Some(refusal);
            self.refuse(refusal, actions);
            return;
        }
        self.repeat_follow(actions);
    }

    pub(super) fn repeat_follow(&mut self, actions: &mut Vec<Action>) {
        let (now_ms, retry_ms) = (self.now_ms, self.timing.retry_ms);
        let Some(active) = self.role.active() else { return };
        let term = active.term;
        let header_is_current = self.header_is_current();
        let Some(lead) = self.role.lead_mut() else { return };
        if let LeadStage::AwaitFollowing { previous, sent_ms, .. } = &mut lead.stage
            && header_is_current
            && now_ms >= *sent_ms
        {
            *sent_ms = now_ms + retry_ms;
            let message = Message::Follow {
                session: lead.session,
                previous: *previous,
                epoch: lead.cut,
                term,
            };
            let link = lead.link;
            self.send(link, message, actions);
        }
    }

    fn drive_active(&mut self, actions: &mut Vec<Action>) {
        self.drive_lead(actions);
        let healthy = self.is_lead_healthy();
        let admitting = self.attempt.as_ref().is_some_and(Attempt::is_swapping);
        let header_is_current = self.header_is_current();
        let Role::Active(active) = &mut self.role else { return };
        let stopping = active.stop.is_some();
        // A resync whose joiner was never proposed as a member is given up without asking anybody.
        if active.confirmed == Confirmed::Alone
            && !active.doubt
            && !admitting
            && let Some(lead) = active.lead.take_if(|lead| !healthy || stopping || lead.leaving)
        {
            self.next_join_ms = self.now_ms + self.timing.retry_ms;
            self.end_lead(&lead, SessionEnd::JoinAborted, actions);
            self.cancel_attempt();
        }
        let Role::Active(active) = &mut self.role else { return };
        // The final epoch needs a follower that takes epochs, or none.
        let streams = active.lead.as_ref().is_none_or(|lead| lead.stage == LeadStage::Live);
        if let Some(stop) = active.stop.as_mut().filter(|stop| !stop.asked && streams) {
            stop.asked = true;
            actions.push(Action::Seal(Seal::Final));
        }
        if let Some(term) = active.stop.and_then(|stop| stop.done)
            && header_is_current
        {
            let link = active.lead.as_ref().map(|lead| lead.link);
            if let Some(link) = link {
                self.send(link, Message::Stopped { term }, actions);
            }
            actions.push(Action::ReportStopped { term });
            self.end(EndReason::Stopped, actions);
            return;
        }
        self.drive_storage(actions);
        if matches!(self.role, Role::Ended(_)) {
            return;
        }
        self.drive_hand_over(actions);
        self.begin_join(actions);
    }

    /// Rule 6: asks the target to claim the record, again and again, or gives the switchover up.
    fn drive_hand_over(&mut self, actions: &mut Vec<Action>) {
        let healthy = self.is_lead_healthy();
        let (now_ms, timing) = (self.now_ms, self.timing);
        let Role::Active(active) = &mut self.role else { return };
        let Some(hand_over) = &mut active.hand_over else { return };
        let Some(lead) = &active.lead else {
            active.hand_over = None;
            return;
        };
        let (link, session, peer) = (lead.link, lead.session, lead.peer);
        let late = now_ms.saturating_sub(hand_over.since_ms) > timing.switch_ms;
        if late || !healthy || lead.leaving || active.stop.is_some() || active.doubt {
            active.hand_over = None;
            self.next_observe_ms = now_ms;
            self.refuse(Refusal::SwitchFailed(peer), actions);
        } else if now_ms >= hand_over.ask_ms {
            hand_over.ask_ms = now_ms + timing.retry_ms;
            self.send(link, Message::Claim { session }, actions);
        }
    }

    /// Tells the follower and the driver that a session is over.
    pub(super) fn end_lead(&mut self, lead: &Lead, reason: SessionEnd, actions: &mut Vec<Action>) {
        self.send(
            lead.link,
            Message::End {
                session: lead.session,
                reason,
            },
            actions,
        );
        actions.push(Action::EndSession { session: lead.session });
    }

    /// Rule 4: a resync begins only when confirmed alone and nothing is unsettled.
    fn begin_join(&mut self, actions: &mut Vec<Action>) {
        let Role::Active(active) = &self.role else { return };
        let ready = active.confirmed == Confirmed::Alone
            && !active.doubt
            && active.lead.is_none()
            && active.stop.is_none()
            && self.is_free()
            && self.now_ms >= self.next_join_ms;
        let Some(uid) = self.known_uid.filter(|_| ready) else {
            return;
        };
        let term = active.term;
        let joiner = self.links.iter().find(|link| {
            let view = link.view;
            view.is_some_and(|view| view.role == crate::message::PeerRole::Starting && !view.unsettled)
                && link.peer.seat != self.me.seat
                && self.is_link_fresh(link)
        });
        let Some((link, peer, contact_ms)) = joiner.and_then(|link| Some((link.id, link.peer, link.contact_ms?)))
        else {
            return;
        };
        let session = self.next_session();
        let lead = Lead {
            session,
            peer,
            link,
            stage: LeadStage::Offered { since_ms: self.now_ms },
            cut: 0,
            sealed: 0,
            acked: 0,
            waiting_since_ms: None,
            broken: None,
            leaving: false,
            contact_ms,
        };
        if let Role::Active(active) = &mut self.role {
            active.lead = Some(lead);
        }
        self.cancel_attempt();
        actions.push(Action::BeginResync { session, link, peer });
        self.send(link, Message::Join { session, term, uid }, actions);
    }

    // ---- frozen

    fn drive_frozen(&mut self, actions: &mut Vec<Action>) {
        self.drive_lead(actions);
        let (now_ms, timing) = (self.now_ms, self.timing);
        let Role::Frozen(frozen) = &mut self.role else { return };
        let Some(epoch) = frozen.sealed else { return };
        if now_ms.saturating_sub(frozen.since_ms) > timing.switch_ms && !frozen.give_up {
            frozen.give_up = true;
            if let Some(peer) = frozen.active.lead.as_ref().map(|lead| lead.peer) {
                self.refuse(Refusal::SwitchFailed(peer), actions);
            }
            return;
        }
        if !frozen.give_up
            && now_ms >= frozen.asked_ms
            && let Some(lead) = &frozen.active.lead
        {
            frozen.asked_ms = now_ms + timing.retry_ms;
            let (link, session, term) = (lead.link, lead.session, frozen.claimed);
            self.send(link, Message::Switch { session, epoch, term }, actions);
        }
    }
}
