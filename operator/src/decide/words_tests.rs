//! What a leader reads at its first look may be of a backup: nothing that can't be taken back follows from it before daemons could have told.

use ftvm_crds::seat::{SeatPublished, SeatRole};
use ftvm_crds::{FormerPod, RunStrategy};

use super::former_tests::former;
use super::rig::World;
use super::stuck_tests::{accept, asked, protected, seats, waits};
use super::*;
use crate::first_look::{FirstLook, TOLD};

impl World {
    pub fn first_look(&self) -> Option<FirstLook> {
        let (drawn, began) = self.first_look.clone()?;
        let age = Duration::try_from(self.now.duration_since(began)).unwrap_or_default();
        Some(FirstLook { drawn, age })
    }

    /// Another process leads from now on, whose first look draws this.
    pub fn new_leader(&mut self, drawn: &str) {
        self.first_look = Some((drawn.to_owned(), self.now));
        self.acceptance = None;
    }

    pub fn ask_for_word(&mut self, seat: &str, uid: &str, drawn: &str) {
        if let Some(pod) = self.pods.get_mut(seat).filter(|pod| pod.uid == uid) {
            pod.look = Some(drawn.to_owned());
        }
    }
}

/// The active is alone by the record, and the node of the other seat away for an hour by the book.
fn alone() -> (World, SeatEntry, SeatEntry) {
    let mut world = protected();
    let (active, standby) = seats(&world);
    world.swap_out(&standby.name);
    world.kill_node_of(&standby);
    assert!(world.step());
    assert!(world.entry(&standby.name).unwrap().lost_since.is_some());
    world.pass(3600);
    (world, active, standby)
}

/// Is the seat given up by another look?
fn goes(world: &mut World, seat: &SeatEntry) -> bool {
    world.step();
    world.entry(&seat.name).is_none_or(|entry| entry.leaving)
}

/// The same, and the holder's daemon answers what it is asked for such a look; it was away when the leader looked at first.
fn goes_by_a_word(world: &mut World, seat: &SeatEntry) -> bool {
    let gone = goes(world, seat);
    let is_asked = |pod: &PodSeen| pod.look.as_deref().is_some_and(|look| look.contains('.'));
    if world.pods.values().any(is_asked) {
        world.repeat_looks();
    }
    gone
}

/// Looks each second until then, and the first one sees something.
fn after_seconds(world: &mut World, most: u64, mut is_so: impl FnMut(&mut World) -> bool) -> Option<u64> {
    (0..=most).find(|_| {
        let found = is_so(world);
        world.pass(1);
        found
    })
}

#[test]
fn no_seat_is_replaced_by_a_leader_before_daemons_had_their_time() {
    let told = TOLD.as_secs();
    // The leader that was there all the time takes the times of the book for what they are.
    let (mut world, _, standby) = alone();
    assert_eq!(
        after_seconds(&mut world, 5, |world| goes_by_a_word(world, &standby)),
        Some(1)
    );
    // A daemon that is away for longer.
    let (mut world, active, standby) = alone();
    world.new_leader("second");
    assert!(!goes(&mut world, &standby));
    assert_eq!(world.pods[&active.name].look.as_deref(), Some("second"), "it was asked");
    let waited = after_seconds(&mut world, 2 * told, |world| goes_by_a_word(world, &standby));
    assert_eq!(waited, Some(told + 1));
    assert_eq!(world.pods.get(&standby.name).and_then(|pod| pod.look.as_deref()), None);
}

/// Who replaces a seat that is lost, after a restart, waits no longer than one that sees it being lost.
#[test]
fn a_leader_that_is_told_has_the_patience_of_the_spec() {
    let (mut world, active, standby) = alone();
    let least = u64::from(world.vm.spec.fault_tolerance.replace_after_seconds);
    world.new_leader("second");
    assert!(!goes(&mut world, &standby));
    world.engine(&active.name);
    let waited = after_seconds(&mut world, TOLD.as_secs(), |world| goes_by_a_word(world, &standby));
    assert_eq!(waited, Some(least + 1));
    // What was repeated for another leader is no word for this one.
    let (mut world, active, standby) = alone();
    for drawn in ["second", "third"] {
        world.new_leader(drawn);
        assert!(!goes(&mut world, &standby));
        if drawn == "second" {
            world.engine(&active.name);
        }
    }
    let waited = after_seconds(&mut world, 2 * TOLD.as_secs(), |world| goes_by_a_word(world, &standby));
    assert_eq!(waited, Some(TOLD.as_secs() + 1));
}

/// However long a seat is borne, a leader's first look adds no more than daemons need.
#[test]
fn a_long_patience_does_not_begin_anew_with_each_leader() {
    let (mut world, active, standby) = alone();
    world.vm.spec.fault_tolerance.replace_after_seconds = 1800;
    world.new_leader("second");
    assert!(!goes(&mut world, &standby));
    world.engine(&active.name);
    let waited = after_seconds(&mut world, 1800, |world| goes_by_a_word(world, &standby));
    assert_eq!(waited, Some(TOLD.as_secs() + 1));
}

/// Record, book and pods are of a backup, and the seat that they take for lost has had the guest alone since.
#[test]
fn the_newest_disk_outlives_a_backup() {
    for answers in [false, true] {
        let (mut world, active, standby) = alone();
        let term = world.record().unwrap().term;
        world.new_leader("second");
        assert_eq!(after_seconds(&mut world, 15, |world| goes(world, &standby)), None);
        // Its daemon writes again what its engine is, or that of the former active what it knows.
        let (seat, role) = if answers {
            (&active, SeatRole::Starting)
        } else {
            (&standby, SeatRole::Active)
        };
        world.pods.get_mut(&seat.name).unwrap().published = Ok(SeatPublished {
            role: Some(role),
            term: term + 2,
            look: answers.then(|| "second".to_owned()),
            ..SeatPublished::default()
        });
        for _ in 0..60 {
            assert!(!goes_by_a_word(&mut world, &standby), "answers: {answers}");
            world.pass(60);
        }
        assert!(world.claims.values().all(|claim| !claim.deleting));
    }
}

/// One that was being removed when the backup was made may have stayed.
#[test]
fn what_a_backup_says_is_leaving_keeps_its_disks() {
    let (mut world, _, standby) = alone();
    assert_eq!(
        after_seconds(&mut world, 5, |world| goes_by_a_word(world, &standby)),
        Some(1)
    );
    world.new_leader("second");
    let claims = world.claims.clone();
    let removed = |world: &mut World| {
        goes_by_a_word(world, &standby);
        world.claims != claims || !world.pods.contains_key(&standby.name)
    };
    let waited = after_seconds(&mut world, 2 * TOLD.as_secs(), removed);
    assert_eq!(waited, Some(TOLD.as_secs() + 1));
}

/// Whoever it names may have been started, and have gone on, since the record said Stopped.
#[test]
fn a_start_waits_for_every_seat_that_the_record_names() {
    let mut world = protected();
    world.want(RunStrategy::Halted);
    assert!(world.settle(60), "{:#?}", world.vm.status);
    // Pods find a node again.
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    world.want(RunStrategy::Always);
    world.new_leader("second");
    world.without_engines(20);
    let is_asked = |world: &World| world.pods.values().any(|pod| pod.request.is_some());
    let looks: Vec<_> = world.pods.values().filter_map(|pod| pod.look.as_deref()).collect();
    assert_eq!(looks, ["second", "second"]);
    for name in world.pods.keys().cloned().collect::<Vec<_>>() {
        world.step();
        assert!(!is_asked(&world), "{name} has not answered");
        world.engine(&name);
    }
    world.step();
    assert!(is_asked(&world));
}

#[test]
fn an_accepted_loss_waits_for_daemons() {
    let mut world = protected();
    let (active, standby) = seats(&world);
    let term = world.record().unwrap().term;
    waits(&mut world, &active.name, term);
    waits(&mut world, &standby.name, term);
    accept(&mut world, "");
    assert_eq!(asked(&mut world).len(), 1);
    world.new_leader("second");
    let waited = after_seconds(&mut world, 2 * TOLD.as_secs(), |world| !asked(world).is_empty());
    assert_eq!(waited, Some(TOLD.as_secs()));
    // Also for the word of a seat that the record does not name.
    world.new_leader("third");
    world.swap_out(&standby.name);
    waits(&mut world, &active.name, term + 1);
    waits(&mut world, &standby.name, term);
    accept(&mut world, "");
    for name in [&active.name, &standby.name] {
        world.step();
        assert!(asked(&mut world).is_empty(), "{name} has not answered");
        let published = world.pods.get_mut(name).unwrap().published.as_mut();
        published.unwrap().look = Some("third".to_owned());
    }
    let looks: Vec<_> = world.pods.values().filter_map(|pod| pod.look.as_deref()).collect();
    assert_eq!(looks, ["third", "third"]);
    assert_eq!(asked(&mut world).len(), 1);
}

/// What is vouched for may be of a backup from between a deletion of the Lease and the one that was made anew then.
#[test]
fn a_lease_is_made_anew_from_what_is_said_now() {
    for (answers, seconds) in [(true, 0), (false, TOLD.as_secs())] {
        let mut world = protected();
        let (active, standby) = seats(&world);
        world.delete_lease();
        for seat in [&active, &standby] {
            world.engine(&seat.name);
        }
        world.new_leader("second");
        for pod in world.pods.values_mut().filter(|_| answers) {
            pod.published.as_mut().unwrap().look = Some("second".to_owned());
        }
        let waited = after_seconds(&mut world, 2 * TOLD.as_secs(), |world| {
            world.step();
            world.lease.is_some()
        });
        assert_eq!(waited, Some(seconds));
    }
}

/// A seat that an old record does not name may have the guest: it is to be stopped, not to be killed.
#[test]
fn a_halt_takes_no_pod_before_daemons_had_their_time() {
    for leader in [None, Some("second")] {
        let (mut world, active, standby) = alone();
        world.nodes.values_mut().for_each(|node| node.ready = true);
        world.want(RunStrategy::Halted);
        if let Some(drawn) = leader {
            world.new_leader(drawn);
        }
        let waited = after_seconds(&mut world, 2 * TOLD.as_secs(), |world| {
            world.step();
            world.pods[&standby.name].deleting
        });
        assert_eq!(waited, Some(leader.map_or(0, |_| TOLD.as_secs())));
        assert!(
            world.pods[&active.name].request.is_some(),
            "the active is asked at once"
        );
    }
}

/// Its seats have their pods, and the first record names one of them.
fn never_ran() -> World {
    let mut world = World::new(3);
    while world.record().is_none() || world.book().iter().any(|entry| entry.pod_uid.is_none()) {
        world.without_engines(1);
    }
    world
}

/// Without an engine nobody has read the header, which alone could say that the record is of a backup.
#[test]
fn by_a_first_record_a_word_without_a_header_is_none() {
    for (role, seconds) in [(None, TOLD.as_secs()), (Some(SeatRole::Starting), 0)] {
        let mut world = never_ran();
        world.new_leader("second");
        world.want(RunStrategy::Halted);
        for pod in world.pods.values_mut() {
            pod.published = Ok(SeatPublished {
                role,
                look: Some("second".to_owned()),
                ..SeatPublished::default()
            });
        }
        let waited = after_seconds(&mut world, 2 * TOLD.as_secs(), |world| {
            world.step();
            world.book().iter().any(|entry| entry.leaving)
        });
        assert_eq!(waited, Some(seconds), "{role:?}");
    }
}

#[test]
fn a_vm_that_never_ran_waits_two_minutes_at_most() {
    let mut world = never_ran();
    let holder = world.record().unwrap().holder.seat.to_string();
    let original = world.book().into_iter().find(|entry| entry.had_uid(&holder)).unwrap();
    world.pods.remove(&original.name);
    world.new_leader("second");
    let waited = after_seconds(&mut world, 2 * TOLD.as_secs(), |world| {
        world.step();
        world.book().iter().any(|entry| entry.leaving)
    });
    assert_eq!(waited, Some(TOLD.as_secs()));
    assert!(world.settle(100), "{:#?}", world.vm.status);
    assert!(world.is_protected());
}

/// Nobody asks any more after what such a pod left: that is for good.
#[test]
fn what_an_earlier_pod_left_is_older_once_daemons_had_their_time() {
    let (mut world, _, standby) = alone();
    let ended = FormerPod {
        ended: true,
        ..former("00000000-0000-4000-8000-000000000001", "node-0", world.now)
    };
    let seats = &mut world.vm.status.as_mut().unwrap().seats;
    let entry = seats.iter_mut().find(|entry| entry.name == standby.name).unwrap();
    entry.former.push(ended);
    world.new_leader("second");
    let waited = after_seconds(&mut world, 2 * TOLD.as_secs(), |world| {
        world.step();
        world
            .entry(&standby.name)
            .is_some_and(|entry| entry.former.iter().any(|former| former.older))
    });
    assert_eq!(waited, Some(TOLD.as_secs()));
}

/// A pod that can't be written to keeps nothing else from being done.
#[test]
fn whoever_is_asked_for_a_word_is_asked_last() {
    let (mut world, _, standby) = alone();
    world.pods.remove(&standby.name);
    world.new_leader("second");
    world.step();
    let actions = decide(&world.observe()).actions;
    let is_question = |action: &Action| matches!(action, Action::AskForWord { .. });
    assert!(
        actions.len() > 1 && actions.last().is_some_and(is_question),
        "{actions:?}"
    );
}

/// While nothing waits for it nobody is asked, and nothing is written.
#[test]
fn a_new_leader_leaves_a_vm_alone_that_is_protected() {
    let mut world = protected();
    world.new_leader("second");
    assert!(world.is_quiet() && !world.step());
    assert!(world.pods.values().all(|pod| pod.look.is_none()));
    // Also one that is halted.
    world.want(RunStrategy::Halted);
    assert!(world.settle(100), "{:#?}", world.vm.status);
    world.new_leader("third");
    assert!(world.is_quiet() && !world.step());
}
