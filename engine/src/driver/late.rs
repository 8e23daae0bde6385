//! Input that comes late: frames for a guest that has just moved by a planned switchover.
//!
//! ```text
//!   client ─► bridge, which does not know yet ─► former source's tap ──link──► target ─► guest
//! ```
//! A bridge may send frames to the source's tap for a while after the guest runs at the target, and some lie there already. A sender
//! would wait for its retransmission timer (200 ms as a rule) for each. So the source passes them on: while its guest stands still as
//! input of the next epoch ([`Driver::stands_for_switchover`]), and for some time after it follows.
//!
//! To the guest these are frames that took a detour: they may come late, twice or never, as on any network, and
//! nothing depends on them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_protocol::identity::{Epoch, SessionId};
use ftvm_protocol::wire::Kind;

use super::follow::Receiving;
use super::{Driver, Queue};
use crate::replication::epoch::{Port, PortData, decode_input, encode_input};
use crate::replication::link::{Frame, LinkSender};
use crate::seat_io::Inbox;

/// Shortest Ethernet header: whatever is shorter is no frame.
const FRAME_BYTES_MIN: usize = 14;
/// How long after a switchover. Bridges learn within milliseconds where the guest speaks now.
const LATE: Duration = Duration::from_secs(2);

/// Where frames with the data of a session go.
#[derive(Default)]
pub enum Route {
    /// No session is followed.
    #[default]
    Nowhere,
    /// To the thread that receives it.
    Follower(Receiving),
    /// The session ended with a switchover to here.
    Late(LateInput),
}

impl Route {
    /// Takes a frame of a session. Must not block.
    pub fn frame(&self, frame: Frame) {
        match self {
            // A session that is over here, and not yet at the other side.
            Route::Nowhere => {}
            Route::Follower(receiving) => receiving.frame(frame),
            Route::Late(late) => late.frame(&frame),
        }
    }
}

/// The target's end: takes what the former source passes on.
pub struct LateInput {
    /// The session in which the source led.
    session: SessionId,
    /// The guest that runs here contains the input up to its end.
    epoch: Epoch,
    until: Instant,
    inbox: Arc<Inbox>,
    nics: u16,
    queue: Queue,
}

impl LateInput {
    /// From a link's thread.
    fn frame(&self, frame: &Frame) {
        let of_session = frame.kind == Kind::Input && frame.session == self.session.0;
        if !of_session || frame.epoch <= self.epoch || Instant::now() > self.until {
            return;
        }
        // What can't be decoded is lost as any frame may be: nothing depends on it.
        for PortData { port, bytes } in decode_input(&frame.payload, self.nics).unwrap_or_default() {
            if let Port::Nic(nic) = port
                && bytes.len() >= FRAME_BYTES_MIN
                && self.inbox.offer(nic, bytes)
            {
                self.queue.late_input();
            }
        }
    }
}

/// The former source's end: where what its taps get goes.
pub struct PassedOn {
    session: SessionId,
    /// After this one.
    epoch: Epoch,
    leader: LinkSender,
    until: Instant,
}

impl Driver {
    /// This seat takes over as planned from `epoch`, the last of `session`: what the source passes on is for the guest.
    pub(super) fn take_late_input(&self, session: SessionId, epoch: Epoch) {
        self.set_route(Route::Late(LateInput {
            session,
            epoch,
            until: Instant::now() + LATE,
            inbox: self.seat.inbox.clone(),
            nics: self.seat.macs.len() as u16,
            queue: self.queue.clone(),
        }));
    }

    /// This seat led `session` until `epoch`, and follows now.
    pub(super) fn pass_late_input_on(&mut self, session: SessionId, epoch: Epoch) {
        self.passed_on = self.following.as_ref().map(|following| PassedOn {
            session,
            epoch,
            leader: following.leader.clone(),
            until: Instant::now() + LATE,
        });
    }

    /// Whether what this seat's taps get is passed on. Not once the leader is lost: then the guest may soon be here.
    pub(super) fn passes_late_input_on(&mut self) -> bool {
        let Some(passed_on) = &self.passed_on else { return false };
        if Instant::now() > passed_on.until || self.following.is_none() || self.core.status().leader_lost {
            self.passed_on = None;
        }
        self.passed_on.is_some()
    }

    /// Looks for frames at the taps of a guest that does not run here any more, and passes them on.
    pub(super) fn drive_late_input(&mut self) {
        if self.stands_for_switchover() {
            return self.seat.pass_input_on();
        }
        if !self.passes_late_input_on() {
            return;
        }
        let Some(PassedOn {
            session, epoch, leader, ..
        }) = &self.passed_on
        else {
            return;
        };
        self.seat.late_input(|nic, frame| {
            let item = PortData {
                port: Port::Nic(nic),
                bytes: frame.to_vec(),
            };
            for payload in encode_input(&[item]) {
                // Full or down: the network may lose frames, and the client asks again.
                let _ = leader.try_send(Kind::Input, epoch + 1, session.0, payload);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only what the source passes on of this session, of what the guest does not contain, and not for ever.
    #[test]
    fn nothing_else_is_taken_for_late_input() {
        let inbox = Arc::new(Inbox::new(1, || {}).expect("an eventfd"));
        let (queue, inputs) = crate::driver::queue();
        let late = |until: Instant| LateInput {
            session: SessionId(5),
            epoch: 7,
            until,
            inbox: inbox.clone(),
            nics: 1,
            queue: queue.clone(),
        };
        let frame = |kind: Kind, session: u64, epoch: Epoch, nic: u16| Frame {
            kind,
            epoch,
            session,
            payload: encode_input(&[PortData {
                port: Port::Nic(nic),
                bytes: vec![1; 60],
            }])
            .remove(0),
        };
        let soon = Instant::now() + Duration::from_secs(3600);
        for other in [
            frame(Kind::EpochPages, 5, 8, 0),
            frame(Kind::Input, 4, 8, 0),
            frame(Kind::Input, 5, 7, 0),
            frame(Kind::Input, 5, 8, 1),
            Frame {
                payload: vec![0xff; 9],
                ..frame(Kind::Input, 5, 8, 0)
            },
            Frame {
                payload: encode_input(&[PortData {
                    port: Port::Nic(0),
                    bytes: vec![1; FRAME_BYTES_MIN - 1],
                }])
                .remove(0),
                ..frame(Kind::Input, 5, 8, 0)
            },
        ] {
            late(soon).frame(&other);
            assert_eq!(inbox.offered_bytes(), 0, "{other:?}");
        }
        late(Instant::now()).frame(&frame(Kind::Input, 5, 8, 0));
        assert_eq!(inbox.offered_bytes(), 0, "too late");
        assert!(inputs.0.try_recv().is_err(), "the driver is not told");
        late(soon).frame(&frame(Kind::Input, 5, 8, 0));
        assert!(inbox.offered_bytes() > 0);
        assert!(matches!(inputs.0.try_recv(), Ok(crate::driver::Input::LateFrames)));
    }
}
