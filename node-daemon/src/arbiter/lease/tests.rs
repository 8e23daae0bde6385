//! What each answer means, told by a server that answers as it is told. That the real API server answers so is tested with
//! the real one (`e2e/tests`).

use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};

use ftvm_crds::lease::genesis;
use ftvm_protocol::identity::{Incarnation, Nonce, SeatId};
use ftvm_protocol::record::{Members, Phase, Snapshot};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use crate::arbiter::Bounded;

pub(super) const UID: &str = "00000000-0000-4000-8000-000000000001";
pub(super) const VM: VmId = VmId(7);
/// Longer than anything here takes on a busy machine; only failures wait for it.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What the server does with the next request.
enum Do {
    Answer(u16, String),
    /// The answer, but only so many bytes of it.
    Cut(u16, String, usize),
    /// Reads the request and closes.
    Close,
    /// Reads the request and answers when it is told to. If nobody does, it answers in the end, and can't be told any more.
    Held(Receiver<()>, u16, String),
}

struct Stub {
    address: std::net::SocketAddr,
    next: Sender<Do>,
    requests: Receiver<String>,
}

impl Stub {
    fn start() -> Stub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (next, todo) = channel();
        let (told, requests) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&mut stream.unwrap(), &todo, &told);
            }
        });
        Stub {
            address,
            next,
            requests,
        }
    }

    fn arbiter(&self) -> LeaseArbiter {
        let config = kube::Config::new(format!("http://{}", self.address).parse().unwrap());
        Leases::new(Server::new(&config).unwrap())
            .unwrap()
            .arbiter("shop", "web", VM)
    }

    fn expect(&self, what: Do) {
        self.next.send(what).unwrap();
    }

    /// The first line and the body of the request that came.
    fn request(&self) -> String {
        self.requests.recv_timeout(PATIENCE).unwrap()
    }
}

/// One connection after the other, until it is closed or cut.
fn serve(stream: &mut TcpStream, todo: &Receiver<Do>, told: &Sender<String>) {
    while let Some(request) = read_request(stream) {
        told.send(request).unwrap();
        let whole = |status: u16, body: &str| {
            let length = body.len();
            format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        };
        let write = |stream: &mut TcpStream, text: &str| stream.write_all(text.as_bytes()).is_ok();
        let on = match todo.recv() {
            Ok(Do::Answer(status, body)) => write(stream, &whole(status, &body)),
            Ok(Do::Cut(status, body, bytes)) => {
                write(stream, &whole(status, &body)[..bytes]);
                false
            }
            Ok(Do::Held(word, status, body)) => {
                let _ = word.recv_timeout(PATIENCE);
                drop(word);
                write(stream, &whole(status, &body));
                false
            }
            Ok(Do::Close) | Err(_) => false,
        };
        if !on {
            return;
        }
    }
}

/// The first line and the body.
pub(super) fn read_request(stream: &mut impl Read) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).ok()?;
    Some(format!(
        "{}\n{}",
        head.lines().next().unwrap(),
        String::from_utf8(body).unwrap()
    ))
}

pub(super) fn lease(version: &str, record: &Record) -> Lease {
    let owner = OwnerReference {
        uid: VM.to_string(),
        ..OwnerReference::default()
    };
    let mut lease = genesis("shop", "web", owner, SeatId(1), "one", Timestamp::now());
    lease.metadata.uid = Some(UID.to_owned());
    lease.metadata.resource_version = Some(version.to_owned());
    set_record(&mut lease, record, Timestamp::now());
    lease
}

pub(super) fn text(lease: &Lease) -> String {
    serde_json::to_string(lease).unwrap()
}

pub(super) fn first() -> Record {
    Record::genesis(SeatId(1), Phase::Running)
}

fn second() -> Record {
    let holder = Incarnation {
        seat: SeatId(1),
        start: 5,
    };
    Record {
        holder,
        members: Members::one(holder),
        term: 2,
        nonce: Nonce(9),
        ..first()
    }
}

pub(super) fn status(code: u16, reason: &str) -> String {
    format!(
        r#"{{"kind":"Status","apiVersion":"v1","status":"Failure","message":"m","reason":"{reason}","code":{code}}}"#
    )
}

/// As if an API server had told it just now.
pub(super) fn keep(arbiter: &LeaseArbiter, lease: Lease) {
    let servers = arbiter.leases.server.endpoints.in_order();
    arbiter.keep(lease, servers[0].teller());
}

pub(super) fn far() -> Instant {
    Instant::now() + PATIENCE
}

/// An arbiter that has read version 10.
fn read(stub: &Stub) -> (LeaseArbiter, Snapshot) {
    let arbiter = stub.arbiter();
    stub.expect(Do::Answer(200, text(&lease("10", &first()))));
    let (outcome, why) = arbiter.read();
    let ReadOutcome::Found(found) = outcome else {
        panic!("{outcome:?} {why:?}")
    };
    let request = stub.request();
    // Nothing that would allow an answer from the API server's cache.
    let line = "GET /apis/coordination.k8s.io/v1/namespaces/shop/leases/web HTTP/1.1\n";
    assert_eq!(request, line);
    (arbiter, found)
}

/// What is left of a swap whose deadline was over before its last request was answered.
struct Late {
    stub: Stub,
    arbiter: LeaseArbiter,
    found: Snapshot,
    outcome: SwapOutcome,
    why: Option<String>,
    requests: Vec<String>,
}

/// A swap that gets these answers, and the last one after its deadline. A machine that needs more time for the requests gets more.
fn late(answers: &[(u16, String)], last: &(u16, String)) -> Late {
    let mut time = Duration::from_millis(200);
    loop {
        let stub = Stub::start();
        let (arbiter, found) = read(&stub);
        for (status, body) in answers {
            stub.expect(Do::Answer(*status, body.clone()));
        }
        let (tell, word) = channel();
        stub.expect(Do::Held(word, last.0, last.1.clone()));
        let (outcome, why) = arbiter.swap(found.uid, found.version, &second(), Instant::now() + time);
        tell.send(()).expect("it waited for the answer");
        let requests: Vec<String> = stub.requests.try_iter().collect();
        if requests.len() > answers.len() {
            return Late {
                stub,
                arbiter,
                found,
                outcome,
                why,
                requests,
            };
        }
        assert!(time < PATIENCE, "{requests:?} in {time:?}: {outcome:?} {why:?}");
        time *= 2;
    }
}

#[test]
fn a_swap_names_uid_and_version_of_what_was_read() {
    let stub = Stub::start();
    let (arbiter, found) = read(&stub);
    assert_eq!((found.version, found.uid.to_string().as_str()), (10, UID));
    stub.expect(Do::Answer(200, text(&lease("11", &second()))));
    let (outcome, why) = arbiter.swap(found.uid, found.version, &second(), far());
    let SwapOutcome::Won(won) = outcome else {
        panic!("{outcome:?} {why:?}")
    };
    assert_eq!((won.version, won.record), (11, second()));
    let request = stub.request();
    let (line, body) = request.split_once('\n').unwrap();
    assert!(line.starts_with("PUT "), "{line}");
    let put: Lease = serde_json::from_str(body).unwrap();
    assert_eq!(put.metadata.uid.as_deref(), Some(UID));
    assert_eq!(put.metadata.resource_version.as_deref(), Some("10"));
    assert_eq!(snapshot(&put).unwrap().record, second());
    // The next one goes over what was written, without a read.
    let third = Record { term: 3, ..second() };
    stub.expect(Do::Answer(409, status(409, "Conflict")));
    stub.expect(Do::Answer(200, text(&lease("12", &second()))));
    assert_eq!(arbiter.swap(won.uid, 11, &third, far()).0, SwapOutcome::Conflict);
    assert!(stub.request().starts_with("PUT "));
}

#[test]
fn a_refusal_is_believed_if_something_else_is_there() {
    use SwapOutcome::{Conflict, Unknown};
    let (good, unreadable) = (
        text(&lease("11", &second())),
        text(&lease("11", &second())).replace("term", "mert"),
    );
    let other = Record {
        nonce: Nonce(8),
        ..second()
    };
    let cases = [
        (Do::Answer(200, text(&lease("11", &other))), Conflict),
        (Do::Answer(404, status(404, "NotFound")), Conflict),
        // Something between passed the PUT on twice: the first one landed.
        (Do::Answer(200, good), Unknown),
        // Whoever refused did not look: it may still land.
        (Do::Answer(200, text(&lease("10", &first()))), Unknown),
        (Do::Answer(200, unreadable), Unknown),
        (Do::Answer(500, status(500, "InternalError")), Unknown),
        (Do::Close, Unknown),
    ];
    for (number, (what, expected)) in cases.into_iter().enumerate() {
        let stub = Stub::start();
        let (arbiter, found) = read(&stub);
        stub.expect(Do::Answer(409, status(409, "Conflict")));
        stub.expect(what);
        let (outcome, why) = arbiter.swap(found.uid, found.version, &second(), far());
        assert_eq!(outcome, expected, "case {number}: {why:?}");
        assert!(why.is_some(), "case {number} says why");
        assert!(stub.request().starts_with("PUT "));
        assert!(stub.request().starts_with("GET "), "case {number} wrote again");
        assert!(stub.requests.try_recv().is_err(), "case {number} asked a third time");
    }
}

#[test]
fn a_refusal_that_nobody_confirms_in_time_is_not_believed() {
    let other = Record {
        nonce: Nonce(8),
        ..second()
    };
    let refusal = (409, status(409, "Conflict"));
    let late = late(&[refusal], &(200, text(&lease("11", &other))));
    assert_eq!(late.outcome, SwapOutcome::Unknown, "{:?}", late.why);
    assert!(late.why.is_some());
    let [put, get] = &late.requests[..] else {
        panic!("{:?}", late.requests)
    };
    assert!(put.starts_with("PUT ") && get.starts_with("GET "), "{put} {get}");
}

#[test]
fn a_read_that_is_older_than_what_was_seen_counts_for_nothing() {
    let stub = Stub::start();
    let (arbiter, found) = read(&stub);
    stub.expect(Do::Answer(200, text(&lease("12", &second()))));
    let (outcome, why) = arbiter.swap(found.uid, found.version, &second(), far());
    assert!(matches!(outcome, SwapOutcome::Won(_)), "{outcome:?} {why:?}");
    stub.request();
    for (version, expected) in [("10", false), ("11", false), ("12", true), ("13", true), ("12", false)] {
        stub.expect(Do::Answer(200, text(&lease(version, &second()))));
        let (outcome, why) = arbiter.read();
        let found = matches!(outcome, ReadOutcome::Found(_));
        assert_eq!(found, expected, "version {version}: {outcome:?} {why:?}");
        assert!(found || why.is_some_and(|why| why.contains("old")), "version {version}");
        stub.request();
    }
    // Nor is it what a swap goes over.
    let third = Record { term: 3, ..second() };
    stub.expect(Do::Answer(200, text(&lease("9", &first()))));
    assert_eq!(arbiter.swap(found.uid, 9, &third, far()).0, SwapOutcome::NotSent);
    stub.request();
    assert!(stub.requests.try_recv().is_err(), "it was sent");
}

#[test]
fn answers_to_a_swap_are_taken_for_no_more_than_they_are() {
    use SwapOutcome::{NotSent, Unknown};
    let good = text(&lease("11", &second()));
    let other_record = text(&lease(
        "11",
        &Record {
            nonce: Nonce(8),
            ..second()
        },
    ));
    let mut other_uid = lease("11", &second());
    other_uid.metadata.uid = Some("00000000-0000-4000-8000-000000000002".to_owned());
    let cases = [
        (Do::Answer(401, status(401, "Unauthorized")), NotSent),
        (Do::Answer(403, status(403, "Forbidden")), NotSent),
        (Do::Answer(404, status(404, "NotFound")), NotSent),
        // By something between, which may have passed the request on.
        (Do::Answer(409, "conflict".to_owned()), Unknown),
        (Do::Answer(403, "<html>forbidden</html>".to_owned()), Unknown),
        (Do::Answer(404, status(500, "NotFound")), Unknown),
        (Do::Answer(409, status(409, "AlreadyExists")), Unknown),
        (Do::Answer(500, status(500, "InternalError")), Unknown),
        (Do::Answer(504, status(504, "Timeout")), Unknown),
        (Do::Answer(429, status(429, "TooManyRequests")), Unknown),
        (Do::Answer(422, status(422, "Invalid")), Unknown),
        (Do::Answer(302, String::new()), Unknown),
        (Do::Answer(200, "{}".to_owned()), Unknown),
        (Do::Answer(200, other_record), Unknown),
        (Do::Answer(200, text(&other_uid)), Unknown),
        // An old version: the write is not in it, or the API server is none.
        (Do::Answer(200, text(&lease("10", &second()))), Unknown),
        (Do::Cut(200, good.clone(), 20), Unknown),
        (Do::Cut(200, good.clone(), good.len()), Unknown),
        (Do::Cut(409, status(409, "Conflict"), 90), Unknown),
        (Do::Close, Unknown),
    ];
    for (number, (what, expected)) in cases.into_iter().enumerate() {
        let stub = Stub::start();
        let (arbiter, found) = read(&stub);
        stub.expect(what);
        let (outcome, why) = arbiter.swap(found.uid, found.version, &second(), far());
        assert_eq!(outcome, expected, "case {number}: {why:?}");
        assert!(why.is_some(), "case {number} says why");
        // Once, whatever came of it.
        stub.request();
        assert!(stub.requests.try_recv().is_err(), "case {number} was sent twice");
    }
}

#[test]
fn an_answer_after_the_deadline_is_none() {
    let Late {
        stub,
        arbiter,
        found,
        outcome,
        why,
        requests,
    } = late(&[], &(200, text(&lease("11", &second()))));
    assert_eq!(outcome, SwapOutcome::Unknown, "{why:?}");
    assert_eq!(requests.len(), 1, "{requests:?}");
    // An attempt that is over before anything is sent leaves nothing behind.
    let (outcome, _) = arbiter.swap(found.uid, found.version, &second(), Instant::now());
    assert_eq!(outcome, SwapOutcome::NotSent);
    assert!(
        stub.requests.recv_timeout(Duration::from_millis(300)).is_err(),
        "nothing was sent"
    );
}

#[test]
fn what_was_never_sent_is_said_to_be() {
    let stub = Stub::start();
    let (arbiter, found) = read(&stub);
    let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
    let nowhere = Leases::new(Server::new(&config).unwrap())
        .unwrap()
        .arbiter("shop", "web", VM);
    keep(&nowhere, lease("10", &first()));
    let (outcome, why) = nowhere.swap(found.uid, 10, &second(), far());
    assert_eq!(outcome, SwapOutcome::NotSent, "{why:?}");
    let low = Record { term: 1, ..second() };
    assert_eq!(
        arbiter.swap(found.uid, 10, &low, far()).0,
        SwapOutcome::NotSent,
        "a term that does not grow"
    );
}

#[test]
fn without_the_object_it_is_read_first() {
    let stub = Stub::start();
    let uid = UID.parse().unwrap();
    // Another version by now: it can never come back.
    let arbiter = stub.arbiter();
    stub.expect(Do::Answer(200, text(&lease("12", &first()))));
    assert_eq!(arbiter.swap(uid, 10, &second(), far()).0, SwapOutcome::Conflict);
    stub.request();
    // It can't be read: nothing was written.
    stub.expect(Do::Answer(500, status(500, "InternalError")));
    assert_eq!(arbiter.swap(uid, 10, &second(), far()).0, SwapOutcome::NotSent);
    stub.request();
    assert!(stub.requests.try_recv().is_err());
}

#[test]
fn reads_tell_gone_from_unreachable_and_refuse_what_is_not_the_vms() {
    let mut foreign = lease("10", &first());
    foreign.metadata.owner_references = None;
    let mut empty = lease("10", &first());
    empty.metadata.annotations = None;
    for (what, expected) in [
        (Do::Answer(404, status(404, "NotFound")), ReadOutcome::Gone),
        (Do::Answer(404, "no such page".to_owned()), ReadOutcome::Unreachable),
        (Do::Answer(403, status(403, "Forbidden")), ReadOutcome::Unreachable),
        (Do::Answer(500, status(500, "InternalError")), ReadOutcome::Unreachable),
        (Do::Answer(200, text(&foreign)), ReadOutcome::Unreachable),
        (Do::Answer(200, text(&empty)), ReadOutcome::Unreachable),
        (Do::Close, ReadOutcome::Unreachable),
    ] {
        let stub = Stub::start();
        stub.expect(what);
        let (outcome, why) = stub.arbiter().read();
        assert_eq!(outcome, expected, "{why:?}");
        assert!(why.is_some());
    }
}

#[test]
fn the_deadline_holds_around_everything() {
    let stub = Stub::start();
    let bounded = Bounded::new(Arc::new(stub.arbiter()));
    let (tell, word) = channel();
    stub.expect(Do::Held(word, 200, text(&lease("10", &first()))));
    let (answer, why) = bounded.ask(&ftvm_engine::control::Ask::ReadRecord, Duration::from_millis(200));
    assert_eq!(answer, ftvm_engine::control::Answer::Read(ReadOutcome::Unreachable));
    // Not because the arbiter gave up: that it does later.
    assert_eq!(why.as_deref(), Some("the arbiter did not answer within the deadline"));
    tell.send(()).expect("it waited for the answer");
}
