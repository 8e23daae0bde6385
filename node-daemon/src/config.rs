//! The configuration of a standalone daemon: a YAML file.
//!
//! This module alone knows that it is YAML. Unknown fields are refused. The schema is published as
//! `docs/standalone-schema.json`; a test compares it with these types.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ftvm_cpu::CpuBaseline;
use ftvm_crds::ADDRESSES_MAX;
use ftvm_crds::quantity::MEMORY_MIB;
use ftvm_engine::control;
use ftvm_engine::mac::{is_unicast, parse_mac};
use ftvm_protocol::identity::SeatId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tap::MTU_BYTES;

/// Errors of the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It could not be read.
    #[error("configuration {path} can't be read ({source}); docs/standalone.md describes it")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// It is no YAML of this form.
    #[error("configuration {path}: {why}; docs/standalone.md lists the fields")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        why: String,
    },
    /// It contradicts itself.
    #[error("configuration: {place}: {why}; {advice}")]
    Refused {
        /// Which part.
        place: String,
        /// Why.
        why: String,
        /// What to do.
        advice: String,
    },
}

fn refuse<T>(place: impl Into<String>, why: impl Into<String>, advice: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Refused {
        place: place.into(),
        why: why.into(),
        advice: advice.into(),
    })
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this node, for people.
    pub node: String,
    /// Folder of the daemon, not shared with another one.
    pub state_folder: PathBuf,
    /// Socket for `ftvm` and other daemons; `daemon.sock` in the state folder if missing.
    #[serde(default)]
    pub control_socket: Option<PathBuf>,
    /// Address and port where daemons of other machines may ask about the seats here (TLS, with the identities of the seats).
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub peer_listen: Option<SocketAddr>,
    /// The static engine program; `ftvm-engine` beside the daemon if missing.
    #[serde(default)]
    pub engine: Option<PathBuf>,
    /// The arbiter.
    pub arbiter: ArbiterConfig,
    /// The jail of the engines.
    #[serde(default)]
    pub jail: JailConfig,
    /// Seats of this node. Others may be added through the socket.
    #[serde(default)]
    pub seats: Vec<SeatConfig>,
}

/// The arbiter: a folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ArbiterConfig {
    /// Folder on a POSIX file system that all daemons of a virtual machine reach: local for one machine, NFS for two. The
    /// record of a virtual machine is in the folder of its name below.
    pub folder: PathBuf,
}

/// The jail of the engines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct JailConfig {
    /// First of the user ids (and group ids) that engines get, one each; nothing else may use them. Without root the
    /// engines keep the daemon's user.
    pub uid_first: u32,
    /// How many there are.
    pub uid_count: u32,
    /// A network namespace for taps, links and the engine, as a path (`/run/netns/NAME`). Root only.
    pub network_namespace: Option<PathBuf>,
    /// Cgroup folders that engines join, one a hierarchy. They must exist.
    pub cgroups: Vec<PathBuf>,
}

impl Default for JailConfig {
    fn default() -> Self {
        JailConfig {
            uid_first: 1_900_000_000,
            uid_count: 1000,
            network_namespace: None,
            cgroups: Vec::new(),
        }
    }
}

/// One seat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SeatConfig {
    /// Name of the virtual machine: lower-case letters, digits and dashes.
    pub vm: String,
    /// Name of this seat, another one than its peer's.
    pub seat: String,
    /// Folder with the identity of this seat, as `ftvm standalone identities` makes it.
    pub identity: PathBuf,
    /// True on the one seat whose disks hold the virtual machine's first contents; `ftvm standalone up` begins there.
    #[serde(default)]
    pub original_disk: bool,
    /// Memory and CPUs.
    pub machine: MachineConfig,
    /// What the guest boots.
    pub boot: BootConfig,
    /// Network cards.
    #[serde(default)]
    pub nics: Vec<NicConfig>,
    /// Disks.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Header of the seat; beside its disks by preference. In the state folder if missing.
    #[serde(default)]
    pub header: Option<PathBuf>,
    /// Redo journal of the seat; beside its disks by preference. In the state folder if missing.
    #[serde(default)]
    pub journal: Option<PathBuf>,
    /// The replication link.
    pub link: LinkConfig,
    /// Time-outs.
    #[serde(default)]
    pub timing: TimingConfig,
    /// Checkpoint settings.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// What the guest does while there is no standby; the same on both seats.
    #[serde(default)]
    pub when_unprotected: WhenUnprotected,
}

/// What the guest does while there is no standby.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenUnprotected {
    /// It runs on.
    #[default]
    Continue,
    /// It stands still, and nothing that it said leaves, until a standby has joined.
    Pause,
}

/// Memory and CPUs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Guest memory.
    pub memory_mib: u64,
    /// vCPUs, 1 to 16.
    pub vcpus: u8,
    /// The CPU that the guest sees, as `status.cpu.baseline` of a FaultTolerantVM has it: both seats the same. All that the host
    /// can give if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
}

/// What the guest boots.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// A bzImage or a PVH ELF kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    #[serde(default)]
    pub cmdline: String,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// Name in messages and metrics.
    pub name: String,
    /// MAC address, the same on both seats. Frames of the guest with another source do not leave.
    pub mac: String,
    /// The guest's IP addresses there, at most 16, without prefixes, the same on both seats: it speaks with no others, and they are
    /// announced with its MAC address. If missing, nobody knows which it has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>")]
    pub addresses: Vec<IpAddr>,
    /// Name of the tap.
    pub tap: String,
    /// Bridge to put the tap into.
    #[serde(default)]
    pub bridge: Option<String>,
    /// Largest payload of a frame, 576 to 9216 bytes, for a guest that boots here. If missing: what the bridge, or the tap that exists,
    /// carries; 1500 without one.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Use a tap that exists, as it is.
    #[serde(default)]
    pub existing: bool,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name in messages and metrics, the same on both seats.
    pub name: String,
    /// A raw file or a block device of this seat alone.
    pub path: PathBuf,
    /// The guest must not write.
    #[serde(default)]
    pub read_only: bool,
    /// Refuse a disk of another size, so that both seats have the same.
    #[serde(default)]
    pub size_mib: Option<u64>,
}

/// The replication link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// Address and port where this seat listens, as its peer reaches them.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// The other seats.
    #[serde(default)]
    pub peers: Vec<PeerConfig>,
    /// Seats that can't be dialled now, and whose disks may have more: on Kubernetes those of the book whose pods are just being made anew, or that are being
    /// removed. Nothing that a file says: a peer that is configured is asked after whether it answers or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(skip)]
    pub absent: Vec<AbsentSeat>,
}

/// A seat that can't be dialled now. Until somebody answers for it no disk is booted (rule 8).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AbsentSeat {
    /// Its name, for people.
    pub seat: String,
    /// As which it is asked after: one of its pods that may have had an engine.
    pub seat_id: SeatId,
}

/// Another seat of the same virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its name.
    pub seat: String,
    /// Its identity, if the folder `identity` does not know that name.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub seat_id: Option<SeatId>,
    /// Where its link listens.
    #[schemars(with = "String")]
    pub address: SocketAddr,
    /// Control socket of its daemon, where that is on this machine.
    #[serde(default)]
    pub daemon: Option<PathBuf>,
    /// `peer_listen` of its daemon, where that is on another machine.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub daemon_address: Option<SocketAddr>,
}

/// Time-outs in milliseconds; what is missing has the protocol's default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TimingConfig {
    /// Interval of probes on the link.
    pub heartbeat_ms: Option<u32>,
    /// A peer that answered nothing for so long is lost.
    pub peer_lost_ms: Option<u32>,
    /// Deadline of one request to the arbiter.
    pub arbiter_deadline_ms: Option<u32>,
    /// Pause between attempts.
    pub retry_ms: Option<u32>,
    /// Without contact for so long a seat of a pair writes nothing on its own.
    pub contact_limit_ms: Option<u32>,
    /// A standby that acknowledges nothing for so long is ejected.
    pub ack_stall_ms: Option<u32>,
    /// A frozen source waits so long for its target.
    pub switch_ms: Option<u32>,
    /// A seat that needs nothing from the arbiter reads the record this often.
    pub observe_ms: Option<u32>,
    /// At a cold start another seat waits so long for the holder's.
    pub holder_first_ms: Option<u32>,
    /// A disk whose request is under way for longer hangs: 500 to 60000, 30000 if missing.
    pub disk_hang_ms: Option<u32>,
    /// What the active's disk fails is kept from the guest for so long, as far as it runs, while the standby may do it: 0 to 60000, 10000
    /// if missing. With 0 the guest is told at once.
    // What a daemon remembers of a seat is read by one of an earlier release, if that comes back, and fields that it does not know are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_hold_ms: Option<u32>,
}

/// Checkpoint settings; what is missing has the engine's default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Shortest epoch in microseconds.
    pub interval_min_us: Option<u32>,
    /// Longest epoch in microseconds.
    pub interval_max_us: Option<u32>,
    /// Added latency in microseconds that is aimed at within these bounds; if missing, epochs are as short as the load allows.
    pub target_latency_us: Option<u32>,
    /// An epoch ends early at so many dirty pages.
    pub dirty_pages_max: Option<u32>,
    /// Bound of the delta cache.
    pub delta_cache_mib: Option<u32>,
    /// Encoder threads.
    pub workers: Option<u8>,
}

impl TimingConfig {
    /// With defaults filled in.
    pub fn resolve(&self) -> control::Timing {
        let default = control::Timing::default();
        control::Timing {
            heartbeat_ms: self.heartbeat_ms.unwrap_or(default.heartbeat_ms),
            peer_lost_ms: self.peer_lost_ms.unwrap_or(default.peer_lost_ms),
            arbiter_deadline_ms: self.arbiter_deadline_ms.unwrap_or(default.arbiter_deadline_ms),
            retry_ms: self.retry_ms.unwrap_or(default.retry_ms),
            contact_limit_ms: self.contact_limit_ms.unwrap_or(default.contact_limit_ms),
            ack_stall_ms: self.ack_stall_ms.unwrap_or(default.ack_stall_ms),
            switch_ms: self.switch_ms.unwrap_or(default.switch_ms),
            observe_ms: self.observe_ms.unwrap_or(default.observe_ms),
            holder_first_ms: self.holder_first_ms.unwrap_or(default.holder_first_ms),
            disk_hang_ms: self.disk_hang_ms.unwrap_or(default.disk_hang_ms),
            disk_hold_ms: self.disk_hold_ms.unwrap_or(default.disk_hold_ms),
        }
    }
}

impl From<WhenUnprotected> for control::WhenUnprotected {
    fn from(configured: WhenUnprotected) -> Self {
        match configured {
            WhenUnprotected::Continue => control::WhenUnprotected::Continue,
            WhenUnprotected::Pause => control::WhenUnprotected::Pause,
        }
    }
}

impl CheckpointConfig {
    /// With defaults filled in.
    pub fn resolve(&self) -> control::Checkpoint {
        let default = control::Checkpoint::default();
        let delta_cache = self.delta_cache_mib.map(|mib| u64::from(mib) << 20);
        control::Checkpoint {
            dirty_pages_max: self.dirty_pages_max.unwrap_or(default.dirty_pages_max),
            delta_cache_bytes: delta_cache.unwrap_or(default.delta_cache_bytes),
            workers: self.workers.unwrap_or(default.workers),
        }
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Config::parse(&text, path)
    }

    /// Parses and checks a text; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let parse = |error: serde_yaml::Error| ConfigError::Parse {
            path: path.to_owned(),
            why: error.to_string(),
        };
        let config: Config = serde_yaml::from_str(text).map_err(parse)?;
        config.check()?;
        Ok(config)
    }

    /// As YAML text.
    pub fn to_yaml(&self) -> String {
        // Plain data with text keys always encodes.
        serde_yaml::to_string(self).unwrap_or_default()
    }

    /// JSON schema of the file.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Config).to_value()
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.control_socket
            .clone()
            .unwrap_or_else(|| self.state_folder.join("daemon.sock"))
    }

    /// Refuses what contradicts itself.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_name("node", &self.node)?;
        for (n, seat) in self.seats.iter().enumerate() {
            seat.check()?;
            for other in &self.seats[..n] {
                seat.check_beside(other)?;
            }
        }
        Ok(())
    }
}

impl SeatConfig {
    /// How the guest is protected, with defaults filled in.
    pub fn protection(&self) -> control::Protection {
        let default = control::Protection::default();
        let checkpoint = &self.checkpoint;
        control::Protection {
            when_unprotected: self.when_unprotected.into(),
            interval_min_us: checkpoint.interval_min_us.unwrap_or(default.interval_min_us),
            interval_max_us: checkpoint.interval_max_us.unwrap_or(default.interval_max_us),
            target_latency_us: checkpoint.target_latency_us,
        }
    }

    /// `VM/SEAT`, for messages.
    pub fn label(&self) -> String {
        format!("{}/{}", self.vm, self.seat)
    }

    /// Refuses what contradicts itself.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_name("vm", &self.vm)?;
        check_name("seat", &self.seat)?;
        self.check_contents()
    }

    /// As [`SeatConfig::check`], whatever the names.
    pub fn check_contents(&self) -> Result<(), ConfigError> {
        let at = |field: &str| format!("seat {}: {field}", self.label());
        if !(1..=16).contains(&self.machine.vcpus) {
            return refuse(
                at("machine.vcpus"),
                format!("{} vCPUs", self.machine.vcpus),
                "1 to 16 are supported",
            );
        }
        if !MEMORY_MIB.contains(&self.machine.memory_mib) {
            return refuse(
                at("machine.memory_mib"),
                format!("{} MiB", self.machine.memory_mib),
                format!("{} MiB to {} TiB", MEMORY_MIB.start(), MEMORY_MIB.end() >> 20),
            );
        }
        if let Some(Err(error)) = self.machine.cpu.as_deref().map(CpuBaseline::from_text) {
            return refuse(at("machine.cpu"), error.to_string(), "leave it out, or copy it whole");
        }
        self.check_devices()?;
        for peer in &self.link.peers {
            if peer.seat == self.seat || peer.address == self.link.listen {
                let why = format!("the peer {} at {} is this seat itself", peer.seat, peer.address);
                let advice = "two seats need different names, addresses and identities";
                return refuse(at("link.peers"), why, advice);
            }
        }
        let timing = self.timing.resolve();
        if timing.heartbeat_ms == 0 || timing.peer_lost_ms < 2 * timing.heartbeat_ms {
            let why = format!(
                "peer lost after {} ms with a heartbeat every {} ms",
                timing.peer_lost_ms, timing.heartbeat_ms
            );
            return refuse(at("timing"), why, "peer_lost_ms must be at least twice heartbeat_ms");
        }
        if !(500..=60_000).contains(&timing.disk_hang_ms) {
            let why = format!("a disk that hangs after {} ms", timing.disk_hang_ms);
            return refuse(at("timing"), why, "disk_hang_ms must be 500 to 60000");
        }
        if timing.disk_hold_ms > 60_000 {
            let why = format!(
                "errors of a disk that are kept from the guest for {} ms",
                timing.disk_hold_ms
            );
            return refuse(at("timing"), why, "disk_hold_ms must be 0 to 60000");
        }
        let protection = self.protection();
        if protection.interval_min_us == 0 || protection.interval_max_us < protection.interval_min_us {
            return refuse(
                at("checkpoint"),
                "interval bounds are empty",
                "0 < interval_min_us <= interval_max_us",
            );
        }
        if let Some(target_us) = protection.target_latency_us
            && target_us < protection.interval_min_us
        {
            let why = format!(
                "output can't leave within {target_us} µs of epochs of {} µs at least",
                protection.interval_min_us
            );
            return refuse(
                at("checkpoint.target_latency_us"),
                why,
                "lower interval_min_us, or raise the target",
            );
        }
        Ok(())
    }

    fn check_devices(&self) -> Result<(), ConfigError> {
        let at = |field: &str| format!("seat {}: {field}", self.label());
        let mut names = BTreeSet::new();
        for nic in &self.nics {
            check_name("nics.name", &nic.name)?;
            if !parse_mac(&nic.mac).is_some_and(is_unicast) {
                let why = format!("`{}` is no unicast MAC address", nic.mac);
                return refuse(
                    at("nics.mac"),
                    why,
                    "write six hexadecimal pairs, such as 02:00:00:00:00:01",
                );
            }
            if let Some((why, advice)) = wrong_addresses(&nic.addresses) {
                return refuse(at("nics.addresses"), why, advice);
            }
            if nic.tap.is_empty() || nic.tap.len() > 15 || nic.tap.contains(['/', ' ', ':', '%']) {
                return refuse(
                    at("nics.tap"),
                    format!("`{}` is no device name", nic.tap),
                    "1 to 15 letters or digits",
                );
            }
            if let Some(mtu) = nic.mtu.filter(|mtu| !MTU_BYTES.contains(mtu)) {
                return refuse(at("nics.mtu"), format!("{mtu} bytes"), "576 to 9216");
            }
            if !names.insert(&nic.name) {
                return refuse(
                    at("nics.name"),
                    format!("`{}` appears twice", nic.name),
                    "give each card its own name",
                );
            }
        }
        for disk in &self.disks {
            check_name("disks.name", &disk.name)?;
            if !names.insert(&disk.name) {
                return refuse(
                    at("disks.name"),
                    format!("`{}` appears twice", disk.name),
                    "give each disk its own name",
                );
            }
        }
        Ok(())
    }

    /// Refuses two seats of one daemon that would use the same thing.
    pub fn check_beside(&self, other: &SeatConfig) -> Result<(), ConfigError> {
        let place = format!("seats {} and {}", other.label(), self.label());
        let both = |what: &str| refuse(place.clone(), format!("both {what}"), "each seat needs its own");
        if (&self.vm, &self.seat) == (&other.vm, &other.seat) {
            return both("have the same name");
        }
        if self.identity == other.identity {
            return both("have the same identity folder");
        }
        if self.link.listen == other.link.listen {
            return both(&format!("listen on {}", self.link.listen));
        }
        if let Some(path) = self.own_files().intersection(&other.own_files()).next() {
            return both(&format!("use {}", path.display()));
        }
        if let Some(tap) = self
            .nics
            .iter()
            .find(|nic| other.nics.iter().any(|its| its.tap == nic.tap))
        {
            return both(&format!("use tap {}", tap.tap));
        }
        Ok(())
    }

    fn own_files(&self) -> BTreeSet<&PathBuf> {
        let disks = self.disks.iter().filter(|disk| !disk.read_only).map(|disk| &disk.path);
        disks.chain(&self.header).chain(&self.journal).collect()
    }
}

/// Refuses what is no name of a node, virtual machine, seat or device.
pub fn check_name(place: &str, name: &str) -> Result<(), ConfigError> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 40 || !name.chars().all(fits) {
        return refuse(
            place,
            format!("`{name}` is no name"),
            "1 to 40 lower-case letters, digits and dashes",
        );
    }
    Ok(())
}

/// What is wrong with the addresses of a card, and what to write instead.
fn wrong_addresses(addresses: &[IpAddr]) -> Option<(String, &'static str)> {
    if addresses.len() > ADDRESSES_MAX {
        return Some((
            format!("{} addresses", addresses.len()),
            "list 16 at most, or none, and nobody knows which the guest has",
        ));
    }
    let of_no_host = addresses.iter().find(|address| !is_of_a_host(**address));
    if let Some(address) = of_no_host {
        let advice = "write addresses that one host has, such as 192.0.2.7 or 2001:db8::7";
        return Some((format!("no host has {address} in a network"), advice));
    }
    let mut known = BTreeSet::new();
    let twice = addresses.iter().find(|address| !known.insert(**address))?;
    Some((format!("{twice} appears twice"), "leave it out once"))
}

/// As the resource's rule has it (`crds/src/rules.rs`): neither multicast nor loopback, broadcast, unspecified or mapped.
fn is_of_a_host(address: IpAddr) -> bool {
    let special = address.is_multicast() || address.is_loopback() || address.is_unspecified();
    let other = match address {
        IpAddr::V4(address) => address.is_broadcast(),
        IpAddr::V6(address) => address.to_ipv4_mapped().is_some(),
    };
    !special && !other
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
