//! Node daemon: seats, jail, arbiter.
