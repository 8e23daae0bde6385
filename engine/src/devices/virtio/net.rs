//! virtio-net (virtio 1.2, section 5.1): one pair of queues, no offloads, no control queue.
//!
//! The MTU is the guest's: what it was told where it booted. It travels with the state and never changes (5.1.4.1), so a seat takes the guest
//! if its own end carries as much, and goes on telling, and holding to, the guest's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::Frontend;
use super::pci_device::{Inner, VirtioDevice};
use super::queue::{Chain, QueueError, QueueState};
use super::worker::{Next, Worker};
use crate::backends::NetBackend;
use crate::devices::event::{DeviceEvent, DeviceEvents};
use crate::devices::kind;
use crate::memory::GuestMem;

const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;

const RX: usize = 0;
const TX: usize = 1;
/// `struct virtio_net_hdr` with `num_buffers`.
const HEADER_BYTES: usize = 12;
/// Ethernet header and one VLAN tag.
const ETHERNET_BYTES: usize = 18;
/// Shortest Ethernet header.
const LEAST_FRAME: usize = 14;
/// Most frames in each direction in one turn inside the gate: what a pause may have to wait for.
const TURN_FRAMES: usize = 16;
/// How long to leave a backend alone that fails.
const BACKOFF_MS: u32 = 200;
const LINK_UP: u16 = 1;
/// Smallest MTU that the device may have (5.1.4.1).
pub const MTU_MIN: u16 = 68;

/// Configuration of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// Largest payload of a frame that the host's end carries, in bytes: the MTU of a guest that boots here.
    pub mtu: u16,
}

/// What an interface has done since the engine started.
#[derive(Debug, Default)]
pub struct NetMetrics {
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
}

/// [`NetMetrics`] at one moment. Directions as the guest sees them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct NetCounts {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Bytes of these frames.
    pub rx_bytes: u64,
    /// Frames that did not fit the guest's buffers, or were longer than its MTU allows.
    pub rx_dropped: u64,
    /// Frames taken from the guest.
    pub tx_frames: u64,
    /// Bytes of these frames.
    pub tx_bytes: u64,
    /// Frames of the guest that were no Ethernet frames of this MTU.
    pub tx_dropped: u64,
}

impl NetMetrics {
    /// Reads all counters.
    pub fn counts(&self) -> NetCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounts {
            rx_frames: get(&self.rx_frames),
            rx_bytes: get(&self.rx_bytes),
            rx_dropped: get(&self.rx_dropped),
            tx_frames: get(&self.tx_frames),
            tx_bytes: get(&self.tx_bytes),
            tx_dropped: get(&self.tx_dropped),
        }
    }
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

/// The frontend: nothing but configuration, for frames never stay in the device.
pub struct Net {
    config: [u8; 12],
    /// What the host's end carries.
    mtu_max: u16,
}

/// What is saved of an interface beside the transport: what both sides must agree upon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    mac: [u8; 6],
    mtu: u16,
}

impl Net {
    /// An interface as configured.
    pub fn new(config: &NetConfig) -> Self {
        let mut bytes = [0; 12];
        bytes[0..6].copy_from_slice(&config.mac);
        bytes[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        bytes[8..10].copy_from_slice(&1u16.to_le_bytes());
        bytes[10..12].copy_from_slice(&config.mtu.to_le_bytes());
        Self {
            config: bytes,
            mtu_max: config.mtu,
        }
    }

    /// The guest's MTU, in bytes.
    pub fn mtu(&self) -> u16 {
        u16::from_le_bytes([self.config[10], self.config[11]])
    }
}

impl Frontend for Net {
    const DEVICE_ID: u16 = 1;
    const PCI_CLASS: u32 = 0x02_0000;
    const QUEUES: &'static [u16] = &[256, 256];
    const SECTION: (u16, u16) = (kind::NET, 1);
    type State = NetState;

    fn features(&self) -> u64 {
        F_MTU | F_MAC | F_STATUS
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn busy(&self) -> bool {
        false
    }

    fn reset(&mut self) {}

    fn save(&self) -> NetState {
        let mut mac = [0; 6];
        mac.copy_from_slice(&self.config[..6]);
        NetState { mac, mtu: self.mtu() }
    }

    fn check(&self, state: &NetState, queues: &[QueueState]) -> Result<(), String> {
        if state.mac != self.config[..6] {
            return Err(format!(
                "MAC addresses differ ({:02x?} there and {:02x?} here): configure both seats alike",
                state.mac,
                &self.config[..6],
            ));
        }
        if state.mtu < MTU_MIN {
            return Err(format!("an MTU of {} bytes, which no Ethernet has", state.mtu));
        }
        check_mtu(state.mtu, self.mtu_max)?;
        if queues.iter().any(|queue| queue.next_avail != queue.next_used) {
            return Err("a buffer was taken from a queue and not given back".to_owned());
        }
        Ok(())
    }

    fn load(&mut self, state: NetState) {
        self.config[10..12].copy_from_slice(&state.mtu.to_le_bytes());
    }
}

/// Whether a host's end that carries `mtu_max` bytes takes a guest that was told `mtu`.
///
/// # Errors
/// Both, and what to do.
pub fn check_mtu(mtu: u16, mtu_max: u16) -> Result<(), String> {
    if mtu <= mtu_max {
        return Ok(());
    }
    Err(format!(
        "the guest was told an MTU of {mtu} bytes, and the bridge or tap of this seat carries {mtu_max}: larger frames would be lost here. Raise the MTU of this \
         node's bridge and of what is on it to {mtu}, or halt the guest and start it where no more than {mtu_max} is carried"
    ))
}

/// Longest frame of an interface with this MTU, with its header.
fn packet_max(mtu: u16) -> usize {
    HEADER_BYTES + usize::from(mtu) + ETHERNET_BYTES
}

/// The thread of one interface.
pub(crate) struct NetWorker {
    device: Arc<VirtioDevice<Net>>,
    backend: Box<dyn NetBackend>,
    events: Arc<dyn DeviceEvents>,
    metrics: Arc<NetMetrics>,
    index: usize,
    chain: Chain,
    /// Room for a frame with its header.
    buffer: Vec<u8>,
    failing: bool,
}

/// How a turn in one direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// There may be more to do.
    More,
    /// Nothing to move, but the guest has buffers.
    Idle,
    /// The guest has to offer something first, and will notify.
    NoBuffers,
    /// The backend failed.
    Failed,
}

impl NetWorker {
    pub(crate) fn new(
        device: Arc<VirtioDevice<Net>>,
        backend: Box<dyn NetBackend>,
        events: Arc<dyn DeviceEvents>,
        metrics: Arc<NetMetrics>,
        index: usize,
    ) -> Self {
        // Of the host's end: a guest that is taken over may have less, never more.
        let packet = packet_max(device.lock().frontend.mtu());
        Self {
            device,
            backend,
            events,
            metrics,
            index,
            chain: Chain::default(),
            // One byte more than allowed, so that a frame that is too long shows.
            buffer: vec![0; packet + 1],
            failing: false,
        }
    }

    /// Takes up to [`TURN_FRAMES`] frames from the guest.
    fn transmit(&mut self, inner: &mut Inner<Net>, mem: &GuestMem) -> Result<Turn, QueueError> {
        let packet_max = packet_max(inner.frontend.mtu());
        let queue = &mut inner.transport.queues[TX];
        queue.disable_notification(mem)?;
        let mut turn = Turn::More;
        for _ in 0..TURN_FRAMES {
            if !queue.pop(mem, &mut self.chain)? {
                turn = if queue.enable_notification(mem)? {
                    Turn::More
                } else {
                    Turn::NoBuffers
                };
                break;
            }
            self.chain_out(mem, packet_max)?;
            queue.push_used(mem, self.chain.head, 0)?;
        }
        inner.transport.raise_if_wanted(TX, mem)?;
        Ok(turn)
    }

    /// Sends the frame in `self.chain`.
    fn chain_out(&mut self, mem: &GuestMem, packet_max: usize) -> Result<(), QueueError> {
        let len = self.chain.read(mem, 0, &mut self.buffer)?;
        let frame = self.buffer.get(HEADER_BYTES..len).unwrap_or_default();
        // Without offloads flags and GSO type are zero (5.1.6.2).
        let plain = self.buffer[0] == 0 && self.buffer[1] == 0;
        if frame.len() < LEAST_FRAME || len > packet_max || !plain {
            add(&self.metrics.tx_dropped, 1);
            return Ok(());
        }
        self.backend.transmit(frame);
        add(&self.metrics.tx_frames, 1);
        add(&self.metrics.tx_bytes, frame.len() as u64);
        Ok(())
    }

    /// Gives up to [`TURN_FRAMES`] frames to the guest, as long as it has buffers.
    fn receive(&mut self, inner: &mut Inner<Net>, mem: &GuestMem) -> Result<Turn, QueueError> {
        let mut turn = Turn::More;
        for _ in 0..TURN_FRAMES {
            let queue = &mut inner.transport.queues[RX];
            if !queue.has_available(mem)? {
                if !queue.enable_notification(mem)? {
                    turn = Turn::NoBuffers;
                    break;
                }
                queue.disable_notification(mem)?;
            }
            match self.backend.receive(&mut self.buffer[HEADER_BYTES..]) {
                Ok(Some(len)) => self.frame_in(inner, mem, len)?,
                Ok(None) => {
                    self.failing = false;
                    turn = Turn::Idle;
                    break;
                }
                Err(error) => {
                    self.report(&error);
                    turn = Turn::Failed;
                    break;
                }
            }
        }
        inner.transport.raise_if_wanted(RX, mem)?;
        Ok(turn)
    }

    /// Gives the frame of `len` bytes in the buffer to the guest.
    fn frame_in(&mut self, inner: &mut Inner<Net>, mem: &GuestMem, len: usize) -> Result<(), QueueError> {
        let queue = &mut inner.transport.queues[RX];
        let total = HEADER_BYTES + len;
        if total > packet_max(inner.frontend.mtu()) || !queue.pop(mem, &mut self.chain)? {
            add(&self.metrics.rx_dropped, 1);
            return Ok(());
        }
        if self.chain.writable_len() < total as u64 {
            queue.push_used(mem, self.chain.head, 0)?;
            add(&self.metrics.rx_dropped, 1);
            return Ok(());
        }
        self.buffer[..HEADER_BYTES].fill(0);
        // num_buffers is one (5.1.6.4.1).
        self.buffer[10] = 1;
        self.chain.write(mem, 0, &self.buffer[..total])?;
        queue.push_used(mem, self.chain.head, total as u32)?;
        add(&self.metrics.rx_frames, 1);
        add(&self.metrics.rx_bytes, len as u64);
        Ok(())
    }

    fn report(&mut self, error: &std::io::Error) {
        if !std::mem::replace(&mut self.failing, true) {
            self.events.report(DeviceEvent::NetError {
                nic: self.index,
                message: format!("frames can't be received: {error}"),
            });
        }
    }
}

impl Worker for NetWorker {
    fn inside(&mut self) -> Next {
        let device = self.device.clone();
        let mut inner = device.lock();
        if !inner.transport.active() {
            return Next::Wait(None);
        }
        let mem = device.mem();
        let turns = self
            .transmit(&mut inner, mem)
            .and_then(|sent| Ok((sent, self.receive(&mut inner, mem)?)));
        match turns {
            Ok((Turn::More, _) | (_, Turn::More)) => Next::Again,
            Ok((_, Turn::Idle)) => Next::Wait(Some(self.backend.wake_fd())),
            Ok((_, Turn::Failed)) => Next::WaitFor(BACKOFF_MS),
            Ok((_, Turn::NoBuffers)) => Next::Wait(None),
            Err(error) => {
                inner.transport.fail(&error);
                Next::Wait(None)
            }
        }
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
