//! Pages of programs in the cluster: probes and metrics.
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;

use super::Cluster;

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(20);

impl Cluster {
    /// Asks for a page from outside of the nodes; returns the answer's status and body.
    ///
    /// # Errors
    /// If nobody answers, or not in HTTP.
    pub fn http_get(&self, at: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
        let mut stream = self.sandbox().connect(at, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // Of version 1.0, so that the answer ends with the connection and comes in one piece.
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        let page = || format!("http://{at}{path}");
        stream.read_to_string(&mut answer).with_context(page)?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .context("no HTTP answer")
            .with_context(page)?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.context("no status").with_context(page)?, body.to_owned()))
    }
}
