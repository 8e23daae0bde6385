//! The source of a planned switchover: what is done before its guest stands still.
//!
//! ```text
//!   target has claimed the record ─► running epoch ends, is acknowledged ─► core hears of the claim ─► guest stands still
//! ```
//!
//! Whatever is under way when the guest stops has to reach the target before it may run there: pages of a long epoch, and epochs
//! with a flush, which the target's disk has to take. So the core hears of a claim a little later than it came, as if the network had
//! been slow, and the guest runs, and answers, until little is left.

use std::time::{Duration, Instant};

use ftvm_protocol::core::Event;
use ftvm_protocol::identity::{Epoch, LinkId};
use ftvm_protocol::message::Message;

use super::Driver;

/// So long a claim waits at most.
const WAITS_MAX: Duration = Duration::from_millis(300);
/// Between two looks whether it is time.
const LOOK: Duration = Duration::from_millis(1);

/// How long a claim waits where a switchover may take `switch_ms`: a small part of the half of it after which the target gives it up.
pub fn waits(switch_ms: u32) -> Duration {
    WAITS_MAX.min(Duration::from_millis(u64::from(switch_ms) / 10))
}

/// A claim of which the core has not heard yet.
pub struct Claimed {
    link: LinkId,
    message: Message,
    /// The epoch that ran when it came.
    running: Epoch,
    until: Instant,
}

impl Claimed {
    /// When to look again whether it is time.
    pub fn due(&self) -> Instant {
        self.until.min(Instant::now() + LOOK)
    }
}

impl Driver {
    /// A control message came.
    pub(super) fn received(&mut self, link: LinkId, message: Message) {
        match message {
            Message::Claimed { .. } => return self.claimed(link, message),
            // What was claimed is so no more.
            Message::SwitchRefused { .. } => self.claimed = None,
            _ => {}
        }
        self.step(Event::Received { link, message });
    }

    fn claimed(&mut self, link: LinkId, message: Message) {
        let (running, until) = match &self.claimed {
            // Said again.
            Some(claimed) => (claimed.running, claimed.until),
            None => (self.seat.gate().epoch(), Instant::now() + self.seat.claim_waits),
        };
        if let Some(leading) = &mut self.leading {
            leading.pacer.hurry();
        }
        self.claimed = Some(Claimed {
            link,
            message,
            running,
            until,
        });
        self.drive_hand_over();
    }

    /// Lets the core hear of a claim once little of the guest is under way, or it has waited long enough.
    pub(super) fn drive_hand_over(&mut self) {
        let Some(claimed) = &self.claimed else { return };
        let waits = Instant::now() < claimed.until && self.has_much_under_way(claimed.running);
        if !waits && let Some(Claimed { link, message, .. }) = self.claimed.take() {
            self.step(Event::Received { link, message });
        }
    }

    /// Whether a claim that came in `running` has to wait.
    fn has_much_under_way(&self, running: Epoch) -> bool {
        // A guest that stands still already has nothing under way.
        let leading = self.leading.as_ref().filter(|_| self.works_on_epoch());
        leading.is_some_and(|leading| {
            let under_way = UnderWay {
                epoch: self.seat.gate().epoch(),
                unacknowledged: leading.unacknowledged(),
                flushed: leading.flushed,
                flushes: self.seat.disk_log.contains_flush(),
                settles: !self.seat.is_settled(),
            };
            under_way.is_much(running)
        })
    }
}

/// What a guest that stopped now would have under way.
#[derive(Debug, Clone, Copy)]
struct UnderWay {
    /// The running epoch.
    epoch: Epoch,
    /// The oldest one that is sealed and not acknowledged.
    unacknowledged: Option<Epoch>,
    /// The last sealed one with a flush.
    flushed: Option<Epoch>,
    /// The running one has a flush.
    flushes: bool,
    /// This seat's disks have not taken yet what its own takeover left to them: it can't follow before.
    settles: bool,
}

impl UnderWay {
    /// Whether a guest that stopped now would wait for more than a short epoch. `running`: the one that ran when the claim came.
    fn is_much(&self, running: Epoch) -> bool {
        let waits = |epoch: Epoch| self.unacknowledged.is_some_and(|oldest| oldest <= epoch);
        let long = self.epoch <= running || waits(running);
        long || self.flushes || self.flushed.is_some_and(waits) || self.settles
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LITTLE: UnderWay = UnderWay {
        epoch: 9,
        unacknowledged: None,
        flushed: None,
        flushes: false,
        settles: false,
    };

    #[test]
    fn a_claim_waits_no_longer_than_its_target_does() {
        for switch_ms in [3_000, 22_400] {
            assert_eq!(waits(switch_ms), WAITS_MAX);
        }
        assert_eq!(waits(400), Duration::from_millis(40));
    }

    #[test]
    fn a_guest_stops_once_what_the_claim_found_under_way_is_through() {
        let in_epoch = |epoch, unacknowledged| UnderWay {
            epoch,
            unacknowledged,
            ..LITTLE
        };
        assert!(in_epoch(8, None).is_much(8), "the epoch has not ended");
        assert!(in_epoch(9, Some(8)).is_much(8), "it is on its way");
        assert!(in_epoch(9, Some(7)).is_much(8));
        assert!(!in_epoch(9, None).is_much(8));
        assert!(
            !in_epoch(10, Some(9)).is_much(8),
            "a guest that always answers stops, too"
        );
    }

    #[test]
    fn a_guest_does_not_stop_where_it_would_wait_for_a_disk() {
        let flushed = |unacknowledged| UnderWay {
            epoch: 11,
            unacknowledged,
            flushed: Some(10),
            ..LITTLE
        };
        assert!(flushed(Some(9)).is_much(8));
        assert!(flushed(Some(10)).is_much(8), "the target's disk takes it");
        assert!(!flushed(None).is_much(8));
        let others = [
            UnderWay {
                flushes: true,
                ..LITTLE
            },
            UnderWay {
                settles: true,
                ..LITTLE
            },
        ];
        assert!(others.iter().all(|under_way| under_way.is_much(8)));
    }
}
