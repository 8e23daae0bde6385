use super::*;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};

use ftvm_protocol::identity::{ArbiterUid, Incarnation, SeatId};
use ftvm_protocol::record::{Phase, Record};

struct Rig {
    daemon: Option<Connection>,
    path: PathBuf,
    endpoint: Endpoint,
    inputs: Receiver<Input>,
}

fn hello() -> Hello {
    Hello {
        version: VERSION,
        engine: "test".into(),
        vm: "vm".into(),
        seat: "a".into(),
        incarnation: Incarnation {
            seat: SeatId(1),
            start: 1,
        },
    }
}

fn rig(name: &str, daemon_uid: u32) -> Rig {
    let folder = std::env::temp_dir().join(format!("ftvm-endpoint-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("control.sock");
    let listener = Listener::bind(&path).unwrap();
    let (daemon, engine) = Connection::pair().unwrap();
    let (sender, inputs) = channel();
    let sink = Box::new(move |input| sender.send(input).unwrap_or_default());
    let endpoint = Endpoint::start(engine, listener, daemon_uid, hello(), sink, || {}).unwrap();
    let rig = Rig {
        daemon: Some(daemon),
        path,
        endpoint,
        inputs,
    };
    assert_eq!(rig.read(rig.daemon.as_ref().unwrap()), FromEngine::Hello(hello()));
    rig
}

impl Rig {
    fn read(&self, connection: &Connection) -> FromEngine {
        connection.receive(true).unwrap().body
    }

    fn next(&self) -> Input {
        self.inputs
            .recv_timeout(Duration::from_secs(90))
            .expect("an input comes")
    }

    fn swap(&self, deadline: Duration) -> u64 {
        let record = Record::genesis(SeatId(1), Phase::Running);
        self.endpoint.handle().request(
            Ask::SwapRecord {
                uid: ArbiterUid(1),
                version: 1,
                record,
            },
            deadline,
        )
    }
}

fn send_command(daemon: &Connection, id: u64, command: Command) {
    daemon.send(&ToEngine::Command { id, command }, &[]).unwrap();
}

fn send_answer(daemon: &Connection, request: u64, answer: &Answer) {
    let (answer, why) = (answer.clone(), None);
    daemon.send(&ToEngine::Answer { request, answer, why }, &[]).unwrap();
}

fn is_answer(input: &Input, number: u64, expected: &Answer) -> bool {
    matches!(input, Input::Answer { request, answer, .. } if *request == number && answer == expected)
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.path.parent().unwrap());
    }
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

const LONG: Duration = Duration::from_secs(3600);

#[test]
fn commands_are_enqueued_and_replies_return() {
    let rig = rig("commands", uid());
    let daemon = rig.daemon.as_ref().unwrap();
    send_command(daemon, 7, Command::Switchover);
    let Input::Command {
        id,
        command: Command::Switchover,
    } = rig.next()
    else {
        panic!("a command comes")
    };
    rig.endpoint.handle().reply(id, Reply::Refused { why: "no".into() });
    assert_eq!(
        rig.read(daemon),
        FromEngine::Reply {
            id: 7,
            reply: Reply::Refused { why: "no".into() }
        }
    );
}

#[test]
fn each_request_is_answered_once() {
    let rig = rig("answers", uid());
    let daemon = rig.daemon.as_ref().unwrap();
    let request = rig.swap(LONG);
    let FromEngine::Request { request: seen, .. } = rig.read(daemon) else {
        panic!("a request comes")
    };
    assert_eq!(seen, request);
    let answer = Answer::Swap(SwapOutcome::Conflict);
    for _ in 0..2 {
        send_answer(daemon, request, &answer);
    }
    send_command(daemon, 1, Command::Status);
    assert!(is_answer(&rig.next(), request, &answer));
    assert!(
        matches!(rig.next(), Input::Command { .. }),
        "the doubled answer is dropped"
    );
}

#[test]
fn a_late_answer_is_the_safe_one() {
    let rig = rig("late", uid());
    let daemon = rig.daemon.as_ref().unwrap();
    let write = rig.swap(Duration::from_millis(10));
    assert!(is_answer(&rig.next(), write, &Answer::Swap(SwapOutcome::Unknown)));
    let read = rig
        .endpoint
        .handle()
        .request(Ask::ReadRecord, Duration::from_millis(10));
    assert!(is_answer(&rig.next(), read, &Answer::Read(ReadOutcome::Unreachable)));
    let late = Answer::Swap(SwapOutcome::Conflict);
    send_answer(daemon, write, &late);
    send_command(daemon, 1, Command::Status);
    assert!(
        matches!(rig.next(), Input::Command { .. }),
        "the late answer is dropped"
    );
}

#[test]
fn an_answer_to_another_question_is_no_answer() {
    let rig = rig("other", uid());
    let daemon = rig.daemon.as_ref().unwrap();
    let request = rig.swap(LONG);
    send_answer(daemon, request, &Answer::Seats(vec![]));
    assert!(is_answer(&rig.next(), request, &Answer::Swap(SwapOutcome::Unknown)));
}

#[test]
fn the_daemons_death_settles_nothing_and_a_new_daemon_adopts() {
    let mut rig = rig("adopt", uid());
    let request = rig.swap(LONG);
    rig.daemon = None;
    assert!(is_answer(&rig.next(), request, &Answer::Swap(SwapOutcome::Unknown)));
    assert_eq!(rig.next(), Input::DaemonLost);
    // Without a daemon nothing is sent, and that is known for sure.
    let request = rig.swap(LONG);
    assert!(is_answer(&rig.next(), request, &Answer::Swap(SwapOutcome::NotSent)));

    let second = Connection::connect(&rig.path).unwrap();
    assert_eq!(rig.read(&second), FromEngine::Hello(hello()));
    assert_eq!(rig.next(), Input::DaemonConnected);
    send_command(&second, 1, Command::Status);
    let Input::Command { id, .. } = rig.next() else {
        panic!("a command comes")
    };

    // The newest wins; a reply to the earlier one goes to nobody.
    let third = Connection::connect(&rig.path).unwrap();
    assert_eq!(rig.read(&third), FromEngine::Hello(hello()));
    assert_eq!(rig.next(), Input::DaemonConnected);
    rig.endpoint.handle().reply(id, Reply::Ok);
    assert!(matches!(second.receive::<FromEngine>(true), Err(SocketError::Closed)));
    assert!(matches!(
        third.receive::<FromEngine>(false),
        Err(SocketError::WouldBlock)
    ));
}

#[test]
fn strangers_and_nonsense_are_refused() {
    let rig = rig("strangers", uid() + 1);
    let stranger = Connection::connect(&rig.path).unwrap();
    assert!(matches!(stranger.receive::<FromEngine>(true), Err(SocketError::Closed)));
    let daemon = rig.daemon.as_ref().unwrap();
    rustix::net::send(
        daemon,
        br#"{"type":"command","id":1,"command":{"do":"fly"}}"#,
        rustix::net::SendFlags::empty(),
    )
    .unwrap();
    send_command(daemon, 2, Command::Status);
    assert!(
        matches!(
            rig.next(),
            Input::Command {
                command: Command::Status,
                ..
            }
        ),
        "nonsense is skipped"
    );
}

#[test]
fn launch_descriptors_are_taken_once_and_all() {
    let (daemon, engine) = Connection::pair().unwrap();
    send_command(&daemon, 1, Command::Status);
    assert!(matches!(receive_launch(&engine), Err(EndpointError::NotALaunch)));
    let mut fds = LaunchFds(vec![Some(engine.into_fd()), Some(daemon.into_fd())]);
    fds.take(Fd(1), "kvm").unwrap();
    assert!(matches!(
        fds.take(Fd(1), "disk"),
        Err(EndpointError::MissingDescriptor { index: 1, .. })
    ));
    assert!(matches!(
        fds.take(Fd(2), "disk"),
        Err(EndpointError::MissingDescriptor { index: 2, .. })
    ));
    assert!(matches!(
        fds.finish(),
        Err(EndpointError::ExtraDescriptors { count: 1 })
    ));
}
