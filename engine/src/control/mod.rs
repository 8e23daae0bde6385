//! What passes between a node daemon and the engine of a seat.
//!
//! ```text
//!   daemon ── Launch + file descriptors ──►  engine        once, on descriptor 3
//!          ── Command, Answer ────────────►                 any number of times
//!          ◄─ Request, Reply, Event ────────                arbiter requests, replies to commands, what happened
//! ```
//!
//! One message is one datagram of a Unix `SOCK_SEQPACKET` connection: JSON, at most [`MESSAGE_BYTES_MAX`] bytes, with at
//! most [`MESSAGE_FDS_MAX`] file descriptors (`SCM_RIGHTS`) beside it. Descriptors are named in the JSON by their position
//! ([`Fd`]).
//!
//! Invariant: the loss of the daemon never stops the engine. Its connection closes, what was asked of the arbiter becomes
//! unknown, and the engine goes on; a later daemon connects to the control listener that came with the launch, and the
//! newest authorised connection wins.
//!
//! Both sides know unknown fields of messages and skip them, so that a newer daemon adopts an older engine and the other way
//! round; the launch alone carries a [`VERSION`] that must match.

mod endpoint;
pub mod exit_code;
pub mod header_file;
mod message;
mod socket;

pub use endpoint::{
    CommandId, Endpoint, EndpointError, Handle, Input, LaunchFds, inherited_connection, receive_launch,
};
pub use message::*;
pub use socket::{Connection, Listener, Message, SocketError};
