use ftvm_protocol::identity::{ArbiterUid, Incarnation, SeatId};
use ftvm_protocol::record::Members;

use super::*;
use crate::seat::testing::{PEER, Rig, healthy};

const FRESH: Duration = Duration::from_millis(100);

/// Why not, if the engine and the record say this.
fn against(change: impl FnOnce(&mut Status, &mut Snapshot)) -> Result<(), Unsafe> {
    let (mut status, mut snapshot) = healthy(1);
    change(&mut status, &mut snapshot);
    expendable(&status, &snapshot, FRESH)
}

#[test]
fn an_active_may_die_only_if_everything_says_that_its_standby_takes_over() {
    assert_eq!(against(|_, _| {}), Ok(()));
    type Change = fn(&mut Status, &mut Snapshot);
    let mends: &[(&str, Change)] = &[
        ("not active", |status, _| status.role = Role::Standby),
        ("not active", |status, _| status.role = Role::Frozen),
        ("not active", |status, _| status.role = Role::Starting),
        ("stands still", |status, _| status.paused = true),
        ("is to go", |status, _| status.leaving = true),
        ("not protected", |status, _| status.protected = false),
        ("resync at 18 %", |status, _| {
            (status.protected, status.resync_percent) = (false, Some(18));
        }),
        ("earlier version", |status, _| status.standby = None),
        ("no link", |status, _| status.peer.as_mut().unwrap().connected = false),
        ("no link", |status, _| status.peer.as_mut().unwrap().incarnation = None),
        ("no link", |status, _| status.peer = None),
        ("can't use the arbiter", |status, _| status.arbiter_reachable = false),
        ("under way", |status, _| {
            status.standby.as_mut().unwrap().not_ready = Some("another change of the members is under way".to_owned());
        }),
    ];
    for (words, change) in mends {
        let why = against(change);
        assert!(
            matches!(&why, Err(Unsafe::Mend(why)) if why.contains(words)),
            "{words}: {why:?}"
        );
    }
    let other = Incarnation {
        seat: SeatId(0xc),
        start: 1,
    };
    // Not to be told from what is so for a moment after a swap.
    let moments: &[(&str, Change)] = &[
        ("no sign of life for 101 ms", |status, _| {
            status.standby.as_mut().unwrap().contact_age_ms = 101
        }),
        ("acknowledged nothing for 101 ms", |status, _| {
            status.standby.as_mut().unwrap().unacknowledged_ms = 101
        }),
        ("record", |_, snapshot| snapshot.uid = ArbiterUid(1)),
        ("record", |_, snapshot| snapshot.record.term += 1),
        ("record", |_, snapshot| snapshot.record.phase = Phase::Stopped),
        ("record", |_, snapshot| snapshot.record.holder = PEER),
        ("record", |status, snapshot| {
            snapshot.record.members = Members::one(status.incarnation)
        }),
        ("record", |_, snapshot| snapshot.record.members = Members::one(PEER)),
    ];
    for (words, change) in moments {
        let why = against(change);
        assert!(
            matches!(&why, Err(Unsafe::Moment(why)) if why.contains(words.trim_start_matches("no sign of life "))),
            "{words}: {why:?}"
        );
    }
    let why = against(|status, snapshot| snapshot.record.members = Members::pair(status.incarnation, other));
    assert!(
        matches!(&why, Err(Unsafe::Moment(_))),
        "its standby is another one: {why:?}"
    );
}

#[test]
fn who_may_die_is_killed_and_what_follows_is_what_follows_a_crash() {
    let rig = Rig::new();
    let (status, _) = healthy(1);
    assert_eq!(rig.seat.fail(), Ok(status.incarnation));
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    assert_eq!(rig.gone(), [status.incarnation], "the standby's daemon is told, once");
    let told = rig.seat.status(Duration::ZERO).last_exit.unwrap();
    assert_eq!(told.incarnation, status.incarnation);
    assert!(told.message.contains("by signal 9"), "{}", told.message);
    let again = rig.seat.fail().unwrap_err().to_string();
    assert!(again.contains("no engine runs"), "{again}");
}

#[test]
fn who_may_not_die_lives_and_says_why() {
    let rig = Rig::new();
    rig.say(|status| status.protected = false);
    let why = rig.seat.fail().unwrap_err().to_string();
    assert!(why.contains("not protected") && why.contains("then ask again"), "{why}");
    rig.assert_alive();
    rig.say(|status| *status = healthy(1).0);
    rig.write(None);
    let why = rig.seat.fail().unwrap_err().to_string();
    assert!(
        why.contains("no route to it") && why.contains("mend that first"),
        "{why}"
    );
    rig.assert_alive();
}

#[test]
fn a_standby_that_is_late_is_waited_for_and_one_that_stays_late_is_not() {
    let rig = Rig::new();
    let late = |ms| rig.say(|status| status.standby.as_mut().unwrap().unacknowledged_ms = ms);
    late(5_000);
    let why = rig.seat.fail().unwrap_err();
    assert!(matches!(why, NotFailed::Unsure { .. }), "{why:?}");
    assert!(why.to_string().contains("acknowledged nothing for 5000 ms"), "{why}");
    rig.assert_alive();
    std::thread::scope(|scope| {
        let failing = scope.spawn(|| rig.seat.fail());
        late(0);
        assert_eq!(failing.join().unwrap(), Ok(healthy(1).0.incarnation));
    });
    rig.wait("its end is noticed", |rig| rig.gone().len() == 1);
}

/// The status of one engine never kills another.
#[test]
fn an_engine_that_came_meanwhile_is_not_killed_for_the_one_that_was_asked() {
    let rig = Rig::new();
    let other = healthy(2);
    rig.write(Some(other.1));
    rig.say(|status| *status = other.0);
    assert!(matches!(rig.seat.fail(), Err(NotFailed::Ended { .. })));
    rig.assert_alive();
}
