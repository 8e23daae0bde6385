//! Frames for the guest that the source of a switchover passes on after its target has begun to run it.
//!
//! ```text
//!   network ─► source's taps ─(looked at each millisecond)─► Input of the session that ended here ─► guest
//! ```
//!
//! Bridges learn where the guest is when the target calls, and what they had sent to the source by then still comes. Lost, each
//! of them would cost its sender a retransmission timer. They are taken as from a network: from the peer alone, for a while, and no more
//! than a guest that stands still may have waiting.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ftvm_protocol::wire::Kind;

use super::Queue;
use crate::replication::epoch::{Port, decode_input};
use crate::replication::link::Frame;
use crate::seat_io::Inbox;

/// How long after the switchover. A source follows, or is lost, much earlier.
const LASTS: Duration = Duration::from_secs(1);

/// Takes such frames.
pub struct LateInput {
    inbox: Arc<Inbox>,
    nics: u16,
    until: Mutex<Option<Instant>>,
    /// The driver knows that something came, and has not looked yet.
    told: AtomicBool,
    queue: Queue,
}

impl LateInput {
    /// For a guest with `nics` interfaces; nothing is taken yet.
    pub fn new(inbox: Arc<Inbox>, nics: u16, queue: Queue) -> Self {
        Self {
            inbox,
            nics,
            until: Mutex::default(),
            told: AtomicBool::new(false),
            queue,
        }
    }

    fn until(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This seat takes the guest from a source that stands still.
    pub fn begins(&self, now: Instant) {
        *self.until() = Some(now + LASTS);
    }

    /// The guest is not this seat's any more.
    pub fn ends(&self) {
        *self.until() = None;
    }

    /// A frame of a session that nobody follows here. What is no input, comes late, or is broken, is dropped.
    pub fn frame(&self, frame: &Frame, now: Instant) {
        if frame.kind != Kind::Input || self.until().is_none_or(|until| now >= until) {
            return;
        }
        let Ok(items) = decode_input(&frame.payload, self.nics) else {
            return;
        };
        for item in items {
            if let Port::Nic(nic) = item.port {
                self.inbox.inject_if_room(nic, item.bytes);
            }
        }
        if !self.told.swap(true, Ordering::SeqCst) {
            self.queue.late_input();
        }
    }

    /// The driver has the guest's interfaces look from now on.
    pub fn taken(&self) {
        self.told.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::super::queue;
    use super::*;
    use crate::replication::epoch::{PortData, encode_input};

    fn input(nic: u16, bytes: Vec<u8>) -> Frame {
        let item = PortData {
            port: Port::Nic(nic),
            bytes,
        };
        Frame {
            kind: Kind::Input,
            epoch: 9,
            session: 1,
            payload: encode_input(&[item]).remove(0),
        }
    }

    #[test]
    fn what_comes_after_a_switchover_reaches_the_guest_for_a_while() {
        let (queue, inputs) = queue();
        let inbox = Arc::new(Inbox::new(1, || {}));
        let late = LateInput::new(inbox.clone(), 1, queue);
        let now = Instant::now();
        late.frame(&input(0, vec![1; 60]), now);
        assert_eq!(inbox.waiting(0), 0, "there was no switchover");
        late.begins(now);
        late.frame(&input(0, vec![1; 60]), now);
        late.frame(&input(0, vec![2; 60]), now);
        assert_eq!(inbox.waiting(0), 2);
        assert_eq!(inputs.0.try_iter().count(), 1, "the driver is told once");
        late.taken();
        late.frame(&input(0, vec![3; 60]), now);
        assert_eq!(inputs.0.try_iter().count(), 1);
        late.frame(&input(0, vec![4; 60]), now + LASTS);
        late.ends();
        late.frame(&input(0, vec![4; 60]), now);
        assert_eq!(inbox.waiting(0), 3);
    }

    #[test]
    fn a_hostile_peer_fills_no_memory_and_reaches_no_other_interface() {
        let (queue, _inputs) = queue();
        let inbox = Arc::new(Inbox::new(1, || {}));
        let late = LateInput::new(inbox.clone(), 1, queue);
        let now = Instant::now();
        late.begins(now);
        late.frame(&input(1, vec![1; 60]), now);
        let mut broken = input(0, vec![1; 60]);
        broken.payload.truncate(7);
        late.frame(&broken, now);
        let other = Frame {
            kind: Kind::EpochPages,
            ..input(0, vec![1; 60])
        };
        late.frame(&other, now);
        assert_eq!(inbox.waiting(0), 0);
        for _ in 0..10_000 {
            late.frame(&input(0, vec![1; 9000]), now);
        }
        assert!((900..1000).contains(&inbox.waiting(0)), "{}", inbox.waiting(0));
    }
}
