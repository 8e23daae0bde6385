//! Seats whose pods a watch does not have, or may not yet have as deleted: the API server itself is asked for each, past every cache. A list may be old, and then its watch
//! is, too.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_protocol::identity::SeatId;
use futures::FutureExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, PartialObjectMeta};
use kube::{Client, Error};
use tokio::task::JoinHandle;

use super::book;
use super::node::NodeSeat;
use crate::explain;

/// An answer that takes longer is none. Nothing waits for it, and a node that has just started, with all its pods, may be slow.
const ASK_MAX: Duration = Duration::from_secs(20);
/// Pauses between an answer and the next question about the same seat: the first, and the longest. They double.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// What the API server says of a seat's pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// There is no pod of its name, or another one.
    Gone,
    /// It is there.
    There { ends: bool },
    /// Nothing that proves anything.
    Nothing,
}

/// One seat's questions.
struct Asked {
    asking: Option<JoinHandle<Answer>>,
    next: Instant,
    pause: Duration,
    warned: bool,
}

/// Asks beside everything else: nothing waits for an answer.
#[derive(Default)]
pub struct Missing(BTreeMap<SeatId, Asked>);

impl Missing {
    /// Takes what was answered, and asks for those of these seats whose turn it is.
    pub fn look(&mut self, client: &Client, missing: &[Arc<NodeSeat>]) {
        let now = Instant::now();
        let known: Vec<_> = missing.iter().map(|seat| (seat.known(), seat)).collect();
        // Those that are back in the watch are forgotten: the next time begins with a short pause.
        self.0
            .retain(|id, _| known.iter().any(|(known, _)| known.seat_id == *id));
        for (known, seat) in known {
            let asked = self.0.entry(known.seat_id).or_insert_with(|| Asked::new(now));
            if let Some(answer) = asked.answered(now) {
                attend(seat, &known, answer, &mut asked.warned);
            } else if asked.is_due(now) {
                let (name, uid) = (known.config.seat, known.seat_id.to_string());
                asked.asking = Some(tokio::spawn(ask(client.clone(), known.namespace, name, uid)));
            }
        }
    }
}

impl Asked {
    fn new(now: Instant) -> Asked {
        Asked {
            asking: None,
            next: now,
            pause: PAUSE.0,
            warned: false,
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.asking.is_none() && now >= self.next
    }

    /// The answer, once there is one; the next question waits longer.
    fn answered(&mut self, now: Instant) -> Option<Answer> {
        let answer = self.asking.as_mut()?.now_or_never()?;
        self.asking = None;
        self.next = now + self.pause;
        self.pause = (2 * self.pause).min(PAUSE.1);
        // A panic there was told by its hook, and is no answer.
        Some(answer.unwrap_or(Answer::Nothing))
    }
}

fn attend(seat: &NodeSeat, known: &book::Seat, answer: Answer, warned: &mut bool) {
    match answer {
        Answer::Gone => seat.is_gone(),
        Answer::There { ends } => {
            if !seat.pod.ends() && !std::mem::replace(warned, true) {
                tracing::warn!(
                    seat = known.config.label(),
                    "the watch lacks a pod that is there: it is old, or the pod lost a label"
                );
            }
            if ends {
                seat.pod.end();
            }
        }
        Answer::Nothing => {}
    }
}

async fn ask(client: Client, namespace: String, name: String, uid: String) -> Answer {
    let api: Api<Pod> = Api::namespaced(client, &namespace);
    // The client itself asks again after some errors: that takes part of the same time.
    match tokio::time::timeout(ASK_MAX, api.get_metadata(&name)).await {
        Ok(answer) => {
            if let Err(error) = &answer {
                tracing::debug!("pod {namespace}/{name}: {}", explain(error));
            }
            judge(&answer, &name, &uid)
        }
        Err(_) => Answer::Nothing,
    }
}

/// Only what the API server says of exactly this pod proves that it is gone. A 404 alone may come from whatever is on the way to it, and an
/// object without a UID is none.
fn judge(answer: &Result<PartialObjectMeta<Pod>, Error>, name: &str, uid: &str) -> Answer {
    match answer {
        Ok(pod) => match pod.metadata.uid.as_deref() {
            None | Some("") => Answer::Nothing,
            Some(other) if other != uid => Answer::Gone,
            Some(_) => Answer::There {
                ends: pod.metadata.deletion_timestamp.is_some(),
            },
        },
        Err(Error::Api(status)) => {
            let details = status.details.as_ref();
            let of_pod = details.is_some_and(|details| details.kind == "pods" && details.name == name);
            if status.reason == "NotFound" && of_pod {
                Answer::Gone
            } else {
                Answer::Nothing
            }
        }
        Err(_) => Answer::Nothing,
    }
}

#[cfg(test)]
#[path = "missing_tests.rs"]
mod tests;
