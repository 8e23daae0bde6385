//! What the API server refuses to make: a quota is used up, a policy forbids it, the spec names something that does not exist.
//!
//! Conditions say so, and pods and claims are asked for again later and later, whatever else happens meanwhile; at once if the spec changes.
//! Everything else about the VM goes on.

use std::time::{Duration, Instant};

use ftvm_crds::FaultTolerantVM;

use crate::api::ApiError;
use crate::observe::Refusal;
use crate::status::API_SERVER_REFUSES;

/// Longest part of a message that is the API server's own, in characters.
const WHY_LENGTH_MAX: usize = 500;

/// What came of the last look that was to make something. Nothing depends on it but when it is tried again.
#[derive(Debug, Clone, Default)]
pub enum Last {
    /// This process has not made anything for the VM yet: what its status says counts.
    #[default]
    Unknown,
    /// All of it was made.
    Made,
    /// The API server refused.
    Refused {
        /// What, where, why, what to do.
        message: String,
        /// Generation of the spec that was made from.
        generation: Option<i64>,
        /// How often in a row.
        times: u32,
        /// When to try again.
        until: Instant,
    },
}

impl Last {
    /// What this means for the VM as it is.
    pub fn seen(&self, vm: &FaultTolerantVM, now: Instant) -> Option<Refusal> {
        match self {
            Last::Unknown => told(vm).map(|message| Refusal {
                message,
                wait: Duration::ZERO,
            }),
            Last::Made => None,
            Last::Refused {
                message,
                generation,
                until,
                ..
            } => {
                let same = *generation == vm.metadata.generation;
                let wait = until.saturating_duration_since(now);
                Some(Refusal {
                    message: message.clone(),
                    wait: if same { wait } else { Duration::ZERO },
                })
            }
        }
    }

    /// How often in a row it was refused.
    pub fn times(&self) -> u32 {
        match self {
            Last::Unknown | Last::Made => 0,
            Last::Refused { times, .. } => *times,
        }
    }
}

/// The refusal that the VM's status tells of.
fn told(vm: &FaultTolerantVM) -> Option<String> {
    let conditions = vm.status.iter().flat_map(|status| &status.conditions);
    let told = conditions.into_iter().find(|told| told.reason == API_SERVER_REFUSES);
    told.map(|told| told.message.clone())
}

/// What, where, why, what to do; none if it is no refusal.
pub fn message(error: &ApiError, namespace: &str) -> Option<String> {
    let status = error.refusal()?;
    let ApiError::Request { kind, name, .. } = error else {
        return None;
    };
    let why: String = status.message.chars().take(WHY_LENGTH_MAX).collect();
    let advice = advice(&status.message);
    Some(format!(
        "the API server refuses {kind} {name} in namespace {namespace} ({why}): {advice}; it is tried again by itself, after 5 minutes at most"
    ))
}

/// What to do about it, by what the API server and its admission plugins say.
fn advice(why: &str) -> &'static str {
    let known = [
        (
            "PriorityClass",
            "create that PriorityClass, or correct spec.placement.priorityClassName",
        ),
        (
            "must specify",
            "a ResourceQuota of the namespace wants what is missing: set it in spec.resources, or give the namespace a LimitRange with defaults",
        ),
        (
            "exceeded quota",
            "raise that ResourceQuota, delete what uses it, or ask for less in spec.machine, spec.disks and spec.resources",
        ),
        (
            " usage per ",
            "change the namespace's LimitRange, or spec.machine, spec.disks and spec.resources",
        ),
        (
            "violates PodSecurity",
            "change the namespace's label pod-security.kubernetes.io/enforce, or make the VM in another namespace",
        ),
        (
            "ValidatingAdmissionPolicy",
            "do what that policy asks for, or change the policy",
        ),
        ("webhook", "mend that webhook, or do what it asks for"),
        (
            "being terminated",
            "the namespace is being deleted: make the VM in another one",
        ),
    ];
    let found = known.into_iter().find(|(words, _)| why.contains(words));
    found.map_or(
        "correct what it names in the VM's spec, or change the namespace's quotas, limits and policies",
        |(_, advice)| advice,
    )
}

#[cfg(test)]
mod tests {
    use ftvm_crds::FaultTolerantVMStatus;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    use k8s_openapi::jiff::Timestamp;
    use kube::core::Status;

    use super::*;
    use crate::decide::rig;

    fn answered(code: u16, reason: &str, message: &str) -> ApiError {
        let status = Status {
            code,
            reason: reason.to_owned(),
            message: message.to_owned(),
            ..Status::default()
        };
        ApiError::Request {
            verb: "create",
            kind: "Pod".to_owned(),
            name: "web-x7k2q".to_owned(),
            source: Box::new(kube::Error::Api(Box::new(status))),
        }
    }

    #[test]
    fn each_refusal_says_what_to_do() {
        // As API servers say it.
        for (why, words) in [
            (
                "pods \"web-x7k2q\" is forbidden: no PriorityClass with name none was found",
                "create that PriorityClass",
            ),
            (
                "pods \"web-x7k2q\" is forbidden: exceeded quota: small, requested: pods=1, used: pods=4, limited: pods=4",
                "raise that ResourceQuota",
            ),
            (
                "pods \"web-x7k2q\" is forbidden: failed quota: cpus: must specify limits.cpu for: seat",
                "set it in spec.resources",
            ),
            (
                "persistentvolumeclaims \"web-x7k2q-root\" is forbidden: maximum storage usage per PersistentVolumeClaim is 1Gi, but request is 2Gi",
                "LimitRange",
            ),
            (
                "pods \"web-x7k2q\" is forbidden: violates PodSecurity \"restricted:latest\": hostPath volumes",
                "pod-security.kubernetes.io/enforce",
            ),
            (
                "pods \"web-x7k2q\" is forbidden: ValidatingAdmissionPolicy 'teams' with binding 'teams' denied request: name a team",
                "that policy asks for",
            ),
            (
                "admission webhook \"teams.example\" denied the request: name a team",
                "that webhook",
            ),
            (
                "pods \"web-x7k2q\" is forbidden: unable to create new content in namespace shop because it is being terminated",
                "make the VM in another one",
            ),
            (
                "pods \"web-x7k2q\" is forbidden: I say so",
                "quotas, limits and policies",
            ),
        ] {
            let message = message(&answered(403, "Forbidden", why), "shop").unwrap();
            let what = "the API server refuses Pod web-x7k2q in namespace shop";
            assert!(message.starts_with(what) && message.contains(why), "{message}");
            assert!(message.contains(words) && message.contains("tried again"), "{message}");
        }
    }

    #[test]
    fn long_answers_leave_room_for_the_advice() {
        let why = format!("no PriorityClass {}", "x".repeat(5000));
        let message = message(&answered(403, "Forbidden", &why), "shop").unwrap();
        assert!(message.chars().count() < 1000 && message.contains("correct spec.placement.priorityClassName"));
    }

    #[test]
    fn what_may_be_otherwise_in_a_moment_is_no_refusal() {
        for (code, reason, text) in [
            (401, "Unauthorized", "Unauthorized"),
            (409, "AlreadyExists", "there is one"),
            (
                409,
                "Conflict",
                "Operation cannot be fulfilled on resourcequotas \"small\"",
            ),
            (429, "TooManyRequests", "later"),
            (500, "InternalError", "etcdserver: request timed out"),
            (503, "ServiceUnavailable", "later"),
        ] {
            assert_eq!(message(&answered(code, reason, text), "shop"), None, "{code} {reason}");
        }
        assert_eq!(message(&ApiError::Unread("web".to_owned()), "shop"), None);
        let webhook = "Internal error occurred: failed calling webhook \"teams.example\": no endpoints available";
        for (code, text) in [
            (400, "bad"),
            (403, "forbidden"),
            (404, "no such namespace"),
            (422, "invalid"),
            (500, webhook),
        ] {
            assert!(message(&answered(code, "", text), "shop").is_some(), "{code}");
        }
    }

    #[test]
    fn it_waits_unless_the_spec_changes() {
        let mut vm = rig::vm();
        let now = Instant::now();
        let last = Last::Refused {
            message: "no".to_owned(),
            generation: vm.metadata.generation,
            times: 3,
            until: now + Duration::from_secs(4),
        };
        let wait = |vm: &FaultTolerantVM, later: u64| last.seen(vm, now + Duration::from_secs(later)).unwrap().wait;
        assert_eq!(
            (wait(&vm, 0), wait(&vm, 1)),
            (Duration::from_secs(4), Duration::from_secs(3))
        );
        assert_eq!((wait(&vm, 4), wait(&vm, 9)), (Duration::ZERO, Duration::ZERO));
        vm.metadata.generation = Some(2);
        assert_eq!(wait(&vm, 0), Duration::ZERO);
        assert_eq!((last.times(), Last::Made.times(), Last::Unknown.times()), (3, 0, 0));
    }

    /// A new leader does not take back what the former one said before it has tried.
    #[test]
    fn a_process_that_knows_nothing_goes_by_the_status() {
        let mut vm = rig::vm();
        assert_eq!(Last::Unknown.seen(&vm, Instant::now()), None);
        let condition = |reason: &str| Condition {
            type_: "Protected".to_owned(),
            status: "False".to_owned(),
            reason: reason.to_owned(),
            message: format!("{reason} and why"),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: None,
        };
        vm.status = Some(FaultTolerantVMStatus {
            conditions: vec![condition("Starting"), condition(API_SERVER_REFUSES)],
            ..FaultTolerantVMStatus::default()
        });
        let seen = Last::Unknown.seen(&vm, Instant::now()).unwrap();
        assert_eq!(seen.message, format!("{API_SERVER_REFUSES} and why"));
        assert_eq!(seen.wait, Duration::ZERO);
        assert_eq!(Last::Made.seen(&vm, Instant::now()), None);
    }
}
