//! What people and monitors are shown of a machine: `kubectl get`, the pods of its seats, their log, its events, the metrics of daemons and operator.
//!
//! All of it follows the machine a little later: each look is repeated until it shows what it should. What is judged are texts and objects, so that
//! each judge has its negative control below.
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::acts::Acts;
use super::{NAMESPACE, VM};
use crate::cluster::install::NAMESPACE as SYSTEM;
use crate::cluster::{Cluster, wait_for};
use crate::demo::rounds::Pair;
use crate::lab::Network;

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);
/// Columns of `kubectl get ftvm`, in their order.
const COLUMNS: [&str; 7] = ["NAME", "STATUS", "PROTECTED", "ACTIVE", "STANDBY", "MODE", "AGE"];
/// What `--output=wide` adds.
const WIDE: [&str; 3] = ["TERM", "INTERVAL", "LAG"];
/// How each line of the embedded guest's console begins (`e2e/guests/embedded/src/serial.rs`).
const CONSOLE: &str = "ftvm-guest: ";
/// What it says there of its journal when it boots (`e2e/guests/embedded/src/journal.rs`).
const JOURNAL: &str = "ftvm-guest: journal: boot ";
/// Ports of metrics: of a daemon, on its node's address, and of an operator, on its pod's.
const DAEMON_PORT: u16 = 7401;
const OPERATOR_PORT: u16 = 8080;
/// What a daemon answers at paths that are there, and at others.
const PROBES: [(&str, u16); 4] = [("/healthz", 200), ("/readyz", 200), ("/", 404), ("/metrics/", 404)];
/// Who asks for nothing for so long is at rest.
const QUIET: Duration = Duration::from_secs(3);

/// Names of the seats' pods, by role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seats {
    /// Runs the guest.
    pub active: String,
    /// Would take over.
    pub standby: String,
}

/// Waits until everything shows this pair: the columns of `kubectl get`, roles and readiness of the pods, metrics of daemons and operator.
///
/// # Errors
/// What is shown instead.
pub fn shows(acts: &Acts<'_>, pair: Pair) -> anyhow::Result<Seats> {
    let cluster = &acts.cluster;
    let (active, standby) = (acts.node(pair.active), acts.node(pair.standby));
    let nodes = (active.as_str(), standby.as_str());
    wait_for("kubectl shows the pair", PATIENCE, || {
        let words = ["get", "ftvm", VM, "--namespace", NAMESPACE];
        judge_row(&cluster.kubectl(&words)?, nodes, None)?;
        let wide = cluster.kubectl(&[&words[..], &["--output=wide"]].concat())?;
        judge_row(&wide, nodes, Some(pair.term))
    })?;
    wait_for("metrics show the active", PATIENCE, || {
        judge_metrics(&daemons_pages(cluster, "/metrics")?, pair.active)
    })?;
    wait_for("the operator's metrics show that it is protected", PATIENCE, || {
        judge_leader(&operators_pages(cluster, stands)?)
    })?;
    wait_for("the seats' pods are ready and called by their roles", PATIENCE, || {
        judge_pods(&pods(cluster)?, nodes)
    })
}

/// The log of the active seat's pod has what the guest said when it booted, that of the standby, which never ran it, has nothing of it.
///
/// # Errors
/// If it is not so.
pub fn console(cluster: &Cluster, seats: &Seats) -> anyhow::Result<()> {
    let log = |pod: &str| cluster.kubectl(&["logs", "--namespace", NAMESPACE, pod]);
    judge_console(seats, &log(&seats.active)?, &log(&seats.standby)?)
}

/// Whether any seat's pod of a machine has something of the guest's console.
///
/// # Errors
/// If the logs can't be read.
pub fn has_spoken(cluster: &Cluster, vm: &str) -> anyhow::Result<bool> {
    let of_vm = format!("--selector=ftvm.dev/vm={vm}");
    let words = ["logs", "--namespace", NAMESPACE, "--tail=-1", "--ignore-errors", &of_vm];
    Ok(has_console(&cluster.kubectl(&words)?))
}

/// Waits until the guest says that it was booted for this time, with so many records in its journal and no error: its disk is the one that it was.
///
/// # Errors
/// What it says instead.
pub fn has_booted(cluster: &Cluster, vm: &str, boot: u64, records: &RangeInclusive<u64>) -> anyhow::Result<()> {
    let active = format!("--selector=ftvm.dev/vm={vm},ftvm.dev/role=active");
    let words = ["logs", "--namespace", NAMESPACE, "--tail=-1", &active];
    wait_for(&format!("the guest of {vm} says what its disk has"), PATIENCE, || {
        judge_journal(&cluster.kubectl(&words)?, boot, records)
    })
}

/// The daemons' probes say that they are well, and there is nothing else to see.
///
/// # Errors
/// What they say.
pub fn probes(cluster: &Cluster) -> anyhow::Result<()> {
    for (path, expected) in PROBES {
        judge_probe(path, expected, &daemons_answers(cluster, path)?)?;
    }
    Ok(())
}

/// Whether KVM passes its test, by node, as the daemons' metrics say.
///
/// # Errors
/// If a daemon does not answer, or does not say it.
pub fn kvm_works(cluster: &Cluster) -> anyhow::Result<Vec<bool>> {
    let pages = daemons_pages(cluster, "/metrics")?;
    let works = pages.iter().map(|page| match samples(page, "ftvm_kvm_works")[..] {
        [(_, works)] => Ok(works == 1),
        ref other => bail!("ftvm_kvm_works: {other:?}"),
    });
    works.collect()
}

/// Addresses of the API server as a host's daemon asks them for records, the first one first; and how many reads of records found one.
///
/// # Errors
/// If the daemon does not answer, or does not say it.
pub fn api_servers(cluster: &Cluster, host: usize) -> anyhow::Result<(Vec<String>, u64)> {
    servers_and_reads(&daemon_page(cluster, host)?)
}

/// How many engines of a seat in a row its storage has ended, as its host's daemon tells.
///
/// # Errors
/// If the daemon does not answer, or does not say it.
pub fn storage_failures(cluster: &Cluster, host: usize, seat: &str) -> anyhow::Result<u64> {
    failures_of(&daemon_page(cluster, host)?, seat)
}

fn failures_of(page: &str, seat: &str) -> anyhow::Result<u64> {
    let mut told = samples(page, "ftvm_seat_storage_failures");
    told.retain(|(labels, _)| labels.contains(&format!("seat=\"{seat}\"")));
    match told[..] {
        [(_, failures)] => Ok(failures),
        _ => bail!("ftvm_seat_storage_failures of seat {seat}: {told:?}"),
    }
}

/// Metrics of a host's daemon.
fn daemon_page(cluster: &Cluster, host: usize) -> anyhow::Result<String> {
    let address = cluster.nodes()[host].plan().address(Network::Management);
    let (status, page) = cluster.http_get(SocketAddr::from((address, DAEMON_PORT)), "/metrics")?;
    ensure!(status == 200, "{status}: {page}");
    Ok(page)
}

fn servers_and_reads(page: &str) -> anyhow::Result<(Vec<String>, u64)> {
    let mut places = samples(page, "ftvm_api_server_place");
    places.sort_by_key(|(_, place)| *place);
    let addresses = places.iter().filter_map(|(labels, _)| labels.split('"').nth(1));
    let requests = samples(page, "ftvm_arbiter_requests_total");
    let found = |labels: &str| labels.contains("\"read\"") && labels.contains("\"found\"");
    let reads = requests.iter().find(|(labels, _)| found(labels));
    let (_, reads) = reads.context("no reads of records")?;
    Ok((addresses.map(str::to_owned).collect(), *reads))
}

/// Messages of a machine's events of one reason, in no order.
///
/// # Errors
/// If they can't be read.
pub fn events(cluster: &Cluster, vm: &str, reason: &str) -> anyhow::Result<Vec<String>> {
    let of_vm = format!("--field-selector=involvedObject.name={vm},reason={reason}");
    messages(&cluster.get(&["events", "--namespace", NAMESPACE, &of_vm])?)
}

/// Waits until an event of this reason tells these words of a machine.
///
/// # Errors
/// What is told instead.
pub fn wait_event(cluster: &Cluster, vm: &str, reason: &str, words: &str) -> anyhow::Result<()> {
    wait_for(&format!("an event tells: {reason}, {words}"), PATIENCE, || {
        judge_events(&events(cluster, vm, reason)?, words)
    })
}

/// Pods of the machine's seats that are ready and stay: what a PodDisruptionBudget counts.
///
/// # Errors
/// If they can't be read.
pub fn standing(cluster: &Cluster) -> anyhow::Result<usize> {
    let pods = pods(cluster)?;
    Ok(pods.iter().filter(|pod| stands(pod)).count())
}

/// Waits until the operator asks the API server for nothing any more.
///
/// # Errors
/// How often it goes on asking.
pub fn operator_rests(cluster: &Cluster) -> anyhow::Result<()> {
    wait_for("the operator rests", PATIENCE, || {
        let before = operators_requests(cluster)?;
        std::thread::sleep(QUIET);
        judge_rest(before, operators_requests(cluster)?)
    })
}

/// Of all replicas since they began; watches and their election are not counted.
fn operators_requests(cluster: &Cluster) -> anyhow::Result<u64> {
    requests_on(&operators_pages(cluster, |_| true)?)
}

/// Metrics of these replicas.
fn operators_pages(cluster: &Cluster, asked: impl Fn(&Value) -> bool) -> anyhow::Result<Vec<String>> {
    let operators = "--selector=app.kubernetes.io/name=ftvm-operator";
    let pods = cluster.get(&["pods", "--namespace", SYSTEM, operators])?;
    let mut pages = Vec::new();
    for pod in pods["items"].as_array().context("no pods")? {
        if !asked(pod) {
            continue;
        }
        let address = pod["status"]["podIP"].as_str().context("no address")?.parse()?;
        let (status, page) = cluster.http_get(SocketAddr::new(address, OPERATOR_PORT), "/metrics")?;
        ensure!(status == 200, "{status}: {page}");
        pages.push(page);
    }
    Ok(pages)
}

/// Sums what all these pages count.
fn requests_on(pages: &[String]) -> anyhow::Result<u64> {
    let requests = pages
        .iter()
        .flat_map(|page| samples(page, "ftvm_operator_api_requests_total"));
    let sum: u64 = requests.map(|(_, count)| count).sum();
    ensure!(sum > 0, "none of them ever asked for anything");
    Ok(sum)
}

/// Requests until two moments, with some time between them.
fn judge_rest(before: u64, after: u64) -> anyhow::Result<()> {
    ensure!(
        after == before,
        "{before} requests until then, {after} until {QUIET:?} later"
    );
    Ok(())
}

fn pods(cluster: &Cluster) -> anyhow::Result<Vec<Value>> {
    let of_vm = format!("--selector=ftvm.dev/vm={VM}");
    let pods = cluster.get(&["pods", "--namespace", NAMESPACE, &of_vm])?;
    Ok(pods["items"].as_array().context("no pods")?.clone())
}

fn daemons_answers(cluster: &Cluster, path: &str) -> anyhow::Result<Vec<(u16, String)>> {
    let nodes = cluster.nodes().iter();
    let addresses = nodes.map(|node| SocketAddr::from((node.plan().address(Network::Management), DAEMON_PORT)));
    addresses.map(|address| cluster.http_get(address, path)).collect()
}

/// By node.
fn daemons_pages(cluster: &Cluster, path: &str) -> anyhow::Result<Vec<String>> {
    let answers = daemons_answers(cluster, path)?.into_iter();
    let pages = answers.map(|(status, page)| {
        ensure!(status == 200, "{status}: {page}");
        Ok(page)
    });
    pages.collect()
}

/// Answers of all daemons at one path, by host.
fn judge_probe(path: &str, expected: u16, answers: &[(u16, String)]) -> anyhow::Result<()> {
    ensure!(!answers.is_empty(), "{path}: no daemon was asked");
    for (host, (status, body)) in answers.iter().enumerate() {
        ensure!(*status == expected, "{path} of host {host}: {status}, {body}");
    }
    Ok(())
}

fn has_console(log: &str) -> bool {
    log.lines().any(|line| line.starts_with(CONSOLE))
}

/// Logs of both seats' pods.
fn judge_console(seats: &Seats, active: &str, standby: &str) -> anyhow::Result<()> {
    ensure!(
        has_console(active),
        "the log of {} lacks the guest's console",
        seats.active
    );
    ensure!(!has_console(standby), "{} has a console without a guest", seats.standby);
    Ok(())
}

/// Of a list of events.
fn messages(list: &Value) -> anyhow::Result<Vec<String>> {
    let items = list["items"].as_array().context("no events")?.iter();
    let message = |event: &Value| event["message"].as_str().unwrap_or_default().to_owned();
    Ok(items.map(message).collect())
}

fn judge_events(told: &[String], words: &str) -> anyhow::Result<()> {
    ensure!(told.iter().any(|told| told.contains(words)), "{told:?}");
    Ok(())
}

/// Names of columns, and what stands in them, of a table with one line below its header. An empty cell is one, too.
fn columns(table: &str) -> anyhow::Result<Vec<(&str, &str)>> {
    let lines: Vec<&str> = table.lines().collect();
    let [mut header, mut row] = lines[..] else {
        bail!("{} lines instead of 2: {table:?}", lines.len());
    };
    let mut columns = Vec::new();
    while !header.is_empty() {
        // A column is as wide as its name with the blanks behind it.
        let name = header.split(' ').next().unwrap_or(header);
        let blanks = header[name.len()..].find(|letter| letter != ' ');
        let width = blanks.map_or(usize::MAX, |blanks| name.len() + blanks);
        let cell;
        (_, header) = header.split_at(width.min(header.len()));
        (cell, row) = row.split_at(width.min(row.len()));
        columns.push((name, cell.trim()));
    }
    Ok(columns)
}

/// `term` is known where the table is the wide one.
fn judge_row(table: &str, (active, standby): (&str, &str), term: Option<u64>) -> anyhow::Result<()> {
    let (names, cells): (Vec<&str>, Vec<&str>) = columns(table)?.into_iter().unzip();
    let wide: &[&str] = if term.is_some() { &WIDE } else { &[] };
    ensure!(names == [&COLUMNS[..], wide].concat(), "the columns are {names:?}");
    ensure!(
        cells[..6] == [VM, "Running", "True", active, standby, "Checkpoint"],
        "the row is {cells:?}"
    );
    ensure!(cells[6].starts_with(|first: char| first.is_ascii_digit()), "{cells:?}");
    if let Some(term) = term {
        let number = |index: usize| cells[COLUMNS.len() + index].parse::<u64>().ok();
        ensure!(number(0) == Some(term), "term {term}: {cells:?}");
        // How long output waited is known once there was some.
        let lag = number(2).is_some() || cells[COLUMNS.len() + 2].is_empty();
        ensure!(number(1).is_some() && lag, "the row is {cells:?}");
    }
    Ok(())
}

fn judge_pods(pods: &[Value], (active, standby): (&str, &str)) -> anyhow::Result<Seats> {
    ensure!(pods.len() == 2, "{} pods", pods.len());
    let named = |node: &str, role: &str| -> anyhow::Result<String> {
        let pod = pods.iter().find(|pod| pod["spec"]["nodeName"] == node);
        let pod = pod.with_context(|| format!("no pod on {node}"))?;
        let label = &pod["metadata"]["labels"]["ftvm.dev/role"];
        ensure!(label == role, "the pod on {node}, which is {role}, is called {label}");
        ensure!(
            is_ready(pod),
            "the pod on {node} is not ready: {}",
            pod["status"]["conditions"]
        );
        let name = pod["metadata"]["name"].as_str();
        Ok(name.context("a pod without a name")?.to_owned())
    };
    Ok(Seats {
        active: named(active, "active")?,
        standby: named(standby, "standby")?,
    })
}

/// The last that a guest's console has of the journal: the guest counts its boots on its disk.
fn judge_journal(log: &str, boot: u64, records: &RangeInclusive<u64>) -> anyhow::Result<()> {
    let said = log.lines().rev().find_map(|line| line.strip_prefix(JOURNAL));
    let said = said.with_context(|| format!("nothing of a journal: {log}"))?;
    let mut numbers = said.split(", ").map(|part| {
        let digits: String = part.chars().filter(char::is_ascii_digit).collect();
        digits.parse::<u64>().with_context(|| said.to_owned())
    });
    let mut next = || numbers.next().with_context(|| said.to_owned())?;
    let (found, has, _, errors) = (next()?, next()?, next()?, next()?);
    ensure!(
        found == boot && records.contains(&has) && errors == 0,
        "boot {boot} with {records:?} records is due: {said}"
    );
    Ok(())
}

/// Ready, and nobody deletes it.
fn stands(pod: &Value) -> bool {
    is_ready(pod) && pod["metadata"]["deletionTimestamp"].is_null()
}

fn is_ready(pod: &Value) -> bool {
    let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// Samples of a metric in Prometheus' text format: labels as they are written, and value.
fn samples<'a>(page: &'a str, name: &str) -> Vec<(&'a str, u64)> {
    let sample = |line: &'a str| {
        let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        let whole = labels.is_empty() || labels.starts_with('{');
        Some((labels, value.parse().ok()?)).filter(|_| whole)
    };
    page.lines().filter_map(sample).collect()
}

/// Pages of all daemons, by host.
fn judge_metrics(pages: &[String], active: usize) -> anyhow::Result<()> {
    let mut said = Vec::new();
    for (host, page) in pages.iter().enumerate() {
        let works = samples(page, "ftvm_kvm_works");
        ensure!(works == [("", 1)], "ftvm_kvm_works of host {host}: {works:?}");
        let words = [
            format!("namespace=\"{NAMESPACE}\""),
            format!("vm=\"{VM}\""),
            "role=\"active\"".to_owned(),
        ];
        for (labels, value) in samples(page, "ftvm_seat_role") {
            if value == 1 && words.iter().all(|word| labels.contains(word.as_str())) {
                said.push(host);
            }
        }
    }
    ensure!(said == [active], "host {active} is active, hosts {said:?} say so");
    Ok(())
}

/// Pages of operators: one of them leads, and tells of the machine that it runs and is protected, which alerts go by.
fn judge_leader(pages: &[String]) -> anyhow::Result<()> {
    let own = [format!("namespace=\"{NAMESPACE}\""), format!("vm=\"{VM}\"")];
    for (metric, word, expected) in [
        ("ftvm_vm_phase", "phase=\"running\"", 1),
        ("ftvm_vm_condition", "condition=\"Protected\"", 1),
        ("ftvm_vm_unprotected", "", 0),
    ] {
        let told = pages.iter().flat_map(|page| samples(page, metric));
        let told = told.filter(|(labels, _)| own.iter().all(|own| labels.contains(own.as_str())));
        let values = told.filter(|(labels, _)| labels.contains(word));
        let values: Vec<u64> = values.map(|(_, value)| value).collect();
        ensure!(values == [expected], "{metric} {word}: {values:?}, not {expected} once");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TABLE: &str = "NAME   STATUS    PROTECTED   ACTIVE   STANDBY   MODE         AGE\n\
                         demo   Running   True        n1       n2        Checkpoint   2m3s\n";

    fn fault<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
        format!("{:#}", result.unwrap_err())
    }

    #[test]
    fn a_row_is_read_by_its_columns() {
        judge_row(TABLE, ("n1", "n2"), None).unwrap();
        // What is not there moves nothing into another column.
        let alone = TABLE.replace("n2", "  ").replace("True ", "False");
        assert_eq!(columns(&alone).unwrap()[3..5], [("ACTIVE", "n1"), ("STANDBY", "")]);
        let wide = TABLE.replace("AGE\n", "AGE    TERM   INTERVAL   LAG\n");
        let wide = wide.replace("2m3s\n", "2m3s   7      20         3\n");
        judge_row(&wide, ("n1", "n2"), Some(7)).unwrap();
        judge_row(&wide.replace("3\n", "\n"), ("n1", "n2"), Some(7)).unwrap();
    }

    #[test]
    fn a_row_that_tells_something_else_is_found() {
        assert!(fault(judge_row(TABLE, ("n2", "n1"), None)).contains("the row is"));
        assert!(fault(judge_row(&TABLE.replace("True ", "False"), ("n1", "n2"), None)).contains("False"));
        assert!(fault(judge_row(&TABLE.replace("MODE", "KIND"), ("n1", "n2"), None)).contains("columns are"));
        assert!(fault(judge_row(TABLE, ("n1", "n2"), Some(7))).contains("columns are"));
        let wide = TABLE.replace("AGE\n", "AGE    TERM   INTERVAL   LAG\n");
        let row = |numbers: &str| wide.replace("2m3s\n", &format!("2m3s   {numbers}\n"));
        assert!(fault(judge_row(&row("8      20         3"), ("n1", "n2"), Some(7))).contains("term"));
        assert!(fault(judge_row(&row("7"), ("n1", "n2"), Some(7))).contains("the row is"));
        assert!(fault(judge_row(&row("7      20         x"), ("n1", "n2"), Some(7))).contains("the row is"));
        assert!(fault(judge_row("No resources found\n", ("n1", "n2"), None)).contains("1 lines"));
    }

    fn pod(name: &str, node: &str, role: &str, ready: &str) -> Value {
        json!({
            "metadata": {"name": name, "labels": {"ftvm.dev/role": role}},
            "spec": {"nodeName": node},
            "status": {"conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": ready}]},
        })
    }

    #[test]
    fn pods_are_known_by_node_role_and_readiness() {
        let judge = |pods: &[Value]| judge_pods(pods, ("n1", "n2"));
        let (first, second) = (pod("a", "n1", "active", "True"), pod("b", "n2", "standby", "True"));
        let seats = judge(&[second.clone(), first.clone()]).unwrap();
        assert_eq!((seats.active.as_str(), seats.standby.as_str()), ("a", "b"));
        assert!(fault(judge(std::slice::from_ref(&first))).contains("1 pods"));
        let swapped = [pod("a", "n1", "standby", "True"), pod("b", "n2", "active", "True")];
        assert!(fault(judge(&swapped)).contains("is called"));
        let unready = [first.clone(), pod("b", "n2", "standby", "False")];
        assert!(fault(judge(&unready)).contains("not ready"));
        assert!(fault(judge(&[first, pod("b", "n3", "standby", "True")])).contains("no pod on n2"));
    }

    #[test]
    fn a_pod_that_goes_or_is_not_ready_does_not_stand() {
        let ready = pod("a", "n1", "active", "True");
        assert!(stands(&ready));
        assert!(!stands(&pod("a", "n1", "active", "False")));
        assert!(!stands(&pod("a", "n1", "active", "Unknown")));
        // A kubelet goes on calling it ready until its containers have ended.
        let mut goes = ready;
        goes["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        assert!(!stands(&goes));
        // Scheduled, and no kubelet has told of it.
        assert!(!stands(
            &json!({"metadata": {"name": "a"}, "status": {"phase": "Pending"}})
        ));
    }

    #[test]
    fn a_daemon_that_is_not_well_or_shows_too_much_is_found() {
        let (well, gone) = ((200, "ok\n".to_owned()), (404, String::new()));
        for (path, expected) in PROBES {
            let (right, wrong) = if expected == 200 {
                (&well, &gone)
            } else {
                (&gone, &well)
            };
            judge_probe(path, expected, &[right.clone(), right.clone()]).unwrap();
            let found = fault(judge_probe(path, expected, &[right.clone(), wrong.clone()]));
            assert!(found.starts_with(&format!("{path} of host 1: ")), "{found}");
        }
        let unready = (503, "no\n".to_owned());
        let found = fault(judge_probe("/readyz", 200, &[unready, well]));
        assert!(found.contains("host 0: 503, no"), "{found}");
        assert!(fault(judge_probe("/readyz", 200, &[])).contains("no daemon"));
    }

    #[test]
    fn a_console_belongs_to_the_active_alone() {
        let seats = Seats {
            active: "demo-a".to_owned(),
            standby: "demo-b".to_owned(),
        };
        // Engines write their own log there, too, which may cite the guest.
        let engine = format!("INFO the guest runs, its console begins with {CONSOLE:?}\n");
        let spoken = format!("{engine}{JOURNAL}1, 0 records, capacity 16000, 0 errors\n");
        judge_console(&seats, &spoken, &engine).unwrap();
        judge_console(&seats, &spoken, "").unwrap();
        let ran = fault(judge_console(&seats, &spoken, &spoken));
        assert_eq!(ran, "demo-b has a console without a guest");
        let silent = fault(judge_console(&seats, &engine, &engine));
        assert_eq!(silent, "the log of demo-a lacks the guest's console");
        let swapped = fault(judge_console(&seats, &engine, &spoken));
        assert!(swapped.contains("demo-a lacks"), "{swapped}");
    }

    #[test]
    fn an_event_that_tells_something_else_is_none() {
        let event = |message: &str| json!({"reason": "ActiveChanged", "message": message, "count": 1});
        let told = messages(&json!({"kind": "List", "items": [event("the guest runs on node n2, before: n1")]}));
        let told = told.unwrap();
        judge_events(&told, "on node n2, before: n1").unwrap();
        assert!(fault(judge_events(&told, "on node n1, before: n2")).contains("n2, before: n1"));
        let none = messages(&json!({"kind": "List", "items": []})).unwrap();
        assert_eq!(fault(judge_events(&none, "the guest runs")), "[]");
        // Without a message it tells nothing, and an answer that is no list is not an empty one.
        assert_eq!(messages(&json!({"items": [{"reason": "x"}]})).unwrap(), [""]);
        assert!(fault(messages(&json!({"kind": "Status", "code": 403}))).contains("no events"));
    }

    #[test]
    fn an_operator_that_goes_on_asking_does_not_rest() {
        let page = |reads: u64, writes: u64| {
            format!(
                "# TYPE ftvm_operator_api_requests_total counter\n\
                 ftvm_operator_api_requests_total{{kind=\"pods\",verb=\"get\"}} {reads}\n\
                 ftvm_operator_api_requests_total{{kind=\"pods\",verb=\"patch\"}} {writes}\n\
                 ftvm_operator_reconcile_seconds_count 99\n"
            )
        };
        // Nothing was asked by a replica that does not lead.
        let other = "ftvm_operator_leader 0\n".to_owned();
        let asked = |reads, writes| requests_on(&[other.clone(), page(reads, writes)]).unwrap();
        assert_eq!(asked(30, 12), 42);
        judge_rest(asked(30, 12), asked(30, 12)).unwrap();
        for after in [asked(31, 12), asked(30, 13)] {
            assert!(fault(judge_rest(asked(30, 12), after)).contains("42 requests until then, 43"));
        }
        // It was started again: that is no rest either.
        assert!(judge_rest(asked(30, 12), asked(3, 1)).is_err());
        assert!(fault(requests_on(std::slice::from_ref(&other))).contains("none of them"));
        assert!(fault(requests_on(&[])).contains("none of them"));
    }

    #[test]
    fn a_guest_that_was_booted_too_often_or_lacks_something_is_found() {
        let line = |boot: u64, records: u64, errors: u64| {
            format!("{CONSOLE}hello\n{JOURNAL}{boot}, {records} records, capacity 16000, {errors} errors\nother\n")
        };
        judge_journal(&line(2, 70, 0), 2, &(70..=70)).unwrap();
        // The last boot counts.
        judge_journal(&(line(1, 0, 0) + &line(2, 71, 0)), 2, &(70..=u64::MAX)).unwrap();
        let wrong = |log: &str, records| fault(judge_journal(log, 2, &records));
        assert!(wrong(&line(3, 70, 0), 70..=70).contains("boot 2"));
        assert!(wrong(&line(2, 69, 0), 70..=u64::MAX).contains("69 records"));
        assert!(wrong(&line(2, 71, 0), 0..=70).contains("71 records"));
        assert!(wrong(&line(2, 70, 1), 70..=70).contains("1 errors"));
        assert!(wrong("ftvm-guest: hello\n", 0..=70).contains("nothing of a journal"));
        assert!(wrong(&format!("{JOURNAL}2, 70 records\n"), 70..=70).contains("70 records"));
    }

    #[test]
    fn failures_of_another_seat_are_not_those_of_this_one() {
        let line = |seat: &str, count: u32| {
            format!("ftvm_seat_storage_failures{{namespace=\"demo\",seat=\"{seat}\",vm=\"demo\"}} {count}\n")
        };
        let page = line("demo-a", 3) + &line("demo-ab", 1);
        assert_eq!(failures_of(&page, "demo-a").unwrap(), 3);
        assert!(fault(failures_of(&page, "demo-b")).contains("of seat demo-b"));
        assert!(failures_of(&(page + &line("demo-a", 4)), "demo-a").is_err());
    }

    #[test]
    fn servers_are_in_the_order_of_their_places() {
        let page = "ftvm_api_server_place{server=\"10.96.0.1:443\"} 2\nftvm_api_server_place{server=\"10.77.0.11:6443\"} 0\n\
            ftvm_api_server_place{server=\"10.77.0.1:6443\"} 1\n\
            ftvm_arbiter_requests_total{outcome=\"found\",request=\"read\"} 7\n\
            ftvm_arbiter_requests_total{outcome=\"won\",request=\"swap\"} 3\n";
        let (servers, reads) = servers_and_reads(page).unwrap();
        assert_eq!(
            (servers.join(" ").as_str(), reads),
            ("10.77.0.11:6443 10.77.0.1:6443 10.96.0.1:443", 7)
        );
        assert!(servers_and_reads("ftvm_kvm_works 1\n").is_err());
    }

    #[test]
    fn exactly_one_node_tells_of_the_active() {
        let page = |role: &str, vm: &str, works: u32| {
            format!(
                "# HELP ftvm_kvm_works 1\n# TYPE ftvm_kvm_works gauge\nftvm_kvm_works {works}\nftvm_kvm_works_not 0\n\
                 ftvm_seat_role{{namespace=\"{NAMESPACE}\",role=\"{role}\",seat=\"s\",vm=\"{vm}\"}} 1\n"
            )
        };
        let (active, standby, other) = (page("active", VM, 1), page("standby", VM, 1), page("active", "x", 1));
        judge_metrics(&[standby.clone(), active.clone(), other.clone()], 1).unwrap();
        assert!(fault(judge_metrics(&[standby.clone(), active.clone()], 0)).contains("[1]"));
        assert!(fault(judge_metrics(&[active.clone(), active], 0)).contains("[0, 1]"));
        assert!(fault(judge_metrics(&[standby, other], 0)).contains("[]"));
        assert!(fault(judge_metrics(&[page("active", VM, 0)], 0)).contains("ftvm_kvm_works"));
        assert!(fault(judge_metrics(&[String::new()], 0)).contains("ftvm_kvm_works"));
    }

    #[test]
    fn exactly_one_operator_tells_that_the_machine_is_protected() {
        let page = |phase: &str, holds: u32| {
            let own = format!("namespace=\"{NAMESPACE}\",vm=\"{VM}\"");
            format!(
                "ftvm_vm_condition{{{own},condition=\"Ready\"}} 1\nftvm_vm_condition{{{own},condition=\"Protected\"}} {holds}\n\
                 ftvm_vm_phase{{{own},phase=\"{phase}\"}} 1\nftvm_vm_unprotected{{{own}}} {}\n",
                1 - holds
            )
        };
        let (leader, other) = (page("running", 1), "ftvm_operator_leader 0\n".to_owned());
        judge_leader(&[other.clone(), leader.clone()]).unwrap();
        assert!(fault(judge_leader(&[leader.clone(), leader.clone()])).contains("[1, 1]"));
        assert!(fault(judge_leader(&[other])).contains("ftvm_vm_phase"));
        assert!(fault(judge_leader(&[page("paused", 1)])).contains("ftvm_vm_phase"));
        assert!(fault(judge_leader(&[page("running", 0)])).contains("[0], not 1"));
        let elsewhere = leader.replace(NAMESPACE, "elsewhere");
        assert!(fault(judge_leader(&[elsewhere])).contains("[], not 1"));
    }
}
