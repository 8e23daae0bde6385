//! How long the session's peer has been silent: a reason to act (rule 3), never a proof of anything.
//!
//! Silence is counted in time in which this process ran. A step that comes late adds no more than one on time would
//! have, and the first late step of a silence leaves at least half of the limit to hear something in: when *we* did not
//! run, we could not have heard. Only the first, so that a host on which every step is late still notices a death.
//!
//! Whatever a peer that is in a session with us says breaks a silence, for it shows that the peer lives. But a peer that talks and answers no probe
//! for several limits does not hear us, and a session needs both directions. Contact in the sense of rule 11 is
//! something else and stays an answer to an own probe ([`super::links`]).

use crate::identity::Incarnation;

/// A peer that is heard but answers nothing is lost after so many limits.
const DEAF_LIMITS: u64 = 4;

/// Counts for the peer of one session at a time.
#[derive(Debug, Clone, Default)]
pub(super) struct Silence {
    peer: Option<Incarnation>,
    /// Since anything came from the peer.
    unheard_ms: u64,
    /// Since the newest probe that was answered.
    unanswered_ms: u64,
    /// This silence was prolonged for a late step already.
    prolonged: bool,
}

impl Silence {
    /// `elapsed_ms` have passed since the last step; a step on time comes after `on_time_ms` at the latest.
    pub(super) fn pass(&mut self, peer: Option<Incarnation>, elapsed_ms: u64, on_time_ms: u64, limit_ms: u64) {
        if peer != self.peer {
            *self = Self {
                peer,
                ..Self::default()
            };
            return;
        }
        let counted_ms = elapsed_ms.min(on_time_ms);
        self.unheard_ms += counted_ms;
        self.unanswered_ms += counted_ms;
        if elapsed_ms > on_time_ms && !self.prolonged {
            self.prolonged = true;
            self.unheard_ms = self.unheard_ms.min(limit_ms / 2);
            self.unanswered_ms = self.unanswered_ms.min(DEAF_LIMITS * limit_ms - limit_ms / 2);
        }
    }

    /// Something came from `peer`.
    pub(super) fn heard(&mut self, peer: Incarnation) {
        if self.peer == Some(peer) {
            self.unheard_ms = 0;
            self.prolonged = false;
        }
    }

    /// `peer` answered a probe that was sent so long ago.
    pub(super) fn answered(&mut self, peer: Incarnation, age_ms: u64) {
        if self.peer == Some(peer) {
            self.unanswered_ms = self.unanswered_ms.min(age_ms);
        }
    }

    /// How much longer the silence may last before `peer` is lost; `None` if it is.
    pub(super) fn left_ms(&self, peer: Incarnation, limit_ms: u64) -> Option<u64> {
        if self.peer != Some(peer) {
            // A session that begins in this step.
            return Some(limit_ms);
        }
        let unheard = limit_ms.checked_sub(self.unheard_ms);
        let unanswered = (DEAF_LIMITS * limit_ms).checked_sub(self.unanswered_ms);
        unheard.min(unanswered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::SeatId;

    const LIMIT_MS: u64 = 300;
    const ON_TIME_MS: u64 = 75;
    const PEER: Incarnation = Incarnation {
        seat: SeatId(1),
        start: 1,
    };

    fn begun() -> Silence {
        let mut silence = Silence::default();
        silence.pass(Some(PEER), 0, ON_TIME_MS, LIMIT_MS);
        silence
    }

    /// Time until the peer counts as lost if every step takes so long.
    fn time_to_loss(mut silence: Silence, step_ms: u64) -> u64 {
        let mut passed_ms = 0;
        while silence.left_ms(PEER, LIMIT_MS).is_some() {
            silence.pass(Some(PEER), step_ms, ON_TIME_MS, LIMIT_MS);
            passed_ms += step_ms;
        }
        passed_ms
    }

    #[test]
    fn a_silent_peer_is_lost_after_the_limit() {
        assert_eq!(time_to_loss(begun(), 50), 350);
        assert_eq!(time_to_loss(begun(), 1), 301);
        let mut talking = begun();
        for _ in 0..10 {
            talking.pass(Some(PEER), 50, ON_TIME_MS, LIMIT_MS);
            talking.heard(PEER);
        }
        assert_eq!(time_to_loss(talking, 50), 350);
    }

    #[test]
    fn own_stalls_do_not_count_but_do_not_blind_either() {
        // 250 ms of real silence, then a stall of ten seconds: half of the limit is left to hear something.
        let mut silence = begun();
        for _ in 0..5 {
            silence.pass(Some(PEER), 50, ON_TIME_MS, LIMIT_MS);
        }
        silence.pass(Some(PEER), 10_000, ON_TIME_MS, LIMIT_MS);
        assert_eq!(silence.left_ms(PEER, LIMIT_MS), Some(150));
        // The second stall of one silence is not answered by more patience.
        silence.pass(Some(PEER), 10_000, ON_TIME_MS, LIMIT_MS);
        assert_eq!(silence.left_ms(PEER, LIMIT_MS), Some(75));
        assert_eq!(time_to_loss(silence, 10_000), 20_000);
        // Where every step comes late a death is noticed all the same.
        assert!(time_to_loss(begun(), 200) <= 1200);
    }

    #[test]
    fn a_peer_that_talks_and_answers_nothing_is_lost_too() {
        let mut silence = begun();
        let mut passed_ms = 0;
        while silence.left_ms(PEER, LIMIT_MS).is_some() {
            silence.pass(Some(PEER), 50, ON_TIME_MS, LIMIT_MS);
            silence.heard(PEER);
            passed_ms += 50;
        }
        assert_eq!(passed_ms, DEAF_LIMITS * LIMIT_MS + 50);
        silence.answered(PEER, 20);
        assert_eq!(silence.left_ms(PEER, LIMIT_MS), Some(LIMIT_MS));
    }

    #[test]
    fn silence_of_one_peer_says_nothing_of_the_next() {
        let mut silence = begun();
        silence.pass(Some(PEER), 60, ON_TIME_MS, LIMIT_MS);
        let next = Incarnation { start: 2, ..PEER };
        silence.heard(next);
        assert_eq!(silence.left_ms(PEER, LIMIT_MS), Some(240));
        assert_eq!(silence.left_ms(next, LIMIT_MS), Some(LIMIT_MS));
        silence.pass(Some(next), 60, ON_TIME_MS, LIMIT_MS);
        assert_eq!(silence.left_ms(next, LIMIT_MS), Some(LIMIT_MS));
    }
}
