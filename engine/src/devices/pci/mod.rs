//! One PCI root bus (PCI Local Bus 3.0) without bridges: configuration mechanism #1, type-0 functions, MSI-X.

pub mod config;
pub mod msix;
pub mod root;
