//! The thread of one disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::request::{Action, Limits, Request, Status};
use super::{BATCH_BYTES, Blk, BlkMetrics, SERIAL_BYTES};
use crate::backends::DiskBackend;
use crate::devices::bus::lock;
use crate::devices::event::{DeviceEvent, DeviceEvents};
use crate::devices::virtio::pci_device::{Inner, Life, VirtioDevice};
use crate::devices::virtio::queue::{Chain, QueueError};
use crate::devices::virtio::worker::{Next, Worker};
use crate::memory::GuestMem;

/// A batch is closed when it has this many requests, or [`BATCH_BYTES`].
const BATCH_REQUESTS: usize = 16;
/// Buffers that have grown beyond this are given back to the allocator.
const KEPT_BUFFER_BYTES: usize = 64 << 10;
/// How often it is looked whether what failed is still to be kept from the guest.
const HELD_LOOK_MS: u32 = 50;
/// One look counts no more: after a longer time the gate was closed, or this process did not run.
const HELD_LOOK_MAX: Duration = Duration::from_millis(500);
/// A disk counts as working again when each kind of request that failed is done again so long after it failed last.
const RECOVERED_AFTER: Duration = Duration::from_secs(10);

/// What a request asks of the backend, as far as it fails apart from the others: a file system that turned read-only is still read, and
/// a flush without writes succeeds on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Read,
    Change,
    Flush,
}

impl Kind {
    /// None: the backend is not asked.
    fn of(action: &Action) -> Option<Kind> {
        match action {
            Action::Read { .. } => Some(Kind::Read),
            Action::Write { .. } | Action::Discard(_) | Action::WriteZeroes(_) => Some(Kind::Change),
            Action::Flush => Some(Kind::Flush),
            Action::GetId | Action::Refuse(_) => None,
        }
    }
}

/// What is new about a disk's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    Fails,
    Recovered,
}

/// Whether a disk works, by its requests.
#[derive(Debug, Default)]
struct Health {
    /// When a request of each kind failed last, unless that kind has worked again since.
    failed: BTreeMap<Kind, Instant>,
}

impl Health {
    /// Tells the first of several failures, and success once every kind that failed has worked again after a while.
    fn judge(&mut self, kind: Kind, works: bool, now: Instant) -> Option<News> {
        if !works {
            let first = self.failed.is_empty();
            self.failed.insert(kind, now);
            return first.then_some(News::Fails);
        }
        let failed = *self.failed.get(&kind)?;
        if now.duration_since(failed) < RECOVERED_AFTER {
            return None;
        }
        self.failed.remove(&kind);
        self.failed.is_empty().then_some(News::Recovered)
    }
}

/// What a disk's thread uses its backend for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Using {
    #[default]
    Nothing,
    /// It has taken requests, and the next one has not begun: the epoch may have no room for it.
    Waits,
    /// A request, or one of its ranges, has been under way since then.
    Executes(Instant),
}

/// What a disk's thread uses its backend for right now, for others to see.
#[derive(Debug, Default)]
pub(crate) struct Executing {
    now: Mutex<Using>,
    ended: Condvar,
}

impl Executing {
    fn set(&self, now: Using) {
        *lock(&self.now) = now;
        if now == Using::Nothing {
            self.ended.notify_all();
        }
    }

    /// Since when the request under way has been so; none if there is none.
    pub(crate) fn since(&self) -> Option<Instant> {
        match *lock(&self.now) {
            Using::Executes(since) => Some(since),
            Using::Nothing | Using::Waits => None,
        }
    }

    /// Waits until the backend is left alone, but no longer than `most`. With the gate closed nothing new begins. True: it is.
    pub(crate) fn wait_end(&self, most: Duration) -> bool {
        let uses = |now: &mut Using| *now != Using::Nothing;
        let waited = self.ended.wait_timeout_while(lock(&self.now), most, uses);
        let (now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *now == Using::Nothing
    }
}

/// How long what failed has been kept from the guest, all of it together. Time in which the guest stands still for a hand-over does not
/// count.
#[derive(Debug, Clone, Copy)]
struct Held {
    lasts: Duration,
    /// What `lasts` was when the present batch failed.
    before: Duration,
    looked: Instant,
}

impl Held {
    fn new(now: Instant) -> Self {
        Self {
            lasts: Duration::ZERO,
            before: Duration::ZERO,
            looked: now,
        }
    }

    /// Another batch failed. Nothing was kept from the guest since the one before it.
    fn begin(&mut self, now: Instant) {
        self.before = self.lasts;
        self.looked = now;
    }

    /// How long the present batch has been kept.
    fn batch_lasts(&self) -> Duration {
        self.lasts.saturating_sub(self.before)
    }

    /// Whether it may be kept for longer, if `most` is the longest.
    fn may_last(&mut self, now: Instant, most: Duration) -> bool {
        self.lasts += now.saturating_duration_since(self.looked).min(HELD_LOOK_MAX);
        self.looked = now;
        self.lasts < most
    }
}

/// Executes the requests of one disk.
pub(crate) struct BlkWorker {
    device: Arc<VirtioDevice<Blk>>,
    disk: Box<dyn DiskBackend>,
    events: Arc<dyn DeviceEvents>,
    metrics: Arc<BlkMetrics>,
    index: usize,
    serial: [u8; SERIAL_BYTES],
    limits: Limits,
    /// What is being executed: the requests of `Blk::in_flight`, in the same order.
    batch: Vec<Request>,
    /// The life of the device that `batch` belongs to.
    life: Life,
    executing: Arc<Executing>,
    chain: Chain,
    buffers: Vec<Vec<u8>>,
    health: Health,
    /// What failed while another side may do it, all of it together.
    held: Option<Held>,
    /// `batch` is being kept from the guest, and was counted.
    holding: bool,
}

impl BlkWorker {
    pub(crate) fn new(
        device: Arc<VirtioDevice<Blk>>,
        disk: Box<dyn DiskBackend>,
        events: Arc<dyn DeviceEvents>,
        metrics: Arc<BlkMetrics>,
        index: usize,
    ) -> Self {
        let (serial, limits, life) = {
            let inner = device.lock();
            let limits = Limits {
                size_bytes: inner.frontend.size_bytes,
                read_only: inner.frontend.read_only,
            };
            (inner.frontend.serial, limits, inner.life)
        };
        Self {
            device,
            disk,
            events,
            metrics,
            index,
            serial,
            limits,
            batch: Vec::new(),
            life,
            executing: Arc::default(),
            chain: Chain::default(),
            buffers: Vec::new(),
            health: Health::default(),
            held: None,
            holding: false,
        }
    }

    /// Tells whether a request is being executed.
    pub(crate) fn executing(&self) -> Arc<Executing> {
        self.executing.clone()
    }

    /// Tells backend and guest about the executed batch.
    fn complete(&mut self, inner: &mut Inner<Blk>, mem: &GuestMem) -> Result<(), QueueError> {
        self.holding = false;
        let before = std::mem::replace(&mut self.life, inner.life);
        let same_life = inner.life == before;
        let batch = std::mem::take(&mut self.batch);
        if inner.life.loads == before.loads {
            // What was executed has changed the disk, whether anybody waits for the answer or not.
            batch.iter().for_each(|request| request.report(self.disk.as_mut()));
        }
        if same_life && !batch.is_empty() {
            let heads = std::mem::take(&mut inner.frontend.in_flight);
            if !inner.transport.reset_pending() {
                self.answer_all(inner, mem, &heads, &batch)?;
            }
        }
        batch.iter().for_each(|request| request.count(&self.metrics));
        self.recycle(batch);
        Ok(())
    }

    fn answer_all(
        &mut self,
        inner: &mut Inner<Blk>,
        mem: &GuestMem,
        heads: &[u16],
        batch: &[Request],
    ) -> Result<(), QueueError> {
        for (head, request) in heads.iter().zip(batch) {
            // The descriptors are read again: nothing of the guest's is trusted to have stayed as it was.
            let queue = &mut inner.transport.queues[0];
            queue.walk(mem, *head, &mut self.chain)?;
            if self.chain.writable_len() == 0 {
                return Err(QueueError::Request {
                    head: *head,
                    what: "has lost the room for its status",
                });
            }
            let written = request.answer(&self.chain, mem)?;
            queue.push_used(mem, *head, written)?;
        }
        inner.transport.raise_if_wanted(0, mem)
    }

    /// Fills the batch: with what a loaded state names as in flight, else from the queue. True if there is something.
    fn take(&mut self, inner: &mut Inner<Blk>, mem: &GuestMem) -> Result<bool, QueueError> {
        let queue = &mut inner.transport.queues[0];
        for head in inner.frontend.in_flight.iter() {
            queue.walk(mem, *head, &mut self.chain)?;
            let buffer = self.buffers.pop().unwrap_or_default();
            self.batch.push(Request::parse(&self.chain, mem, self.limits, buffer)?);
        }
        if !self.batch.is_empty() {
            return Ok(true);
        }
        queue.disable_notification(mem)?;
        let mut bytes = 0;
        while self.batch.len() < BATCH_REQUESTS && bytes < BATCH_BYTES {
            if !queue.pop(mem, &mut self.chain)? {
                if self.batch.is_empty() && queue.enable_notification(mem)? {
                    continue;
                }
                break;
            }
            inner.frontend.in_flight.push(self.chain.head);
            let buffer = self.buffers.pop().unwrap_or_default();
            let request = Request::parse(&self.chain, mem, self.limits, buffer)?;
            bytes += request.disk_bytes();
            let ends = request.action == Action::Flush;
            self.batch.push(request);
            if ends {
                // A flush takes long: what came before must not wait for what comes after it.
                break;
            }
        }
        Ok(!self.batch.is_empty())
    }

    fn recycle(&mut self, batch: Vec<Request>) {
        for request in batch {
            let mut buffer = request.data;
            if buffer.capacity() <= KEPT_BUFFER_BYTES && self.buffers.len() < BATCH_REQUESTS {
                buffer.clear();
                self.buffers.push(buffer);
            }
        }
    }

    /// Something failed that a successor may do, who finds it in flight in the state that it loads: neither guest nor backend are told
    /// for now.
    fn holds(&mut self, inner: &Inner<Blk>) -> bool {
        let most = self.disk.held_for();
        if most.is_zero() {
            self.held = None;
            return false;
        }
        let failed =
            |request: &&Request| request.outcome == Some(Status::IoError) && Kind::of(&request.action).is_some();
        let failed = self.batch.iter().filter(failed).count();
        if inner.life != self.life || inner.transport.reset_pending() || failed == 0 {
            return false;
        }
        let now = Instant::now();
        let held = self.held.get_or_insert_with(|| Held::new(now));
        if !self.holding {
            held.begin(now);
        }
        let holds = held.may_last(now, most);
        if holds && !self.holding {
            self.holding = true;
            self.metrics.hold_begins(failed);
        }
        if self.holding {
            self.metrics.hold_lasts(held.batch_lasts());
        }
        holds
    }

    /// Reports what a request says of the disk's health, if that is news.
    fn judge(&mut self, kind: Kind, result: Result<(), String>) {
        let disk = self.index;
        match self.health.judge(kind, result.is_ok(), Instant::now()) {
            Some(News::Fails) => {
                let message = result.err().unwrap_or_default();
                self.events.report(DeviceEvent::DiskError { disk, message });
            }
            Some(News::Recovered) => self.events.report(DeviceEvent::DiskRecovered { disk }),
            None => {}
        }
    }
}

impl Worker for BlkWorker {
    fn inside(&mut self) -> Next {
        let device = self.device.clone();
        let mut inner = device.lock();
        if self.holds(&inner) {
            return Next::WaitFor(HELD_LOOK_MS);
        }
        let mem = device.mem();
        let completed = self.complete(&mut inner, mem);
        if inner.transport.reset_pending() {
            // Nothing is being executed at this point, whatever a loaded state says.
            inner.frontend.in_flight.clear();
            inner.finish_reset();
        }
        let taken = completed.and_then(|()| {
            if inner.transport.active() {
                self.take(&mut inner, mem)
            } else {
                Ok(false)
            }
        });
        match taken {
            Ok(true) => {
                self.executing.set(Using::Waits);
                Next::Outside
            }
            Ok(false) => Next::Wait(None),
            Err(error) => {
                // What was taken stays unanswered: a broken driver gets nothing more until it resets the device.
                let batch = std::mem::take(&mut self.batch);
                self.recycle(batch);
                inner.frontend.in_flight.clear();
                inner.transport.fail(&error);
                Next::Wait(None)
            }
        }
    }

    fn outside(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        for request in &mut batch {
            let kind = Kind::of(&request.action);
            if kind == Some(Kind::Change) {
                self.executing.set(Using::Waits);
                self.disk.wait_for_room();
            }
            let executing = &self.executing;
            let mut begins = || executing.set(Using::Executes(Instant::now()));
            let result = request.execute(self.disk.as_mut(), &self.serial, &mut begins);
            if let Some(kind) = kind {
                self.judge(kind, result);
            }
        }
        self.batch = batch;
        self.executing.set(Using::Nothing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_works_again_once_what_failed_is_done_again() {
        let (mut health, began) = (Health::default(), Instant::now());
        let mut at = |seconds, kind, works| health.judge(kind, works, began + Duration::from_secs(seconds));
        assert_eq!(at(0, Kind::Change, true), None);
        assert_eq!(at(1, Kind::Change, false), Some(News::Fails));
        assert_eq!(at(2, Kind::Change, false), None, "told once");
        // Its file system turned read-only: that it is read, and flushed without writes, proves nothing.
        assert_eq!(at(60, Kind::Read, true), None);
        assert_eq!(at(60, Kind::Flush, true), None);
        assert_eq!(at(60, Kind::Change, true), Some(News::Recovered));
        assert_eq!(at(61, Kind::Flush, false), Some(News::Fails));
        assert_eq!(at(62, Kind::Flush, true), None, "too soon");
        assert_eq!(at(71, Kind::Flush, true), Some(News::Recovered));
    }

    /// A switchover that is refused lets the guest stand still for a while, and so may a busy host.
    #[test]
    fn what_failed_is_kept_from_a_guest_for_a_part_of_the_time_that_it_runs() {
        let (began, most) = (Instant::now(), Duration::from_secs(10));
        let look = Duration::from_millis(u64::from(HELD_LOOK_MS));
        let mut held = Held::new(began);
        let mut now = began;
        for _ in 0..10 {
            now += Duration::from_secs(60);
            assert!(held.may_last(now, most));
        }
        let looks = (most - 10 * HELD_LOOK_MAX).as_millis() / look.as_millis();
        for left in (0..looks).rev() {
            now += look;
            assert_eq!(held.may_last(now, most), left > 0);
        }
    }

    /// The guest gave the first one up, by a reset of the disk.
    #[test]
    fn what_fails_later_is_kept_for_what_is_left_of_the_time() {
        let (began, most, ms) = (Instant::now(), Duration::from_millis(400), Duration::from_millis);
        let mut held = Held::new(began);
        held.begin(began);
        assert!(held.may_last(began + ms(300), most));
        assert_eq!(held.batch_lasts(), ms(300));
        let later = began + Duration::from_secs(60);
        held.begin(later);
        assert!(held.may_last(later, most), "nothing was kept meanwhile");
        assert_eq!(held.batch_lasts(), Duration::ZERO);
        assert!(held.may_last(later + ms(99), most));
        assert_eq!(held.batch_lasts(), ms(99));
        assert!(!held.may_last(later + ms(100), most));
        held.begin(later + ms(200));
        assert!(!held.may_last(later + ms(200), most), "it is over");
    }

    /// A file system turned read-only, and a sector can't be read either: that the sector was mended says nothing of writes.
    #[test]
    fn what_fails_beside_it_hides_no_failure() {
        let (mut health, began) = (Health::default(), Instant::now());
        let mut at = |seconds, kind, works| health.judge(kind, works, began + Duration::from_secs(seconds));
        assert_eq!(at(0, Kind::Change, false), Some(News::Fails));
        assert_eq!(at(1, Kind::Read, false), None, "told once");
        assert_eq!(at(60, Kind::Read, true), None, "writes still fail");
        assert_eq!(at(61, Kind::Change, false), None, "it has not recovered meanwhile");
        assert_eq!(at(62, Kind::Change, true), None, "too soon");
        assert_eq!(at(72, Kind::Change, true), Some(News::Recovered));
    }
}
