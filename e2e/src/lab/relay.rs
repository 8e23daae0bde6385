//! A program in a node that passes questions to a daemon there, one a line. It costs an emulated machine far less than a program a question.
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use super::Node;
use super::session::{Event, Session};
use super::wire::Start;

/// The agent, which every node has.
const AGENT: &str = "/lab/ftvm-node-agent";

/// The running program; dropping it ends it.
pub struct Relay {
    session: Session,
    rest: Vec<u8>,
}

impl Relay {
    /// Starts it for the daemon with this socket.
    ///
    /// # Errors
    /// If the node's agent does not answer.
    pub fn start(node: &Node, socket: &str) -> anyhow::Result<Self> {
        let argv = [AGENT, "ask", socket].map(str::to_owned).to_vec();
        let session = node.start(&Start {
            argv,
            ..Start::default()
        })?;
        Ok(Self {
            session,
            rest: Vec::new(),
        })
    }

    /// The daemon's answer; null if it gave none. After an error the relay is of no use any more.
    ///
    /// # Errors
    /// If there is none in time, or the node is gone.
    pub fn ask(&mut self, request: &Value, patience: Duration) -> anyhow::Result<Value> {
        self.session.feed(format!("{request}\n").as_bytes())?;
        let deadline = Instant::now() + patience;
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return serde_json::from_slice(&line).context("the answer is no JSON");
            }
            match self.session.next(deadline)? {
                Event::Stdout(bytes) => self.rest.extend(bytes),
                Event::Stderr(bytes) => bail!("{}", String::from_utf8_lossy(&bytes).trim()),
                Event::Exit(code) => bail!("the relay ended with code {code}"),
            }
        }
    }
}
