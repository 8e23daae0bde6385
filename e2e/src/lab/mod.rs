//! Emulated machines: images, nodes, networks and faults.
