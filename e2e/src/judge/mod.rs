//! The judge: a client outside the protected machine that notices everything a failover could break.
//!
//! * [`client`] holds **one** TCP connection with default settings. It never reconnects and never sends a request twice;
//!   what the kernel retransmits is TCP's own business. Requests are numbered and go out one at a time or a few ahead.
//! * [`ledger`] predicts every answer. An answer counts as **lost** when a later state contradicts it: fewer increments
//!   than were answered, fewer journal records, another chain, another boot.
//! * [`sniffer`] stands on the client network's bridge, outside all hosts, and [`emission`] decides from its frames
//!   whether two hosts ever spoke as the guest in the same term.
//!
//! Everything here is a second opinion: it believes neither the engine nor its status.

pub mod client;
pub mod emission;
pub mod latency;
pub mod ledger;
pub mod packet;
pub mod sniffer;
pub mod timeline;

pub use client::{Judge, JudgePlan, Outcome, PhaseReport};
pub use emission::{EmissionReport, Emissions};
pub use ledger::{Findings, Ledger};
