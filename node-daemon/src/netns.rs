//! Telling network namespaces apart.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::Stat;

/// A network namespace: device and inode of its file (namespaces(7)). No other one has them while a process or a descriptor holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Netns {
    dev: u64,
    ino: u64,
}

impl Netns {
    /// The one that this descriptor is of.
    ///
    /// # Errors
    /// The system's.
    pub fn of_descriptor(fd: impl AsFd) -> io::Result<Netns> {
        Ok(rustix::fs::fstat(fd)?.into())
    }

    /// The one that this process lives in. The caller knows that the number still means the process.
    ///
    /// # Errors
    /// The system's: the process has ended, or is another user's and this one may not trace it (proc_pid_ns(5)).
    pub fn of_process(pid: i32) -> io::Result<Netns> {
        Ok(rustix::fs::stat(format!("/proc/{pid}/ns/net"))?.into())
    }
}

impl From<Stat> for Netns {
    fn from(stat: Stat) -> Netns {
        Netns {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_and_a_process_tell_the_same_namespace() {
        let pid = std::process::id().cast_signed();
        let own = std::fs::File::open("/proc/self/ns/net").unwrap();
        let own = Netns::of_descriptor(&own).unwrap();
        assert_eq!(Netns::of_process(pid).unwrap(), own);
        // What is no network namespace is another one than any.
        let other = std::fs::File::open("/proc/self/ns/mnt").unwrap();
        assert_ne!(Netns::of_descriptor(&other).unwrap(), own);
        assert!(Netns::of_process(i32::MAX).is_err());
    }
}
