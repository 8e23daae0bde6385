//! Which replica leads: the one that holds a Lease and renews it in time.
//!
//! ```text
//!   candidate ── free, or not written for `lease` ── PUT won ──► leader ── PUT won, every `renew` ─┐
//!       ▲                                                         │   ▲───────────────────────────┘
//!       └──── another holds it, or `lead_max` since the last PUT that was won was sent ◄──┘
//! ```
//!
//! A leader that is told to end drops all that it was doing and then frees the Lease: the next one waits for nothing.
//!
//! Invariant: at most one replica leads at a time, as long as the Lease is not deleted and clocks run equally fast (no clock is compared
//! with another one). A leader leads until `lead_max` after it *sent* what it won last. Another one takes the Lease only over a version
//! that it read `lease` ago, which was sent before that, and `lease` is longer. Every PUT names the version that it is over: one that
//! arrives late is refused.
//!
//! What a leader sent shortly before it ended may still arrive when another one leads, as with any lock, and soonest after it freed the
//! Lease. So nothing depends on this alone: the book of a VM, requests to its seats and the nodes of its Lease are written over the version
//! that was read, deletions name it, and everything is entered in the book before it is made. What is left (a creation of what the book has,
//! the application of what a VM has once) says the same whoever sent it, or is applied anew.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::random;

/// The Lease.
const NAME: &str = "ftvm-operator";

/// How long what takes.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Another replica may lead if the Lease was not written for so long.
    pub lease: Duration,
    /// A leader renews so often.
    pub renew: Duration,
    /// It leads so long after it sent what it won last. Shorter than `lease` by what a request may be under way and clocks may differ.
    pub lead_max: Duration,
    /// Between two attempts of a leader after the first came to nothing.
    pub again: Duration,
    /// A candidate looks so often, and when the time is over.
    pub look: Duration,
    /// An answer to a leader that takes longer is none.
    pub answer_max: Duration,
    /// An answer to a candidate that takes longer is none: it has time, and a slow API server is to have a leader, too.
    pub candidate_answer_max: Duration,
}

/// Of the operator. A leader can try twice before its time is over, even if the API server does not answer at all.
pub const TIMES: Times = Times {
    lease: Duration::from_secs(8),
    renew: Duration::from_secs(2),
    lead_max: Duration::from_secs(6),
    again: Duration::from_millis(300),
    look: Duration::from_secs(2),
    answer_max: Duration::from_millis(1500),
    candidate_answer_max: Duration::from_secs(4),
};

/// A foreign Lease's duration counts up to this: a wrong one must not keep everybody from leading.
const FOREIGN_MAX: Duration = Duration::from_secs(60);
/// A leader that ends waits no longer until its Lease is free.
const RELEASE_MAX: Duration = Duration::from_secs(1);

/// Why an attempt came to nothing.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Request(#[from] kube::Error),
    #[error("no answer in time")]
    Late(#[from] tokio::time::error::Elapsed),
    #[error("the Lease is gone")]
    Gone,
    #[error("the API server's answer names another holder")]
    Other,
}

/// The Lease as this replica wrote it.
struct Held {
    lease: Lease,
    sent: Instant,
}

/// What a candidate found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// It leads.
    Won,
    /// Another one was faster.
    Beaten,
    /// Another one leads, for so long at least unless it writes.
    Held(Duration),
}

/// One replica's part in it.
pub struct Election {
    api: Api<Lease>,
    replica: String,
    times: Times,
    /// The version that was read last, and since when there is none newer.
    seen: Option<(Option<String>, Instant)>,
    held: Option<Held>,
}

impl Election {
    /// Among the replicas whose Lease is in this namespace. What follows `pod` in the Lease is of this process alone: another one of that
    /// name, such as the pod's former container, is another replica.
    pub fn new(client: Client, namespace: &str, pod: &str, times: Times) -> Election {
        Election {
            api: Api::namespaced(client, namespace),
            replica: format!("{pod}_{:016x}", random::u64()),
            times,
            seen: None,
            held: None,
        }
    }

    /// Waits until this replica leads. Goes on whatever the API server says.
    pub async fn won(&mut self) {
        let (mut said, mut failures) = (false, 0);
        loop {
            let wait = match self.candidate().await {
                Ok(Look::Won) => return,
                Ok(Look::Held(left)) => {
                    (said, failures) = (false, 0);
                    left.clamp(self.times.again, self.times.look)
                }
                Ok(Look::Beaten) => self.backoff(&mut failures),
                Err(error) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(replica = %self.replica, %error, "the election's Lease could not be had; it is tried again");
                    }
                    self.backoff(&mut failures)
                }
            };
            // Not all at the same time.
            let percent = u32::try_from(random::u64() % 100).unwrap_or_default();
            sleep(wait + self.times.again * percent / 100).await;
        }
    }

    /// Longer and longer, up to a look's time.
    fn backoff(&self, failures: &mut u32) -> Duration {
        let wait = self.times.again.saturating_mul(1 << (*failures).min(10));
        *failures = failures.saturating_add(1);
        wait.min(self.times.look)
    }

    /// Renews, and returns as soon as this replica leads no longer. To be waited for before anything that a leader does.
    pub async fn lost(&mut self) {
        while let Some(held) = &self.held {
            let sent = held.sent;
            let renewed = timeout_at(sent + self.times.lead_max, async {
                // From when it was sent: the answer may have taken long.
                sleep_until(sent + self.times.renew).await;
                self.renewed().await
            });
            if !renewed.await.unwrap_or(false) {
                self.held = None;
            }
        }
    }

    /// Leads no longer, and says so, so that the next one waits for nothing. To be called when nothing of what the leader did goes on. Over
    /// the version that it wrote last: where another one leads already, this changes nothing.
    pub async fn release(&mut self) {
        let Some(Held { mut lease, .. }) = self.held.take() else {
            return;
        };
        lease.spec.get_or_insert_with(LeaseSpec::default).holder_identity = None;
        lease.metadata.managed_fields = None;
        let params = PostParams::default();
        match timeout(RELEASE_MAX, self.api.replace(NAME, &params, &lease)).await {
            Ok(Ok(_)) => tracing::info!(replica = %self.replica, "the election's Lease is free"),
            Ok(Err(error)) => tracing::info!(replica = %self.replica, %error, "the election's Lease ends by itself"),
            Err(_) => tracing::info!(replica = %self.replica, "the election's Lease ends by itself: no answer in time"),
        }
    }

    /// One look.
    async fn candidate(&mut self) -> Result<Look, Failed> {
        let patience = self.times.candidate_answer_max;
        let Some(lease) = timeout(patience, self.api.get_opt(NAME)).await?? else {
            return self.make().await;
        };
        let version = lease.resource_version();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => Instant::now(),
        };
        self.seen = Some((version, since));
        let holder = holder(&lease);
        let left = self.lasts(&lease).saturating_sub(since.elapsed());
        // Its own, although it does not lead: it could not renew, and waits like all others, so that one of them may have the Lease that can.
        if left.is_zero() || holder.is_empty() {
            return match self.write(lease, patience).await {
                Err(Failed::Request(error)) if is_conflict(&error) => Ok(Look::Beaten),
                written => written.map(|()| Look::Won),
            };
        }
        Ok(Look::Held(left))
    }

    /// How long the Lease is its holder's after it was written. A replica of another release may have longer times.
    fn lasts(&self, lease: &Lease) -> Duration {
        let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
        let its = Duration::from_secs(seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(0));
        self.times.lease.max(its.min(FOREIGN_MAX))
    }

    /// There is no Lease yet.
    async fn make(&mut self) -> Result<Look, Failed> {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                ..ObjectMeta::default()
            },
            spec: None,
        };
        let (sent, lease) = (Instant::now(), self.next(lease));
        let params = PostParams::default();
        match timeout(self.times.candidate_answer_max, self.api.create(&params, &lease)).await? {
            Err(error) if is_conflict(&error) => Ok(Look::Beaten),
            made => self.hold(sent, made?).map(|()| Look::Won),
        }
    }

    /// Tries until it worked, or another one holds the Lease.
    async fn renewed(&mut self) -> bool {
        loop {
            let Some(held) = &self.held else { return false };
            let failed = match self.write(held.lease.clone(), self.times.answer_max).await {
                Ok(()) => return true,
                Err(failed) => failed,
            };
            tracing::warn!(replica = %self.replica, error = %failed, "the election's Lease was not renewed");
            // Without an answer the known version is tried again: reading it first would take the time that is left.
            if is_known_to_be_old(&failed) {
                match self.read_own().await {
                    // What was not answered may have been done: the next one goes over that.
                    Ok(Some(lease)) => {
                        if let Some(held) = &mut self.held {
                            held.lease = lease;
                        }
                    }
                    Ok(None) | Err(Failed::Gone) => return false,
                    Err(_) => {}
                }
            }
            sleep(self.times.again).await;
        }
    }

    /// The Lease, if it is still this replica's.
    async fn read_own(&self) -> Result<Option<Lease>, Failed> {
        let lease = timeout(self.times.answer_max, self.api.get_opt(NAME)).await??;
        let lease = lease.ok_or(Failed::Gone)?;
        Ok((holder(&lease) == self.replica).then_some(lease))
    }

    /// Writes over exactly what was read.
    async fn write(&mut self, over: Lease, patience: Duration) -> Result<(), Failed> {
        let (sent, lease) = (Instant::now(), self.next(over));
        let params = PostParams::default();
        let written = timeout(patience, self.api.replace(NAME, &params, &lease)).await??;
        self.hold(sent, written)
    }

    fn hold(&mut self, sent: Instant, lease: Lease) -> Result<(), Failed> {
        if holder(&lease) != self.replica {
            return Err(Failed::Other);
        }
        self.held = Some(Held { lease, sent });
        Ok(())
    }

    /// As this replica would have it. Times in it are for people.
    fn next(&self, mut lease: Lease) -> Lease {
        let now = Some(MicroTime(Timestamp::now()));
        let others = holder(&lease) != self.replica;
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if others {
            spec.acquire_time.clone_from(&now);
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        spec.holder_identity = Some(self.replica.clone());
        spec.renew_time = now;
        spec.lease_duration_seconds = i32::try_from(self.times.lease.as_secs()).ok();
        lease.metadata.managed_fields = None;
        lease
    }
}

fn holder(lease: &Lease) -> &str {
    let spec = lease.spec.as_ref();
    spec.and_then(|spec| spec.holder_identity.as_deref())
        .unwrap_or_default()
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

/// The API server says that the Lease is not the one that was written over: another version, or none.
fn is_known_to_be_old(failed: &Failed) -> bool {
    match failed {
        Failed::Request(kube::Error::Api(status)) => matches!(status.code, 404 | 409),
        Failed::Other => true,
        Failed::Request(_) | Failed::Late(_) | Failed::Gone => false,
    }
}

#[cfg(test)]
#[path = "election_tests.rs"]
mod tests;
