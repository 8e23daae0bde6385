//! An emulated node's machine: QEMU with a Debian kernel of its own, control groups of version 2 and KVM.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::node::{DAEMON_SOCKET, Machine, NodeProgram, PATIENCE, Shared, exec_path};
use super::plan::{CLIENT_BRIDGE, NodePlan, VOLUMES_FOLDER};
use crate::lab::image::Image;
use crate::lab::relay::Relay;
use crate::lab::session::{Event, Finished};
use crate::lab::wire::Start;
use crate::lab::{self, Network, NodeConfig, make_payload};

/// Of each machine: a guest of 256 MiB with its overhead, and the node's own programs.
const MEMORY_MIB: u32 = 1800;
/// Images, volumes and logs of a node, in a file that has only what was written.
pub(super) const DATA_MIB: u64 = 16 << 10;
/// An image of many megabytes is unpacked by an emulated processor.
const IMPORT: Duration = Duration::from_secs(600);

/// The machine. Dropping it kills it.
pub(super) struct Emulated {
    plan: NodePlan,
    folder: PathBuf,
    shared: Arc<Shared>,
    machine: lab::Node,
    life: Mutex<Life>,
}

/// What there is from a start to a kill.
#[derive(Default)]
struct Life {
    /// Process ids there.
    programs: BTreeMap<NodeProgram, u32>,
    relay: Option<Relay>,
}

impl Emulated {
    /// Makes its disks, in the node's folder, and its cables.
    pub(super) fn new(
        plan: NodePlan,
        folder: &Path,
        shared: &Arc<Shared>,
        (system, data): (&Image, &Path),
    ) -> anyhow::Result<Self> {
        let disks = folder.join("machine");
        fs::create_dir_all(&disks)?;
        make_payload(&disks, &[])?;
        let config = NodeConfig {
            memory_mib: MEMORY_MIB,
            data_mib: DATA_MIB,
            data_from: Some(data.to_owned()),
            disks: Vec::new(),
        };
        let machine = lab::Node::new(&shared.sandbox, &disks, system, (&plan.name(), plan.index), config)?;
        Ok(Self {
            plan,
            folder: folder.to_owned(),
            shared: Arc::clone(shared),
            machine,
            life: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node's files, which its folder has beside disks and logs.
    fn files(&self) -> anyhow::Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                archive.append_path_with_name(entry.path(), entry.file_name())?;
            }
        }
        archive.append_dir_all("cni", self.folder.join("cni"))?;
        Ok(archive.into_inner()?)
    }

    /// Bridge for guests, routes to the other nodes' pods.
    fn network_script(&self) -> String {
        let mut script = format!(
            "ip link add {CLIENT_BRIDGE} type bridge forward_delay 0 mcast_snooping 0\n\
             ip link set {CLIENT_BRIDGE} up\n\
             ip link set {client} master {CLIENT_BRIDGE} up\n\
             ip route add default via {outside}\n",
            client = Network::Client.card(),
            outside = Network::Management.address(1)
        );
        for other in self.shared.options.plans() {
            if other != self.plan {
                let gateway = other.address(Network::Management);
                script += &format!("ip route add {} via {gateway}\n", other.pods());
            }
        }
        script
    }

    fn run(&self, words: &[&str], input: &mut dyn Read) -> anyhow::Result<Vec<u8>> {
        let start = Start {
            argv: words.iter().map(|&word| word.to_owned()).collect(),
            env: search_path(),
            ..Start::default()
        };
        let Finished { code, stdout, stderr } = self.machine.feed(&start, input, IMPORT)?;
        if code != 0 {
            let text = [stdout, stderr].concat();
            let text = String::from_utf8_lossy(&text).trim().to_owned();
            let command = words.join(" ");
            bail!("{command} on node {} ended with {code}: {text}", self.machine.name());
        }
        Ok(stdout)
    }

    fn sh(&self, script: &str) -> anyhow::Result<String> {
        let output = self.run(&["sh", "-euc", script], &mut std::io::empty())?;
        Ok(String::from_utf8_lossy(&output).trim().to_owned())
    }
}

impl Machine for Emulated {
    /// The machine is the node's alone.
    fn control_group(&self) -> anyhow::Result<String> {
        Ok("/".to_owned())
    }

    fn is_running(&self) -> bool {
        self.machine.is_running()
    }

    fn switch_on(&self) -> anyhow::Result<()> {
        *self.lock() = Life::default();
        self.machine.power_on()?;
        let volumes: Vec<String> = (1..=self.shared.options.volumes_per_node)
            .map(|number| format!("{VOLUMES_FOLDER}/volume-{number}"))
            .collect();
        let script = format!(
            "VOLUMES='{}'\n{}{}",
            volumes.join(" "),
            include_str!("../../cluster/emulated-node.sh"),
            self.network_script()
        );
        self.sh(&script)?;
        self.run(&["tar", "-x", "-C", "/run/node"], &mut Cursor::new(self.files()?))
            .map(drop)
    }

    fn kill(&self) -> anyhow::Result<Instant> {
        *self.lock() = Life::default();
        self.machine.kill()
    }

    /// Its kernel, too.
    fn pause(&self) -> anyhow::Result<Instant> {
        self.machine.pause()?;
        Ok(Instant::now())
    }

    fn resume(&self) -> anyhow::Result<()> {
        self.machine.resume()
    }

    fn set_link(&self, network: Network, up: bool) -> anyhow::Result<()> {
        self.machine.set_link(network, up)
    }

    fn start_program(&self, program: NodeProgram, arguments: &[String]) -> anyhow::Result<()> {
        let name = program.name();
        ensure!(!self.lock().programs.contains_key(&program), "{name} runs already");
        let argv = std::iter::once(format!("/run/programs/{name}")).chain(arguments.iter().cloned());
        let session = self.machine.start(&Start {
            argv: argv.collect(),
            env: search_path(),
            detach_to: Some(log(program)),
            ..Start::default()
        })?;
        self.lock().programs.insert(program, session.pid);
        Ok(())
    }

    fn kill_program(&self, program: NodeProgram) -> anyhow::Result<()> {
        let pid = self.lock().programs.remove(&program);
        let pid = pid.with_context(|| format!("{} does not run on {}", program.name(), self.machine.name()))?;
        self.sh(&format!(
            "kill -KILL {pid}; while [ -e /proc/{pid} ]; do sleep 0.1; done"
        ))
        .map(drop)
    }

    fn ended_program(&self) -> anyhow::Result<Option<String>> {
        let programs = self.lock().programs.clone();
        let pids: Vec<String> = programs.values().map(u32::to_string).collect();
        let script = format!("for pid in {}; do [ -e /proc/$pid ] || echo $pid; done", pids.join(" "));
        let ended = self.sh(&script)?;
        let ended: Vec<&str> = ended.lines().collect();
        let found = programs
            .iter()
            .find(|(_, pid)| ended.contains(&pid.to_string().as_str()));
        found
            .map(|(program, _)| {
                let end = self.sh(&format!("tail -n 15 {}", log(*program)))?;
                Ok(format!("{} ended:\n{end}", program.name()))
            })
            .transpose()
    }

    fn containerd_answers(&self) -> anyhow::Result<()> {
        self.sh("ctr version").map(drop)
    }

    fn kill_processes(&self, program: &str) -> anyhow::Result<(usize, Instant)> {
        let pids = self.sh(&format!(
            "pids=$(pidof {program} || true); [ -z \"$pids\" ] || kill -KILL $pids; echo $pids"
        ))?;
        Ok((pids.split_whitespace().count(), Instant::now()))
    }

    /// What is given to a program is on the machine's disk afterwards: its next death is to lose nothing of it.
    fn exec(&self, words: &[&str], input: Option<File>) -> anyhow::Result<Vec<u8>> {
        let Some(mut input) = input else {
            return self.run(words, &mut std::io::empty());
        };
        let output = self.run(words, &mut input)?;
        self.run(&["sync"], &mut std::io::empty())?;
        Ok(output)
    }

    fn ask_daemon(&self, request: &Value, patience: Duration) -> anyhow::Result<Value> {
        let mut life = self.lock();
        let relay = match &mut life.relay {
            Some(relay) => relay,
            none => none.insert(Relay::start(&self.machine, DAEMON_SOCKET)?),
        };
        let answer = relay.ask(request, patience.max(PATIENCE));
        if answer.is_err() {
            life.relay = None;
        }
        let answer = answer?;
        ensure!(!answer.is_null(), "it gave no answer");
        Ok(answer)
    }

    fn file(&self, path: &Path, scratch: &Path) -> anyhow::Result<PathBuf> {
        let copy = scratch.join(format!("{}.copy", self.machine.name()));
        let path = path.to_str().context("the path is no UTF-8")?;
        let mut session = self.machine.start(&Start {
            argv: ["cat", path].map(str::to_owned).into(),
            ..Start::default()
        })?;
        let mut file = File::create(&copy)?;
        let deadline = Instant::now() + IMPORT;
        loop {
            match session.next(deadline)? {
                Event::Stdout(bytes) => std::io::Write::write_all(&mut file, &bytes)?,
                Event::Stderr(bytes) => bail!("reading {path}: {}", String::from_utf8_lossy(&bytes).trim()),
                Event::Exit(0) => return Ok(copy),
                Event::Exit(code) => bail!("reading {path} ended with {code}"),
            }
        }
    }

    fn save_logs(&self) -> anyhow::Result<()> {
        let console = self.folder.join("console.log");
        fs::write(console, self.machine.console()?)?;
        let script = "cd /var && { find -L log -name '*.log' -type f; find lib/ftvm -name '*.log'; } | tar -ch -T -";
        let archive = self.run(&["sh", "-c", script], &mut std::io::empty())?;
        Ok(tar::Archive::new(archive.as_slice()).unpack(&self.folder)?)
    }
}

fn search_path() -> BTreeMap<String, String> {
    BTreeMap::from([("PATH".to_owned(), exec_path().to_owned())])
}

fn log(program: NodeProgram) -> String {
    format!("/var/log/{}.log", program.name())
}
