//! Whether what seats say is said now. What a leader reads at its first look may be of a backup, and decisions that cost a disk, or have a guest
//! booted, can't be taken back.
//!
//! Whoever went on past a record is one that it names, or joined one of those, whose header says so (rules 3, 4 and 9). So it is enough to hear those
//! that the record names: each daemon repeats what this leader drew ([`crate::first_look`]), with all that it says of its seat then. Where one does not,
//! it has had its time after 120 s. Where a person accepts a loss every seat of the book is heard ([`super::loss`]).
//!
//! What was said at any time is no word by which disks go: whoever had the guest may have died since, and nobody has called its node not ready yet.
//!
//! ```text
//!   a seat's patience is over ─► a look is drawn for that ─► the holder's daemon repeats it ─► leaving ─► pod ─► claims
//!                                                        └─► it is silent: the seat is kept, however long, and that is told
//! ```

use std::time::Duration;

use ftvm_crds::SeatEntry;
use ftvm_crds::seat::SeatRole;
use ftvm_protocol::record::Record;

use super::run::sooner;
use super::{Action, Decision, Held, holder, is_genesis, is_named, named, pod, published};
use crate::first_look::{FirstLook, TOLD};
use crate::observe::Observed;

/// Between the parts of a look that is drawn before something of a seat is taken away: DRAWN.SEAT.SECONDS. DRAWN is of the leader's first look, so that it
/// answers that one, too.
const PART: char = '.';
/// In place of DRAWN where nothing was drawn at first: the leader was there before the VM had seats.
const NOTHING_DRAWN: &str = "0";
/// So many letters of what a seat's name ends with are SEAT: whatever somebody writes into the book, a look stays short enough to be read.
const SEAT_LETTERS: usize = 8;
/// A word by which something of a seat is taken away was asked for so long ago at most: sooner than a dead node is called not ready.
pub(super) const WORD_HOLDS: Duration = Duration::from_secs(30);
/// A daemon that does not answer for so long is told of.
const SILENT_AFTER: Duration = Duration::from_secs(10);
/// Reason of a seat that is kept because the holder's daemon says nothing.
const HOLDER_SILENT: &str = "HolderSilent";

/// For how long daemons may need yet to say what they know.
fn time_left(seen: &Observed) -> Duration {
    let first = seen.first_look.as_ref();
    first.map_or(Duration::ZERO, |first| TOLD.saturating_sub(first.age))
}

/// Has this seat's daemon said since this leader's first look at the VM what it is, or had the time for it?
pub(super) fn is_fresh(seen: &Observed, entry: &SeatEntry) -> bool {
    let said = published(seen, entry).and_then(|published| published.look.as_deref());
    let repeats = |first: &FirstLook| said.is_some_and(|look| is_of(look, first));
    time_left(seen).is_zero() || seen.first_look.as_ref().is_some_and(repeats)
}

/// Was this drawn by the leader of that first look, then or later?
fn is_of(look: &str, first: &FirstLook) -> bool {
    look.split(PART).next() == Some(first.drawn.as_str())
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
        let was_asked = pod.look.as_deref().is_some_and(|look| is_of(look, first));
        if !was_asked && !decision.actions.iter().any(is_asked) {
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

/// How a look begins that this leader draws before it takes away something of this seat.
fn of_removal(seen: &Observed, entry: &SeatEntry) -> String {
    let first = seen.first_look.as_ref();
    let drawn = first.map_or(NOTHING_DRAWN, |first| first.drawn.as_str());
    let end = entry.name.rsplit('-').next().unwrap_or_default();
    let seat: String = end.chars().take(SEAT_LETTERS).collect();
    format!("{drawn}{PART}{seat}{PART}")
}

/// How long ago this leader drew this look to take away something of this seat; none: it is another one, or of before the seat was lost.
fn drawn_ago(seen: &Observed, entry: &SeatEntry, look: &str) -> Option<Duration> {
    let at: i64 = look.strip_prefix(&of_removal(seen, entry))?.parse().ok()?;
    let lost = entry.lost_since.as_ref().map(|since| since.0.as_second());
    let age = seen.now.as_second().checked_sub(at)?;
    // Of a clock that was set back nothing is known.
    let age = u64::try_from(age).ok().filter(|_| lost.is_none_or(|lost| lost <= at))?;
    Some(Duration::from_secs(age))
}

/// Has the daemon of the record's holder said what it is since this leader wanted to take away something of this seat, and only just?
pub(super) fn is_assured(seen: &Observed, record: &Record, book: &[SeatEntry], entry: &SeatEntry) -> bool {
    let said = holder(book, record).and_then(|holder| published(seen, holder)?.look.as_deref());
    let age = said.and_then(|look| drawn_ago(seen, entry, look));
    age.is_some_and(|age| age <= WORD_HOLDS)
}

/// Something of this seat waits for [`is_assured`]: asks for it, once, and once more only if the answer came too late to be one. A daemon that is being
/// started again answers then.
pub(super) fn await_assurance(seen: &Observed, record: &Record, entry: &SeatEntry, decision: &mut Decision) {
    let Some(holder) = holder(&decision.book, record) else {
        return;
    };
    let Some(asked) = pod(seen, holder) else { return };
    let said = published(seen, holder).and_then(|published| published.look.as_ref());
    let silent = asked.look.as_ref().filter(|look| said != Some(*look));
    let Some(age) = silent.and_then(|look| drawn_ago(seen, entry, look)) else {
        let now = seen.now.as_second();
        decision.actions.push(Action::AskForWord {
            seat: holder.name.clone(),
            uid: asked.uid.clone(),
            drawn: format!("{}{now}", of_removal(seen, entry)),
        });
        return;
    };
    let left = SILENT_AFTER.saturating_sub(age);
    if left.is_zero() {
        let node = asked.node.as_deref().unwrap_or("unknown");
        decision.silent = Some(silence(&entry.name, &holder.name, node));
    } else {
        sooner(&mut decision.recheck, left);
    }
}

fn silence(seat: &str, holder: &str, node: &str) -> Held {
    let message = format!(
        "seat {seat} is to be replaced, and its disks may be all that is left: it is kept until the node-daemon of node {node} has said once more what seat {holder} has there. That does not answer: \
         see that it runs, and is of the operator's release; if the node is dead, bring it back"
    );
    Held {
        reason: HOLDER_SILENT,
        message,
    }
}
