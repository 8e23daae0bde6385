//! The negative control of the judge: the same blow to a protected pair, with the real engine and with one whose output gate is
//! switched off. The first must lose nothing, the second must be caught.
//!
//! The blow leaves nothing to luck. First the link is cut from the active to the standby, so that from then on no epoch is
//! acknowledged. An engine with a gate falls silent; one without goes on answering, and every answer is one that the standby
//! can't know. Then the active's host dies, the link is mended, and the standby takes over.
use std::path::{Path, PathBuf};
use std::time::Duration;

use ftvm_e2e::demo::Options;
use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::standalone::Standalone;
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::hosts::{CutDirection, Lab};
use ftvm_e2e::judge::client::{End, Judge};
use ftvm_e2e::lab::binaries;
use ftvm_e2e::scene::{self, PATIENCE};
use serde::{Deserialize, Serialize};

/// The pair counts its peer as lost after this long without an answer: time for the first half of the blow.
const PEER_LOST_MS: u32 = 6_000;
/// A guest that asks for nothing answers within a fraction of this.
const SILENCE: Duration = Duration::from_millis(700);

#[derive(Serialize, Deserialize)]
struct Built {
    programs: Programs,
    ungated: PathBuf,
}

/// The programs, built before the namespaces are entered: there is no network in them.
fn built() -> Built {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ungated.json");
    let make = || {
        Ok(Built {
            programs: programs::build(Profile::Dev)?,
            ungated: binaries::build_example("ftvm-e2e", "ungated-engine", Profile::Dev)?,
        })
    };
    made_outside(&file, make).expect("the programs build")
}

type Scene = scene::Scene<Judge>;

/// A protected pair with a client that asks and asks. `patience`: without an answer for this long the judge gives up.
fn scene(test: &str, programs: &Programs, engine: &Path, patience: Duration) -> Scene {
    let options = Options {
        peer_lost_ms: Some(PEER_LOST_MS),
        ..Options::default()
    };
    let place = (env!("CARGO_TARGET_TMPDIR"), test);
    let prepare = |_: &Lab, system: Standalone| system.with_engine(engine);
    let mut scene = Scene::new(place, programs, &options, prepare, |lab| scene::judge(lab, patience));
    scene.calm();
    scene.wait_for_protection(0);
    scene.wait_for_answers();
    scene
}

/// From here on nothing that the active says reaches the standby. Everything that the client waits for then was asked afterwards.
fn deafen_standby(scene: &Scene) {
    assert!(scene.client.quiet(), "the client gave up");
    scene.lab.cut_link(0, 1, CutDirection::FirstToSecond).unwrap();
    scene.client.go_on();
}

/// The active's host dies; the standby takes over.
fn kill_active(scene: &mut Scene) {
    scene.lab.host(0).kill().unwrap();
    scene.lab.mend_links().unwrap();
    scene.wait_for_active(1);
}

#[test]
fn without_the_gate_answers_are_lost() {
    let _turn = scene::turn();
    let built = built();
    test_inside("without_the_gate_answers_are_lost", || {
        // The judge sees the successor, too, before it gives up.
        let patience = 2 * Duration::from_millis(PEER_LOST_MS.into());
        let mut scene = scene("ungated", &built.programs, &built.ungated, patience);
        deafen_standby(&scene);
        // It answers although nobody could answer in its place.
        scene.wait_for_answers();
        kill_active(&mut scene);
        let outcome = scene.judgement();
        let findings = outcome.findings();
        assert_ne!(outcome.end, End::Told, "the connection lived on: {findings:?}");
        assert!(findings.lost_answers > 0, "the judge saw nothing: {findings:?}");
        assert!(!outcome.is_clean());
        assert_eq!(findings.reboots, 0, "it is the standby's guest that was asked");
    });
}

#[test]
fn with_the_gate_the_same_blow_loses_nothing() {
    let _turn = scene::turn();
    let built = built();
    test_inside("with_the_gate_the_same_blow_loses_nothing", || {
        let engine = built.programs.folder.join("ftvm-engine");
        let mut scene = scene("gated", &built.programs, &engine, PATIENCE);
        deafen_standby(&scene);
        // It falls silent, because nobody could answer in its place.
        scene.wait_for("silence", |scene| scene.client.waiting() > SILENCE);
        kill_active(&mut scene);
        scene.wait_for_answers();
        scene.expect_clean();
    });
}
