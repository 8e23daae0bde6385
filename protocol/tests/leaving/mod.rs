//! A follower that is to end (rule 6).

use ftvm_protocol::core::{Action, Command, EndReason, Event, Gate, Refusal, RoleName};
use ftvm_protocol::record::Members;

use crate::bench::{Arbiter, Bench};
use crate::claimed;

#[test]
fn a_follower_that_leaves_acknowledges_until_it_is_ejected() {
    let mut bench = Bench::pair();
    bench.seats[0].arbiter = Arbiter::Away;
    bench.step(1, Event::Command(Command::Leave));
    for _ in 0..30 {
        bench.pass(100);
        let epoch = bench.epoch(0);
        assert_eq!(bench.gate(0), Gate::Through(epoch), "leaving holds no output back");
        assert!(bench.seats[1].core.status().leaving);
    }
    bench.seats[0].arbiter = Arbiter::Works;
    while bench.seats[1].ended.is_none() {
        let epoch = bench.epoch(0);
        assert!(bench.gate(0).admits(epoch), "{:?} at {epoch}", bench.gate(0));
        bench.pass(10);
        assert!(bench.now_ms < 20_000, "never ejected");
    }
    assert_eq!(bench.seats[1].ended, Some(EndReason::Ejected));
    assert_eq!(bench.gate(0), Gate::Open);
    let record = bench.record.clone().expect("a record").record;
    assert_eq!(record.members, Members::one(bench.seats[0].me));
    bench.restart(1);
    bench.connect();
    bench.pass(1_000);
    assert!(bench.seats[0].core.status().protected, "the seat may come back");
}

#[test]
fn a_follower_that_ends_at_once_holds_output_back() {
    let mut bench = Bench::pair();
    bench.seats[0].arbiter = Arbiter::Away;
    bench.cut();
    bench.pass(100);
    let epoch = bench.epoch(0);
    assert!(!bench.gate(0).admits(epoch), "what leaving is for");
}

#[test]
fn a_follower_that_leaves_takes_no_guest_unless_its_leader_is_lost() {
    let mut bench = Bench::pair();
    bench.seats[0].arbiter = Arbiter::Away;
    bench.step(1, Event::Command(Command::Leave));
    bench.step(0, Event::Command(Command::Switchover));
    assert_eq!(bench.seats[0].actions.last(), Some(&Action::Refused(Refusal::Busy)));
    bench.cut();
    bench.pass(100);
    assert_eq!(
        bench.seats[1].core.status().role,
        RoleName::Active,
        "better than nobody"
    );
}

#[test]
fn a_target_that_has_claimed_the_record_does_not_leave() {
    let mut bench = claimed();
    bench.step(1, Event::Command(Command::Leave));
    assert!(bench.seats[1].wanted(|action| *action == Action::Refused(Refusal::Busy)));
    assert!(!bench.seats[1].core.status().leaving);
}

#[test]
fn a_joiner_that_is_not_yet_a_member_leaves_without_a_write() {
    let mut bench = Bench::new();
    bench.pass(100);
    bench.seats[0].arbiter = Arbiter::Away;
    bench.connect();
    bench.pass(500);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Standby);
    bench.step(1, Event::Command(Command::Leave));
    bench.pass(300);
    assert_eq!(bench.seats[1].ended, Some(EndReason::Ejected));
    assert_eq!(bench.gate(0), Gate::Open);
}
