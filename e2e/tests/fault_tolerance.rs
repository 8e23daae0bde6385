//! What a user chooses of the protection, seen by a client with one connection.
//!
//! A guest that may not run alone (`when_unprotected: pause`): nothing is answered while there is no standby, whatever the reason, and
//! everything goes on once there is one. The same blow to a guest that may run alone is the negative control.
//!
//! A standby that is to go costs no answer: it acknowledges until it is ejected. One that ends at once is the negative control.
//!
//! A target for the added latency (`target_latency_us`): epochs are longer, and fewer, than without.
use std::path::Path;
use std::time::{Duration, Instant};

use ftvm_e2e::demo::Options;
use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::standalone::Standalone;
use ftvm_e2e::demo::system::{Role, System};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::hosts::{CutDirection, Lab};
use ftvm_e2e::judge::client::Judge;
use ftvm_e2e::scene::{self, ANSWERS, PATIENCE};
use serde_json::json;

/// A guest that runs answers within a fraction of this.
const SILENCE: Duration = Duration::from_secs(2);
/// For counting.
const WINDOW: Duration = Duration::from_secs(5);

/// The programs, built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault-tolerance.json");
    made_outside(&file, || programs::build(Profile::Dev)).expect("the programs build")
}

type Scene = scene::Scene<Judge>;

/// Cuts the seats off from each other first, if `apart`.
fn scene(test: &str, programs: &Programs, apart: bool, change: impl FnOnce(Standalone) -> Standalone) -> Scene {
    let options = Options {
        // Not what this is about, and a busy machine needs its time.
        peer_lost_ms: Some(3_000),
        memory_mib: 48,
        ..Options::default()
    };
    let prepare = |lab: &Lab, system| {
        if apart {
            lab.cut_link(0, 1, CutDirection::Both).unwrap();
        }
        change(system)
    };
    let place = (env!("CARGO_TARGET_TMPDIR"), test);
    Scene::new(place, programs, &options, prepare, |lab| scene::judge(lab, PATIENCE))
}

/// The guest stands still on this host, and for long not a single answer comes to the client, which asks and asks.
fn expect_silence(scene: &mut Scene, host: usize) {
    scene.wait_for("pause", |scene| scene.system.seat(host).is_some_and(|seat| seat.paused));
    // What had left before may still come. A guest that never ran has not even taken the connection on which one waits.
    scene.wait_for("silence", |scene| {
        scene.client.answers() == 0 || scene.client.waiting() > SILENCE
    });
    let before = scene.client.answers();
    std::thread::sleep(SILENCE);
    let seat = scene.seat(host);
    assert!(seat.paused && !seat.protected && seat.role == Role::Active, "{seat:?}");
    assert_eq!(seat.counters["guest_running"], false);
    assert!(seat.counters["paused_us"].as_u64().is_some_and(|us| us > 0));
    assert!(seat.why.contains("until a standby has joined"), "{}", seat.why);
    assert_eq!(
        scene.client.answers(),
        before,
        "it was answered although nobody could take over"
    );
}

/// A host that lost everything becomes a spare one.
fn renew(scene: &mut Scene, host: usize) {
    scene.lab.host(host).start().unwrap();
    scene.system.make_spare(host).unwrap();
}

#[test]
fn with_pause_nothing_is_answered_while_nobody_could_take_over() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("with_pause_nothing_is_answered_while_nobody_could_take_over", || {
        let mut scene = scene("pause", &programs, false, Standalone::with_pause);
        scene.wait_for_protection(0);
        scene.calm();
        // A planned hand-over leaves no time without protection.
        scene.system.hand_over(0).unwrap();
        scene.wait_for_protection(1);
        scene.wait_for_answers();
        // The active dies: its successor stands still until it has a standby of its own.
        scene.lab.host(1).kill().unwrap();
        expect_silence(&mut scene, 0);
        scene.system.replace(1, 2).unwrap();
        scene.wait_for_protection(0);
        scene.wait_for_answers();
        // The standby dies: the active stands still, too.
        scene.lab.host(2).kill().unwrap();
        expect_silence(&mut scene, 0);
        renew(&mut scene, 1);
        scene.system.replace(2, 1).unwrap();
        scene.wait_for_protection(0);
        scene.wait_for_answers();
        let seat = scene.seat(0);
        assert_eq!((seat.paused, &seat.counters["guest_running"]), (false, &true.into()));
        assert_eq!(scene.system.trouble(), None);
        assert!(scene.client.quiet());
        scene.system.compare_sides(0, 1).unwrap();
        scene.client.go_on();
        scene.wait_for_answers();
        scene.expect_clean();
    });
}

#[test]
fn without_pause_the_same_blow_is_answered_through() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("without_pause_the_same_blow_is_answered_through", || {
        let mut scene = scene("continue", &programs, false, |system| system);
        scene.wait_for_protection(0);
        scene.calm();
        scene.lab.host(0).kill().unwrap();
        scene.wait_for_active(1);
        scene.wait_for_answers();
        let seat = scene.seat(1);
        assert!(!seat.paused && !seat.protected, "{seat:?}");
        scene.expect_clean();
    });
}

/// Nothing of the guest is heard before it is protected, not even on its console; then it boots.
#[test]
fn with_pause_the_first_start_waits_for_a_standby() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("with_pause_the_first_start_waits_for_a_standby", || {
        let mut scene = scene("pause-first", &programs, true, Standalone::with_pause);
        expect_silence(&mut scene, 0);
        let seat = scene.seat(0);
        assert_eq!(seat.counters["released_items"], 0, "{seat:?}");
        scene.lab.mend_links().unwrap();
        scene.wait_for_protection(0);
        scene.calm();
        assert!(scene.seat(0).counter("released_items").is_some_and(|items| items > 0.0));
        scene.expect_clean();
    });
}

/// While the arbiter is away: nobody can be ejected, so it shows who needs whom.
fn without_arbiter(scene: &mut Scene, leave: impl FnOnce(&mut Scene)) {
    let (folder, hidden) = (scene.folder.join("arbiter"), scene.folder.join("hidden"));
    std::fs::rename(&folder, &hidden).unwrap();
    leave(scene);
    std::fs::rename(&hidden, &folder).unwrap();
}

#[test]
fn a_standby_that_is_to_go_costs_no_answer_however_long_it_takes_to_eject_it() {
    let _turn = scene::turn();
    let programs = built();
    let test = "a_standby_that_is_to_go_costs_no_answer_however_long_it_takes_to_eject_it";
    test_inside(test, || {
        let mut scene = scene("leave", &programs, false, |system| system);
        scene.wait_for_protection(0);
        scene.calm();
        let term = scene.seat(0).term;
        without_arbiter(&mut scene, |scene| {
            scene.system.leave(1, PATIENCE).unwrap();
            scene.wait_for("farewell", |scene| {
                let seat = scene.system.seat(1);
                seat.is_some_and(|seat| seat.leaving)
            });
            for _ in 0..5 {
                scene.wait_for_answers();
                std::thread::sleep(SILENCE / 5);
            }
            assert_eq!(scene.seat(1).role, Role::Standby);
        });
        // Its daemon starts it again, for it was not told that the seat goes: ejected and admitted are two terms.
        scene.wait_for("new standby", |scene| {
            let seat = scene.system.seat(0);
            seat.is_some_and(|seat| seat.protected && seat.term >= term + 2)
        });
        // An active that is to go hands over first, and then follows until it is ejected.
        let term = scene.seat(0).term;
        scene.system.leave(0, PATIENCE).unwrap();
        scene.wait_for("hand-over", |scene| {
            let seat = scene.system.seat(1);
            seat.is_some_and(|seat| seat.role == Role::Active && seat.protected && seat.term >= term + 3)
        });
        scene.wait_for_answers();
        scene.expect_clean();
    });
}

#[test]
fn a_standby_that_ends_at_once_holds_the_guests_answers_up() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("a_standby_that_ends_at_once_holds_the_guests_answers_up", || {
        let mut scene = scene("leave-at-once", &programs, false, |system| system);
        scene.wait_for_protection(0);
        scene.calm();
        without_arbiter(&mut scene, |scene| {
            scene.system.leave(1, Duration::ZERO).unwrap();
            scene.wait_for("loss", |scene| scene.system.seat(0).is_some_and(|seat| !seat.protected));
            // What had left before may still come.
            scene.wait_for("silence", |scene| scene.client.waiting() > SILENCE);
            let before = scene.client.answers();
            std::thread::sleep(SILENCE);
            assert_eq!(
                scene.client.answers(),
                before,
                "answered although nobody else has the state"
            );
        });
        scene.wait_for_answers();
        scene.expect_clean();
    });
}

/// What a pair does under load in some seconds.
#[derive(Debug)]
struct Pace {
    epochs_per_s: f64,
    answers_per_s: f64,
    held_p50_us: u64,
    held_p90_us: u64,
    paused_share: f64,
}

/// Of a pair with this target, while the client asks and asks.
fn pace(test: &str, programs: &Programs, target_us: Option<u32>) -> Pace {
    let checkpoint = json!({ "target_latency_us": target_us });
    let mut scene = scene(test, programs, false, |system| system.with_checkpoint(checkpoint));
    scene.wait_for_protection(0);
    scene.calm();
    let looked = |scene: &mut Scene| (Instant::now(), scene.client.answers(), scene.seat(0));
    let (began, answers, before) = looked(&mut scene);
    scene.wait_for("a time", |scene| {
        began.elapsed() > WINDOW && scene.client.answers() > answers + ANSWERS
    });
    let (ended, all_answers, after) = looked(&mut scene);
    let seconds = (ended - began).as_secs_f64();
    let more = |name: &str| after.counter(name).unwrap_or_default() - before.counter(name).unwrap_or_default();
    let pace = Pace {
        epochs_per_s: more("epochs") / seconds,
        answers_per_s: (all_answers - answers) as f64 / seconds,
        held_p50_us: after.counters["held_us_p50"].as_u64().unwrap_or_default(),
        held_p90_us: after.counters["held_us_p90"].as_u64().unwrap_or_default(),
        paused_share: more("pause_us_total") / 1e6 / seconds,
    };
    println!(
        "target {target_us:?} us: {:.0} epochs and {:.0} answers a second, output held {} us (p50), {} us (p90), guest paused {:.1} %",
        pace.epochs_per_s,
        pace.answers_per_s,
        pace.held_p50_us,
        pace.held_p90_us,
        pace.paused_share * 100.0
    );
    scene.expect_clean();
    pace
}

/// Judged by order alone: how long anything takes is a matter of the machine.
#[test]
fn with_a_target_for_the_latency_epochs_are_fewer_and_output_waits_longer() {
    let _turn = scene::turn();
    let programs = built();
    let test = "with_a_target_for_the_latency_epochs_are_fewer_and_output_waits_longer";
    test_inside(test, || {
        let without = pace("target-none", &programs, None);
        let with = pace("target-20", &programs, Some(20_000));
        assert!(with.epochs_per_s < without.epochs_per_s * 0.75, "{with:?}, {without:?}");
        assert!(with.held_p50_us > without.held_p50_us, "{with:?}, {without:?}");
    });
}
