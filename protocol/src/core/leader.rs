//! The active's side: sealed epochs, acknowledgments, commands, and what a won swap changes.

use crate::identity::{Epoch, Incarnation, LinkId, SessionId, Term};
use crate::message::SessionEnd;
use crate::record::Record;

use super::attempt::Goal;
use super::role::{Active, Confirmed, Frozen, HandOver, Lead, LeadStage, Role, Starting, Stopping};
use super::{Action, ArbiterState, Command, Core, Refusal, Seal};

impl Core {
    // ---- epochs

    pub(super) fn on_sealed(&mut self, epoch: Epoch, seal: Seal, actions: &mut Vec<Action>) {
        let now_ms = self.now_ms;
        let swapping = self.has_tried();
        let refusal = match &mut self.role {
            Role::Active(active) => active.sealed(epoch, seal, swapping, now_ms).err(),
            Role::Frozen(frozen) if seal == Seal::Freeze => {
                let sealed = frozen.active.sealed(epoch, seal, swapping, now_ms);
                if sealed.is_ok() {
                    frozen.sealed = Some(epoch);
                    frozen.asked_ms = now_ms;
                }
                sealed.err()
            }
            Role::Starting(_) | Role::Joining(_) | Role::Standby(_) | Role::Frozen(_) | Role::Ended(_) => {
                Some(Refusal::WrongRole)
            }
        };
        actions.extend(refusal.map(Action::Refused));
    }

    /// Rule 5: an acknowledgment counts only for this incarnation, this session, and an epoch that was sealed.
    pub(super) fn on_ack(
        &mut self,
        link: LinkId,
        leader: Incarnation,
        session: SessionId,
        epoch: Epoch,
    ) -> Result<(), Refusal> {
        let (now_ms, me) = (self.now_ms, self.me);
        if leader != me {
            return Err(Refusal::OtherIncarnation);
        }
        let from = self.link(link).map(|link| link.peer).ok_or(Refusal::UnknownLink)?;
        let lead = self.role.lead_mut().ok_or(Refusal::WrongRole)?;
        if lead.session != session || lead.peer != from {
            return Err(Refusal::OtherSession);
        }
        if lead.stage != LeadStage::Live || epoch > lead.sealed || epoch < lead.cut {
            return Err(Refusal::NeverSealed);
        }
        if epoch > lead.acked {
            lead.acked = epoch;
            lead.waiting_since_ms = (lead.acked < lead.sealed).then_some(now_ms);
        }
        Ok(())
    }

    pub(super) fn on_join_ready(&mut self, link: LinkId, session: SessionId, actions: &mut Vec<Action>) {
        match self.role.lead_mut() {
            Some(lead) if lead.session == session && lead.link == link => {
                if matches!(lead.stage, LeadStage::Offered { .. }) {
                    lead.stage = LeadStage::Streaming;
                    actions.push(Action::StreamResync { session });
                }
            }
            _ => actions.push(Action::Refused(Refusal::OtherSession)),
        }
    }

    pub(super) fn on_following(&mut self, link: LinkId, session: SessionId, actions: &mut Vec<Action>) {
        match self.role.lead_mut() {
            Some(lead) if lead.session == session && lead.link == link => {
                if matches!(lead.stage, LeadStage::AwaitFollowing { .. }) {
                    lead.stage = LeadStage::Live;
                    actions.push(Action::LeadFrom {
                        session,
                        link,
                        peer: lead.peer,
                        base: lead.cut,
                    });
                }
            }
            _ => actions.push(Action::Refused(Refusal::OtherSession)),
        }
    }

    pub(super) fn on_leave(&mut self, link: LinkId, session: SessionId) -> Result<(), Refusal> {
        let lead = self.role.lead_mut().ok_or(Refusal::WrongRole)?;
        if lead.session != session || lead.link != link {
            return Err(Refusal::OtherSession);
        }
        lead.leaving = true;
        Ok(())
    }

    pub(super) fn break_lead(&mut self, refusal: Refusal, actions: &mut Vec<Action>) {
        if let Some(lead) = self.role.lead_mut()
            && lead.broken.is_none()
        {
            lead.broken = Some(refusal);
            self.refuse(refusal, actions);
        }
    }

    // ---- commands

    pub(super) fn on_command(&mut self, command: Command, actions: &mut Vec<Action>) {
        let refusal = match command {
            Command::Stop => self.command_stop(false),
            Command::Start { over_stopped_term } => self.command_start(over_stopped_term, actions),
            Command::Switchover => self.command_switchover(),
            Command::Leave => self.command_leave(),
            Command::AcceptDataLoss { holder, term } => match &mut self.role {
                Role::Starting(starting) => {
                    starting.accept_loss = Some((holder, term));
                    starting.loss_refused = None;
                    self.cancel_attempt();
                    Ok(())
                }
                _ => Err(Refusal::WrongRole),
            },
        };
        // The answer to the command; why the seat itself waits stays in the status.
        actions.extend(refusal.err().map(Action::Refused));
    }

    pub(super) fn on_powered_off(&mut self, actions: &mut Vec<Action>) {
        actions.extend(self.command_stop(true).err().map(Action::Refused));
    }

    fn command_stop(&mut self, by_guest: bool) -> Result<(), Refusal> {
        match &mut self.role {
            Role::Starting(starting) => {
                *starting = Starting {
                    stop: true,
                    start_over: None,
                    accept_loss: None,
                    ..starting.clone()
                };
                self.cancel_attempt();
                Ok(())
            }
            Role::Active(active) => {
                match &mut active.stop {
                    Some(stop) => stop.by_guest |= by_guest,
                    None => active.stop = Some(Stopping::new(by_guest)),
                }
                Ok(())
            }
            Role::Frozen(_) => Err(Refusal::Busy),
            Role::Joining(_) | Role::Standby(_) | Role::Ended(_) => Err(Refusal::WrongRole),
        }
    }

    fn command_start(&mut self, over: Term, actions: &mut Vec<Action>) -> Result<(), Refusal> {
        match &mut self.role {
            Role::Starting(starting) => {
                starting.stop = false;
                starting.start_over = Some(over);
                self.cancel_attempt();
                Ok(())
            }
            Role::Active(active) => match active.stop {
                None => Ok(()),
                Some(stop) if (stop.sealed.is_some() || !stop.asked) && !stop.written && !stop.by_guest => {
                    active.stop = None;
                    if stop.asked {
                        actions.push(Action::Resume);
                    }
                    Ok(())
                }
                Some(_) => Err(Refusal::StopUnderWay),
            },
            Role::Joining(_) | Role::Standby(_) | Role::Frozen(_) | Role::Ended(_) => Err(Refusal::WrongRole),
        }
    }

    pub(super) fn command_switchover(&mut self) -> Result<(), Refusal> {
        self.may_switch_over()?;
        let now_ms = self.now_ms;
        if let Role::Active(active) = &mut self.role {
            active.hand_over = Some(HandOver {
                since_ms: now_ms,
                ask_ms: now_ms,
            });
        }
        Ok(())
    }

    /// Would a switchover be taken up now?
    pub(super) fn may_switch_over(&self) -> Result<(), Refusal> {
        let Role::Active(active) = &self.role else {
            return Err(Refusal::WrongRole);
        };
        self.may_hand_over(active)?;
        if active.hand_over.is_some() {
            return Err(Refusal::Busy);
        }
        Ok(())
    }

    /// Rule 6: the pair is whole, and nothing else is under way. Asked when a switchover begins, and again before the guest stands still.
    fn may_hand_over(&self, active: &Active) -> Result<(), Refusal> {
        if active.confirmed != Confirmed::Pair || active.doubt || !self.is_lead_healthy() || self.is_contact_too_old() {
            return Err(Refusal::NotProtected);
        }
        let live = active
            .lead
            .as_ref()
            .is_some_and(|lead| lead.stage == LeadStage::Live && !lead.leaving);
        if active.stop.is_some() || !self.is_free() || !live {
            return Err(Refusal::Busy);
        }
        Ok(())
    }

    /// Rule 6: the record names the target, which is ready; now the guest stands still.
    pub(super) fn on_claimed(
        &mut self,
        link: LinkId,
        session: SessionId,
        term: Term,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let Role::Active(active) = &self.role else {
            return Err(Refusal::WrongRole);
        };
        let lead = active.lead.as_ref().ok_or(Refusal::WrongRole)?;
        if lead.session != session || lead.link != link {
            return Err(Refusal::OtherSession);
        }
        // A claim that this seat wrote over since is none.
        if term <= active.term || term < self.known_term {
            return Err(Refusal::TermBelowKnown);
        }
        if active.hand_over.is_none() {
            return Err(Refusal::StaleAnswer);
        }
        if self.arbiter == ArbiterState::Gone || self.may_hand_over(active).is_err() {
            return Err(Refusal::Busy);
        }
        let mut active = active.clone();
        active.hand_over = None;
        self.cancel_attempt();
        self.role = Role::Frozen(Frozen {
            active,
            claimed: term,
            sealed: None,
            since_ms: self.now_ms,
            asked_ms: 0,
            give_up: false,
        });
        actions.push(Action::Seal(Seal::Freeze));
        Ok(())
    }

    // ---- won swaps

    pub(super) fn won(&mut self, goal: Goal, record: &Record, actions: &mut Vec<Action>) {
        match goal {
            Goal::Eject | Goal::Settle | Goal::AdmitJoin | Goal::Stop => self.won_as_active(goal, record, actions),
            Goal::Unfreeze => self.won_unfrozen(record, actions),
            Goal::Takeover => self.won_takeover(record, actions),
            Goal::Claim => {
                if let Role::Standby(standby) = &mut self.role
                    && let Some(claim) = &mut standby.claim
                {
                    claim.term = Some(record.term);
                }
            }
            Goal::ColdStart => self.won_cold_start(record, actions),
            Goal::WriteStopped => {
                let header = self.durable.clone();
                let term = record.term;
                let uid = self.known_uid;
                if let Role::Starting(starting) = &mut self.role {
                    starting.stopped = Some(term);
                    starting.prepare = header.map(|mut header| {
                        header.term = term;
                        header.uid = uid.unwrap_or(header.uid);
                        header
                    });
                }
            }
        }
    }

    fn won_as_active(&mut self, goal: Goal, record: &Record, actions: &mut Vec<Action>) {
        let me = self.me;
        let Role::Active(active) = &mut self.role else { return };
        active.term = record.term;
        active.doubt = false;
        let alone = record.members.is_only(me);
        active.confirmed = if alone { Confirmed::Alone } else { Confirmed::Pair };
        if goal == Goal::Stop
            && let Some(stop) = &mut active.stop
        {
            stop.done = Some(record.term);
        }
        if let Some(lead) = active.lead.take_if(|_| alone) {
            self.end_lead(&lead, SessionEnd::Ejected, actions);
        }
    }

    fn won_unfrozen(&mut self, record: &Record, actions: &mut Vec<Action>) {
        let Role::Frozen(frozen) = &self.role else { return };
        self.role = Role::Active(frozen.active.clone());
        self.won_as_active(Goal::Settle, record, actions);
        actions.push(Action::Resume);
    }

    fn won_takeover(&mut self, record: &Record, actions: &mut Vec<Action>) {
        let Role::Standby(standby) = &self.role else { return };
        let (epoch, resend_after) = (standby.staged, standby.leader_acked);
        self.role = Role::Active(Active {
            running: epoch + 1,
            floor: epoch,
            confirmed: Confirmed::Alone,
            term: record.term,
            doubt: false,
            lead: None,
            stop: None,
            hand_over: None,
        });
        actions.push(Action::LoadAndRun {
            epoch,
            resend_after,
            term: record.term,
        });
    }

    /// Rule 6: this seat runs the guest from the source's last epoch on.
    pub(super) fn switch_over(&mut self, term: Term, actions: &mut Vec<Action>) {
        let Role::Standby(standby) = self.role.clone() else {
            return;
        };
        let (epoch, resend_after) = (standby.staged, standby.leader_acked);
        let stage = LeadStage::AwaitFollowing {
            previous: standby.session,
            since_ms: self.now_ms,
            sent_ms: self.now_ms,
        };
        let lead = Lead {
            session: self.next_session(),
            peer: standby.leader,
            link: standby.link,
            stage,
            cut: epoch,
            sealed: epoch,
            acked: epoch,
            waiting_since_ms: None,
            broken: standby.lost.then_some(Refusal::PeerLost(standby.leader)),
            leaving: false,
            contact_ms: standby.contact_ms,
        };
        self.role = Role::Active(Active {
            running: epoch + 1,
            floor: epoch,
            confirmed: Confirmed::Pair,
            term,
            doubt: false,
            lead: Some(lead),
            stop: None,
            hand_over: None,
        });
        self.next_observe_ms = self.now_ms + self.timing.observe_ms;
        actions.push(Action::LoadAndRun {
            epoch,
            resend_after,
            term,
        });
        // Now, for what the guest says waits until the source follows. Not before the guest is loaded: until it follows the source
        // passes on what still arrives at its ports.
        self.repeat_follow(actions);
    }

    fn won_cold_start(&mut self, record: &Record, actions: &mut Vec<Action>) {
        let Role::Starting(starting) = &self.role else { return };
        let stop = starting.stop;
        self.role = Role::Active(Active {
            running: 1,
            floor: 0,
            confirmed: Confirmed::Alone,
            term: record.term,
            doubt: false,
            lead: None,
            // The user may have changed his mind while the boot was being written.
            stop: stop.then(|| Stopping::new(false)),
            hand_over: None,
        });
        actions.push(Action::BootFromDisk {
            term: record.term,
            first_epoch: 1,
        });
    }
}

impl Stopping {
    fn new(by_guest: bool) -> Self {
        Self {
            asked: false,
            sealed: None,
            by_guest,
            written: false,
            done: None,
        }
    }
}

impl Active {
    fn sealed(&mut self, epoch: Epoch, seal: Seal, swapping: bool, now_ms: u64) -> Result<(), Refusal> {
        if epoch != self.running {
            return Err(Refusal::EpochGap);
        }
        if let (Seal::JoinCut, Some(lead)) = (seal, &mut self.lead)
            && lead.stage == LeadStage::Streaming
        {
            lead.stage = LeadStage::Live;
            lead.cut = epoch;
        }
        self.running = epoch + 1;
        // Produced while confirmed alone: free, whatever comes.
        if self.confirmed == Confirmed::Alone && !self.doubt && !swapping {
            let free = match (&self.lead, seal) {
                (Some(lead), Seal::Ordinary | Seal::Freeze | Seal::Final) => lead.stage != LeadStage::Live,
                (Some(_), Seal::JoinCut) | (None, _) => true,
            };
            if free {
                self.floor = epoch;
            }
        }
        if seal == Seal::Final
            && let Some(stop) = &mut self.stop
        {
            stop.sealed = Some(epoch);
        }
        if let Some(lead) = &mut self.lead
            && lead.stage == LeadStage::Live
        {
            lead.sealed = epoch;
            lead.waiting_since_ms.get_or_insert(now_ms);
        }
        Ok(())
    }
}
