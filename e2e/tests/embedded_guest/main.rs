//! The embedded guest under QEMU's emulation: every request, the journal over restarts, and faults that must be found.

mod client;
mod qemu;
mod wire;

use client::Client;
use ftvm_e2e::guest_journal::{self, HEADER_SECTORS, SECTOR_BYTES};
use ftvm_e2e::guest_protocol::{CHURN_WORD_ONLY, Checksum, MAX_PAYLOAD_BYTES, Op, REFUSED, fill_bulk, next_chain};
use qemu::{Disk, Guest};
use std::time::Duration;

const DISK_BYTES: u64 = 4 << 20;
/// For an echo on a busy machine. A neighbour that has moved is known to have from its own request on.
const ECHO: Duration = Duration::from_secs(20);

#[test]
fn increments_count_and_chain_and_pipelined_answers_keep_their_order() {
    let guest = Guest::start("increments", None, "vcpus=1");
    let mut client = guest.connect();
    let (mut chain, mut count) = (0, 0);
    for round in 0..3 {
        for seq in 1..=500 {
            client.send(Op::Increment, round * 1000 + seq, 0, 0);
        }
        for seq in 1..=500 {
            let answer = client.answer();
            count += 1;
            chain = next_chain(chain, round * 1000 + seq, count);
            assert_eq!(
                (answer.seq, answer.count, answer.chain),
                (round * 1000 + seq, count, chain)
            );
        }
    }
    let status = client.call(Op::Status, 1, 0, 0);
    assert_eq!(
        (status.count, status.chain, status.vcpus, status.boots),
        (1500, chain, 1, 0)
    );
    assert!(client.call(Op::Status, 2, 0, 0).guest_time_ns > status.guest_time_ns);
    assert!(client.call(Op::Journal, 3, 0, 0).refused(), "there is no disk");
    assert_eq!(
        client.call(Op::Status, 4, 0, 0).count,
        1500,
        "a refused request changes nothing"
    );
}

#[test]
fn several_connections_are_served_at_once() {
    let guest = Guest::start("connections", None, "");
    let mut clients: Vec<Client> = (0..8).map(|_| guest.connect()).collect();
    for round in 0..20 {
        clients
            .iter_mut()
            .for_each(|client| client.send(Op::Increment, round, 0, 0));
        let counts: Vec<u64> = clients.iter_mut().map(|client| client.answer().count).collect();
        let mut sorted = counts.clone();
        sorted.sort_unstable();
        assert_eq!(
            sorted,
            (round * 8 + 1..=round * 8 + 8).collect::<Vec<_>>(),
            "each increment counts once"
        );
    }
    drop(clients);
    for seq in 0..30 {
        assert_eq!(
            guest.connect().call(Op::Status, seq, 0, 0).count,
            160,
            "closed connections are free again"
        );
    }
}

#[test]
fn payloads_arrive_whole_in_both_directions() {
    let guest = Guest::start("payloads", None, "");
    let mut client = guest.connect();
    let size = 3_000_001;
    client.send(Op::Bulk, 77, size, 0);
    assert_eq!(client.answer().seq, 77);
    let data = client.bytes(size as usize);
    let mut expected = vec![0; size as usize];
    fill_bulk(77, 0, &mut expected);
    assert!(data == expected, "bulk data differs");

    client.send(Op::Sink, 78, size, 0);
    client.raw(&expected);
    client.send(Op::Increment, 79, 0, 0);
    assert_eq!(client.answer().chain, Checksum::of(&expected));
    assert_eq!(client.answer().count, 1, "the request behind a payload is found");

    assert!(client.call(Op::Bulk, 80, MAX_PAYLOAD_BYTES + 1, 0).refused());
    assert!(client.call(Op::Sink, 81, MAX_PAYLOAD_BYTES + 1, 0).refused());
    assert!(
        client.at_end(),
        "what follows a refused sink can't be told from requests"
    );
}

#[test]
fn what_is_not_a_request_is_refused() {
    let guest = Guest::start("refusals", None, "unknown=word churn_pages=x");
    let mut client = guest.connect();
    let answer = client.call_raw(999, 5, 0, 0);
    assert_eq!((answer.op, answer.seq), (999 | REFUSED, 5));
    assert!(
        client.call(Op::SetChurn, 6, u64::MAX, 0).refused(),
        "more pages than RAM"
    );
    assert!(client.call(Op::SetWork, 7, 2, 0).refused());
    assert!(client.call(Op::Damage, 8, 0, 0).refused(), "there is no churn");
    client.raw(&[0x55; 64]);
    assert!(client.at_end(), "a stream out of step is cut");
    assert_eq!(guest.connect().call(Op::Status, 9, 0, 0).count, 0);
}

#[test]
fn churn_dirties_checks_and_finds_damage() {
    let guest = Guest::start("churn", None, "vcpus=2 churn_pages=300 churn_rate=500");
    let mut client = guest.connect();
    let clean = client.call(Op::Verify, 1, 0, 0);
    assert_eq!((clean.vcpus, clean.memory_errors), (2, 0));
    for (pages, mode) in [(1, 0), (1001, 0), (3, 0), (1001, CHURN_WORD_ONLY)] {
        let before = client.call(Op::SetChurn, 2, pages, mode).churned_pages;
        let dirtied = |client: &mut Client| client.call(Op::Status, 3, 0, 0).churned_pages - before;
        client.until("the churn goes round twice", |client| dirtied(client) > 2 * pages);
        assert_eq!(
            client.call(Op::Verify, 4, 0, 0).memory_errors,
            0,
            "{pages} pages, mode {mode:#x}"
        );
    }

    // At this rate a page that is damaged now is not rewritten before the check, which counts it once.
    let mut errors = 0;
    for (page, word) in [(0, 0), (500, 1), (999, 2), (998, 3), (700, 4), (300, 511)] {
        for mode in [0, CHURN_WORD_ONLY] {
            client.call(Op::SetChurn, 5, 1000, 1 | mode);
            assert!(!client.call(Op::Damage, 6, page, word).refused());
            errors += 1;
            assert_eq!(
                client.call(Op::Verify, 7, 0, 0).memory_errors,
                errors,
                "page {page}, word {word}, mode {mode:#x}"
            );
        }
    }
    let quiet = client.call(Op::SetChurn, 8, 0, 0);
    assert_eq!(
        client.call(Op::Status, 9, 0, 0).churned_pages,
        quiet.churned_pages,
        "0 pages stop the churn"
    );
}

#[test]
fn the_background_check_finds_damage_without_being_asked() {
    let guest = Guest::start(
        "background",
        None,
        "vcpus=2 churn_pages=64 churn_rate=1 check_pages=2000",
    );
    let mut client = guest.connect();
    client.until("the pages are filled", |client| {
        client.call(Op::Status, 1, 0, 0).churned_pages > 0
    });
    assert_eq!(client.call(Op::Status, 2, 0, 0).memory_errors, 0);
    assert!(!client.call(Op::Damage, 3, 60, 200).refused());
    client.until("the damage is found", |client| {
        client.call(Op::Status, 4, 0, 0).memory_errors > 0
    });
}

#[test]
fn work_goes_on_while_requests_are_answered() {
    let guest = Guest::start("work", None, "vcpus=2");
    let mut client = guest.connect();
    let idle = client.call(Op::Status, 1, 0, 0).work;
    client.call(Op::SetWork, 2, 1, 0);
    client.until("work is done", |client| {
        client.call(Op::Increment, 3, 0, 0).work > idle + 1000
    });
    client.call(Op::SetWork, 4, 0, 0);
    // A vCPU finishes the piece it is at.
    let mut last = client.call(Op::Status, 5, 0, 0).work;
    client.until("work stops", |client| {
        std::mem::replace(&mut last, client.call(Op::Status, 6, 0, 0).work) == last
    });
}

#[test]
fn the_journal_survives_reset_power_off_and_kill() {
    let disk = Disk::create("journal", DISK_BYTES);
    let mut guest = Guest::start("journal-1", Some(&disk), "vcpus=1");
    let mut client = guest.connect();
    for seq in 1..=100 {
        client.send(Op::Journal, seq, 0, 0);
    }
    for seq in 1..=100 {
        let answer = client.answer();
        assert_eq!((answer.seq, answer.count, answer.boots), (seq, seq, 1));
        assert!(answer.journal_seq >= seq, "answered before it was durable");
    }
    let chain = client.call(Op::Verify, 101, 0, 0).chain;
    assert_eq!(client.call(Op::Status, 102, 0, 0).journal_errors, 0);
    client.call(Op::Increment, 103, 0, 0);

    client.call(Op::Reset, 104, 0, 0);
    guest.wait_ready();
    let mut client = guest.connect();
    let status = client.call(Op::Status, 1, 0, 0);
    assert_eq!(
        (status.boots, status.count, status.chain),
        (2, 100, chain),
        "the count is that of the last record"
    );
    assert_eq!((status.journal_seq, status.journal_errors), (100, 0));

    client.call(Op::PowerOff, 2, 0, 0);
    guest.wait_end();

    let guest = Guest::start("journal-2", Some(&disk), "vcpus=1");
    let mut client = guest.connect();
    assert_eq!(client.call(Op::Status, 1, 0, 0).boots, 3);
    (0..2000).for_each(|seq| client.send(Op::Journal, seq, 0, 0));
    let acknowledged = (0..700).map(|_| client.answer().journal_seq).max().unwrap_or(0);
    drop(guest); // kills it amidst its writes

    let guest = Guest::start("journal-3", Some(&disk), "vcpus=1");
    let status = guest.connect().call(Op::Verify, 1, 0, 0);
    assert_eq!((status.boots, status.journal_errors), (4, 0));
    assert!(
        status.journal_seq >= acknowledged,
        "{} after {acknowledged} was acknowledged",
        status.journal_seq
    );
}

#[test]
fn the_journal_wraps_around_a_small_disk() {
    // A little more than what is written together: the ring wraps after every other batch.
    let records = 97;
    let disk = Disk::create("wrap", (HEADER_SECTORS + records) * SECTOR_BYTES as u64);
    let guest = Guest::start("wrap-1", Some(&disk), "");
    let mut client = guest.connect();
    (0..500).for_each(|seq| client.send(Op::Journal, seq, 0, 0));
    let last = (0..500).map(|_| client.answer()).last().expect("500 answers");
    assert_eq!((last.journal_seq, last.journal_errors), (500, 0));
    assert_eq!(client.call(Op::Verify, 500, 0, 0).journal_errors, 0);
    drop(guest);
    let guest = Guest::start("wrap-2", Some(&disk), "");
    let status = guest.connect().call(Op::Status, 1, 0, 0);
    assert_eq!((status.journal_seq, status.journal_errors, status.count), (500, 0, 500));
}

#[test]
fn a_damaged_journal_is_reported_at_start_and_when_asked() {
    let disk = Disk::create("damaged", DISK_BYTES);
    let guest = Guest::start("damaged-1", Some(&disk), "");
    let mut client = guest.connect();
    (1..=20).for_each(|seq| assert_eq!(client.call(Op::Journal, seq, 0, 0).journal_errors, 0));
    let capacity = guest_journal::capacity(DISK_BYTES / SECTOR_BYTES as u64);
    let record = |seq| guest_journal::sector_of(seq, capacity) * SECTOR_BYTES as u64;
    disk.flip(record(7) + 100);
    let found = client.call(Op::Verify, 21, 0, 0).journal_errors;
    assert!(found > 0, "a flipped bit in record 7 is not found");
    disk.flip(record(7) + 100);
    assert_eq!(
        client.call(Op::Verify, 22, 0, 0).journal_errors,
        found,
        "mended, so no further error"
    );
    disk.zero(record(20), SECTOR_BYTES);
    assert!(
        client.call(Op::Verify, 23, 0, 0).journal_errors > found,
        "the lost last record is not missed"
    );
    drop(guest);

    disk.flip(record(3) + 17);
    let guest = Guest::start("damaged-2", Some(&disk), "");
    let status = guest.connect().call(Op::Status, 1, 0, 0);
    assert_eq!(
        (status.boots, status.journal_errors),
        (2, 1),
        "record 3 is bad, 20 was not known to be durable"
    );
}

#[test]
fn two_disks_have_the_same_journal() {
    let [first, second] = ["first", "second"].map(|name| Disk::create(name, DISK_BYTES));
    let guest = Guest::start("two-1", [&first, &second], "");
    let mut client = guest.connect();
    (1..=20).for_each(|seq| assert_eq!(client.call(Op::Journal, seq, 0, 0).journal_errors, 0));
    assert_eq!(client.call(Op::Verify, 21, 0, 0).journal_errors, 0);
    let capacity = guest_journal::capacity(DISK_BYTES / SECTOR_BYTES as u64);
    let record = |seq| guest_journal::sector_of(seq, capacity) * SECTOR_BYTES as u64;
    second.flip(record(7) + 100);
    assert!(
        client.call(Op::Verify, 22, 0, 0).journal_errors > 0,
        "the second disk is not read back"
    );
    second.flip(record(7) + 100);
    drop(guest);

    // A record that was under way may be on one disk alone.
    second.zero(record(20), SECTOR_BYTES);
    let guest = Guest::start("two-2", [&first, &second], "");
    let status = guest.connect().call(Op::Verify, 1, 0, 0);
    assert_eq!(
        (status.boots, status.journal_seq, status.count, status.journal_errors),
        (2, 20, 20, 0),
        "what one disk has the other one gets"
    );
    drop(guest);

    second.zero(record(20), SECTOR_BYTES);
    let guest = Guest::start("two-3", [&first, &second], "");
    let mut client = guest.connect();
    let refused = client.call(Op::Journal, 1, 0, 0);
    assert!(
        refused.refused() && refused.journal_errors > 0,
        "a durable record that one disk lacks is missed"
    );
}

#[test]
fn arp_ping_and_a_neighbour_that_moves() {
    let mut wire = wire::Wire::open();
    let _guest = Guest::start_on("wire", None, "ip=10.9.0.2/24 gw=none", &wire.netdev());
    let guest_mac = wire.arp(wire::MAC_A);
    wire.ping(wire::MAC_A, guest_mac, ECHO);
    wire.ping(wire::MAC_B, guest_mac, ECHO);
    wire.ping(wire::MAC_A, guest_mac, ECHO);
}
