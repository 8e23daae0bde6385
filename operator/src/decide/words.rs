//! Whether what seats say is said now. What a leader reads at its first look may be of a backup, and decisions that cost a disk, or have a guest
//! booted, can't be taken back.
//!
//! Whoever went on past a record is one that it names, or joined one of those, whose header says so (rules 3, 4 and 9). So it is enough to hear those
//! that the record names: each daemon repeats what this leader drew ([`crate::first_look`]), with all that it says of its seat then. Where one does not,
//! it has had its time after 120 s. Where a person accepts a loss every seat of the book is heard ([`super::loss`]).

use std::time::Duration;

use ftvm_crds::SeatEntry;
use ftvm_crds::seat::SeatRole;
use ftvm_protocol::record::Record;

use super::run::sooner;
use super::{Action, Decision, is_genesis, is_named, named, pod, published};
use crate::first_look::TOLD;
use crate::observe::Observed;

/// For how long daemons may need yet to say what they know.
fn time_left(seen: &Observed) -> Duration {
    let first = seen.first_look.as_ref();
    first.map_or(Duration::ZERO, |first| TOLD.saturating_sub(first.age))
}

/// Has this seat's daemon said since this leader's first look at the VM what it is, or had the time for it?
pub(super) fn is_fresh(seen: &Observed, entry: &SeatEntry) -> bool {
    let drawn = seen.first_look.as_ref().map(|first| &first.drawn);
    let repeats = || published(seen, entry).is_some_and(|published| published.look.as_ref() == drawn);
    time_left(seen).is_zero() || repeats()
}

/// Has its engine said which term it knows? One that runs has read its header; of one that ended without a term nothing is known.
pub(super) fn has_told(seen: &Observed, entry: &SeatEntry) -> bool {
    let runs = |role: Option<SeatRole>| role.is_some_and(|role| role != SeatRole::Ended);
    published(seen, entry).is_some_and(|published| published.term > 0 || runs(published.role))
}

/// Has every seat that the record names said what it is since this leader's first look at the VM, or had the time for it? By a record that no guest ever ran
/// by it is a later term alone that says otherwise, so a header has to be among what is said.
pub(super) fn are_told(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    let has_said = |entry: &SeatEntry| is_fresh(seen, entry) && (!is_genesis(record) || has_told(seen, entry));
    let is_told = |uid: String| book.iter().any(|entry| entry.had_uid(&uid) && has_said(entry));
    time_left(seen).is_zero() || named(record).all(is_told)
}

/// Something waits for [`are_told`]: asks for it, and looks again when that time is over.
pub(super) fn await_words(seen: &Observed, record: &Record, decision: &mut Decision) {
    await_words_of(seen, decision, |entry| is_named(entry, record));
}

/// Something waits for what is said of these seats, until that time is over.
pub(super) fn await_words_of(seen: &Observed, decision: &mut Decision, whose: impl Fn(&SeatEntry) -> bool) {
    let left = time_left(seen);
    let Some(first) = seen.first_look.as_ref().filter(|_| !left.is_zero()) else {
        return;
    };
    sooner(&mut decision.recheck, left);
    for entry in decision.book.iter().filter(|entry| whose(entry)) {
        let Some(pod) = pod(seen, entry).filter(|pod| pod.node.is_some()) else {
            continue;
        };
        let is_asked = |action: &Action| matches!(action, Action::AskForWord { seat, .. } if *seat == entry.name);
        if pod.look.as_ref() != Some(&first.drawn) && !decision.actions.iter().any(is_asked) {
            decision.actions.push(Action::AskForWord {
                seat: entry.name.clone(),
                uid: pod.uid.clone(),
                drawn: first.drawn.clone(),
            });
        }
    }
}

/// What is left of a patience that counts by a time which may be of a backup: all of it from the first look on, but no more than daemons need.
pub(super) fn left(seen: &Observed, patience: Duration) -> Duration {
    let first = seen.first_look.as_ref();
    first.map_or(Duration::ZERO, |first| patience.min(TOLD).saturating_sub(first.age))
}
