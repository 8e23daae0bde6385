//! A machine that nobody protects: the guest under QEMU on the first host. With it the play must end badly; if it does
//! not, the judge is blind.
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;

use anyhow::Context;

use super::prerequisites::find_program;
use super::system::{Role, Seat, System};
use super::{GUEST_MAC, guest_command_line, mac_text};
use crate::hosts::{HostProcess, Lab};

/// The emulator; it also names the process to kill.
const EMULATOR: &str = "qemu-system-x86_64";

/// The guest under QEMU, emulated in software: it needs no KVM.
pub struct Unprotected {
    lab: Rc<Lab>,
    kernel: PathBuf,
    folder: PathBuf,
    memory_mib: u32,
    machine: Option<HostProcess>,
}

impl Unprotected {
    /// A machine whose disk and logs are in `folder`.
    pub fn new(lab: Rc<Lab>, kernel: impl Into<PathBuf>, folder: impl Into<PathBuf>, memory_mib: u32) -> Self {
        Self {
            lab,
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

    /// Starts the machine on a host, from the disk as it is: what a person does after the host of a VM died.
    pub fn boot(&mut self, host: usize) -> anyhow::Result<()> {
        let emulator =
            find_program(EMULATOR).with_context(|| format!("{EMULATOR} is not installed (qemu-system-x86)"))?;
        let host = self.lab.host(host);
        host.add_tap("guest0")?;
        let log = File::create(self.folder.join("qemu.log")).context("creating QEMU's log")?;
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
            .args(["-append", &guest_command_line()])
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
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing QEMU's log")?)
            .stderr(log);
        self.machine = Some(host.spawn("the machine", command)?);
        Ok(())
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
        EMULATOR
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
            .processes_named(EMULATOR)
            .is_ok_and(|processes| !processes.is_empty());
        runs.then(|| Seat {
            role: Role::Active,
            protected: false,
            why: "nobody protects this machine".to_owned(),
            term: 1,
            epoch: 0,
            resync_percent: None,
            counters: serde_json::Map::new(),
        })
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
        vec![self.console(), self.folder.join("qemu.log")]
    }
}
