//! Whom a seat asks before it boots its disk (rule 8).

use ftvm_protocol::core::{Event, GuestReport, Refusal, RoleName};
use ftvm_protocol::identity::SeatId;
use ftvm_protocol::record::Snapshot;

use crate::bench::Bench;

/// A seat that waits to boot asks for the seats that there are, not for those that there were when its engine began.
#[test]
fn a_seat_that_was_replaced_keeps_nobody_from_booting() {
    let mut bench = Bench::new();
    bench.pass(100);
    bench.power_cut(1, GuestReport::Unknown);
    bench.pass(2_000);
    let waiting = bench.seats[0].core.status();
    assert_eq!(
        waiting.refused,
        Some(Refusal::OtherHeaderUnreadable(bench.seats[1].me.seat))
    );
    bench.step(0, Event::OtherSeats(vec![SeatId(3)]));
    bench.pass(2_000);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Active);
}

/// The arbiter was restored to a record that names the first seat alone. That one lost its power before it could note that the other one is a member, and
/// the other one has gone on since: nothing but its header says so. It has no pod now: whoever leaves it out boots an old disk.
#[test]
fn a_seat_that_cant_be_asked_yet_is_waited_for_though_the_record_does_not_name_it() {
    for (others, boots) in [(vec![SeatId(2)], false), (Vec::new(), true)] {
        let mut bench = Bench::new();
        bench.pass(100);
        let alone = bench.record.clone().expect("a record");
        let noted = bench.seats[0].header.clone();
        assert!(alone.record.members.is_only(bench.seats[0].me), "{alone:?}");
        bench.connect();
        bench.pass(500);
        assert!(bench.seats[0].core.status().protected);
        bench.seats[0].header = noted;
        if let Some(header) = &mut bench.seats[1].header {
            header.term += 5;
        }
        let version = bench.record.as_ref().map_or(0, |found| found.version) + 1;
        bench.record = Some(Snapshot { version, ..alone });
        bench.power_cut(1, GuestReport::None);
        bench.step(0, Event::OtherSeats(others));
        bench.pass(2_000);
        let status = bench.seats[0].core.status();
        assert_eq!(status.role == RoleName::Active, boots, "{status:?}");
        if boots {
            continue;
        }
        assert_eq!(status.refused, Some(Refusal::OtherHeaderUnreadable(SeatId(2))));
        // Its pod is there, and its daemon answers.
        bench.seats[1].lost = None;
        bench.pass(2_000);
        let status = bench.seats[0].core.status();
        assert_eq!(status.refused, Some(Refusal::OtherHeaderAbove(SeatId(2))));
    }
}
