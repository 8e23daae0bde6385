//! A machine of the engine with the embedded guest in it, in a network namespace of its own.

use crate::client::Client;
use ftvm_e2e::guest_build::build_embedded_guest;
use ftvm_e2e::guest_protocol::DEFAULT_PORT;
use ftvm_engine::backends::console::Ring;
use ftvm_engine::backends::file_disk::FileDisk;
use ftvm_engine::backends::tap::Tap;
use ftvm_engine::backends::{DiskBackend, DiskOp, NetBackend};
use ftvm_engine::boot::BootSource;
use ftvm_engine::devices::set::{self, Backends, DeviceSetConfig};
use ftvm_engine::devices::virtio::blk::DiskConfig;
use ftvm_engine::devices::virtio::net::NetConfig;
use ftvm_engine::kvm::Kvm;
use ftvm_engine::machine::{DeviceSet, EventSender, Machine, MachineConfig, Platform, VmEvent};
use ftvm_engine::memory::PAGE_SIZE;
use ftvm_engine::state::{StateError, StateReader, StateWriter};
use std::fs::{self, File};
use std::io;
use std::net::TcpStream;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

const TAP: &str = "ftvm0";
const DISK_BYTES: u64 = 4 << 20;
const MEMORY_BYTES: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(90);

/// What outlives a machine: the network, the disk, the kernel. The test's thread is in the network namespace.
pub struct Lab {
    tap: Arc<Mutex<Tap>>,
    disk: Arc<Mutex<FileDisk>>,
    disk_path: PathBuf,
    elf: PathBuf,
}

impl Lab {
    pub fn new(name: &str) -> Self {
        // SAFETY: moves this thread alone into a new network namespace; it holds no lock and shares no such state.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(
            result,
            0,
            "a network namespace needs root: {}",
            io::Error::last_os_error()
        );
        let tap = Tap::create(TAP).expect("a tap");
        ip(&["addr", "add", "10.0.0.1/24", "dev", TAP]);
        ip(&["link", "set", TAP, "up"]);
        let disk_path = std::env::temp_dir().join(format!("ftvm-kvm-{}-{name}.img", std::process::id()));
        File::create(&disk_path)
            .and_then(|file| file.set_len(DISK_BYTES))
            .expect("a scratch disk");
        let disk = FileDisk::open(&disk_path, false).expect("the scratch disk");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let elf = build_embedded_guest(&root).expect("the guest builds");
        Self {
            tap: Arc::new(Mutex::new(tap)),
            disk: Arc::new(Mutex::new(disk)),
            disk_path,
            elf,
        }
    }

    pub fn connect(&self) -> Client {
        Client::new(TcpStream::connect(("10.0.0.2", DEFAULT_PORT)).expect("the guest serves"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.disk_path);
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip")
        .args(arguments)
        .status()
        .expect("ip runs (Debian package iproute2)");
    assert!(status.success(), "ip {arguments:?}: {status}");
}

/// One tap that several machines use, one after the other.
struct SharedTap(Arc<Mutex<Tap>>);

impl NetBackend for SharedTap {
    fn transmit(&mut self, frame: &[u8]) {
        self.0.lock().expect("tap").transmit(frame);
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.0.lock().expect("tap").receive(buf)
    }

    fn wake_fd(&self) -> RawFd {
        self.0.lock().expect("tap").wake_fd()
    }
}

/// One disk that several machines use, one after the other.
struct SharedDisk(Arc<Mutex<FileDisk>>);

impl SharedDisk {
    fn file(&self) -> MutexGuard<'_, FileDisk> {
        self.0.lock().expect("disk")
    }
}

impl DiskBackend for SharedDisk {
    fn size_bytes(&self) -> u64 {
        self.file().size_bytes()
    }

    fn read_only(&self) -> bool {
        self.file().read_only()
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file().read_at(offset, buf)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file().write_at(offset, data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.file().discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.file().write_zeroes(offset, len)
    }

    fn completed(&mut self, op: &DiskOp<'_>, ok: bool) {
        self.file().completed(op, ok);
    }
}

/// A running machine.
pub struct Vm {
    machine: Machine,
    events: Receiver<VmEvent>,
    console: Ring,
    source: BootSource,
    vcpus: u8,
}

struct Devices(Arc<set::DeviceSet>);

impl DeviceSet for Devices {
    fn save(&mut self, writer: &mut StateWriter) {
        self.0.save(writer);
    }

    fn check(&self, reader: &StateReader<'_>) -> Result<(), StateError> {
        self.0.check(reader)
    }

    fn load(&mut self, reader: &StateReader<'_>) -> Result<(), StateError> {
        self.0.load(reader)
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn kick(&mut self) {
        self.0.kick();
    }
}

impl Vm {
    /// Boots the guest and waits until it serves.
    pub fn boot(lab: &Lab, vcpus: u8, command_line: &str) -> Self {
        let mut vm = Self::still(lab, MachineConfig::new(MEMORY_BYTES, vcpus), command_line);
        vm.machine.boot(&vm.source).expect("the guest boots");
        vm.machine.resume().expect("the guest runs");
        vm.wait_ready();
        vm
    }

    fn still(lab: &Lab, config: MachineConfig, command_line: &str) -> Self {
        let kvm = Kvm::open().expect("/dev/kvm");
        let (sender, events) = EventSender::channel();
        let console = Ring::new(1 << 16);
        let backends = Backends {
            nics: vec![Box::new(SharedTap(lab.tap.clone()))],
            disks: vec![Box::new(SharedDisk(lab.disk.clone()))],
            console: Box::new(console.clone()),
        };
        let machine = Machine::create(&config, &kvm, sender, None, |platform| make_devices(platform, backends));
        let source = BootSource {
            kernel: File::open(&lab.elf).expect("the guest's ELF file"),
            initrd: None,
            cmdline: command_line.to_owned(),
            kernel_name: lab.elf.display().to_string(),
            initrd_name: String::new(),
        };
        Self {
            machine: machine.expect("a machine"),
            events,
            console,
            source,
            vcpus: config.vcpus,
        }
    }

    fn wait_ready(&self) {
        let start = Instant::now();
        let mut seen = String::new();
        while !seen.contains(" ready on ") {
            seen.push_str(&String::from_utf8_lossy(&self.console.take()));
            assert!(!seen.contains(" stops: "), "the guest failed:\n{seen}");
            assert!(
                start.elapsed() < PATIENCE,
                "the guest does not serve after {PATIENCE:?}; its console:\n{seen}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        println!("{seen}");
    }

    /// Pauses this machine, and goes on in a new one.
    pub fn move_to_another(mut self, lab: &Lab) -> Self {
        let config = MachineConfig {
            cpu: Some(self.machine.cpu().clone()),
            ..MachineConfig::new(MEMORY_BYTES, self.vcpus)
        };
        let mut other = Self::still(lab, config, &self.source.cmdline);
        self.machine.pause();
        let mut writer = StateWriter::new();
        self.machine.save(&mut writer).expect("a paused machine can be saved");
        let state = writer.finish().to_vec();
        let mut page = [0; PAGE_SIZE];
        for index in 0..self.machine.ram().pages() {
            self.machine.ram().read_page(index, &mut page).expect("inside the RAM");
            other.machine.ram().write_page(index, &page).expect("inside the RAM");
        }
        drop(self);
        let reader = StateReader::parse(&state).expect("a saved state");
        other.machine.load(&reader).expect("the other machine takes it");
        other.machine.after_takeover();
        other.machine.resume().expect("the guest runs");
        other
    }

    fn event(&self, wanted: &VmEvent) {
        let event = self.events.recv_timeout(PATIENCE).expect("the guest ends");
        assert_eq!(&event, wanted);
    }

    pub fn expect_reset(&mut self) {
        self.event(&VmEvent::Reset);
        self.machine.reset(&self.source).expect("the machine resets");
        self.machine.resume().expect("the guest runs");
        self.wait_ready();
    }

    pub fn expect_power_off(&mut self) {
        self.event(&VmEvent::PowerOff);
    }
}

fn make_devices(
    platform: &Platform,
    backends: Backends,
) -> Result<Box<dyn DeviceSet>, ftvm_engine::devices::DeviceError> {
    let config = DeviceSetConfig {
        nics: vec![NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        }],
        disks: vec![DiskConfig {
            serial: "journal".to_owned(),
            read_only: false,
        }],
        rng_seed: [7; 32],
        rtc_unix_ns: 0,
    };
    let platform = set::Platform {
        ram: platform.ram.clone(),
        gate: platform.gate.clone(),
        buses: platform.buses.clone(),
        msi: platform.msi.clone(),
        serial_irq: platform.irq_line(ftvm_engine::devices::legacy::serial::COM1_GSI),
        sci_irq: platform.irq_line(ftvm_engine::devices::legacy::acpi_pm::SCI_GSI),
        notify: platform.notify.clone(),
        clock: platform.clock.clone(),
        events: platform.events.clone(),
        prepare_thread: Arc::new(|_| ()),
    };
    let devices = set::DeviceSet::new(&config, &platform, backends)?;
    Ok(Box::new(Devices(Arc::new(devices))))
}
