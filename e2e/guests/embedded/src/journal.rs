//! The journal's driver: what guest_journal.rs lays out, on the disk of disk.rs, one step at a time.
//!
//! Records appended while a batch is being written go into the next batch, which is written and flushed as one (group
//! commit). A failed write or flush ends the journal for this boot: after it nobody knows what is durable.

use crate::cpu;
use crate::disk::{Disk, REQUEST_SECTORS};
use crate::guest_journal::{
    Content, HEADER_SECTORS, Header, MAX_RECORDS, Record, SECTOR_BYTES, Scan, Sector, Slot, capacity, checksum,
    sector_of,
};
use crate::statics::Once;

/// Records of one batch.
pub const BATCH_RECORDS: usize = 64;

static SLOTS: Once<[Slot; MAX_RECORDS as usize]> = Once::new([Slot::EMPTY; MAX_RECORDS as usize]);
static BATCH: Once<[Sector; BATCH_RECORDS]> = Once::new([[0; SECTOR_BYTES]; BATCH_RECORDS]);

/// What the disk is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// Writing records from `next` on; `until` is one past the batch's last.
    Writing {
        next: u64,
        until: u64,
    },
    /// Making them durable.
    Flushing {
        until: u64,
    },
    /// Reading everything back, from record sector `next` on.
    Verifying {
        next: u64,
        reading: usize,
    },
    /// No disk, or a failed one.
    Failed,
}

/// A journal.
pub struct Journal {
    disk: Option<Disk>,
    slots: &'static mut [Slot],
    batch: &'static mut [Sector; BATCH_RECORDS],
    batched: usize,
    writing: usize,
    state: State,
    capacity: u64,
    /// Starts of a guest on this disk, this one included; 0 without a disk.
    pub boots: u32,
    /// The last durable record.
    pub durable_seq: u64,
    last_seq: u64,
    last_checksum: u64,
    /// Errors found since this boot.
    pub errors: u32,
    verify_wanted: bool,
}

/// What the journal knows of the guest's past.
#[derive(Clone, Copy, Debug, Default)]
pub struct Past {
    /// The count of the last record.
    pub count: u64,
    /// Its chain.
    pub chain: u64,
}

impl Journal {
    /// Opens the journal: reads it whole, removes what was never durable, writes the header of this boot. Waits for the
    /// disk meanwhile.
    pub fn open(disk: Option<Disk>) -> (Self, Past) {
        let mut journal = Self {
            capacity: disk.as_ref().map_or(0, |disk| capacity(disk.sectors())),
            disk,
            slots: SLOTS.take(),
            batch: BATCH.take(),
            batched: 0,
            writing: 0,
            state: State::Idle,
            boots: 0,
            durable_seq: 0,
            last_seq: 0,
            last_checksum: 0,
            errors: 0,
            verify_wanted: false,
        };
        let past = match journal.load() {
            Some(past) => past,
            None => {
                journal.state = State::Failed;
                Past::default()
            }
        };
        (journal, past)
    }

    /// `None` if there is no usable disk; an error is counted if there should be one.
    fn load(&mut self) -> Option<Past> {
        let Some(disk) = &mut self.disk else {
            log!("journal: no disk");
            return None;
        };
        // A batch must never overwrite the last durable record: a start after a crash would find nothing to go on from.
        if self.capacity <= BATCH_RECORDS as u64 || disk.read_only() {
            log!(
                "journal: the disk has {} sectors, read-only: {}",
                disk.sectors(),
                disk.read_only()
            );
            self.errors += 1;
            return None;
        }
        let header = self.read_header()?;
        let past = self.read_records(header.durable_seq)?;
        self.boots = header.boots + 1;
        self.write_header()?;
        log!(
            "journal: boot {}, {} records, capacity {}, {} errors",
            self.boots,
            self.durable_seq,
            self.capacity,
            self.errors
        );
        Some(past)
    }

    fn read_header(&mut self) -> Option<Header> {
        let disk = self.disk.as_mut()?;
        disk.read(0, HEADER_SECTORS as usize);
        self.wait()?;
        let mut newest = Header::default();
        let (sectors, _) = self.disk.as_ref()?.data().as_chunks::<SECTOR_BYTES>();
        for sector in &sectors[..HEADER_SECTORS as usize] {
            match Header::decode(sector) {
                Content::Valid(header) if header.boots > newest.boots => newest = header,
                Content::Valid(_) | Content::Empty => {}
                Content::Bad => self.errors += 1,
            }
        }
        if newest.boots != 0 && newest.capacity != self.capacity {
            log!(
                "journal: written with capacity {}, the disk has now {}",
                newest.capacity,
                self.capacity
            );
            self.errors += 1;
        }
        Some(newest)
    }

    fn read_records(&mut self, durable_seq: u64) -> Option<Past> {
        let capacity = self.capacity;
        let mut next = 0;
        self.slots.fill(Slot::EMPTY);
        let mut known_durable = durable_seq;
        while next < capacity {
            let count = (capacity - next).min(REQUEST_SECTORS as u64) as usize;
            self.disk.as_mut()?.read(HEADER_SECTORS + next, count);
            self.wait()?;
            known_durable = self.take_sectors(next, count, known_durable);
            next += count as u64;
        }
        let scan = Scan::resume(&mut self.slots[..capacity as usize], known_durable);
        let found = scan.assess();
        self.errors += found.errors;
        (self.last_seq, self.last_checksum, self.durable_seq) = (found.last_seq, found.last_checksum, found.last_seq);
        self.erase_leftovers()?;
        if found.last_seq == 0 {
            return Some(Past::default());
        }
        self.disk.as_mut()?.read(sector_of(found.last_seq, capacity), 1);
        self.wait()?;
        let (sectors, _) = self.disk.as_ref()?.data().as_chunks::<SECTOR_BYTES>();
        match Record::decode(&sectors[0]) {
            Content::Valid(record) => Some(Past {
                count: record.count,
                chain: record.chain,
            }),
            Content::Empty | Content::Bad => Some(Past::default()),
        }
    }

    /// Takes sectors that were just read into the scan; returns the durable record known then.
    fn take_sectors(&mut self, first: u64, count: usize, durable_seq: u64) -> u64 {
        let mut scan = Scan::resume(&mut self.slots[..self.capacity as usize], durable_seq);
        let Some(disk) = &self.disk else { return durable_seq };
        let (sectors, _) = disk.data().as_chunks::<SECTOR_BYTES>();
        for (index, sector) in sectors[..count].iter().enumerate() {
            scan.add(first as usize + index, sector);
        }
        scan.durable_seq()
    }

    /// Zeroes records behind a gap: never durable, but in the way of the next ones.
    fn erase_leftovers(&mut self) -> Option<()> {
        let capacity = self.capacity as usize;
        let mut next = 0;
        loop {
            let scan = Scan::resume(&mut self.slots[..capacity], self.durable_seq);
            let Some(index) = scan.leftovers(self.last_seq).find(|&index| index >= next) else {
                return Some(());
            };
            let disk = self.disk.as_mut()?;
            disk.data_mut()[..SECTOR_BYTES].fill(0);
            disk.write(HEADER_SECTORS + index as u64, 1);
            self.wait()?;
            next = index + 1;
        }
    }

    fn write_header(&mut self) -> Option<()> {
        let header = Header {
            boots: self.boots,
            capacity: self.capacity,
            durable_seq: self.durable_seq,
        };
        let disk = self.disk.as_mut()?;
        disk.data_mut()[..SECTOR_BYTES].copy_from_slice(&header.encode());
        disk.write(u64::from(self.boots) % HEADER_SECTORS, 1);
        self.wait()?;
        self.disk.as_mut()?.flush();
        self.wait()
    }

    /// Sleeps until the running request is done; `None` if it failed.
    fn wait(&mut self) -> Option<()> {
        let disk = self.disk.as_mut()?;
        loop {
            cpu::this().clear_wake();
            match disk.poll() {
                Some(true) => return Some(()),
                Some(false) => {
                    log!("journal: a disk request failed");
                    self.errors += 1;
                    return None;
                }
                None => cpu::wait(),
            }
        }
    }

    /// Whether records can be appended at all.
    pub fn usable(&self) -> bool {
        self.state != State::Failed
    }

    /// Whether an append would be taken now. If not, it is after some [`Journal::poll`].
    pub fn ready(&self) -> bool {
        self.usable()
            && self.batched < BATCH_RECORDS
            && !self.verify_wanted
            && !matches!(self.state, State::Verifying { .. })
    }

    /// Appends a record; returns its number. It is durable once [`Journal::durable_seq`] has reached it. `record`'s
    /// numbers are filled in here.
    pub fn append(&mut self, record: Record) -> u64 {
        assert!(self.ready(), "the caller asks first");
        let sector = Record {
            seq: self.last_seq + 1,
            boots: self.boots,
            durable_seq: self.durable_seq,
            previous: self.last_checksum,
            ..record
        }
        .encode();
        self.last_seq += 1;
        self.last_checksum = checksum(&sector);
        self.batch[self.batched] = sector;
        self.batched += 1;
        self.last_seq
    }

    /// Wants everything read back; [`Journal::verifying`] tells when that is done.
    pub fn verify(&mut self) {
        self.verify_wanted |= self.usable();
    }

    /// Whether a verification is wanted or runs.
    pub fn verifying(&self) -> bool {
        self.verify_wanted || matches!(self.state, State::Verifying { .. })
    }

    /// Goes on as far as possible without waiting. True if something changed.
    pub fn poll(&mut self) -> bool {
        let before = (self.state, self.durable_seq);
        while self.step() {}
        (self.state, self.durable_seq) != before
    }

    fn step(&mut self) -> bool {
        let Some(disk) = &mut self.disk else { return false };
        if self.state == State::Failed {
            return false;
        }
        match disk.poll() {
            None => return false,
            Some(false) => {
                log!("journal: a disk request failed, no record is taken from now on");
                self.errors += 1;
                self.verify_wanted = false;
                self.state = State::Failed;
                return false;
            }
            Some(true) => {}
        }
        match self.state {
            State::Writing { next, until } if next < until => self.write_some(next, until),
            State::Writing { until, .. } => {
                disk.flush();
                self.state = State::Flushing { until };
            }
            State::Flushing { until } => {
                self.durable_seq = until - 1;
                self.state = State::Idle;
            }
            State::Verifying { next, reading } => self.verify_some(next, reading),
            State::Idle if self.batched > 0 => {
                let until = self.last_seq + 1;
                let next = until - self.batched as u64;
                self.writing = self.batched;
                self.write_some(next, until);
            }
            State::Idle if self.verify_wanted => {
                self.verify_wanted = false;
                self.slots.fill(Slot::EMPTY);
                self.verify_some(0, 0);
            }
            State::Idle | State::Failed => return false,
        }
        true
    }

    /// Writes the batch's records from `next` on, as far as the ring goes without turning.
    fn write_some(&mut self, next: u64, until: u64) {
        let Some(disk) = &mut self.disk else { return };
        let sector = sector_of(next, self.capacity);
        let room = self.capacity + HEADER_SECTORS - sector;
        let count = (until - next).min(room) as usize;
        let skip = self.writing - (until - next) as usize;
        let data = &mut disk.data_mut()[..count * SECTOR_BYTES];
        data.copy_from_slice(self.batch[skip..skip + count].as_flattened());
        disk.write(sector, count);
        let next = next + count as u64;
        if next == until {
            // Copied whole: appends may use the batch again.
            self.batched = 0;
        }
        self.state = State::Writing { next, until };
    }

    fn verify_some(&mut self, next: u64, reading: usize) {
        self.take_sectors(next, reading, 0);
        let next = next + reading as u64;
        let count = (self.capacity - next).min(REQUEST_SECTORS as u64) as usize;
        if count == 0 {
            let found = Scan::resume(&mut self.slots[..self.capacity as usize], self.durable_seq).assess();
            let strayed = (found.last_seq, found.last_checksum) != (self.last_seq, self.last_checksum);
            self.errors += found.errors + u32::from(strayed && found.errors == 0);
            self.state = State::Idle;
            return;
        }
        let Some(disk) = &mut self.disk else { return };
        disk.read(HEADER_SECTORS + next, count);
        self.state = State::Verifying { next, reading: count };
    }
}
