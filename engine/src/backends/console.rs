//! Where console output goes when no epoch holds it back: standard output, or a ring in memory.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ConsoleBackend;

/// Standard output. Blocks when its reader does, so it is for machines without protection.
#[derive(Debug, Default)]
pub struct Stdout;

impl ConsoleBackend for Stdout {
    fn write(&mut self, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        // A console that nobody reads any more is no reason to stop the guest.
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }
}

/// The last characters of the console.
#[derive(Debug)]
struct Tail {
    bytes: VecDeque<u8>,
    capacity: usize,
    lost: u64,
}

/// Keeps the last characters; the oldest are overwritten. Clones share the ring.
#[derive(Debug, Clone)]
pub struct Ring(Arc<Mutex<Tail>>);

impl Ring {
    /// A ring of `capacity` characters, at least one.
    pub fn new(capacity: usize) -> Self {
        Self(Arc::new(Mutex::new(Tail {
            bytes: VecDeque::new(),
            capacity: capacity.max(1),
            lost: 0,
        })))
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of what is there, oldest first.
    pub fn content(&self) -> Vec<u8> {
        self.tail().bytes.iter().copied().collect()
    }

    /// Takes everything out, oldest first.
    pub fn take(&self) -> Vec<u8> {
        self.tail().bytes.drain(..).collect()
    }

    /// Characters that were overwritten before anybody took them.
    pub fn lost(&self) -> u64 {
        self.tail().lost
    }
}

impl ConsoleBackend for Ring {
    fn write(&mut self, bytes: &[u8]) {
        let mut tail = self.tail();
        let capacity = tail.capacity;
        let kept = &bytes[bytes.len().saturating_sub(capacity)..];
        let overflow = (tail.bytes.len() + kept.len()).saturating_sub(capacity);
        tail.bytes.drain(..overflow);
        tail.bytes.extend(kept);
        tail.lost += (overflow + bytes.len() - kept.len()) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_characters_and_counts_the_others() {
        let ring = Ring::new(8);
        let mut backend = ring.clone();
        backend.write(b"abcdef");
        assert_eq!((ring.content(), ring.lost()), (b"abcdef".to_vec(), 0));
        backend.write(b"ghij");
        assert_eq!((ring.content(), ring.lost()), (b"cdefghij".to_vec(), 2));
        backend.write(b"0123456789");
        assert_eq!((ring.take(), ring.lost()), (b"23456789".to_vec(), 12));
        assert_eq!(ring.content(), b"");
    }
}
