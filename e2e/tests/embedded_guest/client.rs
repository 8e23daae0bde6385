//! A client of the guest's service.

use ftvm_e2e::guest_protocol::{ANSWER_BYTES, Answer, Op, Request};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Emulation on a busy machine is slow; nothing is judged by this but whether it comes at all.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection.
pub struct Client(TcpStream);

impl Client {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        Self(stream)
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("the connection stands");
    }

    pub fn send(&mut self, op: Op, seq: u64, arg: u64, arg2: u64) {
        self.raw(&Request::new(op, seq, arg, arg2).encode());
    }

    pub fn bytes(&mut self, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.0.read_exact(&mut bytes).expect("the connection stands");
        bytes
    }

    pub fn answer(&mut self) -> Answer {
        let bytes: [u8; ANSWER_BYTES] = self.bytes(ANSWER_BYTES).try_into().expect("so many were read");
        Answer::decode(&bytes).expect("an answer")
    }

    pub fn call(&mut self, op: Op, seq: u64, arg: u64, arg2: u64) -> Answer {
        self.call_raw(op as u32, seq, arg, arg2)
    }

    pub fn call_raw(&mut self, op: u32, seq: u64, arg: u64, arg2: u64) -> Answer {
        self.raw(&Request { op, seq, arg, arg2 }.encode());
        let answer = self.answer();
        assert_eq!(answer.seq, seq);
        answer
    }

    /// Whether the guest closed the connection; waits for it.
    pub fn at_end(&mut self) -> bool {
        !matches!(self.0.read(&mut [0]), Ok(1..))
    }

    /// Asks again until `condition` holds.
    pub fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < PATIENCE, "not after {PATIENCE:?}: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
