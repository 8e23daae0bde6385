//! Disks before their guest starts: every block allocated, first contents expanded, and a durable mark that says so.
//!
//! ```text
//!   web server ──► importer fetch ──pipe──► staging file ─┐  (network, no file)
//!   guest image, claim ───────────────────────────────────┴─► importer read ──pipe──► disk   (open files, no network)
//!                                                              digest, format, decompression
//! ```
//!
//! What others wrote is touched by a program of its own, the importer. It holds nothing but the file that it reads, with its
//! backing files (or the network, never both), and says what it finds through a pipe; whoever prepares the disk, this module,
//! writes it, within the bounds of the disk. `docs/disks.md` has the reasons.
//!
//! Invariant: a disk counts only if its mark says complete, and that is written after contents and blocks are durable and
//! counted ([`mark`]).

pub mod frame;
pub mod mark;
pub mod source;
pub mod thick;

mod download;
mod fill;
mod helper;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::{beneath, durable, explain};
use fill::Target;
use helper::Image;
pub use helper::{Backing, Fetch, Read};
use mark::{Mark, MarkFile};
use source::{Place, Source};

/// Contents after which the mark is moved.
const MARK_BYTES: u64 = 32 << 20;
/// A file to download may be so much larger than the disk: what its format adds.
const DOWNLOAD_EXTRA_BYTES: u64 = 64 << 20;

/// Where the contents of a disk without a source come from, as its mark has it.
const BLANK: &str = "blank";

/// Why a disk can't be prepared. The path is said by whoever asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The operating system refused something.
    #[error("{what} failed: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// There is no room.
    #[error(
        "its volume has {free_bytes} bytes free and {missing_bytes} are missing until every block is allocated: make the volume \
         (the claim) larger, or free some of it"
    )]
    NoRoom {
        /// What is needed.
        missing_bytes: u64,
        /// What there is.
        free_bytes: u64,
    },
    /// The volume ran full while it was written, or reported more than it has.
    #[error(
        "its volume ran full ({what}): make the volume (the claim) larger, or free some of it; it goes on from there"
    )]
    Full {
        /// What was tried.
        what: &'static str,
    },
    /// Another size.
    #[error("it has {found_bytes} bytes and should have {size_bytes}: the size of a disk can't be changed")]
    Size {
        /// What it has.
        found_bytes: u64,
        /// What it should have.
        size_bytes: u64,
    },
    /// Blocks are missing, and would be allocated when the guest writes.
    #[error(
        "its block at byte {at_bytes} {why}: choose a volume (a storage class) whose file system allocates at once and neither \
         compresses nor shares blocks; for a copy by reference, copy the bytes (cp --reflink=never --sparse=never)"
    )]
    NotThick {
        /// The first such block.
        at_bytes: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The mark is no mark.
    #[error("{path} is damaged ({why}): a person decides whether the disk counts")]
    DamagedMark {
        /// The mark.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// There was a guest, and no mark, or one of a disk that was never complete.
    #[error(
        "it was used by a guest, and its mark {path} is gone or not complete, as on a volume that was made anew: a person decides. Put the \
         volume back, or the mark if the disk counts; or give the seat up whole, if the other one has the guest's disks"
    )]
    MarkGone {
        /// The mark.
        path: PathBuf,
    },
    /// Another program has it.
    #[error("it is in use by another program (flock): two writers would destroy it")]
    InUse,
    /// The first contents.
    #[error("{name}: {why}")]
    Source {
        /// What they come from.
        name: String,
        /// Why, and what to do.
        why: String,
    },
    /// The first contents are other ones.
    #[error("{name}: {why}")]
    OtherDigest {
        /// What they come from.
        name: String,
        /// Why, and what to do.
        why: String,
    },
    /// The program that reads first contents.
    #[error("{program} {why}")]
    Importer {
        /// Which program.
        program: PathBuf,
        /// Why, and what to do.
        why: String,
    },
}

impl DiskError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> DiskError {
        move |source| DiskError::Io { what, source }
    }

    /// Of something that takes room.
    fn write(what: &'static str) -> impl FnOnce(io::Error) -> DiskError {
        move |source| match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => DiskError::Full { what },
            _ => DiskError::Io { what, source },
        }
    }
}

/// What is being done to a disk, in this order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Its first contents are downloaded.
    Downloading,
    /// They are compared with their digest.
    Checking,
    /// It is written.
    #[default]
    Writing,
}

impl Step {
    /// In words, for people: `disk root is being …`.
    pub fn words(self) -> &'static str {
        match self {
            Step::Downloading => "downloaded",
            Step::Checking => "compared with its digest",
            Step::Writing => "prepared",
        }
    }
}

/// Told how far it is: the step, bytes done, of so many.
pub type Progress<'a> = &'a dyn Fn(Step, u64, u64);

/// Where a source that is a file is.
#[derive(Debug, Clone)]
pub enum FileAt {
    /// There: whoever names it may read what this program may.
    Path(PathBuf),
    /// At this path of a folder that somebody else filled ([`beneath`]).
    In(PathBuf, String),
}

impl FileAt {
    fn open(&self) -> io::Result<File> {
        match self {
            // A FIFO that nobody writes is not waited for.
            FileAt::Path(path) => OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path),
            FileAt::In(folder, path) => beneath::open(folder, path),
        }
    }

    fn name(&self) -> String {
        match self {
            FileAt::Path(path) => path.display().to_string(),
            FileAt::In(_, path) => path.clone(),
        }
    }
}

/// A disk to prepare.
#[derive(Debug, Clone)]
pub struct Job {
    /// The disk: a file, made if it is missing, or a block device of exactly this size.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Its mark.
    pub mark: PathBuf,
    /// Its first contents; zeros if missing.
    pub source: Option<Source>,
    /// Where a source that is a file is.
    pub file: Option<FileAt>,
    /// The files that it is the difference from, nearest first.
    pub backing: Vec<FileAt>,
    /// Where a download is put until the disk is complete.
    pub staging: PathBuf,
    /// The importer.
    pub importer: PathBuf,
    /// Whether a guest ever used it: then it is complete, or nothing is done to it.
    pub used: bool,
    /// Whether no guest of the virtual machine ever ran, on any seat: contents of another source are replaced then, complete or not.
    pub original: bool,
}

/// Prepares a disk: does what is left of it. Returns once it is complete, durably.
///
/// # Errors
/// What is missing. Nothing that was done counts then; the next call goes on where the mark says.
pub fn prepare(job: &Job, progress: Progress<'_>) -> Result<(), DiskError> {
    let marks = MarkFile::new(job.mark.clone());
    let mark = marks.read()?;
    let mut mark = mark.unwrap_or_default();
    if job.used && !mark.complete {
        return Err(DiskError::MarkGone { path: job.mark.clone() });
    }
    if mark.complete && !is_of_another_source(job, &mark)? {
        return complete(job, &mark, progress);
    }
    let mut file = open(&job.path)?;
    lock(&job.path, &file)?;
    let device = thick::is_device(&file).map_err(DiskError::io("looking at it"))?;
    let origin = origin(job)?;
    let size = thick::length(&file).map_err(DiskError::io("reading its size"))?;
    if device && size != job.size_bytes {
        return Err(DiskError::Size {
            found_bytes: size,
            size_bytes: job.size_bytes,
        });
    }
    let known = mark.size_bytes == job.size_bytes && mark.source.as_deref() == Some(origin.as_str());
    if !known || size < mark.done_bytes {
        // Whatever an earlier owner of the volume left behind, or another source.
        if !device {
            file = anew(&job.path, file)?;
        }
        mark = Mark {
            size_bytes: job.size_bytes,
            source: Some(origin),
            ..Mark::default()
        };
        marks.write(&mark)?;
    }
    let allocated = !device && allocate(&file, job.size_bytes, mark.done_bytes == 0)?;
    let image = image(job, &mut mark, &marks, progress)?;
    let target = Target {
        file: &file,
        device,
        blank: allocated,
        size_bytes: job.size_bytes,
        marks: &marks,
        progress,
    };
    let filled = target.fill(job, image, &mut mark);
    if matches!(filled, Err(DiskError::OtherDigest { .. })) {
        // It would be the wrong one the next time, too.
        mark.download = None;
        marks.write(&mark)?;
        forget(&job.staging)?;
    }
    filled?;
    unchanged(job, &mark)?;
    file.sync_all().map_err(DiskError::write("making it durable"))?;
    thick::verify(&file, job.size_bytes)?;
    mark = Mark {
        size_bytes: job.size_bytes,
        done_bytes: job.size_bytes,
        complete: true,
        source: mark.source,
        download: None,
    };
    marks.write(&mark)?;
    forget(&job.staging)?;
    progress(Step::Writing, job.size_bytes, job.size_bytes);
    Ok(())
}

/// Whether a disk is complete with other contents than the guest is to begin with: those of a seat that was not the original when it was made.
fn is_of_another_source(job: &Job, mark: &Mark) -> Result<bool, DiskError> {
    if job.used || !job.original {
        return Ok(false);
    }
    match origin(job) {
        Ok(origin) => Ok(mark.source != Some(origin)),
        // It may be gone since the disk was filled from it.
        Err(_) if mark.source.as_deref() != Some(BLANK) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A disk that was completed before, perhaps with a guest on it: its contents are not touched.
fn complete(job: &Job, mark: &Mark, progress: Progress<'_>) -> Result<(), DiskError> {
    let file = open(&job.path)?;
    let found_bytes = thick::length(&file).map_err(DiskError::io("reading its size"))?;
    if mark.size_bytes != job.size_bytes || found_bytes != job.size_bytes {
        return Err(DiskError::Size {
            found_bytes,
            size_bytes: job.size_bytes,
        });
    }
    // Blocks that were given back since are taken again; contents stay.
    thick::make(&file, job.size_bytes)?;
    forget(&job.staging)?;
    progress(Step::Writing, job.size_bytes, job.size_bytes);
    Ok(())
}

fn open(path: &Path) -> Result<File, DiskError> {
    let device = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_block_device());
    let flags = libc::O_NOFOLLOW | if device { libc::O_EXCL } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(!device)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)
        .map_err(DiskError::io("opening it"))?;
    let kind = file.metadata().map_err(DiskError::io("looking at it"))?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    Err(DiskError::io("opening it")(io::Error::other(
        "it is neither a file nor a block device",
    )))
}

fn lock(path: &Path, file: &File) -> Result<(), DiskError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(DiskError::InUse),
        Err(errno) => return Err(DiskError::io("locking it")(errno.into())),
    }
    // Another import may have put a new file there since this one was opened.
    let [locked, there] = [file.metadata(), std::fs::symlink_metadata(path)];
    let locked = locked.map_err(DiskError::io("looking at it"))?;
    let same = |there: std::fs::Metadata| (there.dev(), there.ino()) == (locked.dev(), locked.ino());
    if there.is_ok_and(same) {
        return Ok(());
    }
    Err(DiskError::InUse)
}

/// A new file in the place of an old one, which is locked. Engines know a file by its number and time of birth: what they remember
/// of the old one must not be believed of this one. Durable, so that no mark ever vouches for the old one's contents.
fn anew(path: &Path, old: File) -> Result<File, DiskError> {
    // Its blocks are free at once, whoever else has it open.
    old.set_len(0).map_err(DiskError::io("emptying it"))?;
    std::fs::remove_file(path).map_err(DiskError::io("removing the old one"))?;
    let made = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = made.map_err(DiskError::io("making it anew"))?;
    lock(path, &file)?;
    thick::write_in_place(&file)?;
    durable::sync_folder(path).map_err(DiskError::io("making its folder durable"))?;
    Ok(file)
}

/// Allocates; a disk that was just begun gives its blocks back if there are too few of them.
fn allocate(file: &File, size_bytes: u64, fresh: bool) -> Result<bool, DiskError> {
    thick::allocate(file, size_bytes).inspect_err(|error| {
        if fresh && matches!(error, DiskError::NoRoom { .. }) {
            // What can't be given back is taken again by the next attempt.
            let _ = file.set_len(0);
        }
    })
}

/// What the contents come from, so that two sources are never mixed.
fn origin(job: &Job) -> Result<String, DiskError> {
    let Some(source) = &job.source else {
        return Ok(BLANK.to_owned());
    };
    let reading = source.reading().map_err(|why| of_source(source, why))?;
    let what = match (&source.sha256, &job.file) {
        (Some(digest), _) => format!("sha256 {digest}"),
        (None, Some(file)) => version(source.name(), file).map_err(|error| unreadable(source, "it", &error))?,
        (None, None) => {
            let why = "a download needs sha256: name the digest of the file";
            return Err(of_source(source, why.to_owned()));
        }
    };
    let behind = job.backing.iter().map(|file| {
        let version = version(&file.name(), file);
        let version = version.map_err(|error| unreadable(source, &backing_file(file), &error))?;
        Ok(format!(" over {version}"))
    });
    let behind = behind.collect::<Result<String, DiskError>>()?;
    Ok(format!(
        "{what} as {:?} {:?}{behind}",
        reading.format, reading.compression
    ))
}

/// Refuses what was changed while it was read: the disk may have some of both, or zeros behind a new end. The next attempt begins anew.
fn unchanged(job: &Job, mark: &Mark) -> Result<(), DiskError> {
    let Some(source) = &job.source else { return Ok(()) };
    if mark.source == Some(origin(job)?) {
        return Ok(());
    }
    let why =
        "it or a backing file of it was changed while it was read: leave them as they are until the disk is complete";
    Err(of_source(source, why.to_owned()))
}

/// A file as it is now: one that is changed, or another one under its name, has another length or time.
fn version(name: &str, file: &FileAt) -> io::Result<String> {
    let data = file.open()?.metadata()?;
    let (seconds, nanoseconds) = (data.mtime(), data.mtime_nsec());
    Ok(format!("{name} {} bytes of {seconds}.{nanoseconds:09}", data.len()))
}

/// The file with the first contents, downloaded if need be, and those that it is the difference from; none: zeros.
fn image(job: &Job, mark: &mut Mark, marks: &MarkFile, progress: Progress<'_>) -> Result<Option<Image>, DiskError> {
    let Some(source) = &job.source else { return Ok(None) };
    if let Place::Http { url, authority } = &source.place {
        download::complete(job, (url, authority.as_deref()), mark, marks, progress)?;
    }
    let file = match (&source.place, &job.file) {
        (Place::Image { .. } | Place::Claim { .. }, Some(file)) => file.open(),
        _ => File::open(&job.staging),
    };
    let (file, identity) = regular(source, "it", file)?;
    let (mut backing, mut seen) = (Vec::new(), vec![identity]);
    for at in &job.backing {
        let what = backing_file(at);
        let (file, identity) = regular(source, &what, at.open())?;
        if seen.contains(&identity) {
            let why =
                format!("{what} is in the chain before: one that leads back to itself has no end; name each file once");
            return Err(of_source(source, why));
        }
        seen.push(identity);
        backing.push((at.name(), file));
    }
    Ok(Some(Image { file, backing }))
}

/// A file that was opened, and by which numbers it is known, if it is one.
fn regular(source: &Source, what: &str, opened: io::Result<File>) -> Result<(File, (u64, u64)), DiskError> {
    let known = opened.and_then(|file| Ok((file.metadata()?, file)));
    let (data, file) = known.map_err(|error| unreadable(source, what, &error))?;
    if !data.is_file() {
        return Err(of_source(source, format!("{what} is no regular file: name a file")));
    }
    Ok((file, (data.dev(), data.ino())))
}

/// How a backing file is spoken of.
fn backing_file(file: &FileAt) -> String {
    format!("its backing file {}", file.name())
}

/// `what`: the file itself, or one that it is the difference from.
fn unreadable(source: &Source, what: &str, error: &io::Error) -> DiskError {
    let where_ = match source.place {
        Place::Image { .. } => "it must be a file of the guest image (or of the volume that is named there)",
        Place::Claim { .. } => {
            "it must be a file of the claim that source.claim names, and its group must be able to read it"
        }
        Place::Http { .. } => "its download is gone; it is begun anew",
    };
    of_source(source, format!("{what} can't be read ({error}): {where_}"))
}

fn of_source(source: &Source, why: String) -> DiskError {
    DiskError::Source {
        name: source.name().to_owned(),
        why,
    }
}

fn forget(staging: &Path) -> Result<(), DiskError> {
    match std::fs::remove_file(staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DiskError::io("removing the downloaded file")(error))
        }
        _ => Ok(()),
    }
}

/// An error with its causes, about this disk.
pub fn told(name: &str, path: &Path, error: &DiskError) -> String {
    format!("disk {name} ({}): {}", path.display(), explain(error))
}

#[cfg(test)]
#[path = "anew_tests.rs"]
mod tests;
