//! How long is waited until the next look at a VM.

use std::time::{Duration, Instant};

use crate::random;

/// First and longest wait after failures.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// Longest wait after a refusal: whoever raises a quota does not look on for minutes.
const REFUSED_MAX: Duration = Duration::from_secs(60);
/// A pod may be without a sandbox so long before its identity is looked for, and at most so long until the next look.
const IDENTITY: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));

/// Looks for the identities of pods that have no sandbox, later and later.
#[derive(Debug, Default, Clone, Copy)]
pub struct Looks {
    done: u32,
    next: Option<Instant>,
}

impl Looks {
    /// Whether one is due, and when the next one is; `lack`: some pod has no sandbox.
    pub fn turn(&mut self, lack: bool, now: Instant) -> (bool, Option<Duration>) {
        if !lack {
            *self = Looks::default();
            return (false, None);
        }
        let next = *self.next.get_or_insert(now + IDENTITY.0);
        if now < next {
            return (false, Some(next - now));
        }
        self.done = self.done.saturating_add(1);
        let wait = IDENTITY.0.saturating_mul(1 << self.done.min(16)).min(IDENTITY.1);
        self.next = Some(now + wait);
        (true, Some(wait))
    }

    /// After a look in which something was refused: the next one comes as soon as after any refusal, also if the wait is [`jittered`].
    pub fn soon(&mut self, now: Instant) -> Duration {
        let soon = now + REFUSED_MAX * 4 / 5;
        let next = self.next.map_or(soon, |next| next.min(soon));
        self.next = Some(next);
        next - now
    }
}

/// After so many failures in a row.
pub fn backoff(failures: u32) -> Duration {
    let (first, longest) = BACKOFF;
    first
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(longest)
}

/// Between three quarters and five quarters.
pub fn jittered(wait: Duration) -> Duration {
    let percent = 75 + random::u64() % 51;
    wait.saturating_mul(percent as u32) / 100
}

/// After so many refusals in a row.
pub fn refused_wait(times: u32) -> Duration {
    jittered(backoff(times).min(REFUSED_MAX)).min(REFUSED_MAX)
}

/// When to look again. A wait after a refusal differs from VM to VM already, and is never made longer.
pub fn pause(recheck: Option<Duration>, refused: Option<Duration>) -> Option<Duration> {
    match (recheck, refused) {
        (Some(recheck), Some(wait)) if recheck < wait => Some(jittered(recheck).min(wait)),
        (_, Some(wait)) => Some(wait),
        (recheck, None) => recheck.map(jittered),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any pod has none for a while after it was placed, and one may have none for long for another reason.
    #[test]
    fn identities_are_looked_for_later_and_later() {
        let (mut looks, begin) = (Looks::default(), Instant::now());
        assert_eq!(looks.turn(false, begin), (false, None));
        assert_eq!(looks.turn(true, begin), (false, Some(IDENTITY.0)));
        let mut now = begin + IDENTITY.0;
        for wait in [20, 40, 80, 160, 320, 600, 600].map(Duration::from_secs) {
            assert_eq!(looks.turn(true, now), (true, Some(wait)));
            assert_eq!(looks.turn(true, now), (false, Some(wait)), "by the way");
            now += wait;
        }
        assert_eq!(looks.turn(false, now), (false, None));
        assert_eq!(looks.turn(true, now), (false, Some(IDENTITY.0)));
    }

    /// People are told that it is tried again within that time.
    #[test]
    fn what_was_refused_is_looked_for_again_within_a_minute() {
        let (mut looks, mut now) = (Looks::default(), Instant::now());
        looks.turn(true, now);
        now += IDENTITY.0;
        assert_eq!(looks.turn(true, now), (true, Some(2 * IDENTITY.0)));
        assert_eq!(looks.soon(now), 2 * IDENTITY.0, "made longer");
        for _ in 0..9 {
            now += REFUSED_MAX;
            assert!(looks.turn(true, now).0);
            assert!(looks.soon(now) * 5 / 4 <= REFUSED_MAX);
        }
    }

    #[test]
    fn waits_grow_to_a_bound_and_differ() {
        let waits: Vec<_> = (1..20).map(backoff).collect();
        assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!((waits[0], waits[1], waits[18]), (BACKOFF.0, 2 * BACKOFF.0, BACKOFF.1));
        assert_eq!(backoff(u32::MAX), BACKOFF.1);
        let some: std::collections::BTreeSet<_> = (0..50).map(|_| jittered(BACKOFF.1)).collect();
        assert!(some.len() > 5);
        let (low, high) = (BACKOFF.1 * 3 / 4, BACKOFF.1 * 5 / 4);
        assert!(some.iter().all(|wait| (low..=high).contains(wait)));
    }

    #[test]
    fn after_refusals_nobody_waits_longer_than_was_said() {
        for times in [1, 3, 6, 7, 9, 30, u32::MAX] {
            for _ in 0..50 {
                let wait = refused_wait(times);
                assert!(
                    wait <= REFUSED_MAX && wait >= backoff(times).min(REFUSED_MAX) * 3 / 4,
                    "{wait:?}"
                );
            }
        }
        let (some, more) = (Duration::from_secs(10), Duration::from_secs(40));
        for _ in 0..50 {
            assert_eq!(pause(Some(more), Some(some)), Some(some));
            assert_eq!(pause(Some(some), Some(some)), Some(some), "made longer");
            let sooner = pause(Some(some), Some(more)).unwrap();
            assert!(sooner < more && sooner >= some * 3 / 4, "{sooner:?}");
        }
        assert_eq!((pause(None, Some(some)), pause(None, None)), (Some(some), None));
        assert!(pause(Some(more), None).unwrap() >= more * 3 / 4);
    }
}
