//! Rule 10: which record may be created in place of one that is gone. Decided by the operator, from what the seats vouch for.
//!
//! A seat vouches ([`crate::core::Status::recreate`]) once it has read that the record is gone, so nothing can be written to that
//! record any more: who is active under it, and who else is a member, is settled for good. What a seat vouched for therefore never becomes wrong,
//! however late it is read. It only becomes *old*, when another successor of the same record was made meanwhile: a seat that goes by that one takes no
//! other, and one that does not know it writes nothing without having seen that the other member goes by the same
//! ([`crate::core::Refusal::NotAdopted`]).

use crate::identity::{ArbiterUid, Incarnation, Term};
use crate::record::{Members, Phase, Record};

/// What one engine vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vouched {
    /// The engine.
    pub by: Incarnation,
    /// The record; [`Record::predecessor`] is the one that is gone.
    pub record: Record,
}

/// Why no record may be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoSuccessor {
    /// No seat vouches for one.
    #[error("no seat vouches for a new one")]
    NobodyVouches,
    /// One seat of a pair vouches, the other does not.
    #[error("of the pair only {0} vouches for a new one")]
    OneOfTwo(Incarnation),
    /// They contradict each other.
    #[error("the seats vouch for different records")]
    Disagree,
    /// Vouched for before another successor was made.
    #[error("what the seats vouch for succeeds another record than the one that is gone")]
    OtherPredecessor,
}

/// The record to create in place of the one called `gone`; the caller draws its nonce. `gone` is the last one of which the caller knows that every member
/// went by it, `seen_term` the highest term that it read of that one or of those before.
///
/// # Errors
/// Why there must be none.
pub fn successor(gone: ArbiterUid, seen_term: Term, vouched: &[Vouched]) -> Result<Record, NoSuccessor> {
    let vouched: Vec<_> = vouched.iter().filter(|vouched| is_sound(vouched)).collect();
    if vouched.is_empty() {
        return Err(NoSuccessor::NobodyVouches);
    }
    // Of that one, or of a later one that the caller never saw every member go by.
    let in_line = |vouched: &&&Vouched| vouched.record.predecessor == Some(gone) || vouched.record.term > seen_term;
    let vouched: Vec<_> = vouched.iter().filter(in_line).copied().collect();
    let Some(newest) = vouched.iter().max_by_key(|vouched| vouched.record.term) else {
        return Err(NoSuccessor::OtherPredecessor);
    };
    let mut alone = vouched.iter().filter(|vouched| is_alone(vouched));
    let chosen = match (alone.next(), alone.next()) {
        (Some(_), Some(_)) => return Err(NoSuccessor::Disagree),
        (Some(alone), None) => &alone.record,
        (None, _) => pair(&vouched)?,
    };
    Ok(Record {
        term: newest.record.term.max(seen_term + 1),
        ..chosen.clone()
    })
}

fn is_alone(vouched: &Vouched) -> bool {
    vouched.record.members == Members::one(vouched.by)
}

/// What a pair vouches for: both the same.
fn pair<'a>(vouched: &[&'a Vouched]) -> Result<&'a Record, NoSuccessor> {
    let essence = |of: &'a Vouched| (of.record.holder, &of.record.members, of.record.predecessor);
    let mut result = Err(NoSuccessor::NobodyVouches);
    for one in vouched {
        let member = one.record.members.iter().find(|member| *member != one.by);
        match vouched.iter().find(|other| Some(other.by) == member) {
            None => result = Err(NoSuccessor::OneOfTwo(one.by)),
            Some(other) if essence(other) == essence(one) => return Ok(&one.record),
            Some(_) => return Err(NoSuccessor::Disagree),
        }
    }
    result
}

/// Does it make sense at all? It comes from another process, through an API server.
fn is_sound(Vouched { by, record }: &Vouched) -> bool {
    record.is_sane()
        && record.members.contains(*by)
        && record.members.iter().count() <= 2
        && record.phase == Phase::Running
        && record.predecessor.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Nonce, SeatId};

    const A: Incarnation = Incarnation {
        seat: SeatId(1),
        start: 1,
    };
    const B: Incarnation = Incarnation {
        seat: SeatId(2),
        start: 2,
    };
    const GONE: ArbiterUid = ArbiterUid(7);

    fn vouched(by: Incarnation, members: Members, term: Term) -> Vouched {
        let record = Record {
            holder: if members.contains(A) { A } else { B },
            members,
            term,
            nonce: Nonce(0),
            phase: Phase::Running,
            group: 0,
            predecessor: Some(GONE),
        };
        Vouched { by, record }
    }

    #[test]
    fn a_pair_must_agree_and_the_larger_term_counts() {
        let both = [vouched(A, Members::pair(A, B), 9), vouched(B, Members::pair(A, B), 8)];
        let record = successor(GONE, 8, &both).unwrap();
        assert_eq!((record.holder, record.term, record.predecessor), (A, 9, Some(GONE)));
        assert_eq!(record.members, Members::pair(A, B));
        // A term that only the operator has read counts, too.
        assert_eq!(successor(GONE, 20, &both).unwrap().term, 21);
        for one in &both {
            assert_eq!(
                successor(GONE, 8, std::slice::from_ref(one)),
                Err(NoSuccessor::OneOfTwo(one.by))
            );
        }
        let mut other = both.clone();
        other[1].record.holder = B;
        assert_eq!(successor(GONE, 8, &other), Err(NoSuccessor::Disagree));
        assert_eq!(successor(GONE, 8, &[]), Err(NoSuccessor::NobodyVouches));
        // One of them twice is not two.
        let twice = [both[0].clone(), both[0].clone()];
        assert_eq!(successor(GONE, 8, &twice), Err(NoSuccessor::OneOfTwo(A)));
    }

    #[test]
    fn who_is_alone_needs_nobody_and_two_of_them_are_a_contradiction() {
        let alone = vouched(A, Members::one(A), 9);
        let former = vouched(B, Members::pair(A, B), 7);
        assert_eq!(
            successor(GONE, 8, &[former, alone.clone()]).unwrap().members,
            Members::one(A)
        );
        let other = vouched(B, Members::one(B), 9);
        assert_eq!(successor(GONE, 8, &[alone, other]), Err(NoSuccessor::Disagree));
        // Nobody says of somebody else that he is alone.
        let foreign = Vouched {
            by: B,
            ..vouched(A, Members::one(A), 9)
        };
        assert_eq!(successor(GONE, 8, &[foreign]), Err(NoSuccessor::NobodyVouches));
    }

    #[test]
    fn what_was_vouched_for_before_an_earlier_successor_is_not_taken() {
        let both = [vouched(A, Members::pair(A, B), 9), vouched(B, Members::pair(A, B), 8)];
        assert_eq!(successor(ArbiterUid(8), 9, &both), Err(NoSuccessor::OtherPredecessor));
        // A successor that both went by before the caller saw it.
        assert_eq!(successor(ArbiterUid(8), 7, &both).unwrap().predecessor, Some(GONE));
        let mut stopped = vouched(A, Members::one(A), 9);
        stopped.record.phase = Phase::Stopped;
        assert_eq!(successor(GONE, 8, &[stopped]), Err(NoSuccessor::NobodyVouches));
    }
}
