//! The log: whoever says something waits for no disk.
//!
//! Standard error is a file of the daemon's. The file system under it may stand still for everybody because somebody makes something
//! durable, and a line that is appended waits for that. So lines are written by a thread of their own.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Lines that may wait; more are lost.
const LINES_MAX: usize = 1024;
/// So long the end of the process waits for its last lines.
const LAST_WORDS: Duration = Duration::from_secs(2);

static LOG: OnceLock<Log> = OnceLock::new();

/// Takes a line for standard error. It waits for it until [`begin`] was called.
#[derive(Debug, Clone, Copy)]
pub struct Line;

/// Makes a [`Line`]: what a subscriber of `tracing` asks for.
pub fn line() -> Line {
    Line
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match LOG.get() {
            Some(log) => {
                log.take(bytes);
                Ok(bytes.len())
            }
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// From now on nobody waits for standard error. `enter` runs first in the thread that does.
///
/// # Errors
/// There can be no more threads.
pub fn begin(enter: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let log = Log::start(io::stderr(), enter)?;
    // Called once a process; a second thread would end at once.
    let _ = LOG.set(log);
    Ok(())
}

/// Waits for the last lines, but not for ever.
pub fn end() {
    if let Some(log) = LOG.get() {
        log.end();
    }
}

enum Item {
    Line(Vec<u8>),
    /// Everything before it is written.
    End(Sender<()>),
}

struct Log {
    items: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

impl Log {
    fn start(into: impl Write + Send + 'static, enter: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (items, todo) = sync_channel(LINES_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = lost.clone();
        std::thread::Builder::new().name("log".to_owned()).spawn(move || {
            enter();
            write_all(into, &todo, &counted);
        })?;
        Ok(Self { items, lost })
    }

    fn take(&self, line: &[u8]) {
        if self.items.try_send(Item::Line(line.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn end(&self) {
        let until = Instant::now() + LAST_WORDS;
        let (written, told) = channel();
        let mut item = Item::End(written);
        while let Err(TrySendError::Full(back)) = self.items.try_send(item) {
            if Instant::now() > until {
                return;
            }
            item = back;
            std::thread::sleep(Duration::from_millis(1));
        }
        // What is not written by then is not waited for.
        let _ = told.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}

fn write_all(mut into: impl Write, todo: &Receiver<Item>, lost: &AtomicU64) {
    while let Ok(item) = todo.recv() {
        // Nobody is there to be told that a line can't be written.
        let missing = lost.swap(0, Ordering::SeqCst);
        if missing > 0 {
            let _ = writeln!(into, "{missing} lines are lost: the log's disk was too slow for them");
        }
        match item {
            Item::Line(line) => {
                let _ = into.write_all(&line);
            }
            Item::End(written) => {
                let _ = written.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A file on a disk that stands still until it is told to go on.
    struct Disk {
        goes_on: Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Later the other end is gone, and nothing waits any more.
            let _ = self.goes_on.recv_timeout(Duration::from_secs(20));
            self.written.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn who_says_something_waits_for_no_disk_and_what_is_lost_is_counted() {
        let (go_on, goes_on) = channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let disk = Disk {
            goes_on,
            written: written.clone(),
        };
        let log = Log::start(disk, || ()).unwrap();
        let said = LINES_MAX + 100;
        for number in 0..said {
            log.take(format!("{number}\n").as_bytes());
        }
        assert!(written.lock().unwrap().is_empty(), "the disk still stands still");
        drop(go_on);
        log.end();
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        let (lost, lines): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.contains("lost"));
        assert!(
            lines
                .iter()
                .zip(0..)
                .all(|(line, number)| **line == format!("{number}"))
        );
        let lost: Vec<usize> = lost
            .iter()
            .map(|line| line.split(' ').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(lines.len() + lost.iter().sum::<usize>(), said);
        assert!(lines.len() >= LINES_MAX);
    }
}
