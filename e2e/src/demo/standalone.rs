//! The real thing: a daemon on every host, and a folder that all of them reach as arbiter.
//!
//! ```text
//!   FOLDER/arbiter/            the record, which all hosts reach
//!   FOLDER/hN/config.yaml      the daemon's configuration
//!   FOLDER/hN/disk.raw         the seat's disk; disk1.raw … where it has several
//!   FOLDER/hN/journal          the seat's journal
//!   FOLDER/hN/state/           the daemon's state folder: sockets, logs
//!   FOLDER/hN/daemon.log
//! ```
//!
//! A seat may have a folder of its own for disks, header and journal ([`Standalone::with_volume`]).
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::background::Background;
use super::place::remove_disks;
use super::programs::Programs;
use super::system::{Digest, Seat, System};
use super::{GUEST_ADDRESS, Options, card_address, card_mac, compare, daemon, guest_command_line, mac_text};
use crate::hosts::{HostProcess, Lab};

/// File name of a seat's first disk in its host's folder.
pub const DISK: &str = "disk.raw";
/// File name of a seat's journal, likewise.
pub const JOURNAL: &str = "journal";
/// Name of the virtual machine.
const VM: &str = "demo";
/// Where replication links listen.
pub const LINK_PORT: u16 = 7100;
/// Where daemons hear each other with [`Standalone::with_daemons_apart`].
pub const DAEMON_PORT: u16 = 7400;
/// Size of each of the guest's disks.
pub const DISK_MIB: u64 = 64;
/// How long a daemon may take to answer, longer than it waits for its engine. A frozen one is not asked.
const ANSWER: Duration = Duration::from_secs(2);
/// How long both sides may take to become equal once nothing happens any more.
const SETTLE: Duration = Duration::from_secs(60);
/// For what a daemon begins or does with its engine, a digest of memory among it, longer than it waits itself.
const PATIENCE: Duration = Duration::from_secs(180);

/// Daemons and engines.
pub struct Standalone {
    lab: Rc<Lab>,
    programs: Programs,
    folder: PathBuf,
    memory_mib: u32,
    vcpus: u32,
    engine: PathBuf,
    /// The seats' `timing`, as in their configuration.
    timing: Value,
    /// The seats' `checkpoint`, likewise.
    checkpoint: Value,
    /// The seats' `when_unprotected`, likewise.
    when_unprotected: &'static str,
    /// The `addresses` of their cards, likewise.
    addresses: Value,
    /// How many disks the guest has.
    disks: usize,
    /// How many network cards it has.
    cards: usize,
    /// What else the guest is told at its start.
    told_more: String,
    /// Where hosts have what their seats' volumes have on a cluster, if not in their folders.
    volumes: BTreeMap<usize, PathBuf>,
    /// The first two daemons talk over the network, not by their sockets.
    apart: bool,
    daemons: Vec<Option<HostProcess>>,
    /// `ftvm standalone replace`, while it waits for protection.
    replacing: Background,
}

impl Standalone {
    /// Nothing is started yet; `folder` must have a short path.
    pub fn new(lab: Rc<Lab>, programs: &Programs, folder: &Path, options: &Options) -> Self {
        Self {
            daemons: lab.hosts().iter().map(|_| None).collect(),
            lab,
            programs: programs.clone(),
            folder: folder.to_owned(),
            memory_mib: options.memory_mib,
            vcpus: options.vcpus,
            engine: programs.folder.join(ENGINE),
            checkpoint: json!({}),
            when_unprotected: "continue",
            told_more: String::new(),
            addresses: json!([]),
            disks: 1,
            cards: 1,
            volumes: BTreeMap::new(),
            apart: false,
            timing: match options.peer_lost_ms {
                Some(peer_lost_ms) => json!({ "peer_lost_ms": peer_lost_ms }),
                None => json!({}),
            },
            replacing: Background::new("ftvm standalone replace"),
        }
    }

    /// With another program as engine: for tests of the judge.
    pub fn with_engine(mut self, program: &Path) -> Self {
        self.engine = program.to_owned();
        self
    }

    /// With other epochs than the usual ones: the seats' `checkpoint`, as in their configuration.
    pub fn with_checkpoint(mut self, checkpoint: Value) -> Self {
        self.checkpoint = checkpoint;
        self
    }

    /// With a guest that stands still while there is no standby.
    pub fn with_pause(mut self) -> Self {
        self.when_unprotected = "pause";
        self
    }

    /// With a guest that is told this, too, at its start.
    pub fn with_command_line(mut self, words: &str) -> Self {
        self.told_more = format!(" {words}");
        self
    }

    /// With a guest that has these IP addresses and no others, as far as its seats know.
    pub fn with_addresses(mut self, addresses: &[&str]) -> Self {
        self.addresses = json!(addresses);
        self
    }

    /// With a guest that has so many disks, and answers on so many network cards ([`card_address`]).
    pub fn with_devices(mut self, disks: usize, cards: usize) -> Self {
        (self.disks, self.cards) = (disks, cards);
        self
    }

    /// With this folder for disks, header and journal of a host's seat; everything else stays where it is.
    pub fn with_volume(mut self, host: usize, folder: &Path) -> Self {
        self.volumes.insert(host, folder.to_owned());
        self
    }

    /// With daemons of the first pair that reach each other over the network, as on machines of their own.
    pub fn with_daemons_apart(mut self) -> Self {
        self.apart = true;
        self
    }

    /// With other times than the usual ones: the seats' `timing`, as in their configuration.
    pub fn with_timing(mut self, timing: Value) -> Self {
        self.timing = timing;
        self
    }

    /// A host that was started again after its power was cut: its seat is what it was, and so is its peer.
    ///
    /// # Errors
    /// If its daemon does not start.
    pub fn come_back(&mut self, host: usize, peer: usize) -> anyhow::Result<()> {
        self.daemons[host] = None;
        self.prepare_host(host, Some(peer))
    }

    /// What a host's daemon says of its seat; nothing if the daemon does not answer.
    #[must_use]
    pub fn why(&self, host: usize) -> String {
        let seat = self.seat_status(host).unwrap_or_default();
        seat["why"].as_str().unwrap_or_default().to_owned()
    }

    /// The exit code of the engine that ended last on a host; none if its daemon knows of none.
    #[must_use]
    pub fn last_exit_code(&self, host: usize) -> Option<u64> {
        self.seat_status(host)?["last_exit"]["code"].as_u64()
    }

    /// What a host's daemon says of its seat.
    fn seat_status(&self, host: usize) -> Option<Value> {
        let mut status = daemon::ask(&self.socket(host), &json!({ "request": "status" }), ANSWER).ok()?;
        let seats = status["seats"].as_array_mut()?;
        seats.iter_mut().find(|seat| seat["vm"] == VM).map(Value::take)
    }

    fn host_folder(&self, host: usize) -> PathBuf {
        self.folder.join(self.lab.host(host).name())
    }

    /// A disk of a host's seat.
    #[must_use]
    pub fn disk(&self, host: usize, disk: usize) -> PathBuf {
        self.volume(host).join(disk_name(disk))
    }

    fn volume(&self, host: usize) -> PathBuf {
        let own = self.volumes.get(&host).cloned();
        own.unwrap_or_else(|| self.host_folder(host))
    }

    fn socket(&self, host: usize) -> PathBuf {
        self.host_folder(host).join("state/daemon.sock")
    }

    fn config_path(&self, host: usize) -> PathBuf {
        self.host_folder(host).join("config.yaml")
    }

    fn address(&self, host: usize, port: u16) -> String {
        format!("{}:{port}", self.lab.host(host).replication_address())
    }

    /// The configuration of a host's daemon. (JSON is YAML.)
    fn config(&self, host: usize, peer: Option<usize>) -> anyhow::Result<Value> {
        let (uid_first, uid_count) = engine_uids()?;
        let listen = self.apart.then(|| self.address(host, DAEMON_PORT));
        Ok(json!({
            "node": self.lab.host(host).name(),
            "state_folder": self.host_folder(host).join("state"),
            "engine": self.engine,
            "arbiter": { "folder": self.folder.join("arbiter") },
            "peer_listen": listen,
            "jail": { "uid_first": uid_first, "uid_count": uid_count },
            "seats": [self.seat_config(host, peer)],
        }))
    }

    /// A seat. The first pair knows each other from the start; a spare has no peer until `ftvm` makes it one.
    fn seat_config(&self, host: usize, of: Option<usize>) -> Value {
        let peer = |peer: usize| {
            let (key, daemon) = match self.apart {
                true => ("daemon_address", json!(self.address(peer, DAEMON_PORT))),
                false => ("daemon", json!(self.socket(peer))),
            };
            json!({ "seat": seat_name(peer), "address": self.address(peer, LINK_PORT), key: daemon })
        };
        let peers: Vec<Value> = of.into_iter().map(peer).collect();
        let volume = self.volume(host);
        json!({
            "vm": VM,
            "seat": seat_name(host),
            "identity": self.folder.join("identities").join(seat_name(host)),
            "original_disk": host == 0,
            "machine": { "memory_mib": self.memory_mib, "vcpus": self.vcpus },
            "boot": { "kernel": self.programs.guest, "cmdline": self.command_line() },
            "nics": (0..self.cards).map(|card| self.nic_config(card)).collect::<Vec<_>>(),
            "disks": (0..self.disks).map(|disk| self.disk_config(host, disk)).collect::<Vec<_>>(),
            "header": volume.join("header"),
            "journal": volume.join(JOURNAL),
            "link": { "listen": self.address(host, LINK_PORT), "peers": peers },
            "timing": self.timing,
            "checkpoint": self.checkpoint,
            "when_unprotected": self.when_unprotected,
        })
    }

    /// What the guest is told at its start.
    fn command_line(&self) -> String {
        let further = (1..self.cards).map(|card| {
            let [a, b, c, d] = card_address(card);
            format!(" ip{card}={a}.{b}.{c}.{d}/24")
        });
        guest_command_line(GUEST_ADDRESS) + &further.collect::<String>() + &self.told_more
    }

    fn nic_config(&self, card: usize) -> Value {
        json!({
            "name": format!("net{card}"),
            "mac": mac_text(card_mac(card)),
            "addresses": self.addresses,
            "tap": format!("guest{card}"),
            "bridge": Lab::GUEST_BRIDGE,
        })
    }

    fn disk_config(&self, host: usize, disk: usize) -> Value {
        json!({ "name": format!("disk{disk}"), "path": self.disk(host, disk), "size_mib": DISK_MIB })
    }

    /// An empty host gets disks and a daemon.
    fn prepare_host(&mut self, host: usize, peer: Option<usize>) -> anyhow::Result<()> {
        let folder = self.host_folder(host);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        for disk in (0..self.disks).map(|disk| self.disk(host, disk)) {
            if !disk.exists() {
                let file = File::create(&disk).with_context(|| format!("creating {}", disk.display()))?;
                file.set_len(DISK_MIB << 20)
                    .with_context(|| format!("sizing {}", disk.display()))?;
            }
        }
        let config = self.config_path(host);
        let text = serde_json::to_string_pretty(&self.config(host, peer)?)?;
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        self.start_daemon(host)
    }

    fn start_daemon(&mut self, host: usize) -> anyhow::Result<()> {
        let mut command = Command::new(self.programs.folder.join("ftvm-node-daemon"));
        command.arg("run").arg("--config").arg(self.config_path(host));
        let log = self.log(&self.host_folder(host).join("daemon.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut process = self.lab.host(host).spawn("ftvm-node-daemon", command)?;
        let deadline = Instant::now() + PATIENCE;
        while daemon::ask(&self.socket(host), &json!({ "request": "status" }), ANSWER).is_err() {
            if let Some(status) = process.try_wait()? {
                bail!(
                    "the daemon of {} ended ({status}): {}",
                    self.lab.host(host).name(),
                    self.last_words(host)
                );
            }
            ensure!(
                Instant::now() < deadline,
                "the daemon of {} does not answer",
                self.lab.host(host).name()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        self.daemons[host] = Some(process);
        Ok(())
    }

    fn last_words(&self, host: usize) -> String {
        let text = fs::read_to_string(self.host_folder(host).join("daemon.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("; ")
    }

    fn log(&self, path: &Path) -> anyhow::Result<File> {
        let mut options = File::options();
        options.create(true).append(true);
        options
            .open(path)
            .with_context(|| format!("opening {}", path.display()))
    }

    /// A `ftvm standalone` command line that addresses the daemons of these hosts.
    fn ftvm(&self, subcommand: &str, hosts: &[usize]) -> Command {
        let mut command = Command::new(self.programs.folder.join("ftvm"));
        command.args(["standalone", subcommand]).stdin(Stdio::null());
        for &host in hosts {
            command.arg("--daemon").arg(self.socket(host));
        }
        command
    }

    /// One round of questions to a host's daemon about its seat's engine.
    fn ask_engine(&self, host: usize, command: Value) -> anyhow::Result<Value> {
        let request = json!({ "request": "command", "vm": VM, "seat": seat_name(host), "command": command });
        let answer = daemon::ask(&self.socket(host), &request, PATIENCE)
            .with_context(|| format!("asking the daemon of {}", self.lab.host(host).name()))?;
        ensure!(
            answer["response"] == "reply",
            "the daemon of {} said {answer}",
            self.lab.host(host).name()
        );
        Ok(answer["reply"].clone())
    }

    /// The seat of this host is to go: it hands over, or is ejected, and its engine ends.
    pub fn leave(&self, host: usize, within: Duration) -> anyhow::Result<()> {
        let within_ms = u64::try_from(within.as_millis())?;
        let reply = self.ask_engine(host, json!({ "do": "leave", "within_ms": within_ms }))?;
        ensure!(reply["reply"] == "ok", "asked to leave, the engine said {reply}");
        Ok(())
    }

    /// Compares two seats' disks, which may take so long to become equal.
    ///
    /// # Errors
    /// If two differ: which, and where.
    pub fn compare_disks(&self, active: usize, standby: usize, patience: Duration) -> anyhow::Result<()> {
        for disk in 0..self.disks {
            compare::disks(&self.disk(active, disk), &self.disk(standby, disk), patience)
                .with_context(|| format!("disk {disk}"))?;
        }
        Ok(())
    }

    fn digest(&self, host: usize) -> anyhow::Result<Digest> {
        let reply = self.ask_engine(host, json!({ "do": "digest" }))?;
        ensure!(
            reply["reply"] == "digest",
            "instead of a digest, {} said {reply}",
            self.lab.host(host).name()
        );
        Ok(serde_json::from_value(reply)?)
    }
}

/// Runs a command to its end; an exit code other than 0 is an error with what it said.
fn finish(mut command: Command) -> anyhow::Result<()> {
    let output = command
        .output()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(output.status.success(), "{command:?} ({}): {text}", output.status);
    Ok(())
}

/// File name of one of a seat's disks in its host's folder.
pub fn disk_name(disk: usize) -> String {
    match disk {
        0 => DISK.to_owned(),
        disk => format!("disk{disk}.raw"),
    }
}

/// The engine's program.
const ENGINE: &str = "ftvm-engine";

fn seat_name(host: usize) -> String {
    // Three hosts, so three letters.
    char::from(b'a' + host as u8).to_string()
}

/// User ids for engines: high ones where all exist, else some of those that this user namespace has.
fn engine_uids() -> anyhow::Result<(u32, u32)> {
    let map = fs::read_to_string("/proc/self/uid_map").context("reading this namespace's user ids")?;
    Ok(uids_from(&map))
}

/// Lines of a uid map are: first id inside, first id outside, count (user_namespaces(7)).
fn uids_from(map: &str) -> (u32, u32) {
    let ranges = map.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().map(|field| field.parse::<u64>().ok());
        let (first, _, count) = (fields.next()??, fields.next()??, fields.next()??);
        Some((first, count))
    });
    let (first, count) = ranges.max_by_key(|(_, count)| *count).unwrap_or((0, 1));
    match (first, count) {
        (0, count) if count > 1_900_001_000 => (1_900_000_000, 1000),
        // Only root exists: the engine keeps that user, which outside is an ordinary one.
        (_, 1) => (0, 1),
        (first, count) => ((first + count.saturating_sub(100)) as u32, count.min(100) as u32),
    }
}

impl System for Standalone {
    fn protects(&self) -> bool {
        true
    }

    fn engine_program(&self) -> &str {
        ENGINE
    }

    fn start(&mut self) -> anyhow::Result<()> {
        fs::create_dir_all(self.folder.join("arbiter")).context("making the arbiter's folder")?;
        let seats: Vec<String> = (0..self.lab.hosts().len()).map(seat_name).collect();
        let mut identities = self.ftvm("identities", &[]);
        identities
            .args(["--vm", VM, "--seats", &seats.join(","), "--out"])
            .arg(self.folder.join("identities"));
        finish(identities)?;
        for host in 0..self.lab.hosts().len() {
            // The third host is the spare one.
            self.prepare_host(host, [Some(1), Some(0)].get(host).copied().flatten())?;
        }
        let mut up = self.ftvm("up", &[0, 1]);
        up.args(["--unprotected", "--wait-s", "60"]);
        finish(up)
    }

    fn seat(&mut self, host: usize) -> Option<Seat> {
        serde_json::from_value(self.seat_status(host)?["engine"].take()).ok()
    }

    fn hand_over(&mut self, host: usize) -> anyhow::Result<()> {
        let reply = self.ask_engine(host, json!({ "do": "switchover" }))?;
        ensure!(reply["reply"] == "ok", "asked to hand over, the engine said {reply}");
        Ok(())
    }

    fn replace(&mut self, lost: usize, spare: usize) -> anyhow::Result<()> {
        self.replacing.finish()?;
        let everyone: Vec<usize> = (0..self.lab.hosts().len())
            .filter(|&host| self.lab.host(host).is_running())
            .collect();
        let mut command = self.ftvm("replace", &everyone);
        command.args(["--vm", VM, "--lost", &seat_name(lost), "--with", &seat_name(spare)]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        self.replacing.began(command.spawn().context("starting ftvm")?);
        Ok(())
    }

    fn trouble(&mut self) -> Option<String> {
        self.replacing.trouble()
    }

    fn make_spare(&mut self, host: usize) -> anyhow::Result<()> {
        // A controller that waits for protection has seen it by now, or never will.
        self.replacing.finish()?;
        let alive = match &mut self.daemons[host] {
            Some(process) => process.try_wait()?.is_none(),
            None => false,
        };
        if !alive {
            self.daemons[host] = None;
            return self.prepare_host(host, None);
        }
        let request = json!({ "request": "apply_seat", "seat": self.seat_config(host, None) });
        let answer = daemon::ask(&self.socket(host), &request, PATIENCE)?;
        ensure!(
            answer["response"] == "done",
            "the daemon of {} said {answer}",
            self.lab.host(host).name()
        );
        Ok(())
    }

    fn compare_sides(&mut self, active: usize, standby: usize) -> anyhow::Result<()> {
        self.compare_disks(active, standby, SETTLE)?;
        compare::memory(|host| self.digest(host), active, standby, PATIENCE)
    }

    fn logs(&self) -> Vec<PathBuf> {
        (0..self.lab.hosts().len())
            .map(|host| self.host_folder(host).join("daemon.log"))
            .collect()
    }
}

impl Drop for Standalone {
    /// Engines that still have them open keep them until they end.
    fn drop(&mut self) {
        self.daemons.clear();
        if let Err(error) = remove_disks(&self.folder) {
            eprintln!("disks of the hosts stay where they are: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_get_ids_that_exist() {
        assert_eq!(uids_from("         0          0 4294967295\n"), (1_900_000_000, 1000));
        assert_eq!(uids_from("0 1000 1\n"), (0, 1));
        assert_eq!(uids_from("0 1000 1\n1 100000 65536\n"), (65437, 100));
    }
}
