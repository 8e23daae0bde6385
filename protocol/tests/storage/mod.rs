//! Rule 13: disks that fail or hang.

use ftvm_protocol::core::{
    Action, Command, EndReason, Event, Gate, GuestReport, Refusal, RoleName, Seal, StorageHealth,
};
use ftvm_protocol::identity::SessionId;
use ftvm_protocol::message::{Message, SessionEnd};
use ftvm_protocol::record::{Members, Phase};

use crate::bench::{Arbiter, Bench};

const FAILED: Event = Event::Storage(StorageHealth::Failed);
const HANGS: Event = Event::Storage(StorageHealth::Hangs);
const WORKS: Event = Event::Storage(StorageHealth::Works);

fn claims(bench: &Bench) -> usize {
    let claim = |action: &&Action| {
        let Action::Send { message, .. } = action else {
            return false;
        };
        matches!(message, Message::Claim { .. })
    };
    bench.seats[0].actions.iter().filter(claim).count()
}

#[test]
fn an_active_whose_disk_fails_hands_over_and_is_copied_again() {
    for trouble in [FAILED, HANGS] {
        let mut bench = Bench::pair();
        bench.step(0, trouble);
        bench.pass(300);
        assert_eq!(
            bench.seats[0].ended,
            Some(EndReason::StorageFailed),
            "it does not follow"
        );
        assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
        assert_eq!(
            bench.gate(1),
            Gate::Open,
            "alone at once, nobody waits for its acknowledgments"
        );
        let record = bench.record.clone().expect("a record").record;
        assert_eq!(record.members, Members::one(bench.seats[1].me));
        bench.restart(0);
        bench.connect();
        bench.pass(1_000);
        assert!(bench.seats[1].core.status().protected);
        assert!(bench.seats[0].wanted(|action| matches!(action, Action::ReceiveResync { .. })));
    }
}

#[test]
fn what_failed_once_does_not_work_again_and_what_hung_may() {
    let mut bench = Bench::new();
    bench.pass(100);
    for (told, health) in [
        (HANGS, StorageHealth::Hangs),
        (WORKS, StorageHealth::Works),
        (FAILED, StorageHealth::Failed),
        (WORKS, StorageHealth::Failed),
        (HANGS, StorageHealth::Failed),
    ] {
        bench.step(0, told);
        assert_eq!(bench.seats[0].core.status().storage, health);
    }
    assert_eq!(bench.seats[0].ended, None, "nobody else has the guest");
    assert_eq!(bench.gate(0), Gate::Open);
    bench.connect();
    bench.pass(1_000);
    assert_eq!(
        bench.seats[1].core.status().role,
        RoleName::Active,
        "as soon as there is one"
    );
}

#[test]
fn a_disk_that_hung_and_is_back_before_the_guest_has_moved_follows() {
    let mut bench = Bench::pair();
    bench.seats[0].manual_seals = true;
    bench.step(0, HANGS);
    bench.pass(20);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Frozen);
    bench.step(0, WORKS);
    bench.seal_and_stage(0, Seal::Freeze);
    bench.pass(500);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Standby);
    assert!(bench.seats[1].core.status().protected);
}

#[test]
fn a_standby_whose_disk_fails_is_ejected_and_takes_no_guest() {
    for trouble in [FAILED, HANGS] {
        let mut bench = Bench::pair();
        bench.seats[0].arbiter = Arbiter::Away;
        bench.step(1, trouble);
        let peer = bench.seats[1].me;
        assert!(bench.seats[0].wanted(|action| *action == Action::Refused(Refusal::FollowerStorage(peer))));
        assert!(!bench.seats[0].core.status().protected, "told at once");
        bench.step(0, Event::Command(Command::Switchover));
        assert!(bench.seats[0].wanted(|action| *action == Action::Refused(Refusal::NotProtected)));
        bench.seats[0].arbiter = Arbiter::Works;
        bench.pass(3_000);
        assert_eq!(bench.gate(0), Gate::Open);
        assert_eq!(bench.seats[1].ended, Some(EndReason::StorageFailed));
        let record = bench.record.clone().expect("a record").record;
        assert_eq!(record.members, Members::one(bench.seats[0].me));
    }
}

#[test]
fn a_standby_whose_disk_fails_takes_over_once_its_leader_had_time_to() {
    for leader_lives in [true, false] {
        let mut bench = Bench::pair();
        // The word of it does not arrive, and there is no link any more.
        bench.seats[1].mute = true;
        bench.step(1, FAILED);
        bench.seats[0].arbiter = Arbiter::Away;
        bench.seats[0].lost = (!leader_lives).then_some(GuestReport::None);
        bench.cut();
        bench.pass(1_000);
        bench.seats[0].arbiter = Arbiter::Works;
        bench.pass(1_000);
        let role = |bench: &Bench, at: usize| bench.seats[at].core.status().role;
        if leader_lives {
            assert_eq!(bench.seats[1].ended, Some(EndReason::StorageFailed));
            assert_eq!(role(&bench, 0), RoleName::Active);
            assert_eq!(bench.gate(0), Gate::Open);
            continue;
        }
        assert_eq!(role(&bench, 1), RoleName::Standby);
        bench.pass(3_000);
        assert_eq!(role(&bench, 1), RoleName::Active, "nobody else is there");
    }
}

#[test]
fn both_disks_fail_and_the_guest_stays_with_its_errors() {
    let mut bench = Bench::pair();
    bench.step(1, FAILED);
    bench.step(0, FAILED);
    bench.pass(5_000);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Active);
    assert_eq!(
        claims(&bench),
        0,
        "never to a seat whose storage is known to have failed"
    );
    assert_eq!(bench.gate(0), Gate::Open);
}

#[test]
fn the_word_of_a_standby_that_failed_is_repeated() {
    let mut bench = Bench::pair();
    bench.seats[0].arbiter = Arbiter::Away;
    bench.seats[1].mute = true;
    bench.step(1, FAILED);
    assert!(bench.seats[0].core.status().protected, "it did not hear");
    bench.seats[1].mute = false;
    bench.pass(100);
    assert!(!bench.seats[0].core.status().protected);
}

#[test]
fn a_switchover_that_comes_to_nothing_is_asked_for_later_and_later() {
    let mut bench = Bench::pair();
    // The target can't have itself named: it gives up, and so does the source.
    bench.seats[1].arbiter = Arbiter::RefusesWrites;
    bench.step(0, FAILED);
    let mut began = Vec::new();
    let mut asking = false;
    while bench.now_ms < 120_000 {
        let before = claims(&bench);
        bench.pass(500);
        let asks = claims(&bench) > before;
        if asks && !asking {
            began.push(bench.now_ms);
        }
        asking = asks;
    }
    let pauses: Vec<u64> = began
        .windows(2)
        .map(|pair| (pair[1] - pair[0] + 1_000) / 6_000)
        .collect();
    assert_eq!(pauses.get(..4), Some([1, 2, 4, 4].as_slice()), "began at {began:?}");
    assert_eq!(bench.seats[0].core.status().role, RoleName::Active);
    bench.seats[1].arbiter = Arbiter::Works;
    bench.pass(30_000);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
}

#[test]
fn a_stop_on_a_failed_disk_leaves_the_boot_to_the_other_one() {
    // The header that says so may never get to that disk.
    for header_hangs in [false, true] {
        let mut bench = Bench::pair();
        bench.seats[0].manual_seals = true;
        bench.step(0, Event::Command(Command::Stop));
        // The last flush failed, and the driver says so first.
        bench.step(0, FAILED);
        bench.seats[0].header_hangs = header_hangs;
        bench.seal_and_stage(0, Seal::Final);
        // It looks at the record now and then.
        bench.pass(11_000);
        assert_eq!(bench.seats[0].ended, Some(EndReason::Stopped));
        let told = |action: &Action| matches!(action, Action::ReportStopped { .. });
        assert_eq!(bench.seats[0].wanted(told), !header_hangs);
        let complete = |at: usize| bench.seats[at].header.as_ref().map(|header| header.complete);
        assert_eq!((complete(0), complete(1)), (Some(header_hangs), Some(true)));
        let record = bench.record.clone().expect("a record").record;
        assert_eq!(record.phase, Phase::Stopped);
        assert_eq!(record.members, Members::one(bench.seats[1].me));
        for at in 0..2 {
            bench.restart(at);
        }
        let over_stopped_term = record.term;
        for at in 0..2 {
            bench.step(at, Event::Command(Command::Start { over_stopped_term }));
        }
        bench.pass(1_000);
        assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
        assert!(!bench.seats[0].wanted(|action| matches!(action, Action::BootFromDisk { .. })));
    }
}

#[test]
fn an_active_whose_header_does_not_get_to_its_disk_lets_the_standby_go_on() {
    for (told, limit_ms) in [(Some(HANGS), 3_000), (None, 10_000)] {
        let mut bench = Bench::new();
        bench.pass(100);
        bench.seats[0].header_hangs = true;
        bench.connect();
        bench.pass(500);
        let record = bench.record.clone().expect("a record").record;
        assert_eq!(record.members, Members::pair(bench.seats[0].me, bench.seats[1].me));
        assert_eq!(bench.gate(0), Gate::Closed);
        if let Some(told) = told {
            bench.step(0, told);
        }
        bench.pass(limit_ms - 1_000);
        assert_eq!(bench.seats[0].ended, None, "it may yet be written");
        bench.pass(2_000);
        assert_eq!(bench.seats[0].ended, Some(EndReason::StorageFailed));
        assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
        assert_eq!(bench.gate(1), Gate::Open);
    }
}

#[test]
fn an_active_that_may_just_have_ejected_its_standby_does_not_go() {
    let mut bench = Bench::new();
    bench.pass(100);
    bench.seats[0].header_hangs = true;
    bench.connect();
    bench.pass(500);
    bench.seats[0].arbiter = Arbiter::SwallowsWrites;
    bench.seats[1].mute = true;
    let before = bench.seats[0].actions.len();
    let ejects = |bench: &Bench| {
        let mut since = bench.seats[0].actions[before..].iter();
        since.any(|action| matches!(action, Action::SwapRecord { .. }))
    };
    while !ejects(&bench) {
        assert!(bench.now_ms < 5_000, "it gives the silent one up");
        bench.pass(10);
    }
    bench.seats[1].mute = false;
    bench.pass(50);
    let writes = |action: &Action| match action {
        Action::WriteHeader { request, .. } => Some(*request),
        _ => None,
    };
    let request = bench.seats[0].actions.iter().rev().find_map(writes).expect("a header");
    bench.step(0, Event::HeaderFailed { request });
    assert!(bench.seats[0].wanted(|action| *action == Action::Refused(Refusal::HeaderNotWritten)));
    assert_eq!(bench.seats[0].ended, None, "the other one may be in no record any more");
}

#[test]
fn a_seat_whose_disk_hangs_joins_once_it_works() {
    let mut bench = Bench::new();
    bench.pass(100);
    bench.step(1, HANGS);
    bench.connect();
    bench.pass(500);
    assert!(bench.seats[1].wanted(|action| *action == Action::Refused(Refusal::OwnStorage)));
    assert!(!bench.seats[1].wanted(|action| matches!(action, Action::ReceiveResync { .. })));
    bench.step(1, WORKS);
    bench.pass(12_000);
    assert!(bench.seats[0].core.status().protected);
}

#[test]
fn a_source_whose_own_write_may_have_landed_does_not_go() {
    let mut bench = Bench::pair();
    bench.seats[0].manual_seals = true;
    bench.step(0, FAILED);
    bench.pass(20);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Frozen);
    // The target takes its time, and the source wants to go on by itself.
    bench.seats[0].arbiter = Arbiter::SwallowsWrites;
    let previous = bench.seats[0].core.status().session.expect("a session");
    let epoch = bench.seal(0, Seal::Freeze);
    while !bench.seats[0].core.status().unsettled {
        assert!(bench.now_ms < 60_000, "it gives up some time");
        bench.pass(10);
    }
    let follow = Message::Follow {
        session: SessionId(99),
        previous,
        epoch,
        term: bench.record.clone().expect("a record").record.term,
    };
    bench.say(1, follow);
    assert_eq!(bench.seats[0].ended, None, "it may be the holder");
}

#[test]
fn a_leader_hears_from_a_source_that_does_not_follow() {
    let mut bench = Bench::pair();
    bench.step(0, FAILED);
    bench.pass(300);
    let failed = bench.seats[0].wanted(|action| {
        let Action::Send { message, .. } = action else {
            return false;
        };
        matches!(
            message,
            Message::End {
                reason: SessionEnd::FollowerStorage,
                ..
            }
        )
    });
    assert!(failed);
}
