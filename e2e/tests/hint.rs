//! The daemon of an engine that died tells the daemon of its peer at once, over a connection of the daemons' own.
//!
//! The closed socket of the dead engine tells the same, and usually sooner. So here nothing of it arrives: what hosts send to or from the
//! port of replication links is dropped, in both directions, right before the engine is killed. The same with the daemons' port dropped,
//! too, is the negative control: the standby notices no sooner than it has to by itself.

use std::path::Path;
use std::time::{Duration, Instant};

use ftvm_e2e::demo::Options;
use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::standalone::{DAEMON_PORT, LINK_PORT, Standalone};
use ftvm_e2e::demo::system::System;
use ftvm_e2e::hosts::Lab;
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::scene;

type Scene = scene::Scene<()>;

/// The programs, built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hint.json");
    made_outside(&file, || programs::build(Profile::Dev)).expect("the programs build")
}

/// A protected pair in which a side counts as lost after this time.
fn scene(test: &str, programs: &Programs, detection: Duration) -> Scene {
    let options = Options {
        peer_lost_ms: Some(u32::try_from(detection.as_millis()).unwrap()),
        memory_mib: 48,
        ..Options::default()
    };
    let place = (env!("CARGO_TARGET_TMPDIR"), test);
    let apart = |_: &Lab, system: Standalone| system.with_daemons_apart();
    let mut scene = Scene::new(place, programs, &options, apart, |_| ());
    scene.wait_for_protection(0);
    scene
}

/// Kills the active's engine while these ports are cut: how long it took from the cut until its standby was active, and what told it.
fn kill_engine(scene: &mut Scene, cut: &[u16]) -> (Duration, String) {
    // The standby hears nothing from here on, however long this takes.
    let began = Instant::now();
    for port in cut {
        scene.lab.cut_port(*port).unwrap();
    }
    let (killed, _) = scene.lab.host(0).kill_program(scene.system.engine_program()).unwrap();
    assert_eq!(killed, 1);
    scene.wait_for_active(1);
    let took = began.elapsed();
    let noticed_by = |scene: &mut Scene| {
        let seat = scene.system.seat(1)?;
        Some(seat.counters.get("takeover_noticed_by")?.as_str()?.to_owned())
    };
    scene.wait_for("measured takeover", |scene| noticed_by(scene).is_some());
    let noticed_by = noticed_by(scene).expect("it was there");
    println!("active after {took:?}, told by {noticed_by}");
    (took, noticed_by)
}

#[test]
fn where_the_link_tells_nothing_the_daemon_of_a_dead_engine_does() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("where_the_link_tells_nothing_the_daemon_of_a_dead_engine_does", || {
        let detection = Duration::from_secs(30);
        let mut scene = scene("hint", &programs, detection);
        let (took, noticed_by) = kill_engine(&mut scene, &[LINK_PORT]);
        assert_eq!(noticed_by, "its daemon's word");
        assert!(took < detection / 6, "{took:?}");
    });
}

#[test]
fn where_the_daemons_are_apart_too_only_silence_tells() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("where_the_daemons_are_apart_too_only_silence_tells", || {
        let detection = Duration::from_secs(6);
        let mut scene = scene("hint-lost", &programs, detection);
        let (took, noticed_by) = kill_engine(&mut scene, &[LINK_PORT, DAEMON_PORT]);
        assert_eq!(noticed_by, "its silence");
        // From the last word that came through, which was a moment before the cut.
        assert!(took > detection * 3 / 4, "{took:?}");
    });
}
