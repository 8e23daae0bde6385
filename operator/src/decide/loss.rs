//! A person accepts that what only seats that are gone have is lost.
//!
//! Invariant: nobody is asked to boot over a loss before each seat of the book has said what it has, or has had its time to. One that has told nothing yet
//! may have the newest disk of all: after a backup was restored neither the record nor the status knows.

use std::time::Duration;

use ftvm_crds::SeatEntry;
use ftvm_crds::names::ANNOTATION_ACCEPT_DATA_LOSS;
use ftvm_crds::seat::{Order, SeatRole};
use ftvm_protocol::identity::{Incarnation, Term};
use ftvm_protocol::record::{Phase, Record};
use kube::ResourceExt;

use super::run::{ask_until_done, attempts, sooner};
use super::spare::newest;
use super::{Decision, anyone_is_heard_of, asked, claim_trouble, holder, needed, pod, published};
use crate::observe::Observed;

/// How the id of a request begins by which a person accepts a loss.
pub const ACCEPT_DATA_LOSS: &str = "accept-data-loss";
/// A seat of which nothing is told keeps others from being asked for so long.
pub const WORD_WITHIN: Duration = Duration::from_secs(60);
/// So often the holder's own seat is asked again to boot before others are: 5 s, 10 s, 20 s and 40 s.
const HOLDER_ATTEMPTS: u32 = 3;

/// The loss that a person accepts while nobody has the guest, and since when a process has seen that. It is no part of the status: that may be an old copy, too.
pub type Acceptance<T> = Option<(String, T)>;

/// Since when it has been the same one, with nobody who has the guest, looking now; a clock that was set back begins anew.
pub fn accepted_since<T: Copy + PartialOrd>(known: &mut Acceptance<T>, seen: &Observed, now: T) -> Option<T> {
    let text = seen.vm.annotations().get(ANNOTATION_ACCEPT_DATA_LOSS);
    let text = text.filter(|_| !anyone_is_heard_of(seen, &seen.status().seats));
    let same = |known: &(String, T)| text == Some(&known.0) && known.1 <= now;
    *known = known.take().filter(same).or_else(|| Some((text?.clone(), now)));
    known.as_ref().map(|(_, since)| *since)
}

/// What a person wrote into the annotation for a data loss: `HOLDER@TERM`, and any text behind it.
pub struct AcceptedLoss<'a> {
    holder: Incarnation,
    term: Term,
    text: &'a str,
}

impl AcceptedLoss<'_> {
    /// Of exactly this record? Whatever is written after it is another matter.
    pub fn is_of(&self, record: &Record) -> bool {
        (self.holder, self.term) == (record.holder, record.term)
    }
}

/// The annotation, if it makes sense.
pub fn accepted_loss(seen: &Observed) -> Option<AcceptedLoss<'_>> {
    let text = seen.vm.annotations().get(ANNOTATION_ACCEPT_DATA_LOSS)?.trim();
    let (of, text) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let (holder, term) = of.split_once('@')?;
    Some(AcceptedLoss {
        holder: holder.parse().ok()?,
        term: term.parse().ok()?,
        text: text.trim(),
    })
}

/// A seat whose word is waited for before anybody is asked to boot over a loss, and for how long yet.
pub fn word_of<'a>(seen: &Observed, book: &'a [SeatEntry]) -> Option<(&'a SeatEntry, Duration)> {
    let rest = WORD_WITHIN.checked_sub(seen.accepted_for.unwrap_or_default());
    let rest = rest.filter(|rest| !rest.is_zero())?;
    let silent = |entry: &&SeatEntry| !entry.leaving && !has_told(seen, entry);
    Some((book.iter().find(silent)?, rest))
}

/// Has its engine said which term it knows? One that runs has read its header; of one that ended without a term nothing is known.
fn has_told(seen: &Observed, entry: &SeatEntry) -> bool {
    let runs = |role: Option<SeatRole>| role.is_some_and(|role| role != SeatRole::Ended);
    published(seen, entry).is_some_and(|published| published.term > 0 || runs(published.role))
}

/// A person says so of this very record, and that what only others have may be lost. Not before nodes that are away are proven to be off. The holder's own
/// seat goes first if it could boot, for it has the most; or, where seats know later terms than the record, the one that knows the latest. Is nothing else to be
/// asked for?
pub(super) fn give_up_holder(seen: &Observed, record: &Record, decision: &mut Decision) -> bool {
    let Some(accepted) = accepted_loss(seen).filter(|accepted| accepted.is_of(record)) else {
        return false;
    };
    let book = decision.book.clone();
    let away = |entry: &SeatEntry| needed(seen, entry, record).any(|(_, ended)| !ended);
    if anyone_is_heard_of(seen, &book) || book.iter().any(away) {
        return false;
    }
    if let Some((_, rest)) = word_of(seen, &book) {
        sooner(&mut decision.recheck, rest);
        return false;
    }
    let text: String = accepted.text.chars().take(asked::REQUEST_LENGTH_MAX).collect();
    let id = format!("{ACCEPT_DATA_LOSS}-{}-{}-{text}", record.term, record.holder.start);
    let order = Order::AcceptDataLoss {
        holder: record.holder,
        term: Some(record.term),
        over_stopped_term: (record.phase == Phase::Stopped).then_some(record.term),
    };
    // Unless there is no room for it, a disk of it is gone, or it was asked in vain for more than a minute.
    let placed = |entry: &SeatEntry| pod(seen, entry).is_some_and(|pod| pod.node.is_some());
    let no_disk = |entry: &SeatEntry| !placed(entry) && claim_trouble(seen, entry).is_some();
    let no_room = |entry: &SeatEntry| pod(seen, entry).is_some_and(|pod| pod.unschedulable.is_some());
    let in_vain = |entry: &SeatEntry| attempts(seen, entry, &id) > HOLDER_ATTEMPTS;
    let could = |entry: &&SeatEntry| !no_room(entry) && !no_disk(entry) && !in_vain(entry);
    let first = newest(seen, record, &book)
        .or_else(|| holder(&book, record))
        .filter(could);
    for entry in book.iter().filter(|entry| !entry.leaving) {
        if first.is_none_or(|first| first.name == entry.name) {
            ask_until_done(seen, entry, &id, &order, decision);
        }
    }
    true
}
