//! The arbiter of the model world: one record, compared and swapped, sometimes forgetful.

use ftvm_protocol::identity::ArbiterUid;
use ftvm_protocol::record::{Record, Snapshot};

/// The arbiter.
#[derive(Debug, Clone)]
pub struct Arbiter {
    now: Option<Snapshot>,
    past: Vec<Snapshot>,
    versions: u64,
    uids: u128,
    /// Counts restores from a backup: terms may repeat after one.
    pub generation: u64,
    /// The record was deleted at least once, or restored.
    pub disturbed: bool,
}

/// What the arbiter does with a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// Written.
    Won(Snapshot),
    /// UID or version differ.
    Conflict,
    /// There is no record.
    Gone,
}

impl Arbiter {
    /// With the first record.
    pub fn new(record: Record) -> Self {
        let first = Snapshot {
            record,
            uid: ArbiterUid(1),
            version: 1,
        };
        Self {
            now: Some(first),
            past: Vec::new(),
            versions: 1,
            uids: 1,
            generation: 0,
            disturbed: false,
        }
    }

    /// The record.
    pub fn get(&self) -> Option<&Snapshot> {
        self.now.as_ref()
    }

    fn write(&mut self, record: Record, uid: ArbiterUid) -> Snapshot {
        self.versions += 1;
        let next = Snapshot {
            record,
            uid,
            version: self.versions,
        };
        self.past.extend(self.now.replace(next.clone()));
        next
    }

    /// Compare and swap.
    pub fn put(&mut self, uid: ArbiterUid, version: u64, record: Record) -> Put {
        match &self.now {
            None => Put::Gone,
            Some(now) if now.uid != uid || now.version != version => Put::Conflict,
            Some(_) => Put::Won(self.write(record, uid)),
        }
    }

    /// A write that does not compare (for mutations).
    pub fn put_blindly(&mut self, record: Record) -> Snapshot {
        let uid = match &self.now {
            Some(now) => now.uid,
            None => {
                self.uids += 1;
                ArbiterUid(self.uids)
            }
        };
        self.write(record, uid)
    }

    /// Somebody deletes the record; returns a copy that somebody may have kept.
    pub fn delete(&mut self, back: usize) -> Option<Record> {
        let mut all: Vec<_> = self.past.drain(..).chain(self.now.take()).collect();
        self.disturbed = true;
        all.truncate(all.len().saturating_sub(back).max(1));
        all.pop().map(|snapshot| snapshot.record)
    }

    /// The operator creates it again.
    pub fn recreate(&mut self, record: Record) -> Snapshot {
        self.uids += 1;
        self.write(record, ArbiterUid(self.uids))
    }

    /// Restored from a backup that is `back` writes old; the version goes on counting.
    pub fn restore(&mut self, back: usize) -> bool {
        if back == 0 || back > self.past.len() {
            return false;
        }
        let at = self.past.len() - back;
        let old = self.past[at].clone();
        self.past.truncate(at);
        self.versions += 1;
        self.now = Some(Snapshot {
            version: self.versions,
            ..old
        });
        self.generation += 1;
        self.disturbed = true;
        true
    }

    /// Somebody applies an old copy of a deleted record: a new object, which names no predecessor.
    pub fn apply_copy(&mut self, record: Record) {
        self.generation += 1;
        self.recreate(Record {
            predecessor: None,
            ..record
        });
    }

    /// How many older records a backup could have.
    pub fn backups(&self) -> usize {
        self.past.len()
    }
}
