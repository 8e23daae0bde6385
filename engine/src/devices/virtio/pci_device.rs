//! A virtio device on the PCI bus: ties transport, frontend, BAR and notifications together.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::Frontend;
use super::transport::{
    self, AREA_BYTES, BAR_BYTES, Description, Effect, NOTIFY_MULTIPLIER, Transport, TransportState,
};
use super::worker::Wake;
use crate::devices::DeviceError;
use crate::devices::bus::{Bus, BusDevice, SharedDevice, lock};
use crate::devices::irq::NotifyRegistrar;
use crate::devices::pci::root::PciFunction;
use crate::devices::set::Platform;
use crate::memory::{GuestMem, GuestRam, PCI_MMIO_END, PCI_MMIO_START};
use crate::state::{StateError, StateReader, StateWriter};

/// What the device's mutex guards.
pub(crate) struct Inner<F> {
    pub(crate) transport: Transport,
    pub(crate) frontend: F,
    /// Whose requests the worker may be holding.
    pub(crate) life: Life,
}

/// Counts what makes a worker's requests out of date.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Life {
    /// Resets of the machine: nobody waits for the requests any more, but they did happen here.
    pub(crate) resets: u64,
    /// Loaded states: the requests belong to a past that another machine has replaced.
    pub(crate) loads: u64,
}

impl<F: Frontend> Inner<F> {
    /// Completes a driver's reset that waited for requests, once none is left.
    pub(crate) fn finish_reset(&mut self) {
        if self.transport.reset_pending() && !self.frontend.busy() {
            self.transport.reset();
            self.frontend.reset();
        }
    }
}

/// A virtio device. Shared by vCPU threads, its worker thread and the machine's owner.
pub(crate) struct VirtioDevice<F> {
    inner: Mutex<Inner<F>>,
    ram: Arc<GuestRam>,
    /// One for each queue.
    wakes: Arc<Vec<Wake>>,
    /// The transport as it is at power-on.
    initial: TransportState,
    instance: u32,
}

#[derive(Serialize, Deserialize)]
struct Saved<S> {
    transport: TransportState,
    device: S,
}

impl<F: Frontend> VirtioDevice<F> {
    /// A device after power-on, with BAR 0 at `bar`. `instance` numbers devices of one kind.
    pub(crate) fn new(
        name: String,
        instance: u32,
        bar: u32,
        frontend: F,
        platform: &Platform,
    ) -> Result<Arc<Self>, DeviceError> {
        let wakes = F::QUEUES.iter().map(|_| Wake::new()).collect::<Result<Vec<_>, _>>();
        let wakes = wakes.map_err(|source| DeviceError::Wake {
            device: name.clone(),
            source,
        })?;
        let description = Description {
            name,
            device_id: F::DEVICE_ID,
            pci_class: F::PCI_CLASS,
            features: frontend.features(),
            queues: F::QUEUES,
            config_bytes: frontend.config().len(),
            bar,
        };
        let transport = Transport::new(description, platform.msi.clone(), platform.events.clone());
        let initial = transport.save();
        Ok(Arc::new(Self {
            inner: Mutex::new(Inner {
                transport,
                frontend,
                life: Life::default(),
            }),
            ram: platform.ram.clone(),
            wakes: Arc::new(wakes),
            initial,
            instance,
        }))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner<F>> {
        lock(&self.inner)
    }

    pub(crate) fn mem(&self) -> &GuestMem {
        self.ram.mem()
    }

    pub(crate) fn wakes(&self) -> &Arc<Vec<Wake>> {
        &self.wakes
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let (area, at) = (offset / AREA_BYTES * AREA_BYTES, offset % AREA_BYTES);
        let mut inner = self.lock();
        match area {
            transport::COMMON => inner.transport.read_common(at, data),
            transport::ISR => {
                data.fill(0);
                if at == 0 {
                    data[0] = inner.transport.read_isr();
                }
            }
            transport::DEVICE => {
                let config = inner.frontend.config();
                for (at, byte) in (at as usize..).zip(data) {
                    *byte = config.get(at).copied().unwrap_or(0);
                }
            }
            transport::NOTIFY => data.fill(0),
            transport::MSIX_TABLE => inner.transport.msix.read_table(at, data),
            transport::MSIX_PENDING => inner.transport.msix.read_pending(at, data),
            _ => {}
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        let (area, at) = (offset / AREA_BYTES * AREA_BYTES, offset % AREA_BYTES);
        match area {
            transport::COMMON => self.write_common(at, data),
            transport::NOTIFY => {
                if let Some(wake) = self.wakes.get((at / NOTIFY_MULTIPLIER) as usize) {
                    wake.signal();
                }
            }
            transport::MSIX_TABLE => self.lock().transport.write_msix(at, data),
            _ => {}
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        match inner.transport.write_common(offset, data, self.mem()) {
            Effect::None => {}
            Effect::Started => self.wakes.iter().for_each(Wake::signal),
            Effect::Reset => {
                inner.transport.defer_reset();
                inner.finish_reset();
            }
        }
    }
}

/// A virtio device as the machine's owner sees it, whatever it does.
pub(crate) trait Saveable: Send + Sync {
    /// Kind and instance of the section that it saves.
    fn section(&self) -> (u16, u32);
    fn save(&self, writer: &mut StateWriter);
    fn check(&self, reader: &StateReader<'_>) -> Result<(), StateError>;
    /// Takes over a state; `check` approved it.
    fn load(&self, reader: &StateReader<'_>) -> Result<(), StateError>;
    /// Wakes the worker for every queue and interrupts the guest once for each.
    fn kick(&self);
    /// Back to power-on.
    fn reset(&self);
}

impl<F: Frontend> VirtioDevice<F> {
    fn parse(&self, reader: &StateReader<'_>) -> Result<Saved<F::State>, StateError> {
        let (kind, version) = F::SECTION;
        let section = reader.require(kind, version, self.instance)?;
        let saved: Saved<F::State> = crate::devices::decode(&section)?;
        let inner = self.lock();
        let transport = inner.transport.check(&saved.transport, self.mem());
        let device = || inner.frontend.check(&saved.device, saved.transport.queues());
        transport.and_then(|()| device()).map_err(|why| section.invalid(why))?;
        Ok(saved)
    }
}

impl<F: Frontend> Saveable for VirtioDevice<F> {
    fn section(&self) -> (u16, u32) {
        (F::SECTION.0, self.instance)
    }

    fn save(&self, writer: &mut StateWriter) {
        let inner = self.lock();
        let saved = Saved {
            transport: inner.transport.save(),
            device: inner.frontend.save(),
        };
        let (kind, version) = F::SECTION;
        crate::devices::encode(writer, kind, version, self.instance, &saved);
    }

    fn check(&self, reader: &StateReader<'_>) -> Result<(), StateError> {
        self.parse(reader).map(|_| ())
    }

    fn load(&self, reader: &StateReader<'_>) -> Result<(), StateError> {
        let saved = self.parse(reader)?;
        let mut inner = self.lock();
        inner.transport.load(saved.transport);
        inner.frontend.load(saved.device);
        inner.life.loads += 1;
        Ok(())
    }

    fn kick(&self) {
        self.lock().transport.raise_all();
        self.wakes.iter().for_each(Wake::signal);
    }

    fn reset(&self) {
        let mut inner = self.lock();
        inner.transport.load(self.initial.clone());
        inner.frontend.reset();
        inner.life.resets += 1;
    }
}

/// BAR 0 on the MMIO bus.
struct Window<F>(Arc<VirtioDevice<F>>);

impl<F: Frontend> BusDevice for Window<F> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.bar_read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.bar_write(offset, data);
    }
}

/// The device's function on the PCI bus. Keeps BAR 0 where the guest put it.
pub(crate) struct Function<F: Frontend> {
    device: Arc<VirtioDevice<F>>,
    window: SharedDevice,
    mmio: Arc<Bus>,
    notify: Arc<dyn NotifyRegistrar>,
    mapped: Option<u64>,
    /// Queues whose notifications the kernel takes, by index.
    registered: Vec<bool>,
}

/// What the owner needs of a function beyond PCI.
pub(crate) trait Mapped: Send {
    /// Brings the MMIO bus in line with the base address register.
    fn remap(&mut self);
    /// Takes the device off the MMIO bus, until it is mapped again, if its base address register says another place.
    fn unmap_if_moved(&mut self);
}

impl<F: Frontend> Function<F> {
    /// Puts the device on `mmio` at its power-on address.
    pub(crate) fn new(device: Arc<VirtioDevice<F>>, mmio: Arc<Bus>, notify: Arc<dyn NotifyRegistrar>) -> Self {
        let registered = vec![false; device.wakes.len()];
        let window = Arc::new(Mutex::new(Window(device.clone())));
        let mut function = Self {
            device,
            window,
            mmio,
            notify,
            mapped: None,
            registered,
        };
        function.remap();
        function
    }

    fn notify_address(base: u64, queue: usize) -> u64 {
        base + transport::NOTIFY + NOTIFY_MULTIPLIER * queue as u64
    }

    fn map(&mut self, base: u64, len: u64) {
        // A BAR that the guest points elsewhere (also while it sizes it) answers nowhere.
        let fits = base >= PCI_MMIO_START && base + len <= PCI_MMIO_END;
        if !fits || self.mmio.insert(base, len, self.window.clone()).is_err() {
            return;
        }
        self.mapped = Some(base);
        for (queue, wake) in self.device.wakes.iter().enumerate() {
            let address = Self::notify_address(base, queue);
            self.registered[queue] = self.notify.register(address, wake.as_fd()).is_ok();
        }
    }

    /// Where the guest wants BAR 0, and its length.
    fn wanted(&self) -> Option<(u64, u64)> {
        self.device.lock().transport.config.bar0()
    }

    fn unmap(&mut self) {
        let Some(base) = self.mapped.take() else { return };
        for (queue, wake) in self.device.wakes.iter().enumerate() {
            if std::mem::take(&mut self.registered[queue]) {
                // Nothing can be done about a failure, and a stale registration only wakes the worker once more.
                let _ = self.notify.unregister(Self::notify_address(base, queue), wake.as_fd());
            }
        }
        self.mmio.remove(base);
    }

    /// The part of BAR 0 that an access to the window capability's data means (4.1.4.9).
    fn window_target(&self) -> Option<(u64, usize)> {
        let inner = self.device.lock();
        let (config, cap) = (&inner.transport.config, inner.transport.window_cap);
        let (bar, offset, len) = (
            config.word(cap + 4) as u8,
            config.double(cap + 8),
            config.double(cap + 12),
        );
        let sound = bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len) && offset < BAR_BYTES;
        sound.then_some((u64::from(offset), len as usize))
    }

    fn window_data(&self) -> usize {
        self.device.lock().transport.window_cap + 16
    }
}

impl<F: Frontend> Mapped for Function<F> {
    fn remap(&mut self) {
        self.unmap_if_moved();
        if self.mapped.is_none()
            && let Some((base, len)) = self.wanted()
        {
            self.map(base, len);
        }
    }

    fn unmap_if_moved(&mut self) {
        if self.wanted().map(|(base, _)| base) != self.mapped {
            self.unmap();
        }
    }
}

impl<F: Frontend> PciFunction for Function<F> {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        if offset == self.window_data()
            && let Some((target, len)) = self.window_target()
        {
            let mut value = [0; 4];
            self.device.bar_read(target, &mut value[..len]);
            data.copy_from_slice(&value[..data.len()]);
            return;
        }
        self.device.lock().transport.config.read(offset, data);
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        if offset == self.window_data() {
            if let Some((target, len)) = self.window_target()
                && len <= data.len()
            {
                self.device.bar_write(target, &data[..len]);
            }
            return;
        }
        self.device.lock().transport.write_config(offset, data);
        self.remap();
    }
}

impl<F: Frontend> Drop for Function<F> {
    fn drop(&mut self) {
        self.unmap();
    }
}
