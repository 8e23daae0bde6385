//! Everything that a seat's engine is given: opened, checked and locked before it starts.
//!
//! What is wrong with a seat is found here where possible, so that the message can name the path, the cause and what to do.
//! Disks, header and journal are locked (flock) on the description that the engine gets: the lock lives as long as the
//! engine, whatever becomes of the daemon.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ftvm_engine::control::{Boot, Disk, Fd, Files, Launch, Link, Listener, Nic, Peer, SocketError, VERSION, exit_code};
use ftvm_protocol::identity::{Incarnation, SeatId};
use rustix::fs::FlockOperation;

use crate::config::{DiskConfig, NicConfig, PeerConfig, SeatConfig};
use crate::identity::{self, IdentityError, SeatIdentity};
use crate::jail::JailError;
use crate::random;
use crate::state::{SeatFolder, StateError};
use crate::tap::{self, TapError, TapSpec};

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
        /// The path.
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
            SeatError::Memory { .. } => exit_code::MEMORY,
            SeatError::Disk { .. } => exit_code::DISK,
            SeatError::Tap(_) | SeatError::Listen { .. } | SeatError::NetworkNamespace { .. } => exit_code::NETWORK,
            SeatError::State(_) => exit_code::STATE_FOLDER,
            SeatError::Jail(_) | SeatError::Cgroup { .. } | SeatError::Control(_) => exit_code::JAIL,
        }
    }
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
pub fn prepare(config: &SeatConfig, folder: &SeatFolder, network: Option<&Path>) -> Result<Prepared, SeatError> {
    let (who, identity) = identity::load(&config.identity, &config.vm, &config.seat)?;
    let mut table = Table::default();
    let boot = open_boot(config, &mut table)?;
    check_memory(config)?;
    let kvm = open_kvm("/dev/kvm")?;
    let mut disks = Vec::new();
    for disk in &config.disks {
        disks.push(open_disk(disk, &mut table)?);
    }
    let header = open_own("header", &header_path(config, folder))?;
    let journal = open_own("journal", &journal_path(config, folder))?;
    let (nics, listener) = in_network(network, || open_network(config))?;
    let nics = nics
        .into_iter()
        .map(|(nic, tap)| Nic {
            tap: table.add(tap),
            ..nic
        })
        .collect();
    folder.remove_control_socket()?;
    let control_listener = Listener::bind(&folder.control_socket())?;
    let files = Files {
        kvm: table.add(kvm),
        userfaultfd: open_userfaultfd().map(|file| table.add(file)),
        header: table.add(header),
        journal: table.add(journal),
        control_listener: table.add(control_listener.into_fd()),
        console: table.add(folder.open_log("console.log", CONSOLE_LOG_BYTES_MAX)?),
        exit_report: table.add(folder.create("exit.json")?),
    };
    let launch = Launch {
        version: VERSION,
        vm: config.vm.clone(),
        vm_id: who.vm_id,
        seat: config.seat.clone(),
        incarnation: Incarnation {
            seat: who.seat_id,
            start: random::nonzero_u64(),
        },
        other_seats: peers(config, &who)?.iter().map(|peer| peer.seat_id).collect(),
        machine: serde_json::json!({
            "memory_bytes": config.machine.memory_mib << 20,
            "vcpus": config.machine.vcpus,
        }),
        boot,
        nics,
        disks,
        link: Link {
            listener: table.add(listener),
            listen_address: config.link.listen,
            peers: peers(config, &who)?,
            identity,
        },
        timing: config.timing.resolve(),
        checkpoint: config.checkpoint.resolve(),
        files,
        daemon_uid: rustix::process::geteuid().as_raw(),
    };
    Ok(Prepared { launch, fds: table.0 })
}

/// A console log is renamed at the start of an engine once it is larger.
const CONSOLE_LOG_BYTES_MAX: u64 = 16 << 20;

/// Where the header of a seat is.
pub fn header_path(config: &SeatConfig, folder: &SeatFolder) -> PathBuf {
    config.header.clone().unwrap_or_else(|| folder.file("header"))
}

/// Where the journal of a seat is.
pub fn journal_path(config: &SeatConfig, folder: &SeatFolder) -> PathBuf {
    config.journal.clone().unwrap_or_else(|| folder.file("journal"))
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

fn open_boot(config: &SeatConfig, table: &mut Table) -> Result<Boot, SeatError> {
    let open = |what, path: &PathBuf| {
        let refuse = |why: String| SeatError::Boot {
            what,
            path: path.clone(),
            why,
        };
        let file = File::open(path).map_err(|error| refuse(format!("{error}; check boot.{what}")))?;
        let data = file.metadata().map_err(|error| refuse(error.to_string()))?;
        if !data.is_file() || data.len() == 0 {
            return Err(refuse("not a file with contents".to_owned()));
        }
        Ok((file, data.len()))
    };
    let (kernel, kernel_bytes) = open("kernel", &config.boot.kernel)?;
    if !is_kernel(&kernel) {
        let why = "not a kernel: neither a bzImage (64-bit boot protocol) nor an ELF program".to_owned();
        return Err(SeatError::Boot {
            what: "kernel",
            path: config.boot.kernel.clone(),
            why,
        });
    }
    let memory_bytes = config.machine.memory_mib << 20;
    let initrd = config
        .boot
        .initrd
        .as_ref()
        .map(|path| open("initrd", path).map(|found| (path, found)))
        .transpose()?;
    let initrd = match initrd {
        None => None,
        Some((path, (_, bytes))) if bytes.saturating_add(kernel_bytes) >= memory_bytes => {
            let why = format!(
                "{bytes} bytes do not fit beside the kernel ({kernel_bytes}) into {} MiB of guest memory: raise \
                 machine.memory_mib",
                config.machine.memory_mib
            );
            return Err(SeatError::Boot {
                what: "initrd",
                path: path.clone(),
                why,
            });
        }
        Some((_, (file, _))) => Some(table.add(file)),
    };
    Ok(Boot {
        kernel: table.add(kernel),
        initrd,
        cmdline: config.boot.cmdline.clone(),
    })
}

/// A bzImage says `HdrS` at 0x202 (Linux boot protocol); an ELF file begins with its magic.
fn is_kernel(file: &File) -> bool {
    let mut start = [0u8; 0x206];
    let length = file.read_at(&mut start, 0).unwrap_or(0);
    start[..length].starts_with(b"\x7fELF") || start.get(0x202..length) == Some(b"HdrS")
}

// ---- host

fn check_memory(config: &SeatConfig) -> Result<(), SeatError> {
    let available_mib = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? >> 10)
    });
    let needed_mib = config.machine.memory_mib;
    match available_mib {
        Some(available_mib) if available_mib < needed_mib => Err(SeatError::Memory {
            seat: config.label(),
            needed_mib,
            available_mib,
        }),
        _ => Ok(()),
    }
}

/// `KVM_GET_API_VERSION` of linux/kvm.h, and the one version there is.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_API_VERSION: i32 = 12;

fn open_kvm(path: &str) -> Result<File, SeatError> {
    let refuse = |why: String| SeatError::Kvm { why };
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        refuse(match error.kind() {
            ErrorKind::NotFound => {
                "does not exist: load kvm-intel or kvm-amd, switch virtualisation on in the firmware, \
                                    or on a virtual machine allow nested virtualisation"
                    .to_owned()
            }
            ErrorKind::PermissionDenied => "permission denied: add the daemon's user to the group kvm".to_owned(),
            _ => error.to_string(),
        })
    })?;
    // SAFETY: an ioctl without an argument.
    let version = unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION as _, 0) };
    if version != KVM_API_VERSION {
        return Err(refuse(format!(
            "is no KVM of API version {KVM_API_VERSION} (it answers {version})"
        )));
    }
    Ok(file)
}

/// Not every kernel has it, and the engine works without.
fn open_userfaultfd() -> Option<File> {
    OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").ok()
}

// ---- disks, header, journal

fn open_disk(disk: &DiskConfig, table: &mut Table) -> Result<Disk, SeatError> {
    let what = format!("disk {}", disk.name);
    let refuse = |why: String| SeatError::Disk {
        what: what.clone(),
        path: disk.path.clone(),
        why,
    };
    let is_device = std::fs::metadata(&disk.path).is_ok_and(|data| data.file_type().is_block_device());
    let mut options = OpenOptions::new();
    options.read(true).write(!disk.read_only);
    if is_device {
        // For a device this means: not mounted and not claimed by anybody.
        options.custom_flags(libc::O_EXCL);
    }
    let file = options.open(&disk.path).map_err(|error| refuse(open_advice(&error)))?;
    let kind = file.metadata().map_err(|error| refuse(error.to_string()))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refuse("neither a file nor a block device".to_owned()));
    }
    let size_bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
        .map_err(|errno| refuse(format!("its size can't be read: {errno}")))?;
    if size_bytes == 0 || size_bytes % 512 != 0 {
        return Err(refuse(format!(
            "{size_bytes} bytes are no whole number of 512-byte sectors: make it whole (truncate)"
        )));
    }
    if let Some(mib) = disk.size_mib
        && size_bytes != mib << 20
    {
        let why = format!("{size_bytes} bytes, but size_mib says {mib} MiB: both seats need disks of one size");
        return Err(refuse(why));
    }
    if !disk.read_only {
        lock(&file, &what, &disk.path)?;
    }
    let path = disk.path.display().to_string();
    Ok(Disk {
        name: disk.name.clone(),
        file: table.add(file),
        path,
        read_only: disk.read_only,
    })
}

fn open_advice(error: &io::Error) -> String {
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound, _) => "does not exist: make it (fallocate -l SIZE), or mount its file system".to_owned(),
        (ErrorKind::PermissionDenied, _) => "permission denied: the daemon's user must read and write it".to_owned(),
        (_, Some(libc::EROFS)) => "its file system is read-only: remount it, or say read_only: true".to_owned(),
        (_, Some(libc::EBUSY)) => "in use: the device is mounted or claimed by another program".to_owned(),
        _ => format!("can't be opened: {error}"),
    }
}

/// Opens the header or the journal, making it if it is missing.
fn open_own(what: &str, path: &Path) -> Result<File, SeatError> {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| SeatError::Disk {
            what: what.to_owned(),
            path: path.to_owned(),
            why: open_advice(&error),
        })?;
    lock(&file, what, path)?;
    Ok(file)
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

// ---- network

fn open_network(config: &SeatConfig) -> Result<(Vec<(Nic, OwnedFd)>, TcpListener), SeatError> {
    let mut nics = Vec::new();
    for nic in &config.nics {
        nics.push((describe(nic), open_tap(nic)?));
    }
    let address = config.link.listen;
    let listen = |source| SeatError::Listen { address, source };
    let listener = TcpListener::bind(address).map_err(listen)?;
    Ok((nics, listener))
}

fn describe(nic: &NicConfig) -> Nic {
    Nic {
        name: nic.name.clone(),
        mac: nic.mac.clone(),
        mtu: nic.mtu,
        tap: Fd(u16::MAX),
    }
}

fn open_tap(nic: &NicConfig) -> Result<OwnedFd, TapError> {
    let spec = TapSpec {
        name: &nic.tap,
        bridge: nic.bridge.as_deref(),
        mtu: nic.mtu,
        existing: nic.existing,
    };
    tap::open(&spec)
}

/// Runs `work` in this network namespace, on a thread of its own: the namespace is a property of the thread.
fn in_network<T: Send>(
    namespace: Option<&Path>,
    work: impl FnOnce() -> Result<T, SeatError> + Send,
) -> Result<T, SeatError> {
    let Some(path) = namespace else { return work() };
    let fail = |source| SeatError::NetworkNamespace {
        path: path.to_owned(),
        source,
    };
    let namespace = File::open(path).map_err(fail)?;
    let joined = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(kind))
                .map_err(|errno| fail(errno.into()))?;
            work()
        });
        thread.join()
    });
    joined.unwrap_or_else(|_| Err(fail(io::Error::other("the thread failed"))))
}

#[cfg(test)]
#[path = "prepare_tests.rs"]
mod tests;
