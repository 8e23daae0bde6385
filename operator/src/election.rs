//! Which replica leads: the one that holds a Lease and renews it in time.
//!
//! ```text
//!   candidate ── free, or not written for `lease` ── PUT won ──► leader ── PUT won, every `renew` ─┐
//!       ▲                                                         │   ▲───────────────────────────┘
//!       └──── another holds it, or `lead_max` since the last PUT that was won was sent ◄──┘
//! ```
//!
//! Invariant: at most one replica leads at a time, as long as the Lease is not deleted and clocks run equally fast (no clock is compared
//! with another one). A leader leads until `lead_max` after it *sent* what it won last. Another one takes the Lease only over a version
//! that it read `lease` ago, which was sent before that, and `lease` is longer. Every PUT names the version that it is over: one that
//! arrives late is refused.
//!
//! What a leader sent shortly before it ended may still arrive when another one leads, as with any lock. So nothing depends on this alone:
//! the book of a VM is written over the version that was read, and everything is entered there before it is made.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt};
use tokio::time::{Instant, sleep, timeout, timeout_at};

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
    /// An answer that takes longer is none.
    pub answer_max: Duration,
}

/// Of the operator. A leader can try twice before its time is over, even if the API server does not answer at all.
pub const TIMES: Times = Times {
    lease: Duration::from_secs(8),
    renew: Duration::from_secs(2),
    lead_max: Duration::from_secs(6),
    again: Duration::from_millis(300),
    look: Duration::from_secs(2),
    answer_max: Duration::from_millis(1500),
};

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
    until: Instant,
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
    /// Among the replicas whose Lease is in this namespace. Two replicas must not have the same name.
    pub fn new(client: Client, namespace: &str, replica: &str, times: Times) -> Election {
        Election {
            api: Api::namespaced(client, namespace),
            replica: replica.to_owned(),
            times,
            seen: None,
            held: None,
        }
    }

    /// Waits until this replica leads. Goes on whatever the API server says.
    pub async fn won(&mut self) {
        let mut said = false;
        loop {
            match self.candidate().await {
                Ok(true) => return,
                Ok(false) => said = false,
                Err(error) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(replica = %self.replica, %error, "the election's Lease could not be had; it is tried again");
                    }
                }
            }
            let waited = self.seen.as_ref().map_or(Duration::ZERO, |(_, since)| since.elapsed());
            let left = self.times.lease.saturating_sub(waited);
            // Not all at the same time.
            let percent = u32::try_from(random::u64() % 100).unwrap_or_default();
            sleep(left.clamp(self.times.again, self.times.look) + self.times.again * percent / 100).await;
        }
    }

    /// Renews, and returns as soon as this replica leads no longer. To be waited for before anything that a leader does.
    pub async fn lost(&mut self) {
        while let Some(held) = &self.held {
            let until = held.until;
            let renewed = timeout_at(until, async {
                sleep(self.times.renew).await;
                self.renewed().await
            });
            if !renewed.await.unwrap_or(false) {
                self.held = None;
            }
        }
    }

    /// One look. True: it leads.
    async fn candidate(&mut self) -> Result<bool, Failed> {
        let Some(lease) = timeout(self.times.answer_max, self.api.get_opt(NAME)).await?? else {
            return self.make().await;
        };
        let version = lease.resource_version();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => Instant::now(),
        };
        self.seen = Some((version, since));
        let holder = holder(&lease);
        let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
        // A replica of another release may have longer times.
        let its = Duration::from_secs(seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(0));
        let over = since.elapsed() >= self.times.lease.max(its);
        // Its own, although it does not lead: it was slow, or another process had its name and is dead.
        if over || holder.is_empty() || holder == self.replica {
            return match self.write(lease).await {
                Err(Failed::Request(error)) if is_conflict(&error) => Ok(false),
                written => written.map(|()| true),
            };
        }
        Ok(false)
    }

    /// There is no Lease yet.
    async fn make(&mut self) -> Result<bool, Failed> {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                ..ObjectMeta::default()
            },
            spec: None,
        };
        let (sent, lease) = (Instant::now(), self.next(lease));
        match timeout(self.times.answer_max, self.api.create(&PostParams::default(), &lease)).await? {
            Err(error) if is_conflict(&error) => Ok(false),
            made => self.hold(sent, made?).map(|()| true),
        }
    }

    /// Tries until it worked, or another one holds the Lease.
    async fn renewed(&mut self) -> bool {
        loop {
            let Some(held) = &self.held else { return false };
            let failed = match self.write(held.lease.clone()).await {
                Ok(()) => return true,
                Err(failed) => failed,
            };
            tracing::warn!(replica = %self.replica, error = %failed, "the election's Lease was not renewed");
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
    async fn write(&mut self, over: Lease) -> Result<(), Failed> {
        let (sent, lease) = (Instant::now(), self.next(over));
        let params = PostParams::default();
        let written = timeout(self.times.answer_max, self.api.replace(NAME, &params, &lease)).await??;
        self.hold(sent, written)
    }

    fn hold(&mut self, sent: Instant, lease: Lease) -> Result<(), Failed> {
        if holder(&lease) != self.replica {
            return Err(Failed::Other);
        }
        let until = sent + self.times.lead_max;
        self.held = Some(Held { lease, until });
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

#[cfg(test)]
#[path = "election_tests.rs"]
mod tests;
