//! What the other side says during a resync: how much may be under way (`Credit` frames), and what its disks hold.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{ResyncError, Told};
use crate::replication::changed::Holds;
use crate::replication::epoch::PayloadError;
use crate::replication::pages::SinkClosed;

/// Bytes under way: on the link, and received but not written.
const WINDOW_BYTES: u64 = 8 << 20;
/// Confirmations come after this many bytes of payload.
pub(super) const CREDIT_EVERY_BYTES: u64 = 1 << 20;
/// And after this many bytes of memory and disks that were written, or zeroed, which takes no payload.
pub(super) const CREDIT_EVERY_WORK_BYTES: u64 = 16 << 20;
/// Zeroes of a disk in one change, at most, so that they can be confirmed piece by piece. And where they have to be written that is one request,
/// which is said to hang if it takes long (`Driver::watch_as_follower`).
pub(super) const ZEROES_MAX_BYTES: u64 = 16 << 20;
/// No more of memory and disks is sent while so much of it is not confirmed: whoever waits for the join checkpoint waits for that first. More
/// than a receiver may keep to itself for ever: what it confirms next, and the piece of which it has confirmed some, of memory or zeroes.
const WINDOW_WORK_BYTES: u64 = 4 * ZEROES_MAX_BYTES;
const _: () = assert!(WINDOW_WORK_BYTES >= CREDIT_EVERY_WORK_BYTES + ZEROES_MAX_BYTES + (1 << 20));
/// A receiver that confirms nothing for so long is stuck. Longer than a disk may hang at most (`disk_hang_ms`): one that is only slow begins anew
/// otherwise, and one whose disk hangs says so itself.
const STALL_LIMIT: Duration = Duration::from_secs(90);

#[derive(Debug, Default)]
struct State {
    sent: u64,
    confirmed: u64,
    /// Of what is not confirmed: what was sent with it, and how many bytes of memory and disks it brings.
    work: VecDeque<(u64, u64)>,
    work_bytes: u64,
    told: Option<Told>,
    closed: bool,
}

impl State {
    fn confirm(&mut self, confirmed: u64) {
        self.confirmed = confirmed;
        while let Some((_, bytes)) = self.work.pop_front_if(|(sent, _)| *sent <= confirmed) {
            self.work_bytes -= bytes;
        }
    }
}

/// Counts what was sent and what the receiver confirmed. The driver hands it every `Credit` and `ResyncHolds` frame of the
/// session, and closes it when the session is over.
#[derive(Debug)]
pub struct ResyncWindow {
    state: Mutex<State>,
    changed: Condvar,
    stall_limit: Duration,
}

impl Default for ResyncWindow {
    fn default() -> Self {
        Self::stuck_after(STALL_LIMIT)
    }
}

impl ResyncWindow {
    fn stuck_after(stall_limit: Duration) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::default(),
            stall_limit,
        }
    }

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
        if confirmed > state.confirmed {
            state.confirm(confirmed);
            self.changed.notify_all();
        }
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

    /// Waits until the other side has said what its disks hold, and nothing else that it says makes the wait longer.
    pub(super) fn wait_told(&self) -> Result<Option<Holds>, ResyncError> {
        let deadline = Instant::now() + self.stall_limit;
        let mut state = self.state();
        loop {
            if state.closed {
                return Err(SinkClosed.into());
            }
            if let Some(told) = state.told {
                return Ok(told.holds);
            }
            state = self.wait_until(deadline, state)?;
        }
    }

    /// Waits for a change; what is passed may have changed or not.
    fn wait_until<'a>(
        &self,
        deadline: Instant,
        state: MutexGuard<'a, State>,
    ) -> Result<MutexGuard<'a, State>, ResyncError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ResyncError::Stalled {
                seconds: self.stall_limit.as_secs(),
                waiting_bytes: state.sent - state.confirmed,
            });
        }
        let (state, _) = self
            .changed
            .wait_timeout(state, left)
            .unwrap_or_else(PoisonError::into_inner);
        Ok(state)
    }

    /// Nobody waits any more.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Waits until `bytes` more may be sent, as long as the other side confirms more and more.
    pub(super) fn take(&self, bytes: u64) -> Result<(), ResyncError> {
        let mut state = self.wait_while(|state| state.sent - state.confirmed + bytes > WINDOW_BYTES)?;
        state.sent += bytes;
        Ok(())
    }

    /// What was sent since this was called last brings `bytes` of memory or disks. Waits until little enough of that is not confirmed, as long as
    /// the other side confirms more and more.
    pub(super) fn worked(&self, bytes: u64) -> Result<(), ResyncError> {
        let mut state = self.state();
        let sent = state.sent;
        if bytes > 0 && sent > state.confirmed {
            state.work.push_back((sent, bytes));
            state.work_bytes += bytes;
        }
        drop(state);
        self.wait_while(|state| state.work_bytes >= WINDOW_WORK_BYTES).map(drop)
    }

    fn wait_while(&self, is_full: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>, ResyncError> {
        let mut state = self.state();
        let (mut confirmed, mut deadline) = (state.confirmed, Instant::now() + self.stall_limit);
        loop {
            if state.closed {
                return Err(SinkClosed.into());
            }
            if !is_full(&state) {
                return Ok(state);
            }
            if state.confirmed > confirmed {
                (confirmed, deadline) = (state.confirmed, Instant::now() + self.stall_limit);
            }
            state = self.wait_until(deadline, state)?;
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    /// A peer that says something all the time, and nothing new: nobody waits for it longer than for one that is silent.
    #[test]
    fn a_peer_that_confirms_nothing_new_is_stuck() {
        let window = ResyncWindow::stuck_after(Duration::from_millis(300));
        window.take(WINDOW_BYTES).expect("there is room");
        let waits: [fn(&ResyncWindow) -> bool; 2] = [
            |window| matches!(window.take(1), Err(ResyncError::Stalled { .. })),
            |window| matches!(window.wait_told(), Err(ResyncError::Stalled { .. })),
        ];
        for stalled in waits {
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| stalled(&window));
                // Far longer than it may take, and no end if it were for ever.
                for _ in 0..1000 {
                    window.credited(&credit_payload(0)).expect("nothing new");
                    window.changed.notify_all();
                    if waiting.is_finished() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                let ended = waiting.is_finished();
                window.close();
                assert!(waiting.join().expect("no panic") && ended, "it waits on");
            });
            window.state().closed = false;
        }
    }

    /// One that confirms little by little is not.
    #[test]
    fn a_peer_that_confirms_more_and_more_is_waited_for() {
        let window = ResyncWindow::stuck_after(Duration::from_secs(3600));
        window.take(WINDOW_BYTES).expect("there is room");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| window.take(10));
            for confirmed in 1..=10 {
                window.credited(&credit_payload(confirmed)).expect("it was sent");
            }
            waiting.join().expect("no panic").expect("there is room again");
        });
    }

    /// One that keeps to itself as much as it ever does is waited for, and zeroes are no further ahead of it than other memory. One that confirms
    /// nothing is stuck.
    #[test]
    fn zeroes_are_not_far_ahead_of_who_confirms_them() {
        const BLOCK_BYTES: u64 = 256 << 10;
        let window = ResyncWindow::stuck_after(Duration::from_secs(60));
        let ahead = AtomicU64::new(0);
        let (frames, came) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut taken, mut credited, mut work_bytes) = (0, 0, 0);
                for (payload, bytes) in came {
                    std::thread::yield_now();
                    ahead.fetch_sub(bytes, Ordering::SeqCst);
                    taken += payload;
                    work_bytes += bytes;
                    if taken - credited >= CREDIT_EVERY_BYTES || work_bytes >= CREDIT_EVERY_WORK_BYTES {
                        (credited, work_bytes) = (taken, 0);
                        window.credited(&credit_payload(credited)).expect("it was sent");
                    }
                }
            });
            for round in 0..1000 {
                // A run of zeroes and a block in two frames, two chunks of a piece of memory, a block.
                let sent = match round % 3 {
                    0 => vec![(30, ZEROES_MAX_BYTES), (BLOCK_BYTES, BLOCK_BYTES)],
                    1 => vec![(200, 7 << 20), (200, 9 << 20)],
                    _ => vec![(BLOCK_BYTES, BLOCK_BYTES)],
                };
                for &(payload, bytes) in &sent {
                    window.take(payload).expect("it is confirmed");
                    ahead.fetch_add(bytes, Ordering::SeqCst);
                    frames.send((payload, bytes)).expect("it is taken");
                }
                let bytes = sent.iter().map(|(_, bytes)| bytes).sum();
                window.worked(bytes).expect("it is confirmed");
                let ahead = ahead.load(Ordering::SeqCst);
                assert!(ahead < WINDOW_WORK_BYTES, "{ahead} bytes");
            }
            drop(frames);
        });
        let silent = ResyncWindow::stuck_after(Duration::from_millis(300));
        silent.take(30).expect("there is room");
        let stuck = silent.worked(WINDOW_WORK_BYTES);
        assert!(matches!(stuck, Err(ResyncError::Stalled { .. })), "{stuck:?}");
    }
}
