//! The standby's side: frames become an epoch, or nothing.

use ftvm_protocol::wire::Kind;

use super::wire::{self, Begin, End, PayloadError, SEQUENCE_BYTES};
use super::{DiskChange, PortData};
use crate::replication::memory::PageMemory;
use crate::replication::pages::{PageChunk, PagesError};

/// What the standby accepts. Everything is fixed by the machine and the configuration, nothing by the peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagingLimits {
    /// Pages of the guest.
    pub page_count: u32,
    /// Sizes of the machine's disks in bytes.
    pub disk_bytes: Vec<u64>,
    /// Network interfaces of the machine.
    pub nics: u16,
    /// Most bytes that one staged epoch may hold. The active's cap on an epoch lies below; whoever acknowledges an
    /// epoch only after the one before it is applied holds two of them at most.
    pub max_epoch_bytes: usize,
}

/// Why frames are no epoch. What was received of it is dropped; the connection that brought it is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EpochError {
    /// Frame of an epoch that was not begun.
    #[error("{kind:?} frame of epoch {epoch} outside an epoch; {}", expected.map_or("none is under way".into(), |epoch: u64| format!("epoch {epoch} is under way")))]
    Unexpected {
        /// Kind of the frame.
        kind: Kind,
        /// Its epoch.
        epoch: u64,
        /// The epoch under way.
        expected: Option<u64>,
    },
    /// Builds on another epoch than the last one received.
    #[error("epoch {epoch} builds on {base:?}, but the last one received is {last:?}")]
    Base {
        /// The epoch.
        epoch: u64,
        /// On what it builds; `None`: on a resync.
        base: Option<u64>,
        /// Last one received completely.
        last: Option<u64>,
    },
    /// An epoch whose number is not above the last.
    #[error("epoch {epoch} comes again or late: {last} was received before")]
    Replayed {
        /// The epoch.
        epoch: u64,
        /// Last one received completely.
        last: u64,
    },
    /// Frame missing, doubled, or out of order.
    #[error(
        "epoch {epoch}: {kind:?} frame has number {found}, {expected} was expected: a frame is missing, doubled or out of order"
    )]
    Sequence {
        /// The epoch.
        epoch: u64,
        /// Kind of the frame.
        kind: Kind,
        /// Its number.
        found: u32,
        /// Number expected.
        expected: u32,
    },
    /// The epoch builds on resync data that did not arrive.
    #[error("epoch {epoch} builds on {announced} bulk frames, {received} arrived")]
    Fence {
        /// The epoch.
        epoch: u64,
        /// Sent, says the peer.
        announced: u64,
        /// Arrived here.
        received: u64,
    },
    /// Larger than the cap.
    #[error("epoch {epoch} holds more than {max} bytes: the active's cap on an epoch must be below the standby's")]
    TooLarge {
        /// The epoch.
        epoch: u64,
        /// Cap in bytes.
        max: usize,
    },
    /// Counts or checksum at the end don't agree with what arrived.
    #[error("epoch {epoch} ends with other counts or another checksum than what arrived: {what}")]
    Disagrees {
        /// The epoch.
        epoch: u64,
        /// Which.
        what: &'static str,
    },
    /// A chunk of pages is malformed.
    #[error("epoch {epoch}: {error}")]
    Pages {
        /// The epoch.
        epoch: u64,
        /// What is wrong.
        #[source]
        error: PagesError,
    },
    /// Another payload is malformed.
    #[error("epoch {epoch}: {error}")]
    Payload {
        /// The epoch.
        epoch: u64,
        /// What is wrong.
        #[source]
        error: PayloadError,
    },
}

/// A complete, checked epoch.
#[derive(Debug)]
pub struct StagedEpoch {
    /// Its number.
    pub epoch: u64,
    /// The epoch on which it builds; `None` if it completes a resync.
    pub base: Option<u64>,
    /// All output up to this epoch has left the active.
    pub released_through: u64,
    /// vCPU and device state.
    pub state: Vec<u8>,
    /// Changes of disks in order; inside the disks and in whole sectors.
    pub disk: Vec<DiskChange>,
    /// What left at the guest's ports.
    pub outputs: Vec<PortData>,
    /// The disk changes must be durable in the journal before the epoch is acknowledged.
    pub contains_flush: bool,
    chunks: Vec<PageChunk>,
    bytes: usize,
}

impl StagedEpoch {
    /// Bytes of memory that it holds; at most [`StagingLimits::max_epoch_bytes`].
    pub fn staged_bytes(&self) -> usize {
        self.bytes
    }

    /// Brings memory from the base to this epoch; can't fail. Epochs are applied in order.
    pub fn apply_pages(&self, memory: &dyn PageMemory) {
        self.chunks.iter().for_each(|chunk| chunk.apply(memory));
    }

    /// Visits the numbers of the pages that [`Self::apply_pages`] changes (one that was sent twice: twice).
    pub fn visit_pages(&self, mut visit: impl FnMut(u32)) {
        self.chunks.iter().for_each(|chunk| chunk.visit_pages(&mut visit));
    }

    /// Pages that [`Self::apply_pages`] changes (one that was sent twice counts twice).
    pub fn pages(&self) -> u64 {
        self.chunks.iter().map(PageChunk::pages).sum()
    }
}

struct Partial {
    staged: StagedEpoch,
    next: u32,
    bytes: usize,
    payload_bytes: u64,
    checksum: crc32fast::Hasher,
}

/// Collects the frames of one connection into epochs.
pub struct EpochReceiver {
    limits: StagingLimits,
    last: Option<u64>,
    bulk_frames: u64,
    partial: Option<Partial>,
}

impl EpochReceiver {
    /// For a new connection. `last` is the epoch that this side has completely, if the peer goes on from there;
    /// `None` if a resync comes first.
    pub fn new(limits: StagingLimits, last: Option<u64>) -> Self {
        Self {
            limits,
            last,
            bulk_frames: 0,
            partial: None,
        }
    }

    /// Counts a bulk frame that was taken completely; an epoch says how many it builds on.
    pub fn bulk_frame(&mut self) {
        self.bulk_frames += 1;
    }

    /// Last epoch received completely.
    pub fn last(&self) -> Option<u64> {
        self.last
    }

    /// Takes a frame of one of the epoch kinds. `Some` when it completes an epoch. After an error the partial epoch
    /// is gone and the connection has to be closed.
    pub fn accept(&mut self, kind: Kind, epoch: u64, payload: Vec<u8>) -> Result<Option<StagedEpoch>, EpochError> {
        let result = match kind {
            Kind::EpochBegin => self.begin(epoch, &payload).map(|()| None),
            Kind::EpochPages | Kind::EpochState | Kind::EpochDisk | Kind::EpochOutput => {
                self.add(kind, epoch, payload).map(|()| None)
            }
            Kind::EpochEnd => self.end(epoch, &payload).map(Some),
            _ => Err(self.unexpected(kind, epoch)),
        };
        if result.is_err() {
            self.partial = None;
        }
        result
    }

    fn unexpected(&self, kind: Kind, epoch: u64) -> EpochError {
        EpochError::Unexpected {
            kind,
            epoch,
            expected: self.partial.as_ref().map(|partial| partial.staged.epoch),
        }
    }

    fn begin(&mut self, epoch: u64, payload: &[u8]) -> Result<(), EpochError> {
        let kind = Kind::EpochBegin;
        if self.partial.is_some() {
            return Err(self.unexpected(kind, epoch));
        }
        let malformed = |error| EpochError::Payload { epoch, error };
        let found = wire::sequence_of(payload, "EpochBegin").map_err(malformed)?;
        if found != 0 {
            return Err(EpochError::Sequence {
                epoch,
                kind,
                found,
                expected: 0,
            });
        }
        let begin: Begin = wire::decode(payload, "EpochBegin").map_err(malformed)?;
        if let Some(last) = self.last
            && epoch <= last
        {
            return Err(EpochError::Replayed { epoch, last });
        }
        // An epoch after a resync builds on nothing but the bulk frames; any other on the last one received.
        if begin.base.is_some() && begin.base != self.last || begin.base.is_none() && self.last.is_some() {
            return Err(EpochError::Base {
                epoch,
                base: begin.base,
                last: self.last,
            });
        }
        if begin.base.is_none() && begin.fence != self.bulk_frames {
            return Err(EpochError::Fence {
                epoch,
                announced: begin.fence,
                received: self.bulk_frames,
            });
        }
        let staged = StagedEpoch {
            epoch,
            base: begin.base,
            released_through: begin.released_through,
            state: Vec::new(),
            disk: Vec::new(),
            outputs: Vec::new(),
            contains_flush: false,
            chunks: Vec::new(),
            bytes: 0,
        };
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(payload);
        self.partial = Some(Partial {
            staged,
            next: 1,
            bytes: 0,
            payload_bytes: payload.len() as u64,
            checksum,
        });
        Ok(())
    }

    /// The epoch under way, if this frame is the next one of it.
    fn expect<'a>(
        partial: &'a mut Option<Partial>,
        kind: Kind,
        epoch: u64,
        payload: &[u8],
    ) -> Result<&'a mut Partial, EpochError> {
        let expected = partial.as_ref().map(|partial| partial.staged.epoch);
        let Some(partial) = partial.as_mut().filter(|partial| partial.staged.epoch == epoch) else {
            return Err(EpochError::Unexpected { kind, epoch, expected });
        };
        let found = wire::sequence_of(payload, "epoch").map_err(|error| EpochError::Payload { epoch, error })?;
        if found != partial.next {
            return Err(EpochError::Sequence {
                epoch,
                kind,
                found,
                expected: partial.next,
            });
        }
        partial.next += 1;
        Ok(partial)
    }

    fn add(&mut self, kind: Kind, epoch: u64, payload: Vec<u8>) -> Result<(), EpochError> {
        let partial = Self::expect(&mut self.partial, kind, epoch, &payload)?;
        partial.checksum.update(&payload);
        partial.payload_bytes += payload.len() as u64;
        let malformed = |error| EpochError::Payload { epoch, error };
        let max = self.limits.max_epoch_bytes;
        // What a frame holds when decoded is at least what it has on the wire, so this bounds the work too.
        if partial.bytes.saturating_add(payload.len()) > max {
            return Err(EpochError::TooLarge { epoch, max });
        }
        let staged = &mut partial.staged;
        partial.bytes += match kind {
            Kind::EpochPages => {
                let chunk = PageChunk::check(payload, self.limits.page_count)
                    .map_err(|error| EpochError::Pages { epoch, error })?;
                let bytes = chunk.staged_bytes();
                staged.chunks.push(chunk);
                bytes
            }
            Kind::EpochState => {
                staged.state.extend_from_slice(&payload[SEQUENCE_BYTES..]);
                payload.len()
            }
            Kind::EpochDisk => {
                let changes =
                    wire::decode_disk(&payload, SEQUENCE_BYTES, &self.limits.disk_bytes).map_err(malformed)?;
                let bytes = changes.iter().map(DiskChange::staged_bytes).sum();
                staged.disk.extend(changes);
                bytes
            }
            _ => {
                let items =
                    wire::decode_ports(&payload, SEQUENCE_BYTES, "EpochOutput", self.limits.nics).map_err(malformed)?;
                let bytes = items.iter().map(|item| size_of::<PortData>() + item.bytes.len()).sum();
                staged.outputs.extend(items);
                bytes
            }
        };
        if partial.bytes > max {
            return Err(EpochError::TooLarge { epoch, max });
        }
        Ok(())
    }

    fn end(&mut self, epoch: u64, payload: &[u8]) -> Result<StagedEpoch, EpochError> {
        Self::expect(&mut self.partial, Kind::EpochEnd, epoch, payload)?;
        let end: End = wire::decode(payload, "EpochEnd").map_err(|error| EpochError::Payload { epoch, error })?;
        let Some(partial) = self.partial.take() else {
            return Err(self.unexpected(Kind::EpochEnd, epoch));
        };
        let mut staged = partial.staged;
        staged.contains_flush = end.contains_flush;
        staged.bytes = partial.bytes;
        let agrees = [
            ("checksum", end.checksum == partial.checksum.finalize()),
            ("payload bytes", end.payload_bytes == partial.payload_bytes),
            ("pages", end.pages == staged.pages()),
            ("state bytes", end.state_bytes == staged.state.len() as u64),
            ("disk changes", end.disk_changes == staged.disk.len() as u64),
            ("outputs", end.outputs == staged.outputs.len() as u64),
        ];
        if let Some((what, _)) = agrees.iter().find(|(_, agrees)| !agrees) {
            return Err(EpochError::Disagrees { epoch, what });
        }
        self.last = Some(epoch);
        Ok(staged)
    }
}
