//! The demonstration as a test: every fault, a protected guest on real KVM, and nothing may be lost.
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ftvm_e2e::demo::programs::{Profile, Programs};
use ftvm_e2e::demo::{Fault, Options, command, programs};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::report::{Progress, Report, table};

/// One at a time: each keeps both cores of a small machine busy, and gaps are measured.
static TURN: Mutex<()> = Mutex::new(());

/// The programs, built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("programs.json");
    made_outside(&file, || programs::build(Profile::Dev)).expect("the programs build")
}

/// Plays some rounds of a fault and demands a clean report.
fn play(test: &str, options: &Options) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let programs = built();
    test_inside(test, || {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        let report = command::play(options, &programs, &folder, &Progress::new());
        println!("{}", table(&report, false));
        check(options, &report);
    });
}

fn check(options: &Options, report: &Report) {
    assert!(report.passed(), "{:#?}", report.complaints);
    assert_eq!(report.rounds, options.rounds);
    for round in &report.per_round {
        assert!(round.examined, "round {} was not examined", round.round);
        assert_eq!(
            round.dual_active + round.lost_answers + round.duplicated_answers,
            0,
            "{round:?}"
        );
    }
    assert!(report.answers > 100, "{} answers", report.answers);
}

fn rounds(fault: Fault, rounds: u32) -> Options {
    Options {
        fault,
        rounds,
        ..Options::default()
    }
}

#[test]
fn nothing_is_lost_without_a_fault() {
    play("nothing_is_lost_without_a_fault", &rounds(Fault::None, 1));
}

#[test]
fn nothing_is_lost_when_an_engine_is_killed() {
    play(
        "nothing_is_lost_when_an_engine_is_killed",
        &rounds(Fault::KillEngine, 2),
    );
}

#[test]
fn nothing_is_lost_when_a_host_is_killed() {
    play("nothing_is_lost_when_a_host_is_killed", &rounds(Fault::KillHost, 2));
}

#[test]
fn nothing_is_lost_when_a_host_stands_still_and_goes_on() {
    play(
        "nothing_is_lost_when_a_host_stands_still_and_goes_on",
        &rounds(Fault::PauseHost, 2),
    );
}

#[test]
fn nothing_is_lost_when_the_link_is_cut() {
    play("nothing_is_lost_when_the_link_is_cut", &rounds(Fault::CutLink, 2));
}

#[test]
fn nothing_is_lost_when_the_link_is_cut_one_way() {
    play(
        "nothing_is_lost_when_the_link_is_cut_one_way",
        &rounds(Fault::CutLinkOneWay, 1),
    );
}
