//! An engine's time-outs on Kubernetes, all from `spec.faultTolerance.detectionMs` (docs/kubernetes.md). Pure.
//!
//! Whoever asks for a longer detection than the default says that a machine here may stand still for that much longer without being dead. A time-out
//! that waits for somebody then waits for the work, which is its default, and for one such stop of every machine that the work needs.

use ftvm_engine::control::Timing;

use crate::config::TimingConfig;

/// The time-outs that belong to a detection of so many milliseconds. Shorter than by default, it makes none shorter: how long an answer of the arbiter
/// takes has nothing to do with how soon a silent side is noticed.
pub fn timing(detection_ms: u32) -> TimingConfig {
    let default = Timing::default();
    let stop_ms = detection_ms.saturating_sub(default.peer_lost_ms);
    let with_stops = |work_ms: u32, stops: u32| Some(work_ms.saturating_add(stop_ms.saturating_mul(stops)));
    // As many probes fit into a silence as by default; of a long one, no more than are needed to keep repeating what was lost.
    let probes = default.peer_lost_ms / default.heartbeat_ms;
    TimingConfig {
        heartbeat_ms: Some((detection_ms / probes).clamp(1, default.retry_ms)),
        peer_lost_ms: Some(detection_ms),
        // This machine has to send and to read; the arbiter is on none of those.
        arbiter_deadline_ms: with_stops(default.arbiter_deadline_ms, 1),
        // The follower has to store the epoch, this side to hear of it.
        ack_stall_ms: with_stops(default.ack_stall_ms, 2),
        // The target has half of it for a swap of the record, which has to fit.
        switch_ms: with_stops(default.switch_ms, 2),
        // The holder's machine has to start its seat.
        holder_first_ms: with_stops(default.holder_first_ms, 1),
        // Nobody is waited for: a pause of one's own, T of rule 11, a look at the record.
        retry_ms: None,
        contact_limit_ms: None,
        observe_ms: None,
        // An engine counts the time in which it ran.
        disk_hang_ms: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_detection_has_the_default_time_outs() {
        let detection_ms = ftvm_crds::FaultTolerance::default().detection_ms;
        assert_eq!(timing(detection_ms).resolve(), Timing::default());
    }

    #[test]
    fn machines_that_stand_still_for_long_are_waited_for() {
        let expected = Timing {
            heartbeat_ms: 200,
            peer_lost_ms: 10_000,
            arbiter_deadline_ms: 11_700,
            ack_stall_ms: 29_400,
            switch_ms: 22_400,
            holder_first_ms: 14_700,
            ..Timing::default()
        };
        assert_eq!(timing(10_000).resolve(), expected);
    }

    #[test]
    fn a_shorter_detection_shortens_nothing_but_the_probes() {
        let expected = Timing {
            heartbeat_ms: 16,
            peer_lost_ms: 100,
            ..Timing::default()
        };
        assert_eq!(timing(100).resolve(), expected);
    }

    /// Over all that the resource admits.
    #[test]
    fn time_outs_fit_each_other() {
        for detection_ms in 100..=10_000 {
            let timing = timing(detection_ms).resolve();
            assert!(timing.peer_lost_ms >= 6 * timing.heartbeat_ms, "{timing:?}");
            assert!(timing.heartbeat_ms <= timing.retry_ms, "{timing:?}");
            // A side that is silent is lost before anything of it is taken for late.
            assert!(timing.ack_stall_ms > timing.peer_lost_ms, "{timing:?}");
            assert!(timing.arbiter_deadline_ms > timing.peer_lost_ms, "{timing:?}");
            // What is asked before a hand-over is given up may be answered.
            assert!(timing.switch_ms > timing.arbiter_deadline_ms, "{timing:?}");
        }
    }
}
