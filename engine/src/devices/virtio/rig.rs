//! A guest's driver, as far as tests need one: finds devices on the PCI bus, sets them up through their BAR, and plays
//! the driver's side of their queues. It shares no code with the devices.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::devices::bus::Buses;
use crate::devices::set::{Backends, DeviceSet, DeviceSetConfig};
use crate::devices::testing::{Bench, Console, MemoryDisk, Wire, wait_until};
use crate::devices::virtio::blk::DiskConfig;
use crate::devices::virtio::net::NetConfig;
use crate::memory::{GuestMem, GuestRam};
use crate::state::{StateReader, StateWriter};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where the queues of the device in slot `slot` are; 64 KiB each.
fn queue_base(slot: usize, queue: usize) -> u64 {
    0x10_0000 + (slot as u64 * 4 + queue as u64) * 0x1_0000
}

/// Free memory for buffers.
pub(crate) const BUFFERS: u64 = 0x40_0000;

/// A machine without a CPU: one interface, one disk, the generator; the test is the guest.
pub(crate) struct Rig {
    pub(crate) bench: Bench,
    pub(crate) set: DeviceSet,
    pub(crate) wire: Wire,
    pub(crate) disk: MemoryDisk,
    pub(crate) console: Console,
}

pub(crate) const RNG_SLOT: usize = 1;
pub(crate) const NET_SLOT: usize = 2;
pub(crate) const BLK_SLOT: usize = 3;
pub(crate) const DISK_BYTES: usize = 1 << 20;

pub(crate) fn config() -> DeviceSetConfig {
    DeviceSetConfig {
        nics: vec![NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        }],
        disks: vec![DiskConfig {
            serial: "root-disk".to_owned(),
            read_only: false,
        }],
        rng_seed: [7; 32],
        rtc_unix_ns: 1_795_366_623_000_000_000,
    }
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(Bench::new(), MemoryDisk::new(DISK_BYTES))
    }

    pub(crate) fn with(bench: Bench, disk: MemoryDisk) -> Self {
        Self::of(&config(), bench, disk)
    }

    fn of(config: &DeviceSetConfig, bench: Bench, disk: MemoryDisk) -> Self {
        let (wire, console) = (Wire::new(), Console::default());
        *disk.gate.lock().unwrap() = Some(bench.platform.gate.clone());
        let backends = Backends {
            nics: vec![wire.backend()],
            disks: vec![Box::new(disk.clone())],
            console: Box::new(console.clone()),
        };
        let set = DeviceSet::new(config, &bench.platform, backends).unwrap();
        Self {
            bench,
            set,
            wire,
            disk,
            console,
        }
    }

    /// Another machine with the same memory content and disk content, closed: the successor.
    pub(crate) fn successor(&self) -> Self {
        self.successor_with_mtu(config().nics[0].mtu)
    }

    /// The same on a host whose end of the interface carries `mtu` bytes.
    pub(crate) fn successor_with_mtu(&self, mtu: u16) -> Self {
        let bench = Bench::new();
        copy_ram(&self.bench.platform.ram, &bench.platform.ram);
        let disk = MemoryDisk::new(DISK_BYTES);
        *disk.content.lock().unwrap() = self.disk.content.lock().unwrap().clone();
        let mut config = config();
        config.nics[0].mtu = mtu;
        Self::of(&config, bench, disk)
    }

    pub(crate) fn mem(&self) -> &GuestMem {
        self.bench.platform.ram.mem()
    }

    pub(crate) fn open(&self) {
        self.bench.platform.gate.open();
    }

    pub(crate) fn close(&self) {
        self.bench.platform.gate.close();
    }

    /// Closes the gate and saves.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.close();
        let mut writer = StateWriter::new();
        self.set.save(&mut writer);
        writer.finish().to_vec()
    }

    /// Loads, checks that saving gives the same bytes, kicks and opens.
    pub(crate) fn take_over(&self, state: &[u8]) {
        self.set.load(&StateReader::parse(state).unwrap()).unwrap();
        assert_eq!(self.save(), state, "load then save is byte-equal");
        self.set.kick();
        self.open();
    }

    pub(crate) fn driver(&self, slot: usize) -> Driver {
        Driver::find(self.set.buses().clone(), self.bench.platform.ram.clone(), slot)
    }
}

pub(crate) fn copy_ram(from: &GuestRam, into: &GuestRam) {
    let mut page = [0; crate::memory::PAGE_SIZE];
    for number in 0..from.pages() {
        from.read_page(number, &mut page).unwrap();
        into.write_page(number, &page).unwrap();
    }
}

/// The driver of one device.
pub(crate) struct Driver {
    pub(crate) buses: Arc<Buses>,
    ram: Arc<GuestRam>,
    pub(crate) slot: usize,
    pub(crate) bar: u64,
}

impl Driver {
    pub(crate) fn find(buses: Arc<Buses>, ram: Arc<GuestRam>, slot: usize) -> Self {
        let mut driver = Self {
            buses,
            ram,
            slot,
            bar: 0,
        };
        driver.bar = u64::from(driver.config_read(0x10) & !0xf);
        driver
    }

    fn select(&self, register: usize) {
        let address = 0x8000_0000 | (self.slot as u32) << 11 | register as u32 & 0xfc;
        self.buses.pio.write(0xcf8, &address.to_le_bytes());
    }

    pub(crate) fn config_read(&self, register: usize) -> u32 {
        self.select(register);
        let mut data = [0; 4];
        self.buses.pio.read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn config_write(&self, register: usize, data: &[u8]) {
        self.select(register);
        self.buses.pio.write(0xcfc + (register as u64 & 3), data);
    }

    /// Offsets of the capabilities with `id`.
    pub(crate) fn capabilities(&self, id: u8) -> Vec<usize> {
        let (mut found, mut at) = (Vec::new(), self.config_read(0x34) as usize & 0xff);
        while at != 0 {
            let word = self.config_read(at);
            if word as u8 == id {
                found.push(at);
            }
            at = word as usize >> 8 & 0xff;
        }
        found
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        assert!(
            self.buses.mmio.read(self.bar + offset, &mut data[..len]),
            "nothing answers at {offset:#x}"
        );
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, value: u64, len: usize) {
        assert!(self.buses.mmio.write(self.bar + offset, &value.to_le_bytes()[..len]));
    }

    pub(crate) fn status(&self) -> u8 {
        self.read(0x14, 1) as u8
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.write(0x14, u64::from(status), 1);
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write(0, 0, 4);
        let low = self.read(4, 4);
        self.write(0, 1, 4);
        low | self.read(4, 4) << 32
    }

    pub(crate) fn accept(&self, features: u64) {
        for half in 0..2u64 {
            self.write(8, half, 4);
            self.write(12, features >> (32 * half) & 0xffff_ffff, 4);
        }
    }

    /// Programs vector `vector` to send `data` and unmasks it.
    pub(crate) fn program_vector(&self, vector: u64, data: u32) {
        let entry = 0x4000 + 16 * vector;
        self.write(entry, 0xfee0_0000, 4);
        self.write(entry + 4, 0, 4);
        self.write(entry + 8, u64::from(data), 4);
        self.write(entry + 12, 0, 4);
    }

    pub(crate) fn enable_msix(&self) {
        let cap = self.capabilities(0x11)[0];
        self.config_write(cap + 2, &0x8000u16.to_le_bytes());
    }

    /// The data of queue `queue`'s message.
    pub(crate) fn vector_data(&self, queue: usize) -> u32 {
        (self.slot * 16 + queue + 0x20) as u32
    }

    /// The data of the configuration change message.
    pub(crate) fn config_vector_data(&self) -> u32 {
        (self.slot * 16 + 15 + 0x20) as u32
    }

    /// Resets the device and sets it up with all of its queues of `size` entries, up to DRIVER_OK.
    pub(crate) fn start(&self, features: u64, size: u16) -> Vec<Vq> {
        self.set_status(0);
        wait_until("reset", || (self.status() == 0).then_some(()));
        self.set_status(1);
        self.set_status(3);
        self.accept(features);
        self.set_status(11);
        assert_eq!(self.status(), 11, "features {features:#x} were refused");
        let queues = self.read(0x12, 2);
        self.enable_msix();
        self.program_vector(queues, self.config_vector_data());
        self.write(0x10, queues, 2);
        let queues = (0..queues as usize)
            .map(|queue| self.start_queue(queue, size, features & 1 << 29 != 0))
            .collect();
        self.set_status(15);
        queues
    }

    fn start_queue(&self, queue: usize, size: u16, event_idx: bool) -> Vq {
        let base = queue_base(self.slot, queue);
        let vq = Vq::new(self.ram.clone(), base, size, event_idx);
        self.write(0x16, queue as u64, 2);
        self.write(0x18, u64::from(size), 2);
        self.write(0x20, vq.desc, 8);
        self.write(0x28, vq.avail & 0xffff_ffff, 4);
        self.write(0x2c, vq.avail >> 32, 4);
        self.write(0x30, vq.used, 8);
        self.program_vector(queue as u64, self.vector_data(queue));
        self.write(0x1a, queue as u64, 2);
        assert_eq!(self.read(0x1a, 2), queue as u64);
        self.write(0x1c, 1, 2);
        assert_eq!(self.read(0x1c, 2), 1);
        vq
    }

    pub(crate) fn notify(&self, queue: usize) {
        self.write(0x3000 + 4 * queue as u64, queue as u64, 2);
    }
}

/// A buffer of a chain: address, length, whether the device writes it.
pub(crate) type Buffer = (u64, u32, bool);

/// The driver's side of a queue.
pub(crate) struct Vq {
    ram: Arc<GuestRam>,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    event_idx: bool,
    next_desc: u16,
    pub(crate) published: u16,
    pub(crate) seen: u16,
}

impl Vq {
    pub(crate) fn new(ram: Arc<GuestRam>, base: u64, size: u16, event_idx: bool) -> Self {
        let mem = ram.mem();
        mem.write_slice(&vec![0; 0x1_0000], GuestAddress(base)).unwrap();
        Self {
            ram,
            size,
            desc: base,
            avail: base + 0x8000,
            used: base + 0xa000,
            event_idx,
            next_desc: 0,
            published: 0,
            seen: 0,
        }
    }

    /// The same queue in another machine's memory.
    pub(crate) fn moved(&self, rig: &Rig) -> Self {
        Self {
            ram: rig.bench.platform.ram.clone(),
            ..*self
        }
    }

    fn mem(&self) -> &GuestMem {
        self.ram.mem()
    }

    pub(crate) fn write_desc(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        write_desc(self.mem(), self.desc, index, address, len, flags, next);
    }

    /// Writes a chain of consecutive descriptors; returns its head without publishing it.
    pub(crate) fn chain(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_desc;
        for (at, (address, len, write)) in buffers.iter().enumerate() {
            let index = (head + at as u16) % self.size;
            let last = at + 1 == buffers.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.write_desc(index, *address, *len, flags, (index + 1) % self.size);
        }
        self.next_desc = (head + buffers.len() as u16) % self.size;
        head
    }

    /// Publishes the chain at `head`.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.published % self.size);
        self.mem().write_obj(head, GuestAddress(slot)).unwrap();
        self.published = self.published.wrapping_add(1);
        self.mem()
            .store(
                self.published,
                GuestAddress(self.avail + 2),
                std::sync::atomic::Ordering::SeqCst,
            )
            .unwrap();
    }

    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.chain(buffers);
        self.publish(head);
        head
    }

    /// Asks for an interrupt when used index `index` is passed.
    pub(crate) fn want_interrupt_at(&self, index: u16) {
        assert!(self.event_idx);
        self.mem()
            .write_obj(index, GuestAddress(self.avail + 4 + 2 * u64::from(self.size)))
            .unwrap();
    }

    /// What the device asked for: the avail index that it wants to be notified at.
    pub(crate) fn avail_event(&self) -> u16 {
        self.mem()
            .read_obj(GuestAddress(self.used + 4 + 8 * u64::from(self.size)))
            .unwrap()
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.mem().write_obj(flags, GuestAddress(self.avail)).unwrap();
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.mem()
            .load(GuestAddress(self.used + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap()
    }

    /// The next chain that the device gave back: head and length.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.seen % self.size);
        let [id, len]: [u32; 2] = self.mem().read_obj(GuestAddress(at)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        Some((id as u16, len))
    }

    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        wait_until("a used buffer", || self.take_used())
    }
}

#[allow(clippy::too_many_arguments)] // the fields of a descriptor
pub(crate) fn write_desc(mem: &GuestMem, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
    let at = GuestAddress(table + 16 * u64::from(index));
    mem.write_obj(address, at).unwrap();
    mem.write_obj([len, u32::from(flags) | u32::from(next) << 16], GuestAddress(at.0 + 8))
        .unwrap();
}
