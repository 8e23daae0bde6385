//! The thread of one disk.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::request::{Action, Limits, Request};
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
/// A disk counts as working again when nothing has failed for this long.
const RECOVERED_AFTER: Duration = Duration::from_secs(10);

/// Whether a disk's thread is using its backend right now.
#[derive(Debug, Default)]
pub(crate) struct Executing {
    now: Mutex<bool>,
    ended: Condvar,
}

impl Executing {
    fn set(&self, now: bool) {
        *lock(&self.now) = now;
        self.ended.notify_all();
    }

    /// Waits until the backend is left alone. With the gate closed nothing new begins.
    pub(crate) fn wait_end(&self) {
        let ended = self.ended.wait_while(lock(&self.now), |now| *now);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
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
    /// When the last request failed, unless the recovery was reported since.
    failed_at: Option<Instant>,
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
            failed_at: None,
        }
    }

    /// Tells whether a request is being executed.
    pub(crate) fn executing(&self) -> Arc<Executing> {
        self.executing.clone()
    }

    /// Tells backend and guest about the executed batch.
    fn complete(&mut self, inner: &mut Inner<Blk>, mem: &GuestMem) -> Result<(), QueueError> {
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
            bytes += request.data.len();
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

    /// Reports the first of several failures, and success once nothing has failed for a while.
    fn judge(&mut self, result: Result<(), String>) {
        let disk = self.index;
        match (result, self.failed_at) {
            (Err(message), before) => {
                self.failed_at = Some(Instant::now());
                if before.is_none() {
                    self.events.report(DeviceEvent::DiskError { disk, message });
                }
            }
            (Ok(()), Some(when)) if when.elapsed() >= RECOVERED_AFTER => {
                self.failed_at = None;
                self.events.report(DeviceEvent::DiskRecovered { disk });
            }
            (Ok(()), _) => {}
        }
    }
}

impl Worker for BlkWorker {
    fn inside(&mut self) -> Next {
        let device = self.device.clone();
        let mut inner = device.lock();
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
                self.executing.set(true);
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
            let result = request.execute(self.disk.as_mut(), &self.serial);
            if !matches!(request.action, Action::Refuse(_) | Action::GetId) {
                self.judge(result);
            }
        }
        self.batch = batch;
        self.executing.set(false);
    }
}
