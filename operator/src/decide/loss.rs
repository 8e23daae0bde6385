//! A person accepts that what only seats that are gone have is lost.
//!
//! Invariant: nobody is asked to boot over a loss before each seat of the book has said what it has, or has had its time to. One that has told nothing yet
//! may have the newest disk of all: after a backup was restored neither the record nor the status knows.

use std::time::Duration;

use ftvm_crds::SeatEntry;
use ftvm_crds::names::ANNOTATION_ACCEPT_DATA_LOSS;
use ftvm_crds::seat::Order;
use ftvm_protocol::identity::{Incarnation, Term};
use ftvm_protocol::record::{Phase, Record};
use kube::ResourceExt;

use super::run::{ask_until_done, attempts, sooner};
use super::spare::newest;
use super::words::{await_words_of, has_told, is_fresh};
use super::{Decision, anyone_is_heard_of, asked, claim_trouble, holder, needed, pod};
use crate::observe::Observed;

/// How the id of a request begins by which a person accepts a loss.
pub const ACCEPT_DATA_LOSS: &str = "accept-data-loss";
/// A seat of which nothing is told keeps others from being asked for so long. What is told has to be new besides (`words`).
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

/// For how long engines may need yet to be there.
fn time_left(seen: &Observed) -> Duration {
    WORD_WITHIN.saturating_sub(seen.accepted_for.unwrap_or_default())
}

/// A seat whose word is waited for before anybody is asked to boot over a loss: what it has, said since this leader's first look.
pub fn word_of<'a>(seen: &Observed, book: &'a [SeatEntry]) -> Option<&'a SeatEntry> {
    let is_over = time_left(seen).is_zero();
    let has_said = |entry: &SeatEntry| is_fresh(seen, entry) && (is_over || has_told(seen, entry));
    book.iter().find(|entry| !entry.leaving && !has_said(entry))
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
    if word_of(seen, &book).is_some() {
        if !time_left(seen).is_zero() {
            sooner(&mut decision.recheck, time_left(seen));
        }
        await_words_of(seen, decision, |entry| !entry.leaving);
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
