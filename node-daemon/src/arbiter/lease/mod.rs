//! The arbiter as a Lease of the API server (docs/kubernetes.md, "Lease").
//!
//! A swap is one PUT of the object as it was read, with another record in it, the `metadata.uid` and the `resourceVersion` of
//! that read. What its answer means is decided here, and only here (rule 2):
//!
//! ```text
//!   nothing was sent ─────────────────────────────► NotSent
//!   401, 403, 404 from the API server itself ─────► NotSent    (refused before anything was written)
//!   409 Conflict from the API server itself, and a
//!   read shows another version and record ────────► Conflict   (it did not land, and never will)
//!   200 with our record, its uid, a new version ──► Won
//!   everything else: late, cut, 5xx, 429, strange ► Unknown    (it may have landed, or may still)
//! ```
//!
//! "From the API server itself" means that the body is a `Status` that says the same: what stands between may say anything. A 409
//! alone proves nothing: load balancers repeat what they take for idempotent, and the second PUT is refused because the first landed.
//!
//! Versions only grow. A read that is older than what was seen before it was asked comes from a cache, or from a server that lags
//! behind, and counts as none: it would pass for a changed record, over which no older PUT can land any more (rule 2).
//!
//! There may be several API servers, and the one that was asked last may just have died with the machine that is to be replaced.
//! `http` says what is asked of whom: a read of another one as well, soon; a PUT of one alone, the one that answered the read. One whose
//! answer is old is asked last from then on, and the read goes on with the others.

mod endpoints;
mod http;
mod servers;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_crds::lease::{check_owner, set_record, snapshot};
use ftvm_engine::checkpoint::Histogram;
use ftvm_protocol::core::{ReadOutcome, SwapOutcome};
use ftvm_protocol::identity::{ArbiterUid, VmId};
use ftvm_protocol::record::Record;
use hyper::StatusCode;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use k8s_openapi::jiff::Timestamp;
use tokio::runtime::Runtime;

pub use http::{HttpAnswer, RequestError, Server, ServerError};
pub use servers::follow_servers;

use self::endpoints::Teller;
use super::{Arbiter, Said};

/// A read takes no longer; whoever asked has usually given up before.
const READ_MAX: Duration = Duration::from_secs(10);

/// The API server and the runtime that talks to it: one for all arbiters of a daemon.
#[derive(Clone)]
pub struct Leases {
    server: Arc<Server>,
    runtime: Arc<Runtime>,
    counts: Arc<Mutex<Counts>>,
}

/// Requests since the start.
struct Counts {
    /// How often, by request and outcome.
    outcomes: BTreeMap<(&'static str, &'static str), u64>,
    /// How long they took, by request.
    took: BTreeMap<&'static str, Histogram>,
}

impl Counts {
    fn new() -> Counts {
        Counts {
            outcomes: OUTCOMES.into_iter().map(|outcome| (outcome, 0)).collect(),
            took: OUTCOMES.map(|(request, _)| (request, Histogram::default())).into(),
        }
    }
}

/// What requests can come to, for metrics.
const OUTCOMES: [(&str, &str); 7] = [
    ("read", "found"),
    ("read", "gone"),
    ("read", "unreachable"),
    ("swap", "won"),
    ("swap", "conflict"),
    ("swap", "not_sent"),
    ("swap", "unknown"),
];

impl Leases {
    /// With a runtime of its own: nothing else of the daemon can hold up an arbiter request.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn new(server: Server) -> std::io::Result<Leases> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("lease")
            .enable_all()
            .build()?;
        Ok(Leases {
            server: Arc::new(server),
            runtime: Arc::new(runtime),
            counts: Arc::new(Mutex::new(Counts::new())),
        })
    }

    /// The API server.
    pub fn server(&self) -> Arc<Server> {
        self.server.clone()
    }

    fn counted(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, request: &'static str, outcome: &'static str, took: Duration) {
        let mut counts = self.counted();
        *counts.outcomes.entry((request, outcome)).or_default() += 1;
        counts.took.entry(request).or_default().add(took);
    }

    /// Request, outcome, how often, since the start.
    pub fn counts(&self) -> Vec<(&'static str, &'static str, u64)> {
        let counts = self.counted();
        let outcomes = counts.outcomes.iter();
        outcomes
            .map(|((request, outcome), count)| (*request, *outcome, *count))
            .collect()
    }

    /// Request, how long those of that kind took since the start, whatever came of them.
    pub fn took(&self) -> Vec<(&'static str, Histogram)> {
        let counts = self.counted();
        let took = counts.took.iter();
        took.map(|(request, took)| (*request, took.clone())).collect()
    }

    /// The arbiter of one virtual machine.
    pub fn arbiter(&self, namespace: &str, vm: &str, vm_id: VmId) -> LeaseArbiter {
        LeaseArbiter {
            leases: self.clone(),
            path: format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{vm}"),
            vm: vm.to_owned(),
            vm_id,
            last: Mutex::default(),
            newest: Mutex::default(),
        }
    }
}

/// The Lease of one virtual machine.
pub struct LeaseArbiter {
    leases: Leases,
    path: String,
    vm: String,
    vm_id: VmId,
    /// What was read or written last, as an API server gave it: the object that a swap changes.
    last: Mutex<Option<(Lease, Teller)>>,
    /// Newest version that the API server ever told.
    newest: Mutex<u64>,
}

/// What a read came to.
enum Read {
    /// By whom.
    Found(Box<Lease>, Teller),
    /// Something newer was seen before.
    Old,
    Gone,
    Unreachable,
}

impl LeaseArbiter {
    /// The Lease as it is now: without `resourceVersion` the API server reads its store, not its cache.
    fn get(&self, deadline: Instant) -> Said<Read> {
        // Each server may lag behind; the last one's old answer is the last word.
        let mut left = self.leases.server.addresses().len();
        loop {
            let newest = self.newest();
            let reading = self.leases.server.read(&self.path, deadline);
            let answer = match self.leases.runtime.block_on(reading) {
                Ok(answer) => answer,
                Err(error) => return (Read::Unreachable, Some(error.to_string())),
            };
            let (read, why) = self.judge(&answer, newest);
            if !matches!(read, Read::Old) {
                return (read, why);
            }
            self.leases.server.lags(&answer.teller);
            left = left.saturating_sub(1);
            if left == 0 || Instant::now() >= deadline {
                return (Read::Unreachable, why);
            }
        }
    }

    /// What an answer to a read is, if this version was seen before it was asked for.
    fn judge(&self, answer: &HttpAnswer, newest: u64) -> Said<Read> {
        let said = self.describe(answer);
        match answer.status {
            StatusCode::OK => match serde_json::from_slice::<Lease>(&answer.body) {
                Ok(lease) if version(&lease) < newest => {
                    let why = format!(
                        "Lease {}: the answer is an old one (version {}, where {newest} was seen): ask the API server itself, not a cache",
                        self.path,
                        version(&lease)
                    );
                    (Read::Old, Some(why))
                }
                Ok(lease) => {
                    self.saw(&lease);
                    (Read::Found(Box::new(lease), answer.teller.clone()), None)
                }
                Err(error) => (Read::Unreachable, Some(format!("Lease {}: {error}", self.path))),
            },
            StatusCode::NOT_FOUND if says(answer, "NotFound") => (Read::Gone, Some(said)),
            _ => (Read::Unreachable, Some(said)),
        }
    }

    fn describe(&self, answer: &HttpAnswer) -> String {
        let status = serde_json::from_slice::<Status>(&answer.body).ok();
        let message = status.and_then(|status| status.message).unwrap_or_default();
        let message: String = message.chars().take(300).collect();
        format!("Lease {}: the API server says {} {message}", self.path, answer.status)
    }

    fn newest(&self) -> u64 {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn saw(&self, lease: &Lease) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        *newest = version(lease).max(*newest);
    }

    fn keep(&self, lease: Lease, teller: Teller) {
        self.saw(&lease);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((lease, teller));
    }

    /// The object of this version and who told it, or what is true of a swap without it.
    fn base(
        &self,
        uid: ArbiterUid,
        version: u64,
        deadline: Instant,
    ) -> Result<(Lease, Teller), Box<Said<SwapOutcome>>> {
        let is_it = |lease: &Lease| snapshot(lease).is_ok_and(|found| (found.uid, found.version) == (uid, version));
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(base) = last.filter(|(lease, _)| is_it(lease)) {
            return Ok(base);
        }
        match self.get(deadline) {
            (Read::Found(lease, teller), _) => {
                if let Err(error) = check_owner(&lease, &self.vm, self.vm_id) {
                    return Err(Box::new((SwapOutcome::NotSent, Some(error.to_string()))));
                }
                if is_it(&lease) {
                    return Ok((*lease, teller));
                }
                // A version that is not the newest never is again.
                let why = format!("Lease {} has another version than {version} by now", self.path);
                Err(Box::new((SwapOutcome::Conflict, Some(why))))
            }
            (Read::Gone | Read::Old | Read::Unreachable, why) => Err(Box::new((SwapOutcome::NotSent, why))),
        }
    }
}

impl Arbiter for LeaseArbiter {
    fn read(&self) -> Said<ReadOutcome> {
        let begun = Instant::now();
        let said = self.try_read();
        let outcome = match &said.0 {
            ReadOutcome::Found(_) => "found",
            ReadOutcome::Gone => "gone",
            ReadOutcome::Unreachable => "unreachable",
        };
        self.leases.count("read", outcome, begun.elapsed());
        said
    }

    fn swap(&self, uid: ArbiterUid, version: u64, record: &Record, deadline: Instant) -> Said<SwapOutcome> {
        let begun = Instant::now();
        let said = self.try_swap(uid, version, record, deadline);
        let outcome = match &said.0 {
            SwapOutcome::Won(_) => "won",
            SwapOutcome::Conflict => "conflict",
            SwapOutcome::NotSent => "not_sent",
            SwapOutcome::Unknown => "unknown",
        };
        self.leases.count("swap", outcome, begun.elapsed());
        said
    }
}

impl LeaseArbiter {
    fn try_read(&self) -> Said<ReadOutcome> {
        let (read, why) = self.get(Instant::now() + READ_MAX);
        let (lease, teller) = match read {
            Read::Found(lease, teller) => (*lease, teller),
            Read::Gone => return (ReadOutcome::Gone, why),
            Read::Old | Read::Unreachable => return (ReadOutcome::Unreachable, why),
        };
        let found = check_owner(&lease, &self.vm, self.vm_id).and_then(|()| snapshot(&lease));
        match found {
            Ok(found) => {
                self.keep(lease, teller);
                (ReadOutcome::Found(found), None)
            }
            Err(error) => (ReadOutcome::Unreachable, Some(error.to_string())),
        }
    }

    fn try_swap(&self, uid: ArbiterUid, version: u64, record: &Record, deadline: Instant) -> Said<SwapOutcome> {
        let (mut lease, teller) = match self.base(uid, version, deadline) {
            Ok(base) => base,
            Err(said) => return *said,
        };
        if snapshot(&lease).is_ok_and(|current| record.term <= current.record.term) {
            let why = format!("term {} does not follow the record's", record.term);
            return (SwapOutcome::NotSent, Some(why));
        }
        set_record(&mut lease, record, Timestamp::now());
        // The server's own notes on who set which field are not a part of what is written.
        lease.metadata.managed_fields = None;
        let body = match serde_json::to_vec(&lease) {
            Ok(body) => body,
            Err(error) => return (SwapOutcome::NotSent, Some(error.to_string())),
        };
        let server = &self.leases.server;
        let writing = server.write(&self.path, body, &teller, deadline);
        match self.leases.runtime.block_on(writing) {
            Err(error @ RequestError::NotSent { .. }) => (SwapOutcome::NotSent, Some(error.to_string())),
            Err(error @ RequestError::Unanswered { .. }) => (SwapOutcome::Unknown, Some(error.to_string())),
            Ok(answer) if answer.status == StatusCode::CONFLICT && says(&answer, "Conflict") => {
                self.refused(&answer, uid, version, record, deadline)
            }
            Ok(answer) => self.swapped(&answer, uid, version, record),
        }
    }

    /// What is there now tells a refusal from a repetition.
    fn refused(
        &self,
        answer: &HttpAnswer,
        uid: ArbiterUid,
        version: u64,
        record: &Record,
        deadline: Instant,
    ) -> Said<SwapOutcome> {
        let said = self.describe(answer);
        let doubt = |why: &str| (SwapOutcome::Unknown, Some(format!("{said}; {why}")));
        match self.get(deadline) {
            (Read::Found(lease, _), _) => match snapshot(&lease) {
                Ok(found) if found.record == *record => {
                    doubt("yet what it refused is there: something between repeated it")
                }
                Ok(found) if (found.uid, found.version) == (uid, version) => doubt("yet nothing has changed"),
                Ok(_) => (SwapOutcome::Conflict, Some(said)),
                Err(error) => doubt(&error.to_string()),
            },
            // It names the UID: it can't land in another object.
            (Read::Gone, _) => (SwapOutcome::Conflict, Some(said)),
            (Read::Old | Read::Unreachable, why) => doubt(&why.unwrap_or_default()),
        }
    }

    fn swapped(&self, answer: &HttpAnswer, uid: ArbiterUid, version: u64, record: &Record) -> Said<SwapOutcome> {
        let said = Some(self.describe(answer));
        match answer.status {
            StatusCode::OK => {
                let lease = serde_json::from_slice::<Lease>(&answer.body).ok();
                let found = lease.and_then(|lease| Some((snapshot(&lease).ok()?, lease)));
                match found {
                    Some((found, lease)) if found.record == *record && found.uid == uid && found.version != version => {
                        self.keep(lease, answer.teller.clone());
                        (SwapOutcome::Won(found), None)
                    }
                    _ => {
                        let why = format!("Lease {}: the answer to a swap shows another record", self.path);
                        (SwapOutcome::Unknown, Some(why))
                    }
                }
            }
            StatusCode::UNAUTHORIZED if says(answer, "Unauthorized") => (SwapOutcome::NotSent, said),
            StatusCode::FORBIDDEN if says(answer, "Forbidden") => (SwapOutcome::NotSent, said),
            StatusCode::NOT_FOUND if says(answer, "NotFound") => (SwapOutcome::NotSent, said),
            _ => (SwapOutcome::Unknown, said),
        }
    }
}

/// Zero for an object without one, which the API server does not give.
fn version(lease: &Lease) -> u64 {
    let version = lease.metadata.resource_version.as_deref();
    version.and_then(|version| version.parse().ok()).unwrap_or_default()
}

/// Whether the body is the API server's own, and says the same as the status line.
fn says(answer: &HttpAnswer, reason: &str) -> bool {
    let status = serde_json::from_slice::<Status>(&answer.body);
    status.is_ok_and(|status| {
        status.reason.as_deref() == Some(reason) && status.code == Some(i32::from(answer.status.as_u16()))
    })
}

#[cfg(test)]
mod endpoint_tests;
#[cfg(test)]
mod tests;
