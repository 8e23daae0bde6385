//! What the API server's objects say of a pod: whether it is a seat of this node, and what that seat is. Pure.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ftvm_crds::names::{
    FILE_DISK, FILE_HEADER, FILE_JOURNAL, LABEL_VM, PATH_DISKS, PATH_GUEST, PATH_IDENTITY, PORT_DAEMON, PORT_LINK,
};
use ftvm_crds::{
    Attachment, Contents, CpuBaseline, FaultTolerantVM, FileCompression, FileFormat, FormerPod, SeatEntry, mac,
    quantity,
};
use ftvm_engine::control::exit_code;
use ftvm_protocol::identity::{SeatId, VmId};
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use crate::config::{
    AbsentSeat, BootConfig, CheckpointConfig, DiskConfig, LinkConfig, MachineConfig, NicConfig, PeerConfig, SeatConfig,
    WhenUnprotected,
};
use crate::disks::source::{Compression, Format, Place, Source};
use crate::kubernetes::machine::is_placeholder;
use crate::kubernetes::timing::timing;
use crate::seat::Former;
use crate::seat_socket::Expected;
use crate::seat_socket::message::{DiskToPrepare, Recipe};

/// A genuine seat of this node, as the book of its virtual machine has it. Remembered in its state folder, so that a daemon
/// without an API server knows the seats that an earlier one had.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seat {
    /// Namespace of the virtual machine and of the pod.
    pub namespace: String,
    /// Name of the virtual machine.
    pub vm: String,
    /// The virtual machine.
    pub vm_id: VmId,
    /// The seat: the pod's UID.
    pub seat_id: SeatId,
    /// What its engine is. Paths are those within the pod.
    pub config: SeatConfig,
    /// What its program prepares.
    pub recipe: Recipe,
    /// False while the seat is being removed: no engine is started for it.
    pub wanted: bool,
    /// Earlier pods of this seat and of the others.
    #[serde(default)]
    pub former: Vec<Former>,
}

impl Seat {
    /// Who the seat must be.
    pub fn expected(&self) -> Expected {
        Expected {
            vm: self.vm.clone(),
            vm_id: self.vm_id,
            seat: self.config.seat.clone(),
            seat_id: self.seat_id,
        }
    }
}

/// Why a pod is no seat of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Refusal {
    /// What does not fit, for people.
    pub why: String,
    /// Exit code if a person has to mend it; 0 if it may become a seat by itself, or was never meant to be one.
    pub code: u8,
}

impl Refusal {
    /// What the virtual machine is to be can't be.
    fn of_spec(why: impl Into<String>) -> Refusal {
        Refusal {
            why: why.into(),
            code: exit_code::CONFIG,
        }
    }
}

impl From<String> for Refusal {
    fn from(why: String) -> Refusal {
        Refusal { why, code: 0 }
    }
}

/// `NAMESPACE/NAME` of the virtual machine that a pod claims to belong to.
pub fn vm_of(pod: &Pod) -> Option<(String, String)> {
    let vm = pod.metadata.labels.as_ref()?.get(LABEL_VM)?;
    Some((pod.metadata.namespace.clone()?, vm.clone()))
}

/// The pod's UID as a seat.
pub fn seat_id(pod: &Pod) -> Option<SeatId> {
    pod.metadata.uid.as_deref()?.parse().ok()
}

/// The seat that this pod is on this node and machine, or why it is none.
///
/// # Errors
/// What does not fit.
pub fn seat(pod: &Pod, vm: &FaultTolerantVM, node: &str, machine: Option<&str>) -> Result<Seat, Refusal> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let vm_name = vm.metadata.name.clone().unwrap_or_default();
    if vm.metadata.namespace.as_deref() != Some(&namespace) {
        return Err(format!("FaultTolerantVM {vm_name} is not in namespace {namespace}").into());
    }
    let vm_uid = vm.metadata.uid.as_deref().unwrap_or_default();
    let vm_id = vm_uid
        .parse()
        .map_err(|error| format!("FaultTolerantVM {vm_name}: {error}"))?;
    let seat_id = seat_id(pod).ok_or_else(|| format!("pod {name}: `{uid}` is no UUID"))?;
    let book = vm
        .status
        .as_ref()
        .map(|status| status.seats.as_slice())
        .unwrap_or_default();
    let entry = book
        .iter()
        .find(|entry| entry.name == name && entry.pod_uid.as_deref() == Some(uid));
    let entry =
        entry.ok_or_else(|| format!("the book of FaultTolerantVM {vm_name} has no pod {name} with UID {uid}"))?;
    if pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) != Some(node) || entry.node.as_deref() != Some(node)
    {
        return Err(format!("pod {name} is not on node {node} by the book").into());
    }
    on_this_machine(name, entry, node, machine)?;
    let ip = entry
        .pod_ip
        .as_deref()
        .ok_or_else(|| format!("the book has no IP of pod {name} yet"))?;
    let ip: IpAddr = ip.parse().map_err(|_| format!("pod {name}: `{ip}` is no IP address"))?;
    let others = || book.iter().filter(move |other| other.name != entry.name);
    let link = LinkConfig {
        listen: SocketAddr::new(ip, PORT_LINK),
        peers: others().filter_map(peer).collect(),
        absent: others().flat_map(absent).collect(),
    };
    Ok(Seat {
        config: config(vm, &namespace, entry, (seat_id, vm_id), link)?,
        recipe: recipe(vm)?,
        namespace,
        vm: vm_name,
        vm_id,
        seat_id,
        wanted: !entry.leaving,
        former: book
            .iter()
            .flat_map(|other| former(other, entry, node, machine))
            .collect(),
    })
}

/// Its engine may run on the machine that had the node's name when the pod was bound to it: nobody else says that none does, or begins one.
fn on_this_machine(pod: &str, entry: &SeatEntry, node: &str, machine: Option<&str>) -> Result<(), Refusal> {
    // An id that many machines have tells none from another.
    let Some(on) = entry.machine.as_deref().filter(|on| !is_placeholder(on)) else {
        return Ok(());
    };
    if machine.is_some_and(|here| on.eq_ignore_ascii_case(here)) {
        return Ok(());
    }
    let here = machine.unwrap_or("one that can't be told");
    Err(Refusal {
        why: format!(
            "pod {pod} was bound to node {node} when that was machine {on}, and this is {here}: its engine may run there, so none is started here and \
             nothing is said of it. Switch that machine off, or see to it that no ftvm-engine runs on it; then delete the pod"
        ),
        code: exit_code::STATE_FOLDER,
    })
}

/// Was it on this very machine? Another one that has the node's name by now knows nothing of what runs there.
fn was_here(former: &FormerPod, node: &str, machine: Option<&str>) -> bool {
    let on = former.boot.as_deref().and_then(|boot| boot.split_once('/'));
    let both = on.filter(|(on, _)| !is_placeholder(on)).zip(machine);
    let same = both.is_some_and(|((on, _), here)| on.eq_ignore_ascii_case(here));
    former.node.as_deref() == Some(node) && same
}

/// Earlier pods of a seat, as they are for `own` on this node and machine.
fn former(of: &SeatEntry, own: &SeatEntry, node: &str, machine: Option<&str>) -> Vec<Former> {
    let former = of.former.iter().filter_map(|former| {
        Some(Former {
            seat_id: former.uid.parse().ok()?,
            own: of.name == own.name,
            here: was_here(former, node, machine),
            ended: former.ended,
        })
    });
    former.collect()
}

/// Is this an earlier pod of one of its seats? The operator enters one only once the API server itself has said that it is gone.
pub fn has_former(vm: &FaultTolerantVM, pod: SeatId) -> bool {
    let seats = vm.status.iter().flat_map(|status| &status.seats);
    let mut former = seats.flat_map(|seat| &seat.former);
    let uid = pod.to_string();
    former.any(|former| former.uid == uid)
}

/// Another seat of the virtual machine, once it can be reached.
fn peer(entry: &SeatEntry) -> Option<PeerConfig> {
    if entry.leaving {
        return None;
    }
    let host: Option<IpAddr> = entry.host_ip.as_deref().and_then(|ip| ip.parse().ok());
    Some(PeerConfig {
        seat: entry.name.clone(),
        seat_id: Some(entry.pod_uid.as_deref()?.parse().ok()?),
        address: SocketAddr::new(entry.pod_ip.as_deref()?.parse().ok()?, PORT_LINK),
        daemon: None,
        daemon_address: host.map(|ip| SocketAddr::new(ip, PORT_DAEMON)),
    })
}

/// A seat of the book that can't be dialled, as whom it is asked after: whoever boots waits for what its disk says. One that never ran keeps nobody waiting.
fn absent(entry: &SeatEntry) -> Vec<AbsentSeat> {
    if peer(entry).is_some() {
        return Vec::new();
    }
    let named = entry.asked_as().filter_map(|uid| {
        Some(AbsentSeat {
            seat: entry.name.clone(),
            seat_id: uid.parse().ok()?,
        })
    });
    named.collect()
}

fn bytes(text: &str) -> Result<u64, Refusal> {
    quantity::bytes(text).map_err(|error| Refusal::of_spec(error.to_string()))
}

fn config(
    vm: &FaultTolerantVM,
    namespace: &str,
    entry: &SeatEntry,
    (seat_id, vm_id): (SeatId, VmId),
    link: LinkConfig,
) -> Result<SeatConfig, Refusal> {
    let spec = &vm.spec;
    let inside = |path: &str| PathBuf::from(format!("{PATH_GUEST}{path}"));
    let first = spec
        .disks
        .first()
        .ok_or_else(|| Refusal::of_spec("a virtual machine without disks has no place for its seats' headers"))?;
    let beside = |file: &str| Some(PathBuf::from(format!("{PATH_DISKS}/{}/{file}", first.name)));
    let disks = spec.disks.iter().map(|disk| {
        Ok(DiskConfig {
            name: disk.name.clone(),
            path: format!("{PATH_DISKS}/{}/{FILE_DISK}", disk.name).into(),
            read_only: false,
            size_mib: Some(bytes(&disk.size)? >> 20),
        })
    });
    let tolerance = &spec.fault_tolerance;
    let microseconds = |ms: u32| Some(ms.saturating_mul(1000));
    let config = SeatConfig {
        vm: format!("{namespace}/{}", vm.metadata.name.as_deref().unwrap_or_default()),
        seat: entry.name.clone(),
        identity: PATH_IDENTITY.into(),
        original_disk: false,
        machine: MachineConfig {
            memory_mib: bytes(&spec.machine.memory)? >> 20,
            vcpus: spec.machine.vcpus,
            cpu: cpu(vm)?,
        },
        boot: BootConfig {
            kernel: inside(&spec.boot.kernel),
            initrd: spec.boot.initrd.as_deref().map(inside),
            cmdline: spec.boot.cmdline.clone(),
        },
        nics: nics(vm, seat_id, vm_id)?,
        disks: disks.collect::<Result<_, Refusal>>()?,
        header: beside(FILE_HEADER),
        journal: beside(FILE_JOURNAL),
        link,
        timing: timing(tolerance),
        checkpoint: CheckpointConfig {
            interval_min_us: microseconds(tolerance.interval.min_ms),
            interval_max_us: microseconds(tolerance.interval.max_ms),
            target_latency_us: tolerance.target_latency_ms.and_then(microseconds),
            ..CheckpointConfig::default()
        },
        when_unprotected: match tolerance.when_unprotected {
            ftvm_crds::WhenUnprotected::Continue => WhenUnprotected::Continue,
            ftvm_crds::WhenUnprotected::Pause => WhenUnprotected::Pause,
        },
    };
    config
        .check_contents()
        .map_err(|error| Refusal::of_spec(crate::explain(&error)))?;
    Ok(config)
}

/// The CPU that the operator chose for the guest, which all its seats have; none: that of the node where it starts.
fn cpu(vm: &FaultTolerantVM) -> Result<Option<String>, String> {
    if vm.spec.machine.cpu_baseline == CpuBaseline::Host {
        return Ok(None);
    }
    let chosen = vm.status.as_ref().and_then(|status| status.cpu_in_force());
    let chosen =
        chosen.ok_or("the operator has not chosen the guest's CPU yet: the VM's condition CpuChosen says why")?;
    Ok(chosen.baseline.clone())
}

fn nics(vm: &FaultTolerantVM, seat_id: SeatId, vm_id: VmId) -> Result<Vec<NicConfig>, Refusal> {
    let nic = |(index, network): (usize, &ftvm_crds::Network)| {
        let Some(Attachment::Bridge(bridge)) = network.attachment() else {
            return Err(Refusal::of_spec(format!(
                "network {} is attached to nothing",
                network.name
            )));
        };
        let card = u8::try_from(index).map_err(|_| Refusal::of_spec("too many networks"))?;
        Ok(NicConfig {
            name: network.name.clone(),
            mac: network.mac.clone().unwrap_or_else(|| mac::of(vm_id, card)),
            addresses: addresses(network)?,
            // Ten digits of a random UUID: two seats of one node do not meet in them.
            tap: format!("ft{:010x}{index}", seat_id.0 & 0xff_ffff_ffff),
            bridge: Some(bridge.to_owned()),
            mtu: None,
            existing: false,
        })
    };
    vm.spec.networks.iter().enumerate().map(nic).collect()
}

fn addresses(network: &ftvm_crds::Network) -> Result<Vec<IpAddr>, Refusal> {
    let address = |text: &String| {
        text.parse::<IpAddr>()
            .map_err(|_| Refusal::of_spec(format!("network {}: `{text}` is no IP address", network.name)))
    };
    network.addresses.iter().map(address).collect()
}

fn recipe(vm: &FaultTolerantVM) -> Result<Recipe, Refusal> {
    let disks = vm.spec.disks.iter().map(|disk| {
        Ok(DiskToPrepare {
            name: disk.name.clone(),
            size_bytes: bytes(&disk.size)?,
            original: false,
            source: source(disk),
        })
    });
    Ok(Recipe {
        kernel: vm.spec.boot.kernel.clone(),
        initrd: vm.spec.boot.initrd.clone(),
        disks: disks.collect::<Result<_, Refusal>>()?,
    })
}

fn source(disk: &ftvm_crds::Disk) -> Option<Source> {
    let place = match disk.contents() {
        Contents::Blank => return None,
        Contents::File(path, backing) => Place::Image { path, backing },
        Contents::Claim(file) => Place::Claim {
            path: file.path,
            backing: file.backing,
        },
        Contents::Http(file) => Place::Http {
            url: file.url,
            authority: file.authority,
        },
    };
    Some(Source {
        place,
        format: disk.source.format.map(|format| match format {
            FileFormat::Raw => Format::Raw,
            FileFormat::Qcow2 => Format::Qcow2,
        }),
        compression: disk.source.compression.map(|compression| match compression {
            FileCompression::None => Compression::None,
            FileCompression::Gzip => Compression::Gzip,
            FileCompression::Xz => Compression::Xz,
            FileCompression::Zstd => Compression::Zstd,
        }),
        sha256: disk.source.sha256.clone(),
    })
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
