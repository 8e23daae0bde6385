//! The daemon process of one node.
fn main() {}
