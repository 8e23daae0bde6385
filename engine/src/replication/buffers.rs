//! Buffers of large frames, used again: a buffer that is given back to the kernel and asked for anew costs a page fault
//! for every 4 KiB, which is more than encrypting them.

use std::sync::{Mutex, PoisonError};

/// Smaller ones are the allocator's business: what a staged chunk holds is counted by its buffer.
const BUFFER_MIN_BYTES: usize = 240 * 1024;
/// Larger ones are rare.
const BUFFER_MAX_BYTES: usize = 512 * 1024;
/// Buffers that are kept: the window of a resync.
const KEPT: usize = 32;

/// What they hold.
pub(crate) const KEPT_BUFFERS_BYTES: usize = KEPT * BUFFER_MAX_BYTES;

static FREE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

fn free() -> std::sync::MutexGuard<'static, Vec<Vec<u8>>> {
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An empty buffer with room for `bytes`.
pub fn take(bytes: usize) -> Vec<u8> {
    if bytes < BUFFER_MIN_BYTES {
        return Vec::with_capacity(bytes);
    }
    let mut buffer = free().pop().unwrap_or_default();
    // No more than asked for: all of it counts as what an epoch holds.
    buffer.reserve_exact(bytes);
    buffer
}

/// Gives a buffer back.
pub fn give(mut buffer: Vec<u8>) {
    if !(BUFFER_MIN_BYTES..=BUFFER_MAX_BYTES).contains(&buffer.capacity()) {
        return;
    }
    buffer.clear();
    let mut free = free();
    if free.len() < KEPT {
        free.push(buffer);
    }
}

/// Gives all that are free to the allocator: after a resync few are needed.
pub fn forget() {
    let buffers = std::mem::take(&mut *free());
    drop(buffers);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_empty_large_enough_and_few() {
        for _ in 0..2 * KEPT {
            give(vec![7; 270_000]);
        }
        give(vec![7; 10]);
        give(vec![7; 1 << 20]);
        assert!(free().len() <= KEPT);
        let buffer = take(300_000);
        assert!(buffer.is_empty() && buffer.capacity() >= 300_000);
        assert!(buffer.capacity() <= BUFFER_MAX_BYTES, "{}", buffer.capacity());
        assert!(take(10).capacity() < BUFFER_MIN_BYTES);
        forget();
    }
}
