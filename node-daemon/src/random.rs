//! Random numbers from the kernel.

use std::fs::File;
use std::io::Read;

/// 128 random bits.
///
/// # Panics
/// If the kernel gives none, which Linux excludes after boot.
pub fn u128() -> u128 {
    let mut bytes = [0u8; 16];
    fill(&mut bytes);
    u128::from_ne_bytes(bytes)
}

/// 64 random bits, never all zero.
///
/// # Panics
/// If the kernel gives none, which Linux excludes after boot.
pub fn nonzero_u64() -> u64 {
    loop {
        let value = (u128() >> 64) as u64;
        if value != 0 {
            return value;
        }
    }
}

fn fill(bytes: &mut [u8]) {
    if rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty()) == Ok(bytes.len()) {
        return;
    }
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(bytes))
        .expect("the kernel gives random numbers");
}
