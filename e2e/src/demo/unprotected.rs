//! A machine that nobody protects: the guest under QEMU, or under our engine on its own, on the first host. With it the play
//! must end badly; if it does not, the judge is blind.
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;

use anyhow::Context;

use super::prerequisites::find_program;
use super::system::{Role, Seat, System};
use super::{GUEST_ADDRESS, GUEST_MAC, guest_command_line, mac_text};
use crate::hosts::{HostProcess, Lab};

/// What runs the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// QEMU, which emulates the machine in software: it needs no KVM.
    Qemu,
    /// `ftvm-engine run`, the program at this path, on this machine's KVM.
    Engine(PathBuf),
}

impl Monitor {
    /// File name of its program; it also names the process to kill.
    fn program(&self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86_64",
            Self::Engine(_) => "ftvm-engine",
        }
    }
}

/// The guest on its own.
pub struct Unprotected {
    lab: Rc<Lab>,
    monitor: Monitor,
    kernel: PathBuf,
    folder: PathBuf,
    memory_mib: u32,
    machine: Option<HostProcess>,
}

impl Unprotected {
    /// A machine whose disk and logs are in `folder`.
    pub fn new(
        lab: Rc<Lab>,
        monitor: Monitor,
        kernel: impl Into<PathBuf>,
        folder: impl Into<PathBuf>,
        memory_mib: u32,
    ) -> Self {
        Self {
            lab,
            monitor,
            kernel: kernel.into(),
            folder: folder.into(),
            memory_mib,
            machine: None,
        }
    }

    fn disk(&self) -> PathBuf {
        self.folder.join("disk.raw")
    }

    fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("monitor.log")
    }

    /// Starts the machine on a host, from the disk as it is: what a person does after the host of a VM died.
    pub fn boot(&mut self, host: usize) -> anyhow::Result<()> {
        let mut command = match &self.monitor {
            Monitor::Qemu => self.qemu()?,
            Monitor::Engine(program) => self.engine(program)?,
        };
        let log = File::create(self.log()).context("creating the log")?;
        command.stdin(Stdio::null()).stderr(log);
        let host = self.lab.host(host);
        host.add_tap("guest0")?;
        self.machine = Some(host.spawn("the machine", command)?);
        Ok(())
    }

    fn qemu(&self) -> anyhow::Result<Command> {
        let name = self.monitor.program();
        let emulator = find_program(name).with_context(|| format!("{name} is not installed (qemu-system-x86)"))?;
        let mut command = Command::new(emulator);
        command
            .args([
                "-machine",
                "q35,accel=tcg",
                "-cpu",
                "max",
                "-nodefaults",
                "-display",
                "none",
                "-no-user-config",
            ])
            .args(["-m", &self.memory_mib.to_string(), "-kernel"])
            .arg(&self.kernel)
            .args(["-append", &guest_command_line(GUEST_ADDRESS)])
            .args(["-serial", &format!("file:{}", path(&self.console()))])
            .args(["-netdev", "tap,id=n0,ifname=guest0,script=no,downscript=no"])
            .args([
                "-device",
                &format!("virtio-net-pci,netdev=n0,disable-legacy=on,mac={}", mac_text(GUEST_MAC)),
            ])
            .args([
                "-drive",
                &format!("file={},format=raw,if=none,id=d0,cache=writeback", path(&self.disk())),
            ])
            .args(["-device", "virtio-blk-pci,drive=d0,disable-legacy=on"])
            .stdout(Stdio::null());
        Ok(command)
    }

    fn engine(&self, program: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new(program);
        command.arg("run").arg("--kernel").arg(&self.kernel);
        command.args(["--cmdline", &guest_command_line(GUEST_ADDRESS)]);
        command.args(["--memory", &format!("{}M", self.memory_mib)]);
        command.arg("--disk").arg(self.disk());
        command.args(["--tap", &format!("guest0,{}", mac_text(GUEST_MAC))]);
        command.stdout(File::create(self.console()).context("creating the console's file")?);
        Ok(command)
    }
}

/// QEMU separates options by commas; a comma in a value is doubled.
fn path(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

impl System for Unprotected {
    fn protects(&self) -> bool {
        false
    }

    fn engine_program(&self) -> &str {
        self.monitor.program()
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let disk = File::create(self.disk()).context("creating the guest's disk")?;
        disk.set_len(64 << 20).context("sizing the guest's disk")?;
        self.boot(0)
    }

    fn seat(&mut self, machine: usize) -> Option<Seat> {
        let runs = self
            .lab
            .host(machine)
            .processes_named(self.monitor.program())
            .is_ok_and(|processes| !processes.is_empty());
        runs.then(|| Seat {
            role: Role::Active,
            protected: false,
            paused: false,
            leaving: false,
            why: "nobody protects this machine".to_owned(),
            term: 1,
            epoch: 0,
            resync_percent: None,
            counters: serde_json::Map::new(),
        })
    }

    fn hand_over(&mut self, _: usize) -> anyhow::Result<()> {
        anyhow::bail!("an unprotected machine has nobody to hand over to")
    }

    fn replace(&mut self, _: usize, _: usize) -> anyhow::Result<()> {
        anyhow::bail!("an unprotected machine has no seat to replace")
    }

    fn trouble(&mut self) -> Option<String> {
        None
    }

    fn make_spare(&mut self, _: usize) -> anyhow::Result<()> {
        Ok(())
    }

    fn compare_sides(&mut self, _: usize, _: usize) -> anyhow::Result<()> {
        anyhow::bail!("an unprotected machine has one side")
    }

    fn logs(&self) -> Vec<PathBuf> {
        vec![self.console(), self.log()]
    }
}
