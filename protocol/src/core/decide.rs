//! Decisions on a record that was just read. Nothing here changes state; rule numbers are those of `docs/protocol.md`.

use crate::header::{MAX_INCARNATIONS, SeatHeader};
use crate::identity::SeatId;
use crate::message::{PeerRole, View};
use crate::record::{Members, Phase, Record, Snapshot};

use super::attempt::Goal;
use super::role::{Active, Confirmed, Frozen, Lead, LeadStage, Role, Standby, Starting};
use super::{Core, EndReason, GuestReport, HeaderReport, Refusal, SeatReport};

/// What to do about what was read.
#[derive(Debug, Clone)]
pub(super) enum Decision {
    /// Nothing.
    Done,
    /// Nothing, and here is why.
    Refuse(Refusal),
    /// Ask these seats first.
    Ask(Vec<SeatId>),
    /// Make this header durable first.
    Prepare(SeatHeader),
    /// The record was re-created for us: make its UID durable, then it is ours.
    Adopt,
    /// End for good.
    End(EndReason),
    /// Swap.
    Swap { goal: Goal, members: Members, phase: Phase },
}

/// How a record's UID relates to the one that this seat knows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lineage {
    Same,
    Successor,
    Strange,
}

impl Core {
    pub(super) fn decide(&self, snapshot: &Snapshot, reports: Option<&[SeatReport]>) -> Decision {
        let record = &snapshot.record;
        if !record.is_sane() {
            return Decision::Refuse(Refusal::RecordMalformed);
        }
        let lineage = match self.known_uid {
            Some(uid) if uid == snapshot.uid => Lineage::Same,
            known if known.is_some() && record.predecessor == known => Lineage::Successor,
            _ => Lineage::Strange,
        };
        let verdict = match &self.role {
            Role::Starting(starting) => self.decide_starting(starting, snapshot, lineage, reports),
            Role::Standby(standby) => self.decide_standby(standby, record, lineage, reports),
            Role::Active(active) => self.decide_active(active, record, lineage, reports),
            Role::Frozen(frozen) => self.decide_frozen(frozen, record, lineage, reports),
            Role::Joining(_) | Role::Ended(_) => Err(Decision::Done),
        };
        verdict.unwrap_or_else(|decision| decision)
    }

    /// Rules 8 and 11: every other seat's daemon proves that no guest runs there, and no header is above the record.
    fn need_proof(&self, record: &Record, reports: Option<&[SeatReport]>) -> Result<(), Decision> {
        let seats = self.seats_to_ask(record);
        let Some(reports) = reports else {
            return Err(Decision::Ask(seats));
        };
        for seat in seats {
            let report = reports.iter().find(|report| report.seat == seat);
            match report.map(|report| &report.header) {
                Some(HeaderReport::Found(header)) if header.term > record.term => {
                    return Err(Decision::Refuse(Refusal::OtherHeaderAbove(seat)));
                }
                Some(HeaderReport::Found(_) | HeaderReport::Absent) => {}
                Some(HeaderReport::Unreadable) | None => {
                    return Err(Decision::Refuse(Refusal::OtherHeaderUnreadable(seat)));
                }
            }
            if report.map(|report| report.guest) != Some(GuestReport::None) {
                return Err(Decision::Refuse(Refusal::OtherGuest(seat)));
            }
        }
        Ok(())
    }

    fn seats_to_ask(&self, record: &Record) -> Vec<SeatId> {
        let mut seats: Vec<_> = record.members.iter().map(|member| member.seat).collect();
        seats.extend(&self.other_seats);
        seats.extend(self.role.session().map(|(peer, ..)| peer.seat));
        seats.sort();
        seats.dedup();
        seats.retain(|seat| *seat != self.me.seat);
        seats
    }

    /// Rule 11: without contact for longer than T this seat writes nothing on its own, unless the other one is proven
    /// to run no guest. Rule 10: nor over a re-created record that the other member has not adopted, as far as is known. That one may have gone
    /// on over another successor of the same record, which is gone by now.
    fn need_contact(&self, record: &Record, reports: Option<&[SeatReport]>) -> Result<(), Decision> {
        if !self.is_contact_too_old() && self.unseen.is_none() {
            return Ok(());
        }
        match self.need_proof(record, reports) {
            Err(Decision::Refuse(_)) => Err(Decision::Refuse(match self.unseen {
                Some(peer) => Refusal::NotAdopted(peer),
                None => Refusal::ContactTooOld,
            })),
            other => other,
        }
    }

    // ---- starting

    fn decide_starting(
        &self,
        starting: &Starting,
        snapshot: &Snapshot,
        lineage: Lineage,
        reports: Option<&[SeatReport]>,
    ) -> Result<Decision, Decision> {
        let record = &snapshot.record;
        let refuse = |refusal| Err(Decision::Refuse(refusal));
        let Some(header) = &self.durable else {
            return refuse(Refusal::DiskIncomplete);
        };
        if lineage == Lineage::Strange {
            return refuse(Refusal::RecordStrange);
        }
        let named = header.is_named(&record.members);
        if let Some((holder, term)) = starting.accept_loss {
            if record.holder != holder || term.is_some_and(|term| term != record.term) {
                return refuse(Refusal::OverrideOtherHolder);
            }
            return self.decide_override(starting, snapshot, header, reports);
        }
        if !named {
            return refuse(Refusal::NotNamed);
        }
        if header.term > record.term {
            return refuse(Refusal::OwnHeaderAbove);
        }
        if starting.stop {
            self.need_proof(record, reports)?;
            return Ok(Decision::Swap {
                goal: Goal::WriteStopped,
                members: record.members.clone(),
                phase: Phase::Stopped,
            });
        }
        check_start(starting, record)?;
        if !header.complete {
            return refuse(Refusal::DiskIncomplete);
        }
        self.need_proof(record, reports)?;
        self.need_holder_first(starting, record, header, reports)?;
        self.decide_boot(snapshot, header)
    }

    fn decide_override(
        &self,
        starting: &Starting,
        snapshot: &Snapshot,
        header: &SeatHeader,
        reports: Option<&[SeatReport]>,
    ) -> Result<Decision, Decision> {
        check_start(starting, &snapshot.record)?;
        if !header.complete {
            return Err(Decision::Refuse(Refusal::DiskIncomplete));
        }
        let seats = self.seats_to_ask(&snapshot.record);
        let Some(reports) = reports else {
            return Err(Decision::Ask(seats));
        };
        for seat in seats {
            let report = reports.iter().find(|report| report.seat == seat);
            if report.map(|report| report.guest) != Some(GuestReport::None) {
                return Err(Decision::Refuse(Refusal::OtherGuest(seat)));
            }
        }
        self.decide_boot(snapshot, header)
    }

    /// Rule 8: the incarnation is in the header before its name can get into the record.
    fn decide_boot(&self, snapshot: &Snapshot, header: &SeatHeader) -> Result<Decision, Decision> {
        if !header.incarnations.contains(&self.me) || header.uid != snapshot.uid {
            let mut next = SeatHeader {
                uid: snapshot.uid,
                ..header.clone()
            };
            next.incarnations.retain(|incarnation| *incarnation != self.me);
            while next.incarnations.len() >= MAX_INCARNATIONS {
                next.incarnations.remove(0);
            }
            next.incarnations.push(self.me);
            return Ok(Decision::Prepare(next));
        }
        Ok(Decision::Swap {
            goal: Goal::ColdStart,
            members: Members::one(self.me),
            phase: Phase::Running,
        })
    }

    /// Either disk would do; the holder's seat goes first if it can.
    fn need_holder_first(
        &self,
        starting: &Starting,
        record: &Record,
        header: &SeatHeader,
        reports: Option<&[SeatReport]>,
    ) -> Result<(), Decision> {
        if header.incarnations.contains(&record.holder) {
            return Ok(());
        }
        let holder_could = reports.into_iter().flatten().any(|report| match &report.header {
            HeaderReport::Found(other) => {
                report.seat == record.holder.seat && other.complete && other.incarnations.contains(&record.holder)
            }
            HeaderReport::Absent | HeaderReport::Unreadable => false,
        });
        let patient = starting
            .holder_could_since_ms
            .is_none_or(|since_ms| self.now_ms.saturating_sub(since_ms) < self.timing.holder_first_ms);
        if holder_could && patient {
            Err(Decision::Refuse(Refusal::HolderFirst))
        } else {
            Ok(())
        }
    }

    // ---- standby

    pub(super) fn is_leader_lost(&self, standby: &Standby) -> bool {
        standby.lost || self.is_silent()
    }

    fn decide_standby(
        &self,
        standby: &Standby,
        record: &Record,
        lineage: Lineage,
        reports: Option<&[SeatReport]>,
    ) -> Result<Decision, Decision> {
        let lost = self.is_leader_lost(standby);
        let named = record.members.contains(self.me);
        if lineage == Lineage::Strange {
            return Err(Decision::Refuse(Refusal::RecordStrange));
        }
        if record.term < self.known_term {
            return Err(Decision::Refuse(Refusal::TermBelowKnown));
        }
        if !named {
            // Before the join's swap this is normal; when the leader is gone or says so it is the end.
            let over = lost || standby.verify || standby.failed;
            return if over {
                Err(Decision::End(EndReason::Ejected))
            } else {
                Ok(Decision::Done)
            };
        }
        if lineage == Lineage::Successor {
            let ours = record.holder == standby.leader;
            return if ours {
                Ok(Decision::Adopt)
            } else {
                Err(Decision::Refuse(Refusal::RecordStrange))
            };
        }
        if record.phase == Phase::Stopped {
            return Err(Decision::End(EndReason::Stopped));
        }
        if record.holder != self.me && record.holder != standby.leader {
            return Err(Decision::Refuse(Refusal::NotHolder));
        }
        let own_landed = record.members.is_only(self.me);
        let claims = standby.claim.is_some_and(|claim| claim.term.is_none());
        if claims && !lost && !own_landed && !self.has_tried() && !self.is_contact_too_old() && self.unseen.is_none() {
            let members = Members::pair(self.me, standby.leader);
            return Ok(Decision::Swap {
                goal: Goal::Claim,
                members,
                phase: record.phase,
            });
        }
        if lost && !self.lets_leader_go_first(standby) || own_landed || self.is_stuck(standby) {
            self.need_contact(record, reports)?;
            return Ok(Decision::Swap {
                goal: Goal::Takeover,
                members: Members::one(self.me),
                phase: record.phase,
            });
        }
        Ok(Decision::Done)
    }

    /// Rule 13: a seat that can't follow any more is no place for the guest while its leader may live. That one ejects it as soon as it can.
    fn lets_leader_go_first(&self, standby: &Standby) -> bool {
        let limit_ms = self.timing.peer_lost_ms + self.timing.switch_ms;
        let may_live = self.now_ms.saturating_sub(standby.contact_ms) <= limit_ms;
        standby.failed && may_live && !self.has_tried()
    }

    /// A write of ours has been unsettled for long and the leader does not settle it.
    pub(super) fn is_stuck(&self, standby: &Standby) -> bool {
        standby
            .unsettled_since_ms
            .is_some_and(|since_ms| self.now_ms.saturating_sub(since_ms) > self.timing.ack_stall_ms)
    }

    // ---- active

    /// What the active wants, without having read.
    pub(super) fn active_goal(&self, active: &Active) -> Option<Goal> {
        if self.is_left_behind(active) {
            // Rule 13: the other seat has what this disk lacks. It stays a member.
            return None;
        }
        let healthy = self.is_lead_healthy();
        let live = |stage| matches!(stage, LeadStage::Live | LeadStage::AwaitFollowing { .. });
        let final_epoch = active
            .stop
            .and_then(|stop| if stop.done.is_none() { stop.sealed } else { None });
        match (&active.lead, active.confirmed) {
            (None, Confirmed::Alone) if final_epoch.is_some() => Some(Goal::Stop),
            (None, Confirmed::Alone) => active.doubt.then_some(Goal::Eject),
            // Can't be: a pair has a session until the peer is ejected.
            (None, Confirmed::Pair) => Some(Goal::Eject),
            (Some(_), Confirmed::Pair) if !healthy => Some(Goal::Eject),
            (Some(lead), Confirmed::Pair) => {
                // It has tried something, or has claimed a record that this seat knows nothing of.
                let needs = |view: View| {
                    view.unsettled
                        || active.hand_over.is_none() && view.with == Some(self.me) && view.term > self.known_term
                };
                let follower_unsettled = self.link(lead.link).and_then(|link| link.view).is_some_and(needs);
                match final_epoch {
                    Some(epoch) if lead.acked >= epoch => Some(Goal::Stop),
                    _ if lead.leaving && active.stop.is_none() => Some(Goal::Eject),
                    _ => (active.doubt || follower_unsettled).then_some(Goal::Settle),
                }
            }
            (Some(lead), Confirmed::Alone) if active.doubt && (!healthy || lead.leaving || active.stop.is_some()) => {
                Some(Goal::Eject)
            }
            (Some(lead), Confirmed::Alone) => {
                let covered = live(lead.stage) && lead.acked >= lead.cut && lead.acked > 0;
                (covered && healthy && !lead.leaving).then_some(Goal::AdmitJoin)
            }
        }
    }

    fn decide_active(
        &self,
        active: &Active,
        record: &Record,
        lineage: Lineage,
        reports: Option<&[SeatReport]>,
    ) -> Result<Decision, Decision> {
        let holder = record.holder == self.me;
        let claimed = active.is_claimed(record, self.me);
        let low = record.term < self.known_term;
        match lineage {
            Lineage::Same => {}
            Lineage::Successor if holder => return Ok(Decision::Adopt),
            Lineage::Successor | Lineage::Strange => return Err(Decision::Refuse(Refusal::RecordStrange)),
        }
        if !holder && !claimed {
            // Rule 13: this seat's own stop, whose answer was lost, or the header for it does not get to the disk. The record is enough.
            let stopped = record.phase == Phase::Stopped && active.stop.is_some();
            let left_behind = self.stop_leaves(active).filter(|other| record.members.is_only(*other));
            return Err(if low {
                Decision::Refuse(Refusal::TermBelowKnown)
            } else if stopped && left_behind.is_some() {
                Decision::End(EndReason::Stopped)
            } else {
                Decision::End(EndReason::LostToSuccessor)
            });
        }
        let mut goal = self.active_goal(active);
        if claimed && active.hand_over.is_none() {
            // The switchover is off: the record names whoever runs the guest.
            goal = goal.or(Some(Goal::Settle));
        }
        if low {
            // Rule 10: back to a term above everything known, by those who need nobody's leave for it.
            let intact = !active.doubt && active.stop.is_none();
            goal = match (active.confirmed, &active.lead) {
                (Confirmed::Pair, Some(_)) if intact && self.is_lead_healthy() => Some(Goal::Settle),
                (Confirmed::Alone, None) if intact => Some(Goal::Eject),
                _ => return Err(Decision::Refuse(Refusal::TermBelowKnown)),
            };
        }
        let Some(goal) = goal else { return Ok(Decision::Done) };
        if active.confirmed == Confirmed::Pair || active.doubt {
            self.need_contact(record, reports)?;
        }
        let alone = Members::one(self.me);
        let pair = active
            .lead
            .as_ref()
            .map_or(alone.clone(), |lead| Members::pair(self.me, lead.peer));
        let (members, phase) = match goal {
            Goal::Settle | Goal::AdmitJoin => (pair, record.phase),
            Goal::Stop => {
                let whole = if active.confirmed == Confirmed::Pair {
                    pair
                } else {
                    alone
                };
                (self.stop_leaves(active).map_or(whole, Members::one), Phase::Stopped)
            }
            _ => (alone, record.phase),
        };
        Ok(Decision::Swap { goal, members, phase })
    }

    // ---- frozen

    fn decide_frozen(
        &self,
        frozen: &Frozen,
        record: &Record,
        lineage: Lineage,
        reports: Option<&[SeatReport]>,
    ) -> Result<Decision, Decision> {
        let holder = record.holder == self.me;
        let claimed = frozen.active.is_claimed(record, self.me);
        let named = record.members.contains(self.me);
        match lineage {
            Lineage::Same => {}
            Lineage::Successor if holder => return Ok(Decision::Adopt),
            Lineage::Successor | Lineage::Strange => return Err(Decision::Refuse(Refusal::RecordStrange)),
        }
        if record.term < self.known_term {
            return Err(Decision::Refuse(Refusal::TermBelowKnown));
        }
        if !named {
            return Err(Decision::End(EndReason::LostToSuccessor));
        }
        if record.phase == Phase::Stopped {
            return Err(Decision::End(EndReason::Stopped));
        }
        let healthy = self.is_lead_healthy();
        let lead = frozen.active.lead.as_ref();
        // A target that runs will ask this seat to follow.
        let runs = |lead: &Lead| {
            let view = self.link(lead.link).and_then(|link| link.view);
            view.is_some_and(|view| view.role == PeerRole::Active)
        };
        let waits = healthy && lead.is_some_and(runs);
        if (holder || claimed && !waits) && (frozen.give_up || !healthy) {
            self.need_contact(record, reports)?;
            let members = match lead {
                Some(lead) if healthy => Members::pair(self.me, lead.peer),
                _ => Members::one(self.me),
            };
            return Ok(Decision::Swap {
                goal: Goal::Unfreeze,
                members,
                phase: record.phase,
            });
        }
        Ok(Decision::Done)
    }
}

/// Rule 7: only a start request for exactly this stop leaves Stopped.
fn check_start(starting: &Starting, record: &Record) -> Result<(), Decision> {
    match record.phase {
        Phase::Running => Ok(()),
        Phase::Stopped if starting.start_over == Some(record.term) => Ok(()),
        Phase::Stopped => Err(Decision::Refuse(Refusal::PhaseStopped)),
    }
}
