//! Jobs of a thread that takes a digest of memory meanwhile.

use std::sync::mpsc::{Receiver, TryRecvError};

/// The next job, none if nobody gives any more. Between jobs a digest is taken, piece by piece: neither an epoch nor an acknowledgment nor a
/// takeover waits for all of it. `piece` takes one, if a digest was asked for, and says whether more are left.
pub fn next_job<J>(todo: &Receiver<J>, mut piece: impl FnMut() -> bool) -> Option<J> {
    while piece() {
        match todo.try_recv() {
            Ok(job) => return Some(job),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return None,
        }
    }
    todo.recv().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::*;
    use crate::devices::testing::PATIENCE;

    #[test]
    fn jobs_wait_for_one_piece_and_pieces_for_no_job() {
        let (give, todo) = channel();
        let taken = AtomicU32::new(0);
        let next = |pieces: u32| {
            let piece = || taken.fetch_add(1, Ordering::SeqCst) + 1 < pieces;
            next_job(&todo, piece).map(|job| (job, taken.load(Ordering::SeqCst)))
        };
        give.send("a").expect("received");
        give.send("b").expect("received");
        assert_eq!(next(10), Some(("a", 1)));
        assert_eq!(next(10), Some(("b", 2)));
        // Nobody gives a job before the last piece is taken; then one is waited for.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let deadline = Instant::now() + PATIENCE;
                while taken.load(Ordering::SeqCst) < 5 && Instant::now() < deadline {
                    std::thread::yield_now();
                }
                give.send("c").expect("received");
            });
            assert_eq!(next(5), Some(("c", 5)));
        });
        drop(give);
        assert_eq!(next(10), None);
    }
}
