//! Nobody boots over a loss that a person accepts before every seat had its time to say what it has.

use ftvm_crds::seat::SeatRole;

use super::rig::World;
use super::stuck_tests::{accept, asked, protected, says, seats, waits};
use super::*;
use crate::status::READY;

/// Nobody has the guest. The holder waits with its disk, the other seat has told nothing yet, and a loss is accepted now.
fn accepted() -> (World, SeatEntry, SeatEntry) {
    let mut world = protected();
    let (active, standby) = seats(&world);
    let term = world.record().unwrap().term;
    waits(&mut world, &active.name, term);
    says(&mut world, &standby.name, None);
    accept(&mut world, "");
    (world, active, standby)
}

fn who_is_asked(world: &mut World) -> String {
    let asked: Vec<_> = asked(world).into_iter().map(|(seat, _)| seat).collect();
    asked.join(" ")
}

/// All that the operator knew was restored, too: it is that seat alone that knows better.
#[test]
fn a_seat_that_has_told_nothing_may_have_the_newest_disk() {
    let (mut world, active, standby) = accepted();
    assert!(who_is_asked(&mut world).is_empty());
    let recheck = decide(&world.observe()).recheck;
    assert!(recheck.is_some_and(|recheck| recheck <= WORD_WITHIN), "{recheck:?}");
    let term = world.record().unwrap().term;
    waits(&mut world, &standby.name, term + 1);
    assert_eq!(who_is_asked(&mut world), standby.name);
    waits(&mut world, &standby.name, term);
    assert_eq!(who_is_asked(&mut world), active.name);
}

/// It may never tell anything: its disk is lost, or it has no place.
#[test]
fn a_seat_that_tells_nothing_is_not_waited_for_without_end() {
    let nothing = |_: &mut World, _: &str| ();
    let no_pod = |world: &mut World, seat: &str| drop(world.pods.remove(seat));
    let ended = |world: &mut World, seat: &str| says(world, seat, Some(SeatRole::Ended));
    let changes: [fn(&mut World, &str); 3] = [nothing, no_pod, ended];
    for change in changes {
        let (mut world, active, standby) = accepted();
        change(&mut world, &standby.name);
        world.step();
        assert!(who_is_asked(&mut world).is_empty());
        world.pass(WORD_WITHIN.as_secs().cast_signed() - 1);
        assert!(who_is_asked(&mut world).is_empty());
        world.pass(1);
        assert_eq!(who_is_asked(&mut world), active.name);
    }
}

#[test]
fn each_acceptance_and_each_process_begins_anew() {
    let (mut world, active, _) = accepted();
    world.pass_for_words();
    assert_eq!(who_is_asked(&mut world), active.name);
    accept(&mut world, " of another time");
    assert!(who_is_asked(&mut world).is_empty());
    world.pass_for_words();
    assert_eq!(who_is_asked(&mut world), active.name);
    // Who has told nothing since the guest is gone was not waited for before.
    says(&mut world, &active.name, Some(SeatRole::Active));
    world.pass_for_words();
    says(&mut world, &active.name, Some(SeatRole::Starting));
    assert!(who_is_asked(&mut world).is_empty());
    world.pass_for_words();
    assert_eq!(who_is_asked(&mut world), active.name);
    world.acceptance = None;
    assert!(who_is_asked(&mut world).is_empty());
    world.pass(10);
    // Nothing is known of how long a clock was wrong that was set back.
    world.observe();
    world.pass(-3600);
    world.pass_for_words();
    assert_eq!(who_is_asked(&mut world), active.name);
}

#[test]
fn what_is_waited_for_is_told() {
    let (mut world, active, standby) = accepted();
    let told = |world: &mut World| {
        let seen = world.observe();
        let status = crate::status::status(&seen, &decide(&seen));
        status.condition(READY).unwrap().clone()
    };
    let waits_for = told(&mut world);
    let words = format!("seat {}, whose disk may be the newest", standby.name);
    assert_eq!(waits_for.reason, "DataLossWaits", "{waits_for:?}");
    assert!(waits_for.message.contains(&words), "{waits_for:?}");
    world.pass_for_words();
    assert_ne!(told(&mut world).reason, "DataLossWaits");
    assert_eq!(who_is_asked(&mut world), active.name);
}
