//! The folder of a play: where it is, what becomes of it, and the short path under which it is seen inside.
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::standalone::{JOURNAL, disk_name};
use crate::guest_journal::MAX_DISKS;

/// Where the inner program sees its folder.
const SHORT_FOLDER: &str = "/mnt";

/// The folder of the play with this name, below `target`: empty at first, logs stay in it afterwards.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(name)
}

/// Makes that folder anew.
///
/// # Errors
/// If the last one can't be removed, or this one not be made.
pub fn new_folder(name: &str) -> anyhow::Result<PathBuf> {
    let path = folder(name);
    if path.exists() {
        fs::remove_dir_all(&path).with_context(|| format!("removing the last run's {}", path.display()))?;
    }
    fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    path.canonicalize()
        .with_context(|| format!("looking at {}", path.display()))
}

/// Hosts' disks and journals are large and of no use afterwards; logs are small and may be.
///
/// # Errors
/// If the folder can't be read or a file not be removed.
pub fn remove_disks(folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)?.filter_map(Result::ok) {
        for name in (0..MAX_DISKS).map(disk_name).chain([JOURNAL.to_owned()]) {
            let file = entry.path().join(name);
            if file.exists() {
                fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
            }
        }
    }
    Ok(())
}

/// Shows a folder at a short path too, in this mount namespace only, and returns that: Unix sockets need short paths.
///
/// # Errors
/// If it is not there or can't be mounted.
pub fn show_at_short_path(folder: &Path) -> anyhow::Result<PathBuf> {
    let short = Path::new(SHORT_FOLDER);
    bind(folder, short)?;
    Ok(short.to_owned())
}

fn bind(folder: &Path, short: &Path) -> anyhow::Result<()> {
    let folder = folder
        .canonicalize()
        .with_context(|| format!("looking at {}", folder.display()))?;
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).context("a path with a NUL byte");
    let (from, to) = (text(&folder)?, text(short)?);
    // SAFETY: NUL-terminated paths; the other pointers may be null for a bind mount.
    let result = unsafe {
        libc::mount(
            from.as_ptr(),
            to.as_ptr(),
            std::ptr::null(),
            libc::MS_BIND,
            std::ptr::null(),
        )
    };
    ensure!(
        result == 0,
        "mounting {} on {}: {}",
        folder.display(),
        short.display(),
        std::io::Error::last_os_error()
    );
    Ok(())
}
