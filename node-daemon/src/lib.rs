//! Node daemon: starts, jails and supervises the engines of one node, and asks the arbiter for them.

pub mod arbiter;
pub mod random;

#[cfg(test)]
mod testing;
