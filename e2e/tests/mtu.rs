//! The guest's MTU is that of the bridge where it boots, and its own from then on: it goes with it, and a host that carries less does not take it.
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::system::{Seat, System};
use ftvm_e2e::demo::{GUEST_MAC, Options};
use ftvm_e2e::guest_protocol::{ANSWER_BYTES, Op, Request};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::hosts::{Host, Lab};
use ftvm_e2e::judge::sniffer::Sniffer;
use ftvm_e2e::judge::timeline::Direction;
use ftvm_e2e::scene::{self, PATIENCE};
use serde_json::json;

/// IPv4 and TCP without options.
const HEADERS_BYTES: usize = 40;
/// What the client asks for at a time: many full segments.
const BULK_BYTES: usize = 200_000;

type Scene = scene::Scene<Sniffer>;

/// The programs, built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mtu.json");
    made_outside(&file, || programs::build(Profile::Dev)).expect("the programs build")
}

/// A pair on hosts whose bridges for the guest have these MTUs.
fn scene(test: &str, programs: &Programs, mtus: [u16; 3]) -> Scene {
    let place = (env!("CARGO_TARGET_TMPDIR"), test);
    let prepare = |lab: &Lab, system| {
        for (host, mtu) in lab.hosts().iter().zip(mtus) {
            set_mtu(host, mtu);
        }
        system
    };
    let client = |lab: &Lab| {
        let ports = lab.hosts().iter().map(Host::client_port).collect();
        Sniffer::start(GUEST_MAC, ports).expect("a sniffer")
    };
    // A machine that is busy for a while must not count as dead: which host takes over is judged.
    let options = Options {
        peer_lost_ms: Some(3_000),
        ..Options::default()
    };
    Scene::new(place, programs, &options, prepare, client)
}

/// Of the host's link to the client network: a bridge whose MTU was not set follows its ports.
fn set_mtu(host: &Host, mtu: u16) {
    ip(host, &["link", "set", Lab::CLIENT_LINK, "mtu", &mtu.to_string()]);
    let told = ip(host, &["link", "show", Lab::GUEST_BRIDGE]);
    assert!(told.contains(&format!("mtu {mtu} ")), "{told}");
}

fn ip(host: &Host, arguments: &[&str]) -> String {
    let mut command = Command::new("ip");
    command.args(arguments);
    let output = host.run(command).expect("the host runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Asks the guest for much, on a connection of its own, and takes it.
fn fetch(scene: &Scene) {
    let entrance = scene.lab.client_entrance().expect("the client's namespace");
    let work = move || {
        entrance().expect("the client's namespace");
        let mut stream = scene::connect();
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let request = Request::new(Op::Bulk, 1, BULK_BYTES as u64, 0).encode();
        stream.write_all(&request).expect("the connection stands");
        stream
            .read_exact(&mut vec![0; ANSWER_BYTES + BULK_BYTES])
            .expect("all of it comes");
    };
    std::thread::spawn(work).join().expect("no panic");
}

fn largest_from(scene: &Scene, host: usize) -> usize {
    scene
        .client
        .timeline()
        .largest_payload_bytes(host, Direction::FromGuest)
}

fn expect_mtu(seat: &Seat, mtu: u16) {
    assert_eq!(seat.counters["nic_mtus"], json!([mtu]), "{seat:?}");
    assert_eq!(
        (&seat.counters["nic_tx_dropped"], &seat.counters["nic_rx_dropped"]),
        (&json!(0), &json!(0))
    );
}

#[test]
fn a_failover_keeps_the_guests_mtu() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("a_failover_keeps_the_guests_mtu", || {
        // The second host carries more, the third exactly as much.
        let mut scene = scene("mtu-kept", &programs, [1400, 1500, 1400]);
        scene.wait_for_protection(0);
        fetch(&scene);
        expect_mtu(&scene.seat(0), 1400);
        expect_mtu(&scene.seat(1), 1400);
        assert_eq!(
            largest_from(&scene, 0),
            1400 - HEADERS_BYTES,
            "whole segments of the guest's MTU"
        );
        scene.lab.host(0).kill().unwrap();
        scene.wait_for_active(1);
        fetch(&scene);
        expect_mtu(&scene.seat(1), 1400);
        assert_eq!(largest_from(&scene, 1), 1400 - HEADERS_BYTES);
        // A seat that joins the successor goes by the guest's MTU, not by that of the successor's bridge.
        scene.system.replace(0, 2).unwrap();
        scene.wait_for_protection(1);
        expect_mtu(&scene.seat(2), 1400);
    });
}

/// Its frames would be lost there in silence. Both sides say so, by the card's name, and the guest goes on.
#[test]
fn a_host_that_carries_less_than_the_guests_mtu_does_not_take_it() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("a_host_that_carries_less_than_the_guests_mtu_does_not_take_it", || {
        let mut scene = scene("mtu-less", &programs, [1500, 1400, 1500]);
        fetch(&scene);
        let told = |text: &str| {
            let words = [
                "network card net0",
                "an MTU of 1500 bytes",
                "carries 1400:",
                "Raise the MTU",
            ];
            words.iter().all(|words| text.contains(words))
        };
        scene.wait_for("word of the active", |scene| {
            scene
                .system
                .seat(0)
                .is_some_and(|seat| !seat.protected && told(&seat.why))
        });
        // Its engine ends, and another one comes.
        scene.wait_for("word of the one that can't join", |scene| told(&scene.system.why(1)));
        fetch(&scene);
        expect_mtu(&scene.seat(0), 1500);
        assert_eq!(largest_from(&scene, 0), 1500 - HEADERS_BYTES);
        // Mended as the message says. (The tap of an engine that tries may be on the bridge, so its MTU is set.)
        for device in [Lab::CLIENT_LINK, Lab::GUEST_BRIDGE] {
            ip(scene.lab.host(1), &["link", "set", device, "mtu", "1500"]);
        }
        scene.wait_for_protection(0);
        expect_mtu(&scene.seat(1), 1500);
    });
}
