use ftvm_protocol::core::{GuestReport, HeaderReport, SeatReport};
use ftvm_protocol::record::{Members, Snapshot};

use super::*;
use crate::seat::testing::{PEER, Rig, healthy};

/// What is to be done if engine, record and the peer's daemon say this.
fn verdict(there: bool, may_hand_over: bool, change: impl FnOnce(&mut Status, &mut Record)) -> Verdict {
    let (mut status, Snapshot { mut record, .. }) = healthy(1);
    change(&mut status, &mut record);
    judge(&status, &record, may_hand_over, |seats| {
        assert_eq!(seats, [PEER.seat]);
        there
    })
}

fn unlink(status: &mut Status) {
    status.peer.as_mut().unwrap().connected = false;
}

#[test]
fn a_cut_off_engine_ends_only_where_nobody_needs_it() {
    let alone = |status: &mut Status, record: &mut Record| record.members = Members::one(status.incarnation);
    let not_named = |_: &mut Status, record: &mut Record| record.members = Members::one(PEER);
    let is_wait = |verdict: &Verdict, words: &str| matches!(verdict, Verdict::Wait(why) if why.contains(words));
    // It leads, and its link is up: planned, for a while.
    assert_eq!(verdict(true, true, |_, _| {}), Verdict::HandOver);
    assert_eq!(verdict(true, false, |_, _| {}), Verdict::End);
    // The pair is apart. Only the word of the peer's daemon tells that the guest is not here alone.
    assert_eq!(verdict(true, true, |status, _| unlink(status)), Verdict::End);
    let silent = verdict(false, true, |status, _| unlink(status));
    assert!(is_wait(&silent, "does not say"), "{silent:?}");
    for role in [Role::Standby, Role::Active] {
        let apart = |status: &mut Status, _: &mut Record| {
            (status.role, status.protected) = (role, false);
        };
        assert_eq!(verdict(true, true, apart), Verdict::End, "{role:?}");
        let silent = verdict(false, true, apart);
        assert!(is_wait(&silent, "does not say"), "{role:?}: {silent:?}");
    }
    // Alone, whatever it says of itself, and whatever somebody says of the peer.
    for role in [Role::Active, Role::Standby, Role::Starting] {
        let alone = |status: &mut Status, record: &mut Record| {
            status.role = role;
            alone(status, record);
        };
        assert_eq!(verdict(true, true, alone), Verdict::Alone, "{role:?}");
    }
    // The record does not name it: without a guest it is of no use; with one it may be right, and the record a strange one.
    for role in [Role::Starting, Role::Joining] {
        let not_named = |status: &mut Status, record: &mut Record| {
            status.role = role;
            not_named(status, record);
        };
        assert_eq!(verdict(false, true, not_named), Verdict::End, "{role:?}");
    }
    for role in [Role::Active, Role::Standby, Role::Frozen] {
        let not_named = |status: &mut Status, record: &mut Record| {
            status.role = role;
            not_named(status, record);
        };
        let strange = verdict(true, true, not_named);
        assert!(is_wait(&strange, "does not name"), "{role:?}: {strange:?}");
    }
    let stops = verdict(true, true, |_, record| record.phase = Phase::Stopped);
    assert!(is_wait(&stops, "stops"), "{stops:?}");
    // What it wrote may yet make it the only one; an engine that does not say so may have written, too.
    for unsettled in [Some(true), None] {
        let unknown = verdict(true, false, |status, _| status.unsettled = unsettled);
        assert!(is_wait(&unknown, "not known"), "{unknown:?}");
    }
    let frozen = verdict(true, true, |status, _| status.role = Role::Frozen);
    assert!(is_wait(&frozen, "switchover"), "{frozen:?}");
}

/// Another namespace than that of the engines of a [`Rig`], which is the test's own.
fn elsewhere() -> Netns {
    let file = std::fs::File::open("/proc/self/ns/mnt").unwrap();
    Netns::of_descriptor(&file).unwrap()
}

fn here() -> Netns {
    Netns::of_process(std::process::id().cast_signed()).unwrap()
}

fn at_peer(guest: GuestReport) -> Vec<SeatReport> {
    vec![SeatReport {
        seat: PEER.seat,
        header: HeaderReport::Absent,
        guest,
    }]
}

#[test]
fn one_that_has_its_pods_network_is_not_asked_anything() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.report(at_peer(GuestReport::Present));
    for _ in 0..3 {
        pod.follow(here());
    }
    assert!(pod.cut_off.lock().unwrap().is_none());
    rig.assert_alive();
    // The same engine, the same record: what differs is the network.
    rig.say(unlink);
    pod.follow(elsewhere());
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
}

#[test]
fn one_whose_peer_has_the_guest_ends_and_the_peers_daemon_is_told() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.say(unlink);
    rig.report(at_peer(GuestReport::Present));
    pod.follow(elsewhere());
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    assert_eq!(
        rig.commands(),
        [Command::Quit],
        "it is ended, not told to go: nothing reaches it"
    );
    assert_eq!(rig.gone(), [healthy(1).0.incarnation]);
    // The next one is in the pod's network.
    rig.launch(2);
    pod.follow(here());
    assert!(pod.cut_off.lock().unwrap().is_none());
    assert!(rig.seat.has_engine() && rig.gone().len() == 1);
}

#[test]
fn one_that_leads_a_whole_pair_hands_over_and_goes_on() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.report(at_peer(GuestReport::Present));
    pod.follow(elsewhere());
    assert_eq!(rig.commands(), [Command::Switchover]);
    rig.assert_alive();
}

#[test]
fn one_that_has_the_guest_alone_goes_on_and_says_what_to_do() {
    let rig = Rig::new();
    let pod = rig.pod();
    let (_, mut snapshot) = healthy(1);
    snapshot.record.members = Members::one(snapshot.record.holder);
    rig.write(Some(snapshot));
    rig.say(unlink);
    rig.report(at_peer(GuestReport::Present));
    pod.follow(elsewhere());
    assert_eq!(rig.commands(), []);
    assert!(pod.progress().cut_off.is_some_and(|why| why.contains("halt and start")));
    rig.assert_alive();
}

/// Whoever can't be asked has said nothing.
#[test]
fn one_of_which_nothing_is_known_goes_on() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.say(unlink);
    for reports in [Vec::new(), at_peer(GuestReport::None), at_peer(GuestReport::Unknown)] {
        rig.report(reports);
        *pod.cut_off.lock().unwrap() = None;
        pod.follow(elsewhere());
        rig.assert_alive();
    }
    rig.report(at_peer(GuestReport::Present));
    rig.write(None);
    *pod.cut_off.lock().unwrap() = None;
    pod.follow(elsewhere());
    assert_eq!(rig.commands(), []);
    rig.assert_alive();
    assert!(pod.progress().cut_off.is_none(), "nobody has to do anything");
}

/// Else both engines of a pair could end, each because of the other one.
#[test]
fn who_is_about_to_end_counts_for_nobody_else() {
    let rig = Rig::new();
    let guest = || rig.seat.report(healthy(1).0.incarnation.seat, STATUS_PATIENCE).guest;
    assert_eq!(guest(), GuestReport::Present);
    rig.seat.hold_swaps(Some(healthy(1).0.incarnation));
    assert_eq!(guest(), GuestReport::Unknown);
    rig.seat.hold_swaps(None);
    assert_eq!(guest(), GuestReport::Present);
    rig.say(|status| status.leaving = true);
    assert_eq!(guest(), GuestReport::Unknown);
}
