//! An emulated machine: QEMU with emulated SVM, a Debian kernel of its own, three network cards, a disk that survives its death.
use std::fs::{self, File};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal};

use super::image::Image;
use super::sandbox::Sandbox;
use super::session::{Finished, Session};
use super::wire::{self, Start};
use super::{NETWORKS, Network, guest};

/// How long a command in a node may take unless told otherwise. Generous: emulation is slow, and slower beside other work.
const COMMAND: Duration = Duration::from_secs(120);
/// How long a node may take to boot: 4 s on an idle machine.
const BOOT: Duration = Duration::from_secs(600);

/// File in the folder of nodes that is the disk with the agent and programs: /lab in each of them.
pub(super) const PAYLOAD: &str = "payload.img";

/// What a node is given.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Size of the disk that is mounted on /data and survives the node's death, in MiB (sparse).
    pub data_mib: u64,
    /// An ext4 image that this disk begins as; then `data_mib` is not looked at.
    pub data_from: Option<PathBuf>,
    /// Raw images that the node sees as further disks, /dev/vdd and on; they survive its death. For seats.
    pub disks: Vec<PathBuf>,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            memory_mib: 1200,
            data_mib: 4096,
            data_from: None,
            disks: Vec::new(),
        }
    }
}

/// A node of a lab. Dropping it kills it.
pub struct Node {
    sandbox: Arc<Sandbox>,
    image: Image,
    folder: PathBuf,
    payload: PathBuf,
    name: String,
    index: u8,
    config: NodeConfig,
    qemu: Mutex<Option<Child>>,
}

impl Node {
    /// A machine that is off, with this system; `index` (1 to 99) decides its addresses. Its disks and logs are in `folder`, which has the
    /// payload. Its taps are made here and live as long as the lab.
    pub(crate) fn new(
        sandbox: &Arc<Sandbox>,
        folder: &std::path::Path,
        image: &Image,
        (name, index): (&str, u8),
        config: NodeConfig,
    ) -> anyhow::Result<Self> {
        let node = Self {
            sandbox: Arc::clone(sandbox),
            image: image.clone(),
            folder: folder.to_path_buf(),
            payload: folder.join(PAYLOAD),
            name: name.to_owned(),
            index,
            config,
            qemu: Mutex::new(None),
        };
        match &node.config.data_from {
            Some(image) => guest::copy_sparse(image, &node.data_disk())?,
            None => File::create(node.data_disk())?.set_len(node.config.data_mib << 20)?,
        }
        for network in NETWORKS {
            let tap = node.tap(network);
            sandbox.run("ip", &["tuntap", "add", &tap, "mode", "tap"])?;
            sandbox.run("ip", &["link", "set", &tap, "master", network.bridge(), "up"])?;
        }
        Ok(node)
    }

    /// The node's host name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's address in a network. On the client network the address is reserved but not configured: guests live there.
    #[must_use]
    pub fn address(&self, network: Network) -> Ipv4Addr {
        network.address(10 + self.index)
    }

    /// The file behind the disk that the node mounts on /data.
    #[must_use]
    pub fn data_disk(&self) -> PathBuf {
        self.folder.join(format!("{}.data.img", self.name))
    }

    /// What the node's kernel and agent wrote to their console since it was first started.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn console(&self) -> anyhow::Result<String> {
        let path = self.console_path();
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Starts the machine (again), with its data disk as it was, and waits until its agent answers.
    ///
    /// # Errors
    /// If it runs already, or does not boot; then the end of its console is in the message.
    pub fn power_on(&self) -> anyhow::Result<()> {
        {
            let mut qemu = self.qemu();
            ensure!(qemu.is_none(), "node {} runs already", self.name);
            for network in NETWORKS {
                self.set_link(network, true)?;
            }
            *qemu = Some(self.sandbox.spawn(self.command()?)?);
        }
        let deadline = Instant::now() + BOOT;
        loop {
            match self.try_run(&["true"], Duration::from_secs(10)) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("node {} does not boot; {}", self.name, self.console_end())));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
            if let Some(qemu) = &mut *self.qemu()
                && let Some(status) = qemu.try_wait()?
            {
                bail!("QEMU of node {} ended ({status}); {}", self.name, self.console_end());
            }
        }
    }

    /// The machine dies at once, as if its plug were pulled: first all its links, so that not even a FIN gets out, then its QEMU.
    ///
    /// Returns when the links were down.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill(&self) -> anyhow::Result<Instant> {
        for network in NETWORKS {
            self.set_link(network, false)?;
        }
        let down = Instant::now();
        let mut qemu = self
            .qemu()
            .take()
            .with_context(|| format!("node {} does not run", self.name))?;
        qemu.kill()?;
        qemu.wait()?;
        Ok(down)
    }

    /// Whether its QEMU runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.qemu()
            .as_mut()
            .is_some_and(|qemu| matches!(qemu.try_wait(), Ok(None)))
    }

    /// Stops the whole machine in time (SIGSTOP to its QEMU), until [`Node::resume`].
    ///
    /// # Errors
    /// If it does not run.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets a paused machine go on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Plugs in or pulls the cable of one network card.
    ///
    /// # Errors
    /// If the tap is gone.
    pub fn set_link(&self, network: Network, up: bool) -> anyhow::Result<()> {
        self.sandbox.run(
            "ip",
            &["link", "set", &self.tap(network), if up { "up" } else { "down" }],
        )?;
        Ok(())
    }

    /// Impairs what the node sends into a network: the words of a netem qdisc, such as `loss 10% delay 5ms`; none mends it.
    ///
    /// # Errors
    /// If tc refuses them.
    pub fn impair(&self, network: Network, netem: &str) -> anyhow::Result<()> {
        let card = network.card();
        if netem.is_empty() {
            self.sh(&format!("tc qdisc del dev {card} root"))?;
        } else {
            self.sh(&format!("tc qdisc replace dev {card} root netem {netem}"))?;
        }
        Ok(())
    }

    /// Runs a command to its end with standard input, whatever its exit code; what it prints meanwhile must be short.
    ///
    /// # Errors
    /// If it cannot be started, or does not end in time.
    pub fn feed(&self, start: &Start, input: &mut dyn Read, timeout: Duration) -> anyhow::Result<Finished> {
        let deadline = Instant::now() + timeout;
        let mut session = self.start(start)?;
        let mut buffer = vec![0; wire::MAX_FRAME];
        loop {
            let count = input.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            session.feed(&buffer[..count])?;
        }
        session.end_input()?;
        session.finish(deadline)
    }

    /// Joins the client network's card to a bridge `br0` inside the node, where guests' taps go.
    ///
    /// # Errors
    /// If it exists.
    pub fn client_bridge(&self) -> anyhow::Result<()> {
        let card = Network::Client.card();
        self.sh(&format!(
            "ip link add br0 type bridge forward_delay 0 mcast_snooping 0; ip link set br0 up; ip link set {card} master br0 up"
        ))?;
        Ok(())
    }

    /// Makes a tap on the bridge `br0`; a VMM in the node gives it to its guest.
    ///
    /// # Errors
    /// If the tap exists, or the bridge does not.
    pub fn client_tap(&self, tap: &str) -> anyhow::Result<()> {
        self.sh(&format!(
            "ip tuntap add {tap} mode tap; ip link set {tap} master br0 up"
        ))?;
        Ok(())
    }

    /// Starts a command and talks to it.
    ///
    /// # Errors
    /// If the agent does not answer or cannot start it.
    pub fn start(&self, start: &Start) -> anyhow::Result<Session> {
        self.start_within(start, COMMAND)
    }

    /// Starts a command that outlives the connection; its output goes to the file `log` in the node. Returns its process id there.
    ///
    /// # Errors
    /// If the agent does not answer or cannot start it.
    pub fn daemon(&self, argv: &[&str], log: &str) -> anyhow::Result<u32> {
        let start = Start {
            detach_to: Some(log.to_owned()),
            ..words(argv)
        };
        Ok(self.start(&start)?.pid)
    }

    /// Runs a command to its end, whatever its exit code.
    ///
    /// # Errors
    /// If it cannot be started, or does not end within two minutes.
    pub fn run(&self, argv: &[&str]) -> anyhow::Result<Finished> {
        self.try_run(argv, COMMAND)
    }

    /// Runs a command to its end, whatever its exit code.
    ///
    /// # Errors
    /// If it cannot be started, or does not end in time.
    pub fn try_run(&self, argv: &[&str], timeout: Duration) -> anyhow::Result<Finished> {
        let deadline = Instant::now() + timeout;
        let mut session = self.start_within(&words(argv), timeout)?;
        session.end_input()?;
        session.finish(deadline)
    }

    /// Runs a shell script that must succeed; returns its standard output without trailing white space.
    ///
    /// # Errors
    /// If it fails; its standard error is in the message.
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        let finished = self.run(&["sh", "-ec", script])?;
        let stderr = String::from_utf8_lossy(&finished.stderr);
        ensure!(
            finished.code == 0,
            "on node {}: `{script}` ended with {}: {}",
            self.name,
            finished.code,
            stderr.trim()
        );
        Ok(String::from_utf8_lossy(&finished.stdout).trim_end().to_owned())
    }

    /// Writes a file in the node.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &str, content: &[u8]) -> anyhow::Result<()> {
        let mut session = self.start(&words(&["sh", "-c", "cat > \"$0\"", path]))?;
        session.feed(content)?;
        session.end_input()?;
        let finished = session.finish(Instant::now() + COMMAND)?;
        let stderr = String::from_utf8_lossy(&finished.stderr);
        ensure!(
            finished.code == 0,
            "cannot write {path} on node {}: {}",
            self.name,
            stderr.trim()
        );
        Ok(())
    }

    /// Reads a file in the node.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let finished = self.run(&["cat", path])?;
        let stderr = String::from_utf8_lossy(&finished.stderr);
        ensure!(
            finished.code == 0,
            "cannot read {path} on node {}: {}",
            self.name,
            stderr.trim()
        );
        Ok(finished.stdout)
    }

    /// The end of the console log, for messages.
    #[must_use]
    pub fn console_end(&self) -> String {
        let text = self.console().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!(
            "the end of its console:\n{}",
            lines[lines.len().saturating_sub(20)..].join("\n")
        )
    }

    fn start_within(&self, start: &Start, timeout: Duration) -> anyhow::Result<Session> {
        let agent = SocketAddr::from((self.address(Network::Management), wire::PORT));
        let stream = self.sandbox.connect(agent, timeout)?;
        Session::start(stream, start, timeout).with_context(|| format!("on node {}: {:?}", self.name, start.argv))
    }

    fn qemu(&self) -> MutexGuard<'_, Option<Child>> {
        self.qemu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let qemu = self.qemu();
        let pid = qemu
            .as_ref()
            .and_then(|qemu| Pid::from_raw(i32::try_from(qemu.id()).ok()?));
        rustix::process::kill_process(pid.with_context(|| format!("node {} does not run", self.name))?, signal)?;
        Ok(())
    }

    /// The node's end of a network in the lab's namespace.
    #[must_use]
    pub fn tap(&self, network: Network) -> String {
        format!("{}-{}", self.name, network.bridge())
    }

    fn console_path(&self) -> PathBuf {
        self.folder.join(format!("{}.console.log", self.name))
    }

    fn command(&self) -> anyhow::Result<Command> {
        // The kernel's look at its timer counts ticks in a busy loop, and panics where the host gave it no time for one.
        let mut words = format!(
            "root=/dev/vda ro init=/usr/sbin/lab-init console=ttyS0 net.ifnames=0 quiet panic=-1 no_timer_check ftvm.node={}",
            self.name
        );
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-name",
            &self.name,
            "-M",
            "q35",
            "-accel",
            "tcg,tb-size=256",
            "-cpu",
            "max",
            "-smp",
            "1",
        ])
        .args([
            "-m",
            &self.config.memory_mib.to_string(),
            "-no-user-config",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-device", "virtio-rng-pci"]);
        qemu.arg("-kernel")
            .arg(&self.image.kernel)
            .arg("-initrd")
            .arg(&self.image.initrd);
        for (name, path, options) in [
            ("root", &self.image.disk, "snapshot=on,cache=unsafe"),
            ("payload", &self.payload, "readonly=on"),
            // A killed QEMU loses nothing that it wrote, flushed or not: only the machine's own caches are lost. So the host
            // need not wait for its disk.
            ("data", &self.data_disk(), "cache=unsafe"),
        ] {
            qemu.arg("-drive").arg(format!(
                "if=none,id={name},format=raw,{options},file={}",
                path.display()
            ));
            qemu.arg("-device").arg(format!("virtio-blk-pci,drive={name}"));
        }
        for (place, path) in self.config.disks.iter().enumerate() {
            qemu.arg("-drive").arg(format!(
                "if=none,id=disk{place},format=raw,discard=unmap,cache=unsafe,file={}",
                path.display()
            ));
            qemu.arg("-device").arg(format!("virtio-blk-pci,drive=disk{place}"));
        }
        for (place, network) in NETWORKS.into_iter().enumerate() {
            let tap = self.tap(network);
            qemu.arg("-netdev")
                .arg(format!("tap,id=net{place},ifname={tap},script=no,downscript=no"));
            qemu.arg("-device").arg(format!(
                "virtio-net-pci,netdev=net{place},mac=52:54:00:0{place}:00:{:02x}",
                self.index
            ));
            words += &match network {
                Network::Client => " ftvm.ip=none".to_owned(),
                _ => format!(" ftvm.ip={}/24", self.address(network)),
            };
        }
        qemu.arg("-append").arg(words);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.join(format!("{}.qemu.log", self.name)))?;
        let console = self.console_path();
        qemu.args([
            "-chardev",
            &format!("file,id=console,append=on,path={}", console.display()),
            "-serial",
            "chardev:console",
        ]);
        qemu.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(qemu)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("lab: node {}, {}", self.name, self.console_end());
        }
        if let Some(mut qemu) = self.qemu().take() {
            // It may have ended by itself; either way it is gone after this.
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
    }
}

fn words(argv: &[&str]) -> Start {
    Start {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        ..Start::default()
    }
}
