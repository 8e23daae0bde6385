//! A node: a machine of one of two kinds with containerd, kubelet and kube-proxy on it.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::cgroup::Groups;
use super::control_plane::{second_api_server, write_second_api_server};
use super::emulated::Emulated;
use super::images;
use super::native::Native;
use super::pki::{Authority, Subject};
use super::plan::{KIND_LABEL, NodeKind, NodePlan, Options, api_url};
use super::wait::{Hopeless, wait_for};
use crate::lab::image::Image;
use crate::lab::{Network, Sandbox};

/// Long enough for a busy machine; nothing is judged by it.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// Of the node-daemon of every node.
pub(super) const DAEMON_SOCKET: &str = "/var/lib/ftvm/daemon.sock";
/// `f_type` of overlayfs, on which containerd cannot put another.
const OVERLAYFS: i64 = 0x794c_7630;

/// File in a node's folder: its containerd has the image of every pod's sandbox.
const HAS_PAUSE_IMAGE: &str = "has-pause-image";

/// What all nodes of a cluster share.
pub(super) struct Shared {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) programs: PathBuf,
    pub(super) options: Options,
    /// Archive of the image of every pod's sandbox.
    pub(super) pause: PathBuf,
}

/// What the machines of a cluster's nodes are made of.
pub(super) struct Material {
    /// Control groups of this machine, for native nodes.
    pub(super) groups: Arc<Groups>,
    /// Emulated machines' system, and the disk that each one's own begins as: it has the images in its containerd.
    pub(super) emulated: Option<(Image, PathBuf)>,
}

/// A program that makes a machine a node, or runs on it as a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeProgram {
    /// Runs containers; they go on without it.
    Containerd,
    /// Reports the node and starts its pods; they go on without it.
    Kubelet,
    /// Makes Services work.
    KubeProxy,
    /// The second API server, on its node ([`Options::api_servers`]).
    ApiServer,
}

impl NodeProgram {
    pub(super) const ALL: [Self; 4] = [Self::Containerd, Self::Kubelet, Self::KubeProxy, Self::ApiServer];

    /// Its file's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
            Self::ApiServer => "kube-apiserver",
        }
    }
}

/// What a node runs on. Where it is on, /run/node has the files of the node's folder, /run/programs the cluster's programs; /var/lib and
/// /var/log are what they were when it was killed.
pub(super) trait Machine {
    /// Makes the control group that kubelet gets, without the remains of an earlier life; returns kubelet's name of it.
    fn control_group(&self) -> anyhow::Result<String>;

    /// True from [`Machine::switch_on`] to [`Machine::kill`].
    fn is_running(&self) -> bool;

    /// Switches it on: a new boot id, empty /run; networks, bridge and routes.
    fn switch_on(&self) -> anyhow::Result<()>;

    /// First its links go down, then everything dies. Returns when the links were down.
    fn kill(&self) -> anyhow::Result<Instant>;

    /// Stops everything in time. Returns when it stood.
    fn pause(&self) -> anyhow::Result<Instant>;

    /// Lets it go on.
    fn resume(&self) -> anyhow::Result<()>;

    /// Plugs in or pulls a cable.
    fn set_link(&self, network: Network, up: bool) -> anyhow::Result<()>;

    /// Starts a program, which must not run.
    fn start_program(&self, program: NodeProgram, arguments: &[String]) -> anyhow::Result<()>;

    /// Kills a program and waits for its end.
    fn kill_program(&self, program: NodeProgram) -> anyhow::Result<()>;

    /// A program that has ended by itself, how, and the end of its log.
    fn ended_program(&self) -> anyhow::Result<Option<String>>;

    /// Succeeds once containerd takes requests.
    fn containerd_answers(&self) -> anyhow::Result<()>;

    /// Sends SIGKILL to every process of this program; returns how many and when.
    fn kill_processes(&self, program: &str) -> anyhow::Result<(usize, Instant)>;

    /// Runs a program to its end and returns what it printed; it must succeed.
    fn exec(&self, words: &[&str], input: Option<File>) -> anyhow::Result<Vec<u8>>;

    /// Asks the node-daemon.
    fn ask_daemon(&self, request: &Value, patience: Duration) -> anyhow::Result<Value>;

    /// A file below /var as it is now, on this machine; a copy in `scratch` where it can't be reached otherwise.
    fn file(&self, path: &Path, scratch: &Path) -> anyhow::Result<PathBuf>;

    /// Sees to it that the node's logs are in its folder.
    fn save_logs(&self) -> anyhow::Result<()>;
}

/// A node. Dropping it kills it.
pub struct Node {
    plan: NodePlan,
    folder: PathBuf,
    shared: Arc<Shared>,
    kind: Kind,
}

enum Kind {
    Native(Native),
    Emulated(Box<Emulated>),
}

impl Node {
    /// Prepares a node's folder and machine; it starts with [`Node::start`].
    pub(super) fn new(
        plan: NodePlan,
        folder: PathBuf,
        shared: &Arc<Shared>,
        material: &Material,
        authority: &Authority,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(&folder)?;
        let kind = match (&material.emulated, plan.kind) {
            (Some((system, data)), NodeKind::Emulated) => {
                File::create(folder.join(HAS_PAUSE_IMAGE))?;
                Kind::Emulated(Box::new(Emulated::new(plan, &folder, shared, (system, data))?))
            }
            _ => Kind::Native(Native::new(plan, &folder, shared, &material.groups)?),
        };
        let node = Self {
            plan,
            folder,
            shared: Arc::clone(shared),
            kind,
        };
        node.write_files(authority)
            .with_context(|| format!("cannot prepare node {}", node.name()))?;
        Ok(node)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        self.plan.name()
    }

    /// Its names and addresses.
    #[must_use]
    pub fn plan(&self) -> NodePlan {
        self.plan
    }

    /// What only a native node has.
    ///
    /// # Errors
    /// If it is emulated.
    pub fn native(&self) -> anyhow::Result<&Native> {
        match &self.kind {
            Kind::Native(native) => Ok(native),
            Kind::Emulated(_) => bail!(
                "node {} is emulated: nothing of it is on this machine's kernel",
                self.name()
            ),
        }
    }

    fn machine(&self) -> &dyn Machine {
        match &self.kind {
            Kind::Native(native) => native,
            Kind::Emulated(emulated) => &**emulated,
        }
    }

    /// True from [`Node::start`] to [`Node::kill`].
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.machine().is_running()
    }

    /// Switches it on: a new boot id, empty /run; disks as they were. Returns once its programs run; the API server knows a little later.
    ///
    /// # Errors
    /// If it runs, or a program does not start: then with the end of its log.
    pub fn start(&self) -> anyhow::Result<()> {
        ensure!(!self.is_running(), "node {} runs already", self.name());
        let group = self.machine().control_group()?;
        self.write_kubelet_config(&group)?;
        self.machine().switch_on()?;
        self.start_program(NodeProgram::Containerd)?;
        let marker = self.folder.join(HAS_PAUSE_IMAGE);
        if !marker.exists() {
            self.import_image(&self.shared.pause)?;
            File::create(marker)?;
        }
        self.start_program(NodeProgram::Kubelet)?;
        self.start_program(NodeProgram::KubeProxy)?;
        if self.has_api_server() {
            self.start_program(NodeProgram::ApiServer)?;
        }
        Ok(())
    }

    fn has_api_server(&self) -> bool {
        self.shared.options.has_second_api_server() && self.plan == NodePlan::SECOND_API_SERVER
    }

    /// Pulls its plug: first its links lose their carrier, so that no FIN or RST gets out, then everything on it dies at once. Returns when
    /// the links were down.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill(&self) -> anyhow::Result<Instant> {
        self.machine().kill()
    }

    /// Stops it in time, containers too, and returns when it stood.
    ///
    /// # Errors
    /// If it does not run, or a process does not stop.
    pub fn pause(&self) -> anyhow::Result<Instant> {
        self.machine().pause()
    }

    /// Lets a paused node go on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.machine().resume()
    }

    /// Plugs in or pulls one of its cables.
    ///
    /// # Errors
    /// If it does not run.
    pub fn set_link(&self, network: Network, up: bool) -> anyhow::Result<()> {
        self.machine().set_link(network, up)
    }

    /// Starts one of its programs, which must not run.
    ///
    /// # Errors
    /// If it ends at once, with the end of its log.
    pub fn start_program(&self, program: NodeProgram) -> anyhow::Result<()> {
        self.machine()
            .start_program(program, &self.program_arguments(program))?;
        if program == NodeProgram::Containerd {
            let patience = self.plan.kind.patience(PATIENCE);
            wait_for(&format!("containerd of node {} answers", self.name()), patience, || {
                self.ensure_programs_run()?;
                self.machine().containerd_answers()
            })?;
        }
        Ok(())
    }

    /// Kills one of its programs and waits for its end; nothing else happens to the node.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill_program(&self, program: NodeProgram) -> anyhow::Result<()> {
        self.machine().kill_program(program)
    }

    /// Programs that have ended by themselves, with the ends of their logs.
    ///
    /// # Errors
    /// If it does not run, or one did.
    pub fn ensure_programs_run(&self) -> anyhow::Result<()> {
        match self.machine().ended_program()? {
            Some(how) => Err(Hopeless(format!("node {}: {how}", self.name())).into()),
            None => Ok(()),
        }
    }

    /// Sends SIGKILL to every process of this program on the node; returns how many and when.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn kill_processes(&self, program: &str) -> anyhow::Result<(usize, Instant)> {
        self.machine().kill_processes(program)
    }

    /// Runs a program on the node to its end and returns what it printed.
    ///
    /// # Errors
    /// If the node does not run, or the program fails: with everything that it printed.
    pub fn exec(&self, words: &[&str]) -> anyhow::Result<Vec<u8>> {
        self.machine().exec(words, None)
    }

    /// Asks its node-daemon.
    ///
    /// # Errors
    /// If the node does not run, or its daemon does not answer in time.
    pub fn ask_daemon(&self, request: &Value, patience: Duration) -> anyhow::Result<Value> {
        self.machine()
            .ask_daemon(request, patience)
            .with_context(|| format!("asking the daemon of {}", self.name()))
    }

    /// A file below the node's /var/lib or /var/log as this machine can read it: in its place, or a copy in `scratch`.
    ///
    /// # Errors
    /// If the node has to be asked for it and does not run.
    pub fn file(&self, path: &Path, scratch: &Path) -> anyhow::Result<PathBuf> {
        self.machine().file(path, scratch)
    }

    /// Sees to it that the node's logs are in its folder of the cluster.
    ///
    /// # Errors
    /// If the node has to be asked for them and does not run.
    pub fn save_logs(&self) -> anyhow::Result<()> {
        self.machine().save_logs()
    }

    /// Gives an OCI archive's images to its containerd.
    ///
    /// # Errors
    /// If it is no such archive.
    pub fn import_image(&self, archive: &Path) -> anyhow::Result<()> {
        let file = File::open(archive).with_context(|| format!("cannot read {}", archive.display()))?;
        let words = ["/run/programs/ctr", "--namespace", "k8s.io", "images", "import", "-"];
        self.machine()
            .exec(&words, Some(file))
            .with_context(|| format!("node {} cannot import {}", self.name(), archive.display()))?;
        Ok(())
    }

    fn write_files(&self, authority: &Authority) -> anyhow::Result<()> {
        fs::create_dir_all(self.folder.join("cni"))?;
        let file = |name: &str| self.folder.join(name);
        let (name, address) = (self.name(), self.plan.address(Network::Management));
        let url = api_url(self.shared.options.api_advertised());
        let user = format!("system:node:{name}");
        fs::copy(authority.file("ca.crt"), file("ca.crt"))?;
        authority.server(&file("kubelet"), &user, &[&name], &[address.into()])?;
        let kubelet = Subject {
            user: &user,
            group: Some("system:nodes"),
        };
        authority.kubeconfig(&file("kubelet.kubeconfig"), &url, &kubelet)?;
        let proxy = Subject {
            user: "system:kube-proxy",
            group: None,
        };
        authority.kubeconfig(&file("kube-proxy.kubeconfig"), &url, &proxy)?;
        let native = matches!(self.kind, Kind::Native(_));
        let snapshotter = if native && rustix::fs::statfs(&self.folder)?.f_type == OVERLAYFS {
            "native"
        } else {
            "overlayfs"
        };
        let containerd = include_str!("../../cluster/containerd.toml")
            .replace("{SNAPSHOTTER}", snapshotter)
            .replace("{SANDBOX}", images::PAUSE);
        fs::write(file("containerd.toml"), containerd)?;
        let proxy = include_str!("../../cluster/kube-proxy.yaml").replace("{NODE}", &name);
        fs::write(file("kube-proxy.yaml"), proxy)?;
        let pods = include_str!("../../cluster/cni.json").replace("{PODS}", &self.plan.pods());
        fs::write(file("cni/10-pods.conflist"), pods)?;
        if self.has_api_server() {
            write_second_api_server(&self.folder, authority)?;
        }
        // No names are looked up outside of the cluster.
        fs::write(file("resolv.conf"), "")?;
        Ok(())
    }

    fn write_kubelet_config(&self, group: &str) -> anyhow::Result<()> {
        let grace = self.shared.options.node_grace.as_secs();
        let config = include_str!("../../cluster/kubelet.yaml")
            .replace("{CGROUP}", group)
            .replace("{STATUS}", &format!("{}ms", grace * 1000 / 4))
            .replace("{LEASE}", &grace.to_string());
        Ok(fs::write(self.folder.join("kubelet.yaml"), config)?)
    }

    fn program_arguments(&self, program: NodeProgram) -> Vec<String> {
        let words: Vec<String> = match program {
            NodeProgram::Containerd => ["--config", "/run/node/containerd.toml"].map(str::to_owned).into(),
            NodeProgram::Kubelet => vec![
                "--config=/run/node/kubelet.yaml".to_owned(),
                "--kubeconfig=/run/node/kubelet.kubeconfig".to_owned(),
                format!("--hostname-override={}", self.name()),
                format!("--node-ip={}", self.plan.address(Network::Management)),
                format!(
                    "--node-labels=topology.kubernetes.io/zone={},{KIND_LABEL}={}",
                    self.plan.zone(),
                    self.plan.kind.name()
                ),
            ],
            NodeProgram::KubeProxy => vec!["--config=/run/node/kube-proxy.yaml".to_owned()],
            NodeProgram::ApiServer => second_api_server(Path::new("/run/node"), &self.shared.options),
        };
        words
    }
}

/// Where the node's programs look for others: the cluster's own before the machine's.
pub(super) fn exec_path() -> &'static str {
    "/run/programs:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}
