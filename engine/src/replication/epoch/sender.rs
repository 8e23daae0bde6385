//! The active's side: an epoch becomes frames.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_protocol::wire::Kind;

use super::wire::{self, Begin, End, PAYLOAD_TARGET_BYTES, PayloadError, SEQUENCE_BYTES};
use super::{DiskChange, PortData};
use crate::replication::pages::{ChunkSink, CopiedPages, EncodeError, PageEncoder, PageSource, PageStats, SinkClosed};

/// Where frames go: the link, or a test.
pub trait FrameSink: Send + Sync {
    /// Queues a frame. Blocks while the queue is full; an error means that the connection is down.
    fn frame(&self, kind: Kind, epoch: u64, payload: Vec<u8>) -> Result<(), SinkClosed>;

    /// Bulk frames (resync) queued so far on this connection: an epoch that builds on them tells the receiver, which
    /// checks that it has had as many.
    fn bulk_frames(&self) -> u64;

    /// Waits until every bulk frame was handed to the connection: what is queued then, of any class, comes behind
    /// them.
    fn wait_bulk_sent(&self) -> Result<(), SinkClosed>;
}

/// Everything of an epoch but pages that were sent before its end, as taken while the guest was paused.
#[derive(Debug, Default)]
pub struct SealedEpoch {
    /// Its number.
    pub epoch: u64,
    /// The epoch that the standby has when it applies this one; `None` if this one completes a resync.
    pub base: Option<u64>,
    /// All output up to this epoch has left.
    pub released_through: u64,
    /// Copies of the pages that are left to send.
    pub pages: Arc<CopiedPages>,
    /// vCPU and device state.
    pub state: Vec<u8>,
    /// Completed changes of disks, in the order of completion.
    pub disk: Vec<DiskChange>,
    /// What left at the guest's ports, in that order.
    pub outputs: Vec<PortData>,
    /// A guest's flush completed in this epoch: the standby journals durably before it acknowledges.
    pub contains_flush: bool,
}

/// What an epoch took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EpochStats {
    /// Pages by kind.
    pub pages: PageStats,
    /// Payload bytes of all its frames.
    pub payload_bytes: u64,
    /// Frames.
    pub frames: u64,
    /// From the begin to the end being queued.
    pub send_time: Duration,
}

/// Numbering and checksum of the epoch that is being sent. Locked for as long as a frame is queued, so that the
/// numbers are in the order of the stream.
#[derive(Default)]
struct Stream {
    epoch: u64,
    sequence: u32,
    payload_bytes: u64,
    checksum: crc32fast::Hasher,
}

/// Numbers the payloads of one epoch, or of one resync, and queues them in that order.
pub(in crate::replication) struct NumberedStream {
    sink: Arc<dyn FrameSink>,
    stream: Mutex<Stream>,
}

/// What went through a stream so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::replication) struct StreamTotals {
    pub frames: u64,
    pub payload_bytes: u64,
    pub checksum: u32,
}

impl NumberedStream {
    pub fn new(sink: Arc<dyn FrameSink>) -> Self {
        Self {
            sink,
            stream: Mutex::default(),
        }
    }

    /// Begins again at number 0.
    pub fn restart(&self, epoch: u64) {
        *self.stream() = Stream {
            epoch,
            ..Stream::default()
        };
    }

    pub fn totals(&self) -> StreamTotals {
        let stream = self.stream();
        StreamTotals {
            frames: u64::from(stream.sequence),
            payload_bytes: stream.payload_bytes,
            checksum: stream.checksum.clone().finalize(),
        }
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers a payload that begins with room for it, and queues it.
    pub fn send(&self, kind: Kind, mut payload: Vec<u8>) -> Result<(), SinkClosed> {
        let mut stream = self.stream();
        payload[..SEQUENCE_BYTES].copy_from_slice(&stream.sequence.to_le_bytes());
        stream.sequence += 1;
        stream.payload_bytes += payload.len() as u64;
        stream.checksum.update(&payload);
        self.sink.frame(kind, stream.epoch, payload)
    }
}

impl ChunkSink for NumberedStream {
    fn chunk(&self, payload: Vec<u8>) -> Result<(), SinkClosed> {
        self.send(Kind::EpochPages, payload)
    }
}

/// Why an epoch could not be sent. It has to be taken as not received: its dirty pages are dirty again.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Pages could not be encoded or the link is down.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The link is down.
    #[error("epoch not sent: {0}")]
    Closed(#[from] SinkClosed),
    /// Begin or end could not be encoded; a defect.
    #[error("epoch not sent: {0}")]
    Payload(#[from] PayloadError),
}

/// Sends epochs, one after another, from one thread.
pub struct EpochSender {
    stream: Arc<NumberedStream>,
    encoder: PageEncoder,
    begun: Option<(u64, Instant)>,
    pages: PageStats,
}

impl EpochSender {
    /// A sender into `sink` whose receiver starts with a resync.
    pub fn new(sink: Arc<dyn FrameSink>, encoder: PageEncoder) -> Self {
        Self {
            stream: Arc::new(NumberedStream::new(sink)),
            encoder,
            begun: None,
            pages: PageStats::default(),
        }
    }

    /// Begins an epoch, if [`Self::pages`] is to send some of it before it is sealed.
    pub fn begin(&mut self, epoch: u64, base: Option<u64>, released_through: u64) -> Result<(), SendError> {
        self.stream.restart(epoch);
        self.pages = PageStats::default();
        self.begun = Some((epoch, Instant::now()));
        let begin = Begin {
            base,
            fence: self.stream.sink.bulk_frames(),
            released_through,
        };
        self.guarded(|sender| {
            Ok(sender
                .stream
                .send(Kind::EpochBegin, wire::sequenced(0, &begin, "EpochBegin")?)?)
        })
    }

    /// Sends pages of the epoch that was begun. Pages that change after this have to be sent again before it ends.
    pub fn pages(&mut self, source: Arc<dyn PageSource>) -> Result<PageStats, SendError> {
        self.guarded(|sender| {
            let stats = sender.encoder.encode(source, sender.stream.clone())?;
            sender.pages.add(&stats);
            Ok(stats)
        })
    }

    /// Sends what is left and ends the epoch; begins it first if that was not done. Returns when the last frame is
    /// queued.
    pub fn finish(&mut self, sealed: &SealedEpoch) -> Result<EpochStats, SendError> {
        if self.begun.is_none_or(|(epoch, _)| epoch != sealed.epoch) {
            self.begin(sealed.epoch, sealed.base, sealed.released_through)?;
        }
        self.pages(sealed.pages.clone())?;
        self.guarded(|sender| sender.tail(sealed))
    }

    fn tail(&mut self, sealed: &SealedEpoch) -> Result<EpochStats, SendError> {
        for piece in sealed.state.chunks(PAYLOAD_TARGET_BYTES) {
            let mut payload = Vec::with_capacity(SEQUENCE_BYTES + piece.len());
            payload.resize(SEQUENCE_BYTES, 0);
            payload.extend_from_slice(piece);
            self.stream.send(Kind::EpochState, payload)?;
        }
        wire::encode_disk(&sealed.disk, SEQUENCE_BYTES, |payload| {
            self.stream.send(Kind::EpochDisk, payload)
        })?;
        wire::encode_ports(&sealed.outputs, SEQUENCE_BYTES, |payload| {
            self.stream.send(Kind::EpochOutput, payload)
        })?;
        let totals = self.stream.totals();
        let end = End {
            pages: self.pages.pages - self.pages.unchanged,
            state_bytes: sealed.state.len() as u64,
            disk_changes: sealed.disk.iter().map(wire::disk_records).sum(),
            outputs: sealed.outputs.iter().map(wire::port_records).sum(),
            contains_flush: sealed.contains_flush,
            payload_bytes: totals.payload_bytes,
            checksum: totals.checksum,
        };
        self.stream
            .send(Kind::EpochEnd, wire::sequenced(0, &end, "EpochEnd")?)?;
        let send_time = self.begun.take().map_or(Duration::ZERO, |(_, begun)| begun.elapsed());
        Ok(EpochStats {
            pages: self.pages,
            payload_bytes: totals.payload_bytes,
            frames: totals.frames + 1,
            send_time,
        })
    }

    /// Runs a step; if it fails, the receiver's memory is unknown and the epoch is over.
    fn guarded<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T, SendError>) -> Result<T, SendError> {
        let result = step(self);
        if result.is_err() {
            self.reset();
        }
        result
    }

    /// Forgets what the receiver has and the epoch that was begun: after a lost connection, and before a resync.
    pub fn reset(&mut self) {
        self.encoder.reset();
        self.begun = None;
    }

    /// Where frames go, for a resync over the same connection.
    pub(in crate::replication) fn sink(&self) -> Arc<dyn FrameSink> {
        self.stream.sink.clone()
    }

    /// The encoder, for a resync over the same connection.
    pub fn encoder(&mut self) -> &mut PageEncoder {
        &mut self.encoder
    }
}
