//! Encodes sets of pages with several threads.
//!
//! Pages are dealt to shards by number; a shard owns its part of the delta cache and is worked on by one thread at a
//! time, so there is no shared cache to lock page by page. A page always belongs to the same shard, and a call
//! returns when all its chunks were handed to the sink: so chunks of one page are in order, whatever the threads do.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::cache::PageCache;
use super::codec::{Coded, Compression, PageCoder, PageKind, PageStats, RECORD_HEADER_BYTES};
use super::{CHUNK_HEADER_BYTES, CHUNK_MAX_BYTES, CHUNK_TARGET_BYTES};
use crate::replication::buffers;
use crate::replication::memory::{PAGE_SIZE, Page, PageMemory};

/// Neighbouring pages that go to the same shard: 256 KiB.
const STRIPE_PAGES: u32 = 64;
/// Sets up to this size are encoded by the caller: waking a thread takes longer.
const INLINE_PAGES: usize = 64;
/// More threads than this gain nothing before the link is full.
const WORKERS_MAX: usize = 16;

/// A set of pages to encode, best in ascending order: a page below the one before it begins a new chunk. A page that
/// is in the set twice is sent twice.
pub trait PageSource: Send + Sync {
    /// Number of pages in the set.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Page number of the `index`th.
    fn page(&self, index: usize) -> u32;
    /// Contents of the `index`th, by way of `scratch` if it has to be copied.
    fn contents<'a>(&'a self, index: usize, scratch: &'a mut Page) -> &'a Page;
}

/// Copies of pages, taken while the guest was paused.
#[derive(Debug, Default)]
pub struct CopiedPages {
    numbers: Vec<u32>,
    contents: Vec<Page>,
}

impl CopiedPages {
    /// Room for `pages` pages; more are taken by growing.
    pub fn with_capacity(pages: usize) -> Self {
        Self {
            numbers: Vec::with_capacity(pages),
            contents: Vec::with_capacity(pages),
        }
    }

    /// Copies one page out of guest memory.
    pub fn copy_from(&mut self, memory: &dyn PageMemory, page: u32) {
        self.numbers.push(page);
        self.contents.push([0; PAGE_SIZE]);
        if let Some(into) = self.contents.last_mut() {
            memory.read_page(page, into);
        }
    }

    /// Adds a page that was copied elsewhere.
    pub fn push(&mut self, page: u32, contents: &Page) {
        self.numbers.push(page);
        self.contents.push(*contents);
    }

    /// Forgets the pages, keeps the room.
    pub fn clear(&mut self) {
        self.numbers.clear();
        self.contents.clear();
    }

    /// The pages, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Page)> {
        self.numbers.iter().copied().zip(&self.contents)
    }

    /// The page numbers, in the order in which they were added.
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }
}

impl PageSource for CopiedPages {
    fn len(&self) -> usize {
        self.numbers.len()
    }
    fn page(&self, index: usize) -> u32 {
        self.numbers[index]
    }
    fn contents<'a>(&'a self, index: usize, _scratch: &'a mut Page) -> &'a Page {
        &self.contents[index]
    }
}

/// Pages read from memory when their turn comes, for copying while the guest runs. A page that the guest writes
/// meanwhile has to be sent again: collect the dirty pages after this set was taken from them.
pub struct LivePages {
    memory: Arc<dyn PageMemory>,
    numbers: Vec<u32>,
}

impl LivePages {
    /// The pages `numbers` of `memory`.
    pub fn new(memory: Arc<dyn PageMemory>, numbers: Vec<u32>) -> Self {
        Self { memory, numbers }
    }
}

impl PageSource for LivePages {
    fn len(&self) -> usize {
        self.numbers.len()
    }
    fn page(&self, index: usize) -> u32 {
        self.numbers[index]
    }
    fn contents<'a>(&'a self, index: usize, scratch: &'a mut Page) -> &'a Page {
        self.memory.read_page(self.numbers[index], scratch);
        scratch
    }
}

/// Nobody takes chunks any more: the connection is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the link is down, nothing more can be sent")]
pub struct SinkClosed;

/// Where finished chunks go. Called by several threads; the order of the calls is the order of the stream. May block:
/// that is how a slow link slows down the encoder.
pub trait ChunkSink: Send + Sync {
    /// Takes a chunk; its first [`CHUNK_HEADER_BYTES`] start with room for a sequence number.
    fn chunk(&self, payload: Vec<u8>) -> Result<(), SinkClosed>;
}

impl<F: Fn(Vec<u8>) -> Result<(), SinkClosed> + Send + Sync> ChunkSink for F {
    fn chunk(&self, payload: Vec<u8>) -> Result<(), SinkClosed> {
        self(payload)
    }
}

/// Size of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderConfig {
    /// Threads that encode, the caller's included: 1 to 16.
    pub workers: usize,
    /// Bytes for the last sent versions of pages, all threads together; 0 sends every page without a delta.
    pub cache_bytes: usize,
    /// What to do with pages that changed a lot.
    pub compression: Compression,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        Self {
            workers: 2,
            cache_bytes: 64 << 20,
            compression: Compression::default(),
        }
    }
}

/// Why pages could not be encoded. The cache was emptied: what the receiver has is unknown.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The sink refused a chunk.
    #[error("pages not sent: {0}")]
    Closed(#[from] SinkClosed),
    /// A thread of the pool ended; a defect.
    #[error("an encoder thread ended before its work was done; the engine has a defect, its log names the panic")]
    WorkerGone,
    /// A thread could not be started.
    #[error("can't start an encoder thread: {0}; is the pod's limit of processes reached?")]
    Spawn(#[source] std::io::Error),
}

/// One part of the pages: its cache and its working memory.
struct Shard {
    cache: PageCache,
    coder: PageCoder,
    scratch: Box<Page>,
}

impl Shard {
    fn encode(&mut self, work: &Work, shard: u32) -> Result<PageStats, SinkClosed> {
        let mut stats = PageStats::default();
        let mut chunk = ChunkBuilder::default();
        self.cache.advance();
        for index in 0..work.source.len() {
            let page = work.source.page(index);
            if shard_of(page, work.shards) != shard {
                continue;
            }
            stats.pages += 1;
            let contents = work.source.contents(index, &mut self.scratch);
            let base = if work.remember { self.cache.find(page) } else { None };
            match self.coder.code(contents, base) {
                Coded::Unchanged => {
                    stats.unchanged += 1;
                    continue;
                }
                Coded::Zero => {
                    stats.zero += 1;
                    chunk.zero(page, work, &mut stats)?;
                    self.cache.remove(page);
                    continue;
                }
                Coded::Data(kind, data) => {
                    *stats.of(kind) += 1;
                    chunk.data(page, kind, data, work, &mut stats)?;
                }
            }
            if work.remember {
                self.cache.store(page, contents);
            } else {
                self.cache.remove(page);
            }
        }
        chunk.close(work, &mut stats)?;
        Ok(stats)
    }
}

impl PageStats {
    fn of(&mut self, kind: PageKind) -> &mut u64 {
        match kind {
            PageKind::Zero => &mut self.zero,
            PageKind::Raw => &mut self.raw,
            PageKind::Runs => &mut self.runs,
            PageKind::Compressed => &mut self.compressed,
            PageKind::CompressedXor => &mut self.compressed_xor,
        }
    }
}

fn shard_of(page: u32, shards: u32) -> u32 {
    (page / STRIPE_PAGES) % shards
}

/// Collects records until a chunk is full.
#[derive(Default)]
struct ChunkBuilder {
    payload: Vec<u8>,
    records: u32,
    /// Where the last record starts and the page after it.
    last: Option<(usize, u32)>,
}

impl ChunkBuilder {
    fn zero(&mut self, page: u32, work: &Work, stats: &mut PageStats) -> Result<(), SinkClosed> {
        if let Some((at, next)) = self.last
            && next == page
            && self.payload[at] == PageKind::Zero as u8
        {
            let count = u16::from_le_bytes([self.payload[at + 5], self.payload[at + 6]]);
            if count < u16::MAX {
                self.payload[at + 5..at + 7].copy_from_slice(&(count + 1).to_le_bytes());
                self.last = Some((at, page + 1));
                return Ok(());
            }
        }
        self.record(page, PageKind::Zero, 1, &[], work, stats)
    }

    fn data(
        &mut self,
        page: u32,
        kind: PageKind,
        data: &[u8],
        work: &Work,
        stats: &mut PageStats,
    ) -> Result<(), SinkClosed> {
        self.record(page, kind, data.len() as u16, data, work, stats)
    }

    fn record(
        &mut self,
        page: u32,
        kind: PageKind,
        len: u16,
        data: &[u8],
        work: &Work,
        stats: &mut PageStats,
    ) -> Result<(), SinkClosed> {
        let out_of_order = self.last.is_some_and(|(_, next)| page < next);
        if out_of_order || self.payload.len() >= CHUNK_TARGET_BYTES {
            self.close(work, stats)?;
        }
        if self.payload.is_empty() {
            let room = (work.source.len() * (PAGE_SIZE + RECORD_HEADER_BYTES)).min(CHUNK_MAX_BYTES);
            self.payload = buffers::take(CHUNK_HEADER_BYTES + room);
            self.payload.resize(CHUNK_HEADER_BYTES, 0);
        }
        self.last = Some((self.payload.len(), page + 1));
        self.records += 1;
        self.payload.push(kind as u8);
        self.payload.extend_from_slice(&page.to_le_bytes());
        self.payload.extend_from_slice(&len.to_le_bytes());
        self.payload.extend_from_slice(data);
        Ok(())
    }

    fn close(&mut self, work: &Work, stats: &mut PageStats) -> Result<(), SinkClosed> {
        self.last = None;
        let records = std::mem::take(&mut self.records);
        if records == 0 {
            return Ok(());
        }
        let mut payload = std::mem::take(&mut self.payload);
        payload[4..8].copy_from_slice(&records.to_le_bytes());
        if payload.len() < payload.capacity() / 2 {
            payload.shrink_to_fit();
        }
        stats.encoded_bytes += payload.len() as u64;
        work.sink.chunk(payload)
    }
}

/// What all threads of one call share.
#[derive(Clone)]
struct Work {
    source: Arc<dyn PageSource>,
    sink: Arc<dyn ChunkSink>,
    shards: u32,
    /// Keep what is sent, so that the next version can be sent as a difference.
    remember: bool,
}

struct Job {
    work: Work,
    done: Sender<Result<PageStats, SinkClosed>>,
}

struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// The encoder: threads, and what was sent last. One caller at a time.
pub struct PageEncoder {
    shards: Vec<Arc<Mutex<Shard>>>,
    workers: Vec<Worker>,
}

impl PageEncoder {
    /// Starts `config.workers - 1` threads; the caller of [`Self::encode`] is the other one.
    pub fn new(config: EncoderConfig) -> Result<Self, EncodeError> {
        let count = config.workers.clamp(1, WORKERS_MAX);
        let shards: Vec<_> = (0..count)
            .map(|_| {
                Arc::new(Mutex::new(Shard {
                    cache: PageCache::new(config.cache_bytes / count),
                    coder: PageCoder::new(config.compression),
                    scratch: Box::new([0; PAGE_SIZE]),
                }))
            })
            .collect();
        let mut encoder = Self {
            shards,
            workers: Vec::new(),
        };
        for number in 1..count {
            let shard = encoder.shards[number].clone();
            let (jobs, incoming) = channel();
            let thread = std::thread::Builder::new()
                .name(format!("encoder-{number}"))
                .spawn(move || work_on(number as u32, &shard, &incoming))
                .map_err(EncodeError::Spawn)?;
            encoder.workers.push(Worker {
                jobs: Some(jobs),
                thread: Some(thread),
            });
        }
        Ok(encoder)
    }

    /// Encodes the pages of `source`, hands the chunks to `sink` and returns when the last one was taken. After an
    /// error the cache is empty and the receiver needs every page that it may lack.
    pub fn encode(&mut self, source: Arc<dyn PageSource>, sink: Arc<dyn ChunkSink>) -> Result<PageStats, EncodeError> {
        self.encode_set(source, sink, true)
    }

    /// The same for a copy of all of memory: most of it is not sent again soon, so nothing is remembered.
    pub fn copy(&mut self, source: Arc<dyn PageSource>, sink: Arc<dyn ChunkSink>) -> Result<PageStats, EncodeError> {
        self.encode_set(source, sink, false)
    }

    fn encode_set(
        &mut self,
        source: Arc<dyn PageSource>,
        sink: Arc<dyn ChunkSink>,
        remember: bool,
    ) -> Result<PageStats, EncodeError> {
        let inline = source.len() <= INLINE_PAGES;
        let work = Work {
            source,
            sink,
            shards: self.shards.len() as u32,
            remember,
        };
        let result = if inline {
            self.encode_here(&work)
        } else {
            self.encode_with_workers(work)
        };
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn encode_here(&self, work: &Work) -> Result<PageStats, EncodeError> {
        let mut stats = PageStats::default();
        for (number, shard) in self.shards.iter().enumerate() {
            stats.add(&lock(shard).encode(work, number as u32)?);
        }
        Ok(stats)
    }

    fn encode_with_workers(&self, work: Work) -> Result<PageStats, EncodeError> {
        let (done, results) = channel();
        for worker in &self.workers {
            let job = Job {
                work: work.clone(),
                done: done.clone(),
            };
            let sent = worker.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
            if !sent {
                return Err(EncodeError::WorkerGone);
            }
        }
        drop(done);
        let mut first = lock(&self.shards[0]).encode(&work, 0);
        drop(work);
        let mut answered = 0;
        // Every job is waited for, also after an error: the source is the caller's again when this returns.
        for result in results {
            answered += 1;
            first = match (first, result) {
                (Ok(mut stats), Ok(more)) => {
                    stats.add(&more);
                    Ok(stats)
                }
                (Err(error), _) | (_, Err(error)) => Err(error),
            };
        }
        if answered != self.workers.len() {
            return Err(EncodeError::WorkerGone);
        }
        Ok(first?)
    }

    /// Forgets what was sent: after a lost connection, and before a resync.
    pub fn reset(&mut self) {
        self.shards.iter().for_each(|shard| lock(shard).cache.clear());
    }

    /// Bytes that the delta cache takes now.
    pub fn cache_bytes(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).cache.bytes()).sum()
    }
}

impl Drop for PageEncoder {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            drop(worker.jobs.take());
            if let Some(thread) = worker.thread.take() {
                // A panic was reported by the thread itself.
                let _ = thread.join();
            }
        }
    }
}

fn work_on(number: u32, shard: &Mutex<Shard>, jobs: &Receiver<Job>) {
    while let Ok(Job { work, done }) = jobs.recv() {
        let result = lock(shard).encode(&work, number);
        drop(work);
        // The caller waits for every answer; if it is gone, so is its interest.
        let _ = done.send(result);
    }
}

/// A poisoned shard belonged to a thread that panicked: its call ended with an error and the cache was emptied.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
