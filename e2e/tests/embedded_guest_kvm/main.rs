//! The embedded guest on the engine's machine, on real KVM, without protection: does every device do its part, and does a
//! machine that was saved amidst traffic go on in another one?

#[path = "../embedded_guest/client.rs"]
#[allow(dead_code)]
mod client;
mod vm;

use client::Client;
use ftvm_e2e::guest_blocks::{BLOCK_REPORT_BYTES, BlockLoad, BlockReport};
use ftvm_e2e::guest_protocol::{CHURN_WORD_ONLY, Checksum, Op, fill_bulk, next_chain};
use std::sync::atomic::{AtomicBool, Ordering};
use vm::{Lab, Vm};

#[test]
fn every_request_works() {
    let lab = Lab::new("requests");
    let vm = Vm::boot(&lab, 2, "");
    let mut client = lab.connect();
    let status = client.call(Op::Status, 1, 0, 0);
    assert_eq!((status.vcpus, status.boots, status.count), (2, 1, 0));
    let mut chain = 0;
    for seq in 0..500 {
        client.send(Op::Increment, seq, 0, 0);
    }
    for seq in 0..500 {
        chain = next_chain(chain, seq, seq + 1);
        assert_eq!(client.answer().chain, chain);
    }
    for seq in 0..200 {
        client.send(Op::Journal, seq, 0, 0);
    }
    let last = (0..200).map(|_| client.answer()).last().expect("200 answers");
    assert_eq!((last.journal_seq, last.journal_errors), (200, 0));

    let mut data = vec![0; 2_000_003];
    fill_bulk(5, 0, &mut data);
    client.send(Op::Bulk, 5, data.len() as u64, 0);
    client.answer();
    assert!(client.bytes(data.len()) == data, "bulk data differs");
    client.send(Op::Sink, 6, data.len() as u64, 0);
    client.raw(&data);
    assert_eq!(client.answer().chain, Checksum::of(&data));

    for mode in [0, CHURN_WORD_ONLY] {
        let before = client.call(Op::SetChurn, 7, 2000, mode).churned_pages;
        client.until("churn", |client| {
            client.call(Op::Status, 8, 0, 0).churned_pages > before + 10_000
        });
        assert_eq!(client.call(Op::Verify, 9, 0, 0).memory_errors, 0);
    }
    client.call(Op::SetChurn, 10, 2000, 1);
    client.call(Op::Damage, 11, 1999, 99);
    assert_eq!(client.call(Op::Verify, 12, 0, 0).memory_errors, 1);
    drop(vm);
}

#[test]
fn reset_in_place_and_power_off() {
    let lab = Lab::new("reset");
    let mut vm = Vm::boot(&lab, 2, "");
    let mut client = lab.connect();
    assert_eq!(client.call(Op::Journal, 1, 0, 0).count, 1);
    client.call(Op::Reset, 2, 0, 0);
    vm.expect_reset();
    let mut client = lab.connect();
    let status = client.call(Op::Status, 3, 0, 0);
    assert_eq!((status.boots, status.count, status.journal_errors), (2, 1, 0));
    client.call(Op::PowerOff, 4, 0, 0);
    vm.expect_power_off();
}

#[test]
fn a_machine_saved_amidst_traffic_goes_on_in_another() {
    const MOVES: u32 = 6;
    for vcpus in [1, 4] {
        let lab = Lab::new(&format!("move{vcpus}"));
        let mut vm = Vm::boot(&lab, vcpus, "churn_pages=2000 churn_rate=20000 check_pages=2000");
        let (mut counter, mut journal, mut bulk) = (lab.connect(), lab.connect(), lab.connect());
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = StopOnDrop(&over); // a failed assertion ends the other threads too
            let clients = [
                scope.spawn(|| count(&mut counter, &over)),
                scope.spawn(|| pipeline_records(&mut journal, &over)),
                scope.spawn(|| download_and_upload(&mut bulk, &over)),
            ];
            for _ in 0..MOVES {
                vm = vm.move_to_another(&lab);
                // Some traffic between two moves.
                let mut client = lab.connect();
                let checked = client.call(Op::Verify, 0, 0, 0);
                assert_eq!((checked.memory_errors, checked.journal_errors), (0, 0), "{vcpus} vCPUs");
            }
            // The machine runs until the last answer has come.
            drop(stop);
            for client in clients {
                client.join().expect("every answer was right");
            }
        });
    }
}

fn report(client: &mut Client) -> BlockReport {
    assert!(!client.answer().refused());
    let bytes = client.bytes(BLOCK_REPORT_BYTES);
    BlockReport::decode(&bytes.try_into().expect("so many were read"))
}

/// What the disk had under way is done again by the other machine: nothing is lost, and each request is answered once.
#[test]
fn a_machine_saved_amidst_a_block_load_goes_on_in_another() {
    let lab = Lab::new("blocks");
    let mut vm = Vm::boot(&lab, 1, "");
    let (mut client, mut journal) = (lab.connect(), lab.connect());
    let write = BlockLoad {
        writes: true,
        random: false,
        block_bytes: 64 << 10,
        depth: 8,
        flush_every: 0,
        limit_ms: 0,
        limit_requests: 128,
    };
    let loads = [
        write,
        BlockLoad {
            random: true,
            block_bytes: 4 << 10,
            depth: 32,
            flush_every: 7,
            limit_ms: 1000,
            limit_requests: 0,
            ..write
        },
        BlockLoad {
            writes: false,
            random: true,
            depth: 32,
            limit_ms: 1000,
            limit_requests: 0,
            ..write
        },
        BlockLoad { writes: false, ..write },
    ];
    for load in loads {
        let (arg, arg2) = load.encode();
        client.send(Op::Block, 1, arg, arg2);
        if load.limit_ms > 0 {
            for seq in 0..2 {
                // Once this is answered the guest has the load as well.
                assert_eq!(journal.call(Op::Journal, seq, 0, 0).journal_errors, 0);
                vm = vm.move_to_another(&lab);
            }
        }
        let found = report(&mut client);
        assert!(found.requests > 0, "{found:?}");
        assert_eq!(
            (found.bytes, found.failed, found.wrong_units),
            (found.requests * u64::from(load.block_bytes), 0, 0),
            "{load:?}: {found:?}"
        );
    }
    let checked = client.call(Op::Verify, 3, 0, 0);
    assert_eq!(
        (checked.journal_seq, checked.journal_errors, checked.memory_errors),
        (4, 0, 0)
    );
    drop(vm);
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Requests one by one: no answer is lost, and the guest's count, journal and clock never go back.
fn count(client: &mut Client, over: &AtomicBool) {
    let mut last = client.call(Op::Status, 0, 0, 0);
    let mut seq = 0;
    while !over.load(Ordering::Relaxed) {
        seq += 1;
        let answer = client.call(Op::Increment, seq, 0, 0);
        assert!(answer.count > last.count && answer.journal_seq >= last.journal_seq);
        assert!(answer.guest_time_ns > last.guest_time_ns, "guest time steps back");
        last = answer;
    }
}

/// Twenty journal requests under way at a time.
fn pipeline_records(client: &mut Client, over: &AtomicBool) {
    let (mut sent, mut received) = (0, 0);
    while !over.load(Ordering::Relaxed) || received < sent {
        while sent < received + 20 && !over.load(Ordering::Relaxed) {
            client.send(Op::Journal, sent, 0, 0);
            sent += 1;
        }
        let answer = client.answer();
        assert_eq!(
            (answer.seq, answer.refused(), answer.journal_errors),
            (received, false, 0)
        );
        received += 1;
    }
}

/// Data in both directions.
fn download_and_upload(client: &mut Client, over: &AtomicBool) {
    let mut data = vec![0; 500_001];
    for seq in 0.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        fill_bulk(seq, 0, &mut data);
        client.send(Op::Bulk, seq, data.len() as u64, 0);
        client.answer();
        assert!(client.bytes(data.len()) == data, "bulk data {seq} differs");
        client.send(Op::Sink, seq, data.len() as u64, 0);
        client.raw(&data);
        assert_eq!(client.answer().chain, Checksum::of(&data));
    }
}
