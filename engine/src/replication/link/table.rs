//! The links' threads have a table of descriptors of their own.
//!
//! When a process is killed, its descriptors are closed only after its memory was given back, which for a guest takes
//! milliseconds to seconds, and until then no peer learns that it is gone. A table of descriptors goes with the last
//! thread that uses it, and the memory with the last thread of all. So the hub's thread leaves the process's table
//! (unshare(2), CLONE_FILES) and closes everything in its own that links don't need; threads that it starts share that
//! one. Their sockets are in no other table: they are closed as soon as these threads are dead.
//!
//! A descriptor made on one side has no meaning on the other. What both use, [`Wake`], is made before they part.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// Links, connections in their handshake, and links that are down but still known to somebody.
const WAKES: usize = 48;

/// Eventfds with the same number in both tables.
#[derive(Debug)]
pub(super) struct Wakes {
    fds: Vec<OwnedFd>,
    free: Mutex<Vec<usize>>,
}

impl Wakes {
    /// To be made before the threads part.
    pub fn new() -> io::Result<Arc<Self>> {
        let fds = (0..WAKES)
            .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))
            .collect::<Result<_, _>>()?;
        Ok(Arc::new(Self {
            fds,
            free: Mutex::new((0..WAKES).collect()),
        }))
    }

    fn free(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that nobody uses.
    pub fn take(self: &Arc<Self>) -> io::Result<Wake> {
        let index = self.free().pop();
        let index = index.ok_or_else(|| io::Error::other("too many connections at a time"))?;
        let wake = Wake {
            pool: self.clone(),
            index,
        };
        wake.drain();
        Ok(wake)
    }

    /// The numbers of all of them.
    pub fn numbers(&self) -> impl Iterator<Item = RawFd> {
        self.fds.iter().map(AsRawFd::as_raw_fd)
    }
}

/// Wakes a thread that polls it, from either side.
#[derive(Debug)]
pub(super) struct Wake {
    pool: Arc<Wakes>,
    index: usize,
}

impl Wake {
    /// Makes it readable.
    pub fn signal(&self) {
        // Adding 1 fails only if the counter is at its maximum, and then the descriptor is readable already.
        let _ = rustix::io::write(self, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable until it is signalled again.
    pub fn drain(&self) {
        // It fails when nothing was signalled.
        let _ = rustix::io::read(self, &mut [0; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pool.fds[self.index].as_fd()
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        self.pool.free().push(self.index);
    }
}

/// Gives the calling thread, and those that it starts from now on, a table that holds only `keep` and the standard
/// descriptors. A system that does not permit it (a container's system call filter) leaves the table shared: then peers
/// learn of a killed engine later.
pub(super) fn part(keep: impl IntoIterator<Item = RawFd>) -> io::Result<()> {
    // SAFETY: unshare has one argument by value. Whoever owns a descriptor in this thread's closures made it here or is
    // one of `keep`: both stay valid in the new table.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        tracing::debug!("links share the engine's descriptors: {}", io::Error::last_os_error());
        return Ok(());
    }
    let mut keep: Vec<u32> = keep.into_iter().filter_map(|fd| u32::try_from(fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.into_iter().filter(|fd| *fd >= 3) {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: arguments by value; the table is this thread's own, and nothing here uses what is closed.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
