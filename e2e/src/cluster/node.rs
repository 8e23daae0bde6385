//! A native node: containerd, kubelet and kube-proxy in namespaces and control groups of their own.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::cgroup::Groups;
use super::pki::{Authority, Subject};
use super::plan::{CLIENT_BRIDGE, NodePlan, Options, VOLUMES_FOLDER, api_url};
use super::wait::{Hopeless, wait_for};
use super::{images, log_end};
use crate::hosts::namespace::{self, Init};
use crate::hosts::{HostProcess, ip_inside, net, new_boot_id, processes};
use crate::lab::{NETWORKS, Network, Sandbox};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(120);
/// `f_type` of overlayfs, on which containerd cannot put another.
const OVERLAYFS: i64 = 0x794c_7630;

/// What all nodes of a cluster share.
pub(super) struct Shared {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) programs: PathBuf,
    pub(super) groups: Groups,
    pub(super) options: Options,
    /// Archive of the image of every pod's sandbox.
    pub(super) pause: PathBuf,
}

/// A program that makes a machine a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeProgram {
    /// Runs containers; they go on without it.
    Containerd,
    /// Reports the node and starts its pods; they go on without it.
    Kubelet,
    /// Makes Services work.
    KubeProxy,
}

impl NodeProgram {
    const ALL: [Self; 3] = [Self::Containerd, Self::Kubelet, Self::KubeProxy];

    /// Its file's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
        }
    }
}

/// A node. Dropping it kills it.
pub struct Node {
    plan: NodePlan,
    folder: PathBuf,
    shared: Arc<Shared>,
    life: Mutex<Option<Life>>,
}

/// What there is from a start to a kill.
struct Life {
    programs: BTreeMap<NodeProgram, HostProcess>,
    init: Init,
}

impl Node {
    /// Prepares a node's folder; it starts with [`Node::start`].
    pub(super) fn new(
        plan: NodePlan,
        folder: PathBuf,
        shared: &Arc<Shared>,
        authority: &Authority,
    ) -> anyhow::Result<Self> {
        let node = Self {
            plan,
            folder,
            shared: Arc::clone(shared),
            life: Mutex::new(None),
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

    /// Its folder on this machine: its /run/node, with `lib` (its /var/lib) and `log` (its /var/log).
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// True from [`Node::start`] to [`Node::kill`].
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.lock().is_some()
    }

    /// Switches it on: a new boot id, empty /run; disks as they were. Returns once its programs run; the API server knows a little later.
    ///
    /// # Errors
    /// If it runs, or a program does not start: then with the end of its log.
    pub fn start(&self) -> anyhow::Result<()> {
        let name = self.name();
        ensure!(!self.is_running(), "node {name} runs already");
        let group = self.shared.groups.renew_node(&name)?;
        self.write_kubelet_config(&group)?;
        let boot_id = new_boot_id(&self.folder, &name)?;
        let born = {
            let name = name.clone();
            // Below the lab's process ids, so that it ends with the lab.
            self.shared.sandbox.launch(move || Init::bear(&name, &boot_id))??
        };
        let init = born.settle()?;
        self.plug_in(&init)?;
        *self.lock() = Some(Life {
            programs: BTreeMap::new(),
            init,
        });
        let mut set_up = Command::new("sh");
        set_up
            .args(["-c", include_str!("../../cluster/node.sh")])
            .env("FOLDER", &self.folder)
            .env("PROGRAMS", &self.shared.programs)
            .env("CGROUPS", self.shared.groups.mount_script());
        self.run(set_up)?;
        self.start_program(NodeProgram::Containerd)?;
        let marker = self.folder.join("has-pause-image");
        if !marker.exists() {
            self.import_image(&self.shared.pause)?;
            File::create(marker)?;
        }
        self.start_program(NodeProgram::Kubelet)?;
        self.start_program(NodeProgram::KubeProxy)
    }

    /// Pulls its plug: first its links lose their carrier, so that no FIN or RST gets out, then every process dies at once. Returns when
    /// the links were down.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill(&self) -> anyhow::Result<Instant> {
        let mut life = self
            .lock()
            .take()
            .with_context(|| format!("node {} does not run", self.name()))?;
        NETWORKS.iter().try_for_each(|network| self.set_link(*network, false))?;
        let down = Instant::now();
        life.init.kill();
        // The links of a dead node go when the kernel tears its namespace down, which is later.
        for network in NETWORKS {
            let port = self.plan.port(network);
            self.shared.sandbox.in_network(|| {
                net::ip(&format!("link delete {port}\n")).or_else(|error| match net::link_index(&port) {
                    Ok(_) => Err(error),
                    Err(_) => Ok(()),
                })
            })??;
        }
        Ok(down)
    }

    /// Stops every process of the node in time, containers too, and waits until they stand. Its kernel, so also its TCP, goes on.
    ///
    /// # Errors
    /// If it does not run, or a process does not stop.
    pub fn pause(&self) -> anyhow::Result<Instant> {
        self.signal_all("STOP")?;
        let at = Instant::now();
        wait_for(&format!("node {} stands still", self.name()), PATIENCE, || {
            let moving = self.moving_processes()?;
            ensure!(moving.is_empty(), "{moving:?} go on");
            Ok(())
        })?;
        Ok(at)
    }

    /// Lets a paused node go on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal_all("CONT")
    }

    /// Plugs in or pulls one of its cables.
    ///
    /// # Errors
    /// If it does not run.
    pub fn set_link(&self, network: Network, up: bool) -> anyhow::Result<()> {
        let port = self.plan.port(network);
        self.shared.sandbox.in_network(|| net::set_link(&port, up))??;
        Ok(())
    }

    /// Starts one of its programs, which must not run.
    ///
    /// # Errors
    /// If it ends at once, with the end of its log.
    pub fn start_program(&self, program: NodeProgram) -> anyhow::Result<()> {
        let name = program.name();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.program_log(program))?;
        let mut command = Command::new("/run/programs".to_owned() + "/" + name);
        command
            .args(self.program_arguments(program))
            .env("PATH", search_path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.with_life(|life| {
            ensure!(!life.programs.contains_key(&program), "{name} runs already");
            let started = namespace::start_inside(&life.init, command)?;
            let process = HostProcess::new(format!("{name} on {}", self.name()), started);
            life.programs.insert(program, process);
            Ok(())
        })?;
        if program == NodeProgram::Containerd {
            self.wait_for_containerd()?;
        }
        Ok(())
    }

    /// Kills one of its programs and waits for its end; nothing else happens to the node.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill_program(&self, program: NodeProgram) -> anyhow::Result<()> {
        let mut process = self.with_life(|life| {
            life.programs
                .remove(&program)
                .with_context(|| format!("{} does not run on {}", program.name(), self.name()))
        })?;
        process.signal(libc::SIGKILL)?;
        process.wait()?;
        Ok(())
    }

    /// Programs that have ended by themselves, with the ends of their logs.
    ///
    /// # Errors
    /// If it does not run, or one did.
    pub fn ensure_programs_run(&self) -> anyhow::Result<()> {
        for program in NodeProgram::ALL {
            let ended = self.with_life(|life| match life.programs.get_mut(&program) {
                Some(process) => Ok(process.try_wait()?),
                None => Ok(None),
            })?;
            if let Some(status) = ended {
                let end = log_end(&self.program_log(program));
                let (program, node) = (program.name(), self.name());
                return Err(Hopeless(format!("{program} of node {node} ended ({status}):\n{end}")).into());
            }
        }
        Ok(())
    }

    /// Sends SIGKILL to every process of this program on the node; returns how many and when.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn kill_processes(&self, program: &str) -> anyhow::Result<(usize, Instant)> {
        let init = self.with_life(|life| Ok(life.init.pid()))?;
        Ok(processes::kill(init, program)?)
    }

    /// Process ids, as this machine counts them, of a program in the node's containers.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn processes_in_pods(&self, program: &str) -> anyhow::Result<Vec<i32>> {
        let init = self.with_life(|life| Ok(life.init.pid()))?;
        let found = processes::below(init, program)?;
        Ok(found.into_iter().map(|process| process.pid).collect())
    }

    /// Runs a program in the node's namespaces to its end; an exit code other than 0 is an error with everything that it printed.
    ///
    /// # Errors
    /// If the node does not run, or the program fails.
    pub fn run(&self, command: Command) -> anyhow::Result<Output> {
        self.run_with_input(command, Stdio::null())
    }

    /// Starts a program in the node's namespaces; dropping the handle kills it.
    ///
    /// # Errors
    /// If the node does not run, or the program cannot be started.
    pub fn spawn(&self, command: Command) -> anyhow::Result<HostProcess> {
        let name = format!("{} on {}", command.get_program().to_string_lossy(), self.name());
        let started = self.with_life(|life| Ok(namespace::start_inside(&life.init, command)?))?;
        Ok(HostProcess::new(name, started))
    }

    /// A function that moves the thread that calls it into the node's network namespace, for good.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn entrance(&self) -> anyhow::Result<impl FnOnce() -> anyhow::Result<()> + Send + use<>> {
        let network = self.with_life(|life| Ok(File::open(format!("/proc/{}/ns/net", life.init.pid()))?))?;
        Ok(move || Ok(namespace::enter_network(&network)?))
    }

    /// Gives an OCI archive's images to its containerd.
    ///
    /// # Errors
    /// If it is no such archive.
    pub fn import_image(&self, archive: &Path) -> anyhow::Result<()> {
        let mut ctr = Command::new("/run/programs/ctr");
        ctr.args(["--namespace", "k8s.io", "images", "import", "-"])
            .env("PATH", search_path());
        let file = File::open(archive).with_context(|| format!("cannot read {}", archive.display()))?;
        self.run_with_input(ctr, file.into())
            .with_context(|| format!("node {} cannot import {}", self.name(), archive.display()))?;
        Ok(())
    }

    /// The folder of one of its local volumes, on this machine.
    #[must_use]
    pub fn volume_folder(&self, number: u8) -> PathBuf {
        self.kept(&Path::new(VOLUMES_FOLDER).join(format!("volume-{number}")))
    }

    /// A path below the node's /var/lib or /var/log, as this machine reaches it, whether the node runs or not.
    #[must_use]
    pub fn kept(&self, path: &Path) -> PathBuf {
        self.folder.join(path.strip_prefix("/var").unwrap_or(path))
    }

    fn run_with_input(&self, mut command: Command, input: Stdio) -> anyhow::Result<Output> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = self.with_life(|life| Ok(namespace::start_inside(&life.init, command)?))?;
        let output = started.keeper.wait_with_output()?;
        if !output.status.success() {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).trim().to_owned();
            bail!("{name} on node {}: {}: {text}", self.name(), output.status);
        }
        Ok(output)
    }

    /// Cables, addresses and routes.
    fn plug_in(&self, init: &Init) -> anyhow::Result<()> {
        let pid = init.pid();
        for network in NETWORKS {
            let (port, card, bridge) = (self.plan.port(network), network.card(), network.bridge());
            let hardware = self.plan.hardware_address(network);
            self.shared.sandbox.in_network(|| {
                net::ip(&format!(
                    "link add {port} type veth peer name {card} address {hardware} netns {pid}\n\
                     link set {port} master {bridge} up\n"
                ))
            })??;
        }
        let mut lines = format!(
            "link set lo up\n\
             link add {CLIENT_BRIDGE} type bridge forward_delay 0 mcast_snooping 0\n\
             link set {CLIENT_BRIDGE} up\n\
             link set {client} master {CLIENT_BRIDGE} up\n",
            client = Network::Client.card()
        );
        for network in [Network::Management, Network::Replication] {
            let (card, address) = (network.card(), self.plan.address(network));
            lines += &format!("address add {address}/24 dev {card}\nlink set {card} up\n");
        }
        lines += &format!("route add default via {}\n", Network::Management.address(1));
        for other in self.shared.options.plans() {
            if other != self.plan {
                let gateway = other.address(Network::Management);
                lines += &format!("route add {} via {gateway}\n", other.pods());
            }
        }
        Ok(ip_inside(init, &lines)?)
    }

    fn write_files(&self, authority: &Authority) -> anyhow::Result<()> {
        for folder in ["lib/kubelet", "log", "cni"] {
            fs::create_dir_all(self.folder.join(folder))?;
        }
        for number in 1..=self.shared.options.volumes_per_node {
            fs::create_dir_all(self.volume_folder(number))?;
        }
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
        let snapshotter = if rustix::fs::statfs(&self.folder)?.f_type == OVERLAYFS {
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
                format!("--node-labels=topology.kubernetes.io/zone={}", self.plan.zone()),
            ],
            NodeProgram::KubeProxy => vec!["--config=/run/node/kube-proxy.yaml".to_owned()],
        };
        words
    }

    fn program_log(&self, program: NodeProgram) -> PathBuf {
        self.folder.join("log").join(program.name()).with_extension("log")
    }

    fn wait_for_containerd(&self) -> anyhow::Result<()> {
        let socket = self.in_node("run/containerd/containerd.sock")?;
        wait_for(&format!("containerd of node {} answers", self.name()), PATIENCE, || {
            self.ensure_programs_run()?;
            UnixStream::connect(&socket).with_context(|| format!("{}", socket.display()))?;
            Ok(())
        })
    }

    /// A file of the node, as this process reaches it.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn in_node(&self, path: &str) -> anyhow::Result<PathBuf> {
        self.with_life(|life| {
            Ok(Path::new("/proc")
                .join(life.init.pid().to_string())
                .join("root")
                .join(path))
        })
    }

    /// `kill -1` in a process-id namespace reaches all its processes, also those in namespaces below, but its init and the sender.
    fn signal_all(&self, signal: &str) -> anyhow::Result<()> {
        let mut command = Command::new("/bin/sh");
        // It fails where there is nobody to signal; who asked looks at the processes himself.
        command.args(["-c", &format!("kill -{signal} -1 2>/dev/null; exit 0")]);
        self.run(command).map(drop)
    }

    /// Numbers and names of processes that neither stand nor have ended.
    fn moving_processes(&self) -> anyhow::Result<Vec<String>> {
        let mut moving = Vec::new();
        // The node's own /proc has its processes, and those in namespaces below.
        for entry in fs::read_dir(self.in_node("proc")?)? {
            let entry = entry?;
            let pid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            // One that ends while it is looked at does not go on.
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
                continue;
            };
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            if pid.is_some_and(|pid| pid != 1) && !matches!(state, Some('T' | 't' | 'Z' | 'X')) {
                moving.push(stat.split(") ").next().unwrap_or_default().to_owned());
            }
        }
        Ok(moving)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Life>> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_life<T>(&self, work: impl FnOnce(&mut Life) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let mut life = self.lock();
        let life = life
            .as_mut()
            .with_context(|| format!("node {} does not run", self.name()))?;
        work(life)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.is_running()
            && let Err(error) = self.kill()
        {
            eprintln!("cluster: cannot take node {} down: {error:#}", self.name());
        }
    }
}

/// Where the node's programs look for others: the cluster's own before the machine's.
fn search_path() -> &'static str {
    "/run/programs:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}
