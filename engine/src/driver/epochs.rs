//! Ends epochs: harvest, rounds, the pause, and what sender and receiver report.

use std::time::{Duration, Instant};

use ftvm_protocol::core::{Event, Seal, StorageHealth};
use ftvm_protocol::identity::{Epoch, SessionId};

use super::follow::Base;
use super::late::Route;
use super::lead::{Done, Job, Leading, Stage};
use super::seat::Seat;
use super::status::Figures;
use super::{Driver, Guest, follow, lead, trace};
use crate::checkpoint::{Decision, Observation};
use crate::control::{CommandId, Digest, Reply, exit_code};
use crate::outbox::Output;
use crate::pause::clock::{PauseClock, Step};
use crate::replication::changed::Holds;
use crate::replication::epoch::{Port, PortData, SealedEpoch};
use crate::replication::pages::CopiedPages;
use crate::replication::resync;

/// Passes of a resync after which it is given up: vCPUs are stopped, so that only devices can write so much.
const PASSES_MAX: u32 = 64;
/// While a standby lags: between two looks at what is recorded meanwhile.
const LAG_LOOK: Duration = Duration::from_millis(2);
/// Without dirty rings the guest's writes are only seen by looking: between two looks.
const LOG_LOOK: Duration = Duration::from_millis(10);

/// A pause whose guest was told to run on.
#[derive(Debug)]
pub struct PauseOver {
    epoch: Epoch,
    clock: PauseClock,
    copied: usize,
    rounds: u32,
}

impl PauseOver {
    fn count(self, figures: &mut Figures) {
        figures.sealed(self.epoch, &self.clock, self.copied, self.rounds);
    }
}

/// A digest that was asked for. A leader's sender takes one of all pages while the guest runs, then one of every page that
/// it sends: at the end of the first epoch that is sealed after that it is the digest of memory then.
#[derive(Debug)]
pub struct PendingDigest {
    command: CommandId,
    /// The leader's sender has read all of memory.
    taken: bool,
}

impl Driver {
    /// When the running epoch needs attention, if it ever does without an event.
    pub(super) fn epoch_due(&mut self) -> Option<Instant> {
        if !self.works_on_epoch() {
            return None;
        }
        let seen = self.observe();
        let limits_writes = self.seat.machine.limits_writes();
        let leading = self.leading.as_mut()?;
        match leading.stage {
            Stage::Bulk { passes } if passes > 0 && !limits_writes => Some(seen.now),
            Stage::Prepared | Stage::Bulk { .. } | Stage::BulkEnd => None,
            Stage::JoinCut | Stage::Streaming => match leading.pacer.decide(seen) {
                Decision::WaitUntil(due) if limits_writes => Some(due),
                Decision::WaitUntil(due) => Some(due.min(seen.now + LOG_LOOK)),
                Decision::WaitForReport if seen.in_flight > 0 => Some(seen.now + LAG_LOOK),
                Decision::WaitForReport => None,
                _ => Some(seen.now),
            },
        }
    }

    /// A guest that stands still for want of a standby has no epochs but the one that lets a standby join.
    pub(super) fn works_on_epoch(&self) -> bool {
        match self.guest {
            Guest::Running => true,
            Guest::Held => self
                .leading
                .as_ref()
                .is_some_and(|leading| leading.stage == Stage::JoinCut),
            Guest::None | Guest::Paused => false,
        }
    }

    fn observe(&self) -> Observation {
        let epoch = self.seat.gate().epoch();
        let (output_since, held_bytes) = self.seat.outbox.waiting(epoch);
        Observation {
            now: Instant::now(),
            output_since,
            recorded_bytes: held_bytes + self.seat.disk_log.bytes(),
            dirty_pages: self.leading.as_ref().map_or(0, |leading| leading.dirty.len()),
            in_flight: self.leading.as_ref().map_or(0, |leading| leading.in_flight.len()),
        }
    }

    /// Counts the last pause once the guest is known to run again.
    pub(super) fn count_pause(&mut self) {
        let Some(since) = self.seat.machine.running_since() else {
            return;
        };
        if let Some(mut over) = self.pause_over.take() {
            over.clock.runs_since(since);
            over.count(&mut self.figures);
        }
    }

    /// Does what is due for the running epoch.
    pub(super) fn drive_epochs(&mut self) {
        if !self.works_on_epoch() {
            return;
        }
        self.count_pause();
        let seen = self.observe();
        let limits_writes = self.seat.machine.limits_writes();
        let Some(leading) = self.leading.as_mut() else { return };
        match leading.stage {
            // Nobody stops the vCPUs here: the harder the brake the longer it takes.
            Stage::Bulk { passes } if passes > 0 && !limits_writes => self.brake((passes * 15).min(100) as u8),
            Stage::Prepared | Stage::Bulk { .. } | Stage::BulkEnd => {}
            Stage::JoinCut | Stage::Streaming => match leading.pacer.decide(seen) {
                Decision::Harvest => self.round(),
                Decision::HoldBack => self.brake(100),
                Decision::WaitUntil(_) if !limits_writes => self.harvest(),
                _ => {}
            },
        }
    }

    /// Learns of the pages that were written since the last harvest; they are write-protected again when this returns.
    fn harvest(&mut self) {
        let Some(leading) = self.leading.as_mut() else { return };
        if let Err(error) = self.seat.machine.harvest(&mut leading.dirty) {
            self.queue.machine(crate::machine::VmEvent::Fatal(error.to_string()));
        }
        if matches!(leading.stage, Stage::JoinCut | Stage::Streaming) {
            self.seat.machine.limit_writes(leading.pacer.room(leading.dirty.len()));
        }
    }

    /// A dirty ring was full. In an epoch that counts; while bulk is sent, what was written stays where it is.
    pub(super) fn ring_full(&mut self) {
        let stage = self.leading.as_ref().map(|leading| leading.stage);
        if matches!(stage, Some(Stage::JoinCut | Stage::Streaming)) {
            self.harvest();
        }
    }

    /// The guest has written all that it may for now: the running epoch ends, or the next pass comes, and it runs on.
    pub(super) fn writes_limited(&mut self) {
        match self.leading.as_ref().map(|leading| leading.stage) {
            Some(Stage::JoinCut | Stage::Streaming) => self.harvest(),
            // What it was stopped for is being sent already.
            Some(Stage::Bulk { .. }) if self.limited_since < self.pass_began => self.release_limited(),
            Some(Stage::Bulk { .. } | Stage::BulkEnd) => {}
            Some(Stage::Prepared) | None => self.release_limited(),
        }
    }

    /// The first copy, or a pass, is sent: what was written meanwhile is sent again while it is too much for the join
    /// checkpoint.
    fn next_pass(&mut self) {
        self.harvest();
        let room = self.seat.pacer.first_room();
        let Some(leading) = self.leading.as_mut() else { return };
        let Stage::Bulk { passes } = leading.stage else { return };
        let dirty = leading.dirty.len();
        if dirty <= room / 2 {
            leading.stage = Stage::BulkEnd;
            self.seat.machine.limit_writes(room - dirty);
            leading.sending.give(Job::EndResync);
        } else if passes == PASSES_MAX {
            let session = leading.session;
            let why = format!(
                "the resync can't end: after {passes} passes {dirty} pages are still written during one, faster than the link \
                 to the standby carries them; use a faster link, or let the guest do less"
            );
            return self.session_failed(session, &why);
        } else {
            leading.stage = Stage::Bulk { passes: passes + 1 };
            self.pass_began = Some(Instant::now());
            self.seat.machine.limit_writes(resync::pass_limit(dirty));
            leading.dirty.sort();
            let pages = leading.dirty.iter().collect();
            leading.dirty.clear();
            leading.sending.give(Job::Pass(pages));
        }
        self.release_limited();
    }

    /// Harvests; then sends a round while the guest runs, or ends the epoch.
    fn round(&mut self) {
        self.harvest();
        let epoch = self.seat.gate().epoch();
        let Some(leading) = self.leading.as_mut() else { return };
        match leading.pacer.harvested(leading.dirty.len()) {
            Decision::SendRound => Self::send_round(leading, epoch, &self.seat),
            Decision::Throttle(percent) => {
                Self::send_round(leading, epoch, &self.seat);
                self.brake(percent);
            }
            _ => {
                let seal = if leading.stage == Stage::JoinCut {
                    Seal::JoinCut
                } else {
                    Seal::Ordinary
                };
                self.seal(seal);
            }
        }
    }

    /// Pages are write-protected again already: whatever the guest writes from here on is found by the next harvest.
    fn send_round(leading: &mut Leading, epoch: Epoch, seat: &Seat) {
        seat.machine.limit_writes(leading.pacer.room(0));
        leading.dirty.sort();
        let pages = leading.dirty.iter().collect();
        leading.dirty.clear();
        leading.sending.give(Job::Round {
            epoch,
            base: leading.base,
            released_through: released_through(leading.unacknowledged(), seat.outbox.oldest_held(), epoch),
            pages,
        });
    }

    /// Lets a guest that outruns the link stand still for a part of the time.
    fn brake(&mut self, percent: u8) {
        const SLICE: Duration = Duration::from_millis(1);
        self.pause_guest();
        let still = SLICE * u32::from(percent) / 100;
        std::thread::sleep(still);
        self.figures.braked += still;
        self.resume_guest();
    }

    /// Pauses the guest, takes what is left of the epoch, and lets the core say what leaves and whether the guest runs on.
    pub(super) fn seal(&mut self, seal: Seal) {
        self.count_pause();
        // A guest that has not even begun to run since.
        if let Some(over) = self.pause_over.take() {
            over.count(&mut self.figures);
        }
        let mut clock = PauseClock::start();
        let epoch = self.seat.gate().epoch();
        if self.leading.is_none() {
            self.pause_guest();
            return self.seal_alone(epoch, seal);
        }
        let state = match self.seat.machine.pause_and_save(&mut clock) {
            Ok(state) => state,
            Err(error) => return self.guest_failed(&error),
        };
        self.guest = Guest::Paused;
        self.harvest();
        clock.done(Step::Harvest);
        let outputs = match seal {
            // What was withheld for want of a standby is this one's to say, too.
            Seal::JoinCut => self.seat.outbox.all_held(),
            _ => self.seat.outbox.of_epoch(epoch),
        };
        let changes = self.seat.disk_log.take();
        let Some(leading) = self.leading.as_mut() else { return };
        let memory = self.seat.machine.ram();
        let mut pages = CopiedPages::with_capacity(leading.dirty.len());
        for page in leading.dirty.iter() {
            pages.copy_from(&**memory, page);
        }
        let copied = pages.numbers().len();
        leading.dirty.clear();
        let sealed = SealedEpoch {
            epoch,
            base: leading.base,
            released_through: released_through(leading.unacknowledged(), self.seat.outbox.oldest_held(), epoch),
            pages: std::sync::Arc::new(pages),
            state,
            disk: changes.changes,
            outputs: Vec::new(),
            contains_flush: changes.contains_flush || seal == Seal::Final,
        };
        leading.tell_sealed(&self.seat, &sealed, seal);
        let rounds = leading.pacer.rounds();
        leading.sealed(epoch, sealed.contains_flush);
        self.takeover.reached_first(trace::Step::Sealed);
        self.seat.gate().set_epoch(epoch + 1);
        self.seat.machine.limit_writes(self.seat.pacer.first_room());
        let digest = self.digest.as_ref().is_some_and(|pending| pending.taken);
        if matches!(seal, Seal::Freeze | Seal::Final) {
            self.sealed_state = Some(Base {
                epoch,
                state: sealed.state.clone(),
                since: Instant::now(),
                outputs: outputs.iter().cloned().map(port_data).collect(),
            });
        }
        clock.done(Step::Copy);
        self.step(Event::EpochSealed { epoch, seal });
        clock.done(Step::Core);
        let runs_on =
            matches!(seal, Seal::Ordinary | Seal::JoinCut) && self.guest == Guest::Paused && self.ended.is_none();
        if runs_on {
            self.resume_guest();
        }
        clock.done(Step::Resume);
        let pause = clock.total();
        let over = PauseOver {
            epoch,
            clock,
            copied,
            rounds,
        };
        if runs_on && self.guest == Guest::Running {
            self.pause_over = Some(over);
        } else {
            over.count(&mut self.figures);
        }
        if let Some(leading) = self.leading.as_mut() {
            leading.pacer.sealed(Instant::now(), pause);
            let outputs = outputs.into_iter().map(port_data).collect();
            let sealed = Box::new(SealedEpoch { outputs, ..sealed });
            leading.sending.give(Job::Finish { sealed, digest });
        }
    }

    /// An end of an epoch that the core asks for.
    pub(super) fn seal_as_asked(&mut self, seal: Seal) {
        if seal == Seal::Freeze {
            // The order to run comes next: from now on the follower may change its disks by itself.
            self.seat.changed.forget();
        }
        if seal == Seal::Final && self.leading.is_some() {
            return self.flush_then_seal();
        }
        self.seal(seal);
    }

    /// A stop of a guest without a follower: its disks are flushed, and that is all there is.
    fn seal_alone(&mut self, epoch: Epoch, seal: Seal) {
        if let Err(why) = self.seat.flush_disks() {
            return self.queue.machine(crate::machine::VmEvent::Fatal(why));
        }
        self.seat.gate().set_epoch(epoch + 1);
        self.step(Event::EpochSealed { epoch, seal });
    }

    pub(super) fn lead_report(&mut self, report: lead::Report) {
        let ours = self
            .leading
            .as_ref()
            .is_some_and(|leading| leading.session == report.session);
        match report.done {
            // A session that could not even be begun is reported too.
            Done::Failed { why } => {
                tracing::warn!("session {} can't go on: {why}", report.session.0);
                self.troubles.session_failed(report.session, why);
                self.step(Event::SessionFailed {
                    session: report.session,
                });
            }
            _ if !ours => {}
            Done::Pass => self.next_pass(),
            Done::Resync(stats) => {
                self.figures.resync = stats;
                if let Some(leading) = self.leading.as_mut() {
                    leading.stage = Stage::JoinCut;
                    leading.pacer.hurry();
                }
            }
            Done::Digest => {
                if let (Some(pending), Some(leading)) = (&mut self.digest, &mut self.leading) {
                    pending.taken = true;
                    leading.pacer.hurry();
                }
            }
            Done::Round => {
                if let Some(leading) = self.leading.as_mut() {
                    leading.pacer.round_sent();
                }
            }
            Done::Epoch {
                epoch,
                stats,
                cache_bytes,
                digest,
            } => {
                tracing::trace!("epoch {epoch} queued");
                self.takeover.reached_first(trace::Step::Sent);
                self.figures.sent(&stats);
                self.figures.cache_bytes = cache_bytes;
                if let Some((digest, pending)) = digest.and_then(|digest| Some((digest, self.digest.take()?))) {
                    self.control
                        .reply(pending.command, Reply::Digest(digest_reply(epoch, digest)));
                }
            }
        }
    }

    /// Forgets what the core counts as acknowledged.
    pub(super) fn acknowledged(&mut self, acked: Epoch) {
        let Some(leading) = self.leading.as_mut() else { return };
        if leading.unacknowledged().is_some_and(|epoch| epoch <= acked) {
            let stream = leading.stream;
            self.seat.changed.acknowledged(Holds { stream, epoch: acked });
        }
        while leading.in_flight.front().is_some_and(|(epoch, _)| *epoch <= acked) {
            if let Some((_, sealed)) = leading.in_flight.pop_front() {
                let elapsed = sealed.elapsed();
                leading.pacer.acknowledged(elapsed);
                self.figures.acknowledged.add(elapsed);
            }
        }
    }

    pub(super) fn follow_report(&mut self, report: follow::Report) {
        let session = report.session;
        if self
            .following
            .as_ref()
            .is_none_or(|following| following.session != session)
        {
            return;
        }
        match report.news {
            follow::News::Failed(failure) => self.cant_follow(session, failure),
            follow::News::NoDisks(failure) => self.cant_open_disks(session, failure),
            follow::News::Digest { epoch, memory } => {
                let digest = digest_reply(epoch, memory);
                self.figures.digest = Some(digest.clone());
                if let Some(pending) = self.digest.take() {
                    self.control.reply(pending.command, Reply::Digest(digest));
                }
            }
            follow::News::Staged {
                epoch,
                leader_acked,
                joins,
                state,
            } => {
                // The join checkpoint is loaded for real; later ones are checked as far as that goes without loading.
                let loads = if joins {
                    self.seat.machine.load(&state)
                } else {
                    self.seat.machine.check(&state)
                };
                match loads {
                    Ok(()) => self.step(Event::EpochStaged {
                        session,
                        epoch,
                        leader_acked,
                    }),
                    Err(error) => {
                        let why = format!("epoch {epoch} can't be loaded: {}", crate::error_chain(&error));
                        self.cant_follow(session, why.into());
                    }
                }
            }
        }
    }

    fn cant_follow(&mut self, session: SessionId, follow::Failure { why, code }: follow::Failure) {
        tracing::warn!("session {} can't be followed: {why}", session.0);
        self.tell_leader(&why);
        // What hung before has come to an end, with an error: that does not take these words back.
        self.follower_watch.forget();
        self.troubles.session = Some(why);
        self.troubles.session_code = code;
        if code == Some(exit_code::STORAGE) {
            self.step(Event::Storage(StorageHealth::Failed));
        }
        if self.ended.is_none() {
            self.step(Event::SessionFailed { session });
        }
    }

    /// Nobody has touched the memory: a source that was to follow from its own last epoch goes on there, should its target be lost.
    fn cant_open_disks(&mut self, session: SessionId, failure: follow::Failure) {
        self.cant_follow(session, failure);
        self.set_route(Route::Nowhere);
        self.following = None;
    }

    // ---- digest

    /// A leader answers at the next epoch, which it asks the follower for too; a follower gives the one it was asked for
    /// last, or waits for the first, so that whoever asks the leader and then the follower gets two digests of one epoch.
    pub(super) fn begin_digest(&mut self, id: CommandId) {
        if let Some(leading) = self
            .leading
            .as_mut()
            .filter(|leading| leading.stage == Stage::Streaming)
        {
            let command = id;
            if self.digest.is_some() {
                let why = "another digest is being taken: ask again".to_owned();
                return self.control.reply(command, Reply::Refused { why });
            }
            leading.sending.give(Job::Digest);
            self.digest = Some(PendingDigest { command, taken: false });
            return;
        }
        let reply = match &self.figures.digest {
            Some(digest) if self.following.is_some() => Reply::Digest(digest.clone()),
            None if self.following.is_some() => {
                self.digest = Some(PendingDigest {
                    command: id,
                    taken: false,
                });
                return;
            }
            _ => Reply::Refused {
                why: "a digest is of the epoch of a protected guest: ask the active seat, then the standby".to_owned(),
            },
        };
        self.control.reply(id, reply);
    }

    pub(super) fn fail_digest(&mut self, why: &str) {
        if let Some(digest) = self.digest.take() {
            self.control
                .reply(digest.command, Reply::Refused { why: why.to_owned() });
        }
    }
}

impl Leading {
    /// What the follower has durably once it acknowledges this epoch, as it goes by it: a flush, or its join checkpoint.
    fn tell_sealed(&self, seat: &Seat, sealed: &SealedEpoch, seal: Seal) {
        if seal == Seal::Freeze {
            return;
        }
        let (stream, epoch) = (self.stream, sealed.epoch);
        let durable = sealed.contains_flush || sealed.base.is_none();
        seat.changed.sealed(self.peer.seat, Holds { stream, epoch }, durable);
    }
}

fn digest_reply(epoch: Epoch, memory: resync::Digest) -> Digest {
    Digest {
        epoch,
        memory: format!("{:032x}", memory.0),
        disks: std::collections::BTreeMap::new(),
    }
}

/// Up to which epoch output has left, as the follower is told while `epoch` runs: what is not acknowledged has not, and what is may
/// still be held back.
fn released_through(unacknowledged: Option<Epoch>, oldest_held: Option<Epoch>, epoch: Epoch) -> Epoch {
    [unacknowledged, oldest_held]
        .into_iter()
        .flatten()
        .fold(epoch, Epoch::min)
        .saturating_sub(1)
}

fn port_data(output: Output) -> PortData {
    match output {
        Output::Frame { nic, bytes } => PortData {
            port: Port::Nic(u16::from(nic)),
            bytes: bytes.to_vec(),
        },
        Output::Console(bytes) => PortData {
            port: Port::Console,
            bytes: bytes.to_vec(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_that_is_held_or_not_acknowledged_has_not_left() {
        assert_eq!(released_through(None, None, 9), 8);
        assert_eq!(released_through(Some(8), Some(8), 9), 7);
        // Acknowledged, while the gate is still closed, or the last word of a switchover that was taken back.
        assert_eq!(released_through(None, Some(7), 9), 6);
        assert_eq!(released_through(Some(6), None, 9), 5);
        assert_eq!(released_through(None, Some(9), 9), 8);
        assert_eq!(released_through(None, None, 0), 0);
    }
}
