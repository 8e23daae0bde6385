//! A protected Debian survives the death of its machine: the demonstration with Linux, as a test.
use ftvm_e2e::demo::{Fault, Guest, Options, linux};
use ftvm_e2e::lab::binaries::Profile;
use ftvm_e2e::report::{Progress, table};

fn survives(fault: Fault, vcpus: u32, rounds: u32) {
    let options = Options {
        fault,
        guest: Guest::Linux,
        memory_mib: 256,
        vcpus,
        rounds,
        ..Options::default()
    };
    // Optimised: everything is emulated, and unoptimised programs would be waited for several times as long.
    let report = linux::play(&options, Profile::Fast, &Progress::new());
    print!("{}", table(&report, false));
    assert!(report.passed(), "{:#?}", report.complaints);
    assert_eq!(report.rounds, rounds);
    assert!(
        report.per_round.iter().all(|round| round.examined),
        "a round was not examined"
    );
    assert!(report.answers > 0 && report.duplicated_answers == 0);
}

#[test]
fn pulled_plug_three_times() {
    survives(Fault::KillHost, 1, 3);
}

#[test]
fn pulled_plug_with_two_vcpus() {
    survives(Fault::KillHost, 2, 1);
}
