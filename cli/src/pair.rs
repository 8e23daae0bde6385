//! The small controller: what the operator does on Kubernetes, for daemons that are named on the command line.
//!
//! It is never on the failover path: engines, daemons and the arbiter take over without it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Command, Reply, Role, exit_code};
use ftvm_node_daemon::api::{DaemonStatus, Phase, Request, Response, SeatStatus};
use ftvm_node_daemon::config::PeerConfig;
use ftvm_node_daemon::{client, explain};
use ftvm_protocol::identity::Incarnation;
use ftvm_protocol::record;

use crate::Failure;

/// A daemon answers within this time.
const PATIENCE: Duration = Duration::from_secs(20);
/// Interval of looking.
const LOOK: Duration = Duration::from_millis(200);
/// Interval of `up --watch`.
const WATCH: Duration = Duration::from_secs(1);
/// A stop is durable within this time, or is said to take longer.
const STOP: Duration = Duration::from_secs(120);

/// Daemons by their sockets.
pub struct Pair {
    sockets: Vec<PathBuf>,
}

/// What the daemons say at one time.
pub struct View {
    /// Those that answered.
    pub daemons: Vec<(PathBuf, DaemonStatus)>,
    /// Those that did not, and why.
    pub silent: Vec<(PathBuf, String)>,
}

/// A seat and where its daemon is.
pub type Placed<'a> = (&'a Path, &'a DaemonStatus, &'a SeatStatus);

impl View {
    /// Every seat of a virtual machine, or of all.
    pub fn seats<'a>(&'a self, vm: Option<&'a str>) -> impl Iterator<Item = Placed<'a>> {
        let all = self.daemons.iter();
        let all =
            all.flat_map(|(socket, daemon)| daemon.seats.iter().map(move |seat| (socket.as_path(), daemon, seat)));
        all.filter(move |(_, _, seat)| vm.is_none_or(|vm| seat.vm == vm))
    }

    /// Names of the virtual machines.
    pub fn vms(&self) -> BTreeSet<&str> {
        self.seats(None).map(|(_, _, seat)| seat.vm.as_str()).collect()
    }

    /// The seat that runs the guest. Of two that say so the higher term is right; the other has not heard yet.
    pub fn active<'a>(&'a self, vm: &'a str) -> Option<Placed<'a>> {
        let active = self
            .seats(Some(vm))
            .filter(|placed| role(placed.2) == Some(Role::Active));
        active.max_by_key(|(_, _, seat)| seat.engine.as_ref().map(|engine| engine.term))
    }

    /// Whether a virtual machine is protected.
    pub fn protected(&self, vm: &str) -> bool {
        self.active(vm)
            .is_some_and(|(_, _, seat)| seat.engine.as_ref().is_some_and(|engine| engine.protected))
    }

    /// Whether its guest stands still until a standby has joined.
    pub fn paused(&self, vm: &str) -> bool {
        self.active(vm)
            .is_some_and(|(_, _, seat)| seat.engine.as_ref().is_some_and(|engine| engine.paused))
    }

    /// What a person has to mend at a seat, with its exit code: what its daemon says, else what its engine says.
    fn trouble(&self, vm: Option<&str>) -> Option<(u8, String)> {
        let by_daemons = self.seats(vm).map(|(_, _, seat)| (seat, seat.code, &seat.why));
        let by_engines = self.seats(vm).filter_map(|(_, _, seat)| {
            let engine = seat.engine.as_ref()?;
            Some((seat, engine.code, &engine.why))
        });
        let (seat, code, why) = by_daemons.chain(by_engines).find(|(_, code, _)| *code != 0)?;
        Some((code, format!("seat {}: {why}", seat.seat)))
    }

    /// A failure if no daemon answered.
    pub fn failure(&self) -> Option<Failure> {
        let (_, why) = self.silent.first().filter(|_| self.daemons.is_empty())?;
        Some(Failure::new(exit_code::DAEMON, why.clone()))
    }
}

/// Role of a seat's engine.
pub fn role(seat: &SeatStatus) -> Option<Role> {
    seat.engine.as_ref().map(|engine| engine.role)
}

impl Pair {
    /// The daemons behind these sockets.
    pub fn new(sockets: Vec<PathBuf>) -> Pair {
        Pair { sockets }
    }

    fn ask(&self, socket: &Path, request: &Request) -> Result<Response, Failure> {
        match client::ask(socket, request, PATIENCE) {
            Ok(Response::Refused { code, message }) => Err(Failure::new(code, message)),
            Ok(Response::Reply {
                reply: Reply::Refused { why },
            }) => Err(Failure::new(exit_code::REFUSED, why)),
            Ok(response) => Ok(response),
            Err(error) => Err(Failure::new(exit_code::DAEMON, explain(&error))),
        }
    }

    /// Asks every daemon, all at once.
    pub fn view(&self) -> View {
        let answers: Vec<_> = std::thread::scope(|scope| {
            let ask = |socket: &'_ PathBuf| {
                let socket = socket.clone();
                scope.spawn(move || (socket.clone(), self.ask(&socket, &Request::Status)))
            };
            let asking: Vec<_> = self.sockets.iter().map(ask).collect();
            asking.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        let mut view = View {
            daemons: Vec::new(),
            silent: Vec::new(),
        };
        for (socket, answer) in answers {
            match answer {
                Ok(Response::Status(status)) => view.daemons.push((socket, *status)),
                Ok(other) => view.silent.push((socket, format!("unexpected answer {other:?}"))),
                Err(failure) => view.silent.push((socket, failure.message)),
            }
        }
        view
    }

    /// Like [`Pair::view`], but every daemon must answer.
    fn whole_view(&self) -> Result<View, Failure> {
        let view = self.view();
        match view.silent.first() {
            Some((_, why)) => Err(Failure::new(exit_code::DAEMON, why.clone())),
            None => Ok(view),
        }
    }

    /// Makes record and header of every virtual machine that has none.
    pub fn set_up(&self) -> Result<(), Failure> {
        let view = self.whole_view()?;
        for vm in view.vms() {
            let original: Vec<_> = view.seats(Some(vm)).filter(|(_, _, seat)| seat.original_disk).collect();
            let waiting: Vec<_> = original
                .iter()
                .filter(|(_, _, seat)| seat.phase == Phase::NotSetUp)
                .collect();
            if let ([_, _, ..], [_, ..]) = (&original[..], &waiting[..]) {
                let message = format!("{vm}: several seats say `original_disk: true`; only one has the first contents");
                return Err(Failure::new(exit_code::CONFIG, message));
            }
            for (socket, _, seat) in waiting {
                self.ask(
                    socket,
                    &Request::SetUp {
                        vm: vm.to_owned(),
                        seat: seat.seat.clone(),
                    },
                )?;
            }
        }
        self.introduce(&view)
    }

    /// Makes all seats of a virtual machine peers of each other.
    fn introduce(&self, view: &View) -> Result<(), Failure> {
        for (socket, _, seat) in view.seats(None) {
            let others: Vec<PeerConfig> = view
                .seats(Some(&seat.vm))
                .filter(|(_, _, other)| other.seat != seat.seat && other.seat_id.is_some())
                .map(|(socket, daemon, other)| PeerConfig {
                    seat: other.seat.clone(),
                    seat_id: other.seat_id,
                    address: other.link_address,
                    daemon: Some(socket.to_owned()),
                    daemon_address: daemon.peer_address,
                })
                .collect();
            let known = |other: &PeerConfig| {
                seat.peers.iter().any(|peer| {
                    let same_id = peer.seat_id.is_none() || peer.seat_id == other.seat_id;
                    peer.seat == other.seat && peer.address == other.address && same_id
                })
            };
            if !others.iter().all(known) {
                // Those that are configured and did not answer now may come back.
                let absent = seat
                    .peers
                    .iter()
                    .filter(|peer| others.iter().all(|other| other.seat != peer.seat));
                let peers = others.iter().chain(absent).cloned().collect();
                let (vm, seat) = (seat.vm.clone(), seat.seat.clone());
                self.ask(socket, &Request::SetPeers { vm, seat, peers })?;
            }
        }
        Ok(())
    }

    /// Waits until every virtual machine (or one) runs and, if asked for, is protected; tells of progress.
    pub fn wait(
        &self,
        vm: Option<&str>,
        protected: bool,
        patience: Duration,
        tell: &mut dyn FnMut(String),
    ) -> Result<(), Failure> {
        let until = Instant::now() + patience;
        let mut told = String::new();
        loop {
            let view = self.view();
            let done = |vm: &str| view.active(vm).is_some() && (!protected || view.protected(vm));
            let vms: Vec<&str> = view
                .vms()
                .into_iter()
                .filter(|name| vm.is_none_or(|vm| vm == *name))
                .collect();
            if !vms.is_empty() && vms.iter().all(|vm| done(vm)) {
                return Ok(());
            }
            let line = vms.iter().map(|vm| progress(&view, vm)).collect::<Vec<_>>().join("; ");
            if line != told {
                tell(line.clone());
                told = line;
            }
            if Instant::now() >= until {
                let late = format!("not {} within {patience:?}: {told}", aim(protected));
                return Err(match view.trouble(vm) {
                    Some((code, why)) => Failure::new(code, format!("{late}: {why}")),
                    None => Failure::new(exit_code::TIMEOUT, late),
                });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Stays, and introduces seats to each other as they come. Ends only by a signal.
    pub fn watch(&self) -> Result<(), Failure> {
        loop {
            if let Err(failure) = self.introduce(&self.view()) {
                eprintln!("ftvm: {failure}");
            }
            std::thread::sleep(WATCH);
        }
    }

    /// Makes `with` the peer of what is left of the virtual machine, and forgets `lost`.
    pub fn replace(&self, vm: &str, lost: &str, with: &str) -> Result<(), Failure> {
        let view = self.view();
        let find = |name: &str| view.seats(Some(vm)).find(|(_, _, seat)| seat.seat == name);
        let Some(placed @ (new_socket, _, new)) = find(with) else {
            let message =
                format!("seat {vm}/{with} is at none of these daemons: configure it there, and name its daemon");
            return Err(Failure::new(exit_code::REFUSED, message));
        };
        if new.seat_id.is_none() {
            return Err(Failure::new(
                exit_code::IDENTITY,
                format!("seat {vm}/{with} has no identity: {}", new.why),
            ));
        }
        let Some(active_at @ (socket, _, active)) = view.active(vm) else {
            let message = format!("no seat of {vm} runs the guest: replacing is for a running virtual machine");
            return Err(Failure::new(exit_code::REFUSED, message));
        };
        if active.seat == lost {
            let message = format!("seat {vm}/{lost} runs the guest: switch over first");
            return Err(Failure::new(exit_code::REFUSED, message));
        }
        if find(lost).is_some_and(|(_, _, seat)| role(seat) == Some(Role::Standby)) {
            let message = format!(
                "seat {vm}/{lost} is not lost, it protects the guest: to take it away, stop its daemon and engine first"
            );
            return Err(Failure::new(exit_code::REFUSED, message));
        }
        let peer = |(socket, daemon, seat): Placed<'_>| PeerConfig {
            seat: seat.seat.clone(),
            seat_id: seat.seat_id,
            address: seat.link_address,
            daemon: Some(socket.to_owned()),
            daemon_address: daemon.peer_address,
        };
        let set = |socket: &Path, seat: &SeatStatus, peers| {
            self.ask(
                socket,
                &Request::SetPeers {
                    vm: vm.to_owned(),
                    seat: seat.seat.clone(),
                    peers,
                },
            )
        };
        set(socket, active, vec![peer(placed)])?;
        set(new_socket, new, vec![peer(active_at)])?;
        if let Some((lost_socket, _, seat)) = find(lost) {
            self.wait_ejected(vm, seat, socket)?;
            self.ask(
                lost_socket,
                &Request::RemoveSeat {
                    vm: vm.to_owned(),
                    seat: lost.to_owned(),
                },
            )?;
        }
        Ok(())
    }

    /// A seat that the record names may be the one that goes on: it is removed only after the active one ejected it.
    fn wait_ejected(&self, vm: &str, lost: &SeatStatus, socket: &Path) -> Result<(), Failure> {
        let until = Instant::now() + PATIENCE;
        loop {
            let told = match self.ask(socket, &Request::Record { vm: vm.to_owned() })? {
                Response::Record {
                    snapshot: Some(snapshot),
                    ..
                } => {
                    let record = snapshot.record;
                    if Some(record.holder.seat) == lost.seat_id {
                        let message = format!(
                            "seat {vm}/{} took over meanwhile and runs the guest: nothing was removed",
                            lost.seat
                        );
                        return Err(Failure::new(exit_code::REFUSED, message));
                    }
                    if record.members.iter().all(|member| Some(member.seat) != lost.seat_id) {
                        return Ok(());
                    }
                    "the arbiter's record still names it".to_owned()
                }
                Response::Record { why, .. } => why.unwrap_or_else(|| "the arbiter has no record".to_owned()),
                other => format!("unexpected answer {other:?}"),
            };
            if Instant::now() >= until {
                let message = format!(
                    "seat {vm}/{} is not removed: {told}; see `status`, then replace it again",
                    lost.seat
                );
                return Err(Failure::new(exit_code::TIMEOUT, message));
            }
            std::thread::sleep(LOOK);
        }
    }

    fn to_active(&self, vm: &str, command: Command) -> Result<(), Failure> {
        self.ask_active(vm, |seat| Request::Command {
            vm: vm.to_owned(),
            seat,
            command,
        })
    }

    /// Asks the daemon of the active seat.
    fn ask_active(&self, vm: &str, request: impl FnOnce(String) -> Request) -> Result<(), Failure> {
        let view = self.view();
        let Some((socket, _, seat)) = view.active(vm) else {
            let state = progress(&view, vm);
            return Err(Failure::new(
                exit_code::REFUSED,
                format!("no seat of {vm} runs the guest ({state})"),
            ));
        };
        self.ask(socket, &request(seat.seat.clone())).map(drop)
    }

    /// Planned switchover; returns when the other seat runs the guest.
    pub fn switchover(&self, vm: &str) -> Result<(), Failure> {
        self.moves(vm, || self.to_active(vm, Command::Switchover))
    }

    /// Kills the active's engine if its standby would take over; returns when the other seat runs the guest.
    pub fn failover(&self, vm: &str) -> Result<(), Failure> {
        self.moves(vm, || {
            self.ask_active(vm, |seat| Request::Failover {
                vm: vm.to_owned(),
                seat,
            })
        })
    }

    /// Does something after which another seat runs the guest, and waits for that.
    fn moves(&self, vm: &str, act: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
        let before = self.view().active(vm).map(|(_, _, seat)| seat.seat.clone());
        act()?;
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let view = self.view();
            if view
                .active(vm)
                .is_some_and(|(_, _, seat)| Some(&seat.seat) != before.as_ref())
            {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
        Err(Failure::new(
            exit_code::TIMEOUT,
            format!("no other seat runs {vm} within {PATIENCE:?}: see `status`"),
        ))
    }

    /// Stops; returns when the record says so.
    pub fn stop(&self, vm: &str) -> Result<(), Failure> {
        self.to_active(vm, Command::Stop)?;
        let until = Instant::now() + STOP;
        while Instant::now() < until {
            for (socket, _) in self.view().daemons {
                if let Ok(Response::Record {
                    snapshot: Some(snapshot),
                    ..
                }) = self.ask(&socket, &Request::Record { vm: vm.to_owned() })
                    && snapshot.record.phase == record::Phase::Stopped
                {
                    return Ok(());
                }
            }
            std::thread::sleep(LOOK);
        }
        Err(Failure::new(
            exit_code::TIMEOUT,
            format!("{vm} is not stopped within {STOP:?}: see `status`"),
        ))
    }

    /// Starts every seat of a stopped virtual machine; the protocol decides which one boots.
    pub fn start(&self, vm: &str) -> Result<(), Failure> {
        let view = self.view();
        if let Some(failure) = view.failure() {
            return Err(failure);
        }
        let mut results = Vec::new();
        for (socket, _, seat) in view.seats(Some(vm)) {
            results.push(self.ask(
                socket,
                &Request::Start {
                    vm: vm.to_owned(),
                    seat: seat.seat.clone(),
                },
            ));
        }
        // One seat that starts is a virtual machine that starts.
        let nothing = Failure::new(exit_code::REFUSED, format!("no seat of {vm} at these daemons"));
        let started = results.iter().any(Result::is_ok);
        if started {
            Ok(())
        } else {
            Err(results.into_iter().find_map(Result::err).unwrap_or(nothing))
        }
    }

    /// Presses the guest's power button.
    pub fn power_button(&self, vm: &str) -> Result<(), Failure> {
        self.to_active(vm, Command::PowerButton)
    }

    /// Overrides a holder that is alone and dead (rule 9); the engine asks for the proof.
    pub fn accept_data_loss(&self, vm: &str, seat: &str, holder: Incarnation) -> Result<(), Failure> {
        let view = self.view();
        let Some((socket, _, seat)) = view.seats(Some(vm)).find(|(_, _, found)| found.seat == seat) else {
            return Err(Failure::new(
                exit_code::REFUSED,
                format!("no seat {vm}/{seat} at these daemons"),
            ));
        };
        let command = Command::AcceptDataLoss { holder, term: None };
        self.ask(
            socket,
            &Request::Command {
                vm: vm.to_owned(),
                seat: seat.seat.clone(),
                command,
            },
        )
        .map(drop)
    }
}

fn aim(protected: bool) -> &'static str {
    if protected { "protected" } else { "running" }
}

/// One line on a virtual machine.
fn progress(view: &View, vm: &str) -> String {
    let seats: Vec<String> = view.seats(Some(vm)).map(|(_, _, seat)| describe(seat)).collect();
    if seats.is_empty() {
        format!("{vm}: no seats")
    } else {
        format!("{vm}: {}", seats.join(", "))
    }
}

fn describe(seat: &SeatStatus) -> String {
    let Some(engine) = &seat.engine else {
        return format!("{}: {}", seat.seat, seat.why);
    };
    let role = crate::table::role_name(engine.role);
    match engine.resync_percent {
        Some(percent) => format!("{} {role} {percent} %", seat.seat),
        None => format!("{} {role}", seat.seat),
    }
}
