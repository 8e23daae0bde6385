//! What a person asks for by an annotation of the VM: told to the daemon of one seat, and what came of it.
//!
//! ```text
//!   new text ─┬─► not now ──► switchover: Pending until it can be;  failover: Refused
//!             └─► Pending, with the pod that is told ──► request on that pod ─┬─► its daemon's answer: Done, Refused
//!                                                                             ├─► none will come: Refused, not known
//!                       failover: not begun in time, or not wanted any more ──┴─► taken back on that pod: Refused
//! ```
//!
//! A failure is taken back by another request in the place of the one that asks for it, with the same id. A daemon writes that it begins over the
//! version of the pod that asks (`begun`), so of a pod that has the one without the other it is known that it never comes, whatever any clock says.
//!
//! Invariant: as long as a text stands in the status no second pod is told of it, and none is told twice, whatever becomes of the first: a
//! failure that was brought about and not answered must not hit the successor.

use std::time::Duration;

use ftvm_crds::names::{ANNOTATION_FAILOVER, ANNOTATION_SWITCHOVER};
use ftvm_crds::seat::{DoneRequest, FAILOVER_WITHIN, Order, SeatRequest};
use ftvm_crds::{AskedFor, Outcome, SeatEntry, Told};
use ftvm_protocol::record::Record;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use kube::ResourceExt;

use super::run::{ask, sooner, whole_seconds};
use super::{Action, Decision, holder, pod, published};
use crate::observe::{Observed, PodSeen};

/// Longest text that is kept of an annotation, in characters.
pub(super) const REQUEST_LENGTH_MAX: usize = 64;

/// Something that can be asked for.
struct Kind {
    /// In ids and messages.
    name: &'static str,
    annotation: &'static str,
    order: Order,
    /// If its daemon has not begun it within this time it is taken back.
    within: Option<SignedDuration>,
}

const SWITCHOVER: Kind = Kind {
    name: "switchover",
    annotation: ANNOTATION_SWITCHOVER,
    order: Order::Switchover,
    within: None,
};

const FAILOVER: Kind = Kind {
    name: "failover",
    annotation: ANNOTATION_FAILOVER,
    order: Order::Failover,
    within: Some(SignedDuration::from_secs(FAILOVER_WITHIN.as_secs() as i64)),
};

/// Why something can't be told to anybody now, and what that makes of it.
struct Obstacle {
    outcome: Outcome,
    why: String,
}

/// Looks at both annotations. A pod has room for one request, so one of them is under way at a time.
pub(super) fn follow(seen: &Observed, record: &Record, decision: &mut Decision) {
    let obstacle = before_switchover(seen, record, decision);
    decision.switchover = SWITCHOVER.follow(seen, record, decision.switchover.clone(), obstacle, decision);
    let obstacle = before_failover(seen, record, decision);
    decision.failover = FAILOVER.follow(seen, record, decision.failover.clone(), obstacle, decision);
}

/// Nothing can be told while the record is not to be gone by. A failure that comes once somebody has mended it would be a surprise.
pub(super) fn refuse_failover(seen: &Observed, decision: &mut Decision) {
    come_to_an_end(seen, decision);
    let Some(request) = FAILOVER.request(seen) else { return };
    let known = decision.failover.as_ref();
    if !is_under_way(known) && known.is_none_or(|known| known.request != request) {
        let why = "the VM's Lease is not to be gone by, so that nobody could take over: the condition ArbiterReachable says what to do; \
                   then ask again with another text";
        decision.settles = true;
        decision.failover = Some(AskedFor {
            request,
            outcome: Outcome::Refused,
            why: Some(why.to_owned()),
            told: None,
        });
    }
}

/// Where nothing new is told to anybody: a failure that was told comes to its end, and is taken back if nobody wants it any more.
pub(super) fn come_to_an_end(seen: &Observed, decision: &mut Decision) {
    let Some((asked, told)) = decision.failover.clone().and_then(under_way) else {
        return;
    };
    let id = FAILOVER.id(&asked.request);
    let after = match answer(seen, &decision.book, &id) {
        Some(done) => answered(asked.request, done, Some(told)),
        None => FAILOVER.await_answer(seen, asked.request, told, Telling::Over, decision),
    };
    decision.failover = Some(after);
}

fn before_switchover(seen: &Observed, record: &Record, decision: &Decision) -> Option<Obstacle> {
    let waits = |why: &str| {
        Some(Obstacle {
            outcome: Outcome::Pending,
            why: why.to_owned(),
        })
    };
    if is_under_way(decision.failover.as_ref()) {
        return waits("waits until status.failover says what came of the failover");
    }
    if !is_protected(seen, record, &decision.book) {
        return waits("waits until the VM is protected: a switchover needs a standby");
    }
    None
}

/// A failure is brought about at once or not at all.
fn before_failover(seen: &Observed, record: &Record, decision: &Decision) -> Option<Obstacle> {
    let refused = |why: &str| {
        Some(Obstacle {
            outcome: Outcome::Refused,
            why: format!("{why}, then ask again with another text"),
        })
    };
    if is_under_way(decision.switchover.as_ref()) {
        return refused("a switchover is under way: wait until status.switchover says what came of it");
    }
    if !is_protected(seen, record, &decision.book) {
        return refused(
            "the VM is not protected, a failure now would stop the guest: wait until its condition Protected is True",
        );
    }
    if !pair_stays(seen, record, &decision.book) {
        return refused(
            "a seat of the pair is to go, or its node is not ready, so that the guest may have no place to go on: wait until both are well",
        );
    }
    let uid = super::record(seen).map(|record| record.snapshot.uid.to_string());
    if decision.lease_uid != uid {
        return refused(
            "the VM's Lease was made anew, a failover may be refused: wait until its condition ArbiterReachable is True",
        );
    }
    None
}

/// Was a pod told, and has it not answered?
fn is_under_way(asked: Option<&AskedFor>) -> bool {
    asked.is_some_and(|asked| asked.outcome == Outcome::Pending && asked.told.is_some())
}

/// What a pod was told, and which one, if it has not answered.
fn under_way(asked: AskedFor) -> Option<(AskedFor, Told)> {
    let told = asked.told.clone().filter(|_| asked.outcome == Outcome::Pending)?;
    Some((asked, told))
}

fn answered(request: String, done: DoneRequest, told: Option<Told>) -> AskedFor {
    AskedFor {
        request,
        outcome: done.refused.as_ref().map_or(Outcome::Done, |_| Outcome::Refused),
        why: done.refused,
        told,
    }
}

/// May a pod that was chosen still be told?
#[derive(Clone, Copy, PartialEq, Eq)]
enum Telling {
    /// It is, if it was not: an operator may have died in between.
    GoesOn,
    /// Not by this look.
    Over,
}

fn is_protected(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    let active = holder(book, record).and_then(|entry| published(seen, entry));
    record.members.iter().count() > 1 && active.is_some_and(|published| published.protected)
}

/// Whether both seats have a place to go on. The active knows of its own end alone, and its link says nothing of its standby's way to the
/// API server.
fn pair_stays(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    record.members.iter().all(|member| {
        let uid = member.seat.to_string();
        let entry = book.iter().find(|entry| entry.had_uid(&uid) && !entry.leaving);
        let pod = entry.and_then(|entry| pod(seen, entry)).filter(|pod| !pod.deleting);
        pod.and_then(|pod| pod.node.as_deref())
            .is_some_and(|node| seen.node_ready(node))
    })
}

impl Kind {
    /// The annotation's text.
    fn request(&self, seen: &Observed) -> Option<String> {
        let text = seen.vm.annotations().get(self.annotation)?;
        Some(text.chars().take(REQUEST_LENGTH_MAX).collect())
    }

    fn id(&self, request: &str) -> String {
        format!("{}-{request}", self.name)
    }

    fn follow(
        &self,
        seen: &Observed,
        record: &Record,
        known: Option<AskedFor>,
        obstacle: Option<Obstacle>,
        decision: &mut Decision,
    ) -> Option<AskedFor> {
        // What a pod was told comes to its end first, whatever the annotation says since.
        let told = known.as_ref().filter(|known| is_under_way(Some(known)));
        let request = told.map(|told| told.request.clone()).or_else(|| self.request(seen));
        let Some(request) = request else { return known };
        let known = known.filter(|known| known.request == request);
        if known.as_ref().is_some_and(|known| known.outcome != Outcome::Pending) {
            return known;
        }
        let asked = |outcome, why, told| {
            Some(AskedFor {
                request: request.clone(),
                outcome,
                why,
                told,
            })
        };
        let id = self.id(&request);
        let book = decision.book.clone();
        let has_it = |entry: &&SeatEntry| request_of(seen, entry) == Some(&id);
        let answer = answer(seen, &book, &id);
        if known.is_none() && (answer.is_some() || book.iter().any(|entry| has_it(&entry))) {
            // What is told is in the status first. A daemon that had this id would do nothing, and its answer is about another time.
            decision.settles = true;
            let why = format!(
                "a {} was asked for with this text before: ask with another text",
                self.name
            );
            return asked(Outcome::Refused, Some(why), None);
        }
        // A request on a pod is as good as the status of an operator that did not keep whom it told.
        let told = known.and_then(|known| known.told);
        let told = told.or_else(|| book.iter().find(has_it).and_then(|entry| self.telling(seen, entry)));
        // Whoever was told answers, whether or not it is active any more.
        if let Some(done) = answer {
            return Some(answered(request, done, told));
        }
        if let Some(told) = told {
            return Some(self.await_answer(seen, request, told, Telling::GoesOn, decision));
        }
        if let Some(Obstacle { outcome, why }) = obstacle {
            decision.settles |= outcome == Outcome::Refused;
            return asked(outcome, Some(why), None);
        }
        let active = holder(&book, record)?;
        let told = self.telling(seen, active)?;
        sooner_than(told.until.as_ref(), seen, decision);
        ask(seen, active, &self.told(&id, &told), &mut decision.actions);
        asked(Outcome::Pending, None, Some(told))
    }

    /// A pod was told, or is about to be: an operator may have died in between.
    fn await_answer(
        &self,
        seen: &Observed,
        request: String,
        mut told: Told,
        telling: Telling,
        decision: &mut Decision,
    ) -> AskedFor {
        // An operator of an earlier release set no time.
        told.until = told.until.or_else(|| self.until(seen));
        let id = self.id(&request);
        let (outcome, why) = self.outcome(seen, &id, &told, telling, decision);
        decision.settles |= outcome == Outcome::Refused;
        AskedFor {
            request,
            outcome,
            why,
            told: Some(told),
        }
    }

    fn outcome(
        &self,
        seen: &Observed,
        id: &str,
        told: &Told,
        telling: Telling,
        decision: &mut Decision,
    ) -> (Outcome, Option<String>) {
        let is_told = |entry: &&SeatEntry| entry.pod_uid.as_ref() == Some(&told.pod_uid) && pod(seen, entry).is_some();
        // Another request that came later takes the place of the answer.
        let stays = |entry: &&SeatEntry| {
            let request = request_of(seen, entry);
            request.is_some_and(|request| request == id) || request == told.after.as_ref()
        };
        let entry = decision.book.iter().find(is_told).filter(stays).cloned();
        let Some((pod, entry)) = entry.and_then(|entry| Some((pod(seen, &entry)?, entry))) else {
            let why = format!(
                "not known whether it was done, the seat that was told won't answer any more: see status.active and status.lastFailover; \
                 for another {} ask with another text",
                self.name
            );
            return (Outcome::Refused, Some(why));
        };
        if is_taken_back(pod, id) {
            return self.after_taking_back(pod, id);
        }
        if let Some(why) = self.unwanted(seen, told) {
            take_back(&entry, pod, id, decision);
            return (Outcome::Pending, Some(format!("is taken back: {why}")));
        }
        sooner_than(told.until.as_ref(), seen, decision);
        if telling == Telling::GoesOn {
            ask(seen, &entry, &self.told(id, told), &mut decision.actions);
        }
        (Outcome::Pending, None)
    }

    /// It was taken back on the pod: no daemon begins it any more, but it may have been begun before.
    fn after_taking_back(&self, pod: &PodSeen, id: &str) -> (Outcome, Option<String>) {
        match &pod.published {
            Ok(published) if published.begun.as_deref() != Some(id) => {
                let why = format!(
                    "taken back before it was begun, nothing was done: nobody wanted it any more, or the seat's daemon did not begin it in time; \
                     for another {} ask with another text",
                    self.name
                );
                (Outcome::Refused, Some(why))
            }
            _ => {
                let why = "taken back, but its daemon may have begun it before: waits for what that says";
                (Outcome::Pending, Some(why.to_owned()))
            }
        }
    }

    /// Why what was told is not wanted any more, if it can be taken back. A clock that was set back ends no time late.
    fn unwanted(&self, seen: &Observed, told: &Told) -> Option<String> {
        let within = self.within?;
        let left = told.until.as_ref()?.0.duration_since(seen.now);
        if !seen.vm.annotations().contains_key(self.annotation) {
            return Some(format!("the annotation {} was removed", self.annotation));
        }
        let over = left.is_negative() || left > within;
        over.then(|| format!("its daemon did not begin it within {} s", within.as_secs()))
    }

    fn until(&self, seen: &Observed) -> Option<Time> {
        let within = self.within?;
        Some(Time(whole_seconds(seen.now).0 + within))
    }

    /// What is kept of a seat that is told now.
    fn telling(&self, seen: &Observed, entry: &SeatEntry) -> Option<Told> {
        let pod = pod(seen, entry)?;
        Some(Told {
            pod_uid: pod.uid.clone(),
            after: request_of(seen, entry).cloned(),
            until: self.until(seen),
        })
    }

    /// What is written for the daemon.
    fn told(&self, id: &str, told: &Told) -> SeatRequest {
        let until = told.until.as_ref().map(|until| until.0.as_millisecond());
        SeatRequest {
            id: id.to_owned(),
            order: self.order.clone(),
            until_unix_ms: until.and_then(|until| u64::try_from(until).ok()),
        }
    }
}

/// Looks again once the time is over.
fn sooner_than(until: Option<&Time>, seen: &Observed, decision: &mut Decision) {
    if let Some(until) = until {
        let left = until.0.duration_since(seen.now);
        sooner(&mut decision.recheck, Duration::try_from(left).unwrap_or_default());
    }
}

fn is_taken_back(pod: &PodSeen, id: &str) -> bool {
    let request = pod.request.as_ref();
    request.is_some_and(|request| request.id == id && request.order == Order::TakeBack)
}

/// Over exactly the pod that was observed: also one that is not told yet, for what a former leader sent may be on its way. What else is asked of
/// that pod now comes first, and takes its place.
fn take_back(entry: &SeatEntry, pod: &PodSeen, id: &str, decision: &mut Decision) {
    let is_asked = |action: &Action| matches!(action, Action::Request { seat, .. } if *seat == entry.name);
    if decision.actions.iter().any(is_asked) {
        return;
    }
    decision.actions.push(Action::Request {
        seat: entry.name.clone(),
        uid: pod.uid.clone(),
        request: SeatRequest {
            id: id.to_owned(),
            order: Order::TakeBack,
            until_unix_ms: None,
        },
    });
}

/// Id of the request that the seat's pod has.
fn request_of<'a>(seen: &'a Observed, entry: &SeatEntry) -> Option<&'a String> {
    Some(&pod(seen, entry)?.request.as_ref()?.id)
}

/// What a daemon says of a request that it was told.
fn answer(seen: &Observed, book: &[SeatEntry], id: &str) -> Option<DoneRequest> {
    let answers = book.iter().filter_map(|entry| pod(seen, entry)?.last_answer());
    answers.into_iter().find(|done| done.id == id).cloned()
}

#[cfg(test)]
#[path = "asked_tests.rs"]
mod tests;
