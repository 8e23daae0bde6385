//! What fails of a seat's storage, noted where the operating system says it: whoever gets the error makes words of it, and ends a session or a request.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::storage::Storage;
use crate::control::{FailingStorage, StorageKind, StoragePart};

/// What failed first of each part of a seat's storage.
#[derive(Debug, Default)]
pub struct Failures(Mutex<BTreeMap<StoragePart, (StorageKind, String)>>);

impl Failures {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<StoragePart, (StorageKind, String)>> {
        // Changed in single steps, so a panic elsewhere leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something failed. Of each part what failed first is kept: the rest mostly follows from it.
    pub fn note(&self, part: StoragePart, error: &io::Error, what: impl FnOnce() -> String) {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StorageKind::Full,
            _ => StorageKind::Failed,
        };
        let mut failed = self.lock();
        failed
            .entry(part)
            .or_insert_with(|| (kind, format!("{}: {error}", what())));
    }

    /// The part works again.
    pub fn forget(&self, part: StoragePart) {
        self.lock().remove(&part);
    }

    /// How this part failed, if it did.
    pub fn kind(&self, part: StoragePart) -> Option<StorageKind> {
        self.lock().get(&part).map(|(kind, _)| *kind)
    }

    /// Everything that failed, disks first.
    pub fn told(&self) -> Vec<FailingStorage> {
        let failed = self.lock();
        let told = failed.iter().map(|(part, (kind, why))| FailingStorage {
            part: *part,
            kind: *kind,
            under_guest: false,
            why: why.clone(),
        });
        told.collect()
    }
}

/// A part of a seat's storage.
pub struct Noted {
    storage: Arc<dyn Storage>,
    part: StoragePart,
    failures: Arc<Failures>,
}

impl Noted {
    /// Does the same as `storage`, and notes what fails.
    pub fn new(storage: Arc<dyn Storage>, part: StoragePart, failures: Arc<Failures>) -> Self {
        Self {
            storage,
            part,
            failures,
        }
    }

    fn judge(&self, result: io::Result<()>, what: impl FnOnce() -> String) -> io::Result<()> {
        result.inspect_err(|error| self.failures.note(self.part, error, what))
    }
}

impl Storage for Noted {
    fn size_bytes(&self) -> u64 {
        self.storage.size_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let result = self.storage.read_at(offset, buf);
        self.judge(result, || format!("reading {} bytes at {offset}", buf.len()))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let result = self.storage.write_at(offset, data);
        self.judge(result, || format!("writing {} bytes at {offset}", data.len()))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let result = self.storage.zero(offset, len);
        self.judge(result, || format!("zeroing {len} bytes at {offset}"))
    }

    fn zero_anew(&self, offset: u64, len: u64) -> io::Result<()> {
        let result = self.storage.zero_anew(offset, len);
        self.judge(result, || format!("zeroing {len} bytes at {offset}"))
    }

    fn sync(&self) -> io::Result<()> {
        let result = self.storage.sync();
        self.judge(result, || "syncing".to_owned())
    }

    fn identity(&self) -> Option<u128> {
        self.storage.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::testing::MemStorage;

    #[test]
    fn what_failed_first_of_each_part_is_told_until_it_works_again() {
        let failures = Arc::new(Failures::default());
        let parts = [StoragePart::Journal, StoragePart::Disk(1), StoragePart::Disk(0)];
        let disks = parts.map(|_| MemStorage::called(vec![0; 4096], 7));
        let noted = |index: usize| Noted::new(disks[index].clone(), parts[index], failures.clone());
        let (journal, disk) = (noted(0), noted(1));
        assert_eq!((journal.size_bytes(), journal.identity()), (4096, Some(7)));
        journal.write_at(512, &[1; 512]).expect("no fault");
        disk.sync().expect("no fault");
        noted(2).read_at(0, &mut [0; 8]).expect("no fault");
        assert!(failures.told().is_empty());
        disks[0].fail_after(0, io::ErrorKind::QuotaExceeded);
        disks[1].fail_after(0, io::ErrorKind::BrokenPipe);
        let error = journal.write_at(0, &[1; 512]).expect_err("it is full");
        assert_eq!(
            error.kind(),
            io::ErrorKind::QuotaExceeded,
            "whoever asked is told the same"
        );
        disk.sync().expect_err("it fails");
        disks[0].fail_after(0, io::ErrorKind::BrokenPipe);
        journal.sync().expect_err("it fails otherwise");
        let told = failures.told();
        let told: Vec<_> = told
            .iter()
            .map(|failed| (failed.part, failed.kind, &failed.why))
            .collect();
        let [
            (StoragePart::Disk(1), StorageKind::Failed, sync),
            (StoragePart::Journal, StorageKind::Full, write),
        ] = &told[..]
        else {
            panic!("{told:?}")
        };
        assert!(
            sync.starts_with("syncing: ") && write.starts_with("writing 512 bytes at 0: "),
            "{told:?}"
        );
        assert_eq!(failures.kind(StoragePart::Journal), Some(StorageKind::Full));
        failures.forget(StoragePart::Disk(1));
        assert_eq!((failures.kind(StoragePart::Disk(1)), failures.told().len()), (None, 1));
    }
}
