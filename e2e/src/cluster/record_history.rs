//! Who held a VM's record when, from what the API server made of all that daemons and operator wrote.
use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::Value;

use super::api_proxy::{PodWrite, version_of};

/// The record's holders.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecordHistory {
    /// By the Lease's version: when the write was given to the API server, and the UID of the pod whose it is since.
    holders: BTreeMap<u64, (Instant, String)>,
    /// The nodes of pods, by UID.
    nodes: BTreeMap<String, String>,
}

/// The history of the record of this VM. The writes must be all that changed it.
#[must_use]
pub fn record_history(writes: &[PodWrite], namespace: &str, vm: &str) -> RecordHistory {
    let mut history = RecordHistory::default();
    let own = |write: &&PodWrite| write.asked.namespace.as_deref() == Some(namespace);
    for write in writes.iter().filter(own) {
        let (Some(sent), Some(made)) = (write.sent, &write.made) else {
            continue;
        };
        match write.asked.resource.as_str() {
            "leases" if made["metadata"]["name"] == vm => {
                if let Some((version, holder)) = holder(made) {
                    history.holders.insert(version, (sent, holder));
                }
            }
            // Each daemon writes on the pods of its node, and long before one of them holds the record.
            "pods" => {
                if let Some((seat, node)) = place(made) {
                    history.nodes.insert(seat, node);
                }
            }
            _ => {}
        }
    }
    history
}

fn holder(lease: &Value) -> Option<(u64, String)> {
    let version = version_of(lease)?;
    let record = lease["metadata"]["annotations"]["ftvm.dev/record"].as_str()?;
    let record: Value = serde_json::from_str(record).ok()?;
    // An incarnation: `UID/start`.
    let (seat, _) = record["holder"].as_str()?.split_once('/')?;
    Some((version, seat.to_owned()))
}

fn place(pod: &Value) -> Option<(String, String)> {
    let uid = pod["metadata"]["uid"].as_str()?.to_owned();
    Some((uid, pod["spec"]["nodeName"].as_str()?.to_owned()))
}

impl RecordHistory {
    /// The node whose seat held the record at this time, as far as it is known.
    #[must_use]
    pub fn holder_at(&self, at: Instant) -> Option<&str> {
        let (_, holder) = self.holders.values().rev().find(|(sent, _)| *sent <= at)?;
        self.nodes.get(holder).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ftvm_protocol::identity::{Incarnation, Nonce};
    use ftvm_protocol::record::{Members, Phase, Record};
    use serde_json::json;

    use super::super::api_proxy::{Asked, Asker};
    use super::*;

    const SEATS: [&str; 2] = [
        "00000000-0000-4000-8000-00000000000a",
        "00000000-0000-4000-8000-00000000000b",
    ];

    fn write(at: Instant, line: &str, made: Option<Value>) -> PodWrite {
        PodWrite {
            asked: Asked::new(Asker::default(), "PUT", &line.parse().unwrap()),
            arrived: at,
            sent: Some(at),
            made,
        }
    }

    fn pod(at: Instant, seat: usize) -> PodWrite {
        let made = json!({"metadata": {"uid": SEATS[seat]}, "spec": {"nodeName": format!("n{seat}")}});
        write(at, "/api/v1/namespaces/shop/pods/web-a", Some(made))
    }

    fn lease(at: Instant, name: &str, version: u64, holder: usize) -> PodWrite {
        let holder = Incarnation {
            seat: SEATS[holder].parse().unwrap(),
            start: 1,
        };
        let record = Record {
            holder,
            members: Members::one(holder),
            term: version,
            nonce: Nonce(1),
            phase: Phase::Running,
            group: 0,
            predecessor: None,
        };
        let record = serde_json::to_string(&record).unwrap();
        let made = json!({
            "metadata": {
                "name": name, "uid": "00000000-0000-4000-8000-0000000000ff", "resourceVersion": version.to_string(),
                "annotations": {"ftvm.dev/record": record},
            },
        });
        let line = format!("/apis/coordination.k8s.io/v1/namespaces/shop/leases/{name}");
        write(at, &line, Some(made))
    }

    #[test]
    fn the_newest_write_that_was_made_says_who_holds_it() {
        let begin = Instant::now();
        let at = |ms: u64| begin + Duration::from_millis(ms);
        let refused = PodWrite {
            made: None,
            ..lease(at(30), "web", 9, 0)
        };
        let writes = [
            pod(at(0), 0),
            pod(at(0), 1),
            lease(at(20), "web", 5, 1),
            // Its turn came earlier, and it was written down later.
            lease(at(10), "web", 3, 0),
            lease(at(25), "other", 7, 0),
            refused,
        ];
        let history = record_history(&writes, "shop", "web");
        let holders: Vec<_> = [5, 10, 19, 20, 40].map(|ms| history.holder_at(at(ms))).into();
        assert_eq!(holders, [None, Some("n0"), Some("n0"), Some("n1"), Some("n1")]);
        // Of a seat that nobody wrote of it is not known where it is.
        let history = record_history(&writes[1..], "shop", "web");
        assert_eq!(history.holder_at(at(15)), None);
    }
}
