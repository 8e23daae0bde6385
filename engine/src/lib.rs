//! Virtual machine monitor and replication of one seat.
