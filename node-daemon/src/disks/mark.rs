//! How far a disk is, durably: a small file beside it, replaced in one step.
//!
//! Invariant: whatever a mark says is durable before the mark is. A crash at any point leaves the mark of before or of after.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::DiskError;
use crate::durable;

/// Longest mark that is read.
const BYTES_MAX: u64 = 64 << 10;

/// How far a disk is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Its size.
    pub size_bytes: u64,
    /// What is durable of its first contents.
    pub done_bytes: u64,
    /// Whether that is all.
    pub complete: bool,
    /// What the contents come from; the rest of another source would make nonsense of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What was downloaded so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<Download>,
}

/// A download that goes on after a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Download {
    /// What is durable of it.
    pub done_bytes: u64,
    /// Its length, if the server said so.
    pub total_bytes: Option<u64>,
    /// The server's name for this very version (ETag, RFC 9110 section 8.8.3).
    pub etag: Option<String>,
    /// Whether that is all.
    pub complete: bool,
}

/// A mark's file.
#[derive(Debug, Clone)]
pub struct MarkFile {
    path: PathBuf,
}

impl MarkFile {
    /// At this path.
    pub fn new(path: PathBuf) -> MarkFile {
        MarkFile { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The mark; none: nothing was begun.
    pub fn read(&self) -> Result<Option<Mark>, DiskError> {
        let read = || -> io::Result<Vec<u8>> {
            let file = File::open(&self.path)?;
            if file.metadata()?.len() > BYTES_MAX {
                return Err(io::Error::other("it is too long"));
            }
            std::fs::read(&self.path)
        };
        match read() {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| DiskError::DamagedMark {
                    path: self.path.clone(),
                    why: error.to_string(),
                }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(DiskError::io("reading its mark")(error)),
        }
    }

    /// Puts this mark in the place of the one before.
    pub fn write(&self, mark: &Mark) -> Result<(), DiskError> {
        let text = serde_json::to_vec(mark).map_err(io::Error::from);
        text.and_then(|text| durable::replace(&self.path, &text))
            .map_err(DiskError::write("writing its mark"))
    }
}
