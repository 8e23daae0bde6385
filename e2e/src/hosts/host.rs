//! The hosts themselves, and what can be done to them.
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{HostsError, ProcessInfo, io as failed, namespace, net, outer, processes};

/// A process stands still at the end of the system call that it is in, such as a flush of a busy disk.
const STANDSTILL: Duration = Duration::from_secs(120);

/// What a lab consists of.
#[derive(Clone, Debug)]
pub struct LabPlan {
    /// Folder for boot ids and whatever the user of the lab keeps per host; must exist.
    pub folder: PathBuf,
    /// The hosts, `h1` onwards in tests and demonstrations.
    pub hosts: Vec<HostPlan>,
    /// Address of the client on the client network.
    pub client_address: Ipv4Addr,
    /// Prefix length of both networks.
    pub prefix: u8,
}

/// One host.
#[derive(Clone, Debug)]
pub struct HostPlan {
    /// Its name; at most 8 characters, because links are named after it.
    pub name: String,
    /// Its address on the replication network.
    pub replication_address: Ipv4Addr,
}

impl LabPlan {
    /// Three hosts, `h1` to `h3`, at 10.99.0.1 onwards, and a client at 10.77.0.1.
    pub fn three_hosts(folder: impl Into<PathBuf>) -> Self {
        let host = |n: u8| HostPlan {
            name: format!("h{n}"),
            replication_address: Ipv4Addr::new(10, 99, 0, n),
        };
        Self {
            folder: folder.into(),
            hosts: (1..=3).map(host).collect(),
            client_address: Ipv4Addr::new(10, 77, 0, 1),
            prefix: 24,
        }
    }
}

/// Both networks, the client and the hosts. Dropping it ends them all.
#[derive(Debug)]
pub struct Lab {
    hosts: Vec<Host>,
    client: namespace::Init,
}

/// Which packets between two hosts a cut drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutDirection {
    /// In both directions.
    Both,
    /// Only those from the first host to the second.
    FirstToSecond,
}

impl Lab {
    /// Bridge of a host that joins the guest's tap with the client network.
    pub const GUEST_BRIDGE: &str = "guest";
    /// A host's link on the client network, as it sees it.
    pub const CLIENT_LINK: &str = "client0";
    /// A host's link on the replication network, as it sees it.
    pub const REPLICATION_LINK: &str = "ft0";

    /// Builds networks, client and hosts. Must be called inside outer namespaces.
    pub fn new(plan: &LabPlan) -> Result<Self, HostsError> {
        if !outer::inside() {
            return Err(HostsError::NotInside);
        }
        let bridge = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";
        net::ip(&format!(
            "link add client {bridge}\nlink add ft {bridge}\nlink set client up\nlink set ft up\n"
        ))?;
        net::nft("table bridge cut {\n chain forward { type filter hook forward priority 0; }\n}\n")?;
        let client = namespace::Init::start("client", &new_boot_id(&plan.folder, "client")?)?;
        net::ip(&format!(
            "link add port-client type veth peer name client0 netns {}\n",
            client.pid()
        ))?;
        net::ip("link set port-client master client up\n")?;
        let (address, prefix) = (plan.client_address, plan.prefix);
        ip_inside(
            &client,
            &format!("link set lo up\naddress add {address}/{prefix} dev client0\nlink set client0 up\n"),
        )?;
        let hosts = plan
            .hosts
            .iter()
            .map(|host| Host::new(host, plan))
            .collect::<Result<_, _>>()?;
        Ok(Self { hosts, client })
    }

    /// The hosts, in the plan's order.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// A host by its place in the plan.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }

    /// A function that moves the thread that calls it into the client's network namespace, for good.
    pub fn client_entrance(&self) -> Result<impl FnOnce() -> Result<(), HostsError> + Send + use<>, HostsError> {
        let network = network_of(self.client.pid())?;
        Ok(move || namespace::enter_network(&network))
    }

    /// Drops packets between two hosts on the replication network until [`Lab::mend_links`].
    pub fn cut_link(&self, first: usize, second: usize, direction: CutDirection) -> Result<(), HostsError> {
        let (a, b) = (
            self.hosts[first].replication_port(),
            self.hosts[second].replication_port(),
        );
        let mut script = format!("add rule bridge cut forward iifname \"{a}\" oifname \"{b}\" drop\n");
        if direction == CutDirection::Both {
            script += &format!("add rule bridge cut forward iifname \"{b}\" oifname \"{a}\" drop\n");
        }
        net::nft(&script)
    }

    /// Drops what hosts send to or from this TCP port, until [`Lab::mend_links`].
    pub fn cut_port(&self, port: u16) -> Result<(), HostsError> {
        let rule = |side: &str| format!("add rule bridge cut forward ether type ip tcp {side} {port} drop\n");
        net::nft(&(rule("dport") + &rule("sport")))
    }

    /// Takes back every [`Lab::cut_link`] and [`Lab::cut_port`].
    pub fn mend_links(&self) -> Result<(), HostsError> {
        net::nft("flush chain bridge cut forward\n")
    }
}

/// A host. Dropping it kills it.
#[derive(Debug)]
pub struct Host {
    plan: HostPlan,
    prefix: u8,
    lab_folder: PathBuf,
    init: Mutex<Option<namespace::Init>>,
}

impl Host {
    fn new(plan: &HostPlan, lab: &LabPlan) -> Result<Self, HostsError> {
        let host = Self {
            plan: plan.clone(),
            prefix: lab.prefix,
            lab_folder: lab.folder.clone(),
            init: Mutex::new(None),
        };
        host.start()?;
        Ok(host)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// Its address on the replication network.
    pub fn replication_address(&self) -> Ipv4Addr {
        self.plan.replication_address
    }

    /// The outer end of its link to the client network, a port of the bridge there.
    pub fn client_port(&self) -> String {
        format!("{}-client", self.plan.name)
    }

    /// The outer end of its link to the replication network.
    pub fn replication_port(&self) -> String {
        format!("{}-ft", self.plan.name)
    }

    /// True until [`Host::kill`].
    pub fn is_running(&self) -> bool {
        self.lock().is_some()
    }

    /// Starts the host, with a new boot id and nothing running.
    pub fn start(&self) -> Result<(), HostsError> {
        if self.is_running() {
            return Err(self.state_error("it is running already"));
        }
        let init = namespace::Init::start(&self.plan.name, &new_boot_id(&self.lab_folder, &self.plan.name)?)?;
        let pid = init.pid();
        for (port, inner, bridge) in [
            (self.client_port(), Lab::CLIENT_LINK, "client"),
            (self.replication_port(), Lab::REPLICATION_LINK, "ft"),
        ] {
            net::ip(&format!("link add {port} type veth peer name {inner} netns {pid}\n"))?;
            net::ip(&format!("link set {port} master {bridge} up\n"))?;
        }
        let (address, prefix, guest) = (self.plan.replication_address, self.prefix, Lab::GUEST_BRIDGE);
        ip_inside(
            &init,
            &format!(
                "link set lo up\naddress add {address}/{prefix} dev ft0\nlink set ft0 up\n\
                 link add {guest} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
                 link set {guest} up\nlink set client0 master {guest} up\n"
            ),
        )?;
        *self.lock() = Some(init);
        Ok(())
    }

    /// Starts a program on this host. Its working directory is `/`, of which the host sees the same files as everyone.
    pub fn spawn(&self, name: &str, command: Command) -> Result<HostProcess, HostsError> {
        let started = self.with_init(|init| namespace::start_inside(init, command))?;
        Ok(HostProcess::new(format!("{name} on {}", self.name()), started))
    }

    /// Runs a program on this host to its end; an exit code other than 0 is an error with everything that it printed.
    pub fn run(&self, mut command: Command) -> Result<Output, HostsError> {
        let line = format!("{command:?}");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let started = self.with_init(|init| namespace::start_inside(init, command))?;
        let output = started
            .keeper
            .wait_with_output()
            .map_err(failed(format!("waiting for {line}")))?;
        if !output.status.success() {
            let text = [output.stdout, output.stderr].concat();
            let output_text = String::from_utf8_lossy(&text).into_owned();
            return Err(HostsError::Command {
                command: line,
                status: output.status,
                output: output_text,
            });
        }
        Ok(output)
    }

    /// A function that moves the thread that calls it into this host's network namespace, for good.
    pub fn entrance(&self) -> Result<impl FnOnce() -> Result<(), HostsError> + Send + use<>, HostsError> {
        let network = self.with_init(|init| network_of(init.pid()))?;
        Ok(move || namespace::enter_network(&network))
    }

    /// Sends a whole Ethernet frame out of its link to the client network.
    pub fn send_frame(&self, frame: Vec<u8>) -> Result<(), HostsError> {
        let entrance = self.entrance()?;
        // A thread that has entered stays there.
        let sent = std::thread::spawn(move || {
            entrance()?;
            net::send_frame(Lab::CLIENT_LINK, &frame)
        });
        sent.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A persistent tap of this name, joined to the guest's bridge.
    pub fn add_tap(&self, tap: &str) -> Result<(), HostsError> {
        let guest = Lab::GUEST_BRIDGE;
        let lines = format!("tuntap add dev {tap} mode tap\nlink set {tap} master {guest} up\n");
        self.with_init(|init| ip_inside(init, &lines))
    }

    /// Pulls the plug: first the links lose their carrier, so that no farewell (FIN, RST) leaves; then every process
    /// dies at once. Returns the moment at which the links were down.
    pub fn kill(&self) -> Result<Instant, HostsError> {
        let (client, ft) = (self.client_port(), self.replication_port());
        let Some(mut init) = self.lock().take() else {
            return Err(self.state_error("it is not running"));
        };
        net::set_link(&client, false)?;
        net::set_link(&ft, false)?;
        let at = Instant::now();
        init.kill();
        // The links of a dead host go when its namespace is torn down, which the kernel does later: not waiting for it
        // lets the next start find the old names.
        for port in [client, ft] {
            if net::link_index(&port).is_ok() {
                net::ip(&format!("link delete {port}\n")).or_else(|error| match net::link_index(&port) {
                    Ok(_) => Err(error),
                    Err(_) => Ok(()),
                })?;
            }
        }
        Ok(at)
    }

    /// Stops every process on this host (SIGSTOP), in one step, and waits until they have stopped. Its kernel, so also
    /// its TCP, goes on. Returns the moment at which the signal had been sent.
    pub fn freeze(&self) -> Result<Instant, HostsError> {
        self.signal_all("STOP")?;
        let at = Instant::now();
        let deadline = at + STANDSTILL;
        loop {
            let all = self.processes()?;
            let running: Vec<_> = all.iter().filter(|process| !process.stands_still(&all)).collect();
            if running.is_empty() {
                return Ok(at);
            }
            if Instant::now() > deadline {
                return Err(self.state_error(format!("{running:?} did not stop within {STANDSTILL:?} of SIGSTOP")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets the processes of a frozen host go on.
    pub fn thaw(&self) -> Result<Instant, HostsError> {
        self.signal_all("CONT")?;
        Ok(Instant::now())
    }

    /// `kill -1` inside the pid namespace reaches all its processes but the init and the sender, without a gap through
    /// which a fork could slip.
    fn signal_all(&self, signal: &str) -> Result<(), HostsError> {
        let mut command = Command::new("/bin/sh");
        // It fails where there is nobody to signal; who asked looks at the processes himself.
        command.args(["-c", &format!("kill -{signal} -1 2>/dev/null; exit 0")]);
        self.run(command).map(drop)
    }

    /// The processes on this host, without its init.
    pub fn processes(&self) -> Result<Vec<ProcessInfo>, HostsError> {
        processes::all(self.with_init(|init| Ok(init.pid()))?)
    }

    /// The processes of this host whose program has this file name.
    pub fn processes_named(&self, program: &str) -> Result<Vec<ProcessInfo>, HostsError> {
        processes::named(self.with_init(|init| Ok(init.pid()))?, program)
    }

    /// Sends SIGKILL to every process of this program; returns how many and when.
    pub fn kill_program(&self, program: &str) -> Result<(usize, Instant), HostsError> {
        processes::kill(self.with_init(|init| Ok(init.pid()))?, program)
    }

    fn lock(&self) -> MutexGuard<'_, Option<namespace::Init>> {
        self.init.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_init<T>(&self, work: impl FnOnce(&namespace::Init) -> Result<T, HostsError>) -> Result<T, HostsError> {
        self.lock()
            .as_ref()
            .map_or_else(|| Err(self.state_error("it is not running")), work)
    }

    fn state_error(&self, what: impl Into<String>) -> HostsError {
        HostsError::State {
            host: self.plan.name.clone(),
            what: what.into(),
        }
    }
}

impl Drop for Lab {
    /// Hosts die, and both networks go, so that another lab can be made. What fails goes with the outer namespaces.
    fn drop(&mut self) {
        for host in self.hosts.iter().filter(|host| host.is_running()) {
            host.kill().ok();
        }
        self.client.kill();
        for link in ["port-client", "client", "ft"] {
            net::ip(&format!("link delete {link}\n")).ok();
        }
        net::nft("delete table bridge cut\n").ok();
    }
}

/// A program started by [`Host::spawn`]. Dropping it kills it.
#[derive(Debug)]
pub struct HostProcess {
    name: String,
    started: namespace::Started,
}

impl HostProcess {
    pub(crate) fn new(name: String, started: namespace::Started) -> Self {
        Self { name, started }
    }

    /// Its pid as this process sees it.
    pub fn pid(&self) -> i32 {
        self.started.pid
    }

    /// Sends a signal; a process that has ended is not an error.
    pub fn signal(&self, signal: libc::c_int) -> Result<(), HostsError> {
        match self
            .started
            .pidfd
            .as_ref()
            .map(|pidfd: &OwnedFd| namespace::signal(pidfd, signal))
        {
            Some(Err(error)) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(failed(format!("signalling {}", self.name))(error))
            }
            _ => Ok(()),
        }
    }

    /// Its exit status if it has ended; a program killed by signal N has exit code 128 + N.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, HostsError> {
        self.started
            .keeper
            .try_wait()
            .map_err(failed(format!("waiting for {}", self.name)))
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus, HostsError> {
        self.started
            .keeper
            .wait()
            .map_err(failed(format!("waiting for {}", self.name)))
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL).ok();
        self.started.keeper.wait().ok();
    }
}

/// Runs `ip -batch` on lines of `ip` commands in a host's network namespace.
pub(crate) fn ip_inside(init: &namespace::Init, lines: &str) -> Result<(), HostsError> {
    // `ip` looks at the namespace that it is started in; IPv6's own chatter is switched off there first.
    let script = format!(
        "for f in all default; do p=/proc/sys/net/ipv6/conf/$f/disable_ipv6; [ ! -e $p ] || echo 1 >$p; done\n\
         exec ip -batch - <<'END'\n{lines}END\n"
    );
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let started = namespace::start_inside(init, command)?;
    let output = started
        .keeper
        .wait_with_output()
        .map_err(failed("waiting for `ip` in a host"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(HostsError::Command {
        command: format!("ip, in a host:\n{lines}"),
        status: output.status,
        output: text,
    })
}

/// A fresh boot id for a host that starts, in a file that is mounted over the kernel's.
pub(crate) fn new_boot_id(folder: &Path, host: &str) -> Result<PathBuf, HostsError> {
    let path = folder.join(format!("{host}.boot-id"));
    let id =
        fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(failed("reading a random UUID from the kernel"))?;
    // The old file may be mounted in a host that is still going away: replace it instead of writing into it.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed(format!("removing {}", path.display()))(error));
        }
        _ => fs::write(&path, id).map_err(failed(format!("writing {}", path.display())))?,
    }
    Ok(path)
}

fn network_of(pid: i32) -> Result<fs::File, HostsError> {
    fs::File::open(format!("/proc/{pid}/ns/net")).map_err(failed("opening the client's network namespace"))
}
