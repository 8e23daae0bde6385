//! What is told of disks that fail, and of guests that went elsewhere for that.

use ftvm_crds::seat::{StorageKind, StoragePart, StorageTrouble};

use super::tests::{expect, said};
use super::*;
use crate::decide::decide;
use crate::decide::rig::World;
use crate::observe::PodSeen;

const WHY: &str = "writing 512 bytes at 0: no";

fn trouble(kind: StorageKind, under_guest: bool) -> StorageTrouble {
    StorageTrouble {
        part: StoragePart::Disk("root".to_owned()),
        kind,
        under_guest,
        since_unix_ms: 1_800_000_000_999,
        why: WHY.to_owned(),
    }
}

/// Protected, and the names of the active and the standby.
fn protected() -> (World, String, String) {
    let mut world = World::new(3);
    assert!(world.settle(60) && world.is_protected());
    let holder = world.record().unwrap().holder.seat.to_string();
    let (active, standby): (Vec<_>, Vec<_>) = world.book().into_iter().partition(|entry| entry.had_uid(&holder));
    (world, active[0].name.clone(), standby[0].name.clone())
}

fn pod<'a>(world: &'a mut World, seat: &str) -> &'a mut PodSeen {
    world.pods.get_mut(seat).unwrap()
}

/// The VM is protected and its guest has I/O errors: that is told, with what to do.
#[test]
fn a_disk_that_fails_under_the_guest_is_told_with_what_to_do() {
    let (mut world, active, _) = protected();
    assert_eq!(said(&mut world, STORAGE_HEALTHY).reason, "NoFailures");
    for (kind, reason, how) in [
        (StorageKind::Failed, "DiskFailed", "fails"),
        (StorageKind::Full, "DiskFull", "is full"),
        (StorageKind::Hangs, "DiskHangs", "hangs"),
    ] {
        pod(&mut world, &active).published.as_mut().unwrap().storage_troubles = vec![trouble(kind, true)];
        let condition = said(&mut world, STORAGE_HEALTHY);
        let what = format!("disk root {how} since 2027-01-15T08:00:00Z ({WHY})");
        expect(&condition, reason, &what);
        for words in [
            format!("seat {active} on node "),
            "kubectl annotate ftvm web --overwrite ftvm.dev/switchover=".to_owned(),
            format!("delete pod {active} and its claims"),
        ] {
            assert!(condition.message.contains(&words), "{words}: {}", condition.message);
        }
        assert_eq!(said(&mut world, PROTECTED).status, "True");
    }
}

/// Its disk hung or failed, and the other seat went on: one warning says which, where, since when and where the guest is.
#[test]
fn a_guest_that_went_to_the_other_seat_because_of_its_disk_is_told() {
    let (mut world, former, active) = protected();
    let before = world.vm.status.clone().unwrap();
    let entry = world.entry(&former).unwrap();
    let node = world.kill_node_of(&entry);
    world.engine(&active);
    world.nodes.get_mut(&node).unwrap().ready = true;
    let mut tells = |under_guest| {
        pod(&mut world, &former).published = Ok(SeatPublished {
            code: 21,
            why: "this seat's storage failed".to_owned(),
            storage_troubles: vec![trouble(StorageKind::Hangs, under_guest)],
            storage_failures: 1,
            ..SeatPublished::default()
        });
        let seen = world.observe();
        status(&seen, &decide(&seen))
    };
    // A seat that only followed.
    let followed = tells(false);
    let told = followed.condition(STORAGE_HEALTHY).unwrap();
    expect(
        told,
        "DiskHangs",
        &format!("seat {former} on node {node}: disk root hangs"),
    );
    let went = tells(true);
    let told = went.condition(STORAGE_HEALTHY).unwrap();
    expect(
        told,
        "SwitchedOver",
        &format!("seat {former} on node {node}: disk root hangs"),
    );
    let there = format!("the guest went to seat {active} on node ");
    assert!(told.message.contains(&there), "{}", told.message);
    let reasons = |after| -> Vec<String> {
        let events = changes(&before, after).into_iter().filter(|event| event.warning);
        events.map(|event| event.reason).collect()
    };
    assert!(reasons(&went).contains(&"SwitchedForDisk".to_owned()));
    assert!(!reasons(&went).contains(&"SwitchedOver".to_owned()), "told once");
    assert!(!reasons(&followed).contains(&"SwitchedForDisk".to_owned()));
    // Its engine can't end while the disk hangs, and its daemon repeats what it was.
    let published = pod(&mut world, &former).published.as_mut().unwrap();
    (published.role, published.code) = (Some(SeatRole::Active), 0);
    expect(&said(&mut world, STORAGE_HEALTHY), "SwitchedOver", &there);
}

/// Its engine joins, ends and is begun again: what is told of it stays the same, so it is told once.
#[test]
fn a_seat_whose_storage_fails_at_every_join_is_told_once() {
    let (mut world, _, standby) = protected();
    world.swap_out(&standby);
    let tells = |world: &mut World, role: Option<SeatRole>, failures: u32| {
        pod(world, &standby).published = Ok(SeatPublished {
            role,
            peer_connected: role.is_some(),
            code: if role.is_some() { 0 } else { 21 },
            storage_troubles: vec![trouble(StorageKind::Full, false)],
            storage_failures: failures,
            ..SeatPublished::default()
        });
        [STORAGE_HEALTHY, PROTECTED].map(|kind| {
            let condition = said(world, kind);
            (condition.reason, condition.message)
        })
    };
    let ended = tells(&mut world, None, 2);
    for (reason, message) in &ended {
        assert_eq!(reason, "DiskFull");
        for words in [
            "disk root is full since ",
            "fails at every join",
            "replaced on another node",
        ] {
            assert!(message.contains(words), "{words}: {message}");
        }
    }
    assert_eq!(tells(&mut world, Some(SeatRole::Joining), 3), ended);
    let [storage, protection] = tells(&mut world, Some(SeatRole::Joining), 1);
    assert_eq!((storage.0.as_str(), protection.0.as_str()), ("DiskFull", "Resyncing"));
    assert!(storage.1.contains("begun anew by itself"), "{}", storage.1);
}
