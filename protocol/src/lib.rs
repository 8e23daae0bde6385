//! Protocol of a fault-tolerant VM: pure decisions, no I/O.
