//! The transport that the crate `virtio-drivers` builds its queues on, with what its own lacks: MSI-X vectors, and
//! notification without reading anything from the device.

use crate::guest_journal::MAX_DISKS;
use crate::pci::VirtioFunction;
use crate::protocol::MAX_CARDS;
use crate::statics::Once;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering, fence};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Error, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const FEATURE_SELECT: u64 = 0;
const FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_VECTOR: u64 = 16;
const STATUS: u64 = 20;
const GENERATION: u64 = 21;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFFSET: u64 = 30;
const QUEUE_DESCRIPTORS: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;
const NO_VECTOR: u16 = 0xFFFF;
const MAX_QUEUES: usize = 2;

/// `VIRTIO_F_RING_EVENT_IDX` is hidden: the crate compares the indices without regard to their wrapping, so that after
/// 65,536 buffers a notification may be left out.
const RING_EVENT_INDEX: u64 = 1 << 29;

/// A virtio device's registers.
pub struct PciTransport {
    registers: VirtioFunction,
    notify: [u64; MAX_QUEUES],
}

impl PciTransport {
    /// Takes over a device that pci.rs set up. All queues share its one MSI-X vector.
    pub fn new(registers: VirtioFunction) -> Self {
        Self {
            registers,
            notify: [0; MAX_QUEUES],
        }
    }

    fn read<T>(&self, register: u64) -> T {
        // SAFETY: a register of the common configuration, of its own width and alignment, in mapped MMIO space.
        unsafe { ((self.registers.common + register) as *const T).read_volatile() }
    }

    fn write<T>(&self, register: u64, value: T) {
        // SAFETY: as above. The addresses that queues are given come from `GuestHal`.
        unsafe { ((self.registers.common + register) as *mut T).write_volatile(value) };
    }

    fn write_address(&self, register: u64, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    fn in_device_config<T>(&self, offset: usize) -> Result<*mut T, Error> {
        if offset + size_of::<T>() > self.registers.device_bytes as usize {
            return Err(Error::ConfigSpaceTooSmall);
        }
        Ok((self.registers.device + offset as u64) as *mut T)
    }
}

impl Transport for PciTransport {
    fn device_type(&self) -> DeviceType {
        DeviceType::try_from(self.registers.kind).expect("only known types are opened")
    }

    fn read_device_features(&mut self) -> u64 {
        self.write(FEATURE_SELECT, 0u32);
        let low: u32 = self.read(FEATURE);
        self.write(FEATURE_SELECT, 1u32);
        let high: u32 = self.read(FEATURE);
        (u64::from(low) | u64::from(high) << 32) & !RING_EVENT_INDEX
    }

    fn write_driver_features(&mut self, features: u64) {
        for (select, part) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(DRIVER_FEATURE_SELECT, select);
            self.write(DRIVER_FEATURE, part);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(QUEUE_SELECT, queue);
        u32::from(self.read::<u16>(QUEUE_SIZE))
    }

    fn notify(&mut self, queue: u16) {
        // SAFETY: the queue's register in the notification area, checked when the queue was set up.
        unsafe { (self.notify[usize::from(queue)] as *mut u16).write_volatile(queue) };
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(u32::from(self.read::<u8>(STATUS)))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(STATUS, status.bits() as u8);
        if status.is_empty() {
            while self.read::<u8>(STATUS) != 0 {
                core::hint::spin_loop();
            }
        }
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, descriptors: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        self.write(CONFIG_VECTOR, NO_VECTOR);
        self.write(QUEUE_SELECT, queue);
        self.write(QUEUE_SIZE, size as u16);
        self.write_address(QUEUE_DESCRIPTORS, descriptors);
        self.write_address(QUEUE_DRIVER, driver);
        self.write_address(QUEUE_DEVICE, device);
        self.write(QUEUE_VECTOR, 0u16);
        assert!(
            self.read::<u16>(QUEUE_VECTOR) == 0,
            "the device refuses MSI-X entry 0 for queue {queue}"
        );
        let offset = u32::from(self.read::<u16>(QUEUE_NOTIFY_OFFSET)) * self.registers.notify_multiplier;
        assert!(
            offset + 2 <= self.registers.notify_bytes,
            "queue {queue} is notified outside of the notification area"
        );
        self.notify[usize::from(queue)] = self.registers.notify + u64::from(offset);
        self.write(QUEUE_ENABLE, 1u16);
    }

    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(QUEUE_SELECT, queue);
        self.read::<u16>(QUEUE_ENABLE) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        // MSI-X needs no acknowledgment, and the ISR register stays 0.
        InterruptStatus::empty()
    }

    fn read_config_generation(&self) -> u32 {
        u32::from(self.read::<u8>(GENERATION))
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let field = self.in_device_config::<T>(offset)?;
        // SAFETY: inside the device's own configuration; callers read fields at their natural alignment and width.
        Ok(unsafe { field.read_volatile() })
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<(), Error> {
        let field = self.in_device_config::<T>(offset)?;
        // SAFETY: as for reading.
        unsafe { field.write_volatile(value) };
        Ok(())
    }
}

/// Whether the device is to be told of what was added to the queue.
pub fn wants_kick<const SIZE: usize>(queue: &VirtQueue<GuestHal, SIZE>) -> bool {
    // The device says that it wants to be told, and then looks once more: what was added must not be seen later than that is read, and
    // `add` has no such fence.
    fence(Ordering::SeqCst);
    queue.should_notify()
}

/// Two pages a queue: cards have two queues, disks one.
const DMA_PAGES: usize = 2 * (2 * MAX_CARDS + MAX_DISKS);
static DMA: Once<[u8; DMA_PAGES * PAGE_SIZE]> = Once::new([0; DMA_PAGES * PAGE_SIZE]);
static DMA_BASE: AtomicUsize = AtomicUsize::new(0);
static DMA_USED: AtomicUsize = AtomicUsize::new(0);

/// Memory for queues, out of a static; physical and virtual addresses are the same.
pub struct GuestHal;

// SAFETY: see each method.
unsafe impl Hal for GuestHal {
    // Page-aligned (`Once` is), zero since the image was loaded, handed out once: only the first vCPU opens devices.
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        if DMA_USED.load(Ordering::Relaxed) == 0 {
            DMA_BASE.store(DMA.take().as_mut_ptr().expose_provenance(), Ordering::Relaxed);
        }
        let first = DMA_USED.fetch_add(pages, Ordering::Relaxed);
        assert!(first + pages <= DMA_PAGES, "queues need more than {DMA_PAGES} pages");
        let address = DMA_BASE.load(Ordering::Relaxed) + first * PAGE_SIZE;
        let pointer = NonNull::new(core::ptr::with_exposed_provenance_mut(address)).expect("statics are not at 0");
        (address as PhysAddr, pointer)
    }

    // Queues live as long as the guest.
    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    // One to one.
    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(core::ptr::with_exposed_provenance_mut(address as usize)).expect("no device is at 0")
    }

    // One to one.
    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>().expose_provenance() as PhysAddr
    }

    // Nothing was copied.
    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
