//! The few things that the file arbiter does to a folder, so that tests can fail each of them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Longest file that is read.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// File system operations of the arbiter.
pub trait Files: Send + Sync + 'static {
    /// Creates a file that must not exist, with these contents, durable when this returns.
    fn create(&self, path: &Path, contents: &[u8]) -> io::Result<()>;
    /// Writes over the first bytes of a file that is there and is not shorter, durable when this returns.
    fn overwrite(&self, path: &Path, contents: &[u8]) -> io::Result<()>;
    /// Changes the folder and changes it back, which proves that it can be written, and makes a network file system look at it
    /// again. Nothing of it need be durable.
    fn touch(&self, path: &Path) -> io::Result<()>;
    /// `link(2)`: fails if `to` exists.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the entries of a folder durable.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;
    /// The whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Removes a name.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The system's own.
#[derive(Debug, Clone, Copy, Default)]
pub struct PosixFiles;

impl Files for PosixFiles {
    fn create(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(contents)?;
        file.sync_all()
    }

    fn overwrite(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.write_all(contents)?;
        file.sync_data()
    }

    fn touch(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        std::fs::remove_file(path)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::hard_link(from, to)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        File::open(folder)?.sync_all()
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut contents = Vec::new();
        File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut contents)?;
        Ok(contents)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
}
