//! The engine process of one seat.
fn main() {}
