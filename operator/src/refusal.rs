//! What can't be made until a person does something, mostly because the API server refuses it: a quota is used up, a policy forbids it, the
//! spec names something that does not exist. Or the authority is gone that signs for the seats.
//!
//! Conditions say so, and pods and claims are asked for again later and later, up to a bound; at once if the spec changes, or the book: a
//! pod that is gone has to be made anew, whatever was refused before. Everything else about the VM goes on.

use std::time::{Duration, Instant};

use ftvm_crds::FaultTolerantVM;

use crate::api::ApiError;
use crate::observe::Refusal;
use crate::status::{API_SERVER_REFUSES, AUTHORITY_UNUSABLE};

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
    Refused(Refused),
}

/// A refusal.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// In one word.
    pub reason: &'static str,
    /// What, where, why, what to do.
    pub message: String,
    /// Generation of the spec that was made from.
    pub generation: Option<i64>,
    /// The book that was made from.
    pub book: Seats,
    /// How often in a row, for this spec and book.
    pub times: u32,
    /// When to try again.
    pub until: Instant,
}

/// The seats of a book and the UIDs of their pods, in order.
type Seats = Vec<(String, Option<String>)>;

impl Last {
    /// What this means for the VM as it is.
    pub fn seen(&self, vm: &FaultTolerantVM, now: Instant) -> Option<Refusal> {
        match self {
            Last::Unknown => told(vm),
            Last::Made => None,
            Last::Refused(refused) => Some(refused.seen(vm, now)),
        }
    }

    /// A refusal that was of the VM as it is.
    pub fn of(&self, vm: &FaultTolerantVM) -> Option<&Refused> {
        match self {
            Last::Unknown | Last::Made => None,
            Last::Refused(refused) => Some(refused).filter(|refused| refused.is_of(vm)),
        }
    }
}

impl Refused {
    /// What is gone by once more is refused to a VM, after a `former` refusal of the same: attempts before its time were of what does not wait,
    /// and say nothing of what does.
    pub fn next(
        former: Option<&Refused>,
        vm: &FaultTolerantVM,
        (reason, message): (&'static str, String),
        now: Instant,
        wait: impl FnOnce(u32) -> Duration,
    ) -> Refused {
        if let Some(former) = former.filter(|former| now < former.until) {
            return former.clone();
        }
        let times = former.map_or(0, |former| former.times).saturating_add(1);
        Refused {
            reason,
            message,
            generation: vm.metadata.generation,
            book: seats(vm),
            times,
            until: now + wait(times),
        }
    }

    /// What this means for the VM as it is.
    pub fn seen(&self, vm: &FaultTolerantVM, now: Instant) -> Refusal {
        let wait = self.until.saturating_duration_since(now);
        Refusal {
            reason: self.reason,
            message: self.message.clone(),
            wait: if self.is_of(vm) { wait } else { Duration::ZERO },
        }
    }

    fn is_of(&self, vm: &FaultTolerantVM) -> bool {
        self.generation == vm.metadata.generation && self.book == seats(vm)
    }
}

fn seats(vm: &FaultTolerantVM) -> Seats {
    let seats = vm.status.iter().flat_map(|status| &status.seats);
    seats.map(|entry| (entry.name.clone(), entry.pod_uid.clone())).collect()
}

/// The refusal that the VM's status tells of.
fn told(vm: &FaultTolerantVM) -> Option<Refusal> {
    let conditions = || vm.status.iter().flat_map(|status| &status.conditions);
    [API_SERVER_REFUSES, AUTHORITY_UNUSABLE].into_iter().find_map(|reason| {
        let told = conditions().find(|told| told.reason == reason)?;
        Some(Refusal {
            reason,
            message: told.message.clone(),
            wait: Duration::ZERO,
        })
    })
}

/// In one word.
pub fn reason(error: &ApiError) -> &'static str {
    match error.refusal() {
        Some(_) => API_SERVER_REFUSES,
        None => AUTHORITY_UNUSABLE,
    }
}

/// What, where, why, what to do; none if it needs no person.
pub fn message(error: &ApiError, namespace: &str) -> Option<String> {
    if error.needs_person() && error.refusal().is_none() {
        return Some(format!("{error}. It is tried again by itself, after 1 minute at most"));
    }
    let status = error.refusal()?;
    let ApiError::Request { kind, name, .. } = error else {
        return None;
    };
    let why: String = status.message.chars().take(WHY_LENGTH_MAX).collect();
    let advice = advice(&status.message);
    Some(format!(
        "the API server refuses {kind} {name} in namespace {namespace} ({why}): {advice}; it is tried again by itself, after 1 minute at most"
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
    use crate::decide::rig::{self, World};

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
    fn an_authority_that_is_gone_needs_a_person() {
        let error = ApiError::AuthorityGone {
            name: "web-authority".to_owned(),
            trusts: "pod web-x7k2q".to_owned(),
        };
        assert_eq!(reason(&error), AUTHORITY_UNUSABLE);
        let message = message(&error, "shop").unwrap();
        for words in ["Secret web-authority is gone", "pod web-x7k2q", "tried again"] {
            assert!(message.contains(words), "{message}");
        }
        assert_eq!(reason(&answered(403, "Forbidden", "no")), API_SERVER_REFUSES);
    }

    /// What is told of a refusal so many seconds after `now`; the n-th in a row waits n seconds.
    fn refused(former: Option<&Refused>, vm: &FaultTolerantVM, now: Instant, later: u64) -> Refused {
        let wait = |times: u32| Duration::from_secs(u64::from(times));
        Refused::next(
            former,
            vm,
            (API_SERVER_REFUSES, format!("no {later}")),
            now + Duration::from_secs(later),
            wait,
        )
    }

    #[test]
    fn it_waits_unless_the_spec_changes() {
        let mut vm = rig::vm();
        let now = Instant::now();
        let last = Last::Refused(Refused {
            until: now + Duration::from_secs(4),
            ..refused(None, &vm, now, 0)
        });
        let wait = |vm: &FaultTolerantVM, later: u64| last.seen(vm, now + Duration::from_secs(later)).unwrap().wait;
        assert_eq!(
            (wait(&vm, 0), wait(&vm, 1)),
            (Duration::from_secs(4), Duration::from_secs(3))
        );
        assert_eq!((wait(&vm, 4), wait(&vm, 9)), (Duration::ZERO, Duration::ZERO));
        vm.metadata.generation = Some(2);
        assert_eq!(wait(&vm, 0), Duration::ZERO);
        assert_eq!(last.of(&vm), None, "counted anew");
    }

    /// A standby's pod is refused for long, and then the active's pod is gone: it must not wait for that.
    #[test]
    fn another_book_does_not_wait() {
        let mut world = World::new(3);
        assert!(world.settle(60) && world.is_protected());
        let now = Instant::now();
        let last = Last::Refused(refused(None, &world.vm, now, 0));
        let wait = |vm: &FaultTolerantVM| last.seen(vm, now).unwrap().wait;
        assert_eq!(wait(&world.vm), Duration::from_secs(1));
        assert!(last.of(&world.vm).is_some());
        let active = world.book()[0].name.clone();
        world.pods.remove(&active);
        assert!(world.step());
        assert_eq!(world.entry(&active).unwrap().pod_uid, None);
        assert_eq!(wait(&world.vm), Duration::ZERO);
        assert_eq!(last.of(&world.vm), None, "counted anew");
    }

    /// Looks have many causes, and what does not wait is asked for in each of them.
    #[test]
    fn what_is_refused_before_its_time_is_not_counted() {
        let vm = rig::vm();
        let now = Instant::now();
        let first = refused(None, &vm, now, 0);
        assert_eq!((first.times, first.until), (1, now + Duration::from_secs(1)));
        assert_eq!(refused(Some(&first), &vm, now, 0), first);
        let second = refused(Some(&first), &vm, now, 1);
        assert_eq!((second.times, second.until), (2, now + Duration::from_secs(3)));
        assert_eq!(second.message, "no 1");
        assert_eq!(refused(Some(&second), &vm, now, 2), second);
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
        assert_eq!((seen.reason, seen.wait), (API_SERVER_REFUSES, Duration::ZERO));
        vm.status.as_mut().unwrap().conditions[1] = condition(AUTHORITY_UNUSABLE);
        let seen = Last::Unknown.seen(&vm, Instant::now()).unwrap();
        assert_eq!(seen.reason, AUTHORITY_UNUSABLE);
        assert_eq!(Last::Made.seen(&vm, Instant::now()), None);
    }
}
