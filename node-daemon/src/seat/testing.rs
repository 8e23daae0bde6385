//! A seat whose engine is a process of its own that does nothing, and says of itself what a test wants.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ftvm_engine::control::{Command, Connection, FromEngine, PeerStatus, Reply, Role, StandbyStatus, Status, ToEngine};
use ftvm_protocol::core::{ReadOutcome, SeatReport, SwapOutcome};
use ftvm_protocol::identity::{ArbiterUid, Incarnation, Nonce, SeatId, VmId};
use ftvm_protocol::record::{Members, Phase, Record, Snapshot};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::informed::Informed;
use super::{Engine, Seat, Surroundings};
use crate::arbiter::{Arbiter, Bounded, Said};
use crate::bridges::AllowedBridges;
use crate::config::{Config, JailConfig};
use crate::seat_socket::message::Recipe;
use crate::seat_socket::{Expected, Handed, Hierarchies, PodSeat};
use crate::state::StateFolder;
use crate::testing::Folder;

const OWN: SeatId = SeatId(0xa);
/// The standby.
pub const PEER: Incarnation = Incarnation {
    seat: SeatId(0xb),
    start: 7,
};
const UID: ArbiterUid = ArbiterUid(0x1ea5e);

/// The record, or nothing.
#[derive(Default)]
struct Kept(Arc<Mutex<Option<Snapshot>>>);

impl Arbiter for Kept {
    fn read(&self) -> Said<ReadOutcome> {
        match locked(&self.0).clone() {
            Some(snapshot) => (ReadOutcome::Found(snapshot), None),
            None => (ReadOutcome::Unreachable, Some("no route to it".to_owned())),
        }
    }

    fn swap(&self, _: ArbiterUid, _: u64, _: &Record, _: Instant) -> Said<SwapOutcome> {
        panic!("nothing of this writes the record")
    }
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
pub struct Rig {
    /// With its thread running.
    pub seat: Arc<Seat>,
    handed: Arc<Handed>,
    status: Arc<Mutex<Status>>,
    record: Arc<Mutex<Option<Snapshot>>>,
    gone: Arc<Mutex<Vec<Incarnation>>>,
    commands: Arc<Mutex<Vec<Command>>>,
    reports: Arc<Mutex<Vec<SeatReport>>>,
    thread: Option<JoinHandle<()>>,
    /// Locked, and kept.
    _state: StateFolder,
    _folder: Folder,
}

/// An active that is protected, in a record of term 3.
pub fn healthy(start: u64) -> (Status, Snapshot) {
    let me = Incarnation { seat: OWN, start };
    let record = Record {
        holder: me,
        members: Members::pair(me, PEER),
        term: 3,
        nonce: Nonce(9),
        ..Record::genesis(OWN, Phase::Running)
    };
    let status = Status {
        vm: "demo".to_owned(),
        seat: "a".to_owned(),
        incarnation: me,
        role: Role::Active,
        holds_guest: true,
        protected: true,
        paused: false,
        leaving: false,
        unsettled: Some(false),
        why: "protected by b".to_owned(),
        code: 0,
        term: record.term,
        holder: Some(me),
        members: vec![me, PEER],
        epoch: 40,
        acknowledged: 39,
        peer: Some(PeerStatus {
            seat: "b".to_owned(),
            incarnation: Some(PEER),
            address: "192.0.2.2:7000".parse().unwrap(),
            connected: true,
        }),
        standby: Some(StandbyStatus {
            contact_age_ms: 40,
            unacknowledged_ms: 2,
            not_ready: None,
        }),
        arbiter_reachable: true,
        arbiter_uid: Some(UID),
        vouches: None,
        resync_percent: None,
        failing_disks: Vec::new(),
        accepted_loss: None,
        counters: serde_json::Map::new(),
    };
    let version = 5;
    (
        status,
        Snapshot {
            record,
            uid: UID,
            version,
        },
    )
}

impl Rig {
    /// With a healthy engine.
    pub fn new() -> Rig {
        let folder = Folder::new("seat");
        let state = StateFolder::open(&folder.path().join("state")).unwrap();
        let example = include_str!("../../../docs/examples/standalone-a.yaml");
        let config = Config::parse(example, Path::new("example")).unwrap().seats.remove(0);
        let (status, snapshot) = healthy(1);
        let record = Arc::new(Mutex::new(Some(snapshot)));
        let gone: Arc<Mutex<Vec<Incarnation>>> = Arc::default();
        let expected = Expected {
            vm: config.vm.clone(),
            vm_id: VmId(1),
            seat: config.seat.clone(),
            seat_id: OWN,
        };
        let handed = Arc::new(Handed::new(expected, Hierarchies::read().unwrap()));
        let telling = gone.clone();
        let reports: Arc<Mutex<Vec<SeatReport>>> = Arc::default();
        let reporting = reports.clone();
        let surroundings = Surroundings {
            engine: "/nonexistent".into(),
            jail_mount_point: state.jail(),
            jail: JailConfig::default(),
            bridges: AllowedBridges::Listed(Vec::new()),
            ask_seats: Box::new(move |_, _, _| locked(&reporting).clone()),
            tell_gone: Box::new(move |_, incarnation| locked(&telling).push(incarnation)),
        };
        let arbiter = Arc::new(Bounded::new(Arc::new(Kept(record.clone()))));
        let seat = Seat::new(
            config,
            state.pod(OWN).unwrap(),
            handed.clone(),
            arbiter,
            Arc::new(surroundings),
            0,
        );
        let mut rig = Rig {
            seat: seat.unwrap(),
            handed,
            status: Arc::new(Mutex::new(status)),
            record,
            gone,
            commands: Arc::default(),
            reports,
            thread: None,
            _state: state,
            _folder: folder,
        };
        rig.launch(1);
        let running = rig.seat.clone();
        rig.thread = Some(std::thread::spawn(move || running.run()));
        rig
    }

    /// Another engine, as healthy as the first.
    #[expect(clippy::zombie_processes, reason = "the seat's thread waits for it, by its pidfd")]
    pub fn launch(&self, start: u64) {
        let (status, snapshot) = healthy(start);
        let incarnation = status.incarnation;
        self.say(|now| *now = status);
        self.write(Some(snapshot));
        let config = self.seat.config();
        let child = std::process::Command::new("sleep").arg("3600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let (ours, theirs) = Connection::pair().unwrap();
        let (said, told, process) = (self.status.clone(), self.commands.clone(), pidfd_of(pid));
        std::thread::spawn(move || answer(&theirs, &said, &told, &process));
        self.seat.inner().engine = Some(Engine {
            incarnation,
            pid,
            pidfd: Arc::new(pidfd_of(pid)),
            adopted: false,
            own_user: false,
            since: Instant::now(),
            serves_since: None,
            connection: Some(Arc::new(ours)),
            protection: Informed::Knows(config.protection()),
            introduced: Informed::Knows(config.link),
        });
        self.seat.wake();
    }

    /// Changes what the engine says of itself.
    pub fn say(&self, change: impl FnOnce(&mut Status)) {
        change(&mut locked(&self.status));
    }

    /// The arbiter's record from now on; none: it can't be reached.
    pub fn write(&self, snapshot: Option<Snapshot>) {
        *locked(&self.record) = snapshot;
    }

    /// The seat as a pod's.
    pub fn pod(&self) -> Arc<PodSeat> {
        let recipe = Recipe {
            kernel: "/boot/vmlinuz".to_owned(),
            initrd: None,
            disks: Vec::new(),
        };
        Arc::new(PodSeat::new(self.seat.clone(), self.handed.clone(), recipe))
    }

    /// Engines whose end the other daemons were told.
    pub fn gone(&self) -> Vec<Incarnation> {
        locked(&self.gone).clone()
    }

    /// What daemons of other seats say from now on.
    pub fn report(&self, reports: Vec<SeatReport>) {
        *locked(&self.reports) = reports;
    }

    /// What engines were told, beside questions for their status.
    pub fn commands(&self) -> Vec<Command> {
        locked(&self.commands).clone()
    }

    /// Waits until it is so.
    pub fn wait(&self, what: &str, is_so: impl Fn(&Rig) -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !is_so(self) {
            assert!(Instant::now() < until, "not so: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Nothing was killed: the engine runs, and nobody was told of an end.
    pub fn assert_alive(&self) {
        assert!(self.seat.has_engine() && self.gone().is_empty(), "{:?}", self.gone());
        let inner = self.seat.inner();
        let engine = inner.engine.as_ref().unwrap();
        // A killed one may not have been waited for yet.
        let mut fds = [rustix::event::PollFd::new(&*engine.pidfd, rustix::event::PollFlags::IN)];
        let now = crate::seat::timespec(Some(Duration::ZERO));
        assert_eq!(rustix::event::poll(&mut fds, now.as_ref()).unwrap(), 0, "it has ended");
    }
}

fn pidfd_of(pid: i32) -> OwnedFd {
    rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap()
}

/// The engine's part of its connection, until that is closed. It ends when it is told to.
fn answer(connection: &Connection, status: &Mutex<Status>, commands: &Mutex<Vec<Command>>, process: &OwnedFd) {
    while let Ok(message) = connection.receive::<ToEngine>(true) {
        if let ToEngine::Command { id, command } = message.body {
            let quit = command == Command::Quit;
            let reply = match command {
                Command::Status => Reply::Status(Box::new(locked(status).clone())),
                command => {
                    locked(commands).push(command);
                    Reply::Ok
                }
            };
            // The daemon may have closed it meanwhile.
            let _ = connection.send(&FromEngine::Reply { id, reply }, &[]);
            if quit {
                // It may have been killed before.
                let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.seat.inner().removing = true;
        let pidfd = self.seat.inner().engine.as_ref().map(|engine| engine.pidfd.clone());
        if let Some(pidfd) = pidfd {
            // One that has ended is just as well.
            let _ = rustix::process::pidfd_send_signal(&*pidfd, Signal::KILL);
        }
        self.seat.wake();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
