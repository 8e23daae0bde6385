//! What a person has to mend before a VM can start or be protected.

use ftvm_crds::SeatEntry;
use ftvm_crds::names::{ANNOTATION_ACCEPT_DATA_LOSS, RESOURCE_SEAT, claim_name};
use ftvm_crds::seat::{SeatPublished, SeatRole};
use ftvm_protocol::identity::Term;
use ftvm_protocol::record::Record;
use kube::ResourceExt;

use super::API_SERVER_REFUSES;
use super::storage::{self, CLAIM_BEING_DELETED};
use crate::cpu;
use crate::decide::{
    ACCEPT_DATA_LOSS, BINDING, OUT_OF_SERVICE, WORD_WITHIN, Want, accepted_loss, anyone_is_heard_of, away,
    goes_with_vm, is_genesis, is_known, is_named, is_old_copy, is_spare, lease_is_strange, needed, pod, proof_may_come,
    record, recreation, says_active, stop_refused, unbound_for, unproven, want, was_newer, word_of,
};
use crate::first_look::TOLD;
use crate::observe::{LeaseSeen, NodeSeen, Observed, PodPhase, PodSeen};

/// Reason of a seat that waits for an image.
const IMAGE_PULL_FAILED: &str = "ImagePullFailed";
/// Reason of a VM whose record names a holder that is none of its seats.
const HOLDER_UNKNOWN: &str = "HolderUnknown";
/// Reason of a VM whose Lease said a later term before.
pub(super) const LEASE_OLDER: &str = "LeaseOlder";
/// A node that nobody can taint.
const MISSING_NODE: &str =
    "its object is gone, make one of that name with the taint: docs/kubernetes.md, \"A node that is lost for good\"";
/// Reason of a seat for which no node is left.
const TOO_FEW_NODES: &str = "TooFewNodes";

/// So much of a pod's trouble, which may be told at any length, stands before the commands, which must not be cut off with the message.
const TROUBLE_CHARS_MAX: usize = 500;

/// Something that a person has to mend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// In one word, for programs.
    pub reason: &'static str,
    /// What, where, why, what to do.
    pub message: String,
}

pub(super) fn obstacle(reason: &'static str, message: impl Into<String>) -> Obstacle {
    Obstacle {
        reason,
        message: message.into(),
    }
}

/// Everything in the way, the most telling first.
pub fn obstacles(seen: &Observed) -> Vec<Obstacle> {
    let mut found = Vec::new();
    match &seen.lease {
        LeaseSeen::Unusable(error) => found.push(obstacle("LeaseUnusable", error.to_string())),
        LeaseSeen::Missing if lease_is_strange(seen) => found.push(obstacle("LeaseGone", lease_gone(seen))),
        _ if lease_is_strange(seen) => found.push(obstacle(
            "LeaseReplaced",
            "the VM's Lease is another object than the operator made: delete it: it is made anew from what the seats know",
        )),
        _ => {}
    }
    found.extend(nobody_boots(seen));
    let book = seen.status().seats;
    if let Some(refused) = &seen.refused {
        let refused = obstacle(refused.reason, refused.message.clone());
        // Where a quota has room for one pod alone it is the other one that is refused.
        let mut stay = book.iter().filter(|entry| !entry.leaving);
        found.push(match stay.find(|entry| !seen.pods.contains_key(&entry.name)) {
            Some(entry) => holds_boot(seen, entry, refused),
            None => refused,
        });
    }
    found.extend(
        book.iter()
            .filter(|entry| !entry.leaving)
            .filter_map(|entry| Some(holds_boot(seen, entry, of_seat(seen, entry)?))),
    );
    found.extend(unproven_end(seen));
    // A guest starts without a second node, unless it waits for a disk: whatever else there is has to be mended before.
    let holds = |found: &Obstacle| found.message.contains(ANNOTATION_ACCEPT_DATA_LOSS);
    found.sort_by_key(|obstacle| obstacle.reason == TOO_FEW_NODES && !holds(obstacle));
    found
}

/// Why a Lease that is gone is not there again, and what to do.
pub(super) fn lease_gone(seen: &Observed) -> String {
    let why = match recreation(seen) {
        Some(Err(why)) => why.to_string(),
        _ => return "the VM's Lease was deleted; its seats agree, and it is made anew now".to_owned(),
    };
    format!(
        "the VM's Lease was deleted, and {why}: a protected pair goes on, a failover is refused, halting and starting wait. It is made anew by itself once the active seat is alone or both seats \
         are connected and agree: bring the other seat's node back, or put a copy of the Lease back (docs/kubernetes.md, \"A Lease that is gone\")"
    )
}

/// The Lease was at a later term already.
pub(super) fn lease_older(seen: &Observed, says: Term) -> String {
    let knew = seen.status().term.unwrap_or_default();
    format!(
        "the VM's Lease says term {says}, and said {knew} before: it is an old copy, from a backup or of a hand. A protected pair goes on, a failover is refused, no seat is replaced. While a seat has \
         the guest, delete the Lease: it is made anew from what the seats know. Else put the last record back (docs/kubernetes.md, \"A Lease that is gone\")"
    )
}

/// The seat waits with a disk that is newer than the record, which does not name it.
fn newer(seen: &Observed, entry: &SeatEntry, published: &SeatPublished) -> Option<Obstacle> {
    let record = &record(seen)?.snapshot.record;
    let waits = published.role == Some(SeatRole::Starting);
    if !waits || published.term <= record.term || is_named(entry, record) {
        return None;
    }
    let seat = &entry.name;
    let message = if anyone_is_heard_of(seen, &seen.status().seats) {
        format!(
            "seat {seat} knows a later term than the record, does not join and is kept: if what its disk has is not wanted, delete pod {seat} and its claims"
        )
    } else {
        let accept = accept_command(seen, record);
        format!(
            "seat {seat} knows a later term than the record, which may be an old copy: put the last record back, or go on with the newest disk ({accept})"
        )
    };
    Some(obstacle("SeatIsNewer", message))
}

/// The command by which a person says that whatever only other seats have may be lost.
fn accept_command(seen: &Observed, record: &Record) -> String {
    let (vm, holder, term) = (seen.vm.name_any(), record.holder, record.term);
    format!("kubectl annotate ftvm {vm} --overwrite {ANNOTATION_ACCEPT_DATA_LOSS}={holder}@{term}")
}

/// What keeps a seat's pod from starting keeps the guest from being booted, too, while nobody has it and nobody else can say what that seat's disk has.
fn holds_boot(seen: &Observed, entry: &SeatEntry, mut found: Obstacle) -> Obstacle {
    let ran = record(seen).filter(|found| !is_genesis(&found.snapshot.record));
    let silent = entry.pod_ip.is_none() && entry.asked_as().next().is_some();
    let told = found.message.contains(ANNOTATION_ACCEPT_DATA_LOSS);
    let (Some(ran), true, false) = (ran, silent && want(seen) == Want::Run, told) else {
        return found;
    };
    if anyone_is_heard_of(seen, &seen.status().seats) {
        return found;
    }
    let record = &ran.snapshot.record;
    let open = entry.former.iter().find(|former| {
        let asked = entry.asked_as().any(|uid| uid == former.uid);
        asked && !former.ended
    });
    let before = match open.and_then(|former| former.node.as_deref()) {
        Some(node) => format!(
            "boot node {node}, or switch it off and say so ({}), for an earlier pod of the seat may run there, and ",
            taint_command(node)
        ),
        None => String::new(),
    };
    let what: String = found.message.chars().take(TROUBLE_CHARS_MAX).collect();
    let (seat, accept) = (&entry.name, accept_command(seen, record));
    found.message = format!(
        "{what}. No guest is booted before it is known what the disk of seat {seat} has; if that is lost for good, {before}accept it ({accept})"
    );
    found
}

/// No guest runs, as far as anybody knows, and no disk may be booted before it is known what became of a seat that whoever boots asks after.
fn nobody_boots(seen: &Observed) -> Option<Obstacle> {
    let found = record(seen).filter(|found| !is_genesis(&found.snapshot.record))?;
    let record = &found.snapshot.record;
    let book = seen.status().seats;
    if want(seen) != Want::Run || anyone_is_heard_of(seen, &book) {
        return None;
    }
    if !is_known(&book, record) {
        let message = format!(
            "the record's holder {} is none of the VM's seats: nothing of them is taken away; put a former copy of the Lease back",
            record.holder
        );
        return Some(obstacle(HOLDER_UNKNOWN, message));
    }
    // A seat that the record does not name, that is of no use any more and that another node could have, is replaced.
    let goes = is_spare(seen, record, &book);
    let stays = |entry: &&SeatEntry| !goes || is_named(entry, record) || !cpu::has_other_place(seen, &book, entry);
    let waits = || book.iter().filter(stays);
    let away = waits().find_map(|entry| Some((entry, gone(seen, entry, record)?, false)));
    let off = || waits().find_map(|entry| Some((entry, off(seen, entry, record)?, true)));
    let Some((entry, node, proven)) = away.or_else(off) else {
        let refused = book.iter().find_map(|entry| loss_refused(seen, entry));
        return refused.or_else(|| loss_waits(seen, &book, record));
    };
    let say = |how: &str| format!("make sure that it is switched off and say so ({how}), and ");
    let say = match (proven, seen.nodes.contains_key(&node)) {
        (true, _) => String::new(),
        (false, true) => say(&taint_command(&node)),
        (false, false) => say(MISSING_NODE),
    };
    let seat = &entry.name;
    let waits = accepted_loss(seen).is_some_and(|accepted| accepted.is_of(record));
    let waits = if waits {
        "; that was accepted, and waits for the former"
    } else {
        ""
    };
    let accept = accept_command(seen, record);
    Some(obstacle(
        "NodeNeeded",
        format!(
            "node {node} is away, and nobody else tells of a running guest: none is started without knowing what seat {seat} has there, where it may run. Bring the node back. \
             If it is lost for good, {say}accept that what only it has is lost ({accept}){waits}"
        ),
    ))
}

/// Nobody has the guest, and of an earlier pod on a node that is ready it is not proven that its engine has ended.
fn unproven_end(seen: &Observed) -> Option<Obstacle> {
    let record = &record(seen)?.snapshot.record;
    let book = seen.status().seats;
    if want(seen) != Want::Run || is_genesis(record) || anyone_is_heard_of(seen, &book) {
        return None;
    }
    let mut open = book.iter().filter_map(|entry| {
        let (former, node, since) = unproven(seen, entry, record)?;
        proof_may_come(seen, former, since)
            .is_none()
            .then_some((entry, former, node))
    });
    let (entry, former, node) = open.next()?;
    let (seat, uid) = (&entry.name, &former.uid);
    let boot = former.boot.as_deref().and_then(|boot| boot.split_once('/'));
    let mend = match boot {
        Some((_, boot)) if !boot.is_empty() => format!("boot node {node}"),
        _ => format!(
            "switch node {node} off, say so ({}), and remove the taint before it is switched on again",
            taint_command(node)
        ),
    };
    let message = format!(
        "it is not proven that an earlier pod of seat {seat} ({uid}, on node {node}) has ended, and no guest is booted before: {mend}"
    );
    Some(obstacle("EndNotProven", message))
}

/// The node of a pod that whoever boots asks after, if it is not there and the pod not proven to have ended.
fn gone(seen: &Observed, entry: &SeatEntry, record: &Record) -> Option<String> {
    needed(seen, entry, record)
        .find(|(_, ended)| !ended)
        .map(|(node, _)| node.to_owned())
}

/// The node of such a pod that has ended, if it is not there, and the seat's present pod has none.
fn off(seen: &Observed, entry: &SeatEntry, record: &Record) -> Option<String> {
    let placed = pod(seen, entry).is_some_and(|pod| pod.node.is_some());
    needed(seen, entry, record)
        .find(|(_, ended)| *ended && !placed)
        .map(|(node, _)| node.to_owned())
}

/// What keeps a VM from being halted or deleted, and a reason if it does not go by itself and nothing else tells it; `runs`: the guest goes on meanwhile.
pub(super) fn holds_up(seen: &Observed, book: &[SeatEntry], runs: bool) -> Option<(Option<&'static str>, String)> {
    let record = &record(seen)?.snapshot.record;
    let wanted = want(seen);
    if wanted != Want::Run {
        if let Some((entry, claim)) = goes_with_vm(seen, book, record) {
            let text = storage::holds_up(seen, runs, &entry.name, claim);
            return Some((Some(CLAIM_BEING_DELETED), text));
        }
        if !is_known(book, record) && !seen.pods.is_empty() {
            return Some((Some(HOLDER_UNKNOWN), unknown_holder(seen, book, record)));
        }
        let unnamed = |entry: &SeatEntry| says_active(seen, entry) && !is_named(entry, record);
        if is_old_copy(seen, record, book) && (was_newer(seen, record) || book.iter().any(unnamed)) {
            let text = "; the VM's Lease is an old copy: delete it, whoever has the guest is stopped by the one that is made anew";
            return Some((Some(LEASE_OLDER), text.to_owned()));
        }
    }
    let mut away = book
        .iter()
        .filter_map(|entry| Some((entry, away(seen, entry, record)?)));
    if let Some((entry, node)) = away.next() {
        let text = format!(
            "; node {node} of seat {} is away: bring it back, or make sure that it is switched off and say so ({})",
            entry.name,
            taint_command(&node)
        );
        return Some((None, text));
    }
    let text = refusal(seen, book, record).filter(|_| wanted != Want::Run)?;
    Some((None, text))
}

/// Nobody can be stopped in the record's name.
fn unknown_holder(seen: &Observed, book: &[SeatEntry], record: &Record) -> String {
    let holder = record.holder;
    let unknown =
        format!("; the record's holder {holder} is none of the VM's seats, so that nobody can be stopped in order");
    if want(seen) != Want::Delete {
        return format!("{unknown}: put a former copy of the Lease back");
    }
    let active = book.iter().find(|entry| says_active(seen, entry));
    let asked = active.map_or_else(String::new, |entry| {
        format!("; seat {}, which says that it is active, is asked to stop", entry.name)
    });
    let refused = refusal(seen, book, record).unwrap_or_default();
    format!(
        "{unknown}{asked}{refused}. Put a former copy of the Lease back, or delete the VM's pods to have it go without a stop"
    )
}

/// What a seat said when it was asked to stop.
fn refusal(seen: &Observed, book: &[SeatEntry], record: &Record) -> Option<String> {
    let (entry, why) = stop_refused(seen, book, record)?;
    let seat = &entry.name;
    Some(format!(
        "; seat {seat} refused to stop: {why}. It is asked again, later and later"
    ))
}

/// The command by which a person says of a node that it is switched off.
fn taint_command(node: &str) -> String {
    format!("kubectl taint node {node} {OUT_OF_SERVICE}=nodeshutdown:NoExecute")
}

/// What a seat refused that was to boot although something may be lost.
fn loss_refused(seen: &Observed, entry: &SeatEntry) -> Option<Obstacle> {
    let done = pod(seen, entry)?.last_answer()?;
    let why = done
        .refused
        .as_ref()
        .filter(|_| done.id.starts_with(ACCEPT_DATA_LOSS))?;
    Some(obstacle(
        "DataLossRefused",
        format!(
            "seat {} does not boot over the loss that was accepted: {why}. It is asked again, later and later",
            entry.name
        ),
    ))
}

/// A loss was accepted, and a seat that may have the newest disk has told nothing yet.
fn loss_waits(seen: &Observed, book: &[SeatEntry], record: &Record) -> Option<Obstacle> {
    accepted_loss(seen).filter(|accepted| accepted.is_of(record))?;
    let seat = &word_of(seen, book)?.name;
    let (seconds, told) = (WORD_WITHIN.as_secs(), TOLD.as_secs());
    Some(obstacle(
        "DataLossWaits",
        format!(
            "a loss was accepted, and seat {seat}, whose disk may be the newest, has not told yet what it has: that is waited for, for {seconds} s at most, and for {told} s after this operator began to lead"
        ),
    ))
}

fn of_seat(seen: &Observed, entry: &SeatEntry) -> Option<Obstacle> {
    // A pod that is on a node, and has or follows the guest, goes on with a claim that is being deleted.
    let goes_on = |pod: &PodSeen| pod.node.is_some() && pod.phase != PodPhase::Finished;
    let placed = seen.pods.get(&entry.name).is_some_and(goes_on);
    if !(placed && anyone_is_heard_of(seen, &seen.status().seats))
        && let Some(found) = storage::of_claim(seen, entry)
    {
        return Some(found);
    }
    let seat = seen.pods.get(&entry.name)?;
    if let Some(node) = &seat.node
        && !seen.node_ready(node)
    {
        let book = seen.status().seats;
        if !cpu::has_other_place(seen, &book, entry) {
            let key = &seen.vm.spec.placement.topology_key;
            let message = format!(
                "node {node} of seat {} is not ready, and no other ready node could have the seat: bring it back, or add a node with KVM, and the guest's CPU, that differs in {key} from that of the other seat; until then the seat and its disks are kept",
                entry.name
            );
            return Some(obstacle(TOO_FEW_NODES, message));
        }
        let message = format!(
            "node {node} of seat {} is not ready: the seat is replaced on another node after spec.faultTolerance.replaceAfterSeconds, unless the record names it",
            entry.name
        );
        return Some(obstacle("NodeNotReady", message));
    }
    if let Some((reason, text)) = &seat.waiting
        && is_image_trouble(reason)
    {
        let why = why_not_pulled(reason, text);
        return Some(obstacle(
            IMAGE_PULL_FAILED,
            format!(
                "seat {}: an image can't be pulled ({why}): correct spec.boot.image, its pullSecret, or the operator's seat image",
                entry.name
            ),
        ));
    }
    if let Some(why) = &seat.unprepared {
        return Some(obstacle(
            "GuestImageNotCopied",
            format!(
                "seat {}: the files of its guest image can't be copied into its pod ({why}, see docs/exit-codes.md): correct spec.boot and spec.disks[].source.image, or make space on its node; it is tried again",
                entry.name
            ),
        ));
    }
    if let Some(why) = &seat.failed {
        return Some(obstacle(
            "SeatFailed",
            format!("pod {} failed ({why}); it is made again", entry.name),
        ));
    }
    if let Some(found) = unbound(seen, entry, seat) {
        return Some(found);
    }
    if let Some(text) = &seat.unschedulable {
        return Some(unschedulable(seen, entry, text));
    }
    if let Some(found) = storage::fails_again(seen, &seen.status().seats, entry) {
        return Some(found);
    }
    let published = pod(seen, entry)?.published.as_ref();
    match published {
        Err(error) => Some(obstacle("SeatStatusUnreadable", format!("pod {}: {error}", entry.name))),
        Ok(published) if published.code != 0 => Some(obstacle(
            "SeatNeedsHelp",
            format!(
                "seat {}: {} (code {}, see docs/exit-codes.md)",
                entry.name, published.why, published.code
            ),
        )),
        Ok(published) => newer(seen, entry, published),
    }
}

/// Reasons of kubelet for a container whose image it does not get (`pkg/kubelet/images/types.go`, and the errors of CRI).
pub(super) const IMAGE_TROUBLES: [&str; 7] = [
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
];

fn is_image_trouble(reason: &str) -> bool {
    IMAGE_TROUBLES.contains(&reason)
}

/// What the last attempt failed with. Between two attempts kubelet says `ImagePullBackOff` and puts words before that: it would be told anew
/// at each of them.
fn why_not_pulled<'a>(reason: &'a str, text: &'a str) -> &'a str {
    let waits = text
        .strip_prefix("Back-off pulling image \"")
        .and_then(|rest| rest.split_once("\": "));
    let Some((_, last)) = waits else {
        return if text.is_empty() { reason } else { text };
    };
    let failed = last.split_once(": ");
    failed.map_or(last, |(word, text)| if is_image_trouble(word) { text } else { last })
}

/// Does a message under the same reason tell nothing new? Each attempt has another port, duration, id of a request or count of what is used,
/// and a status that is written for them brings the next look.
pub(super) fn is_no_news(reason: &str, before: &str, message: &str) -> bool {
    match reason {
        // Of the same seat.
        IMAGE_PULL_FAILED => same_but_for_numbers(before, message, ":"),
        // Of the same kind and name.
        API_SERVER_REFUSES => same_but_for_numbers(before, message, " ("),
        _ => false,
    }
}

/// Are two messages the same before this mark, and alike behind it but for numbers, and words that have some in them or may be such?
fn same_but_for_numbers(one: &str, other: &str, mark: &str) -> bool {
    fn words(text: &str) -> impl Iterator<Item = &str> {
        let words = text.split(|letter: char| !letter.is_alphanumeric());
        words.filter(|word| !word.is_empty() && !is_number(word))
    }
    let head = |text: &str| text.split(mark).next().map(str::to_owned);
    head(one) == head(other) && words(one).eq(words(other))
}

/// A number, a quantity, or a part of an id: hexadecimal digits may all be letters.
fn is_number(word: &str) -> bool {
    let hexadecimal = word.len() >= 4 && word.chars().all(|letter| letter.is_ascii_hexdigit());
    hexadecimal || word.contains(|letter: char| letter.is_ascii_digit())
}

/// A volume that does not come: the class is wrong, or nothing provisions.
fn unbound(seen: &Observed, entry: &SeatEntry, seat: &PodSeen) -> Option<Obstacle> {
    if seat.phase != PodPhase::Pending {
        return None;
    }
    seen.vm.spec.disks.iter().find_map(|disk| {
        let name = claim_name(&entry.name, &disk.name);
        let age = unbound_for(seen, seen.claims.get(&name)?)?;
        let told = seat.unschedulable.as_deref().is_some_and(|text| text.contains("PersistentVolumeClaim"));
        (told || (seat.unschedulable.is_none() && age >= BINDING)).then(|| {
            let class = disk.storage_class(entry.slot).unwrap_or("the cluster's default");
            let field = if disk.storage_class_names.is_empty() {
                "storageClassName"
            } else {
                "storageClassNames"
            };
            let pod = &entry.name;
            obstacle(
                "VolumeNotBound",
                format!(
                    "claim {name} has no volume (storage class: {class}), see `kubectl describe pvc {name}`: mend what provisions for the class; or name a class that provisions in spec.disks[].{field} and delete claim {name} and pod {pod}, which are then made anew"
                ),
            )
        })
    })
}

/// The labels that the seat asks for, if no node that offers seats has them.
fn unmatched(seen: &Observed, entry: &SeatEntry) -> Option<String> {
    let labels = &seen.vm.spec.placement.seats.get(usize::from(entry.slot))?.node_selector;
    let offering = |node: &&NodeSeen| node.seats.max(node.seats_in_all) > 0;
    let mut nodes = seen.nodes.values().filter(offering);
    let text = || {
        labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect::<Vec<_>>()
    };
    (!nodes.any(|node| node.has_labels(labels))).then(|| text().join(", "))
}

fn unschedulable(seen: &Observed, entry: &SeatEntry, text: &str) -> Obstacle {
    let cpu = cpu::unfit(seen);
    let offers = seen.nodes.values().filter(|node| node.ready && node.seats > 0).count();
    let seat = &entry.name;
    if offers == 0 {
        return obstacle(
            "NoKvmNode",
            format!(
                "seat {seat} can't be placed: no ready node offers {RESOURCE_SEAT}: nodes need /dev/kvm and a running ftvm node-daemon, see its log ({text})"
            ),
        );
    }
    if let Some(labels) = unmatched(seen, entry) {
        return obstacle(
            "Unschedulable",
            format!(
                "seat {seat} can't be placed: no node with KVM has the labels {labels}, as spec.placement.seats[{}].nodeSelector asks for: label a node; or correct it and delete pod {seat}, which is then made anew ({text})",
                entry.slot
            ),
        );
    }
    if text.contains("Insufficient memory") {
        let memory = &seen.vm.spec.machine.memory;
        return obstacle(
            "InsufficientMemory",
            format!(
                "seat {seat} can't be placed: no node has {memory} and the engine's overhead free: free memory, add a node, or lower spec.machine.memory while halted ({text})"
            ),
        );
    }
    if text.contains("persistent volumes to bind") {
        return obstacle(
            "NoVolume",
            format!(
                "seat {seat} can't be placed: no node that is left has a free volume for its claims ({text}): add volumes there, or name another class in spec.disks[].storageClassName, or one for each seat in storageClassNames"
            ),
        );
    }
    let key = &seen.vm.spec.placement.topology_key;
    let offering = seen.nodes.iter().filter(|(_, node)| node.ready && node.seats > 0);
    let with_key = offering.filter(|(name, node)| cpu::domain(key, name, node).is_some());
    if with_key.count() < 2 || text.contains("anti-affinity") {
        return obstacle(
            TOO_FEW_NODES,
            format!(
                "seat {seat} can't be placed: two seats need two ready nodes with KVM that have the label {key} and differ in it, and one more to replace a lost one: add a node, or the label ({text}){cpu}"
            ),
        );
    }
    obstacle(
        "Unschedulable",
        format!(
            "seat {seat} can't be placed: {text}: add a node; or relax spec.placement and spec.resources and delete pod {seat}, which is then made anew{cpu}"
        ),
    )
}
