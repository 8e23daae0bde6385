//! What an expression of PromQL uses. Of the language no more is known than the rules need: what is not known is a complaint or a panic.
use std::collections::BTreeSet;

/// Words that stand before a list of labels.
const BEFORE_LABELS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// Words that are neither.
const OPERATORS: [&str; 5] = ["and", "or", "unless", "bool", "offset"];

/// A metric, and what is asked of its labels: name and values.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    /// The metric.
    pub metric: String,
    /// Each with the values that are allowed.
    pub labels: Vec<(String, Vec<String>)>,
    /// By which it is grouped or matched.
    pub grouped: BTreeSet<String>,
}

/// All that is selected.
#[must_use]
pub fn uses(expression: &str) -> Vec<Used> {
    parts(expression).0
}

/// What is selected, and the labels by which it is grouped or matched.
///
/// # Panics
/// Where the expression is none that is known.
#[must_use]
pub fn parts(expression: &str) -> (Vec<Used>, BTreeSet<String>) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
