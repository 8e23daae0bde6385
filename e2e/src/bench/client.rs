//! A plain client of the guest: it asks and waits, one request at a time.
use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::Load;
use crate::guest_blocks::{BLOCK_REPORT_BYTES, BlockLoad, BlockReport};
use crate::guest_protocol::{ANSWER_BYTES, Answer, CHURN_WORD_ONLY, Op, Request};
use crate::judge::latency::Histogram;

/// Interval between two attempts to connect.
const RETRY: Duration = Duration::from_millis(50);
/// Without an answer for this long something is broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection, with default settings.
#[derive(Debug)]
pub struct GuestClient {
    stream: TcpStream,
    seq: u64,
}

impl GuestClient {
    /// Connects as soon as the guest listens and answers.
    ///
    /// # Errors
    /// If it does not within `patience`.
    pub fn connect(guest: SocketAddr, patience: Duration) -> anyhow::Result<Self> {
        let deadline = Instant::now() + patience;
        loop {
            let error = match Self::try_connect(guest, patience) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            if Instant::now() > deadline {
                return Err(error.context(format!("the guest at {guest} does not answer")));
            }
            std::thread::sleep(RETRY);
        }
    }

    fn try_connect(guest: SocketAddr, patience: Duration) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&guest, patience)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self { stream, seq: 0 };
        client.status()?;
        Ok(client)
    }

    /// Connects on a thread that `entrance` moves to where the client stands.
    ///
    /// # Errors
    /// If it can't be moved, or the guest does not answer.
    pub fn connect_from<E: fmt::Display>(
        entrance: impl FnOnce() -> Result<(), E> + Send + 'static,
        guest: SocketAddr,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        let thread = std::thread::spawn(move || {
            entrance().map_err(|error| anyhow::anyhow!("{error}"))?;
            Self::connect(guest, patience)
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thread that connects to the guest panicked"))?
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// If the connection fails or the guest refuses.
    pub fn ask(&mut self, op: Op, arg: u64, arg2: u64) -> anyhow::Result<Answer> {
        self.seq += 1;
        let request = Request::new(op, self.seq, arg, arg2);
        let mut bytes = [0; ANSWER_BYTES];
        self.stream
            .write_all(&request.encode())
            .and_then(|()| self.stream.read_exact(&mut bytes))
            .with_context(|| format!("asking the guest for {op:?}"))?;
        let answer = Answer::decode(&bytes)?;
        ensure!(!answer.refused(), "the guest refuses {op:?} with {arg} and {arg2}");
        ensure!(
            answer.seq == self.seq,
            "the guest answers request {} instead of {}",
            answer.seq,
            self.seq
        );
        Ok(answer)
    }

    /// The guest's state.
    ///
    /// # Errors
    /// As [`GuestClient::ask`].
    pub fn status(&mut self) -> anyhow::Result<Answer> {
        self.ask(Op::Status, 0, 0)
    }

    /// Gives the guest a load.
    ///
    /// # Errors
    /// As [`GuestClient::ask`].
    pub fn load(&mut self, load: Load, epoch_ms: u32) -> anyhow::Result<()> {
        let words = if load.whole_pages { 0 } else { CHURN_WORD_ONLY };
        // A rate of 0 means no limit; without pages it means nothing.
        let rate = load.pages_per_s(epoch_ms).max(1);
        self.ask(Op::SetChurn, load.dirty_pages.into(), rate | words)?;
        self.ask(Op::SetWork, load.busy.into(), 0)?;
        Ok(())
    }

    /// Fills so many pages with data that does not compress, and leaves them alone from then on.
    ///
    /// # Errors
    /// As [`GuestClient::ask`].
    pub fn fill(&mut self, pages: u64) -> anyhow::Result<()> {
        // The slowest rate there is: after the answer, which comes when all are filled, a page a second.
        self.ask(Op::SetChurn, pages, 1)?;
        self.ask(Op::SetWork, 0, 0)?;
        Ok(())
    }

    /// Has the guest run a block load, and waits for its report, which is not judged here.
    ///
    /// # Errors
    /// As [`GuestClient::ask`].
    pub fn blocks(&mut self, load: BlockLoad) -> anyhow::Result<BlockReport> {
        let (arg, arg2) = load.encode();
        self.ask(Op::Block, arg, arg2).with_context(|| format!("{load:?}"))?;
        let mut bytes = [0; BLOCK_REPORT_BYTES];
        self.stream
            .read_exact(&mut bytes)
            .context("reading the report of a block load")?;
        Ok(BlockReport::decode(&bytes))
    }

    /// Asks one request after the other for a while.
    ///
    /// # Errors
    /// As [`GuestClient::ask`].
    pub fn latency(&mut self, window: Duration) -> anyhow::Result<Histogram> {
        let mut times = Histogram::default();
        let end = Instant::now() + window;
        while Instant::now() < end {
            let asked = Instant::now();
            self.ask(Op::Increment, 0, 0)?;
            times.add(u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX));
        }
        Ok(times)
    }
}
