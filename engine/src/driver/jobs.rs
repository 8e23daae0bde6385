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
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn jobs_wait_for_one_piece_and_pieces_for_no_job() {
        let (give, todo) = channel();
        let mut taken = 0;
        let mut next = |pieces: u32| {
            next_job(&todo, || {
                taken += 1;
                taken < pieces
            })
            .map(|job| (job, taken))
        };
        give.send("a").expect("received");
        give.send("b").expect("received");
        assert_eq!(next(10), Some(("a", 1)));
        assert_eq!(next(10), Some(("b", 2)));
        // The last piece is taken without a job, which is waited for then.
        let later = give.clone();
        let giver = std::thread::spawn(move || later.send("c").expect("received"));
        assert_eq!(next(0), Some(("c", 3)));
        giver.join().expect("no panic");
        drop(give);
        assert_eq!(next(10), None);
    }
}
