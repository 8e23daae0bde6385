//! Labs, test guests, judges and fault tools.

pub mod alerts;
pub mod bench;
pub mod cargo;
pub mod cluster;
pub mod demo;
pub mod guest_blocks;
pub mod guest_build;
pub mod guest_journal;
pub mod guest_protocol;
pub mod hosts;
pub mod interrupt;
pub mod judge;
pub mod lab;
pub mod report;
pub mod scene;
