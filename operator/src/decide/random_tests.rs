//! Random walks of the world in [`super::rig`]: the operator looks at what may be old, other things happen between its looks
//! and its deeds, nodes come and go, people change their minds.

use std::collections::BTreeSet;

use ftvm_crds::names::{ANNOTATION_FAILOVER, ANNOTATION_SWITCHOVER};
use ftvm_crds::{Outcome, RunStrategy};
use ftvm_protocol::record::Snapshot;

use super::rig::{World, node, poor};
use super::*;

struct Seeded(u64);

impl Seeded {
    /// xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled".
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    fn pick<T: Clone>(&mut self, list: &[T]) -> Option<T> {
        (!list.is_empty()).then(|| list[self.below(list.len() as u64) as usize].clone())
    }
}

/// Never broken, whatever happens. (The rig checks each deletion itself.)
fn check(world: &World, seed: u64, step: u32) {
    let book = world.book();
    assert!(book.len() <= SEATS, "seed {seed}, step {step}: {book:#?}");
    assert!(
        book.iter().filter(|entry| entry.leaving).count() <= 2,
        "seed {seed}, step {step}"
    );
    let once: BTreeSet<_> = world.kills.iter().collect();
    assert_eq!(
        once.len(),
        world.kills.len(),
        "seed {seed}, step {step}: one text killed twice: {:?}",
        world.kills
    );
    let failover = world.vm.status.clone().unwrap_or_default().failover;
    if let Some(AskedFor {
        request,
        why: Some(why),
        ..
    }) = failover
    {
        let done = world.kills.contains(&format!("failover-{request}"));
        let denied = why.contains("nothing was done");
        assert!(!done || !denied, "seed {seed}, step {step}: {request} was done: {why}");
    }
    let mut slots: Vec<_> = book.iter().map(|entry| entry.slot).collect();
    slots.dedup();
    assert_eq!(slots.len(), book.len(), "seed {seed}, step {step}: {book:#?}");
    for name in world.pods.keys() {
        assert!(
            book.iter().any(|entry| entry.name == *name),
            "seed {seed}, step {step}: pod {name} is in no book"
        );
    }
    for (name, claim) in world.claims.iter().filter(|(_, claim)| !claim.deleting) {
        assert!(
            book.iter().any(|entry| entry.name == claim.seat),
            "seed {seed}, step {step}: claim {name} is in no book"
        );
    }
}

fn disturb(world: &mut World, random: &mut Seeded) {
    let seats: Vec<String> = world.pods.keys().cloned().collect();
    let Some(seat) = random.pick(&seats) else { return };
    match random.below(12) {
        0 | 1 => world.schedule(&seat),
        2 | 3 => world.kubelet(&seat),
        4..=7 => world.engine(&seat),
        8 => world.volumes(),
        9 => {
            let names: Vec<String> = world.nodes.keys().cloned().collect();
            let node = random.pick(&names).unwrap();
            let node = world.nodes.get_mut(&node).unwrap();
            node.ready = !node.ready || random.below(4) > 0;
        }
        10 if random.below(6) == 0 => {
            // Somebody, or a drain, deletes a pod.
            world.pods.get_mut(&seat).unwrap().deleting = true;
        }
        11 if random.below(12) == 0 => world.delete_lease(),
        _ => world.pass(random.below(30) as i64),
    }
}

/// A person asks for a failure or a switchover.
fn ask(world: &mut World, random: &mut Seeded, step: u32) {
    let annotation = if random.below(3) == 0 {
        ANNOTATION_SWITCHOVER
    } else {
        ANNOTATION_FAILOVER
    };
    let annotations = world.vm.metadata.annotations.get_or_insert_default();
    annotations.insert(annotation.to_owned(), step.to_string());
    world.version += 1;
}

/// Now and then somebody wants something.
fn wish(world: &mut World, random: &mut Seeded, step: u32) {
    if random.below(60) == 0 {
        let strategy = if random.below(2) == 0 {
            RunStrategy::Halted
        } else {
            RunStrategy::Always
        };
        world.want(strategy);
    }
    if random.below(8) == 0 {
        ask(world, random, step);
    }
}

/// Has everything that was asked for come to its end?
fn nothing_pends(world: &World) -> bool {
    let status = world.vm.status.clone().unwrap_or_default();
    let mut asked = [status.switchover, status.failover].into_iter().flatten();
    asked.all(|asked| asked.outcome != Outcome::Pending)
}

/// The storage of nodes fails every join there: of all of them, of none, or of one.
fn change_storage(world: &mut World, random: &mut Seeded) {
    let nodes: Vec<String> = world.nodes.keys().cloned().collect();
    match random.below(4) {
        0 => world.bad_storage.extend(nodes),
        1 => world.bad_storage.clear(),
        _ => world.bad_storage.extend(random.pick(&nodes)),
    }
}

/// Everything is mended: the VM is protected again, and then there is nothing to do. Nodes were booted: of a pod that vanished and whose successor
/// is elsewhere, nothing else may be proven.
fn mend(world: &mut World) {
    for node in world.nodes.values_mut() {
        (node.ready, node.boot) = (true, Some("machine/second".to_owned()));
    }
    world.claims.values_mut().for_each(|claim| claim.bound = false);
    world.bad_storage.clear();
}

/// A Lease that was made anew may be deleted before everybody goes by its successor, and then all pods go: a person does what the condition says.
fn delete_strange(world: &mut World, seed: u64) {
    let status = world.vm.status.clone().unwrap_or_default();
    let strange = |(found, _): &(Snapshot, String)| Some(found.uid.to_string()) != status.lease_uid;
    if world.pods.is_empty() && world.lease.as_ref().is_some_and(strange) {
        let said = status.conditions.iter().find(|said| said.reason == "LeaseReplaced");
        assert!(
            said.is_some_and(|said| said.message.contains("delete it")),
            "seed {seed}: {status:#?}"
        );
        world.delete_lease();
        world.settle(200);
    }
}

/// So many engines were killed as it was asked for, and so many joins were failed by storage.
fn walk(seed: u64) -> [usize; 2] {
    let mut storage = Seeded(seed.wrapping_mul(0xd134_2543_de82_ef95) | 1);
    let mut random = Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut world = World::new(2 + random.below(3) as usize);
    if random.below(2) == 0 {
        // One node has less than the others.
        world.nodes.insert("node-0".to_owned(), node(&poor()));
    }
    let mut old: Option<(crate::observe::Observed, u64)> = None;
    for step in 0..400 {
        for _ in 0..random.below(4) {
            disturb(&mut world, &mut random);
        }
        wish(&mut world, &mut random, step);
        if seed % 4 == 1 && step % 50 == 0 {
            change_storage(&mut world, &mut storage);
        }
        if seed.is_multiple_of(3) && step % 80 == 79 {
            world.new_leader(&format!("leader-{step}"));
        }
        match random.below(8) {
            // Keeps what it saw for later.
            0 => old = Some((world.observe(), world.version)),
            // Acts on what it saw long ago: two leaders, a slow cache.
            1 => {
                if let Some((seen, version)) = old.take() {
                    world.reconcile(seen, version);
                }
            }
            // Sees, is overtaken by others, then acts.
            2 => {
                let (seen, version) = (world.observe(), world.version);
                disturb(&mut world, &mut random);
                world.reconcile(seen, version);
            }
            _ => {
                world.step();
            }
        }
        check(&world, seed, step);
    }
    mend(&mut world);
    world.want(RunStrategy::Always);
    world.settle(200);
    delete_strange(&mut world, seed);
    if world.is_split() {
        // Deleted twice in a row: told as gone, and a person's to mend.
        return [world.kills.len(), world.joins_failed];
    }
    let known = world
        .vm
        .status
        .as_ref()
        .is_some_and(|status| status.lease_uid.is_some());
    if world.lease.is_none() && known {
        // Nobody vouches: a pod was made anew meanwhile. A person does what the documentation says.
        let said = &world.vm.status.as_ref().unwrap().conditions;
        let said = said
            .iter()
            .find(|said| said.type_ == crate::status::ARBITER_REACHABLE)
            .unwrap();
        assert_eq!(said.reason, "LeaseGone", "seed {seed}: {said:?}");
        assert!(
            said.message.contains("put a copy of the Lease back"),
            "seed {seed}: {said:?}"
        );
        world.put_copy_back();
    }
    assert!(
        world.settle(400),
        "seed {seed} does not settle: {:#?}\n{:#?}",
        world.vm.status,
        world.record()
    );
    assert!(
        world.is_protected(),
        "seed {seed}: {:#?}\n{:#?}\n{:#?}",
        world.vm.status,
        world.record(),
        world.pods
    );
    assert!(world.has_finalizer());
    assert!(!world.step(), "seed {seed}");
    assert!(nothing_pends(&world), "seed {seed}: {:#?}", world.vm.status);
    [world.kills.len(), world.joins_failed]
}

#[test]
fn random_walks_break_nothing_and_end_protected() {
    let walks = (0..200).map(walk);
    let [kills, joins] = walks.fold([0, 0], |[kills, joins], [k, j]| [kills + k, joins + j]);
    assert!(kills > 30, "only {kills} failures were brought about");
    assert!(joins > 20, "only {joins} joins were failed");
}

/// The checks bite: a mutation of the rules is found.
#[test]
#[should_panic(expected = "a claim of seat")]
fn a_claim_of_a_named_seat_would_be_noticed() {
    let mut world = World::new(3);
    assert!(world.settle(60));
    let (name, claim) = world
        .claims
        .iter()
        .next()
        .map(|(name, claim)| (name.clone(), claim.clone()))
        .unwrap();
    world.pods.remove(&claim.seat);
    let action = Action::DeleteClaim {
        claim: name,
        uid: claim.uid,
    };
    world.apply(&action, 0);
}
