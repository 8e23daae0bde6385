//! Whether this daemon is well, for the probes of its own pod: a socket in a folder that no other pod sees.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Connection, Listener, exit_code};
use serde::{Deserialize, Serialize};

use crate::explain;
use crate::state::{StateError, remove_if_there};

const SOCKET: &str = "probe.sock";
/// Whatever turns, turns at least this often.
const BEAT_MAX: Duration = Duration::from_secs(60);
/// A probe that is asked by hand waits this long; kubelet ends its own after the `timeoutSeconds` of the chart's values.
const PATIENCE: Duration = Duration::from_secs(60);

/// The answer to a probe.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    well: bool,
    what: String,
}

struct Shared {
    began: Instant,
    /// Milliseconds since `began`.
    beat: AtomicU64,
    leads: AtomicBool,
    synced: AtomicBool,
}

/// Whether this daemon is well.
#[derive(Clone)]
pub struct Health(Arc<Shared>);

impl Health {
    /// Answers probes in this folder, in a thread of its own.
    ///
    /// # Errors
    /// If the socket can't be had.
    pub fn start(folder: &Path) -> Result<Health, StateError> {
        let failed = |what| {
            let path = folder.to_owned();
            move |source| StateError::Io { what, path, source }
        };
        let health = Health(Arc::new(Shared {
            began: Instant::now(),
            beat: AtomicU64::new(0),
            leads: AtomicBool::new(false),
            synced: AtomicBool::new(false),
        }));
        std::fs::create_dir_all(folder).map_err(failed("making"))?;
        let path = folder.join(SOCKET);
        remove_if_there(&path)?;
        let listener = Listener::bind(&path)
            .map_err(|error| failed("binding the probe's socket in")(std::io::Error::other(error)))?;
        let shared = health.clone();
        let work = move || {
            loop {
                match listener.accept() {
                    // Whoever asked may be gone.
                    Ok(connection) => drop(connection.send(&shared.answer(), &[])),
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        };
        let spawned = std::thread::Builder::new().name("probe".to_owned()).spawn(work);
        spawned.map_err(failed("starting a thread for"))?;
        Ok(health)
    }

    /// One in which nothing turned for a long time.
    #[cfg(test)]
    pub fn of_standstill() -> Health {
        Health(Arc::new(Shared {
            began: Instant::now()
                .checked_sub(2 * BEAT_MAX)
                .expect("this machine runs for two minutes"),
            beat: AtomicU64::new(0),
            leads: AtomicBool::new(true),
            synced: AtomicBool::new(true),
        }))
    }

    /// Something turned.
    pub fn beat(&self) {
        let now = self.0.began.elapsed().as_millis();
        self.0
            .beat
            .store(u64::try_from(now).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// It has the state folder.
    pub fn leads(&self) {
        self.0.leads.store(true, Ordering::Relaxed);
        self.beat();
    }

    /// Whether the API server's objects are known.
    pub fn synced(&self, synced: bool) {
        self.0.synced.store(synced, Ordering::Relaxed);
    }

    /// Whether it is the daemon that has the seats.
    pub fn is_leading(&self) -> bool {
        self.0.leads.load(Ordering::Relaxed)
    }

    /// Whether the API server's objects are known.
    pub fn is_synced(&self) -> bool {
        self.0.synced.load(Ordering::Relaxed)
    }

    /// Whether something turned lately. A daemon without an API server is well: it would not be better after a restart.
    pub fn is_well(&self) -> bool {
        let beat = Duration::from_millis(self.0.beat.load(Ordering::Relaxed));
        self.0.began.elapsed().saturating_sub(beat) < BEAT_MAX
    }

    fn answer(&self) -> Answer {
        let what = match (self.is_well(), self.is_leading(), self.is_synced()) {
            (false, ..) => "stands still",
            (true, false, _) => "waits for its predecessor",
            (true, true, false) => "serves seats; no API server",
            (true, true, true) => "serves seats",
        };
        Answer {
            well: self.is_well(),
            what: what.to_owned(),
        }
    }
}

/// Asks the daemon of this pod; gives the exit code of the probe.
pub fn probe(folder: &Path) -> u8 {
    match ask(folder) {
        Ok(Answer { well: true, what }) => {
            println!("{what}");
            exit_code::OK
        }
        Ok(Answer { what, .. }) => {
            println!("{what}");
            exit_code::DAEMON
        }
        Err(why) => {
            println!("{why}");
            exit_code::DAEMON
        }
    }
}

fn ask(folder: &Path) -> Result<Answer, String> {
    use std::os::fd::AsFd;
    let connection = Connection::connect(&folder.join(SOCKET)).map_err(|error| explain(&error))?;
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(
        connection.as_fd(),
        rustix::event::PollFlags::IN,
    )];
    let patience = rustix::event::Timespec {
        tv_sec: PATIENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    match rustix::event::poll(&mut fds, Some(&patience)) {
        Ok(1..) => connection
            .receive::<Answer>(false)
            .map(|message| message.body)
            .map_err(|error| explain(&error)),
        _ => Err("the daemon does not answer its probe".to_owned()),
    }
}
