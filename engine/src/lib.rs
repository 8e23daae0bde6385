//! Virtual machine monitor and replication of one seat.

pub mod backends;
pub mod boot;
pub mod checkpoint;
pub mod clock;
pub mod control;
pub mod devices;
pub mod driver;
pub mod kvm;
pub mod log;
pub mod mac;
pub mod machine;
pub mod memory;
pub mod outbox;
pub mod pause;
pub mod priority;
pub mod replication;
pub mod run;
pub mod seat_io;
pub mod seccomp;
pub mod state;
pub mod vcpu;

/// An error with its causes in one line.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
