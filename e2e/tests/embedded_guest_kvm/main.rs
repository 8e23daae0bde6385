//! The embedded guest on the engine's machine, on real KVM, without protection: does every device do its part, and does a
//! machine that was saved amidst traffic go on in another one?

#[path = "../embedded_guest/client.rs"]
#[allow(dead_code)]
mod client;
mod vm;

use ftvm_e2e::guest_protocol::{CHURN_WORD_ONLY, Checksum, Op, fill_bulk, next_chain};
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
    for vcpus in [1, 2] {
        let lab = Lab::new(&format!("move{vcpus}"));
        let mut vm = Vm::boot(&lab, vcpus, "churn_pages=2000 churn_rate=20000");
        let mut client = lab.connect();
        let (mut seq, mut chain, mut time_ns, mut journal) = (0, 0, 0, 0);
        for round in 0..8 {
            let moved = std::thread::scope(|scope| {
                let moving = scope.spawn(|| vm.move_to_another(&lab));
                // Requests go on until the move is over, and a bit longer.
                let mut after = 0;
                while after < 20 {
                    let op = if seq % 4 == 0 { Op::Journal } else { Op::Increment };
                    let answer = client.call(op, seq, 0, 0);
                    seq += 1;
                    chain = next_chain(chain, seq - 1, seq);
                    assert_eq!((answer.count, answer.chain), (seq, chain), "round {round}");
                    assert!(answer.guest_time_ns > time_ns, "guest time steps back in round {round}");
                    assert!(answer.journal_seq >= journal);
                    (time_ns, journal) = (answer.guest_time_ns, answer.journal_seq);
                    after += u32::from(moving.is_finished());
                }
                moving.join().expect("the move succeeds")
            });
            vm = moved;
            let checked = client.call(Op::Verify, 0, 0, 0);
            assert_eq!((checked.memory_errors, checked.journal_errors), (0, 0), "round {round}");
        }
    }
}
