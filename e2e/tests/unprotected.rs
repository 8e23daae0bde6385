//! Negative controls with a real guest that nobody protects: its host dies, and the judge must turn red.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use ftvm_e2e::demo::rounds::{Patience, Stage};
use ftvm_e2e::demo::system::System;
use ftvm_e2e::demo::unprotected::{Monitor, Unprotected};
use ftvm_e2e::demo::witness::EmbeddedWitness;
use ftvm_e2e::demo::{Fault, GUEST_ADDRESS, GUEST_MAC, Options, programs};
use ftvm_e2e::guest_protocol::{Answer, DEFAULT_PORT, Op};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::hosts::{Lab, LabPlan};
use ftvm_e2e::judge::client::{self, End, Judge, JudgePlan, Outcome};
use ftvm_e2e::lab::binaries::{self, Profile};
use ftvm_e2e::report::{Progress, Report};
use serde::{Deserialize, Serialize};

const GUEST: ([u8; 4], u16) = (GUEST_ADDRESS, DEFAULT_PORT);

fn folder(test: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
    std::fs::remove_dir_all(&path).ok();
    std::fs::create_dir_all(&path).expect("the target folder is writable");
    path
}

/// What is built before the namespaces are entered, because there is no network in them.
#[derive(Serialize, Deserialize)]
struct Built {
    kernel: PathBuf,
    engine: PathBuf,
}

fn built() -> Built {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("unprotected.json");
    let make = || {
        let engine = binaries::build(&[("ftvm-engine", "ftvm-engine")], Profile::Dev)?;
        Ok(Built {
            kernel: programs::build_guest()?,
            engine: engine[0].clone(),
        })
    };
    made_outside(&file, make).expect("the programs build")
}

/// The guest's state, from where its client stood.
fn look(lab: &Lab) -> Answer {
    let entrance = lab.client_entrance().unwrap();
    let asked = std::thread::spawn(move || {
        entrance().unwrap();
        // Nobody announces a guest that boots elsewhere, and its former host's link may be up: who knows its hardware address would ask there
        // for most of a minute. Who asks for it anew is answered by the guest, and the bridges learn.
        let forgot = Command::new("ip").args(["neigh", "flush", "all"]).status().unwrap();
        assert!(forgot.success(), "{forgot}");
        client::inspect(SocketAddr::from(GUEST), Duration::from_secs(60)).unwrap()
    });
    asked.join().unwrap()
}

/// What is left after a play without protection.
struct Aftermath {
    report: Report,
    outcome: Outcome,
    lab: Rc<Lab>,
    system: Unprotected,
}

fn play(test: &str, fault: Fault, monitor: Monitor, kernel: PathBuf) -> Aftermath {
    let folder = folder(test);
    let lab = Rc::new(Lab::new(&LabPlan::three_hosts(&folder)).unwrap());
    let options = Options {
        fault,
        ..Options::default()
    };
    let mut system = Unprotected::new(Rc::clone(&lab), monitor, kernel, folder, options.memory_mib);
    let mut patience = Patience::default();
    if fault != Fault::None {
        // Nobody takes over: its silence is for good.
        patience.stalled = Duration::from_secs(4);
    }
    let progress = Progress::new();
    let client = || {
        let plan = JudgePlan {
            stalled_after: patience.stalled,
            ..JudgePlan::new(SocketAddr::from(GUEST))
        };
        let judge = Judge::start(plan, lab.client_entrance()?)?;
        Ok(EmbeddedWitness {
            judge,
            churn_pages: options.churn_pages,
            churn_rate: options.churn_rate,
        })
    };
    let stage = Stage::prepare(&options, patience, &progress, (&*lab, GUEST_MAC), &mut system, client).unwrap();
    let (report, outcome) = stage.play();
    Aftermath {
        report,
        outcome,
        lab,
        system,
    }
}

#[test]
fn without_a_fault_the_judge_is_green() {
    let built = built();
    test_inside("without_a_fault_the_judge_is_green", || {
        let ending = play("green", Fault::None, Monitor::Qemu, built.kernel);
        assert!(ending.report.passed(), "{:?}", ending.report.complaints);
        assert!(ending.report.answers > 100);
        // The ledger agrees with an observer on another connection.
        let mut ledger = ending.outcome.ledger;
        ledger.inspect(&look(&ending.lab));
        assert!(ledger.findings().is_clean(), "{:?}", ledger.findings());
    });
}

#[test]
fn an_unprotected_guest_whose_host_dies_is_red() {
    let built = built();
    test_inside("an_unprotected_guest_whose_host_dies_is_red", || {
        let mut ending = play("red", Fault::KillHost, Monitor::Qemu, built.kernel);
        assert!(!ending.report.passed());
        assert_eq!(ending.outcome.end, End::Stalled, "{:?}", ending.report.complaints);
        // Somebody starts the machine on another host, from the disk that was saved: what was said is gone.
        ending.system.boot(1).unwrap();
        ending.outcome.ledger.inspect(&look(&ending.lab));
        let findings = ending.outcome.ledger.findings();
        assert!(findings.reboots >= 1, "{findings:?}");
    });
}

#[test]
fn a_killed_process_of_an_unprotected_guest_is_red() {
    let built = built();
    test_inside("a_killed_process_of_an_unprotected_guest_is_red", || {
        let ending = play("red-process", Fault::KillEngine, Monitor::Qemu, built.kernel);
        assert!(!ending.report.passed());
        assert!(
            ending.outcome.unanswered > 0 || ending.outcome.end != End::Told,
            "{:?}",
            ending.outcome.end
        );
    });
}

/// The same guest under the engine that protects it elsewhere: without a standby that engine is no better than another.
#[test]
fn our_engine_without_a_standby_is_red_when_it_is_killed() {
    let built = built();
    test_inside("our_engine_without_a_standby_is_red_when_it_is_killed", || {
        let mut ending = play(
            "red-engine",
            Fault::KillEngine,
            Monitor::Engine(built.engine),
            built.kernel,
        );
        assert!(!ending.report.passed());
        assert_eq!(ending.outcome.end, End::Stalled, "{:?}", ending.report.complaints);
        assert!(ending.report.answers > 100, "it answered before");
        ending.system.boot(1).unwrap();
        ending.outcome.ledger.inspect(&look(&ending.lab));
        let findings = ending.outcome.ledger.findings();
        assert!(findings.reboots >= 1, "{findings:?}");
    });
}

#[test]
fn an_answer_that_only_memory_knew_is_lost() {
    let built = built();
    test_inside("an_answer_that_only_memory_knew_is_lost", || {
        let folder = folder("lost");
        let lab = Rc::new(Lab::new(&LabPlan::three_hosts(&folder)).unwrap());
        let mut system = Unprotected::new(Rc::clone(&lab), Monitor::Qemu, built.kernel, folder, 128);
        System::start(&mut system).unwrap();
        let judge = Judge::start(JudgePlan::new(SocketAddr::from(GUEST)), lab.client_entrance().unwrap()).unwrap();
        assert!(judge.quiet());
        // Durable, durable, and then three that are in memory alone.
        for op in [Op::Journal, Op::Journal, Op::Increment, Op::Increment, Op::Increment] {
            judge.ask(op, 0, 0).unwrap();
        }
        lab.host(0).kill().unwrap();
        let outcome = judge.finish();
        assert!(outcome.findings().is_clean(), "so far nothing contradicts an answer");
        system.boot(1).unwrap();
        let mut ledger = outcome.ledger;
        ledger.inspect(&look(&lab));
        assert_eq!(ledger.findings().lost_answers, 3, "{:?}", ledger.findings());
        assert_eq!(ledger.findings().reboots, 1);
    });
}
