//! Events: what changed between two statuses that a person would want to be told.

use ftvm_crds::names::LABEL_VM;
use ftvm_crds::{AskedFor, FaultTolerantVMStatus, Outcome, VmPhase, VolumePolicy};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;

use super::networks::ONE_PATH;
use super::storage::SWITCHED_OVER;
use super::{CONDITIONS, NOT_RUNNING, PAUSED, RESYNCING};
use crate::decide::{self, holder};
use crate::observe::Observed;

/// Reason of the event that tells of a guest that went to the other seat because of its disk.
const SWITCHED_FOR_DISK: &str = "SwitchedForDisk";

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Something is wrong.
    pub warning: bool,
    /// In one word.
    pub reason: String,
    /// In one sentence.
    pub note: String,
}

fn change(warning: bool, reason: &str, note: impl Into<String>) -> Change {
    Change {
        warning,
        reason: reason.to_owned(),
        note: note.into(),
    }
}

/// What is worth an event.
pub fn changes(old: &FaultTolerantVMStatus, new: &FaultTolerantVMStatus) -> Vec<Change> {
    let mut found = Vec::new();
    let node = |node: &Option<String>| node.clone().unwrap_or_else(|| "nowhere".to_owned());
    if old.active != new.active && new.active.is_some() {
        found.push(change(
            false,
            "ActiveChanged",
            format!(
                "the guest runs on node {}, before: {}",
                node(&new.active),
                node(&old.active)
            ),
        ));
    }
    if old.phase != new.phase && new.phase == Some(VmPhase::Halted) {
        found.push(change(false, "Halted", "the VM is halted; its disks are kept"));
    }
    if old.last_failover != new.last_failover
        && let Some(failover) = &new.last_failover
    {
        let note = format!(
            "seat {} took over ({}), gap {} µs",
            failover.seat, failover.reason, failover.gap_microseconds
        );
        found.push(change(false, "TookOver", note));
    }
    found.extend(seats(old, new));
    found.extend(asked("Switchover", old.switchover.as_ref(), new.switchover.as_ref()));
    found.extend(asked("Failover", old.failover.as_ref(), new.failover.as_ref()));
    // How far a resync is, is no event.
    for kind in CONDITIONS.into_iter().filter(|kind| *kind != RESYNCING) {
        found.extend(condition(old.condition(kind), new.condition(kind)));
    }
    found.dedup_by(|a, b| a.note == b.note);
    found
}

/// What stays of a VM that goes, and how to find it: told last, for its status and its record go with it.
pub fn kept(seen: &Observed) -> Option<Change> {
    if seen.vm.spec.volume_policy != VolumePolicy::Retain || seen.claims.is_empty() {
        return None;
    }
    let (namespace, vm) = (seen.vm.namespace().unwrap_or_default(), seen.vm.name_any());
    let claims: Vec<&str> = seen.claims.keys().map(String::as_str).collect();
    let book = seen.status().seats;
    let last = decide::record(seen).and_then(|record| holder(&book, &record.snapshot.record));
    let last = last.map_or_else(String::new, |entry| format!("; seat {} was active last", entry.name));
    let note = format!(
        "claims {} are kept (spec.volumePolicy: Retain): kubectl get pvc --namespace {namespace} --selector {LABEL_VM}={vm}{last}",
        claims.join(", ")
    );
    Some(change(false, "VolumesRetained", note))
}

/// What came of something that was asked for.
fn asked(what: &str, old: Option<&AskedFor>, new: Option<&AskedFor>) -> Option<Change> {
    let asked = new.filter(|_| old != new)?;
    let what_of = format!("{} {}", what.to_lowercase(), asked.request);
    match asked.outcome {
        Outcome::Pending => None,
        Outcome::Done => Some(change(false, &format!("{what}Done"), what_of)),
        Outcome::Refused => {
            let why = asked.why.as_deref().unwrap_or("");
            Some(change(true, &format!("{what}Refused"), format!("{what_of}: {why}")))
        }
    }
}

fn seats(old: &FaultTolerantVMStatus, new: &FaultTolerantVMStatus) -> Vec<Change> {
    let mut found = Vec::new();
    for entry in &new.seats {
        let before = old.seats.iter().find(|before| before.name == entry.name);
        if before.is_none() {
            found.push(change(false, "SeatEntered", format!("seat {}", entry.name)));
        }
        if entry.leaving && before.is_some_and(|before| !before.leaving) {
            let node = entry.node.as_deref().unwrap_or("no node");
            found.push(change(
                true,
                "SeatLost",
                format!("seat {} on {node} is given up and replaced", entry.name),
            ));
        }
    }
    found
}

/// A condition that changed, or fails for another reason than before.
fn condition(old: Option<&Condition>, new: Option<&Condition>) -> Option<Change> {
    let new = new?;
    let same = old.is_some_and(|old| old.status == new.status && (old.reason == new.reason || new.status == "True"));
    if same || new.status == "Unknown" || (old.is_none() && ["Starting", "InStep"].contains(&new.reason.as_str())) {
        return None;
    }
    let quiet = [
        "Starting",
        "Halted",
        "Stopping",
        "Deleting",
        NOT_RUNNING,
        "Resyncing",
        "WaitsForNodes",
        // The chart's values are meant so.
        ONE_PATH,
    ];
    let good = new.status == "True";
    // A guest that has not run yet has to wait for its standby.
    let begins = new.reason == PAUSED && old.is_some_and(|old| old.reason == "Starting");
    let warning = !good && !begins && !quiet.contains(&new.reason.as_str());
    let reason = match new.reason.as_str() {
        _ if good => new.type_.as_str(),
        SWITCHED_OVER => SWITCHED_FOR_DISK,
        reason => reason,
    };
    (good || warning).then(|| change(warning, reason, format!("{}: {}", new.type_, new.message)))
}
