//! The program of a seat's pod: it prepares the seat's files, hands them to the node daemon, shows the guest's console as
//! the pod's log, and ends after the engine. docs/kubernetes.md, "Seat socket".
//!
//! ```text
//!   guest image, claims, identity ──► descriptors ──► node daemon ──► engine
//!   stdout ◄── FIFO beside the first disk ◄──────────────────────────── console
//! ```
//!
//! `seat ready` tells whether the seat is ready: what the daemon said last. `seat install` and `seat copy` run before it, where the guest
//! image can't be mounted ([`copy`]).

mod copy;
mod disks;
mod files;
mod state;

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_engine::control::{Connection, Message, SocketError};
use ftvm_node_daemon::seat_socket::message::{FromSeat, Recipe, SOCKET, ToSeat, VERSION};
use rustix::event::{PollFd, PollFlags, Timespec};

/// Pause before the daemon is called again, doubled with each attempt in a row at which files couldn't be had.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_MAX: Duration = Duration::from_secs(30);
/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(500);
/// After SIGTERM, a daemon that can't be reached is waited for this long; then the engine hands over by itself.
const DAEMON_PATIENCE: Duration = Duration::from_secs(20);

/// Where things are in the pod.
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }
}

fn main() -> ExitCode {
    let all: Vec<String> = std::env::args().skip(1).collect();
    match all.split_first() {
        Some((word, arguments)) if word == "install" => return copy::install(arguments),
        Some((word, arguments)) if word == "copy" => return copy::copy(arguments),
        _ => {}
    }
    let mut arguments = all.into_iter();
    let (mut root, mut ready) = (PathBuf::from("/"), false);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            // For tests: another folder in the place of the container's root.
            ("--root", Some(folder)) => root = folder.into(),
            ("ready", None) => ready = true,
            _ => {
                eprintln!("seat: usage: seat [--root FOLDER] [ready], seat install PATH, seat copy …");
                return ExitCode::from(2);
            }
        }
    }
    let layout = Layout { root };
    if ready {
        return state::report(&layout);
    }
    match Seat::new(layout) {
        Ok(mut seat) => ExitCode::from(seat.run()),
        Err(why) => {
            eprintln!("seat: {why}");
            ExitCode::from(1)
        }
    }
}

struct Seat {
    layout: Arc<Layout>,
    signals: OwnedFd,
    work: Option<disks::Work>,
    console: Option<files::Console>,
    /// When SIGTERM came.
    terminating: Option<Instant>,
    /// Attempts in a row at which disks or files couldn't be had.
    failures: u32,
    said: String,
}

/// Why a conversation with the daemon ended.
enum Over {
    /// To be begun again.
    Again,
    /// The program ends with this code.
    End(u8),
}

impl Seat {
    fn new(layout: Layout) -> Result<Seat, String> {
        let signals = block_signals().map_err(|error| format!("signals can't be taken: {error}"))?;
        state::forget(&layout);
        Ok(Seat {
            console: files::find_console(&layout),
            layout: Arc::new(layout),
            signals,
            work: None,
            terminating: None,
            failures: 0,
            said: String::new(),
        })
    }

    fn run(&mut self) -> u8 {
        loop {
            match Connection::connect(&self.layout.path("run/ftvm").join(SOCKET)) {
                Ok(connection) => {
                    if let Over::End(code) = self.converse(&connection) {
                        return code;
                    }
                }
                Err(error) => self.say(format!("no node daemon yet: {error}")),
            }
            // Whoever ends the pod waits for nothing.
            let failures = self.terminating.map_or(self.failures, |_| 0);
            self.wait(None, Some(pause(failures)));
            if self.terminating.is_some_and(|since| since.elapsed() > DAEMON_PATIENCE) {
                self.say("the pod ends and no node daemon answers: the engine hands over by itself".to_owned());
                return 0;
            }
        }
    }

    /// Prints a message unless it is what was said last.
    fn say(&mut self, what: String) {
        if self.said != what {
            eprintln!("seat: {what}");
            self.said = what;
        }
    }

    /// Waits for a message, for a signal, or for this long. True if there is a message.
    fn wait(&mut self, connection: Option<&Connection>, timeout: Option<Duration>) -> bool {
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if let Some(connection) = connection {
            fds.push(PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN));
        }
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        // An interrupted wait is one without news.
        let polled = rustix::event::poll(&mut fds, timeout.as_ref()).unwrap_or(0);
        let ready = |index: usize| polled > 0 && fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (signal, message) = (ready(0), ready(1));
        if signal {
            let mut information = [0; size_of::<libc::signalfd_siginfo>()];
            // Only that one came counts.
            let _ = rustix::io::read(&self.signals, &mut information);
            self.terminating.get_or_insert_with(Instant::now);
        }
        message
    }

    fn converse(&mut self, connection: &Connection) -> Over {
        let mut told_to_end = false;
        let mut handed = false;
        if connection.send(&FromSeat::Hello { version: VERSION }, &[]).is_err() {
            return self.last_words(connection);
        }
        loop {
            if self.terminating.is_some() && !told_to_end {
                if connection.send(&FromSeat::Terminate {}, &[]).is_err() {
                    return Over::Again;
                }
                told_to_end = true;
            }
            if !handed && self.work.is_some() {
                match self.attend_work(connection) {
                    Ok(done) => handed = done,
                    Err(over) => return over,
                }
            }
            let pause = (!handed && self.work.is_some()).then_some(PROGRESS);
            if !self.wait(Some(connection), pause) {
                continue;
            }
            match connection.receive::<ToSeat>(false) {
                Ok(Message { body, .. }) => {
                    if let Some(over) = self.obey(body) {
                        return over;
                    }
                }
                Err(SocketError::WouldBlock) => {}
                Err(SocketError::Malformed(error)) => self.say(format!("message of the daemon skipped: {error}")),
                Err(_) => return self.last_words(connection),
            }
        }
    }

    /// The daemon has closed its end. What it said before, a refusal for example, can still be read, though not at the first
    /// look where it closed without reading everything (`ECONNRESET` comes first).
    fn last_words(&mut self, connection: &Connection) -> Over {
        for _ in 0..2 {
            if let Ok(Message { body, .. }) = connection.receive::<ToSeat>(false)
                && let Some(over) = self.obey(body)
            {
                return over;
            }
        }
        self.say("the node daemon went away; the engine runs on".to_owned());
        Over::Again
    }

    fn obey(&mut self, message: ToSeat) -> Option<Over> {
        match message {
            ToSeat::Refused { why } => {
                self.say(format!("the node daemon refuses: {why}"));
                Some(Over::Again)
            }
            ToSeat::Prepare(recipe) => {
                self.prepare(recipe);
                None
            }
            ToSeat::State { role, ready, why } => {
                let told = state::State { role, ready, why };
                if let Err(error) = state::keep(&self.layout, &told) {
                    self.say(error);
                }
                None
            }
            ToSeat::End { code, why } => {
                self.say(format!("the engine has ended: {why}"));
                Some(Over::End(code))
            }
        }
    }

    /// Begins to prepare the disks; work that is under way or done for the same recipe goes on.
    fn prepare(&mut self, recipe: Recipe) {
        if self.work.as_ref().is_some_and(|work| work.is_for(&recipe)) {
            return;
        }
        self.work = Some(disks::Work::start(self.layout.clone(), recipe));
    }

    /// Tells how far the disks are. True once everything was handed over.
    fn attend_work(&mut self, connection: &Connection) -> Result<bool, Over> {
        let Some(work) = &self.work else { return Ok(false) };
        match work.outcome() {
            None => {
                for (disk, progress) in work.progress() {
                    let progress = FromSeat::Progress {
                        disk,
                        step: progress.step,
                        done_bytes: progress.done_bytes,
                        total_bytes: progress.total_bytes,
                    };
                    match connection.send(&progress, &[]) {
                        // A daemon that does not read now is told more later.
                        Ok(()) | Err(SocketError::WouldBlock) => {}
                        Err(_) => return Err(Over::Again),
                    }
                }
                Ok(false)
            }
            Some(Err(why)) => {
                self.work = None;
                Err(self.failed(connection, why))
            }
            Some(Ok(())) => {
                let recipe = work.recipe().clone();
                self.hand_over(connection, &recipe)
            }
        }
    }

    fn hand_over(&mut self, connection: &Connection, recipe: &Recipe) -> Result<bool, Over> {
        let opened = files::open(&self.layout, recipe, &mut self.console);
        let (fds, initrd) = match opened {
            Ok(opened) => opened,
            Err(why) => return Err(self.failed(connection, why)),
        };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        match connection.send(&FromSeat::Ready { initrd }, &fds) {
            Ok(()) => {
                self.failures = 0;
                Ok(true)
            }
            Err(_) => Err(Over::Again),
        }
    }

    /// The daemon publishes it; a later conversation tries again.
    fn failed(&mut self, connection: &Connection, why: String) -> Over {
        self.failures = self.failures.saturating_add(1);
        self.say(why.clone());
        // If it is gone, it hears of it the next time.
        let _ = connection.send(&FromSeat::Failed { why }, &[]);
        Over::Again
    }
}

/// How long to wait after so many failures in a row.
fn pause(failures: u32) -> Duration {
    AGAIN.saturating_mul(1 << failures.min(6)).min(AGAIN_MAX)
}

/// SIGTERM and SIGINT as a descriptor (signalfd(2)); blocked before there are threads, so in all of them.
fn block_signals() -> std::io::Result<OwnedFd> {
    // SAFETY: an initialised set; the descriptor is new and nobody else's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(std::io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_again_and_again_is_tried_later_and_later() {
        let pauses: Vec<_> = (0..9).map(|failures| pause(failures).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]);
        assert_eq!(pause(u32::MAX), AGAIN_MAX);
    }
}
