//! The seat's disks, prepared in a thread of their own (`ftvm_node_daemon::disks`).
//!
//! ```text
//!   disks/NAME/disk.raw     the disk
//!   disks/NAME/ftvm-disk    how far it is
//!   guest/, sources/NAME/   files with first contents
//!   staging/NAME            a download, until the disk is complete
//! ```

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ftvm_node_daemon::disks::source::Place;
use ftvm_node_daemon::disks::{self, FileAt, Job, Step};
use ftvm_node_daemon::seat_socket::message::{DiskToPrepare, Recipe};

use crate::Layout;

/// Where a disk is.
pub fn disk_path(layout: &Layout, name: &str) -> PathBuf {
    layout.path("disks").join(name).join("disk.raw")
}

/// How far a disk is.
#[derive(Clone, Copy)]
pub struct Progress {
    pub step: Step,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// Disks that are being prepared.
pub struct Work {
    recipe: Recipe,
    progress: Arc<Mutex<Vec<Progress>>>,
    outcome: Arc<Mutex<Option<Result<(), String>>>>,
}

impl Work {
    /// Begins.
    pub fn start(layout: Arc<Layout>, recipe: Recipe) -> Work {
        let untouched = |disk: &DiskToPrepare| Progress {
            step: Step::Writing,
            done_bytes: 0,
            total_bytes: disk.size_bytes,
        };
        let work = Work {
            progress: Arc::new(Mutex::new(recipe.disks.iter().map(untouched).collect())),
            outcome: Arc::default(),
            recipe,
        };
        let (disks, progress, outcome) = (work.recipe.disks.clone(), work.progress.clone(), work.outcome.clone());
        let thread = move || {
            let prepare_all = |used: bool| {
                disks.iter().enumerate().try_for_each(|(index, disk)| {
                    prepare(&layout, disk, used, &|step, done_bytes, total_bytes| {
                        let mut all = progress.lock().unwrap_or_else(PoisonError::into_inner);
                        all[index] = Progress {
                            step,
                            done_bytes,
                            total_bytes,
                        };
                    })
                })
            };
            let result = are_used(&layout, &disks).and_then(prepare_all);
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        };
        if let Err(error) = std::thread::Builder::new().name("disks".to_owned()).spawn(thread) {
            let why = format!("no thread for the disks: {error}");
            *work.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(Err(why));
        }
        work
    }

    /// Whether this is work on the same recipe, and has not failed.
    pub fn is_for(&self, recipe: &Recipe) -> bool {
        self.recipe == *recipe && !matches!(self.outcome(), Some(Err(_)))
    }

    /// What it is for.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// What came of it, once it is over.
    pub fn outcome(&self) -> Option<Result<(), String>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How far each disk is.
    pub fn progress(&self) -> Vec<(String, Progress)> {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.recipe.disks.iter().zip(progress.iter());
        all.map(|(disk, progress)| (disk.name.clone(), *progress)).collect()
    }
}

/// Whether a seat ever ran with these disks: its header, which lies beside the first one, counts for all of them. One that can't be looked at
/// proves nothing.
fn are_used(layout: &Layout, disks: &[DiskToPrepare]) -> Result<bool, String> {
    let Some(first) = disks.first() else { return Ok(false) };
    let header = disk_path(layout, &first.name).with_file_name("ftvm-header");
    match std::fs::metadata(&header) {
        Ok(data) => Ok(data.len() > 0),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(format!(
            "{} can't be looked at ({error}): check the claim and its permissions",
            header.display()
        )),
    }
}

fn prepare(layout: &Layout, disk: &DiskToPrepare, used: bool, progress: disks::Progress<'_>) -> Result<(), String> {
    let path = disk_path(layout, &disk.name);
    let folder = path.parent().unwrap_or(Path::new("/"));
    let source = disk.source.clone().filter(|_| disk.original);
    let (file, backing) = match source.as_ref().map(|source| &source.place) {
        Some(Place::Image { path, backing }) => in_folder(&layout.path("guest"), path, backing),
        Some(Place::Claim { path, backing }) => {
            let folder = layout.path("sources").join(&disk.name);
            in_folder(&folder, path, backing)
        }
        Some(Place::Http { .. }) | None => (None, Vec::new()),
    };
    let importer = std::env::current_exe().map(|seat| seat.with_file_name("importer"));
    let job = Job {
        size_bytes: disk.size_bytes,
        mark: folder.join("ftvm-disk"),
        source,
        file,
        backing,
        staging: layout.path("staging").join(&disk.name),
        importer: importer.unwrap_or_else(|_| PathBuf::from("/importer")),
        used,
        original: disk.original,
        path,
    };
    disks::prepare(&job, progress).map_err(|error| disks::told(&disk.name, &job.path, &error))
}

/// A file with first contents, and those that it is the difference from: all of them in one folder, which is their root.
fn in_folder(folder: &Path, path: &str, backing: &[String]) -> (Option<FileAt>, Vec<FileAt>) {
    let file = |path: &str| FileAt::In(folder.to_owned(), path.to_owned());
    (Some(file(path)), backing.iter().map(|path| file(path)).collect())
}

#[cfg(test)]
#[path = "disks_tests.rs"]
mod tests;
