//! Random numbers of the kernel.

use rustix::rand::{GetRandomFlags, getrandom};

/// A random number; 0 if the kernel has none, which it has on every supported system.
pub fn u64() -> u64 {
    let mut bytes = [0; 8];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(8) => u64::from_ne_bytes(bytes),
        _ => 0,
    }
}
