//! An engine's time-outs on Kubernetes, from `spec.faultTolerance` (docs/kubernetes.md): those of disks as they are there, all others by `detectionMs`.
//! Pure.
//!
//! Whoever asks for a longer detection than the default says that a machine here may stand still for that much longer without being dead. A time-out
//! that waits for somebody then waits for the work, which is its default, and for one such stop of every machine that the work needs.

use ftvm_crds::FaultTolerance;
use ftvm_engine::control::Timing;

use crate::config::TimingConfig;

/// The time-outs of an engine. A detection that is shorter than by default makes none shorter: how long an answer of the arbiter takes has nothing to do
/// with how soon a silent side is noticed.
pub fn timing(tolerance: &FaultTolerance) -> TimingConfig {
    let default = Timing::default();
    let detection_ms = tolerance.detection_ms;
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
        // Of these an engine counts the time in which it ran, or its guest: stops are not in it.
        disk_hang_ms: unless(default.disk_hang_ms, tolerance.disk_hang_ms),
        disk_hold_ms: unless(default.disk_hold_ms, tolerance.disk_hold_ms),
    }
}

/// What is as by default is not said.
fn unless(default_ms: u32, ms: u32) -> Option<u32> {
    (ms != default_ms).then_some(ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detecting(detection_ms: u32) -> TimingConfig {
        timing(&FaultTolerance {
            detection_ms,
            ..FaultTolerance::default()
        })
    }

    #[test]
    fn the_default_tolerance_has_the_default_time_outs() {
        assert_eq!(timing(&FaultTolerance::default()).resolve(), Timing::default());
    }

    #[test]
    fn disks_are_waited_for_as_the_resource_says_whatever_the_detection() {
        for (disk_hang_ms, disk_hold_ms) in [(500, 0), (60_000, 60_000)] {
            for detection_ms in [100, 10_000] {
                let tolerance = FaultTolerance {
                    detection_ms,
                    disk_hang_ms,
                    disk_hold_ms,
                    ..FaultTolerance::default()
                };
                let expected = Timing {
                    disk_hang_ms,
                    disk_hold_ms,
                    ..detecting(detection_ms).resolve()
                };
                assert_eq!(timing(&tolerance).resolve(), expected);
            }
        }
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
        assert_eq!(detecting(10_000).resolve(), expected);
    }

    #[test]
    fn a_shorter_detection_shortens_nothing_but_the_probes() {
        let expected = Timing {
            heartbeat_ms: 16,
            peer_lost_ms: 100,
            ..Timing::default()
        };
        assert_eq!(detecting(100).resolve(), expected);
    }

    /// Over all that the resource admits.
    #[test]
    fn time_outs_fit_each_other() {
        for detection_ms in 100..=10_000 {
            let timing = detecting(detection_ms).resolve();
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
