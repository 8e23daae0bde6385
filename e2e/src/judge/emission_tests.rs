//! Synthetic captures.
use std::time::{Duration, Instant};

use super::*;

const A: usize = 0;
const B: usize = 1;

fn data(seq: u32, payload: &[u8]) -> Packet<'_> {
    Packet::Tcp(Segment {
        source: "10.77.0.2:7777".parse().unwrap(),
        destination: "10.77.0.1:40000".parse().unwrap(),
        seq,
        ack: 1,
        syn: false,
        fin: false,
        rst: false,
        payload,
    })
}

fn with(packet: Packet<'_>, change: impl FnOnce(&mut Segment<'_>)) -> Packet<'_> {
    let Packet::Tcp(mut segment) = packet else {
        unreachable!()
    };
    change(&mut segment);
    Packet::Tcp(segment)
}

fn after(frames: &[(usize, Packet<'_>)]) -> EmissionReport {
    let mut emissions = Emissions::default();
    frames
        .iter()
        .for_each(|(host, packet)| emissions.observe(Instant::now(), *host, packet));
    emissions.report().clone()
}

#[test]
fn a_clean_failover_is_one_handover() {
    let report = after(&[
        (A, data(1000, b"one")),
        (A, data(1003, b"two")),
        // The successor sends the last epoch's frames once more, then goes on.
        (B, data(1003, b"two")),
        (B, data(1006, b"three")),
    ]);
    assert_eq!(
        (
            report.handovers,
            report.dual_active,
            report.rewritten,
            report.late_repeats
        ),
        (1, 0, 0, 0)
    );
    assert_eq!(report.frames, BTreeMap::from([(A, 2), (B, 2)]));
}

#[test]
fn a_repetition_alone_is_no_handover() {
    let report = after(&[
        (A, data(1000, b"one")),
        (B, data(1000, b"one")),
        (A, data(1003, b"two")),
    ]);
    assert_eq!((report.handovers, report.dual_active), (0, 0));
}

#[test]
fn a_deposed_host_with_news_is_dual_active() {
    let report = after(&[
        (A, data(1000, b"one")),
        (B, data(1003, b"two")),
        (A, data(1006, b"three")),
    ]);
    assert_eq!((report.handovers, report.dual_active, report.rewritten), (1, 1, 0));
}

#[test]
fn a_deposed_host_may_repeat_what_was_said() {
    let report = after(&[
        (A, data(1000, b"one")),
        (B, data(1003, b"two")),
        (A, data(1000, b"one")),
        (A, data(1003, b"two")),
    ]);
    assert_eq!((report.dual_active, report.rewritten, report.late_repeats), (0, 0, 2));
}

#[test]
fn a_partly_new_segment_is_news() {
    let report = after(&[
        (A, data(1000, b"one")),
        (B, data(1003, b"two")),
        (A, data(1003, b"twox")),
    ]);
    assert_eq!((report.dual_active, report.rewritten), (1, 0));
}

#[test]
fn other_bytes_at_the_same_place_are_two_histories() {
    let report = after(&[
        (A, data(1000, b"one")),
        (A, data(1003, b"two")),
        (B, data(1000, b"onetwi")),
    ]);
    assert_eq!((report.dual_active, report.rewritten), (0, 1));
}

#[test]
fn a_rebuilt_host_may_speak_again() {
    let mut emissions = Emissions::default();
    emissions.observe(Instant::now(), A, &data(1000, b"one"));
    emissions.observe(Instant::now(), B, &data(1003, b"two"));
    emissions.rebuilt(A);
    emissions.observe(Instant::now(), A, &data(1006, b"three"));
    assert_eq!((emissions.report().handovers, emissions.report().dual_active), (2, 0));
    assert_eq!(emissions.speaker(), Some(A));
    // Now the other one is deposed.
    emissions.observe(Instant::now(), B, &data(1011, b"four"));
    assert_eq!(emissions.report().dual_active, 1);
}

/// It took over twice before any status said that it was rebuilt: the record's history does.
#[test]
fn a_host_that_held_the_record_was_rebuilt() {
    let begin = Instant::now();
    let at = |ms: u64| begin + Duration::from_millis(ms);
    let play = || {
        let mut emissions = Emissions::default();
        emissions.observe(at(0), A, &data(1000, b"one"));
        emissions.observe(at(10), B, &data(1003, b"two"));
        emissions.observe(at(20), A, &data(1006, b"three"));
        emissions.observe(at(21), A, &data(1011, b"four"));
        emissions
    };
    let dual = |emissions: &Emissions| emissions.report().dual_active;
    // The holders, by when they won.
    let holders = |changes: &'static [(u64, usize)]| {
        move |host: usize, when: Instant| {
            let mut before = changes.iter().rev().filter(|(ms, _)| at(*ms) <= when);
            before.next().is_some_and(|(_, holder)| *holder == host)
        }
    };
    let mut emissions = play();
    assert_eq!(dual(&emissions), 2);
    emissions.explain(holders(&[(0, A), (9, B)]));
    assert_eq!(dual(&emissions), 2, "B holds it");
    emissions.explain(holders(&[(0, A), (9, B), (20, A)]));
    assert_eq!((dual(&emissions), emissions.report().handovers), (0, 2));
    assert_eq!(emissions.speaker(), Some(A));
    emissions.observe(at(30), A, &data(1015, b"five"));
    assert_eq!(dual(&emissions), 0);
    // Deposed now, as if nobody had been explained.
    emissions.observe(at(31), B, &data(1019, b"six"));
    assert_eq!(dual(&emissions), 1);
    // Two at once: the former one goes on, though the record went to the other.
    let mut emissions = play();
    emissions.observe(at(22), B, &data(1015, b"five"));
    emissions.explain(holders(&[(0, A), (9, B), (20, A)]));
    assert_eq!(dual(&emissions), 3);
}

#[test]
fn numbers_wrap_around() {
    let start = u32::MAX - 1;
    let report = after(&[
        (A, data(start, b"abcd")),
        (B, data(2, b"ef")),
        (A, data(start, b"abcd")),
        (A, data(4, b"gh")),
    ]);
    assert_eq!(
        (
            report.handovers,
            report.late_repeats,
            report.dual_active,
            report.rewritten
        ),
        (1, 1, 1, 0)
    );
}

#[test]
fn fins_and_syns_are_content() {
    let fin = with(data(1003, b""), |segment| segment.fin = true);
    let report = after(&[(A, data(1000, b"one")), (B, fin), (A, fin), (A, data(1000, b"one"))]);
    assert_eq!((report.handovers, report.dual_active, report.late_repeats), (1, 0, 2));

    let syn = |seq| with(data(seq, b""), |segment| segment.syn = true);
    let report = after(&[
        (A, syn(10)),
        (A, syn(10)),
        (B, syn(10)),
        (B, data(11, b"x")),
        (A, syn(5_000_000)),
    ]);
    assert_eq!(
        (report.handovers, report.dual_active),
        (1, 1),
        "another answer to the same SYN is a second speaker"
    );
}

#[test]
fn a_hole_hides_bytes_but_not_news() {
    let report = after(&[
        (A, data(1000, b"one")),
        (A, data(2000, b"two")),
        (B, data(1500, b"old")),
        (B, data(2003, b"x")),
    ]);
    assert_eq!((report.handovers, report.dual_active, report.rewritten), (1, 0, 0));
}

#[test]
fn acknowledgments_and_other_frames_bring_nothing() {
    let report = after(&[
        (A, data(1000, b"one")),
        (B, data(1003, b"")),
        (B, Packet::Other),
        (A, data(1003, b"two")),
    ]);
    assert_eq!((report.handovers, report.dual_active), (0, 0));
}

#[test]
fn memory_is_bounded() {
    let mut emissions = Emissions::default();
    let payload = vec![7; 60_000];
    for index in 0..100u32 {
        emissions.observe(Instant::now(), A, &data(index * 60_000, &payload));
    }
    assert!(emissions.streams.values().all(|stream| stream.tail.len() <= KEPT_BYTES));
    for port in 0..=u16::MAX {
        let packet = with(data(1, b"x"), |segment| segment.destination.set_port(port));
        emissions.observe(Instant::now(), A, &packet);
    }
    assert!(emissions.streams.len() <= STREAMS_MAX);
}
