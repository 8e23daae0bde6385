//! Helpers of this crate's unit tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bridges::AllowedBridges;
use crate::config::JailConfig;
use crate::daemon::{Daemon, Settings};
use crate::state::StateFolder;

/// A file without a name, on a real disk.
pub fn unnamed_file() -> std::fs::File {
    let folder = Folder::new("file");
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create_new(true);
    options.open(folder.path().join("file")).unwrap()
}

/// A daemon of node `one` in this folder: without seats, without an engine, and nobody reaches it.
pub fn daemon(folder: &Folder) -> Arc<Daemon> {
    let state = folder.path().join("state");
    let settings = Settings {
        node: "one".to_owned(),
        state_folder: state.clone(),
        control_socket: folder.path().join("daemon.sock"),
        peer_listen: None,
        engine: "/bin/false".into(),
        jail: JailConfig::default(),
        bridges: AllowedBridges::Listed(Vec::new()),
        arbiter_folder: None,
    };
    Daemon::new(settings, StateFolder::open(&state).unwrap())
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
