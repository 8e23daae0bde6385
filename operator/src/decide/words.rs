//! Whether what seats say is said now. What a leader reads at its first look may be of a backup, and decisions that cost a disk, or have a guest
//! booted, can't be taken back.
//!
//! Whoever went on past a record is one that it names, or joined one of those, whose header says so (rules 3, 4 and 9). So it is enough to hear those
//! that the record names: each daemon repeats what this leader drew ([`crate::first_look`]), with all that it says of its seat then. Where one does not,
//! it has had its time after 120 s.

use std::time::Duration;

use ftvm_crds::SeatEntry;
use ftvm_protocol::record::Record;

use super::run::sooner;
use super::{Action, Decision, is_named, named, pod};
use crate::first_look::TOLD;
use crate::observe::Observed;

/// Has every seat that the record names said what it is since this leader's first look at the VM, or had the time for it?
pub(super) fn are_told(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    let Some(first) = &seen.first_look else { return true };
    let repeats = |entry: &SeatEntry| {
        let published = pod(seen, entry).and_then(|pod| pod.published.as_ref().ok());
        published.is_some_and(|published| published.look.as_ref() == Some(&first.drawn))
    };
    let is_told = |uid: String| book.iter().any(|entry| entry.had_uid(&uid) && repeats(entry));
    first.age >= TOLD || named(record).all(is_told)
}

/// Something waits for [`are_told`]: asks for it, and looks again when that time is over.
pub(super) fn await_words(seen: &Observed, record: &Record, decision: &mut Decision) {
    let Some(first) = &seen.first_look else { return };
    sooner(&mut decision.recheck, TOLD.saturating_sub(first.age));
    for entry in decision.book.iter().filter(|entry| is_named(entry, record)) {
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
