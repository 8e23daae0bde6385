//! What the other side says during a resync: how much may be under way (`Credit` frames), and what its disks hold.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{ResyncError, Told};
use crate::replication::changed::Holds;
use crate::replication::epoch::PayloadError;
use crate::replication::pages::SinkClosed;

/// Bytes under way: on the link, and received but not written.
const WINDOW_BYTES: u64 = 8 << 20;
/// Confirmations come after this many bytes.
pub(super) const CREDIT_EVERY_BYTES: u64 = 1 << 20;
/// A receiver that confirms nothing for so long is stuck.
const STALL_LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct State {
    sent: u64,
    confirmed: u64,
    told: Option<Told>,
    closed: bool,
}

/// Counts what was sent and what the receiver confirmed. The driver hands it every `Credit` and `ResyncHolds` frame of the
/// session, and closes it when the session is over.
#[derive(Debug, Default)]
pub struct ResyncWindow {
    state: Mutex<State>,
    changed: Condvar,
}

impl ResyncWindow {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the payload of a `Credit` frame.
    pub fn credited(&self, payload: &[u8]) -> Result<(), ResyncError> {
        let malformed = PayloadError::Malformed("Credit");
        let bytes: [u8; 8] = payload.try_into().map_err(|_| malformed.clone())?;
        let confirmed = u64::from_le_bytes(bytes);
        let mut state = self.state();
        if confirmed < state.confirmed || confirmed > state.sent {
            return Err(malformed.into());
        }
        state.confirmed = confirmed;
        self.changed.notify_all();
        Ok(())
    }

    /// Takes the payload of a `ResyncHolds` frame, of which there is one.
    pub fn told(&self, payload: &[u8]) -> Result<(), ResyncError> {
        let malformed = PayloadError::Malformed("ResyncHolds");
        let told = match postcard::take_from_bytes(payload) {
            Ok((told, [])) => told,
            _ => return Err(malformed.into()),
        };
        let mut state = self.state();
        if state.told.is_some() {
            return Err(malformed.into());
        }
        state.told = Some(told);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until the other side has said what its disks hold.
    pub(super) fn wait_told(&self) -> Result<Option<Holds>, ResyncError> {
        let mut state = self.state();
        loop {
            if state.closed {
                return Err(SinkClosed.into());
            }
            if let Some(told) = state.told {
                return Ok(told.holds);
            }
            let (after, timeout) = self
                .changed
                .wait_timeout(state, STALL_LIMIT)
                .unwrap_or_else(PoisonError::into_inner);
            state = after;
            if timeout.timed_out() && state.told.is_none() {
                return Err(ResyncError::Stalled {
                    seconds: STALL_LIMIT.as_secs(),
                    waiting_bytes: state.sent - state.confirmed,
                });
            }
        }
    }

    /// Nobody waits any more.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Waits until `bytes` more may be sent.
    pub(super) fn take(&self, bytes: u64) -> Result<(), ResyncError> {
        let mut state = self.state();
        loop {
            let waiting_bytes = state.sent - state.confirmed;
            if state.closed {
                return Err(SinkClosed.into());
            }
            if waiting_bytes + bytes <= WINDOW_BYTES {
                state.sent += bytes;
                return Ok(());
            }
            let (after, timeout) = self
                .changed
                .wait_timeout(state, STALL_LIMIT)
                .unwrap_or_else(PoisonError::into_inner);
            state = after;
            if timeout.timed_out() && state.sent - state.confirmed >= waiting_bytes {
                return Err(ResyncError::Stalled {
                    seconds: STALL_LIMIT.as_secs(),
                    waiting_bytes,
                });
            }
        }
    }
}

/// Payload of a `ResyncHolds` frame.
pub(super) fn told_payload(holds: Option<Holds>) -> Result<Vec<u8>, PayloadError> {
    postcard::to_allocvec(&Told { holds }).map_err(|_| PayloadError::Malformed("ResyncHolds"))
}

/// Payload of a `Credit` frame: all bytes of resync payloads taken so far.
pub(super) fn credit_payload(taken: u64) -> Vec<u8> {
    taken.to_le_bytes().to_vec()
}
