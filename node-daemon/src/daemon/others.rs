//! What daemons ask each other about seats: locally by their control sockets, elsewhere by [`crate::peer`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Command, exit_code};
use ftvm_engine::replication::link::TlsIdentity;
use ftvm_protocol::core::{GuestReport, HeaderReport, SeatReport};
use ftvm_protocol::identity::{Incarnation, SeatId, identity_name};

use super::{Daemon, STATUS_PATIENCE, refused};
use crate::api::{Request, Response};
use crate::client;
use crate::config::SeatConfig;
use crate::explain;
use crate::identity::SeatIdentity;
use crate::peer::{self, Answers, Asked};
use crate::prepare::known_id;
use crate::seat::Seat;

/// A daemon on another machine that has a peer of one of our seats.
struct Elsewhere {
    address: SocketAddr,
    seat: SeatId,
    /// Of our seat, which asks.
    own: TlsIdentity,
}

impl Daemon {
    /// What is known here of a seat.
    pub(crate) fn local_report(&self, seat_id: SeatId, patience: Duration) -> Option<SeatReport> {
        self.report(&self.all_seats(), seat_id, patience)
    }

    /// What is known of a seat that one of these is, or was as an earlier pod.
    fn report(&self, seats: &[Arc<Seat>], seat_id: SeatId, patience: Duration) -> Option<SeatReport> {
        if let Some(seat) = seats.iter().find(|seat| seat.seat_id() == Some(seat_id)) {
            return Some(seat.report(seat_id, patience));
        }
        let remembered = self.state.has_pod(seat_id);
        seats.iter().find_map(|seat| seat.report_of_former(seat_id, remembered))
    }

    /// Reports of these seats: from here, or from the daemons that the configuration names beside them.
    pub(super) fn ask_seats(&self, vm: &str, seats: &[SeatId], deadline: Duration) -> Vec<SeatReport> {
        let until = Instant::now() + deadline;
        seats
            .iter()
            .filter_map(|seat_id| self.ask_seat(vm, *seat_id, until))
            .collect()
    }

    fn ask_seat(&self, vm: &str, seat_id: SeatId, until: Instant) -> Option<SeatReport> {
        let patience = until.saturating_duration_since(Instant::now());
        if let Some(report) = self.local_report(seat_id, patience.min(STATUS_PATIENCE)) {
            return Some(report);
        }
        let request = Request::SeatReport { seat_id };
        // A daemon that does not know the seat says nothing of it.
        let useful = |response| match response {
            Response::SeatReport { report } if report.seat == seat_id && report != unknown(seat_id) => Some(report),
            _ => None,
        };
        let here = self.peer_daemons(vm).into_iter().find_map(|socket| {
            let patience = until.saturating_duration_since(Instant::now());
            client::ask(&socket, &request, patience).ok().and_then(useful)
        });
        let elsewhere = || {
            let mut daemons = self.elsewhere(vm);
            if daemons.iter().any(|daemon| daemon.seat == seat_id) {
                daemons.retain(|daemon| daemon.seat == seat_id);
            }
            // Else it may be an earlier pod of a seat that one of them has.
            daemons.into_iter().find_map(|daemon| {
                let asked = peer::ask(&daemon.own, daemon.seat, daemon.address, &request, until);
                let told = asked.map_err(|error| tracing::warn!("seat {}: {}", daemon.seat, explain(&error)));
                told.ok().and_then(useful)
            })
        };
        here.or_else(elsewhere).or_else(|| {
            let of_vm = self.all_seats().into_iter().filter(|seat| seat.config().vm == vm);
            let remembered = self.state.has_pod(seat_id);
            of_vm.into_iter().find_map(|seat| seat.knows_ended(seat_id, remembered))
        })
    }

    /// Daemons of other machines that have seats of this virtual machine.
    fn elsewhere(&self, vm: &str) -> Vec<Elsewhere> {
        let seats = self.all_seats().into_iter();
        let seats = seats.filter(|seat| seat.config().vm == vm);
        seats
            .filter_map(|seat| {
                let config = seat.config();
                let (who, own) = open_identity(&seat)
                    .map_err(|why| tracing::warn!("seat {}: {why}", config.label()))
                    .ok()?;
                let peers = config.link.peers.into_iter();
                let found = peers.filter_map(move |peer| {
                    Some(Elsewhere {
                        address: peer.daemon_address?,
                        seat: known_id(&who, &peer)?,
                        own: own.clone(),
                    })
                });
                Some(found.collect::<Vec<_>>())
            })
            .flatten()
            .collect()
    }

    /// Control sockets of other daemons that have seats of this virtual machine.
    fn peer_daemons(&self, vm: &str) -> Vec<PathBuf> {
        let own = self.settings.control_socket.clone();
        let configs = self.all_seats().into_iter().map(|seat| seat.config());
        let configs = configs.filter(|config| config.vm == vm);
        let mut sockets: Vec<PathBuf> = configs
            .flat_map(|config| config.link.peers)
            .filter_map(|peer| peer.daemon)
            .collect();
        sockets.sort();
        sockets.dedup();
        sockets.retain(|socket| *socket != own);
        sockets
    }

    /// A dead engine is told at once to whoever runs its peer. Only a hint, so nobody waits for it.
    pub(super) fn tell_gone(self: &Arc<Daemon>, seat: &SeatConfig, incarnation: Incarnation) {
        let (daemon, vm) = (self.clone(), seat.vm.clone());
        let tell = move || {
            daemon.tell_local(&vm, incarnation);
            for socket in daemon.peer_daemons(&vm) {
                // The link's silence tells it too.
                let _ = client::ask(
                    &socket,
                    &Request::PeerGone {
                        vm: vm.clone(),
                        incarnation,
                    },
                    STATUS_PATIENCE,
                );
            }
            for other in daemon.elsewhere(&vm) {
                let request = Request::PeerGone {
                    vm: vm.clone(),
                    incarnation,
                };
                let until = Instant::now() + STATUS_PATIENCE;
                let _ = peer::ask(&other.own, other.seat, other.address, &request, until);
            }
        };
        // Without a thread the hint is not given; the link's silence tells it too.
        let _ = std::thread::Builder::new().name("hint".to_owned()).spawn(tell);
    }

    pub(super) fn tell_local(&self, vm: &str, incarnation: Incarnation) {
        for seat in self.all_seats() {
            if seat.config().vm == vm && seat.seat_id() != Some(incarnation.seat) {
                let why = "its daemon saw its process end".to_owned();
                // Only a hint.
                let _ = seat.command(Command::PeerGone { incarnation, why }, STATUS_PATIENCE);
            }
        }
    }
}

/// What a daemon says of a seat that it does not have.
pub(super) fn unknown(seat: SeatId) -> SeatReport {
    SeatReport {
        seat,
        header: HeaderReport::Unreadable,
        guest: GuestReport::Unknown,
    }
}

/// A seat's identity for TLS, which lets in the other seats that it knows.
fn open_identity(seat: &Seat) -> Result<(SeatIdentity, TlsIdentity), String> {
    let config = seat.config();
    let (who, pem) = seat.source().identity(&config).map_err(|error| explain(&error))?;
    let own = TlsIdentity::from_pem(
        who.vm_id,
        who.seat_id,
        &pem.certificate_pem,
        &pem.key_pem.0,
        &pem.authority_pem,
    );
    let own = own.map_err(|error| explain(&error))?;
    let configured = config.link.peers.iter().filter_map(|peer| known_id(&who, peer));
    let others = who.seats.values().copied().chain(configured);
    others
        .filter(|seat| *seat != who.seat_id)
        .for_each(|seat| own.allow(seat));
    Ok((who, own))
}

/// Answers daemons of other machines.
pub(super) struct ForOthers(pub(super) Weak<Daemon>);

impl ForOthers {
    fn seats(&self) -> Vec<Arc<Seat>> {
        self.0.upgrade().map(|daemon| daemon.all_seats()).unwrap_or_default()
    }
}

impl Answers for ForOthers {
    fn seat(&self, name: &str) -> Option<Asked> {
        self.seats().into_iter().find_map(|seat| {
            let config = seat.config();
            let (who, identity) = open_identity(&seat).ok()?;
            let ours = identity_name(who.vm_id, who.seat_id) == name;
            ours.then_some(Asked {
                identity,
                vm: config.vm,
            })
        })
    }

    fn answer(&self, vm: &str, asker: SeatId, request: Request) -> Response {
        let Some(daemon) = self.0.upgrade() else {
            return refused(exit_code::DAEMON, "the daemon ends".to_owned());
        };
        match request {
            Request::SeatReport { seat_id } => {
                let mut of_vm = self.seats();
                of_vm.retain(|seat| seat.config().vm == vm);
                let report = daemon.report(&of_vm, seat_id, STATUS_PATIENCE);
                Response::SeatReport {
                    report: report.unwrap_or_else(|| unknown(seat_id)),
                }
            }
            // Only the seat's own daemon sees its engine end.
            Request::PeerGone { incarnation, .. } if incarnation.seat == asker => {
                daemon.tell_local(vm, incarnation);
                Response::Done
            }
            other => refused(exit_code::REFUSED, format!("seat {asker} may not ask for {other:?}")),
        }
    }
}
