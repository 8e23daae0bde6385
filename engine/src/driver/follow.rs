//! The thread that receives a session's epochs.
//!
//! ```text
//!   frames ─► EpochReceiver ─► staged ──(journal, fsync if flushed)──► report Staged ─► core ─► Apply ─► memory, disks
//! ```
//!
//! The driver says what may be applied, so memory never runs ahead of what the core counts as this seat's state.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use ftvm_protocol::identity::{Epoch, SessionId};
use ftvm_protocol::wire::Kind;

use super::Queue;
use crate::replication::epoch::{
    EpochReceiver, InputLog, OutputLog, PortData, StagedEpoch, StagingLimits, decode_input,
};
use crate::replication::link::{Frame, LinkSender};
use crate::replication::memory::PageMemory;
use crate::replication::resync::{Digest, ResyncTarget, digest_memory};
use crate::replication::standby_disks::StandbyDisks;

/// Most bytes of input kept for injection, and of output kept for sending again.
const LOG_BYTES: usize = 8 << 20;

const GONE: &str = "the receiving thread has ended before the takeover";

/// For the receiving thread.
pub enum Job {
    /// A frame of some session.
    Frame(Frame),
    /// The core counts this epoch as this seat's state: bring memory and disks there.
    Apply(Epoch),
    /// The leader is lost: bring memory and disks to this epoch and give its state, for a takeover that may follow.
    Prepare {
        /// The last staged epoch, as the core counts.
        epoch: Epoch,
        /// Takes vCPU and device state.
        reply: Sender<Result<Vec<u8>, String>>,
    },
    /// Takeover from this epoch. The thread ends.
    TakeOver {
        /// The last staged epoch, as the core counts.
        epoch: Epoch,
        /// Takes what the successor needs.
        reply: Sender<Result<TakenOver, String>>,
    },
}

/// What a successor starts from. Memory is at the epoch already, and so are the disks if they are read through what
/// waits for the volumes.
pub struct TakenOver {
    /// vCPU and device state.
    pub state: Vec<u8>,
    /// Input that the guest got after the checkpoint.
    pub inputs: Vec<PortData>,
    /// Output that may not have left, oldest first.
    pub outputs: Vec<PortData>,
    /// The disks, with what waits for the volumes.
    pub disks: StandbyDisks,
}

/// What the receiving thread reports.
#[derive(Debug)]
pub struct Report {
    /// The session.
    pub session: SessionId,
    /// What happened.
    pub news: News,
}

/// News of a session that is followed.
#[derive(Debug)]
pub enum News {
    /// An epoch is here whole, checked, and durable as far as it has to be.
    Staged {
        /// Which.
        epoch: Epoch,
        /// Output up to here has left the leader.
        leader_acked: Epoch,
        /// It completes a resync: load the state once to prove that it loads.
        joins: bool,
        /// vCPU and device state.
        state: Arc<[u8]>,
    },
    /// Memory and disks are at this epoch, and the leader asked for their digest there.
    Digest {
        /// The epoch.
        epoch: Epoch,
        /// Of memory.
        memory: Digest,
    },
    /// The session can't go on.
    Failed {
        /// Why.
        why: String,
    },
}

/// What a follower works on.
pub struct Place {
    /// Guest RAM.
    pub memory: Arc<dyn PageMemory>,
    /// The seat's disks and journal.
    pub disks: StandbyDisks,
    /// What is accepted.
    pub limits: StagingLimits,
    /// Where the leader learns how much of the resync was taken.
    pub credit: LinkSender,
}

/// Where frames and orders for the receiving thread go.
#[derive(Clone)]
pub struct Receiving(Sender<Job>);

impl Receiving {
    /// Starts the thread for a session. `last`: the epoch that memory is at, with its state, if no resync comes first.
    pub fn start(
        session: SessionId,
        place: Place,
        last: Option<(Epoch, Vec<u8>)>,
        queue: Queue,
        enter: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, todo) = channel();
        std::thread::Builder::new().name("receive".to_owned()).spawn(move || {
            enter();
            Follower::new(session, place, last, queue).run(&todo);
        })?;
        Ok(Self(jobs))
    }

    /// Hands a job over; dropped if the thread has ended.
    pub fn give(&self, job: Job) {
        let _ = self.0.send(job);
    }

    /// Takes over from `epoch`: waits until memory is there.
    pub fn take_over(&self, epoch: Epoch) -> Result<TakenOver, String> {
        let (reply, answer) = channel();
        self.give(Job::TakeOver { epoch, reply });
        answer.recv().map_err(|_| GONE.to_owned())?
    }

    /// Waits until memory is at `epoch` and gives the state there. What follows it may still come.
    pub fn prepare(&self, epoch: Epoch) -> Result<Vec<u8>, String> {
        let (reply, answer) = channel();
        self.give(Job::Prepare { epoch, reply });
        answer.recv().map_err(|_| GONE.to_owned())?
    }
}

struct Follower {
    session: SessionId,
    place: Place,
    receiver: EpochReceiver,
    resync: ResyncTarget,
    staged: VecDeque<StagedEpoch>,
    applied: Option<(Epoch, Vec<u8>)>,
    inputs: InputLog,
    outputs: OutputLog,
    /// The leader wants a digest of this epoch.
    digest_at: Option<Epoch>,
    queue: Queue,
}

impl Follower {
    fn new(session: SessionId, place: Place, last: Option<(Epoch, Vec<u8>)>, queue: Queue) -> Self {
        let last_epoch = last.as_ref().map(|(epoch, _)| *epoch);
        Self {
            session,
            receiver: EpochReceiver::new(place.limits.clone(), last_epoch),
            resync: ResyncTarget::new(&place.limits),
            place,
            staged: VecDeque::new(),
            applied: last,
            inputs: InputLog::new(LOG_BYTES),
            outputs: OutputLog::new(LOG_BYTES),
            digest_at: None,
            queue,
        }
    }

    fn run(mut self, todo: &Receiver<Job>) {
        // A stream that failed brings nothing more; what was staged before is still this seat's state to take over from.
        let mut failed = false;
        while let Ok(job) = todo.recv() {
            match job {
                Job::Frame(frame) if failed || frame.session != self.session.0 => {}
                Job::Frame(frame) => {
                    if let Err(why) = self.frame(frame) {
                        failed = true;
                        self.report(News::Failed { why });
                    }
                }
                Job::Apply(epoch) => {
                    if let Err(why) = self.apply_through(epoch) {
                        return self.report(News::Failed { why });
                    }
                }
                Job::Prepare { epoch, reply } => {
                    let prepared = self.apply_through(epoch);
                    let state = prepared.and_then(|()| Ok(self.state_of(epoch)?.clone()));
                    // A driver that does not wait any more is one that ends.
                    let _ = reply.send(state);
                }
                Job::TakeOver { epoch, reply } => {
                    // A driver that does not wait any more is one that ends.
                    let _ = reply.send(self.take_over(epoch));
                    return;
                }
            }
        }
    }

    fn report(&self, news: News) {
        self.queue.follow(Report {
            session: self.session,
            news,
        });
    }

    fn frame(&mut self, frame: Frame) -> Result<(), String> {
        match frame.kind {
            Kind::Input => {
                let items = decode_input(&frame.payload, self.place.limits.nics).map_err(|error| error.to_string())?;
                self.inputs.add(frame.epoch, items);
                Ok(())
            }
            Kind::ResyncBegin | Kind::ResyncMemory | Kind::ResyncDisk | Kind::ResyncEnd => {
                let place = &mut self.place;
                let taken = self
                    .resync
                    .accept(frame.kind, frame.payload, &*place.memory, &mut place.disks);
                if let Some(credit) = taken.map_err(|error| error.to_string())? {
                    // A link that refuses is down, and its event is under way.
                    let _ = place.credit.try_send(Kind::Credit, 0, self.session.0, credit);
                }
                self.receiver.bulk_frame();
                Ok(())
            }
            Kind::Digest => {
                self.digest_at = Some(frame.epoch);
                self.digest_if_due();
                Ok(())
            }
            kind => {
                let staged = self.receiver.accept(kind, frame.epoch, frame.payload);
                match staged.map_err(|error| error.to_string())? {
                    Some(staged) => self.stage(staged),
                    None => Ok(()),
                }
            }
        }
    }

    fn stage(&mut self, staged: StagedEpoch) -> Result<(), String> {
        let joins = staged.base.is_none();
        let disks = &mut self.place.disks;
        disks
            .stage(staged.epoch, &staged.disk, staged.contains_flush || joins)
            .map_err(|error| error.to_string())?;
        let news = News::Staged {
            epoch: staged.epoch,
            leader_acked: staged.released_through,
            joins,
            state: Arc::from(staged.state.as_slice()),
        };
        self.staged.push_back(staged);
        if joins {
            // Nobody may take over before the join is acknowledged, and the proof of loading needs the memory.
            let epoch = self.receiver.last().unwrap_or_default();
            self.apply_through(epoch)?;
        }
        self.report(news);
        Ok(())
    }

    fn apply_through(&mut self, epoch: Epoch) -> Result<(), String> {
        while self.staged.front().is_some_and(|staged| staged.epoch <= epoch) {
            let Some(staged) = self.staged.pop_front() else { break };
            staged.apply_pages(&*self.place.memory);
            let disks = &mut self.place.disks;
            disks.commit(staged.epoch).map_err(|error| error.to_string())?;
            self.inputs.contained_through(staged.epoch);
            self.outputs.add(staged.epoch, staged.outputs, staged.released_through);
            self.applied = Some((staged.epoch, staged.state));
            self.digest_if_due();
        }
        Ok(())
    }

    fn digest_if_due(&mut self) {
        let applied = self.applied.as_ref().map(|(epoch, _)| *epoch);
        if self.digest_at.is_some() && self.digest_at == applied {
            self.digest_at = None;
            self.report(News::Digest {
                epoch: applied.unwrap_or_default(),
                memory: digest_memory(&*self.place.memory, 1),
            });
        }
    }

    fn state_of(&self, epoch: Epoch) -> Result<&Vec<u8>, String> {
        match &self.applied {
            Some((applied, state)) if *applied == epoch => Ok(state),
            Some((applied, _)) => Err(format!("memory is at epoch {applied}, the core counts {epoch}")),
            None => Err("there is no complete checkpoint to take over from".to_owned()),
        }
    }

    fn take_over(mut self, epoch: Epoch) -> Result<TakenOver, String> {
        self.apply_through(epoch)?;
        let state = self.state_of(epoch)?.clone();
        Ok(TakenOver {
            state,
            inputs: self.inputs.take_for_injection(epoch),
            outputs: self.outputs.take_for_resending(),
            disks: self.place.disks,
        })
    }
}
