//! Commands inside a node, as seen from the lab.
use std::io::{self, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::wire::{self, Frame, Start};

/// What a finished command left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Exit code, or 128 plus the number of the signal that ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// One part of a running command's story.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes of standard output.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// The end, with the exit code, or 128 plus a signal.
    Exit(i32),
}

/// A command that runs in a node; dropping this kills it.
pub struct Session {
    stream: TcpStream,
    /// Its process id in the node.
    pub pid: u32,
}

impl Session {
    /// Starts a command over a fresh connection to the node's agent.
    ///
    /// # Errors
    /// If the agent does not answer in time or cannot start the command.
    pub fn start(mut stream: TcpStream, start: &Start, timeout: Duration) -> anyhow::Result<Self> {
        stream.set_nodelay(true)?;
        let mut line = serde_json::to_vec(start)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        stream.set_read_timeout(Some(timeout))?;
        match wire::read_frame(&mut stream).context("the node's agent does not answer")? {
            Some(Frame {
                kind: wire::STARTED,
                payload,
            }) => {
                let pid = payload.try_into().map(u32::from_le_bytes);
                let pid = pid.map_err(|_| anyhow::anyhow!("the node's agent sent no process id"))?;
                Ok(Self { stream, pid })
            }
            Some(Frame {
                kind: wire::FAILED,
                payload,
            }) => bail!("in the node: {}", String::from_utf8_lossy(&payload)),
            other => bail!("the node's agent answered out of turn: {other:?}"),
        }
    }

    /// The next thing that the command does.
    ///
    /// # Errors
    /// If nothing happens until the deadline, or the connection breaks (the node was killed, or its management link is down).
    pub fn next(&mut self, deadline: Instant) -> anyhow::Result<Event> {
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(left))?;
        let frame = wire::read_frame(&mut self.stream).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                anyhow::anyhow!("process {} in the node did not end in time", self.pid)
            }
            _ => error.into(),
        })?;
        match frame {
            Some(Frame {
                kind: wire::STDOUT,
                payload,
            }) => Ok(Event::Stdout(payload)),
            Some(Frame {
                kind: wire::STDERR,
                payload,
            }) => Ok(Event::Stderr(payload)),
            Some(Frame {
                kind: wire::EXIT,
                payload,
            }) => match payload.try_into().map(i32::from_le_bytes) {
                Ok(code) => Ok(Event::Exit(code)),
                Err(_) => bail!("the node's agent sent no exit code"),
            },
            Some(frame) => bail!("the node's agent sent a frame of unknown kind {}", frame.kind),
            None => bail!("the node's agent hung up before process {} ended", self.pid),
        }
    }

    /// Sends bytes to the command's standard input.
    ///
    /// # Errors
    /// If the connection breaks.
    pub fn feed(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        for part in bytes.chunks(wire::MAX_FRAME) {
            wire::write_frame(&mut self.stream, wire::STDIN, part)?;
        }
        Ok(())
    }

    /// Ends the command's standard input.
    ///
    /// # Errors
    /// If the connection breaks.
    pub fn end_input(&mut self) -> anyhow::Result<()> {
        Ok(wire::write_frame(&mut self.stream, wire::STDIN_END, &[])?)
    }

    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// If the connection breaks.
    pub fn signal(&mut self, signal: u8) -> anyhow::Result<()> {
        Ok(wire::write_frame(&mut self.stream, wire::SIGNAL, &[signal])?)
    }

    /// Collects everything up to the end.
    ///
    /// # Errors
    /// Those of [`Session::next`].
    pub fn finish(mut self, deadline: Instant) -> anyhow::Result<Finished> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next(deadline)? {
                Event::Stdout(bytes) => stdout.extend(bytes),
                Event::Stderr(bytes) => stderr.extend(bytes),
                Event::Exit(code) => return Ok(Finished { code, stdout, stderr }),
            }
        }
    }
}
