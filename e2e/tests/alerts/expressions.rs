//! What alerts ask for, and whether anybody tells it.
use std::collections::{BTreeMap, BTreeSet};

use ftvm_e2e::alerts::Alert;
use ftvm_e2e::alerts::expression::{Used, parts, uses};

use crate::exported;

/// What Prometheus itself and the chart's monitors add to each series.
const OF_THE_SCRAPE: [&str; 2] = ["instance", "node"];

/// What alerts ask for and nobody tells: metrics, labels, and values of labels.
fn untold(
    alerts: &[Alert],
    metrics: &BTreeMap<String, BTreeSet<String>>,
    values: &BTreeMap<(&str, &str), BTreeSet<String>>,
) -> Vec<String> {
    let mut found = Vec::new();
    for Alert {
        name,
        expression,
        texts,
        ..
    } in alerts
    {
        let (used, grouping) = parts(expression);
        if used.is_empty() {
            found.push(format!("{name} asks for nothing"));
        }
        for Used {
            metric,
            labels,
            grouped,
        } in used
        {
            let Some(known) = metrics.get(&metric) else {
                found.push(format!("{name}: nobody tells {metric}"));
                continue;
            };
            let asked = labels.iter().map(|(label, _)| label).chain(&grouped);
            for label in asked {
                if !known.contains(label) && !OF_THE_SCRAPE.contains(&label.as_str()) {
                    found.push(format!("{name}: {metric} has no label {label}"));
                }
            }
            for (label, asked) in &labels {
                let told = values.get(&(metric.as_str(), label.as_str()));
                for value in asked {
                    if !told.is_some_and(|told| told.contains(value)) {
                        found.push(format!("{name}: {metric} never has {label}={value}"));
                    }
                }
            }
        }
        for label in texts.split("$labels.").skip(1) {
            let label = label
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .next()
                .unwrap_or_default();
            if !grouping.contains(label) {
                found.push(format!("{name} says {label}, and its expression leaves that out"));
            }
        }
    }
    found
}

#[test]
fn alerts_ask_for_what_programs_tell() {
    let (alerts, metrics, values) = (crate::alerts(), exported::metrics(), exported::values());
    assert_eq!(untold(&alerts, &metrics, &values), [""; 0]);
    // Whatever one of the programs calls otherwise is noticed.
    let used: BTreeSet<String> = alerts
        .iter()
        .flat_map(|alert| uses(&alert.expression))
        .map(|used| used.metric)
        .collect();
    assert!(used.len() > 15, "{used:?}");
    for metric in &used {
        let mut renamed = metrics.clone();
        let labels = renamed.remove(metric).unwrap();
        renamed.insert(format!("{metric}_new"), labels);
        let found = untold(&alerts, &renamed, &values);
        let words = format!("nobody tells {metric}");
        assert!(
            !found.is_empty() && found.iter().all(|text| text.ends_with(&words)),
            "{found:?}"
        );
    }
    let mut without_label = metrics.clone();
    without_label.get_mut("ftvm_engine").unwrap().remove("name");
    let found = untold(&alerts, &without_label, &values);
    assert!(
        found.iter().any(|text| text.ends_with("ftvm_engine has no label name")),
        "{found:?}"
    );
    let mut without_group = metrics.clone();
    let progress = without_group.get_mut("ftvm_seat_progress_percent").unwrap();
    progress.remove("seat");
    let found = untold(&alerts, &without_group, &values);
    let words = "FtvmResyncStalled: ftvm_seat_progress_percent has no label seat";
    assert!(found.iter().any(|text| text == words), "{found:?}");
    let mut without_value = values.clone();
    without_value
        .get_mut(&("ftvm_engine", "name"))
        .unwrap()
        .remove("output_waits_us");
    let found = untold(&alerts, &metrics, &without_value);
    assert_eq!(found, ["FtvmOutputStalled: ftvm_engine never has name=output_waits_us"]);
    let mut other_texts = alerts;
    "{{ $labels.pod }}".clone_into(&mut other_texts[0].texts);
    let found = untold(&other_texts, &metrics, &values);
    assert_eq!(
        found,
        ["FtvmGuestNotRunning says pod, and its expression leaves that out"]
    );
}

/// The label `node` is made by the chart's monitors.
#[test]
fn monitors_name_the_node() {
    let monitors = crate::read("charts/fault-tolerant-vm/templates/monitors.yaml");
    assert!(monitors.contains("targetLabel: node"), "{monitors}");
}
