//! What waits to be sent on a link: four classes, each bounded.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_protocol::identity::{LinkId, SessionId};
use ftvm_protocol::wire::Kind;

use super::table::Wake;
use super::{DownReason, Frame, class_of};
use crate::replication::epoch::FrameSink;
use crate::replication::pages::SinkClosed;

/// Order in which frames leave: a class waits for those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Heartbeats, acknowledgments, credit: sending never waits.
    Control,
    /// Copies of frames to the guest: sending never waits; what doesn't fit is refused.
    Input,
    /// Epochs: sending waits for room.
    Epoch,
    /// Resync: sending waits for room.
    Bulk,
}

const CLASSES: usize = 4;

/// Most bytes that may wait in each class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Control; a link that lets so much pile up is closed.
    pub control_bytes: usize,
    /// Input.
    pub input_bytes: usize,
    /// Epochs.
    pub epoch_bytes: usize,
    /// Bulk.
    pub bulk_bytes: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl QueueLimits {
    /// Unless somebody wants others.
    pub const DEFAULT: Self = Self {
        control_bytes: 1 << 20,
        input_bytes: 2 << 20,
        epoch_bytes: 4 << 20,
        bulk_bytes: 2 << 20,
    };

    /// Of all classes together.
    pub const fn bytes(&self) -> usize {
        self.control_bytes + self.input_bytes + self.epoch_bytes + self.bulk_bytes
    }

    fn of(&self, class: Class) -> usize {
        match class {
            Class::Control => self.control_bytes,
            Class::Input => self.input_bytes,
            Class::Epoch => self.epoch_bytes,
            Class::Bulk => self.bulk_bytes,
        }
    }
}

/// Why a frame was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendRefused {
    /// The link is down.
    #[error("the link is down")]
    Down,
    /// No room in a class that doesn't wait.
    #[error("the link's queue is full")]
    Full,
    /// Longer than its kind may be.
    #[error("the payload is longer than its kind allows")]
    TooLong,
}

/// How much waits and went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Bytes waiting: control, input, epoch, bulk.
    pub waiting_bytes: [usize; CLASSES],
    /// Payload bytes taken by the link's thread since it is up.
    pub taken_bytes: u64,
    /// Time that producers spent waiting for room.
    pub waited: Duration,
}

#[derive(Default)]
struct Waiting {
    frames: [VecDeque<Frame>; CLASSES],
    bytes: [usize; CLASSES],
    taken_bytes: u64,
    waited: Duration,
    closed: bool,
    close_reason: Option<DownReason>,
}

/// Shared by a link's thread and everybody who sends.
pub(super) struct Queue {
    limits: QueueLimits,
    waiting: Mutex<Waiting>,
    room: Condvar,
    wake: Wake,
    woken: AtomicBool,
    received: AtomicU64,
}

/// A frame costs more than its payload.
const FRAME_BYTES: usize = size_of::<Frame>();

impl Queue {
    pub fn new(limits: QueueLimits, wake: Wake) -> Self {
        Self {
            limits,
            waiting: Mutex::default(),
            room: Condvar::new(),
            wake,
            woken: AtomicBool::new(false),
            received: AtomicU64::new(0),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_up(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.wake.signal();
        }
    }

    /// Readable when something was queued or closed.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The link's thread is awake: what is queued from now on wakes it again.
    pub fn awake(&self) {
        self.wake.drain();
        self.woken.store(false, Ordering::Release);
    }

    fn push(&self, frame: Frame, may_wait: bool) -> Result<(), SendRefused> {
        if frame.payload.len() > frame.kind.max_len() as usize {
            return Err(SendRefused::TooLong);
        }
        let class = class_of(frame.kind);
        let waits = may_wait && class >= Class::Epoch;
        let cost = frame.payload.len() + FRAME_BYTES;
        let limit = self.limits.of(class);
        let index = class as usize;
        let mut waiting = self.waiting();
        // A frame larger than the limit goes when its class is empty.
        let mut since: Option<Instant> = None;
        while !waiting.closed && waiting.bytes[index] > 0 && waiting.bytes[index] + cost > limit {
            if !waits {
                drop(waiting);
                if class == Class::Control {
                    self.close(DownReason::ClosedHere(
                        "control messages pile up, the peer takes none".to_owned(),
                    ));
                }
                return Err(SendRefused::Full);
            }
            since.get_or_insert_with(Instant::now);
            waiting = self.room.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(since) = since {
            waiting.waited += since.elapsed();
        }
        if waiting.closed {
            return Err(SendRefused::Down);
        }
        waiting.bytes[index] += cost;
        waiting.frames[index].push_back(frame);
        drop(waiting);
        self.wake_up();
        Ok(())
    }

    /// The link's thread received a frame.
    pub fn note_received(&self) {
        self.received.fetch_add(1, Ordering::Relaxed);
    }

    /// The next frame to send.
    pub fn pop(&self) -> Option<Frame> {
        let mut waiting = self.waiting();
        let index = waiting.frames.iter().position(|frames| !frames.is_empty())?;
        let frame = waiting.frames[index].pop_front()?;
        waiting.bytes[index] -= frame.payload.len() + FRAME_BYTES;
        waiting.taken_bytes += frame.payload.len() as u64;
        drop(waiting);
        self.room.notify_all();
        Some(frame)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting().frames.iter().all(VecDeque::is_empty)
    }

    /// Asks the link's thread to end the connection; what waits is not sent.
    pub fn close(&self, reason: DownReason) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        waiting.close_reason.get_or_insert(reason);
        drop(waiting);
        self.room.notify_all();
        self.wake_up();
    }

    /// Why the link is to be closed, if it is; told once.
    pub fn close_reason(&self) -> Option<DownReason> {
        self.waiting().close_reason.take()
    }

    /// The link is down: nobody waits any more, and what waited is dropped.
    pub fn shut(&self) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        waiting.frames = Default::default();
        waiting.bytes = [0; CLASSES];
        drop(waiting);
        self.room.notify_all();
    }
}

/// Sends on one link. Cheap to clone; outlives the link, which then refuses.
#[derive(Clone)]
pub struct LinkSender {
    pub(super) link: LinkId,
    pub(super) queue: Arc<Queue>,
}

impl std::fmt::Debug for LinkSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LinkSender").field(&self.link).finish()
    }
}

impl LinkSender {
    /// Nobody sends what waits here.
    #[cfg(test)]
    pub fn to_nobody() -> Self {
        let limits = QueueLimits {
            epoch_bytes: 4096,
            control_bytes: 4096,
            input_bytes: 4096,
            bulk_bytes: 4096,
        };
        let wakes = super::table::Wakes::new().expect("eventfds");
        Self {
            link: LinkId(1),
            queue: Arc::new(Queue::new(limits, wakes.take().expect("one is free"))),
        }
    }

    /// The link.
    pub fn link(&self) -> LinkId {
        self.link
    }

    /// Queues a frame in its kind's class ([`class_of`]). Waits for room in the classes of epochs and bulk, until the
    /// link is down.
    pub fn send(&self, kind: Kind, epoch: u64, session: u64, payload: Vec<u8>) -> Result<(), SendRefused> {
        self.queue.push(
            Frame {
                kind,
                epoch,
                session,
                payload,
            },
            true,
        )
    }

    /// Queues a frame or refuses at once.
    pub fn try_send(&self, kind: Kind, epoch: u64, session: u64, payload: Vec<u8>) -> Result<(), SendRefused> {
        self.queue.push(
            Frame {
                kind,
                epoch,
                session,
                payload,
            },
            false,
        )
    }

    /// Waits until every frame of `class` was handed to the connection; frames queued after that, of any class, come
    /// after them.
    pub fn wait_sent(&self, class: Class) -> Result<(), SendRefused> {
        let mut waiting = self.queue.waiting();
        while !waiting.closed && !waiting.frames[class as usize].is_empty() {
            waiting = self.queue.room.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        if waiting.closed { Err(SendRefused::Down) } else { Ok(()) }
    }

    /// Closes the link; the event says `reason`.
    pub fn close(&self, reason: &str) {
        self.queue.close(DownReason::ClosedHere(reason.to_owned()));
    }

    /// Frames received on this link so far: as long as it grows, the peer lives.
    pub fn received_frames(&self) -> u64 {
        self.queue.received.load(Ordering::Relaxed)
    }

    /// How much waits.
    pub fn state(&self) -> QueueState {
        let waiting = self.queue.waiting();
        QueueState {
            waiting_bytes: waiting.bytes,
            taken_bytes: waiting.taken_bytes,
            waited: waiting.waited,
        }
    }
}

/// One replication session over a link, for [`EpochSender`](crate::replication::epoch::EpochSender) and resync.
#[derive(Debug)]
pub struct SessionSink {
    sender: LinkSender,
    session: SessionId,
    bulk_frames: AtomicU64,
}

impl SessionSink {
    /// `session` over `sender`'s link.
    pub fn new(sender: LinkSender, session: SessionId) -> Self {
        Self {
            sender,
            session,
            bulk_frames: AtomicU64::new(0),
        }
    }

    /// The link's sender.
    pub fn sender(&self) -> &LinkSender {
        &self.sender
    }
}

impl FrameSink for SessionSink {
    fn frame(&self, kind: Kind, epoch: u64, payload: Vec<u8>) -> Result<(), SinkClosed> {
        if class_of(kind) == Class::Bulk {
            self.bulk_frames.fetch_add(1, Ordering::Relaxed);
        }
        self.sender
            .send(kind, epoch, self.session.0, payload)
            .map_err(|_| SinkClosed)
    }

    fn bulk_frames(&self) -> u64 {
        self.bulk_frames.load(Ordering::Relaxed)
    }

    fn wait_bulk_sent(&self) -> Result<(), SinkClosed> {
        self.sender.wait_sent(Class::Bulk).map_err(|_| SinkClosed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::Wakes;
    use super::*;

    fn queue(epoch_bytes: usize) -> Arc<Queue> {
        let limits = QueueLimits {
            epoch_bytes,
            control_bytes: 4096,
            input_bytes: 4096,
            bulk_bytes: 4096,
        };
        let wakes = Wakes::new().expect("eventfds");
        Arc::new(Queue::new(limits, wakes.take().expect("one is free")))
    }

    fn sender(queue: &Arc<Queue>) -> LinkSender {
        LinkSender {
            link: LinkId(1),
            queue: queue.clone(),
        }
    }

    #[test]
    fn classes_leave_in_order_and_frames_in_order_within_them() {
        let queue = queue(1 << 20);
        let sender = sender(&queue);
        for (kind, epoch) in [
            (Kind::ResyncMemory, 1),
            (Kind::EpochBegin, 2),
            (Kind::Input, 3),
            (Kind::EpochEnd, 4),
            (Kind::Control, 5),
            (Kind::Credit, 6),
        ] {
            sender.send(kind, epoch, 0, vec![]).expect("room");
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|frame| frame.epoch).collect();
        assert_eq!(order, [5, 6, 3, 2, 4, 1]);
        assert!(queue.is_empty());
    }

    #[test]
    fn epochs_wait_for_room_and_input_is_refused() {
        let queue = queue(10_000);
        let sender = sender(&queue);
        sender.send(Kind::EpochPages, 1, 0, vec![0; 9000]).expect("room");
        assert_eq!(
            sender.try_send(Kind::EpochPages, 2, 0, vec![0; 9000]),
            Err(SendRefused::Full)
        );
        let waiting = {
            let sender = sender.clone();
            std::thread::spawn(move || sender.send(Kind::EpochPages, 2, 0, vec![0; 9000]))
        };
        assert_eq!(queue.pop().map(|frame| frame.epoch), Some(1));
        waiting.join().expect("no panic").expect("room was made");
        assert_eq!(queue.pop().map(|frame| frame.epoch), Some(2));
        sender.send(Kind::Input, 1, 0, vec![0; 3000]).expect("room");
        assert_eq!(sender.send(Kind::Input, 1, 0, vec![0; 3000]), Err(SendRefused::Full));
        assert_eq!(
            sender.send(Kind::Control, 1, 0, vec![0; 5000]),
            Err(SendRefused::TooLong)
        );
    }

    #[test]
    fn who_waits_when_the_link_goes_down_is_told() {
        let queue = queue(100);
        let sender = sender(&queue);
        sender
            .send(Kind::EpochPages, 1, 0, vec![0; 9000])
            .expect("one frame always fits");
        let waiting = {
            let sender = sender.clone();
            std::thread::spawn(move || {
                (
                    sender.send(Kind::EpochPages, 2, 0, vec![0; 10]),
                    sender.wait_sent(Class::Epoch),
                )
            })
        };
        sender.close("test");
        assert_eq!(
            waiting.join().expect("no panic"),
            (Err(SendRefused::Down), Err(SendRefused::Down))
        );
        assert!(matches!(queue.close_reason(), Some(DownReason::ClosedHere(_))));
        queue.shut();
        assert!(queue.is_empty());
        assert_eq!(sender.send(Kind::Control, 1, 0, vec![]), Err(SendRefused::Down));
    }

    #[test]
    fn control_that_piles_up_closes_the_link() {
        let queue = queue(100);
        let sender = sender(&queue);
        let refused = (0..100).find_map(|_| sender.send(Kind::Control, 0, 0, vec![0; 500]).err());
        assert_eq!(refused, Some(SendRefused::Full));
        assert!(queue.close_reason().is_some());
    }
}
