//! What happened to a VM, told to people as events of the API server.
//!
//! Each event is an object that the API server keeps for a while, so each VM has a bound: 200 at once, and one more for each three seconds. (A failover
//! is some ten of them.) Of those the last 50 are not for looks that fail, but for what happens to the guest. A failure that stays is told again after six minutes. What is
//! too much is in the log.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_crds::FaultTolerantVM;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, ResourceExt};

/// Longest reason and note; the API server takes 128 and 1024 bytes.
const REASON_BYTES_MAX: usize = 128;
const NOTE_BYTES_MAX: usize = 1024;
/// So many events of a VM may follow each other at once.
const BURST: u32 = 200;
/// So many of them are not for looks that fail.
const RESERVE: u32 = 50;
/// After each of these times there may be one more.
const REFILL: Duration = Duration::from_secs(3);
/// The same failure is told again after this time.
const FAILURE_AGAIN: Duration = Duration::from_secs(360);

/// Reason of a look that failed.
pub const RECONCILE_FAILED: &str = "ReconcileFailed";
/// Reason where a look is not possible: the operator can't read the VM.
pub const UNREADABLE: &str = "Unreadable";

/// At most so many bytes of a text.
pub fn clipped(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// What is told again and again while it stays.
fn is_failure(reason: &str) -> bool {
    [RECONCILE_FAILED, UNREADABLE].contains(&reason)
}

/// Is an event told?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Told,
    /// It was told lately.
    Repeated,
    /// There were too many.
    TooMany,
}

/// What VMs were told lately, by their UIDs. Of one that was told nothing for long there is nothing.
#[derive(Debug, Default)]
struct Bounds(HashMap<String, Lately>);

/// What a VM was told lately.
#[derive(Debug)]
struct Lately {
    /// So many events may be told at once.
    left: u32,
    /// Since when the next one is waited for.
    since: Instant,
    /// The failure that was told last, and when.
    failure: Option<(String, Instant)>,
}

impl Lately {
    fn new(now: Instant) -> Lately {
        Lately {
            left: BURST,
            since: now,
            failure: None,
        }
    }

    /// As it is by now.
    fn pass(&mut self, now: Instant) {
        while self.left < BURST && now.saturating_duration_since(self.since) >= REFILL {
            self.left += 1;
            self.since += REFILL;
        }
        if self.left == BURST {
            self.since = now;
        }
        let recent = |when: &Instant| now.saturating_duration_since(*when) < FAILURE_AGAIN;
        self.failure = self.failure.take().filter(|(_, when)| recent(when));
    }

    fn judge(&mut self, reason: &str, note: &str, now: Instant) -> Verdict {
        let fails = is_failure(reason);
        if fails && self.failure.as_ref().is_some_and(|(told, _)| told == note) {
            return Verdict::Repeated;
        }
        let reserved = if fails { RESERVE } else { 0 };
        if self.left <= reserved {
            return Verdict::TooMany;
        }
        self.left -= 1;
        if fails {
            self.failure = Some((note.to_owned(), now));
        }
        Verdict::Told
    }
}

impl Bounds {
    /// Is this told of a VM?
    fn judge(&mut self, vm: &str, reason: &str, note: &str, now: Instant) -> Verdict {
        self.0.retain(|_, lately| {
            lately.pass(now);
            lately.left < BURST || lately.failure.is_some()
        });
        let lately = self.0.entry(vm.to_owned()).or_insert_with(|| Lately::new(now));
        lately.judge(reason, note, now)
    }

    /// An event was lost: if it was of a failure, that was told to nobody.
    fn lost(&mut self, vm: &str, reason: &str) {
        if let Some(lately) = self.0.get_mut(vm).filter(|_| is_failure(reason)) {
            lately.failure = None;
        }
    }
}

/// Tells it.
pub struct Events {
    client: Client,
    reporter: Reporter,
    bounds: Mutex<Bounds>,
}

impl Events {
    /// In the name of this replica.
    pub fn new(client: Client, replica: String) -> Events {
        Events {
            client,
            reporter: Reporter {
                controller: "ftvm-operator".to_owned(),
                instance: Some(replica),
            },
            bounds: Mutex::default(),
        }
    }

    fn bounds(&self) -> MutexGuard<'_, Bounds> {
        self.bounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM is gone.
    pub fn forget(&self, vm: &FaultTolerantVM) {
        self.bounds().0.remove(&vm.uid().unwrap_or_default());
    }

    /// One thing, one event. A recorder that is kept takes whatever it is told of an object under one reason within six minutes for repetitions of the
    /// first: it counts them, and the note stays that of the first, so that after a second failover the wrong node would be named. Hence a new one
    /// each time, within the VM's bound.
    ///
    /// # Errors
    /// The API server's.
    pub async fn publish(
        &self,
        vm: &ObjectReference,
        type_: EventType,
        reason: &str,
        note: &str,
    ) -> Result<(), kube::Error> {
        let uid = vm.uid.clone().unwrap_or_default();
        let verdict = self.bounds().judge(&uid, reason, note, Instant::now());
        match verdict {
            Verdict::Told => {}
            Verdict::Repeated => return Ok(()),
            Verdict::TooMany => {
                tracing::warn!(
                    vm = vm.name.as_deref(),
                    reason,
                    note,
                    "not told as an event: too many of this VM"
                );
                return Ok(());
            }
        }
        let event = Event {
            type_,
            reason: clipped(reason, REASON_BYTES_MAX).to_owned(),
            note: Some(clipped(note, NOTE_BYTES_MAX).to_owned()),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
        let published = recorder.publish(&event, vm).await;
        if published.is_err() {
            self.bounds().lost(&uid, reason);
        }
        published
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::sync::{Arc, Mutex};

    use hyper::Method;
    use hyper::http::request::Parts;
    use kube::Resource;
    use serde_json::Value;

    use super::*;
    use crate::decide::rig;
    use crate::testing::serve;

    /// Takes every event and says so.
    type Taken = Arc<Mutex<Vec<(Method, Value)>>>;

    async fn server() -> (Client, Taken) {
        let taken = Taken::default();
        let taking = taken.clone();
        let config = serve(move |head: Parts, body| {
            let event: Value = serde_json::from_slice(&body).unwrap();
            let answer = event.to_string();
            taking.lock().unwrap().push((head.method, event));
            ready(Some((200, answer)))
        });
        (Client::try_from(config.await).unwrap(), taken)
    }

    /// How many of so many events are told at this time.
    fn told(bounds: &mut Bounds, vm: &str, reason: &str, count: u32, now: Instant) -> u32 {
        let told = |number: &u32| bounds.judge(vm, reason, &number.to_string(), now) == Verdict::Told;
        u32::try_from((0..count).filter(told).count()).unwrap()
    }

    #[test]
    fn each_vm_has_a_bound_of_its_own() {
        let mut bounds = Bounds::default();
        let begin = Instant::now();
        assert_eq!(told(&mut bounds, "a", "SeatFailed", 1000, begin), BURST);
        assert_eq!(told(&mut bounds, "b", "SeatFailed", 3, begin), 3);
        assert_eq!(
            bounds.judge("a", "SeatFailed", "", begin + REFILL / 2),
            Verdict::TooMany
        );
        // One each time, however many there are, and no more at once than in the beginning.
        for time in 1..=5 {
            let now = begin + REFILL * time;
            assert_eq!(told(&mut bounds, "a", "SeatFailed", 100, now), 1, "{time}");
        }
        let later = begin + REFILL * 1000;
        assert_eq!(told(&mut bounds, "a", "SeatFailed", 1000, later), BURST);
    }

    #[test]
    fn a_failure_is_told_again_if_it_is_another_one_or_after_a_while() {
        let mut bounds = Bounds::default();
        let begin = Instant::now();
        let mut judge = |note: &str, seconds: u64| {
            let now = begin + Duration::from_secs(seconds);
            bounds.judge("a", RECONCILE_FAILED, note, now)
        };
        assert_eq!(judge("no answer", 0), Verdict::Told);
        assert_eq!(judge("no answer", 359), Verdict::Repeated);
        assert_eq!(judge("no answer", 360), Verdict::Told);
        assert_eq!(judge("no certificate", 361), Verdict::Told);
        assert_eq!(judge("no answer", 362), Verdict::Told);
        // One that the API server did not take was told to nobody.
        bounds.lost("a", "SeatFailed");
        let again = |bounds: &mut Bounds| {
            let now = begin + Duration::from_secs(363);
            bounds.judge("a", RECONCILE_FAILED, "no answer", now)
        };
        assert_eq!(again(&mut bounds), Verdict::Repeated);
        bounds.lost("a", RECONCILE_FAILED);
        assert_eq!(again(&mut bounds), Verdict::Told);
    }

    #[test]
    fn failures_leave_something_for_what_happens_to_the_guest() {
        let mut bounds = Bounds::default();
        let now = Instant::now();
        assert_eq!(told(&mut bounds, "a", RECONCILE_FAILED, 1000, now), BURST - RESERVE);
        assert_eq!(told(&mut bounds, "a", "ActiveChanged", 100, now), RESERVE);
    }

    #[test]
    fn what_was_told_long_ago_is_not_remembered() {
        let mut bounds = Bounds::default();
        let begin = Instant::now();
        for vm in 0..100 {
            bounds.judge(&vm.to_string(), "SeatFailed", "", begin);
        }
        bounds.judge("fails", RECONCILE_FAILED, "no answer", begin);
        bounds.judge("new", "SeatFailed", "", begin + REFILL);
        // The failure is not told again for a while.
        assert_eq!(bounds.0.len(), 2, "{bounds:?}");
        bounds.judge("new", "SeatFailed", "", begin + FAILURE_AGAIN);
        assert_eq!(bounds.0.keys().collect::<Vec<_>>(), ["new"]);
    }

    /// Each event is a request and an object.
    #[tokio::test]
    async fn beyond_the_bound_nothing_is_sent() {
        let (client, taken) = server().await;
        let events = Events::new(client, "one".to_owned());
        let vm = rig::vm();
        let sent = || taken.lock().unwrap().len();
        let mut last = Lately::new(Instant::now());
        last.left = 1;
        events.bounds().0.insert(vm.uid().unwrap_or_default(), last);
        for note in ["first", "second", "third"] {
            let told = events
                .publish(&vm.object_ref(&()), EventType::Normal, "SeatFailed", note)
                .await;
            told.unwrap();
        }
        assert_eq!(sent(), 1);
        events.forget(&vm);
        let told = events
            .publish(&vm.object_ref(&()), EventType::Normal, "SeatFailed", "")
            .await;
        told.unwrap();
        assert_eq!(sent(), 2);
    }

    #[tokio::test]
    async fn what_happens_twice_is_told_twice() {
        let (client, taken) = server().await;
        let events = Events::new(client, "one".to_owned());
        let notes = [
            "the guest runs on node a, before: b",
            "the guest runs on node b, before: a",
        ];
        for note in notes {
            let vm = rig::vm();
            let told = events
                .publish(&vm.object_ref(&()), EventType::Normal, "ActiveChanged", note)
                .await;
            told.unwrap();
        }
        let taken = taken.lock().unwrap();
        let told: Vec<_> = taken.iter().map(|(method, event)| (method, &event["note"])).collect();
        assert_eq!(told[0], (&Method::POST, &Value::from(notes[0])));
        assert_eq!(told[1], (&Method::POST, &Value::from(notes[1])));
        let name = |index: usize| &taken[index].1["metadata"]["name"];
        assert!(told.len() == 2 && name(0) != name(1), "{taken:?}");
        assert_eq!(taken[0].1["regarding"]["name"], "web");
    }
}
