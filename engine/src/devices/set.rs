//! All devices of one machine: built from its configuration, saved, loaded, kicked and reset together.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::bus::{Buses, SharedDevice, lock};
use super::event::DeviceEvents;
use super::irq::{GuestClock, IrqLine, MsiSender, NotifyRegistrar};
use super::legacy::acpi_pm::{self, AcpiPm};
use super::legacy::i8042::{self, I8042};
use super::legacy::rtc::{self, Rtc};
use super::legacy::serial::{self, Serial};
use super::pci::root::{CONFIG_PORTS, CONFIG_PORTS_LEN, PciFunction, PciRoot};
use super::virtio::Frontend;
use super::virtio::blk::{Blk, BlkCounts, BlkMetrics, BlkWorker, DiskConfig, Executing, SECTOR_BYTES};
use super::virtio::net::{MTU_MIN, Net, NetConfig, NetCounts, NetMetrics, NetWorker};
use super::virtio::pci_device::{Function, Mapped, Saveable, VirtioDevice};
use super::virtio::rng::{Rng, RngWorker};
use super::virtio::transport::BAR_BYTES;
use super::virtio::worker::{Worker, WorkerThread};
use super::{DeviceError, decode, encode, kind};
use crate::backends::{ConsoleBackend, DiskBackend, NetBackend};
use crate::mac::is_unicast;
use crate::memory::{GuestRam, PCI_MMIO_START};
use crate::pause::PauseGate;
use crate::state::{Section, StateError, StateReader, StateWriter};

/// Slots for interfaces and disks: all but those of the host bridge and the random generator.
const SLOTS: usize = 30;
const MTU_MAX: u16 = 65_521;
/// Version of the sections that this module writes itself.
const VERSION: u16 = 1;

/// What the machine offers to its devices.
#[derive(Clone)]
pub struct Platform {
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// The gate that device threads work behind.
    pub gate: Arc<PauseGate>,
    /// Where the devices are put.
    pub buses: Arc<Buses>,
    /// Message-signalled interrupts.
    pub msi: Arc<dyn MsiSender>,
    /// The line of COM1, GSI [`serial::COM1_GSI`].
    pub serial_irq: Arc<dyn IrqLine>,
    /// The line of the system control interrupt, GSI [`acpi_pm::SCI_GSI`].
    pub sci_irq: Arc<dyn IrqLine>,
    /// Queue notifications.
    pub notify: Arc<dyn NotifyRegistrar>,
    /// The guest's time.
    pub clock: Arc<dyn GuestClock>,
    /// Receives what devices report.
    pub events: Arc<dyn DeviceEvents>,
    /// Runs first on every device thread: installs its system call filter.
    pub prepare_thread: Arc<dyn Fn(DeviceThread) + Send + Sync>,
}

/// What a device thread does. All of them interrupt the guest (KVM_SIGNAL_MSI), so all need the calls of a network thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceThread {
    /// Serves a network interface.
    Net,
    /// Serves a disk.
    Disk,
    /// Serves the random generator.
    Rng,
}

/// What is on the buses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSetConfig {
    /// Network interfaces, in the order in which the guest finds them.
    pub nics: Vec<NetConfig>,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Key of the random generator's stream: secret, fresh for every machine that is booted. A state that is loaded replaces it.
    pub rng_seed: [u8; 32],
    /// Time of day when the guest's clock was zero, in nanoseconds since 1970. A state that is loaded replaces it.
    pub rtc_unix_ns: u64,
}

/// The host's side of the devices, in the order of the configuration.
pub struct Backends {
    /// One for each network interface.
    pub nics: Vec<Box<dyn NetBackend>>,
    /// One for each disk.
    pub disks: Vec<Box<dyn DiskBackend>>,
    /// Where the serial console's output goes.
    pub console: Box<dyn ConsoleBackend>,
}

/// What all devices have done since the engine started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DeviceCounts {
    /// One for each network interface.
    pub nics: Vec<NetCounts>,
    /// One for each disk.
    pub disks: Vec<BlkCounts>,
}

/// The devices of one machine.
///
/// Dropping it ends the device threads; for that it opens the gate, so vCPUs must not run any more.
pub struct DeviceSet {
    threads: Vec<WorkerThread>,
    gate: Arc<PauseGate>,
    buses: Arc<Buses>,
    /// First ports of the devices that this set put on the bus.
    ports: Vec<u64>,
    virtio: Vec<Arc<dyn Saveable>>,
    functions: Vec<Arc<Mutex<dyn Mapped>>>,
    root: Arc<Mutex<PciRoot>>,
    serial: Arc<Mutex<Serial>>,
    rtc: Arc<Mutex<Rtc>>,
    pm: Arc<Mutex<AcpiPm>>,
    nets: Vec<Arc<VirtioDevice<Net>>>,
    net_metrics: Vec<Arc<NetMetrics>>,
    blk_metrics: Vec<Arc<BlkMetrics>>,
    executing: Vec<Arc<Executing>>,
}

impl DeviceSet {
    /// Builds the devices and starts their threads, which wait at the closed gate.
    pub fn new(config: &DeviceSetConfig, platform: &Platform, backends: Backends) -> Result<Self, DeviceError> {
        check_config(config, &backends)?;
        let root = Arc::new(Mutex::new(PciRoot::new(platform.events.clone())));
        let serial = Serial::new(platform.serial_irq.clone(), backends.console);
        let pm = AcpiPm::new(platform.sci_irq.clone(), platform.events.clone());
        let mut set = Self {
            threads: Vec::new(),
            gate: platform.gate.clone(),
            buses: platform.buses.clone(),
            ports: Vec::new(),
            virtio: Vec::new(),
            functions: Vec::new(),
            root,
            serial: Arc::new(Mutex::new(serial)),
            rtc: Arc::new(Mutex::new(Rtc::new(config.rtc_unix_ns, platform.clock.clone()))),
            pm: Arc::new(Mutex::new(pm)),
            nets: Vec::new(),
            net_metrics: config.nics.iter().map(|_| Arc::default()).collect(),
            blk_metrics: config.disks.iter().map(|_| Arc::default()).collect(),
            executing: Vec::new(),
        };
        set.put_on_ports(Arc::new(Mutex::new(I8042::new(platform.events.clone()))))?;
        let rng = set.add_virtio("rng".to_owned(), 0, Rng::new(config.rng_seed), platform)?;
        set.start("rng", DeviceThread::Rng, &rng, RngWorker::new(rng.clone()), platform)?;
        for (index, (nic, backend)) in config.nics.iter().zip(backends.nics).enumerate() {
            set.add_net(index, nic, backend, platform)?;
        }
        for (index, (disk, backend)) in config.disks.iter().zip(backends.disks).enumerate() {
            set.add_disk(index, disk, backend, platform)?;
        }
        Ok(set)
    }

    /// Puts the devices with fixed ports on the bus. An error leaves those that were put there to [`Drop`].
    fn put_on_ports(&mut self, i8042: SharedDevice) -> Result<(), DeviceError> {
        let ports: [(u64, u64, SharedDevice); 5] = [
            (CONFIG_PORTS, CONFIG_PORTS_LEN, self.root.clone()),
            (serial::COM1, serial::PORTS, self.serial.clone()),
            (rtc::INDEX_PORT, rtc::PORTS, self.rtc.clone()),
            (u64::from(acpi_pm::EVENT_PORT), acpi_pm::PORTS, self.pm.clone()),
            (i8042::COMMAND_PORT, 1, i8042),
        ];
        for (base, len, device) in ports {
            self.buses.pio.insert(base, len, device)?;
            self.ports.push(base);
        }
        Ok(())
    }

    fn add_net(
        &mut self,
        index: usize,
        config: &NetConfig,
        backend: Box<dyn NetBackend>,
        platform: &Platform,
    ) -> Result<(), DeviceError> {
        let name = format!("net{index}");
        let device = self.add_virtio(name.clone(), index as u32, Net::new(config), platform)?;
        self.nets.push(device.clone());
        let metrics = self.net_metrics[index].clone();
        let worker = NetWorker::new(device.clone(), backend, platform.events.clone(), metrics, index);
        self.start(&name, DeviceThread::Net, &device, worker, platform)
    }

    fn add_disk(
        &mut self,
        index: usize,
        config: &DiskConfig,
        backend: Box<dyn DiskBackend>,
        platform: &Platform,
    ) -> Result<(), DeviceError> {
        let size_bytes = backend.size_bytes();
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DeviceError::DiskSize {
                disk: index,
                size_bytes,
            });
        }
        if backend.read_only() && !config.read_only {
            return Err(DeviceError::DiskReadOnly { disk: index });
        }
        let name = format!("disk{index}");
        let device = self.add_virtio(name.clone(), index as u32, Blk::new(config, size_bytes), platform)?;
        let metrics = self.blk_metrics[index].clone();
        let worker = BlkWorker::new(device.clone(), backend, platform.events.clone(), metrics, index);
        self.executing.push(worker.executing());
        self.start(&name, DeviceThread::Disk, &device, worker, platform)
    }

    /// Makes a virtio device and puts it into the next slot, its BAR into the next place of the MMIO hole.
    fn add_virtio<F: Frontend>(
        &mut self,
        name: String,
        instance: u32,
        frontend: F,
        platform: &Platform,
    ) -> Result<Arc<VirtioDevice<F>>, DeviceError> {
        let bar = PCI_MMIO_START as u32 + BAR_BYTES * self.functions.len() as u32;
        let device = VirtioDevice::new(name, instance, bar, frontend, platform)?;
        let mmio = self.buses.mmio.clone();
        let function = Arc::new(Mutex::new(Function::new(device.clone(), mmio, platform.notify.clone())));
        let slot = lock(&self.root).add(function.clone() as Arc<Mutex<dyn PciFunction>>);
        debug_assert!(slot.is_some(), "the number of devices was checked");
        self.functions.push(function);
        self.virtio.push(device.clone());
        Ok(device)
    }

    fn start<F: Frontend>(
        &mut self,
        name: &str,
        kind: DeviceThread,
        device: &VirtioDevice<F>,
        worker: impl Worker,
        platform: &Platform,
    ) -> Result<(), DeviceError> {
        let prepare = platform.prepare_thread.clone();
        let wakes = device.wakes().clone();
        let thread = WorkerThread::spawn(name, self.gate.clone(), wakes, move || prepare(kind), worker);
        self.threads.push(thread.map_err(|source| DeviceError::Thread {
            device: name.to_owned(),
            source,
        })?);
        Ok(())
    }

    /// The buses that vCPU threads send their accesses to.
    pub fn buses(&self) -> &Arc<Buses> {
        &self.buses
    }

    /// Kind and instance of every section that [`Self::save`] writes and [`Self::load`] needs.
    pub fn sections(&self) -> Vec<(u16, u32)> {
        let own = [kind::PCI_ROOT, kind::SERIAL, kind::RTC, kind::ACPI_PM].map(|kind| (kind, 0));
        own.into_iter()
            .chain(self.virtio.iter().map(|device| device.section()))
            .collect()
    }

    /// Appends the state of all devices. vCPUs are parked and the gate is closed.
    pub fn save(&self, writer: &mut StateWriter) {
        encode(writer, kind::PCI_ROOT, VERSION, 0, &lock(&self.root).save());
        encode(writer, kind::SERIAL, VERSION, 0, &lock(&self.serial).save());
        encode(writer, kind::RTC, VERSION, 0, &lock(&self.rtc).save());
        encode(writer, kind::ACPI_PM, VERSION, 0, &lock(&self.pm).save());
        self.virtio.iter().for_each(|device| device.save(writer));
    }

    /// Checks everything that a state says against this configuration and the guest's memory as it is now, changing
    /// nothing. A state that passes can be loaded.
    pub fn check(&self, reader: &StateReader<'_>) -> Result<(), StateError> {
        Legacy::read(reader)?;
        self.virtio.iter().try_for_each(|device| device.check(reader))
    }

    /// Takes over a state, all of it or nothing. vCPUs are parked and the gate is closed; guest memory and the
    /// interrupt controllers are loaded already, for this drives the interrupt lines.
    pub fn load(&self, reader: &StateReader<'_>) -> Result<(), StateError> {
        self.check(reader)?;
        let legacy = Legacy::read(reader)?;
        lock(&self.root).load(&legacy.root);
        lock(&self.serial).load(legacy.serial);
        lock(&self.rtc).load(legacy.rtc);
        lock(&self.pm).load(legacy.pm);
        self.virtio.iter().try_for_each(|device| device.load(reader))?;
        self.remap();
        Ok(())
    }

    /// After a load, before the guest runs: every queue is looked at once, whatever became of its notification, and the
    /// guest is interrupted once for each. In-flight disk requests are executed again.
    pub fn kick(&self) {
        self.virtio.iter().for_each(|device| device.kick());
    }

    /// Back to power-on, for a reset of the machine. vCPUs are parked and the gate is closed. The clock runs on, and the
    /// random generator's stream too.
    pub fn reset(&self) {
        lock(&self.root).reset();
        lock(&self.serial).reset();
        lock(&self.rtc).reset();
        lock(&self.pm).reset();
        self.virtio.iter().for_each(|device| device.reset());
        self.remap();
    }

    /// Since when the request that each disk has under way has been so; none where there is none.
    pub fn requests_since(&self) -> Vec<Option<Instant>> {
        self.executing.iter().map(|executing| executing.since()).collect()
    }

    /// With the gate closed: what the disks' threads are using their backends for. A seat that gives the guest away has to wait for its
    /// end before the disks' contents become the other side's business, in any thread, and before the gate opens again.
    pub fn disks_in_use(&self) -> DisksInUse {
        DisksInUse(self.executing.clone())
    }

    /// Characters typed into the console; returns how many had room. Waits while the gate is closed.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        let _entry = self.gate.enter();
        lock(&self.serial).input(bytes)
    }

    /// Presses the power button. Waits while the gate is closed.
    pub fn press_power_button(&self) {
        let _entry = self.gate.enter();
        lock(&self.pm).press_power_button();
    }

    /// The MTU that the guest was told, by interface.
    pub fn mtus(&self) -> Vec<u16> {
        self.nets.iter().map(|net| net.lock().frontend.mtu()).collect()
    }

    /// What the devices have done.
    pub fn counts(&self) -> DeviceCounts {
        DeviceCounts {
            nics: self.net_metrics.iter().map(|metrics| metrics.counts()).collect(),
            disks: self.blk_metrics.iter().map(|metrics| metrics.counts()).collect(),
        }
    }

    /// Ranges can trade places, so all that move leave before any is put back. Those that don't stay where they are: each change of
    /// where a queue is notified waits until the kernel's readers have seen it (SRCU), and for a worker thread of the kernel's, while the
    /// guest stands still.
    fn remap(&self) {
        self.functions
            .iter()
            .for_each(|function| lock(function).unmap_if_moved());
        self.functions.iter().for_each(|function| lock(function).remap());
    }
}

/// Requests that were under way when a guest was paused.
pub struct DisksInUse(Vec<Arc<Executing>>);

impl DisksInUse {
    /// Waits until no thread is using a disk's backend, for each disk no longer than `most`. True: none is.
    pub fn end_within(&self, most: Duration) -> bool {
        self.0.iter().all(|executing| executing.wait_end(most))
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        let closed = self.gate.is_closed();
        // A thread that waits at the gate sees only inside that it is to end.
        self.threads.iter().for_each(WorkerThread::stop);
        self.gate.open();
        self.threads.clear();
        if closed {
            self.gate.close();
        }
        // The functions of the PCI root take themselves off the MMIO bus when they go.
        self.ports.iter().for_each(|base| _ = self.buses.pio.remove(*base));
    }
}

/// The states of the devices that this module saves itself, checked.
struct Legacy {
    root: super::pci::root::RootState,
    serial: serial::SerialState,
    rtc: rtc::RtcState,
    pm: acpi_pm::AcpiPmState,
}

impl Legacy {
    fn read(reader: &StateReader<'_>) -> Result<Self, StateError> {
        Ok(Self {
            root: read_checked(reader, kind::PCI_ROOT, PciRoot::accepts)?,
            serial: read_checked(reader, kind::SERIAL, Serial::accepts)?,
            rtc: read_checked(reader, kind::RTC, Rtc::accepts)?,
            pm: read_checked(reader, kind::ACPI_PM, AcpiPm::accepts)?,
        })
    }
}

fn read_checked<T: DeserializeOwned>(
    reader: &StateReader<'_>,
    kind: u16,
    accepts: fn(&T) -> bool,
) -> Result<T, StateError> {
    let section: Section<'_> = reader.require(kind, VERSION, 0)?;
    let state = decode(&section)?;
    if accepts(&state) {
        Ok(state)
    } else {
        Err(section.invalid("a register has a value that the device can't have"))
    }
}

fn check_config(config: &DeviceSetConfig, backends: &Backends) -> Result<(), DeviceError> {
    for (what, configured, given) in [
        ("network interfaces", config.nics.len(), backends.nics.len()),
        ("disks", config.disks.len(), backends.disks.len()),
    ] {
        if configured != given {
            return Err(DeviceError::Mismatch {
                what,
                configured,
                given,
            });
        }
    }
    let devices = config.nics.len() + config.disks.len();
    if devices > SLOTS {
        return Err(DeviceError::TooMany { devices, slots: SLOTS });
    }
    for (nic, NetConfig { mac, mtu }) in config.nics.iter().enumerate() {
        if !(MTU_MIN..=MTU_MAX).contains(mtu) {
            return Err(DeviceError::Mtu { nic, mtu: *mtu });
        }
        if !is_unicast(*mac) {
            return Err(DeviceError::Mac { nic, mac: *mac });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
