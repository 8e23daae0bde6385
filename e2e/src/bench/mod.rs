//! The benchmark: what protection costs, measured beside QEMU's answers to the same questions, in one run on one KVM.
//!
//! ```text
//!   pair      a real pair on hosts made of namespaces (`demo::standalone`): pauses, latency, speed, memory, resync
//!   block     the guest's own load on its disk, protected and alone in turns, on a pair of its own
//!   gap       the demonstration itself, a few rounds of two faults
//!   qemu      the same guest under QEMU: live migration, then COLO checkpoints
//!   kubernetes  a VM on a cluster, the operator at rest, the operator with many VMs: runs of their own
//!   report    every figure, as JSON with stable keys; `goals` and `tables` read it
//! ```
//!
//! Guests get the same load everywhere: so many pages, each written once in every epoch ([`Load`]).
//!
//! Nothing here judges by time: a figure that misses its goal is told, and the run still succeeds. It fails when
//! something could not be measured.
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure};

use crate::lab::binaries::Profile;

pub mod block;
pub mod client;
pub mod command;
pub mod facts;
pub mod gap;
pub mod goals;
pub mod join;
pub mod kubernetes;
pub mod pair;
pub mod process;
pub mod qemu;
pub mod report;
pub mod resync;
pub mod tables;
pub mod window;

/// A part of the benchmark that can be run alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Our pauses against the dirty set.
    Pause,
    /// Time from request to answer, with and without protection.
    Latency,
    /// Guest speed, with and without protection.
    Speed,
    /// What the engines' processes take beside guest memory.
    Memory,
    /// The rate of a full resync against a plain TLS stream.
    Resync,
    /// What a client waits when an engine or a host is killed.
    Gap,
    /// QEMU's live migration.
    Migration,
    /// QEMU's COLO checkpoints.
    Colo,
    /// Throughput of the guest's disk, with and without protection.
    Block,
    /// A VM on a cluster: apply, killed nodes, drains.
    Cluster,
    /// Operator and daemons with one VM at rest.
    Operator,
    /// The operator with many VMs on hollow nodes.
    Fleet,
}

impl Part {
    /// Those of the engine, which need no root: one run measures several on one pair.
    pub const OF_ENGINE: [Self; 9] = [
        Self::Pause,
        Self::Latency,
        Self::Speed,
        Self::Memory,
        Self::Resync,
        Self::Gap,
        Self::Migration,
        Self::Colo,
        Self::Block,
    ];
    /// Those that need a cluster.
    pub const OF_KUBERNETES: [Self; 3] = [Self::Cluster, Self::Operator, Self::Fleet];

    /// All parts.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::OF_ENGINE.into_iter().chain(Self::OF_KUBERNETES)
    }

    /// Whether it needs a cluster.
    pub fn is_of_kubernetes(self) -> bool {
        Self::OF_KUBERNETES.contains(&self)
    }

    /// Whether its figures have a section of a page to themselves, and so can be measured anew alone.
    pub fn has_section(self) -> bool {
        self.is_of_kubernetes() || self == Self::Block
    }

    /// Its name on the command line and in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Latency => "latency",
            Self::Speed => "speed",
            Self::Memory => "memory",
            Self::Resync => "resync",
            Self::Gap => "gap",
            Self::Migration => "migration",
            Self::Colo => "colo",
            Self::Block => "block",
            Self::Cluster => "cluster",
            Self::Operator => "operator",
            Self::Fleet => "fleet",
        }
    }

    /// The part of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all().find(|part| part.name() == name)
    }
}

/// What the user chose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Parts to run.
    pub parts: Vec<Part>,
    /// Seconds instead of minutes: shows that everything can be measured, and nothing else.
    pub short: bool,
    /// Where the report goes as JSON.
    pub json: Option<PathBuf>,
    /// A Markdown file whose marked section becomes the report's tables.
    pub markdown: Option<PathBuf>,
    /// How the programs are built: figures of unoptimised ones mean nothing.
    pub profile: Profile,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// How long a VM at rest is watched; none: as the plan says.
    pub rest_s: Option<u64>,
    /// Length of an epoch when nobody waits for output, and QEMU's delay between checkpoints, in milliseconds.
    pub epoch_ms: u32,
}

impl Options {
    /// Every part of the engine, at full length.
    pub fn full() -> Self {
        Self {
            parts: Part::OF_ENGINE.to_vec(),
            short: false,
            json: None,
            markdown: None,
            profile: Profile::Fast,
            memory_mib: 1024,
            rest_s: None,
            epoch_ms: 50,
        }
    }

    /// The same, in seconds.
    pub fn short() -> Self {
        Self {
            short: true,
            memory_mib: 128,
            epoch_ms: 20,
            ..Self::full()
        }
    }

    /// Whether a part is to be run.
    pub fn wants(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    /// Whether these parts can be run together, and their figures be written where they are to go.
    ///
    /// # Errors
    /// If not, with what to do.
    pub fn check(&self) -> anyhow::Result<()> {
        if let Some(page) = &self.markdown {
            tables::check_page(&self.parts, page)?;
        }
        let of_kubernetes = self.parts.iter().filter(|part| part.is_of_kubernetes()).count();
        if of_kubernetes == self.parts.len() {
            return Ok(());
        }
        ensure!(
            of_kubernetes == 0,
            "cluster, operator and fleet are measured on clusters and the other parts in namespaces: give them in runs of their own"
        );
        let shares = |part: &Part| !part.has_section();
        let missing: Vec<&str> = Part::OF_ENGINE
            .into_iter()
            .filter(|part| shares(part) && !self.wants(*part))
            .map(Part::name)
            .collect();
        let some_share = self.parts.iter().any(shares);
        if self.markdown.is_some() && some_share && !missing.is_empty() {
            bail!(
                "pause to colo share one section of a page: without {} their figures would be wiped out of it; run all parts, or leave --markdown out",
                missing.join(", ")
            );
        }
        Ok(())
    }

    /// How long a VM at rest is watched.
    pub fn rest_window(&self) -> Duration {
        self.rest_s.map_or(self.plan().rest, Duration::from_secs)
    }

    /// How long and how often to measure.
    pub fn plan(&self) -> Plan {
        if self.short { Plan::SHORT } else { Plan::FULL }
    }
}

/// How long and how often to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// A window in which pauses are counted.
    pub window: Duration,
    /// A window in which the guest's speed or requests are counted.
    pub speed_window: Duration,
    /// From a change of the load to the window's begin.
    pub settle: Duration,
    /// A window in which the requests to the guest's disk are counted.
    pub block_window: Duration,
    /// How often each of these is measured, with and without protection.
    pub block_rounds: u32,
    /// Full resyncs.
    pub resyncs: u32,
    /// Rounds of each fault.
    pub faults: u32,
    /// Migrations for each load.
    pub migrations: u32,
    /// Length of the plain stream, in MiB.
    pub stream_mib: u32,
    /// How often a VM is applied to a cluster.
    pub applies: u32,
    /// How often its node is killed, and how often it is drained.
    pub nodes_lost: u32,
    /// How long a VM at rest is watched.
    pub rest: Duration,
    /// VMs of the fleet.
    pub vms: u32,
    /// Nodes of the fleet.
    pub hollow_nodes: u32,
    /// A node of the fleet that was not heard of for so long is not ready.
    pub hollow_grace: Duration,
}

impl Plan {
    /// A full run takes some fifteen minutes.
    const FULL: Self = Self {
        window: Duration::from_secs(20),
        speed_window: Duration::from_secs(10),
        settle: Duration::from_millis(1500),
        block_window: Duration::from_secs(2),
        block_rounds: 3,
        resyncs: 3,
        faults: 5,
        migrations: 5,
        stream_mib: 1024,
        applies: 3,
        nodes_lost: 3,
        rest: Duration::from_secs(120),
        vms: 500,
        hollow_nodes: 20,
        // As a cluster is by default.
        hollow_grace: Duration::from_secs(40),
    };
    /// Enough for every figure to exist.
    const SHORT: Self = Self {
        window: Duration::from_millis(500),
        speed_window: Duration::from_millis(300),
        settle: Duration::from_millis(100),
        block_window: Duration::from_millis(50),
        block_rounds: 1,
        resyncs: 1,
        faults: 1,
        migrations: 1,
        stream_mib: 64,
        applies: 1,
        nodes_lost: 1,
        rest: Duration::from_secs(10),
        vms: 6,
        hollow_nodes: 3,
        hollow_grace: Duration::from_secs(10),
    };
}

/// What the guest does while it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Pages that it writes once in every epoch, one after the other.
    pub dirty_pages: u32,
    /// Whole pages are written anew, with data that does not compress, instead of one word of each.
    pub whole_pages: bool,
    /// Its CPU is never idle: it computes whenever it does not write pages.
    pub busy: bool,
}

impl Load {
    /// Dirty pages an epoch that are measured.
    pub const PAGES: [u32; 4] = [0, 256, 2048, 8192];

    /// One word of each page, and an idle CPU otherwise.
    pub fn idle(dirty_pages: u32) -> Self {
        Self {
            dirty_pages,
            whole_pages: false,
            busy: false,
        }
    }

    /// One word of each page, and a busy CPU.
    pub fn busy(dirty_pages: u32) -> Self {
        Self {
            busy: true,
            ..Self::idle(dirty_pages)
        }
    }

    /// Whole pages, and an idle CPU otherwise.
    pub fn whole(dirty_pages: u32) -> Self {
        Self {
            whole_pages: true,
            ..Self::idle(dirty_pages)
        }
    }

    /// Pages a second, so that all are written once in an epoch of `epoch_ms`.
    pub fn pages_per_s(self, epoch_ms: u32) -> u64 {
        u64::from(self.dirty_pages) * 1000 / u64::from(epoch_ms.max(1))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_part_has_a_name_of_its_own() {
        for part in Part::all() {
            assert_eq!(Part::from_name(part.name()), Some(part));
        }
        assert_eq!(Part::from_name("everything"), None);
    }

    #[test]
    fn a_run_that_would_wipe_figures_is_refused_before_it_begins() {
        let page = Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks.md"));
        let run = |parts: &[Part], markdown: &Option<PathBuf>| {
            let options = Options {
                parts: parts.to_vec(),
                markdown: markdown.clone(),
                ..Options::full()
            };
            options.check().map_err(|error| format!("{error:#}"))
        };
        assert_eq!(run(&Part::OF_ENGINE, &page), Ok(()));
        assert_eq!(run(&[Part::Fleet], &page), Ok(()));
        assert_eq!(run(&[Part::Block], &page), Ok(()));
        assert_eq!(run(&[Part::Pause], &None), Ok(()));
        for some in [&[Part::Pause][..], &[Part::Pause, Part::Block][..]] {
            assert!(run(some, &page).unwrap_err().contains("wiped out"));
        }
        assert_eq!(
            run(&Part::OF_ENGINE[..8], &page),
            Ok(()),
            "block is not in their section"
        );
        let missing = run(&[Part::Fleet], &Some(PathBuf::from("/nowhere/page.md"))).unwrap_err();
        assert!(missing.contains("/nowhere/page.md"), "{missing}");
        let other = Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md"));
        let no_section = run(&[Part::Fleet], &other).unwrap_err();
        assert!(no_section.contains("figures of fleet: begin"), "{no_section}");
        assert!(
            run(&[Part::Pause, Part::Fleet], &None)
                .unwrap_err()
                .contains("of their own")
        );
    }

    #[test]
    fn a_load_is_written_once_an_epoch() {
        assert_eq!(Load::idle(256).pages_per_s(50), 5120);
        assert_eq!(Load::idle(0).pages_per_s(50), 0);
    }
}
