//! Each alert has a page, and what the pages name exists, as far as files can tell.
use std::collections::BTreeSet;

use ftvm_crds::names;
use ftvm_e2e::cluster::install::NAMESPACE;
use ftvm_engine::driver::FIGURES;

use crate::{Alert, alerts, exported, read, root};

const FOLDER: &str = "docs/runbooks";
/// Where the alerts are listed.
const LIST: &str = "docs/kubernetes.md";
/// What each page says, in this order.
const HEADINGS: [&str; 4] = ["What it means", "What to look at", "What to do", "When it ends"];
/// Of kubectl, as `kubectl --help` has them.
const VERBS: [&str; 9] = [
    "annotate", "delete", "describe", "drain", "edit", "get", "logs", "patch", "rollout",
];
/// Of Kubernetes and the Prometheus operator, as `kubectl api-resources` has them.
const KINDS: [&str; 11] = [
    "daemonset",
    "deployment",
    "endpointslices",
    "events",
    "lease",
    "node",
    "nodes",
    "pod",
    "pods",
    "pvc",
    "servicemonitor",
];

/// What pages may name.
struct World {
    /// The resource's definition.
    definition: String,
    /// The chart's templates.
    chart: String,
    /// Sources of the programs that write conditions.
    sources: String,
    metrics: BTreeSet<String>,
}

impl World {
    fn new() -> World {
        World {
            definition: read("crds/ftvm.dev_faulttolerantvms.yaml"),
            chart: texts("charts/fault-tolerant-vm/templates"),
            sources: texts("operator/src") + &texts("crds/src"),
            metrics: exported::metrics().into_keys().collect(),
        }
    }

    /// Is there a word of this text in quotation marks?
    fn says(&self, word: &str) -> bool {
        self.sources.contains(&format!("\"{word}\""))
    }
}

/// All files below a folder, in one.
fn texts(folder: &str) -> String {
    let entries = std::fs::read_dir(root().join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let texts = entries.map(|entry| {
        let entry = entry.unwrap();
        let path = format!("{folder}/{}", entry.file_name().to_str().unwrap());
        match entry.file_type().unwrap().is_dir() {
            true => texts(&path),
            false => read(&path),
        }
    });
    texts.collect()
}

/// What is wrong with the page of an alert.
fn faults(alert: &Alert, page: &str, world: &World) -> Vec<String> {
    let mut found = Vec::new();
    if page.lines().next() != Some(format!("# {}", alert.name).as_str()) {
        found.push("its title is another one".to_owned());
    }
    let headings: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    if headings != HEADINGS {
        found.push(format!("its headings are {headings:?}"));
    }
    let commands = page.lines().filter(|line| line.starts_with("    "));
    let commands: Vec<&str> = commands.map(str::trim).collect();
    if commands.is_empty() {
        found.push("it has no command".to_owned());
    }
    found.extend(commands.iter().flat_map(|command| command_faults(command, world)));
    let prose = page.lines().filter(|line| !line.starts_with("    "));
    let prose = prose.collect::<Vec<_>>().join("\n");
    found.extend(
        prose
            .split('`')
            .skip(1)
            .step_by(2)
            .flat_map(|word| word_fault(word, world)),
    );
    found.extend(prose.split("](").skip(1).filter_map(link_fault));
    found
}

/// A word in the text.
fn word_fault(word: &str, world: &World) -> Option<String> {
    let metric = word.split('{').next().unwrap_or_default();
    let is_reason = word.starts_with(|c: char| c.is_ascii_uppercase()) && word.chars().all(char::is_alphabetic);
    let unknown = if metric.starts_with("ftvm_") {
        !world.metrics.contains(metric)
    } else if is_reason {
        !world.says(word)
    } else if word.starts_with("spec.") || word.starts_with("status.") {
        !fields(word).all(|field| world.definition.contains(&format!(" {field}:")))
    } else if word.ends_with("_us") || word.contains("_us_") || word.ends_with("_bytes") {
        !FIGURES.iter().any(|figure| figure.name == word)
    } else if word.contains("ftvm.dev/") {
        return name_fault(word);
    } else {
        return None;
    };
    unknown.then(|| format!("there is no {word}"))
}

fn fields(path: &str) -> impl Iterator<Item = &str> {
    path.split('.').filter(|field| !field.is_empty())
}

/// An annotation, a label or a resource, perhaps with a value.
fn name_fault(word: &str) -> Option<String> {
    let name = word.split(['=', ',']).next().unwrap_or_default().trim_end_matches('-');
    let known = [
        names::LABEL_VM,
        names::LABEL_SEAT,
        names::LABEL_ROLE,
        names::ANNOTATION_SEAT_STATUS,
        names::ANNOTATION_NETWORKS,
        names::ANNOTATION_SWITCHOVER,
        names::ANNOTATION_FAILOVER,
        names::ANNOTATION_ACCEPT_DATA_LOSS,
        names::RESOURCE_SEAT,
    ];
    (!known.contains(&name)).then(|| format!("there is no {name}"))
}

/// A link to another page, or to a part of one; `rest` begins with it.
fn link_fault(rest: &str) -> Option<String> {
    let link = rest.split(')').next().unwrap_or_default();
    let (file, part) = link.split_once('#').unwrap_or((link, ""));
    let Ok(page) = std::fs::read_to_string(root().join(FOLDER).join(file)) else {
        return Some(format!("there is no page {file}"));
    };
    let place = |heading: &str| {
        let kept = heading.to_lowercase().replace(' ', "-");
        kept.replace(|c: char| !c.is_alphanumeric() && c != '-', "")
    };
    let headings = page.lines().filter_map(|line| line.strip_prefix('#'));
    let mut headings = headings.filter_map(|line| line.trim_start_matches('#').strip_prefix(' '));
    let there = part.is_empty() || headings.any(|heading| place(heading) == part);
    (!there).then(|| format!("{file} has no part {part}"))
}

/// What a line names that is to be typed in.
fn command_faults(command: &str, world: &World) -> Vec<String> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let mut found = match words[..] {
        ["helm", "history", "ftvm", ..] => Vec::new(),
        ["kubectl", verb, ..] if !VERBS.contains(&verb) => vec![format!("kubectl does not {verb}")],
        ["kubectl", "get", "--raw", ..] | ["kubectl", "logs" | "drain", ..] => Vec::new(),
        ["kubectl", "rollout", "status", object, ..] | ["kubectl", _, object, ..] => object_faults(object, world),
        _ => vec![format!("what is {command:?}")],
    };
    for word in words.iter().filter(|word| **word != NAMESPACE) {
        let name = word.split_once("app.kubernetes.io/name=").map(|(_, name)| name);
        let component = name.and_then(|name| name.strip_prefix("ftvm-"));
        if let Some(component) = component.or(word.strip_prefix("ftvm-")) {
            found.extend(component_fault(component, world));
        }
        if word.starts_with("ftvm.dev/") {
            found.extend(name_fault(word));
        }
        // Of templates for the output: fields of the VM, and names of annotations and resources with their dots escaped.
        if words.contains(&"ftvm") {
            let paths = word.split("{.").skip(1).filter(|path| !path.starts_with("metadata."));
            let paths = paths.filter_map(|path| path.split('}').next());
            let unknown = paths
                .flat_map(fields)
                .filter(|field| !world.definition.contains(&format!(" {field}:")));
            found.extend(unknown.map(|field| format!("a VM has no {field}")));
        }
        if let Some((_, name)) = word.split_once("ftvm\\.dev/") {
            let name = name.split(['\'', '}', ',']).next().unwrap_or_default();
            found.extend(name_fault(&format!("ftvm.dev/{name}")));
        }
        if let Some(reason) = word.strip_prefix("reason=").filter(|reason| !world.says(reason)) {
            found.push(format!("no event has the reason {reason}"));
        }
    }
    found
}

/// Kinds, separated by commas, or one and a name.
fn object_faults(object: &str, world: &World) -> Vec<String> {
    let kinds = object.split('/').next().unwrap_or_default();
    let unknown = kinds.split(',').filter(|kind| {
        let own = world.definition.lines().any(|line| line.trim() == format!("- {kind}"));
        !own && !KINDS.contains(kind)
    });
    let mut found: Vec<String> = unknown.map(|kind| format!("there are no {kind}")).collect();
    let component = object.split_once("/ftvm-").map(|(_, component)| component);
    found.extend(component.and_then(|component| component_fault(component, world)));
    found
}

/// Operator and node-daemon, called as a release `ftvm` of the chart calls them.
fn component_fault(component: &str, world: &World) -> Option<String> {
    let template = format!("{{{{ include \"ftvm.name\" . }}}}-{component}");
    (!world.chart.contains(&template)).then(|| format!("the chart has no {component}"))
}

/// Alerts without a page, pages without an alert, and what is wrong with pages.
fn pages_faults(alerts: &[Alert], world: &World) -> Vec<String> {
    let mut found = Vec::new();
    for alert in alerts {
        let place = format!("{FOLDER}/{}.md", alert.name);
        if alert.runbook != place {
            found.push(format!(
                "{}: its runbook is {:?} and not {place}",
                alert.name, alert.runbook
            ));
        }
        match std::fs::read_to_string(root().join(&place)) {
            Ok(page) => {
                let faults = faults(alert, &page, world);
                found.extend(faults.iter().map(|fault| format!("{place}: {fault}")));
            }
            Err(_) => found.push(format!("{} has no runbook", alert.name)),
        }
    }
    for entry in std::fs::read_dir(root().join(FOLDER)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        if !alerts.iter().any(|alert| alert.name == name) {
            found.push(format!("{name} is no alert"));
        }
    }
    found
}

/// Name and severity of each alert that the documentation lists, if its link leads to the alert's page.
fn listed(page: &str) -> Vec<(String, String)> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| [Ftvm"));
    rows.map(|row| {
        let (name, rest) = row.split_once(']').unwrap_or_default();
        let name = format!("Ftvm{name}");
        let link = format!("(runbooks/{name}.md) | ");
        let severity = rest.strip_prefix(&link).and_then(|rest| rest.split(' ').next());
        (name, severity.unwrap_or("without its page").to_owned())
    })
    .collect()
}

#[test]
fn each_alert_has_a_page_and_pages_name_what_exists() {
    let (alerts, world) = (alerts(), World::new());
    assert_eq!(pages_faults(&alerts, &world), [""; 0]);
    let mut other = alerts;
    other[0].runbook.clear();
    let found = pages_faults(&other, &world);
    assert_eq!(
        found,
        ["FtvmGuestNotRunning: its runbook is \"\" and not docs/runbooks/FtvmGuestNotRunning.md"]
    );
    other[0].name = "FtvmNew".to_owned();
    let found = pages_faults(&other, &world);
    assert!(found.contains(&"FtvmNew has no runbook".to_owned()), "{found:?}");
    assert!(
        found.contains(&"FtvmGuestNotRunning is no alert".to_owned()),
        "{found:?}"
    );
}

#[test]
fn severities_are_those_that_people_sort_by() {
    for Alert {
        name, severity, texts, ..
    } in alerts()
    {
        assert!(
            ["critical", "warning"].contains(&severity.as_str()),
            "{name}: {severity}"
        );
        assert!(texts.lines().all(|text| text.len() > 20), "{name}: {texts}");
    }
}

#[test]
fn the_documentation_lists_the_alerts() {
    let alerts: Vec<_> = alerts().into_iter().map(|alert| (alert.name, alert.severity)).collect();
    let page = read(LIST);
    assert_eq!(listed(&page), alerts);
    for other in [
        page.replace(
            "[FtvmLag](runbooks/FtvmLag.md) | warning",
            "[FtvmLag](runbooks/FtvmLag.md) | critical",
        ),
        page.replace("runbooks/FtvmLag.md", "runbooks/FtvmLog.md"),
        page.replace("| [FtvmLag]", "| FtvmLag"),
    ] {
        assert_ne!(listed(&other), alerts);
    }
}

#[test]
fn what_a_page_names_and_is_not_there_is_found() {
    let (alerts, world) = (alerts(), World::new());
    let alert = &alerts[0];
    let page = |command: &str, text: &str| {
        let [first, second, third, fourth] = HEADINGS;
        format!(
            "# {}\n\n## {first}\n{text}\n\n## {second}\n\n    {command}\n\n## {third}\n\n## {fourth}\n",
            alert.name
        )
    };
    let good = "kubectl get pods --selector app.kubernetes.io/name=ftvm-operator";
    let prose = "`NodeNeeded`, `ftvm_engine{name=\"x\"}`, `ack_us_p99`, `status.lastFailover`, [a](../kubernetes.md#a-lease-that-is-gone)";
    assert_eq!(faults(alert, &page(good, prose), &world), [""; 0]);
    for (command, fault) in [
        ("kubectl mend ftvm VM", "kubectl does not mend"),
        ("kubectl get machines", "there are no machines"),
        (
            "kubectl get pods --selector app.kubernetes.io/name=ftvm-manager",
            "the chart has no manager",
        ),
        (
            "kubectl rollout status deployment/ftvm-manager",
            "the chart has no manager",
        ),
        (
            "kubectl annotate ftvm VM ftvm.dev/switch=x",
            "there is no ftvm.dev/switch",
        ),
        (
            "kubectl get ftvm VM --output jsonpath='{.status.failovers}'",
            "a VM has no failovers",
        ),
        (
            "kubectl get nodes --output custom-columns='S:.status.allocatable.ftvm\\.dev/seats'",
            "there is no ftvm.dev/seats",
        ),
        (
            "kubectl get events --field-selector reason=Vanished",
            "no event has the reason Vanished",
        ),
        ("reboot", "what is \"reboot\""),
    ] {
        assert_eq!(faults(alert, &page(command, prose), &world), [fault], "{command}");
    }
    for (text, fault) in [
        ("`NodeWanted`", "there is no NodeWanted"),
        ("`ftvm_engines`", "there is no ftvm_engines"),
        ("`ack_us_p98`", "there is no ack_us_p98"),
        ("`status.failovers`", "there is no status.failovers"),
        ("`ftvm.dev/switch`", "there is no ftvm.dev/switch"),
        ("[a](../kuber.md)", "there is no page ../kuber.md"),
        ("[a](../kubernetes.md#nothing)", "../kubernetes.md has no part nothing"),
    ] {
        assert_eq!(faults(alert, &page(good, text), &world), [fault], "{text}");
    }
    let untitled = page(good, prose)
        .replace("## When it ends", "## Whatever")
        .replace("# Ftvm", "# Vm");
    assert_eq!(faults(alert, &untitled, &world).len(), 2);
}
