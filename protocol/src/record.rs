//! The arbiter's record: who is active, and who may become so.
//!
//! Invariant: the record is only ever compared and swapped, never patched and never expired.

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::identity::{ArbiterUid, Incarnation, Nonce, Term};

/// Most members that a record may name. Two today; a larger set leaves room for more seats.
pub const MAX_MEMBERS: usize = 4;

/// What the user wants of the guest, as far as it was confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// A guest runs or may be started.
    Running,
    /// The guest was stopped; only a swap that carries a start request leaves this phase.
    Stopped,
}

/// Set of incarnations that may hold next. Sorted, without duplicates, 1 to [`MAX_MEMBERS`] entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Members(Vec<Incarnation>);

impl Members {
    /// A set of one.
    pub fn one(member: Incarnation) -> Self {
        Self(vec![member])
    }

    /// A set of two.
    pub fn pair(first: Incarnation, second: Incarnation) -> Self {
        let mut set = vec![first, second];
        set.sort();
        set.dedup();
        Self(set)
    }

    /// From a list in any order; `None` if it is empty, too long or names one twice.
    pub fn from_list(mut list: Vec<Incarnation>) -> Option<Self> {
        if list.is_empty() || list.len() > MAX_MEMBERS {
            return None;
        }
        list.sort();
        let sorted = list.len();
        list.dedup();
        (list.len() == sorted).then_some(Self(list))
    }

    /// Is this incarnation named?
    pub fn contains(&self, incarnation: Incarnation) -> bool {
        self.0.contains(&incarnation)
    }

    /// Is this incarnation the only one?
    pub fn is_only(&self, incarnation: Incarnation) -> bool {
        self.0 == [incarnation]
    }

    /// The members, sorted.
    pub fn iter(&self) -> impl Iterator<Item = Incarnation> + '_ {
        self.0.iter().copied()
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let list = Vec::<Incarnation>::deserialize(deserializer)?;
        Members::from_list(list)
            .ok_or_else(|| de::Error::custom(format!("members must be 1 to {MAX_MEMBERS} different incarnations")))
    }
}

/// The arbiter's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The incarnation that is active (or was, when stopped).
    pub holder: Incarnation,
    /// Who may hold next: the pair when protected, the holder alone otherwise.
    pub members: Members,
    /// Plus one (or more) at every write.
    pub term: Term,
    /// Fresh at every write.
    pub nonce: Nonce,
    /// Running or stopped.
    pub phase: Phase,
    /// Reserved for consistency groups of VMs; 0 today.
    pub group: u64,
    /// UID of the record that this one replaces, if the operator re-created it.
    pub predecessor: Option<ArbiterUid>,
}

impl Record {
    /// The first record of a VM: the genesis incarnation of the seat that has the original disk is holder and only
    /// member. `phase` is Running if the VM shall start with its first engine.
    pub fn genesis(seat: crate::identity::SeatId, phase: Phase) -> Self {
        let holder = Incarnation::genesis(seat);
        Self {
            holder,
            members: Members::one(holder),
            term: 1,
            nonce: Nonce(0),
            phase,
            group: 0,
            predecessor: None,
        }
    }

    /// Is the holder a member?
    pub fn is_sane(&self) -> bool {
        self.members.contains(self.holder)
    }
}

/// A record as it was read: with the identity and version that a swap must name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The record.
    pub record: Record,
    /// Identity of the object (`metadata.uid`).
    pub uid: ArbiterUid,
    /// Version of the object (`metadata.resourceVersion` as a number; of the file arbiter: the term). Compared for
    /// equality only. The arbiter never uses one twice.
    pub version: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::SeatId;

    fn inc(seat: u128, start: u64) -> Incarnation {
        Incarnation {
            seat: SeatId(seat),
            start,
        }
    }

    #[test]
    fn members_are_a_bounded_set() {
        assert!(Members::from_list(vec![]).is_none());
        assert!(Members::from_list(vec![inc(1, 1), inc(1, 1)]).is_none());
        assert!(Members::from_list((0..5).map(|n| inc(n, 1)).collect()).is_none());
        let set = Members::from_list(vec![inc(2, 1), inc(1, 1)]).unwrap();
        assert_eq!(set, Members::pair(inc(1, 1), inc(2, 1)));
        assert!(set.contains(inc(2, 1)) && !set.contains(inc(2, 2)) && !set.is_only(inc(1, 1)));
    }

    #[test]
    fn decoding_checks_the_set() {
        let two = postcard::to_allocvec(&vec![inc(1, 1), inc(1, 1)]).unwrap();
        assert!(postcard::from_bytes::<Members>(&two).is_err());
        let none = postcard::to_allocvec(&Vec::<Incarnation>::new()).unwrap();
        assert!(postcard::from_bytes::<Members>(&none).is_err());
    }
}
