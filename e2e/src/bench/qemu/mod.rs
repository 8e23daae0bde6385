//! The same guest under QEMU, and what QEMU's own mechanisms make of the same load.
//!
//! * The machine is `pc`: with `q35` QEMU 7.2's COLO secondary ends in an assertion (`memory_region_add_subregion_common`)
//!   when it loads its second checkpoint.
//! * All connections are Unix sockets: over `tcp:` QEMU does not set TCP_NODELAY, and every checkpoint waits for Nagle.
//! * Requests reach the guest through QEMU's own user networking. Nothing holds its output back, as COLO's proxy would.
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::client::GuestClient;
use crate::demo::prerequisites::find_program;

pub mod colo;
pub mod migration;
mod trace;

/// QEMU's program, in Debian's package `qemu-system-x86`.
pub const EMULATOR: &str = "qemu-system-x86_64";

/// Waiting for a guest, a monitor or a migration.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks while waiting.
const LOOK: Duration = Duration::from_millis(10);
/// As much as there is.
const BANDWIDTH_BYTES_PER_S: u64 = 1 << 40;

/// What all machines of a part share.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The embedded guest.
    pub kernel: PathBuf,
    /// Where sockets and logs go; a short path.
    pub folder: PathBuf,
    /// Guest memory.
    pub memory_mib: u32,
}

/// A QEMU with the guest. It is killed when dropped.
pub struct Emulator {
    name: String,
    folder: PathBuf,
    child: Child,
    monitor: Monitor,
    address: SocketAddr,
}

impl Emulator {
    /// Starts one that boots the guest, or that waits for it on the socket `incoming`.
    ///
    /// # Errors
    /// If QEMU is missing or does not start.
    pub fn start(setup: &Setup, name: &str, incoming: Option<&Path>) -> anyhow::Result<Self> {
        let program =
            find_program(EMULATOR).with_context(|| format!("{EMULATOR} is not installed (qemu-system-x86)"))?;
        let address = free_address()?;
        let socket = setup.folder.join(format!("{name}.qmp"));
        let file = |kind: &str| setup.folder.join(format!("{name}.{kind}"));
        let complaints = File::create(file("stderr")).context("creating a log of QEMU")?;
        let network = format!(
            "user,id=n0,net=10.0.0.0/24,host=10.0.0.1,hostfwd=tcp:{address}-10.0.0.2:{}",
            crate::guest_protocol::DEFAULT_PORT
        );
        let mut command = Command::new(program);
        command
            .args(["-machine", "pc,accel=kvm", "-cpu", "qemu64", "-smp", "1"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-m", &setup.memory_mib.to_string()])
            .args(["-append", "ip=10.0.0.2/24 gw=10.0.0.1", "-kernel"])
            .arg(&setup.kernel)
            .args(["-netdev", &network])
            .args(["-device", "virtio-net-pci,netdev=n0,disable-legacy=on,romfile="])
            .args(["-serial", &format!("file:{}", file("console").display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(["-msg", "timestamp=on", "-D"])
            .arg(file("trace"))
            .args(trace::EVENTS.iter().flat_map(|event| ["-trace", event]));
        if let Some(path) = incoming {
            command.args(["-incoming", &format!("unix:{}", path.display())]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(complaints)
            .spawn()
            .context("starting QEMU")?;
        let monitor = match Monitor::connect(&socket, &mut child) {
            Ok(monitor) => monitor,
            Err(error) => {
                child.kill().ok();
                child.wait().ok();
                return Err(error.context(last_words(&setup.folder, name)));
            }
        };
        Ok(Self {
            name: name.to_owned(),
            folder: setup.folder.clone(),
            child,
            monitor,
            address,
        })
    }

    /// A client of its guest, once that serves. (User networking accepts connections before the guest can.)
    ///
    /// # Errors
    /// If it never does.
    pub fn client(&mut self) -> anyhow::Result<GuestClient> {
        GuestClient::connect(self.address, PATIENCE).with_context(|| self.last_words())
    }

    /// Waits until a guest that boots here says that it serves.
    ///
    /// # Errors
    /// If QEMU ends before, or the guest never does.
    pub fn wait_booted(&mut self) -> anyhow::Result<()> {
        let console = self.folder.join(format!("{}.console", self.name));
        let deadline = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(&console).is_ok_and(|text| text.contains(" ready on ")) {
            if let Some(status) = self.child.try_wait()? {
                bail!("QEMU ended ({status}) before the guest served: {}", self.last_words());
            }
            ensure!(
                Instant::now() < deadline,
                "the guest under QEMU does not serve within {PATIENCE:?}"
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Runs a command of QEMU's machine protocol.
    ///
    /// # Errors
    /// What QEMU says against it.
    pub fn order(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.monitor
            .order(command, arguments)
            .with_context(|| self.last_words())
    }

    /// The lines that QEMU traced so far.
    ///
    /// # Errors
    /// If they can't be read.
    pub fn traced(&self) -> anyhow::Result<Vec<trace::Line>> {
        let path = self.folder.join(format!("{}.trace", self.name));
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.lines().filter_map(trace::Line::parse).collect())
    }

    /// The end of what QEMU complained about.
    pub fn last_words(&self) -> String {
        last_words(&self.folder, &self.name)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn last_words(folder: &Path, name: &str) -> String {
    let text = std::fs::read_to_string(folder.join(format!("{name}.stderr"))).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!(
        "QEMU {name} said last: {}",
        lines[lines.len().saturating_sub(3)..].join("; ")
    )
}

/// A loopback address whose port is free now.
fn free_address() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("looking for a free port")?;
    Ok(listener.local_addr()?)
}

/// A connection to QEMU's monitor: a JSON object a line, events between the answers.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn connect(socket: &Path, child: &mut Child) -> anyhow::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => {
                    if let Some(status) = child.try_wait()? {
                        bail!("QEMU ended at once ({status})");
                    }
                    ensure!(Instant::now() < deadline, "QEMU's monitor can't be reached: {error}");
                    std::thread::sleep(LOOK);
                }
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self(BufReader::new(stream));
        monitor.line().context("reading QEMU's greeting")?;
        monitor.order("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        let read = self.0.read_line(&mut line).context("QEMU's monitor does not answer")?;
        ensure!(read > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }

    fn order(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let mut text = json!({ "execute": command, "arguments": arguments }).to_string();
        text.push('\n');
        self.0
            .get_mut()
            .write_all(text.as_bytes())
            .context("QEMU's monitor is gone")?;
        loop {
            let answer = self.line()?;
            if let Some(result) = answer.get("return") {
                return Ok(result.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"]);
            }
        }
    }
}
