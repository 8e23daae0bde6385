//! Connections to the other seats: TCP, TLS 1.3 both ways, frames.
//!
//! ```text
//!   producers ─► LinkSender ─► queue by class ─┐                          ┌─► events(Frame) on the link's thread
//!                (waits when full)             ├─► link thread ◄═TLS═► peer
//!   hub: listens, dials, refuses, one link ────┘   poll(socket, eventfd)  └─► events(Up), events(Down)
//!        to each incarnation
//! ```
//!
//! A link is one connection and one thread that owns its TLS state. It is up once both certificates were verified,
//! both hellos were read and a version was agreed on. Both seats may dial: of two links between the same two
//! incarnations the one that the smaller seat dialled stays.
//!
//! The order of frames is kept within a class, not between classes: control before input before epochs before bulk.
//!
//! Invariant: nothing waits for a stuck peer longer than a deadline: connecting, the handshake and an unmoving stream
//! each have one. Invariant: the seat in a peer's hello is the one in its certificate, and the certificate is signed
//! by this VM's authority.

mod connection;
mod frames;
mod hub;
mod queue;
mod table;
mod tls;

use std::net::SocketAddr;
use std::time::Duration;

use ftvm_protocol::core::Timing;
use ftvm_protocol::identity::{Incarnation, LinkId};
use ftvm_protocol::wire::{Hello, Kind, NegotiateError, WireError};

use super::threads::ThreadFilters;
use crate::control::exit_code;

pub use frames::Frame;
pub use hub::LinkHub;
pub use queue::{Class, LinkSender, QueueLimits, QueueState, SendRefused, SessionSink};
pub use tls::{TlsError, TlsIdentity};

/// How links behave.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// Who this engine is.
    pub hello: Hello,
    /// Certificates and key.
    pub identity: TlsIdentity,
    /// From connecting to being up; also from accepting.
    pub handshake_deadline: Duration,
    /// A link on which bytes wait and none moves for so long is down.
    pub stall_deadline: Duration,
    /// Pause between two attempts to dial at first; doubles up to `retry_max`.
    pub retry_min: Duration,
    /// Longest pause between two attempts.
    pub retry_max: Duration,
    /// What may wait in each link's queue.
    pub queue: QueueLimits,
    /// Filters for the link's threads.
    pub filters: ThreadFilters,
}

impl LinkConfig {
    /// With the defaults: 2 s for a handshake, 5 s of stall, attempts every 50 ms to 1 s.
    pub fn new(hello: Hello, identity: TlsIdentity) -> Self {
        Self {
            hello,
            identity,
            handshake_deadline: Duration::from_secs(2),
            stall_deadline: Duration::from_secs(5),
            retry_min: Duration::from_millis(50),
            retry_max: Duration::from_secs(1),
            queue: QueueLimits::default(),
            filters: None,
        }
    }

    /// Between machines of which one counts as lost after a silence of `peer_lost`. Where that is longer than usual a machine may stand still for
    /// that much longer without being dead, and its link must not end before: both sides may while they shake hands, the reader
    /// while bytes wait for it.
    #[must_use]
    pub fn with_detection(mut self, peer_lost: Duration) -> Self {
        let usual = Duration::from_millis(Timing::default().peer_lost_ms);
        let stop = peer_lost.saturating_sub(usual);
        self.handshake_deadline += 2 * stop;
        self.stall_deadline += stop;
        self
    }
}

/// What links report. For one link: `Up`, then its frames, then `Down`, all from its own thread.
#[derive(Debug)]
pub enum LinkEvent {
    /// A link may be used.
    Up {
        /// Its name, never used before.
        link: LinkId,
        /// The other side, as its hello says; its seat is the certificate's.
        peer: Incarnation,
        /// Wire version agreed on.
        version: u16,
        /// To send with.
        sender: LinkSender,
    },
    /// A frame arrived; length and checksum were verified.
    Frame {
        /// On which link.
        link: LinkId,
        /// The frame.
        frame: Frame,
    },
    /// A link is gone.
    Down {
        /// Which.
        link: LinkId,
        /// Why.
        reason: DownReason,
    },
    /// A connection did not become a link. For the log and the status; attempts go on.
    Refused {
        /// Where it came from or went to, if that is known.
        address: Option<SocketAddr>,
        /// Why.
        reason: DownReason,
    },
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum DownReason {
    /// The peer ended it, or its process died and its kernel did.
    #[error("the peer closed the connection")]
    Closed,
    /// The network or the peer's kernel ended it.
    #[error("the connection broke: {0}")]
    Broken(#[source] std::io::Error),
    /// Not to be reached.
    #[error("can't connect: {0}; is the other seat's engine running, and may its address be reached?")]
    Connect(#[source] std::io::Error),
    /// TLS refused: certificates, or a damaged stream.
    #[error("{0}")]
    Tls(#[source] TlsError),
    /// Not up in time.
    #[error("no handshake within {} ms: the other side accepts connections but does not speak", .0.as_millis())]
    HandshakeTimeout(Duration),
    /// Bytes wait and none moves.
    #[error("nothing could be sent for {} ms: the other side is stuck, or the network lets nothing through", .0.as_millis())]
    Stalled(Duration),
    /// A frame that must not be.
    #[error("refused frame: {0}")]
    Wire(#[from] WireError),
    /// Hellos don't fit together.
    #[error("{0}")]
    Negotiate(#[from] NegotiateError),
    /// Hello and certificate name different seats.
    #[error("the peer calls itself {0}, its certificate is another seat's")]
    OtherSeat(Incarnation),
    /// Another link to the same incarnation is kept.
    #[error("another connection to the same engine is kept")]
    Superseded,
    /// The driver closed it.
    #[error("closed here: {0}")]
    ClosedHere(String),
    /// No thread, socket or other resource.
    #[error("can't serve the connection: {0}")]
    Resources(#[source] std::io::Error),
}

impl DownReason {
    /// The exit code of what a person has to mend before a link can stand; none for what mends itself.
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            Self::Tls(TlsError::Protocol(_)) => None,
            Self::Tls(_) | Self::OtherSeat(_) => Some(exit_code::IDENTITY),
            Self::Negotiate(NegotiateError::Versions { .. }) => Some(exit_code::WIRE_VERSION),
            Self::Negotiate(NegotiateError::OtherVm { .. } | NegotiateError::SameSeat(_)) => Some(exit_code::IDENTITY),
            _ => None,
        }
    }
}

/// The class in which frames of a kind are sent.
pub fn class_of(kind: Kind) -> Class {
    match kind {
        Kind::Hello | Kind::Control | Kind::Credit | Kind::Trouble | Kind::ResyncHolds => Class::Control,
        Kind::Input => Class::Input,
        Kind::EpochBegin
        | Kind::EpochPages
        | Kind::EpochState
        | Kind::EpochDisk
        | Kind::EpochOutput
        | Kind::EpochEnd
        // In the order of epochs: it speaks of the one before it.
        | Kind::Digest => Class::Epoch,
        Kind::ResyncBegin | Kind::ResyncPlan | Kind::ResyncMemory | Kind::ResyncDisk | Kind::ResyncEnd => {
            Class::Bulk
        }
    }
}

#[cfg(test)]
mod tests;
