//! Virtual machine monitor and replication of one seat.

pub mod backends;
pub mod checkpoint;
pub mod control;
pub mod devices;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod outbox;
pub mod pause;
pub mod replication;
pub mod run;
pub mod seat_io;
pub mod seccomp;
pub mod state;
pub mod vcpu;
