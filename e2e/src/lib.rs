//! Labs, test guests, judges and fault tools.

pub mod lab;
