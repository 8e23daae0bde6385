//! The standby's redo journal: changes of disks, epoch by epoch, durable before they are applied to the volumes.
//!
//! ```text
//!   half 0: header(generation g)    record record commit(epoch) record commit …      one half is written,
//! half 1: header(generation g+1)  record commit …                                  the other is kept until the
//! volumes have it
//! ```
//!
//! An epoch counts if its commit record and every record before it are whole. After a crash at any byte,
//! [`Journal::recover`] applies every epoch that counts, in order, and then empties the journal; applying twice is
//! harmless, since records say contents, not changes. Epochs after the last durable one may be lost in any part, from
//! the journal and from volumes that had some of them already: no guest flush is among them, so that is what any disk
//! with a volatile cache does.
//!
//! A history may have an origin: the stream that its records are of, and the volumes that they belong to, which nobody but that
//! stream has changed since. Then the journal proves what the volumes hold ([`Recovered::holds`]): everything through the last
//! epoch that counts. Whoever writes to them in another role empties the journal first, which ends that.
//!
//! Invariant: a half is written again only after everything in it is durable on the volumes, and its old contents are
//! durably disowned before the first new record. So what is replayed is always a gapless end of the history.

mod format;

use std::io;
use std::sync::Arc;

use super::changed::{Holds, Stream};
use super::epoch::{DiskChange, DiskData};
use super::storage::{Storage, identity_of};
use format::{HALF_HEADER_BYTES, HalfHeader, Origin, RECORD_HEADER_BYTES, Record, RecordKind};

/// Smallest journal: an epoch must fit into half of it.
pub const JOURNAL_MIN_BYTES: u64 = 64 * 1024;

/// Records are put together up to this size for one write.
const WRITE_BYTES: usize = 1 << 20;
/// A longer write is recorded in pieces.
const PIECE_BYTES: usize = 256 * 1024;
/// A half takes no more after it has zeroed so many bytes of disks, if the other one is free: their records take no room, and a replay
/// may have to write them all, before a guest runs.
const ZEROED_MAX_BYTES: u64 = 1 << 30;

/// Why the journal can't be written or replayed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The journal's storage failed.
    #[error(
        "journal: {what} failed: {error}; the standby acknowledges nothing more, mend its storage and let it join again"
    )]
    Io {
        /// Doing what.
        what: &'static str,
        /// The cause.
        #[source]
        error: io::Error,
    },
    /// A volume failed while the journal was replayed.
    #[error("disk {disk}: replaying the journal failed: {error}; the volume is not usable before that succeeds")]
    Volume {
        /// Disk index.
        disk: u16,
        /// The cause.
        #[source]
        error: io::Error,
    },
    /// Too small to be a journal.
    #[error("journal has {0} bytes, at least {JOURNAL_MIN_BYTES} are needed")]
    TooSmall(u64),
    /// An epoch that doesn't fit.
    #[error(
        "epoch {epoch} changes disks by {needed} bytes, a half of the journal has {room}: make the journal larger, or epochs smaller"
    )]
    TooLarge {
        /// The epoch.
        epoch: u64,
        /// Bytes needed.
        needed: u64,
        /// Bytes of a half.
        room: u64,
    },
    /// The half to be written next is not on the volumes yet.
    #[error("journal is full: the volumes have not taken its older half yet")]
    Full,
    /// Records that were durable are gone.
    #[error(
        "journal is damaged: it holds {older:?} in its older half, but the newer half continues after {newer}; resynchronise this seat from the other one"
    )]
    Damaged {
        /// Last epoch found in the older half.
        older: Option<u64>,
        /// Epoch that the newer half follows.
        newer: u64,
    },
    /// A record of a disk, or a part of one, that the machine doesn't have.
    #[error(
        "journal holds a change of disk {disk} at {offset} for {len} bytes, which the machine's disks don't have: was it another machine's?"
    )]
    Foreign {
        /// Disk index.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// An earlier error left the journal in an unknown state.
    #[error("journal failed before and takes nothing more until the engine is started again")]
    Failed,
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> JournalError {
    move |error| JournalError::Io { what, error }
}

/// What a recovery found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Epochs applied to the volumes.
    pub epochs: u64,
    /// The last of them.
    pub last: Option<u64>,
    /// Changes applied.
    pub changes: u64,
    /// What the volumes hold, if the journal proves it.
    pub holds: Option<Holds>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Half {
    generation: u64,
    /// Where the next record goes, from the half's start.
    end: u64,
    /// Last epoch in it.
    last: Option<u64>,
    /// Bytes of disks that its records zero.
    zeroed_bytes: u64,
}

/// The journal. One thread writes it.
pub struct Journal {
    storage: Arc<dyn Storage>,
    half_bytes: u64,
    halves: [Half; 2],
    current: usize,
    /// Last epoch appended since the journal was emptied.
    last: Option<u64>,
    /// Of the history; none if the volumes may be anything.
    origin: Option<Origin>,
    /// Of the volumes, if they can be told from others.
    volumes: Option<u128>,
    failed: bool,
}

impl Journal {
    /// Replays what counts in the journal onto `volumes` (by disk index), makes it durable there, and gives the
    /// journal, empty.
    pub fn recover(storage: Arc<dyn Storage>, volumes: &[Arc<dyn Storage>]) -> Result<(Self, Recovered), JournalError> {
        let (mut journal, headers) = Self::read(storage, volumes)?;
        let mut order: Vec<(usize, HalfHeader)> = headers
            .iter()
            .copied()
            .enumerate()
            .filter_map(|(half, header)| Some((half, header?)))
            .collect();
        order.sort_by_key(|(_, header)| header.generation);
        // A half that follows nothing begins a history: what is older counts no more.
        if let [_, (_, newer)] = &order[..]
            && newer.follows.is_none()
        {
            order.remove(0);
        }
        let scanned: Vec<Scan> = order
            .iter()
            .map(|(half, header)| journal.scan(*half, header.generation))
            .collect::<Result<_, _>>()?;
        if let ([_, (_, newer)], [older_scan, newer_scan]) = (&order[..], &scanned[..])
            && newer_scan.last.is_some()
            && let Some(follows) = newer.follows
            && older_scan.last != Some(follows)
        {
            return Err(JournalError::Damaged {
                older: older_scan.last,
                newer: follows,
            });
        }
        let mut recovered = Recovered::default();
        for ((half, header), scan) in order.iter().zip(&scanned) {
            journal.replay(*half, header.generation, scan, volumes)?;
            recovered.epochs += scan.epochs;
            recovered.changes += scan.changes;
            recovered.last = scan.last.or(recovered.last);
        }
        if recovered.changes > 0 {
            for (disk, volume) in volumes.iter().enumerate() {
                volume.sync().map_err(|error| JournalError::Volume {
                    disk: disk as u16,
                    error,
                })?;
            }
        }
        // The newest header is the history's. Both are there since the first start; where one can't be read nobody knows whether it
        // was the newer one, or the end of what the other continues.
        let newest = order.last().filter(|_| !headers.contains(&None));
        recovered.holds = journal.proven(newest.and_then(|(_, header)| header.origin), recovered.last);
        match recovered.holds {
            Some(holds) => journal.begin(holds.stream, Some(holds.epoch))?,
            None => journal.reset()?,
        }
        Ok((journal, recovered))
    }

    /// A journal that can't be replayed, for volumes that will be written whole: it is left as it is, and takes nothing before it
    /// is emptied.
    pub fn unusable(storage: Arc<dyn Storage>, volumes: &[Arc<dyn Storage>]) -> Result<Self, JournalError> {
        let (journal, _) = Self::read(storage, volumes)?;
        Ok(Self {
            failed: true,
            ..journal
        })
    }

    fn read(
        storage: Arc<dyn Storage>,
        volumes: &[Arc<dyn Storage>],
    ) -> Result<(Self, [Option<HalfHeader>; 2]), JournalError> {
        if storage.size_bytes() < JOURNAL_MIN_BYTES {
            return Err(JournalError::TooSmall(storage.size_bytes()));
        }
        let half_bytes = storage.size_bytes() / 2 / 4096 * 4096;
        let mut journal = Self {
            storage,
            half_bytes,
            halves: [Half::default(); 2],
            current: 0,
            last: None,
            origin: None,
            volumes: identity_of(volumes),
            failed: false,
        };
        let headers = [journal.read_header(0)?, journal.read_header(1)?];
        for (half, header) in journal.halves.iter_mut().zip(&headers) {
            half.generation = header.map_or(0, |header| header.generation);
        }
        Ok((journal, headers))
    }

    /// What volumes hold onto which everything through `last` was replayed.
    fn proven(&self, origin: Option<Origin>, last: Option<u64>) -> Option<Holds> {
        let origin = origin.filter(|origin| Some(origin.volumes) == self.volumes)?;
        Some(Holds {
            stream: origin.stream,
            epoch: last.or(origin.holds)?,
        })
    }

    fn read_header(&self, half: usize) -> Result<Option<HalfHeader>, JournalError> {
        let mut bytes = [0; HALF_HEADER_BYTES];
        self.storage
            .read_at(half as u64 * self.half_bytes, &mut bytes)
            .map_err(io_error("reading"))?;
        Ok(HalfHeader::decode(&bytes))
    }

    /// Of a half whose header was unreadable. It gets a generation that is new as far as the other half knows, and may be that of
    /// the records that are there.
    fn void_records(&self, half: usize) -> Result<(), JournalError> {
        let first = half as u64 * self.half_bytes + HALF_HEADER_BYTES as u64;
        self.storage
            .write_at(first, &[0; RECORD_HEADER_BYTES])
            .map_err(io_error("writing"))?;
        self.storage.sync().map_err(io_error("syncing"))
    }

    fn disown_and_write_header(&mut self, half: usize, follows: Option<u64>) -> Result<(), JournalError> {
        if self.halves[half].generation == 0 {
            self.void_records(half)?;
        }
        let generation = self.halves.iter().map(|half| half.generation).max().unwrap_or(0) + 1;
        let header = HalfHeader {
            generation,
            follows,
            origin: self.origin,
        };
        self.storage
            .write_at(half as u64 * self.half_bytes, &header.encode())
            .map_err(io_error("writing"))?;
        self.storage.sync().map_err(io_error("syncing"))?;
        self.halves[half] = Half {
            generation,
            end: HALF_HEADER_BYTES as u64,
            last: None,
            zeroed_bytes: 0,
        };
        Ok(())
    }

    /// Empties the journal durably: everything in it is on the volumes, or of no use any more. Nothing is said of the volumes
    /// from then on: they may be changed by anybody.
    pub fn reset(&mut self) -> Result<(), JournalError> {
        self.restart(None)
    }

    /// Whether it is as [`Self::reset`] leaves it: durably empty, and nothing is said of the volumes.
    pub fn is_reset(&self) -> bool {
        !self.failed && self.origin.is_none() && self.last.is_none()
    }

    /// Empties the journal durably and begins the history of `stream`. `holds`: what of it the volumes have already, durably;
    /// none lets the first epoch that is appended as durable say so. From now on only that stream changes the volumes.
    pub fn begin(&mut self, stream: Stream, holds: Option<u64>) -> Result<(), JournalError> {
        let origin = |volumes| Origin { stream, volumes, holds };
        self.restart(self.volumes.map(origin))
    }

    /// One sector does it: the older half begins a new history, which disowns the newer one. A crash before that leaves an end
    /// of the history before.
    fn restart(&mut self, origin: Option<Origin>) -> Result<(), JournalError> {
        self.origin = origin;
        let older = if self.halves[0].generation <= self.halves[1].generation {
            0
        } else {
            1
        };
        let result = self.disown_and_write_header(older, None);
        self.failed = result.is_err();
        self.current = older;
        self.halves[1 - older].last = None;
        self.last = None;
        result
    }

    /// Bytes that the records of these changes take.
    fn needed(changes: &[DiskChange]) -> u64 {
        let record = |change: &DiskChange| match &change.what {
            DiskData::Zeroed(_) => RECORD_HEADER_BYTES as u64,
            DiskData::Written(data) => (data.len() + data.len().div_ceil(PIECE_BYTES) * RECORD_HEADER_BYTES) as u64,
        };
        changes.iter().map(record).sum::<u64>() + RECORD_HEADER_BYTES as u64
    }

    /// Appends an epoch. With `durable` it, and every epoch before it, survives a power cut when this returns.
    /// `synced_through`: what is durable on the volumes, which lets the older half be written again;
    /// [`JournalError::Full`] if that is not far enough.
    ///
    /// After an error nothing more is taken: what is on the storage is unknown.
    pub fn append(
        &mut self,
        epoch: u64,
        changes: &[DiskChange],
        durable: bool,
        synced_through: Option<u64>,
    ) -> Result<(), JournalError> {
        if self.failed {
            return Err(JournalError::Failed);
        }
        let needed = Self::needed(changes);
        let room = self.half_bytes - HALF_HEADER_BYTES as u64;
        if needed > room {
            return Err(JournalError::TooLarge { epoch, needed, room });
        }
        let (current, other) = (self.halves[self.current], 1 - self.current);
        let free = self.halves[other].last <= synced_through;
        let full = current.end + needed > self.half_bytes;
        if full && !free {
            return Err(JournalError::Full);
        }
        if full || (free && current.zeroed_bytes >= ZEROED_MAX_BYTES) {
            self.failed = true;
            self.disown_and_write_header(other, self.last)?;
            self.current = other;
        }
        self.failed = true;
        self.write_epoch(epoch, changes)?;
        if durable {
            self.storage.sync().map_err(io_error("syncing"))?;
        }
        self.failed = false;
        self.last = Some(epoch);
        let half = &mut self.halves[self.current];
        half.last = Some(epoch);
        half.zeroed_bytes = half.zeroed_bytes.saturating_add(zeroed_bytes(changes));
        Ok(())
    }

    /// Whether the volumes should be synced soon, through the epoch returned: the current half has taken half of
    /// what it may, and the other one is not free.
    pub fn wants_sync(&self, synced_through: Option<u64>) -> Option<u64> {
        let current = &self.halves[self.current];
        let other = &self.halves[1 - self.current];
        let half_full = current.end > self.half_bytes / 2 || current.zeroed_bytes >= ZEROED_MAX_BYTES / 2;
        (half_full && other.last > synced_through)
            .then_some(other.last)
            .flatten()
    }

    fn write_epoch(&mut self, epoch: u64, changes: &[DiskChange]) -> Result<(), JournalError> {
        let half = self.halves[self.current];
        let start = self.current as u64 * self.half_bytes;
        let mut at = start + half.end;
        let mut buffer = Vec::with_capacity(WRITE_BYTES.min(Self::needed(changes) as usize));
        let mut records = RecordWriter {
            generation: half.generation,
            epoch,
            sequence: 0,
            chain: crc32fast::Hasher::new(),
        };
        for change in changes {
            match &change.what {
                DiskData::Zeroed(len) => {
                    records.push(&mut buffer, RecordKind::Zeroed, change.disk, change.offset, *len, &[]);
                }
                DiskData::Written(data) => {
                    for (piece, offset) in data.chunks(PIECE_BYTES).zip((change.offset..).step_by(PIECE_BYTES)) {
                        records.push(
                            &mut buffer,
                            RecordKind::Written,
                            change.disk,
                            offset,
                            piece.len() as u64,
                            piece,
                        );
                        at = self.write_out(at, &mut buffer, WRITE_BYTES - PIECE_BYTES)?;
                    }
                }
            }
            at = self.write_out(at, &mut buffer, WRITE_BYTES - PIECE_BYTES)?;
        }
        let chain = records.chain.clone().finalize();
        records.push(&mut buffer, RecordKind::Commit, 0, u64::from(chain), 0, &[]);
        at = self.write_out(at, &mut buffer, 0)?;
        self.halves[self.current].end = at - start;
        Ok(())
    }

    /// Writes the buffer once it holds more than `keep` bytes.
    fn write_out(&self, at: u64, buffer: &mut Vec<u8>, keep: usize) -> Result<u64, JournalError> {
        if buffer.len() <= keep {
            return Ok(at);
        }
        self.storage.write_at(at, buffer).map_err(io_error("writing"))?;
        let at = at + buffer.len() as u64;
        buffer.clear();
        Ok(at)
    }

    /// Reads a half's records up to the first that is not whole or not of this generation.
    fn visit(
        &self,
        half: usize,
        generation: u64,
        mut visit: impl FnMut(&Record, &[u8], u64) -> Result<bool, JournalError>,
    ) -> Result<(), JournalError> {
        let start = half as u64 * self.half_bytes;
        let mut at = HALF_HEADER_BYTES as u64;
        let mut data = Vec::new();
        let mut header = [0; RECORD_HEADER_BYTES];
        while at + RECORD_HEADER_BYTES as u64 <= self.half_bytes {
            self.storage
                .read_at(start + at, &mut header)
                .map_err(io_error("reading"))?;
            let Some(record) = Record::decode(&header) else {
                return Ok(());
            };
            let len = record.data_len();
            let body = at + RECORD_HEADER_BYTES as u64;
            if record.generation != generation || len > PIECE_BYTES as u64 || body + len > self.half_bytes {
                return Ok(());
            }
            data.resize(len as usize, 0);
            self.storage
                .read_at(start + body, &mut data)
                .map_err(io_error("reading"))?;
            if !record.verify(&header, &data) {
                return Ok(());
            }
            at = body + len;
            if !visit(&record, &data, at)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Finds the epochs of a half that count.
    fn scan(&self, half: usize, generation: u64) -> Result<Scan, JournalError> {
        let mut scan = Scan::default();
        let mut open = Open::default();
        self.visit(half, generation, |record, _, end| {
            if !open.fits(record, scan.last) {
                return Ok(false);
            }
            if record.kind == RecordKind::Commit {
                scan = Scan {
                    epochs: scan.epochs + 1,
                    changes: scan.changes + u64::from(open.records),
                    last: Some(record.epoch),
                    end,
                };
                open = Open::default();
            } else {
                open.add(record);
            }
            Ok(true)
        })?;
        Ok(scan)
    }

    /// Applies what [`Self::scan`] found.
    fn replay(
        &self,
        half: usize,
        generation: u64,
        scan: &Scan,
        volumes: &[Arc<dyn Storage>],
    ) -> Result<(), JournalError> {
        let mut reached = HALF_HEADER_BYTES as u64;
        self.visit(half, generation, |record, data, end| {
            if end > scan.end {
                return Ok(false);
            }
            reached = end;
            let &Record { disk, offset, len, .. } = record;
            if record.kind == RecordKind::Commit {
                return Ok(true);
            }
            let volume = volumes
                .get(usize::from(disk))
                .filter(|volume| offset.checked_add(len).is_some_and(|end| end <= volume.size_bytes()))
                .ok_or(JournalError::Foreign { disk, offset, len })?;
            let result = if record.kind == RecordKind::Zeroed {
                volume.zero(offset, len)
            } else {
                volume.write_at(offset, data)
            };
            result.map_err(|error| JournalError::Volume { disk, error })?;
            Ok(true)
        })?;
        if scan.epochs > 0 && reached != scan.end {
            let error = io::Error::new(io::ErrorKind::InvalidData, "it reads differently the second time");
            return Err(JournalError::Io { what: "reading", error });
        }
        Ok(())
    }
}

fn zeroed_bytes(changes: &[DiskChange]) -> u64 {
    let zeroed = changes
        .iter()
        .filter(|change| matches!(change.what, DiskData::Zeroed(_)));
    zeroed.map(DiskChange::len).fold(0, u64::saturating_add)
}

/// What counts in a half.
#[derive(Debug, Clone, Copy, Default)]
struct Scan {
    epochs: u64,
    changes: u64,
    last: Option<u64>,
    /// Behind the last commit record.
    end: u64,
}

/// The epoch that is being read.
#[derive(Default)]
struct Open {
    epoch: Option<u64>,
    records: u32,
    chain: crc32fast::Hasher,
}

impl Open {
    /// Whether a record is the next one of the open epoch, or the first of one after `last`.
    fn fits(&self, record: &Record, last: Option<u64>) -> bool {
        let epoch = self.epoch.unwrap_or(record.epoch);
        let in_order =
            record.epoch == epoch && last.is_none_or(|last| record.epoch > last) && record.sequence == self.records;
        let whole = record.kind != RecordKind::Commit || u64::from(self.chain.clone().finalize()) == record.offset;
        in_order && whole
    }

    fn add(&mut self, record: &Record) {
        self.epoch = Some(record.epoch);
        self.records += 1;
        self.chain.update(&record.checksum.to_le_bytes());
    }
}

struct RecordWriter {
    generation: u64,
    epoch: u64,
    sequence: u32,
    chain: crc32fast::Hasher,
}

impl RecordWriter {
    fn push(&mut self, buffer: &mut Vec<u8>, kind: RecordKind, disk: u16, offset: u64, len: u64, data: &[u8]) {
        let Self {
            generation,
            epoch,
            sequence,
            ..
        } = *self;
        let record = Record {
            kind,
            disk,
            sequence,
            generation,
            epoch,
            offset,
            len,
            checksum: 0,
        };
        let header = record.encode(data);
        let checksum = &header[RECORD_HEADER_BYTES - 4..];
        self.chain.update(checksum);
        self.sequence += 1;
        buffer.extend_from_slice(&header);
        buffer.extend_from_slice(data);
    }
}

#[cfg(test)]
mod tests;
