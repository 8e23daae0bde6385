//! The negative control of the judge: the same blow to a protected pair, with the real engine and with one whose output gate is
//! switched off. The first must lose nothing, the second must be caught.
//!
//! The blow leaves nothing to luck. First the link is cut from the active to the standby, so that from then on no epoch is
//! acknowledged. An engine with a gate falls silent; one without goes on answering, and every answer is one that the standby
//! can't know. Then the active's host dies, the link is mended, and the standby takes over.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::standalone::Standalone;
use ftvm_e2e::demo::system::{Role, Seat, System};
use ftvm_e2e::demo::{GUEST_ADDRESS, Options, place};
use ftvm_e2e::guest_protocol::{DEFAULT_PORT, Op};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::hosts::{CutDirection, Lab, LabPlan};
use ftvm_e2e::judge::client::{self, End, Judge, JudgePlan, Outcome};
use ftvm_e2e::lab::binaries;
use serde::{Deserialize, Serialize};

const GUEST: ([u8; 4], u16) = (GUEST_ADDRESS, DEFAULT_PORT);
/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(90);
/// The pair counts its peer as lost after this long without an answer: time for the first half of the blow.
const PEER_LOST_MS: u32 = 6_000;
/// A guest that asks for nothing answers within a fraction of this.
const SILENCE: Duration = Duration::from_millis(700);
/// Answers of a healthy guest, before and after the blow.
const ANSWERS: u64 = 100;

/// One at a time: each keeps both cores of a small machine busy.
static TURN: Mutex<()> = Mutex::new(());

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

/// A protected pair, with a client that asks and asks.
struct Scene {
    lab: Rc<Lab>,
    system: Standalone,
    judge: Judge,
}

impl Scene {
    /// `patience`: without an answer for this long the judge gives up.
    fn new(test: &str, programs: &Programs, engine: &Path, patience: Duration) -> Self {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        let folder = place::show_at_short_path(&folder).unwrap();
        let lab = Rc::new(Lab::new(&LabPlan::three_hosts(&folder)).unwrap());
        let options = Options {
            peer_lost_ms: Some(PEER_LOST_MS),
            ..Options::default()
        };
        let mut system = Standalone::new(Rc::clone(&lab), programs, &folder, &options).with_engine(engine);
        system.start().unwrap();
        let plan = JudgePlan {
            connect_within: PATIENCE,
            stalled_after: patience,
            ..JudgePlan::new(SocketAddr::from(GUEST))
        };
        let judge = Judge::start(plan, lab.client_entrance().unwrap()).unwrap();
        // Memory is not what this is about: with little of it to copy a slow machine has short epochs, too.
        judge.ask(Op::SetChurn, 0, 0).expect("the guest answers");
        judge.go_on();
        let mut scene = Self { lab, system, judge };
        scene.wait_for("protection", |scene| {
            let active = scene.system.seat(0).is_some_and(|seat| seat.protected);
            active && scene.system.seat(1).is_some_and(|seat| seat.role == Role::Standby)
        });
        scene.wait_for_answers();
        scene
    }

    fn wait_for(&mut self, what: &str, done: impl Fn(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            if Instant::now() > deadline {
                let seats: Vec<Option<Seat>> = (0..2).map(|host| self.system.seat(host)).collect();
                panic!("no {what} within {PATIENCE:?}: {seats:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for answers to what is asked from now on.
    fn wait_for_answers(&mut self) {
        let goal = self.judge.answers() + ANSWERS;
        self.wait_for("answers", |scene| {
            scene.judge.answers() >= goal || scene.judge.has_ended()
        });
    }

    /// From here on nothing that the active says reaches the standby.
    fn deafen_standby(&self) {
        self.lab.cut_link(0, 1, CutDirection::FirstToSecond).unwrap();
    }

    /// The active's host dies; the standby takes over.
    fn kill_active(&mut self) {
        self.lab.host(0).kill().unwrap();
        self.lab.mend_links().unwrap();
        self.wait_for("successor", |scene| {
            scene.system.seat(1).is_some_and(|seat| seat.role == Role::Active)
        });
    }

    /// The client's end, and what the successor's guest says on another connection.
    fn judgement(self) -> Outcome {
        let entrance = self.lab.client_entrance().unwrap();
        let mut outcome = self.judge.finish();
        let asked = std::thread::spawn(move || {
            entrance().unwrap();
            client::inspect(SocketAddr::from(GUEST), PATIENCE).unwrap()
        });
        outcome.ledger.inspect(&asked.join().unwrap());
        outcome
    }
}

#[test]
fn without_the_gate_answers_are_lost() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built();
    test_inside("without_the_gate_answers_are_lost", || {
        // The judge sees the successor, too, before it gives up.
        let patience = 2 * Duration::from_millis(PEER_LOST_MS.into());
        let mut scene = Scene::new("ungated", &built.programs, &built.ungated, patience);
        scene.deafen_standby();
        // It answers although nobody could answer in its place.
        scene.wait_for_answers();
        scene.kill_active();
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
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built();
    test_inside("with_the_gate_the_same_blow_loses_nothing", || {
        let engine = built.programs.folder.join("ftvm-engine");
        let mut scene = Scene::new("gated", &built.programs, &engine, PATIENCE);
        scene.deafen_standby();
        // It falls silent, because nobody could answer in its place.
        scene.wait_for("silence", |scene| scene.judge.waiting() > SILENCE);
        scene.kill_active();
        scene.wait_for_answers();
        let outcome = scene.judgement();
        assert!(outcome.is_clean(), "{:?}: {:?}", outcome.end, outcome.complaints());
    });
}
