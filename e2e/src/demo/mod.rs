//! The demonstration: a guest is protected, its host is killed before the eyes of a client, and nothing is lost.
//!
//! `rounds` is the play, `system` what it knows of the protected machine, `prerequisites` what it needs of this one. The
//! same play with an unprotected machine ([`unprotected`]) is a negative control: it must end badly.
use std::path::PathBuf;

pub mod prerequisites;
pub mod programs;
pub mod rounds;
pub mod system;
pub mod unprotected;

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
    /// Nothing.
    None,
}

impl Fault {
    /// All faults.
    pub const ALL: [Self; 6] = [
        Self::KillEngine,
        Self::KillHost,
        Self::PauseHost,
        Self::CutLink,
        Self::CutLinkOneWay,
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
            Self::None => "none",
        }
    }

    /// The fault of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }
}

/// What the user chose.
#[derive(Clone, Debug)]
pub struct Options {
    /// The fault.
    pub fault: Fault,
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
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fault: Fault::KillHost,
            memory_mib: 128,
            vcpus: 1,
            rounds: 1,
            json: None,
            churn_pages: 1024,
            churn_rate: 2000,
        }
    }
}
