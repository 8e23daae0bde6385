//! The thread that receives a session's epochs.
//!
//! ```text
//!   frames ─► EpochReceiver ─► staged ──(journal, fsync if flushed)──► report Staged ─► core ─► Apply ─► memory, disks
//! ```
//!
//! The driver says what may be applied, so memory never runs ahead of what the core counts as this seat's state.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use ftvm_protocol::identity::{Epoch, SessionId};
use ftvm_protocol::wire::Kind;

use super::Queue;
use super::jobs::next_job;
use crate::control::exit_code;
use crate::replication::changed::Stream;
use crate::replication::epoch::{
    EpochReceiver, InputLog, OutputLog, PortData, StagedEpoch, StagingLimits, decode_input,
};
use crate::replication::link::{Frame, LinkSender};
use crate::replication::memory::PageMemory;
use crate::replication::resync::{DIGEST_PIECE_PAGES, Digest, Offer, ResyncTarget, StillDigest};
use crate::replication::standby_disks::{StandbyDisks, StandbyDisksError};

/// Most bytes of input kept for injection, and of output kept for sending again.
pub(super) const LOG_BYTES: usize = 8 << 20;

/// Epochs, of the largest size, that may be here whole and not be applied: the two that a leader has under way, and one that it ends because
/// somebody asked. A leader that waits for acknowledgments never comes further: its next epoch comes after an acknowledgment, and what was
/// here before that was to be applied by then. Each was found no larger than that, so that fewer than four are never refused.
const UNAPPLIED_EPOCHS_MAX: usize = 3;

const GONE: &str = "the receiving thread has ended before the takeover";

/// For the receiving thread.
pub enum Job {
    /// A frame of some session.
    Frame(Frame),
    /// A frame was dropped.
    Overrun {
        /// Its session.
        session: u64,
    },
    /// The core counts this epoch as this seat's state: bring memory and disks there.
    Apply(Epoch),
    /// A switchover is about to come: begin to make durable what the disks have taken.
    SyncAhead,
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
    Failed(Failure),
    /// This seat's disks can't be used: nothing of the session was taken, nor will be.
    NoDisks(Failure),
}

/// Why a session can't be followed.
#[derive(Debug)]
pub struct Failure {
    /// In words.
    pub why: String,
    /// The engine's exit code, if a person has to mend something before this seat can join.
    pub code: Option<u8>,
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self { why, code: None }
    }
}

impl From<StandbyDisksError> for Failure {
    fn from(error: StandbyDisksError) -> Self {
        Self {
            why: error.to_string(),
            code: error.is_storage().then_some(exit_code::STORAGE),
        }
    }
}

/// Gives the seat's disks and journal once nobody else uses them. May wait for disks, so it is called in the receiving thread.
pub type OpenDisks = Box<dyn FnOnce() -> Result<StandbyDisks, Failure> + Send>;

/// What a follower works on, beside its disks.
pub struct Place {
    /// Guest RAM.
    pub memory: Arc<dyn PageMemory>,
    /// What is accepted.
    pub limits: StagingLimits,
    /// What a guest finds here.
    pub offer: Offer,
    /// The session.
    pub stream: Stream,
    /// Where the leader learns what the disks hold, and how much of the resync was taken.
    pub credit: LinkSender,
    /// Bytes of frames that may wait for the receiving thread.
    pub waiting_bytes: usize,
}

/// Bytes of frames that wait for the receiving thread. A leader keeps below the limit, which follows from what an epoch
/// may hold and how many are under way; whoever does not is not listened to any more.
struct Backlog {
    waiting_bytes: AtomicUsize,
    bytes_max: usize,
    exceeded: AtomicBool,
}

impl Backlog {
    fn new(bytes_max: usize) -> Self {
        Self {
            waiting_bytes: AtomicUsize::new(0),
            bytes_max,
            exceeded: AtomicBool::new(false),
        }
    }

    /// What a frame takes.
    fn cost(frame: &Frame) -> usize {
        frame.payload.capacity() + size_of::<Frame>()
    }

    /// Whether a frame may wait; after the first that may not, none may.
    fn add(&self, frame: &Frame) -> bool {
        let cost = Self::cost(frame);
        let before = self.waiting_bytes.fetch_add(cost, Ordering::SeqCst);
        if before + cost > self.bytes_max {
            self.exceeded.store(true, Ordering::SeqCst);
        }
        let fits = !self.exceeded.load(Ordering::SeqCst);
        if !fits {
            self.waiting_bytes.fetch_sub(cost, Ordering::SeqCst);
        }
        fits
    }

    fn taken(&self, frame: &Frame) {
        self.waiting_bytes.fetch_sub(Self::cost(frame), Ordering::SeqCst);
    }
}

/// Where frames and orders for the receiving thread go.
#[derive(Clone)]
pub struct Receiving {
    jobs: Sender<Job>,
    backlog: Arc<Backlog>,
}

impl Receiving {
    /// Starts the thread for a session. `last`: what memory is at, if no resync comes first. Frames and orders may be given at
    /// once: they wait for the disks.
    pub fn start(
        session: SessionId,
        place: Place,
        disks: OpenDisks,
        last: Option<Base>,
        queue: Queue,
        enter: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, todo) = channel();
        let backlog = Arc::new(Backlog::new(place.waiting_bytes));
        let waiting = backlog.clone();
        std::thread::Builder::new().name("receive".to_owned()).spawn(move || {
            enter();
            match disks() {
                Ok(disks) => Follower::new(session, place, disks, last, queue).run(&todo, &waiting),
                Err(failure) => {
                    let news = News::NoDisks(failure);
                    queue.follow(Report { session, news });
                }
            }
        })?;
        Ok(Self { jobs, backlog })
    }

    /// Hands a job over; dropped if the thread has ended.
    pub fn give(&self, job: Job) {
        let _ = self.jobs.send(job);
    }

    /// Hands a frame over. If too many wait already it is dropped, and the session fails.
    pub fn frame(&self, frame: Frame) {
        let session = frame.session;
        if self.backlog.add(&frame) {
            self.give(Job::Frame(frame));
        } else {
            self.give(Job::Overrun { session });
        }
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

/// The end of an epoch from which a session goes on without a resync.
#[derive(Debug)]
pub struct Base {
    /// The epoch.
    pub epoch: Epoch,
    /// The machine's state but its memory.
    pub state: Vec<u8>,
    /// When the guest stood still.
    pub since: Instant,
    /// What the guest said in that epoch.
    pub outputs: Vec<PortData>,
}

struct Follower {
    session: SessionId,
    place: Place,
    disks: StandbyDisks,
    receiver: EpochReceiver,
    resync: ResyncTarget,
    staged: VecDeque<StagedEpoch>,
    applied: Option<(Epoch, Vec<u8>)>,
    inputs: InputLog,
    outputs: OutputLog,
    /// The leader wants a digest of this epoch.
    digest_at: Option<Epoch>,
    /// The digest that is being taken, and of which epoch.
    digesting: Option<(Epoch, StillDigest)>,
    queue: Queue,
}

impl Follower {
    fn new(session: SessionId, place: Place, disks: StandbyDisks, last: Option<Base>, queue: Queue) -> Self {
        let last_epoch = last.as_ref().map(|last| last.epoch);
        let mut outputs = OutputLog::new(LOG_BYTES);
        let applied = last.map(|last| {
            // The new leader sends it again; should it die first, this seat does.
            outputs.add(last.epoch, last.outputs, last.epoch.saturating_sub(1));
            (last.epoch, last.state)
        });
        Self {
            session,
            receiver: EpochReceiver::new(place.limits.clone(), last_epoch),
            resync: ResyncTarget::new(&place.limits, place.offer.clone(), true),
            place,
            disks,
            staged: VecDeque::new(),
            applied,
            inputs: InputLog::new(LOG_BYTES),
            outputs,
            digest_at: None,
            digesting: None,
            queue,
        }
    }

    fn run(mut self, todo: &Receiver<Job>, backlog: &Backlog) {
        // A stream that failed brings nothing more; what was staged before is still this seat's state to take over from.
        let mut failed = false;
        if let Err(failure) = self.begin() {
            failed = true;
            self.report(News::Failed(failure));
        }
        while let Some(job) = next_job(todo, || self.take_piece()) {
            if let Job::Frame(frame) = &job {
                // Before it is decoded: whoever keeps it counts it again.
                backlog.taken(frame);
            }
            match job {
                Job::Overrun { session } if failed || session != self.session.0 => {}
                Job::Overrun { .. } => {
                    failed = true;
                    let max = backlog.bytes_max;
                    let why = format!("more than {max} bytes of frames wait here: the peer sends more than it may");
                    self.report(News::Failed(why.into()));
                }
                Job::Frame(frame) if failed || frame.session != self.session.0 => {}
                Job::Frame(frame) => {
                    if let Err(failure) = self.frame(frame) {
                        failed = true;
                        self.report(News::Failed(failure));
                    }
                }
                Job::Apply(epoch) => {
                    if let Err(failure) = self.apply_through(epoch) {
                        return self.report(News::Failed(failure));
                    }
                }
                Job::SyncAhead => self.disks.sync_ahead(),
                Job::Prepare { epoch, reply } => {
                    let prepared = self.apply_through(epoch).map_err(|failure| failure.why);
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

    /// Takes some of the digest that the leader asked for. Whether more is left.
    fn take_piece(&mut self) -> bool {
        let Some((epoch, digest)) = &mut self.digesting else {
            return false;
        };
        let Some(memory) = digest.advance(&*self.place.memory, DIGEST_PIECE_PAGES) else {
            return true;
        };
        let epoch = *epoch;
        self.digesting = None;
        self.report(News::Digest { epoch, memory });
        false
    }

    /// A seat that joins has the stream's state with its checkpoint. One that goes on from its own ran the guest: what its disks
    /// hold is known to nobody.
    fn begin(&mut self) -> Result<(), Failure> {
        if self.applied.is_none() {
            return Ok(());
        }
        Ok(self.disks.begin_after_own_guest()?)
    }

    fn report(&self, news: News) {
        self.queue.follow(Report {
            session: self.session,
            news,
        });
    }

    fn frame(&mut self, frame: Frame) -> Result<(), Failure> {
        match frame.kind {
            Kind::Input => {
                let items = decode_input(&frame.payload, self.place.limits.nics).map_err(|error| error.to_string())?;
                self.inputs.add(frame.epoch, items);
                Ok(())
            }
            Kind::ResyncBegin | Kind::ResyncPlan | Kind::ResyncMemory | Kind::ResyncDisk | Kind::ResyncEnd => {
                let place = &self.place;
                let taken = self
                    .resync
                    .accept(frame.kind, frame.payload, &*place.memory, &mut self.disks);
                let taken = taken.map_err(|error| Failure {
                    why: error.to_string(),
                    code: error.exit_code(),
                });
                if let Some((kind, answer)) = taken? {
                    // A link that refuses is down, and its event is under way.
                    let _ = place.credit.try_send(kind, 0, self.session.0, answer);
                }
                self.receiver.bulk_frame();
                Ok(())
            }
            Kind::Digest => {
                self.digest_at = Some(frame.epoch);
                self.digesting = None;
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

    fn stage(&mut self, staged: StagedEpoch) -> Result<(), Failure> {
        let max = UNAPPLIED_EPOCHS_MAX * self.place.limits.max_epoch_bytes;
        let before: usize = self.staged.iter().map(StagedEpoch::staged_bytes).sum();
        if before + staged.staged_bytes() > max {
            let why = format!(
                "more than {max} bytes of epochs wait here to be applied: the peer waits for no acknowledgment"
            );
            return Err(why.into());
        }
        let joins = staged.base.is_none();
        if joins {
            self.disks.begin_stream(self.place.stream)?;
        }
        self.disks
            .stage(staged.epoch, &staged.disk, staged.contains_flush || joins)?;
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

    fn apply_through(&mut self, epoch: Epoch) -> Result<(), Failure> {
        while self.staged.front().is_some_and(|staged| staged.epoch <= epoch) {
            let Some(staged) = self.staged.pop_front() else { break };
            let memory = &*self.place.memory;
            if let Some((_, digest)) = &mut self.digesting {
                staged.visit_pages(|page| digest.keep(memory, page));
            }
            staged.apply_pages(memory);
            self.disks.commit(staged.epoch)?;
            self.inputs.contained_through(staged.epoch);
            self.outputs.add(staged.epoch, staged.outputs, staged.released_through);
            self.applied = Some((staged.epoch, staged.state));
            self.digest_if_due();
        }
        Ok(())
    }

    fn digest_if_due(&mut self) {
        let applied = self.applied.as_ref().map(|(epoch, _)| *epoch);
        if let Some(epoch) = self.digest_at.take_if(|epoch| applied == Some(*epoch)) {
            self.digesting = Some((epoch, StillDigest::default()));
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
        self.apply_through(epoch).map_err(|failure| failure.why)?;
        let state = self.state_of(epoch)?.clone();
        Ok(TakenOver {
            state,
            inputs: self.inputs.take_for_injection(epoch),
            outputs: self.outputs.take_for_resending(),
            disks: self.disks,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;
    use crate::kvm::{CpuOffer, Kvm, cpu_of_host};
    use crate::replication::changed::Holds;
    use crate::replication::epoch::{EpochSender, FrameSink, SealedEpoch};
    use crate::replication::journal::JOURNAL_MIN_BYTES;
    use crate::replication::memory::HeapMemory;
    use crate::replication::pages::{EncoderConfig, PageEncoder, SinkClosed};
    use crate::replication::testing::MemStorage;
    use ftvm_protocol::identity::{Incarnation, SeatId};

    const STREAM: Stream = Stream {
        leader: Incarnation {
            seat: SeatId(4),
            start: 2,
        },
        session: SessionId(3),
    };

    fn place() -> Place {
        let host = cpu_of_host(&Kvm::open().expect("KVM")).expect("baseline");
        Place {
            memory: Arc::new(HeapMemory::new(1)),
            limits: StagingLimits {
                page_count: 1,
                disk_bytes: vec![4096],
                nics: 0,
                max_epoch_bytes: 1 << 20,
            },
            offer: Offer {
                cpu: CpuOffer {
                    host: host.clone(),
                    machine: host,
                    tsc_scaling: true,
                },
                nics: Vec::new(),
            },
            stream: STREAM,
            credit: LinkSender::to_nobody(),
            waiting_bytes: 1 << 20,
        }
    }

    fn follower(disks: StandbyDisks, last: Option<Base>) -> Follower {
        Follower::new(STREAM.session, place(), disks, last, Queue(channel().0))
    }

    /// The source of a switchover follows: neither its driver nor its target waits for its disks, and what comes meanwhile is taken in
    /// order. If the disks can't be used, the session fails.
    #[test]
    fn who_begins_to_follow_waits_for_no_disk() {
        let base = || Base {
            epoch: 8,
            state: vec![1, 2, 3],
            since: Instant::now(),
            outputs: Vec::new(),
        };
        let (queue, inputs) = crate::driver::queue();
        let start = |disks: OpenDisks| {
            Receiving::start(STREAM.session, place(), disks, Some(base()), queue.clone(), || {}).expect("starts")
        };
        let (ready, readied) = channel();
        let receiving = start(Box::new(move || -> Result<StandbyDisks, Failure> {
            let waited = readied.recv_timeout(Duration::from_secs(90));
            waited.map_err(|_| "the driver waited for the disks".to_owned())?;
            let journal = MemStorage::new(vec![0; JOURNAL_MIN_BYTES as usize]);
            Ok(StandbyDisks::open(
                journal,
                vec![MemStorage::new(vec![0; 4096])],
                &None,
            )?)
        }));
        receiving.give(Job::SyncAhead);
        ready.send(()).expect("the thread waits for it");
        assert_eq!(receiving.take_over(8).expect("taken over").state, [1, 2, 3]);
        let receiving = start(Box::new(|| Err(Failure::from("the disk is gone".to_owned()))));
        let report = match inputs.0.recv_timeout(Duration::from_secs(90)) {
            Ok(crate::driver::Input::Follow(report)) => report,
            other => panic!("{other:?}"),
        };
        assert!(matches!(&report.news, News::NoDisks(Failure { why, .. }) if why == "the disk is gone"));
        assert!(receiving.take_over(8).is_err());
    }

    /// The source of a switchover has on its disks what failed there, or was under way when the guest stood still, and its
    /// successor has no record of that. A joiner has nothing but what came.
    #[test]
    fn a_seat_that_ran_the_guest_never_says_what_its_disks_hold() {
        for own in [false, true] {
            let journal = MemStorage::new(vec![0; JOURNAL_MIN_BYTES as usize]);
            let volume = MemStorage::called(vec![0; 4096], 1);
            let open = || StandbyDisks::open(journal.clone(), vec![volume.clone()], &None).expect("opens");
            let last = own.then(|| Base {
                epoch: 8,
                state: Vec::new(),
                since: Instant::now(),
                outputs: Vec::new(),
            });
            let mut follower = follower(open(), last);
            follower.begin().expect("no fault");
            if !own {
                follower.disks.begin_stream(STREAM).expect("no fault");
            }
            follower.disks.stage(9, &[], true).expect("no fault");
            drop(follower);
            let holds = (!own).then_some(Holds {
                stream: STREAM,
                epoch: 9,
            });
            for _ in 0..2 {
                assert_eq!(open().holds(), holds, "ran the guest: {own}");
            }
        }
    }

    #[derive(Default)]
    struct Frames(Mutex<Vec<Frame>>);

    impl FrameSink for Frames {
        fn frame(&self, kind: Kind, epoch: u64, payload: Vec<u8>) -> Result<(), SinkClosed> {
            self.0.lock().unwrap().push(Frame {
                kind,
                epoch,
                session: STREAM.session.0,
                payload,
            });
            Ok(())
        }

        fn bulk_frames(&self) -> u64 {
            0
        }

        fn wait_bulk_sent(&self) -> Result<(), SinkClosed> {
            Ok(())
        }
    }

    /// A peer that sends whole epochs and waits for no acknowledgment: those that are not applied are bounded. One that waits never meets
    /// that.
    #[test]
    fn epochs_that_wait_to_be_applied_are_bounded() {
        for waits in [false, true] {
            let journal = MemStorage::new(vec![0; JOURNAL_MIN_BYTES as usize]);
            let disks = StandbyDisks::open(journal, vec![MemStorage::new(vec![0; 4096])], &None).expect("opens");
            let last = Base {
                epoch: 8,
                state: Vec::new(),
                since: Instant::now(),
                outputs: Vec::new(),
            };
            let mut follower = follower(disks, Some(last));
            follower.begin().expect("no fault");
            let frames = Arc::new(Frames::default());
            let encoder = PageEncoder::new(EncoderConfig::default()).expect("starts");
            let mut sender = EpochSender::new(frames.clone(), encoder);
            let mut taken = 0;
            let refused = (9..29).find_map(|epoch| {
                let sealed = SealedEpoch {
                    epoch,
                    base: Some(epoch - 1),
                    state: vec![0; 900_000],
                    ..SealedEpoch::default()
                };
                sender.finish(&sealed).expect("frames are kept");
                let frames = std::mem::take(&mut *frames.0.lock().unwrap());
                let refused = frames.into_iter().find_map(|frame| follower.frame(frame).err());
                taken += usize::from(refused.is_none());
                if waits {
                    follower.apply_through(epoch).expect("no fault");
                }
                refused
            });
            let why = refused.map(|failure| failure.why);
            assert_eq!(taken, if waits { 20 } else { UNAPPLIED_EPOCHS_MAX }, "{why:?}");
            assert!(waits || why.is_some_and(|why| why.contains("waits for no acknowledgment")));
        }
    }

    /// A peer that sends and sends while nothing is taken: no more than the limit waits, and nothing of the stream is taken
    /// with a hole in it.
    #[test]
    fn frames_that_wait_are_bounded() {
        let frame = |len: usize| Frame {
            kind: Kind::EpochPages,
            epoch: 1,
            session: 1,
            payload: vec![0; len],
        };
        let backlog = Backlog::new(1 << 20);
        for _ in 0..100 {
            assert!(backlog.add(&frame(100_000)));
            backlog.taken(&frame(100_000));
        }
        let fit = (0..100).take_while(|_| backlog.add(&frame(100_000))).count();
        assert_eq!(fit, 10);
        assert!(!backlog.add(&frame(1)), "the one before it is missing");
        assert!(backlog.waiting_bytes.load(Ordering::SeqCst) <= 1 << 20);
    }
}
