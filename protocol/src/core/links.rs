//! Links and heartbeats. Contact is an answer to an own probe, dated to when the probe was sent.
//!
//! Invariant: over a link goes only what its version has. A driver on the other side closes a link that brings anything else, and
//! with it a session that works.

use std::collections::VecDeque;

use crate::identity::{Incarnation, LinkId};
use crate::message::{Message, View};

use super::Action;

/// Most probes that wait for an answer on one link.
const MAX_OPEN_PROBES: usize = 64;

#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) peer: Incarnation,
    /// Wire version agreed on.
    version: u16,
    /// What the peer said of itself last.
    pub(super) view: Option<View>,
    /// When the newest answered probe was sent.
    pub(super) contact_ms: Option<u64>,
    open: VecDeque<(u64, u64)>,
    probes: u64,
    next_probe_ms: u64,
}

impl Link {
    pub(super) fn new(id: LinkId, peer: Incarnation, version: u16, now_ms: u64) -> Self {
        Self {
            id,
            peer,
            version,
            view: None,
            contact_ms: None,
            open: VecDeque::new(),
            probes: 0,
            next_probe_ms: now_ms,
        }
    }

    /// Tells the peer, in words that its version has; if it has none for this, it is not told.
    pub(super) fn say(&self, message: Message, actions: &mut Vec<Action>) {
        let link = self.id;
        let word = message.spoken_in(self.version);
        actions.extend(word.map(|message| Action::Send { link, message }));
    }

    /// Number of the probe to send now, if one is due.
    pub(super) fn probe_due(&mut self, now_ms: u64, interval_ms: u64) -> Option<u64> {
        if now_ms < self.next_probe_ms {
            return None;
        }
        self.next_probe_ms = now_ms + interval_ms;
        self.probes += 1;
        if self.open.len() == MAX_OPEN_PROBES {
            self.open.pop_front();
        }
        self.open.push_back((self.probes, now_ms));
        Some(self.probes)
    }

    /// An answer came: when was its probe sent? `None` if there is no such probe, or it was answered before.
    pub(super) fn answered(&mut self, n: u64) -> Option<u64> {
        let at = self.open.iter().position(|(open, _)| *open == n)?;
        let (_, sent_ms) = self.open[at];
        // A newer answer makes the older probes pointless.
        self.open.drain(..=at);
        self.contact_ms = Some(self.contact_ms.map_or(sent_ms, |contact| contact.max(sent_ms)));
        Some(sent_ms)
    }

    pub(super) fn next_probe_ms(&self) -> u64 {
        self.next_probe_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::SeatId;
    use crate::wire::VERSION_MAX;

    #[test]
    fn a_late_answer_is_old_contact_and_a_second_one_none() {
        let peer = Incarnation {
            seat: SeatId(1),
            start: 1,
        };
        let mut link = Link::new(LinkId(1), peer, VERSION_MAX, 100);
        assert_eq!(link.probe_due(100, 50), Some(1));
        assert_eq!(link.probe_due(120, 50), None);
        assert_eq!(link.probe_due(150, 50), Some(2));
        assert_eq!(link.answered(1), Some(100));
        assert_eq!(link.contact_ms, Some(100));
        assert_eq!(link.answered(1), None);
        assert_eq!(link.answered(9), None);
        assert_eq!(link.answered(2), Some(150));
        assert_eq!(link.contact_ms, Some(150));
    }
}
