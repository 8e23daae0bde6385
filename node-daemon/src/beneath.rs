//! Files of folders that others filled: guest images, and claims with first contents.
//!
//! `seat copy` has rules of its own: it runs with the guest image as its root, among what the runtime has mounted there, and follows no link at all.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How often a path is looked up while the system is changing.
const ATTEMPTS: u32 = 100;

/// Opens a file for reading by its path in this folder, which is its root: a symbolic link there leads to another place of the folder and
/// never out, to a seat's identity for example. Never waits, whatever it is.
///
/// # Errors
/// Those of openat2.
pub fn open(folder: &Path, path: &str) -> io::Result<File> {
    let root = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(folder, root, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..ATTEMPTS {
        match rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve) {
            // Something was renamed or mounted meanwhile, anywhere, and a link has `..` (openat2(2)).
            Err(Errno::AGAIN) => {}
            opened => return Ok(opened?.into()),
        }
    }
    Err(Errno::AGAIN.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_lead_to_places_of_the_folder_and_never_out() {
        let outside = crate::testing::Folder::new("beneath");
        let (folder, secret) = (outside.path().join("guest"), outside.path().join("secret"));
        std::fs::create_dir_all(folder.join("boot")).unwrap();
        std::fs::write(&secret, "secret").unwrap();
        std::fs::write(folder.join("boot/vmlinuz-6"), "kernel").unwrap();
        for (name, to) in [
            ("boot/vmlinuz", "vmlinuz-6"),
            ("vmlinuz", "/boot/vmlinuz"),
            ("up", "../secret"),
            ("absolute", secret.to_str().unwrap()),
            ("folder", ".."),
        ] {
            symlink(to, folder.join(name)).unwrap();
        }
        for path in [
            "/boot/vmlinuz-6",
            "/boot/vmlinuz",
            "/vmlinuz",
            "boot/vmlinuz",
            "/../boot/vmlinuz",
        ] {
            let read = open(&folder, path).and_then(io::read_to_string);
            assert_eq!(read.unwrap(), "kernel", "{path}");
        }
        for path in ["up", "absolute", "folder/secret", "../secret"] {
            // It leads out for who follows it.
            assert_eq!(std::fs::read(folder.join(path)).unwrap(), b"secret", "{path}");
            let error = open(&folder, path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{path}: {error}");
        }
    }
}
