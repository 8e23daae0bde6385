//! The thread of one device: work inside the pause gate, wait and block outside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::pause::PauseGate;

/// What a worker does after a turn inside the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another turn at once, after giving the driver a chance to close the gate.
    Again,
    /// [`Worker::outside`], then another turn.
    Outside,
    /// Wait for a notification, or for this descriptor to become readable.
    Wait(Option<RawFd>),
    /// Wait for a notification, at most this many milliseconds.
    WaitFor(u32),
}

/// The work of one device thread.
pub(crate) trait Worker: Send + 'static {
    /// A bounded turn inside the pause gate; must not block.
    fn inside(&mut self) -> Next;
    /// Work that may block, outside the gate.
    fn outside(&mut self) {}
}

/// A counter that wakes a thread; written by the kernel (ioeventfd) or by [`Self::signal`].
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn signal(&self) {
        // It can fail only when the counter is full, and then the thread is woken anyway.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn drain(&self) {
        // It fails when nothing was signalled.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A running device thread. It ends when this is dropped; the gate must then be open, or the thread could not see it.
#[derive(Debug)]
pub(crate) struct WorkerThread {
    stop: Arc<AtomicBool>,
    wakes: Arc<Vec<Wake>>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerThread {
    /// Starts a thread that is woken by any of `wakes`. `prepare` runs on it first (system call filter).
    pub(crate) fn spawn(
        name: &str,
        gate: Arc<PauseGate>,
        wakes: Arc<Vec<Wake>>,
        prepare: impl FnOnce() + Send + 'static,
        mut worker: impl Worker,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, woken) = (stop.clone(), wakes.clone());
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            crate::priority::take_short_turns();
            prepare();
            run(&gate, &woken, &stopped, &mut worker);
        })?;
        Ok(Self {
            stop,
            wakes,
            thread: Some(thread),
        })
    }
}

impl WorkerThread {
    /// Asks the thread to end, which it does inside the gate.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wakes.iter().for_each(Wake::signal);
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn run(gate: &PauseGate, wakes: &[Wake], stop: &AtomicBool, worker: &mut impl Worker) {
    loop {
        let next = {
            let _entry = gate.enter();
            if stop.load(Ordering::SeqCst) {
                return;
            }
            worker.inside()
        };
        match next {
            Next::Again => {}
            Next::Outside => worker.outside(),
            Next::Wait(extra) => wait(wakes, extra, None),
            Next::WaitFor(timeout_ms) => wait(wakes, None, Some(timeout_ms)),
        }
    }
}

/// Sleeps until one of `wakes` is signalled (which is consumed), `extra` is readable or the time is over.
fn wait(wakes: &[Wake], extra: Option<RawFd>, timeout_ms: Option<u32>) {
    let mut fds: Vec<PollFd<'_>> = wakes.iter().map(|wake| PollFd::new(wake, PollFlags::IN)).collect();
    if let Some(fd) = extra {
        // SAFETY: the descriptor belongs to the backend of the worker that named it, which outlives this call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
    }
    let timeout = timeout_ms.map(|ms| Timespec {
        tv_sec: i64::from(ms / 1000),
        tv_nsec: i64::from(ms % 1000) * 1_000_000,
    });
    // An interrupted or failed poll is a spurious wake-up: the worker looks at everything anyway.
    let _ = poll(&mut fds, timeout.as_ref());
    for (wake, polled) in wakes.iter().zip(&fds) {
        if !polled.revents().is_empty() {
            wake.drain();
        }
    }
}
