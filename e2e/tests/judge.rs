//! Negative controls of the judge: servers that lie in every way it promises to notice, and one that does not.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use ftvm_e2e::guest_protocol::{Answer, Checksum, Op, REQUEST_BYTES, Request, fill_bulk, next_chain};
use ftvm_e2e::judge::client::End;
use ftvm_e2e::judge::{Judge, JudgePlan, Outcome};

/// An answer is held for so long.
const HELD: Duration = Duration::from_millis(400);

/// The guest's state as the protocol describes it.
#[derive(Clone, Default)]
struct State {
    count: u64,
    chain: u64,
    journal_seq: u64,
    boots: u32,
    time_ns: u64,
}

/// What a server does at its 300th request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    None,
    /// Goes back to its state of five requests ago: what it answered since never happened.
    Forgets,
    /// Starts again from its journal.
    Restarts,
    /// Counts on, but over another request than the one that was sent.
    Forks,
    /// Carries a request out twice.
    Repeats,
    /// Its clock steps back.
    StepsBack,
    /// Sends an answer twice.
    AnswersTwice,
    /// Flips one bit of bulk data.
    Corrupts,
    /// Answers a journal request without writing a record.
    SkipsJournal,
    /// Finds an error in its memory.
    IsDamaged,
    /// Closes the connection.
    HangsUp,
    /// Stops answering.
    FallsSilent,
}

const LIES_AT: u64 = 300;

fn serve(mut stream: TcpStream, lie: Lie) {
    let started = Instant::now();
    let mut state = State {
        boots: 1,
        ..State::default()
    };
    let mut history = vec![state.clone()];
    let mut memory_errors = 0;
    for number in 1u64.. {
        let mut head = [0; REQUEST_BYTES];
        if stream.read_exact(&mut head).is_err() {
            return;
        }
        let request = Request::decode(&head).unwrap();
        let op = Op::from_u32(request.op).unwrap();
        // A lie that needs a certain request waits for one.
        let lies = number >= LIES_AT;
        let now = lies && number == LIES_AT;
        match lie {
            Lie::Forgets if now => state = history[history.len() - 6].clone(),
            Lie::Restarts if now => {
                state = State {
                    boots: 2,
                    journal_seq: state.journal_seq,
                    ..history[LIES_AT as usize / 2].clone()
                }
            }
            Lie::Repeats if now => state.count += 1,
            Lie::StepsBack if now => state.time_ns = 1,
            Lie::IsDamaged if now => memory_errors = 1,
            Lie::HangsUp if now => return,
            Lie::FallsSilent if now => std::thread::sleep(Duration::from_secs(600)),
            _ => {}
        }
        if !(lie == Lie::StepsBack && now) {
            state.time_ns = started.elapsed().as_nanos() as u64;
        }
        if matches!(op, Op::Increment | Op::Journal) {
            state.count += 1;
            let seq = if lie == Lie::Forks && lies {
                request.seq + 1
            } else {
                request.seq
            };
            state.chain = next_chain(state.chain, seq, state.count);
        }
        state.journal_seq += u64::from(op == Op::Journal && !(lie == Lie::SkipsJournal && lies));
        let mut answer = Answer {
            op: request.op,
            seq: request.seq,
            count: state.count,
            chain: state.chain,
            guest_time_ns: state.time_ns,
            journal_seq: state.journal_seq,
            boots: state.boots,
            memory_errors,
            vcpus: 1,
            ..Answer::default()
        };
        let mut payload = vec![
            0;
            if matches!(op, Op::Sink | Op::Bulk) {
                request.arg as usize
            } else {
                0
            }
        ];
        if op == Op::Sink {
            stream.read_exact(&mut payload).unwrap();
            answer.chain = Checksum::of(&payload);
            payload.clear();
        }
        fill_bulk(request.seq, 0, &mut payload);
        if lie == Lie::Corrupts && lies && !payload.is_empty() {
            payload[1000] ^= 4;
        }
        let bytes = [&answer.encode()[..], &payload].concat();
        let times = if lie == Lie::AnswersTwice && now { 2 } else { 1 };
        for _ in 0..times {
            if stream.write_all(&bytes).is_err() {
                return;
            }
        }
        history.push(state.clone());
    }
}

/// A judge's outcome after about 600 requests to a server that tells this lie.
fn judge(lie: Lie) -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || serve(listener.accept().unwrap().0, lie));
    let mut plan = JudgePlan::new(address);
    if lie == Lie::FallsSilent {
        plan.stalled_after = Duration::from_millis(500);
    }
    let judge = Judge::start(plan, || Ok::<(), String>(())).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while judge.answers() < 600 && !judge.has_ended() {
        assert!(
            Instant::now() < deadline,
            "{lie:?}: {} answers in 30 s",
            judge.answers()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let outcome = judge.finish();
    if lie != Lie::FallsSilent {
        server.join().unwrap();
    }
    outcome
}

#[test]
fn an_honest_server_is_clean() {
    let outcome = judge(Lie::None);
    assert!(outcome.is_clean(), "{:?}", outcome.complaints());
    assert!(outcome.answers >= 600);
    assert_eq!(outcome.latency.total(), outcome.answers);
}

#[test]
fn every_lie_turns_it_red_in_its_own_category() {
    type Category = fn(&Outcome) -> u64;
    let cases: [(Lie, Category); 10] = [
        (Lie::Forgets, |outcome| outcome.findings().lost_answers),
        (Lie::Restarts, |outcome| {
            outcome.findings().reboots.min(outcome.findings().lost_answers)
        }),
        (Lie::Forks, |outcome| outcome.findings().contradictions),
        (Lie::Repeats, |outcome| outcome.findings().applied_twice),
        (Lie::StepsBack, |outcome| outcome.findings().time_steps_back),
        (Lie::AnswersTwice, |outcome| outcome.findings().duplicated_answers),
        (Lie::Corrupts, |outcome| outcome.findings().corrupt_payloads),
        (Lie::SkipsJournal, |outcome| outcome.findings().lost_journal_records),
        (Lie::IsDamaged, |outcome| outcome.findings().memory_errors),
        (Lie::HangsUp, |outcome| {
            u64::from(matches!(outcome.end, End::Broken { .. }))
        }),
    ];
    for (lie, category) in cases {
        let outcome = judge(lie);
        assert!(!outcome.is_clean(), "{lie:?} went unnoticed");
        assert!(
            category(&outcome) > 0,
            "{lie:?} was taken for something else: {:?}",
            outcome.complaints()
        );
        assert!(!outcome.complaints().is_empty());
    }
}

#[test]
fn silence_is_a_stall_with_its_gap() {
    let outcome = judge(Lie::FallsSilent);
    assert_eq!(outcome.end, End::Stalled);
    assert!(outcome.unanswered > 0);
    assert!(!outcome.is_clean());
}

/// A server that counts, and holds an answer until it is told to send it.
fn hold_answers(listener: &TcpListener, held: &Receiver<Receiver<()>>) {
    let (mut stream, mut state) = (listener.accept().unwrap().0, State::default());
    let mut head = [0; REQUEST_BYTES];
    while stream.read_exact(&mut head).is_ok() {
        for word in held.try_iter() {
            word.recv().ok();
        }
        let request = Request::decode(&head).unwrap();
        if request.op == Op::Increment as u32 {
            state.count += 1;
            state.chain = next_chain(state.chain, request.seq, state.count);
        }
        let (seq, op) = (request.seq, request.op);
        let answer = Answer {
            op,
            seq,
            count: state.count,
            chain: state.chain,
            ..Answer::default()
        };
        stream.write_all(&answer.encode()).ok();
    }
}

fn milliseconds_since(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

/// However slow the machine is, a gap that began after an answer is no longer than the time since that answer was waited for.
#[test]
fn gaps_are_measured_where_they_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (hold, held) = channel();
    let server = std::thread::spawn(move || hold_answers(&listener, &held));
    let plan = JudgePlan {
        payload_bytes: 0,
        journal: false,
        ..JudgePlan::new(address)
    };
    let judge = Judge::start(plan, || Ok::<(), String>(())).unwrap();
    let wait_until = |done: &dyn Fn() -> bool| {
        while !done() {
            assert!(!judge.has_ended());
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let more = |count: u64| {
        let goal = judge.answers() + count;
        wait_until(&|| judge.answers() >= goal);
    };
    let begin = Instant::now();
    more(100);
    judge.phase();
    more(100);
    let calm = judge.phase();
    assert!(calm.gap_ms <= milliseconds_since(begin), "{calm:?}");

    let begin = Instant::now();
    more(100);
    judge.phase();
    let (let_go, word) = channel();
    hold.send(word).unwrap();
    wait_until(&|| judge.waiting() >= HELD);
    let_go.send(()).unwrap();
    let after_it = Instant::now();
    more(100);
    let disturbed = judge.phase();
    let held_ms = HELD.as_secs_f64() * 1e3;
    assert!(
        (held_ms..=milliseconds_since(begin)).contains(&disturbed.gap_ms),
        "{disturbed:?}"
    );
    more(100);
    let after = judge.phase();
    assert!(after.gap_ms <= milliseconds_since(after_it), "{after:?}");

    // A quiet client waits for nothing, so silence is no gap; a request of the owner's is answered in between.
    assert!(judge.quiet());
    judge.phase();
    let begin = Instant::now();
    let answer = judge.ask(Op::Status, 0, 0).unwrap();
    let took_ms = milliseconds_since(begin);
    assert_eq!(answer.op, Op::Status as u32);
    std::thread::sleep(begin.elapsed() + Duration::from_millis(300));
    let quiet = judge.phase();
    assert_eq!(quiet.answers, 1);
    assert!(quiet.gap_ms <= took_ms, "{quiet:?}, where the answer took {took_ms} ms");
    judge.go_on();
    more(100);
    let outcome = judge.finish();
    assert!(outcome.is_clean(), "{:?}", outcome.complaints());
    server.join().unwrap();
}

#[test]
fn an_absent_guest_is_said_to_be_absent() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let plan = JudgePlan {
        connect_within: Duration::from_millis(100),
        ..JudgePlan::new(address)
    };
    let outcome = Judge::start(plan, || Ok::<(), String>(())).unwrap().finish();
    assert!(matches!(outcome.end, End::NoConnection { .. }), "{:?}", outcome.end);
    assert!(!outcome.is_clean());
}
