//! What an expression of PromQL uses. Of the language no more is known than the rules need: what is not known is a complaint or a panic.
use std::collections::{BTreeMap, BTreeSet};

use crate::Alert;
use crate::exported;

/// Words that stand before a list of labels.
const BEFORE_LABELS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// Words that are neither.
const OPERATORS: [&str; 5] = ["and", "or", "unless", "bool", "offset"];
/// What Prometheus itself and the chart's monitors add to each series.
const OF_THE_SCRAPE: [&str; 2] = ["instance", "node"];

/// A metric, and what is asked of its labels: name and values.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    /// The metric.
    pub metric: String,
    /// Each with the values that are allowed.
    pub labels: Vec<(String, Vec<String>)>,
    /// By which it is grouped or matched.
    grouped: BTreeSet<String>,
}

/// All that is selected.
pub fn uses(expression: &str) -> Vec<Used> {
    parts(expression).0
}

/// What is selected, and the labels by which it is grouped or matched.
fn parts(expression: &str) -> (Vec<Used>, BTreeSet<String>) {
    let (mut used, mut grouping) = (Vec::<Used>::new(), BTreeSet::new());
    // Of aggregations around what comes next, each with how much is left where it ends.
    let mut around: Vec<(usize, Vec<String>)> = Vec::new();
    // By which what comes next is matched with what came last.
    let mut matched = Vec::new();
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        around.retain(|(end, _)| rest.len() > *end);
        let word: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if word.is_empty() {
            // Ranges and numbers are of no interest; selectors are taken with their metric.
            rest = match first {
                '[' => rest.split_once(']').expect("a range ends").1,
                _ => &rest[first.len_utf8()..],
            };
            continue;
        }
        rest = rest[word.len()..].trim_start();
        if BEFORE_LABELS.contains(&word.as_str()) {
            let (labels, after) = rest
                .strip_prefix('(')
                .and_then(|list| list.split_once(')'))
                .expect("labels");
            let labels: Vec<String> = labels.split(',').map(|label| label.trim().to_owned()).collect();
            grouping.extend(labels.iter().cloned());
            rest = after;
            if word == "by" || word == "without" {
                around.push((rest.len() - parenthesis(rest).len(), labels));
            } else {
                if let Some(last) = used.last_mut() {
                    last.grouped.extend(labels.iter().cloned());
                }
                matched = labels;
            }
        } else if first.is_ascii_digit()
            || OPERATORS.contains(&word.as_str())
            || rest.starts_with('(')
            || is_aggregation(rest)
        {
            // A number, an operator, a function, or an aggregation.
        } else {
            let (selector, after) = match rest.strip_prefix('{') {
                Some(selector) => selector.split_once('}').expect("a selector ends"),
                None => ("", rest),
            };
            used.push(Used {
                metric: word,
                labels: matchers(selector),
                grouped: around
                    .iter()
                    .flat_map(|(_, labels)| labels)
                    .chain(&matched)
                    .cloned()
                    .collect(),
            });
            matched.clear();
            rest = after;
        }
    }
    (used, grouping)
}

/// Up to the end of the first parenthesis.
fn parenthesis(text: &str) -> &str {
    let mut depth = 0;
    for (place, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth == 1 => return &text[..=place],
            ')' => depth -= 1,
            _ => {}
        }
    }
    panic!("a parenthesis ends");
}

/// Does `by (…)` or `without (…)` follow?
fn is_aggregation(rest: &str) -> bool {
    rest.starts_with("by (") || rest.starts_with("without (")
}

fn matchers(selector: &str) -> Vec<(String, Vec<String>)> {
    let matchers = selector.split(',').filter(|matcher| !matcher.trim().is_empty());
    matchers
        .map(|matcher| {
            let (label, value) = matcher.split_once('=').expect("a matcher");
            let value = value.trim_start_matches('~').trim().trim_matches('"');
            (label.trim().to_owned(), value.split('|').map(str::to_owned).collect())
        })
        .collect()
}

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

#[test]
fn expressions_are_taken_apart() {
    let text = r#"
        sum by (a, b) (rate(one{x="1", y=~"2|3"}[10m])) / 1e6 > on (a) max by (a) (two)
        unless on (a, c) changes(max without (d) (three)[1h:1m]) == 0 or absent(four == 1)"#;
    let (used, grouping) = parts(text);
    let metrics: Vec<&str> = used.iter().map(|used| used.metric.as_str()).collect();
    assert_eq!(metrics, ["one", "two", "three", "four"]);
    let labels = [("x", vec!["1"]), ("y", vec!["2", "3"])];
    let labels = labels.map(|(label, values)| {
        (
            label.to_owned(),
            values.into_iter().map(str::to_owned).collect::<Vec<String>>(),
        )
    });
    assert_eq!(used[0].labels, labels);
    assert_eq!(Vec::from_iter(grouping), ["a", "b", "c", "d"]);
    let grouped = used.iter().map(|used| Vec::from_iter(used.grouped.clone()).join(" "));
    assert_eq!(grouped.collect::<Vec<_>>(), ["a b", "a c", "a c d", ""]);
}
