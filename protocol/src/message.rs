//! Control messages between the cores of two seats.
//!
//! They travel in [`crate::wire::Kind::Control`] frames, over authenticated links, so the sender's incarnation is the
//! link's. Encoded with postcard; bounded by the frame kind; decoding accepts no trailing bytes.
//!
//! Invariant: what a version has keeps its bytes. New words come last in their enum, and [`Message::since`] says of each which
//! version brought it; older peers are spoken to in what they have for it ([`Message::spoken_in`]), or not at all.

use serde::{Deserialize, Serialize};

use crate::identity::{ArbiterUid, Epoch, Incarnation, SessionId, Term};
use crate::wire::{Kind, VERSION_MIN, VERSION_STORAGE};

/// What a seat is, as far as its peer needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PeerRole {
    /// Just started; has no guest; can be resynchronised.
    Starting,
    /// Receives a resync.
    Joining,
    /// Has a complete checkpoint and acknowledges.
    Standby,
    /// Runs the guest.
    Active,
    /// Gave the guest out of hand in a switchover or a stop and waits for the outcome.
    Frozen,
    /// Ended for good.
    Ended,
}

/// What a seat tells of itself in every probe and every answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Its role.
    pub role: PeerRole,
    /// Highest term it knows of.
    pub term: Term,
    /// The arbiter's record that it belongs to, if it knows.
    pub uid: Option<ArbiterUid>,
    /// The session that it leads or follows.
    pub session: Option<(Incarnation, SessionId)>,
    /// The other side of that session. Only who names the receiver here is in contact with it: an active that has
    /// ejected a standby still answers its probes.
    pub with: Option<Incarnation>,
    /// A swap of its own is in flight or its outcome unknown: as a standby it acknowledges nothing meanwhile.
    pub unsettled: bool,
}

/// Why a session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionEnd {
    /// The leader ejected the follower by a confirmed swap.
    Ejected,
    /// The leader gave up the resync before it asked the arbiter for membership.
    JoinAborted,
    /// The follower cannot go on (staging or validation failed, disk full).
    FollowerFailed,
    /// The follower has lost its place and restarts.
    FollowerLeft,
    /// The follower cannot go on: its storage failed or hangs (rule 13). Version 3; in version 2 it is [`Self::FollowerFailed`].
    FollowerStorage,
}

impl SessionEnd {
    fn since(self) -> u16 {
        match self {
            Self::Ejected | Self::JoinAborted | Self::FollowerFailed | Self::FollowerLeft => VERSION_MIN,
            Self::FollowerStorage => VERSION_STORAGE,
        }
    }
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Heartbeat. `n` is the sender's own counter. Answered at once by a reply.
    Probe {
        /// Counts the sender's probes.
        n: u64,
        /// The sender.
        view: View,
    },
    /// Answer to a probe; counts as contact at the time that the probe was *sent*.
    ProbeReply {
        /// Of the probe.
        n: u64,
        /// The sender of the reply.
        view: View,
    },
    /// Leader to a starting seat: your resync begins.
    Join {
        /// New session.
        session: SessionId,
        /// Leader's term.
        term: Term,
        /// The record that the joiner will belong to.
        uid: ArbiterUid,
    },
    /// Joiner to leader: header says "incomplete" durably, send the bulk.
    JoinReady {
        /// Of the Join.
        session: SessionId,
    },
    /// Follower to leader: everything up to and including this epoch is received whole, validated and, where a guest
    /// flush is contained, durable in the journal. The first one of a session acknowledges the join checkpoint.
    Ack {
        /// Whom it is for: an acknowledgment to another incarnation of the leader's seat is void.
        leader: Incarnation,
        /// Session.
        session: SessionId,
        /// Epoch.
        epoch: Epoch,
    },
    /// Either way: the session is over.
    End {
        /// Session.
        session: SessionId,
        /// Why.
        reason: SessionEnd,
    },
    /// Frozen source to target: run from the end of this epoch.
    Switch {
        /// Session of the pair.
        session: SessionId,
        /// The last epoch; the source is frozen at its end.
        epoch: Epoch,
        /// Term of the claim for which it froze.
        term: Term,
    },
    /// Target to source: will not (the reason is in the target's status). A frozen source goes on by a swap of its own.
    SwitchRefused {
        /// Session of the pair.
        session: SessionId,
    },
    /// New active to the frozen source: I run from that epoch, follow me.
    Follow {
        /// New session, led by the sender.
        session: SessionId,
        /// The session in which the switchover was asked for.
        previous: SessionId,
        /// The source's last epoch: base of the new session.
        epoch: Epoch,
        /// Term of the sender's confirmed record.
        term: Term,
    },
    /// Former source to the new active: I follow from that epoch.
    Following {
        /// New session.
        session: SessionId,
    },
    /// Active to standby: the record says Stopped, confirmed. Stop too (after reading it yourself).
    Stopped {
        /// Term of that record.
        term: Term,
    },
    /// Active to standby: the guest is to be yours; let the record name you as its holder, then say so. Nothing else
    /// changes for either of us until then.
    Claim {
        /// Session of the pair.
        session: SessionId,
    },
    /// Standby to active: the record names me, and my header has that term.
    Claimed {
        /// Session of the pair.
        session: SessionId,
        /// Term of that record.
        term: Term,
    },
    /// Follower to leader: I am to go; let the record forget me. I acknowledge until then.
    Leave {
        /// Session of the pair.
        session: SessionId,
    },
}

/// Why a payload is no control message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than a control frame may be.
    #[error("control message has {0} bytes, more than a control frame may carry")]
    TooLong(usize),
    /// Of a version that was not agreed on.
    #[error("control message is of wire version {since}, {agreed} was agreed on")]
    Version {
        /// First version that has it.
        since: u16,
        /// Agreed on.
        agreed: u16,
    },
    /// Malformed.
    #[error("control message is malformed: {0}")]
    Malformed(&'static str),
}

impl Message {
    /// First wire version that has it, with all that it carries.
    pub fn since(&self) -> u16 {
        match self {
            Message::End { reason, .. } => reason.since(),
            Message::Probe { .. }
            | Message::ProbeReply { .. }
            | Message::Join { .. }
            | Message::JoinReady { .. }
            | Message::Ack { .. }
            | Message::Switch { .. }
            | Message::SwitchRefused { .. }
            | Message::Follow { .. }
            | Message::Following { .. }
            | Message::Stopped { .. }
            | Message::Claim { .. }
            | Message::Claimed { .. }
            | Message::Leave { .. } => VERSION_MIN,
        }
    }

    /// What a peer is told with which this version was agreed on: the same, or what that version has for it. `None`: it has nothing
    /// for it, and such a peer is not told.
    pub fn spoken_in(self, version: u16) -> Option<Self> {
        let word = match self {
            Message::End {
                session,
                reason: SessionEnd::FollowerStorage,
            } if version < VERSION_STORAGE => Message::End {
                session,
                reason: SessionEnd::FollowerFailed,
            },
            message => message,
        };
        (word.since() <= version).then_some(word)
    }

    fn check(&self, agreed: u16) -> Result<(), MessageError> {
        match self.since() {
            since if since > agreed => Err(MessageError::Version { since, agreed }),
            _ => Ok(()),
        }
    }

    /// Payload of a control frame of the version that was agreed on.
    pub fn encode(&self, agreed: u16) -> Result<Vec<u8>, MessageError> {
        self.check(agreed)?;
        let bytes = postcard::to_allocvec(self).map_err(|_| MessageError::Malformed("does not encode"))?;
        if bytes.len() > Kind::Control.max_len() as usize {
            return Err(MessageError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// From the payload of a verified control frame of the version that was agreed on.
    pub fn decode(payload: &[u8], agreed: u16) -> Result<Self, MessageError> {
        if payload.len() > Kind::Control.max_len() as usize {
            return Err(MessageError::TooLong(payload.len()));
        }
        let (message, rest): (Self, _) =
            postcard::take_from_bytes(payload).map_err(|_| MessageError::Malformed("does not decode"))?;
        if !rest.is_empty() {
            return Err(MessageError::Malformed("bytes follow its end"));
        }
        message.check(agreed)?;
        Ok(message)
    }
}
