//! The active's side of a resync.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ftvm_protocol::wire::Kind;

use super::window::{ResyncWindow, ZEROES_MAX_BYTES};
use super::{Begin, DISK_CHANGES, DISK_COPY, DISK_PREFIX_BYTES, End, Plan, ResyncError};
use crate::kvm::CpuBaseline;
use crate::replication::buffers;
use crate::replication::changed::{Grains, Holds, Unknown};
use crate::replication::epoch::{DiskChange, EpochSender, NumberedStream, wire};
use crate::replication::memory::{PAGE_SIZE, PageMemory};
use crate::replication::pages::{ChunkSink, EncodeError, LivePages, PageStats, SinkClosed};
use crate::replication::storage::Storage;

/// Disks are copied in blocks of this size.
const BLOCK_BYTES: u64 = 256 * 1024;
/// Memory is copied in pieces of this many pages; between them disk changes are sent. No chunk has more than a piece, so zeroes, which
/// take no room in one, are confirmed as often as other pages.
const PIECE_PAGES: usize = 4096;

/// How far a resync is; shared with whoever shows it.
#[derive(Debug, Default)]
pub struct ResyncProgress {
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
}

impl ResyncProgress {
    /// Bytes of memory and disks in all; 0 before a resync begins.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of memory and disks that were read, encoded and queued.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    /// Percent of the first copy that is done, 99 at most; `None` while no resync runs.
    pub fn percent(&self) -> Option<u8> {
        let (done, total) = (self.done_bytes(), self.total_bytes());
        (total > 0).then(|| (u128::from(done) * 100 / u128::from(total)).min(99) as u8)
    }

    fn begin(&self, total_bytes: u64) {
        self.done_bytes.store(0, Ordering::Relaxed);
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    fn add(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn end(&self) {
        self.total_bytes.store(0, Ordering::Relaxed);
    }
}

/// What a resync took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResyncStats {
    /// Pages by kind.
    pub pages: PageStats,
    /// Bytes of disks copied, zeroes included.
    pub disk_bytes: u64,
    /// Bytes of disks that were not copied, because the other side has them.
    pub spared_bytes: u64,
    /// Times that pages were sent again, before the end.
    pub passes: u64,
    /// Pages sent again.
    pub again_pages: u64,
    /// Changes that completed meanwhile and were sent behind.
    pub disk_changes: u64,
    /// Payload bytes of all frames.
    pub payload_bytes: u64,
    /// From begin to end.
    pub time: Duration,
}

impl ResyncStats {
    /// Bytes of memory and disks copied, zeroes and pages sent again included.
    pub fn copied_bytes(&self) -> u64 {
        self.pages.pages * PAGE_SIZE as u64 + self.disk_bytes
    }

    /// Bytes of memory and disks copied in a second.
    pub fn bytes_per_second(&self) -> f64 {
        self.copied_bytes() as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

type Feed = Box<dyn FnMut() -> Vec<DiskChange> + Send>;
type Changed = Box<dyn FnOnce(Option<Holds>) -> Result<Vec<Grains>, Unknown> + Send>;

/// Copies a running machine.
pub struct ResyncSource {
    memory: Arc<dyn PageMemory>,
    cpu: CpuBaseline,
    mtus: Vec<u16>,
    volumes: Vec<Arc<dyn Storage>>,
    changes: Feed,
    changed: Option<Changed>,
    confirms_work: bool,
    window: Arc<ResyncWindow>,
    progress: Arc<ResyncProgress>,
}

impl ResyncSource {
    /// All of `memory` and `volumes` of a guest that sees `cpu` and was told `mtus`. `changes` gives the disk changes that completed since it was asked last, in
    /// order; recording began before this is made. Dirty tracking of memory began before, too.
    pub fn new(
        memory: Arc<dyn PageMemory>,
        cpu: CpuBaseline,
        mtus: Vec<u16>,
        volumes: Vec<Arc<dyn Storage>>,
        changes: impl FnMut() -> Vec<DiskChange> + Send + 'static,
    ) -> Self {
        Self {
            memory,
            cpu,
            mtus,
            volumes,
            changes: Box::new(changes),
            changed: None,
            confirms_work: false,
            window: Arc::default(),
            progress: Arc::default(),
        }
    }

    /// Asks the other side what its disks hold, and copies what `changed` says may differ from that, if it can say. It is called
    /// after recording began.
    #[must_use]
    pub fn asking(
        mut self,
        changed: impl FnOnce(Option<Holds>) -> Result<Vec<Grains>, Unknown> + Send + 'static,
    ) -> Self {
        self.changed = Some(Box::new(changed));
        self
    }

    /// Whether the other side confirms what it has written or zeroed, too, and not only what came. Then no more of that is under way than it
    /// does in a moment; otherwise the join checkpoint may come far ahead of the zeroes before it.
    #[must_use]
    pub fn with_work_confirmed(mut self, confirms_work: bool) -> Self {
        self.confirms_work = confirms_work;
        self
    }

    /// How far it is. Each resync has its own: one that was given up may still run for a moment beside its successor.
    pub fn progress(&self) -> Arc<ResyncProgress> {
        self.progress.clone()
    }

    /// Where `Credit` frames of the session go; without them the resync stalls after a few megabytes.
    pub fn window(&self) -> Arc<ResyncWindow> {
        self.window.clone()
    }

    /// Copies everything once through `sender`'s encoder and connection. What the guest writes meanwhile is sent by
    /// [`Resync::pass`].
    pub fn copy(mut self, sender: &mut EpochSender) -> Result<Resync, ResyncError> {
        let begun = Instant::now();
        sender.reset();
        let disk_bytes: Vec<u64> = self.volumes.iter().map(|volume| volume.size_bytes()).collect();
        let page_count = self.memory.page_count();
        let all_bytes: u64 = disk_bytes.iter().sum();
        let memory_bytes = u64::from(page_count) * PAGE_SIZE as u64;
        self.progress.begin(memory_bytes + all_bytes);
        let bulk = Arc::new(Bulk::new(sender, self.window.clone(), self.confirms_work));
        let begin = wire::sequenced(
            0,
            &Begin {
                page_count,
                disk_bytes: disk_bytes.clone(),
                cpu: self.cpu.clone(),
                mtus: self.mtus.clone(),
            },
            "ResyncBegin",
        )?;
        bulk.send(Kind::ResyncBegin, begin)?;
        let changed = match self.changed.take() {
            Some(changed) => self.plan(changed, &bulk)?,
            None => None,
        };
        let copied_bytes = changed
            .as_ref()
            .map_or(all_bytes, |disks| disks.iter().map(Grains::bytes).sum());
        self.progress.begin(memory_bytes + copied_bytes);
        let mut resync = Resync {
            source: self,
            bulk,
            begun,
            stats: ResyncStats {
                disk_bytes: copied_bytes,
                spared_bytes: all_bytes - copied_bytes,
                ..ResyncStats::default()
            },
        };
        for (size, disk) in disk_bytes.into_iter().zip(0u16..) {
            let extents: Box<dyn Iterator<Item = Range<u64>>> = match &changed {
                Some(disks) => Box::new(disks[usize::from(disk)].extents()),
                None => Box::new(std::iter::once(0..size)),
            };
            for extent in extents {
                resync.stats.disk_changes += resync.source.copy_blocks(disk, extent, &resync.bulk)?;
            }
        }
        resync.send_pages(sender, (0..page_count).collect())?;
        Ok(resync)
    }

    /// What to copy of disks that hold what the other side says, if that is known; tells the other side.
    fn plan(&self, changed: Changed, bulk: &Bulk) -> Result<Option<Vec<Grains>>, ResyncError> {
        let grains = match changed(self.window.wait_told()?) {
            Ok(grains) => Some(grains),
            Err(why) => {
                tracing::info!("the other side's disks are copied whole: {why}");
                None
            }
        };
        let bytes = |disks: &Vec<Grains>| disks.iter().map(Grains::bytes).collect();
        let plan = Plan {
            changed_bytes: grains.as_ref().map(bytes),
        };
        bulk.send(Kind::ResyncPlan, wire::sequenced(0, &plan, "ResyncPlan")?)?;
        Ok(grains)
    }

    fn copy_blocks(&mut self, disk: u16, extent: Range<u64>, bulk: &Bulk) -> Result<u64, ResyncError> {
        let volume = self.volumes[usize::from(disk)].clone();
        let (mut offset, size) = (extent.start, extent.end);
        let mut block = vec![0; BLOCK_BYTES.min(size - offset) as usize];
        let mut sent = 0;
        // Runs of zeroes are gathered: most of many disks.
        let mut zeroes = 0;
        while offset < size {
            let len = BLOCK_BYTES.min(size - offset);
            let bytes = &mut block[..len as usize];
            volume
                .read_at(offset, bytes)
                .map_err(|error| ResyncError::Read { disk, offset, error })?;
            let zero = is_zero(bytes);
            if zero {
                zeroes += len;
            }
            let mut copy = Vec::new();
            let changes = (self.changes)();
            let flush_zeroes = !zero || !changes.is_empty() || offset + len == size || zeroes >= ZEROES_MAX_BYTES;
            if zeroes > 0 && flush_zeroes {
                let end = if zero { offset + len } else { offset };
                copy.push(DiskChange::zeroed(disk, end - zeroes, zeroes));
                zeroes = 0;
            }
            if !zero {
                copy.push(DiskChange::written(disk, offset, bytes));
            }
            bulk.disk(DISK_COPY, &copy)?;
            bulk.worked(copy.iter().map(DiskChange::len).sum())?;
            // Only now: what completed after the block was read has to come behind it.
            bulk.disk(DISK_CHANGES, &changes)?;
            sent += changes.len() as u64;
            offset += len;
            self.progress.add(len);
        }
        Ok(sent)
    }

    fn send_changes(&mut self, bulk: &Bulk) -> Result<u64, ResyncError> {
        let changes = (self.changes)();
        bulk.disk(DISK_CHANGES, &changes)?;
        Ok(changes.len() as u64)
    }
}

/// A resync whose first copy is sent.
pub struct Resync {
    source: ResyncSource,
    bulk: Arc<Bulk>,
    begun: Instant,
    stats: ResyncStats,
}

impl Resync {
    /// Sends pages again that were written since they were sent, and what changed on the disks. The other side puts them
    /// into its memory at once: it is of no use before the join checkpoint anyway. The pages are write-protected again
    /// before this is called, so that what is written from then on is found again.
    pub fn pass(&mut self, sender: &mut EpochSender, pages: Vec<u32>) -> Result<(), ResyncError> {
        self.stats.passes += 1;
        self.stats.again_pages += pages.len() as u64;
        self.send_pages(sender, pages)
    }

    /// Ends the resync; returns when the last frame was handed to the connection. The join checkpoint comes next, with
    /// what was written and changed since.
    pub fn end(mut self, sender: &mut EpochSender) -> Result<ResyncStats, ResyncError> {
        let totals = self.bulk.stream.totals();
        self.stats.payload_bytes = totals.payload_bytes;
        let end = End {
            payload_bytes: totals.payload_bytes,
            checksum: totals.checksum,
        };
        self.bulk
            .send(Kind::ResyncEnd, wire::sequenced(0, &end, "ResyncEnd")?)?;
        sender.sink().wait_bulk_sent()?;
        buffers::forget();
        self.stats.time = self.begun.elapsed();
        Ok(self.stats)
    }

    fn send_pages(&mut self, sender: &mut EpochSender, pages: Vec<u32>) -> Result<(), ResyncError> {
        for piece in pages.chunks(PIECE_PAGES) {
            let source = Arc::new(LivePages::new(self.source.memory.clone(), piece.to_vec()));
            let encoded = sender.encoder().copy(source, self.bulk.clone());
            self.stats.pages.add(&encoded.map_err(|error| self.bulk.why(error))?);
            let bytes = piece.len() as u64 * PAGE_SIZE as u64;
            self.bulk.worked(bytes)?;
            self.stats.disk_changes += self.source.send_changes(&self.bulk)?;
            self.source.progress.add(bytes);
        }
        Ok(())
    }
}

impl Drop for ResyncSource {
    fn drop(&mut self) {
        self.progress.end();
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(4096)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Bulk frames, numbered and within the window.
struct Bulk {
    stream: NumberedStream,
    window: Arc<ResyncWindow>,
    confirms_work: bool,
    /// Why the window refused, for the encoder's caller: the encoder itself only knows that its sink is closed.
    refused: Mutex<Option<ResyncError>>,
}

impl Bulk {
    fn new(sender: &EpochSender, window: Arc<ResyncWindow>, confirms_work: bool) -> Self {
        Self {
            stream: NumberedStream::new(sender.sink()),
            window,
            confirms_work,
            refused: Mutex::default(),
        }
    }

    fn send(&self, kind: Kind, payload: Vec<u8>) -> Result<(), ResyncError> {
        self.window.take(payload.len() as u64)?;
        Ok(self.stream.send(kind, payload)?)
    }

    fn disk(&self, what: u8, changes: &[DiskChange]) -> Result<(), ResyncError> {
        wire::encode_disk(changes, DISK_PREFIX_BYTES, |mut payload| {
            payload[DISK_PREFIX_BYTES - 1] = what;
            self.send(Kind::ResyncDisk, payload)
        })
    }

    /// What was sent since this was called last brings so many bytes of memory or of a disk's copy.
    fn worked(&self, bytes: u64) -> Result<(), ResyncError> {
        if self.confirms_work {
            self.window.worked(bytes)
        } else {
            Ok(())
        }
    }

    fn why(&self, error: EncodeError) -> ResyncError {
        self.refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .unwrap_or(error.into())
    }
}

impl ChunkSink for Bulk {
    fn chunk(&self, payload: Vec<u8>) -> Result<(), SinkClosed> {
        self.send(Kind::ResyncMemory, payload).map_err(|error| {
            *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            SinkClosed
        })
    }
}
