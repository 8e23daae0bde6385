//! Labs, test guests, judges and fault tools.

pub mod guest_protocol;
pub mod hosts;
pub mod judge;
pub mod lab;
