//! The guest shall run: seats, Lease, requests, replacement.

use std::time::Duration;

use ftvm_crds::names::{nodes_text, seat_name};
use ftvm_crds::seat::{Order, SeatPublished, SeatRequest, SeatRole};
use ftvm_crds::{ChosenCpu, CpuBaseline, STORAGE_FAILED_ON_MAX, SeatEntry, VmPhase};
use ftvm_protocol::record::{Phase, Record};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::loss::give_up_holder;
use super::recreate::recreate;
use super::spare::{is_spare, never_ran};
use super::words::{self, are_told, await_assurance, await_words, is_assured};
use super::{
    Action, Decision, Held, SEATS, Trouble, asked, claim_trouble, claims, former, holder, is_genesis, is_named,
    lease_is_strange, pod, record, says_active, seat_id, trouble,
};
use crate::cpu::{self, Choice};
use crate::observe::{Observed, PodPhase, PodSeen};
use crate::status::CPU_CHOSEN;

/// Between two attempts at what a seat refuses: at first, and at most.
const AGAIN_SECONDS: (i64, i64) = (5, 600);
/// Between the id of a request and number and time of an attempt.
const ATTEMPT: char = '~';
/// A guest that powered itself off is started again after this time.
const RESTART_AFTER: Duration = Duration::from_secs(10);
/// So long it is waited for nodes that offer seats to publish their CPU, and for a second node.
const NODES_WAIT: Duration = Duration::from_secs(30);
/// A pod that failed is made again after this time, doubled for each earlier one.
const REMAKE_AFTER_SECONDS: i64 = 5;

pub(super) fn run(seen: &Observed, decision: &mut Decision) {
    if lease_is_strange(seen) {
        // An intact pair goes on by itself. Beyond making anew what is gone, it is a person's to decide.
        asked::refuse_failover(seen, decision);
        return recreate(seen, decision);
    }
    let found = record(seen).map(|record| record.snapshot.record.clone());
    // A record whose holder is in no entry was written by a hand, or by another release: nobody knows what may go.
    if let Some(record) = found.as_ref().filter(|record| is_known(&decision.book, record)) {
        give_up(seen, record, decision);
        remove_leaving(seen, record, decision);
    }
    enter_seats(seen, found.as_ref(), decision);
    choose_cpu(seen, found.as_ref(), decision);
    make_seats(seen, found.as_ref(), decision);
    claims::look_again(seen, &decision.book, &mut decision.recheck);
    match &found {
        None => create_lease(seen, decision),
        Some(record) => {
            former::look_again(seen, record, &decision.book, &mut decision.recheck);
            tell_nodes(seen, decision);
            if never_ran(seen, record, &decision.book) {
                follow_original(seen, record, decision);
            }
            requests(seen, record, decision);
        }
    }
}

/// Is the record's holder one of these seats, or did no guest run yet?
pub fn is_known(book: &[SeatEntry], record: &Record) -> bool {
    is_genesis(record) || holder(book, record).is_some()
}

/// Marks a seat that was in trouble for long while the other one is alone, if the holder's daemon says only now that it is; forgets troubles that ended.
fn give_up(seen: &Observed, record: &Record, decision: &mut Decision) {
    let genesis = never_ran(seen, record, &decision.book);
    let alone = record.members.iter().count() == 1;
    if !alone {
        decision.replacements = 0;
        decision.storage_failed_on.clear();
    }
    let runs = guest_runs(seen, record, &decision.book);
    let spare = is_spare(seen, record, &decision.book);
    let holder_fails = trouble::holder_fails(seen, record, &decision.book);
    let (told, mut waits) = (are_told(seen, record, &decision.book), false);
    let mut wanted = None;
    let mut leaving = decision.book.iter().any(|entry| entry.leaving);
    let replacements = decision.replacements;
    let book = decision.book.clone();
    let cpu = cpu::chosen(&seen.vm).filter(|_| genesis);
    for entry in &mut decision.book {
        let named = is_named(entry, record) && !genesis;
        // Or is not known to be of no use: while it leaves nobody could go on with what it has, nor without it.
        if entry.leaving && (named || !spare) {
            entry.leaving = false;
        }
        if entry.leaving {
            continue;
        }
        let gone = entry.pod_uid.is_none() && !entry.former.is_empty();
        if genesis && (gone || cpu.as_ref().is_some_and(|cpu| is_unfit(seen, entry, cpu))) {
            // No guest ever ran. The record names a pod that is gone: begin anew instead of guessing what its disks hold. Or the pod
            // was placed before the CPU was chosen, where no engine can have it.
            waits = true;
            entry.leaving = told && !leaving;
            leaving |= told;
            continue;
        }
        let trouble = (alone && !named).then(|| super::trouble(seen, entry)).flatten();
        // While no guest runs there is nothing to join.
        let idle = |trouble: &Trouble| matches!(trouble, Trouble::Storage | Trouble::NoEngine | Trouble::Slow);
        let trouble = trouble.filter(|trouble| runs || !idle(trouble));
        let trouble = trouble.filter(|trouble| !holder_fails || *trouble != Trouble::Storage);
        // As long as no other node could have it nothing counts: what keeps it from joining later is another loss.
        let trouble = trouble.filter(|trouble| genesis || helps(seen, &book, entry, trouble));
        let patience = trouble
            .as_ref()
            .and_then(|trouble| trouble::patience(seen, trouble, replacements));
        let Some(patience) = patience else {
            entry.lost_since = None;
            continue;
        };
        let since = lost_since(seen, entry, trouble.as_ref());
        entry.lost_since = Some(Time(since));
        let lost = Duration::try_from(seen.now.duration_since(since)).unwrap_or_default();
        let left = patience.saturating_sub(lost).max(words::left(seen, patience));
        waits = true;
        if !left.is_zero() {
            sooner(&mut decision.recheck, left);
        } else if told && !leaving && spare {
            if genesis || is_assured(seen, record, &book, entry) {
                (entry.leaving, leaving) = (true, true);
                if trouble::is_of_storage(seen, entry, trouble.as_ref()) {
                    note_storage(&mut decision.storage_failed_on, entry.node.as_ref());
                }
            } else {
                wanted = Some(entry.clone());
            }
        }
    }
    if let Some(entry) = wanted {
        await_assurance(seen, record, &entry, decision);
    }
    if genesis && !has_original(seen, record, &decision.book) {
        // Disks of seats that were not the original are made to get everything by replication: no guest can begin there.
        for entry in decision.book.iter_mut().filter(|entry| was_admitted(entry)) {
            waits = true;
            entry.leaving |= told;
        }
    }
    if waits && !told {
        await_words(seen, record, decision);
    }
}

/// The storage of this node failed last: another seat goes elsewhere while there is another place.
fn note_storage(failed_on: &mut Vec<String>, node: Option<&String>) {
    let Some(node) = node else { return };
    failed_on.retain(|known| known != node);
    failed_on.push(node.clone());
    let surplus = failed_on.len().saturating_sub(STORAGE_FAILED_ON_MAX);
    failed_on.drain(..surplus);
}

/// Would another seat be better off? Where no other node could have it, its disks are kept: its node may come back, or its storage be mended, and the seat
/// joins by itself then. (Where its storage can't be had from another node, another claim there would mostly be of the same.)
fn helps(seen: &Observed, book: &[SeatEntry], entry: &SeatEntry, trouble: &Trouble) -> bool {
    let of_node = matches!(trouble, Trouble::Node | Trouble::Bound | Trouble::Storage);
    !of_node || claim_trouble(seen, entry).is_some() || cpu::has_other_place(seen, book, entry)
}

/// While no guest ran: is the pod there that the record names, of a seat that stays?
fn has_original(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    let original = record.holder.seat.to_string();
    let mut pods = book
        .iter()
        .filter(|entry| !entry.leaving)
        .filter_map(|entry| seen.pods.get(&entry.name));
    pods.any(|pod| pod.uid == original)
}

/// May a daemon have taken a pod of this seat for one? Its disks are what they were prepared for then.
fn was_admitted(entry: &SeatEntry) -> bool {
    entry.pod_uid.is_some() || !entry.former.is_empty()
}

/// Since when the seat has been in trouble. One that runs without an engine could not have had any before its container started: images
/// and volumes have their own, longer, time.
fn lost_since(seen: &Observed, entry: &SeatEntry, trouble: Option<&Trouble>) -> Timestamp {
    let now = whole_seconds(seen.now).0;
    let since = entry.lost_since.as_ref().map_or(now, |since| since.0);
    let started = pod(seen, entry).and_then(|pod| pod.first_start);
    // By the node's clock: one that is ahead says nothing.
    let of_engine = matches!(trouble, Some(Trouble::NoEngine | Trouble::Storage));
    let started = started.filter(|started| *started <= now && of_engine);
    started.map_or(since, |started| since.max(started))
}

/// Is the seat's pod on a node that can't give this CPU?
fn is_unfit(seen: &Observed, entry: &SeatEntry, cpu: &ftvm_cpu::CpuBaseline) -> bool {
    let node = pod(seen, entry).and_then(|pod| seen.nodes.get(pod.node.as_deref()?));
    node.is_some_and(|node| cpu::lacks(node, cpu).is_some())
}

/// Takes away what a leaving seat has, then the seat.
fn remove_leaving(seen: &Observed, record: &Record, decision: &mut Decision) {
    let genesis = never_ran(seen, record, &decision.book);
    let leaving = decision.book.iter().find(|entry| entry.leaving).cloned();
    let spare = is_spare(seen, record, &decision.book);
    let Some(entry) = leaving.filter(|entry| genesis || spare && !is_named(entry, record)) else {
        return;
    };
    if !are_told(seen, record, &decision.book) {
        return await_words(seen, record, decision);
    }
    let mut steps = Vec::new();
    let done = remove_seat(seen, &entry, &mut steps);
    if !steps.is_empty() && !genesis && !is_assured(seen, record, &decision.book, &entry) {
        return await_assurance(seen, record, &entry, decision);
    }
    decision.actions.append(&mut steps);
    if done {
        decision.book.retain(|other| other.name != entry.name);
        decision.replacements += 1;
    }
}

/// As a status keeps it.
pub(super) fn whole_seconds(now: Timestamp) -> Time {
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

fn guest_runs(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    holder(book, record).is_some_and(|entry| says_active(seen, entry))
}

/// One step of a seat's removal; true once nothing is left to do.
pub(super) fn remove_seat(seen: &Observed, entry: &SeatEntry, actions: &mut Vec<Action>) -> bool {
    if let Some(pod) = seen.pods.get(&entry.name) {
        delete_pod(seen, entry, pod, true, actions);
        return false;
    }
    let claims = seen.claims.iter().filter(|(_, claim)| claim.seat == entry.name);
    let mut done = true;
    for (name, claim) in claims {
        if !claim.deleting {
            done = false;
            actions.push(Action::DeleteClaim {
                claim: name.clone(),
                uid: claim.uid.clone(),
            });
        }
    }
    done
}

/// Deletes a pod once; by force if its node can't do it and the caller says that this is proven harmless.
pub(super) fn delete_pod(
    seen: &Observed,
    entry: &SeatEntry,
    pod: &PodSeen,
    may_force: bool,
    actions: &mut Vec<Action>,
) {
    let unreachable = pod.node.as_deref().is_some_and(|node| !seen.node_ready(node));
    let force = may_force && unreachable;
    if !pod.deleting || force {
        actions.push(Action::DeletePod {
            seat: entry.name.clone(),
            uid: pod.uid.clone(),
            version: pod.version.clone(),
            force,
        });
    }
}

fn enter_seats(seen: &Observed, record: Option<&Record>, decision: &mut Decision) {
    let vm = seen.vm.name_any();
    // A seat that leaves counts: never more than two.
    let protected = record.is_some_and(|record| record.members.iter().count() > 1);
    for draw in seen.draws {
        if decision.book.len() >= SEATS || protected {
            break;
        }
        let name = seat_name(&vm, draw);
        let taken = decision.book.iter().any(|entry| entry.name == name);
        if taken || seen.pods.contains_key(&name) || seen.claims.values().any(|claim| claim.seat == name) {
            continue;
        }
        let slot = u8::from(decision.book.iter().any(|entry| entry.slot == 0));
        decision.book.push(SeatEntry {
            name,
            slot,
            ..SeatEntry::default()
        });
    }
}

/// What the guest's CPU is, before any of its seats' engines runs: daemons start none without it. Kept until the VM is halted.
fn choose_cpu(seen: &Observed, record: Option<&Record>, decision: &mut Decision) {
    if seen.vm.spec.machine.cpu_baseline == CpuBaseline::Host || decision.cpu.as_ref().is_some_and(|cpu| !cpu.former) {
        return;
    }
    let ran = record.is_some_and(|record| !is_genesis(record));
    if ran && decision.book.iter().any(|entry| entry.pod_uid.is_some()) {
        let why = "that of the node where the guest started: no CPU had been chosen then; halt and start the VM to choose one";
        decision.cpu = Some(ChosenCpu {
            source: CpuBaseline::Host,
            baseline: None,
            why: why.to_owned(),
            former: false,
        });
        return;
    }
    let hold = |reason, message| Some(Held { reason, message });
    match cpu::choose(seen) {
        Choice::Common(chosen) => decision.cpu = Some(chosen),
        Choice::Early { why, then } => match NODES_WAIT.checked_sub(waited_for_nodes(seen)) {
            Some(rest) if !rest.is_zero() => {
                sooner(&mut decision.recheck, rest);
                decision.held = hold("WaitsForNodes", why);
            }
            _ => decision.cpu = Some(then),
        },
        Choice::Unlike(why) => decision.held = hold("NoCommonCpu", why),
        // As without a CPU to choose: the pods say what they wait for.
        Choice::Nobody => {}
    }
}

/// How long no CPU could be chosen.
fn waited_for_nodes(seen: &Observed) -> Duration {
    let status = seen.status();
    let since = status
        .condition(CPU_CHOSEN)
        .filter(|condition| condition.status == "False");
    let waited = since.map_or(Duration::ZERO, |condition| {
        Duration::try_from(seen.now.duration_since(condition.last_transition_time.0)).unwrap_or_default()
    });
    // That time may be of a backup.
    let first = seen.first_look.as_ref();
    first.map_or(waited, |first| waited.min(first.age))
}

/// The seats that stay, in the order in which they are made: whoever has the guest's state comes first, for what is left of a quota may be
/// enough for one.
fn by_need<'a>(book: &'a [SeatEntry], record: Option<&Record>) -> Vec<&'a SeatEntry> {
    let holder = record.and_then(|record| holder(book, record));
    let mut seats: Vec<_> = book.iter().filter(|entry| !entry.leaving).collect();
    seats.sort_by_key(|entry| {
        let holds = holder.is_some_and(|holder| holder.name == entry.name);
        let named = record.is_some_and(|record| is_named(entry, record));
        (!holds, !named)
    });
    seats
}

/// Claims, pods, admission.
fn make_seats(seen: &Observed, record: Option<&Record>, decision: &mut Decision) {
    // Whoever is admitted prepares its disks by what the record says then.
    let follows = record
        .is_some_and(|record| never_ran(seen, record, &decision.book) && !has_original(seen, record, &decision.book));
    for entry in by_need(&decision.book, record) {
        let seat = entry.name.clone();
        let made = seen.pods.get(&entry.name);
        // The API server lets a claim go that somebody deletes under a pod without a node.
        let unplaced = made.is_none_or(|pod| pod.node.is_none() && pod.phase == PodPhase::Pending && !pod.deleting);
        if unplaced && decision.held.is_none() {
            let disks = claims::to_make(seen, entry);
            if !disks.is_empty() {
                let seat = seat.clone();
                decision.actions.push(Action::CreateClaims { seat, disks });
            }
        }
        let keeps = record.is_some_and(|record| claims::goes_with_pod(seen, entry, record).is_some());
        match made {
            None if decision.held.is_some() => {}
            // A pod could not be placed, and would keep no claim from going.
            None if claim_trouble(seen, entry).is_some() => {}
            None => decision.actions.push(Action::CreatePod { seat }),
            // A disk would go with it.
            Some(pod) if pod.phase == PodPhase::Finished && keeps => {}
            Some(pod) if pod.phase == PodPhase::Finished => {
                let wait = REMAKE_AFTER_SECONDS << entry.former.len().min(6);
                let age = pod
                    .created
                    .map_or(i64::MAX, |created| seen.now.duration_since(created).as_secs());
                if age >= wait {
                    delete_pod(seen, entry, pod, false, &mut decision.actions);
                } else {
                    sooner(&mut decision.recheck, Duration::from_secs((wait - age).unsigned_abs()));
                }
            }
            Some(pod) if entry.pod_uid.is_none() && !pod.deleting && !follows => {
                decision.actions.push(Action::Admit {
                    seat,
                    uid: pod.uid.clone(),
                });
            }
            Some(_) => {}
        }
    }
}

/// Is it bound to a node that is ready, and does it stay? A guest can begin there.
fn is_placed(seen: &Observed, pod: &PodSeen) -> bool {
    let ready = pod.node.as_deref().is_some_and(|node| seen.node_ready(node));
    ready && !pod.deleting && pod.phase != PodPhase::Finished
}

/// The first seat that a node has taken has the original disks: a pod that no node can take would keep the guest from starting.
fn create_lease(seen: &Observed, decision: &mut Decision) {
    let stay = || decision.book.iter().filter(|entry| !entry.leaving);
    let placed = stay().find(|entry| pod(seen, entry).is_some_and(|pod| is_placed(seen, pod)));
    // Or one that has to be replaced, which needs a record.
    let lost = |entry: &&SeatEntry| matches!(super::trouble(seen, entry), Some(Trouble::Node | Trouble::Bound));
    if let Some(entry) = placed.or_else(|| stay().find(lost))
        && let Some(id) = seat_id(entry)
    {
        decision.actions.push(Action::CreateLease {
            original: id,
            node: entry.node.clone().unwrap_or_default(),
        });
    }
}

/// No guest ran yet, and the original is gone: the record follows a seat that was entered since, once a node has taken its pod and
/// before that is admitted.
fn follow_original(seen: &Observed, record: &Record, decision: &mut Decision) {
    let book = &decision.book;
    if has_original(seen, record, book) || book.iter().any(|entry| entry.leaving || was_admitted(entry)) {
        return;
    }
    let pods = book.iter().filter_map(|entry| seen.pods.get(&entry.name));
    let mut placed = pods.filter(|pod| is_placed(seen, pod));
    let Some(original) = placed.find_map(|pod| pod.uid.parse().ok()) else {
        return;
    };
    if are_told(seen, record, &decision.book) {
        decision.actions.push(Action::RewriteGenesis { original });
    } else {
        await_words(seen, record, decision);
    }
}

fn tell_nodes(seen: &Observed, decision: &mut Decision) {
    let stay = decision.book.iter().filter(|entry| !entry.leaving);
    let nodes = nodes_text(stay.filter_map(|entry| entry.node.as_deref()));
    // Nodes of pods that are gone may stay named until others are known: a swap must not fail for that.
    if !nodes.is_empty() && record(seen).is_some_and(|record| record.nodes != nodes) {
        decision.actions.push(Action::SetLeaseNodes { nodes });
    }
}

fn requests(seen: &Observed, record: &Record, decision: &mut Decision) {
    if give_up_holder(seen, record, decision) {
        return asked::come_to_an_end(seen, decision);
    }
    if record.phase == Phase::Stopped {
        start(seen, record, decision);
        return asked::come_to_an_end(seen, decision);
    }
    asked::follow(seen, record, decision);
}

/// Starts over a Stopped record: at once if the user wants it, after a while if the guest powered itself off.
fn start(seen: &Observed, record: &Record, decision: &mut Decision) {
    let was_running = matches!(
        seen.status().phase,
        Some(VmPhase::Running | VmPhase::Paused | VmPhase::Stopping)
    );
    let renewed = super::record(seen).and_then(|record| record.renewed);
    // By the clock of the node whose daemon wrote it: one that is ahead says nothing.
    let age = renewed.map(|time| Duration::try_from(seen.now.duration_since(time)).unwrap_or(RESTART_AFTER));
    if let Some(age) = age
        && was_running
        && age < RESTART_AFTER
    {
        return sooner(&mut decision.recheck, RESTART_AFTER - age);
    }
    if !are_told(seen, record, &decision.book) {
        return await_words(seen, record, decision);
    }
    let id = format!("start-{}", record.term);
    let order = Order::Start {
        over_stopped_term: record.term,
    };
    let named: Vec<_> = decision
        .book
        .iter()
        .filter(|entry| is_named(entry, record))
        .cloned()
        .collect();
    for entry in named {
        ask_until_done(seen, &entry, &id, &order, decision);
    }
}

/// Is the second one the id of an attempt at what the first one names?
pub(super) fn is_attempt(id: &str, other: &str) -> bool {
    attempt(id, other).is_some()
}

/// Number and time of an attempt at what `id` names.
fn attempt(id: &str, other: &str) -> Option<(u32, i64)> {
    let (number, at) = other.strip_prefix(id)?.strip_prefix(ATTEMPT)?.split_once('-')?;
    Some((number.parse().ok()?, at.parse().ok()?))
}

/// Its engine has no guest, and waits for its turn or for a leader.
pub(super) fn is_starting(pod: &PodSeen) -> bool {
    let role = |published: &SeatPublished| published.role == Some(SeatRole::Starting);
    pod.told().is_some_and(role)
}

/// How often it was asked again.
pub(super) fn attempts(seen: &Observed, entry: &SeatEntry, id: &str) -> u32 {
    let asked = pod(seen, entry).and_then(|pod| pod.request.as_ref());
    asked
        .and_then(|asked| attempt(id, &asked.id))
        .map_or(0, |(number, _)| number)
}

/// Asks a seat for what is done once, however often it is asked for: again and again, later and later, while it refuses, or waits with an engine that may
/// not have been told (its predecessor was). An id is used up, so each attempt has one of its own.
pub(super) fn ask_until_done(seen: &Observed, entry: &SeatEntry, id: &str, order: &Order, decision: &mut Decision) {
    let Some(pod) = pod(seen, entry) else { return };
    let now = seen.now.as_second();
    let last = pod
        .request
        .as_ref()
        .and_then(|asked| Some((asked, attempt(id, &asked.id)?)));
    let number = match last {
        None => 0,
        Some((asked, (number, at))) => {
            let Some(done) = pod.last_answer().filter(|done| done.id == asked.id) else {
                return;
            };
            if done.refused.is_none() && !is_starting(pod) {
                return;
            }
            let rest = at + (AGAIN_SECONDS.0 << number.min(16)).min(AGAIN_SECONDS.1) - now;
            // A clock that was set back ends no wait late.
            if rest > 0 && at <= now {
                return sooner(&mut decision.recheck, Duration::from_secs(rest.unsigned_abs()));
            }
            number.saturating_add(1)
        }
    };
    let id = format!("{id}{ATTEMPT}{number}-{now}");
    let request = SeatRequest {
        id,
        order: order.clone(),
        until_unix_ms: None,
    };
    ask(seen, entry, &request, &mut decision.actions);
}

fn was_asked(seen: &Observed, entry: &SeatEntry, id: &str) -> bool {
    pod(seen, entry).is_some_and(|pod| pod.request.as_ref().is_some_and(|request| request.id == id))
}

/// Asks a seat, unless it was asked or has answered already.
pub(super) fn ask(seen: &Observed, entry: &SeatEntry, request: &SeatRequest, actions: &mut Vec<Action>) {
    let Some(pod) = pod(seen, entry) else {
        return;
    };
    if was_asked(seen, entry, &request.id) || pod.last_answer().is_some_and(|done| done.id == request.id) {
        return;
    }
    actions.push(Action::Request {
        seat: entry.name.clone(),
        uid: pod.uid.clone(),
        request: request.clone(),
    });
}

pub(super) fn sooner(recheck: &mut Option<Duration>, after: Duration) {
    let after = after.max(Duration::from_millis(100));
    *recheck = Some(recheck.map_or(after, |other| other.min(after)));
}
