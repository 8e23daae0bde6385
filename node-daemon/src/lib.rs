//! Node daemon: starts, jails and supervises the engines of one node, and asks the arbiter for them.

pub mod arbiter;
pub mod config;
pub mod jail;
pub mod random;
pub mod state;
pub mod tap;

#[cfg(test)]
mod testing;
