//! Peers that are set reach the engine whenever they are set, and are remembered.

mod support;

use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;

use ftvm_node_daemon::api::{Request, Response};
use ftvm_node_daemon::config::{AbsentSeat, PeerConfig};
use ftvm_protocol::identity::SeatId;
use support::Node;

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn set(node: &Node, port: u16) {
    let peer = PeerConfig {
        seat: "b".into(),
        seat_id: None,
        address: address(port),
        daemon: None,
        daemon_address: None,
    };
    let response = node.ask(&Request::SetPeers {
        vm: "vm".into(),
        seat: "a".into(),
        peers: vec![peer],
    });
    assert_eq!(response, Response::Done);
}

/// What the engine itself says.
fn known(node: &Node) -> Option<SocketAddr> {
    Some(node.seat()?.engine?.peer?.address)
}

fn wait_known(node: &mut Node, port: u16) {
    node.wait("the engine knows its peer", |node| {
        (known(node)? == address(port)).then_some(())
    });
    assert_eq!(node.seat().unwrap().peers[0].address, address(port));
}

#[test]
fn a_running_engine_is_told() {
    let mut node = Node::new(|_| {});
    node.start_seat();
    assert_eq!(known(&node), Some(address(1)), "as configured");
    for port in [2, 3, 3, 4] {
        set(&node, port);
        wait_known(&mut node, port);
    }
}

#[test]
fn an_engine_that_starts_meanwhile_is_told() {
    let mut node = Node::new(|config| {
        let folder = config.state_folder.with_file_name("cgroup");
        config.jail.cgroups = vec![folder];
    });
    // A start waits at this file until somebody reads it, when the launch message has been written long since.
    let cgroup = &node.config.jail.cgroups[0];
    std::fs::create_dir(cgroup).unwrap();
    let held = cgroup.join("cgroup.procs");
    rustix::fs::mkfifoat(rustix::fs::CWD, &held, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    node.start();
    let response = node.ask(&Request::SetUp {
        vm: "vm".into(),
        seat: "a".into(),
    });
    assert!(matches!(response, Response::SetUp { .. }), "{response:?}");
    let exit_report = node.folder.join("state/seats/vm.a/exit.json");
    node.wait("the launch message is made", |_| exit_report.exists().then_some(()));
    set(&node, 7);
    assert!(node.engine_pids().is_empty(), "the start waits");
    // Read without end, so that the engine's own attempt to join it succeeds too.
    let mut reading = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&held)
        .unwrap();
    wait_known(&mut node, 7);
    let mut joined = [0; 8];
    assert_eq!(reading.read(&mut joined).unwrap(), 1, "one engine joined");
}

#[test]
fn they_outlive_the_daemon_until_the_configuration_names_others() {
    let mut node = Node::new(|_| {});
    let first = node.start_seat();
    set(&node, 5);
    wait_known(&mut node, 5);
    node.kill_daemon();
    node.start();
    let seat = node.wait_running();
    assert!(seat.adopted);
    wait_known(&mut node, 5);
    // While the engine is adopted and not connected to.
    node.kill_daemon();
    node.start();
    set(&node, 6);
    wait_known(&mut node, 6);
    assert_eq!(node.seat().unwrap().pid, first.pid, "the same engine all along");
    // The next engine too.
    node.script("exit 23");
    let pid = first.pid.unwrap();
    node.wait("another engine answers", |node| {
        node.seat()
            .filter(|seat| seat.engine.is_some() && seat.pid != Some(pid))
    });
    wait_known(&mut node, 6);
    // The same configuration again changes nothing; another one does, also for an engine that is adopted.
    let mut config = node.config.seats[0].clone();
    let apply = |node: &Node, seat| node.ask(&Request::ApplySeat { seat: Box::new(seat) });
    assert_eq!(apply(&node, config.clone()), Response::Done);
    assert_eq!(node.seat().unwrap().peers[0].address, address(6));
    config.link.peers[0].address = address(8);
    assert_eq!(apply(&node, config), Response::Done);
    wait_known(&mut node, 8);
    node.kill_daemon();
    node.config.seats[0].link.peers[0].address = address(9);
    node.write_config();
    node.start();
    wait_known(&mut node, 9);
}

#[test]
fn a_seat_that_is_removed_leaves_no_peers_behind() {
    let mut node = Node::new(|_| {});
    node.start_seat();
    set(&node, 5);
    wait_known(&mut node, 5);
    let (vm, seat) = ("vm".to_owned(), "a".to_owned());
    assert_eq!(node.ask(&Request::RemoveSeat { vm, seat }), Response::Done);
    node.wait("its engine has ended", |node| {
        node.engine_pids().is_empty().then_some(())
    });
    let seat = Box::new(node.config.seats[0].clone());
    assert_eq!(node.ask(&Request::ApplySeat { seat }), Response::Done);
    node.wait_running();
    wait_known(&mut node, 1);
}

/// Whom the engine itself says to ask before it boots.
fn asked_after(node: &Node) -> Option<Vec<String>> {
    let counters = node.seat()?.engine?.counters;
    let seats = counters.get("other_seats")?.as_array()?.iter();
    Some(seats.filter_map(|seat| seat.as_str().map(str::to_owned)).collect())
}

fn wait_asked_after(node: &mut Node, expected: &[String]) {
    node.wait("the engine knows whom to ask", |node| {
        (asked_after(node)? == expected).then_some(())
    });
}

/// Whether it runs, is adopted or starts: it is never told of the one without the other.
#[test]
fn an_engine_asks_after_seats_that_cant_be_dialled() {
    let mut node = Node::new(|_| {});
    let first = node.start_seat();
    let peer = asked_after(&node).unwrap();
    assert_eq!(peer.len(), 1, "as configured: {peer:?}");
    let mut config = node.config.seats[0].clone();
    let absent = SeatId(0xb1);
    config.link.absent = vec![AbsentSeat {
        seat: "c".into(),
        seat_id: absent,
    }];
    let apply = |node: &Node, seat| node.ask(&Request::ApplySeat { seat: Box::new(seat) });
    assert_eq!(apply(&node, config.clone()), Response::Done);
    wait_asked_after(&mut node, &[peer[0].clone(), absent.to_string()]);
    config.link.peers.clear();
    assert_eq!(apply(&node, config.clone()), Response::Done);
    wait_asked_after(&mut node, &[absent.to_string()]);
    let pid = first.pid.unwrap();
    assert_eq!(node.seat().unwrap().pid, Some(pid), "the same engine all along");
    node.kill_daemon();
    node.config.seats[0] = config;
    node.config.seats[0].link.absent[0].seat_id = SeatId(0xb2);
    node.write_config();
    node.start();
    wait_asked_after(&mut node, &[SeatId(0xb2).to_string()]);
    assert_eq!(node.seat().unwrap().pid, Some(pid), "adopted");
    node.script("exit 23");
    node.wait("another engine answers", |node| {
        node.seat()
            .filter(|seat| seat.engine.is_some() && seat.pid != Some(pid))
    });
    wait_asked_after(&mut node, &[SeatId(0xb2).to_string()]);
}
