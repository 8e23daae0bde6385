//! What is told of each VM by its name.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ftvm_crds::FaultTolerantVM;
use ftvm_crds::metrics::{Families, Metric};
use kube::ResourceExt;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{self, Gauge, MetricFamily};

use crate::status::CONDITIONS;

/// One VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    namespace: String,
    name: String,
    /// In one word, in small letters.
    phase: String,
    lacks_protection: bool,
    /// Those that are True or False.
    conditions: Vec<(&'static str, bool)>,
    /// In seconds since 1970; 0: never.
    last_failover: i64,
    last_gap: Option<Duration>,
    target_latency_ms: Option<u32>,
}

impl Vm {
    /// What its spec and status say, beside these two.
    pub fn of(vm: &FaultTolerantVM, phase: String, lacks_protection: bool) -> Vm {
        let status = vm.status.as_ref();
        let condition = |kind: &'static str| {
            let told = status?.condition(kind)?;
            match told.status.as_str() {
                "True" => Some((kind, true)),
                "False" => Some((kind, false)),
                _ => None,
            }
        };
        let failover = status.and_then(|status| status.last_failover.as_ref());
        Vm {
            namespace: vm.namespace().unwrap_or_default(),
            name: vm.name_any(),
            phase,
            lacks_protection,
            conditions: CONDITIONS.into_iter().filter_map(condition).collect(),
            last_failover: failover.map_or(0, |failover| failover.time.0.as_second()),
            last_gap: failover.map(|failover| Duration::from_micros(failover.gap_microseconds)),
            target_latency_ms: vm.spec.fault_tolerance.target_latency_ms,
        }
    }

    fn phases(&self) -> Vec<(&str, f64)> {
        vec![(self.phase.as_str(), 1.0)]
    }

    fn unprotected(&self) -> Vec<(&str, f64)> {
        vec![("", f64::from(u8::from(self.lacks_protection)))]
    }

    fn told_conditions(&self) -> Vec<(&str, f64)> {
        let conditions = self.conditions.iter();
        conditions
            .map(|(kind, holds)| (*kind, f64::from(u8::from(*holds))))
            .collect()
    }

    fn failovers(&self) -> Vec<(&str, f64)> {
        // Exact for 200 million years.
        vec![("", self.last_failover as f64)]
    }

    fn gaps(&self) -> Vec<(&str, f64)> {
        let gap = self.last_gap.into_iter();
        gap.map(|gap| ("", gap.as_secs_f64())).collect()
    }

    fn targets(&self) -> Vec<(&str, f64)> {
        let target = self.target_latency_ms.into_iter();
        target.map(|target_ms| ("", f64::from(target_ms))).collect()
    }
}

/// The value of a metric's label beside namespace and name, if it has one, and what is told, of one VM.
type Tell = fn(&Vm) -> Vec<(&str, f64)>;

const MEASURES: [(&str, Tell); 6] = [
    ("ftvm_vm_phase", Vm::phases),
    ("ftvm_vm_unprotected", Vm::unprotected),
    ("ftvm_vm_condition", Vm::told_conditions),
    ("ftvm_vm_last_failover_timestamp_seconds", Vm::failovers),
    ("ftvm_vm_last_failover_gap_seconds", Vm::gaps),
    ("ftvm_vm_target_latency_ms", Vm::targets),
];

/// One of them.
struct Measure {
    metric: &'static Metric,
    desc: Desc,
    tell: Tell,
}

/// All VMs. They are replaced together: nothing of one that is gone stays, and no scrape misses one that is there.
#[derive(Clone)]
pub struct Each {
    measures: Arc<Vec<Measure>>,
    vms: Arc<Mutex<Vec<Vm>>>,
}

impl Each {
    /// None.
    ///
    /// # Errors
    /// If the list says something else.
    pub fn new(families: &mut Families) -> prometheus::Result<Each> {
        let measures = MEASURES.into_iter().map(|(name, tell)| {
            let metric = families.listed(name)?;
            let desc = metric.described()?;
            Ok(Measure { metric, desc, tell })
        });
        let measures: Vec<Measure> = measures.collect::<prometheus::Result<_>>()?;
        families.add(Each {
            measures: Arc::new(measures),
            vms: Arc::default(),
        })
    }

    /// These are all.
    pub fn set(&self, vms: Vec<Vm>) {
        *self.lock() = vms;
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vm>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Each {
    fn desc(&self) -> Vec<&Desc> {
        self.measures.iter().map(|measure| &measure.desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let vms = self.lock();
        let families = self.measures.iter().map(|Measure { metric, tell, .. }| {
            let samples = vms.iter().flat_map(|vm| {
                let told = tell(vm).into_iter();
                told.map(move |(label, value)| sample(metric, vm, label, value))
            });
            metric.family(samples.collect())
        });
        families.collect()
    }
}

fn sample(metric: &Metric, vm: &Vm, label: &str, value: f64) -> proto::Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut sample = proto::Metric::from_gauge(gauge);
    sample.set_label(metric.labelled(&[&vm.namespace, &vm.name, label]));
    sample
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;
    use serde_json::json;

    use super::*;
    use crate::metrics::Metrics;

    fn vm(namespace: &str, name: &str) -> FaultTolerantVM {
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": "R", "message": "", "lastTransitionTime": "2026-11-28T00:00:00Z"});
        let vm = json!({
            "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "machine": {"memory": "64Mi"}, "boot": {"image": {"reference": "web:1"}},
                "disks": [{"name": "root", "size": "64Mi"}], "faultTolerance": {"targetLatencyMs": 20},
            },
            "status": {
                "conditions": [
                    condition("Protected", "False"), condition("StorageHealthy", "True"), condition("ArbiterReachable", "Unknown"),
                    condition("Foreign", "True"),
                ],
                "lastFailover": {
                    "time": "1970-01-01T00:01:40Z", "reason": "lost", "seat": "web-a", "gapMicroseconds": 410_000,
                },
            },
        });
        serde_json::from_value(vm).unwrap()
    }

    fn text(each: &Each) -> String {
        let told = each.collect().into_iter();
        let told: Vec<MetricFamily> = told.filter(|family| !family.get_metric().is_empty()).collect();
        TextEncoder::new().encode_to_string(&told).unwrap()
    }

    #[test]
    fn each_vm_is_told_by_its_name_and_goes_without_a_trace() {
        let each = Metrics::new().unwrap().each;
        assert_eq!(text(&each), "");
        each.set(vec![Vm::of(&vm("shop", "web"), "running".to_owned(), true)]);
        let told = text(&each);
        let samples: Vec<&str> = told.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            samples,
            [
                r#"ftvm_vm_phase{namespace="shop",vm="web",phase="running"} 1"#,
                r#"ftvm_vm_unprotected{namespace="shop",vm="web"} 1"#,
                r#"ftvm_vm_condition{namespace="shop",vm="web",condition="Protected"} 0"#,
                r#"ftvm_vm_condition{namespace="shop",vm="web",condition="StorageHealthy"} 1"#,
                r#"ftvm_vm_last_failover_timestamp_seconds{namespace="shop",vm="web"} 100"#,
                r#"ftvm_vm_last_failover_gap_seconds{namespace="shop",vm="web"} 0.41"#,
                r#"ftvm_vm_target_latency_ms{namespace="shop",vm="web"} 20"#,
            ]
        );
        // Names that are the same one after the other are two VMs.
        let two = [("shop", "web"), ("sho", "pweb")];
        each.set(
            two.map(|(space, name)| Vm::of(&vm(space, name), "running".to_owned(), false))
                .to_vec(),
        );
        assert_eq!(text(&each).matches("\nftvm_vm_unprotected{").count(), 2);
        let mut plain = vm("shop", "web");
        (plain.status, plain.spec.fault_tolerance.target_latency_ms) = (None, None);
        each.set(vec![Vm::of(&plain, "starting".to_owned(), false)]);
        let told = text(&each);
        let never = r#"ftvm_vm_last_failover_timestamp_seconds{namespace="shop",vm="web"} 0"#;
        assert!(told.lines().any(|line| line == never), "{told}");
        assert!(
            !told.contains("target_latency") && !told.contains("condition{") && !told.contains("_gap_"),
            "{told}"
        );
        each.set(Vec::new());
        assert_eq!(text(&each), "");
    }
}
