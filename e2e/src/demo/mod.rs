//! The demonstration: a guest is protected, its host is killed before the eyes of a client, and nothing is lost.
//!
//! `rounds` is the play, `system` what it knows of the protected machine, `prerequisites` what it needs of this one. The
//! same play with an unprotected machine ([`unprotected`]) is a negative control: it must end badly.
use std::path::PathBuf;

use crate::judge::packet::Mac;

mod background;
pub mod cluster;
pub mod command;
mod compare;
pub mod daemon;
pub mod linux;
pub mod machines;
pub mod place;
pub mod prerequisites;
pub mod programs;
pub mod rounds;
pub mod standalone;
pub mod system;
pub mod unprotected;
pub mod witness;

/// What is done to the active host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL to the engine.
    KillEngine,
    /// All links down at once, then every process dies.
    KillHost,
    /// SIGSTOP to every process, SIGCONT after another host has taken over.
    PauseHost,
    /// The replication link between active and standby drops everything.
    CutLink,
    /// The replication link drops what the active sends to the standby.
    CutLinkOneWay,
    /// No fault: the active hands over as planned, on a cluster because its node is drained.
    HandOver,
    /// Nothing.
    None,
}

impl Fault {
    /// All faults.
    pub const ALL: [Self; 7] = [
        Self::KillEngine,
        Self::KillHost,
        Self::PauseHost,
        Self::CutLink,
        Self::CutLinkOneWay,
        Self::HandOver,
        Self::None,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::KillEngine => "kill-engine",
            Self::KillHost => "kill-host",
            Self::PauseHost => "pause-host",
            Self::CutLink => "cut-link",
            Self::CutLinkOneWay => "cut-link-one-way",
            Self::HandOver => "hand-over",
            Self::None => "none",
        }
    }

    /// Its name where hosts are nodes of a cluster.
    pub fn name_of_nodes(self) -> &'static str {
        match self {
            Self::KillHost => "kill-node",
            Self::PauseHost => "pause-node",
            Self::HandOver => "drain",
            other => other.name(),
        }
    }

    /// The fault of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    /// The fault of this name where hosts are nodes of a cluster.
    pub fn from_name_of_nodes(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name_of_nodes() == name)
    }
}

/// What runs in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// A small program of this project, on this machine's KVM.
    Embedded,
    /// Debian with Redis and an HTTP server, in emulated machines.
    Linux,
}

impl Guest {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Linux => "linux",
        }
    }

    /// The guest of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Embedded, Self::Linux]
            .into_iter()
            .find(|guest| guest.name() == name)
    }
}

/// The guest's address on the client network.
pub const GUEST_ADDRESS: [u8; 4] = [10, 77, 0, 2];
/// The guest's MAC address, the same wherever it runs.
pub const GUEST_MAC: Mac = [0x02, 0xF7, 0x00, 0x00, 0x00, 0x01];

/// The guest's address by this network card: the first one's is [`GUEST_ADDRESS`].
pub fn card_address(card: usize) -> [u8; 4] {
    let [a, b, c, d] = GUEST_ADDRESS;
    [a, b, c, d + card as u8]
}

/// The MAC address of this network card: the first one's is [`GUEST_MAC`].
pub fn card_mac(card: usize) -> Mac {
    let [a, b, c, d, e, f] = GUEST_MAC;
    [a, b, c, d, e, f + card as u8]
}

/// Pages that the guest keeps writing, and how fast: enough for several rounds of pre-copy in every epoch.
const CHURN_PAGES: u32 = 2_000;
const CHURN_PAGES_PER_S: u32 = 20_000;

/// What the embedded guest is told at its start.
pub fn guest_command_line(address: [u8; 4]) -> String {
    let [a, b, c, d] = address;
    format!("churn_pages={CHURN_PAGES} churn_rate={CHURN_PAGES_PER_S} ip={a}.{b}.{c}.{d}/24 gw=none")
}

/// A MAC address as text.
pub fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What the user chose.
#[derive(Clone, Debug)]
pub struct Options {
    /// The fault.
    pub fault: Fault,
    /// The guest.
    pub guest: Guest,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Guest CPUs.
    pub vcpus: u32,
    /// How often the fault strikes.
    pub rounds: u32,
    /// Where the report goes as JSON.
    pub json: Option<PathBuf>,
    /// Pages that the guest keeps dirtying.
    pub churn_pages: u64,
    /// Pages that each of its CPUs dirties per second.
    pub churn_rate: u64,
    /// A seat that hears nothing from its peer for so long counts it as lost; the engine's default if none.
    pub peer_lost_ms: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fault: Fault::KillHost,
            guest: Guest::Embedded,
            memory_mib: 128,
            vcpus: 1,
            rounds: 1,
            json: None,
            churn_pages: 1024,
            churn_rate: 2000,
            peer_lost_ms: None,
        }
    }
}
