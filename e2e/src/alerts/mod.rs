//! The chart's alerts, as their file of rules says them.
pub mod expression;

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;

/// The file, from the project's folder.
pub const RULES: &str = "charts/fault-tolerant-vm/files/alerts.yaml";

/// One alert.
#[derive(Debug, Clone)]
pub struct Alert {
    /// Its name.
    pub name: String,
    /// Its label of that name.
    pub severity: String,
    /// When it fires, in PromQL.
    pub expression: String,
    /// What it says of labels.
    pub texts: String,
    /// Place of its page, from the project's folder.
    pub runbook: String,
}

/// All of them, in their order.
///
/// # Errors
/// If there is no such file, or it has no rules.
pub fn read(root: &Path) -> anyhow::Result<Vec<Alert>> {
    let text = fs::read_to_string(root.join(RULES)).with_context(|| format!("reading {RULES}"))?;
    let rules: Value = serde_yaml::from_str(&text).with_context(|| format!("reading {RULES}"))?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let rules = list(&rules["groups"])
        .into_iter()
        .flat_map(|group| list(&group["rules"]));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let found = rules.map(|rule| Alert {
        name: text(&rule["alert"]),
        severity: text(&rule["labels"]["severity"]),
        expression: text(&rule["expr"]),
        texts: ["summary", "description"]
            .map(|key| text(&rule["annotations"][key]))
            .join("\n"),
        runbook: text(&rule["annotations"]["runbook_url"]),
    });
    let found: Vec<Alert> = found.collect();
    ensure!(!found.is_empty(), "{RULES} has no rules");
    Ok(found)
}
