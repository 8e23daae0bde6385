//! VMs as an API server tells them, for tests.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::seen::Seen;

/// When everything is looked at.
pub const NOW: &str = "2026-01-02T05:04:05Z";

/// [`NOW`].
pub fn now() -> Timestamp {
    NOW.parse().unwrap()
}

/// The example of the documentation in namespace `shop`, under another name and with this status (YAML); none if that is empty.
pub fn seen(name: &str, status: &str) -> Seen {
    let mut object: Value = ftvm_crds::yaml::read(include_str!("../../docs/examples/web.yaml")).unwrap();
    let metadata = json!({
        "name": name, "namespace": "shop", "uid": "0123abcd-4567-4000-8000-0000000000ff", "generation": 3,
        "creationTimestamp": "2026-01-01T05:04:05Z",
    });
    object["metadata"] = metadata;
    if !status.is_empty() {
        object["status"] = ftvm_crds::yaml::read(status).unwrap();
    }
    of(object)
}

/// An object as the API server tells it.
pub fn of(object: Value) -> Seen {
    serde_json::from_value(object).unwrap()
}

/// A status of a protected VM: conditions can be put behind it.
pub const PROTECTED: &str = r"
observedGeneration: 3
phase: Running
active: n1
standby: n2
mode: Checkpoint
term: 7
intervalMs: 20
lagMs: 3
seats:
- {name: web-x7k2q, slot: 0, podUid: 0123abcd-0000-4000-8000-00000000000a, node: n1}
- {name: web-bbbbb, slot: 1, podUid: 0123abcd-0000-4000-8000-00000000000b, node: n2}
lastFailover: {time: '2026-01-02T03:04:05Z', reason: the peer was lost, seat: web-x7k2q, node: n1, gapMicroseconds: 12345}
conditions:
- {type: Ready, status: 'True', reason: GuestRuns, message: the guest runs, lastTransitionTime: '2026-01-02T03:04:05Z'}
- {type: Protected, status: 'True', reason: StandbyFollows, message: seat web-bbbbb on node n2 would take over, lastTransitionTime: '2026-01-02T04:04:05Z'}
- {type: Resyncing, status: 'False', reason: InStep, message: no seat is being brought up to date, lastTransitionTime: '2026-01-02T04:04:05Z'}
";

/// A status whose standby is being brought up to date.
pub const RESYNCING: &str = r"
observedGeneration: 3
phase: Running
active: n1
mode: Checkpoint
term: 8
resyncPercent: 42
seats:
- {name: web-x7k2q, slot: 0, podUid: 0123abcd-0000-4000-8000-00000000000a, node: n1}
- {name: web-bbbbb, slot: 1, podUid: 0123abcd-0000-4000-8000-00000000000b, node: n2, lostSince: '2026-01-02T05:03:35Z'}
conditions:
- {type: Ready, status: 'True', reason: GuestRuns, message: the guest runs, lastTransitionTime: '2026-01-02T03:04:05Z'}
- {type: Protected, status: 'False', reason: Resyncing, message: 'a seat is being brought up to date: 42 %', lastTransitionTime: '2026-01-02T05:03:35Z'}
- {type: Resyncing, status: 'True', reason: Joining, message: a seat is being brought up to date; status.resyncPercent has the progress, lastTransitionTime: '2026-01-02T05:03:35Z'}
";

/// A halted VM.
pub const HALTED: &str = r"
observedGeneration: 3
phase: Halted
term: 9
seats:
- {name: web-x7k2q, slot: 0}
conditions:
- {type: Ready, status: 'False', reason: Halted, message: 'the VM is halted: set spec.runStrategy to Always to start it', lastTransitionTime: '2026-01-02T03:04:05Z'}
- {type: Protected, status: 'False', reason: NotRunning, message: 'no guest runs: there is nothing to protect', lastTransitionTime: '2026-01-02T03:04:05Z'}
";
