//! Pods that are gone, and of which of them it is proven that no engine runs any more (rules 8 and 9).
//!
//! The record goes on naming a pod that is gone until a guest runs again, and no disk is booted before that proof: an object that the API server
//! lacks may have been deleted by force, while its node went on.

use std::time::Duration;

use ftvm_crds::seat::SeatPublished;
use ftvm_crds::{FormerPod, SeatEntry};
use ftvm_protocol::record::{Phase, Record};
use k8s_openapi::jiff::Timestamp;

use super::run::{sooner, whole_seconds};
use super::{has_engine, names};
use crate::observe::{NodeSeen, Observed, PodPhase, PodSeen};

/// Most earlier pods of a seat that the book keeps.
pub const FORMER_MAX: usize = 8;
/// A node that is ready so long after a pod was missed was heard of meanwhile (it is called not ready after 40 to 50 s of silence), and its kubelet has
/// ended what belongs to no pod.
const HEARD_OF: Duration = Duration::from_secs(120);
/// Put on a node by a person who made sure that it is switched off.
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// The pod ends, its daemon said so of the engine that there was, and no other one is begun: all its containers have ended, or the record says Stopped.
pub(super) fn engine_ended(pod: &PodSeen, record: Option<&Record>) -> bool {
    let told = |published: &SeatPublished| published.last_exit.is_some();
    let told = pod.published.as_ref().is_ok_and(told);
    let stopped = record.is_some_and(|record| record.phase == Phase::Stopped);
    pod.deleting && (stopped || pod.phase == PodPhase::Finished) && told && !has_engine(pod)
}

/// The pod is gone; the record and the seat's header may name it for a long time.
pub(super) fn forget(entry: &mut SeatEntry, uid: String, now: Timestamp, record: Option<&Record>) {
    entry.former.push(FormerPod {
        uid,
        // No daemon takes a pod for a seat of which the book does not know the node.
        ended: entry.engine_ended || entry.node.is_none(),
        node: entry.node.take(),
        missing_since: whole_seconds(now),
    });
    if entry.former.len() > FORMER_MAX {
        let named = |former: &FormerPod| record.is_some_and(|record| names(record, &former.uid));
        let oldest = entry.former.iter().position(|former| !named(former)).unwrap_or(0);
        entry.former.remove(oldest);
    }
    entry.pod_uid = None;
    entry.pod_ip = None;
    entry.host_ip = None;
    entry.engine_ended = false;
}

/// Enters what nodes prove of pods that the record names.
pub(super) fn prove(seen: &Observed, record: &Record, book: &mut [SeatEntry], recheck: &mut Option<Duration>) {
    let formers = book.iter_mut().flat_map(|entry| &mut entry.former);
    for former in formers.filter(|former| !former.ended && names(record, &former.uid)) {
        let Some(node) = former.node.as_deref().and_then(|node| seen.nodes.get(node)) else {
            // A Node object that was deleted says nothing of the machine.
            continue;
        };
        let missing = seen.now.duration_since(former.missing_since.0);
        let missing = Duration::try_from(missing).unwrap_or_default();
        if is_out_of_service(node) || node.ready && missing >= HEARD_OF {
            former.ended = true;
        } else if node.ready {
            sooner(recheck, HEARD_OF - missing);
        }
    }
}

/// A person says so, and nothing contradicts it.
fn is_out_of_service(node: &NodeSeen) -> bool {
    !node.ready && node.taints.iter().any(|taint| taint.key == OUT_OF_SERVICE)
}

/// The node of a seat that the record names, if it is not ready and the seat's pod there not proven to have ended.
pub fn away(seen: &Observed, entry: &SeatEntry, record: &Record) -> Option<String> {
    let now = entry.pod_uid.iter().filter_map(|uid| Some((uid, entry.node.as_ref()?)));
    let former = entry.former.iter().filter(|former| !former.ended);
    let former = former.filter_map(|former| Some((&former.uid, former.node.as_ref()?)));
    let mut named = now.chain(former).filter(|(uid, _)| names(record, uid));
    let away = named.find(|(_, node)| !seen.node_ready(node));
    away.map(|(_, node)| node.clone())
}

/// Nodes that a proof is still to come of.
pub fn nodes_to_ask(book: &[SeatEntry]) -> impl Iterator<Item = &str> {
    let formers = book.iter().flat_map(|entry| &entry.former);
    let open = formers.filter(|former| !former.ended);
    open.filter_map(|former| former.node.as_deref())
}

/// Is a pod that is gone proven to have ended by `after` alone?
pub(super) fn proves(before: &[SeatEntry], after: &[SeatEntry]) -> bool {
    let ended = |book: &[SeatEntry], uid: &str| {
        let mut formers = book.iter().flat_map(|entry| &entry.former);
        formers.any(|former| former.uid == uid && former.ended)
    };
    let formers = after.iter().flat_map(|entry| &entry.former);
    let mut ended_now = formers.filter(|former| former.ended);
    ended_now.any(|former| !ended(before, &former.uid))
}
