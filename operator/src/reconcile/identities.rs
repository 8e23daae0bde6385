//! Identities of pods that somebody deleted, and what keeps them from being made anew.

use std::time::{Duration, Instant};

use ftvm_crds::FaultTolerantVM;
use kube::ResourceExt;

use super::{CONFLICT, Context};
use crate::api::{ApiError, Objects};
use crate::authority::authority;
use crate::decide;
use crate::observe::{Observed, PodPhase, Refusal};
use crate::refusal::{self, Last, Refused};

/// Makes identities anew that somebody deleted: without one kubelet makes no sandbox, and nothing tells the operator why. When to look again, and
/// what was refused.
pub(super) async fn restore(
    seen: &Observed,
    objects: &Objects,
    context: &Context,
) -> Result<(Option<Duration>, Option<Refusal>), ApiError> {
    let pods = without_sandbox(seen);
    let (due, again) = context.remember(&seen.vm, |memory| {
        if pods.is_empty() {
            memory.restored = Last::Made;
        }
        memory.identities.turn(!pods.is_empty(), Instant::now())
    });
    if !due {
        return Ok((again, None));
    }
    let mut refused = None;
    for (seat, uid) in &pods {
        match restore_one(seen, seat, uid, objects, context).await {
            Err(error) if error.needs_person() => refused = refused.or(Some(error)),
            done => done?,
        }
    }
    let Some(error) = refused else {
        context.remember(&seen.vm, |memory| memory.restored = Last::Made);
        // The status still says what was refused.
        return Ok((seen.refused.as_ref().map(|_| CONFLICT).or(again), None));
    };
    Ok(was_refused(&seen.vm, &error, context))
}

async fn restore_one(
    seen: &Observed,
    seat: &str,
    uid: &str,
    objects: &Objects,
    context: &Context,
) -> Result<(), ApiError> {
    if objects.lacks_identity(seat).await? {
        // Another authority would be one that nobody trusts.
        let authority = authority(&seen.vm, objects, &context.caches).await?;
        objects.restore_identity(&seen.vm, seat, uid, &authority).await?;
        tracing::warn!(vm = %seen.vm.name_any(), %seat, "its identity was gone and is made anew");
    }
    Ok(())
}

/// What was refused when identities were looked for, as long as a pod waits for one: looks are further apart than the waits after other refusals.
pub(super) fn unrestored(last: &Last, seen: &Observed, now: Instant) -> Option<Refusal> {
    let refused = last.seen(&seen.vm, now)?;
    (!without_sandbox(seen).is_empty()).then_some(refused)
}

/// Seats and UIDs of pods that are in the book, stay, and have no sandbox: no program of theirs runs, so none reads an identity that comes meanwhile.
fn without_sandbox(seen: &Observed) -> Vec<(String, String)> {
    let book = seen.status().seats;
    let stay = book.iter().filter(|entry| !entry.leaving);
    let pods = stay.filter_map(|entry| Some((entry.name.clone(), decide::pod(seen, entry)?)));
    let lacking = pods.filter(|(_, pod)| pod.no_sandbox && !pod.deleting && pod.phase != PodPhase::Finished);
    lacking.map(|(seat, pod)| (seat, pod.uid.clone())).collect()
}

/// An identity could not be made anew: when to look again, and what is to be told until then.
fn was_refused(vm: &FaultTolerantVM, error: &ApiError, context: &Context) -> (Option<Duration>, Option<Refusal>) {
    context.metrics.failures.with_label_values(&["refused"]).inc();
    let namespace = vm.namespace().unwrap_or_default();
    let name = format!("{namespace}/{}", vm.name_any());
    tracing::warn!(vm = %name, %error, "an identity can't be made anew");
    let message = refusal::message(error, &namespace).unwrap_or_else(|| error.to_string());
    let now = Instant::now();
    // What else is to be made does not wait for it.
    let refused = Refused::next(None, vm, (refusal::reason(error), message), now, |_| Duration::ZERO);
    let told = refused.seen(vm, now);
    let again = context.remember(vm, |memory| {
        memory.restored = Last::Refused(refused);
        memory.identities.soon(now)
    });
    (Some(again), Some(told))
}

#[cfg(test)]
mod tests {
    use ftvm_crds::seat::SeatPublished;

    use super::*;
    use crate::decide::rig::World;
    use crate::status;

    /// Between two looks nothing else says it.
    #[test]
    fn what_an_identity_waits_for_is_told_as_long_as_it_does() {
        let mut world = World::new(3);
        assert!(world.settle(60));
        let now = Instant::now();
        let why = (status::AUTHORITY_UNUSABLE, "put it back".to_owned());
        let refused = Last::Refused(Refused::next(None, &world.vm, why, now, |_| Duration::ZERO));
        let told = |last: &Last, world: &mut World| {
            let refused = unrestored(last, &world.observe(), now + Duration::from_secs(600));
            refused.map(|refused| (refused.message, refused.wait))
        };
        assert_eq!(told(&refused, &mut world), None, "nobody waits");
        let seat = world.book()[0].name.clone();
        world.pods.get_mut(&seat).unwrap().no_sandbox = true;
        let says = Some(("put it back".to_owned(), Duration::ZERO));
        assert_eq!(told(&refused, &mut world), says);
        world.vm.metadata.generation = Some(9);
        assert_eq!(told(&refused, &mut world), says, "of another spec, too");
        assert_eq!(told(&Last::Made, &mut world), None);
        // Another replica goes by what the status says until its own first look.
        assert_eq!(told(&Last::Unknown, &mut world), None);
        world
            .pods
            .values_mut()
            .for_each(|pod| pod.published = Ok(SeatPublished::default()));
        let seen = world.observe();
        let seen = Observed {
            refused: unrestored(&refused, &seen, now),
            ..seen
        };
        world.vm.status = Some(status::status(&seen, &decide::decide(&seen)));
        assert_eq!(told(&Last::Unknown, &mut world), says);
    }

    #[test]
    fn only_pods_that_stay_and_have_no_sandbox_may_lack_their_identity() {
        let mut world = World::new(3);
        assert!(world.settle(60));
        let seat = world.book()[0].clone();
        assert!(without_sandbox(&world.observe()).is_empty());
        world.pods.get_mut(&seat.name).unwrap().no_sandbox = true;
        let lacking = (seat.name.clone(), seat.pod_uid.unwrap());
        assert_eq!(without_sandbox(&world.observe()), [lacking]);
        world.pods.get_mut(&seat.name).unwrap().deleting = true;
        assert!(without_sandbox(&world.observe()).is_empty());
        let pod = world.pods.get_mut(&seat.name).unwrap();
        (pod.deleting, pod.uid) = (false, "another".to_owned());
        assert!(without_sandbox(&world.observe()).is_empty(), "not admitted");
    }
}
