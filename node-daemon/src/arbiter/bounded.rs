//! A hard deadline around an arbiter.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Answer, Ask};
use ftvm_protocol::core::{ReadOutcome, SwapOutcome};

use super::{Arbiter, Said};

/// Most requests that may hang at a time; more are not sent.
const HANGING_MAX: usize = 8;

/// Runs each request on a thread of its own and waits for it no longer than its deadline.
///
/// A thread that hangs in the kernel is left there: its outcome, when it comes, is dropped, as the rules demand of an answer
/// after the deadline (rule 2).
pub struct Bounded {
    arbiter: Arc<dyn Arbiter>,
    hanging: Arc<AtomicUsize>,
}

impl Bounded {
    /// Bounds this arbiter.
    pub fn new(arbiter: Arc<dyn Arbiter>) -> Bounded {
        Bounded {
            arbiter,
            hanging: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// Answers a read or a swap within `deadline`. (Questions about seats are not the arbiter's.)
    pub fn ask(&self, ask: &Ask, deadline: Duration) -> Said<Answer> {
        let until = Instant::now() + deadline;
        match ask.clone() {
            Ask::ReadRecord => {
                let outcome = self.run(until, |arbiter| arbiter.read());
                let (outcome, why) = outcome.unwrap_or_else(|(_, why)| (ReadOutcome::Unreachable, Some(why)));
                (Answer::Read(outcome), why)
            }
            Ask::SwapRecord { uid, version, record } => {
                let outcome = self.run(until, move |arbiter| arbiter.swap(uid, version, &record, until));
                let (outcome, why) = outcome.unwrap_or_else(|(begun, why)| {
                    (
                        if begun {
                            SwapOutcome::Unknown
                        } else {
                            SwapOutcome::NotSent
                        },
                        Some(why),
                    )
                });
                (Answer::Swap(outcome), why)
            }
            Ask::AskSeats { .. } => (
                Answer::Seats(Vec::new()),
                Some("the arbiter does not know seats".to_owned()),
            ),
        }
    }

    /// What `work` returns, or whether it was begun and why it did not end in time.
    fn run<T: Send + 'static>(
        &self,
        until: Instant,
        work: impl FnOnce(&dyn Arbiter) -> Said<T> + Send + 'static,
    ) -> Result<Said<T>, (bool, String)> {
        if self.hanging.fetch_add(1, Ordering::SeqCst) >= HANGING_MAX {
            self.hanging.fetch_sub(1, Ordering::SeqCst);
            let why =
                format!("{HANGING_MAX} earlier requests still hang: is the arbiter's file system mounted and alive?");
            return Err((false, why));
        }
        let (sender, receiver) = sync_channel(1);
        let (arbiter, hanging) = (self.arbiter.clone(), self.hanging.clone());
        let thread = std::thread::Builder::new().name("arbiter".to_owned()).spawn(move || {
            let outcome = work(arbiter.as_ref());
            // Nobody waits any more after the deadline.
            let _ = sender.send(outcome);
            arbiter.prepare();
            hanging.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(error) = thread {
            self.hanging.fetch_sub(1, Ordering::SeqCst);
            return Err((false, format!("no thread for the request: {error}")));
        }
        let outcome = receiver.recv_timeout(until.saturating_duration_since(Instant::now()));
        match outcome {
            // This process may have been stopped between the answer and here.
            Ok(_) if Instant::now() >= until => Err((true, "the arbiter answered after the deadline".to_owned())),
            Ok(said) => Ok(said),
            Err(RecvTimeoutError::Timeout) => Err((true, "the arbiter did not answer within the deadline".to_owned())),
            Err(RecvTimeoutError::Disconnected) => Err((true, "the request failed within the daemon".to_owned())),
        }
    }
}
