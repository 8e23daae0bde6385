//! What a core is built from.

use crate::header::SeatHeader;
use crate::identity::{Incarnation, SeatId};

/// The seat's header file at the engine's start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredHeader {
    /// Read and intact.
    Found(SeatHeader),
    /// There is none: a new seat, which can only join.
    Absent,
    /// There is one that can't be used: the seat can only join, after a person removed it or accepted the loss.
    Damaged,
}

/// Times. All in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Interval of probes on each link.
    pub heartbeat_ms: u64,
    /// A peer of which nothing was heard for so long, or that answered no probe for four times as long, is lost. Time in
    /// which this process did not run does not count (see `silence`).
    pub peer_lost_ms: u64,
    /// Deadline of one request to the arbiter or to daemons.
    pub arbiter_deadline_ms: u64,
    /// Pause between attempts.
    pub retry_ms: u64,
    /// T: a seat of a pair without contact for longer writes nothing on its own.
    pub contact_limit_ms: u64,
    /// A follower that acknowledges nothing for this long while epochs wait is ejected.
    pub ack_stall_ms: u64,
    /// A frozen source waits this long for its target before it swaps to go on by itself.
    pub switch_ms: u64,
    /// A seat that needs nothing from the arbiter reads the record this often (condition, re-created records).
    pub observe_ms: u64,
    /// At a cold start a seat that is not the holder's waits this long for the holder's seat.
    pub holder_first_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_ms: 50,
            peer_lost_ms: 300,
            arbiter_deadline_ms: 2_000,
            retry_ms: 200,
            contact_limit_ms: 600_000,
            ack_stall_ms: 10_000,
            switch_ms: 3_000,
            observe_ms: 10_000,
            holder_first_ms: 5_000,
        }
    }
}

/// What a core is built from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This engine start. Its `start` is random and not zero: nonces are derived from it.
    pub incarnation: Incarnation,
    /// The seat's header file.
    pub header: StoredHeader,
    /// Every other seat of this VM that the daemon knows of and that may have had an engine, whether it can be reached now or not; asked before a cold start
    /// along with the record's. One that nobody answers for keeps this seat from booting.
    pub other_seats: Vec<SeatId>,
    /// Times.
    pub timing: Timing,
    /// Time of the core's clock at creation.
    pub now_ms: u64,
}
