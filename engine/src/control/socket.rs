//! Datagrams with descriptors over a Unix `SOCK_SEQPACKET` connection.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::message::{MESSAGE_BYTES_MAX, MESSAGE_FDS_MAX};

/// Errors of a control connection.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The other side closed the connection, or its process ended.
    #[error("control connection closed by the other side")]
    Closed,
    /// Nothing to read, or the other side does not read what it was sent.
    #[error("control connection would block")]
    WouldBlock,
    /// A message to send is larger than [`MESSAGE_BYTES_MAX`] or carries too many descriptors.
    #[error(
        "control message of {bytes} bytes and {fds} descriptors is over the bound ({MESSAGE_BYTES_MAX} bytes, {MESSAGE_FDS_MAX} descriptors)"
    )]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// Its descriptors.
        fds: usize,
    },
    /// A received message was cut off because it is over the bound.
    #[error(
        "control message from the other side is over the bound of {MESSAGE_BYTES_MAX} bytes or {MESSAGE_FDS_MAX} descriptors"
    )]
    Truncated,
    /// A received message is not what it should be.
    #[error("control message is malformed; do daemon and engine come from one release?")]
    Malformed(#[source] serde_json::Error),
    /// A path does not fit into a Unix socket address.
    #[error("socket path {path} is longer than the 107 bytes that Unix sockets allow: choose a shorter state folder")]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("control socket: {what}")]
    Io {
        /// What was tried.
        what: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

fn io(what: impl Into<String>) -> impl FnOnce(Errno) -> SocketError {
    move |errno| SocketError::Io {
        what: what.into(),
        source: errno.into(),
    }
}

/// A received message with its descriptors, in the order in which they were sent.
#[derive(Debug)]
pub struct Message<T> {
    /// The decoded JSON.
    pub body: T,
    /// The descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// One end of a control connection. Sending and receiving need no exclusive access: datagrams do not interleave.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

impl Connection {
    /// Both ends of a new connection, close-on-exec.
    pub fn pair() -> Result<(Connection, Connection), SocketError> {
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(io("socketpair"))?;
        Ok((Connection { socket: a }, Connection { socket: b }))
    }

    /// Connects to a [`Listener`].
    pub fn connect(path: &Path) -> Result<Connection, SocketError> {
        let address = unix_address(path)?;
        let socket = seqpacket_socket()?;
        rustix::net::connect(&socket, &address).map_err(io(format!("connect to {}", path.display())))?;
        Ok(Connection { socket })
    }

    /// Takes over a connected `SOCK_SEQPACKET` socket.
    pub fn from_fd(socket: OwnedFd) -> Result<Connection, SocketError> {
        let kind = rustix::net::sockopt::socket_type(&socket).map_err(io("SO_TYPE of the control descriptor"))?;
        if kind != SocketType::SEQPACKET {
            return Err(io("the control descriptor is no SOCK_SEQPACKET socket")(Errno::NOTSOCK));
        }
        Ok(Connection { socket })
    }

    /// The socket itself, to hand it to a child.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Process id and user id of the other side at the time of connect (or listen), as this process's namespaces show them;
    /// no process id for a process of another pid namespace. unix(7), SO_PEERCRED.
    pub fn peer(&self) -> Result<(Option<i32>, u32), SocketError> {
        let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: a structure and a length that fit each other. (Not by rustix, whose type can't hold the process id 0.)
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut credentials).cast(),
                &mut length,
            )
        };
        if result != 0 {
            return Err(SocketError::Io {
                what: "SO_PEERCRED".into(),
                source: std::io::Error::last_os_error(),
            });
        }
        Ok(((credentials.pid != 0).then_some(credentials.pid), credentials.uid))
    }

    /// Sends one message; never blocks ([`SocketError::WouldBlock`] says that nothing was sent).
    pub fn send<T: Serialize>(&self, body: &T, fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        let text = serde_json::to_vec(body).map_err(SocketError::Malformed)?;
        if text.len() > MESSAGE_BYTES_MAX || fds.len() > MESSAGE_FDS_MAX {
            return Err(SocketError::TooLarge {
                bytes: text.len(),
                fds: fds.len(),
            });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(&text)], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN | Errno::NOBUFS) => return Err(SocketError::WouldBlock),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Err(SocketError::Closed),
                Err(errno) => return Err(io("send")(errno)),
            }
        }
    }

    /// Receives one message; blocks if `wait`.
    pub fn receive<T: DeserializeOwned>(&self, wait: bool) -> Result<Message<T>, SocketError> {
        let mut text = vec![0u8; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
        let mut flags = RecvFlags::CMSG_CLOEXEC;
        if !wait {
            flags |= RecvFlags::DONTWAIT;
        }
        loop {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let result = rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut text)], &mut ancillary, flags);
            let received = match result {
                Ok(received) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(SocketError::WouldBlock),
                Err(Errno::CONNRESET | Errno::NOTCONN) => return Err(SocketError::Closed),
                Err(errno) => return Err(io("receive")(errno)),
            };
            // Collected first: whatever happens next, they are closed and not leaked.
            let fds: Vec<OwnedFd> = ancillary
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
                return Err(SocketError::Truncated);
            }
            // JSON is never empty, so an empty datagram is the end of the connection or a mistake that ends it.
            if received.bytes == 0 {
                return Err(SocketError::Closed);
            }
            let body = serde_json::from_slice(&text[..received.bytes]).map_err(SocketError::Malformed)?;
            return Ok(Message { body, fds });
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A listening control socket.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Binds `path`, which must not exist, and listens. Access rights are those of the folder and the umask.
    pub fn bind(path: &Path) -> Result<Listener, SocketError> {
        let address = unix_address(path)?;
        let socket = seqpacket_socket()?;
        rustix::net::bind(&socket, &address).map_err(io(format!("bind {}", path.display())))?;
        rustix::net::listen(&socket, 8).map_err(io(format!("listen on {}", path.display())))?;
        Ok(Listener { socket })
    }

    /// Takes over a listening socket that came with the launch.
    pub fn from_fd(socket: OwnedFd) -> Listener {
        Listener { socket }
    }

    /// The socket itself, to hand it to an engine.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Accepts one connection; [`SocketError::WouldBlock`] only if the socket is non-blocking.
    pub fn accept(&self) -> Result<Connection, SocketError> {
        loop {
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(socket) => return Ok(Connection { socket }),
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => return Err(SocketError::WouldBlock),
                Err(errno) => return Err(io("accept")(errno)),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn seqpacket_socket() -> Result<OwnedFd, SocketError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(io("create socket"))
}

fn unix_address(path: &Path) -> Result<SocketAddrUnix, SocketError> {
    SocketAddrUnix::new(path).map_err(|errno| match errno {
        Errno::NAMETOOLONG => SocketError::PathTooLong { path: path.to_owned() },
        other => io(format!("address {}", path.display()))(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    #[test]
    fn message_and_descriptors_arrive_in_order() {
        let (a, b) = Connection::pair().unwrap();
        let mut files = Vec::new();
        for n in 0..3u8 {
            let mut file = tempfile();
            file.write_all(&[n]).unwrap();
            file.rewind().unwrap();
            files.push(file);
        }
        let fds: Vec<_> = files.iter().map(|f| f.as_fd()).collect();
        a.send(&"hello", &fds).unwrap();
        let message: Message<String> = b.receive(true).unwrap();
        assert_eq!(message.body, "hello");
        for (n, fd) in message.fds.into_iter().enumerate() {
            let mut byte = [9];
            std::fs::File::from(fd).read_exact(&mut byte).unwrap();
            assert_eq!(usize::from(byte[0]), n);
        }
    }

    #[test]
    fn bounds_and_ends_are_named() {
        let (a, b) = Connection::pair().unwrap();
        assert!(matches!(b.receive::<String>(false), Err(SocketError::WouldBlock)));
        let big = "x".repeat(MESSAGE_BYTES_MAX);
        assert!(matches!(a.send(&big, &[]), Err(SocketError::TooLarge { .. })));
        rustix::net::send(&a, b"{not json", SendFlags::empty()).unwrap();
        assert!(matches!(b.receive::<String>(true), Err(SocketError::Malformed(_))));
        let oversized = vec![b'x'; MESSAGE_BYTES_MAX + 1];
        rustix::net::send(&a, &oversized, SendFlags::empty()).unwrap();
        assert!(matches!(b.receive::<String>(true), Err(SocketError::Truncated)));
        drop(a);
        assert!(matches!(b.receive::<String>(true), Err(SocketError::Closed)));
        assert!(matches!(b.send(&"late", &[]), Err(SocketError::Closed)));
    }

    #[test]
    fn largest_message_passes_and_a_full_socket_does_not_block() {
        let (a, b) = Connection::pair().unwrap();
        let big = "x".repeat(MESSAGE_BYTES_MAX - 2);
        a.send(&big, &[]).unwrap();
        let received: Message<String> = b.receive(true).unwrap();
        assert_eq!(received.body, big);
        let full = (0..10_000).find_map(|_| a.send(&big, &[]).err());
        assert!(matches!(full, Some(SocketError::WouldBlock)));
    }

    fn tempfile() -> std::fs::File {
        let fd = rustix::fs::memfd_create("control-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        fd.into()
    }
}
