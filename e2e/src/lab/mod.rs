//! Emulated machines: images, nodes, networks and faults.
//!
//! ```text
//!   this process (judge, test)            lab namespace (own network, mounts, process ids)
//!   ─────────────────────────             ┌──────────────────────────────────────────────────────┐
//!   Lab ── Sandbox ─────────────────────► │ mgmt   10.77.0.0/24 ── lab .1 · node 1 .11 · node 2 .12│ agent, shared folder
//!    │      (launcher thread, one pipe)   │ repl   10.78.0.0/24 ── lab .1 · node 1 .11 · node 2 .12│ replication link
//!    ├─ Node 1 = one QEMU process         │ client 10.79.0.0/24 ── lab .1 · guest .100            │ what clients see
//!    ├─ Node 2 = one QEMU process         └──────────────────────────────────────────────────────┘
//!    └─ Share = one NFS server
//! ```
//! Invariant: nothing outlives the process that made the lab; the kernel takes it back (see [`sandbox`]).
//! Invariant: labs of several processes do not meet: each has its own network, and its own folder for disks and logs.
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, ensure};

use crate::hosts::net;

pub mod binaries;
pub mod cache;
mod folder;
pub mod guest;
pub mod image;
pub mod node;
pub mod relay;
pub mod sandbox;
pub mod session;
pub mod share;
pub mod wire;

pub(crate) use folder::{Folder, sweep};
pub use node::{Node, NodeConfig};
pub use sandbox::Sandbox;
pub use share::Share;

use image::Image;

/// A network of the lab; every node has a card in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// The lab talks to the nodes' agents, and nodes reach the shared folder. Not part of what is tested.
    Management,
    /// The nodes among themselves: the replication link.
    Replication,
    /// Guests and their clients.
    Client,
}

/// All networks, in the order of the nodes' cards.
pub const NETWORKS: [Network; 3] = [Network::Management, Network::Replication, Network::Client];

impl Network {
    /// The bridge in the lab's namespace.
    #[must_use]
    pub fn bridge(self) -> &'static str {
        match self {
            Network::Management => "mgmt",
            Network::Replication => "repl",
            Network::Client => "client",
        }
    }

    /// The card in a node.
    #[must_use]
    pub fn card(self) -> &'static str {
        match self {
            Network::Management => "eth0",
            Network::Replication => "eth1",
            Network::Client => "eth2",
        }
    }

    /// An address in it; the lab itself is 1.
    #[must_use]
    pub fn address(self, host: u8) -> Ipv4Addr {
        match self {
            Network::Management => Ipv4Addr::new(10, 77, 0, host),
            Network::Replication => Ipv4Addr::new(10, 78, 0, host),
            Network::Client => Ipv4Addr::new(10, 79, 0, host),
        }
    }
}

/// A lab: namespaces with three networks, a folder for its disks and logs, and the programs that its nodes get.
pub struct Lab {
    sandbox: Arc<Sandbox>,
    folder: Folder,
}

impl Lab {
    /// Makes a lab. `programs` are files that every node finds under their own names in /lab.
    ///
    /// # Errors
    /// Without the right to make namespaces, or when a program is missing.
    pub fn new(programs: &[PathBuf]) -> anyhow::Result<Self> {
        let folder = Folder::new()?;
        let sandbox = Arc::new(Sandbox::new()?);
        make_networks(&sandbox)?;
        make_payload(folder.path(), programs)?;
        Ok(Self { sandbox, folder })
    }

    /// Boots a node; `index` (1 to 89) must be its own.
    ///
    /// # Errors
    /// If its image cannot be built or it does not boot.
    pub fn node(&self, name: &str, index: u8, config: NodeConfig) -> anyhow::Result<Node> {
        ensure!(
            (1..90).contains(&index),
            "node {name}: {index} is no index of a node (1 to 89)"
        );
        let node = Node::new(
            &self.sandbox,
            self.folder.path(),
            &Image::node()?,
            (name, index),
            config,
        )?;
        node.power_on()?;
        Ok(node)
    }

    /// Exports a folder that the nodes can share; at most once a lab.
    ///
    /// # Errors
    /// If the NFS server does not start.
    pub fn share(&self) -> anyhow::Result<Share> {
        Share::new(&self.sandbox, self.folder.path())
    }

    /// The lab's namespaces: clients outside the nodes connect from there.
    #[must_use]
    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    /// The lab's folder for disks and logs; removed with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Makes the disk, in `folder`, that carries agent and programs into the nodes.
pub(crate) fn make_payload(folder: &Path, programs: &[PathBuf]) -> anyhow::Result<()> {
    let root = folder.join("payload");
    fs::create_dir(&root)?;
    let mut bytes = 0;
    let agent = binaries::build(&[("ftvm-e2e", "ftvm-node-agent")], binaries::Profile::Dev)?;
    for program in agent.iter().chain(programs) {
        let name = program
            .file_name()
            .with_context(|| format!("{} names no file", program.display()))?;
        bytes += fs::copy(program, root.join(name)).with_context(|| format!("cannot read {}", program.display()))?;
    }
    let init = root.join("init.sh");
    fs::write(&init, include_str!("../../nodes/init.sh"))?;
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let size_mib = (bytes >> 20) + (bytes >> 24) + 8;
    let image = folder.join(node::PAYLOAD);
    make_ext4(&root, &image, size_mib, &["-O", "^has_journal"])?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

/// Makes a file system that has the content of a folder.
pub(crate) fn make_ext4(content: &Path, image: &Path, size_mib: u64, options: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("mke2fs")
        .args(["-q", "-t", "ext4"])
        .args(options)
        .arg("-d")
        .args([content, image])
        .arg(format!("{size_mib}M"))
        .stdin(Stdio::null())
        .output()
        .context("cannot start mke2fs")?;
    ensure!(
        output.status.success(),
        "mke2fs: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Makes the bridges of all networks, on which the lab itself has address 1.
pub(crate) fn make_networks(sandbox: &Sandbox) -> anyhow::Result<()> {
    let mut lines = String::new();
    for network in NETWORKS {
        let (bridge, address) = (network.bridge(), network.address(1));
        // Its own, or it would be that of one of its ports, and change when that goes: whoever spoke with address 1 would speak to nobody.
        let [_, second, _, host] = address.octets();
        lines += &format!(
            "link add {bridge} address 02:00:0a:{second:02x}:00:{host:02x} type bridge forward_delay 0 mcast_snooping 0\n\
             address add {address}/24 dev {bridge}\nlink set {bridge} up\n"
        );
    }
    sandbox.in_network(|| net::ip(&lines))??;
    Ok(())
}
