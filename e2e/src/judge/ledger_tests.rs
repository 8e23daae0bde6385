//! Each way in which a guest can go back on its word, and that it is noticed once.
use super::*;

/// A guest that keeps its word, as the protocol describes it.
#[derive(Clone, Default)]
struct Guest {
    count: u64,
    chain: u64,
    time: u64,
    journal: u64,
    boots: u32,
}

impl Guest {
    fn answer(&mut self, op: Op, seq: u64) -> Answer {
        self.time += 1000;
        if increments(op) {
            self.count += 1;
            self.chain = next_chain(self.chain, seq, self.count);
        }
        self.journal += u64::from(op == Op::Journal);
        Answer {
            op: op as u32,
            seq,
            count: self.count,
            chain: self.chain,
            guest_time_ns: self.time,
            journal_seq: self.journal,
            boots: self.boots,
            ..Answer::default()
        }
    }
}

/// Both sides after some honest work.
fn after_work() -> (Ledger, Guest) {
    let (mut ledger, mut guest) = (
        Ledger::new(100),
        Guest {
            boots: 3,
            ..Guest::default()
        },
    );
    for op in [
        Op::Status,
        Op::Increment,
        Op::Journal,
        Op::Increment,
        Op::Status,
        Op::Increment,
    ] {
        let seq = ledger.send(op);
        ledger.take(&guest.answer(op, seq));
    }
    assert!(ledger.findings().is_clean(), "{:?}", ledger.findings());
    (ledger, guest)
}

/// Lets the guest answer one more request, which `lie` may change, and tells what was found.
fn findings_after(op: Op, lie: impl FnOnce(&mut Guest, &mut Answer)) -> Findings {
    let (mut ledger, mut guest) = after_work();
    let seq = ledger.send(op);
    let mut answer = guest.answer(op, seq);
    lie(&mut guest, &mut answer);
    ledger.take(&answer);
    // From here on it keeps its word: nothing may be counted twice.
    let seq = ledger.send(Op::Status);
    let mut answer = Answer {
        seq,
        op: Op::Status as u32,
        ..answer
    };
    answer.guest_time_ns += 1;
    ledger.take(&answer);
    ledger.findings().clone()
}

#[test]
fn pipelined_answers_are_predicted() {
    let (mut ledger, mut guest) = after_work();
    let seqs: Vec<u64> = (0..10).map(|_| ledger.send(Op::Increment)).collect();
    assert_eq!(ledger.outstanding(), 10);
    for seq in seqs {
        assert_eq!(ledger.due().map(|sent| sent.seq), Some(seq));
        ledger.take(&guest.answer(Op::Increment, seq));
    }
    assert!(ledger.findings().is_clean());
    assert_eq!(ledger.count(), guest.count);
}

#[test]
fn forgotten_increments_are_lost_answers() {
    let found = findings_after(Op::Status, |_, answer| answer.count -= 2);
    assert_eq!(
        found,
        Findings {
            lost_answers: 2,
            ..Findings::default()
        }
    );
    // An increment that is applied to a state that forgot one before.
    let found = findings_after(Op::Increment, |_, answer| answer.count -= 1);
    assert_eq!(
        found,
        Findings {
            lost_answers: 1,
            ..Findings::default()
        }
    );
}

#[test]
fn another_chain_is_another_history() {
    let found = findings_after(Op::Increment, |_, answer| answer.chain ^= 1);
    assert_eq!(
        found,
        Findings {
            contradictions: 1,
            ..Findings::default()
        }
    );
    assert_eq!(found.lost_in_all(), 1);
}

#[test]
fn a_request_that_is_carried_out_twice_is_noticed() {
    let found = findings_after(Op::Increment, |_, answer| answer.count += 1);
    assert_eq!(
        found,
        Findings {
            applied_twice: 1,
            ..Findings::default()
        }
    );
}

#[test]
fn restarts_clocks_and_journals_are_watched() {
    let found = findings_after(Op::Status, |_, answer| answer.boots += 1);
    assert_eq!(
        found,
        Findings {
            reboots: 1,
            ..Findings::default()
        }
    );
    let found = findings_after(Op::Status, |_, answer| answer.guest_time_ns = 5);
    assert_eq!(
        found,
        Findings {
            time_steps_back: 1,
            ..Findings::default()
        }
    );
    let found = findings_after(Op::Status, |_, answer| answer.journal_seq = 0);
    assert_eq!(
        found,
        Findings {
            lost_journal_records: 1,
            ..Findings::default()
        }
    );
    let found = findings_after(Op::Journal, |_, answer| answer.journal_seq -= 1);
    assert_eq!(
        found,
        Findings {
            lost_journal_records: 1,
            ..Findings::default()
        }
    );
    let found = findings_after(Op::Verify, |_, answer| {
        (answer.memory_errors, answer.journal_errors) = (2, 3)
    });
    assert_eq!(
        found,
        Findings {
            memory_errors: 2,
            journal_errors: 3,
            ..Findings::default()
        }
    );
}

#[test]
fn answers_out_of_turn_twice_or_refused_are_noticed() {
    let (mut ledger, mut guest) = after_work();
    let seq = ledger.send(Op::Status);
    let answer = guest.answer(Op::Status, seq);
    assert!(ledger.take(&answer).is_some());
    assert!(ledger.take(&answer).is_none());
    assert_eq!(
        *ledger.findings(),
        Findings {
            duplicated_answers: 1,
            ..Findings::default()
        }
    );

    let (mut ledger, mut guest) = after_work();
    let (_, second) = (ledger.send(Op::Status), ledger.send(Op::Status));
    ledger.take(&guest.answer(Op::Status, second));
    ledger.take(&guest.answer(Op::Status, 1 << 40));
    assert_eq!(
        *ledger.findings(),
        Findings {
            out_of_step: 2,
            ..Findings::default()
        }
    );

    let found = findings_after(Op::Status, |_, answer| answer.op |= REFUSED);
    assert_eq!(found.refused, 1);
    let found = findings_after(Op::Status, |_, answer| answer.op = Op::Verify as u32);
    assert_eq!(found.out_of_step, 1);
}

#[test]
fn sinks_are_compared_by_checksum_and_leave_the_chain_alone() {
    let (mut ledger, mut guest) = after_work();
    for wrong in [0, 1] {
        let seq = ledger.send(Op::Sink);
        ledger.send_payload(b"payload");
        let mut answer = guest.answer(Op::Sink, seq);
        answer.chain = Checksum::of(b"payload") ^ wrong;
        ledger.take(&answer);
        let seq = ledger.send(Op::Increment);
        ledger.take(&guest.answer(Op::Increment, seq));
        assert_eq!(
            *ledger.findings(),
            Findings {
                corrupt_payloads: wrong,
                ..Findings::default()
            }
        );
    }
}

#[test]
fn an_inspection_allows_what_was_open_and_nothing_else() {
    let (mut ledger, mut guest) = after_work();
    let open: Vec<u64> = (0..3).map(|_| ledger.send(Op::Increment)).collect();
    let before = guest.clone();
    let mut states = vec![guest.answer(Op::Status, 0)];
    states.extend(open.iter().map(|seq| guest.answer(Op::Increment, *seq)));
    for state in &states {
        let mut copy = ledger.clone();
        copy.inspect(state);
        assert!(copy.findings().is_clean(), "{:?} at {state:?}", copy.findings());
    }
    let check = |change: &dyn Fn(&mut Answer), expected: Findings| {
        let (mut copy, mut state) = (ledger.clone(), before.clone().answer(Op::Status, 0));
        change(&mut state);
        copy.inspect(&state);
        assert_eq!(*copy.findings(), expected);
    };
    check(
        &|state| state.count -= 1,
        Findings {
            lost_answers: 1,
            ..Findings::default()
        },
    );
    check(
        &|state| state.chain ^= 1,
        Findings {
            contradictions: 1,
            ..Findings::default()
        },
    );
    check(
        &|state| state.count += 5,
        Findings {
            applied_twice: 2,
            ..Findings::default()
        },
    );
    check(
        &|state| state.boots += 1,
        Findings {
            reboots: 1,
            ..Findings::default()
        },
    );
}

#[test]
fn complaints_name_what_is_not_zero() {
    let found = Findings {
        lost_answers: 2,
        reboots: 1,
        ..Findings::default()
    };
    assert_eq!(found.complaints(), [("answers lost", 2), ("restarts of the guest", 1)]);
    assert!(Findings::default().complaints().is_empty());
}
