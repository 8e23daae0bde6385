//! A native node's machine: namespaces and control groups of its own on this machine's kernel.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::cgroup::Groups;
use super::datastores;
use super::log_end;
use super::node::{DAEMON_SOCKET, Machine, NodeProgram, PATIENCE, Shared, exec_path};
use super::plan::{CLIENT_BRIDGE, NodePlan, VOLUMES_FOLDER};
use super::wait::wait_for;
use crate::demo::daemon;
use crate::hosts::disk::Volume;
use crate::hosts::namespace::{self, Init};
use crate::hosts::{HostProcess, ip_inside, net, new_boot_id, processes};
use crate::lab::{NETWORKS, Network};

/// The machine. Dropping it kills it.
pub struct Native {
    plan: NodePlan,
    folder: PathBuf,
    shared: Arc<Shared>,
    groups: Arc<Groups>,
    life: Mutex<Option<Life>>,
}

/// What there is from a start to a kill.
struct Life {
    programs: BTreeMap<NodeProgram, HostProcess>,
    init: Init,
}

/// Processes that stand still until this is dropped.
pub struct Stopped(Vec<OwnedFd>);

impl Drop for Stopped {
    fn drop(&mut self) {
        for process in &self.0 {
            // One that has ended meanwhile can't go on.
            namespace::signal(process, libc::SIGCONT).ok();
        }
    }
}

impl Native {
    /// Prepares it in the node's folder, which gets `lib` (its /var/lib) and `log` (its /var/log).
    pub(super) fn new(
        plan: NodePlan,
        folder: &Path,
        shared: &Arc<Shared>,
        groups: &Arc<Groups>,
    ) -> anyhow::Result<Self> {
        let this = Self {
            plan,
            folder: folder.to_owned(),
            shared: Arc::clone(shared),
            groups: Arc::clone(groups),
            life: Mutex::new(None),
        };
        for folder in ["lib/kubelet", "log"] {
            fs::create_dir_all(this.folder.join(folder))?;
        }
        for number in 1..=this.shared.options.volumes_per_node {
            fs::create_dir_all(this.volume_folder(number))?;
        }
        if this.shared.options.datastores {
            for class in datastores::CLASSES {
                fs::create_dir_all(this.kept(&datastores::mount_point(class)))?;
            }
            datastores::make_images(&this.folder)?;
        }
        Ok(this)
    }

    /// A function that moves the thread that calls it into the node's network namespace, for good.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn entrance(&self) -> anyhow::Result<impl FnOnce() -> anyhow::Result<()> + Send + use<>> {
        let network = self.with_life(|life| Ok(File::open(format!("/proc/{}/ns/net", life.init.pid()))?))?;
        Ok(move || Ok(namespace::enter_network(&network)?))
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

    /// Stops a program in the node's containers in time, and nothing else of the node, until what is returned is dropped.
    ///
    /// # Errors
    /// If the node does not run, or no such program on it.
    pub fn stop_in_pods(&self, program: &str) -> anyhow::Result<Stopped> {
        let init = self.with_life(|life| Ok(life.init.pid()))?;
        let stopped = Stopped(processes::stop_below(init, program)?);
        ensure!(
            !stopped.0.is_empty(),
            "no {program} runs in the pods of {}",
            self.name()
        );
        Ok(stopped)
    }

    /// Its datastore of a class, for as long as it runs. `guard` is where [`crate::hosts::thaw::guard`] listens.
    ///
    /// # Errors
    /// If the node does not run or has no datastores, or no guard listens.
    pub fn datastore(&self, class: &str, guard: &Path) -> anyhow::Result<Volume> {
        ensure!(
            self.shared.options.datastores && datastores::CLASSES.contains(&class),
            "node {} has no datastore {class}",
            self.name()
        );
        Volume::mounted(self.in_node(beneath_root(&datastores::mount_point(class)))?, guard)
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

    fn name(&self) -> String {
        self.plan.name()
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

    fn program_log(&self, program: NodeProgram) -> PathBuf {
        self.folder.join("log").join(program.name()).with_extension("log")
    }

    /// A file of the node, as this process reaches it.
    fn in_node(&self, path: impl AsRef<Path>) -> anyhow::Result<PathBuf> {
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
        self.run_with_input(command, Stdio::null()).map(drop)
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

impl Machine for Native {
    fn control_group(&self) -> anyhow::Result<String> {
        self.groups.renew_node(&self.name())
    }

    fn is_running(&self) -> bool {
        self.lock().is_some()
    }

    fn switch_on(&self) -> anyhow::Result<()> {
        let name = self.name();
        let boot_id = new_boot_id(&self.folder, &name)?;
        // Below the lab's process ids, so that it ends with the lab.
        let born = self.shared.sandbox.launch(move || Init::bear(&name, &boot_id))??;
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
            .env("VOLUMES", self.shared.options.volumes_per_node.to_string())
            .env("CGROUPS", self.groups.mount_script());
        self.run_with_input(set_up, Stdio::null()).map(drop)
    }

    fn kill(&self) -> anyhow::Result<Instant> {
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

    /// Its kernel, so also its TCP, goes on.
    fn pause(&self) -> anyhow::Result<Instant> {
        self.signal_all("STOP")?;
        let at = Instant::now();
        wait_for(&format!("node {} stands still", self.name()), PATIENCE, || {
            let moving = self.moving_processes()?;
            ensure!(moving.is_empty(), "{moving:?} go on");
            Ok(())
        })?;
        Ok(at)
    }

    fn resume(&self) -> anyhow::Result<()> {
        self.signal_all("CONT")
    }

    fn set_link(&self, network: Network, up: bool) -> anyhow::Result<()> {
        let port = self.plan.port(network);
        self.shared.sandbox.in_network(|| net::set_link(&port, up))??;
        Ok(())
    }

    fn start_program(&self, program: NodeProgram, arguments: &[String]) -> anyhow::Result<()> {
        let name = program.name();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.program_log(program))?;
        let mut command = Command::new("/run/programs".to_owned() + "/" + name);
        command
            .args(arguments)
            .env("PATH", exec_path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.with_life(|life| {
            ensure!(!life.programs.contains_key(&program), "{name} runs already");
            let started = namespace::start_inside(&life.init, command)?;
            let process = HostProcess::new(format!("{name} on {}", self.name()), started);
            life.programs.insert(program, process);
            Ok(())
        })
    }

    fn kill_program(&self, program: NodeProgram) -> anyhow::Result<()> {
        let mut process = self.with_life(|life| {
            life.programs
                .remove(&program)
                .with_context(|| format!("{} does not run on {}", program.name(), self.name()))
        })?;
        process.signal(libc::SIGKILL)?;
        process.wait()?;
        Ok(())
    }

    fn ended_program(&self) -> anyhow::Result<Option<String>> {
        for program in NodeProgram::ALL {
            let ended = self.with_life(|life| match life.programs.get_mut(&program) {
                Some(process) => Ok(process.try_wait()?),
                None => Ok(None),
            })?;
            if let Some(status) = ended {
                let end = log_end(&self.program_log(program));
                return Ok(Some(format!("{} ended ({status}):\n{end}", program.name())));
            }
        }
        Ok(None)
    }

    fn containerd_answers(&self) -> anyhow::Result<()> {
        let socket = self.in_node("run/containerd/containerd.sock")?;
        UnixStream::connect(&socket).with_context(|| format!("{}", socket.display()))?;
        Ok(())
    }

    fn kill_processes(&self, program: &str) -> anyhow::Result<(usize, Instant)> {
        let init = self.with_life(|life| Ok(life.init.pid()))?;
        Ok(processes::kill(init, program)?)
    }

    fn exec(&self, words: &[&str], input: Option<File>) -> anyhow::Result<Vec<u8>> {
        let (program, arguments) = words.split_first().context("a command without a program")?;
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", exec_path());
        let output = self.run_with_input(command, input.map_or_else(Stdio::null, Into::into))?;
        Ok(output.stdout)
    }

    fn ask_daemon(&self, request: &Value, patience: Duration) -> anyhow::Result<Value> {
        let socket = self.in_node(DAEMON_SOCKET.trim_start_matches('/'))?;
        Ok(daemon::ask(&socket, request, patience)?)
    }

    /// It lies on this machine, and what is on a datastore in a file system that is mounted in the node alone.
    fn file(&self, path: &Path, _scratch: &Path) -> anyhow::Result<PathBuf> {
        if self.shared.options.datastores {
            self.in_node(beneath_root(path))
        } else {
            Ok(self.kept(path))
        }
    }

    /// They lie in the node's folder.
    fn save_logs(&self) -> anyhow::Result<()> {
        Ok(())
    }
}

/// A path of a node, from its root on.
fn beneath_root(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

impl Drop for Native {
    fn drop(&mut self) {
        if self.is_running()
            && let Err(error) = self.kill()
        {
            eprintln!("cluster: cannot take node {} down: {error:#}", self.name());
        }
    }
}
