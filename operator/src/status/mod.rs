//! What a person reads: status, conditions, events. Pure functions of what was observed and decided.

mod changes;
mod networks;
mod obstacles;
mod storage;

use std::time::Duration;

use ftvm_crds::quantity::WHOLE_MAX;
use ftvm_crds::seat::{SeatPublished, SeatRole, Takeover};
use ftvm_crds::{CpuBaseline, Failover, FaultTolerantVMStatus, SeatEntry, VmPhase};
use ftvm_protocol::record::Phase;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::decide::{
    self, Decision, Want, anyone_is_heard_of, goes_with_vm, holder, is_genesis, is_named, lease_is_strange, published,
    want, was_newer,
};
use crate::observe::{LeaseSeen, Observed};

pub use changes::{Change, changes, kept};
use networks::networks;
use obstacles::{LEASE_OLDER, holds_up, is_no_news, lease_gone, lease_older};
pub use obstacles::{Obstacle, obstacles};
use storage::storage;

/// The guest runs.
pub const READY: &str = "Ready";
/// A standby would take over.
pub const PROTECTED: &str = "Protected";
/// A seat is being brought up to the other's state.
pub const RESYNCING: &str = "Resyncing";
/// No seat reports a failing disk, and its claims are all there.
pub const STORAGE_HEALTHY: &str = "StorageHealthy";
/// The record can be read and written.
pub const ARBITER_REACHABLE: &str = "ArbiterReachable";
/// The nodes of its seats have two paths that work for each role of a network that is configured.
pub const NETWORKS_REDUNDANT: &str = "NetworksRedundant";
/// The guest's CPU was chosen.
pub const CPU_CHOSEN: &str = "CpuChosen";

/// All conditions.
pub const CONDITIONS: [&str; 7] = [
    READY,
    PROTECTED,
    RESYNCING,
    STORAGE_HEALTHY,
    ARBITER_REACHABLE,
    CPU_CHOSEN,
    NETWORKS_REDUNDANT,
];

/// Reason of a VM for which something can't be made.
pub const API_SERVER_REFUSES: &str = "ApiServerRefuses";
/// Reason of a VM whose seats can't have identities.
pub const AUTHORITY_UNUSABLE: &str = "AuthorityUnusable";

/// Reason of a VM that nobody need protect: no guest runs.
pub const NOT_RUNNING: &str = "NotRunning";
/// Reason of a guest that stands still until a standby has joined.
const PAUSED: &str = "Paused";

/// Clocks of nodes, and of the operator's, that are right differ by less.
const AHEAD_MAX: SignedDuration = SignedDuration::from_secs(60);
/// What lies further ahead is looked at again after this time: shortest and longest.
const AHEAD_LOOKS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));

/// Longest message of a condition.
const MESSAGE_LENGTH_MAX: usize = 1024;

/// A condition before it has a time.
struct Said {
    kind: &'static str,
    holds: Option<bool>,
    reason: String,
    message: String,
}

fn said(kind: &'static str, holds: bool, reason: &str, message: impl Into<String>) -> Said {
    Said {
        kind,
        holds: Some(holds),
        reason: reason.to_owned(),
        message: message.into(),
    }
}

/// What the roles are, as far as record and daemons tell.
struct Roles<'a> {
    active: Option<&'a SeatEntry>,
    standby: Option<&'a SeatEntry>,
    /// Of the active.
    published: Option<&'a SeatPublished>,
}

fn roles<'a>(seen: &'a Observed, book: &'a [SeatEntry]) -> Roles<'a> {
    let record = decide::record(seen).map(|record| &record.snapshot.record);
    let record = record.filter(|record| record.phase == Phase::Running && !is_genesis(record));
    let active = record.and_then(|record| holder(book, record));
    let published = active.and_then(|entry| published(seen, entry));
    // What was said last from a node that is gone says nothing of now.
    let published = published.filter(|_| anyone_is_heard_of(seen, book));
    let standby = record.and_then(|record| {
        book.iter().find(|entry| {
            Some(entry.name.as_str()) != active.map(|active| active.name.as_str()) && is_named(entry, record)
        })
    });
    Roles {
        active,
        standby,
        published,
    }
}

/// The status as it should be.
pub fn status(seen: &Observed, decision: &Decision) -> FaultTolerantVMStatus {
    let old = seen.status();
    let book = &decision.book;
    let roles = roles(seen, book);
    let protected = is_protected(&roles);
    let phase = phase(seen, decision, &roles);
    let joining = book.iter().filter_map(|entry| resync(seen, entry)).next();
    let conditions = [
        ready(seen, decision, phase, &roles),
        protection(seen, decision, phase, &roles),
        resyncing(joining),
        storage(seen, book),
        arbiter(seen, book, decision.lease_uid.as_ref()),
        cpu_chosen(seen, decision),
        networks(seen, book),
    ];
    let conditions = conditions.map(|said| condition(said, &old, seen));
    FaultTolerantVMStatus {
        observed_generation: seen.vm.metadata.generation,
        phase: Some(phase),
        active: roles.active.and_then(|entry| entry.node.clone()),
        standby: roles.standby.filter(|_| protected).and_then(|entry| entry.node.clone()),
        mode: Some(seen.vm.spec.fault_tolerance.mode),
        term: decide::record(seen)
            // Of a successor by which not every seat goes nothing is kept: there may be another one yet.
            .filter(|record| decision.lease_uid == Some(record.snapshot.uid.to_string()))
            .map(|record| record.snapshot.record.term.min(WHOLE_MAX))
            // That the record was put back to an earlier one is to be seen for good.
            .max(old.term),
        interval_ms: roles.published.and_then(|published| published.interval_ms),
        lag_ms: roles.published.and_then(|published| published.lag_ms),
        resync_percent: joining,
        seats: book.clone(),
        replacements: decision.replacements,
        storage_failed_on: decision.storage_failed_on.clone(),
        lease_uid: decision.lease_uid.clone(),
        cpu: decision.cpu.clone(),
        last_failover: failover(seen, book).or(old.last_failover.clone()),
        switchover: decision.switchover.clone(),
        failover: decision.failover.clone(),
        conditions: conditions.to_vec(),
    }
}

/// Does the guest run, whatever is wanted?
fn guest_runs(roles: &Roles<'_>) -> bool {
    roles
        .published
        .is_some_and(|published| published.role == Some(SeatRole::Active))
}

/// Does a halt or a deletion wait, for as long as a person likes, while the guest runs? It is to be protected as before.
fn goes_on(seen: &Observed, book: &[SeatEntry], roles: &Roles<'_>) -> bool {
    let record = decide::record(seen).map(|record| &record.snapshot.record);
    guest_runs(roles) && record.is_some_and(|record| goes_with_vm(seen, book, record).is_some())
}

fn is_protected(roles: &Roles<'_>) -> bool {
    roles.standby.is_some() && roles.published.is_some_and(|published| published.protected)
}

fn phase(seen: &Observed, decision: &Decision, roles: &Roles<'_>) -> VmPhase {
    match want(seen) {
        Want::Delete => VmPhase::Deleting,
        Want::Halt if decision.at_rest => VmPhase::Halted,
        Want::Halt => VmPhase::Stopping,
        Want::Run => {
            let runs = guest_runs(roles);
            let stopped = decide::record(seen).is_some_and(|record| record.snapshot.record.phase == Phase::Stopped);
            let before = seen.status().phase;
            let paused = roles.published.is_some_and(|published| published.paused);
            if runs {
                if paused { VmPhase::Paused } else { VmPhase::Running }
            } else if stopped && matches!(before, Some(VmPhase::Running | VmPhase::Paused | VmPhase::Stopping)) {
                VmPhase::Stopping
            } else {
                VmPhase::Starting
            }
        }
    }
}

/// Progress of a seat that joins or prepares its disks.
fn resync(seen: &Observed, entry: &SeatEntry) -> Option<u8> {
    let published = published(seen, entry)?;
    let percent = published.resync_percent.map(|percent| percent.min(100));
    percent.or((published.role == Some(SeatRole::Joining)).then_some(0))
}

/// What a seat without an engine says of its disks.
fn preparing<'a>(seen: &'a Observed, entry: &SeatEntry) -> Option<&'a str> {
    let published = published(seen, entry)?;
    let engine = published.incarnation.is_some() || published.role.is_some();
    Some(published.why.as_str()).filter(|why| !engine && !why.is_empty())
}

/// What an engine or a program says of why it does not go on: while nobody has the guest, that of any seat.
fn why(seen: &Observed, book: &[SeatEntry], roles: &Roles<'_>) -> Option<String> {
    if let Some(published) = roles.published {
        return Some(published.why.clone()).filter(|why| !why.is_empty());
    }
    book.iter().find_map(|entry| {
        let published = published(seen, entry)?;
        let why = Some(published.why.as_str()).filter(|why| !why.is_empty())?;
        Some(format!("seat {}: {why}", entry.name))
    })
}

/// What a person has to mend first.
fn obstacle(seen: &Observed, decision: &Decision) -> Option<Obstacle> {
    let held = decision.held.as_ref().or(decision.silent.as_ref());
    let held = held.map(|held| Obstacle {
        reason: held.reason,
        message: held.message.clone(),
    });
    held.or_else(|| obstacles(seen).into_iter().next())
}

fn ready(seen: &Observed, decision: &Decision, phase: VmPhase, roles: &Roles<'_>) -> Said {
    match phase {
        VmPhase::Running => said(READY, true, "GuestRuns", "the guest runs"),
        VmPhase::Paused => said(
            READY,
            false,
            PAUSED,
            "the guest stands still until a standby has joined, as spec.faultTolerance.whenUnprotected asks for; \
             the condition Protected says what is missing",
        ),
        VmPhase::Halted => said(
            READY,
            false,
            "Halted",
            "the VM is halted: set spec.runStrategy to Always to start it",
        ),
        VmPhase::Deleting | VmPhase::Stopping => {
            let (reason, doing) = match phase {
                VmPhase::Deleting => ("Deleting", "the VM is being deleted"),
                _ => ("Stopping", "the guest is being stopped"),
            };
            let (own, waits) = holds_up(seen, &decision.book, guest_runs(roles)).unwrap_or_default();
            said(READY, false, own.unwrap_or(reason), format!("{doing}{waits}"))
        }
        VmPhase::Starting => match obstacle(seen, decision) {
            Some(obstacle) => said(READY, false, obstacle.reason, obstacle.message),
            None => {
                let why = why(seen, &decision.book, roles).unwrap_or_default();
                said(
                    READY,
                    false,
                    "Starting",
                    format!("the guest is being started; {why}").trim_end_matches("; "),
                )
            }
        },
    }
}

fn protection(seen: &Observed, decision: &Decision, phase: VmPhase, roles: &Roles<'_>) -> Said {
    let wanted = matches!(phase, VmPhase::Running | VmPhase::Paused | VmPhase::Starting);
    if !wanted && !goes_on(seen, &decision.book, roles) {
        return said(
            PROTECTED,
            false,
            NOT_RUNNING,
            "no guest runs: there is nothing to protect",
        );
    }
    if let Some(standby) = roles.standby
        && is_protected(roles)
    {
        let node = standby.node.as_deref().unwrap_or("unknown");
        if standby.node.is_some() && roles.active.is_some_and(|active| active.node == standby.node) {
            let seat = &standby.name;
            return said(
                PROTECTED,
                false,
                "SameNode",
                format!(
                    "both seats are on node {node}, whose death would take both: see to it that nodes have the labels kubernetes.io/hostname and {}, \
                     and delete pod {seat}, which is then made anew elsewhere",
                    seen.vm.spec.placement.topology_key
                ),
            );
        }
        return said(
            PROTECTED,
            true,
            "StandbyFollows",
            format!("seat {} on node {node} would take over", standby.name),
        );
    }
    if let Some(obstacle) = obstacle(seen, decision) {
        return said(PROTECTED, false, obstacle.reason, obstacle.message);
    }
    if let Some((entry, percent)) = decision
        .book
        .iter()
        .filter_map(|entry| Some((entry, resync(seen, entry)?)))
        .next()
    {
        return match preparing(seen, entry) {
            Some(why) => said(
                PROTECTED,
                false,
                "PreparingDisks",
                format!("seat {}: {why}", entry.name),
            ),
            None => said(
                PROTECTED,
                false,
                "Resyncing",
                format!("a seat is being brought up to date: {percent} %"),
            ),
        };
    }
    let why = why(seen, &decision.book, roles).unwrap_or_else(|| "a standby is being prepared".to_owned());
    said(
        PROTECTED,
        false,
        match phase {
            VmPhase::Paused => PAUSED,
            VmPhase::Starting => "Starting",
            _ => "NoStandby",
        },
        why,
    )
}

fn resyncing(joining: Option<u8>) -> Said {
    match joining {
        Some(_) => said(
            RESYNCING,
            true,
            "Joining",
            "a seat is being brought up to date; status.resyncPercent has the progress",
        ),
        None => said(RESYNCING, false, "InStep", "no seat is being brought up to date"),
    }
}

fn arbiter(seen: &Observed, book: &[SeatEntry], decision_uid: Option<&String>) -> Said {
    match &seen.lease {
        LeaseSeen::Unusable(error) => return said(ARBITER_REACHABLE, false, "LeaseUnusable", error.to_string()),
        LeaseSeen::Missing if lease_is_strange(seen) => {
            return said(ARBITER_REACHABLE, false, "LeaseGone", lease_gone(seen));
        }
        LeaseSeen::Found(_) if lease_is_strange(seen) => {
            return said(
                ARBITER_REACHABLE,
                false,
                "LeaseReplaced",
                "the VM's Lease is another object than the operator made (other UID): a protected pair goes on, a failover is refused; delete it: it is made anew from what the seats know",
            );
        }
        LeaseSeen::Found(record) if was_newer(seen, &record.snapshot.record) => {
            return said(
                ARBITER_REACHABLE,
                false,
                LEASE_OLDER,
                lease_older(seen, record.snapshot.record.term),
            );
        }
        LeaseSeen::Found(record) if decision_uid != Some(&record.snapshot.uid.to_string()) => {
            return said(
                ARBITER_REACHABLE,
                false,
                "LeaseRecreated",
                "the VM's Lease was deleted and made anew: a failover may be refused until both seats go by the new one",
            );
        }
        LeaseSeen::Missing => {
            return Said {
                holds: None,
                ..said(
                    ARBITER_REACHABLE,
                    false,
                    "NotMade",
                    "the VM has no Lease yet: it is made with the first seat",
                )
            };
        }
        LeaseSeen::Found(_) => {}
    }
    let engines = book.iter().filter_map(|entry| Some((entry, published(seen, entry)?)));
    // One that joins does not ask: what it knows may be of long ago.
    let asks = |published: &SeatPublished| published.incarnation.is_some() && published.role != Some(SeatRole::Joining);
    let unreachable = engines
        .into_iter()
        .find(|(_, published)| asks(published) && !published.arbiter_reachable);
    match unreachable {
        Some((entry, published)) => said(
            ARBITER_REACHABLE,
            false,
            "SeatCantReach",
            format!(
                "seat {} can't use the VM's Lease ({}): a protected pair goes on, a failover waits",
                entry.name, published.why
            ),
        ),
        None => said(
            ARBITER_REACHABLE,
            true,
            "Reachable",
            "the VM's Lease can be read and written",
        ),
    }
}

fn cpu_chosen(seen: &Observed, decision: &Decision) -> Said {
    let asked = seen.vm.spec.machine.cpu_baseline == CpuBaseline::Common;
    match (decision.cpu.as_ref().filter(|cpu| !cpu.former), &decision.held) {
        (Some(cpu), _) if cpu.source == CpuBaseline::Common => {
            said(CPU_CHOSEN, true, "Common", format!("the guest's CPU is {}", cpu.why))
        }
        (Some(cpu), _) => said(CPU_CHOSEN, false, "HostCpu", format!("the guest's CPU is {}", cpu.why)),
        (None, Some(held)) => said(CPU_CHOSEN, false, held.reason, held.message.clone()),
        (None, None) if asked => Said {
            holds: None,
            ..said(
                CPU_CHOSEN,
                false,
                "NotChosen",
                "it is chosen when the guest is to start and nodes offer seats",
            )
        },
        (None, None) => said(
            CPU_CHOSEN,
            true,
            "Host",
            "the guest's CPU is that of the node where it starts",
        ),
    }
}

/// Takeovers that seats tell of, and when they were: by the clocks of their nodes, in whole seconds, as the status keeps them.
fn takeovers<'a>(
    seen: &'a Observed,
    book: &'a [SeatEntry],
) -> impl Iterator<Item = (&'a SeatEntry, &'a Takeover, Timestamp)> {
    book.iter().filter_map(move |entry| {
        let takeover = published(seen, entry)?.last_takeover.as_ref()?;
        let seconds = i64::try_from(takeover.unix_ms / 1000).ok()?;
        Some((entry, takeover, Timestamp::from_second(seconds).ok()?))
    })
}

/// A clock that is ahead says nothing: its takeover is not told before that time, and hides no other one.
fn lies_ahead(seen: &Observed, time: Timestamp) -> bool {
    time.duration_since(seen.now) > AHEAD_MAX
}

/// When a takeover that lies ahead is to be looked at, for nothing else need happen by then.
pub fn failover_ahead(seen: &Observed, book: &[SeatEntry]) -> Option<Duration> {
    let ahead = takeovers(seen, book).filter(|(.., time)| lies_ahead(seen, *time));
    let next = ahead
        .map(|(.., time)| time.duration_since(seen.now) - AHEAD_MAX)
        .min()?;
    let (shortest, longest) = AHEAD_LOOKS;
    Some(Duration::try_from(next).unwrap_or(shortest).clamp(shortest, longest))
}

/// The latest takeover that any seat tells of, if it is news.
fn failover(seen: &Observed, book: &[SeatEntry]) -> Option<Failover> {
    let told = takeovers(seen, book).filter(|(.., time)| !lies_ahead(seen, *time));
    let (entry, takeover, time) = told.max_by_key(|(_, takeover, _)| takeover.unix_ms)?;
    let known = seen.status().last_failover.map(|known| known.time.0);
    if known.is_some_and(|known| known >= time && !lies_ahead(seen, known)) {
        return None;
    }
    Some(Failover {
        time: Time(time),
        reason: takeover.reason.chars().take(256).collect(),
        seat: entry.name.clone(),
        node: entry.node.clone(),
        gap_microseconds: takeover.microseconds.min(WHOLE_MAX),
    })
}

fn condition(said: Said, old: &FaultTolerantVMStatus, seen: &Observed) -> Condition {
    let status = match said.holds {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    let same = old.condition(said.kind).filter(|before| before.status == status);
    let message: String = said.message.chars().take(MESSAGE_LENGTH_MAX).collect();
    let kept = same
        .filter(|before| before.reason == said.reason)
        .filter(|before| is_no_news(&said.reason, &before.message, &message));
    Condition {
        type_: said.kind.to_owned(),
        status: status.to_owned(),
        reason: said.reason,
        message: kept.map_or(message, |before| before.message.clone()),
        last_transition_time: same.map_or_else(
            || Time(Timestamp::from_second(seen.now.as_second()).unwrap_or(seen.now)),
            |before| before.last_transition_time.clone(),
        ),
        observed_generation: seen.vm.metadata.generation,
    }
}

#[cfg(test)]
mod failover_tests;
#[cfg(test)]
mod networks_tests;
#[cfg(test)]
mod page_tests;
#[cfg(test)]
mod storage_tests;
#[cfg(test)]
mod tests;
