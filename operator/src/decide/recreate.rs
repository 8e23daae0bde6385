//! A Lease that is gone (rule 10).
//!
//! ```text
//!   gone ─► engines read it, vouch; daemons publish ─► create, predecessor = status.leaseUid ─► engines adopt, daemons publish
//!        ─► status.leaseUid
//! ```
//!
//! Until the last step the Lease is known by its predecessor: an operator that dies in between, or a second deletion, changes nothing.

use ftvm_crds::SeatEntry;
use ftvm_crds::names::nodes_text;
use ftvm_crds::seat::SeatRole;
use ftvm_protocol::identity::Nonce;
use ftvm_protocol::record::Record;
use ftvm_protocol::recreation::{NoSuccessor, Vouched, successor};

use super::words::{are_told, await_words};
use super::{Action, Decision, lease_uid, published};
use crate::observe::{LeaseSeen, Observed};

/// The record to create in place of a Lease that is gone; `None` if none is.
pub fn recreation(seen: &Observed) -> Option<Result<Record, NoSuccessor>> {
    if seen.lease != LeaseSeen::Missing {
        return None;
    }
    let gone = lease_uid(seen)?;
    let status = seen.status();
    let vouched: Vec<_> = status
        .seats
        .iter()
        .filter_map(|entry| vouched(seen, &status.seats, entry))
        .collect();
    let found = successor(gone, status.term.unwrap_or_default(), &vouched);
    Some(found.map(|record| Record {
        nonce: Nonce(u128::from(seen.draws[0]) << 64 | u128::from(seen.draws[1])),
        ..record
    }))
}

/// What the engine of this seat vouches for, if it speaks of seats of this VM.
fn vouched(seen: &Observed, book: &[SeatEntry], entry: &SeatEntry) -> Option<Vouched> {
    let published = published(seen, entry)?;
    let by = published.incarnation?;
    let record = published.vouches.clone()?;
    let own = entry.pod_uid.as_deref() == Some(&by.seat.to_string());
    let known = |seat: String| book.iter().any(|entry| entry.had_uid(&seat));
    let sound = own && published.role != Some(SeatRole::Ended);
    (sound && record.members.iter().all(|member| known(member.seat.to_string()))).then_some(Vouched { by, record })
}

pub(super) fn recreate(seen: &Observed, decision: &mut Decision) {
    let Some(Ok(record)) = recreation(seen) else { return };
    // Of a backup from between a deletion and a Lease that was made anew then: seats may go by that one, and vouch for it.
    if !are_told(seen, &record, &decision.book) {
        return await_words(seen, &record, decision);
    }
    let stay = decision.book.iter().filter(|entry| !entry.leaving);
    let nodes = nodes_text(stay.filter_map(|entry| entry.node.as_deref()));
    decision.actions.push(Action::RecreateLease { record, nodes });
}

/// Does every member of this record go by its UID, durably? Only then the former one is forgotten.
pub fn all_go_by(seen: &Observed, record: &crate::observe::Record) -> bool {
    let book = seen.status().seats;
    record.snapshot.record.members.iter().all(|member| {
        let seat = member.seat.to_string();
        let entry = book.iter().find(|entry| entry.pod_uid.as_ref() == Some(&seat));
        let published = entry.and_then(|entry| published(seen, entry));
        published.is_some_and(|published| published.lease_uid == Some(record.snapshot.uid))
    })
}
