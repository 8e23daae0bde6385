use super::*;
use ftvm_engine::control::Status;
use ftvm_node_daemon::api::DaemonStatus;
use ftvm_protocol::identity::{Incarnation, SeatId};

fn seat(name: &str, role: Option<Role>, protected: bool, term: u64) -> SeatStatus {
    let incarnation = Incarnation {
        seat: SeatId(1),
        start: 1,
    };
    let engine = role.map(|role| Status {
        vm: "demo".into(),
        seat: name.into(),
        incarnation,
        role,
        holds_guest: true,
        protected,
        paused: false,
        leaving: false,
        unsettled: Some(false),
        standby: None,
        why: String::new(),
        term,
        holder: None,
        members: vec![],
        epoch: 7,
        acknowledged: 7,
        peer: None,
        arbiter_reachable: true,
        arbiter_uid: None,
        vouches: None,
        resync_percent: None,
        failing_disks: Vec::new(),
        accepted_loss: None,
        code: 0,
        counters: serde_json::Map::new(),
    });
    SeatStatus {
        vm: "demo".into(),
        seat: name.into(),
        seat_id: None,
        original_disk: false,
        link_address: "192.0.2.1:1".parse().unwrap(),
        peers: vec![],
        phase: if engine.is_some() {
            Phase::Running
        } else {
            Phase::Waiting
        },
        why: if engine.is_some() {
            String::new()
        } else {
            "disk root /x: does not exist".into()
        },
        code: 0,
        pid: None,
        adopted: false,
        jail: "full".into(),
        starts: 1,
        storage_failures: 0,
        console: "/c".into(),
        log: "/l".into(),
        engine,
        last_exit: None,
        events: vec![],
    }
}

fn view(seats: Vec<SeatStatus>) -> View {
    let daemon = DaemonStatus {
        node: "alpha".into(),
        version: "1".into(),
        state_folder: "/s".into(),
        arbiter_folder: Some("/a".into()),
        peer_address: None,
        seats,
    };
    View {
        daemons: vec![("/d".into(), daemon)],
        silent: vec![("/e".into(), "no daemon answers on /e".into())],
    }
}

#[test]
fn a_person_sees_where_it_runs_and_why_not() {
    let view = view(vec![
        seat("a", Some(Role::Active), true, 5),
        seat("b", Some(Role::Standby), false, 5),
        seat("c", None, false, 0),
    ]);
    let expected = "\
VM    SEAT  NODE   ROLE     PROTECTED  TERM  EPOCH  NOTE
demo  a     alpha  active   yes        5     7
demo  b     alpha  standby             5     7
demo  c     alpha  waiting                          disk root /x: does not exist
-     -     /e     -        -          -     -      no daemon answers on /e
";
    assert_eq!(render(&view), expected);
}

#[test]
fn a_guest_that_stands_still_is_said_to() {
    let mut alone = seat("a", Some(Role::Active), false, 5);
    if let Some(engine) = &mut alone.engine {
        engine.paused = true;
    }
    let view = view(vec![alone]);
    assert!(render(&view).contains("no, paused"), "{}", render(&view));
    let json: serde_json::Value = serde_json::from_str(&json(&view)).unwrap();
    assert_eq!(json["vms"][0]["paused"], true);
}

#[test]
fn of_two_that_claim_the_guest_the_higher_term_is_right() {
    let view = view(vec![
        seat("a", Some(Role::Active), true, 5),
        seat("b", Some(Role::Active), false, 6),
    ]);
    assert_eq!(view.active("demo").unwrap().2.seat, "b");
    assert!(!view.protected("demo"));
    let json: serde_json::Value = serde_json::from_str(&json(&view)).unwrap();
    assert_eq!(json["vms"][0]["active"], "b");
    assert_eq!(json["vms"][0]["protected"], false);
    assert_eq!(json["silent"][0]["socket"], "/e");
    assert_eq!(json["daemons"][0]["seats"][0]["engine"]["role"], "active");
}
