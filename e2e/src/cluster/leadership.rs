//! Which replica of the operator led when, and whether another one wrote; what was made, and whether it was in the book. Judged by what
//! replicas sent, not by what they say.
use std::collections::{BTreeMap, BTreeSet};

use super::api_proxy::{PodWrite, version_of};

/// The election's Lease.
pub const ELECTION: &str = "ftvm-operator";
/// Seats of a VM.
const SEATS_MAX: usize = 2;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leadership {
    /// Who held the Lease, one after the other.
    pub leaders: Vec<String>,
    /// Writes of each replica that only a leader does.
    pub writes: BTreeMap<String, usize>,
    /// What must not be.
    pub complaints: Vec<String>,
}

/// Whether it is about the election's Lease, taken or not: what candidates may write. It is in the replicas' own namespace, as their user says.
fn is_election(write: &PodWrite) -> bool {
    let asked = &write.asked;
    let own = asked.asker.user.split(':').nth(2);
    let named = asked.name.as_deref().is_none_or(|name| name == ELECTION);
    asked.resource == "leases" && named && own.is_some() && asked.namespace.as_deref() == own
}

/// The pod of a replica, of which the Lease also says which process it is.
#[must_use]
pub fn pod_of(holder: &str) -> &str {
    holder.split_once('_').map_or(holder, |(pod, _)| pod)
}

/// Judges writes that replicas of the operator sent. A replica that sends one must hold the Lease then: from when the API server was given
/// the write with which another one took it, it does no more.
#[must_use]
pub fn judge(writes: &[PodWrite], is_operator: impl Fn(&str) -> bool) -> Leadership {
    let mut found = Leadership::default();
    let (mut elections, others): (Vec<_>, Vec<_>) = writes
        .iter()
        .filter(|write| is_operator(&write.asked.asker.user))
        .partition(|write| is_election(write));
    let made = |write: &PodWrite| write.made.as_ref().and_then(version_of);
    elections.retain(|write| made(write).is_some());
    elections.sort_by_key(|write| made(write));
    let holder = |write: &PodWrite| {
        let made = write.made.as_ref();
        let identity = made.and_then(|made| made["spec"]["holderIdentity"].as_str());
        pod_of(identity.unwrap_or_default()).to_owned()
    };
    found.leaders = elections.iter().map(|write| holder(write)).collect();
    // It was freed: nobody leads then.
    found.leaders.retain(|leader| !leader.is_empty());
    found.leaders.dedup();
    for write in others {
        let replica = write.asked.asker.pod.clone().unwrap_or_default();
        let before = elections
            .iter()
            .filter(|election| election.sent.is_some_and(|sent| sent < write.arrived));
        let leader = before
            .max_by_key(|election| made(election))
            .map(|election| holder(election));
        if leader.as_ref() != Some(&replica) {
            let asked = &write.asked;
            found.complaints.push(format!(
                "{replica} sent {} {} {:?} while {leader:?} led",
                asked.method, asked.resource, asked.name
            ));
        }
        *found.writes.entry(replica).or_default() += 1;
    }
    found
}

/// What a VM has must be in its book: never more than two seats there, nothing made for another one, one Lease at most.
#[must_use]
pub fn harm(writes: &[PodWrite], namespace: &str, vm: &str) -> Vec<String> {
    let mut taken: Vec<_> = writes
        .iter()
        .filter(|write| write.asked.namespace.as_deref() == Some(namespace))
        .filter_map(|write| Some((write.sent?, &write.asked, write.made.as_ref()?)))
        .collect();
    taken.sort_by_key(|(sent, ..)| *sent);
    let (mut book, mut newest, mut leases, mut harm) = (BTreeSet::new(), 0, 0, Vec::new());
    for (_, asked, made) in taken {
        let name = made["metadata"]["name"].as_str().unwrap_or_default();
        match (asked.resource.as_str(), asked.method.as_str()) {
            ("faulttolerantvms", _) if name == vm && version_of(made) > Some(newest) => {
                newest = version_of(made).unwrap_or(newest);
                let seats = made["status"]["seats"].as_array().into_iter().flatten();
                book = seats
                    .filter_map(|seat| seat["name"].as_str().map(str::to_owned))
                    .collect();
                if book.len() > SEATS_MAX {
                    harm.push(format!("the book has {book:?}"));
                }
            }
            ("pods" | "persistentvolumeclaims", "POST")
                if !book
                    .iter()
                    .any(|seat| name == seat || name.starts_with(&format!("{seat}-"))) =>
            {
                harm.push(format!(
                    "{} {name} was made while the book had {book:?}",
                    asked.resource
                ));
            }
            ("leases", "POST") if name == vm => leases += 1,
            _ => {}
        }
    }
    if leases > 1 {
        harm.push(format!("{leases} Leases were made"));
    }
    harm
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::{Value, json};

    use super::super::api_proxy::{Asked, Asker};
    use super::*;

    const OPERATOR: &str = "system:serviceaccount:system:ftvm-operator";

    struct Play {
        begin: Instant,
        writes: Vec<PodWrite>,
    }

    impl Play {
        fn new() -> Self {
            Self {
                begin: Instant::now(),
                writes: Vec::new(),
            }
        }

        /// Sent by a replica at this millisecond, given to the API server then, if at all.
        fn write(mut self, pod: &str, (arrived, sent): (u64, Option<u64>), line: &str, made: Option<Value>) -> Self {
            let words: Vec<&str> = line.split(' ').collect();
            let at = |ms: u64| self.begin + Duration::from_millis(ms);
            let asker = Asker {
                user: OPERATOR.to_owned(),
                pod: Some(pod.to_owned()),
                ..Asker::default()
            };
            let asked = Asked::new(asker, words[0], &words[1].parse().unwrap());
            self.writes.push(PodWrite {
                asked,
                arrived: at(arrived),
                sent: sent.map(at),
                made,
            });
            self
        }

        fn holds(self, pod: &str, arrived: u64, version: u64) -> Self {
            let made = json!({
                "metadata": {"name": ELECTION, "resourceVersion": version.to_string()}, "spec": {"holderIdentity": pod},
            });
            let line = "PUT /apis/coordination.k8s.io/v1/namespaces/system/leases/ftvm-operator";
            self.write(pod, (arrived, Some(arrived)), line, Some(made))
        }

        fn acts(self, pod: &str, arrived: u64) -> Self {
            let line = "PUT /apis/ftvm.dev/v1alpha1/namespaces/shop/faulttolerantvms/web/status";
            self.write(pod, (arrived, None), line, None)
        }

        fn makes(self, at: u64, kind: &str, object: Value) -> Self {
            let line = match kind {
                "leases" => "POST /apis/coordination.k8s.io/v1/namespaces/shop/leases".to_owned(),
                "faulttolerantvms" => {
                    "PUT /apis/ftvm.dev/v1alpha1/namespaces/shop/faulttolerantvms/web/status".to_owned()
                }
                _ => format!("POST /api/v1/namespaces/shop/{kind}"),
            };
            self.write("a", (at, Some(at)), &line, Some(object))
        }

        fn judged(&self) -> Leadership {
            judge(&self.writes, |user| user == OPERATOR)
        }
    }

    #[test]
    fn who_holds_the_lease_may_write() {
        let play = Play::new()
            .holds("a", 10, 1)
            .acts("a", 20)
            .holds("a", 30, 2)
            .acts("a", 40);
        let found = play.holds("b", 50, 3).acts("b", 60).judged();
        assert_eq!(
            (found.leaders, found.complaints),
            (vec!["a".to_owned(), "b".to_owned()], Vec::new())
        );
        assert_eq!(found.writes, BTreeMap::from([("a".to_owned(), 2), ("b".to_owned(), 1)]));
    }

    /// Freed by a leader that ends: whoever writes then leads no more, and the next one needs no time.
    #[test]
    fn a_lease_that_is_free_is_nobodys() {
        let play = || Play::new().holds("a_01", 10, 1).acts("a", 20).holds("", 30, 2);
        let found = play().holds("b_02", 31, 3).acts("b", 32).judged();
        assert_eq!(
            (found.leaders, found.complaints),
            (vec!["a".to_owned(), "b".to_owned()], Vec::new())
        );
        assert_eq!(play().acts("a", 31).judged().complaints.len(), 1);
    }

    /// The negative controls: two that lead at once, and one that was never elected.
    #[test]
    fn who_does_not_is_found() {
        let play = Play::new().holds("a", 10, 1).acts("a", 20).holds("b", 50, 3);
        let found = play.acts("b", 60).acts("a", 61).judged();
        assert_eq!(found.complaints.len(), 1, "{found:?}");
        assert!(
            found.complaints[0].starts_with("a sent PUT faulttolerantvms"),
            "{found:?}"
        );
        assert_eq!(Play::new().acts("b", 5).holds("b", 10, 1).judged().complaints.len(), 1);
    }

    #[test]
    fn what_is_not_in_the_book_is_harm() {
        let book = |version: u64, names: &[&str]| {
            let seats: Vec<_> = names.iter().map(|name| json!({"name": name})).collect();
            json!({"metadata": {"name": "web", "resourceVersion": version.to_string()}, "status": {"seats": seats}})
        };
        let named = |name: &str| json!({"metadata": {"name": name}});
        let good = Play::new()
            .makes(1, "faulttolerantvms", book(5, &["web-a", "web-b"]))
            .makes(2, "persistentvolumeclaims", named("web-a-root"))
            .makes(3, "pods", named("web-a"))
            .makes(4, "leases", named("web"));
        assert_eq!(harm(&good.writes, "shop", "web"), Vec::<String>::new());
        let bad = good
            .makes(5, "pods", named("web-c"))
            .makes(6, "faulttolerantvms", book(6, &["web-a", "web-b", "web-c"]))
            .makes(7, "leases", named("web"));
        assert_eq!(harm(&bad.writes, "shop", "web").len(), 3);
        let other = Play::new().makes(1, "persistentvolumeclaims", named("web-a-root"));
        assert_eq!(harm(&other.writes, "shop", "web").len(), 1);
    }
}
