//! Helpers of this crate's unit tests.

use std::path::{Path, PathBuf};

/// A file without a name, on a real disk.
pub fn unnamed_file() -> std::fs::File {
    let folder = Folder::new("file");
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create_new(true);
    options.open(folder.path().join("file")).unwrap()
}

/// A fresh folder, removed at the end.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let unique = format!("ftvm-{name}-{}-{:x}", std::process::id(), crate::random::nonzero_u64());
        let path = std::env::temp_dir().join(unique);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
