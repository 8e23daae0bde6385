//! Which seats are of no use any more, where the record may be an old copy: restored from a backup, put back by a hand.
//!
//! Such a record may name a seat alone whose peer went on without it since. Terms tell: an engine makes the term of a record that it won durable in
//! its seat's header before it releases anything, so whoever was alone by the record *as it is* says exactly its term, and nobody went on past it
//! (rules 1 and 9). What remains is what only a person can have done: to accept a loss, and then to put back a record of before that.

use ftvm_crds::SeatEntry;
use ftvm_crds::seat::SeatRole;
use ftvm_protocol::identity::Term;
use ftvm_protocol::record::Record;

use super::{holder, is_genesis, is_heard_of, pod, published, record, says_active};
use crate::observe::Observed;

/// Was the record at a later term before? The status keeps the highest that was read.
pub fn was_newer(seen: &Observed, record: &Record) -> bool {
    let known = seen.vm.status.as_ref().and_then(|status| status.term);
    known.is_some_and(|term| term > record.term)
}

/// Is the record older than what its seats, or the status, know? For a moment also where pods are seen sooner than the Lease.
pub fn is_old_copy(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    was_newer(seen, record) || newest(seen, record, book).is_some()
}

/// The seat whose engine knows the highest term, if that is above the record's: its disk is the newest that anybody tells of.
pub(super) fn newest<'a>(seen: &Observed, record: &Record, book: &'a [SeatEntry]) -> Option<&'a SeatEntry> {
    let holder = holder(book, record).map(|entry| &entry.name);
    let key = |entry: &SeatEntry| -> (Term, bool) {
        let term = published(seen, entry).map_or(0, |published| published.term);
        (term, Some(&entry.name) == holder)
    };
    let above = book.iter().filter(|entry| key(entry).0 > record.term);
    above.max_by_key(|entry| key(entry))
}

/// Did no guest ever run? That the record is the first one says so unless it is an old copy.
pub(super) fn never_ran(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    is_genesis(record) && !is_old_copy(seen, record, book)
}

/// Is a seat that the record does not name of no use any more? Only once the holder's seat is heard of, and has run by this very record: it has the guest, or
/// waits with its disk. Else the other one may have the newest disk, and be all that is left to go on with.
pub fn is_spare(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    let ran_by_it = || holder(book, record).is_some_and(|entry| has_run_by(seen, record, entry));
    !is_old_copy(seen, record, book) && (is_genesis(record) || ran_by_it())
}

/// Is the holder the only member, and does it have the guest by this very record?
pub(super) fn goes_on_alone(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    let has_guest = |entry: &SeatEntry| says_active(seen, entry) && has_run_by(seen, record, entry);
    let alone = record.members.is_only(record.holder) && !is_old_copy(seen, record, book);
    alone && holder(book, record).is_some_and(has_guest)
}

/// Is the holder's seat heard of, and does its header have this record's UID and term?
fn has_run_by(seen: &Observed, of: &Record, entry: &SeatEntry) -> bool {
    let (Some(found), Some(published)) = (record(seen), published(seen, entry)) else {
        return false;
    };
    let node = pod(seen, entry).and_then(|pod| pod.node.as_deref());
    let is_there = match published.role {
        // A daemon repeats what an engine said last until the next one answers.
        Some(SeatRole::Active) => is_heard_of(seen, entry) && published.incarnation == Some(of.holder),
        // It knows no term but its header's.
        Some(SeatRole::Starting) => node.is_some_and(|node| seen.node_ready(node)),
        _ => false,
    };
    is_there && published.term == of.term && published.lease_uid == Some(found.snapshot.uid)
}
