//! The authority that signs for a VM's seats: that in its Secret, or a new one.
//!
//! Invariant: a new authority is never made while a pod that trusts the former one may live: the two would never be a pair.

use std::collections::BTreeSet;

use ftvm_crds::FaultTolerantVM;
use ftvm_crds::names::authority_secret_name;
use kube::ResourceExt;

use crate::api::{ApiError, Objects};
use crate::build::Authority;
use crate::caches::Caches;
use crate::decide::{self, names};
use crate::observe::Observed;

/// The VM's authority, made if there is none.
///
/// # Errors
/// If it is gone and still trusted, damaged, or another VM's, or the API server refuses.
pub async fn authority(vm: &FaultTolerantVM, objects: &Objects, caches: &Caches) -> Result<Authority, ApiError> {
    if let Some(found) = objects.authority(vm).await? {
        return Ok(found);
    }
    let gone = |trusts: String| ApiError::AuthorityGone {
        name: authority_secret_name(&vm.name_any()),
        trusts,
    };
    // Past every cache: an old one may lack a pod.
    let seen = caches.observe_fresh(objects, &vm.name_any()).await?;
    let Some(seen) = seen.filter(|seen| seen.vm.metadata.uid == vm.metadata.uid) else {
        return Err(gone("a VM that was deleted".to_owned()));
    };
    let mut issued = BTreeSet::new();
    for (name, pod) in &seen.pods {
        if objects.has_identity(name, &pod.uid).await? {
            issued.insert(pod.uid.clone());
        }
    }
    match trusts(&seen, &issued) {
        Some(who) => Err(gone(who)),
        None => objects.make_authority(vm).await,
    }
}

/// Who may live and trusts an authority that is gone. `issued` has the UIDs of pods for which an identity was made: that is done before
/// the book says so.
fn trusts(seen: &Observed, issued: &BTreeSet<String>) -> Option<String> {
    let status = seen.status();
    let record = decide::record(seen).map(|record| &record.snapshot.record);
    // Without a Lease no guest ever ran. Whom a Lease named that is gone or strange nobody knows.
    let ran = status.lease_uid.is_some();
    let named = |uid: &str| record.map_or(ran, |record| names(record, uid));
    status.seats.iter().find_map(|entry| {
        let pod = seen.pods.get(&entry.name);
        if entry.pod_uid.is_some() || pod.is_some_and(|pod| issued.contains(&pod.uid)) {
            return Some(format!("pod {}", entry.name));
        }
        // Deleted by force, or with its node: the record goes on naming it until a guest runs elsewhere.
        let mut open = entry.former.iter().filter(|former| !former.ended);
        let former = open.find(|former| named(&former.uid))?;
        let node = former.node.as_deref().unwrap_or("unknown");
        Some(format!(
            "an earlier pod of seat {} that may still run on node {node} (boot that node anew or, if it is switched off, say so: docs/kubernetes.md, \"A node that is lost for good\")",
            entry.name
        ))
    })
}

#[cfg(test)]
mod tests {
    use ftvm_crds::RunStrategy;

    use super::*;
    use crate::decide::rig::World;

    fn who(world: &mut World, issued: &[&str]) -> Option<String> {
        let issued: BTreeSet<String> = issued.iter().map(|uid| (*uid).to_owned()).collect();
        trusts(&world.observe(), &issued)
    }

    #[test]
    fn a_halted_vm_gets_a_new_authority() {
        let mut world = World::new(3);
        assert_eq!(who(&mut world, &[]), None, "the first one");
        assert!(world.settle(60) && world.is_protected());
        let pod = who(&mut world, &[]).unwrap();
        assert_eq!(pod, format!("pod {}", world.book()[0].name));
        world.want(RunStrategy::Halted);
        assert!(world.settle(60));
        assert!(world.pods.is_empty());
        assert!(world.book().iter().all(|entry| !entry.former.is_empty()));
        assert_eq!(who(&mut world, &[]), None);
        // Started: pods that no authority has signed for.
        world.want(RunStrategy::Always);
        while world.pods.is_empty() {
            assert!(world.step());
        }
        assert_eq!(who(&mut world, &[]), None);
    }

    /// One seat's pod goes while the authority is away: the other one trusts it.
    #[test]
    fn while_one_seat_lives_there_is_no_new_authority() {
        let mut world = World::new(3);
        assert!(world.settle(60) && world.is_protected());
        for gone in 0..2 {
            let mut world = World {
                vm: world.vm.clone(),
                pods: world.pods.clone(),
                claims: world.claims.clone(),
                lease: world.lease.clone(),
                ..World::new(3)
            };
            let (name, other) = (world.book()[gone].name.clone(), world.book()[1 - gone].name.clone());
            world.pods.remove(&name);
            assert!(world.step(), "the book says so");
            assert!(world.entry(&name).is_some_and(|entry| entry.pod_uid.is_none()));
            assert!(who(&mut world, &[]).is_some());
            // Whatever became of the pod that is gone.
            let seats = &mut world.vm.status.as_mut().unwrap().seats;
            seats.iter_mut().for_each(|entry| entry.former.clear());
            assert_eq!(who(&mut world, &[]), Some(format!("pod {other}")));
        }
    }

    /// An identity is made before the book has the pod's UID, and a look may end in between.
    #[test]
    fn a_pod_that_was_signed_for_counts_before_it_is_in_the_book() {
        let mut world = World::new(3);
        while world.pods.is_empty() {
            assert!(world.step());
        }
        assert!(world.book().iter().all(|entry| entry.pod_uid.is_none()));
        let (name, pod) = world.pods.first_key_value().unwrap();
        let (name, uid) = (name.clone(), pod.uid.clone());
        assert_eq!(who(&mut world, &["another"]), None);
        assert_eq!(who(&mut world, &[uid.as_str()]), Some(format!("pod {name}")));
    }

    #[test]
    fn pods_that_were_deleted_by_force_may_live() {
        let mut world = World::new(3);
        assert!(world.settle(60) && world.is_protected());
        world.pods.clear();
        assert!(world.step(), "the book says so");
        assert!(world.book().iter().all(|entry| entry.pod_uid.is_none()));
        let told = who(&mut world, &[]).unwrap();
        assert!(told.contains("may still run on node node-"), "{told}");
        // Nor is anything known of them without a record.
        let lease = world.lease.take();
        assert!(who(&mut world, &[]).is_some());
        world.lease = lease;
        let seats = &mut world.vm.status.as_mut().unwrap().seats;
        let formers = seats.iter_mut().flat_map(|entry| &mut entry.former);
        formers.for_each(|former| former.ended = true);
        assert_eq!(who(&mut world, &[]), None);
    }
}
