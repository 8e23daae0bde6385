//! What the parts of Kubernetes found. Keys of the JSON are stable: new ones may be added, units come last.
use anyhow::ensure;
use serde::Serialize;

use super::super::process::ProcessMemory;
use super::requests::Requests;

/// One VM, its client, and what happens to its nodes.
#[derive(Clone, Debug, Serialize)]
pub struct ClusterFigures {
    /// From `kubectl apply` until protected, each time, in milliseconds. The first one reads the images for the first time.
    pub protected_ms: Vec<f64>,
    /// The longest.
    pub protected_ms_max: f64,
    /// The active's node dies.
    pub kill_node: FaultFigures,
    /// The active's node is drained.
    pub drain: FaultFigures,
    /// Answers lost, doubled, or given by two, which must be none.
    pub lost_answers: u64,
}

/// Rounds of one fault.
#[derive(Clone, Debug, Serialize)]
pub struct FaultFigures {
    /// What the client waited, each time, in milliseconds.
    pub gap_ms: Vec<f64>,
    /// The longest.
    pub gap_ms_max: f64,
    /// The median.
    pub gap_ms_p50: f64,
    /// From the fault until protected again with the third node, each time, in milliseconds.
    pub reprotect_ms: Vec<f64>,
    /// The longest.
    pub reprotect_ms_max: f64,
}

/// One protected VM to which nothing happens.
#[derive(Clone, Debug, Serialize)]
pub struct OperatorFigures {
    /// Length of the window.
    pub window_s: f64,
    /// Requests in it.
    pub requests: Requests,
    /// Writes of operator and daemons in the window, as a rate.
    pub measured_writes_per_vm_hour: f64,
    /// What comes so seldom that the window need not have it, computed from the periods in `docs/kubernetes.md`; 0 if the window is longer.
    pub periodic_writes_per_vm_hour: f64,
    /// Both.
    pub writes_per_vm_hour: f64,
    /// Writes of the election, as a rate; the same for any number of VMs.
    pub election_writes_per_hour: f64,
    /// Memory of each replica.
    pub replicas: Vec<ProcessMemory>,
    /// The most that one of them has, shared parts counted in part.
    pub pss_bytes_max: u64,
}

/// The operator with many VMs on nodes that do not exist.
#[derive(Clone, Debug, Serialize)]
pub struct FleetFigures {
    /// VMs.
    pub vms: u32,
    /// Nodes.
    pub nodes: u32,
    /// From `kubectl apply` of all until all are protected, in milliseconds; scheduler and controllers included.
    pub protected_ms: f64,
    /// What the operator did for that.
    pub start: Work,
    /// What it did in a window at rest.
    pub rest: Work,
    /// Its writes at rest as a rate, with what comes once an hour.
    pub rest_writes_per_vm_hour: f64,
    /// VMs with a seat on the node that died.
    pub lost_seats: u64,
    /// From its death until the control plane called it not ready, in milliseconds.
    pub not_ready_ms: f64,
    /// From then until all were protected again, in milliseconds.
    pub reprotect_ms: f64,
    /// What the operator did from the death on.
    pub loss: Work,
    /// Its process at rest.
    pub memory: ProcessMemory,
    /// The most that it ever had resident, at the end of the run.
    pub peak_bytes: u64,
}

/// What the operator did in some time.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Work {
    /// How long that was, in milliseconds.
    pub took_ms: f64,
    /// Requests that read.
    pub reads: u64,
    /// Requests that write, events included.
    pub writes: u64,
    /// Its processor time, in milliseconds.
    pub cpu_ms: f64,
    /// Looks at a VM.
    pub reconciles: u64,
    /// Average time of one, its requests included, in milliseconds.
    pub reconcile_ms: Option<f64>,
}

impl Work {
    /// Who is at rest asks for nothing, in a window that had some length.
    ///
    /// # Errors
    /// What was asked for.
    pub fn judge_rest(&self) -> anyhow::Result<()> {
        ensure!(
            self.reads == 0 && self.writes == 0 && self.took_ms > 0.0,
            "an operator at rest asks for nothing: {} reads and {} writes in {:.0} ms",
            self.reads,
            self.writes,
            self.took_ms
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_no_rest() {
        let rest = Work {
            took_ms: 4_000.0,
            // It may look at a VM without a request.
            cpu_ms: 3.0,
            reconciles: 1,
            reconcile_ms: Some(0.1),
            ..Work::default()
        };
        rest.judge_rest().unwrap();
        let fault = |work: Work| work.judge_rest().unwrap_err().to_string();
        assert!(fault(Work { reads: 1, ..rest }).contains("1 reads and 0 writes"));
        assert!(fault(Work { writes: 1, ..rest }).contains("0 reads and 1 writes"));
        assert!(fault(Work { took_ms: 0.0, ..rest }).contains("in 0 ms"));
    }
}
