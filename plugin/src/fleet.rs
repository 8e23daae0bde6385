//! A line for each VM.

use ftvm_crds::{FaultTolerantVMStatus, VmPhase};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use crate::health::{NOT_LOOKED_AT, Protection, phase_name, protection, told, troubles};
use crate::seen::Seen;
use crate::text::{Cell, Last, Paper, Tone, age, table};

const HEAD: [&str; 8] = [
    "NAME",
    "PHASE",
    "PROTECTED",
    "ACTIVE",
    "STANDBY",
    "TERM",
    "FAILOVER",
    "AGE",
];

/// Names of the columns.
pub fn head(all: bool) -> Vec<Cell> {
    let names = all.then_some("NAMESPACE").into_iter().chain(HEAD).chain(["NOTE"]);
    names.map(|name| Cell::toned(name, Tone::Head)).collect()
}

/// All of them below each other; `all`: of all namespaces.
pub fn render(vms: &[Seen], all: bool, now: Timestamp, paper: Paper) -> String {
    let rows = vms.iter().map(|seen| row(seen, all, now));
    let rows: Vec<_> = std::iter::once(head(all)).chain(rows).collect();
    table(&rows, 0, Last::Cut, paper)
}

/// One VM.
pub fn row(seen: &Seen, all: bool, now: Timestamp) -> Vec<Cell> {
    let place = all.then(|| Cell::new(seen.namespace().unwrap_or_default()));
    let mut cells: Vec<Cell> = place.into_iter().collect();
    cells.push(Cell::new(seen.name_any()));
    match &seen.vm {
        Ok(vm) => cells.extend(columns(vm.status.as_ref(), now)),
        Err(_) => cells.extend(["", "", "", "", "", ""].map(Cell::new)),
    }
    let created = seen.creation_timestamp();
    cells.push(Cell::new(created.map_or_else(String::new, |time| age(time.0, now))));
    cells.push(Cell::new(note(seen)));
    cells
}

/// One that is not there any more.
pub fn gone(seen: &Seen, all: bool, now: Timestamp) -> Vec<Cell> {
    let mut cells = row(seen, all, now);
    let place = usize::from(all);
    cells.truncate(place + 1);
    cells.push(Cell::toned("gone", Tone::Bad));
    cells
}

fn columns(status: Option<&FaultTolerantVMStatus>, now: Timestamp) -> [Cell; 6] {
    let missing = FaultTolerantVMStatus::default();
    let status = status.unwrap_or(&missing);
    let text = |text: &Option<String>| Cell::new(text.as_deref().unwrap_or_default());
    let phase = status.phase.map_or_else(|| Cell::new("?"), phase);
    let protected = match protection(status) {
        Protection::Yes => Cell::toned("yes", Tone::Good),
        Protection::No => Cell::toned("no", Tone::Bad),
        Protection::Nothing => Cell::new("-"),
        Protection::Unknown => Cell::new("?"),
    };
    let failover = status.last_failover.as_ref();
    let failover = failover.map_or_else(String::new, |failover| age(failover.time.0, now));
    let term = status.term.map_or_else(String::new, |term| term.to_string());
    [
        phase,
        protected,
        text(&status.active),
        text(&status.standby),
        Cell::new(term),
        Cell::new(failover),
    ]
}

/// The phase, as it is meant.
pub fn phase(phase: VmPhase) -> Cell {
    let tone = match phase {
        VmPhase::Running => Tone::Good,
        VmPhase::Paused => Tone::Bad,
        VmPhase::Starting | VmPhase::Stopping | VmPhase::Deleting => Tone::Busy,
        VmPhase::Halted => Tone::Plain,
    };
    Cell::toned(phase_name(phase), tone)
}

/// What somebody has to do something about, or is being done.
fn note(seen: &Seen) -> String {
    let vm = match &seen.vm {
        Ok(vm) => vm,
        Err(why) => return format!("this release can't read it ({why}): use the plugin of the operator's release"),
    };
    let Some(status) = &vm.status else {
        return NOT_LOOKED_AT.to_owned();
    };
    troubles(status).next().map_or_else(String::new, told)
}

#[cfg(test)]
#[path = "fleet_tests.rs"]
mod tests;
