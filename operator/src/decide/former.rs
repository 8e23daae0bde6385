//! Pods that are gone, and of which of them it is proven that no engine runs any more (rules 8 and 9).
//!
//! The record goes on naming a pod that is gone until a guest runs again, and no disk is booted before that proof: an object that the API server
//! lacks may have been deleted by force, while its node went on.

use std::time::Duration;

use ftvm_crds::{FormerPod, SeatEntry};
use ftvm_protocol::record::Record;
use k8s_openapi::jiff::Timestamp;

use super::run::{sooner, whole_seconds};
use super::{Decision, anyone_is_heard_of, has_engine, is_named, names, pod, spare, words};
use crate::observe::{NodeSeen, Observed, PodPhase, PodSeen};

/// Most earlier pods of a seat that the book keeps.
pub const FORMER_MAX: usize = 8;
/// Put on a node by a person who made sure that it is switched off.
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// The pod is being deleted, and its daemon said that no engine of it runs, nor is begun any more. That is true for good, whatever the record says now or
/// later; a record that says Stopped proves nothing by itself: it may be started over, by an engine that was begun a moment before.
pub(super) fn engine_ended(pod: &PodSeen) -> bool {
    let over = pod.told().is_some_and(|published| published.over);
    pod.deleting && over && !has_engine(pod)
}

/// The pod is gone; the record and the seat's header may name it for a long time.
pub(super) fn forget(entry: &mut SeatEntry, uid: String, seen: &Observed, record: Option<&Record>) {
    entry.former.push(FormerPod {
        uid,
        boot: boot(entry, seen),
        // No daemon takes a pod for a seat of which the book does not know the node.
        ended: entry.engine_ended || entry.node.is_none(),
        node: entry.node.take(),
        missing_since: whole_seconds(seen.now),
        older: false,
    });
    if entry.former.len() > FORMER_MAX {
        let spare = |former: &FormerPod| !record.is_some_and(|record| names(record, &former.uid));
        // That a node once took one is what says that the seat's disk may have something.
        let idle = entry
            .former
            .iter()
            .position(|former| spare(former) && former.node.is_none());
        let oldest = idle.or_else(|| entry.former.iter().position(spare));
        entry.former.remove(oldest.unwrap_or(0));
    }
    entry.pod_uid = None;
    entry.machine = None;
    entry.pod_ip = None;
    entry.host_ip = None;
    entry.engine_ended = false;
}

/// Machine and boot of the node where the seat's pod was. Where the Node object is gone its boot is not known: the machine alone remains, whose daemon
/// can tell what became of the pod once it is there again.
fn boot(entry: &SeatEntry, seen: &Observed) -> Option<String> {
    let machine = entry.machine.as_deref()?;
    match seen.nodes.get(entry.node.as_deref()?) {
        None => Some(format!("{machine}/")),
        // Another machine may have the node's name by now, whose boots and whose daemon say nothing of the one where the pod was.
        Some(node) => node.boot.clone().filter(|_| node.machine() == Some(machine)),
    }
}

/// Does whoever is to boot a disk ask after this pod: because the record names it, or as the one that the book has for its seat? A seat that is being removed
/// is waited for only until it is out of the book, and nothing has to be proven of it before.
fn is_asked_after(entry: &SeatEntry, record: &Record, uid: &str) -> bool {
    names(record, uid) || !entry.leaving && entry.asked_as().any(|asked| asked == uid)
}

/// A pod that whoever boots asks after, on a node that is ready, of which the book does not prove that it has ended; and since when the program of
/// its successor has run. A daemon of the same machine may still prove it.
pub fn unproven<'a>(
    seen: &'a Observed,
    entry: &'a SeatEntry,
    record: &'a Record,
) -> Option<(&'a FormerPod, &'a str, Option<Timestamp>)> {
    let mut open = entry
        .former
        .iter()
        .filter(|former| !former.ended && is_asked_after(entry, record, &former.uid));
    let found = open.find_map(|former| {
        let node = former.node.as_deref().filter(|node| seen.node_ready(node))?;
        Some((former, node))
    });
    let (former, node) = found?;
    let next = pod(seen, entry).filter(|pod| pod.phase == PodPhase::Running);
    Some((former, node, next.and_then(|pod| pod.first_start.or(pod.created))))
}

/// So long after a seat's program was started a daemon that can prove something has done it.
const PROOF: Duration = Duration::from_secs(60);

/// Is a person to be told that it is not proven? At once if no daemon can prove it, since nobody knows on which machine it was. None: yes; else not
/// before this time has passed.
pub fn proof_may_come(seen: &Observed, former: &FormerPod, since: Option<Timestamp>) -> Option<Duration> {
    former.boot.as_ref()?;
    let age = since.and_then(|since| Duration::try_from(seen.now.duration_since(since)).ok());
    let left = PROOF.saturating_sub(age.unwrap_or_default());
    Some(left).filter(|left| !left.is_zero())
}

/// Looks again when a person has to be told.
pub(super) fn look_again(seen: &Observed, record: &Record, book: &[SeatEntry], recheck: &mut Option<Duration>) {
    for entry in book {
        if let Some((former, _, Some(since))) = unproven(seen, entry, record)
            && let Some(left) = proof_may_come(seen, former, Some(since))
            && !anyone_is_heard_of(seen, book)
        {
            sooner(recheck, left);
        }
    }
}

/// Enters what nodes prove of pods that whoever boots asks after.
pub(super) fn prove(seen: &Observed, record: &Record, book: &mut [SeatEntry]) {
    for entry in book {
        let asked: Vec<_> = entry
            .former
            .iter()
            .map(|former| !former.ended && is_asked_after(entry, record, &former.uid))
            .collect();
        let formers = entry.former.iter_mut().zip(asked);
        for (former, _) in formers.filter(|(_, asked)| *asked) {
            // A Node object that was deleted says nothing of the machine.
            let node = former.node.as_deref().and_then(|node| seen.nodes.get(node));
            former.ended = node.is_some_and(|node| is_out_of_service(node) || was_booted(former, node));
        }
    }
}

/// Enters of which pods the disk is older: they have ended, and another seat has the guest alone. Whatever becomes of that one, nobody has to ask what they left.
pub(super) fn outlive(seen: &Observed, record: &Record, decision: &mut Decision) {
    let is_over = |former: &FormerPod| former.ended && !former.older;
    let is_outlived = |entry: &SeatEntry| !is_named(entry, record) && entry.former.iter().any(is_over);
    if !decision.book.iter().any(is_outlived) || !spare::goes_on_alone(seen, record, &decision.book) {
        return;
    }
    if !words::are_told(seen, record, &decision.book) {
        return words::await_words(seen, record, decision);
    }
    for entry in decision.book.iter_mut().filter(|entry| !is_named(entry, record)) {
        let ended = entry.former.iter_mut().filter(|former| former.ended);
        ended.for_each(|former| former.older = true);
    }
}

/// Is it the same machine, and was it booted since the pod was missed? Nothing of before runs any more then. (Silence proves nothing, nor does a node
/// that is heard of again: its kubelet may not yet have ended what belongs to no pod.)
fn was_booted(former: &FormerPod, node: &NodeSeen) -> bool {
    let before = former.boot.as_deref().and_then(|boot| boot.split_once('/'));
    let now = node.boot.as_deref().and_then(|boot| boot.split_once('/'));
    before
        .zip(now)
        // An empty one is not known.
        .filter(|(before, now)| !before.1.is_empty() && !now.1.is_empty())
        .is_some_and(|(before, now)| before.0 == now.0 && before.1 != now.1)
}

/// A person says so, and nothing contradicts it.
fn is_out_of_service(node: &NodeSeen) -> bool {
    !node.ready && node.taints.iter().any(|taint| taint.key == OUT_OF_SERVICE)
}

/// The node of a seat that the record names, if it is not ready and the seat's pod there not proven to have ended.
pub fn away(seen: &Observed, entry: &SeatEntry, record: &Record) -> Option<String> {
    absent(seen, entry, |uid| names(record, uid))
        .find(|(_, ended)| !ended)
        .map(|(node, _)| node.to_owned())
}

/// Nodes of a seat's pods that whoever boots asks after, if they are not ready; and whether the pod there is proven to have ended.
pub fn needed<'a>(
    seen: &'a Observed,
    entry: &'a SeatEntry,
    record: &'a Record,
) -> impl Iterator<Item = (&'a str, bool)> {
    absent(seen, entry, move |uid| is_asked_after(entry, record, uid))
}

/// Nodes of those of a seat's pods, if they are not ready; and whether the pod there is proven to have ended.
fn absent<'a>(
    seen: &'a Observed,
    entry: &'a SeatEntry,
    which: impl Fn(&str) -> bool + 'a,
) -> impl Iterator<Item = (&'a str, bool)> {
    let now = entry.pod_uid.iter().map(move |uid| (uid, &entry.node, false));
    let former = entry.former.iter();
    let former = former.map(|former| (&former.uid, &former.node, former.ended));
    let which = now.chain(former).filter(move |(uid, ..)| which(uid));
    let placed = which.filter_map(|(_, node, ended)| Some((node.as_deref()?, ended)));
    placed.filter(move |(node, _)| !seen.node_ready(node))
}

/// Nodes that prove something, or would if a pod of theirs were missed: of such a pod the boot is kept in which its node is then. A node may be told
/// more than once.
pub fn nodes_to_ask(book: &[SeatEntry]) -> impl Iterator<Item = &str> {
    book.iter().flat_map(|entry| {
        let open = entry.former.iter().filter(|former| !former.ended);
        let formers = open.filter_map(|former| former.node.as_deref());
        formers.chain(entry.node.as_deref())
    })
}

/// Is an engine proven to have ended by `after` alone, or what it left to be older?
pub(super) fn proves(before: &[SeatEntry], after: &[SeatEntry]) -> bool {
    let ended = |book: &[SeatEntry], uid: &str| {
        let mut formers = book.iter().flat_map(|entry| &entry.former);
        formers.any(|former| former.uid == uid && former.ended)
    };
    let formers = after.iter().flat_map(|entry| &entry.former);
    let mut ended_now = formers.filter(|former| former.ended);
    let older = |book: &[SeatEntry]| {
        let formers = book.iter().flat_map(|entry| &entry.former);
        formers.filter(|former| former.older).count()
    };
    let engine_ended = |entry: &SeatEntry| before.iter().any(|old| old.name == entry.name && old.engine_ended);
    let engines = after.iter().filter(|entry| entry.engine_ended);
    let marked = older(after) > older(before);
    marked
        || ended_now.any(|former| !ended(before, &former.uid))
        || engines.into_iter().any(|entry| !engine_ended(entry))
}
