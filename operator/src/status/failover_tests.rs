//! What is told of takeovers.

use super::*;
use crate::decide::decide;
use crate::decide::rig::World;

fn took_over(world: &mut World, seat: &str, unix_ms: u64) {
    let takeover = Takeover {
        unix_ms,
        reason: "peer lost".to_owned(),
        microseconds: 310_000,
    };
    let published = &mut world.pods.get_mut(seat).unwrap().published;
    published.as_mut().unwrap().last_takeover = Some(takeover);
}

#[test]
fn a_takeover_is_kept_and_told_once() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let old = world.vm.status.clone().unwrap();
    let active = world.book()[0].name.clone();
    let unix_ms = u64::try_from(world.now.as_millisecond()).unwrap() + 123;
    took_over(&mut world, &active, unix_ms);
    world.step();
    let new = world.vm.status.clone().unwrap();
    assert_eq!(new.last_failover.as_ref().unwrap().gap_microseconds, 310_000);
    let told = changes(&old, &new);
    assert!(
        told.iter()
            .any(|change| change.reason == "TookOver" && change.note.contains("310000 µs")),
        "{told:?}"
    );
    assert!(!world.step(), "told once");
    assert_eq!(changes(&new, &new), []);
}

/// What the status says now, as seconds since the world began.
fn told(world: &mut World, begin: Timestamp) -> Option<(String, i64)> {
    let seen = world.observe();
    let told = status(&seen, &decide(&seen)).last_failover?;
    Some((told.seat, told.time.0.duration_since(begin).as_secs()))
}

/// By a clock that is wrong, or by whoever lies.
#[test]
fn a_takeover_that_lies_ahead_is_not_told() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let (begin, book) = (world.now, world.book());
    let (wrong, right) = (book[0].name.as_str(), book[1].name.as_str());
    let begin_ms = u64::try_from(begin.as_millisecond()).unwrap();
    for ahead_ms in [61_000, 3_600_000, 366 * 86_400_000, u64::MAX - begin_ms] {
        took_over(&mut world, wrong, begin_ms + ahead_ms);
        assert_eq!(told(&mut world, begin), None, "{ahead_ms} ms ahead");
    }
    // It hides no other one.
    took_over(&mut world, right, begin_ms);
    assert_eq!(told(&mut world, begin), Some((right.to_owned(), 0)));
    // Clocks differ, and time goes on.
    took_over(&mut world, wrong, begin_ms + 60_000);
    assert_eq!(told(&mut world, begin), Some((wrong.to_owned(), 60)));
    took_over(&mut world, wrong, begin_ms + 90_000);
    assert_eq!(told(&mut world, begin), Some((right.to_owned(), 0)));
    world.pass(30);
    assert_eq!(told(&mut world, begin), Some((wrong.to_owned(), 90)));
}

/// It was believed once: by an operator whose clock was ahead as well, or one of an earlier release.
#[test]
fn a_known_takeover_that_lies_ahead_hides_no_other() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let (begin, seat) = (world.now, world.book()[0].name.clone());
    took_over(&mut world, &seat, u64::try_from(begin.as_millisecond()).unwrap());
    for (ahead_s, hidden) in [(60, true), (61, false)] {
        world.vm.status.as_mut().unwrap().last_failover = Some(Failover {
            time: Time(begin + SignedDuration::from_secs(ahead_s)),
            reason: "peer lost".to_owned(),
            seat: "former".to_owned(),
            node: None,
            gap_microseconds: 1,
        });
        let expected = if hidden {
            ("former", ahead_s)
        } else {
            (seat.as_str(), 0)
        };
        let (by, seconds) = told(&mut world, begin).unwrap();
        assert_eq!((by.as_str(), seconds), expected);
    }
}

#[test]
fn a_takeover_that_lies_ahead_is_looked_at_when_its_time_has_come() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let (book, begin_ms) = (world.book(), u64::try_from(world.now.as_millisecond()).unwrap());
    let look = |world: &mut World| failover_ahead(&world.observe(), &world.book()).map(|after| after.as_secs());
    assert_eq!(look(&mut world), None);
    for (ahead_s, after_s) in [(60, None), (61, Some(1)), (90, Some(30)), (366 * 86_400, Some(3600))] {
        took_over(&mut world, &book[0].name, begin_ms + 1000 * ahead_s);
        assert_eq!(look(&mut world), after_s, "{ahead_s} s ahead");
    }
    // The next one of several.
    took_over(&mut world, &book[1].name, begin_ms + 90_000);
    assert_eq!(look(&mut world), Some(30));
    world.pass(30);
    assert_eq!(look(&mut world), Some(3600), "the other one is told by now");
}
