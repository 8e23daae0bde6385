//! Claims of which something is wrong, and those that wait for a volume.
//!
//! Invariant: a claim that is gone is made anew, empty, only for a seat whose disks nobody ever used, or that has lost the first of them, where its header
//! was, while another seat that the record names says that it has its own: a seat that kept its header would boot with what is left, and its peer
//! would get a copy of that.

use std::time::Duration;

use ftvm_crds::names::claim_name;
use ftvm_crds::{SeatEntry, VolumePolicy};
use ftvm_protocol::record::Record;

use super::former::FORMER_MAX;
use super::run::sooner;
use super::spare::never_ran;
use super::{Want, is_heard_of, is_named, published, record, want};
use crate::observe::{ClaimSeen, Observed, PodPhase};

/// What is wrong with a claim of a seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimTrouble {
    /// It is being deleted, and goes once no pod that is bound to a node uses it.
    Deleting,
    /// Its volume is gone.
    Lost,
    /// It is gone, and is not made anew.
    Gone,
}

/// The first claim of this seat of which something is wrong, by name.
pub fn claim_trouble(seen: &Observed, entry: &SeatEntry) -> Option<(ClaimTrouble, String)> {
    seen.vm.spec.disks.iter().find_map(|disk| {
        let name = claim_name(&entry.name, &disk.name);
        let trouble = match seen.claims.get(&name) {
            Some(claim) if claim.deleting => ClaimTrouble::Deleting,
            Some(claim) if claim.lost => ClaimTrouble::Lost,
            Some(_) => return None,
            None if may_be_made(seen, entry) => return None,
            None => ClaimTrouble::Gone,
        };
        Some((trouble, name))
    })
}

/// The disks of a seat whose claims are to be made, in this order: whether any may be made anew is seen by that of the first disk, so it comes last.
pub(super) fn to_make(seen: &Observed, entry: &SeatEntry) -> Vec<String> {
    let disks = seen.vm.spec.disks.iter().rev().map(|disk| disk.name.clone());
    let missing: Vec<String> = disks
        .filter(|disk| !seen.claims.contains_key(&claim_name(&entry.name, disk)))
        .collect();
    if may_be_made(seen, entry) { missing } else { Vec::new() }
}

/// May what this seat lacks be made anew, empty?
fn may_be_made(seen: &Observed, entry: &SeatEntry) -> bool {
    let first = seen.vm.spec.disks.first();
    // Without its header it boots nothing, and gets everything from the other seat.
    let no_header = first.is_none_or(|disk| !seen.claims.contains_key(&claim_name(&entry.name, &disk.name)));
    !may_have_data(seen, entry) || (no_header && is_elsewhere(seen, entry))
}

/// May an engine have run with disks of this seat since a guest ran?
fn may_have_data(seen: &Observed, entry: &SeatEntry) -> bool {
    let status = seen.vm.status.as_ref();
    let ran = match record(seen) {
        Some(record) => !never_ran(seen, &record.snapshot.record, &seen.status().seats),
        None => status.is_some_and(|status| status.lease_uid.is_some()),
    };
    let placed = entry.node.is_some() || entry.former.iter().any(|former| former.node.is_some());
    // No more are kept.
    ran && (placed || entry.former.len() >= FORMER_MAX)
}

/// Does the record name another seat, whose claims are all there, and not only since a moment ago: it knows a term, or has the guest or follows it?
fn is_elsewhere(seen: &Observed, entry: &SeatEntry) -> bool {
    let Some(record) = record(seen).map(|record| &record.snapshot.record) else {
        return false;
    };
    let seats = seen.vm.status.iter().flat_map(|status| &status.seats);
    let mut others = seats.filter(|other| other.name != entry.name);
    // A disk without a header knows of no term.
    let knows = |other: &SeatEntry| {
        published(seen, other).is_some_and(|published| published.term > 0) || is_heard_of(seen, other)
    };
    others.any(|other| is_named(other, record) && has_all(seen, other) && knows(other))
}

fn has_all(seen: &Observed, entry: &SeatEntry) -> bool {
    seen.vm.spec.disks.iter().all(|disk| {
        let claim = seen.claims.get(&claim_name(&entry.name, &disk.name));
        claim.is_some_and(|claim| !claim.deleting && !claim.lost)
    })
}

/// A claim of a seat that the record names and that is still there only because the seat's pod is: whatever ends the pod destroys a disk.
pub(super) fn goes_with_pod<'a>(seen: &'a Observed, entry: &SeatEntry, record: &Record) -> Option<&'a str> {
    let placed = seen.pods.get(&entry.name).is_some_and(|pod| pod.node.is_some());
    if !placed || never_ran(seen, record, &seen.status().seats) || !is_named(entry, record) {
        return None;
    }
    let mut claims = seen.claims.iter();
    let deleted = claims.find(|(_, claim)| claim.seat == entry.name && claim.deleting);
    deleted.map(|(name, _)| name.as_str())
}

/// A seat, and a claim of it, that would go if the VM were halted or deleted now, though its disks are to be kept.
pub fn goes_with_vm<'a>(
    seen: &'a Observed,
    book: &'a [SeatEntry],
    record: &Record,
) -> Option<(&'a SeatEntry, &'a str)> {
    if want(seen) == Want::Delete && seen.vm.spec.volume_policy == VolumePolicy::Delete {
        return None;
    }
    book.iter()
        .find_map(|entry| Some((entry, goes_with_pod(seen, entry, record)?)))
}

/// A claim may be without a volume for so long before a person is told.
pub const BINDING: Duration = Duration::from_secs(30);
/// Longest and shortest wait for the next look.
const LOOKS: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(1));

/// How long a claim has been without a volume; none if it has one.
pub fn unbound_for(seen: &Observed, claim: &ClaimSeen) -> Option<Duration> {
    let age = || Duration::try_from(seen.now.duration_since(claim.created?)).ok();
    (!claim.bound).then(|| age().unwrap_or_default())
}

/// To those that wait for a volume nothing need ever happen: looks again when a person has to be told, then later and later: twice the age each time, to a bound.
pub(super) fn look_again(seen: &Observed, book: &[SeatEntry], recheck: &mut Option<Duration>) {
    let (longest, shortest) = LOOKS;
    for entry in book.iter().filter(|entry| !entry.leaving) {
        let starts = |entry: &SeatEntry| {
            seen.pods
                .get(&entry.name)
                .is_some_and(|pod| pod.phase == PodPhase::Pending)
        };
        let claims = seen.claims.values().filter(|claim| claim.seat == entry.name);
        let waits = claims.filter_map(|claim| unbound_for(seen, claim));
        if let Some(age) = waits.max().filter(|_| starts(entry)) {
            let next = BINDING.checked_sub(age).filter(|left| !left.is_zero()).unwrap_or(age);
            sooner(recheck, next.clamp(shortest, longest));
        }
    }
}
