//! Whether the seat's program lives, where there is one (Kubernetes): it holds the reading end of the console's FIFO.
//!
//! The kernel tells by POLLERR on the writing end that nobody reads (pipe(7)), and takes that back when somebody does again:
//! a seat program that is started anew within the patience is taken for the same. No daemon is needed for either.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::{Driver, Queue};

/// How often a FIFO without a reader is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// A hand-over that is not done by then is given up: the standby takes over from the silence instead. Volumes are unmounted soon
/// after a pod.
const LEAVE_MAX: Duration = Duration::from_secs(5);

/// Tells the driver, again and again, while nobody has read the console for longer than `patience`. Returns never.
pub fn watch(console: &File, patience: Duration, queue: &Queue) {
    loop {
        if !has_no_reader(console, None) {
            continue;
        }
        let begun = Instant::now();
        while has_no_reader(console, Some(Duration::ZERO)) {
            if begun.elapsed() >= patience {
                queue.put(super::Input::SeatGone);
            }
            std::thread::sleep(LOOK);
        }
    }
}

fn has_no_reader(console: &File, timeout: Option<Duration>) -> bool {
    // No event is asked for: errors are told anyway.
    let mut fds = [PollFd::from_borrowed_fd(console.as_fd(), PollFlags::empty())];
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    });
    // An interrupted wait is tried again.
    rustix::event::poll(&mut fds, timeout.as_ref()).is_ok_and(|ready| ready > 0)
        && fds[0].revents().contains(PollFlags::ERR)
}

impl Driver {
    pub(super) fn seat_gone(&mut self) {
        self.leave(LEAVE_MAX, "the seat's program (its pod) is gone and did not come back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};

    #[test]
    fn a_reader_that_comes_back_in_time_is_no_news_and_one_that_does_not_is() {
        let path = std::env::temp_dir().join(format!("ftvm-seat-watch-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        let open = |flags| rustix::fs::open(&path, flags | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut patience = Duration::from_secs(2);
        let (reader, inputs) = loop {
            let reader = open(OFlags::RDONLY);
            let console: File = open(OFlags::WRONLY).into();
            let (queue, inputs) = super::super::queue();
            std::thread::spawn(move || watch(&console, patience, &queue));
            let left = Instant::now();
            drop(reader);
            // Longer than it looks.
            std::thread::sleep(Duration::from_millis(700));
            let reader = open(OFlags::RDONLY);
            if left.elapsed() < patience {
                break (reader, inputs);
            }
            // A machine this busy needs more patience to come back in time.
            patience *= 2;
            assert!(patience < Duration::from_secs(60), "it can't come back in time");
        };
        let told = inputs.0.recv_timeout(patience + Duration::from_secs(1));
        assert!(told.is_err(), "it came back in time");
        drop(reader);
        let told = inputs.0.recv_timeout(Duration::from_secs(60));
        assert!(matches!(told, Ok(super::super::Input::SeatGone)), "{told:?}");
        std::fs::remove_file(&path).unwrap();
    }
}
