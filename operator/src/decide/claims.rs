//! Claims that wait for a volume: nothing need ever happen to them, so they are looked at again without a cause.

use std::time::Duration;

use ftvm_crds::SeatEntry;

use super::run::sooner;
use crate::observe::{ClaimSeen, Observed, PodPhase};

/// A claim may be without a volume for so long before a person is told.
pub const BINDING: Duration = Duration::from_secs(30);
/// Longest and shortest wait for the next look.
const LOOKS: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(1));

/// How long a claim has been without a volume; none if it has one.
pub fn unbound_for(seen: &Observed, claim: &ClaimSeen) -> Option<Duration> {
    let age = || Duration::try_from(seen.now.duration_since(claim.created?)).ok();
    (!claim.bound).then(|| age().unwrap_or_default())
}

/// Looks again when a person has to be told, then later and later: twice the age each time, to a bound.
pub(super) fn look_again(seen: &Observed, book: &[SeatEntry], recheck: &mut Option<Duration>) {
    let (longest, shortest) = LOOKS;
    for entry in book.iter().filter(|entry| !entry.leaving) {
        let starts = |entry: &SeatEntry| {
            seen.pods
                .get(&entry.name)
                .is_some_and(|pod| pod.phase == PodPhase::Pending)
        };
        let claims = seen.claims.values().filter(|claim| claim.seat == entry.name);
        let waits = claims.filter_map(|claim| unbound_for(seen, claim));
        if let Some(age) = waits.max().filter(|_| starts(entry)) {
            let next = BINDING.checked_sub(age).filter(|left| !left.is_zero()).unwrap_or(age);
            sooner(recheck, next.clamp(shortest, longest));
        }
    }
}
