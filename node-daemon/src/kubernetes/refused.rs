//! Pods that look like seats of this node and are none. Nothing else would tell why: the program in such a pod waits for ever. What a person has
//! to mend is said in the place of a seat's status; what may come by itself is not.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_crds::names::ANNOTATION_SEAT_STATUS;
use ftvm_crds::seat::SeatPublished;
use ftvm_protocol::identity::SeatId;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::book::{self, Refusal};
use super::publish::clip;

/// The same pod is written no more often, whatever came of it.
const AGAIN: Duration = Duration::from_secs(5);

/// A patch that is due on a pod.
#[derive(Debug)]
pub struct Word {
    /// Namespace of the pod.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// What is written.
    pub patch: Value,
}

#[derive(Default)]
struct Refused {
    refusal: Refusal,
    written_at: Option<Instant>,
}

/// See the module.
#[derive(Default)]
pub struct RefusedPods(Mutex<BTreeMap<SeatId, Refused>>);

impl RefusedPods {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SeatId, Refused>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This one is none.
    pub fn refuse(&self, id: SeatId, refusal: Refusal) {
        self.lock().entry(id).or_default().refusal = refusal;
    }

    /// This one is a seat.
    pub fn accept(&self, id: SeatId) {
        self.lock().remove(&id);
    }

    /// There are no others.
    pub fn keep(&self, seen: &[SeatId]) {
        self.lock().retain(|id, _| seen.contains(id));
    }

    /// Why this one is none.
    pub fn why(&self, id: SeatId) -> Option<String> {
        self.lock().get(&id).map(|refused| refused.refusal.why.clone())
    }

    /// What is to be said on these pods now. What an earlier daemon published beside it stays.
    pub fn words<'a>(&self, pods: impl Iterator<Item = &'a Arc<Pod>>) -> Vec<Word> {
        let mut refused = self.lock();
        let word = |pod: &Arc<Pod>| {
            let id = book::seat_id(pod)?;
            let refused = refused.get_mut(&id).filter(|refused| refused.refusal.code != 0)?;
            let annotations = pod.metadata.annotations.clone().unwrap_or_default();
            // What can't be read is written over.
            let found = SeatPublished::of(&annotations).unwrap_or_default();
            let published = SeatPublished {
                why: clip(&refused.refusal.why),
                code: refused.refusal.code,
                arbiter_reachable: true,
                ..found.clone()
            };
            if published == found || refused.written_at.is_some_and(|at| at.elapsed() < AGAIN) {
                return None;
            }
            refused.written_at = Some(Instant::now());
            let text = serde_json::to_string(&published).ok()?;
            Some(Word {
                namespace: pod.metadata.namespace.clone()?,
                pod: pod.metadata.name.clone()?,
                // Another pod of this name is not meant.
                patch: json!({"metadata": {"uid": id.to_string(), "annotations": {ANNOTATION_SEAT_STATUS: text}}}),
            })
        };
        pods.filter_map(word).collect()
    }
}
