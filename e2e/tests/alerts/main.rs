//! The chart's alerts: they fire where they should, use nothing that the programs don't tell, and each has a page that says what to do.
//!
//! Rules are in one file of the chart. `promtool` plays them on made-up series; what it can't know, whether programs tell such series at all, is
//! asked of the lists that they make their metrics of. Each judge has its negative control.
mod exported;
mod expressions;
mod pages;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use ftvm_e2e::alerts::{Alert, RULES, expression};
use serde_json::Value;

const CASES: &str = "e2e/tests/alerts/cases.yaml";

/// The project's folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn yaml(text: &str) -> Value {
    serde_yaml::from_str(text).unwrap()
}

fn alerts() -> Vec<Alert> {
    let found = ftvm_e2e::alerts::read(&root()).unwrap();
    assert!(found.len() >= 18, "{found:?}");
    found
}

/// Whether it was content, and what it said.
fn promtool(arguments: &[&str], folder: &Path) -> (bool, String) {
    let output = Command::new("promtool").args(arguments).current_dir(folder).output();
    let output = output
        .expect("promtool can't be started: it is in the Debian package prometheus, which `cargo xtask test` installs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn each_alert_fires_and_is_silent_where_it_should() {
    for command in [["check", "rules", RULES], ["test", "rules", CASES]] {
        let (content, said) = promtool(&command, &root());
        assert!(content && said.contains("SUCCESS"), "{command:?}: {said}");
    }
}

/// As if all metrics were called otherwise now: each alert is noticed, also those that fire where something is missing.
#[test]
fn promtool_notices_metrics_that_are_called_otherwise() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("alerts-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let renamed = read(RULES).replace("(ftvm_", "(other_").replace(" ftvm_", " other_");
    let cases = yaml(&read(CASES));
    let place = cases["rule_files"][0].as_str().unwrap();
    std::fs::write(folder.join("alerts.yaml"), renamed).unwrap();
    std::fs::write(folder.join("cases.yaml"), read(CASES).replace(place, "alerts.yaml")).unwrap();
    let (content, said) = promtool(&["test", "rules", "cases.yaml"], &folder);
    assert!(!content, "{said}");
    for Alert { name, .. } in alerts() {
        assert!(said.contains(&format!("alertname: {name},")), "{name}: {said}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Alerts without a case in which they fire, or one in which they don't although all that they ask for is there.
fn without_cases(alerts: &[Alert], cases: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for alert in alerts {
        let groups = cases["tests"].as_array().unwrap();
        let Some(group) = groups.iter().find(|group| group["name"] == alert.name.as_str()) else {
            found.push(format!("{} has no cases", alert.name));
            continue;
        };
        let tests = group["alert_rule_test"].as_array().unwrap().iter();
        let own = tests.filter(|test| test["alertname"] == alert.name.as_str());
        let fires: BTreeSet<bool> = own.map(|test| test["exp_alerts"] != Value::Array(Vec::new())).collect();
        if fires.len() != 2 {
            found.push(format!("{} does not both fire and not fire", alert.name));
        }
        let series = group["input_series"].as_array().unwrap().iter();
        let names: BTreeSet<&str> = series
            .filter_map(|series| series["series"].as_str()?.split('{').next())
            .collect();
        for used in expression::uses(&alert.expression) {
            if !names.contains(used.metric.as_str()) {
                found.push(format!("{}: no case has {}", alert.name, used.metric));
            }
        }
    }
    found
}

#[test]
fn no_alert_is_without_its_cases() {
    let (alerts, cases) = (alerts(), yaml(&read(CASES)));
    assert_eq!(without_cases(&alerts, &cases), [""; 0]);
    let mut one_more = alerts.clone();
    one_more[0].name = "FtvmNew".to_owned();
    assert_eq!(without_cases(&one_more, &cases), ["FtvmNew has no cases"]);
    let mut without_silence = cases.clone();
    without_silence["tests"][0]["alert_rule_test"]
        .as_array_mut()
        .unwrap()
        .remove(0);
    let found = without_cases(&alerts, &without_silence);
    assert_eq!(found, [format!("{} does not both fire and not fire", alerts[0].name)]);
    let mut without_series = cases;
    without_series["tests"][0]["input_series"] = Value::Array(Vec::new());
    let found = without_cases(&alerts, &without_series);
    assert!(
        !found.is_empty() && found.iter().all(|text| text.contains("no case has")),
        "{found:?}"
    );
}
