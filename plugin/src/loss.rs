//! What it means to go on without what only seats that are gone have: told before it is accepted. Pure.

use ftvm_crds::lease::{check_owner, snapshot};
use ftvm_crds::names::ANNOTATION_ACCEPT_DATA_LOSS;
use ftvm_crds::{FaultTolerantVM, FaultTolerantVMStatus, RunStrategy, SeatEntry, VmPhase};
use ftvm_protocol::identity::{ArbiterUid, Incarnation, Term, VmId};
use ftvm_protocol::record::{Phase, Record};
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt as _;

use crate::cluster::Said;
use crate::detail::{advice, published};

/// Of every disk that is booted.
const MEMORY: &str = "What was in the guest's memory alone is lost in any case: it is booted.";

/// What would be written, and what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// `HOLDER@TERM`, as the operator takes it.
    pub of: String,
    /// Its term.
    pub term: Term,
    /// What a person should know, a line each.
    pub lines: Vec<String>,
}

/// Of a VM, its Lease, and what its seats' pods say.
///
/// # Errors
/// Why nothing can be accepted, and what to do.
pub fn plan(vm: &FaultTolerantVM, lease: Option<&Lease>, said: &Said) -> Result<Plan, String> {
    let missing = FaultTolerantVMStatus::default();
    let status = vm.status.as_ref().unwrap_or(&missing);
    let record = record(vm, status, lease)?;
    let old = old_copy(status, &record, said);
    may_be_accepted(vm, status, &record, old.is_some())?;
    let lost = old.unwrap_or_else(|| lost(&record).to_owned());
    let mut lines = vec![used(status, &record), lost, MEMORY.to_owned()];
    lines.extend(status.seats.iter().map(|entry| seat(entry, &record, said)));
    if let Err(why) = said {
        lines.push(format!(
            "What the seats' pods say is not known ({why}): a seat may know a later term than the record, which nothing tells here."
        ));
    }
    let of = format!("{}@{}", record.holder, record.term);
    let before = vm.annotations().get(ANNOTATION_ACCEPT_DATA_LOSS);
    let wrong = advice(vm);
    if before.is_some_and(|text| text.split_whitespace().next() == Some(of.as_str())) {
        lines.push("This was accepted before, of this very record: see first what it waits for.".to_owned());
    } else if !wrong.iter().any(|line| line.contains(ANNOTATION_ACCEPT_DATA_LOSS)) {
        lines.push("No condition of the VM asks for this: what they say may be all that is to be done.".to_owned());
    }
    lines.extend(wrong.iter().map(|line| format!("The VM says: {line}")));
    let term = record.term;
    Ok(Plan { of, term, lines })
}

fn record(vm: &FaultTolerantVM, status: &FaultTolerantVMStatus, lease: Option<&Lease>) -> Result<Record, String> {
    let lease = lease.ok_or(
        "the VM has no Lease, so that nobody knows who had the guest last: see the condition ArbiterReachable (docs/kubernetes.md, \"A Lease that is gone\")",
    )?;
    let vm_id = vm.uid().unwrap_or_default().parse::<VmId>();
    let vm_id = vm_id.map_err(|error| format!("the VM's UID: {error}"))?;
    check_owner(lease, &vm.name_any(), vm_id).map_err(|error| error.to_string())?;
    let found = snapshot(lease).map_err(|error| error.to_string())?;
    // The operator goes by no other one, whatever is accepted of it.
    let same = |known: ArbiterUid| found.uid == known || found.record.predecessor == Some(known);
    let known = status.lease_uid.as_deref();
    if known.is_some_and(|known| !known.parse().is_ok_and(same)) {
        return Err(
            "the VM's Lease is another object than the operator made, so that its record is not gone by: see the condition ArbiterReachable (docs/kubernetes.md, \"A Lease that is gone\")".to_owned(),
        );
    }
    Ok(found.record)
}

/// The highest term that the engine of this seat knows, if its pod says one.
fn term(entry: &SeatEntry, said: &Said) -> Option<Term> {
    let found = published(entry, said)?.as_ref().ok()?;
    Some(found.term).filter(|term| *term > 0)
}

/// What it means that somebody knows a later term than the record, if so: a backup was restored, or an old copy put in its place.
fn old_copy(status: &FaultTolerantVMStatus, record: &Record, said: &Said) -> Option<String> {
    let told = status.seats.iter().filter_map(|entry| {
        let who = format!("seat {} knows", entry.name);
        Some((term(entry, said)?, who))
    });
    let read = status.term.map(|term| (term, "the status knew".to_owned()));
    // Of the same term a seat is told: it has the disk.
    let later = read.into_iter().chain(told).filter(|(term, _)| *term > record.term);
    let (term, who) = later.max_by_key(|(term, _)| *term)?;
    Some(format!(
        "The record says term {}, and {who} {term}: it is an old copy. All that happened since may be lost, unless the disk of the latest term is used. Put the last record back, if there is a copy of it (docs/kubernetes.md, \"A Lease that is gone\").",
        record.term
    ))
}

/// `old`: somebody knows a later term than the record.
fn may_be_accepted(
    vm: &FaultTolerantVM,
    status: &FaultTolerantVMStatus,
    record: &Record,
    old: bool,
) -> Result<(), String> {
    if vm.metadata.deletion_timestamp.is_some() {
        return Err("the VM is being deleted: nothing of it is booted".to_owned());
    }
    if vm.spec.run_strategy == RunStrategy::Halted {
        return Err(
            "the VM is halted: `kubectl ftvm start` it first, and see whether anything has to be lost".to_owned(),
        );
    }
    if let Some(VmPhase::Running | VmPhase::Paused) = status.phase {
        let node = status.active.as_deref().unwrap_or("an unknown node");
        return Err(format!(
            "the guest is on node {node}: nothing has to be lost for it to go on. What keeps it from being protected is in `kubectl ftvm status`"
        ));
    }
    // A backup may have brought the first record back.
    let first = record.term == 1 && record.members.is_only(Incarnation::genesis(record.holder.seat));
    if first && !old {
        return Err("no guest of this VM ever ran: there is nothing to lose, and what keeps it from starting is in `kubectl ftvm status`".to_owned());
    }
    Ok(())
}

/// The seat of the book that an incarnation was.
fn seat_of(status: &FaultTolerantVMStatus, incarnation: Incarnation) -> Option<&SeatEntry> {
    let uid = incarnation.seat.to_string();
    status.seats.iter().find(|entry| entry.had_uid(&uid))
}

fn used(status: &FaultTolerantVMStatus, record: &Record) -> String {
    let Some(entry) = seat_of(status, record.holder) else {
        return format!(
            "By the record of term {} {}, which is none of the VM's seats, had the guest last. Its disk is not used; that of the seat with the latest term is, or any. If there is a former copy of the Lease put it back instead.",
            record.term, record.holder
        );
    };
    format!(
        "By the record of term {} seat {} on {} had the guest last. That disk is used if its node can boot it; or that of a seat which is known to have a later term, for it is newer; else another one.",
        record.term,
        entry.name,
        node(entry)
    )
}

/// What only seats that are gone may have, by a record that is the last one.
fn lost(record: &Record) -> &'static str {
    let others = record.members.iter().filter(|member| *member != record.holder).count();
    match (record.phase, others) {
        (Phase::Stopped, _) => {
            "It was stopped in order: nothing is lost if the disk of a seat that was told of the stop is used."
        }
        (Phase::Running, 0) => {
            "It ran alone: nothing that it flushed is lost if that seat's disk is used; if another one's is, all that happened since it went on alone is lost."
        }
        (Phase::Running, _) => {
            "It was protected: nothing that it flushed and that anybody was told of is lost, whichever disk of the pair is used, unless the record is an old copy."
        }
    }
}

fn node(entry: &SeatEntry) -> String {
    let former = entry.former.iter().rev().find_map(|former| former.node.as_deref());
    match (entry.node.as_deref(), former) {
        (Some(node), _) => format!("node {node}"),
        (None, Some(node)) => format!("no node yet (before: {node})"),
        (None, None) => "no node yet".to_owned(),
    }
}

fn seat(entry: &SeatEntry, record: &Record, said: &Said) -> String {
    let named = record
        .members
        .iter()
        .any(|member| entry.had_uid(&member.seat.to_string()));
    let named = if named {
        "the record names it"
    } else {
        "the record does not name it"
    };
    let lost = entry.lost_since.as_ref();
    let lost = lost.map_or_else(String::new, |time| format!("; missed since {}", time.0));
    let leaving = if entry.leaving { "; it is being removed" } else { "" };
    let knows = match term(entry, said) {
        Some(term) if term > record.term => format!("; it knows term {term}, its disk is newer than the record"),
        Some(term) => format!("; it knows term {term}"),
        None => "; it does not say which term it knows".to_owned(),
    };
    format!("Seat {}: {}; {named}{knows}{lost}{leaving}.", entry.name, node(entry))
}

#[cfg(test)]
#[path = "loss_tests.rs"]
mod tests;
