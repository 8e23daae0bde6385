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
        let all = seats.iter();
        all.filter_map(|seat| seat.report_of_former(seat_id, remembered))
            .reduce(joined)
    }

    /// Reports of these seats: from here, and from the daemons that the configuration names beside them.
    pub(super) fn ask_seats(&self, vm: &str, seats: &[SeatId], deadline: Duration) -> Vec<SeatReport> {
        let begin = Instant::now();
        // Others may take all the time that they get, and an answer that comes late is none.
        let (until, until_told) = (begin + deadline, begin + deadline * 7 / 8);
        let mut of_vm = self.all_seats();
        of_vm.retain(|seat| seat.config().vm == vm);
        let here = |seat_id: &SeatId| {
            let patience = until.saturating_duration_since(Instant::now());
            self.report(&of_vm, *seat_id, patience.min(STATUS_PATIENCE))
        };
        let here: Vec<_> = seats.iter().map(here).collect();
        let all = seats.iter().zip(here);
        all.filter_map(|(seat_id, here)| self.ask_on(vm, &of_vm, *seat_id, here, until_told))
            .collect()
    }

    /// Asks others for what is not known here of a seat.
    fn ask_on(
        &self,
        vm: &str,
        of_vm: &[Arc<Seat>],
        seat_id: SeatId,
        here: Option<SeatReport>,
        until: Instant,
    ) -> Option<SeatReport> {
        let is_here = of_vm.iter().any(|seat| seat.seat_id() == Some(seat_id));
        // Of a seat of this node, and of a pod that it has not forgotten, nobody knows more.
        if is_here || self.state.has_pod(seat_id) {
            return here;
        }
        let own = of_vm.iter().any(|seat| seat.had(seat_id));
        let whole = |report: &SeatReport| {
            report.guest != GuestReport::Unknown && (own || report.header != HeaderReport::Unreadable)
        };
        if here.as_ref().is_some_and(whole) {
            return here;
        }
        let request = Request::SeatReport { seat_id };
        let local = self.peer_daemons(vm).into_iter().filter_map(|socket| {
            let patience = until.saturating_duration_since(Instant::now());
            client::ask(&socket, &request, patience).ok()
        });
        let elsewhere = std::iter::once_with(|| self.elsewhere_of(vm, seat_id)).flatten();
        let elsewhere = elsewhere.filter_map(|daemon| {
            let asked = peer::ask(&daemon.own, daemon.seat, daemon.address, &request, until);
            let told = asked.map_err(|error| tracing::warn!("seat {}: {}", daemon.seat, explain(&error)));
            told.ok()
        });
        let mut known = here;
        // One that does not know whether it has ended is not the last one that is asked.
        for report in local.chain(elsewhere).filter_map(|response| useful(response, seat_id)) {
            known = Some(match known {
                Some(known) => joined(known, report),
                None => report,
            });
            if known.as_ref().is_some_and(whole) {
                break;
            }
        }
        known
    }

    /// Daemons of other machines to ask about a seat: the one that has it, or all, for it may be an earlier pod of a seat that one of them has.
    fn elsewhere_of(&self, vm: &str, seat_id: SeatId) -> Vec<Elsewhere> {
        let mut daemons = self.elsewhere(vm);
        if daemons.iter().any(|daemon| daemon.seat == seat_id) {
            daemons.retain(|daemon| daemon.seat == seat_id);
        }
        daemons
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

/// What two say of a seat: each may know what the other one does not. That somebody has the guest counts more than that nobody does.
fn joined(one: SeatReport, other: SeatReport) -> SeatReport {
    let header = match one.header {
        HeaderReport::Unreadable => other.header,
        known => known,
    };
    let guest = match (one.guest, other.guest) {
        (GuestReport::Present, _) | (_, GuestReport::Present) => GuestReport::Present,
        (GuestReport::None, _) | (_, GuestReport::None) => GuestReport::None,
        (GuestReport::Unknown, GuestReport::Unknown) => GuestReport::Unknown,
    };
    SeatReport {
        seat: one.seat,
        header,
        guest,
    }
}

/// What is told of this seat. A daemon that does not know it says nothing of it.
fn useful(response: Response, seat_id: SeatId) -> Option<SeatReport> {
    match response {
        Response::SeatReport { report } if report.seat == seat_id && report != unknown(seat_id) => Some(report),
        _ => None,
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

#[cfg(test)]
#[path = "others_tests.rs"]
mod tests;
