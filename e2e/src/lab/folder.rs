//! A lab's folder: locked while it is in use. What a killed process left behind is removed by the next lab.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FlockOperation;

use super::cache;
use crate::cluster::cgroup;
use crate::interrupt;

/// The folder; dropping it removes it.
pub(crate) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// A new one. Also removes those whose processes are gone, with the control groups that they name.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn new() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static MAKING: Mutex<()> = Mutex::new(());
        // Between making the lock and taking it another thread's sweep would take it.
        let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        sweep()?;
        let path = parent()?.join(format!(
            "{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir(&path)?;
        let lock = File::create(path.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        let doomed = path.clone();
        interrupt::at_end(move || {
            // It was removed already, or it is the next lab's to remove.
            let _ = cgroup::remove_left(&doomed).and_then(|()| Ok(fs::remove_dir_all(&doomed)?));
        });
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if std::env::var_os("FTVM_KEEP_LABS").is_some() {
            eprintln!("lab: kept {} (the next lab removes it)", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("lab: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes what killed processes left behind.
///
/// # Errors
/// Those of the file system.
pub(crate) fn sweep() -> anyhow::Result<()> {
    let parent = parent()?;
    for entry in fs::read_dir(&parent)?.filter_map(Result::ok) {
        // Ours to remove only if nobody holds its lock.
        if let Ok(lock) = File::open(entry.path().join("lock"))
            && rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            cgroup::remove_left(&entry.path())?;
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn parent() -> anyhow::Result<PathBuf> {
    let parent = cache::folder()?.join("labs");
    fs::create_dir_all(&parent)?;
    Ok(parent)
}
