//! Protocol of a fault-tolerant VM: who is active, what may be released, who may join.
//!
//! Pure: events in, actions out. No clock, socket, thread, file or randomness; the engine's driver executes actions and
//! reports events, and so does a seeded simulator (crate `ftvm-protocol-sim`). `docs/protocol.md` has the rules, the
//! state diagram and how they are attacked.
//!
//! Invariant: everything ever released is contained in the state of every seat that may become active next.
//! Invariant: at most one incarnation creates new output in a term.

pub mod core;
pub mod header;
pub mod identity;
pub mod message;
pub mod record;
pub mod recreation;
pub mod room;
pub mod wire;
