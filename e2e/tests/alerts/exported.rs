//! What the programs tell, from their own registries.
use std::collections::{BTreeMap, BTreeSet};

use ftvm_crds::FaultTolerantVM;
use ftvm_engine::control::Role;
use ftvm_engine::outbox::{Outbox, Output, Sink, admitted};
use ftvm_node_daemon::kubernetes::described_metrics;
use ftvm_node_daemon::seat_socket::role_name;
use ftvm_operator::metrics::Metrics;
use ftvm_operator::reconcile::count;
use ftvm_operator::status::CONDITIONS;
use serde_json::{Map, json};

/// Labels of each metric of operator and node-daemons.
pub fn metrics() -> BTreeMap<String, BTreeSet<String>> {
    let operator = Metrics::new().unwrap().described();
    let daemon = described_metrics().unwrap();
    assert!(operator.len() > 10 && daemon.len() > 10, "{operator:?} {daemon:?}");
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, labels) in operator.into_iter().chain(daemon) {
        let labels: BTreeSet<String> = labels.into_iter().collect();
        // What both tell is the same thing.
        let before = all.insert(name, labels.clone());
        assert!(before.is_none_or(|before| before == labels), "{labels:?}");
    }
    all
}

/// Values of those labels that alerts ask for.
pub fn values() -> BTreeMap<(&'static str, &'static str), BTreeSet<String>> {
    let page = operators_page();
    let of_operator = |metric: &'static str, label: &'static str| ((metric, label), label_values(&page, metric, label));
    let roles = [
        Role::Starting,
        Role::Joining,
        Role::Standby,
        Role::Active,
        Role::Frozen,
        Role::Ended,
    ];
    BTreeMap::from([
        (("ftvm_engine", "name"), engines_figures()),
        (
            ("ftvm_seat_role", "role"),
            roles.map(|role| role_name(role).to_owned()).into(),
        ),
        of_operator("ftvm_vm_phase", "phase"),
        of_operator("ftvm_vm_condition", "condition"),
    ])
}

/// Those that an engine tells of its output.
fn engines_figures() -> BTreeSet<String> {
    struct Nowhere;
    impl Sink for Nowhere {
        fn emit(&self, _: &Output) {}
    }
    let mut counters = Map::new();
    Outbox::new(Box::new(Nowhere), admitted).counters(&mut counters);
    counters.into_iter().map(|(name, _)| name).collect()
}

/// What the operator tells of a VM in each phase, of which all conditions are known.
fn operators_page() -> String {
    let conditions = CONDITIONS.map(|kind| {
        json!({"type": kind, "status": "True", "reason": "R", "message": "", "lastTransitionTime": "2026-11-28T00:00:00Z"})
    });
    let phases = ["Starting", "Running", "Paused", "Stopping", "Halted", "Deleting"];
    let vms = phases.map(|phase| -> FaultTolerantVM {
        let vm = json!({
            "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM",
            "metadata": {"name": phase.to_lowercase(), "namespace": "shop"},
            "spec": {
                "machine": {"memory": "64Mi"}, "boot": {"image": {"reference": "web:1"}}, "disks": [{"name": "root", "size": "64Mi"}],
            },
            "status": {"phase": phase, "conditions": conditions},
        });
        serde_json::from_value(vm).unwrap()
    });
    let metrics = Metrics::new().unwrap();
    count(vms.iter(), &metrics);
    metrics.text()
}

fn label_values(page: &str, metric: &str, label: &str) -> BTreeSet<String> {
    let (begins, mark) = (format!("{metric}{{"), format!("{label}=\""));
    let samples = page.lines().filter(|line| line.starts_with(&begins));
    let values = samples.filter_map(|line| line.split_once(&mark)?.1.split('"').next());
    values.map(str::to_owned).collect()
}
