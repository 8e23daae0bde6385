//! The Kubernetes types of fault-tolerant VMs, and everything else that operator, node-daemon and command line must see alike:
//! names of objects, labels and annotations, what daemon and operator write to each other, how they tell Prometheus, and the
//! arbiter's record in a Lease.
//!
//! No client and no engine in here. `docs/kubernetes.md` says who writes what.

pub mod cpu;
pub mod lease;
pub mod mac;
pub mod metrics;
pub mod names;
pub mod networks;
pub mod quantity;
mod rules;
pub mod seat;
mod spec;
mod status;
pub mod yaml;

pub use rules::{definition, messages};
pub use spec::*;
pub use status::*;

/// A value out of a JSON object. An array would do for serde: its fields would be taken by their order.
fn from_json_object<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    if !text.trim_start().starts_with('{') {
        return Err("not a JSON object".to_owned());
    }
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// First lines of the generated file.
pub const YAML_HEAD: &str = "# Generated from the types in crds/src; do not edit. Anew:\n\
                             #   cargo run -p ftvm-crds --bin crd-yaml > crds/ftvm.dev_faulttolerantvms.yaml\n";
