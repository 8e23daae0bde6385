//! A file system of its own that hangs, fails or is full when it is told to, for real.
//!
//! - It hangs by `FIFREEZE` (fsfreeze(8)): writes and allocations wait in the kernel until it is thawed, and no signal ends that. What is
//!   in the page cache is read as ever, and a sync that has nothing to write returns.
//! - It fails by the order that ext4 and XFS have for their own tests: whatever is read, written or made durable is an I/O error, until it
//!   was mounted anew.
//! - It is full by a file that takes all there is; what others have keeps its blocks, unless somebody takes them ([`take_blocks`]).
//!
//! Invariant: nothing of this is done but to the root of a file system that is mounted from a loop device, and to files on such. A path that
//! leads elsewhere, where nothing is mounted or a process's number has another one by now, would take this machine's own disk down.
//!
//! A [`Volume::mount`] is ext4 on a loop device. Its image has no name any more once it is mounted, and the loop device goes with the last
//! mount: nothing of it is left when the namespaces of the test are gone. [`super::thaw`] sees to it that they can go.
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use rustix::fs::{FallocateFlags, fallocate, major, minor};
use rustix::io::Errno;

use super::thaw::Guarded;

/// `FIFREEZE` and `FITHAW` (linux/fs.h).
const FREEZE: libc::c_ulong = 0xC004_5877;
const THAW: libc::c_ulong = 0xC004_5878;
/// `XFS_IOC_GOINGDOWN`, and `EXT4_IOC_SHUTDOWN`, which is the same.
const SHUT_DOWN: libc::c_ulong = 0x8004_587D;
/// Nothing more reaches the device, not even the journal (`XFS_FSOP_GOING_FLAGS_NOLOGFLUSH`, `EXT4_GOING_FLAGS_NOLOGFLUSH`).
const AT_ONCE: u32 = 2;
/// What the number of a loop device begins with (`LOOP_MAJOR`, linux/major.h).
const LOOP_MAJOR: u32 = 7;
/// Name of the file that takes all room.
const FILLER: &str = "filler";
/// Taken at a time, at first.
const TAKEN_BYTES: u64 = 256 << 20;
/// Taken at last.
const BLOCK: [u8; 4096] = [1; 4096];

/// A mounted file system.
#[derive(Debug)]
pub struct Volume {
    folder: PathBuf,
    guarded: Guarded,
}

impl Volume {
    /// An empty one of so many MiB, mounted at `folder` in this process's mount namespace: hosts see it if they are made later. `guard` is
    /// where [`super::thaw::guard`] listens.
    ///
    /// # Errors
    /// If it can't be made or mounted: that needs root, loop devices, and e2fsprogs.
    pub fn mount(folder: &Path, mib: u64, guard: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let image = folder.with_extension("image");
        let file = File::create(&image).with_context(|| format!("creating {}", image.display()))?;
        file.set_len(mib << 20)
            .with_context(|| format!("sizing {}", image.display()))?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image))?;
        run(Command::new("mount")
            .args(["-t", "ext4", "-o", "loop"])
            .arg(&image)
            .arg(folder))?;
        fs::remove_file(&image).with_context(|| format!("removing {}", image.display()))?;
        Self::mounted(folder.to_owned(), guard)
    }

    /// One that is mounted at `folder` already, of its own: whatever is done to it is done to all of that file system. `guard` as in
    /// [`Volume::mount`].
    ///
    /// # Errors
    /// If no guard listens there.
    pub fn mounted(folder: PathBuf, guard: &Path) -> anyhow::Result<Self> {
        let guarded = Guarded::connect(guard).with_context(|| format!("connecting to {}", guard.display()))?;
        Ok(Self { folder, guarded })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// From now on whoever writes to it waits, until what is returned is dropped. Before it stands still it writes what is dirty.
    ///
    /// # Errors
    /// If nobody would thaw it after this process, if nothing is mounted there from a loop device, or if it can't be frozen.
    pub fn hang(&self) -> anyhow::Result<Hanging> {
        let root = open_root(&self.folder)?;
        self.guarded.thaw_at_end(&root).context("telling the guard")?;
        order(&root, FREEZE).with_context(|| format!("freezing {}", self.folder.display()))?;
        Ok(Hanging(root))
    }

    /// From now on it answers with I/O errors, until it was mounted anew.
    ///
    /// # Errors
    /// If nothing is mounted there from a loop device, or its kind knows no such order.
    pub fn fail(&self) -> anyhow::Result<()> {
        let root = open_root(&self.folder)?;
        let how = AT_ONCE;
        // SAFETY: an open descriptor; the order reads an integer, which outlives the call.
        match unsafe { libc::ioctl(root.as_raw_fd(), SHUT_DOWN, &raw const how) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()).with_context(|| format!("shutting {} down", self.folder.display())),
        }
    }

    /// Takes all room that is left, until what is returned is dropped.
    ///
    /// # Errors
    /// If nothing is mounted there from a loop device; what else than want of room keeps a file from growing.
    pub fn fill(&self) -> anyhow::Result<Full> {
        open_root(&self.folder)?;
        let path = self.folder.join(FILLER);
        let file = File::options().create_new(true).append(true).open(&path);
        let file = file.with_context(|| format!("creating {}", path.display()))?;
        let full = Full { path, file };
        loop_device(&full.file).with_context(|| format!("filling {}", full.path.display()))?;
        full.take_more()?;
        Ok(full)
    }
}

/// A volume without room. Dropping it gives the room back.
#[derive(Debug)]
#[must_use]
pub struct Full {
    path: PathBuf,
    file: File,
}

impl Full {
    /// Takes what has become free since.
    ///
    /// # Errors
    /// What else than want of room keeps a file from growing.
    pub fn take_more(&self) -> anyhow::Result<()> {
        let filling = || format!("filling {}", self.path.display());
        let length = || anyhow::Ok(self.file.metadata().with_context(filling)?.len());
        loop {
            let before = length()?;
            self.take(before).with_context(filling)?;
            if length()? == before {
                return Ok(());
            }
            // Until then a write has more set aside than it takes.
            self.file.sync_data().with_context(filling)?;
        }
    }

    /// Takes what is free now, from where the file ends.
    fn take(&self, mut at: u64) -> io::Result<()> {
        let mut bytes = TAKEN_BYTES;
        while bytes >= BLOCK.len() as u64 {
            match fallocate(&self.file, FallocateFlags::empty(), at, bytes) {
                Ok(()) => at += bytes,
                Err(Errno::NOSPC) => bytes /= 2,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // What is set aside for a file system's own needs is there for writers.
        let mut file = &self.file;
        loop {
            match file.write_all(&BLOCK) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            eprintln!("{} stays: {error}", self.path.display());
        }
    }
}

/// Takes the blocks from under a file that somebody may have open: it is as long as before and reads as zeros, and has to find room for
/// whatever is written to it.
///
/// # Errors
/// If it is on no loop device, or its file system can't do that.
pub fn take_blocks(file: &Path) -> anyhow::Result<()> {
    let taking = || format!("taking the blocks of {}", file.display());
    let open = File::options().write(true).open(file).with_context(taking)?;
    loop_device(&open).with_context(taking)?;
    let bytes = open.metadata().with_context(taking)?.len();
    ensure!(bytes > 0, "{} has none", file.display());
    fallocate(&open, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, bytes).with_context(taking)
}

/// A volume that hangs. Dropping it lets everything go on.
#[derive(Debug)]
#[must_use]
pub struct Hanging(File);

impl Drop for Hanging {
    fn drop(&mut self) {
        if let Err(error) = thaw(&self.0) {
            eprintln!("a volume stays frozen until this test ends: {error}");
        }
    }
}

/// Lets everything go on that waits for the file system of an open file.
pub(super) fn thaw(file: &impl AsFd) -> io::Result<()> {
    order(file, THAW)
}

/// The root of a file system that is mounted there from a loop device; nothing else may get an order.
fn open_root(folder: &Path) -> anyhow::Result<File> {
    let opening = || format!("opening the file system at {}", folder.display());
    let root = File::open(folder).with_context(opening)?;
    let above = fs::metadata(folder.join("..")).with_context(opening)?.dev();
    let own = loop_device(&root).with_context(opening)?;
    ensure!(own != above, "nothing is mounted at {}", folder.display());
    Ok(root)
}

/// The number of the loop device that an open file lies on, other than that of this machine's root.
fn loop_device(file: &File) -> anyhow::Result<u64> {
    let (device, machine) = (file.metadata()?.dev(), fs::metadata("/")?.dev());
    ensure!(
        major(device) == LOOP_MAJOR && device != machine,
        "it lies on device {}:{}, which is no loop device of a test: it is left alone",
        major(device),
        minor(device)
    );
    Ok(device)
}

fn order(file: &impl AsFd, what: libc::c_ulong) -> io::Result<()> {
    // SAFETY: an open descriptor; both orders ignore their argument.
    match unsafe { libc::ioctl(file.as_fd().as_raw_fd(), what, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .output()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ({}): {text}", output.status);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No order is given here: whoever breaks this finds that out without losing the machine.
    #[test]
    fn what_is_no_mounted_loop_device_is_left_alone() {
        let folder = std::env::temp_dir().join(format!("ftvm-no-volume-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let refused = ["/", "/proc", "/nowhere-at-all"].map(Path::new).map(open_root);
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        assert!(open_root(&folder).is_err(), "nothing is mounted there");
        let root = File::open("/").expect("it is there");
        assert!(loop_device(&root).is_err());
        fs::remove_dir_all(&folder).expect("removed");
    }
}
