//! virtio-rng (virtio 1.2, section 5.4). Its bytes are a ChaCha20 key stream (RFC 8439) whose key and position are part of
//! the machine's state, so that the successor hands out what the active would have handed out next.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Frontend;
use super::pci_device::{Inner, VirtioDevice};
use super::queue::{Chain, QueueError, QueueState};
use super::worker::{Next, Worker};
use crate::devices::kind;
use crate::memory::GuestMem;

/// Most bytes for one request; a driver has to cope with fewer than it asked for (5.4.6.2).
const REQUEST_BYTES: usize = 4096;
const BLOCK_BYTES: usize = 64;

/// A ChaCha20 key stream that can be saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    key: [u8; 32],
    /// Next block. The nonce is this counter's upper half, so the stream does not repeat.
    block: u64,
}

impl Stream {
    /// The stream that belongs to `key`, from its beginning.
    pub fn new(key: [u8; 32]) -> Self {
        Self { key, block: 0 }
    }

    /// Fills `out`; what is left of the last block is thrown away.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(BLOCK_BYTES) {
            let nonce = [(self.block >> 32) as u32, 0, 0];
            let block = chacha20_block(&self.key, self.block as u32, nonce);
            chunk.copy_from_slice(&block[..chunk.len()]);
            self.block = self.block.wrapping_add(1);
        }
    }
}

/// The ChaCha20 block function (RFC 8439, section 2.3).
fn chacha20_block(key: &[u8; 32], counter: u32, nonce: [u32; 3]) -> [u8; BLOCK_BYTES] {
    let mut initial = [0u32; 16];
    initial[..4].copy_from_slice(&[0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574]);
    for (word, bytes) in initial[4..12].iter_mut().zip(key.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    initial[12] = counter;
    initial[13..].copy_from_slice(&nonce);
    let mut state = initial;
    for _ in 0..10 {
        for column in 0..4 {
            quarter_round(&mut state, [column, column + 4, column + 8, column + 12]);
        }
        for diagonal in 0..4 {
            let at = |row: usize| 4 * row + (diagonal + row) % 4;
            quarter_round(&mut state, [at(0), at(1), at(2), at(3)]);
        }
    }
    let mut out = [0; BLOCK_BYTES];
    for ((bytes, word), start) in out.chunks_exact_mut(4).zip(state).zip(initial) {
        bytes.copy_from_slice(&word.wrapping_add(start).to_le_bytes());
    }
    out
}

fn quarter_round(state: &mut [u32; 16], [a, b, c, d]: [usize; 4]) {
    for (x, y, z, turn) in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)] {
        state[x] = state[x].wrapping_add(state[y]);
        state[z] = (state[z] ^ state[x]).rotate_left(turn);
    }
}

/// The frontend.
pub struct Rng {
    stream: Stream,
}

impl Rng {
    /// A generator that starts at the beginning of `seed`'s stream.
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            stream: Stream::new(seed),
        }
    }
}

impl Frontend for Rng {
    const DEVICE_ID: u16 = 4;
    const PCI_CLASS: u32 = 0xff_0000;
    const QUEUES: &'static [u16] = &[8];
    const SECTION: (u16, u16) = (kind::RNG, 1);
    type State = Stream;

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn busy(&self) -> bool {
        false
    }

    /// The stream goes on: what was handed out never comes again.
    fn reset(&mut self) {}

    fn save(&self) -> Stream {
        self.stream.clone()
    }

    fn check(&self, _: &Stream, queues: &[QueueState]) -> Result<(), String> {
        if queues.iter().any(|queue| queue.next_avail != queue.next_used) {
            return Err("a buffer was taken from a queue and not given back".to_owned());
        }
        Ok(())
    }

    fn load(&mut self, state: Stream) {
        self.stream = state;
    }
}

/// The generator's thread.
pub(crate) struct RngWorker {
    device: Arc<VirtioDevice<Rng>>,
    chain: Chain,
    buffer: Vec<u8>,
}

impl RngWorker {
    pub(crate) fn new(device: Arc<VirtioDevice<Rng>>) -> Self {
        Self {
            device,
            chain: Chain::default(),
            buffer: vec![0; REQUEST_BYTES],
        }
    }

    /// Serves one request. False if there is none.
    fn serve(&mut self, inner: &mut Inner<Rng>, mem: &GuestMem) -> Result<bool, QueueError> {
        let queue = &mut inner.transport.queues[0];
        if !queue.pop(mem, &mut self.chain)? {
            return queue.enable_notification(mem);
        }
        let wanted = self.chain.writable_len().min(REQUEST_BYTES as u64) as usize;
        let bytes = &mut self.buffer[..wanted];
        inner.frontend.stream.fill(bytes);
        self.chain.write(mem, 0, bytes)?;
        queue.push_used(mem, self.chain.head, wanted as u32)?;
        inner.transport.raise_if_wanted(0, mem)?;
        Ok(true)
    }
}

impl Worker for RngWorker {
    fn inside(&mut self) -> Next {
        let device = self.device.clone();
        let mut inner = device.lock();
        if !inner.transport.active() {
            return Next::Wait(None);
        }
        match self.serve(&mut inner, device.mem()) {
            Ok(true) => Next::Again,
            Ok(false) => Next::Wait(None),
            Err(error) => {
                inner.transport.fail(&error);
                Next::Wait(None)
            }
        }
    }
}

#[cfg(test)]
#[path = "rng_tests.rs"]
mod tests;
