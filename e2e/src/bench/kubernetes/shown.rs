//! The parts of Kubernetes as goals and tables.
use super::super::goals::{Bound, Verdict};
use super::super::report::Report;
use super::super::tables::{Table, optional, thousands};
use super::figures::{ClusterFigures, FleetFigures, OperatorFigures, Work};

const MIB: f64 = (1u64 << 20) as f64;

/// Goals of the parts that were measured; their names begin with the part's.
pub fn verdicts(report: &Report) -> Vec<Verdict> {
    let at_most = |name, what: &str, goal: f64, unit, figure: f64| {
        Verdict::new(name, what, (Bound::AtMost, goal, unit), Some(figure))
    };
    let mut all = Vec::new();
    if let Some(cluster) = &report.cluster {
        let ready_s = cluster.protected_ms_max / 1e3;
        let again_s = cluster.kill_node.reprotect_ms_max.max(cluster.drain.reprotect_ms_max) / 1e3;
        all.extend([
            at_most(
                "cluster_protected_s",
                "from kubectl apply to protected, longest",
                15.0,
                "s",
                ready_s,
            ),
            at_most(
                "cluster_gap_ms_kill_node",
                "gap on a killed node, longest",
                500.0,
                "ms",
                cluster.kill_node.gap_ms_max,
            ),
            at_most(
                "cluster_gap_ms_drain",
                "gap on a drain, longest",
                20.0,
                "ms",
                cluster.drain.gap_ms_max,
            ),
            at_most(
                "cluster_reprotect_s",
                "protected again on the third node, longest",
                30.0,
                "s",
                again_s,
            ),
        ]);
    }
    if let Some(operator) = &report.operator {
        let writes = operator.writes_per_vm_hour;
        all.push(at_most(
            "operator_writes_per_vm_hour",
            "API writes per VM and hour at rest",
            10.0,
            "",
            writes,
        ));
    }
    if let Some(fleet) = &report.fleet {
        let writes = fleet.rest_writes_per_vm_hour;
        let what = "the operator's API writes per VM and hour at rest, many VMs";
        all.push(at_most("fleet_writes_per_vm_hour", what, 10.0, "", writes));
    }
    all
}

/// Tables of the parts that were measured.
pub(in super::super) fn tables(report: &Report) -> Vec<Table> {
    let mut all = Vec::new();
    all.extend(report.cluster.as_ref().map(cluster));
    if let Some(figures) = &report.operator {
        all.push(rest(figures));
        all.push(written(figures));
    }
    if let Some(figures) = &report.fleet {
        all.push(fleet(figures));
        all.push(work(figures));
    }
    all
}

fn cluster(figures: &ClusterFigures) -> Table {
    let head = [
        "",
        "rounds",
        "gap p50 ms",
        "gap longest ms",
        "protected after s, each round",
    ];
    let mut table = Table::new("A VM on a cluster", &head);
    let seconds = |times: &[f64]| {
        let each: Vec<String> = times.iter().map(|ms| format!("{:.1}", ms / 1e3)).collect();
        each.join(" ")
    };
    let times = &figures.protected_ms;
    table.row([
        "applied".to_owned(),
        times.len().to_string(),
        optional(None),
        optional(None),
        seconds(times),
    ]);
    for (name, fault) in [("node killed", &figures.kill_node), ("node drained", &figures.drain)] {
        table.row([
            name.to_owned(),
            fault.gap_ms.len().to_string(),
            format!("{:.1}", fault.gap_ms_p50),
            format!("{:.1}", fault.gap_ms_max),
            seconds(&fault.reprotect_ms),
        ]);
    }
    table
}

fn rest(figures: &OperatorFigures) -> Table {
    let title = "Operator and daemons with one VM at rest";
    let mut table = Table::new(title, &["", ""]);
    let replica = |index: usize| figures.replicas.get(index).map(|memory| mib(memory.pss_bytes));
    let rows = [
        ("window, s", format!("{:.0}", figures.window_s)),
        (
            "writes of the operator in it",
            figures.requests.operator_writes.to_string(),
        ),
        ("writes of daemons in it", figures.requests.daemon_writes.to_string()),
        (
            "as a rate, per VM and hour",
            format!("{:.1}", figures.measured_writes_per_vm_hour),
        ),
        (
            "what comes more seldom, computed",
            format!("{:.1}", figures.periodic_writes_per_vm_hour),
        ),
        (
            "reads of the operator in the window",
            figures.requests.operator_reads.to_string(),
        ),
        (
            "writes of its election, per hour",
            thousands(figures.election_writes_per_hour),
        ),
        (
            "writes of kubelets in the window",
            figures.requests.kubelet_writes.to_string(),
        ),
        (
            "writes of everybody else in the window",
            figures.requests.other_writes.to_string(),
        ),
        ("memory of a replica, MiB", optional(replica(0))),
        ("memory of the other one, MiB", optional(replica(1))),
    ];
    rows.into_iter()
        .for_each(|(name, value)| table.row([name.to_owned(), value]));
    table
}

fn written(figures: &OperatorFigures) -> Table {
    let mut table = Table::new("What they wrote in the window", &["", "times"]);
    let written = figures.requests.written.iter();
    written.for_each(|(what, times)| table.row([what.clone(), times.to_string()]));
    table
}

fn fleet(figures: &FleetFigures) -> Table {
    let mut table = Table::new("The operator with many VMs on hollow nodes", &["", ""]);
    let seconds = |ms: f64| format!("{:.1}", ms / 1e3);
    let rows = [
        ("VMs", figures.vms.to_string()),
        ("nodes", figures.nodes.to_string()),
        ("all protected after, s", seconds(figures.protected_ms)),
        ("memory at rest, MiB", mib(figures.memory.pss_bytes)),
        ("the most ever resident, MiB", mib(figures.peak_bytes)),
        ("seats on the node that died", figures.lost_seats.to_string()),
        ("called not ready after, s", seconds(figures.not_ready_ms)),
        ("all protected again after that, s", seconds(figures.reprotect_ms)),
    ];
    rows.into_iter()
        .for_each(|(name, value)| table.row([name.to_owned(), value]));
    table
}

fn work(figures: &FleetFigures) -> Table {
    let head = ["", "s", "reads", "writes", "processor s", "looks at a VM", "ms each"];
    let mut table = Table::new("What the operator did for them", &head);
    let mut row = |name: &str, work: &Work| {
        table.row([
            name.to_owned(),
            format!("{:.1}", work.took_ms / 1e3),
            thousands(work.reads as f64),
            thousands(work.writes as f64),
            format!("{:.2}", work.cpu_ms / 1e3),
            thousands(work.reconciles as f64),
            optional(work.reconcile_ms.map(|ms| format!("{ms:.1}"))),
        ]);
    };
    row("until all were protected", &figures.start);
    row("at rest", &figures.rest);
    row("from the node's death until protected again", &figures.loss);
    table
}

fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / MIB)
}
