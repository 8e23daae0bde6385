//! Starting a seat's engine, and adopting one that an earlier daemon started.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_engine::control::{Connection, FromEngine, Hello, ToEngine, exit_code};
use ftvm_protocol::identity::Incarnation;
use rustix::process::{Pid, PidfdFlags};

use super::informed::Informed;
use super::{Engine, LOG_BYTES_MAX, RAN_WELL, Seat};
use crate::api::Phase;
use crate::explain;
use crate::jail::{self, Child, Jail, Program};
use crate::prepare::{Place, SeatError, prepare};
use crate::state::{self, EngineRecord, StateError};

/// Pauses before the next start, by failures in a row.
const PAUSES_MS: [u64; 7] = [0, 500, 1_000, 2_000, 5_000, 10_000, 30_000];
/// The same for an engine that ended because of the seat's storage, which is asked again later and later.
const STORAGE_PAUSE_MIN: Duration = Duration::from_secs(1);
const STORAGE_PAUSE_MAX: Duration = Duration::from_secs(30);

impl Seat {
    pub(super) fn start(self: &Arc<Seat>) {
        match self.try_start() {
            Ok(()) => {}
            Err(error) => {
                let message = explain(&error);
                tracing::error!(seat = self.config().label(), code = error.exit_code(), "{message}");
                self.ended(message, error.exit_code());
            }
        }
    }

    fn try_start(self: &Arc<Seat>) -> Result<(), SeatError> {
        let config = self.config();
        self.source.settle(&config, &self.arbiter)?;
        let place = self.source.place()?;
        let prepared = prepare(&config, &*self.source, &place, &self.folder, &self.surroundings.bridges)?;
        let incarnation = prepared.launch.incarnation;
        self.set_seat_id(incarnation.seat);
        let (ours, theirs) = Connection::pair()?;
        let program = jail::open_static_program(&self.surroundings.engine)?;
        let log = self.folder.open_log("engine.log", LOG_BYTES_MAX)?;
        let jail = self.jail(&place)?;
        let name = [format!("ftvm-engine {}", config.label())];
        let program = Program {
            file: &program,
            arguments: &name,
            log: &log,
            control: theirs.into_fd(),
        };
        let child = jail::spawn(&jail, program)?;
        // Remembered before it is told anything: see the module's invariant.
        let result = self.remember(&child, incarnation, &jail).and_then(|()| {
            let fds: Vec<_> = prepared.fds.iter().map(|fd| fd.as_fd()).collect();
            Ok(ours.send(&ToEngine::Launch(Box::new(prepared.launch)), &fds)?)
        });
        if let Err(error) = result {
            // Without a launch message it ends by itself as soon as our end closes.
            drop(ours);
            child.wait();
            self.folder.forget_engine()?;
            return Err(error);
        }
        tracing::info!(seat = config.label(), pid = child.pid, %incarnation, "engine started");
        let mut inner = self.inner();
        inner.phase = Phase::Running;
        inner.starts += 1;
        (inner.why, inner.code) = (String::new(), 0);
        inner.engine = Some(Engine {
            incarnation,
            pid: child.pid,
            pidfd: Arc::new(child.pidfd),
            adopted: false,
            own_user: jail.user.is_some(),
            since: Instant::now(),
            serves_since: None,
            connection: Some(Arc::new(ours)),
            protection: Informed::Knows(config.protection()),
            introduced: Informed::Knows(config.link),
        });
        Ok(())
    }

    fn remember(&self, child: &Child, incarnation: Incarnation, jail: &Jail) -> Result<(), SeatError> {
        // A child that has ended is there until it is waited for. Without its start time a later daemon would take it for ended.
        let start_time = state::start_time(child.pid);
        let start_time = start_time.ok_or_else(|| unknown(child.pid, std::io::ErrorKind::Other.into()))?;
        let record = EngineRecord {
            incarnation,
            pid: child.pid,
            start_time,
            boot_id: state::boot_id()?,
            uid: jail.user.map(|(uid, _)| uid),
        };
        Ok(self.folder.set_engine(&record)?)
    }

    fn jail(&self, place: &Place) -> Result<Jail, SeatError> {
        let settings = &self.surroundings.jail;
        let mut cgroups = Vec::new();
        for folder in &place.cgroups {
            let path = folder.join("cgroup.procs");
            let file = OpenOptions::new().write(true).open(&path);
            cgroups.push(file.map_err(|source| SeatError::Cgroup { path, source })?);
        }
        let uid = settings.uid_first.saturating_add(self.slot);
        Ok(Jail {
            user: self.may_change_user().then_some((uid, uid)),
            mount_point: self.surroundings.jail_mount_point.clone(),
            network: place.network.clone(),
            cgroups,
            descriptors_max: 1024,
        })
    }

    /// Root of a user namespace that maps these user ids, such as the machine's first one.
    pub(super) fn may_change_user(&self) -> bool {
        let settings = &self.surroundings.jail;
        let uid = settings.uid_first.saturating_add(self.slot);
        let own = rustix::process::geteuid();
        own.is_root() && own.as_raw() != uid && is_mapped("uid_map", uid) && is_mapped("gid_map", uid)
    }

    /// Takes over an engine that an earlier daemon started. With an engine that nobody remembers, nothing can be told to it or of it until it
    /// has ended.
    pub(super) fn adopt(self: &Arc<Seat>) {
        let record = match self.folder.engine() {
            Ok(None) if self.source.has_process() => {
                let folder = self.folder.path().display();
                return self.doubt(format!(
                    "an engine runs in its pod that {folder} knows nothing of (was the state folder emptied?): it is left alone, and none is started beside it. \
                     Delete the pod: the other seat goes on"
                ));
            }
            Ok(None) => return self.no_doubt(),
            Ok(Some(record)) => record,
            Err(error) => return self.doubt(explain(&error)),
        };
        let found = match living(&record) {
            Ok(found) => found,
            Err(error) => return self.doubt(explain(&error)),
        };
        let Some(pidfd) = found else {
            if self.source.has_process() {
                return self.doubt(format!(
                    "the engine that {} knows of (process {}) has ended, and another process is where engines of its pod live, or it can't be told: none is started beside it. \
                     If this stays: delete the pod, the other seat goes on",
                    self.folder.path().display(),
                    record.pid
                ));
            }
            tracing::info!(
                seat = self.config().label(),
                pid = record.pid,
                "the earlier daemon's engine has ended"
            );
            self.collect_report(record.incarnation, jail::Ended::Unseen);
            // A failure to forget only means that the next daemon looks again.
            let _ = self.folder.forget_engine();
            return self.no_doubt();
        };
        self.set_seat_id(record.incarnation.seat);
        tracing::info!(
            seat = self.config().label(),
            pid = record.pid,
            "adopting the earlier daemon's engine"
        );
        let mut inner = self.inner();
        inner.phase = Phase::Running;
        (inner.doubt, inner.why, inner.code) = (false, String::new(), 0);
        inner.engine = Some(Engine {
            incarnation: record.incarnation,
            pid: record.pid,
            pidfd: Arc::new(pidfd),
            adopted: true,
            own_user: record.uid.is_some(),
            since: Instant::now(),
            serves_since: None,
            connection: None,
            introduced: Informed::Unknown,
            protection: Informed::Unknown,
        });
    }

    /// Connects to an engine whose connection is missing; false if it has to be tried again.
    pub(super) fn reconnect(&self, incarnation: Incarnation) -> bool {
        let connection = match Connection::connect(&self.folder.control_socket()) {
            Ok(connection) => connection,
            Err(error) => {
                self.inner().why = format!(
                    "the engine runs, but its control socket does not answer: {}",
                    explain(&error)
                );
                return false;
            }
        };
        // The engine greets first; whoever else listens there is not the engine that was started.
        match greeting(&connection) {
            Some(hello) if hello.incarnation == incarnation => {}
            other => {
                let who = other.map_or("nobody".to_owned(), |hello| hello.incarnation.to_string());
                self.inner().why = format!("the control socket is answered by {who} instead of {incarnation}");
                return false;
            }
        }
        let mut inner = self.inner();
        inner.why.clear();
        if let Some(engine) = &mut inner.engine {
            engine.connection = Some(Arc::new(connection));
        }
        true
    }

    /// Whether an engine may be running that could not be reached or read of.
    pub(super) fn doubts(&self) -> bool {
        self.inner().doubt
    }

    fn no_doubt(&self) {
        let mut inner = self.inner();
        if inner.doubt {
            (inner.doubt, inner.why, inner.code) = (false, "not started yet".to_owned(), 0);
        }
    }

    fn doubt(&self, why: String) {
        let mut inner = self.inner();
        if inner.doubt && inner.why == why {
            return;
        }
        tracing::error!(seat = inner.config.label(), "{why}");
        inner.doubt = true;
        inner.why = why;
        inner.code = exit_code::STATE_FOLDER;
    }

    /// The engine ended or could not be started: when to try again.
    pub(super) fn ended(&self, why: String, code: u8) {
        let mut inner = self.inner();
        inner.storage_failures = inner.storage_failures();
        let ran_well = inner
            .engine
            .take()
            .is_some_and(|engine| engine.since.elapsed() >= RAN_WELL);
        inner.failures = if ran_well { 0 } else { inner.failures.saturating_add(1) };
        let pause = if code == exit_code::STORAGE {
            inner.storage_failures = inner.storage_failures.saturating_add(1);
            storage_pause(inner.storage_failures)
        } else {
            let index = usize::try_from(inner.failures).unwrap_or(usize::MAX);
            Duration::from_millis(PAUSES_MS[index.min(PAUSES_MS.len() - 1)])
        };
        inner.next_start = Some(Instant::now() + pause);
        inner.phase = Phase::Waiting;
        (inner.why, inner.code) = (why, code);
        inner.replies.clear();
    }
}

/// After so many engines in a row that ended because of the seat's storage, from the first on.
fn storage_pause(failures: u32) -> Duration {
    let doubled = STORAGE_PAUSE_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(STORAGE_PAUSE_MAX)
}

/// The hello that an engine sends first, within two seconds.
fn greeting(connection: &Connection) -> Option<Hello> {
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(
        connection.as_fd(),
        rustix::event::PollFlags::IN,
    )];
    let patience = super::timespec(Some(Duration::from_secs(2)));
    rustix::event::poll(&mut fds, patience.as_ref()).ok()?;
    match connection.receive::<FromEngine>(false).ok()?.body {
        FromEngine::Hello(hello) => Some(hello),
        _ => None,
    }
}

/// A pidfd of the very process that was remembered; none once it has ended. An error is a doubt: the process can't be looked at, for want of
/// descriptors or memory, for instance, and may be there.
fn living(record: &EngineRecord) -> Result<Option<OwnedFd>, StateError> {
    if state::boot_id()? != record.boot_id {
        return Ok(None);
    }
    // Zero is nobody's number.
    let number =
        Pid::from_raw(record.pid).ok_or_else(|| unknown(record.pid, std::io::ErrorKind::InvalidData.into()))?;
    // The descriptor first: then the start time read below is of the process that the descriptor holds.
    let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty());
    judge(record, pidfd, state::start_time)
}

/// The same from what the kernel said, and what it says then.
fn judge(
    record: &EngineRecord,
    pidfd: rustix::io::Result<OwnedFd>,
    start_time: impl Fn(i32) -> Option<u64>,
) -> Result<Option<OwnedFd>, StateError> {
    let pidfd = match pidfd {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(errno) => return Err(unknown(record.pid, errno.into())),
    };
    let started = start_time(record.pid);
    if has_ended(&pidfd) {
        return Ok(None);
    }
    match started {
        Some(time) => Ok((time == record.start_time).then_some(pidfd)),
        None => Err(unknown(record.pid, std::io::ErrorKind::Other.into())),
    }
}

fn unknown(pid: i32, source: std::io::Error) -> StateError {
    StateError::Io {
        what: "looking at the engine's process",
        path: format!("/proc/{pid}/stat").into(),
        source,
    }
}

pub(super) fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
    let now = super::timespec(Some(Duration::ZERO));
    rustix::event::poll(&mut fds, now.as_ref()).is_ok_and(|ready| ready > 0)
}

/// Whether an id exists in this user namespace (user_namespaces(7): lines of first inside, first outside, count).
fn is_mapped(map: &str, id: u32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/self/{map}")).unwrap_or_default();
    text.lines().any(|line| {
        let mut numbers = line
            .split_ascii_whitespace()
            .map(|number| number.parse::<u64>().unwrap_or(0));
        let (first, _, count) = (numbers.next(), numbers.next(), numbers.next());
        let (first, count) = (first.unwrap_or(0), count.unwrap_or(0));
        (first..first.saturating_add(count)).contains(&u64::from(id))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seat::testing::Rig;
    use crate::seat_socket::{Expected, Handed, Hierarchies};
    use crate::testing::Folder;
    use ftvm_engine::control::{Event, Role};
    use ftvm_protocol::core::GuestReport;
    use ftvm_protocol::identity::{SeatId, VmId};

    /// Want of descriptors is no proof: a second engine would begin on the same disks.
    #[test]
    fn an_engine_that_cant_be_looked_at_may_run() {
        use rustix::io::Errno;
        let pid = std::process::id().cast_signed();
        let record = EngineRecord {
            incarnation: Incarnation {
                seat: SeatId(0xa),
                start: 1,
            },
            pid,
            start_time: state::start_time(pid).unwrap(),
            boot_id: state::boot_id().unwrap(),
            uid: None,
        };
        let open = || rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty());
        assert!(living(&record).unwrap().is_some());
        assert!(judge(&record, Err(Errno::SRCH), state::start_time).unwrap().is_none());
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            assert!(judge(&record, Err(errno), state::start_time).is_err(), "{errno}");
        }
        assert!(judge(&record, open(), |_| None).is_err());
        assert!(
            judge(&record, open(), |_| Some(0)).unwrap().is_none(),
            "another process"
        );
        let booted = EngineRecord {
            boot_id: "another".to_owned(),
            ..record
        };
        assert!(living(&booted).unwrap().is_none());
    }

    /// A seat whose thread does not run, of a pod whose control groups are these.
    fn idle(rig: &Rig, cgroups: &Folder) -> Arc<Seat> {
        let expected = Expected {
            vm: "web".to_owned(),
            vm_id: VmId(1),
            seat: "web-a".to_owned(),
            seat_id: SeatId(0xc),
        };
        let source = Arc::new(Handed::new(expected, Hierarchies::at(cgroups.path())));
        let (config, folder) = (rig.seat.config(), rig.seat.folder().clone());
        let (arbiter, surroundings) = (rig.seat.arbiter().clone(), rig.seat.surroundings.clone());
        Seat::new(config, folder, source, arbiter, surroundings, 0).unwrap()
    }

    /// An engine that was told to serve so long ago; its process is this one.
    fn engine(served: Option<Duration>) -> Engine {
        let (now, pid) = (Instant::now(), std::process::id().cast_signed());
        let pidfd = rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        Engine {
            incarnation: Incarnation {
                seat: SeatId(0xc),
                start: 1,
            },
            pid,
            pidfd: Arc::new(pidfd),
            adopted: false,
            own_user: false,
            // A resync may take as long as it likes.
            since: now.checked_sub(RAN_WELL).unwrap(),
            serves_since: served.map(|served| now.checked_sub(served).unwrap()),
            connection: None,
            introduced: Informed::Unknown,
            protection: Informed::Unknown,
        }
    }

    /// Each engine would read a whole disk from its peer.
    #[test]
    fn an_engine_that_its_storage_ended_is_begun_again_later_and_later() {
        let (rig, cgroups) = (Rig::new(), Folder::new("cgroups"));
        let seat = idle(&rig, &cgroups);
        let ends = |served: Option<u64>, code: u8, pause_ms: u64, failures: u32| {
            seat.inner().engine = Some(engine(served.map(Duration::from_secs)));
            let (pause, before) = (Duration::from_millis(pause_ms), Instant::now());
            seat.ended("writing: I/O error".to_owned(), code);
            let next = seat.inner().next_start.unwrap();
            let on_time = before + pause <= next && next <= Instant::now() + pause;
            assert!(
                on_time,
                "{served:?}, code {code}: {:?}",
                next.saturating_duration_since(before)
            );
            assert_eq!(seat.status(Duration::ZERO).storage_failures, failures);
        };
        for (failed, pause_ms) in (1..).zip([1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]) {
            ends(None, exit_code::STORAGE, pause_ms, failed);
        }
        // A standby for a moment: that proves nothing of its disks.
        ends(Some(5), exit_code::STORAGE, 30_000, 8);
        // Nor does another end.
        ends(None, exit_code::SEAT_LOST, 0, 8);
        ends(Some(30), exit_code::STORAGE, 1000, 1);
        ends(Some(30), exit_code::SEAT_LOST, 0, 0);
        assert_eq!(storage_pause(u32::MAX), STORAGE_PAUSE_MAX);
    }

    /// What it was told last is old once it has served for long.
    #[test]
    fn storage_has_failed_until_an_engine_has_served_for_long() {
        let (rig, cgroups) = (Rig::new(), Folder::new("cgroups"));
        let seat = idle(&rig, &cgroups);
        seat.ended("writing: I/O error".to_owned(), exit_code::STORAGE);
        let tells = |served: Option<u64>| {
            seat.inner().engine = Some(engine(served.map(Duration::from_secs)));
            seat.status(Duration::ZERO).storage_failures
        };
        assert_eq!([tells(None), tells(Some(5)), tells(Some(30))], [1, 1, 0]);
        seat.inner().engine = Some(engine(None));
        let becomes = |role| {
            let why = String::new();
            seat.note(Event::Role { role, term: 1, why });
            let inner = seat.inner();
            inner.engine.as_ref().unwrap().serves_since.is_some()
        };
        assert!(!becomes(Role::Starting) && !becomes(Role::Joining) && becomes(Role::Standby));
        assert!(becomes(Role::Ended), "what it served counts at its end");
        assert!(!becomes(Role::Joining), "it is copied anew");
    }

    /// The state folder is empty: another engine beside it, or the word that there is none, would be wrong.
    #[test]
    fn an_engine_that_nobody_remembers_is_in_doubt_until_it_is_gone() {
        let (rig, cgroups) = (Rig::new(), Folder::new("cgroups"));
        let leaf = format!("kubepods/pod{}/ftvm-engine", SeatId(0xc));
        let leaf = cgroups.path().join(leaf);
        std::fs::create_dir_all(&leaf).unwrap();
        std::fs::write(leaf.join("cgroup.procs"), "4711\n").unwrap();
        let seat = idle(&rig, &cgroups);
        for _ in 0..2 {
            seat.adopt();
            assert!(seat.doubts() && seat.has_engine());
            assert_eq!(seat.report(SeatId(0xc), Duration::ZERO).guest, GuestReport::Unknown);
            assert_eq!(seat.pause_before_start(), None, "none is started beside it");
            let status = seat.status(Duration::ZERO);
            assert!(status.why.contains("Delete the pod"), "{}", status.why);
            assert_eq!(status.code, 11);
        }
        std::fs::write(leaf.join("cgroup.procs"), "").unwrap();
        seat.adopt();
        assert!(!seat.doubts());
        assert_eq!(seat.status(Duration::ZERO).code, 0);
    }
}
