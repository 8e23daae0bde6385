//! The seat socket: where the programs of this node's seat pods hand their files to the daemon.
//!
//! ```text
//!   seat ── connect ──► pidfd, cgroups, pod UID ──► genuine? ──► Prepare ──► Ready + descriptors ──► checks ──► Handed
//! ```
//!
//! A pod is hostile until proven otherwise, and then it may harm its own virtual machine alone. Nothing that it says is
//! believed; its descriptors are checked; its messages, connections and waiting are bounded.

mod handed;
pub mod message;
mod network;
mod pod;
mod refusals;
mod server;

mod seat;

pub use handed::{Expected, Handed, Held};
pub use pod::{Hierarchies, Peer, PodError};
pub use seat::{DiskProgress, PodSeat, Progress, role_name};
pub use server::{Pods, bind, serve};
