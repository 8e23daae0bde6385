use std::path::Path;

use ftvm_engine::control::Listener;
use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::{ArbiterUid, VmId};

use super::*;
use crate::arbiter::FileArbiter;
use crate::config::{Config, PeerConfig};
use crate::seat::Former;
use crate::seat_socket::{Expected, Handed, Hierarchies};
use crate::testing::{Folder, daemon};

/// An earlier pod that is asked for.
const ASKED: SeatId = SeatId(0xa);

/// Another daemon, which says this of every seat.
fn other(folder: &Folder, name: &str, header: HeaderReport, guest: GuestReport) -> PathBuf {
    let path = folder.path().join(name);
    let listener = Listener::bind(&path).unwrap();
    std::thread::spawn(move || {
        while let Ok(connection) = listener.accept() {
            while let Ok(message) = connection.receive::<Request>(true) {
                let Request::SeatReport { seat_id } = message.body else {
                    break;
                };
                let report = SeatReport {
                    seat: seat_id,
                    header: header.clone(),
                    guest,
                };
                // The asker may have gone.
                let _ = connection.send(&Response::SeatReport { report }, &[]);
            }
        }
    });
    path
}

/// A seat of this daemon, with peers that these daemons have.
fn add(daemon: &Arc<Daemon>, folder: &Folder, sockets: [PathBuf; 2]) -> Arc<Seat> {
    let example = include_str!("../../../docs/examples/standalone-a.yaml");
    let mut config = Config::parse(example, Path::new("example")).unwrap().seats.remove(0);
    let peer = |(index, socket): (usize, PathBuf)| PeerConfig {
        seat: format!("peer-{index}"),
        seat_id: None,
        address: "192.0.2.2:7400".parse().unwrap(),
        daemon: Some(socket),
        daemon_address: None,
    };
    config.link.peers = sockets.into_iter().enumerate().map(peer).collect();
    let expected = Expected {
        vm: config.vm.clone(),
        vm_id: VmId(1),
        seat: config.seat.clone(),
        seat_id: SeatId(0x5),
    };
    let source = Arc::new(Handed::new(expected, Hierarchies::read().unwrap()));
    let arbiter = Arc::new(FileArbiter::new(folder.path().join("arbiter")));
    let seat_folder = daemon.state().pod(SeatId(0x5)).unwrap();
    let seat = daemon.add(config, seat_folder, source, arbiter).unwrap();
    seat.set_seat_id(SeatId(0x5));
    seat
}

/// One has its disk, another one saw it end.
#[test]
fn whoever_knows_something_of_an_earlier_pod_is_asked() {
    let folder = Folder::new("others");
    let daemon = daemon(&folder);
    let header = HeaderReport::Found(SeatHeader::genesis(ASKED, ArbiterUid(1)));
    let sockets = [
        other(&folder, "one", header.clone(), GuestReport::Unknown),
        other(&folder, "two", HeaderReport::Unreadable, GuestReport::None),
    ];
    let seat = add(&daemon, &folder, sockets);
    let ask = || daemon.ask_seats("demo", &[ASKED], Duration::from_secs(60));
    let told = SeatReport {
        seat: ASKED,
        header,
        guest: GuestReport::None,
    };
    assert_eq!(ask(), std::slice::from_ref(&told));
    // Also where it is one of a seat of this node, which does not know whether it has ended.
    let former = Former {
        seat_id: ASKED,
        own: true,
        here: false,
        ended: false,
    };
    seat.set_former(vec![former]);
    assert_eq!(ask(), [told]);
    // Of what this node has not forgotten nobody knows more.
    daemon.state().pod(ASKED).unwrap();
    assert_eq!(ask(), [unknown(ASKED)]);
}

/// Whoever says that it has ended is believed over one that does not know, and never over one that sees it run.
#[test]
fn that_a_guest_is_there_counts_most() {
    let report = |guest| SeatReport {
        guest,
        ..unknown(ASKED)
    };
    let guest = |one, other| joined(report(one), report(other)).guest;
    let (none, present, unknown) = (GuestReport::None, GuestReport::Present, GuestReport::Unknown);
    for (one, other, both) in [
        (none, unknown, none),
        (none, present, present),
        (unknown, present, present),
        (unknown, unknown, unknown),
    ] {
        assert_eq!((guest(one, other), guest(other, one)), (both, both));
    }
}
