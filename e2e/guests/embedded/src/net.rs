//! virtio-net below smoltcp: one receive and one transmit queue, no offloads. (Virtio 1.2, section 5.1.)

use crate::protocol::MAX_CARDS;
use crate::statics::Once;
use crate::virtio::{GuestHal, PciTransport, wants_kick};
use core::sync::atomic::{Ordering, fence};
use smoltcp::phy::{Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

const QUEUE_SIZE: usize = 64;
const BUFFER_BYTES: usize = 2048;
/// Flags, GSO, checksum fields and buffer count: all zero without offloads.
const HEADER_BYTES: usize = 12;
const ETHERNET_BYTES: usize = 14;
/// Of a card that does not say.
const MTU_DEFAULT: u16 = 1500;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const VERSION_1: u64 = 1 << 32;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const PEERS: usize = 16;
/// Of the MTU in the device's configuration.
const MTU_OFFSET: usize = 10;

type Buffers = [[u8; BUFFER_BYTES]; QUEUE_SIZE];
type Queue = VirtQueue<GuestHal, QUEUE_SIZE>;

static RECEIVE_BUFFERS: [Once<Buffers>; MAX_CARDS] = [const { Once::new([[0; BUFFER_BYTES]; QUEUE_SIZE]) }; MAX_CARDS];
static TRANSMIT_BUFFERS: [Once<Buffers>; MAX_CARDS] = [const { Once::new([[0; BUFFER_BYTES]; QUEUE_SIZE]) }; MAX_CARDS];

/// A network card.
pub struct Net {
    transport: PciTransport,
    receiver: Receiver,
    transmitter: Transmitter,
    /// The card's address.
    pub mac: [u8; 6],
    /// Largest payload of a frame, in bytes.
    mtu: u16,
    peers: Peers,
}

struct Receiver {
    queue: Queue,
    buffers: &'static mut Buffers,
    /// Which buffer belongs to a descriptor.
    owner: [u8; QUEUE_SIZE],
    kick: bool,
}

struct Transmitter {
    queue: Queue,
    buffers: &'static mut Buffers,
    owner: [u8; QUEUE_SIZE],
    sizes: [u16; QUEUE_SIZE],
    free: [u8; QUEUE_SIZE],
    free_count: usize,
    kick: bool,
}

impl Net {
    /// Opens card `number`.
    pub fn open(mut transport: PciTransport, number: usize) -> Result<Self, virtio_drivers::Error> {
        transport.set_status(virtio_drivers::transport::DeviceStatus::empty());
        // Whoever agrees on the MTU has buffers for it (5.1.4.2). The field is there before that is agreed, and another number if it is not.
        let mtu = transport
            .read_config_space(MTU_OFFSET)
            .map_or(MTU_DEFAULT, u16::from_le);
        let fits = HEADER_BYTES + ETHERNET_BYTES + usize::from(mtu) <= BUFFER_BYTES;
        let wanted = VERSION_1 | MAC | if fits { MTU } else { 0 };
        let features = begin(&mut transport, wanted);
        let mtu = if features & MTU != 0 { mtu } else { MTU_DEFAULT };
        let mut mac = [0x02, 0x46, 0x54, 0x56, 0x4D, 0x01 + number as u8];
        if features & MAC != 0 {
            for (index, byte) in mac.iter_mut().enumerate() {
                *byte = transport.read_config_space(index)?;
            }
        }
        let mut receiver = Receiver {
            queue: VirtQueue::new(&mut transport, RECEIVE, false, false)?,
            buffers: RECEIVE_BUFFERS[number].take(),
            owner: [0; QUEUE_SIZE],
            kick: false,
        };
        let mut transmitter = Transmitter {
            queue: VirtQueue::new(&mut transport, TRANSMIT, false, false)?,
            buffers: TRANSMIT_BUFFERS[number].take(),
            owner: [0; QUEUE_SIZE],
            sizes: [0; QUEUE_SIZE],
            free: core::array::from_fn(|index| index as u8),
            free_count: QUEUE_SIZE,
            kick: false,
        };
        // Sent frames are collected when the next one needs a buffer, without an interrupt each.
        transmitter.queue.set_dev_notify(false);
        transport.finish_init();
        (0..QUEUE_SIZE).for_each(|buffer| receiver.give(buffer));
        transport.notify(RECEIVE);
        receiver.kick = false;
        Ok(Self {
            transport,
            receiver,
            transmitter,
            mac,
            mtu,
            peers: Peers::default(),
        })
    }

    /// Tells the device about buffers added since the last time. To be called after smoltcp ran.
    pub fn flush(&mut self) {
        if core::mem::take(&mut self.receiver.kick) && wants_kick(&self.receiver.queue) {
            self.transport.notify(RECEIVE);
        }
        if core::mem::take(&mut self.transmitter.kick) && wants_kick(&self.transmitter.queue) {
            self.transport.notify(TRANSMIT);
        }
    }

    /// Whether a known neighbour has a new hardware address since the last call: what smoltcp has cached is stale then.
    pub fn neighbour_moved(&mut self) -> bool {
        core::mem::take(&mut self.peers.moved)
    }
}

/// Resets the device and agrees on features; returns those that both have.
pub fn begin(transport: &mut PciTransport, wanted: u64) -> u64 {
    use virtio_drivers::transport::DeviceStatus;
    let start = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    transport.set_status(DeviceStatus::empty());
    transport.set_status(start);
    let features = transport.read_device_features() & wanted;
    assert!(features & VERSION_1 != 0, "the virtio device is not a modern one");
    transport.write_driver_features(features);
    transport.set_status(start | DeviceStatus::FEATURES_OK);
    assert!(
        transport.get_status().contains(DeviceStatus::FEATURES_OK),
        "the virtio device refuses features {features:#x}"
    );
    features
}

impl Receiver {
    /// Gives a buffer to the device.
    fn give(&mut self, buffer: usize) {
        // SAFETY: the buffer is static, and not touched again before `take` pops it.
        let token = unsafe { self.queue.add(&[], &mut [&mut self.buffers[buffer]]) };
        let token = token.expect("as many descriptors as buffers");
        self.owner[usize::from(token)] = buffer as u8;
        self.kick = true;
    }

    /// The next received frame: its buffer and its size in bytes, header excluded.
    fn take(&mut self) -> Option<(usize, usize)> {
        let token = self.queue.peek_used()?;
        let buffer = usize::from(
            *self
                .owner
                .get(usize::from(token))
                .expect("the device returns a descriptor of the queue"),
        );
        // SAFETY: this buffer was added under this token.
        let used = unsafe { self.queue.pop_used(token, &[], &mut [&mut self.buffers[buffer]]) };
        let bytes = used.expect("peeked just now") as usize;
        Some((buffer, bytes.min(BUFFER_BYTES).saturating_sub(HEADER_BYTES)))
    }
}

impl Transmitter {
    /// Whether a frame can be sent now; if not, the device interrupts once it can.
    fn ready(&mut self, transport: &mut PciTransport) -> bool {
        if self.free_count > 0 {
            return true;
        }
        self.collect();
        if self.free_count > 0 {
            return true;
        }
        if core::mem::take(&mut self.kick) && wants_kick(&self.queue) {
            transport.notify(TRANSMIT);
        }
        self.queue.set_dev_notify(true);
        // What was used before the device saw the flag raises no interrupt: it has to be seen here.
        fence(Ordering::SeqCst);
        self.collect();
        if self.free_count > 0 {
            self.queue.set_dev_notify(false);
        }
        self.free_count > 0
    }

    fn collect(&mut self) {
        while let Some(token) = self.queue.peek_used() {
            let buffer = *self
                .owner
                .get(usize::from(token))
                .expect("the device returns a descriptor of the queue");
            let size = usize::from(self.sizes[usize::from(buffer)]);
            let bytes = &self.buffers[usize::from(buffer)][..size];
            // SAFETY: this buffer was added under this token, with this size.
            unsafe { self.queue.pop_used(token, &[bytes], &mut []) }.expect("peeked just now");
            self.free[self.free_count] = buffer;
            self.free_count += 1;
        }
    }

    fn send<R>(&mut self, size: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        self.free_count -= 1;
        let buffer = usize::from(self.free[self.free_count]);
        let bytes = &mut self.buffers[buffer][..HEADER_BYTES + size];
        let result = fill(&mut bytes[HEADER_BYTES..]);
        bytes[..HEADER_BYTES].fill(0);
        // SAFETY: the buffer is static, and not touched again before `collect` pops it.
        let token = unsafe { self.queue.add(&[bytes], &mut []) }.expect("as many descriptors as buffers");
        self.owner[usize::from(token)] = buffer as u8;
        self.sizes[buffer] = (HEADER_BYTES + size) as u16;
        self.kick = true;
        result
    }
}

/// A frame that came.
pub struct RxToken<'a> {
    receiver: &'a mut Receiver,
    buffer: usize,
    bytes: usize,
}

/// Leave to send one frame.
pub struct TxToken<'a>(&'a mut Transmitter);

impl smoltcp::phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(&self.receiver.buffers[self.buffer][HEADER_BYTES..HEADER_BYTES + self.bytes]);
        self.receiver.give(self.buffer);
        result
    }
}

impl smoltcp::phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, size: usize, f: F) -> R {
        self.0.send(size, f)
    }
}

impl Device for Net {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        // A frame may need an answer; without room for one it stays in the queue.
        if !self.transmitter.ready(&mut self.transport) {
            return None;
        }
        let (buffer, bytes) = self.receiver.take()?;
        self.peers
            .look(&self.receiver.buffers[buffer][HEADER_BYTES..HEADER_BYTES + bytes]);
        Some((
            RxToken {
                receiver: &mut self.receiver,
                buffer,
                bytes,
            },
            TxToken(&mut self.transmitter),
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        self.transmitter
            .ready(&mut self.transport)
            .then_some(TxToken(&mut self.transmitter))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_BYTES + usize::from(self.mtu);
        capabilities
    }
}

/// Which hardware address an IPv4 address was last seen with. smoltcp keeps a neighbour for a minute and learns of a new
/// hardware address only from ARP aimed at this guest.
#[derive(Default)]
struct Peers {
    known: [([u8; 4], [u8; 6]); PEERS],
    next: usize,
    moved: bool,
}

impl Peers {
    /// Takes note of a frame's sender: from ARP what it says, from IPv4 its source address and the frame's. (What comes
    /// through a router has the router's hardware address, and moves when the router does.)
    fn look(&mut self, frame: &[u8]) {
        let sender = match frame.get(12..14) {
            Some([0x08, 0x06]) => frame.get(22..28).zip(frame.get(28..32)),
            Some([0x08, 0x00]) => frame.get(6..12).zip(frame.get(26..30)),
            _ => None,
        };
        let Some((mac, ip)) = sender else { return };
        let mac: [u8; 6] = mac.try_into().expect("six bytes");
        let ip: [u8; 4] = ip.try_into().expect("four bytes");
        if let Some((_, known)) = self.known.iter_mut().find(|(known, _)| *known == ip) {
            self.moved |= *known != mac;
            *known = mac;
        } else {
            self.known[self.next] = (ip, mac);
            self.next = (self.next + 1) % PEERS;
        }
    }
}
