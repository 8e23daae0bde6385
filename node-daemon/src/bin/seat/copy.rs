//! The files of a guest image where the cluster has no image volumes (docs/kubernetes.md, "Guest images").
//!
//! ```text
//!   seat install /ftvm-tools/seat             in this program's own image: puts it where the next one is started from
//!   seat copy --to /ftvm-guest /boot/vmlinuz --optional /boot/initrd /disk/root.raw       in the guest image
//! ```
//!
//! The guest image is anybody's. Of it only regular files of the image itself are read: behind no symbolic link and on no mount, so nothing
//! that the node, the runtime or a volume has put there. Nothing of it is run. What is copied takes as many blocks as has contents, so
//! that a file of nothing but holes does not fill the node's disk.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ftvm_engine::control::exit_code;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, SeekFrom};
use rustix::io::Errno;

/// A file that takes longer is told of, and again after as long.
const TELL: Duration = Duration::from_secs(2);
/// Bytes that are read at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Zeros of this length stay a hole.
const BLOCK_BYTES: usize = 64 << 10;
static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// What `seat copy` is to do.
#[derive(Debug)]
struct Order {
    /// The image's root; another folder in tests.
    root: PathBuf,
    /// Where the files go, under the paths that they have.
    to: PathBuf,
    files: Vec<Wanted>,
}

#[derive(Debug)]
struct Wanted {
    path: String,
    /// That there is none is no mistake.
    optional: bool,
}

/// `seat install PATH`; the arguments are those after `install`.
pub fn install(arguments: &[String]) -> ExitCode {
    let [path] = arguments else {
        return usage();
    };
    end_on_sigterm();
    ended(put_program(Path::new(path)))
}

/// `seat copy …`; the arguments are those after `copy`.
pub fn copy(arguments: &[String]) -> ExitCode {
    let Some(order) = parse(arguments) else {
        return usage();
    };
    end_on_sigterm();
    ended(copy_all(&order))
}

fn usage() -> ExitCode {
    eprintln!("seat: usage: seat install PATH, or seat copy [--root FOLDER] --to FOLDER {{PATH | --optional PATH}}…");
    ExitCode::from(exit_code::USAGE)
}

fn ended(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            // The last line: it becomes the container's message.
            eprintln!("seat: {why}");
            ExitCode::from(exit_code::GUEST_IMAGE)
        }
    }
}

fn parse(arguments: &[String]) -> Option<Order> {
    let (mut root, mut to, mut files) = (PathBuf::from("/"), None, Vec::new());
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let (path, optional) = match argument.as_str() {
            "--root" => {
                root = arguments.next()?.into();
                continue;
            }
            "--to" => {
                to = Some(PathBuf::from(arguments.next()?));
                continue;
            }
            "--optional" => (arguments.next()?, true),
            _ => (argument, false),
        };
        inside(path)?;
        files.push(Wanted {
            path: path.clone(),
            optional,
        });
    }
    let to = to.filter(|_| !files.is_empty())?;
    Some(Order { root, to, files })
}

/// An absolute path, relative to the root that it begins with; none if it is no such path, or not a plain one.
fn inside(path: &str) -> Option<PathBuf> {
    let inside = path.strip_prefix('/')?;
    let plain = Path::new(inside)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    (plain && !inside.is_empty()).then(|| inside.into())
}

/// The first process of a container is not ended by a signal that it has no handler for, and a pod that is deleted would wait for kubelet's
/// patience to end.
fn end_on_sigterm() {
    extern "C" fn end(_: libc::c_int) {
        // SAFETY: ends the process, and is allowed in a handler.
        unsafe { libc::_exit(128 + libc::SIGTERM) }
    }
    // SAFETY: the handler has the signature that is asked for, and does what a handler may do.
    unsafe { libc::signal(libc::SIGTERM, end as *const () as libc::sighandler_t) };
}

/// Copies this program, in one step for whoever starts it.
fn put_program(path: &Path) -> Result<(), String> {
    let new = path.with_extension("new");
    let put = || {
        remove_if_there(&new)?;
        let (mut from, mut to) = (File::open("/proc/self/exe")?, File::create_new(&new)?);
        io::copy(&mut from, &mut to)?;
        to.set_permissions(Permissions::from_mode(0o555))?;
        std::fs::rename(&new, path)
    };
    put().map_err(|error: io::Error| {
        let path = path.display();
        format!(
            "the program that copies guest images can't be put at {path} ({error}): {}",
            advice(&error)
        )
    })
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What to do about a file that can't be written.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make space on the node's disk, where pods have their emptyDir volumes, or let disks be filled from a claim or a web server (spec.disks[].source)"
        }
        _ => "check the volume of the pod and the node's log",
    }
}

fn copy_all(order: &Order) -> Result<(), String> {
    let root = rustix::fs::open(
        &order.root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let root = root.map_err(|errno| format!("{} can't be opened ({errno}): check the pod", order.root.display()))?;
    for Wanted { path, optional } in &order.files {
        let inside = inside(path).ok_or_else(|| format!("{path} is no absolute path"))?;
        let Some(from) = open(&root, &inside, path)? else {
            if *optional {
                continue;
            }
            return Err(format!(
                "the guest image has no file {path}: correct spec.boot or spec.disks[].source.image, or put the file into the image"
            ));
        };
        copy_file(&from, path, &order.to.join(inside))?;
    }
    Ok(())
}

/// Opens a regular file of the image for reading; none if there is nothing of this name.
fn open(root: &OwnedFd, inside: &Path, path: &str) -> Result<Option<File>, String> {
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let at = |flags: OFlags| {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat2(root, inside, flags, Mode::empty(), resolve)
    };
    let refused = |errno: Errno| {
        let why = match errno {
            Errno::LOOP => "lies behind a symbolic link: name the file by its own path",
            Errno::XDEV => {
                "is no file of the image itself, something is mounted there: name another path, and leave VOLUME out of the image's Dockerfile"
            }
            Errno::ACCESS => {
                "may not be read by user 65532, as whom the pod runs: let everybody read it in the image (chmod a+r)"
            }
            Errno::NOSYS | Errno::PERM => {
                "can't be opened: the node needs Linux 5.6, and a container runtime that allows openat2"
            }
            _ => "can't be opened: check the image",
        };
        format!("{path} of the guest image {why} ({errno})")
    };
    // It is looked at first: to open a device or a FIFO would do something.
    let seen = match at(OFlags::PATH) {
        Ok(seen) => seen,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(errno) => return Err(refused(errno)),
    };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&seen).map_err(refused)?.st_mode);
    match kind {
        FileType::RegularFile => at(OFlags::RDONLY).map(|file| Some(file.into())).map_err(refused),
        FileType::Symlink => Err(format!(
            "{path} of the guest image is a symbolic link: name the file that it leads to"
        )),
        kind => Err(format!(
            "{path} of the guest image is no regular file ({kind:?}): name one that is"
        )),
    }
}

/// Why a file was not copied: its image or the volume.
enum Failed {
    Reading(io::Error),
    Writing(io::Error),
}

fn copy_file(from: &File, path: &str, to: &Path) -> Result<(), String> {
    copy_contents(from, path, to).map_err(|failed| match failed {
        Failed::Reading(error) => {
            format!("{path} of the guest image can't be read ({error}): check the image and the node's disk")
        }
        Failed::Writing(error) => format!(
            "{path} of the guest image can't be copied to {} ({error}): {}",
            to.display(),
            advice(&error)
        ),
    })
}

fn copy_contents(from: &File, path: &str, to: &Path) -> Result<(), Failed> {
    let about = from.metadata().map_err(Failed::Reading)?;
    let mut progress = Progress::new(path, about.len());
    let into = create(to).map_err(Failed::Writing)?;
    let mut buffer = vec![0u8; BUFFER_BYTES];
    let mut at = 0;
    while let Some(range) = data_after(from, at, about.len()).map_err(Failed::Reading)? {
        at = range.end;
        copy_range(from, &into, range, &mut buffer, &mut progress)?;
    }
    into.set_len(about.len()).map_err(Failed::Writing)?;
    // By its time an import that was interrupted knows that it is the same file: docs/disks.md.
    let time = about.modified().map_err(Failed::Reading)?;
    into.set_modified(time).map_err(Failed::Writing)?;
    say(progress.end());
    Ok(())
}

/// A new file in the place of what an earlier attempt left.
fn create(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    remove_if_there(path)?;
    OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)
}

/// The next stretch that is not a hole; none if there is none before the end.
fn data_after(file: &File, at: u64, size_bytes: u64) -> io::Result<Option<Range<u64>>> {
    if at >= size_bytes {
        return Ok(None);
    }
    let begin = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(begin) if begin >= size_bytes => return Ok(None),
        Ok(begin) => begin,
        Err(Errno::NXIO) => return Ok(None),
        // A file system that knows no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..size_bytes)),
        Err(errno) => return Err(errno.into()),
    };
    let hole = rustix::fs::seek(file, SeekFrom::Hole(begin))?.min(size_bytes);
    // Whatever a file system says: it goes on.
    let end = if hole > begin { hole } else { size_bytes };
    Ok(Some(begin..end))
}

/// Images are unpacked without holes: what is zero stays one all the same.
fn copy_range(
    from: &File,
    into: &File,
    range: Range<u64>,
    buffer: &mut [u8],
    progress: &mut Progress<'_>,
) -> Result<(), Failed> {
    let mut at = range.start;
    while at < range.end {
        let count = usize::try_from(range.end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
        let part = &mut buffer[..count];
        from.read_exact_at(part, at).map_err(Failed::Reading)?;
        for block in part.chunks(BLOCK_BYTES) {
            if *block != ZEROS[..block.len()] {
                into.write_all_at(block, at).map_err(Failed::Writing)?;
            }
            at += block.len() as u64;
        }
        say(progress.at(at));
    }
    Ok(())
}

fn say(news: Option<String>) {
    if let Some(news) = news {
        eprintln!("seat: {news}");
    }
}

/// Of a file, for who reads the container's log.
struct Progress<'a> {
    path: &'a str,
    size_bytes: u64,
    begun: Instant,
    told: Instant,
}

impl Progress<'_> {
    fn new(path: &str, size_bytes: u64) -> Progress<'_> {
        let begun = Instant::now();
        Progress {
            path,
            size_bytes,
            begun,
            told: begun,
        }
    }

    /// What there is to tell once so many bytes are copied.
    fn at(&mut self, done_bytes: u64) -> Option<String> {
        if self.told.elapsed() < TELL {
            return None;
        }
        self.told = Instant::now();
        let (done, size) = (done_bytes >> 20, self.size_bytes >> 20);
        Some(format!(
            "{} of the guest image: {done} of {size} MiB are copied",
            self.path
        ))
    }

    /// What there is to tell once all are.
    fn end(&self) -> Option<String> {
        let (size, took) = (self.size_bytes >> 20, self.begun.elapsed());
        (took >= TELL).then(|| {
            let seconds = took.as_secs();
            format!(
                "{} of the guest image: {size} MiB were copied in {seconds} s",
                self.path
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Order> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn what_takes_longer_than_two_seconds_is_told() {
        let mut progress = Progress::new("/disk/root.raw", 5 << 20);
        assert_eq!((progress.at(1 << 20), progress.end()), (None, None));
        progress.begun -= TELL;
        progress.told -= TELL;
        let told = progress.at(2 << 20).unwrap();
        assert_eq!(told, "/disk/root.raw of the guest image: 2 of 5 MiB are copied");
        assert_eq!(progress.at(3 << 20), None, "not at each step");
        assert!(progress.end().unwrap().contains("5 MiB were copied in 2 s"));
    }

    #[test]
    fn orders_name_plain_absolute_paths() {
        let order = parsed("--to /a /boot/vmlinuz --optional /boot/initrd").unwrap();
        assert_eq!((order.root, order.to), ("/".into(), "/a".into()));
        let files: Vec<_> = order
            .files
            .iter()
            .map(|file| (file.path.as_str(), file.optional))
            .collect();
        assert_eq!(files, [("/boot/vmlinuz", false), ("/boot/initrd", true)]);
        for wrong in [
            "",
            "--to /a",
            "/boot/vmlinuz",
            "--to /a boot/vmlinuz",
            "--to /a /",
            "--to /a /../etc/passwd",
            "--to /a /boot/../../etc/passwd",
            "--to /a --force /boot/vmlinuz",
            "--to /a /boot/vmlinuz --optional",
            "/boot/vmlinuz --to",
        ] {
            assert!(parsed(wrong).is_none(), "{wrong}");
        }
    }
}
