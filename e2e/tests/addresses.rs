//! Where the network believes the guest to be: frames for it must reach the seat that will answer. And as whom the guest may speak.
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::standalone::Standalone;
use ftvm_e2e::demo::system::System as _;
use ftvm_e2e::demo::{GUEST_MAC, Options, mac_text};
use ftvm_e2e::guest_protocol::{ANSWER_BYTES, Answer, Op, Request};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::hosts::{Host, Lab};
use ftvm_e2e::judge::packet::Mac;
use ftvm_e2e::judge::sniffer::Sniffer;
use ftvm_e2e::judge::timeline::{Direction, Kind};
use ftvm_e2e::scene::{self, PATIENCE};

/// The programs, built before the namespaces are entered: there is no network in them.
fn built(test: &str) -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}.json"));
    made_outside(&file, || programs::build(Profile::Dev)).expect("the programs build")
}

/// A client that sends one request when it is told to, and tells its answer.
struct Asker {
    ask: SyncSender<()>,
    answers: Receiver<Answer>,
}

impl Asker {
    fn start(lab: &Lab) -> Self {
        let (ask, asked) = sync_channel::<()>(1);
        let (answer, answers) = sync_channel(1);
        let entrance = lab.client_entrance().expect("the client's namespace");
        std::thread::spawn(move || {
            entrance().expect("the client's namespace");
            let mut stream = scene::connect();
            while asked.recv().is_ok() {
                let request = Request::new(Op::Status, 0, 0, 0).encode();
                stream.write_all(&request).expect("the connection stands");
                let mut bytes = [0; ANSWER_BYTES];
                stream.read_exact(&mut bytes).expect("the connection stands");
                answer
                    .send(Answer::decode(&bytes).expect("an answer"))
                    .expect("the test waits");
            }
        });
        Self { ask, answers }
    }

    fn ask(&self) {
        self.ask.send(()).expect("the client runs");
    }

    fn wait(&self) -> Answer {
        self.answers.recv_timeout(PATIENCE).expect("an answer")
    }
}

/// Who looks from outside.
struct Client {
    asker: Asker,
    sniffer: Sniffer,
}

type Scene = scene::Scene<Client>;

/// No frozen process may count as a dead machine here: the default is 0.3 s.
fn options() -> Options {
    Options {
        peer_lost_ms: Some(3_000),
        ..Options::default()
    }
}

fn sniffer(lab: &Lab, source: Mac) -> Sniffer {
    let ports = lab.hosts().iter().map(Host::client_port).collect();
    Sniffer::start(source, ports).expect("a sniffer")
}

/// A protected pair on the first two hosts, and a client that has had an answer and is silent.
fn scene(test: &str, programs: &Programs) -> Scene {
    scene_of(test, programs, &[])
}

/// The same with a guest that has these IP addresses; none: nobody knows.
fn scene_of(test: &str, programs: &Programs, addresses: &[&str]) -> Scene {
    let place = (env!("CARGO_TARGET_TMPDIR"), test);
    let client = |lab: &Lab| Client {
        sniffer: sniffer(lab, GUEST_MAC),
        asker: Asker::start(lab),
    };
    let prepare = |_: &Lab, system: Standalone| system.with_addresses(addresses);
    let mut scene = Scene::new(place, programs, &options(), prepare, client);
    scene.client.asker.ask();
    scene.client.asker.wait();
    scene.wait_for_protection(0);
    scene
}

fn frames(scene: &Scene, host: usize, direction: Direction, kind: Kind) -> usize {
    scene.client.sniffer.timeline().count(host, direction, kind)
}

/// Requests that the bridge sent to a host. Its client's system sends acknowledgements, too, when it likes.
fn requests(scene: &Scene, host: usize) -> usize {
    let timeline = scene.client.sniffer.timeline();
    timeline.segments_with_payload(host, Direction::ToGuest)
}

fn signal_daemon(scene: &Scene, host: usize, signal: libc::c_int) {
    let daemons = scene.lab.host(host).processes_named("ftvm-node-daemon");
    let daemons = daemons.expect("processes");
    assert_eq!(daemons.len(), 1, "{daemons:?}");
    // SAFETY: a signal to a process that this test started.
    assert_eq!(unsafe { libc::kill(daemons[0].pid, signal) }, 0);
}

/// Sends a broadcast out of a host's link to the client network, with this source.
fn speak_as(source: Mac, host: &Host) {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&source);
    // An EtherType for experiments (IEEE 802).
    frame.extend_from_slice(&[0x88, 0xb5]);
    frame.resize(60, 0);
    host.send_frame(frame).expect("a frame that is sent");
}

/// The engine is dead and its successor has not won yet, for its daemon stands still: what is sent now is for the
/// successor, not for the dead one, whose clients would wait for their retransmission timers.
#[test]
fn a_request_that_is_sent_during_a_takeover_reaches_the_successor() {
    const TEST: &str = "a_request_that_is_sent_during_a_takeover_reaches_the_successor";
    let _turn = scene::turn();
    let programs = built(TEST);
    test_inside(TEST, || {
        let mut scene = scene(TEST, &programs);
        signal_daemon(&scene, 1, libc::SIGSTOP);
        let before = requests(&scene, 0);
        let (killed, _) = scene.lab.host(0).kill_program("ftvm-engine").expect("a kill");
        assert_eq!(killed, 1);
        scene.wait_for("call from the successor", |scene| {
            frames(scene, 1, Direction::FromGuest, Kind::Announcement) > 0
        });
        assert_eq!(
            frames(&scene, 1, Direction::FromGuest, Kind::Tcp),
            0,
            "it is not active: nothing of the guest leaves"
        );
        scene.client.asker.ask();
        scene.wait_for("request", |scene| requests(scene, 1) > 0);
        signal_daemon(&scene, 1, libc::SIGCONT);
        scene.client.asker.wait();
        assert_eq!(requests(&scene, 0), before, "something was sent to the dead engine");
        assert_eq!(
            frames(&scene, 1, Direction::FromGuest, Kind::GratuitousArp),
            0,
            "nobody said which IP addresses the guest has"
        );
    });
}

/// Whether the second host announced an IPv4 address of the guest, and an IPv6 address.
fn announced(scene: &Scene) -> [bool; 2] {
    let kinds = [Kind::GratuitousArp, Kind::NeighbourAdvertisement];
    kinds.map(|kind| frames(scene, 1, Direction::FromGuest, kind) > 0)
}

/// What neighbours know of its IP addresses is the guest's to say: it is said by the side that is active, not by one that only asks for
/// the guest's frames.
#[test]
fn a_successor_announces_the_guests_ip_addresses_once_it_is_active() {
    const TEST: &str = "a_successor_announces_the_guests_ip_addresses_once_it_is_active";
    let _turn = scene::turn();
    let programs = built(TEST);
    test_inside(TEST, || {
        let mut scene = scene_of(TEST, &programs, &["10.77.0.2", "2001:db8::2"]);
        signal_daemon(&scene, 1, libc::SIGSTOP);
        let (killed, _) = scene.lab.host(0).kill_program("ftvm-engine").expect("a kill");
        assert_eq!(killed, 1);
        scene.wait_for("call from the successor", |scene| {
            frames(scene, 1, Direction::FromGuest, Kind::Announcement) > 0
        });
        assert_eq!(announced(&scene), [false; 2], "it is not active");
        signal_daemon(&scene, 1, libc::SIGCONT);
        scene.wait_for("announcements", |scene| announced(scene) == [true; 2]);
        scene.client.asker.ask();
        scene.client.asker.wait();
        let seat = scene.seat(1);
        let refused = &seat.counters["nic_refused"]["net0"];
        let all = refused.as_object().expect("by reason");
        assert!(!all.is_empty() && all.values().all(|count| *count == 0), "{refused}");
    });
}

/// A protected pair whose guest nobody can reach, and who looks for frames with this source.
fn unheard(
    test: &str,
    programs: &Programs,
    source: Mac,
    prepare: impl FnOnce(Standalone) -> Standalone,
) -> scene::Scene<Sniffer> {
    let place = (env!("CARGO_TARGET_TMPDIR"), test);
    let prepare = |_: &Lab, system: Standalone| prepare(system);
    let client = |lab: &Lab| sniffer(lab, source);
    let mut scene = scene::Scene::new(place, programs, &options(), prepare, client);
    scene.wait_for_protection(0);
    scene
}

/// Asks for the guest in vain until frames of the guest were refused for this reason.
fn ask_until_refused(scene: &mut scene::Scene<Sniffer>, reason: &str) {
    scene.wait_for("refusal", |scene| {
        let entrance = scene.lab.client_entrance().expect("the client's namespace");
        let asked = std::thread::spawn(move || {
            entrance().expect("the client's namespace");
            TcpStream::connect_timeout(&scene::guest(), Duration::from_secs(1)).is_ok()
        });
        assert!(!asked.join().expect("no panic"), "the guest was heard");
        let seat = scene.system.seat(0);
        seat.is_some_and(|seat| seat.counters["nic_refused"]["net0"][reason].as_u64() > Some(0))
    });
}

/// Frames of the guest that came out of the host where it runs, and are no announcements of the engine's.
fn heard(scene: &scene::Scene<Sniffer>) -> usize {
    let timeline = scene.client.timeline();
    let of = |kind| timeline.count(0, Direction::FromGuest, kind);
    of(Kind::Tcp) + of(Kind::Other)
}

/// The guest answers for an address that is not the one it was given. (With the one it has, and with none known, it is heard: all the
/// other tests.)
#[test]
fn a_guest_is_not_heard_with_anothers_ip_address() {
    const TEST: &str = "a_guest_is_not_heard_with_anothers_ip_address";
    let _turn = scene::turn();
    let programs = built(TEST);
    test_inside(TEST, || {
        let mut scene = unheard(TEST, &programs, GUEST_MAC, |system| {
            system.with_addresses(&["10.77.0.99"])
        });
        ask_until_refused(&mut scene, "arp");
        assert_eq!(heard(&scene), 0);
        // Its successor goes by the same.
        scene.lab.host(0).kill().expect("a host that dies");
        scene.wait_for_active(1);
        scene.wait_for("announcement of the address that it was given", |scene| {
            let timeline = scene.client.timeline();
            timeline.count(1, Direction::FromGuest, Kind::GratuitousArp) > 0
        });
        let timeline = scene.client.timeline();
        let of = |kind| timeline.count(1, Direction::FromGuest, kind);
        assert_eq!((of(Kind::Tcp), of(Kind::Other)), (0, 0));
    });
}

#[test]
fn a_guest_is_not_heard_with_anothers_mac_address() {
    const TEST: &str = "a_guest_is_not_heard_with_anothers_mac_address";
    const OTHER: Mac = [0x02, 0xF7, 0x00, 0x00, 0x00, 0x09];
    let _turn = scene::turn();
    let programs = built(TEST);
    test_inside(TEST, || {
        let words = format!("mac={}", mac_text(OTHER));
        let mut scene = unheard(TEST, &programs, OTHER, |system| system.with_command_line(&words));
        ask_until_refused(&mut scene, "mac");
        assert_eq!(heard(&scene), 0);
        // Were there one, it would be seen.
        speak_as(OTHER, scene.lab.host(0));
        scene.wait_for("frame", |scene| heard(scene) > 0);
    });
}

/// A host that was active once goes on where it stood and sends old frames: bridges then look for the guest there.
#[test]
fn the_active_side_announces_the_guest_when_somebody_else_speaks_with_its_address() {
    const TEST: &str = "the_active_side_announces_the_guest_when_somebody_else_speaks_with_its_address";
    let _turn = scene::turn();
    let programs = built(TEST);
    test_inside(TEST, || {
        let mut scene = scene(TEST, &programs);
        for round in 1..=3 {
            speak_as(GUEST_MAC, scene.lab.host(2));
            scene.wait_for("announcement", |scene| announced_after_the_speech(scene, round));
            scene.client.asker.ask();
            scene.client.asker.wait();
        }
        assert_eq!(
            requests(&scene, 2),
            0,
            "the bridge looked for the guest where it is not"
        );
    });
}

/// Has all bridges on the way look for the guest at this host, whatever they see.
fn pin_the_guest_to(scene: &Scene, host: usize) {
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let host = scene.lab.host(host);
    let entry = |port: &str| {
        let mut command = Command::new("bridge");
        command.args(["fdb", "replace", &mac, "dev", port, "master", "static", "sticky"]);
        command
    };
    let here = entry(&host.client_port()).status().expect("bridge, of iproute2");
    assert!(here.success(), "{here}");
    host.run(entry("guest0")).expect("the host's bridge takes it, too");
}

/// Bridges that learn late where the guest is after a switchover: what they send to the source reaches the guest all the same, and no
/// client has to wait for its retransmission timer.
#[test]
fn what_reaches_the_source_after_a_switchover_is_passed_on() {
    const TEST: &str = "what_reaches_the_source_after_a_switchover_is_passed_on";
    let _turn = scene::turn();
    let programs = built(TEST);
    test_inside(TEST, || {
        let mut scene = scene(TEST, &programs);
        pin_the_guest_to(&scene, 0);
        scene.system.hand_over(0).expect("a switchover");
        let mut answers_from_the_target = 0;
        // The second of them was asked for when the guest ran at the target.
        while answers_from_the_target < 2 {
            let sent_before = frames(&scene, 1, Direction::FromGuest, Kind::Tcp);
            scene.client.asker.ask();
            scene.client.asker.wait();
            answers_from_the_target += usize::from(sent_before > 0);
        }
        assert_eq!(requests(&scene, 1), 0, "all were sent to the source");
    });
}

/// Whether the active host announced the guest after the third host spoke for the `speeches`th time.
fn announced_after_the_speech(scene: &Scene, speeches: usize) -> bool {
    let timeline = scene.client.sniffer.timeline();
    let spoke_last = timeline.last_at(2, Direction::FromGuest, Kind::Other);
    timeline.count(2, Direction::FromGuest, Kind::Other) >= speeches
        && timeline.last_at(0, Direction::FromGuest, Kind::Announcement) > spoke_last
}
