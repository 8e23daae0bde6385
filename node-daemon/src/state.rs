//! The daemon's state folder: what a later daemon needs to adopt running engines.
//!
//! ```text
//!   daemon.lock                 held while a daemon lives: a second one on this folder is refused
//!   jail/                       empty; engines mount their root here, each in its own mount namespace
//!   seats/VM.SEAT/              of a seat that is a pod: seats/POD-UID/
//!     engine.json               the engine that was started last (EngineRecord), written before its launch message
//!     control.sock              its control listener
//!     exit.json                 its exit report, written by itself
//!     peers.json                peers that were set by request, and the configured ones in whose place they are
//!     over.json                 of a pod that is being deleted: no engine is begun for it any more
//!     engine.log, console.log   its messages, the guest's console
//!     header, journal           unless the configuration puts them elsewhere
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ftvm_protocol::identity::{Incarnation, SeatId};
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::durable;

/// Errors of the state folder.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another daemon uses it.
    #[error(
        "state folder {folder} is in use by another daemon{by}: stop that one, or give this one a folder of its own \
         (`state_folder`)"
    )]
    InUse {
        /// The folder.
        folder: PathBuf,
        /// Its process id, if it could be read.
        by: String,
    },
    /// The system refused.
    #[error("state folder: {what} {path} failed ({source}); check permissions and free space")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path} is damaged ({why}); an engine may still run: look at it before you remove the file")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { what, path, source }
}

/// The state folder of this daemon, locked.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    /// The lock falls with this process, or with the first close of the file.
    _lock: File,
}

impl StateFolder {
    /// Makes the folder if it is missing, and locks it.
    pub fn open(path: &Path) -> Result<StateFolder, StateError> {
        make_folder(path)?;
        let lock_path = path.join("daemon.lock");
        let mut options = OpenOptions::new();
        let mut lock = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io_error("opening", &lock_path))?;
        // A record lock: unlike flock it is not shared with a forked child that has not executed its program yet.
        if rustix::fs::fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let pid = std::fs::read_to_string(&lock_path).unwrap_or_default();
            let by = if pid.trim().is_empty() {
                String::new()
            } else {
                format!(" (process {})", pid.trim())
            };
            return Err(StateError::InUse {
                folder: path.to_owned(),
                by,
            });
        }
        lock.set_len(0).map_err(io_error("writing", &lock_path))?;
        write!(lock, "{}", std::process::id()).map_err(io_error("writing", &lock_path))?;
        make_folder(&path.join("jail"))?;
        Ok(StateFolder {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// Where engines mount their root.
    pub fn jail(&self) -> PathBuf {
        self.path.join("jail")
    }

    /// The folder of a seat, made if it is missing. Names were checked by the configuration.
    pub fn seat(&self, vm: &str, seat: &str) -> Result<SeatFolder, StateError> {
        self.folder(&format!("{vm}.{seat}"))
    }

    /// The folder of a seat that is a pod, made if it is missing.
    pub fn pod(&self, pod: SeatId) -> Result<SeatFolder, StateError> {
        self.folder(&pod.to_string())
    }

    fn folder(&self, name: &str) -> Result<SeatFolder, StateError> {
        let path = self.path.join("seats").join(name);
        make_folder(&path)?;
        Ok(SeatFolder { path })
    }

    /// Pods that have a folder.
    pub fn pods(&self) -> Result<Vec<SeatId>, StateError> {
        let path = self.path.join("seats");
        make_folder(&path)?;
        let entries = std::fs::read_dir(&path).map_err(io_error("listing", &path))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| name.parse().ok()).collect())
    }

    /// Whether a pod has a folder: [`StateFolder::forget_pod`] was not called, or came to nothing.
    pub fn has_pod(&self, pod: SeatId) -> bool {
        let path = self.path.join("seats").join(pod.to_string());
        // Whatever can't be told is not forgotten.
        path.try_exists().unwrap_or(true)
    }

    /// Removes the folder of a pod that is gone, and whose engine is.
    pub fn forget_pod(&self, pod: SeatId) -> Result<(), StateError> {
        let path = self.path.join("seats").join(pod.to_string());
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("removing", &path)(error)),
            _ => Ok(()),
        }
    }
}

fn make_folder(path: &Path) -> Result<(), StateError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io_error("making", path))
}

/// The folder of one seat.
#[derive(Debug, Clone)]
pub struct SeatFolder {
    path: PathBuf,
}

/// What is known of the engine that was started last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineRecord {
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Its process id.
    pub pid: i32,
    /// Its start time in clock ticks since boot (field 22 of `/proc/PID/stat`): process ids are used again.
    pub start_time: u64,
    /// The boot of the machine that this is said of.
    pub boot_id: String,
    /// Its user id, none if it has the daemon's.
    pub uid: Option<u32>,
}

impl SeatFolder {
    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of a file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The control listener's socket.
    pub fn control_socket(&self) -> PathBuf {
        self.file("control.sock")
    }

    /// Opens a file of this folder for appending, keeping one earlier file (`NAME.1`) once it is over `bytes_max`.
    pub fn open_log(&self, name: &str, bytes_max: u64) -> Result<File, StateError> {
        let path = self.file(name);
        if std::fs::metadata(&path).is_ok_and(|data| data.len() > bytes_max) {
            let earlier = self.file(&format!("{name}.1"));
            std::fs::rename(&path, &earlier).map_err(io_error("renaming", &path))?;
        }
        let mut options = OpenOptions::new();
        options
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("opening", &path))
    }

    /// A new, empty file in place of an earlier one.
    pub fn create(&self, name: &str) -> Result<File, StateError> {
        let path = self.file(name);
        remove_if_there(&path)?;
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("creating", &path))
    }

    /// The engine that was started last, if any.
    pub fn engine(&self) -> Result<Option<EngineRecord>, StateError> {
        self.read_json("engine.json")
    }

    /// Whether the engine that was started last may be running: not if the machine was booted since, or no process has its number and start time.
    pub fn may_have_engine(&self) -> Result<bool, StateError> {
        let Some(record) = self.engine()? else {
            return Ok(false);
        };
        if boot_id()? != record.boot_id {
            return Ok(false);
        }
        let process = Path::new("/proc").join(record.pid.to_string());
        let is_there = process.try_exists().map_err(io_error("looking for", &process))?;
        // One that can't be looked at may be it.
        Ok(is_there && start_time(record.pid).is_none_or(|time| time == record.start_time))
    }

    /// Remembers an engine, durably.
    pub fn set_engine(&self, record: &EngineRecord) -> Result<(), StateError> {
        self.write_json("engine.json", record)
    }

    /// Whether it has this file.
    pub fn has(&self, name: &str) -> Result<bool, StateError> {
        let path = self.file(name);
        path.try_exists().map_err(io_error("looking for", &path))
    }

    /// Replaces a JSON file of this folder, durably and in one step.
    pub fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let path = self.file(name);
        // Plain data always encodes.
        let text = serde_json::to_vec_pretty(value).unwrap_or_default();
        durable::replace(&path, &text).map_err(io_error("writing", &path))
    }

    /// Forgets the engine: it is known to have ended.
    pub fn forget_engine(&self) -> Result<(), StateError> {
        remove_if_there(&self.file("engine.json"))
    }

    /// A JSON file of this folder, none if it is missing or empty.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.file(name);
        let text = match std::fs::read(&path) {
            Ok(text) if text.is_empty() => return Ok(None),
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("reading", &path)(error)),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| StateError::Damaged {
                path,
                why: error.to_string(),
            })
    }

    /// Removes a leftover socket.
    pub fn remove_control_socket(&self) -> Result<(), StateError> {
        remove_if_there(&self.control_socket())
    }
}

/// Removes a file; one that is not there is fine.
pub fn remove_if_there(path: &Path) -> Result<(), StateError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Identity of this boot of the machine.
pub fn boot_id() -> Result<String, StateError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(io_error("reading", path))?;
    Ok(text.trim().to_owned())
}

/// Start time of a process in clock ticks since boot; none if there is no such process.
///
/// Field 22 of `/proc/PID/stat` (proc(5)); the name in field 2 may contain anything, so fields are counted from its end.
pub fn start_time(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = text.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    #[test]
    fn engines_are_remembered_and_forgotten() {
        let folder = Folder::new("engines");
        let seat = StateFolder::open(folder.path()).unwrap().seat("vm", "a").unwrap();
        assert_eq!(seat.engine().unwrap(), None);
        let record = EngineRecord {
            incarnation: Incarnation {
                seat: SeatId(1),
                start: 2,
            },
            pid: 3,
            start_time: 4,
            boot_id: boot_id().unwrap(),
            uid: None,
        };
        seat.set_engine(&record).unwrap();
        assert_eq!(seat.engine().unwrap(), Some(record));
        std::fs::write(seat.file("engine.json"), "{").unwrap();
        assert!(matches!(seat.engine(), Err(StateError::Damaged { .. })));
        seat.forget_engine().unwrap();
        assert_eq!(seat.engine().unwrap(), None);
        seat.forget_engine().unwrap();
    }

    #[test]
    fn an_engine_may_run_unless_its_process_is_gone() {
        let folder = Folder::new("may-run");
        let seat = StateFolder::open(folder.path()).unwrap().seat("vm", "a").unwrap();
        assert!(!seat.may_have_engine().unwrap(), "there was none");
        let pid = std::process::id().cast_signed();
        let own = EngineRecord {
            incarnation: Incarnation {
                seat: SeatId(1),
                start: 2,
            },
            pid,
            start_time: start_time(pid).unwrap(),
            boot_id: boot_id().unwrap(),
            uid: None,
        };
        let may_run = |change: fn(&mut EngineRecord)| {
            let mut record = own.clone();
            change(&mut record);
            seat.set_engine(&record).unwrap();
            seat.may_have_engine().unwrap()
        };
        assert!(may_run(|_| {}));
        assert!(!may_run(|record| record.start_time += 1));
        assert!(!may_run(|record| record.boot_id.push('x')));
        assert!(!may_run(|record| record.pid = i32::MAX));
        std::fs::write(seat.file("engine.json"), "{").unwrap();
        assert!(seat.may_have_engine().is_err());
    }

    #[test]
    fn start_times_tell_processes_apart() {
        let own = start_time(std::process::id().cast_signed()).unwrap();
        assert!(own > 0);
        assert_eq!(start_time(i32::MAX), None);
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        assert!(start_time(child.id().cast_signed()).unwrap() >= own);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
