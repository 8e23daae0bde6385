//! A seat as launched: machine, disks, network and files, put together from the launch message.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ftvm_protocol::core::{Config, StoredHeader};
use ftvm_protocol::wire::{Hello, Kind};

use super::follow::{Failure, OpenDisks, Place};
use super::guest::SeatMachine;
use super::late::Route;
use super::limits::EpochLimits;
use super::nics::{Nic, duplicate_taps, host_sink, net_backends, open_nics};
use super::status::hanging_text;
use super::{Queue, hand_over, seat_watch};
use crate::backends::DiskBackend;
use crate::boot::BootSource;
use crate::checkpoint::PacerConfig;
use crate::control::header_file::{HeaderFile, HeaderFileError};
use crate::control::{EndpointError, Launch, LaunchFds, Peer, Protection, StoragePart, WhenUnprotected, exit_code};
use crate::devices::DeviceError;
use crate::devices::set::{Backends, DeviceSet, DeviceSetConfig, DeviceThread};
use crate::devices::virtio::blk::DiskConfig;
use crate::devices::virtio::net::NetConfig;
use crate::kvm::{Kvm, KvmError};
use crate::machine::{EventSender, Machine, MachineConfig, MachineError};
use crate::memory::PAGE_SIZE;
use crate::outbox::{self, Outbox};
use crate::pause::PauseGate;
use crate::replication::changed::{ChangedBlocks, Stream};
use crate::replication::epoch::StagingLimits;
use crate::replication::journal::Journal;
use crate::replication::link::{LinkConfig, LinkEvent, LinkHub, LinkSender, TlsError, TlsIdentity};
use crate::replication::memory::PageMemory;
use crate::replication::noted::{Failures, Noted};
use crate::replication::pages::EncoderConfig;
use crate::replication::resync::{Offer, ResyncProgress, ResyncSource};
use crate::replication::standby_disks::{ClosedDisks, SeatVolume, Settler, StandbyDisks, StandbyDisksError};
use crate::replication::storage::{FileStorage, Storage};
use crate::replication::watched::{UnderWay, Watched};
use crate::seat_io::{DiskLog, Inbox, NicPlace, Refused, SeatConsole, SeatDisk, discard_queued, queued_for};
use crate::seccomp::{Filters, ThreadKind};

/// Why a seat can't be prepared.
#[derive(Debug, thiserror::Error)]
pub enum SeatError {
    /// Descriptors and message don't fit together.
    #[error(transparent)]
    Launch(#[from] EndpointError),
    /// The machine's configuration is not one.
    #[error("machine configuration in the launch message: {0}")]
    MachineConfig(#[source] serde_json::Error),
    /// A MAC address.
    #[error(
        "network card `{nic}`: `{mac}` is no MAC address: write six hexadecimal bytes with colons, as 02:00:00:00:00:01"
    )]
    Mac {
        /// Which card.
        nic: String,
        /// What it says.
        mac: String,
    },
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A disk.
    #[error("disk `{name}` ({path}) can't be used: check the file and its file system")]
    Disk {
        /// Its name.
        name: String,
        /// Its path outside the jail.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The seat's header.
    #[error(transparent)]
    Header(#[from] HeaderFileError),
    /// The journal.
    #[error("the seat's journal can't be allocated ({bytes} bytes): is its file system full?")]
    Journal {
        /// Its size.
        bytes: u64,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Certificate or key.
    #[error(transparent)]
    Identity(#[from] TlsError),
    /// A descriptor, thread or random bytes.
    #[error("{what} failed")]
    System {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

impl SeatError {
    /// The exit code that says which kind it is.
    pub fn exit_code(&self) -> u8 {
        match self {
            SeatError::Launch(_) | SeatError::MachineConfig(_) => exit_code::LAUNCH,
            SeatError::Mac { .. } => exit_code::CONFIG,
            SeatError::Kvm(_) => exit_code::KVM,
            SeatError::Machine(error) => match error {
                MachineError::Memory(_) => exit_code::MEMORY,
                MachineError::Kvm(_) => exit_code::KVM,
                MachineError::Cpu(_) => exit_code::CPU,
                MachineError::Boot(_) => exit_code::BOOT,
                _ => exit_code::CONFIG,
            },
            SeatError::Disk { .. } => exit_code::DISK,
            SeatError::Header(_) | SeatError::Journal { .. } => exit_code::STORAGE,
            SeatError::Identity(_) => exit_code::IDENTITY,
            SeatError::System { .. } => exit_code::INTERNAL,
        }
    }
}

pub(super) fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> SeatError {
    move |source| SeatError::System { what, source }
}

/// Everything that the driver owns of a seat.
pub struct Seat {
    /// Name of the VM, for people.
    pub vm: String,
    /// Name of the seat, for people.
    pub seat: String,
    /// Whom to dial.
    pub peers: Vec<Peer>,
    pub(super) machine: SeatMachine,
    /// Output on its way out.
    pub outbox: Arc<Outbox>,
    /// Input on its way in.
    pub inbox: Arc<Inbox>,
    /// Disk changes of the running epoch.
    pub disk_log: Arc<DiskLog>,
    /// What has changed on the disks since a follower had the same.
    pub changed: Arc<ChangedBlocks>,
    /// What an epoch may hold.
    pub limits: EpochLimits,
    /// By NIC: its tap.
    taps: Vec<File>,
    /// By NIC: the guest's addresses.
    pub macs: Vec<[u8; 6]>,
    /// By NIC: the guest's IP addresses, where they are known.
    pub addresses: Vec<Vec<IpAddr>>,
    /// By NIC: frames of the guest that did not leave.
    refused: Vec<Arc<Refused>>,
    /// By NIC: its name, and the largest payload that its tap carries, in bytes.
    nics: Vec<(String, u16)>,
    /// How pages are encoded.
    pub encoder: EncoderConfig,
    /// How epochs are paced.
    pub pacer: PacerConfig,
    /// What the guest does while no standby would take over, at first.
    pub when_unprotected: WhenUnprotected,
    /// How long a claim of the record waits for what the guest has under way.
    pub(super) claim_waits: Duration,
    /// A request of a disk that is under way for longer hangs.
    pub(super) hangs_after: Duration,
    /// A standby tells its leader of its own storage after so long: in time, before that one ejects it.
    pub(super) tells_after: Duration,
    /// Where frames of a followed session go.
    pub(super) route: Arc<Mutex<Route>>,
    volumes: Vec<Arc<SeatVolume>>,
    /// What failed of volumes, journal and header.
    pub(super) failures: Arc<Failures>,
    /// Brings the volumes in order after a takeover, and empties the journal.
    settler: Option<Settler>,
    journal: Arc<dyn Storage>,
    /// What is asked of the volumes and of the journal, but for what the guest asks.
    under_way: Arc<UnderWay>,
    /// The journal as a boot emptied it. Nobody uses it while the guest is here.
    emptied: Option<Journal>,
    header: Option<HeaderFile>,
    dropped: Arc<AtomicU64>,
    filters: Option<Arc<Filters>>,
    resync: Arc<ResyncProgress>,
}

/// What the launch prepares beside the seat.
pub struct Prepared {
    /// The seat.
    pub seat: Seat,
    /// For the core.
    pub config: Config,
    /// For the links.
    pub link: LinkConfig,
    /// The listening socket of the links.
    pub listener: TcpListener,
}

/// Puts a seat together. `filters`: the system call filters of its threads; `rule`: what may leave it.
pub fn prepare(
    launch: &Launch,
    fds: &mut LaunchFds,
    queue: &Queue,
    filters: Option<Arc<Filters>>,
    rule: outbox::Rule,
) -> Result<Prepared, SeatError> {
    let kvm = Kvm::from_fd(fds.take(launch.files.kvm, "KVM")?)?;
    if let Some(fd) = launch.files.userfaultfd {
        drop(fds.take(fd, "userfaultfd")?);
    }
    let (header, stored) = HeaderFile::open(fds.take(launch.files.header, "the seat's header")?.into())?;
    let mut machine: MachineConfig =
        serde_json::from_value(launch.machine.clone()).map_err(SeatError::MachineConfig)?;
    let ram_pages = u32::try_from(machine.memory_bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX);
    let limits = EpochLimits::new(ram_pages, machine.vcpus, launch.disks.len());
    machine.dirty_ring_entries = machine.dirty_ring_entries.min(limits.ring_entries);
    let failures: Arc<Failures> = Arc::default();
    let journal = open_journal(launch, fds, limits.journal_bytes, &failures)?;
    let volumes = open_volumes(launch, fds, &failures)?;
    let nics = open_nics(launch, fds)?;
    let refused = nics.iter().map(|nic| nic.refused.clone()).collect();
    let console = File::from(fds.take(launch.files.console, "the console")?);
    let watched = launch.seat_patience_ms.map(|ms| Duration::from_millis(u64::from(ms)));
    if let Some(patience) = watched {
        watch_seat(&console, patience, queue, filters.clone())?;
    }
    let dropped = Arc::new(AtomicU64::new(0));
    let outbox = Arc::new(Outbox::new(Box::new(host_sink(&nics, console, &dropped)?), rule));
    let waits = queue.clone();
    outbox.on_waiting(move || waits.output_waits());
    let boot = boot_source(launch, fds)?;
    let (changed, disk_log) = change_logs(&volumes, limits, queue);
    let parts = build(
        &kvm,
        &machine,
        launch,
        nics,
        &outbox,
        &volumes,
        &disk_log,
        queue,
        filters.clone(),
    )?;
    let seat = Seat {
        vm: launch.vm.clone(),
        seat: launch.seat.clone(),
        peers: launch.link.peers.clone(),
        machine: SeatMachine::new(parts.machine, parts.devices, boot),
        outbox,
        inbox: parts.inbox,
        disk_log,
        changed,
        limits,
        taps: parts.taps,
        macs: parts.macs,
        addresses: launch.nics.iter().map(|nic| nic.addresses.clone()).collect(),
        refused,
        nics: launch.nics.iter().map(|nic| (nic.name.clone(), nic.mtu)).collect(),
        encoder: EncoderConfig {
            workers: usize::from(launch.checkpoint.workers).max(1),
            cache_bytes: usize::try_from(launch.checkpoint.delta_cache_bytes).unwrap_or(usize::MAX),
            ..EncoderConfig::default()
        },
        pacer: pacer_config(limits, &launch.protection),
        when_unprotected: launch.protection.when_unprotected,
        claim_waits: hand_over::waits(launch.timing.switch_ms),
        hangs_after: Duration::from_millis(launch.timing.disk_hang_ms.into()),
        tells_after: Duration::from_millis(u64::from(launch.timing.ack_stall_ms) / 2),
        route: Arc::default(),
        volumes,
        failures,
        settler: None,
        journal,
        under_way: Arc::default(),
        emptied: None,
        header: Some(header),
        dropped,
        filters: filters.clone(),
        resync: Arc::default(),
    };
    let (link, listener) = link(launch, fds, filters)?;
    Ok(Prepared {
        config: core_config(launch, stored),
        seat,
        link,
        listener,
    })
}

/// What was written to the disks: since the standby knew it, and in this epoch.
fn change_logs(volumes: &[Arc<SeatVolume>], limits: EpochLimits, queue: &Queue) -> (Arc<ChangedBlocks>, Arc<DiskLog>) {
    let sizes: Vec<_> = volumes.iter().map(|volume| volume.size_bytes()).collect();
    let changed = Arc::new(ChangedBlocks::new(&sizes));
    let waits = queue.clone();
    let log = DiskLog::new(changed.clone(), limits.disk_bytes, limits.recorded_bytes, move || {
        waits.output_waits()
    });
    (changed, Arc::new(log))
}

fn pacer_config(limits: EpochLimits, protection: &Protection) -> PacerConfig {
    let config = PacerConfig {
        recorded_bytes_max: limits.recorded_bytes,
        pages_max: limits.pages,
        ..PacerConfig::default()
    };
    paced(config, protection)
}

fn paced(config: PacerConfig, protection: &Protection) -> PacerConfig {
    let us = |us: u32| Duration::from_micros(us.into());
    PacerConfig {
        interval_min: us(protection.interval_min_us),
        interval_max: us(protection.interval_max_us),
        target_latency: protection.target_latency_us.map(us),
        ..config
    }
}

fn boot_source(launch: &Launch, fds: &mut LaunchFds) -> Result<BootSource, SeatError> {
    Ok(BootSource {
        kernel: fds.take(launch.boot.kernel, "the kernel")?.into(),
        initrd: match launch.boot.initrd {
            Some(fd) => Some(fds.take(fd, "the initrd")?.into()),
            None => None,
        },
        cmdline: launch.boot.cmdline.clone(),
        kernel_name: "kernel".to_owned(),
        initrd_name: "initrd".to_owned(),
    })
}

fn core_config(launch: &Launch, header: StoredHeader) -> Config {
    Config {
        incarnation: launch.incarnation,
        header,
        other_seats: launch.other_seats.clone(),
        timing: (&launch.timing).into(),
        now_ms: 0,
    }
}

fn open_journal(
    launch: &Launch,
    fds: &mut LaunchFds,
    bytes: u64,
    failures: &Arc<Failures>,
) -> Result<Arc<dyn Storage>, SeatError> {
    let file: File = fds.take(launch.files.journal, "the journal")?.into();
    let journal = FileStorage::allocated(file, bytes).map_err(|source| SeatError::Journal { bytes, source })?;
    let noted = Noted::new(Arc::new(journal), StoragePart::Journal, failures.clone());
    Ok(Arc::new(noted))
}

fn open_volumes(
    launch: &Launch,
    fds: &mut LaunchFds,
    failures: &Arc<Failures>,
) -> Result<Vec<Arc<SeatVolume>>, SeatError> {
    let mut volumes = Vec::new();
    for (index, disk) in launch.disks.iter().enumerate() {
        let file: File = fds.take(disk.file, &disk.path)?.into();
        let storage = FileStorage::new(file, None).map_err(|source| SeatError::Disk {
            name: disk.name.clone(),
            path: disk.path.clone(),
            source,
        })?;
        let noted = Noted::new(Arc::new(storage), StoragePart::Disk(index), failures.clone());
        volumes.push(Arc::new(SeatVolume::new(Arc::new(noted))));
    }
    Ok(volumes)
}

struct Parts {
    machine: Machine,
    devices: Arc<DeviceSet>,
    inbox: Arc<Inbox>,
    taps: Vec<File>,
    macs: Vec<[u8; 6]>,
}

/// Starts the thread that looks whether the seat's program lives.
fn watch_seat(
    console: &File,
    patience: Duration,
    queue: &Queue,
    filters: Option<Arc<Filters>>,
) -> Result<(), SeatError> {
    let console = console
        .try_clone()
        .map_err(system("duplicating the console's descriptor"))?;
    let (queue, enter) = (queue.clone(), enter_filter(filters, ThreadKind::Worker));
    let work = move || {
        enter();
        seat_watch::watch(&console, patience, &queue);
    };
    let thread = std::thread::Builder::new().name("seat".to_owned()).spawn(work);
    thread.map(drop).map_err(system("starting a thread"))
}

/// What runs first in a thread of this kind.
fn enter_filter(filters: Option<Arc<Filters>>, kind: ThreadKind) -> impl FnOnce() + Send + 'static {
    move || {
        let Some(filters) = filters else { return };
        filters
            .enter(kind)
            .expect("a thread enters the filter that was compiled for it");
    }
}

#[allow(clippy::too_many_arguments)] // one caller, which has them all at hand
fn build(
    kvm: &Kvm,
    config: &MachineConfig,
    launch: &Launch,
    nics: Vec<Nic>,
    outbox: &Arc<Outbox>,
    volumes: &[Arc<SeatVolume>],
    disk_log: &Arc<DiskLog>,
    queue: &Queue,
    filters: Option<Arc<Filters>>,
) -> Result<Parts, SeatError> {
    let taps = duplicate_taps(&nics)?;
    let elsewhere = queue.clone();
    let inbox = Inbox::new(nics.len(), move || elsewhere.address_elsewhere());
    let inbox = Arc::new(inbox.map_err(system("an event counter for each network card"))?);
    let macs = nics.iter().map(|nic| nic.mac).collect();
    let set_config = DeviceSetConfig {
        nics: nics
            .iter()
            .map(|nic| NetConfig {
                mac: nic.mac,
                mtu: nic.mtu,
            })
            .collect(),
        disks: disk_configs(launch),
        rng_seed: random_seed()?,
        rtc_unix_ns: unix_ns(),
    };
    let mut devices = None;
    let events = queue.clone();
    let machine = Machine::create(
        config,
        kvm,
        EventSender::new(move |event| events.machine(event)),
        filters.clone(),
        |platform| {
            let backends = Backends {
                nics: net_backends(nics, queue, &platform.gate, outbox, &inbox)?,
                disks: disk_backends(launch, volumes, disk_log),
                console: Box::new(SeatConsole::new(platform.gate.clone(), outbox.clone())),
            };
            let prepare_thread = Arc::new(move |thread| enter_device_filter(filters.as_deref(), thread));
            let set = Arc::new(DeviceSet::new(
                &set_config,
                &platform.for_devices(prepare_thread),
                backends,
            )?);
            devices = Some(set.clone());
            Ok::<_, DeviceError>(Box::new(set) as Box<dyn crate::machine::DeviceSet>)
        },
    )?;
    // `create` has called the closure, or has failed.
    let devices = devices.ok_or_else(|| system("building devices")(std::io::ErrorKind::Other.into()))?;
    Ok(Parts {
        machine,
        devices,
        inbox,
        taps,
        macs,
    })
}

fn disk_configs(launch: &Launch) -> Vec<DiskConfig> {
    let config = |disk: &crate::control::Disk| DiskConfig {
        serial: disk.name.clone(),
        read_only: disk.read_only,
    };
    launch.disks.iter().map(config).collect()
}

fn disk_backends(launch: &Launch, volumes: &[Arc<SeatVolume>], log: &Arc<DiskLog>) -> Vec<Box<dyn DiskBackend>> {
    let hold = Duration::from_millis(launch.timing.disk_hold_ms.into());
    let mut backends: Vec<Box<dyn DiskBackend>> = Vec::new();
    for (index, (disk, volume)) in launch.disks.iter().zip(volumes).enumerate() {
        let disk = SeatDisk::new(index as u16, volume.clone(), disk.read_only, hold, log.clone());
        backends.push(Box::new(disk));
    }
    backends
}

fn enter_device_filter(filters: Option<&Filters>, thread: DeviceThread) {
    let Some(filters) = filters else { return };
    let kind = match thread {
        // All device threads interrupt the guest; the generator's has no file and no frames, but that is all.
        DeviceThread::Net | DeviceThread::Rng => ThreadKind::Net,
        DeviceThread::Disk => ThreadKind::Disk,
    };
    filters
        .enter(kind)
        .expect("a thread enters the filter that was compiled for it");
}

fn random_seed() -> Result<[u8; 32], SeatError> {
    let mut seed = [0; 32];
    let filled = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
    match filled {
        Ok(32) => Ok(seed),
        Ok(_) => Err(system("getrandom")(std::io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(system("getrandom")(error.into())),
    }
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn link(
    launch: &Launch,
    fds: &mut LaunchFds,
    filters: Option<Arc<Filters>>,
) -> Result<(LinkConfig, TcpListener), SeatError> {
    let identity = &launch.link.identity;
    let tls = TlsIdentity::from_pem(
        launch.vm_id,
        launch.incarnation.seat,
        &identity.certificate_pem,
        &identity.key_pem.0,
        &identity.authority_pem,
    )?;
    let listener = fds.take(launch.link.listener, "the link's listening socket")?;
    let hello = Hello::new(launch.vm_id, launch.incarnation);
    let peer_lost = Duration::from_millis(launch.timing.peer_lost_ms.into());
    let mut config = LinkConfig::new(hello, tls).with_detection(peer_lost);
    config.filters = filters;
    Ok((config, TcpListener::from(listener)))
}

/// Starts the links of a seat: frames of sessions go straight to the thread that receives them, everything else to the
/// driver.
pub fn start_links(prepared: LinkConfig, listener: TcpListener, seat: &Seat, queue: Queue) -> std::io::Result<LinkHub> {
    let route = seat.route.clone();
    let hub = LinkHub::start(prepared, Some(listener), move |event| match event {
        LinkEvent::Frame { frame, .. } if is_of_session(frame.kind) => {
            route.lock().unwrap_or_else(PoisonError::into_inner).frame(frame);
        }
        event => queue.link(event),
    })?;
    for peer in &seat.peers {
        hub.add_peer(peer.seat_id, Some(peer.address));
    }
    Ok(hub)
}

/// Frames that carry a session's data, as opposed to control messages.
fn is_of_session(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::Hello | Kind::Control | Kind::Credit | Kind::ResyncHolds | Kind::Trouble
    )
}

/// What a thread that the driver starts is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Encodes and sends.
    Worker,
    /// Writes to files.
    Storage,
}

/// Makes everything durable that was written to these disks.
pub fn flush_all(volumes: &[Arc<SeatVolume>]) -> Result<(), String> {
    for (volume, disk) in volumes.iter().zip(0..) {
        volume
            .sync()
            .map_err(|error| format!("flushing disk {disk} failed: {error}"))?;
    }
    Ok(())
}

impl Seat {
    /// What runs first in a thread of this kind: its system call filter.
    pub fn enter(&self, work: Work) -> impl FnOnce() + Send + 'static {
        let kind = match work {
            Work::Worker => ThreadKind::Worker,
            Work::Storage => ThreadKind::Disk,
        };
        enter_filter(self.filters.clone(), kind)
    }

    /// Goes by these bounds from now on.
    pub fn set_protection(&mut self, protection: &Protection) {
        self.pacer = paced(self.pacer, protection);
    }

    /// The pause gate.
    pub fn gate(&self) -> &Arc<PauseGate> {
        self.machine.gate()
    }

    /// Guest RAM for encoding and applying.
    pub fn page_memory(&self) -> Arc<dyn PageMemory> {
        self.machine.ram().clone()
    }

    /// The header file, once.
    pub fn take_header_file(&mut self) -> std::io::Result<HeaderFile> {
        self.header
            .take()
            .ok_or_else(|| std::io::ErrorKind::AlreadyExists.into())
    }

    fn closed_disks(&self) -> Result<ClosedDisks, String> {
        let watched = |storage| Arc::new(Watched::new(storage, self.under_way.clone())) as Arc<dyn Storage>;
        let volumes = self.volumes.iter().map(|volume| watched(volume.direct())).collect();
        let closed = ClosedDisks::new(watched(self.journal.clone()), volumes, &self.filters);
        closed.map_err(|error| crate::error_chain(&error))
    }

    /// Since when volumes or journal have kept a follower waiting.
    pub(super) fn storage_since(&self) -> Option<Instant> {
        self.under_way.since()
    }

    /// The disks for a session that is followed. `joins`: a resync brings everything; otherwise the guest was here until now, and what
    /// it had under way comes to its end first.
    pub fn disks_to_follow(&mut self, joins: bool) -> Result<OpenDisks, String> {
        let closed = self.closed_disks()?;
        let (in_use, hangs_after) = (self.machine.disks_in_use(), self.hangs_after);
        let (settler, emptied) = (self.settler.take(), self.emptied.take());
        Ok(Box::new(move || -> Result<StandbyDisks, Failure> {
            // A write that is under way would land behind what the new leader sends.
            if !in_use.end_within(hangs_after) {
                // Its storage counts as failed from here on: settler and journal are given up, and this engine never follows again.
                return Err(Failure {
                    why: format!("a disk of this seat hangs: {}", hanging_text(hangs_after)),
                    code: Some(exit_code::STORAGE),
                });
            }
            let emptied = match settler {
                Some(settler) => Some(settler.wait()?),
                None => emptied,
            };
            let opened = match emptied {
                Some(journal) => return Ok(closed.open_emptied(journal)),
                None if joins => closed.open_to_join(),
                None => closed.open(),
            };
            Ok(opened?)
        }))
    }

    /// Whether nothing of a takeover waits for the disks any more.
    pub fn is_settled(&self) -> bool {
        self.settler.as_ref().is_none_or(Settler::has_ended)
    }

    /// Lets the guest use the volumes while what a takeover left in `disks` is written to them.
    pub fn take_disks_over(&mut self, disks: StandbyDisks, queue: Queue) -> std::io::Result<()> {
        let report = move |outcome: &Result<(), String>| {
            if let Err(why) = outcome {
                queue.storage_failed(format!(
                    "after the takeover the guest can't make its writes durable: {why}"
                ));
            }
        };
        self.settler = Some(Settler::start(&self.volumes, disks, &self.filters, report)?);
        Ok(())
    }

    /// Brings the volumes to what was acknowledged before this engine started.
    pub fn recover_disks(&mut self) -> Result<(), String> {
        let text = |error: StandbyDisksError| crate::error_chain(&error);
        let mut disks = self.closed_disks()?.open().map_err(text)?;
        disks.settle().map_err(text)?;
        self.emptied = Some(disks.into_journal());
        Ok(())
    }

    /// Makes everything durable that the guest wrote.
    pub fn flush_disks(&self) -> Result<(), String> {
        flush_all(&self.volumes)
    }

    /// The disks, in the order of the machine's configuration.
    pub fn volumes(&self) -> Vec<Arc<SeatVolume>> {
        self.volumes.clone()
    }

    /// What a receiving thread works on.
    pub fn follower_place(&self, credit: LinkSender, stream: Stream) -> Place {
        let page_count = self.machine.ram().pages();
        Place {
            memory: self.page_memory(),
            stream,
            credit,
            offer: Offer {
                cpu: self.machine.cpu_offer().clone(),
                nics: self.nics.clone(),
            },
            waiting_bytes: self.limits.waiting_bytes(),
            limits: StagingLimits {
                page_count,
                disk_bytes: self.volumes.iter().map(|volume| volume.size_bytes()).collect(),
                nics: self.macs.len() as u16,
                max_epoch_bytes: self.limits.staging_bytes,
            },
        }
    }

    /// Memory and disks, to be copied while the guest runs.
    pub fn resync_source(&mut self) -> ResyncSource {
        let log = self.disk_log.clone();
        let recording = log.number();
        let changes = move || log.take_of(recording);
        let volumes = self.volumes.iter().map(|volume| volume.clone() as Arc<dyn Storage>);
        let cpu = self.machine.cpu_offer().machine.clone();
        let mtus = self.machine.mtus();
        let source = ResyncSource::new(self.page_memory(), cpu, mtus, volumes.collect(), changes);
        self.resync = source.progress();
        source
    }

    /// Progress of a resync, if there is one.
    pub fn resync_percent(&self) -> Option<u8> {
        self.resync.percent()
    }

    /// Throws away what the taps have queued for a guest that runs elsewhere.
    pub fn discard_input(&self) {
        self.taps.iter().for_each(discard_queued);
    }

    /// Copies to the standby what the taps have queued for a guest that stands still for a switchover.
    pub fn pass_input_on(&self) {
        let epoch = self.gate().epoch();
        for (nic, (tap, mac)) in self.taps.iter().zip(&self.macs).enumerate() {
            let place = NicPlace {
                nic: nic as u8,
                mac: *mac,
            };
            self.inbox.pass_on(place, tap, epoch);
        }
    }

    /// Gives what the taps have queued for the guest's own addresses.
    pub fn late_input(&self, mut take: impl FnMut(u16, &[u8])) {
        for (nic, (tap, mac)) in self.taps.iter().zip(&self.macs).enumerate() {
            queued_for(*mac, tap, |frame| take(nic as u16, frame));
        }
    }

    /// Sends a frame that is no output of the guest. A tap that does not take it loses it, as a wire does.
    pub fn send_directly(&self, nic: usize, frame: &[u8]) {
        if let Some(tap) = self.taps.get(nic) {
            let _ = rustix::io::write(tap, frame);
        }
    }

    /// Frames of the guest that did not leave, by its cards' names and the reasons'.
    pub fn refused(&self) -> BTreeMap<&str, BTreeMap<&'static str, u64>> {
        let cards = self.nics.iter().zip(&self.refused);
        cards
            .map(|((name, _), refused)| (name.as_str(), refused.counts().collect()))
            .collect()
    }

    /// Output that the host did not take, or that had no room where it waited.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed) + self.outbox.lost()
    }
}
