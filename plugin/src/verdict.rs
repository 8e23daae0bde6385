//! What a VM that was asked something says of it. Pure.

use ftvm_crds::names::{ANNOTATION_ACCEPT_DATA_LOSS, ANNOTATION_SWITCHOVER};
use ftvm_crds::{FaultTolerantVM, FaultTolerantVMStatus, Outcome, RunStrategy, VmPhase};
use ftvm_protocol::identity::Term;
use kube::ResourceExt as _;

use crate::health::{NOT_LOOKED_AT, READY, phase_name, told};

/// What a VM says of what was asked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is done; in words.
    Done(String),
    /// It may be yet; what it waits for.
    Yet(String),
    /// It won't be; why, and what to do.
    Never(String),
}

use Verdict::{Done, Never, Yet};

/// What was asked for. Each judges a version of the VM that was read later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// A switchover by this text, when the guest was on this node.
    Switchover { request: String, before: Option<String> },
    /// The guest runs, by the spec of this generation.
    Start { generation: i64 },
    /// Nothing runs, by the spec of this generation.
    Stop { generation: i64 },
    /// The guest runs although something may be lost; by this annotation, of this term.
    AcceptDataLoss { annotation: String, term: Term },
}

impl Asked {
    /// In words.
    pub fn what(&self) -> &'static str {
        match self {
            Asked::Switchover { .. } => "switchover",
            Asked::Start { .. } => "start",
            Asked::Stop { .. } => "stop",
            Asked::AcceptDataLoss { .. } => "accept-data-loss",
        }
    }

    /// What has become of it.
    pub fn judge(&self, vm: &FaultTolerantVM) -> Verdict {
        if vm.metadata.deletion_timestamp.is_some() {
            return Never("the VM is being deleted".to_owned());
        }
        let Some(status) = &vm.status else {
            return Yet(NOT_LOOKED_AT.to_owned());
        };
        match self {
            Asked::Switchover { request, before } => switched_over(vm, status, request, before.as_deref()),
            Asked::Start { generation } => started(vm, status, *generation),
            Asked::Stop { generation } => stopped(vm, status, *generation),
            Asked::AcceptDataLoss { annotation, term } => booted(vm, status, annotation, *term),
        }
    }
}

fn switched_over(vm: &FaultTolerantVM, status: &FaultTolerantVMStatus, request: &str, before: Option<&str>) -> Verdict {
    let Some(known) = status.switchover.as_ref().filter(|known| known.request == request) else {
        let stands = vm
            .annotations()
            .get(ANNOTATION_SWITCHOVER)
            .is_some_and(|text| text == request);
        return if stands {
            Yet("the operator has not taken it up yet; if that lasts: does it run, and has it a leader?".to_owned())
        } else {
            Never(format!(
                "the annotation {ANNOTATION_SWITCHOVER} was changed or removed before the operator took it up: see who asks, then ask again"
            ))
        };
    };
    // Who was told had the guest; what the status said before may have been old.
    let told = known.told.as_ref().map(|told| told.pod_uid.as_str());
    let told = told.and_then(|uid| status.seats.iter().find(|entry| entry.had_uid(uid)));
    let before = told.and_then(|entry| entry.node.as_deref()).or(before);
    let active = status.active.as_deref();
    let node = active.unwrap_or("an unknown node");
    match known.outcome {
        Outcome::Pending => Yet(known
            .why
            .clone()
            .unwrap_or_else(|| "the active seat was told".to_owned())),
        Outcome::Refused => Never(format!(
            "refused: {}",
            known
                .why
                .as_deref()
                .unwrap_or("no reason was given; see the log of the node-daemon")
        )),
        Outcome::Done if active.is_none() || active == before => Yet(format!(
            "it is told as done, and the status has the guest on {node} as before"
        )),
        Outcome::Done => Done(format!("the guest runs on node {node}")),
    }
}

/// Does the status not speak of the spec of this generation yet?
fn is_old(status: &FaultTolerantVMStatus, generation: i64) -> bool {
    status.observed_generation.is_none_or(|seen| seen < generation)
}

/// What the condition Ready says.
fn ready(status: &FaultTolerantVMStatus) -> String {
    let phase = status.phase.map_or("?", phase_name);
    let said = status.condition(READY).map_or_else(String::new, told);
    format!("{phase}: {said}")
}

fn started(vm: &FaultTolerantVM, status: &FaultTolerantVMStatus, generation: i64) -> Verdict {
    if vm.spec.run_strategy == RunStrategy::Halted {
        return Never("somebody else asked for a stop (spec.runStrategy is Halted)".to_owned());
    }
    if is_old(status, generation) {
        return Yet(NOT_TAKEN_UP.to_owned());
    }
    match status.phase {
        Some(VmPhase::Running) => Done(runs(status)),
        _ => Yet(ready(status)),
    }
}

fn stopped(vm: &FaultTolerantVM, status: &FaultTolerantVMStatus, generation: i64) -> Verdict {
    if vm.spec.run_strategy == RunStrategy::Always {
        return Never("somebody else asked for a start (spec.runStrategy is Always)".to_owned());
    }
    if is_old(status, generation) {
        return Yet(NOT_TAKEN_UP.to_owned());
    }
    match status.phase {
        Some(VmPhase::Halted) => Done("the VM is halted; its disks are kept".to_owned()),
        _ => Yet(ready(status)),
    }
}

fn booted(vm: &FaultTolerantVM, status: &FaultTolerantVMStatus, annotation: &str, term: Term) -> Verdict {
    if vm.spec.run_strategy == RunStrategy::Halted {
        return Never("somebody else asked for a stop (spec.runStrategy is Halted)".to_owned());
    }
    // What booted over the loss has written a later record.
    let later = status.term.is_some_and(|known| known > term);
    if later && matches!(status.phase, Some(VmPhase::Running | VmPhase::Paused)) {
        return Done(runs(status));
    }
    let stands = vm
        .annotations()
        .get(ANNOTATION_ACCEPT_DATA_LOSS)
        .is_some_and(|text| text == annotation);
    if !stands {
        return Never(format!(
            "the annotation {ANNOTATION_ACCEPT_DATA_LOSS} was changed or removed: see who else accepts losses"
        ));
    }
    Yet(ready(status))
}

/// What a change of the spec waits for first.
const NOT_TAKEN_UP: &str =
    "the operator has not looked at the change yet; if that lasts: does it run, and has it a leader?";

fn runs(status: &FaultTolerantVMStatus) -> String {
    let node = status.active.as_deref().unwrap_or("an unknown node");
    let stands_still = match status.phase {
        Some(VmPhase::Paused) => ", and stands still until a standby has joined",
        _ => "",
    };
    format!("the guest runs on node {node}{stands_still}")
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
