//! What to do about one VM: a pure function of what was observed.
//!
//! ```text
//!   Always:  enter seats ─► claims, pods ─► admit (identity, UID into the book) ─► Lease once ─► nodes, requests
//!            alone for long and the other seat in trouble ─► the holder's daemon says so now ─► leaving ─► pod ─► claims ─► out of the book
//!            ─► enter another
//!   Halted:  stop request ─► record Stopped, engines ended ─► pods
//!   deleted: as Halted ─► claims by policy ─► finalizer
//! ```
//!
//! Either the book changes or other things are done, never both: the book is written with the version of the object that was
//! observed, so a decision made of an old book comes to nothing.
//!
//! Invariant: a seat that the record names is never made to leave, and nothing of it is deleted but a pod that can't run a guest any more.
//! Invariant: a Lease that is gone is made anew only from what seats vouch for ([`ftvm_protocol::recreation`]), never from what the operator remembers.
//! Invariant: no pod of a seat that the record names is taken away while one of its claims is being deleted, unless its volumes are to go.
//! Invariant: the book never has more than two seats.
//! Invariant: nothing that costs a disk, or has a guest booted, is decided from what a leader read first: whoever the record names has said it since, or had
//! the time for it (`words`).
//! Invariant: no disk goes of a VM whose guest ran but by a word of the holder's daemon that was asked for then, and only just (`words`).
//! Invariant: when everything is as it should be, there is nothing to do.

mod asked;
mod claims;
mod end;
mod former;
mod loss;
mod recreate;
mod run;
mod spare;
mod trouble;
mod words;

use std::time::Duration;

use ftvm_crds::names::FINALIZER;
use ftvm_crds::seat::{SeatPublished, SeatRequest, SeatRole};
use ftvm_crds::{AskedFor, ChosenCpu, RunStrategy, SeatEntry};
use ftvm_protocol::identity::{ArbiterUid, Incarnation, SeatId};
use ftvm_protocol::record::Record;
use kube::ResourceExt;

use crate::observe::{LeaseSeen, Observed, PodSeen};

pub use claims::{BINDING, ClaimTrouble, claim_trouble, goes_with_vm, unbound_for};
pub use end::stop_refused;
pub use former::{OUT_OF_SERVICE, away, needed, nodes_to_ask, proof_may_come, unproven};
pub use loss::{ACCEPT_DATA_LOSS, Acceptance, WORD_WITHIN, accepted_loss, accepted_since, word_of};
pub use recreate::{all_go_by, recreation};
pub use run::is_known;
pub use spare::{is_old_copy, is_spare, was_newer};
pub use trouble::{Trouble, fails_at_every_join, holder_fails, trouble};

/// Seats of a VM.
pub const SEATS: usize = 2;

/// Something to do at the API server.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Put the finalizer on.
    AddFinalizer,
    /// Make a seat's missing claims.
    CreateClaims {
        /// The seat.
        seat: String,
        /// Its disks that have none, in the order in which they are made.
        disks: Vec<String>,
    },
    /// Make a seat's pod.
    CreatePod {
        /// The seat.
        seat: String,
    },
    /// Make a pod's identity, then enter its UID into the book.
    Admit {
        /// The seat.
        seat: String,
        /// UID of its pod.
        uid: String,
    },
    /// Make the Lease with the first record.
    CreateLease {
        /// The seat with the original disks.
        original: SeatId,
        /// Its node, if it is known.
        node: String,
    },
    /// Make the Lease anew, with a record that succeeds the one that is gone.
    RecreateLease {
        /// The record.
        record: Record,
        /// The annotation `ftvm.dev/nodes`.
        nodes: String,
    },
    /// Write the first record anew for another seat.
    RewriteGenesis {
        /// The seat with the original disks.
        original: SeatId,
    },
    /// Tell the admission policy which daemons may write the record.
    SetLeaseNodes {
        /// The annotation.
        nodes: String,
    },
    /// Ask a seat's daemon for something.
    Request {
        /// The seat.
        seat: String,
        /// UID of its pod.
        uid: String,
        /// What.
        request: SeatRequest,
    },
    /// Ask a seat's daemon to say what it knows now, and to repeat what this leader drew with it.
    AskForWord {
        /// The seat.
        seat: String,
        /// UID of its pod.
        uid: String,
        /// What was drawn.
        drawn: String,
    },
    /// Delete a pod.
    DeletePod {
        /// The seat.
        seat: String,
        /// UID of the pod.
        uid: String,
        /// resourceVersion of the pod.
        version: String,
        /// Without waiting for its node, which is gone or not ready.
        force: bool,
    },
    /// Delete a claim.
    DeleteClaim {
        /// Its name.
        claim: String,
        /// Its UID.
        uid: String,
    },
    /// Let the object go.
    RemoveFinalizer,
}

impl Action {
    /// Is it more than a write over exactly what was observed, or one that any later look would correct?
    fn needs_certainty(&self) -> bool {
        // What names a Lease's nodes, too: over an old version it would come to nothing until the watch tells the new one.
        !matches!(self, Action::AddFinalizer | Action::Admit { .. })
    }

    /// Does it make something? That may be refused without anything being wrong with the rest: a quota, a policy, a name that does not exist.
    pub fn makes(&self) -> bool {
        let others = matches!(
            self,
            Action::Admit { .. } | Action::CreateLease { .. } | Action::RecreateLease { .. }
        );
        others || self.waits()
    }

    /// The seat that it makes something of, if it is of one.
    pub fn makes_of(&self) -> Option<&str> {
        match self {
            Action::CreateClaims { seat, .. } | Action::CreatePod { seat } | Action::Admit { seat, .. } => Some(seat),
            _ => None,
        }
    }

    /// Does it wait after something was refused? What makes a seat or a Lease of what is there already does not.
    pub fn waits(&self) -> bool {
        matches!(self, Action::CreateClaims { .. } | Action::CreatePod { .. })
    }
}

/// Something waits, and nothing that is observed tells why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// In one word.
    pub reason: &'static str,
    /// What, where, why, what to do.
    pub message: String,
}

/// What was decided.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Decision {
    /// The book as it should be; unchanged if equal to the observed one.
    pub book: Vec<SeatEntry>,
    /// What to do, if the book stays.
    pub actions: Vec<Action>,
    /// The Lease's UID, to be kept for good.
    pub lease_uid: Option<String>,
    /// The switchover that was asked for last.
    pub switchover: Option<AskedFor>,
    /// The failure that was asked for last.
    pub failover: Option<AskedFor>,
    /// Says of something that was asked for that it won't be done, or that nobody knows.
    pub settles: bool,
    /// Seats that were replaced since the VM was last protected.
    pub replacements: u32,
    /// Nodes where the storage of a seat failed at every join since then.
    pub storage_failed_on: Vec<String>,
    /// The CPU that was chosen for the guest.
    pub cpu: Option<ChosenCpu>,
    /// No CPU can be chosen for the guest: its seats' pods wait, so that none is placed in vain.
    pub held: Option<Held>,
    /// A seat is kept that would be replaced if the holder's daemon answered.
    pub silent: Option<Held>,
    /// Look again after this time, even if nothing happens.
    pub recheck: Option<Duration>,
    /// A VM that is halted or goes has no pod any more.
    pub at_rest: bool,
}

impl Decision {
    /// Makes or takes away something, asks for something or refuses it, forgets or gives up a pod, or says that it has ended: decided a second time,
    /// from reads past every cache, before it is done.
    pub fn needs_certainty(&self, seen: &Observed) -> bool {
        let old = seen.vm.status.as_ref().map_or(&[][..], |status| &status.seats);
        let lost = old.iter().any(|before| {
            let after = self.book.iter().find(|entry| entry.name == before.name);
            after.is_none_or(|after| {
                after.leaving != before.leaving || (before.pod_uid.is_some() && after.pod_uid.is_none())
            })
        });
        // A cache may be behind what the status was written by.
        let older = record(seen).is_some_and(|found| was_newer(seen, &found.snapshot.record));
        older
            || lost
            || former::proves(old, &self.book)
            || self.settles
            || self.actions.iter().any(Action::needs_certainty)
    }
}

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The guest runs.
    Run,
    /// It is stopped.
    Halt,
    /// The VM goes.
    Delete,
}

/// What the user wants of this VM.
pub fn want(seen: &Observed) -> Want {
    if seen.vm.metadata.deletion_timestamp.is_some() {
        Want::Delete
    } else if seen.vm.spec.run_strategy == RunStrategy::Halted {
        Want::Halt
    } else {
        Want::Run
    }
}

/// What to do.
pub fn decide(seen: &Observed) -> Decision {
    let status = seen.status();
    let mut decision = Decision {
        book: status.seats.clone(),
        lease_uid: status.lease_uid.clone(),
        switchover: status.switchover.clone(),
        failover: status.failover.clone(),
        replacements: status.replacements,
        storage_failed_on: status.storage_failed_on.clone(),
        cpu: status.cpu.clone(),
        ..Decision::default()
    };
    if want(seen) != Want::Delete && !seen.vm.finalizers().iter().any(|name| name == FINALIZER) {
        decision.actions.push(Action::AddFinalizer);
        return decision;
    }
    if let Some(record) = record(seen)
        && (decision.lease_uid.is_none() || recreate::all_go_by(seen, record))
    {
        decision.lease_uid = Some(record.snapshot.uid.to_string());
    }
    book_of_pods(seen, &mut decision.book);
    if let Some(record) = record(seen) {
        former::prove(seen, &record.snapshot.record, &mut decision.book);
        former::outlive(seen, &record.snapshot.record, &mut decision);
    }
    match want(seen) {
        Want::Run => run::run(seen, &mut decision),
        Want::Halt | Want::Delete => {
            end::end(seen, &mut decision);
            asked::come_to_an_end(seen, &mut decision);
        }
    }
    if decision.book != status.seats || decision.lease_uid != status.lease_uid || decision.cpu != status.cpu {
        decision.actions.clear();
    }
    // A pod that can't be written to holds nothing else up.
    let is_question = |action: &Action| matches!(action, Action::AskForWord { .. });
    decision.actions.sort_by_key(is_question);
    if let Some(wait) = seen.waits() {
        // Looks have many causes, and what is refused may stay so for long.
        decision.actions.retain(|action| !action.waits());
        run::sooner(&mut decision.recheck, wait);
    }
    decision
}

/// May anything be decided from the record? Not if the Lease is neither the one that the operator knows nor its successor, or gone.
pub fn record(seen: &Observed) -> Option<&crate::observe::Record> {
    let record = seen.record()?;
    let Some(known) = lease_uid(seen) else {
        let known = seen.vm.status.as_ref().is_some_and(|status| status.lease_uid.is_some());
        return (!known).then_some(record);
    };
    let same = record.snapshot.uid == known || record.snapshot.record.predecessor == Some(known);
    same.then_some(record)
}

/// UID of the last Lease by which every seat that it named went.
pub fn lease_uid(seen: &Observed) -> Option<ArbiterUid> {
    seen.vm.status.as_ref()?.lease_uid.as_deref()?.parse().ok()
}

/// Is there a Lease that ought not to be there, or none where one ought to be?
pub fn lease_is_strange(seen: &Observed) -> bool {
    let known = seen.vm.status.as_ref().is_some_and(|status| status.lease_uid.is_some());
    match &seen.lease {
        LeaseSeen::Missing => known,
        LeaseSeen::Unusable(_) => true,
        LeaseSeen::Found(_) => record(seen).is_none(),
    }
}

/// A record that no engine ever wrote: no guest ever ran.
pub fn is_genesis(record: &Record) -> bool {
    record.term == 1 && record.members.is_only(Incarnation::genesis(record.holder.seat))
}

/// The seat of an entry, if it has a pod.
pub fn seat_id(entry: &SeatEntry) -> Option<SeatId> {
    entry.pod_uid.as_deref().and_then(|uid| uid.parse().ok())
}

/// Does the record name this seat, by any of its pods?
pub fn is_named(entry: &SeatEntry, record: &Record) -> bool {
    named(record).any(|uid| entry.had_uid(&uid))
}

/// Does the record name this pod?
pub fn names(record: &Record, uid: &str) -> bool {
    named(record).any(|named| named == uid)
}

/// UIDs of the pods that the record names.
fn named(record: &Record) -> impl Iterator<Item = String> {
    let members = record.members.iter().chain([record.holder]);
    members.map(|member| member.seat.to_string())
}

/// The entry of the record's holder.
pub fn holder<'a>(book: &'a [SeatEntry], record: &Record) -> Option<&'a SeatEntry> {
    let holder = record.holder.seat.to_string();
    book.iter().find(|entry| entry.had_uid(&holder))
}

/// The pod that an entry means, if it still is that one.
pub fn pod<'a>(seen: &'a Observed, entry: &SeatEntry) -> Option<&'a PodSeen> {
    let pod = seen.pods.get(&entry.name)?;
    (entry.pod_uid.as_deref() == Some(&pod.uid)).then_some(pod)
}

/// What the daemon of that pod says, if it can be read.
pub fn published<'a>(seen: &'a Observed, entry: &SeatEntry) -> Option<&'a SeatPublished> {
    pod(seen, entry)?.told()
}

/// Does the seat's engine run, or is it about to?
pub fn has_engine(pod: &PodSeen) -> bool {
    match &pod.published {
        // Unreadable: the daemon writes it anew at its next change.
        Err(_) => true,
        Ok(published) => published.incarnation.is_some() && published.role != Some(SeatRole::Ended),
    }
}

/// Does any of these seats have the guest, or follow the one that does, as far as anybody tells now?
pub fn anyone_is_heard_of(seen: &Observed, book: &[SeatEntry]) -> bool {
    book.iter().any(|entry| is_heard_of(seen, entry))
}

/// Does a seat's daemon say that its engine runs the guest?
pub fn says_active(seen: &Observed, entry: &SeatEntry) -> bool {
    published(seen, entry).is_some_and(|published| published.role == Some(SeatRole::Active))
}

/// Does a seat's daemon, on a node that is ready, say that its engine has the guest, or follows the one that does? Where no node is ready it is the
/// control plane that hears nothing.
pub fn is_heard_of(seen: &Observed, entry: &SeatEntry) -> bool {
    let Some(pod) = pod(seen, entry) else { return false };
    let ready = pod.node.as_deref().is_some_and(|node| seen.node_ready(node));
    let deaf = seen.nodes.values().all(|node| !node.ready);
    let has = pod.told().is_some_and(|published| match published.role {
        Some(SeatRole::Active) => true,
        Some(SeatRole::Joining | SeatRole::Standby | SeatRole::Frozen) => {
            published.peer_connected || published.holds_guest
        }
        Some(SeatRole::Starting | SeatRole::Ended) | None => published.holds_guest,
    });
    (ready || deaf) && has
}

/// Which machine a node is, as its kubelet tells it.
pub fn machine(seen: &Observed, node: &str) -> Option<String> {
    seen.nodes.get(node)?.machine().map(str::to_owned)
}

/// Enters where pods are, and that they are gone.
fn book_of_pods(seen: &Observed, book: &mut [SeatEntry]) {
    let record = record(seen).map(|record| &record.snapshot.record);
    for entry in book.iter_mut() {
        let Some(uid) = entry.pod_uid.clone() else {
            continue;
        };
        match seen.pods.get(&entry.name).filter(|pod| pod.uid == uid) {
            Some(pod) => {
                if entry.node.is_none() {
                    // In one write with the node, before which no daemon takes the pod for a seat: later another machine may have its name.
                    entry.machine = pod.node.as_deref().and_then(|node| machine(seen, node));
                }
                // What was known stays: a pod that ends loses its IP, and nobody needs that told.
                entry.node = pod.node.clone().or(entry.node.take());
                entry.pod_ip = pod.pod_ip.clone().or(entry.pod_ip.take());
                entry.host_ip = pod.host_ip.clone().or(entry.host_ip.take());
                entry.engine_ended = former::engine_ended(pod);
            }
            None => former::forget(entry, uid, seen, record),
        }
    }
}

#[cfg(test)]
mod assured_tests;
#[cfg(test)]
mod claims_tests;
#[cfg(test)]
mod cpu_tests;
#[cfg(test)]
mod first_tests;
#[cfg(test)]
mod former_tests;
#[cfg(test)]
mod loss_tests;
#[cfg(test)]
mod random_tests;
#[cfg(test)]
pub(crate) mod rig;
#[cfg(test)]
mod rig_disks;
#[cfg(test)]
mod rig_lease;
#[cfg(test)]
mod spare_tests;
#[cfg(test)]
mod storage_tests;
#[cfg(test)]
mod stuck_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod words_tests;
