//! The disks of a seat go only by a word of the holder's daemon that was asked for then.

use ftvm_crds::seat::SeatPublished;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;

use super::rig::World;
use super::stuck_tests::{protected, seats};
use super::*;
use crate::observe::PodPhase;
use crate::status::PROTECTED;

/// The active goes on alone by all that is told of it, and the other seat's pod is there again, without an engine that joins.
fn back() -> (World, SeatEntry, SeatEntry) {
    let mut world = protected();
    let (active, standby) = seats(&world);
    world.swap_out(&standby.name);
    // Its container was started again.
    let pod = world.pods.get_mut(&standby.name).unwrap();
    (pod.published, pod.first_start) = (Ok(SeatPublished::default()), None);
    world.step();
    assert!(world.entry(&standby.name).unwrap().lost_since.is_some());
    (world, active, standby)
}

fn patience(world: &World) -> u32 {
    world.vm.spec.fault_tolerance.replace_after_seconds
}

/// Looks each second; daemons that live answer at once. How often one was asked.
fn look_for(world: &mut World, seconds: u32, daemons_live: bool) -> usize {
    let mut asked = 0;
    for _ in 0..seconds {
        let actions = decide(&world.observe()).actions;
        let questions = actions
            .iter()
            .filter(|action| matches!(action, Action::AskForWord { .. }));
        asked += questions.count();
        world.step();
        if daemons_live {
            world.repeat_looks();
        }
        for seat in world.pods.keys().cloned().collect::<Vec<_>>() {
            world.kubelet(&seat);
        }
        world.volumes();
        world.pass(1);
    }
    asked
}

/// The holder's daemon was asked a second ago, and has answered.
fn answered() -> (World, SeatEntry, SeatEntry) {
    let (mut world, active, standby) = back();
    let patience = patience(&world);
    assert_eq!(look_for(&mut world, patience, true), 0, "before its patience is over");
    assert_eq!(look_for(&mut world, 1, true), 1);
    (world, active, standby)
}

fn is_marked(world: &World, seat: &SeatEntry) -> bool {
    world.entry(&seat.name).is_none_or(|entry| entry.leaving)
}

fn has_its_claims(world: &World, seat: &SeatEntry) -> bool {
    let claims = world.claims.values().filter(|claim| claim.seat == seat.name);
    claims.filter(|claim| !claim.deleting).count() == world.vm.spec.disks.len()
}

/// Its disks are old, and may be all that is left.
#[test]
fn what_a_dead_active_said_last_costs_no_disk() {
    let (mut world, active, standby) = back();
    assert_eq!(look_for(&mut world, 3600, false), 1, "asked once");
    assert!(!is_marked(&world, &standby) && has_its_claims(&world, &standby));
    world.kill_node_of(&active);
    assert_eq!(look_for(&mut world, 3600, false), 0, "it is known to be away");
    assert!(!is_marked(&world, &standby) && has_its_claims(&world, &standby));
}

#[test]
fn beside_an_active_that_lives_a_seat_is_replaced_by_one_word() {
    let (mut world, _, standby) = answered();
    assert!(!is_marked(&world, &standby));
    assert_eq!(look_for(&mut world, 1, true), 0);
    assert!(is_marked(&world, &standby) && has_its_claims(&world, &standby));
    assert_eq!(look_for(&mut world, 20, true), 0, "asked once");
    assert!(world.entry(&standby.name).is_none(), "{:#?}", world.book());
    assert!(world.claims.values().all(|claim| claim.seat != standby.name));
}

/// It is only being started again, or is of a release that repeats nothing.
#[test]
fn a_daemon_that_is_silent_is_told_and_answers_when_it_is_back() {
    let (mut world, active, standby) = back();
    let patience = patience(&world);
    assert_eq!(look_for(&mut world, patience + 1, false), 1);
    let told = |world: &World| {
        let status = world.vm.status.as_ref().unwrap();
        status.condition(PROTECTED).unwrap().clone()
    };
    world.step();
    assert_ne!(told(&world).reason, "HolderSilent");
    let recheck = decide(&world.observe()).recheck;
    assert_eq!(recheck, Some(Duration::from_secs(9)), "nobody would look again");
    world.pass(9);
    world.step();
    let silent = told(&world);
    assert_eq!(
        (silent.status.as_str(), silent.reason.as_str()),
        ("False", "HolderSilent")
    );
    for words in [&active.name, active.node.as_ref().unwrap(), &standby.name] {
        assert!(silent.message.contains(words.as_str()), "{words}: {silent:?}");
    }
    world.pass(3600);
    assert!(world.is_quiet(), "it is waited for without end, and without a look");
    // What it says is an hour late, and it is there again.
    world.repeat_looks();
    assert_eq!(look_for(&mut world, 1, true), 1);
    assert!(!is_marked(&world, &standby));
    assert_ne!(told(&world).reason, "HolderSilent");
    assert_eq!(look_for(&mut world, 1, true), 0);
    assert!(is_marked(&world, &standby));
}

/// A look that was drawn just now, which that daemon repeats.
fn repeats(world: &mut World, daemon: &str, look: &str) {
    let look = Some(format!("{look}.{}", world.now.as_second()));
    let pod = world.pods.get_mut(daemon).unwrap();
    pod.published.as_mut().unwrap().look.clone_from(&look);
    pod.look = look;
}

/// The seat is lost since then.
fn lose(world: &mut World, seat: &str, seconds_ago: i64) {
    let since = world.now - SignedDuration::from_secs(seconds_ago);
    let mut seats = world.vm.status.as_mut().unwrap().seats.iter_mut();
    let entry = seats.find(|entry| entry.name == seat).unwrap();
    entry.lost_since = Some(Time(since));
}

#[test]
fn no_other_word_is_one() {
    let changes: [fn(&mut World, &str, &str); 6] = [
        // This one alone is.
        |world, _, _| world.pass(29),
        // Too late to tell anything of now.
        |world, _, _| world.pass(30),
        // The seat was lost once more since.
        |world, _, standby| {
            world.pass(25);
            lose(world, standby, 20);
        },
        // Because of another seat, or of another leader's.
        |world, active, _| repeats(world, active, "0.other"),
        |world, active, standby| {
            let (_, seat) = standby.rsplit_once('-').unwrap();
            repeats(world, active, &format!("1.{seat}"));
        },
        // The clock was set back since.
        |world, _, standby| {
            world.pass(-10);
            lose(world, standby, 60);
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let (mut world, active, standby) = answered();
        change(&mut world, &active.name, &standby.name);
        let again = usize::from(number > 0);
        assert_eq!(look_for(&mut world, 1, true), again, "{number}");
        assert_eq!(is_marked(&world, &standby), number == 0, "{number}");
        look_for(&mut world, 1, true);
        assert!(is_marked(&world, &standby), "{number}");
    }
}

/// What another leader was told is of before.
#[test]
fn each_leader_asks_before_it_goes_on_with_a_removal() {
    let (mut world, active, standby) = answered();
    world.step();
    assert!(is_marked(&world, &standby));
    world.new_leader("second");
    let looks = |world: &World| world.pods[&active.name].look.clone().unwrap();
    assert_eq!(look_for(&mut world, 1, true), 1);
    assert_eq!(looks(&world), "second");
    assert_eq!(look_for(&mut world, 1, true), 1);
    assert!(looks(&world).starts_with("second."), "{}", looks(&world));
    assert!(!world.pods[&standby.name].deleting);
    assert_eq!(look_for(&mut world, 1, true), 0);
    assert!(world.pods[&standby.name].deleting);
}

/// Whoever had the guest may have died while the pod took its time to end.
#[test]
fn claims_wait_for_another_word_if_the_last_one_is_old() {
    let (mut world, _, standby) = answered();
    world.step();
    world.step();
    assert!(world.pods[&standby.name].deleting);
    world.pass(60);
    world.pods.remove(&standby.name);
    assert_eq!(look_for(&mut world, 20, false), 1, "asked once");
    assert!(is_marked(&world, &standby) && has_its_claims(&world, &standby));
    world.repeat_looks();
    world.step();
    assert!(!has_its_claims(&world, &standby));
}

/// A seat that was kept for want of another node, and whose engine does not join once its node is back: kubelet fails its pod, for nobody offers the
/// device yet, or it is not there yet.
#[test]
fn a_loss_of_another_kind_is_borne_from_its_own_beginning() {
    for phase in [PodPhase::Finished, PodPhase::Running] {
        let mut world = World::new(2);
        assert!(world.settle(60) && world.is_protected());
        let (active, standby) = seats(&world);
        let node = world.kill_node_of(&standby);
        world.engine(&active.name);
        world.settle(200);
        world.pass(3600);
        assert!(!world.step() && !is_marked(&world, &standby));
        world.nodes.get_mut(&node).unwrap().ready = true;
        let pod = world.pods.get_mut(&standby.name).unwrap();
        (pod.phase, pod.created) = (phase, Some(world.now));
        pod.published = Ok(SeatPublished::default());
        let begin = world.now;
        for _ in 0..3 {
            world.step();
            world.repeat_looks();
        }
        let entry = world.entry(&standby.name).unwrap();
        assert!(
            !entry.leaving && entry.lost_since == Some(Time(begin)),
            "{phase:?}: {entry:?}"
        );
    }
}

/// The rig's check bites.
#[test]
#[should_panic(expected = "nobody was asked")]
fn a_claim_that_goes_without_a_word_would_be_noticed() {
    let (mut world, _, standby) = back();
    world.pods.remove(&standby.name);
    let mut claims = world.claims.iter();
    let (name, claim) = claims.find(|(_, claim)| claim.seat == standby.name).unwrap();
    let (name, uid) = (name.clone(), claim.uid.clone());
    world.delete_claim(&name, &uid);
}
