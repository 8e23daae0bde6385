//! A wait queue on one 32-bit word, futex(2), private to this process.

use std::sync::atomic::{AtomicU32, Ordering};

/// Sleeps while `word` holds `expected`. May return early: the caller looks at the word again.
pub fn wait(word: &AtomicU32, expected: u32) {
    if word.load(Ordering::SeqCst) != expected {
        return;
    }
    // SAFETY: the word outlives the call, the kernel only reads it, and no time-out is given.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            std::ptr::null::<libc::timespec>(),
        );
    }
}

/// Wakes everyone who waits on `word`.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: the kernel uses only the word's address, as the name of the wait queue.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            i32::MAX,
        );
    }
}

/// Waits until `done(word)` is true: spins `spins` times, then sleeps until someone wakes the word.
///
/// Returns the value for which `done` was true.
pub fn wait_until(word: &AtomicU32, spins: u32, done: impl Fn(u32) -> bool) -> u32 {
    for _ in 0..spins {
        let value = word.load(Ordering::SeqCst);
        if done(value) {
            return value;
        }
        std::hint::spin_loop();
    }
    loop {
        let value = word.load(Ordering::SeqCst);
        if done(value) {
            return value;
        }
        wait(word, value);
    }
}

/// Sleeps while `word` holds `expected`, but no longer than `timeout`. May return early.
pub fn wait_timeout(word: &AtomicU32, expected: u32, timeout: std::time::Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: the word and the time-out outlive the call, the kernel only reads them.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            &raw const timeout,
        );
    }
}
