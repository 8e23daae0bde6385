//! The operator: observe → decide (pure) → status (pure) → apply what was built (pure).
//!
//! It is never on the way of a failover: seats fail over with the operator dead. `docs/kubernetes.md` has the objects and who
//! writes what; [`decide`] has the rules.

pub mod api;
mod authority;
pub mod build;
pub mod caches;
pub mod cpu;
pub mod decide;
pub mod election;
pub mod events;
pub mod first_look;
pub mod helm_test;
pub mod image_volumes;
pub mod metrics;
pub mod observe;
mod random;
pub mod reconcile;
mod refusal;
pub mod run;
mod serve;
pub mod status;
#[cfg(test)]
mod testing;
pub mod trim;
pub mod uninstall;
mod waits;
