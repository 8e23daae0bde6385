//! All that the operator tells.

use ftvm_crds::metrics::{BUILD_INFO, Kind, Label, Metric, NAMESPACE, VM, Values};

use crate::status::CONDITIONS;

/// Phases of VMs as metrics call them.
pub const PHASES: [&str; 6] = ["starting", "running", "paused", "stopping", "halted", "deleting"];

/// Requests of the operator, as metrics call them.
pub const VERBS: [&str; 8] = [
    "get", "apply", "create", "dry-run", "patch", "delete", "status", "update",
];

/// Labels of what is told of a VM.
const VM_LABELS: [Label; 2] = [NAMESPACE, VM];

/// The metrics, in the order of `docs/metrics.md`.
pub const METRICS: &[Metric] = &[
    Metric {
        name: "ftvm_operator_leader",
        kind: Kind::Gauge,
        unit: "1",
        labels: &[],
        help: "1 while this replica is the leader",
    },
    Metric {
        name: "ftvm_operator_reconciles_total",
        kind: Kind::Counter,
        unit: "reconciles",
        labels: &[],
        help: "Reconciles that were begun",
    },
    Metric {
        name: "ftvm_operator_reconcile_failures_total",
        kind: Kind::Counter,
        unit: "reconciles",
        labels: &[Label {
            name: "kind",
            values: Values::OneOf(&["conflict", "refused"]),
        }],
        help: "Reconciles that failed, by kind of failure",
    },
    Metric {
        name: "ftvm_operator_reconcile_seconds",
        kind: Kind::Histogram(&[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]),
        unit: "seconds",
        labels: &[],
        help: "Duration of reconciles",
    },
    Metric {
        name: "ftvm_operator_api_requests_total",
        kind: Kind::Counter,
        unit: "requests",
        labels: &[
            Label {
                name: "verb",
                values: Values::OneOf(&VERBS),
            },
            Label {
                name: "kind",
                values: Values::Each("kind of object that the operator asks for"),
            },
        ],
        help: "Requests to the API server without watches, by verb and kind",
    },
    Metric {
        name: "ftvm_vms",
        kind: Kind::Gauge,
        unit: "VMs",
        labels: &[Label {
            name: "phase",
            values: Values::OneOf(&PHASES),
        }],
        help: "Fault-tolerant VMs by phase",
    },
    Metric {
        name: "ftvm_vms_unprotected",
        kind: Kind::Gauge,
        unit: "VMs",
        labels: &[],
        help: "VMs whose guest runs without protection",
    },
    Metric {
        name: "ftvm_vms_unreadable",
        kind: Kind::Gauge,
        unit: "VMs",
        labels: &[],
        help: "VMs that the operator does nothing for, because it can't read them",
    },
    Metric {
        name: "ftvm_vm_phase",
        kind: Kind::Gauge,
        unit: "1",
        labels: &[
            NAMESPACE,
            VM,
            Label {
                name: "phase",
                values: Values::OneOf(&PHASES),
            },
        ],
        help: "1 for the phase that the VM is in",
    },
    Metric {
        name: "ftvm_vm_unprotected",
        kind: Kind::Gauge,
        unit: "1",
        labels: &VM_LABELS,
        help: "1 while the VM's guest runs without protection",
    },
    Metric {
        name: "ftvm_vm_condition",
        kind: Kind::Gauge,
        unit: "1",
        labels: &[
            NAMESPACE,
            VM,
            Label {
                name: "condition",
                values: Values::OneOf(&CONDITIONS),
            },
        ],
        help: "1 for a condition of the VM that is True, 0 for one that is False; of one that is Unknown nothing is told",
    },
    Metric {
        name: "ftvm_vm_last_failover_timestamp_seconds",
        kind: Kind::Gauge,
        unit: "seconds",
        labels: &VM_LABELS,
        help: "When the standby took over last, in seconds since 1970; 0: never",
    },
    Metric {
        name: "ftvm_vm_last_failover_gap_seconds",
        kind: Kind::Gauge,
        unit: "seconds",
        labels: &VM_LABELS,
        help: "For how long no seat ran the guest in the last failover, once there was one",
    },
    Metric {
        name: "ftvm_vm_target_latency_ms",
        kind: Kind::Gauge,
        unit: "milliseconds",
        labels: &VM_LABELS,
        help: "For how long output may wait for its release, in milliseconds, where the VM's spec says it",
    },
    BUILD_INFO,
];
