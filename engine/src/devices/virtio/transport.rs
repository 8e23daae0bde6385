//! The common part of every virtio device: status, features, queue set-up, interrupts (virtio 1.2, sections 2 and 4.1).

use std::fmt::Display;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::queue::{Queue, QueueError, QueueState};
use super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::devices::event::{DeviceEvent, DeviceEvents};
use crate::devices::irq::MsiSender;
use crate::devices::pci::config::{CAP_MSIX, CAP_VENDOR, ConfigSpace, ConfigState, Identity};
use crate::devices::pci::msix::{ENTRY_BYTES, Msix};
use crate::memory::GuestMem;

/// Size of BAR 0, which holds every structure of the device in pages of its own.
pub const BAR_BYTES: u32 = 0x8000;
/// Offset of the common configuration in BAR 0.
pub const COMMON: u64 = 0x0000;
/// Offset of the ISR status.
pub const ISR: u64 = 0x1000;
/// Offset of the device configuration.
pub const DEVICE: u64 = 0x2000;
/// Offset of the notification area.
pub const NOTIFY: u64 = 0x3000;
/// Bytes between the notification addresses of two queues.
pub const NOTIFY_MULTIPLIER: u64 = 4;
/// Offset of the MSI-X table.
pub const MSIX_TABLE: u64 = 0x4000;
/// Offset of the MSI-X pending bits.
pub const MSIX_PENDING: u64 = 0x5000;
/// Size of each of these areas.
pub const AREA_BYTES: u64 = 0x1000;

/// No MSI-X vector.
pub const NO_VECTOR: u16 = 0xffff;

/// Device status: the driver is ready.
pub const STATUS_DRIVER_OK: u8 = 4;
/// Device status: the features are settled.
pub const STATUS_FEATURES_OK: u8 = 8;
/// Device status: the device gave up until it is reset.
pub const STATUS_NEEDS_RESET: u8 = 0x40;

const STATUS_BY_DRIVER: u8 = 0x8f;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
const COMMON_BYTES: usize = 0x40;
const VENDOR_VIRTIO: u16 = 0x1af4;

/// What a write to the common configuration asks the device to do beyond changing registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Reset, as soon as no request is being worked on.
    Reset,
    /// The driver is ready: look at all queues.
    Started,
}

/// State and registers of the transport.
pub struct Transport {
    name: String,
    /// The PCI configuration space.
    pub config: ConfigSpace,
    /// Messages and pending bits.
    pub msix: Msix,
    /// The queues, in the order of the device's specification.
    pub queues: Vec<Queue>,
    registers: Registers,
    offered: u64,
    msix_cap: usize,
    /// Offset of the capability through which the BAR can be accessed from the configuration space.
    pub window_cap: usize,
    msi: Arc<dyn MsiSender>,
    events: Arc<dyn DeviceEvents>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u8,
    isr: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
    queue_vectors: Vec<u16>,
    reset_pending: bool,
}

impl Registers {
    fn new(queues: usize) -> Self {
        Self {
            status: 0,
            isr: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queue_vectors: vec![NO_VECTOR; queues],
            reset_pending: false,
        }
    }
}

/// What is saved of a transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    config: ConfigState,
    msix: Msix,
    registers: Registers,
    queues: Vec<QueueState>,
}

impl TransportState {
    /// The saved queues.
    pub fn queues(&self) -> &[QueueState] {
        &self.queues
    }
}

/// What identifies a device to the guest and to its owner.
#[derive(Debug, Clone)]
pub struct Description {
    /// Name in events, for example `net0`.
    pub name: String,
    /// Virtio device ID.
    pub device_id: u16,
    /// PCI class code.
    pub pci_class: u32,
    /// Features of the device without those of the transport.
    pub features: u64,
    /// Sizes of its queues.
    pub queues: &'static [u16],
    /// Size of its configuration in bytes.
    pub config_bytes: usize,
    /// Where BAR 0 is at power-on.
    pub bar: u32,
}

impl Transport {
    /// A device after power-on.
    pub fn new(description: Description, msi: Arc<dyn MsiSender>, events: Arc<dyn DeviceEvents>) -> Self {
        let vectors = description.queues.len() + 1;
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR_VIRTIO,
            device: 0x1040 + description.device_id,
            revision: 1,
            class: description.pci_class,
            subsystem_vendor: VENDOR_VIRTIO,
            subsystem: 0x40 + description.device_id,
        });
        config.add_bar0(description.bar, BAR_BYTES);
        let msix_cap = add_msix(&mut config, vectors);
        let window_cap = add_virtio_capabilities(&mut config, &description);
        Self {
            name: description.name,
            config,
            msix: Msix::new(vectors),
            queues: description.queues.iter().map(|size| Queue::new(*size)).collect(),
            registers: Registers::new(description.queues.len()),
            offered: description.features | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC,
            msix_cap,
            window_cap,
            msi,
            events,
        }
    }

    /// The device's name in events.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Features that the driver accepted.
    pub fn features(&self) -> u64 {
        self.registers.driver_features
    }

    /// The device works: the driver is ready, no reset is pending and nothing was broken.
    pub fn active(&self) -> bool {
        self.registers.status & (STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_NEEDS_RESET)
            == STATUS_DRIVER_OK | STATUS_FEATURES_OK
            && !self.registers.reset_pending
    }

    /// A reset waits for requests that are being worked on.
    pub fn reset_pending(&self) -> bool {
        self.registers.reset_pending
    }

    /// The driver asked for a reset that can't be done yet; the status register goes on showing the device in use.
    pub fn defer_reset(&mut self) {
        self.registers.reset_pending = true;
    }

    /// What a driver's reset does: everything but what belongs to PCI, which includes the MSI-X table.
    pub fn reset(&mut self) {
        self.queues.iter_mut().for_each(Queue::reset);
        self.registers = Registers::new(self.queues.len());
    }

    /// The message control register of MSI-X.
    fn msix_control(&self) -> u16 {
        self.config.word(self.msix_cap + 2)
    }

    /// Interrupts the guest for queue `index`.
    pub fn raise_queue(&mut self, index: usize) {
        self.registers.isr |= ISR_QUEUE;
        let vector = self.registers.queue_vectors[index];
        let control = self.msix_control();
        self.msix.raise(vector, control, self.msi.as_ref());
    }

    /// Interrupts the guest for queue `index` if the driver wants it for what was given back.
    pub fn raise_if_wanted(&mut self, index: usize, mem: &GuestMem) -> Result<(), QueueError> {
        if self.queues[index].needs_interrupt(mem)? {
            self.raise_queue(index);
        }
        Ok(())
    }

    /// Interrupts the guest once for every queue that is in use, whether needed or not.
    pub fn raise_all(&mut self) {
        if self.active() {
            let used: Vec<usize> = (0..self.queues.len())
                .filter(|index| self.queues[*index].enabled())
                .collect();
            used.into_iter().for_each(|index| self.raise_queue(index));
        }
    }

    /// The driver broke the rules: nothing more is done for it until it resets the device.
    pub fn fail(&mut self, why: &dyn Display) {
        if self.registers.status & STATUS_NEEDS_RESET != 0 {
            return;
        }
        self.registers.status |= STATUS_NEEDS_RESET;
        self.queues.iter_mut().for_each(Queue::abandon);
        self.events.report(DeviceEvent::NeedsReset {
            device: self.name.clone(),
            message: why.to_string(),
        });
        if self.registers.status & STATUS_DRIVER_OK != 0 {
            self.registers.isr |= ISR_CONFIG;
            let control = self.msix_control();
            self.msix
                .raise(self.registers.config_vector, control, self.msi.as_ref());
        }
    }

    /// A guest read of the ISR status clears it.
    pub fn read_isr(&mut self) -> u8 {
        std::mem::take(&mut self.registers.isr)
    }

    /// A guest write to the MSI-X table.
    pub fn write_msix(&mut self, offset: u64, data: &[u8]) {
        let control = self.msix_control();
        self.msix.write_table(offset, data, control, self.msi.as_ref());
    }

    /// A guest write to the PCI configuration space.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let control = self.msix_control();
        self.msix.deliver_pending(control, self.msi.as_ref());
    }

    /// A guest read of the common configuration.
    pub fn read_common(&self, offset: u64, data: &mut [u8]) {
        let image = self.common_image();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn common_image(&self) -> [u8; COMMON_BYTES] {
        let registers = &self.registers;
        let selected = usize::from(registers.queue_select);
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &registers.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered, registers.device_feature_select).to_le_bytes());
        put(0x08, &registers.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(registers.driver_features, registers.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &registers.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[registers.status]);
        put(0x16, &registers.queue_select.to_le_bytes());
        put(0x1a, &NO_VECTOR.to_le_bytes());
        if let Some(queue) = self.queues.get(selected) {
            let state = queue.state();
            put(0x18, &state.size.to_le_bytes());
            put(0x1a, &registers.queue_vectors[selected].to_le_bytes());
            put(0x1c, &u16::from(state.enabled).to_le_bytes());
            put(0x1e, &registers.queue_select.to_le_bytes());
            put(0x20, &state.desc.to_le_bytes());
            put(0x28, &state.avail.to_le_bytes());
            put(0x30, &state.used.to_le_bytes());
            put(0x38, &registers.queue_select.to_le_bytes());
        }
        image
    }

    /// A guest write to the common configuration, of a whole register (or half of a 64-bit one); others are dropped.
    pub fn write_common(&mut self, offset: u64, data: &[u8], mem: &GuestMem) -> Effect {
        if self.registers.reset_pending {
            return Effect::None;
        }
        let mut raw = [0; 8];
        let Some(into) = raw.get_mut(..data.len()) else {
            return Effect::None;
        };
        into.copy_from_slice(data);
        let value = u64::from_le_bytes(raw);
        match (offset, data.len()) {
            (0x00, 4) => self.registers.device_feature_select = value as u32,
            (0x08, 4) => self.registers.driver_feature_select = value as u32,
            (0x0c, 4) => self.accept_features(value as u32),
            (0x10, 2) => self.registers.config_vector = self.checked_vector(value as u16),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.registers.queue_select = value as u16,
            (0x18..0x38, _) => self.write_queue(offset, data.len(), value, mem),
            _ => {}
        }
        Effect::None
    }

    fn checked_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn accept_features(&mut self, value: u32) {
        let registers = &mut self.registers;
        if registers.status & STATUS_FEATURES_OK == 0 && registers.driver_feature_select < 2 {
            let shift = 32 * registers.driver_feature_select;
            registers.driver_features = registers.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let before = self.registers.status;
        let mut status = before | value & STATUS_BY_DRIVER;
        if status & STATUS_FEATURES_OK != 0 && before & STATUS_FEATURES_OK == 0 {
            let features = self.registers.driver_features;
            if features & !self.offered != 0 || features & F_VERSION_1 == 0 {
                // The driver reads the status back and sees that its choice was not accepted (2.2.2).
                status &= !STATUS_FEATURES_OK;
            } else {
                let event_idx = features & F_EVENT_IDX != 0;
                self.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
            }
        }
        self.registers.status = status;
        if status & STATUS_DRIVER_OK != 0 && before & STATUS_DRIVER_OK == 0 {
            Effect::Started
        } else {
            Effect::None
        }
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64, mem: &GuestMem) {
        let selected = usize::from(self.registers.queue_select);
        let vector = self.checked_vector(value as u16);
        let Some(queue) = self.queues.get_mut(selected) else {
            return;
        };
        match (offset, len) {
            (0x18, 2) => queue.configure(|state| state.size = value as u16),
            (0x1a, 2) => self.registers.queue_vectors[selected] = vector,
            (0x1c, 2) if value == 1 && !queue.enabled() => {
                if let Err(error) = queue.enable(mem) {
                    self.fail(&format_args!("queue {selected}: {error}"));
                }
            }
            (0x20 | 0x28 | 0x30, 8) => queue.configure(|state| *address(state, offset) = value),
            (0x20 | 0x28 | 0x30, 4) => {
                queue.configure(|state| set_low(address(state, offset), value));
            }
            (0x24 | 0x2c | 0x34, 4) => {
                queue.configure(|state| set_high(address(state, offset - 4), value));
            }
            _ => {}
        }
    }

    /// What is saved.
    pub fn save(&self) -> TransportState {
        TransportState {
            config: self.config.save(),
            msix: self.msix.clone(),
            registers: self.registers.clone(),
            queues: self.queues.iter().map(|queue| *queue.state()).collect(),
        }
    }

    /// Checks a state against this device and the guest's memory without changing anything.
    pub fn check(&self, state: &TransportState, mem: &GuestMem) -> Result<(), String> {
        let registers = &state.registers;
        let mut vectors = registers.queue_vectors.iter().chain([&registers.config_vector]);
        let complaint = if !self.config.accepts(&state.config) {
            "the PCI configuration space has another shape"
        } else if !state.msix.is_sound(self.msix.vectors()) {
            "the MSI-X table has another shape"
        } else if state.queues.len() != self.queues.len() || registers.queue_vectors.len() != self.queues.len() {
            "the number of queues differs"
        } else if vectors.any(|vector| self.checked_vector(*vector) != *vector) {
            "an interrupt vector does not exist"
        } else if registers.status & !(STATUS_BY_DRIVER | STATUS_NEEDS_RESET) != 0
            || registers.isr & !(ISR_QUEUE | ISR_CONFIG) != 0
        {
            "a register has bits that do not exist"
        } else if registers.status & STATUS_FEATURES_OK != 0
            && (registers.driver_features & !self.offered != 0 || registers.driver_features & F_VERSION_1 == 0)
        {
            "features are in use that this device does not offer"
        } else {
            return self.check_queues(state, mem);
        };
        Err(complaint.to_owned())
    }

    fn check_queues(&self, state: &TransportState, mem: &GuestMem) -> Result<(), String> {
        for (index, (queue, saved)) in self.queues.iter().zip(&state.queues).enumerate() {
            queue
                .check(saved, mem)
                .map_err(|error| format!("queue {index}: {error}"))?;
        }
        Ok(())
    }

    /// Takes over a state that [`Self::check`] approved.
    pub fn load(&mut self, state: TransportState) {
        self.config.load(&state.config);
        self.msix = state.msix;
        self.registers = state.registers;
        let settled = self.registers.status & STATUS_FEATURES_OK != 0;
        let event_idx = settled && self.registers.driver_features & F_EVENT_IDX != 0;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            queue.load(saved, event_idx);
        }
    }
}

/// The 32 bits of a 64-bit feature set that `select` means; zero beyond.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn address(state: &mut QueueState, offset: u64) -> &mut u64 {
    match offset {
        0x20 => &mut state.desc,
        0x28 => &mut state.avail,
        _ => &mut state.used,
    }
}

fn set_low(field: &mut u64, value: u64) {
    *field = *field & !0xffff_ffff | value & 0xffff_ffff;
}

fn set_high(field: &mut u64, value: u64) {
    *field = *field & 0xffff_ffff | value << 32;
}

fn add_msix(config: &mut ConfigSpace, vectors: usize) -> usize {
    debug_assert!(vectors as u64 * ENTRY_BYTES <= AREA_BYTES);
    let mut body = [0; 10];
    body[0..2].copy_from_slice(&(vectors as u16 - 1).to_le_bytes());
    body[2..6].copy_from_slice(&(MSIX_TABLE as u32).to_le_bytes());
    body[6..10].copy_from_slice(&(MSIX_PENDING as u32).to_le_bytes());
    config.add_capability(CAP_MSIX, &body, &[0x00, 0xc0])
}

/// Adds the five virtio capabilities (4.1.4); returns the offset of the last, the window into the BAR.
fn add_virtio_capabilities(config: &mut ConfigSpace, description: &Description) -> usize {
    let capability = |kind: u8, offset: u64, len: u64, extra: &[u8]| {
        // cap_len, cfg_type, bar, id, padding, offset, length
        let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((len as u32).to_le_bytes());
        body.extend(extra);
        body
    };
    let notify_bytes = NOTIFY_MULTIPLIER * description.queues.len() as u64;
    let multiplier = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    config.add_capability(CAP_VENDOR, &capability(1, COMMON, COMMON_BYTES as u64, &[]), &[]);
    config.add_capability(CAP_VENDOR, &capability(2, NOTIFY, notify_bytes, &multiplier), &[]);
    config.add_capability(CAP_VENDOR, &capability(3, ISR, 1, &[]), &[]);
    if description.config_bytes > 0 {
        config.add_capability(
            CAP_VENDOR,
            &capability(4, DEVICE, description.config_bytes as u64, &[]),
            &[],
        );
    }
    // Of the window, BAR number, offset, length and data can be written.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    writable[14..].fill(0);
    config.add_capability(CAP_VENDOR, &capability(5, 0, 0, &[0; 4]), &writable)
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
