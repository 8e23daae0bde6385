//! Files that a crash at any point leaves as they were or as they become.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Replaces a file, or makes it, durably and in one step: written beside it (`PATH.new`), fsynced, renamed over it, and its folder
/// fsynced.
///
/// # Errors
/// If any of that fails; the file is then the old one, or the new one that a crash may still take back.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let file = File::create(&new)?;
    file.write_all_at(contents, 0)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    sync_folder(path)
}

/// Makes durable which file is at this path.
///
/// # Errors
/// If that fails; a crash may take a change of it back.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}
