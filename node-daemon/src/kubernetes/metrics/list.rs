//! All that a node-daemon tells.

use ftvm_crds::metrics::{BUILD_INFO, Kind, Label, Metric, NAMESPACE, SEAT, VM, Values};

/// Labels of what is told of a seat.
const SEAT_LABELS: [Label; 3] = [NAMESPACE, VM, SEAT];

/// States of the node's paths.
pub const PATH_STATES: [&str; 4] = ["up", "down", "missing", "shared"];

/// The metrics, in the order of `docs/metrics.md`.
pub const METRICS: &[Metric] = &[
    Metric {
        name: "ftvm_seats",
        kind: Kind::Gauge,
        unit: "seats",
        labels: &[],
        help: "Seats of this node",
    },
    Metric {
        name: "ftvm_seat_role",
        kind: Kind::Gauge,
        unit: "1",
        labels: &[
            NAMESPACE,
            VM,
            SEAT,
            Label {
                name: "role",
                values: Values::OneOf(&["none", "starting", "joining", "standby", "active", "frozen", "ended"]),
            },
        ],
        help: "1 for the role that the seat has now; none without an engine",
    },
    Metric {
        name: "ftvm_seat_protected",
        kind: Kind::Gauge,
        unit: "1",
        labels: &SEAT_LABELS,
        help: "1 while the seat leads a protected pair",
    },
    Metric {
        name: "ftvm_seat_term",
        kind: Kind::Gauge,
        unit: "terms",
        labels: &SEAT_LABELS,
        help: "Term of the record as the engine knows it",
    },
    Metric {
        name: "ftvm_seat_epoch",
        kind: Kind::Gauge,
        unit: "epochs",
        labels: &SEAT_LABELS,
        help: "Last epoch that the seat cut as the active, or received whole as the standby",
    },
    Metric {
        name: "ftvm_seat_epoch_acknowledged",
        kind: Kind::Gauge,
        unit: "epochs",
        labels: &SEAT_LABELS,
        help: "Last epoch that the standby acknowledged, as the engine knows it",
    },
    Metric {
        name: "ftvm_seat_unacknowledged_seconds",
        kind: Kind::Gauge,
        unit: "seconds",
        labels: &SEAT_LABELS,
        help: "For how long epochs have waited without any acknowledgment, where the seat is active and has a standby",
    },
    Metric {
        name: "ftvm_seat_link_up",
        kind: Kind::Gauge,
        unit: "1",
        labels: &SEAT_LABELS,
        help: "1 while the replication link to the other seat is up",
    },
    Metric {
        name: "ftvm_seat_guest_pause_seconds",
        kind: Kind::Histogram(&[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0]),
        unit: "seconds",
        labels: &SEAT_LABELS,
        help: "For how long the guest stood still for an epoch, since the engine started",
    },
    Metric {
        name: "ftvm_seat_output_hold_seconds",
        kind: Kind::Histogram(&[
            0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
        ]),
        unit: "seconds",
        labels: &SEAT_LABELS,
        help: "For how long output was held back that did not leave at once, since the engine started",
    },
    Metric {
        name: "ftvm_seat_arbiter_reachable",
        kind: Kind::Gauge,
        unit: "1",
        labels: &SEAT_LABELS,
        help: "0 after the engine's last arbiter request failed",
    },
    Metric {
        name: "ftvm_seat_program_connected",
        kind: Kind::Gauge,
        unit: "1",
        labels: &SEAT_LABELS,
        help: "1 while the pod's program is connected",
    },
    Metric {
        name: "ftvm_seat_progress_percent",
        kind: Kind::Gauge,
        unit: "percent",
        labels: &SEAT_LABELS,
        help: "Progress of preparing a disk, or of a resync, while there is one",
    },
    Metric {
        name: "ftvm_seat_engine_starts_total",
        kind: Kind::Counter,
        unit: "engines",
        labels: &SEAT_LABELS,
        help: "Engines of the seat that this daemon started",
    },
    Metric {
        name: "ftvm_seat_engine_exit_code",
        kind: Kind::Gauge,
        unit: "1",
        labels: &SEAT_LABELS,
        help: "Exit code of the seat's last engine that this daemon saw end",
    },
    Metric {
        name: "ftvm_engine",
        kind: Kind::Gauge,
        unit: "in the name",
        labels: &[
            NAMESPACE,
            VM,
            SEAT,
            Label {
                name: "name",
                values: Values::Each("figure of the list below"),
            },
        ],
        help: "Counters and measures of the engine by name",
    },
    Metric {
        name: "ftvm_guest_frames_refused_total",
        kind: Kind::Counter,
        unit: "frames",
        labels: &[
            NAMESPACE,
            VM,
            SEAT,
            Label {
                name: "nic",
                values: Values::Each("card of the VM"),
            },
            Label {
                name: "reason",
                values: Values::OneOf(&[
                    "mac",
                    "protocol",
                    "malformed",
                    "ip",
                    "arp",
                    "neighbour",
                    "router",
                    "dhcp_server",
                ]),
            },
        ],
        help: "Frames of the guest that did not leave, by card and reason, since the engine started",
    },
    Metric {
        name: "ftvm_seat_disk",
        kind: Kind::Gauge,
        unit: "1",
        labels: &[
            NAMESPACE,
            VM,
            SEAT,
            Label {
                name: "disk",
                values: Values::Each("disk of the VM"),
            },
            Label {
                name: "state",
                values: Values::OneOf(&["works", "failed", "full", "hangs"]),
            },
        ],
        help: "1 for the state of each of the seat's disks under its engine",
    },
    Metric {
        name: "ftvm_seat_storage_failures",
        kind: Kind::Gauge,
        unit: "engines",
        labels: &SEAT_LABELS,
        help: "Engines in a row that ended because of the seat's storage, none of which served for long",
    },
    Metric {
        name: "ftvm_arbiter_requests_total",
        kind: Kind::Counter,
        unit: "requests",
        labels: &[
            Label {
                name: "request",
                values: Values::OneOf(&["read", "swap"]),
            },
            Label {
                name: "outcome",
                values: Values::OneOf(&["found", "gone", "unreachable", "won", "conflict", "not_sent", "unknown"]),
            },
        ],
        help: "Requests to the API server for records, by outcome",
    },
    Metric {
        name: "ftvm_arbiter_request_seconds",
        kind: Kind::Histogram(&[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]),
        unit: "seconds",
        labels: &[Label {
            name: "request",
            values: Values::OneOf(&["read", "swap"]),
        }],
        help: "How long requests to the API server for records took, whatever came of them",
    },
    Metric {
        name: "ftvm_api_server_place",
        kind: Kind::Gauge,
        unit: "places",
        labels: &[Label {
            name: "server",
            values: Values::Each("address of the API server, nine at most"),
        }],
        help: "When an address of the API server is asked for records: the one with 0 first",
    },
    Metric {
        name: "ftvm_node_paths",
        kind: Kind::Gauge,
        unit: "paths",
        labels: &[
            Label {
                name: "role",
                values: Values::OneOf(&["management", "replication", "migration", "client"]),
            },
            Label {
                name: "state",
                values: Values::OneOf(&PATH_STATES),
            },
        ],
        help: "Paths of the node's networks by role, where it is configured, and state",
    },
    Metric {
        name: "ftvm_kvm_works",
        kind: Kind::Gauge,
        unit: "1",
        labels: &[],
        help: "1 while the KVM self-test passes",
    },
    Metric {
        name: "ftvm_api_server_synced",
        kind: Kind::Gauge,
        unit: "1",
        labels: &[],
        help: "1 once the API server's objects are known",
    },
    BUILD_INFO,
];
