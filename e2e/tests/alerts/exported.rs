//! What the programs tell, from the lists that they make it of.
use std::collections::{BTreeMap, BTreeSet};

use ftvm_crds::metrics::{Kind, Metric, Values};
use ftvm_engine::driver::FIGURES;
use ftvm_node_daemon::kubernetes::METRICS as OF_NODE_DAEMON;
use ftvm_operator::metrics::METRICS as OF_OPERATOR;

fn both() -> impl Iterator<Item = &'static Metric> {
    OF_OPERATOR.iter().chain(OF_NODE_DAEMON)
}

/// Labels of each series of operator and node-daemons.
pub fn metrics() -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for metric in both() {
        let labels: BTreeSet<String> = metric.labels.iter().map(|label| label.name.to_owned()).collect();
        let series: &[&str] = match metric.kind {
            Kind::Counter | Kind::Gauge => &[""],
            Kind::Histogram(_) => &["_bucket", "_sum", "_count"],
        };
        for end in series {
            let mut labels = labels.clone();
            if *end == "_bucket" {
                labels.insert("le".to_owned());
            }
            // What both tell is the same thing.
            let before = all.insert(format!("{}{end}", metric.name), labels.clone());
            assert!(before.is_none_or(|before| before == labels), "{labels:?}");
        }
    }
    all
}

/// Values of those labels that have no others.
pub fn values() -> BTreeMap<(&'static str, &'static str), BTreeSet<String>> {
    let mut all: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    for metric in both() {
        for label in metric.labels {
            let values: Vec<&str> = match label.values {
                Values::OneOf(values) => values.to_vec(),
                Values::Each(_) if metric.name == "ftvm_engine" && label.name == "name" => {
                    FIGURES.iter().map(|figure| figure.name).collect()
                }
                Values::Each(_) => continue,
            };
            let known = all.entry((metric.name, label.name)).or_default();
            known.extend(values.into_iter().map(str::to_owned));
        }
    }
    all
}

/// What is wrong with how a metric is called (Prometheus, "Metric and label naming"), and with what is said of it.
fn faults(metric: &Metric) -> Vec<String> {
    let Metric {
        name,
        kind,
        unit,
        labels,
        help,
    } = metric;
    let mut found = Vec::new();
    if (*kind == Kind::Counter) != name.ends_with("_total") {
        found.push(format!("{name} is a {}", kind.name()));
    }
    let ends = [
        ("seconds", "_seconds"),
        ("milliseconds", "_ms"),
        ("percent", "_percent"),
        ("bytes", "_bytes"),
    ];
    for (named, end) in ends {
        let base = name.strip_suffix("_total").unwrap_or(name);
        if (*unit == named) != base.ends_with(end) {
            found.push(format!("{name} is in {unit}"));
        }
    }
    if !name.starts_with("ftvm_") || help.len() < 10 || help.ends_with('.') || help.contains(['|', '\n']) {
        found.push(format!("{name}: {help:?}"));
    }
    for label in *labels {
        let bounded = match label.values {
            Values::OneOf(values) => BTreeSet::from_iter(values).len() == values.len() && !values.is_empty(),
            Values::Each(what) => !what.is_empty(),
        };
        if !bounded {
            found.push(format!("{name}: its label {} has {:?}", label.name, label.values));
        }
    }
    found
}

#[test]
fn metrics_are_called_as_prometheus_asks_for() {
    let found: Vec<String> = both().flat_map(faults).collect();
    assert_eq!(found, [""; 0]);
    let good = Metric {
        name: "ftvm_new_seconds",
        kind: Kind::Gauge,
        unit: "seconds",
        labels: &[],
        help: "How long it is new",
    };
    assert_eq!(faults(&good), [""; 0]);
    for bad in [
        Metric {
            name: "ftvm_new_total_seconds_total",
            ..good
        },
        Metric {
            kind: Kind::Counter,
            ..good
        },
        Metric {
            unit: "milliseconds",
            ..good
        },
        Metric { help: "New.", ..good },
        Metric {
            name: "new_seconds",
            ..good
        },
    ] {
        assert!(!faults(&bad).is_empty(), "{bad:?}");
    }
}

/// Figures have their units in their names, and say something.
#[test]
fn figures_have_units() {
    for figure in FIGURES {
        let words = ["us", "ms", "bytes", "pages"];
        let named = figure.name.split('_').any(|word| words.contains(&word));
        assert_eq!(named, figure.unit() != "1", "{}", figure.name);
        assert!(figure.help.len() > 10 && !figure.help.contains('|'), "{}", figure.name);
    }
}
