//! The journal's driver: what guest_journal.rs lays out, on the disks of disk.rs, one step at a time.
//!
//! Records appended while a batch is being written go into the next batch, which is written and flushed as one (group
//! commit). A failed write or flush ends the journal for this boot: after it nobody knows what is durable.
//!
//! Every disk has the whole journal. A batch goes to all of them at once, and its records are durable when the last one has
//! flushed. So at a start disks may differ by the batch that was under way and by nothing else: what one disk has of it
//! the others get, and where more differs, that is an error.

use crate::cpu;
use crate::disk::{Disk, REQUEST_SECTORS};
use crate::guest_journal::{
    Assessment, Content, HEADER_SECTORS, Header, MAX_DISKS, MAX_RECORDS, Record, SECTOR_BYTES, Scan, Slot, Tally,
    capacity, checksum, sector_of,
};
use crate::protocol::MAX_CARDS;
use crate::statics::Once;

/// Records of one batch.
pub const BATCH_RECORDS: usize = 64;

static SLOTS: Once<[Slot; MAX_RECORDS as usize]> = Once::new([Slot::EMPTY; MAX_RECORDS as usize]);
static BATCH: Once<[Record; BATCH_RECORDS]> = Once::new([NO_RECORD; BATCH_RECORDS]);

const NO_RECORD: Record = Record {
    seq: 0,
    boots: 0,
    request_seq: 0,
    tallies: [Tally { count: 0, chain: 0 }; MAX_CARDS],
    guest_time_ns: 0,
    durable_seq: 0,
    previous: 0,
    disk: 0,
};

/// What the disks are busy with.
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
    /// Reading everything back, disk after disk, from record sector `next` on.
    Verifying {
        disk: usize,
        next: u64,
        reading: usize,
    },
    /// No disk, or a failed one.
    Failed,
}

/// A journal.
pub struct Journal {
    disks: &'static mut [Option<Disk>],
    slots: &'static mut [Slot],
    /// Without what differs from disk to disk.
    batch: &'static mut [Record; BATCH_RECORDS],
    batched: usize,
    writing: usize,
    state: State,
    capacity: u64,
    /// Starts of a guest on these disks, this one included; 0 without a disk.
    pub boots: u32,
    /// The last durable record.
    pub durable_seq: u64,
    last_seq: u64,
    /// Of the last record that each disk was given.
    last_checksums: [u64; MAX_DISKS],
    /// Errors found since this boot.
    pub errors: u32,
    verify_wanted: bool,
}

/// What the journal knows of the guest's past: what the cards' requests had added up to at the last record.
pub type Past = [Tally; MAX_CARDS];

impl Journal {
    /// Opens the journal: reads it whole, removes what was never durable, writes the header of this boot. Waits for the
    /// disks meanwhile. `disks` has those that were opened, in order, and then none.
    pub fn open(disks: &'static mut [Option<Disk>; MAX_DISKS]) -> (Self, Past) {
        let count = disks.iter().flatten().count();
        let disks = &mut disks[..count];
        let mut journal = Self {
            capacity: disks
                .iter()
                .flatten()
                .map(|disk| capacity(disk.sectors()))
                .min()
                .unwrap_or(0),
            disks,
            slots: SLOTS.take(),
            batch: BATCH.take(),
            batched: 0,
            writing: 0,
            state: State::Idle,
            boots: 0,
            durable_seq: 0,
            last_seq: 0,
            last_checksums: [0; MAX_DISKS],
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
        if self.disks.is_empty() {
            log!("journal: no disk");
            return None;
        }
        for disk in self.disks.iter().flatten() {
            // A batch must never overwrite the last durable record: a start after a crash would find nothing to go on from.
            if capacity(disk.sectors()) <= BATCH_RECORDS as u64 || disk.read_only() {
                log!(
                    "journal: the disk has {} sectors, read-only: {}",
                    disk.sectors(),
                    disk.read_only()
                );
                self.errors += 1;
                return None;
            }
        }
        let mut newest = Header::default();
        for number in 0..self.disks.len() {
            let header = self.read_header(number)?;
            newest.boots = newest.boots.max(header.boots);
            newest.durable_seq = newest.durable_seq.max(header.durable_seq);
        }
        self.read_disks(newest.durable_seq)?;
        let past = self.read_past()?;
        self.boots = newest.boots + 1;
        for number in 0..self.disks.len() {
            self.write_header(number)?;
        }
        log!(
            "journal: boot {}, {} records, capacity {}, {} errors",
            self.boots,
            self.durable_seq,
            self.capacity,
            self.errors
        );
        Some(past)
    }

    /// The first disk, for requests beside the journal's own.
    pub fn first_disk(&mut self) -> Option<&mut Disk> {
        self.disks.first_mut()?.as_mut()
    }

    fn disk(&mut self, number: usize) -> &mut Disk {
        self.disks[number].as_mut().expect("it was opened")
    }

    fn read_header(&mut self, number: usize) -> Option<Header> {
        self.disk(number).read(0, HEADER_SECTORS as usize);
        self.wait(number)?;
        let mut newest = Header::default();
        let (sectors, _) = self.disks[number].as_ref()?.data().as_chunks::<SECTOR_BYTES>();
        for sector in &sectors[..HEADER_SECTORS as usize] {
            match Header::decode(sector) {
                Content::Valid(header) if header.disk != number as u32 => self.errors += 1,
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

    /// Reads all disks' records, and gives each what the furthest one has of the batch that was under way.
    fn read_disks(&mut self, durable_seq: u64) -> Option<()> {
        let mut lasts = [0; MAX_DISKS];
        let mut known_durable = durable_seq;
        for (number, last) in lasts.iter_mut().enumerate().take(self.disks.len()) {
            let found = self.read_records(number, &mut known_durable)?;
            *last = found.last_seq;
            self.last_checksums[number] = found.last_checksum;
            self.last_seq = self.last_seq.max(found.last_seq);
        }
        self.durable_seq = self.last_seq;
        let furthest = lasts.iter().position(|&last| last == self.last_seq)?;
        for (number, &last) in lasts.iter().enumerate().take(self.disks.len()) {
            let lacks = self.last_seq - last;
            if last < known_durable || lacks > BATCH_RECORDS as u64 {
                log!("journal: disk {number} lacks the last {lacks} records of disk {furthest}");
                self.errors += 1;
            }
            if lacks > BATCH_RECORDS as u64 {
                return None;
            }
            if lacks > 0 {
                self.bring_forward(number, furthest, last)?;
            }
        }
        Some(())
    }

    /// Reads a disk's records. `known_durable` is the last record that is known to be durable so far.
    fn read_records(&mut self, number: usize, known_durable: &mut u64) -> Option<Assessment> {
        let capacity = self.capacity;
        let mut next = 0;
        self.slots.fill(Slot::EMPTY);
        while next < capacity {
            let count = (capacity - next).min(REQUEST_SECTORS as u64) as usize;
            self.disk(number).read(HEADER_SECTORS + next, count);
            self.wait(number)?;
            *known_durable = self.take_sectors(number, next, count, *known_durable);
            next += count as u64;
        }
        let found = self.scan(number, *known_durable).assess();
        self.errors += found.errors;
        self.erase_leftovers(number, found.last_seq)?;
        Some(found)
    }

    /// What was read of a disk so far.
    fn scan(&mut self, number: usize, durable_seq: u64) -> Scan<'_> {
        Scan::resume(&mut self.slots[..self.capacity as usize], durable_seq, number as u32)
    }

    /// Takes sectors that were just read into the scan; returns the durable record known then.
    fn take_sectors(&mut self, number: usize, first: u64, count: usize, durable_seq: u64) -> u64 {
        let slots = &mut self.slots[..self.capacity as usize];
        let mut scan = Scan::resume(slots, durable_seq, number as u32);
        let Some(disk) = &self.disks[number] else {
            return durable_seq;
        };
        let (sectors, _) = disk.data().as_chunks::<SECTOR_BYTES>();
        for (index, sector) in sectors[..count].iter().enumerate() {
            scan.add(first as usize + index, sector);
        }
        scan.durable_seq()
    }

    /// Zeroes records behind a gap: never durable, but in the way of the next ones.
    fn erase_leftovers(&mut self, number: usize, last_seq: u64) -> Option<()> {
        let mut next = 0;
        loop {
            let scan = self.scan(number, last_seq);
            let Some(index) = scan.leftovers(last_seq).find(|&index| index >= next) else {
                return Some(());
            };
            let disk = self.disk(number);
            disk.data_mut()[..SECTOR_BYTES].fill(0);
            disk.write(HEADER_SECTORS + index as u64, 1);
            self.wait(number)?;
            next = index + 1;
        }
    }

    /// Copies the records behind `last` to disk `number` from the disk that has them all, and makes them durable.
    fn bring_forward(&mut self, number: usize, from: usize, last: u64) -> Option<()> {
        for seq in last + 1..=self.last_seq {
            let Content::Valid(record) = self.read_record(from, seq)? else {
                log!("journal: disk {number} lacks record {seq}, which can't be read from disk {from} either");
                self.errors += 1;
                return None;
            };
            let sector = Record {
                disk: number as u32,
                previous: self.last_checksums[number],
                ..record
            }
            .encode();
            self.last_checksums[number] = checksum(&sector);
            let place = sector_of(seq, self.capacity);
            let disk = self.disk(number);
            disk.data_mut()[..SECTOR_BYTES].copy_from_slice(&sector);
            disk.write(place, 1);
            self.wait(number)?;
        }
        self.disk(number).flush();
        self.wait(number)
    }

    fn read_record(&mut self, number: usize, seq: u64) -> Option<Content<Record>> {
        let place = sector_of(seq, self.capacity);
        self.disk(number).read(place, 1);
        self.wait(number)?;
        let (sectors, _) = self.disks[number].as_ref()?.data().as_chunks::<SECTOR_BYTES>();
        Some(Record::decode(&sectors[0]))
    }

    /// What the last record says, on all disks alike.
    fn read_past(&mut self) -> Option<Past> {
        if self.last_seq == 0 {
            return Some(Past::default());
        }
        let mut first = None;
        for number in 0..self.disks.len() {
            let record = match self.read_record(number, self.last_seq)? {
                Content::Valid(record) => Record {
                    previous: 0,
                    disk: 0,
                    ..record
                },
                Content::Empty | Content::Bad => NO_RECORD,
            };
            if *first.get_or_insert(record) != record {
                log!(
                    "journal: record {} of disk {number} is not that of disk 0",
                    self.last_seq
                );
                self.errors += 1;
                return None;
            }
        }
        first.map(|record| record.tallies)
    }

    fn write_header(&mut self, number: usize) -> Option<()> {
        let header = Header {
            boots: self.boots,
            capacity: self.capacity,
            durable_seq: self.durable_seq,
            disk: number as u32,
        };
        let disk = self.disk(number);
        disk.data_mut()[..SECTOR_BYTES].copy_from_slice(&header.encode());
        disk.write(u64::from(header.boots) % HEADER_SECTORS, 1);
        self.wait(number)?;
        self.disk(number).flush();
        self.wait(number)
    }

    /// Sleeps until the disk's running request is done; `None` if it failed.
    fn wait(&mut self, number: usize) -> Option<()> {
        loop {
            cpu::this().clear_wake();
            match self.disk(number).poll() {
                Some(true) => return Some(()),
                Some(false) => {
                    log!("journal: a request to disk {number} failed");
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
        self.last_seq += 1;
        self.batch[self.batched] = Record {
            seq: self.last_seq,
            boots: self.boots,
            durable_seq: self.durable_seq,
            ..record
        };
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

    /// As [`Disk::poll`], of all disks. A failure is told at once, though others are still busy.
    fn poll_disks(&mut self) -> Option<bool> {
        let mut done = Some(true);
        for disk in self.disks.iter_mut().flatten() {
            match disk.poll() {
                Some(true) => {}
                Some(false) => return Some(false),
                None => done = None,
            }
        }
        done
    }

    fn step(&mut self) -> bool {
        if self.state == State::Failed {
            // What still ran then is taken back: it would be in the way of others' requests.
            for disk in self.disks.iter_mut().flatten() {
                disk.poll();
            }
            return false;
        }
        match self.poll_disks() {
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
                self.disks.iter_mut().flatten().for_each(Disk::flush);
                self.state = State::Flushing { until };
            }
            State::Flushing { until } => {
                self.durable_seq = until - 1;
                self.state = State::Idle;
            }
            State::Verifying { disk, next, reading } => self.verify_some(disk, next, reading),
            State::Idle if self.batched > 0 => {
                let until = self.last_seq + 1;
                let next = until - self.batched as u64;
                self.writing = self.batched;
                self.write_some(next, until);
            }
            State::Idle if self.verify_wanted => {
                self.verify_wanted = false;
                self.verify_disk(0);
            }
            State::Idle | State::Failed => return false,
        }
        true
    }

    /// Writes the batch's records from `next` on to all disks, as far as the ring goes without turning.
    fn write_some(&mut self, next: u64, until: u64) {
        let place = sector_of(next, self.capacity);
        let room = self.capacity + HEADER_SECTORS - place;
        let count = (until - next).min(room) as usize;
        let skip = self.writing - (until - next) as usize;
        let records = &self.batch[skip..skip + count];
        let disks = self.disks.iter_mut().flatten().zip(&mut self.last_checksums);
        for (number, (disk, last_checksum)) in disks.enumerate() {
            let (sectors, _) = disk.data_mut().as_chunks_mut::<SECTOR_BYTES>();
            for (sector, record) in sectors.iter_mut().zip(records) {
                *sector = Record {
                    previous: *last_checksum,
                    disk: number as u32,
                    ..*record
                }
                .encode();
                *last_checksum = checksum(sector);
            }
            disk.write(place, count);
        }
        let next = next + count as u64;
        if next == until {
            // Copied whole; what was appended where the ring turned is the next batch.
            self.batch.copy_within(self.writing..self.batched, 0);
            self.batched -= self.writing;
        }
        self.state = State::Writing { next, until };
    }

    /// Begins to read a disk back; after the last one all is verified.
    fn verify_disk(&mut self, number: usize) {
        if number == self.disks.len() {
            self.state = State::Idle;
            return;
        }
        self.slots.fill(Slot::EMPTY);
        self.verify_some(number, 0, 0);
    }

    fn verify_some(&mut self, number: usize, next: u64, reading: usize) {
        self.take_sectors(number, next, reading, 0);
        let next = next + reading as u64;
        let count = (self.capacity - next).min(REQUEST_SECTORS as u64) as usize;
        if count == 0 {
            let found = self.scan(number, self.durable_seq).assess();
            let last = (self.last_seq, self.last_checksums[number]);
            let strayed = (found.last_seq, found.last_checksum) != last;
            self.errors += found.errors + u32::from(strayed && found.errors == 0);
            self.verify_disk(number + 1);
            return;
        }
        self.disk(number).read(HEADER_SECTORS + next, count);
        self.state = State::Verifying {
            disk: number,
            next,
            reading: count,
        };
    }
}
