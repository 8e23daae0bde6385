//! The embedded guest's journal on disk: its layout, and what a reader may conclude from what it finds.
//!
//! The guest compiles this very file, so it uses `core` only; tests use it to look at, and to damage, a disk.
//!
//! Sectors 0 and 1 hold the header, written in turn, so that one of them is always whole. The records follow, one a
//! sector, in a ring: record `seq` (from 1 on) is in sector `2 + (seq - 1) % capacity`. Every record says which record
//! was known to be durable when it was written, and carries its predecessor's checksum. So a reader tells apart what
//! may be missing (records that were never flushed) from what must be there.
//!
//! A sector is written whole or not at all; a half-written one counts as an error.
//!
//! A guest with several disks keeps the same journal on each. Its sectors name their disk, so that no two disks hold the
//! same, and one that is taken for another is found.

use crate::guest_protocol::{Checksum, MAX_CARDS};

/// Size of a sector, and of a record.
pub const SECTOR_BYTES: usize = 512;
/// Sectors in front of the records.
pub const HEADER_SECTORS: u64 = 2;
/// A journal never has more records than this, however large its disk.
pub const MAX_RECORDS: u64 = 8192;
/// Most disks that a guest keeps its journal on.
pub const MAX_DISKS: usize = 8;
/// Where a sector's checksum is: the last eight bytes.
pub const CHECKSUM_OFFSET: usize = SECTOR_BYTES - 8;

/// No journal gets this far; keeps arithmetic on numbers from a disk from wrapping.
const MAX_SEQ: u64 = 1 << 62;

const HEADER_MAGIC: u64 = u64::from_le_bytes(*b"FTVMJHDR");
const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"FTVMJREC");

/// One sector's bytes.
pub type Sector = [u8; SECTOR_BYTES];

/// How many records fit a disk of so many sectors.
pub fn capacity(disk_sectors: u64) -> u64 {
    disk_sectors.saturating_sub(HEADER_SECTORS).min(MAX_RECORDS)
}

/// The sector of record `seq` in a journal of `capacity` records. Records are numbered from 1.
pub fn sector_of(seq: u64, capacity: u64) -> u64 {
    HEADER_SECTORS + (seq - 1) % capacity
}

/// The journal's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Starts of a guest on this disk. The header of boot `n` is in sector `n % 2`.
    pub boots: u32,
    /// Records in the ring.
    pub capacity: u64,
    /// Records up to this one were durable when the header was written.
    pub durable_seq: u64,
    /// The disk's number, from 0 on.
    pub disk: u32,
}

/// What a header or record sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<T> {
    /// Zeroes: never written.
    Empty,
    /// A whole header or record.
    Valid(T),
    /// Anything else.
    Bad,
}

impl Header {
    /// The header's sector.
    pub fn encode(&self) -> Sector {
        let mut sector = [0; SECTOR_BYTES];
        put(
            &mut sector,
            0,
            &[
                HEADER_MAGIC,
                u64::from(self.boots),
                self.capacity,
                self.durable_seq,
                u64::from(self.disk),
            ],
        );
        seal(&mut sector);
        sector
    }

    /// Reads a header sector.
    pub fn decode(sector: &Sector) -> Content<Self> {
        match open(sector, HEADER_MAGIC) {
            Content::Empty => Content::Empty,
            Content::Bad => Content::Bad,
            Content::Valid(_) => match (u32::try_from(word(sector, 1)), u32::try_from(word(sector, 4))) {
                (Ok(boots), Ok(disk)) => Content::Valid(Self {
                    boots,
                    capacity: word(sector, 2),
                    durable_seq: word(sector, 3),
                    disk,
                }),
                _ => Content::Bad,
            },
        }
    }
}

/// What the requests that came by one network card have added up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Increments.
    pub count: u64,
    /// The hash over them, see [`next_chain`](crate::guest_protocol::next_chain).
    pub chain: u64,
}

/// The word of a record in which a card's tally begins: the further cards' were added behind everything else.
fn tally_word(card: usize) -> usize {
    if card == 0 { 4 } else { 8 + 2 * card }
}

/// One record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Its number, from 1 on.
    pub seq: u64,
    /// The boot that wrote it.
    pub boots: u32,
    /// The request that asked for it.
    pub request_seq: u64,
    /// All cards' tallies right after that request.
    pub tallies: [Tally; MAX_CARDS],
    /// Guest time at that moment.
    pub guest_time_ns: u64,
    /// Records up to this one were durable then.
    pub durable_seq: u64,
    /// Checksum of the record before this one, 0 for the first.
    pub previous: u64,
    /// The number of the disk that it is on, from 0 on.
    pub disk: u32,
}

impl Record {
    /// The record's sector; [`checksum`] of it is what the next record carries.
    pub fn encode(&self) -> Sector {
        let mut sector = [0; SECTOR_BYTES];
        put(
            &mut sector,
            0,
            &[RECORD_MAGIC, self.seq, u64::from(self.boots), self.request_seq],
        );
        put(
            &mut sector,
            6,
            &[
                self.guest_time_ns,
                self.durable_seq,
                self.previous,
                u64::from(self.disk),
            ],
        );
        for (card, tally) in self.tallies.iter().enumerate() {
            put(&mut sector, tally_word(card), &[tally.count, tally.chain]);
        }
        seal(&mut sector);
        sector
    }

    /// Reads a record sector.
    pub fn decode(sector: &Sector) -> Content<Self> {
        match open(sector, RECORD_MAGIC) {
            Content::Empty => Content::Empty,
            Content::Bad => Content::Bad,
            Content::Valid(_) => match (u32::try_from(word(sector, 2)), u32::try_from(word(sector, 9))) {
                (Ok(boots), Ok(disk)) => Content::Valid(Self {
                    seq: word(sector, 1),
                    boots,
                    request_seq: word(sector, 3),
                    tallies: core::array::from_fn(|card| Tally {
                        count: word(sector, tally_word(card)),
                        chain: word(sector, tally_word(card) + 1),
                    }),
                    guest_time_ns: word(sector, 6),
                    durable_seq: word(sector, 7),
                    previous: word(sector, 8),
                    disk,
                }),
                _ => Content::Bad,
            },
        }
    }
}

/// The checksum that a sector ends with.
pub fn checksum(sector: &Sector) -> u64 {
    word(sector, CHECKSUM_OFFSET / 8)
}

/// What a scan keeps of one record sector.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    /// The record's number; 0 for an empty sector, [`Slot::BAD`] for a bad one.
    seq: u64,
    previous: u64,
    checksum: u64,
}

impl Slot {
    const BAD: u64 = u64::MAX;
    /// A sector that was never written.
    pub const EMPTY: Self = Self {
        seq: 0,
        previous: 0,
        checksum: 0,
    };
}

/// One reading of all record sectors.
#[derive(Debug)]
pub struct Scan<'a> {
    slots: &'a mut [Slot],
    durable_seq: u64,
    disk: u32,
}

/// What a scan says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assessment {
    /// The last record of the journal; 0 if it is empty. Records behind a gap do not count.
    pub last_seq: u64,
    /// The last record's checksum, 0 if the journal is empty.
    pub last_checksum: u64,
    /// Bad sectors, missing records and broken links.
    pub errors: u32,
}

impl<'a> Scan<'a> {
    /// Starts a scan of a journal on this disk with as many records as `slots`; `durable_seq` is the header's, or higher if
    /// the reader knows better.
    pub fn new(slots: &'a mut [Slot], durable_seq: u64, disk: u32) -> Self {
        slots.fill(Slot::EMPTY);
        Self::resume(slots, durable_seq, disk)
    }

    /// Goes on with a scan whose slots were kept.
    pub fn resume(slots: &'a mut [Slot], durable_seq: u64, disk: u32) -> Self {
        Self {
            slots,
            durable_seq,
            disk,
        }
    }

    /// The last record that is known to be durable so far.
    pub fn durable_seq(&self) -> u64 {
        self.durable_seq
    }

    /// Takes the record sector number `index` (without the header's sectors).
    pub fn add(&mut self, index: usize, sector: &Sector) {
        let capacity = self.slots.len();
        let Some(slot) = self.slots.get_mut(index) else { return };
        *slot = match Record::decode(sector) {
            Content::Empty => Slot::EMPTY,
            Content::Valid(record) if record.disk == self.disk && belongs(record.seq, index, capacity) => {
                self.durable_seq = self.durable_seq.max(record.durable_seq.min(record.seq - 1));
                Slot {
                    seq: record.seq,
                    previous: record.previous,
                    checksum: checksum(sector),
                }
            }
            Content::Valid(_) | Content::Bad => Slot {
                seq: Slot::BAD,
                ..Slot::EMPTY
            },
        };
    }

    /// Judges what was taken.
    pub fn assess(&self) -> Assessment {
        let capacity = self.slots.len() as u64;
        let oldest = self.durable_seq.saturating_sub(capacity) + 1;
        let bad = self.slots.iter().filter(|slot| slot.seq == Slot::BAD).count() as u32;
        // What was durable must be there, unless a later record took its place.
        let missing = (oldest..=self.durable_seq)
            .filter(|&seq| !matches!(self.slot(seq).seq, found if found == seq || found == seq + capacity || found == Slot::BAD))
            .count() as u32;
        let mut last_seq = self.durable_seq;
        while self.slot(last_seq + 1).seq == last_seq + 1 && self.linked(last_seq + 1) {
            last_seq += 1;
        }
        let unlinked = (oldest..=self.durable_seq)
            .filter(|&seq| {
                seq > 1 && self.slot(seq).seq == seq && self.slot(seq - 1).seq == seq - 1 && !self.linked(seq)
            })
            .count() as u32;
        let last_checksum = if last_seq == 0 { 0 } else { self.slot(last_seq).checksum };
        Assessment {
            last_seq,
            last_checksum,
            errors: bad + missing + unlinked,
        }
    }

    /// The record sectors (without the header's) that hold a record behind a gap, which an append would collide with.
    pub fn leftovers(&self, last_seq: u64) -> impl Iterator<Item = usize> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter(move |(_, slot)| slot.seq > last_seq && slot.seq != Slot::BAD)
            .map(|(i, _)| i)
    }

    fn slot(&self, seq: u64) -> &Slot {
        &self.slots[((seq - 1) % self.slots.len() as u64) as usize]
    }

    fn linked(&self, seq: u64) -> bool {
        let before = if seq == 1 { 0 } else { self.slot(seq - 1).checksum };
        self.slot(seq).previous == before
    }
}

fn belongs(seq: u64, index: usize, capacity: usize) -> bool {
    seq > 0 && seq < MAX_SEQ && (seq - 1) % capacity as u64 == index as u64
}

/// Writes words from word number `first` on.
fn put(sector: &mut Sector, first: usize, words: &[u64]) {
    for (place, word) in sector.as_chunks_mut::<8>().0.iter_mut().skip(first).zip(words) {
        *place = word.to_le_bytes();
    }
}

fn seal(sector: &mut Sector) {
    let sum = Checksum::of(&sector[..CHECKSUM_OFFSET]);
    sector[CHECKSUM_OFFSET..].copy_from_slice(&sum.to_le_bytes());
}

fn open(sector: &Sector, magic: u64) -> Content<()> {
    if sector.iter().all(|&byte| byte == 0) {
        Content::Empty
    } else if word(sector, 0) == magic && checksum(sector) == Checksum::of(&sector[..CHECKSUM_OFFSET]) {
        Content::Valid(())
    } else {
        Content::Bad
    }
}

fn word(sector: &Sector, index: usize) -> u64 {
    u64::from_le_bytes(sector.as_chunks::<8>().0[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: usize = 8;

    fn tallies(count: u64, chain: u64) -> [Tally; MAX_CARDS] {
        core::array::from_fn(|card| Tally {
            count: count + card as u64,
            chain: chain + card as u64,
        })
    }

    /// Disk 0 on which records `1..=count` were appended, the durable one always two behind.
    fn disk(count: u64) -> Vec<Sector> {
        let mut sectors = vec![[0; SECTOR_BYTES]; CAPACITY];
        let mut previous = 0;
        for seq in 1..=count {
            let record = Record {
                seq,
                boots: 1,
                request_seq: seq * 10,
                tallies: tallies(seq, 0),
                durable_seq: seq.saturating_sub(2),
                previous,
                ..Record::default()
            };
            let sector = record.encode();
            previous = checksum(&sector);
            sectors[sector_of(seq, CAPACITY as u64) as usize - HEADER_SECTORS as usize] = sector;
        }
        sectors
    }

    fn assess(sectors: &[Sector], durable_seq: u64) -> Assessment {
        let mut slots = [Slot::EMPTY; CAPACITY];
        let mut scan = Scan::new(&mut slots, durable_seq, 0);
        sectors
            .iter()
            .enumerate()
            .for_each(|(index, sector)| scan.add(index, sector));
        scan.assess()
    }

    #[test]
    fn headers_and_records_survive_the_disk() {
        let header = Header {
            boots: 3,
            capacity: 8,
            durable_seq: 17,
            disk: 5,
        };
        assert_eq!(Header::decode(&header.encode()), Content::Valid(header));
        let record = Record {
            seq: 4,
            boots: 2,
            request_seq: 9,
            tallies: tallies(5, 60),
            guest_time_ns: 70,
            durable_seq: 3,
            previous: 80,
            disk: 7,
        };
        assert_eq!(Record::decode(&record.encode()), Content::Valid(record));
        assert_eq!(Record::decode(&[0; SECTOR_BYTES]), Content::Empty);
        assert_eq!(Record::decode(&header.encode()), Content::Bad);
    }

    #[test]
    fn a_sound_journal_has_no_errors_at_any_length() {
        for count in 0..30 {
            let found = assess(&disk(count), 0);
            assert_eq!((found.last_seq, found.errors), (count, 0), "{count} records");
        }
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        for index in 0..CAPACITY {
            for bit in (0..SECTOR_BYTES * 8).step_by(7) {
                let mut sectors = disk(20);
                sectors[index][bit / 8] ^= 1 << (bit % 8);
                assert!(assess(&sectors, 20).errors > 0, "sector {index} bit {bit}");
            }
        }
    }

    #[test]
    fn a_lost_durable_record_is_an_error_and_a_lost_unflushed_one_is_not() {
        let mut sectors = disk(5);
        sectors[1] = [0; SECTOR_BYTES];
        assert_eq!(assess(&sectors, 0).errors, 1);
        let mut sectors = disk(5);
        sectors[3] = [0; SECTOR_BYTES];
        let found = assess(&sectors, 0);
        assert_eq!((found.last_seq, found.errors), (3, 0));
        assert_eq!(
            assess(&sectors, 4).errors,
            1,
            "the header knows that record 4 was durable"
        );
    }

    #[test]
    fn records_behind_a_gap_are_leftovers() {
        let mut sectors = disk(5);
        sectors[3] = [0; SECTOR_BYTES];
        let mut slots = [Slot::EMPTY; CAPACITY];
        let mut scan = Scan::new(&mut slots, 0, 0);
        sectors
            .iter()
            .enumerate()
            .for_each(|(index, sector)| scan.add(index, sector));
        assert_eq!(scan.leftovers(3).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn an_old_or_foreign_record_is_an_error() {
        let mut sectors = disk(12);
        sectors[0] = disk(1)[0];
        assert_eq!(assess(&sectors, 12).errors, 1, "record 1 where 9 was durable");
        let mut sectors = disk(8);
        sectors.swap(2, 3);
        assert!(assess(&sectors, 8).errors >= 2, "records in each other's place");
        let mut other = disk(8);
        let stranger = Record {
            seq: 3,
            tallies: tallies(99, 0),
            ..Record::default()
        }
        .encode();
        other[2] = stranger;
        assert!(
            assess(&other, 8).errors >= 1,
            "a valid record that the next one does not follow"
        );
        let mut other = disk(8);
        let Content::Valid(last) = Record::decode(&other[7]) else {
            panic!("it was written");
        };
        other[7] = Record { disk: 1, ..last }.encode();
        assert_eq!(assess(&other, 8).errors, 1, "the last record of another disk");
    }
}
