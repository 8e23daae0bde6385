//! The demonstration with an unmodified Debian as guest, on two emulated machines with kernels and KVM of their own.
//!
//! When a machine's plug is pulled it is started again and takes its own place: there is no third one.
mod machines;
mod system;
pub(super) mod witness;

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::ensure;

use self::machines::Emulated;
use self::system::EmulatedSystem;
use self::witness::RedisWitness;
use super::machines::Machines;
use super::rounds::{Patience, Stage};
use super::{Fault, Guest, Options};
use crate::lab::binaries::{self, Profile};
use crate::lab::image::Image;
use crate::lab::{Lab, NodeConfig, guest};
use crate::report::{Progress, Report, table};

/// Everything is slower by a factor of ten to a hundred in here.
const PATIENCE: Patience = Patience {
    protected: Duration::from_secs(1200),
    calm: Duration::from_secs(5),
    stalled: Duration::from_secs(180),
    hold: Duration::from_secs(10),
    // Each look costs an emulated machine a hundredth of a second.
    look: Duration::from_millis(500),
};
/// For the guest to switch itself off.
const STOP: Duration = Duration::from_secs(600);

/// Runs the demonstration and prints its report.
///
/// # Errors
/// If the machines cannot be made; what goes wrong in the play itself is in the report.
pub fn run(options: &Options, profile: Profile) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    let report = play(options, profile, &progress);
    report.conclude(options, &progress, None)
}

/// The whole play; an error outside of a round is a complaint too.
pub fn play(options: &Options, profile: Profile, progress: &Progress) -> Report {
    play_on_stage(options, profile, progress).unwrap_or_else(|error| Report::failed(options, &error, progress))
}

/// The play with a pulled plug, as a test, so many times, each with everything examined.
///
/// # Panics
/// If anything that a client was told did not hold, or was not looked at.
pub fn survives_pulled_plugs(vcpus: u32, rounds: u32) {
    let options = Options {
        fault: Fault::KillHost,
        guest: Guest::Linux,
        memory_mib: 256,
        vcpus,
        rounds,
        ..Options::default()
    };
    // Optimised: everything is emulated, and unoptimised programs would be waited for several times as long.
    let report = play(&options, Profile::Fast, &Progress::new());
    print!("{}", table(&report, false));
    assert!(report.passed(), "{:#?}", report.complaints);
    assert_eq!(report.rounds, rounds);
    assert!(
        report.per_round.iter().all(|round| round.examined),
        "a round was not examined"
    );
    assert!(report.answers > 0 && report.duplicated_answers == 0);
}

fn play_on_stage(options: &Options, profile: Profile, progress: &Progress) -> anyhow::Result<Report> {
    let (machines, disks) = machines(profile, progress)?;
    let mut system = EmulatedSystem::new(Rc::clone(&machines), options, disks.clone());
    let client = || RedisWitness::start(machines.lab.sandbox(), PATIENCE.protected, PATIENCE.stalled);
    let prepared = Stage::prepare(
        options,
        PATIENCE,
        progress,
        (&*machines, guest::MAC),
        &mut system,
        client,
    );
    let stage = match prepared {
        Ok(stage) => stage,
        Err(error) => return Err(error.context(last_words(&machines, &system))),
    };
    let (mut report, ()) = stage.play();
    if report.passed() {
        match examine_disks(&machines, &mut system, &disks, options.fault) {
            Ok(()) => progress
                .good("the guest switched itself off; both disks are equal, file system and Redis' log are in order"),
            Err(error) => report.complaints.push(format!("after the end: {error:#}")),
        }
    } else {
        progress.say(last_words(&machines, &system));
    }
    Ok(report)
}

/// Two machines with everything that they need.
fn machines(profile: Profile, progress: &Progress) -> anyhow::Result<(Rc<Emulated>, Vec<PathBuf>)> {
    progress.say("building what is not fresh (programs and images; the first time takes some minutes)");
    let image = Image::guest()?;
    let mut files = binaries::build(&[("ftvm-engine", "ftvm-engine")], profile)?;
    // Pages, frames and blocks pass through the engine alone. Optimising what daemon and command consist of takes several times as long.
    let others = match profile {
        Profile::Fast => Profile::Dev,
        Profile::Dev | Profile::Release => profile,
    };
    let programs = [("ftvm-node-daemon", "ftvm-node-daemon"), ("ftvm-cli", "ftvm")];
    files.extend(binaries::build(&programs, others)?);
    files.extend([image.kernel.clone(), image.initrd.clone()]);
    let lab = Lab::new(&files)?;
    let share = lab.share()?;
    let disks = ["one.seat.img", "two.seat.img"].map(|name| lab.folder().join(name));
    guest::make_disk(&image, &disks[0])?;
    // The second seat's disk begins empty: the resync must fill it.
    std::fs::File::create(&disks[1])?.set_len(std::fs::metadata(&image.disk)?.len())?;
    let boot = |name, index: u8| {
        let disk = disks[usize::from(index) - 1].clone();
        lab.node(
            name,
            index,
            NodeConfig {
                disks: vec![disk],
                ..NodeConfig::default()
            },
        )
    };
    let (one, two) = std::thread::scope(|scope| {
        let two = scope.spawn(|| boot("two", 2));
        (boot("one", 1), two.join())
    });
    let two = two.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let nodes = vec![one?, two];
    progress.say("two emulated machines, three networks and a shared folder are up");
    Ok((Rc::new(Emulated { nodes, share, lab }), disks.to_vec()))
}

/// The guest stops; then what is on the disks is looked at from outside.
fn examine_disks(
    machines: &Emulated,
    system: &mut EmulatedSystem,
    disks: &[PathBuf],
    fault: Fault,
) -> anyhow::Result<()> {
    use super::system::{Role, System};
    guest::ssh(machines.lab.sandbox(), "poweroff")?;
    let deadline = Instant::now() + STOP;
    let running = |system: &mut EmulatedSystem| {
        let lives = |role| !matches!(role, Role::Stopped | Role::Halted);
        (0..disks.len()).any(|machine| system.seat(machine).is_some_and(|seat| lives(seat.role)))
    };
    while running(system) {
        ensure!(
            Instant::now() < deadline,
            "the guest switched itself off, but its seats do not stop (fault {})",
            fault.name()
        );
        std::thread::sleep(Duration::from_millis(500));
    }
    for node in &machines.nodes {
        node.sh("sync")?;
        node.kill()?;
    }
    for disk in disks {
        guest::examine_disk(disk, machines.lab.folder())?;
    }
    Ok(())
}

fn last_words(machines: &Emulated, system: &EmulatedSystem) -> String {
    let alive = (0..machines.nodes.len()).filter(|&machine| machines.is_running(machine));
    alive
        .map(|machine| format!("{}:\n{}\n", machines.nodes[machine].name(), system.last_words(machine)))
        .collect()
}
