//! How much may be under way: the sender's side of `Credit` frames.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::ResyncError;
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
    closed: bool,
}

/// Counts what was sent and what the receiver confirmed. The driver hands it every `Credit` frame of the session, and
/// closes it when the session is over.
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

/// Payload of a `Credit` frame: all bytes of resync payloads taken so far.
pub(super) fn credit_payload(taken: u64) -> Vec<u8> {
    taken.to_le_bytes().to_vec()
}
