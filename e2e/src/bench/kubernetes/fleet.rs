//! The operator with many VMs: its real program at a real API server with scheduler and controllers. Nodes are hollow: one program writes
//! what their kubelets and daemons would (`operator/examples/hollow_nodes.rs`).
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::super::process::{ProcessMemory, thread_times};
use super::figures::{FleetFigures, Work};
use super::requests::Requests;
use super::{NAMESPACE, Options, PATIENCE, define, milliseconds, say, vm};
use crate::cluster::{self, AuditEvent, Cluster, wait_for};
use crate::lab::binaries;
use crate::report::Progress;

/// Where the operator answers, in the cluster's outer network.
const LISTEN: &str = "127.0.0.1:8090";
const CLASS: &str = "hollow";
/// The node that dies.
const VICTIM: &str = "hollow-1";
/// Without a request for so long the operator is at rest.
const QUIET: Duration = Duration::from_secs(10);
/// Time for all VMs to be protected, and for the fleet to come to rest, beyond [`PATIENCE`].
const PATIENCE_A_VM: Duration = Duration::from_secs(2);

/// A program that ends with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(cluster: &Cluster, mut command: Command, name: &str) -> anyhow::Result<Self> {
        let log = File::create(cluster.folder().join("log").join(format!("{name}.log")))?;
        command.env("KUBECONFIG", cluster.admin_kubeconfig()).stderr(log);
        Ok(Self(cluster.sandbox().spawn(command)?))
    }

    fn pid(&self) -> anyhow::Result<i32> {
        Ok(i32::try_from(self.0.id())?)
    }
}

/// Builds the programs, makes the fleet, and looks on while it starts, rests and loses a node.
///
/// # Errors
/// If not all VMs are protected in the end, the operator does not come to rest, or something can't be counted.
pub fn measure(options: &Options, progress: &Progress) -> anyhow::Result<FleetFigures> {
    let programs = binaries::build(&[("ftvm-operator", "ftvm-operator")], options.profile)?;
    let hollow = binaries::build_example("ftvm-operator", "hollow_nodes", options.profile)?;
    let plan = options.plan();
    let cluster = Cluster::start(cluster::Options {
        nodes: 0,
        node_grace: plan.hollow_grace,
        audit: true,
        say: say(progress),
        ..cluster::Options::default()
    })?;
    define(&cluster)?;
    cluster.make_namespace("ftvm-system", &json!({}))?;
    cluster.make_namespace(NAMESPACE, &json!({}))?;
    cluster.apply(&class().to_string())?;
    let mut nodes = HollowNodes::start(&cluster, &hollow, options)?;
    progress.say(format!("fleet: {} hollow nodes are up", plan.hollow_nodes));
    let operator = Operator::start(&cluster, programs.first().context("no operator was built")?)?;
    let figures = Fleet {
        cluster: &cluster,
        operator: &operator,
        options,
        progress,
    };
    let measured = figures.measure(&mut nodes);
    measured.with_context(|| format!("the operator's last words: {}", operator.last_words(&cluster)))
}

fn class() -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": CLASS},
        "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "Immediate",
    })
}

struct Fleet<'a> {
    cluster: &'a Cluster,
    operator: &'a Operator,
    options: &'a Options,
    progress: &'a Progress,
}

/// What the operator had done at some time.
struct Look {
    at: Instant,
    events: usize,
    cpu_ms: f64,
    reconciles: u64,
    reconcile_s: f64,
}

impl Fleet<'_> {
    fn measure(&self, nodes: &mut HollowNodes) -> anyhow::Result<FleetFigures> {
        let plan = self.options.plan();
        let patience = PATIENCE + PATIENCE_A_VM * plan.vms;
        let (vms, all) = (u64::from(plan.vms), plan.vms);
        let before = self.look()?;
        self.apply(all)?;
        let protected = nodes.wait_for("all VMs are protected", patience, |line| {
            line["vms"] == vms && line["protected"] == vms
        })?;
        let protected_ms = milliseconds(protected - before.at);
        let start = self.since(&before)?;
        self.progress.say(format!(
            "fleet: {all} VMs are protected after {:.1} s",
            protected_ms / 1e3
        ));
        let rest = self.rest(patience)?;
        let memory = ProcessMemory::of(self.operator.process.pid()?)?;
        self.progress.say(format!(
            "fleet: at rest {} reads and {} writes",
            rest.reads, rest.writes
        ));
        let lost_seats = self.seats_on(VICTIM)?;
        ensure!(lost_seats > 0, "{VICTIM} has no seat: its death shows nothing");
        let before = self.look()?;
        nodes.kill(VICTIM)?;
        nodes.wait_for("its VMs are not protected", patience, |line| {
            line["protected"].as_u64() < Some(vms)
        })?;
        let not_ready = nodes.wait_for("it is not ready", patience, |line| line["notReady"] == VICTIM)?;
        let again = nodes.wait_for("all VMs are protected again", patience, |line| line["protected"] == vms)?;
        let loss = self.since(&before)?;
        ensure!(self.seats_on(VICTIM)? == 0, "seats are still on the dead node");
        self.progress.say(format!(
            "fleet: {lost_seats} seats were replaced {:.1} s after their node was not ready",
            (again - not_ready).as_secs_f64()
        ));
        let rest_an_hour = rest.writes as f64 * 3.6e6 / rest.took_ms / f64::from(all);
        let shared = super::rest::WRITES_A_SHARED * 3600.0 / super::rest::SHARED.as_secs_f64();
        Ok(FleetFigures {
            vms: all,
            nodes: plan.hollow_nodes,
            protected_ms,
            start,
            rest,
            rest_writes_per_vm_hour: rest_an_hour + shared,
            lost_seats,
            not_ready_ms: milliseconds(not_ready - before.at),
            reprotect_ms: milliseconds(again - not_ready),
            loss,
            memory,
            peak_bytes: ProcessMemory::of(self.operator.process.pid()?)?.peak_bytes,
        })
    }

    fn apply(&self, vms: u32) -> anyhow::Result<()> {
        let items: Vec<Value> = (0..vms)
            .map(|number| {
                let mut vm = vm(&format!("vm-{number}"), "64Mi", CLASS);
                // Hollow nodes publish no CPU.
                vm["spec"]["machine"]["cpuBaseline"] = json!("Host");
                vm
            })
            .collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        self.cluster.apply(&list.to_string()).map(drop)
    }

    fn look(&self) -> anyhow::Result<Look> {
        let times = thread_times(self.operator.process.pid()?)?;
        let metrics = self.operator.metrics(self.cluster)?;
        let value = |name: &str| sample(&metrics, name).with_context(|| format!("the operator has no metric {name}"));
        Ok(Look {
            at: Instant::now(),
            events: self.cluster.audit_events()?.len(),
            cpu_ms: times.values().sum::<u64>() as f64 / 1e6,
            reconciles: value("ftvm_operator_reconcile_seconds_count")? as u64,
            reconcile_s: value("ftvm_operator_reconcile_seconds_sum")?,
        })
    }

    fn since(&self, before: &Look) -> anyhow::Result<Work> {
        let now = self.look()?;
        let events = self.cluster.audit_events()?;
        let asked = Requests::count(events.get(before.events..now.events).unwrap_or_default());
        ensure!(
            asked.other_writes > 0,
            "the audit log does not even have the hollow nodes' writes: it can't be believed"
        );
        let reconciles = now.reconciles - before.reconciles;
        let seconds = now.reconcile_s - before.reconcile_s;
        Ok(Work {
            took_ms: milliseconds(now.at - before.at),
            reads: asked.operator_reads,
            writes: asked.operator_writes,
            cpu_ms: now.cpu_ms - before.cpu_ms,
            reconciles,
            reconcile_ms: (reconciles > 0).then(|| seconds * 1e3 / reconciles as f64),
        })
    }

    /// What it does in a window at rest. An event's series may be told once more in any window; where seconds are to show no more than that
    /// it comes to rest, there is another one.
    fn rest(&self, patience: Duration) -> anyhow::Result<Work> {
        let deadline = Instant::now() + patience;
        loop {
            self.come_to_rest(patience)?;
            let before = self.look()?;
            std::thread::sleep(self.options.rest_window());
            let rest = self.since(&before)?;
            if !self.options.short || rest.judge_rest().is_ok() || Instant::now() > deadline {
                return Ok(rest);
            }
        }
    }

    /// Waits until the operator asks for nothing any more: an operator that never does is told, not measured.
    fn come_to_rest(&self, patience: Duration) -> anyhow::Result<()> {
        wait_for("the operator comes to rest", patience, || {
            let before = self.cluster.audit_events()?;
            std::thread::sleep(QUIET);
            judge_rest(&before, &self.cluster.audit_events()?)
        })
    }

    fn seats_on(&self, node: &str) -> anyhow::Result<u64> {
        let on_node = format!("--field-selector=spec.nodeName={node}");
        let pods = self
            .cluster
            .kubectl(&["get", "pods", "--namespace", NAMESPACE, &on_node, "--output=name"])?;
        Ok(pods.lines().count() as u64)
    }
}

/// What was written down of all requests until two moments, [`QUIET`] apart.
fn judge_rest(before: &[AuditEvent], after: &[AuditEvent]) -> anyhow::Result<()> {
    let asked = |events: &[AuditEvent]| {
        let asked = Requests::count(events);
        asked.operator_reads + asked.operator_writes
    };
    let (before, after) = (asked(before), asked(after));
    ensure!(
        after == before,
        "{before} requests until then, {after} until {} s later",
        QUIET.as_secs()
    );
    Ok(())
}

struct Operator {
    process: Process,
}

impl Operator {
    fn start(cluster: &Cluster, program: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command
            .args(["run", "--seat-image", "lab.ftvm.dev/hollow:1", "--listen", LISTEN])
            .envs([("POD_NAME", "fleet"), ("POD_NAMESPACE", "ftvm-system")])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let this = Self {
            process: Process::start(cluster, command, "operator")?,
        };
        wait_for("the operator leads", PATIENCE, || {
            let metrics = this.metrics(cluster)?;
            ensure!(
                sample(&metrics, "ftvm_operator_leader") == Some(1.0),
                "it waits for the election"
            );
            Ok(())
        })?;
        Ok(this)
    }

    fn metrics(&self, cluster: &Cluster) -> anyhow::Result<String> {
        let (_, metrics) = cluster.http_get(LISTEN.parse()?, "/metrics")?;
        Ok(metrics)
    }

    fn last_words(&self, cluster: &Cluster) -> String {
        let log = std::fs::read_to_string(cluster.folder().join("log/operator.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines
            .get(lines.len().saturating_sub(10)..)
            .unwrap_or_default()
            .join("\n")
    }
}

/// A value of a metric without labels.
fn sample(metrics: &str, name: &str) -> Option<f64> {
    let lines = metrics.lines().filter_map(|line| line.split_once(' '));
    let found = lines.into_iter().find(|(found, _)| *found == name);
    found.and_then(|(_, value)| value.trim().parse().ok())
}

/// The program that plays kubelets and daemons.
struct HollowNodes {
    input: ChildStdin,
    lines: Receiver<(Instant, Value)>,
    _process: Process,
}

impl HollowNodes {
    fn start(cluster: &Cluster, program: &Path, options: &Options) -> anyhow::Result<Self> {
        let plan = options.plan();
        let seats = 2 * plan.vms;
        // Those of one node must find room elsewhere.
        let a_node = seats.div_ceil(plan.hollow_nodes - 1) + 1;
        // Each lost seat leaves its own behind, and on a busy machine a seat may be lost more than once.
        let volumes = seats + 4 * a_node;
        let mut command = Command::new(program);
        let numbers = [
            ("--nodes", plan.hollow_nodes),
            ("--seats", a_node),
            ("--volumes", volumes),
        ];
        for (name, number) in numbers {
            command.args([name, &number.to_string()]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(cluster, command, "hollow-nodes")?;
        let output = process.0.stdout.take().context("no output")?;
        let input = process.0.stdin.take().context("no input")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or_default();
                if sender.send((Instant::now(), line)).is_err() {
                    break;
                }
            }
        });
        let mut this = Self {
            input,
            lines,
            _process: process,
        };
        this.wait_for("the hollow nodes are made", PATIENCE, |line| line["madeNodes"].is_u64())?;
        Ok(this)
    }

    /// When it said so; every line counts once.
    fn wait_for(&mut self, what: &str, patience: Duration, so: impl Fn(&Value) -> bool) -> anyhow::Result<Instant> {
        let deadline = Instant::now() + patience;
        let mut last = Value::Null;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((at, line)) if so(&line) => return Ok(at),
                Ok((_, line)) => last = line,
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{what}: not so after {} s; last told: {last}", patience.as_secs())
                }
                Err(RecvTimeoutError::Disconnected) => bail!("{what}: hollow_nodes ended; last told: {last}"),
            }
        }
    }

    fn kill(&mut self, node: &str) -> anyhow::Result<()> {
        writeln!(self.input, "kill {node}").context("hollow_nodes ended")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the API server writes them down.
    fn event(verb: &str, user: &str, resource: &str, name: &str) -> AuditEvent {
        let user_agent = if user == "operator" {
            "ftvm-operator/0.1.0"
        } else {
            "kube-scheduler/v1.37.0"
        };
        let event = json!({
            "kind": "Event", "level": "Metadata", "stage": "ResponseComplete", "verb": verb, "userAgent": user_agent,
            "user": {"username": format!("system:serviceaccount:ftvm-system:{user}"), "groups": ["system:authenticated"]},
            "objectRef": {"resource": resource, "namespace": NAMESPACE, "name": name, "apiVersion": "v1"},
            "responseStatus": {"code": 200}, "requestReceivedTimestamp": "2026-01-01T00:00:00.000000Z",
        });
        serde_json::from_value(event).unwrap()
    }

    #[test]
    fn an_operator_that_goes_on_asking_does_not_come_to_rest() {
        let before = vec![
            event("list", "operator", "pods", ""),
            event("patch", "operator", "faulttolerantvms", "vm-0"),
        ];
        let later = |more: AuditEvent| [before.clone(), vec![more]].concat();
        judge_rest(&before, &before).unwrap();
        // What others ask is nothing of it, nor is who leads, nor a watch that stays open.
        judge_rest(
            &before,
            &later(event("update", "scheduler", "leases", "kube-scheduler")),
        )
        .unwrap();
        judge_rest(&before, &later(event("patch", "operator", "leases", "ftvm-operator"))).unwrap();
        judge_rest(&before, &later(event("watch", "operator", "pods", ""))).unwrap();
        for busy in [
            event("get", "operator", "pods", "vm-0-a"),
            event("create", "operator", "events", "vm-0.17"),
        ] {
            let found = judge_rest(&before, &later(busy)).unwrap_err().to_string();
            assert_eq!(found, "2 requests until then, 3 until 10 s later");
        }
        // A log that has less than before is no rest.
        assert!(judge_rest(&before, &before[..1]).is_err());
    }

    #[test]
    fn metrics_are_found_by_their_whole_name() {
        let text = "HTTP/1.0 200 OK\r\n\r\n# HELP a b\na_sum 1.5\na_count 3\na 1\nb{x=\"y\"} 4\n";
        assert_eq!(
            (sample(text, "a"), sample(text, "a_sum"), sample(text, "a_count")),
            (Some(1.0), Some(1.5), Some(3.0))
        );
        assert_eq!(sample(text, "b"), None);
    }
}
