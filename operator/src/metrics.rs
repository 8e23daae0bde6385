//! Prometheus metrics.

mod each;

use std::collections::BTreeMap;

pub use each::{Each, Vm};
use prometheus::core::Collector;
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
            each: Each::new()?,
            leader: IntGauge::new("ftvm_operator_leader", "1 while this replica is the leader")?,
            build: IntGaugeVec::new(
                Opts::new("ftvm_build_info", "1, with the program and its version"),
                &["component", "version"],
            )?,
            registry,
        };
        for family in metrics.families() {
            metrics.registry.register(family)?;
        }
        let version = ["operator", env!("CARGO_PKG_VERSION")];
        metrics.build.with_label_values(&version).set(1);
        Ok(metrics)
    }

    fn families(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.reconciles.clone()),
            Box::new(self.failures.clone()),
            Box::new(self.seconds.clone()),
            Box::new(self.requests.clone()),
            Box::new(self.vms.clone()),
            Box::new(self.unprotected.clone()),
            Box::new(self.unreadable.clone()),
            Box::new(self.each.clone()),
            Box::new(self.leader.clone()),
            Box::new(self.build.clone()),
        ]
    }

    /// Name and labels of each metric, for whoever writes rules about them.
    pub fn described(&self) -> BTreeMap<String, Vec<String>> {
        let families = self.families();
        let described = families.iter().flat_map(|family| family.desc());
        described
            .map(|desc| (desc.fq_name.clone(), desc.variable_labels.clone()))
            .collect()
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

    /// All are in docs/kubernetes.md, and nothing else.
    #[test]
    fn names_and_documentation_agree() {
        let page = include_str!("../../docs/kubernetes.md");
        let listed = page
            .lines()
            .find(|line| line.starts_with("- Metrics of the operator: "))
            .unwrap();
        let words = listed.split('`').skip(1).step_by(2);
        let documented: BTreeMap<String, Vec<String>> = words
            .map(|word| {
                let (name, labels) = word.trim_end_matches('}').split_once('{').unwrap_or((word, ""));
                let labels = labels.split(',').filter(|label| !label.is_empty());
                (name.to_owned(), labels.map(str::to_owned).collect())
            })
            .collect();
        assert_eq!(Metrics::new().unwrap().described(), documented);
    }
}
