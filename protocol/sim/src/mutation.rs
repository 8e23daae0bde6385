//! Rules removed, one at a time, from outside: between the core and the world.
//!
//! A mutation changes what the core is told, what becomes of what it asks for, or what its driver does. The core itself
//! and the invariants know nothing of mutations. Each must be caught by the general invariants on random seeds.

use ftvm_protocol::core::{
    ArbiterState, Event, Gate, GuestReport, HeaderReport, ReadOutcome, Refusal, RoleName, Seal, Status, StorageHealth,
    SwapOutcome, Timing,
};
use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::{ArbiterUid, Epoch, LinkId, RequestId, SessionId};
use ftvm_protocol::message::{Message, PeerRole};
use ftvm_protocol::record::{Members, Phase, Record, Snapshot};
use ftvm_protocol::recreation::Vouched;
use ftvm_protocol::wire::VERSION_MAX;

use crate::arbiter::Put;
use crate::world::{Input, World};

macro_rules! mutations {
    ($($(#[doc = $doc:literal])* $name:ident = $rule:literal, $text:literal;)*) => {
        /// A rule removed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Mutation {
            $(#[doc = $text] $name,)*
        }

        impl Mutation {
            /// All of them.
            pub const ALL: &'static [Mutation] = &[$(Mutation::$name,)*];

            /// The rule that it removes.
            pub fn rule(self) -> u8 {
                match self {
                    $(Mutation::$name => $rule,)*
                }
            }

            /// What is removed, in words.
            pub fn text(self) -> &'static str {
                match self {
                    $(Mutation::$name => $text,)*
                }
            }
        }
    };
}

mutations! {
    ReleaseWithoutAck = 1, "release without acknowledgment";
    UnknownMeansNotSent = 2, "unknown outcome settled by reading an unchanged record";
    UnknownMeansWon = 2, "unknown outcome taken for success";
    AckWhileTrying = 2, "standby acknowledges after it tried to take over";
    PutWithoutVersion = 2, "write without resourceVersion";
    PutWithoutUid = 2, "write without metadata.uid";
    ClientRetries = 2, "client repeats a refused write by itself";
    NoDeadline = 2, "answers count however late";
    TakeUnnamed = 3, "standby tries although not named";
    LoserGoesOn = 3, "loser does not halt and swaps over the winner";
    JoinOutputFree = 4, "output goes on freely after the join cut";
    JoinBeforeAck = 4, "member before the join checkpoint is acknowledged";
    PartialEpoch = 5, "a partial epoch is accepted";
    PartialJoin = 5, "a partial join checkpoint is accepted";
    NoJournal = 5, "acknowledged before the journal is durable";
    AckUnbound = 5, "acknowledgment not bound to incarnation, session and epoch";
    NoFreeze = 6, "source of a switchover does not freeze";
    UnfreezeWithoutSwap = 6, "frozen source goes on without a swap";
    LeaveUnheard = 6, "follower that leaves is not heard";
    LeaveWithoutSwap = 6, "follower that leaves taken for ejected without the swap";
    StopWithoutSwap = 7, "stop reported without the swap";
    StopWithoutAck = 7, "stopped without an acknowledged epoch";
    StopIgnored = 7, "Stopped is read as Running";
    HeaderNotWritten = 8, "header not written";
    JoinHeaderNotWritten = 8, "header does not say incomplete during a resync";
    BootUnnamed = 8, "boot although not named";
    BootBesideLiving = 8, "boot without asking the other seats";
    BootIncomplete = 8, "boot from an incomplete resync";
    IgnoreHeaderTerms = 8, "terms of headers not compared";
    SameIncarnation = 8, "identity without incarnation";
    OverrideWithoutProof = 9, "override without proof of death";
    DeleteNamedSeat = 9, "operator deletes a seat that the record names";
    AcceptLowerTerm = 10, "record with a lower term accepted";
    AcceptOtherUid = 10, "record with another UID accepted";
    RecreateBlindly = 10, "record re-created without agreement";
    RecreateFromOne = 10, "record of a pair re-created because one seat vouches for it";
    RecreateStale = 10, "record re-created from what was vouched for before it was gone";
    SuccessorUnseen = 10, "written over a re-created record that the other member may not go by";
    NoContactLimit = 11, "takeover after T without contact";
    StaleContact = 11, "an old answer counts as contact now";
    RunOnUnreachable = 12, "arbiter unreachable and peer lost: runs on";
    StorageUnheard = 13, "a disk that fails or hangs is not heard of";
    FollowWithFailedDisk = 13, "source whose disk failed follows, and its disk counts as whole";
    FlushErrorForgotten = 13, "a flush that failed is forgotten: later ones succeed";
    AnswerBeforeHandOver = 13, "a flush that was not done is answered as done before the guest moves";
    StopFlushUnheard = 13, "a last flush that fails before a stop is not heard of";
    VersionUnchecked = 13, "version agreed on is not checked: a leader is told of failed storage in words that it lacks";
    LateWriteIntoNextLife = 13, "a seat's next engine begins before the former process is gone";
}

impl World {
    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    fn status(&self, slot: usize) -> Option<Status> {
        self.slots[slot].engine.as_ref().map(|engine| engine.core.status())
    }

    // ---- what the core is told

    pub(crate) fn mutate_event(&mut self, slot: usize, event: Event) -> Option<Event> {
        let Some(mutation) = self.mutation else {
            return Some(event);
        };
        let Some(status) = self.status(slot) else {
            return Some(event);
        };
        Some(match event {
            Event::RecordRead {
                request,
                outcome: ReadOutcome::Found(snapshot),
            } => {
                let snapshot = self.mutate_read(mutation, slot, &status, snapshot);
                Event::RecordRead {
                    request,
                    outcome: ReadOutcome::Found(snapshot),
                }
            }
            Event::RecordSwapped { request, outcome } => Event::RecordSwapped {
                request,
                outcome: self.mutate_outcome(mutation, &status, request, outcome),
            },
            Event::SeatsReported { request, mut reports } => {
                let starting = status.role == RoleName::Starting;
                let overriding = self.user.overrides.is_some_and(|(by, _)| by == status.incarnation);
                for report in &mut reports {
                    match mutation {
                        Mutation::BootBesideLiving if starting => {
                            report.guest = GuestReport::None;
                            report.header = HeaderReport::Absent;
                        }
                        Mutation::OverrideWithoutProof if overriding => report.guest = GuestReport::None,
                        Mutation::IgnoreHeaderTerms => {
                            if let HeaderReport::Found(header) = &mut report.header {
                                header.term = 0;
                            }
                        }
                        _ => {}
                    }
                }
                Event::SeatsReported { request, reports }
            }
            Event::Received {
                message: Message::Leave { .. },
                ..
            } if mutation == Mutation::LeaveUnheard => return None,
            Event::Connected { link, peer, .. } if mutation == Mutation::VersionUnchecked => Event::Connected {
                link,
                peer,
                version: VERSION_MAX,
            },
            Event::Storage(_) if mutation == Mutation::StopFlushUnheard && status.stopping => return None,
            Event::Storage(health) => return mutate_storage(mutation, status.role, health).map(Event::Storage),
            Event::Received { link, message } => Event::Received {
                link,
                message: self.mutate_message(mutation, slot, &status, link, message),
            },
            event => event,
        })
    }

    fn mutate_read(&self, mutation: Mutation, slot: usize, status: &Status, read: Snapshot) -> Snapshot {
        let mut snapshot = read;
        let record = &mut snapshot.record;
        let me = status.incarnation;
        let with = |members: &Members, more| {
            let mut list: Vec<_> = members.iter().collect();
            list.push(more);
            Members::from_list(list).unwrap_or_else(|| members.clone())
        };
        match mutation {
            Mutation::TakeUnnamed if status.role == RoleName::Standby => record.members = with(&record.members, me),
            Mutation::LoserGoesOn if status.role == RoleName::Active => {
                record.holder = me;
                record.members = with(&record.members, me);
                record.term = record.term.max(status.term);
            }
            Mutation::AcceptLowerTerm => record.term = record.term.max(status.term),
            Mutation::AcceptOtherUid => snapshot.uid = status.uid.unwrap_or(snapshot.uid),
            Mutation::BootUnnamed if status.role == RoleName::Starting => {
                let own = self.slots[slot]
                    .disk
                    .header
                    .as_ref()
                    .and_then(|header| header.incarnations.last());
                if let Some(own) = own {
                    record.members = with(&record.members, *own);
                }
            }
            Mutation::StopIgnored if matches!(status.role, RoleName::Starting | RoleName::Standby) => {
                record.phase = Phase::Running;
            }
            _ => {}
        }
        snapshot
    }

    fn mutate_outcome(
        &self,
        mutation: Mutation,
        status: &Status,
        request: RequestId,
        outcome: SwapOutcome,
    ) -> SwapOutcome {
        match (mutation, outcome) {
            (Mutation::UnknownMeansNotSent, SwapOutcome::Unknown) => SwapOutcome::NotSent,
            (Mutation::UnknownMeansWon, SwapOutcome::Unknown) => {
                let asked = self.last_put.as_ref().filter(|(asked, _)| *asked == request);
                asked.map_or(SwapOutcome::Unknown, |(_, snapshot)| SwapOutcome::Won(snapshot.clone()))
            }
            (Mutation::AcceptOtherUid, SwapOutcome::Won(mut snapshot)) => {
                snapshot.uid = status.uid.unwrap_or(snapshot.uid);
                SwapOutcome::Won(snapshot)
            }
            (_, outcome) => outcome,
        }
    }

    fn mutate_message(
        &self,
        mutation: Mutation,
        slot: usize,
        status: &Status,
        link: LinkId,
        message: Message,
    ) -> Message {
        match (mutation, message) {
            (Mutation::AckUnbound, Message::Ack { leader, session, epoch }) => {
                let sealed = self.slots[slot]
                    .engine
                    .as_ref()
                    .map_or(epoch, |e| e.driver.epoch.saturating_sub(1));
                let bound = status.session.filter(|_| status.role != RoleName::Standby);
                match bound {
                    Some(session) => Message::Ack {
                        leader: status.incarnation,
                        session,
                        epoch: sealed,
                    },
                    None => Message::Ack { leader, session, epoch },
                }
            }
            (Mutation::LoserGoesOn, Message::Probe { n, mut view }) => {
                if view.role == PeerRole::Active {
                    view.role = PeerRole::Standby;
                }
                Message::Probe { n, view }
            }
            (Mutation::LoserGoesOn, Message::ProbeReply { n, mut view }) => {
                if view.role == PeerRole::Active {
                    view.role = PeerRole::Standby;
                }
                Message::ProbeReply { n, view }
            }
            (Mutation::SuccessorUnseen, Message::Probe { n, mut view }) => {
                view.uid = status.uid;
                Message::Probe { n, view }
            }
            (Mutation::StaleContact, Message::ProbeReply { n, view }) => {
                let newest = self.probes_sent.get(&(slot, link)).copied().unwrap_or(n);
                Message::ProbeReply { n: newest, view }
            }
            (_, message) => message,
        }
    }

    // ---- what becomes of what it asks for

    /// The arbiter as it would be without compare-and-swap.
    pub(crate) fn mutated_put(&mut self, record: &Record, uid: ArbiterUid, version: u64) -> Option<Put> {
        let now = self.arbiter.get().map(|snapshot| (snapshot.uid, snapshot.version));
        let blind = match (self.mutation?, now) {
            (Mutation::PutWithoutVersion, Some((now, _))) => now == uid,
            (Mutation::PutWithoutUid, None) => true,
            (Mutation::PutWithoutUid, Some((_, now))) => now == version,
            (Mutation::ClientRetries, Some((now, _))) => now == uid,
            (Mutation::AcceptOtherUid, Some((_, now))) => now == version,
            _ => false,
        };
        blind.then(|| Put::Won(self.arbiter.put_blindly(record.clone())))
    }

    /// A swap that never gets to the arbiter. True: it was answered.
    pub(crate) fn mutated_swap(
        &mut self,
        slot: usize,
        request: RequestId,
        (uid, version): (ArbiterUid, u64),
        record: &Record,
    ) -> bool {
        let snapshot = Snapshot {
            record: record.clone(),
            uid,
            version: version + 1,
        };
        if self.is(Mutation::UnknownMeansWon) {
            self.last_put = Some((request, snapshot));
            return false;
        }
        let leaves = |follower: Status| follower.leaving && record.members.is_only(record.holder);
        let unwritten = match self.mutation {
            Some(Mutation::StopWithoutSwap) => record.phase == Phase::Stopped,
            Some(Mutation::LeaveWithoutSwap) => self.status(1 - slot).is_some_and(leaves),
            _ => false,
        };
        if !unwritten {
            return false;
        }
        let won = Event::RecordSwapped {
            request,
            outcome: SwapOutcome::Won(snapshot),
        };
        self.input_after(2, slot, Input::Core(won));
        true
    }

    /// The operator without the rules for creating a record again.
    pub(crate) fn mutated_plan(&self) -> Option<Record> {
        if !self.is(Mutation::RecreateBlindly) {
            return None;
        }
        let statuses = [0, 1].map(|slot| self.status(slot));
        let active = statuses
            .iter()
            .flatten()
            .find(|status| status.role == RoleName::Active)?;
        let mut record = Record::genesis(active.incarnation.seat, Phase::Running);
        record.holder = active.incarnation;
        record.members = match statuses.iter().flatten().find(|other| other.role == RoleName::Standby) {
            Some(standby) => Members::pair(active.incarnation, standby.incarnation),
            None => Members::one(active.incarnation),
        };
        record.term = active.term + 1;
        record.predecessor = active.uid;
        Some(record)
    }

    /// What the operator takes for vouched.
    pub(crate) fn mutate_vouched(&self, vouched: &mut Vec<Vouched>) {
        if self.is(Mutation::RecreateFromOne) {
            let other = |one: &Vouched| {
                let by = one.record.members.iter().find(|member| *member != one.by)?;
                Some(Vouched { by, ..one.clone() })
            };
            let forged: Vec<_> = vouched.iter().filter_map(other).collect();
            vouched.extend(forged);
        }
    }

    /// What a daemon publishes although the record is there.
    pub(crate) fn mutated_published(&self, status: &Status) -> Option<Record> {
        if !self.is(Mutation::RecreateStale) || status.role != RoleName::Active && status.role != RoleName::Standby {
            return None;
        }
        let me = status.incarnation;
        let holder = if status.role == RoleName::Active {
            me
        } else {
            status.peer?
        };
        Some(Record {
            holder,
            members: status.peer.map_or(Members::one(me), |peer| Members::pair(me, peer)),
            term: status.term + 1,
            predecessor: status.uid,
            ..Record::genesis(me.seat, Phase::Running)
        })
    }

    /// The operator deletes a seat that is down although the record names it.
    pub(crate) fn mutated_operator(&mut self) {
        if !self.is(Mutation::DeleteNamedSeat) || !self.rng.percent(20) {
            return;
        }
        let Some(members) = self.arbiter.get().map(|snapshot| snapshot.record.members.clone()) else {
            return;
        };
        for slot in 0..2 {
            let seat = self.slots[slot].seat;
            if !self.slots[slot].node_up && members.iter().any(|member| member.seat == seat) {
                self.lose_disk(slot);
                self.disks_lost -= 1;
            }
        }
    }

    // ---- what its process and driver do

    pub(crate) fn mutated_start(&self, life: u64) -> u64 {
        if self.is(Mutation::SameIncarnation) { 1 } else { life }
    }

    pub(crate) fn mutated_stored_header(&self, slot: usize) -> Option<SeatHeader> {
        let mut header = self.slots[slot].disk.header.clone()?;
        if self.is(Mutation::BootIncomplete) {
            header.complete = true;
        }
        if self.is(Mutation::IgnoreHeaderTerms) {
            header.term = 0;
        }
        Some(header)
    }

    pub(crate) fn mutated_timing(&self, mut timing: Timing) -> Timing {
        if self.is(Mutation::NoContactLimit) {
            timing.contact_limit_ms = u64::MAX / 4;
        }
        if self.is(Mutation::NoDeadline) {
            timing.arbiter_deadline_ms = 1_000_000;
        }
        timing
    }

    /// Without a deadline of its own the core needs to be told of every loss.
    pub(crate) fn mutated_loss_notice_ms(&self) -> Option<u64> {
        self.is(Mutation::NoDeadline).then_some(150)
    }

    pub(crate) fn mutated_header_is_lost(&self, header: &SeatHeader) -> bool {
        self.is(Mutation::HeaderNotWritten) || self.is(Mutation::JoinHeaderNotWritten) && !header.complete
    }

    pub(crate) fn mutated_partial_is_enough(&self, join: bool) -> bool {
        self.is(if join {
            Mutation::PartialJoin
        } else {
            Mutation::PartialEpoch
        })
    }

    pub(crate) fn mutated_journals(&self) -> bool {
        !self.is(Mutation::NoJournal)
    }

    /// Is a flush that was not done answered as done? `failed_before`: an earlier one failed.
    pub(crate) fn mutated_answer(&self, failed_before: bool) -> bool {
        self.is(Mutation::AnswerBeforeHandOver) || self.is(Mutation::FlushErrorForgotten) && failed_before
    }

    /// Does the journal of a disk that failed when the guest ran here count as flushed?
    pub(crate) fn mutated_follower_is_sure(&self, failed_before: bool) -> bool {
        self.is(Mutation::FollowWithFailedDisk) && failed_before
    }

    /// The seat's next engine does not wait for the end of the former one.
    pub(crate) fn mutated_next_life(&self) -> bool {
        self.is(Mutation::LateWriteIntoNextLife)
    }

    pub(crate) fn mutated_no_pause(&self, seal: Seal) -> bool {
        self.is(Mutation::NoFreeze) && seal == Seal::Freeze
    }

    pub(crate) fn mutated_gate(&self, slot: usize, gate: Gate) -> Gate {
        let Gate::Through(_) = gate else { return gate };
        let alone = self.status(slot).is_some_and(|status| {
            self.arbiter
                .get()
                .is_some_and(|snapshot| snapshot.record.members.is_only(status.incarnation))
        });
        if self.is(Mutation::ReleaseWithoutAck) || self.is(Mutation::JoinOutputFree) && alone {
            return Gate::Open;
        }
        gate
    }

    pub(crate) fn mutate_refused(&mut self, slot: usize, refusal: Refusal) {
        if !self.is(Mutation::UnfreezeWithoutSwap) || !matches!(refusal, Refusal::SwitchFailed(_)) {
            return;
        }
        if let Some(engine) = &mut self.slots[slot].engine
            && let Some(guest) = &mut engine.driver.guest
        {
            guest.running = true;
            engine.driver.gate = Gate::Open;
        }
        self.schedule_guest(slot, 1);
    }

    pub(crate) fn mutate_after_step(&mut self, slot: usize) {
        if self.is(Mutation::FollowWithFailedDisk)
            && self
                .status(slot)
                .is_some_and(|status| status.role == RoleName::Frozen && status.storage == StorageHealth::Hangs)
        {
            self.step(slot, Event::Storage(StorageHealth::Works));
        }
        if !self.is(Mutation::RunOnUnreachable) {
            return;
        }
        let Some(status) = self.status(slot) else { return };
        let lost = status
            .contact_age_ms
            .is_some_and(|age_ms| age_ms > crate::world::TIMING.peer_lost_ms);
        if status.role == RoleName::Active && status.arbiter == ArbiterState::Unreachable && lost {
            if let Some(engine) = &mut self.slots[slot].engine {
                engine.driver.gate = Gate::Open;
            }
            self.input_after(1, slot, Input::Nic);
        }
    }

    /// Acknowledgments that nobody sent.
    pub(crate) fn mutate_after_seal(&mut self, slot: usize, seal: Seal, epoch: Epoch) {
        let forged = match seal {
            Seal::JoinCut => self.is(Mutation::JoinBeforeAck),
            Seal::Final => self.is(Mutation::StopWithoutAck),
            Seal::Ordinary | Seal::Freeze => false,
        };
        let Some(status) = self.status(slot).filter(|_| forged) else {
            return;
        };
        let link = self.slots[slot]
            .engine
            .as_ref()
            .and_then(|engine| Some(engine.driver.leading.as_ref()?.link));
        if let (Some(link), Some(session)) = (link, status.session) {
            let message = Message::Ack {
                leader: status.incarnation,
                session,
                epoch,
            };
            self.step(slot, Event::Received { link, message });
        }
    }

    pub(crate) fn mutate_after_staging(&mut self, slot: usize, session: SessionId, epoch: Epoch) {
        if !self.is(Mutation::AckWhileTrying) {
            return;
        }
        let Some(status) = self.status(slot).filter(|status| status.role == RoleName::Standby) else {
            return;
        };
        let Some(leader) = status.peer else { return };
        let Some(link) = self
            .links
            .iter()
            .rev()
            .find(|link| link.open == [true, true])
            .map(|link| link.id)
        else {
            return;
        };
        self.send(slot, link, Message::Ack { leader, session, epoch });
    }
}

/// What is heard of a seat's storage.
fn mutate_storage(mutation: Mutation, role: RoleName, health: StorageHealth) -> Option<StorageHealth> {
    match (mutation, role, health) {
        (Mutation::StorageUnheard, ..) | (Mutation::FlushErrorForgotten, _, StorageHealth::Failed) => None,
        (Mutation::FollowWithFailedDisk, RoleName::Standby, StorageHealth::Failed) => None,
        // One that may come back, and does as soon as the guest stands still.
        (Mutation::FollowWithFailedDisk, RoleName::Active | RoleName::Frozen, StorageHealth::Failed) => {
            Some(StorageHealth::Hangs)
        }
        (.., health) => Some(health),
    }
}
