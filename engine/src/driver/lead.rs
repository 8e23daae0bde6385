//! The thread that sends a session's epochs, and what the driver knows of the session it leads.
//!
//! Encoding pages takes the time that the guest must not lose, so the driver only hands over what is to be sent. Jobs
//! are done in order; each has one report.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use ftvm_protocol::identity::{Epoch, Incarnation, SessionId};
use ftvm_protocol::wire::Kind;

use super::Queue;
use super::jobs::next_job;
use crate::checkpoint::Pacer;
use crate::memory::DirtyPages;
use crate::replication::changed::Stream;
use crate::replication::epoch::{EpochSender, EpochStats, FrameSink, SealedEpoch, SendError};
use crate::replication::memory::PageMemory;
use crate::replication::pages::{LivePages, SinkClosed};
use crate::replication::resync::{
    DIGEST_PIECE_PAGES, Digest, PageDigests, Resync, ResyncError, ResyncSource, ResyncStats, ResyncWindow,
};

/// Something to send.
pub enum Job {
    /// The whole machine, while the guest runs.
    Resync(Box<ResyncSource>),
    /// Pages that were written since the resync sent them.
    Pass(Vec<u32>),
    /// The end of the resync.
    EndResync,
    /// Pages of the running epoch, while the guest runs.
    Round {
        /// The running epoch.
        epoch: Epoch,
        /// What it builds on.
        base: Option<Epoch>,
        /// Output up to here has left.
        released_through: Epoch,
        /// The pages.
        pages: Vec<u32>,
    },
    /// The end of an epoch.
    Finish {
        /// The epoch.
        sealed: Box<SealedEpoch>,
        /// Give the digest of memory at its end, and ask the follower for its own.
        digest: bool,
    },
    /// Take the digest of all of memory, as it is, between other jobs, and keep it up to date until an epoch is finished with its
    /// digest. An epoch that was sealed before this was reported must not be: memory was ahead of it.
    Digest,
}

/// What became of a job.
#[derive(Debug)]
pub enum Done {
    /// Everything, or a pass, is encoded and queued.
    Pass,
    /// The bulk was sent to its end.
    Resync(ResyncStats),
    /// A round is encoded and queued.
    Round,
    /// An epoch is queued whole.
    Epoch {
        /// Which.
        epoch: Epoch,
        /// What it took.
        stats: EpochStats,
        /// What the delta cache takes now, in bytes.
        cache_bytes: usize,
        /// Of memory at its end, if it was asked for.
        digest: Option<Digest>,
    },
    /// The digest is taken and kept up to date.
    Digest,
    /// The session can't go on.
    Failed {
        /// Why.
        why: String,
    },
}

/// A report of the sending thread.
#[derive(Debug)]
pub struct Report {
    /// The session that it belongs to.
    pub session: SessionId,
    /// What became of the job.
    pub done: Done,
}

#[derive(Debug, thiserror::Error)]
enum JobError {
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Resync(#[from] ResyncError),
    #[error(transparent)]
    Closed(#[from] SinkClosed),
    #[error("a resync was to go on that was not begun: a defect")]
    NoResync,
}

/// The sending thread of one session. It ends when this is dropped and the link is down or its jobs are done.
pub struct Sending {
    jobs: Sender<Job>,
}

impl Sending {
    /// Starts the thread; `enter` runs first in it.
    pub fn start(
        session: SessionId,
        sender: EpochSender,
        sink: Arc<dyn FrameSink>,
        memory: Arc<dyn PageMemory>,
        queue: Queue,
        enter: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, todo) = channel();
        let mut worker = Worker {
            sender,
            sink,
            memory,
            resync: None,
            begun: None,
            digests: None,
        };
        std::thread::Builder::new().name("epochs".to_owned()).spawn(move || {
            enter();
            worker.send_all(session, &todo, &queue);
        })?;
        Ok(Self { jobs })
    }

    /// Hands a job over. A thread that is gone has reported why.
    pub fn give(&self, job: Job) {
        let _ = self.jobs.send(job);
    }
}

struct Worker {
    sender: EpochSender,
    sink: Arc<dyn FrameSink>,
    memory: Arc<dyn PageMemory>,
    /// A resync that was begun and not ended.
    resync: Option<Resync>,
    begun: Option<Epoch>,
    digests: Option<PageDigests>,
}

impl Worker {
    fn send_all(&mut self, session: SessionId, todo: &Receiver<Job>, queue: &Queue) {
        while let Some(job) = next_job(todo, || self.take_piece(session, queue)) {
            let done = match self.do_job(job) {
                Ok(None) => continue,
                Ok(Some(done)) => done,
                Err(error) => Done::Failed { why: error.to_string() },
            };
            let failed = matches!(done, Done::Failed { .. });
            queue.lead(Report { session, done });
            if failed {
                return;
            }
        }
    }

    /// Reads some of memory for a digest that was asked for. Whether pages are left that were never read for it.
    fn take_piece(&mut self, session: SessionId, queue: &Queue) -> bool {
        let Some(digests) = self.digests.as_mut().filter(|digests| !digests.is_whole()) else {
            return false;
        };
        digests.advance(&*self.memory, DIGEST_PIECE_PAGES);
        let whole = digests.is_whole();
        if whole {
            let done = Done::Digest;
            queue.lead(Report { session, done });
        }
        !whole
    }

    /// What there is to report of a job, if it is anything yet.
    fn do_job(&mut self, job: Job) -> Result<Option<Done>, JobError> {
        let done = match job {
            Job::Resync(source) => {
                self.resync = Some(source.copy(&mut self.sender)?);
                Done::Pass
            }
            Job::Pass(pages) => {
                let resync = self.resync.as_mut().ok_or(JobError::NoResync)?;
                resync.pass(&mut self.sender, pages)?;
                Done::Pass
            }
            Job::EndResync => {
                let resync = self.resync.take().ok_or(JobError::NoResync)?;
                Done::Resync(resync.end(&mut self.sender)?)
            }
            Job::Round {
                epoch,
                base,
                released_through,
                pages,
            } => {
                if self.begun != Some(epoch) {
                    self.sender.begin(epoch, base, released_through)?;
                    self.begun = Some(epoch);
                }
                // Before the round is reported, and so before the epoch can end: what is written later is sent again.
                if let Some(digests) = &mut self.digests {
                    pages.iter().for_each(|page| digests.reread(&*self.memory, *page));
                }
                self.sender
                    .pages(Arc::new(LivePages::new(self.memory.clone(), pages)))?;
                Done::Round
            }
            Job::Finish { sealed, digest } => {
                let stats = self.sender.finish(&sealed)?;
                let epoch = sealed.epoch;
                if let Some(digests) = &mut self.digests {
                    sealed
                        .pages
                        .iter()
                        .for_each(|(page, contents)| digests.set(page, contents));
                }
                let digests = self.digests.take_if(|_| digest);
                if digests.is_some() {
                    self.sink.frame(Kind::Digest, epoch, Vec::new())?;
                }
                let digest = digests.map(|digests| digests.digest());
                Done::Epoch {
                    epoch,
                    stats,
                    cache_bytes: self.sender.encoder().cache_bytes(),
                    digest,
                }
            }
            Job::Digest => {
                self.digests = Some(PageDigests::new(self.memory.page_count()));
                return Ok(None);
            }
        };
        Ok(Some(done))
    }
}

/// How far a session that this seat leads has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The joiner is not ready yet.
    Prepared,
    /// The bulk is being sent, and what is written meanwhile, pass after pass.
    Bulk {
        /// Passes begun.
        passes: u32,
    },
    /// Few dirty pages are left, and the bulk is being sent to its end.
    BulkEnd,
    /// The bulk is sent; the join checkpoint comes next.
    JoinCut,
    /// Ordinary epochs.
    Streaming,
}

/// The session that this seat leads.
pub struct Leading {
    /// Its name.
    pub session: SessionId,
    /// The same, as it is called elsewhere.
    pub stream: Stream,
    /// Who follows.
    pub peer: Incarnation,
    /// Whether the version agreed on has it confirm what it has written, too, and not only what came.
    pub confirms_work: bool,
    /// How far it is.
    pub stage: Stage,
    /// Its thread.
    pub sending: Sending,
    /// When to end an epoch.
    pub pacer: Pacer,
    /// Dirty and not sent.
    pub dirty: DirtyPages,
    /// What the running epoch builds on; none before the join checkpoint.
    pub base: Option<Epoch>,
    /// How much of the bulk may be under way.
    pub window: Option<Arc<ResyncWindow>>,
    /// Sealed and not acknowledged, with the time of the seal.
    pub in_flight: VecDeque<(Epoch, Instant)>,
    /// The last sealed epoch in which the guest flushed a disk: the follower makes it durable before it acknowledges.
    pub flushed: Option<Epoch>,
}

impl Leading {
    /// The oldest epoch that is sealed and not acknowledged.
    pub fn unacknowledged(&self) -> Option<Epoch> {
        self.in_flight.front().map(|(epoch, _)| *epoch)
    }

    /// An epoch was sealed, with a flush or without: the next one builds on it.
    pub fn sealed(&mut self, epoch: Epoch, flushes: bool) {
        self.base = Some(epoch);
        self.stage = Stage::Streaming;
        self.in_flight.push_back((epoch, Instant::now()));
        if flushes {
            self.flushed = Some(epoch);
        }
    }

    /// Ends the session's thread without waiting for it: it may wait for a link that is about to go.
    pub fn abandon(self) {
        if let Some(window) = &self.window {
            window.close();
        }
    }
}
