//! The descriptors that are handed over, and the console.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ftvm_node_daemon::beneath;
use ftvm_node_daemon::seat_socket::message::{DEFAULT_INITRD, Recipe};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::Layout;
use crate::disks::disk_path;

/// Room for the guest's words while nobody takes the pod's log.
const CONSOLE_BYTES: usize = 1 << 20;

/// The reading end of the console, copied to standard output by a thread. While it is open, the engine knows that this
/// program lives.
pub struct Console(());

/// Opens everything in the order that the daemon expects; tells whether there is an initrd.
pub fn open(layout: &Layout, recipe: &Recipe, console: &mut Option<Console>) -> Result<(Vec<OwnedFd>, bool), String> {
    let mut fds = Vec::new();
    for name in ["seat.json", "certificate.pem", "key.pem", "authority.pem"] {
        fds.push(open_for_reading(
            &layout.path("identity").join(name),
            "check the seat's identity Secret",
        )?);
    }
    fds.push(open_of_guest(layout, &recipe.kernel, "boot.kernel")?);
    let initrd = match &recipe.initrd {
        Some(path) => Some(open_of_guest(layout, path, "boot.initrd")?),
        None => match beneath::open(&layout.path("guest"), DEFAULT_INITRD) {
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => None,
            _ => Some(open_of_guest(layout, DEFAULT_INITRD, "boot.initrd")?),
        },
    };
    let with_initrd = initrd.is_some();
    fds.extend(initrd);
    for disk in &recipe.disks {
        fds.push(open_for_writing(&disk_path(layout, &disk.name), false)?);
    }
    let first = recipe
        .disks
        .first()
        .ok_or("a seat without a disk has no place for its header")?;
    let folder = layout.path("disks").join(&first.name);
    fds.push(open_for_writing(&folder.join("ftvm-header"), true)?);
    fds.push(open_for_writing(&folder.join("ftvm-journal"), true)?);
    fds.push(open_console(&folder.join("ftvm-console"), console)?);
    Ok((fds, with_initrd))
}

fn open_of_guest(layout: &Layout, path: &str, what: &str) -> Result<OwnedFd, String> {
    let opened = beneath::open(&layout.path("guest"), path);
    opened.map(Into::into).map_err(|error| {
        format!("{path} of the guest image can't be opened ({error}): {what} must be a file of the guest image")
    })
}

fn open_for_reading(path: &Path, advice: &str) -> Result<OwnedFd, String> {
    File::open(path)
        .map(Into::into)
        .map_err(|error| format!("{} can't be opened ({error}): {advice}", path.display()))
}

fn open_for_writing(path: &Path, create: bool) -> Result<OwnedFd, String> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map(Into::into)
        .map_err(|error| {
            format!(
                "{} can't be opened ({error}): check the claim and its permissions",
                path.display()
            )
        })
}

/// The writing end. A FIFO with a name, so that a running engine's end is connected again when this program is started anew.
fn open_console(path: &Path, console: &mut Option<Console>) -> Result<OwnedFd, String> {
    let failed = |errno: Errno| {
        format!(
            "{} can't be used as the console's FIFO ({errno}): choose a storage class with a POSIX file system",
            path.display()
        )
    };
    match rustix::fs::mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed(errno)),
    }
    if console.is_none() {
        *console = Some(read_console(path)?);
    }
    open_fifo(path, OFlags::WRONLY | OFlags::NONBLOCK).map_err(failed)
}

/// The console of an engine that an earlier run of this program started, found before anybody is asked: the engine waits for
/// a reader and for nothing else.
pub fn find_console(layout: &Layout) -> Option<Console> {
    let folders = std::fs::read_dir(layout.path("disks")).ok()?;
    folders.flatten().find_map(|folder| {
        let path = folder.path().join("ftvm-console");
        path.exists().then(|| read_console(&path).ok()).flatten()
    })
}

fn open_fifo(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
}

fn read_console(path: &Path) -> Result<Console, String> {
    let failed = |errno: Errno| format!("{} can't be read as a FIFO ({errno}): remove it", path.display());
    // For reading and writing: reading never finds an end, and opening never waits.
    let end = open_fifo(path, OFlags::RDWR).map_err(failed)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&end).map_err(failed)?.st_mode);
    if kind != FileType::Fifo {
        return Err(failed(Errno::INVAL));
    }
    // Less room only means that more is lost when nobody takes the log.
    let _ = rustix::pipe::fcntl_setpipe_size(&end, CONSOLE_BYTES);
    copy_to_stdout(end.into()).map_err(|error| format!("no thread for the console: {error}"))?;
    Ok(Console(()))
}

fn copy_to_stdout(mut from: File) -> std::io::Result<()> {
    let work = move || {
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(count) => {
                    let mut out = std::io::stdout().lock();
                    // A log that nobody takes any more is no reason to stop reading: the engine looks at this end.
                    let _ = out.write_all(&buffer[..count]).and_then(|()| out.flush());
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    eprintln!("seat: the console can't be read: {error}");
                    std::process::exit(1);
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("console".to_owned())
        .spawn(work)
        .map(drop)
}
