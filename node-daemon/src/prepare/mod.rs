//! Everything that a seat's engine is given: opened, checked and locked before it starts.
//!
//! ```text
//!   Source ── identity, kernel, disks, header, journal, console ─┐
//!     paths: opened by the daemon (standalone)                   ├─► checks, locks, taps, link ─► Launch + descriptors
//!     handed: from the seat's program (Kubernetes)               ┘
//! ```
//!
//! What is wrong with a seat is found here where possible, so that the message can name the path, the cause and what to do.
//! Disks, header and journal are locked (flock) on the description that the engine gets: the lock lives as long as the
//! engine, whatever becomes of the daemon.

mod host;
mod network;
mod paths;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ftvm_cpu::{CpuBaseline, TextError};
use ftvm_engine::control::{
    Boot, Disk, Fd, Files, Identity, Launch, Link, Listener, Nic, Peer, SocketError, VERSION, exit_code,
};
use ftvm_protocol::core::StoredHeader;
use ftvm_protocol::identity::{Incarnation, SeatId};
use rustix::fs::FlockOperation;

use crate::api::Phase;
use crate::arbiter::Bounded;
use crate::bridges::AllowedBridges;
use crate::config::{PeerConfig, SeatConfig};
use crate::disks::{DiskError, thick};
use crate::identity::{IdentityError, SeatIdentity};
use crate::jail::JailError;
use crate::random;
use crate::state::{SeatFolder, StateError};
use crate::tap::TapError;

pub use paths::{Paths, header_path, journal_path};

/// Why a seat's engine can't be started.
#[derive(Debug, thiserror::Error)]
pub enum SeatError {
    /// Its identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A peer that nobody knows.
    #[error("seat {seat}: peer {peer} is in no seat.json of its identity: give its `seat_id` in link.peers")]
    UnknownPeer {
        /// The seat.
        seat: String,
        /// Its peer.
        peer: String,
    },
    /// Kernel or initrd.
    #[error("{what} {path}: {why}")]
    Boot {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// KVM.
    #[error("/dev/kvm: {why}")]
    Kvm {
        /// Why, and what to do.
        why: String,
    },
    /// The guest's CPU.
    #[error("machine.cpu: {0}: leave it out, or copy it whole")]
    Cpu(#[from] TextError),
    /// Memory.
    #[error(
        "seat {seat} needs {needed_mib} MiB of guest memory, but this host has {available_mib} MiB available: lower \
         machine.memory_mib, stop something, or place the seat elsewhere"
    )]
    Memory {
        /// The seat.
        seat: String,
        /// What it asks for.
        needed_mib: u64,
        /// What there is.
        available_mib: u64,
    },
    /// A disk, the header or the journal.
    #[error("{what} {path}: {why}")]
    Disk {
        /// What it is.
        what: String,
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The link's address.
    #[error(
        "link address {address} can't be listened on ({source}): it must be an address of this node and a free port"
    )]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The network namespace.
    #[error("network namespace {path}: {source}; it must exist, and the daemon must run as root")]
    NetworkNamespace {
        /// The path, or whose it is.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A cgroup.
    #[error("cgroup {path}: {source}; it must exist and be writable by the daemon")]
    Cgroup {
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Something that is to come has not come yet.
    #[error("seat {seat} waits: {why}")]
    NotYet {
        /// The seat.
        seat: String,
        /// For what.
        why: String,
    },
    /// What the seat's program handed over is not what it should be.
    #[error("seat {seat}: {what} that its program handed over: {why}")]
    Handed {
        /// The seat.
        seat: String,
        /// Which descriptor.
        what: String,
        /// Why it is refused, and what to do.
        why: String,
    },
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] SocketError),
}

impl SeatError {
    /// The documented exit code for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            SeatError::Identity(_) | SeatError::UnknownPeer { .. } => exit_code::IDENTITY,
            SeatError::Boot { .. } => exit_code::BOOT,
            SeatError::Kvm { .. } => exit_code::KVM,
            SeatError::Cpu(_) => exit_code::CPU,
            SeatError::Memory { .. } => exit_code::MEMORY,
            SeatError::Disk { .. } | SeatError::Handed { .. } => exit_code::DISK,
            SeatError::NotYet { .. } => exit_code::ARBITER,
            SeatError::Tap(_) | SeatError::Listen { .. } | SeatError::NetworkNamespace { .. } => exit_code::NETWORK,
            SeatError::State(_) => exit_code::STATE_FOLDER,
            SeatError::Jail(_) | SeatError::Cgroup { .. } | SeatError::Control(_) => exit_code::JAIL,
        }
    }
}

/// Where a seat's files come from, and where its engine lives.
pub trait Source: Send + Sync + 'static {
    /// Who the seat is, with the keys that prove it.
    fn identity(&self, config: &SeatConfig) -> Result<(SeatIdentity, Identity), SeatError>;

    /// The header as it is now, for other seats that ask (rule 8).
    fn header(&self, config: &SeatConfig) -> Result<StoredHeader, String>;

    /// Why no engine can be started before a person or a program does something; none: it can be tried.
    fn missing(&self, config: &SeatConfig) -> Option<(Phase, String)>;

    /// Called before each start: what has to be settled with the arbiter first.
    fn settle(&self, config: &SeatConfig, arbiter: &Bounded) -> Result<(), SeatError>;

    /// The files, opened and of the right kind.
    fn open(&self, config: &SeatConfig, folder: &SeatFolder) -> Result<Materials, SeatError>;

    /// Cgroups and network of the next engine.
    fn place(&self) -> Result<Place, SeatError>;

    /// Whether a process is where engines of this seat live, as far as that can be known.
    fn has_process(&self) -> bool {
        false
    }

    /// The same of another pod of this node.
    fn has_process_of(&self, _pod: SeatId) -> bool {
        false
    }

    /// Whether the seat was told to go: no engine is begun then.
    fn ends(&self) -> bool {
        false
    }

    /// The engine has ended: its cgroups may go.
    fn left(&self) {}
}

/// What a seat's engine is made of.
#[derive(Debug)]
pub struct Materials {
    /// Who the seat is.
    pub who: SeatIdentity,
    /// Its keys.
    pub identity: Identity,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The disks, in the order of the configuration.
    pub disks: Vec<File>,
    /// The header.
    pub header: File,
    /// The journal.
    pub journal: File,
    /// Takes the guest's console.
    pub console: File,
    /// Whether the daemon makes the disks thick itself; else it only counts their blocks.
    pub allocate: bool,
    /// With a FIFO as console: how long the engine goes on without anybody at its other end.
    pub seat_patience_ms: Option<u32>,
}

/// Where an engine lives.
#[derive(Debug, Default)]
pub struct Place {
    /// Folders of cgroups to join, one a hierarchy.
    pub cgroups: Vec<PathBuf>,
    /// Network namespace of the engine and of its link; none: the daemon's.
    pub network: Option<Arc<OwnedFd>>,
    /// Whether taps are made in that namespace too; else in the daemon's.
    pub taps_inside: bool,
}

/// A launch message with its descriptors.
#[derive(Debug)]
pub struct Prepared {
    /// The message.
    pub launch: Launch,
    /// The descriptors that it names, in order.
    pub fds: Vec<OwnedFd>,
}

#[derive(Debug, Default)]
struct Table(Vec<OwnedFd>);

impl Table {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> Fd {
        self.0.push(fd.into());
        // A configuration with so many devices is over the bound of a message and refused when it is sent.
        Fd(u16::try_from(self.0.len() - 1).unwrap_or(u16::MAX))
    }
}

/// Opens and checks everything for a new engine of this seat.
pub fn prepare(
    config: &SeatConfig,
    source: &dyn Source,
    place: &Place,
    folder: &SeatFolder,
    bridges: &AllowedBridges,
) -> Result<Prepared, SeatError> {
    folder.remove_control_socket()?;
    let control_listener = Listener::bind(&folder.control_socket())?;
    let materials = source.open(config, folder)?;
    check_boot(config, &materials)?;
    host::check_memory(config)?;
    let cpu = config.machine.cpu.as_deref().map(CpuBaseline::from_text).transpose()?;
    let kvm = host::open_kvm("/dev/kvm")?;
    lock_own(config, folder, &materials)?;
    let (taps, listener) = network::open(config, place, bridges)?;
    let who = &materials.who;
    let peers = peers(config, who)?;
    let mut table = Table::default();
    let nics = config.nics.iter().zip(taps);
    let disks = config.disks.iter().zip(materials.disks);
    let launch = Launch {
        version: VERSION,
        vm: config.vm.clone(),
        vm_id: who.vm_id,
        seat: config.seat.clone(),
        incarnation: Incarnation {
            seat: who.seat_id,
            start: random::nonzero_u64(),
        },
        other_seats: peers.iter().map(|peer| peer.seat_id).chain(absent(config)).collect(),
        machine: serde_json::json!({
            "memory_bytes": config.machine.memory_mib << 20,
            "vcpus": config.machine.vcpus,
            "cpu": cpu,
        }),
        boot: Boot {
            kernel: table.add(materials.kernel),
            initrd: materials.initrd.map(|file| table.add(file)),
            cmdline: config.boot.cmdline.clone(),
        },
        nics: nics
            .map(|(nic, tap)| Nic {
                name: nic.name.clone(),
                mac: nic.mac.clone(),
                addresses: nic.addresses.clone(),
                mtu: tap.mtu,
                tap: table.add(tap.device),
            })
            .collect(),
        disks: disks
            .map(|(disk, file)| Disk {
                name: disk.name.clone(),
                file: table.add(file),
                path: disk.path.display().to_string(),
                read_only: disk.read_only,
            })
            .collect(),
        link: Link {
            listener: table.add(listener),
            listen_address: config.link.listen,
            peers,
            identity: materials.identity,
        },
        timing: config.timing.resolve(),
        checkpoint: config.checkpoint.resolve(),
        protection: config.protection(),
        files: Files {
            kvm: table.add(kvm),
            userfaultfd: host::open_userfaultfd().map(|file| table.add(file)),
            header: table.add(materials.header),
            journal: table.add(materials.journal),
            control_listener: table.add(control_listener.into_fd()),
            console: table.add(materials.console),
            exit_report: table.add(folder.create("exit.json")?),
        },
        daemon_uid: rustix::process::geteuid().as_raw(),
        seat_patience_ms: materials.seat_patience_ms,
    };
    Ok(Prepared { launch, fds: table.0 })
}

/// The peers of a seat with their identities.
pub fn peers(config: &SeatConfig, who: &SeatIdentity) -> Result<Vec<Peer>, SeatError> {
    config
        .link
        .peers
        .iter()
        .map(|peer| peer_of(config, who, peer))
        .collect()
}

/// Other seats that can't be dialled now, and are asked after all the same.
pub fn absent(config: &SeatConfig) -> Vec<SeatId> {
    config.link.absent.iter().map(|absent| absent.seat_id).collect()
}

/// The identity of a peer, if the configuration or the seat's own identity knows it.
pub fn known_id(who: &SeatIdentity, peer: &PeerConfig) -> Option<SeatId> {
    peer.seat_id.or_else(|| who.seats.get(&peer.seat).copied())
}

fn peer_of(config: &SeatConfig, who: &SeatIdentity, peer: &PeerConfig) -> Result<Peer, SeatError> {
    let seat_id = known_id(who, peer).ok_or_else(|| SeatError::UnknownPeer {
        seat: config.label(),
        peer: peer.seat.clone(),
    })?;
    Ok(Peer {
        seat: peer.seat.clone(),
        seat_id,
        address: peer.address,
    })
}

// ---- kernel and initrd

fn check_boot(config: &SeatConfig, materials: &Materials) -> Result<(), SeatError> {
    let kernel_bytes = boot_bytes("kernel", &config.boot.kernel, &materials.kernel)?;
    if !is_kernel(&materials.kernel) {
        let why = "not a kernel: neither a bzImage (64-bit boot protocol) nor an ELF program".to_owned();
        return Err(SeatError::Boot {
            what: "kernel",
            path: config.boot.kernel.clone(),
            why,
        });
    }
    let Some(initrd) = &materials.initrd else { return Ok(()) };
    let path = config.boot.initrd.clone().unwrap_or_default();
    let bytes = boot_bytes("initrd", &path, initrd)?;
    if bytes.saturating_add(kernel_bytes) >= config.machine.memory_mib << 20 {
        let why = format!(
            "{bytes} bytes do not fit beside the kernel ({kernel_bytes}) into {} MiB of guest memory: raise \
             machine.memory_mib",
            config.machine.memory_mib
        );
        return Err(SeatError::Boot {
            what: "initrd",
            path,
            why,
        });
    }
    Ok(())
}

fn boot_bytes(what: &'static str, path: &Path, file: &File) -> Result<u64, SeatError> {
    let refuse = |why: String| SeatError::Boot {
        what,
        path: path.to_owned(),
        why,
    };
    let data = file.metadata().map_err(|error| refuse(error.to_string()))?;
    if !data.is_file() || data.len() == 0 {
        return Err(refuse("not a file with contents".to_owned()));
    }
    Ok(data.len())
}

/// A bzImage says `HdrS` at 0x202 (Linux boot protocol); an ELF file begins with its magic.
fn is_kernel(file: &File) -> bool {
    let mut start = [0u8; 0x206];
    let length = file.read_at(&mut start, 0).unwrap_or(0);
    start[..length].starts_with(b"\x7fELF") || start.get(0x202..length) == Some(b"HdrS")
}

// ---- disks, header, journal

fn lock_own(config: &SeatConfig, folder: &SeatFolder, materials: &Materials) -> Result<(), SeatError> {
    for (disk, file) in config.disks.iter().zip(&materials.disks) {
        let what = format!("disk {}", disk.name);
        check_size(disk.size_mib, &what, &disk.path, file)?;
        if !disk.read_only {
            lock(file, &what, &disk.path)?;
            check_blocks(file, materials.allocate, &what, &disk.path)?;
        }
    }
    lock(&materials.header, "header", &header_path(config, folder))?;
    lock(&materials.journal, "journal", &journal_path(config, folder))
}

fn check_size(size_mib: Option<u64>, what: &str, path: &Path, file: &File) -> Result<(), SeatError> {
    let refuse = |why: String| SeatError::Disk {
        what: what.to_owned(),
        path: path.to_owned(),
        why,
    };
    let size_bytes = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))
        .map_err(|errno| refuse(format!("its size can't be read: {errno}")))?;
    if size_bytes == 0 || size_bytes % 512 != 0 {
        return Err(refuse(format!(
            "{size_bytes} bytes are no whole number of 512-byte sectors: make it whole (truncate)"
        )));
    }
    match size_mib {
        Some(mib) if size_bytes != mib << 20 => Err(refuse(format!(
            "{size_bytes} bytes, but size_mib says {mib} MiB: both seats need disks of one size"
        ))),
        _ => Ok(()),
    }
}

/// Every block of a disk is allocated before its guest starts: it never runs full under it.
fn check_blocks(file: &File, allocate: bool, what: &str, path: &Path) -> Result<(), SeatError> {
    let make = if allocate { thick::make } else { thick::verify };
    let size = thick::length(file).map_err(|source| DiskError::Io {
        what: "reading its size",
        source,
    });
    size.and_then(|size_bytes| make(file, size_bytes))
        .map_err(|error| SeatError::Disk {
            what: what.to_owned(),
            path: path.to_owned(),
            why: crate::explain(&error),
        })
}

fn lock(file: &File, what: &str, path: &Path) -> Result<(), SeatError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let why = "in use by another seat or program (flock): two writers would destroy it".to_owned();
            Err(SeatError::Disk {
                what: what.to_owned(),
                path: path.to_owned(),
                why,
            })
        }
        Err(errno) => {
            let why = format!("can't be locked ({errno}): its file system must support flock");
            Err(SeatError::Disk {
                what: what.to_owned(),
                path: path.to_owned(),
                why,
            })
        }
    }
}
