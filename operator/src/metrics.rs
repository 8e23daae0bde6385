//! Prometheus metrics.

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

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
    /// 1 while this replica is the leader.
    pub leader: IntGauge,
}

impl Metrics {
    /// All at zero.
    ///
    /// # Errors
    /// If a name is used twice.
    pub fn new() -> prometheus::Result<Metrics> {
        let registry = Registry::new();
        let metrics = Metrics {
            reconciles: IntCounter::new("ftvm_operator_reconciles_total", "Reconciles that were begun")?,
            failures: IntCounterVec::new(
                Opts::new(
                    "ftvm_operator_reconcile_failures_total",
                    "Reconciles that failed, by kind of failure",
                ),
                &["kind"],
            )?,
            seconds: Histogram::with_opts(HistogramOpts::new(
                "ftvm_operator_reconcile_seconds",
                "Duration of reconciles",
            ))?,
            requests: IntCounterVec::new(
                Opts::new(
                    "ftvm_operator_api_requests_total",
                    "Requests to the API server without watches, by verb and kind",
                ),
                &["verb", "kind"],
            )?,
            vms: IntGaugeVec::new(Opts::new("ftvm_vms", "Fault-tolerant VMs by phase"), &["phase"])?,
            unprotected: IntGauge::new("ftvm_vms_unprotected", "VMs whose guest runs without protection")?,
            unreadable: IntGauge::new(
                "ftvm_vms_unreadable",
                "VMs that the operator does nothing for, because it can't read them",
            )?,
            leader: IntGauge::new("ftvm_operator_leader", "1 while this replica is the leader")?,
            registry,
        };
        let registry = &metrics.registry;
        registry.register(Box::new(metrics.reconciles.clone()))?;
        registry.register(Box::new(metrics.failures.clone()))?;
        registry.register(Box::new(metrics.seconds.clone()))?;
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.vms.clone()))?;
        registry.register(Box::new(metrics.unprotected.clone()))?;
        registry.register(Box::new(metrics.unreadable.clone()))?;
        registry.register(Box::new(metrics.leader.clone()))?;
        Ok(metrics)
    }

    /// Whoever leads now counts the VMs: two replicas that count them would double every sum.
    pub fn leads_no_longer(&self) {
        self.leader.set(0);
        self.vms.reset();
        self.unprotected.set(0);
        self.unreadable.set(0);
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
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_page_lists_each_metric() {
        let metrics = Metrics::new().unwrap();
        // What has labels is told once there is something to count.
        metrics.failures.with_label_values(&["refused"]).inc();
        metrics.requests.with_label_values(&["get", "Pod"]).inc();
        metrics.vms.with_label_values(&["running"]).set(1);
        let text = metrics.text();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let told: BTreeSet<&str> = types.filter_map(|line| line.split(' ').next()).collect();
        let page = include_str!("../../docs/kubernetes.md");
        let listed = page
            .lines()
            .find(|line| line.starts_with("- Operator metrics: "))
            .unwrap();
        let words = listed.split('`').skip(1).step_by(2);
        let documented: BTreeSet<&str> = words.filter_map(|word| word.split('{').next()).collect();
        assert_eq!(told, documented);
    }

    #[test]
    fn only_the_leader_counts_vms() {
        let metrics = Metrics::new().unwrap();
        let follower = metrics.text();
        metrics.leader.set(1);
        metrics.vms.with_label_values(&["running"]).set(7);
        metrics.unprotected.set(2);
        metrics.unreadable.set(1);
        assert!(metrics.text().contains("ftvm_vms{phase=\"running\"} 7"));
        metrics.leads_no_longer();
        assert_eq!(metrics.text(), follower);
    }
}
