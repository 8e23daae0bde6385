//! The Helm chart: what it renders, what it refuses, and what its policies let the operator and the node-daemons do, judged by a real API server.
mod admission;
mod daemon;
mod operator;
mod people;
mod render;
mod uninstall;

use std::path::{Path, PathBuf};

/// The chart's folder.
fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/fault-tolerant-vm")
}

/// Files of values that the chart is tested with: all in its folder `ci`.
fn value_sets() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(chart().join("ci")).unwrap();
    let mut sets: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    sets.sort();
    assert!(sets.len() >= 3, "{sets:?}");
    sets
}
