//! The embedded guest's block load: what a request asks for, what a disk's blocks must hold, and what the guest tells of it.
//!
//! The guest compiles this very file, so it uses `core` only; tests use it to damage a disk where the load reads it.
//!
//! The load has an area of the first disk to itself, behind everything that the journal ever uses. The area is a row of
//! units of [`UNIT_BYTES`]; a block is one or more of them. What a unit must hold follows from its number and its
//! *generation*, a number that each write request has anew: so a unit that was never written, one of an earlier write, one
//! of another place and one with a wrong bit are all found when they are read.

use crate::guest_journal::{HEADER_SECTORS, MAX_RECORDS, SECTOR_BYTES};

/// Where the area begins on the disk, in bytes.
pub const AREA_OFFSET: u64 = 8 << 20;
/// The area is never larger than this, however large its disk.
pub const AREA_MAX_BYTES: u64 = 56 << 20;
/// Unit of the area.
pub const UNIT_BYTES: usize = 4096;
/// Units of the largest area.
pub const UNITS_MAX: usize = (AREA_MAX_BYTES / UNIT_BYTES as u64) as usize;
/// Most requests that are in the queue at a time.
pub const DEPTH_MAX: usize = 32;
/// Largest block.
pub const BLOCK_MAX_BYTES: usize = 256 << 10;
/// Size of an encoded [`BlockReport`].
pub const BLOCK_REPORT_BYTES: usize = 8 * REPORT_WORDS;

const REPORT_WORDS: usize = 14;
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
const WRITES: u64 = 1 << 0;
const RANDOM: u64 = 1 << 1;

const _: () = assert!((HEADER_SECTORS + MAX_RECORDS) * SECTOR_BYTES as u64 <= AREA_OFFSET);

/// The area's size on a disk of so many sectors: a whole number of blocks of any size, 0 on a small disk.
pub fn area_bytes(disk_sectors: u64) -> u64 {
    let behind = disk_sectors
        .saturating_mul(SECTOR_BYTES as u64)
        .saturating_sub(AREA_OFFSET);
    let block = BLOCK_MAX_BYTES as u64;
    behind.min(AREA_MAX_BYTES) / block * block
}

/// What a block load does. It ends after `limit_ms` or `limit_requests`, whichever comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLoad {
    /// It writes; otherwise it reads, and checks what it gets.
    pub writes: bool,
    /// One block anywhere after the other; otherwise one behind the other, and from the first again after the last.
    pub random: bool,
    /// Bytes of a request: 4, 8, 16, 32, 64, 128 or 256 KiB.
    pub block_bytes: u32,
    /// Requests that are in the queue at a time, a flush among them; 1 to [`DEPTH_MAX`].
    pub depth: u32,
    /// A flush after so many writes, and one in the end; 0 for none.
    pub flush_every: u32,
    /// Ends after so many milliseconds; 0 for no such limit.
    pub limit_ms: u32,
    /// Ends after so many requests, flushes not counted; 0 for no such limit.
    pub limit_requests: u32,
}

impl BlockLoad {
    /// The two arguments of its request.
    pub fn encode(&self) -> (u64, u64) {
        let writes = if self.writes { WRITES } else { 0 };
        let random = if self.random { RANDOM } else { 0 };
        let units = u64::from(self.block_bytes) / UNIT_BYTES as u64;
        let arg = writes | random | u64::from(self.depth) << 8 | units << 16 | u64::from(self.flush_every) << 32;
        (arg, u64::from(self.limit_ms) | u64::from(self.limit_requests) << 32)
    }

    /// Reads a request's arguments. None if they ask for something that there is not.
    pub fn decode(arg: u64, arg2: u64) -> Option<Self> {
        let units = arg >> 16 & 0xFFFF;
        let load = Self {
            writes: arg & WRITES != 0,
            random: arg & RANDOM != 0,
            block_bytes: u32::try_from(units * UNIT_BYTES as u64).ok()?,
            depth: (arg >> 8 & 0xFF) as u32,
            flush_every: (arg >> 32) as u32,
            limit_ms: arg2 as u32,
            limit_requests: (arg2 >> 32) as u32,
        };
        let sound = units.is_power_of_two()
            && load.block_bytes as usize <= BLOCK_MAX_BYTES
            && (1..=DEPTH_MAX).contains(&(load.depth as usize))
            && (load.writes || load.flush_every == 0)
            && (load.limit_ms > 0 || load.limit_requests > 0)
            && load.encode() == (arg, arg2);
        sound.then_some(load)
    }

    /// Units of a block.
    pub fn block_units(&self) -> u64 {
        u64::from(self.block_bytes) / UNIT_BYTES as u64
    }
}

/// The first word of a unit's data; the others follow from it.
fn seed(unit: u64, generation: u32) -> u64 {
    let mixed = (unit ^ u64::from(generation).rotate_left(32) ^ GOLDEN).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB)
}

fn word(seed: u64, index: usize) -> u64 {
    let mixed = seed.wrapping_add((index as u64).wrapping_mul(GOLDEN));
    mixed ^ (mixed >> 29)
}

/// Fills a unit with what it holds after a write of this generation.
pub fn fill_unit(unit: u64, generation: u32, bytes: &mut [u8]) {
    let seed = seed(unit, generation);
    let (words, _) = bytes.as_chunks_mut::<8>();
    for (index, bytes) in words.iter_mut().enumerate() {
        *bytes = word(seed, index).to_le_bytes();
    }
}

/// Whether a unit holds what a write of this generation left there.
pub fn unit_holds(unit: u64, generation: u32, bytes: &[u8]) -> bool {
    let seed = seed(unit, generation);
    let (words, rest) = bytes.as_chunks::<8>();
    let mut differ = 0;
    for (index, bytes) in words.iter().enumerate() {
        differ |= u64::from_le_bytes(*bytes) ^ word(seed, index);
    }
    differ == 0 && rest.is_empty()
}

/// The number after this one in a row that looks random and never gets to 0 (xorshift64).
pub fn next_random(state: u64) -> u64 {
    let mut next = state;
    next ^= next << 13;
    next ^= next >> 7;
    next ^ next << 17
}

/// Steps that a power of two is divided into.
const STEPS: usize = 32;
/// Powers of two that are told apart; the last bucket takes what is longer (2^36 ns are 69 s).
const POWERS: usize = 32;

/// Times in nanoseconds, counted in buckets whose width is 1/32 of their power of two.
#[derive(Clone, Debug)]
pub struct Times {
    counts: [u32; STEPS * (POWERS + 1)],
    total: u64,
    max_ns: u64,
}

impl Times {
    /// None yet.
    pub const NEW: Self = Self {
        counts: [0; STEPS * (POWERS + 1)],
        total: 0,
        max_ns: 0,
    };

    /// Forgets all.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
        self.max_ns = 0;
    }

    /// Counts one.
    pub fn add(&mut self, ns: u64) {
        let count = &mut self.counts[bucket(ns)];
        *count = count.saturating_add(1);
        self.total += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// What a report says of them.
    pub fn sum_up(&self) -> Latency {
        Latency {
            p50_ns: self.not_exceeded_by(50),
            p99_ns: self.not_exceeded_by(99),
            max_ns: self.max_ns,
        }
    }

    /// The time that so many of a hundred did not exceed, rounded up to its bucket's end; 0 if there are none.
    fn not_exceeded_by(&self, of_hundred: u64) -> u64 {
        let rank = (self.total * of_hundred).div_ceil(100);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if *count > 0 && seen >= rank {
                return bucket_end(index).min(self.max_ns);
            }
        }
        self.max_ns
    }
}

fn bucket(ns: u64) -> usize {
    if ns < STEPS as u64 {
        return ns as usize;
    }
    let power = (ns.ilog2() - STEPS.ilog2()) as usize;
    let step = (ns >> power) as usize - STEPS;
    ((power + 1) * STEPS + step).min(STEPS * (POWERS + 1) - 1)
}

fn bucket_end(index: usize) -> u64 {
    let (power, step) = (index / STEPS, (index % STEPS) as u64);
    match power {
        0 => step,
        power => ((STEPS as u64 + step + 1) << (power - 1)) - 1,
    }
}

/// How long requests took, from their way into the queue until the driver saw them done, in nanoseconds; zeroes if there were none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Median.
    pub p50_ns: u64,
    /// 99 of 100 did not take longer.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// What the guest tells of a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockReport {
    /// Reads or writes that were done, whether they succeeded or not.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Flushes that were done, likewise.
    pub flushes: u64,
    /// Requests and flushes that the disk answered with an error.
    pub failed: u64,
    /// Units that were read with other bytes than were written.
    pub wrong_units: u64,
    /// The first one that was found; meaningless if there is none.
    pub first_wrong_unit: u64,
    /// From the first request until the last one was done.
    pub elapsed_ns: u64,
    /// The area's size.
    pub area_bytes: u64,
    /// Of reads or writes.
    pub latency: Latency,
    /// Of flushes.
    pub flush_latency: Latency,
}

impl BlockReport {
    /// The report's bytes: its fields in order, little endian.
    pub fn encode(&self) -> [u8; BLOCK_REPORT_BYTES] {
        let words: [u64; REPORT_WORDS] = [
            self.requests,
            self.bytes,
            self.flushes,
            self.failed,
            self.wrong_units,
            self.first_wrong_unit,
            self.elapsed_ns,
            self.area_bytes,
            self.latency.p50_ns,
            self.latency.p99_ns,
            self.latency.max_ns,
            self.flush_latency.p50_ns,
            self.flush_latency.p99_ns,
            self.flush_latency.max_ns,
        ];
        let mut bytes = [0; BLOCK_REPORT_BYTES];
        let (places, _) = bytes.as_chunks_mut::<8>();
        for (place, word) in places.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        bytes
    }

    /// Reads a report.
    pub fn decode(bytes: &[u8; BLOCK_REPORT_BYTES]) -> Self {
        let mut words = [0; REPORT_WORDS];
        let (places, _) = bytes.as_chunks::<8>();
        for (word, place) in words.iter_mut().zip(places) {
            *word = u64::from_le_bytes(*place);
        }
        let [
            requests,
            bytes,
            flushes,
            failed,
            wrong_units,
            first_wrong_unit,
            elapsed_ns,
            area_bytes,
            times @ ..,
        ] = words;
        let [p50_ns, p99_ns, max_ns, flush_p50_ns, flush_p99_ns, flush_max_ns] = times;
        Self {
            requests,
            bytes,
            flushes,
            failed,
            wrong_units,
            first_wrong_unit,
            elapsed_ns,
            area_bytes,
            latency: Latency { p50_ns, p99_ns, max_ns },
            flush_latency: Latency {
                p50_ns: flush_p50_ns,
                p99_ns: flush_p99_ns,
                max_ns: flush_max_ns,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: BlockLoad = BlockLoad {
        writes: true,
        random: true,
        block_bytes: 256 << 10,
        depth: 32,
        flush_every: u32::MAX,
        limit_ms: 7,
        limit_requests: u32::MAX,
    };

    #[test]
    fn loads_survive_the_wire() {
        for block_bytes in (12..=18).map(|power| 1 << power) {
            for (writes, random, depth) in [(true, false, 1), (true, true, 31), (false, true, 32), (false, false, 2)] {
                let load = BlockLoad {
                    writes,
                    random,
                    block_bytes,
                    depth,
                    flush_every: if writes { 9 } else { 0 },
                    ..LOAD
                };
                let (arg, arg2) = load.encode();
                assert_eq!(BlockLoad::decode(arg, arg2), Some(load));
            }
        }
    }

    #[test]
    fn what_there_is_not_is_refused() {
        let refused = |load: BlockLoad| {
            let (arg, arg2) = load.encode();
            assert_eq!(BlockLoad::decode(arg, arg2), None, "{load:?}");
        };
        for block_bytes in [0, 12 << 10, 512 << 10] {
            refused(BlockLoad { block_bytes, ..LOAD });
        }
        for depth in [0, 33, 255] {
            refused(BlockLoad { depth, ..LOAD });
        }
        // A load that reads has nothing to flush, and one without an end never answers.
        refused(BlockLoad { writes: false, ..LOAD });
        refused(BlockLoad {
            limit_ms: 0,
            limit_requests: 0,
            ..LOAD
        });
        let (arg, arg2) = LOAD.encode();
        assert_eq!(BlockLoad::decode(arg | 1 << 2, arg2), None, "a bit that nobody knows");
        assert_eq!(BlockLoad::decode(0, 0), None);
        assert_eq!(BlockLoad::decode(u64::MAX, u64::MAX), None);
    }

    #[test]
    fn the_area_lies_behind_the_journal_and_inside_the_disk() {
        let sectors = |bytes: u64| bytes / SECTOR_BYTES as u64;
        for (disk, area) in [
            (0, 0),
            (4 << 20, 0),
            (8 << 20, 0),
            ((8 << 20) + (255 << 10), 0),
            (16 << 20, 8 << 20),
            (64 << 20, 56 << 20),
            (1 << 40, 56 << 20),
        ] {
            assert_eq!(area_bytes(sectors(disk)), area, "a disk of {disk} bytes");
            assert!(area == 0 || AREA_OFFSET + area <= disk);
        }
        assert_eq!(area_bytes(u64::MAX), AREA_MAX_BYTES);
    }

    /// The judge of what is read.
    #[test]
    fn a_unit_that_is_not_what_was_written_is_found() {
        let mut bytes = [0; UNIT_BYTES];
        assert!(!unit_holds(3, 5, &bytes), "never written");
        fill_unit(3, 5, &mut bytes);
        assert!(unit_holds(3, 5, &bytes));
        assert!(!unit_holds(3, 6, &bytes), "the write before the last");
        assert!(!unit_holds(4, 5, &bytes), "another place's");
        assert!(!unit_holds(5, 3, &bytes), "number and generation are two things");
        for bit in (0..UNIT_BYTES * 8).step_by(61).chain([UNIT_BYTES * 8 - 1]) {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!unit_holds(3, 5, &bytes), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        // Half of it from another write: torn.
        let mut torn = bytes;
        let mut other = [0; UNIT_BYTES];
        fill_unit(3, 4, &mut other);
        torn[UNIT_BYTES / 2..].copy_from_slice(&other[UNIT_BYTES / 2..]);
        assert!(!unit_holds(3, 5, &torn) && !unit_holds(3, 4, &torn));
    }

    #[test]
    fn reports_survive_the_wire() {
        let report = BlockReport {
            requests: 1,
            bytes: 2,
            flushes: 3,
            failed: 4,
            wrong_units: 5,
            first_wrong_unit: 6,
            elapsed_ns: 7,
            area_bytes: 8,
            latency: Latency {
                p50_ns: 9,
                p99_ns: 10,
                max_ns: 11,
            },
            flush_latency: Latency {
                p50_ns: 12,
                p99_ns: 13,
                max_ns: 14,
            },
        };
        let bytes = report.encode();
        assert_eq!(BlockReport::decode(&bytes), report);
        let first: Vec<u8> = bytes.iter().step_by(8).copied().collect();
        assert_eq!(first, (1..=14).collect::<Vec<u8>>(), "as documented");
    }

    #[test]
    fn quantiles_are_within_the_promised_error() {
        let mut times = Times::NEW;
        assert_eq!(times.sum_up(), Latency::default());
        (1..=100_000).for_each(|time| times.add(time));
        let found = times.sum_up();
        assert_eq!(found.max_ns, 100_000);
        for (found, exact) in [(found.p50_ns, 50_000), (found.p99_ns, 99_000)] {
            assert!((exact..=exact + exact / 32).contains(&found), "{found} for {exact}");
        }
        times.add(u64::MAX);
        assert_eq!(times.sum_up().max_ns, u64::MAX);
        times.clear();
        assert_eq!(times.sum_up(), Latency::default());
        times.add(7);
        assert_eq!((times.sum_up().p50_ns, times.sum_up().p99_ns), (7, 7));
    }

    #[test]
    fn every_time_lies_in_its_bucket() {
        let mut before = 0;
        for time in (0..100_000).chain([1 << 30, (1 << 36) - 1]) {
            let index = bucket(time);
            assert!(index >= before && time <= bucket_end(index), "{time}");
            assert!(index == 0 || time > bucket_end(index - 1), "{time} in bucket {index}");
            before = index;
        }
    }

    #[test]
    fn random_numbers_do_not_get_stuck() {
        let mut state = 1;
        let mut high = 0;
        for _ in 0..10_000 {
            state = next_random(state);
            assert_ne!(state, 0);
            high += state >> 63;
        }
        assert!((4_000..6_000).contains(&high), "{high} of 10,000 are in the upper half");
    }
}
