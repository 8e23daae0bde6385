//! What the tests of this module share: a seeded generator, so that every failure can be repeated, and storage that
//! fails.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::epoch::{DiskChange, DiskData};
use super::memory::{PAGE_SIZE, Page};
use super::storage::Storage;

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
pub struct Seeded(u64);

impl Seeded {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }

    pub fn page(&mut self) -> Page {
        let mut page = [0; PAGE_SIZE];
        self.fill(&mut page);
        page
    }
}

/// What a storage in memory does to those who use it.
#[derive(Default)]
pub struct Faults {
    /// Fails every change or sync from this one on, counted from 0.
    pub fail_from: Option<(u64, io::ErrorKind)>,
    /// Operations so far.
    pub operations: u64,
}

struct Contents {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Changes since the last sync: what a power cut may lose, in any part.
    unsynced: Vec<(usize, Vec<u8>)>,
    faults: Faults,
}

/// A volume in memory that knows what a power cut would leave, and that can fail.
pub struct MemStorage(Mutex<Contents>, u128);

impl MemStorage {
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Self::called(bytes, 0)
    }

    /// One that can be told from those with another identity.
    pub fn called(bytes: Vec<u8>, identity: u128) -> Arc<Self> {
        let contents = Contents {
            now: bytes.clone(),
            durable: bytes,
            unsynced: Vec::new(),
            faults: Faults::default(),
        };
        Arc::new(Self(Mutex::new(contents), identity))
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.contents().now.clone()
    }

    /// What is there after a power cut: each sector that was written since the last sync is old or new.
    pub fn after_power_cut(&self, seeded: &mut Seeded) -> Vec<u8> {
        let contents = self.contents();
        let mut bytes = contents.durable.clone();
        // Mostly everything or nothing arrives; the hard cases are in between.
        let chance = seeded.below(5);
        for (offset, data) in &contents.unsynced {
            let mut at = *offset;
            for sector in data.chunks(512) {
                if seeded.below(4) < chance {
                    bytes[at..at + sector.len()].copy_from_slice(sector);
                }
                at += sector.len();
            }
        }
        bytes
    }

    /// Fails from the operation after `after` more of them.
    pub fn fail_after(&self, after: u64, error: io::ErrorKind) {
        let faults = &mut self.contents().faults;
        faults.fail_from = Some((faults.operations + after, error));
    }

    /// Fails no more.
    pub fn work_again(&self) {
        self.contents().faults.fail_from = None;
    }
}

impl Contents {
    fn operation(&mut self) -> io::Result<()> {
        let number = self.faults.operations;
        self.faults.operations += 1;
        match self.faults.fail_from {
            Some((from, error)) if number >= from => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn change(&mut self, offset: u64, data: Vec<u8>) -> io::Result<()> {
        self.operation()?;
        let offset = offset as usize;
        self.now[offset..offset + data.len()].copy_from_slice(&data);
        self.unsynced.push((offset, data));
        Ok(())
    }
}

impl Storage for MemStorage {
    fn size_bytes(&self) -> u64 {
        self.contents().now.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.contents().now[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.contents().change(offset, data.to_vec())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.contents().change(offset, vec![0; len as usize])
    }

    fn sync(&self) -> io::Result<()> {
        let mut contents = self.contents();
        contents.operation()?;
        contents.durable = contents.now.clone();
        contents.unsynced.clear();
        Ok(())
    }

    fn identity(&self) -> Option<u128> {
        Some(self.1)
    }
}

/// A change of a disk of `sectors` sectors.
pub fn random_change(seeded: &mut Seeded, disk: u16, sectors: u64) -> DiskChange {
    let start = seeded.below(sectors - 1);
    let count = 1 + seeded.below(8).min(sectors - start - 1);
    if seeded.below(4) == 0 {
        return DiskChange::zeroed(disk, start * 512, count * 512);
    }
    let data = seeded.bytes(count as usize * 512);
    DiskChange::written(disk, start * 512, &data)
}

/// Changes the bytes of a disk.
pub fn apply_change(disk: &mut [u8], change: &DiskChange) {
    let range = change.offset as usize..change.end() as usize;
    match &change.what {
        DiskData::Zeroed(_) => disk[range].fill(0),
        DiskData::Written(data) => disk[range].copy_from_slice(data),
    }
}
