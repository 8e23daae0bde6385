//! The arbiter as a folder on a POSIX file system, local or shared (NFS).
//!
//! ```text
//!   identity               UUID of the arbiter, drawn when the folder is set up
//!   record.00000000000000000001      the record of version 1, never changed once it is there
//!   record.00000000000000000002      ...
//!   temporary.*            being written, or left over from a crash: nobody reads them
//! ```
//!
//! A swap writes a temporary file, makes it durable and `link(2)`s it to the name of the next version: that name can be created
//! once, whoever tries, so of all that swap over one version one wins. After *any* error of link the file under that name is
//! compared by its nonce: a network file system may send a request twice and report "exists" after the first one succeeded.
//!
//! A spare temporary file, full of spaces and durable, is made while nobody waits: writing a record over it (spaces behind
//! JSON mean nothing) changes neither its size nor its blocks, so making that durable takes the device one write and no
//! transaction of the file system.
//!
//! Invariant: a temporary file that was linked, or may have been, is never written again.
//!
//! Invariant: versions have no gaps and files are never removed, so existence is monotonic and the newest version is found by
//! opening names, never by listing a folder (listings of network file systems are cached).
//!
//! Invariant: nobody acts on a record that could vanish: winner and reader both fsync the folder before they report it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ftvm_protocol::core::{ReadOutcome, SwapOutcome};
use ftvm_protocol::identity::ArbiterUid;
use ftvm_protocol::record::{Record, Snapshot};
use serde::{Deserialize, Serialize};

use super::files::{Files, PosixFiles};
use super::{Arbiter, Said};
use crate::random;

/// Format of the record files.
const FORMAT: u32 = 1;
/// Size of a spare file: a record takes less than a quarter of it.
const SPARE_BYTES: usize = 4096;

/// Errors of the file arbiter.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// The folder is gone or can't be used.
    #[error(
        "arbiter folder {folder}: {what} failed ({source}); it must exist, be writable and, for two machines, be shared \
         by both: mount it again, or free space, or mend its permissions"
    )]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The folder is there and empty.
    #[error(
        "arbiter folder {folder} is not set up: has the share been mounted? `ftvm standalone up` sets up a new one"
    )]
    NotSetUp {
        /// The folder.
        folder: PathBuf,
    },
    /// A file is not what it should be.
    #[error("arbiter file {file} is damaged ({why}): restore the folder from where it came, never edit it")]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Why.
        why: String,
    },
    /// The record was created before, for something else.
    #[error(
        "arbiter folder {folder} already holds the record of another virtual machine or seat; choose another folder"
    )]
    Exists {
        /// The folder.
        folder: PathBuf,
    },
}

/// A record file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    uid: ArbiterUid,
    version: u64,
    record: Record,
    /// Over the JSON of `record`.
    crc32: u32,
}

/// The file arbiter of one virtual machine.
#[derive(Debug)]
pub struct FileArbiter<F: Files = PosixFiles> {
    folder: PathBuf,
    files: F,
    /// A version that existed and was durable, so that the search begins there and a reader need not fsync again.
    durable: AtomicU64,
    /// A durable file of spaces that no other process knows.
    spare: Mutex<Option<PathBuf>>,
}

impl FileArbiter {
    /// The arbiter in this folder, which need not exist now.
    pub fn new(folder: impl Into<PathBuf>) -> FileArbiter {
        FileArbiter::with_files(folder, PosixFiles)
    }
}

impl<F: Files> FileArbiter<F> {
    /// With other file system operations, for tests.
    pub fn with_files(folder: impl Into<PathBuf>, files: F) -> FileArbiter<F> {
        FileArbiter {
            folder: folder.into(),
            files,
            durable: AtomicU64::new(0),
            spare: Mutex::default(),
        }
    }

    /// Sets the folder up with a first record, or finds it set up with the same first record by an earlier attempt.
    ///
    /// The record is made from the drawn identity. Whoever races here, there is one identity and one first record.
    pub fn set_up(&self, first: &Record) -> Result<ArbiterUid, ArbiterError> {
        std::fs::create_dir_all(&self.folder).map_err(|source| self.folder_error("creating it", source))?;
        let drawn = ArbiterUid(random::u128());
        self.publish(drawn.to_string().as_bytes(), &self.folder.join("identity"))?;
        let uid = self.identity()?;
        let bytes = encode(uid, 1, first);
        let path = self.path(1);
        self.publish(&bytes, &path)?;
        let stored = self.load(1, uid)?.ok_or_else(|| self.not_set_up())?;
        if stored.holder != first.holder {
            return Err(ArbiterError::Exists {
                folder: self.folder.clone(),
            });
        }
        Ok(uid)
    }

    /// The newest record.
    pub fn newest(&self) -> Result<Option<Snapshot>, ArbiterError> {
        self.files
            .touch(&self.temporary())
            .map_err(|source| self.folder_error("writing", source))?;
        let uid = self.identity()?;
        let Some(version) = self.newest_version()? else {
            return Ok(None);
        };
        if version > self.durable.load(Ordering::Relaxed) {
            let synced = self.files.sync_folder(&self.folder);
            synced.map_err(|source| self.folder_error("fsync", source))?;
        }
        let record = self.load(version, uid)?.ok_or_else(|| self.not_set_up())?;
        self.is_durable(version);
        Ok(Some(Snapshot { record, uid, version }))
    }

    fn try_swap(&self, uid: ArbiterUid, version: u64, record: &Record, deadline: Instant) -> Said<SwapOutcome> {
        let said = |outcome, why: String| (outcome, Some(why));
        let current = match self
            .identity()
            .and_then(|found| Ok((found, self.load(version, found)?)))
        {
            Ok((found, _)) if found != uid => {
                return said(
                    SwapOutcome::Conflict,
                    format!("arbiter has identity {found}, not {uid}"),
                );
            }
            Ok((_, Some(current))) => current,
            Ok((_, None)) => return said(SwapOutcome::Conflict, format!("arbiter has no version {version}")),
            Err(error) => return said(SwapOutcome::NotSent, error.to_string()),
        };
        let Some(next) = version.checked_add(1).filter(|_| record.term > current.term) else {
            return said(
                SwapOutcome::NotSent,
                format!("term {} does not follow {}", record.term, current.term),
            );
        };
        let path = self.path(next);
        let temporary = match self.write(&encode(uid, next, record)) {
            Ok(temporary) => temporary,
            Err(source) => return said(SwapOutcome::NotSent, self.folder_error("writing", source).to_string()),
        };
        let said = if Instant::now() >= deadline {
            said(
                SwapOutcome::NotSent,
                "the deadline passed before the record was to be linked".to_owned(),
            )
        } else {
            self.link(&temporary, &path, uid, next, record)
        };
        // A leftover is only untidy.
        let _ = self.files.remove(&temporary);
        said
    }

    fn spare(&self) -> MutexGuard<'_, Option<PathBuf>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A temporary file with these contents, durable: the spare one, or else a new one.
    fn write(&self, contents: &[u8]) -> std::io::Result<PathBuf> {
        let spare = self.spare().take_if(|_| contents.len() <= SPARE_BYTES);
        if let Some(spare) = spare {
            // Over everything, whatever became of the file since.
            let mut whole = contents.to_vec();
            whole.resize(SPARE_BYTES, b' ');
            if self.files.overwrite(&spare, &whole).is_ok() {
                return Ok(spare);
            }
            // Nothing else knows the name, so nothing of it can ever count.
            let _ = self.files.remove(&spare);
        }
        let temporary = self.temporary();
        let created = self.files.create(&temporary, contents);
        created.map(|()| temporary.clone()).inspect_err(|_| {
            let _ = self.files.remove(&temporary);
        })
    }

    /// The step that decides.
    fn link(&self, temporary: &Path, path: &Path, uid: ArbiterUid, next: u64, record: &Record) -> Said<SwapOutcome> {
        let linked = self.files.link(temporary, path);
        if let Err(error) = &linked {
            match self.load(next, uid) {
                Ok(Some(found)) if found.nonce == record.nonce => {}
                Ok(Some(found)) => {
                    return (
                        SwapOutcome::Conflict,
                        Some(format!("term {} was written by {}", found.term, found.holder)),
                    );
                }
                Ok(None) => {
                    return (
                        SwapOutcome::Unknown,
                        Some(format!("link to {}: {error}", path.display())),
                    );
                }
                Err(unread) => return (SwapOutcome::Unknown, Some(format!("link: {error}; then {unread}"))),
            }
        }
        if let Err(source) = self.files.sync_folder(&self.folder) {
            return (
                SwapOutcome::Unknown,
                Some(self.folder_error("fsync", source).to_string()),
            );
        }
        self.is_durable(next);
        (
            SwapOutcome::Won(Snapshot {
                record: record.clone(),
                uid,
                version: next,
            }),
            None,
        )
    }

    /// Creates `path` with these contents unless it exists; durable either way.
    fn publish(&self, contents: &[u8], path: &Path) -> Result<(), ArbiterError> {
        let temporary = self.temporary();
        self.files
            .create(&temporary, contents)
            .map_err(|source| self.folder_error("writing", source))?;
        let linked = self.files.link(&temporary, path);
        // A leftover is only untidy.
        let _ = self.files.remove(&temporary);
        match linked {
            Ok(()) => {}
            Err(source) if source.kind() == ErrorKind::AlreadyExists => {}
            Err(source) => return Err(self.folder_error("link", source)),
        }
        self.files
            .sync_folder(&self.folder)
            .map_err(|source| self.folder_error("fsync", source))
    }

    fn identity(&self) -> Result<ArbiterUid, ArbiterError> {
        let file = self.folder.join("identity");
        let contents = match self.files.read(&file) {
            Ok(contents) => contents,
            Err(error) if error.kind() == ErrorKind::NotFound && self.folder.is_dir() => return Err(self.not_set_up()),
            Err(source) => return Err(self.folder_error("reading its identity", source)),
        };
        let text = String::from_utf8_lossy(&contents);
        text.trim().parse().map_err(|error| ArbiterError::Damaged {
            file,
            why: format!("{error}"),
        })
    }

    /// The record of this version, if there is one.
    fn load(&self, version: u64, uid: ArbiterUid) -> Result<Option<Record>, ArbiterError> {
        let file = self.path(version);
        let contents = match self.files.read(&file) {
            Ok(contents) => contents,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.folder_error("reading a record", source)),
        };
        let damaged = |why: String| ArbiterError::Damaged {
            file: file.clone(),
            why,
        };
        let stored: Stored = serde_json::from_slice(&contents).map_err(|error| damaged(error.to_string()))?;
        if stored.format != FORMAT || stored.version != version || stored.uid != uid {
            return Err(damaged("it belongs to another arbiter, version or format".to_owned()));
        }
        if checksum(&stored.record) != stored.crc32 {
            return Err(damaged("its checksum differs".to_owned()));
        }
        Ok(Some(stored.record))
    }

    fn is_durable(&self, version: u64) {
        self.durable.fetch_max(version, Ordering::Relaxed);
    }

    /// Gallops from a known version, then bisects: existence is monotonic.
    fn newest_version(&self) -> Result<Option<u64>, ArbiterError> {
        let mut low = self.durable.load(Ordering::Relaxed).max(1);
        if !self.exists(low)? {
            // The folder is another one than before; its identity says so to whoever asks.
            self.durable.store(0, Ordering::Relaxed);
            low = 1;
            if !self.exists(low)? {
                return Ok(None);
            }
        }
        let mut step = 1u64;
        let mut high = loop {
            let Some(candidate) = low.checked_add(step) else {
                return Ok(Some(low));
            };
            if !self.exists(candidate)? {
                break candidate;
            }
            low = candidate;
            step = step.saturating_mul(2);
        };
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.exists(middle)? {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(Some(low))
    }

    fn exists(&self, version: u64) -> Result<bool, ArbiterError> {
        match self.files.read(&self.path(version)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(source) => Err(self.folder_error("reading a record", source)),
        }
    }

    fn path(&self, version: u64) -> PathBuf {
        self.folder.join(format!("record.{version:020}"))
    }

    fn temporary(&self) -> PathBuf {
        self.folder.join(format!("temporary.{:032x}", random::u128()))
    }

    fn folder_error(&self, what: &'static str, source: std::io::Error) -> ArbiterError {
        ArbiterError::Folder {
            folder: self.folder.clone(),
            what,
            source,
        }
    }

    fn not_set_up(&self) -> ArbiterError {
        ArbiterError::NotSetUp {
            folder: self.folder.clone(),
        }
    }
}

impl<F: Files> Arbiter for FileArbiter<F> {
    fn read(&self) -> Said<ReadOutcome> {
        match self.newest() {
            Ok(Some(snapshot)) => (ReadOutcome::Found(snapshot), None),
            Ok(None) => (ReadOutcome::Gone, Some(self.not_set_up().to_string())),
            Err(error) => (ReadOutcome::Unreachable, Some(error.to_string())),
        }
    }

    fn swap(&self, uid: ArbiterUid, version: u64, record: &Record, deadline: Instant) -> Said<SwapOutcome> {
        self.try_swap(uid, version, record, deadline)
    }

    fn prepare(&self) {
        if self.spare().is_some() {
            return;
        }
        let temporary = self.temporary();
        // Without one a swap takes longer, that is all; the folder's trouble is told to whoever asks.
        if self.files.create(&temporary, &[b' '; SPARE_BYTES]).is_ok() {
            let unused = self.spare().replace(temporary);
            // Made by two requests at a time.
            unused.map(|unused| self.files.remove(&unused));
        } else {
            let _ = self.files.remove(&temporary);
        }
    }
}

impl<F: Files> Drop for FileArbiter<F> {
    fn drop(&mut self) {
        if let Some(spare) = self.spare().take() {
            // A leftover is only untidy.
            let _ = self.files.remove(&spare);
        }
    }
}

fn encode(uid: ArbiterUid, version: u64, record: &Record) -> Vec<u8> {
    let stored = Stored {
        format: FORMAT,
        uid,
        version,
        record: record.clone(),
        crc32: checksum(record),
    };
    // Plain data with text keys always encodes.
    serde_json::to_vec_pretty(&stored).unwrap_or_default()
}

fn checksum(record: &Record) -> u32 {
    crc32fast::hash(&serde_json::to_vec(record).unwrap_or_default())
}
