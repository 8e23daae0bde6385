//! A daemon on each of two emulated machines; the arbiter's folder comes over NFS.
//!
//! ```text
//!   /lab/          programs, kernel, initrd (read only)      /dev/vdd   the seat's disk
//!   /share/        arbiter records, identities (NFS)         /data/     configuration, state, header, journal: survives the machine's death
//! ```
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::machines::Emulated;
use crate::demo::system::{Digest, Seat, System};
use crate::demo::{Options, compare, mac_text};
use crate::lab::relay::Relay;
use crate::lab::{Network, guest};

const VM: &str = "demo";
const SEATS: [&str; 2] = ["a", "b"];
const LINK_PORT: u16 = 7100;
const DAEMON_PORT: u16 = 7101;
const SOCKET: &str = "/data/state/daemon.sock";
const CONFIG: &str = "/data/config.yaml";
const DAEMON_LOG: &str = "/data/daemon.log";
/// For things that take their time in an emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// For the first seat to run the guest.
const START: Duration = Duration::from_secs(1200);
/// A machine whose cut link hides an answer is not waited for long.
const ANSWER: Duration = Duration::from_secs(30);
/// For a digest of memory, longer than its daemon waits for its engine.
const DIGEST: Duration = Duration::from_secs(100);

/// Daemons and engines on emulated machines.
pub struct EmulatedSystem {
    machines: Rc<Emulated>,
    memory_mib: u32,
    vcpus: u32,
    disks: Vec<PathBuf>,
    /// One helper a machine that carries questions to its daemon.
    relays: Vec<Option<Relay>>,
}

impl EmulatedSystem {
    /// Nothing is started yet. `disks` are the images behind the seats' disks.
    pub fn new(machines: Rc<Emulated>, options: &Options, disks: Vec<PathBuf>) -> Self {
        let relays = disks.iter().map(|_| None).collect();
        Self {
            machines,
            memory_mib: options.memory_mib,
            vcpus: options.vcpus,
            disks,
            relays,
        }
    }

    fn sh(&self, machine: usize, script: &str) -> anyhow::Result<String> {
        self.machines.nodes[machine].sh(script)
    }

    /// The configuration of a machine's daemon. (JSON is YAML.)
    fn config(&self, machine: usize) -> Value {
        let address = |machine: usize, port: u16| {
            let address = self.machines.nodes[machine].address(Network::Replication);
            format!("{address}:{port}")
        };
        let other = 1 - machine;
        json!({
            "node": self.machines.nodes[machine].name(),
            "state_folder": "/data/state",
            "engine": "/lab/ftvm-engine",
            "arbiter": { "folder": "/share/arbiter" },
            "peer_listen": address(machine, DAEMON_PORT),
            "jail": { "uid_first": 1_900_000_000_u32, "uid_count": 1000 },
            "seats": [{
                "vm": VM,
                "seat": SEATS[machine],
                "identity": "/data/identity",
                "original_disk": machine == 0,
                "machine": { "memory_mib": self.memory_mib, "vcpus": self.vcpus },
                "boot": { "kernel": "/lab/vmlinuz", "initrd": "/lab/initrd.img", "cmdline": guest::CMDLINE },
                "nics": [{ "name": "net0", "mac": mac_text(guest::MAC), "tap": "guest0", "bridge": "br0" }],
                "disks": [{ "name": "disk0", "path": "/dev/vdd" }],
                "header": "/data/header",
                "journal": "/data/journal",
                "link": {
                    "listen": address(machine, LINK_PORT),
                    "peers": [{
                        "seat": SEATS[other],
                        "address": address(other, LINK_PORT),
                        "daemon_address": address(other, DAEMON_PORT),
                    }],
                },
                // An emulated machine may stand still for a while when its host is busy: that is not its death.
                "timing": { "heartbeat_ms": 200, "peer_lost_ms": 10000, "ack_stall_ms": 30000, "arbiter_deadline_ms": 8000 },
                "checkpoint": { "interval_min_us": 20_000, "interval_max_us": 200_000, "workers": 1 },
            }],
        })
    }

    /// What a machine needs after each boot, then its daemon.
    fn start_daemon(&mut self, machine: usize) -> anyhow::Result<()> {
        let machines = Rc::clone(&self.machines);
        let node = &machines.nodes[machine];
        node.client_bridge()?;
        self.machines.share.mount(node)?;
        let identity = format!(
            "[ -d /data/identity ] || cp -r /share/identities/{} /data/identity",
            SEATS[machine]
        );
        node.sh(&identity)?;
        node.write(CONFIG, serde_json::to_string_pretty(&self.config(machine))?.as_bytes())?;
        node.daemon(&["/lab/ftvm-node-daemon", "run", "--config", CONFIG], DAEMON_LOG)?;
        self.relays[machine] = None;
        let deadline = Instant::now() + PATIENCE;
        while self.ask(machine, &json!({ "request": "status" })).is_err() {
            if Instant::now() > deadline || node.run(&["pidof", "ftvm-node-daemon"])?.code != 0 {
                bail!(
                    "the daemon of {} does not answer; its last words:\n{}",
                    node.name(),
                    self.last_words(machine)
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// The end of a daemon's log, with its engine's words.
    pub fn last_words(&self, machine: usize) -> String {
        self.sh(
            machine,
            &format!("tail -n 15 {DAEMON_LOG}; tail -n 15 /data/state/seats/*/engine.log 2>/dev/null || true"),
        )
        .unwrap_or_else(|error| format!("{error:#}"))
    }

    fn ask(&mut self, machine: usize, request: &Value) -> anyhow::Result<Value> {
        self.ask_for(machine, request, ANSWER)
    }

    fn ask_for(&mut self, machine: usize, request: &Value, patience: Duration) -> anyhow::Result<Value> {
        let node = &self.machines.nodes[machine];
        let relay = match &mut self.relays[machine] {
            Some(relay) => relay,
            none => none.insert(Relay::start(node, SOCKET)?),
        };
        let answer = relay.ask(request, patience);
        if answer.is_err() {
            self.relays[machine] = None;
        }
        let answer = answer.with_context(|| format!("asking the daemon of {}", node.name()))?;
        ensure!(!answer.is_null(), "the daemon of {} gave no answer", node.name());
        Ok(answer)
    }

    fn digest(&mut self, machine: usize) -> anyhow::Result<Digest> {
        let request = json!({ "request": "command", "vm": VM, "seat": SEATS[machine], "command": { "do": "digest" } });
        let answer = self.ask_for(machine, &request, DIGEST)?;
        let reply = &answer["reply"];
        ensure!(
            reply["reply"] == "digest",
            "instead of a digest, the seat on machine {machine} said {answer}"
        );
        Ok(serde_json::from_value(reply.clone())?)
    }

    /// The images behind both disks become equal once the guest is still, the journal applied and the machines' caches written.
    /// What they are then is examined: file system and Redis' log must be in order, as after a power cut.
    fn compare_disks(&self, active: usize, standby: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.sh(active, "sync")?;
            self.sh(standby, "sync")?;
            let scratch = self.machines.lab.folder();
            let copy = guest::copy_disk(&self.disks[active], scratch)?;
            // Both, and after it was made: so it is no mixture of two moments.
            let first = compare::first_difference(&copy, &self.disks[standby])?;
            let Some(at) = first.map_or_else(
                || compare::first_difference(&copy, &self.disks[active]),
                |at| Ok(Some(at)),
            )?
            else {
                return guest::examine_copy(&copy, scratch).context("the disks are equal, and damaged");
            };
            ensure!(
                Instant::now() < deadline,
                "the disks differ at byte {at} and stay so for {PATIENCE:?}"
            );
        }
    }
}

impl System for EmulatedSystem {
    fn protects(&self) -> bool {
        true
    }

    fn engine_program(&self) -> &str {
        "ftvm-engine"
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.machines.share.mount(&self.machines.nodes[0])?;
        self.sh(0, "mkdir /share/arbiter")?;
        let identities = format!("/lab/ftvm standalone identities --vm {VM} --seats a,b --out /share/identities");
        self.sh(0, &format!("{identities}; umount /share"))?;
        for machine in 0..SEATS.len() {
            self.start_daemon(machine)?;
        }
        let up = ["/lab/ftvm", "standalone", "up", "--daemon", SOCKET, "--unprotected"];
        let finished = self.machines.nodes[0].try_run(&up, START)?;
        let text = String::from_utf8_lossy(&finished.stderr);
        ensure!(
            finished.code == 0,
            "{} ended with {}: {}",
            up.join(" "),
            finished.code,
            text.trim()
        );
        Ok(())
    }

    fn seat(&mut self, machine: usize) -> Option<Seat> {
        let status = self.ask(machine, &json!({ "request": "status" })).ok()?;
        let seats = status["seats"].as_array()?;
        let seat = seats
            .iter()
            .find(|seat| seat["vm"] == VM && seat["engine"].is_object())?;
        serde_json::from_value(seat["engine"].clone()).ok()
    }

    fn hand_over(&mut self, machine: usize) -> anyhow::Result<()> {
        let request =
            json!({ "request": "command", "vm": VM, "seat": SEATS[machine], "command": { "do": "switchover" } });
        let answer = self.ask(machine, &request)?;
        ensure!(
            answer["reply"]["reply"] == "ok",
            "asked to hand over, the engine said {answer}"
        );
        Ok(())
    }

    fn replace(&mut self, _lost: usize, _spare: usize) -> anyhow::Result<()> {
        bail!("with two machines there is no spare one: the lost one comes back in its own place")
    }

    fn trouble(&mut self) -> Option<String> {
        None
    }

    fn make_spare(&mut self, machine: usize) -> anyhow::Result<()> {
        // A daemon that lives starts its seat's engine again by itself.
        if self.machines.nodes[machine].run(&["pidof", "ftvm-node-daemon"])?.code == 0 {
            return Ok(());
        }
        self.start_daemon(machine)
    }

    fn compare_sides(&mut self, active: usize, standby: usize) -> anyhow::Result<()> {
        self.compare_disks(active, standby)?;
        compare::memory(|machine| self.digest(machine), active, standby, PATIENCE)
    }

    fn logs(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}
