//! One unprotected guest, run from the command line: for trying kernels, images and hosts.

use crate::backends::file_disk::{DiskError, FileDisk};
use crate::backends::tap::{Tap, TapError};
use crate::backends::{DiskBackend, NetBackend, console};
use crate::boot::BootSource;
use crate::control::exit_code;
use crate::devices::DeviceError;
use crate::devices::set::{Backends, DeviceSet, DeviceSetConfig};
use crate::devices::virtio::blk::DiskConfig;
use crate::devices::virtio::net::NetConfig;
use crate::kvm::{Kvm, KvmError};
use crate::mac::parse_mac;
use crate::machine::{EventSender, Machine, MachineConfig, MachineError, VmEvent};
use clap::Args;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// Standard Ethernet.
const MTU: u16 = 1500;

/// Runs one guest without protection, its serial console on standard input and output, until it switches itself off.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// A Linux bzImage, or a 64-bit ELF file with a PVH entry point.
    #[arg(long)]
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "console=ttyS0")]
    pub cmdline: String,
    /// RAM, in bytes or with a suffix K, M, G.
    #[arg(long, default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u8,
    /// A disk, raw file or block device; `,ro` behind it for reading only. May be repeated.
    #[arg(long)]
    pub disk: Vec<String>,
    /// A tap device that exists; `,MAC` behind it for the guest's address. May be repeated.
    #[arg(long)]
    pub tap: Vec<String>,
    /// End when the guest resets itself, instead of booting again.
    #[arg(long)]
    pub no_reboot: bool,
}

/// Why a guest could not be run.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the texts say it
pub enum RunError {
    #[error("{what} {path} can't be opened: check the path and its permissions")]
    Open {
        what: &'static str,
        path: String,
        source: io::Error,
    },
    #[error("MAC address {text} is not one: write it as 02:00:00:00:00:01")]
    Mac { text: String },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("the guest can't go on: {0}")]
    Guest(String),
    #[error("no random numbers from the host")]
    Random(#[source] io::Error),
}

impl RunError {
    /// What the program exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Open { .. } => exit_code::BOOT,
            Self::Mac { .. } => exit_code::USAGE,
            Self::Disk(_) => exit_code::DISK,
            Self::Tap(_) => exit_code::NETWORK,
            Self::Kvm(_) => exit_code::KVM,
            Self::Machine(error) => match error {
                MachineError::Memory(_) => exit_code::MEMORY,
                MachineError::Kvm(_) => exit_code::KVM,
                MachineError::Cpu(_) => exit_code::CPU,
                MachineError::Boot(_) => exit_code::BOOT,
                MachineError::Vcpus { .. } => exit_code::CONFIG,
                MachineError::Devices(_) => exit_code::DISK,
                MachineError::State(_) | MachineError::Running { .. } => exit_code::INTERNAL,
            },
            Self::Guest(_) => exit_code::GUEST,
            Self::Random(_) => exit_code::INTERNAL,
        }
    }
}

/// Runs the guest to its end.
pub fn run(args: &RunArgs) -> Result<(), RunError> {
    let source = open_boot_source(args)?;
    let (config, backends) = open_devices(args)?;
    let kvm = Kvm::open()?;
    let (events, receiver) = EventSender::channel();
    let mut devices = None;
    let mut machine = Machine::create(
        &MachineConfig::new(args.memory, args.vcpus),
        &kvm,
        events,
        None,
        |platform| {
            let set = Arc::new(DeviceSet::new(
                &config,
                &platform.for_devices(Arc::new(|_| ())),
                backends,
            )?);
            devices = Some(set.clone());
            Ok::<_, DeviceError>(Box::new(set) as Box<dyn crate::machine::DeviceSet>)
        },
    )?;
    machine.boot(&source)?;
    machine.resume()?;
    if let Some(devices) = devices {
        forward_input(devices);
    }
    follow(&mut machine, &source, &receiver, args.no_reboot)
}

/// Deals with events until the guest's end.
fn follow(
    machine: &mut Machine,
    source: &BootSource,
    events: &Receiver<VmEvent>,
    no_reboot: bool,
) -> Result<(), RunError> {
    while let Ok(event) = events.recv() {
        match event {
            VmEvent::PowerOff => break,
            VmEvent::Reset | VmEvent::TripleFault if no_reboot => break,
            VmEvent::Reset | VmEvent::TripleFault => {
                machine.reset(source)?;
                machine.resume()?;
            }
            VmEvent::Fatal(why) => return Err(RunError::Guest(why)),
            VmEvent::DirtyRingFull | VmEvent::WritesLimited { .. } => {}
            VmEvent::Device(event) => tracing::warn!("{event}"),
        }
    }
    machine.pause();
    Ok(())
}

/// Types what comes on standard input. The thread ends with the process: nothing can wake it from its read.
fn forward_input(devices: Arc<DeviceSet>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let taken = devices.console_input(rest);
                rest = &rest[taken..];
                if taken == 0 {
                    // The guest's buffer is full; it reads at its own pace.
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
    });
}

fn open(what: &'static str, path: &Path) -> Result<File, RunError> {
    File::open(path).map_err(|source| RunError::Open {
        what,
        path: path.display().to_string(),
        source,
    })
}

fn open_boot_source(args: &RunArgs) -> Result<BootSource, RunError> {
    Ok(BootSource {
        kernel: open("kernel", &args.kernel)?,
        initrd: args.initrd.as_deref().map(|path| open("initrd", path)).transpose()?,
        cmdline: args.cmdline.clone(),
        kernel_name: args.kernel.display().to_string(),
        initrd_name: args
            .initrd
            .as_ref()
            .map(|path| path.display().to_string())
            .unwrap_or_default(),
    })
}

fn open_devices(args: &RunArgs) -> Result<(DeviceSetConfig, Backends), RunError> {
    let mut config = DeviceSetConfig {
        nics: Vec::new(),
        disks: Vec::new(),
        rng_seed: seed().map_err(RunError::Random)?,
        rtc_unix_ns: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_nanos() as u64),
    };
    let mut backends = Backends {
        nics: Vec::new(),
        disks: Vec::new(),
        console: Box::new(console::Stdout),
    };
    for (index, disk) in args.disk.iter().enumerate() {
        let (path, read_only) = disk
            .strip_suffix(",ro")
            .map_or((disk.as_str(), false), |path| (path, true));
        config.disks.push(DiskConfig {
            serial: format!("disk{index}"),
            read_only,
        });
        backends
            .disks
            .push(Box::new(FileDisk::open(Path::new(path), read_only)?) as Box<dyn DiskBackend>);
    }
    for (index, tap) in args.tap.iter().enumerate() {
        let (name, mac) = match tap.split_once(',') {
            Some((name, text)) => {
                let wrong = || RunError::Mac { text: text.to_owned() };
                (name, parse_mac(text).ok_or_else(wrong)?)
            }
            None => (tap.as_str(), [0x02, 0x66, 0x74, 0, 0, index as u8]),
        };
        config.nics.push(NetConfig { mac, mtu: MTU });
        backends.nics.push(Box::new(Tap::attach(name)?) as Box<dyn NetBackend>);
    }
    Ok((config, backends))
}

fn seed() -> io::Result<[u8; 32]> {
    let mut seed = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    Ok(seed)
}

/// Bytes, or with a suffix K, M or G (powers of 1024).
fn parse_size(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a size such as 512M"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "M", "5T", "-1", "99999999999G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
