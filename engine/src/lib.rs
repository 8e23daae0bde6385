//! Virtual machine monitor and replication of one seat.

pub mod control;
