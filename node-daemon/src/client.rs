//! Asking a daemon.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Connection, SocketError};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::api::{Request, Response};

/// Errors of a client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon answers on {socket} ({source}): is ftvm-node-daemon running, and may you use its socket?")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The cause.
        source: SocketError,
    },
    /// The conversation broke.
    #[error("the daemon on {socket} ended the conversation ({source}): look at its log")]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// The cause.
        source: SocketError,
    },
    /// It took too long.
    #[error("the daemon on {socket} did not answer within {patience_ms} ms")]
    Late {
        /// The socket.
        socket: PathBuf,
        /// How long it was waited for.
        patience_ms: u128,
    },
}

/// Sends one request on a connection of its own and waits for the answer.
pub fn ask(socket: &Path, request: &Request, patience: Duration) -> Result<Response, ClientError> {
    let until = Instant::now() + patience;
    let connection = Connection::connect(socket).map_err(|source| ClientError::Connect {
        socket: socket.to_owned(),
        source,
    })?;
    let broken = |source| ClientError::Broken {
        socket: socket.to_owned(),
        source,
    };
    connection.send(request, &[]).map_err(broken)?;
    loop {
        match connection.receive::<Response>(false) {
            Ok(message) => return Ok(message.body),
            Err(SocketError::WouldBlock) => {}
            Err(error) => return Err(broken(error)),
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ClientError::Late {
                socket: socket.to_owned(),
                patience_ms: patience.as_millis(),
            });
        }
        let mut fds = [PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN)];
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        // An interrupted wait is tried again.
        let _ = rustix::event::poll(&mut fds, Some(&left));
    }
}
