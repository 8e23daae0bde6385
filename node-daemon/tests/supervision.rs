//! Engines outlive daemons; daemons restart engines; the arbiter is asked through them.

mod support;

use std::time::Duration;

use ftvm_engine::control::{Command, Connection, Reply};
use ftvm_node_daemon::api::{Phase, Request, Response, SeatStatus};
use ftvm_protocol::record;
use support::Node;

fn names(seat: &SeatStatus) -> (i32, String) {
    (seat.pid.unwrap(), seat.engine.as_ref().unwrap().incarnation.to_string())
}

#[test]
fn a_daemon_that_ends_or_is_killed_leaves_its_engine_to_the_next() {
    let mut node = Node::new(|_| {});
    let first = node.start_seat();
    assert!(!first.adopted);
    for round in 0..4 {
        if round % 2 == 0 {
            assert_eq!(node.terminate_daemon(), 0);
        } else {
            node.kill_daemon();
        }
        assert_eq!(node.engine_pids(), [first.pid.unwrap()], "the engine goes on alone");
        node.start();
        let seat = node.wait_running();
        assert!(seat.adopted);
        assert_eq!(names(&seat), names(&first), "the same engine");
        // And it is really under the new daemon's hand.
        node.script("swap");
        assert!(node.said().contains("Won"), "{}", node.said());
    }
}

#[test]
fn an_engine_that_ended_without_a_daemon_is_reported_and_replaced() {
    let mut node = Node::new(|_| {});
    let first = node.start_seat();
    node.kill_daemon();
    // SAFETY: this test's engine.
    unsafe { libc::kill(first.pid.unwrap(), libc::SIGKILL) };
    node.wait("the engine is gone", |node| node.engine_pids().is_empty().then_some(()));
    node.start();
    let second = node.wait_running();
    assert!(!second.adopted);
    assert_ne!(names(&second).1, names(&first).1, "a new incarnation");
    let last = second.last_exit.expect("the end is reported");
    assert_eq!(last.incarnation.to_string(), names(&first).1);
    assert!(last.message.contains("no daemon watched"), "{}", last.message);
}

#[test]
fn a_daemon_killed_during_a_start_leaves_one_engine_or_none() {
    let mut node = Node::new(|_| {});
    node.start_seat();
    for delay_ms in (0..60).step_by(4) {
        // Without an engine, so that the next daemon starts one.
        node.kill_daemon();
        for pid in node.engine_pids() {
            // SAFETY: this test's engine.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        node.wait("the engine is gone", |node| node.engine_pids().is_empty().then_some(()));
        node.launch();
        std::thread::sleep(Duration::from_millis(delay_ms));
        node.kill_daemon();
        // Whatever came of it, the next daemon has one engine and knows it.
        node.start();
        let seat = node.wait_running();
        let pid = seat.pid.unwrap();
        node.wait("one engine is left", |node| (node.engine_pids() == [pid]).then_some(()));
    }
}

#[test]
fn an_engine_that_crashes_is_started_anew_with_another_incarnation() {
    let mut node = Node::new(|_| {});
    let mut before = node.start_seat();
    let ends: &[(&str, u8, &str)] = &[
        ("exit 23", 23, "told to exit with 23"),
        ("vanish 5", 5, "without a report"),
        ("abort", 1, "by signal 6"),
        ("unlink", 27, "without a report"),
    ];
    for (script, code, words) in ends {
        node.script(script);
        let old = names(&before).1;
        before = node.wait("another engine answers", |node| {
            node.seat().filter(|seat| {
                seat.engine
                    .as_ref()
                    .is_some_and(|engine| engine.incarnation.to_string() != old)
            })
        });
        let last = before.last_exit.clone().expect("the end is reported");
        assert_eq!((last.code, last.incarnation.to_string()), (*code, old), "{script}");
        assert!(last.message.contains(words), "{}", last.message);
    }
    let log = std::fs::read_to_string(&before.log).unwrap();
    assert!(
        log.contains("forbidden system call") && log.contains("SYS_unlink"),
        "{log}"
    );
    // An engine that fails again and again is not started without a pause.
    let starts = node.seat().unwrap().starts;
    assert!(starts <= 1 + ends.len() as u64, "{starts} starts");
}

#[test]
fn the_record_is_swapped_through_the_daemon_and_lost_with_its_folder() {
    let mut node = Node::new(|_| {});
    node.start_seat();
    node.script("read");
    assert!(node.said().contains("Found"), "{}", node.said());
    node.script("swap");
    assert!(node.said().contains("Won"), "{}", node.said());
    let Response::Record {
        snapshot: Some(snapshot),
        ..
    } = node.ask(&Request::Record { vm: "vm".into() })
    else {
        panic!("a record")
    };
    assert_eq!((snapshot.version, snapshot.record.term), (2, 2));
    let (folder, hidden) = (node.folder.join("arbiter"), node.folder.join("hidden"));
    std::fs::rename(&folder, &hidden).unwrap();
    node.script("read");
    let said = node.said();
    assert!(
        said.contains("Unreachable") && said.contains(&folder.display().to_string()),
        "{said}"
    );
    std::fs::rename(&hidden, &folder).unwrap();
    node.script("swap");
    assert!(node.said().contains("Won"), "{}", node.said());
}

#[test]
fn an_engine_that_floods_its_daemon_is_answered_and_bounded() {
    let mut node = Node::new(|_| {});
    node.start_seat();
    node.script("flood");
    node.said();
    assert!(node.seat().unwrap().engine.is_some());
    node.script("read");
    assert!(
        node.said().contains("Answer") || node.said().contains("Read"),
        "{}",
        node.said()
    );
}

#[test]
fn a_stopped_machine_stays_stopped_until_it_is_started() {
    let mut node = Node::new(|_| {});
    node.start_seat();
    assert!(matches!(
        node.engine(Command::Stop),
        Response::Reply { reply: Reply::Ok }
    ));
    let stopped = |node: &Node| node.seat().filter(|seat| seat.phase == Phase::Stopped);
    node.wait("the seat is stopped", stopped);
    let response = node.engine(Command::Status);
    assert!(matches!(response, Response::Refused { code: 26, .. }), "{response:?}");
    assert!(node.engine_pids().is_empty());
    let response = node.ask(&Request::Start {
        vm: "vm".into(),
        seat: "a".into(),
    });
    assert!(matches!(response, Response::Reply { reply: Reply::Ok }), "{response:?}");
    node.wait_running();
    node.wait("the record says Running", |node| {
        match node.ask(&Request::Record { vm: "vm".into() }) {
            Response::Record {
                snapshot: Some(snapshot),
                ..
            } => (snapshot.record.phase == record::Phase::Running).then_some(()),
            _ => None,
        }
    });
}

#[test]
fn seats_are_added_changed_removed_and_told_of_dead_peers() {
    let mut node = Node::new(|_| {});
    node.start_seat();
    let mut other = node.config.seats[0].clone();
    other.seat = "b".into();
    other.identity = node.folder.join("b");
    other.original_disk = false;
    other.link.peers[0].seat = "a".into();
    let apply = |node: &Node, seat| node.ask(&Request::ApplySeat { seat: Box::new(seat) });
    let response = apply(&node, other.clone());
    assert!(
        matches!(&response, Response::Refused { code: 10, message } if message.contains("both listen")),
        "{response:?}"
    );
    other.link.listen.set_port(support::free_port());
    let response = apply(&node, other.clone());
    assert!(
        matches!(&response, Response::Refused { code: 10, message } if message.contains("both use")),
        "{response:?}"
    );
    other.disks.clear();
    assert_eq!(apply(&node, other), Response::Done);
    let second = |node: &Node| node.status()?.seats.into_iter().find(|seat| seat.seat == "b");
    let b = node.wait("the second engine answers", |node| {
        second(node).filter(|seat| seat.engine.is_some())
    });
    assert_ne!(
        uid_of(b.pid.unwrap()),
        uid_of(node.seat().unwrap().pid.unwrap()),
        "a user id of its own"
    );
    // What one seat asks of the other: header and guest.
    node.script("seats");
    let said = node.said();
    assert!(said.contains("Absent") && said.contains("Present"), "{said}");
    assert_eq!(
        node.ask(&Request::RemoveSeat {
            vm: "vm".into(),
            seat: "b".into()
        }),
        Response::Done
    );
    node.wait("it is gone", |node| second(node).is_none().then_some(()));
    let incarnation = b.engine.unwrap().incarnation;
    let gone = format!("gone {incarnation}");
    node.wait("the first is told", |node| {
        (node.seat()?.engine?.why == gone).then_some(())
    });
}

fn uid_of(pid: i32) -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(format!("/proc/{pid}")).unwrap().uid()
}

const STRANGER: &str = "FTVM_TEST_STRANGER";

#[test]
fn only_root_and_the_daemons_user_are_answered() {
    use std::os::unix::fs::PermissionsExt;
    if let Some(socket) = std::env::var_os(STRANGER) {
        let connection = Connection::connect(std::path::Path::new(&socket)).unwrap();
        let response = connection.receive::<Response>(true).unwrap().body;
        assert!(matches!(&response, Response::Refused { code: 25, .. }), "{response:?}");
        println!("{response:?}");
        return;
    }
    let mut node = Node::new(|_| {});
    node.start();
    // Another user, who may reach the socket, and a copy of this program that he may execute.
    let program = node.folder.join("stranger");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    for path in [node.folder.clone(), node.config.control_socket(), program.clone()] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    }
    let output = std::process::Command::new("setpriv")
        .args(["--reuid", "54321", "--regid", "54321", "--clear-groups"])
        .arg(program)
        .args(["--exact", "only_root_and_the_daemons_user_are_answered", "--nocapture"])
        .env(STRANGER, node.config.control_socket())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("user 54321 may not command this daemon"),
        "{output:?}"
    );
}
