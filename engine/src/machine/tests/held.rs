//! What the disk of one machine can't do another machine's does: the guest, which runs on here and there, sees a success.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::DeviceError;
use crate::devices::set;
use crate::devices::testing::{Console, MemoryDisk};
use crate::devices::virtio::F_VERSION_1;
use crate::devices::virtio::rig::{self, BUFFERS, Driver};

/// Slot of the disk: there is no network card.
const SLOT: usize = 2;
/// Virtio's request to write.
const OUT: u32 = 1;
/// Where the guest looks for the status of its request, and what is there before the disk has said anything.
const STATUS: u64 = BUFFERS + 0x20;
const NO_STATUS: u8 = 0xee;
const DATA: u64 = BUFFERS + 0x1000;
/// What the guest reports: the status and one.
const OK: u64 = 1;
const IO_ERROR: u64 = 2;
/// No test waits for its end.
const LONG: Duration = Duration::from_secs(60);

/// Waits for its request's status, and reports that and one.
fn waiting_guest() -> BootSource {
    let [a, b, c, d] = (STATUS as u32).to_le_bytes();
    let code = [
        &[0xA0, a, b, c, d, 0x3C, NO_STATUS, 0x74, 0xF7][..], // MOV AL from there, CMP, JE to the beginning
        &[0x0F, 0xB6, 0xC0, 0x40],                            // MOVZX EAX, AL; INC EAX
        &[0x66, 0xBA, 0x04, 0x05, 0xEF, 0xF4, 0xEB, 0xFD],    // EAX to the port, halt
    ]
    .concat();
    let kernel = test_guest::file_with(&test_guest::elf(&code, 0x10_0000, Some(0x10_0000)));
    BootSource { kernel, ..source() }
}

/// A machine with a disk.
struct WithDisk {
    bench: Bench,
    devices: Arc<set::DeviceSet>,
    disk: MemoryDisk,
}

impl WithDisk {
    fn new() -> Self {
        let disk = MemoryDisk::new(rig::DISK_BYTES);
        let kvm = Kvm::open().expect("KVM");
        let (sender, events) = EventSender::channel();
        let config = set::DeviceSetConfig {
            nics: Vec::new(),
            ..rig::config()
        };
        let backends = set::Backends {
            nics: Vec::new(),
            disks: vec![Box::new(disk.clone())],
            console: Box::new(Console::default()),
        };
        let mut made = None;
        let machine = Machine::create(&MachineConfig::new(MEMORY_BYTES, 1), &kvm, sender, None, |platform| {
            let (_, seen) = Port::plug_in(&platform.buses);
            let platform = platform.for_devices(Arc::new(|_| ()));
            let devices = Arc::new(set::DeviceSet::new(&config, &platform, backends)?);
            made = Some((seen, devices.clone()));
            Ok::<_, DeviceError>(Box::new(devices) as Box<dyn DeviceSet>)
        })
        .expect("machine");
        let (seen, devices) = made.expect("made");
        let bench = Bench { machine, seen, events };
        Self { bench, devices, disk }
    }

    /// One whose guest has asked its disk, which fails, to write a sector.
    fn asked(hold: Duration) -> Self {
        let mut here = Self::new();
        here.disk.fails.store(true, Ordering::SeqCst);
        here.disk.hold_ms.store(hold.as_millis() as u64, Ordering::SeqCst);
        here.bench.machine.boot(&waiting_guest()).expect("boot");
        let ram = here.bench.machine.ram();
        let driver = Driver::find(here.devices.buses().clone(), ram.clone(), SLOT);
        let mut queue = driver.start(F_VERSION_1, 128).remove(0);
        let mem = ram.mem();
        mem.write_obj([OUT, 0, 0, 0], GuestAddress(BUFFERS)).expect("RAM");
        mem.write_obj(NO_STATUS, GuestAddress(STATUS)).expect("RAM");
        mem.write_slice(&[1; 512], GuestAddress(DATA)).expect("RAM");
        queue.add(&[(BUFFERS, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
        driver.notify(0);
        here.bench.machine.resume().expect("resume");
        here
    }

    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "{what}: {:?}", self.devices.counts());
            std::thread::yield_now();
        }
    }

    fn reported(&self) -> u64 {
        self.bench.seen.failure.load(Ordering::Relaxed)
    }

    /// Waits until the guest has said what became of its request.
    fn wait_reported(&self) -> u64 {
        self.wait("a report of the guest", |here| here.reported() != 0);
        self.reported()
    }
}

#[test]
fn a_guest_with_a_held_write_succeeds_elsewhere() {
    let mut failing = WithDisk::asked(LONG);
    // Looked at more than once: it is kept from the guest, and not just about to be told.
    failing.wait("a hold that lasts", |here| {
        here.devices.counts().disks[0].held_ms_max > 0
    });
    failing.bench.machine.pause();
    assert_eq!(failing.reported(), 0, "the guest still waits");
    let counts = failing.devices.counts().disks[0];
    assert_eq!((counts.held, counts.errors), (1, 0));
    let state = failing.bench.save();
    let mut healthy = WithDisk::new();
    failing.bench.copy_ram_to(&healthy.bench);
    healthy.bench.load(&state);
    healthy.bench.machine.after_takeover();
    healthy.bench.machine.resume().expect("resume");
    assert_eq!(healthy.wait_reported(), OK);
    healthy.bench.machine.pause();
    assert_eq!(healthy.disk.content.lock().expect("disk")[..512], [1; 512]);
}

/// Negative control of the test above: without a hold, and once it is over, the guest has its error.
#[test]
fn a_guest_is_told_of_a_write_that_is_not_held() {
    for (hold, held) in [(Duration::ZERO, 0), (Duration::from_millis(120), 1)] {
        let mut alone = WithDisk::asked(hold);
        assert_eq!(alone.wait_reported(), IO_ERROR);
        alone.bench.machine.pause();
        let counts = alone.devices.counts().disks[0];
        assert_eq!((counts.held, counts.errors), (held, 1), "held for {hold:?}");
    }
}
