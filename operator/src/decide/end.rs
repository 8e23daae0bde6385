//! The guest shall not run, or the VM shall go: stop it, prove it, take the pods away.

use ftvm_crds::names::FINALIZER;
use ftvm_crds::seat::Order;
use ftvm_crds::{SeatEntry, VolumePolicy};
use ftvm_protocol::record::{Phase, Record};
use kube::ResourceExt;

use super::recreate::recreate;
use super::run::{ask_until_done, attempts, delete_pod, is_attempt, is_known, is_starting, remove_seat};
use super::spare::{is_old_copy, never_ran};
use super::words::{are_told, await_words};
use super::{Action, Decision, Want, claims, has_engine, holder, is_named, pod, record, says_active, want};
use crate::observe::{Observed, PodPhase, PodSeen};

pub(super) fn end(seen: &Observed, decision: &mut Decision) {
    let goes = want(seen) == Want::Delete;
    let found = record(seen).map(|record| record.snapshot.record.clone());
    match &found {
        Some(record) if never_ran(seen, record, &decision.book) && !goes => {
            if decision.book.is_empty() || are_told(seen, record, &decision.book) {
                begin_anew(seen, decision);
            } else {
                await_words(seen, record, decision);
            }
        }
        // The guest goes on, and conditions say what to do: only while it runs its disks can be copied to another seat.
        Some(record) if claims::goes_with_vm(seen, &decision.book, record).is_some() => {}
        Some(record) if !never_ran(seen, record, &decision.book) => stop(seen, record, decision),
        // No guest ever ran, or the arbiter is gone and the VM goes with all it has.
        _ if goes || seen.status().lease_uid.is_none() => {
            for entry in &decision.book {
                if let Some(pod) = seen.pods.get(&entry.name) {
                    delete_pod(seen, entry, pod, true, &mut decision.actions);
                }
            }
        }
        // Halting needs the record: conditions say what is wrong with it.
        _ => recreate(seen, decision),
    }
    let pods_gone = seen.pods.is_empty();
    if goes && pods_gone {
        release(seen, decision);
    }
    decision.at_rest = pods_gone;
    if !goes && pods_gone && decision.book.iter().all(|entry| entry.pod_uid.is_none()) {
        // The next start chooses anew. Where no guest ran there are no volumes to go back to.
        let ran = found
            .as_ref()
            .is_some_and(|record| !never_ran(seen, record, &decision.book));
        decision.cpu = decision.cpu.take().filter(|cpu| ran && cpu.baseline.is_some());
        decision.cpu.iter_mut().for_each(|cpu| cpu.former = true);
    }
}

/// A VM whose guest never ran is halted by forgetting its seats: their disks hold nothing but the image.
fn begin_anew(seen: &Observed, decision: &mut Decision) {
    decision.book.iter_mut().for_each(|entry| entry.leaving = true);
    let mut gone = Vec::new();
    for entry in &decision.book {
        if remove_seat(seen, entry, &mut decision.actions) {
            gone.push(entry.name.clone());
        }
    }
    decision.book.retain(|entry| !gone.contains(&entry.name));
}

/// A new id for each wish; the active may change before it is executed.
fn stop_id(seen: &Observed, record: &Record) -> String {
    let generation = seen.vm.metadata.generation.unwrap_or_default();
    format!("stop-{generation}-{}", record.term)
}

/// A seat that refused to stop when it was asked last, and why.
pub fn stop_refused<'a>(
    seen: &'a Observed,
    book: &'a [SeatEntry],
    record: &Record,
) -> Option<(&'a SeatEntry, &'a str)> {
    let id = stop_id(seen, record);
    book.iter().find_map(|entry| {
        let done = pod(seen, entry)?.last_answer()?;
        let why = done.refused.as_deref()?;
        is_attempt(&id, &done.id).then_some((entry, why))
    })
}

fn stop(seen: &Observed, record: &Record, decision: &mut Decision) {
    let book = decision.book.clone();
    let id = stop_id(seen, record);
    if record.phase == Phase::Running {
        return stop_running(seen, record, &book, &id, decision);
    }
    if !is_known(&book, record) && want(seen) != Want::Delete {
        return;
    }
    // The record may be of a backup, and a seat have been started over it since. Of a VM that goes nothing is kept for that.
    if want(seen) != Want::Delete && !seen.pods.is_empty() && !are_told(seen, record, &book) {
        return await_words(seen, record, decision);
    }
    // By an old copy a seat that it does not name may have the guest.
    let old = is_old_copy(seen, record, &book);
    for entry in &book {
        let Some(pod) = seen.pods.get(&entry.name) else {
            continue;
        };
        let may_go = !old || is_named(entry, record) || has_nothing(seen, entry);
        if may_go && ended(seen, entry, record, &id) {
            delete_pod(seen, entry, pod, !is_named(entry, record), &mut decision.actions);
        } else if is_starting(pod) {
            ask_until_done(seen, entry, &id, &Order::Stop, decision);
        }
    }
}

fn stop_running(seen: &Observed, record: &Record, book: &[SeatEntry], id: &str, decision: &mut Decision) {
    let nobody = book.iter().all(|entry| has_nothing(seen, entry));
    let holder = holder(book, record);
    let may_take = want(seen) == Want::Delete || are_told(seen, record, book);
    let nothing_to_stop = nobody && holder.is_none_or(|entry| !can_answer(seen, entry) || refuses(seen, entry, id));
    if nothing_to_stop && may_take {
        // No guest runs, and none can be stopped in order: with its pods gone the VM is halted, and its disks are what they are after a crash.
        for entry in book {
            if let Some(pod) = seen.pods.get(&entry.name) {
                delete_pod(seen, entry, pod, false, &mut decision.actions);
            }
        }
        return;
    }
    // Of a record whose holder nobody knows, whoever has the guest can still be asked before the VM goes.
    let active = holder.or_else(|| {
        let mut seats = book.iter().filter(|_| want(seen) == Want::Delete);
        seats.find(|entry| says_active(seen, entry))
    });
    if let Some(active) = active {
        ask_until_done(seen, active, id, &Order::Stop, decision);
    }
    let mut waits = nothing_to_stop;
    // With every other pod gone, what is left belongs to nobody that the record names. An old copy may lack the one that has the guest.
    for entry in book
        .iter()
        .filter(|entry| !is_named(entry, record) && is_known(book, record) && !is_old_copy(seen, record, book))
    {
        match seen.pods.get(&entry.name) {
            Some(pod) if may_take => delete_pod(seen, entry, pod, true, &mut decision.actions),
            pod => waits |= pod.is_some(),
        }
    }
    if waits {
        await_words(seen, record, decision);
    }
}

/// Its node is ready, or it has none yet, and no engine there has a guest.
fn has_nothing(seen: &Observed, entry: &SeatEntry) -> bool {
    seen.pods.get(&entry.name).is_none_or(|pod| {
        let heard = pod.node.as_deref().is_none_or(|node| seen.node_ready(node));
        heard && (!has_engine(pod) || is_starting(pod))
    })
}

/// Could its daemon answer a request?
fn can_answer(seen: &Observed, entry: &SeatEntry) -> bool {
    pod(seen, entry).is_some_and(|pod| pod.phase == PodPhase::Running)
}

/// It was asked for this and refused, or was asked more than once and goes on waiting: the record can't be written without the other seat's word.
fn refuses(seen: &Observed, entry: &SeatEntry, id: &str) -> bool {
    let done = pod(seen, entry).and_then(PodSeen::last_answer);
    let again = attempts(seen, entry, id) > 0;
    done.is_some_and(|done| is_attempt(id, &done.id) && (done.refused.is_some() || again))
}

/// The record says Stopped: has this seat's engine ended, too, or never been of interest? One that has no guest and waits to be asked for a
/// start was begun after the stop, by a daemon that could not read the record then, and ends with its pod. Unless it was asked: a
/// daemon goes on with that whatever is wanted since, until it is told to stop.
fn ended(seen: &Observed, entry: &SeatEntry, record: &Record, stop: &str) -> bool {
    let over = record.term;
    let waits = |pod: &PodSeen| {
        let asked = pod.request.as_ref().is_some_and(|request| match request.order {
            Order::Start { over_stopped_term } => over_stopped_term == over,
            Order::AcceptDataLoss { over_stopped_term, .. } => over_stopped_term == Some(over),
            Order::Stop => is_attempt(stop, &request.id) && !is_done(pod, &request.id),
            Order::Switchover | Order::Failover | Order::TakeBack => false,
        });
        !asked && is_starting(pod)
    };
    !is_named(entry, record) || pod(seen, entry).is_none_or(|pod| !has_engine(pod) || waits(pod))
}

fn is_done(pod: &PodSeen, id: &str) -> bool {
    pod.last_answer()
        .is_some_and(|done| done.id == id && done.refused.is_none())
}

/// The pods are gone: claims by policy, then the object.
fn release(seen: &Observed, decision: &mut Decision) {
    let mut left = 0;
    if seen.vm.spec.volume_policy == VolumePolicy::Delete {
        for (name, claim) in seen.claims.iter().filter(|(_, claim)| !claim.deleting) {
            left += 1;
            decision.actions.push(Action::DeleteClaim {
                claim: name.clone(),
                uid: claim.uid.clone(),
            });
        }
    }
    let held = seen.vm.finalizers().iter().any(|name| name == FINALIZER);
    if left == 0 && held {
        decision.actions.push(Action::RemoveFinalizer);
    }
}
