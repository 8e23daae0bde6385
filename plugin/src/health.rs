//! Which of a VM's conditions somebody has to do something about. The operator wrote into their messages what.

use ftvm_crds::{FaultTolerantVMStatus, VmPhase};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// The guest runs.
pub const READY: &str = "Ready";
/// A standby would take over.
pub const PROTECTED: &str = "Protected";
/// The one condition that holds while something is not as it is meant to be.
const RESYNCING: &str = "Resyncing";

/// Why a VM without a status has none.
pub const NOT_LOOKED_AT: &str =
    "the operator has not looked at the VM yet; if that lasts: does it run, and has it a leader?";

/// Reasons that are no trouble: nobody wants it otherwise.
const MEANT: [&str; 2] = ["Halted", "NotRunning"];

/// Conditions that do not hold and should, the most telling first. Those of a later release count, too.
pub fn troubles(status: &FaultTolerantVMStatus) -> impl Iterator<Item = &Condition> {
    let first = [READY, PROTECTED];
    let known = first.into_iter().filter_map(move |kind| status.condition(kind));
    let others = status
        .conditions
        .iter()
        .filter(move |condition| !first.contains(&condition.type_.as_str()));
    known.chain(others).filter(|condition| {
        condition.status == "False" && condition.type_ != RESYNCING && !MEANT.contains(&condition.reason.as_str())
    })
}

/// Does the standby follow?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// It would take over.
    Yes,
    /// Nobody would.
    No,
    /// No guest runs.
    Nothing,
    /// Nobody says.
    Unknown,
}

/// As the condition has it.
pub fn protection(status: &FaultTolerantVMStatus) -> Protection {
    match status.condition(PROTECTED) {
        Some(condition) if condition.status == "True" => Protection::Yes,
        Some(condition) if condition.reason == "NotRunning" => Protection::Nothing,
        Some(condition) if condition.status == "False" => Protection::No,
        _ => Protection::Unknown,
    }
}

/// A condition in one line.
pub fn told(condition: &Condition) -> String {
    let Condition { reason, message, .. } = condition;
    if message.is_empty() {
        reason.clone()
    } else {
        format!("{reason}: {message}")
    }
}

/// The word for a phase, as the object has it.
pub fn phase_name(phase: VmPhase) -> &'static str {
    match phase {
        VmPhase::Starting => "Starting",
        VmPhase::Running => "Running",
        VmPhase::Paused => "Paused",
        VmPhase::Stopping => "Stopping",
        VmPhase::Halted => "Halted",
        VmPhase::Deleting => "Deleting",
    }
}
