//! A real Kubernetes on one machine: control plane, and *native nodes* made of namespaces or emulated ones. [`plan`] has the picture.
//!
//! Entry points: [`Cluster::start`] for tests, [`holder`] for `cargo xtask cluster`.
//!
//! Invariant: nothing of a cluster is in the machine's own network, mounts or process ids; all of it ends with the process that made it.
//! Control groups and the folder, which the kernel keeps, are removed with the cluster, or by the next lab if its process was killed.
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

mod api_proxy;
pub mod audit;
pub(crate) mod cgroup;
mod control_plane;
pub mod datastores;
mod emulated;
pub mod holder;
mod http;
pub mod images;
pub mod install;
pub mod leadership;
mod native;
mod node;
pub mod pace;
mod pki;
pub mod plan;
mod plugin;
mod preload;
pub mod programs;
mod raw;
pub mod record_history;
pub mod wait;

pub use api_proxy::{ApiProxy, Asked, Asker, Deeds, Dice, Fault, PodWrite};
pub use audit::AuditEvent;
pub use control_plane::Component;
pub use native::{Native, Stopped};
pub use node::{Node, NodeProgram};
pub use plan::{NodeKind, NodePlan, Options, Say};
pub use plugin::{Answer, Plugin};
pub use wait::wait_for;

use cgroup::Groups;
use control_plane::ControlPlane;
use node::{Material, Shared};
use pki::{Authority, Subject};

use crate::hosts::{CutDirection, net};
use crate::lab::image::Image;
use crate::lab::{Folder, Network, Sandbox, make_networks};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);

/// A running cluster; dropping it takes everything back. Fields end in this order.
pub struct Cluster {
    nodes: Vec<Node>,
    api_proxy: Option<ApiProxy>,
    control: ControlPlane,
    authority: Authority,
    shared: Arc<Shared>,
    folder: Remains,
}

/// The cluster's folder; the control groups that it names go before it.
struct Remains(Folder);

impl Drop for Remains {
    fn drop(&mut self) {
        if let Err(error) = cgroup::remove_left(self.0.path()) {
            eprintln!("cluster: {error:#}");
        }
    }
}

impl Cluster {
    /// Builds the programs if they are not in the cache, starts the control plane and all nodes, and waits until they are ready.
    ///
    /// # Errors
    /// Without root or a program of the machine; if something does not start, with the end of its log.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a cluster's nodes need root: containers, mounts and control groups are made; run it as root"
        );
        options.check()?;
        let say = Arc::clone(&options.say);
        let programs = programs::folder(&say)?;
        let folder = Remains(Folder::new()?);
        let sandbox = Arc::new(Sandbox::new()?);
        make_outside(&sandbox, &options)?;
        let authority = Authority::new(&folder.0.path().join("pki"))?;
        say("starting the control plane");
        let control = ControlPlane::start(&sandbox, &programs, folder.0.path(), &authority, &options)?;
        let api_proxy = options
            .api_proxy
            .then(|| ApiProxy::start(&sandbox, folder.0.path(), &authority))
            .transpose()?;
        let shared = Arc::new(Shared {
            sandbox,
            programs,
            options,
            pause: folder.0.path().join("pod.tar"),
        });
        let mut cluster = Self {
            nodes: Vec::new(),
            api_proxy,
            control,
            authority,
            shared,
            folder,
        };
        if cluster.shared.options.nodes > 0 {
            cluster.add_nodes()?;
        }
        Ok(cluster)
    }

    fn add_nodes(&mut self) -> anyhow::Result<()> {
        images::pack_pause(&self.shared.pause)?;
        let say = Arc::clone(&self.shared.options.say);
        let material = self.material()?;
        for plan in self.shared.options.plans() {
            let folder = self.folder().join("nodes").join(plan.name());
            let node = Node::new(plan, folder, &self.shared, &material, &self.authority)?;
            self.nodes.push(node);
        }
        say(&format!("starting {} nodes", self.nodes.len()));
        std::thread::scope(|scope| {
            let starts: Vec<_> = self.nodes.iter().map(|node| scope.spawn(|| node.start())).collect();
            starts.into_iter().try_for_each(|start| match start.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        self.apply(include_str!("../../cluster/storage.yaml"))?;
        self.apply(&self.volumes()?)?;
        for node in &self.nodes {
            self.wait_node_ready(&node.name())?;
        }
        for node in self.nodes.iter().filter(|node| node.plan().kind == NodeKind::Native) {
            let archives = &self.shared.options.images;
            archives.iter().try_for_each(|archive| node.import_image(archive))?;
        }
        if self.shared.options.has_second_api_server() {
            self.wait_api_servers(&[plan::api_address(), plan::second_api_address()])?;
        }
        say("all nodes are ready");
        Ok(())
    }

    /// Waits until the API servers' service leads to those at these addresses, and to no other.
    ///
    /// # Errors
    /// If it is not so in time.
    pub fn wait_api_servers(&self, addresses: &[Ipv4Addr]) -> anyhow::Result<()> {
        let expected: BTreeSet<String> = addresses.iter().map(Ipv4Addr::to_string).collect();
        wait_for("the API servers publish themselves", PATIENCE, || {
            for node in self.nodes.iter().filter(|node| node.is_running()) {
                node.ensure_programs_run()?;
            }
            let slice = self.get(&["endpointslice", "--namespace", "default", "kubernetes"])?;
            let endpoints = slice["endpoints"].as_array().context("no endpoints")?;
            let addresses = endpoints
                .iter()
                .filter_map(|endpoint| endpoint["addresses"][0].as_str());
            let found: BTreeSet<String> = addresses.map(str::to_owned).collect();
            ensure!(found == expected, "they are {found:?}");
            Ok(())
        })
    }

    fn material(&self) -> anyhow::Result<Material> {
        let name = self.folder().file_name().and_then(|name| name.to_str());
        let group = format!("ftvm-{}", name.context("the lab's folder has no name")?);
        let emulated = || {
            let mut archives = vec![self.shared.pause.clone()];
            archives.extend(self.shared.options.images.iter().cloned());
            let (programs, folder) = (&self.shared.programs, self.folder());
            let data = preload::disk(self.sandbox(), programs, &archives, folder, emulated::DATA_MIB)?;
            Ok::<_, anyhow::Error>((Image::cluster_node(programs)?, data))
        };
        Ok(Material {
            groups: Arc::new(Groups::new(self.folder(), &group)?),
            emulated: (self.kind() == NodeKind::Emulated).then(emulated).transpose()?,
        })
    }

    /// Its folder: the administrator's kubeconfig, `log`, `nodes`.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.0.path()
    }

    /// The namespaces around it: clients outside of the nodes connect from there.
    #[must_use]
    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.shared.sandbox
    }

    /// The folder of the programs: kubectl, helm and those of the cluster itself.
    #[must_use]
    pub fn programs(&self) -> &Path {
        &self.shared.programs
    }

    /// What stands between the API server and everything on the nodes.
    ///
    /// # Errors
    /// If [`Options::api_proxy`] is off.
    pub fn api_proxy(&self) -> anyhow::Result<&ApiProxy> {
        self.api_proxy
            .as_ref()
            .context("the cluster has no proxy: set Options::api_proxy")
    }

    /// Tells whoever looks on.
    pub(crate) fn say(&self, text: &str) {
        (self.shared.options.say)(text);
    }

    /// The nodes, `n1` first.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node by its name.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn node(&self, name: &str) -> anyhow::Result<&Node> {
        let found = self.nodes.iter().find(|node| node.name() == name);
        found.with_context(|| format!("there is no node {name}"))
    }

    /// The administrator's kubeconfig. Its server is reached from inside the cluster's namespaces only.
    #[must_use]
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.folder().join("admin.kubeconfig")
    }

    /// A kubeconfig for someone else; what they may do is up to RBAC.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn kubeconfig(&self, user: &str, group: Option<&str>) -> anyhow::Result<PathBuf> {
        let path = self
            .folder()
            .join(format!("{}.kubeconfig", user.replace([':', '/'], "-")));
        let url = plan::api_url(plan::api_address());
        self.authority.kubeconfig(&path, &url, &Subject { user, group })?;
        Ok(path)
    }

    /// Runs kubectl as the administrator; returns what it printed.
    ///
    /// # Errors
    /// If it fails, with what it said.
    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.kubectl_as(&self.admin_kubeconfig(), arguments)
    }

    /// Starts kubectl as the administrator, for what takes long.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_kubectl(&self, arguments: &[&str]) -> anyhow::Result<Child> {
        let mut command = kubectl_command(self.programs(), self.folder(), &self.admin_kubeconfig());
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        self.sandbox().spawn(command)
    }

    /// Runs kubectl as someone else; returns what it printed.
    ///
    /// # Errors
    /// If it fails, with what it said.
    pub fn kubectl_as(&self, kubeconfig: &Path, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = kubectl_command(self.programs(), self.folder(), kubeconfig);
        command.args(arguments);
        self.run(command, "")
    }

    /// A merge patch as someone else, without reading the object first as `kubectl patch` does; returns the API server's answer.
    ///
    /// # Errors
    /// If it is refused, with the API server's reason.
    pub fn patch_as(&self, kubeconfig: &Path, path: &str, patch: &Value) -> anyhow::Result<String> {
        let mut proxy = raw::Proxy::start(self, kubeconfig)?;
        proxy.send("PATCH", path, "application/merge-patch+json", &patch.to_string())
    }

    /// Runs kubectl with `--output=json`.
    ///
    /// # Errors
    /// If it fails, with what it said.
    pub fn get(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.kubectl(&[&["get", "--output=json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {}: no JSON", arguments.join(" ")))
    }

    /// Applies manifests, YAML or JSON, on the server's side.
    ///
    /// # Errors
    /// If the API server refuses them, with its reason.
    pub fn apply(&self, manifests: &str) -> anyhow::Result<String> {
        let mut command = kubectl_command(self.programs(), self.folder(), &self.admin_kubeconfig());
        command.args(["apply", "--server-side", "--filename=-"]);
        self.run(command, manifests)
    }

    /// Makes a namespace with labels.
    ///
    /// # Errors
    /// If the API server refuses it, with its reason.
    pub fn make_namespace(&self, name: &str, labels: &Value) -> anyhow::Result<()> {
        let metadata = json!({"name": name, "labels": labels});
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
        self.apply(&namespace.to_string()).map(drop)
    }

    /// Runs Helm as the administrator; returns what it printed.
    ///
    /// # Errors
    /// If it fails, with what it said.
    pub fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(self.programs().join("helm"));
        for (name, folder) in [
            ("HELM_CACHE_HOME", "helm/cache"),
            ("HELM_CONFIG_HOME", "helm/config"),
            ("HELM_DATA_HOME", "helm/data"),
        ] {
            command.env(name, self.folder().join(folder));
        }
        command.env("KUBECONFIG", self.admin_kubeconfig()).args(arguments);
        self.run(command, "")
    }

    /// Runs a program in the outer namespaces with `input`; returns what it printed.
    fn run(&self, mut command: Command, input: &str) -> anyhow::Result<String> {
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.sandbox().spawn(command)?;
        // Who does not read it to its end says why on standard error.
        let written = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).trim().to_owned();
            bail!("{}: {}: {text}", words.join(" "), output.status);
        }
        written.transpose()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Gives an OCI archive's images to every node that runs.
    ///
    /// # Errors
    /// If it is no such archive.
    pub fn import_image(&self, archive: &Path) -> anyhow::Result<()> {
        self.nodes
            .iter()
            .filter(|node| node.is_running())
            .try_for_each(|node| node.import_image(archive))
    }

    /// Waits until the API server takes a node for ready.
    ///
    /// # Errors
    /// If it does not, with the reason; at once if a program of the node has ended.
    pub fn wait_node_ready(&self, name: &str) -> anyhow::Result<()> {
        wait_for(&format!("node {name} is ready"), self.patience(), || {
            self.node(name)?.ensure_programs_run()?;
            let (status, reason) = self.node_condition(name)?;
            ensure!(status == "True", "{status}: {reason}");
            Ok(())
        })
    }

    /// Waits until the API server takes a node for not ready.
    ///
    /// # Errors
    /// If it does not.
    pub fn wait_node_not_ready(&self, name: &str) -> anyhow::Result<()> {
        wait_for(&format!("node {name} is not ready"), self.patience(), || {
            let (status, reason) = self.node_condition(name)?;
            ensure!(status != "True", "it is ready: {reason}");
            Ok(())
        })
    }

    /// Waits until a pod's containers run and are ready.
    ///
    /// # Errors
    /// If they are not, with the state of the pod and its last events.
    pub fn wait_pod_ready(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        wait_for(&format!("pod {namespace}/{name} is ready"), self.patience(), || {
            let pod = self.get(&["pod", "--namespace", namespace, name])?;
            ensure!(condition(&pod, "Ready").0 == "True", "{}", self.pod_story(&pod));
            Ok(())
        })
    }

    /// What the nodes run on that have seats.
    #[must_use]
    pub fn kind(&self) -> NodeKind {
        match self.shared.options.emulated {
            0 => NodeKind::Native,
            _ => NodeKind::Emulated,
        }
    }

    /// The nodes that have seats, `n1` first.
    #[must_use]
    pub fn workers(&self) -> &[Node] {
        match self.kind() {
            NodeKind::Native => &self.nodes,
            NodeKind::Emulated => &self.nodes[..usize::from(self.shared.options.emulated)],
        }
    }

    fn patience(&self) -> Duration {
        self.kind().patience(PATIENCE)
    }

    /// What the API server wrote down so far; [`Options::audit`] must be on.
    ///
    /// # Errors
    /// If it is off.
    pub fn audit_events(&self) -> anyhow::Result<Vec<AuditEvent>> {
        audit::read(self.folder())
    }

    /// Stops a program of the control plane in time: who asks it waits.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pause_component(&self, component: Component) -> anyhow::Result<()> {
        self.control.signal(component, Signal::STOP)
    }

    /// Lets a paused program go on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume_component(&self, component: Component) -> anyhow::Result<()> {
        self.control.signal(component, Signal::CONT)
    }

    /// Kills a program of the control plane: who asks it is refused.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill_component(&self, component: Component) -> anyhow::Result<()> {
        self.control.kill_component(component)
    }

    /// Starts a killed program and waits until the API server is ready.
    ///
    /// # Errors
    /// If it runs, or does not start.
    pub fn start_component(&self, component: Component) -> anyhow::Result<()> {
        self.control.start_component(component)?;
        self.control.wait_ready()
    }

    /// Drops packets between two nodes in a network until [`Cluster::mend_links`].
    ///
    /// # Errors
    /// If nft refuses.
    pub fn cut_link(
        &self,
        first: &Node,
        second: &Node,
        network: Network,
        direction: CutDirection,
    ) -> anyhow::Result<()> {
        let (a, b) = (first.plan().port(network), second.plan().port(network));
        let mut script = format!("add rule bridge cut forward iifname \"{a}\" oifname \"{b}\" drop\n");
        if direction == CutDirection::Both {
            script += &format!("add rule bridge cut forward iifname \"{b}\" oifname \"{a}\" drop\n");
        }
        self.sandbox().in_network(|| net::nft(&script))??;
        Ok(())
    }

    /// Takes back every [`Cluster::cut_link`].
    ///
    /// # Errors
    /// If nft refuses.
    pub fn mend_links(&self) -> anyhow::Result<()> {
        self.sandbox()
            .in_network(|| net::nft("flush chain bridge cut forward\n"))??;
        Ok(())
    }

    /// Status and reason of a node's condition Ready.
    fn node_condition(&self, name: &str) -> anyhow::Result<(String, String)> {
        let node = self.get(&["node", name])?;
        Ok(condition(&node, "Ready"))
    }

    /// Phase, containers' states and events of a pod, for who waits in vain.
    fn pod_story(&self, pod: &Value) -> String {
        let (name, namespace) = (&pod["metadata"]["name"], &pod["metadata"]["namespace"]);
        let field = format!(
            "--field-selector=involvedObject.name={}",
            name.as_str().unwrap_or_default()
        );
        let namespace = namespace.as_str().unwrap_or_default();
        let events = self.kubectl(&["get", "events", "--namespace", namespace, &field, "--no-headers"]);
        format!(
            "phase {}, {}, containers {}, events:\n{}",
            pod["status"]["phase"],
            condition(pod, "Ready").1,
            pod["status"]["containerStatuses"],
            events.unwrap_or_else(|error| format!("{error:#}"))
        )
    }

    /// Manifests of all local volumes, and of the classes that datastores have.
    fn volumes(&self) -> anyhow::Result<String> {
        let classes: &[&str] = if self.shared.options.datastores {
            &datastores::CLASSES
        } else {
            &[]
        };
        let mut items: Vec<Value> = classes.iter().map(|class| datastores::storage_class(class)).collect();
        for node in &self.nodes {
            let name = node.name();
            for number in 1..=self.shared.options.volumes_per_node {
                let folder = format!("volume-{number}");
                let path = Path::new(plan::VOLUMES_FOLDER).join(&folder);
                items.push(volume(&name, &format!("{name}-{folder}"), "local", &path));
                for class in classes {
                    let path = datastores::mount_point(class).join(&folder);
                    items.push(volume(&name, &format!("{name}-{class}-{number}"), class, &path));
                }
            }
        }
        Ok(serde_json::to_string(
            &json!({"apiVersion": "v1", "kind": "List", "items": items}),
        )?)
    }
}

/// Manifest of a node's volume.
fn volume(node: &str, name: &str, class: &str, path: &Path) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "10Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": class,
            "local": {"path": path},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
            ]}]}},
        },
    })
}

/// Networks around the nodes: bridges, routes to the pods, the address for a proxy.
fn make_outside(sandbox: &Arc<Sandbox>, options: &Options) -> anyhow::Result<()> {
    make_networks(sandbox)?;
    let front = plan::api_front_address();
    let mut lines = format!("address add {front}/24 dev {}\n", Network::Management.bridge());
    for plan in options.plans() {
        let gateway = plan.address(Network::Management);
        lines += &format!("route add {} via {gateway}\n", plan.pods());
    }
    sandbox.in_network(|| {
        net::ip(&lines)?;
        net::nft("table bridge cut {\n chain forward { type filter hook forward priority 0; }\n}\n")
    })??;
    sandbox.run("sh", &["-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])?;
    Ok(())
}

/// kubectl as it runs for a cluster whose folder this is.
fn kubectl_command(programs: &Path, folder: &Path, kubeconfig: &Path) -> Command {
    let mut command = Command::new(programs.join("kubectl"));
    command
        .arg(format!("--kubeconfig={}", kubeconfig.display()))
        .arg(format!("--cache-dir={}", folder.join("kubectl").display()));
    command
}

/// Status of a condition (`Unknown` if there is none), and its reason and message.
fn condition(object: &Value, kind: &str) -> (String, String) {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.and_then(|all| all.iter().find(|one| one["type"] == kind));
    let text = |name: &str| found.and_then(|one| one[name].as_str()).unwrap_or_default().to_owned();
    let status = match text("status") {
        empty if empty.is_empty() => "Unknown".to_owned(),
        status => status,
    };
    (
        status,
        format!("{} {}", text("reason"), text("message")).trim().to_owned(),
    )
}

/// The last lines of a log.
fn log_end(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}
