//! What is told of each VM by its name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ftvm_crds::FaultTolerantVM;
use kube::ResourceExt;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Gauge, LabelPair, Metric, MetricFamily, MetricType};

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

    fn targets(&self) -> Vec<(&str, f64)> {
        let target = self.target_latency_ms.into_iter();
        target.map(|target_ms| ("", f64::from(target_ms))).collect()
    }
}

/// One metric.
struct Measure {
    name: &'static str,
    help: &'static str,
    /// A label beside namespace and name.
    label: Option<&'static str>,
    /// The value of that label, if there is one, and what is told, of one VM.
    tell: fn(&Vm) -> Vec<(&str, f64)>,
}

static MEASURES: [Measure; 5] = [
    Measure {
        name: "ftvm_vm_phase",
        help: "1 for the phase that the VM is in",
        label: Some("phase"),
        tell: Vm::phases,
    },
    Measure {
        name: "ftvm_vm_unprotected",
        help: "1 while the VM's guest runs without protection",
        label: None,
        tell: Vm::unprotected,
    },
    Measure {
        name: "ftvm_vm_condition",
        help: "1 for a condition of the VM that is True, 0 for one that is False",
        label: Some("condition"),
        tell: Vm::told_conditions,
    },
    Measure {
        name: "ftvm_vm_last_failover_timestamp_seconds",
        help: "When the standby took over last, in seconds since 1970; 0: never",
        label: None,
        tell: Vm::failovers,
    },
    Measure {
        name: "ftvm_vm_target_latency_ms",
        help: "For how long output may wait for its release, in milliseconds, where the VM's spec says it",
        label: None,
        tell: Vm::targets,
    },
];

/// All VMs. They are replaced together: nothing of one that is gone stays, and no scrape misses one that is there.
#[derive(Clone)]
pub struct Each {
    described: Arc<Vec<Desc>>,
    vms: Arc<Mutex<Vec<Vm>>>,
}

impl Each {
    /// None.
    ///
    /// # Errors
    /// If a name is none.
    pub fn new() -> prometheus::Result<Each> {
        let described = MEASURES.iter().map(|measure| {
            let labels = ["namespace", "vm"].into_iter().chain(measure.label);
            Desc::new(
                measure.name.to_owned(),
                measure.help.to_owned(),
                labels.map(str::to_owned).collect(),
                HashMap::new(),
            )
        });
        Ok(Each {
            described: Arc::new(described.collect::<prometheus::Result<_>>()?),
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
        self.described.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let vms = self.lock();
        let families = MEASURES.iter().map(|measure| {
            let samples = vms.iter().flat_map(|vm| {
                let told = (measure.tell)(vm).into_iter();
                told.map(move |(label, value)| sample(measure, vm, label, value))
            });
            let mut family = MetricFamily::default();
            family.set_name(measure.name.to_owned());
            family.set_help(measure.help.to_owned());
            family.set_field_type(MetricType::GAUGE);
            family.set_metric(samples.collect());
            family
        });
        families.collect()
    }
}

fn sample(measure: &Measure, vm: &Vm, label: &str, value: f64) -> Metric {
    let own = measure.label.map(|name| (name, label));
    let labels = [("namespace", vm.namespace.as_str()), ("vm", vm.name.as_str())];
    let pairs = labels.into_iter().chain(own).map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value.to_owned());
        pair
    });
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_gauge(gauge);
    metric.set_label(pairs.collect());
    metric
}

#[cfg(test)]
mod tests {
    use prometheus::{Registry, TextEncoder};
    use serde_json::json;

    use super::*;

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
                    "time": "1970-01-01T00:01:40Z", "reason": "lost", "seat": "web-a", "gapMicroseconds": 1,
                },
            },
        });
        serde_json::from_value(vm).unwrap()
    }

    fn text(each: &Each) -> String {
        let registry = Registry::new();
        registry.register(Box::new(each.clone())).unwrap();
        TextEncoder::new().encode_to_string(&registry.gather()).unwrap()
    }

    #[test]
    fn each_vm_is_told_by_its_name_and_goes_without_a_trace() {
        let each = Each::new().unwrap();
        assert_eq!(text(&each), "");
        each.set(vec![Vm::of(&vm("shop", "web"), "running".to_owned(), true)]);
        let told = text(&each);
        let samples: Vec<&str> = told.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            samples,
            [
                r#"ftvm_vm_condition{namespace="shop",vm="web",condition="Protected"} 0"#,
                r#"ftvm_vm_condition{namespace="shop",vm="web",condition="StorageHealthy"} 1"#,
                r#"ftvm_vm_last_failover_timestamp_seconds{namespace="shop",vm="web"} 100"#,
                r#"ftvm_vm_phase{namespace="shop",vm="web",phase="running"} 1"#,
                r#"ftvm_vm_target_latency_ms{namespace="shop",vm="web"} 20"#,
                r#"ftvm_vm_unprotected{namespace="shop",vm="web"} 1"#,
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
            !told.contains("target_latency") && !told.contains("condition{"),
            "{told}"
        );
        each.set(Vec::new());
        assert_eq!(text(&each), "");
    }
}
