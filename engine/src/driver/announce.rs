//! Tells the network where the guest's addresses are.
//!
//! Bridges learn an address's port from the source of frames. A host that stood still and goes on may send old frames once
//! more, and they teach the bridge a port behind which nobody answers, until the guest speaks again. So the active side
//! announces the guest's addresses when it takes over, when it sees a frame with such an address come from outside, and
//! when a seat connects: whoever lost its place does that as soon as it is back.
//!
//! Invariant: what an active side announces is the guest's output, and leaves through the gate like all of it.
//!
//! A standby whose leader's connection closed, whose leader's daemon says that it is gone, or whose leader stands still and
//! asked it to take over, calls frames to its own tap before it has asked the arbiter ([`Driver::call_frames_here`]): a frame
//! that goes to a dead engine is lost, and its sender waits for a retransmission timer, 200 ms as a rule. That is no output
//! of the guest, says nothing of its state, and gives no right to anything. Should the leader live, its own tap gets the call too (it is a broadcast), and the leader announces
//! the addresses again as soon as its gate admits that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_protocol::core::RoleName;
use ftvm_protocol::identity::Epoch;

use super::{Driver, Guest};
use crate::outbox::Output;

/// Between two announcements at first, and at most: each of a row doubles it, so that two hosts that were given one
/// address by mistake don't flood the network.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// After so long without an announcement a new row begins.
const CALM: Duration = Duration::from_secs(5);

/// When to announce next.
#[derive(Debug, Default)]
pub struct Announcer {
    last: Option<Instant>,
    pause: Duration,
    due: Option<Instant>,
}

impl Announcer {
    /// The network may have learnt something wrong. However many of these come in a row, an announcement follows the last.
    pub fn ask(&mut self, now: Instant) {
        if self.due.is_some() {
            return;
        }
        let calm = self.last.is_none_or(|last| now.saturating_duration_since(last) >= CALM);
        if calm {
            self.pause = Duration::ZERO;
        }
        self.due = Some(self.last.map_or(now, |last| now.max(last + self.pause)));
    }

    /// When the next one is due.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether to announce now.
    pub fn take(&mut self, now: Instant) -> bool {
        let due = self.due.take_if(|due| *due <= now).is_some();
        if due {
            self.last = Some(now);
            self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
        due
    }
}

impl Driver {
    /// The network may believe that the guest is elsewhere.
    pub(super) fn ask_to_announce(&mut self) {
        if self.guest != Guest::None && self.core.status().role == RoleName::Active {
            self.announcer.ask(Instant::now());
        }
    }

    /// Announces if that is due.
    pub(super) fn announce_if_due(&mut self) {
        if self.guest.is_here() && self.announcer.take(Instant::now()) {
            tracing::debug!("the guest's addresses are announced again");
            self.announce(self.seat.gate().epoch());
        }
    }

    /// Has the network send what is for the guest to this seat's taps, which keep it until the guest may be here.
    pub(super) fn call_frames_here(&self) {
        for (nic, mac) in self.seat.macs.iter().enumerate() {
            self.seat.send_directly(nic, &rarp_announcement(*mac));
        }
    }

    /// Tells the network where the guest's addresses are now, as soon as the gate admits `epoch`; at once for a guest that stands
    /// still until a standby has joined.
    pub(super) fn announce(&mut self, epoch: Epoch) {
        if self.holds_now() {
            return self.call_frames_here();
        }
        for (nic, mac) in self.seat.macs.clone().into_iter().enumerate() {
            let frame = Output::Frame {
                nic: nic as u8,
                bytes: Arc::from(rarp_announcement(mac)),
            };
            self.seat.outbox.put(epoch, frame);
        }
    }
}

/// A reverse ARP request of the guest's own address (RFC 903), broadcast: bridges learn where the address is, and
/// nobody answers.
fn rarp_announcement(mac: [u8; 6]) -> Vec<u8> {
    const FRAME_BYTES_MIN: usize = 60;
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 4]);
    frame.resize(FRAME_BYTES_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_announcement_is_a_reverse_arp_request() {
        let mac = [2, 0, 0, 0, 0, 1];
        let frame = rarp_announcement(mac);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac);
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[20..22], [0, 3]);
        assert_eq!(frame[22..28], mac);
        assert_eq!(frame[32..38], mac);
    }

    #[test]
    fn the_first_is_announced_at_once_and_the_last_of_a_row_too() {
        let now = Instant::now();
        let mut announcer = Announcer::default();
        assert!(!announcer.take(now));
        announcer.ask(now);
        assert!(announcer.take(now));
        // Between two announcements: one more follows.
        announcer.ask(now);
        announcer.ask(now);
        assert!(!announcer.take(now));
        let due = announcer.due().expect("asked");
        assert!(due <= now + PAUSE_MIN);
        assert!(announcer.take(due));
        assert!(!announcer.take(due));
        assert_eq!(announcer.due(), None);
    }

    #[test]
    fn a_long_row_slows_down_and_calm_ends_it() {
        let mut now = Instant::now();
        let mut announcer = Announcer::default();
        let mut pauses = Vec::new();
        for _ in 0..16 {
            announcer.ask(now);
            let due = announcer.due().expect("asked");
            pauses.push(due - now);
            now = due;
            assert!(announcer.take(now));
        }
        assert!(pauses.is_sorted(), "{pauses:?}");
        assert_eq!((pauses[0], pauses[15]), (Duration::ZERO, PAUSE_MAX));
        now += CALM;
        announcer.ask(now);
        assert_eq!(announcer.due(), Some(now));
    }
}
