//! A file system of its own that hangs when it is told to, for real: whoever writes to it waits in the kernel, and no signal ends that.
//!
//! ext4 on a loop device, frozen by `FIFREEZE` (fsfreeze(8)): writes and allocations wait until it is thawed. What is in the page cache is
//! read as ever, and a sync that has nothing to write returns.
//!
//! Its image has no name any more once it is mounted, and the loop device goes with the last mount: nothing of it is left when the
//! namespaces of the test are gone. [`super::thaw`] sees to it that they can go.
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use super::thaw::Guarded;

/// `FIFREEZE` and `FITHAW` (linux/fs.h).
const FREEZE: libc::c_ulong = 0xC004_5877;
const THAW: libc::c_ulong = 0xC004_5878;

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
        Ok(Self {
            folder: folder.to_owned(),
            guarded: Guarded::connect(guard).with_context(|| format!("connecting to {}", guard.display()))?,
        })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// From now on whoever writes to it waits, until what is returned is dropped. Before it stands still it writes what is dirty.
    ///
    /// # Errors
    /// If nobody would thaw it after this process, or if it can't be frozen.
    pub fn hang(&self) -> anyhow::Result<Hanging> {
        let root = File::open(&self.folder).with_context(|| format!("opening {}", self.folder.display()))?;
        self.guarded.thaw_at_end(&root).context("telling the guard")?;
        order(&root, FREEZE).with_context(|| format!("freezing {}", self.folder.display()))?;
        Ok(Hanging(root))
    }
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
