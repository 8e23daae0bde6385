//! Requests that kubectl has no words for, through `kubectl proxy`.
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::{Cluster, kubectl_command, wait_for};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A `kubectl proxy` on a Unix socket; dropping it ends it.
pub(super) struct Proxy {
    process: Child,
    socket: PathBuf,
}

impl Proxy {
    pub(super) fn start(cluster: &Cluster, kubeconfig: &Path) -> anyhow::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let socket = cluster.folder().join(format!("proxy-{number}.sock"));
        let mut command = kubectl_command(cluster.programs(), cluster.folder(), kubeconfig);
        command
            .arg("proxy")
            .arg(format!("--unix-socket={}", socket.display()))
            // It refuses some methods by default; the API server is to decide.
            .arg("--reject-methods=^$")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        let process = cluster.sandbox().spawn(command)?;
        Ok(Self { process, socket })
    }

    /// One request; returns the body of a 2xx answer.
    pub(super) fn send(&mut self, method: &str, path: &str, kind: &str, body: &str) -> anyhow::Result<String> {
        let mut stream = wait_for("kubectl proxy listens", PATIENCE, || {
            Ok(UnixStream::connect(&self.socket)?)
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // Of version 1.0, so that the answer ends with the connection and comes in one piece.
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        if status.starts_with('2') {
            return Ok(body.to_owned());
        }
        // A `Status`, unless the proxy itself speaks.
        let said: Value = serde_json::from_str(body).unwrap_or_default();
        let text = |key: &str| said[key].as_str().unwrap_or(body).to_owned();
        bail!("{method} {path}: {status} {}: {}", text("reason"), text("message"))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.socket);
    }
}
