//! Asking a daemon: one JSON datagram each way over its Unix `SOCK_SEQPACKET` socket.
//!
//! The demonstration speaks the published format instead of using the daemon's own types: what a user's script would see.
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// Largest datagram.
const BYTES_MAX: usize = 1 << 20;

/// Sends a request and waits for its answer, each step for at most `patience`.
pub fn ask(socket: &Path, request: &Value, patience: Duration) -> io::Result<Value> {
    let connection = connect(socket, patience)?;
    let text = serde_json::to_vec(request)?;
    // SAFETY: an open descriptor, and a buffer of the length given.
    let sent = unsafe {
        libc::send(
            connection.as_raw_fd(),
            text.as_ptr().cast(),
            text.len(),
            libc::MSG_NOSIGNAL,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answer = vec![0; BYTES_MAX];
    // SAFETY: an open descriptor, and a buffer of the length given.
    let length = unsafe { libc::recv(connection.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
    match usize::try_from(length) {
        Ok(0) => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the daemon closed the connection without an answer",
        )),
        Ok(length) => Ok(serde_json::from_slice(&answer[..length])?),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn connect(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let timeout = libc::timeval {
        tv_sec: patience.as_secs() as libc::time_t,
        tv_usec: libc::suseconds_t::from(patience.subsec_micros()),
    };
    // SAFETY: a new descriptor that nobody else owns; address and options are complete plain data of the sizes given, and
    // the path was checked to fit with its NUL.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let size = size_of_val(&timeout) as libc::socklen_t;
            if libc::setsockopt(fd, libc::SOL_SOCKET, option, (&raw const timeout).cast(), size) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        let bytes = name.as_bytes_with_nul();
        if bytes.len() > address.sun_path.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the path is too long for a Unix socket",
            ));
        }
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let size = size_of_val(&address) as libc::socklen_t;
        if libc::connect(fd, (&raw const address).cast(), size) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_daemon_is_an_error() {
        let error = ask(
            Path::new("/nonexistent/daemon.sock"),
            &Value::Null,
            Duration::from_millis(100),
        )
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let long = "x".repeat(200);
        let error = ask(Path::new(&long), &Value::Null, Duration::from_millis(100)).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
