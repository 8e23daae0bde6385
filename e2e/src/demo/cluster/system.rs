//! The seats of a FaultTolerantVM, as the daemons of their nodes show them. Nobody but the operator replaces one.
use std::path::{Path, PathBuf};
use std::process::Child;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::groups::EngineGroup;
use super::{GUEST_ADDRESS, NAMESPACE, VM};
use crate::cluster::install::{DEBIAN_IMAGE, GUEST_IMAGE};
use crate::cluster::plan::CLIENT_BRIDGE;
use crate::cluster::{Cluster, wait_for};
use crate::demo::background::Background;
use crate::demo::standalone::DISK;
use crate::demo::system::{Digest, Seat, System};
use crate::demo::{GUEST_MAC, Guest, Options, compare, guest_command_line, mac_text};
use crate::lab::guest;

/// Name of the guest's disk.
const DISK_NAME: &str = "root";
/// How long a daemon may take to answer, longer than it waits for its engine.
const ANSWER: Duration = Duration::from_secs(2);
/// How long both sides may take to become equal once nothing happens any more.
const SETTLE: Duration = Duration::from_secs(60);
/// For a digest of memory, longer than its daemon waits for its engine.
const DIGEST: Duration = Duration::from_secs(50);
/// For a node that was started to be of use again.
const PATIENCE: Duration = Duration::from_secs(120);

/// The machine.
pub struct Kubernetes {
    cluster: Rc<Cluster>,
    options: Options,
    /// `kubectl drain`, while it waits.
    drain: Background,
    /// Name of the node that takes no pods since.
    drained: Option<String>,
}

impl Kubernetes {
    /// Nothing is applied yet.
    pub fn new(cluster: Rc<Cluster>, options: &Options) -> Self {
        Self {
            cluster,
            options: options.clone(),
            drain: Background::new("kubectl drain"),
            drained: None,
        }
    }

    /// What `kubectl apply` gets.
    fn manifest(&self) -> Value {
        let (image, cmdline, mac, disk) = match self.options.guest {
            Guest::Embedded => (
                GUEST_IMAGE,
                guest_command_line(GUEST_ADDRESS),
                GUEST_MAC,
                json!({"name": DISK_NAME, "size": "64Mi", "storageClassName": "local"}),
            ),
            Guest::Linux => (
                DEBIAN_IMAGE,
                guest::CMDLINE.to_owned(),
                guest::MAC,
                json!({"name": DISK_NAME, "size": "320Mi", "storageClassName": "local", "source": {"image": {}}}),
            ),
        };
        json!({
            "apiVersion": "ftvm.dev/v1alpha1",
            "kind": "FaultTolerantVM",
            "metadata": {"name": VM, "namespace": NAMESPACE},
            "spec": {
                "machine": {"vcpus": self.options.vcpus, "memory": format!("{}Mi", self.options.memory_mib)},
                "boot": {"image": {"reference": image, "pullPolicy": "Never"}, "cmdline": cmdline},
                "disks": [disk],
                "networks": [{"name": "front", "mac": mac_text(mac), "bridge": {"name": CLIENT_BRIDGE}}],
                "faultTolerance": self.tolerance(),
                // The nodes share this machine's two processors.
                "resources": {"cpuRequest": "100m"},
            },
        })
    }

    fn tolerance(&self) -> Value {
        let mut tolerance = match self.options.guest {
            Guest::Embedded => json!({"replaceAfterSeconds": 10}),
            // An emulated machine may stand still for a while when its host is busy: that is not its death. An engine takes half a minute to
            // start there, and there is no other node that a seat could be placed on.
            Guest::Linux => {
                json!({"replaceAfterSeconds": 1200, "detectionMs": 10_000, "interval": {"minMs": 20, "maxMs": 200}})
            }
        };
        if let Some(ms) = self.options.peer_lost_ms {
            tolerance["detectionMs"] = json!(ms);
        }
        tolerance
    }

    fn ask(&self, machine: usize, request: &Value, patience: Duration) -> anyhow::Result<Value> {
        self.cluster.workers()[machine].ask_daemon(request, patience)
    }

    fn patience(&self, native: Duration) -> Duration {
        self.cluster.kind().patience(native)
    }

    /// The seat with an engine on a node: its name and the engine's status.
    fn engine(&self, machine: usize) -> anyhow::Result<Option<(String, Value)>> {
        let status = self.ask(machine, &json!({"request": "status"}), ANSWER)?;
        let vm = format!("{NAMESPACE}/{VM}");
        let seats = status["seats"].as_array().cloned().unwrap_or_default();
        let found = seats
            .into_iter()
            .find(|seat| seat["vm"] == vm.as_str() && seat["engine"].is_object());
        Ok(found.and_then(|mut seat| Some((seat["seat"].as_str()?.to_owned(), seat["engine"].take()))))
    }

    /// The seat whose engine runs on a node. An engine that has no time for its daemon just now does not show itself.
    fn named(&self, machine: usize) -> anyhow::Result<String> {
        let what = format!("an engine runs on {}", self.cluster.workers()[machine].name());
        wait_for(&what, self.patience(SETTLE), || {
            let found = self.engine(machine)?;
            let name = found.map(|(name, _)| name);
            name.context("its daemon shows none")
        })
    }

    fn digest(&self, machine: usize) -> anyhow::Result<Digest> {
        let seat = self.named(machine)?;
        let vm = format!("{NAMESPACE}/{VM}");
        let request = json!({"request": "command", "vm": vm, "seat": seat, "command": {"do": "digest"}});
        wait_for(&format!("{seat} has a digest"), self.patience(DIGEST), || {
            let answer = self.ask(machine, &request, self.patience(DIGEST))?;
            let reply = &answer["reply"];
            ensure!(reply["reply"] == "digest", "{seat} said {answer}");
            Ok(serde_json::from_value(reply.clone())?)
        })
    }

    /// The file of a seat's disk, as this machine can read it: that of its claim's volume on its node.
    fn disk(&self, machine: usize) -> anyhow::Result<PathBuf> {
        let claim = format!("{}-{DISK_NAME}", self.named(machine)?);
        let claim = self.cluster.get(&["pvc", "--namespace", NAMESPACE, &claim])?;
        let volume = claim["spec"]["volumeName"]
            .as_str()
            .context("the claim has no volume")?;
        let volume = self.cluster.get(&["pv", volume])?;
        let path = volume["spec"]["local"]["path"]
            .as_str()
            .context("the volume has no path")?;
        self.cluster.workers()[machine].file(&Path::new(path).join(DISK), self.cluster.folder())
    }

    /// Where the node's kernel has the engine, and what it charges its pod with.
    fn examine_group(&self, machine: usize) -> anyhow::Result<()> {
        let seat = self.named(machine)?;
        let pod = self.cluster.get(&["pod", "--namespace", NAMESPACE, &seat])?;
        let uid = pod["metadata"]["uid"].as_str().context("the pod has no UID")?;
        let limit = &pod["spec"]["containers"][0]["resources"]["limits"]["memory"];
        let limit_mib = limit
            .as_str()
            .and_then(|limit| limit.strip_suffix("Mi")?.parse::<u64>().ok());
        let limit_mib = limit_mib.with_context(|| format!("the pod's limit of memory is {limit}, no number of Mi"))?;
        let group = EngineGroup::read(&self.cluster.workers()[machine])?;
        self.cluster.say(&format!("the engine of {seat}: {group}"));
        group.judge(uid, limit_mib << 20, u64::from(self.options.memory_mib) << 20)
    }

    /// Copies of both disks become equal once the guest is still and the journal applied. What they are then is examined: file system and
    /// Redis' log must be in order, as after a power cut.
    fn compare_copies(&self, active: usize, standby: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + self.patience(SETTLE);
        loop {
            let (ours, theirs) = (self.disk(active)?, self.disk(standby)?);
            let Some(at) = compare::first_difference(&ours, &theirs)? else {
                return guest::examine_copy(&ours, self.cluster.folder()).context("the disks are equal, and damaged");
            };
            ensure!(Instant::now() < deadline, "the disks differ at byte {at} and stay so");
        }
    }
}

/// Begins to take all pods from a node but the daemons', as administrators do before they work on one.
pub(super) fn start_drain(cluster: &Cluster, node: &str) -> anyhow::Result<Child> {
    cluster.start_kubectl(&[
        "drain",
        node,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--timeout=180s",
    ])
}

/// What `kubectl get ftvm` shows, the machines' whole status, and what the pods say: for who waits in vain.
#[must_use]
pub fn story(cluster: &Cluster) -> String {
    let shown = ["get", "ftvm", "--namespace", NAMESPACE, "--output=wide"];
    let shown = cluster.kubectl(&shown).unwrap_or_else(|error| format!("{error:#}"));
    let machines = cluster.get(&["ftvm", "--namespace", NAMESPACE]);
    let machines = machines.map_or_else(|error| format!("{error:#}"), |list| statuses(&list));
    format!("{shown}\n{machines}\n{}", cluster.pods_story(NAMESPACE))
}

fn statuses(list: &Value) -> String {
    let machines = list["items"].as_array().into_iter().flatten();
    let lines = machines.map(|vm| format!("{}: {:#}\n", vm["metadata"]["name"], vm["status"]));
    lines.collect()
}

impl System for Kubernetes {
    fn protects(&self) -> bool {
        true
    }

    fn engine_program(&self) -> &str {
        "ftvm-engine"
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.cluster.apply(&self.manifest().to_string()).map(drop)
    }

    fn seat(&mut self, machine: usize) -> Option<Seat> {
        let (_, engine) = self.engine(machine).ok()??;
        serde_json::from_value(engine).ok()
    }

    /// By a drain of its node.
    fn hand_over(&mut self, machine: usize) -> anyhow::Result<()> {
        let node = self.cluster.workers()[machine].name();
        self.drain.began(start_drain(&self.cluster, &node)?);
        self.drained = Some(node);
        Ok(())
    }

    /// The operator does.
    fn replace(&mut self, _lost: usize, _spare: usize) -> anyhow::Result<()> {
        Ok(())
    }

    fn trouble(&mut self) -> Option<String> {
        self.drain.trouble()
    }

    /// A node that was started again, or drained, takes seats once it is ready and offers them.
    fn make_spare(&mut self, machine: usize) -> anyhow::Result<()> {
        let name = self.cluster.workers()[machine].name();
        if let Some(trouble) = self.drain.finish()? {
            bail!("{trouble}");
        }
        if let Some(drained) = self.drained.take() {
            self.cluster.kubectl(&["uncordon", &drained])?;
        }
        self.cluster.wait_node_ready(&name)?;
        wait_for(&format!("node {name} offers seats"), self.patience(PATIENCE), || {
            let node = self.cluster.get(&["node", &name])?;
            let seats = &node["status"]["allocatable"]["ftvm.dev/seat"];
            ensure!(seats.as_str().is_some_and(|seats| seats != "0"), "{seats}");
            self.ask(machine, &json!({"request": "status"}), ANSWER).map(drop)
        })
    }

    fn compare_sides(&mut self, active: usize, standby: usize) -> anyhow::Result<()> {
        match self.options.guest {
            Guest::Embedded => compare::disks(&self.disk(active)?, &self.disk(standby)?, SETTLE)?,
            Guest::Linux => {
                self.examine_group(active)?;
                self.examine_group(standby)?;
                self.compare_copies(active, standby)?;
            }
        }
        compare::memory(|machine| self.digest(machine), active, standby, self.patience(DIGEST))
    }

    fn logs(&self) -> Vec<PathBuf> {
        vec![self.cluster.folder().join("log")]
    }
}
