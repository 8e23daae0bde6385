//! Prometheus metrics.

mod each;
mod list;

pub use each::{Each, Vm};
use ftvm_crds::metrics::{BUILD_INFO, Families};
pub use list::{METRICS, PHASES, VERBS};
use prometheus::{Encoder, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder};

/// Everything that is counted.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Reconciles that were begun.
    pub reconciles: IntCounter,
    /// Reconciles that failed, by kind of failure.
    pub failures: IntCounterVec,
    /// Duration of reconciles.
    pub seconds: Histogram,
    /// Requests to the API server, by verb and kind; watches not counted.
    pub requests: IntCounterVec,
    /// VMs by phase.
    pub vms: IntGaugeVec,
    /// VMs whose guest runs without protection.
    pub unprotected: IntGauge,
    /// VMs that this operator can't read.
    pub unreadable: IntGauge,
    /// Each VM by its name.
    pub each: Each,
    /// 1 while this replica is the leader.
    pub leader: IntGauge,
    /// 1, with this program's version.
    build: IntGaugeVec,
}

impl Metrics {
    /// All at zero.
    ///
    /// # Errors
    /// If they are not what the list says.
    pub fn new() -> prometheus::Result<Metrics> {
        let mut families = Families::new(METRICS);
        let told = &mut families;
        let metrics = Metrics {
            reconciles: told.counter("ftvm_operator_reconciles_total")?,
            failures: told.counters("ftvm_operator_reconcile_failures_total")?,
            seconds: told.histogram("ftvm_operator_reconcile_seconds")?,
            requests: told.counters("ftvm_operator_api_requests_total")?,
            vms: told.gauges("ftvm_vms")?,
            unprotected: told.gauge("ftvm_vms_unprotected")?,
            unreadable: told.gauge("ftvm_vms_unreadable")?,
            each: Each::new(told)?,
            leader: told.gauge("ftvm_operator_leader")?,
            build: told.gauges(BUILD_INFO.name)?,
            registry: families.complete()?,
        };
        let version = ["operator", env!("CARGO_PKG_VERSION")];
        metrics.build.with_label_values(&version).set(1);
        Ok(metrics)
    }

    /// Whoever leads now counts the VMs: two replicas that count them would double every sum.
    pub fn leads_no_longer(&self) {
        self.leader.set(0);
        self.vms.reset();
        self.unprotected.set(0);
        self.unreadable.set(0);
        self.each.set(Vec::new());
    }

    /// In Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics can't be encoded");
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::rig::World;

    #[test]
    fn only_the_leader_counts_vms() {
        let metrics = Metrics::new().unwrap();
        let follower = metrics.text();
        metrics.leader.set(1);
        metrics.vms.with_label_values(&["running"]).set(7);
        metrics.unprotected.set(2);
        metrics.unreadable.set(1);
        let vm = World::new(3).vm;
        metrics.each.set(vec![Vm::of(&vm, "running".to_owned(), true)]);
        assert!(metrics.text().contains("ftvm_vm_unprotected{"));
        assert!(metrics.text().contains("ftvm_vms{phase=\"running\"} 7"));
        metrics.leads_no_longer();
        assert_eq!(metrics.text(), follower);
    }
}
