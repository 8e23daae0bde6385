//! The `ftvm` command.
fn main() {}
