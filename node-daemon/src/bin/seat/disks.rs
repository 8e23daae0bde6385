//! Disks: every block allocated, and the original's contents copied from the guest image.
//!
//! ```text
//!   disk.raw          the disk
//!   ftvm-disk         how far it is (Mark): written after what it says is durable, in one step
//! ```
//!
//! A copy that was interrupted goes on where the mark says. Until the mark says complete, nothing that was on the volume counts.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ftvm_node_daemon::seat_socket::message::{DiskToPrepare, Recipe};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::Layout;

/// Bytes copied at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Bytes after which the mark is moved.
const MARK_BYTES: u64 = 64 << 20;

/// How far a disk is.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Mark {
    /// Its size.
    size_bytes: u64,
    /// What is durable of its first contents.
    done_bytes: u64,
    /// Whether that is all.
    complete: bool,
}

/// Where a disk is.
pub fn disk_path(layout: &Layout, name: &str) -> PathBuf {
    layout.path("disks").join(name).join("disk.raw")
}

/// Disks that are being prepared, in a thread of their own.
pub struct Work {
    recipe: Recipe,
    done: Arc<Vec<AtomicU64>>,
    outcome: Arc<Mutex<Option<Result<(), String>>>>,
}

impl Work {
    /// Begins.
    pub fn start(layout: Arc<Layout>, recipe: Recipe) -> Work {
        let work = Work {
            done: Arc::new(recipe.disks.iter().map(|_| AtomicU64::new(0)).collect()),
            outcome: Arc::default(),
            recipe,
        };
        let (disks, done, outcome) = (work.recipe.disks.clone(), work.done.clone(), work.outcome.clone());
        let thread = move || {
            let mut all = disks.iter().zip(done.iter());
            let result = all.try_for_each(|(disk, done)| prepare(&layout, disk, done));
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

    /// Name, bytes done, size of each disk.
    pub fn progress(&self) -> Vec<(String, u64, u64)> {
        let all = self.recipe.disks.iter().zip(self.done.iter());
        all.map(|(disk, done)| (disk.name.clone(), done.load(Ordering::Relaxed), disk.size_bytes))
            .collect()
    }
}

fn prepare(layout: &Layout, disk: &DiskToPrepare, done: &AtomicU64) -> Result<(), String> {
    let path = disk_path(layout, &disk.name);
    let source = disk.source.as_ref().filter(|_| disk.original);
    let source = source.map(|source| layout.guest(source));
    try_prepare(&path, disk, source.as_deref(), done)
        .map_err(|error| format!("disk {} ({}): {error}", disk.name, path.display()))
}

fn other(why: String) -> io::Error {
    io::Error::other(why)
}

fn try_prepare(path: &Path, disk: &DiskToPrepare, source: Option<&Path>, done: &AtomicU64) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mark = read_mark(folder)?.unwrap_or_default();
    let length = file.metadata()?.len();
    if mark.complete {
        if mark.size_bytes != disk.size_bytes || length != disk.size_bytes {
            return Err(other(format!(
                "it has {length} bytes and the FaultTolerantVM says {}: the size of a disk can't be changed",
                disk.size_bytes
            )));
        }
        done.store(disk.size_bytes, Ordering::Relaxed);
        return Ok(());
    }
    let fresh = mark.size_bytes != disk.size_bytes || length < mark.done_bytes;
    let from = if fresh { 0 } else { mark.done_bytes };
    if fresh {
        // Whatever an earlier owner of the volume left behind.
        file.set_len(0)?;
        let mark = Mark {
            size_bytes: disk.size_bytes,
            ..Mark::default()
        };
        write_mark(folder, &mark)?;
    }
    let thick = allocate(&file, disk.size_bytes)?;
    let source = source.map(|source| open_source(source, disk)).transpose()?;
    let mut target = Target {
        file: &file,
        folder,
        size_bytes: disk.size_bytes,
        done,
        marked: from,
        thick,
    };
    target.fill(source.as_ref(), from)?;
    file.sync_all()?;
    verify(&file, disk.size_bytes)?;
    write_mark(
        folder,
        &Mark {
            size_bytes: disk.size_bytes,
            done_bytes: disk.size_bytes,
            complete: true,
        },
    )
}

/// The first contents and their length.
fn open_source(path: &Path, disk: &DiskToPrepare) -> io::Result<(File, u64)> {
    let file = File::open(path).map_err(|error| {
        other(format!(
            "{} of the guest image can't be opened: {error}",
            path.display()
        ))
    })?;
    let length = file.metadata()?.len();
    if length > disk.size_bytes {
        return Err(other(format!(
            "{} of the guest image has {length} bytes, more than the disk's {}: make the disk larger",
            path.display(),
            disk.size_bytes
        )));
    }
    Ok((file, length))
}

/// Allocates what is not allocated yet and keeps what is there; false if the file system knows no such call.
fn allocate(file: &File, size_bytes: u64) -> io::Result<bool> {
    loop {
        return match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size_bytes) {
            Ok(()) => Ok(true),
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(Errno::NOSPC | Errno::FBIG) => Err(other(format!(
                "its volume has no room for {size_bytes} bytes and the seat's journal: make the claim larger"
            ))),
            Err(errno) => Err(errno.into()),
        };
    }
}

struct Target<'a> {
    file: &'a File,
    folder: &'a Path,
    size_bytes: u64,
    done: &'a AtomicU64,
    marked: u64,
    /// Allocated: what is not written reads as zeros.
    thick: bool,
}

impl Target<'_> {
    fn fill(&mut self, source: Option<&(File, u64)>, from: u64) -> io::Result<()> {
        let mut buffer = vec![0u8; CHUNK_BYTES];
        let mut at = from;
        while at < self.size_bytes {
            let count = usize::try_from(self.size_bytes - at).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            let chunk = &mut buffer[..count];
            chunk.fill(0);
            if let Some((file, length)) = source
                && at < *length
            {
                let within = usize::try_from(*length - at).map_or(count, |left| left.min(count));
                file.read_exact_at(&mut chunk[..within], at)?;
            }
            if !self.thick || chunk.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(chunk, at)?;
            }
            at += count as u64;
            self.done.store(at, Ordering::Relaxed);
            if at - self.marked >= MARK_BYTES {
                self.mark(at)?;
            }
        }
        Ok(())
    }

    fn mark(&mut self, done_bytes: u64) -> io::Result<()> {
        self.file.sync_data()?;
        self.marked = done_bytes;
        let mark = Mark {
            size_bytes: self.size_bytes,
            done_bytes,
            complete: false,
        };
        write_mark(self.folder, &mark)
    }
}

/// A disk that is not thick could run full under a running guest.
fn verify(file: &File, size_bytes: u64) -> io::Result<()> {
    let data = file.metadata()?;
    let allocated = data.blocks() * 512;
    if data.len() != size_bytes || allocated < size_bytes {
        return Err(other(format!(
            "its volume has allocated {allocated} of {size_bytes} bytes: choose a storage class whose file system neither \
             compresses nor allocates late"
        )));
    }
    Ok(())
}

fn mark_path(folder: &Path) -> PathBuf {
    folder.join("ftvm-disk")
}

fn read_mark(folder: &Path) -> io::Result<Option<Mark>> {
    match std::fs::read(mark_path(folder)) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
            let path = mark_path(folder);
            other(format!(
                "{} is damaged ({error}): a person decides whether the disk counts",
                path.display()
            ))
        }),
        Err(error) if error.kind() == ErrorKind::NotFound && has_header(folder) => Err(other(
            "it was used by a guest and its mark ftvm-disk is gone: a person decides whether the disk counts"
                .to_owned(),
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a seat ever ran with the disks of this folder.
fn has_header(folder: &Path) -> bool {
    std::fs::metadata(folder.join("ftvm-header")).is_ok_and(|data| data.len() > 0)
}

fn write_mark(folder: &Path, mark: &Mark) -> io::Result<()> {
    let (path, new) = (mark_path(folder), folder.join("ftvm-disk.new"));
    let text = serde_json::to_vec(mark).unwrap_or_default();
    let file = File::create(&new)?;
    file.write_all_at(&text, 0)?;
    file.sync_all()?;
    std::fs::rename(&new, &path)?;
    File::open(folder)?.sync_all()
}
