//! What is wrong with the VM's disks, and what to do.

use std::collections::BTreeSet;

use ftvm_crds::names::{
    ANNOTATION_ACCEPT_DATA_LOSS, ANNOTATION_SWITCHOVER, LABEL_MANAGED_BY, LABEL_SEAT, LABEL_VM, MANAGED_BY,
};
use ftvm_crds::seat::{SeatPublished, SeatRole, StorageKind, StorageTrouble};
use ftvm_crds::{SeatEntry, VolumePolicy};
use ftvm_protocol::record::Record;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::obstacles::{Obstacle, obstacle};
use super::{STORAGE_HEALTHY, Said, said};
use crate::cpu;
use crate::decide::{
    self, ClaimTrouble, Want, claim_trouble, fails_at_every_join, holder, holder_fails, is_genesis, is_heard_of,
    is_named, lease_is_strange, pod, published, says_active, want,
};
use crate::observe::{Observed, PodPhase};

/// Reason of a seat one of whose claims somebody deletes.
pub(super) const CLAIM_BEING_DELETED: &str = "ClaimBeingDeleted";
/// Reason of a seat whose storage has failed.
const DISK_FAILED: &str = "DiskFailed";
/// Reason of a guest that went to the other seat because of its disk.
pub(super) const SWITCHED_OVER: &str = "SwitchedOver";
/// So much of what seats say of their storage stands before what to do.
const WORDS_CHARS_MAX: usize = 400;
/// Reason of a seat that has lost a disk.
const VOLUME_LOST: &str = "VolumeLost";
/// Exit codes that mean a failing disk (`docs/exit-codes.md`).
const STORAGE_CODES: [u8; 2] = [16, 21];
/// How a volume outlives its claim.
const KEEP_VOLUME: &str =
    "(to keep the volume itself, set persistentVolumeReclaimPolicy of its PersistentVolume to Retain)";

/// The condition. What the record's holder says comes first: the guest runs there.
pub(super) fn storage(seen: &Observed, book: &[SeatEntry]) -> Said {
    let mut seats: Vec<_> = book.iter().collect();
    let holder = decide::record(seen).and_then(|record| holder(book, &record.snapshot.record));
    seats.sort_by_key(|entry| holder.is_none_or(|holder| holder.name != entry.name));
    let mut found = seats.into_iter().filter_map(|entry| of_seat(seen, book, entry));
    match claims(seen, book).or_else(|| found.next()) {
        Some(found) => said(STORAGE_HEALTHY, false, found.reason, found.message),
        None => said(STORAGE_HEALTHY, true, "NoFailures", "no seat reports a failing disk"),
    }
}

/// What a seat says of its storage, and what to do about it.
fn of_seat(seen: &Observed, book: &[SeatEntry], entry: &SeatEntry) -> Option<Obstacle> {
    let published = published(seen, entry)?;
    if let Some(found) = fails_again(seen, book, entry) {
        return Some(found);
    }
    let seat = &entry.name;
    let Some(first) = published.storage_troubles.first() else {
        let told = STORAGE_CODES.contains(&published.code);
        return told.then(|| obstacle(DISK_FAILED, format!("seat {seat}: {}", published.why)));
    };
    let (at, what) = (place(entry), words(&published.storage_troubles));
    let holder = decide::record(seen).and_then(|record| holder(book, &record.snapshot.record));
    // What it said last may be old: one whose disk hangs can't end, and says nothing new.
    let leads = holder.is_none_or(|holder| holder.name == *seat);
    if leads && published.role == Some(SeatRole::Active) {
        let then = of_active(seen, entry, published);
        return Some(obstacle(reason(first.kind), format!("{at}: {what}; {then}")));
    }
    let anew = "it is begun anew by itself, and copied. Look at its disks: where they fail again, a seat that the record does not name is replaced";
    let had_guest = published.storage_troubles.iter().any(|trouble| trouble.under_guest);
    let other = book
        .iter()
        .find(|other| other.name != *seat && says_active(seen, other));
    Some(match other.filter(|_| had_guest) {
        Some(other) => {
            let other = place(other);
            obstacle(
                SWITCHED_OVER,
                format!("{at}: {what}; the guest went to {other} for that. As to {seat}, {anew}"),
            )
        }
        None => obstacle(reason(first.kind), format!("{at}: {what}; {anew}")),
    })
}

/// A seat that nobody waits for any more as it is: its storage fails at every join.
pub(super) fn fails_again(seen: &Observed, book: &[SeatEntry], entry: &SeatEntry) -> Option<Obstacle> {
    let record = &decide::record(seen)?.snapshot.record;
    let pod = pod(seen, entry).filter(|pod| !is_named(entry, record) && fails_at_every_join(pod))?;
    let storage = pod.told().map_or(&[][..], |published| &published.storage_troubles);
    let what = match words(storage) {
        words if words.is_empty() => String::new(),
        words => format!("{words}; "),
    };
    let then = if holder_fails(seen, record, book) {
        "disks of the seat that has the guest fail, too, and what is on these may be all that is left, so the seat is kept: mend its volumes, or delete its pod and claims"
    } else if cpu::has_other_place(seen, book, entry) {
        "it is replaced on another node, after spec.faultTolerance.replaceAfterSeconds and later each time"
    } else {
        "no other ready node could have it, so the seat is kept: mend or replace its volumes, or add a node with KVM"
    };
    let failed_on = &seen.status().storage_failed_on;
    let before = if failed_on.is_empty() {
        String::new()
    } else {
        let (nodes, classes) = (failed_on.join(", "), classes(seen, entry.slot));
        format!(". So it was before on nodes {nodes}: look what the volumes of storage class {classes} have in common")
    };
    let reason = storage.first().map_or(DISK_FAILED, |first| reason(first.kind));
    let at = place(entry);
    Some(obstacle(
        reason,
        format!("{at}: {what}its storage fails at every join: {then}{before}"),
    ))
}

fn place(entry: &SeatEntry) -> String {
    let node = entry.node.as_deref().unwrap_or("unknown");
    format!("seat {} on node {node}", entry.name)
}

fn reason(kind: StorageKind) -> &'static str {
    match kind {
        StorageKind::Failed => DISK_FAILED,
        StorageKind::Full => "DiskFull",
        StorageKind::Hangs => "DiskHangs",
    }
}

/// What does not work, how, and since when.
fn words(storage: &[StorageTrouble]) -> String {
    let told = storage.iter().map(|trouble| {
        let seconds = i64::try_from(trouble.since_unix_ms / 1000).ok();
        let since = seconds.and_then(|seconds| Timestamp::from_second(seconds).ok());
        let since = since.map_or_else(|| "a time unknown".to_owned(), |since| since.to_string());
        format!("{} {} since {since} ({})", trouble.part, trouble.kind, trouble.why)
    });
    let told: Vec<String> = told.collect();
    // Whatever a pod says, there is room for what to do, and a terminal shows it as it is.
    let told = told.join(", ");
    let told = told.chars().filter(|c| !c.is_control());
    told.take(WORDS_CHARS_MAX).collect()
}

/// Storage classes of the volumes of a seat in this slot.
fn classes(seen: &Observed, slot: u8) -> String {
    let disks = seen.vm.spec.disks.iter();
    let named = disks.map(|disk| disk.storage_class(slot).unwrap_or("the cluster's default"));
    let named: BTreeSet<&str> = named.collect();
    named.into_iter().collect::<Vec<_>>().join(", ")
}

/// The guest runs there: what becomes of it, and of the disk.
fn of_active(seen: &Observed, entry: &SeatEntry, published: &SeatPublished) -> String {
    let (vm, seat) = (seen.vm.name_any(), &entry.name);
    let goes = if published.protected {
        "the guest goes to the other seat as soon as that can take it, and gets the error if that takes long. Should it stay"
    } else {
        "the guest gets the error until another seat has joined and takes it over. Should it stay then"
    };
    format!(
        "{goes}, hand it over (kubectl annotate ftvm {vm} --overwrite {ANNOTATION_SWITCHOVER}=\"$(date)\"); to replace the volumes, once the other seat is active, delete pod {seat} and its claims"
    )
}

/// Of all seats that of the record's holder comes last: while it has the guest the other one can be replaced.
fn claims(seen: &Observed, book: &[SeatEntry]) -> Option<Obstacle> {
    if want(seen) == Want::Delete && seen.vm.spec.volume_policy == VolumePolicy::Delete {
        return None;
    }
    let holder = decide::record(seen).and_then(|record| holder(book, &record.snapshot.record));
    let mut seats: Vec<_> = book.iter().filter(|entry| !entry.leaving).collect();
    seats.sort_by_key(|entry| holder.is_some_and(|holder| holder.name == entry.name));
    seats.into_iter().find_map(|entry| of_claim(seen, entry))
}

/// What is wrong with a claim of this seat.
pub(super) fn of_claim(seen: &Observed, entry: &SeatEntry) -> Option<Obstacle> {
    let (trouble, claim) = claim_trouble(seen, entry)?;
    let seat = &entry.name;
    let (reason, what) = match trouble {
        ClaimTrouble::Deleting => {
            let what = format!("claim {claim} of seat {seat} is being deleted, which can't be taken back");
            (CLAIM_BEING_DELETED, what)
        }
        ClaimTrouble::Lost => (
            VOLUME_LOST,
            format!("the volume of claim {claim} of seat {seat} is gone"),
        ),
        ClaimTrouble::Gone => (
            VOLUME_LOST,
            format!("claim {claim} of seat {seat} is gone, and no empty disk takes its place"),
        ),
    };
    let advice = advice(seen, entry, trouble);
    Some(obstacle(reason, format!("{what}: {advice}")))
}

fn advice(seen: &Observed, entry: &SeatEntry, trouble: ClaimTrouble) -> String {
    if lease_is_strange(seen) {
        return "what becomes of the seat waits for the VM's Lease, see the condition ArbiterReachable".to_owned();
    }
    let book = seen.status().seats;
    let record = decide::record(seen).map(|record| &record.snapshot.record);
    let named = record.filter(|record| !is_genesis(record) && is_named(entry, record));
    let placed = seen.pods.get(&entry.name).is_some_and(|pod| pod.node.is_some());
    let mut others = book.iter().filter(|other| other.name != entry.name && !other.leaving);
    let runs_elsewhere = others.clone().any(|other| is_heard_of(seen, other));
    match named {
        Some(record) if placed && !runs_elsewhere && is_idle(seen, entry) => {
            let other = others.find(|other| claim_trouble(seen, other).is_none());
            let keep = match trouble {
                ClaimTrouble::Deleting => "set persistentVolumeReclaimPolicy of its PersistentVolume to Retain, ",
                ClaimTrouble::Lost | ClaimTrouble::Gone => "",
            };
            let then = without_pod(seen, entry, record, trouble, other);
            format!("no guest runs: {keep}delete pod {seat}, and then {then}", seat = entry.name)
        }
        Some(record) if placed => with_pod(seen, &book, entry, record),
        Some(record) if !runs_elsewhere => {
            let other = others.find(|other| claim_trouble(seen, other).is_none());
            without_pod(seen, entry, record, trouble, other)
        }
        // It is not named for long, or not at all.
        _ => "the seat is replaced once the other one has the guest and spec.faultTolerance.replaceAfterSeconds have passed; \
              one that was never used gets another claim when this one is gone"
            .to_owned(),
    }
}

/// Has the seat's pod failed, or does nobody say that it has the guest or follows it?
fn is_idle(seen: &Observed, entry: &SeatEntry) -> bool {
    let failed = pod(seen, entry).is_some_and(|pod| pod.phase == PodPhase::Finished);
    failed || !is_heard_of(seen, entry)
}

/// Its pod is on a node, and holds the claim.
fn with_pod(seen: &Observed, book: &[SeatEntry], entry: &SeatEntry, record: &Record) -> String {
    let (vm, seat) = (seen.vm.name_any(), &entry.name);
    let holds = holder(book, record).is_some_and(|holder| holder.name == entry.name);
    if !holds {
        return format!(
            "its copy of the disk goes with pod {seat}: while the guest runs on the other seat delete pod {seat}, the seat is replaced then {KEEP_VOLUME}"
        );
    }
    let mut others = book.iter().filter(|other| other.name != entry.name);
    if others.any(|other| is_named(other, record) && claim_trouble(seen, other).is_none()) {
        return format!(
            "its copy of the disk goes with pod {seat}: switch over (kubectl annotate ftvm {vm} --overwrite {ANNOTATION_SWITCHOVER}=\"$(date)\"), then delete pod {seat}, the seat is replaced then {KEEP_VOLUME}"
        );
    }
    format!(
        "the only whole copy of the disk goes with pod {seat}: keep that pod until the VM is protected by a seat with claims of its own, then switch over, or copy the data out of the guest {KEEP_VOLUME}"
    )
}

/// No pod is on a node, and nobody runs the guest: a person decides.
fn without_pod(
    seen: &Observed,
    entry: &SeatEntry,
    record: &Record,
    trouble: ClaimTrouble,
    other: Option<&SeatEntry>,
) -> String {
    let (vm, seat) = (seen.vm.name_any(), &entry.name);
    let first = match trouble {
        ClaimTrouble::Deleting | ClaimTrouble::Gone => "",
        ClaimTrouble::Lost => "delete it, and ",
    };
    let put_back = format!(
        "{first}put a claim of that name back, over its former volume or a copy of it, with the labels {LABEL_MANAGED_BY}={MANAGED_BY},{LABEL_VM}={vm},{LABEL_SEAT}={seat}"
    );
    let (holder, term) = (record.holder, record.term);
    match other {
        Some(other) => format!(
            "{put_back}; or go on with the disks of seat {} and lose what only seat {seat} has: kubectl annotate ftvm {vm} --overwrite {ANNOTATION_ACCEPT_DATA_LOSS}={holder}@{term}, seat {seat} is replaced then",
            other.name
        ),
        None => format!("{put_back}; no other seat has its disks"),
    }
}

/// What a halt or a deletion waits for.
pub(super) fn holds_up(seen: &Observed, runs: bool, seat: &str, claim: &str) -> String {
    let (vm, meanwhile) = (seen.vm.name_any(), if runs { ", and the guest goes on" } else { "" });
    let waits = format!(
        "; it waits{meanwhile}: claim {claim} of seat {seat} is being deleted, and its copy of the disk goes with pod {seat}"
    );
    match want(seen) {
        Want::Delete => format!(
            "{waits}. To give the disks up set spec.volumePolicy to Delete (kubectl patch ftvm {vm} --type=merge --patch '{{\"spec\":{{\"volumePolicy\":\"Delete\"}}}}'), or delete pod {seat} {KEEP_VOLUME}"
        ),
        Want::Run | Want::Halt => format!(
            "{waits}. Set spec.runStrategy to Always, do what the condition StorageHealthy says, and halt then; or give this copy up and delete pod {seat} {KEEP_VOLUME}"
        ),
    }
}
