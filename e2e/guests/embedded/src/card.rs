//! A network card with a TCP/IP stack of its own: smoltcp's interface and sockets on net.rs. Nothing passes from one card to
//! another.

use crate::net::Net;
use crate::protocol::MAX_CARDS;
use crate::statics::Once;
use crate::time::{self, Nanoseconds};
use smoltcp::iface::{Interface, PollResult, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address, Ipv4Cidr};

/// Connections at a time of the first card.
const CONNECTIONS: usize = 12;
const BUFFER_BYTES: usize = 256 << 10;
/// Likewise of each further one.
const FURTHER_CONNECTIONS: usize = 4;
const FURTHER_BUFFER_BYTES: usize = 16 << 10;
/// Connections at a time of all cards.
pub const ALL_CONNECTIONS: usize = CONNECTIONS + (MAX_CARDS - 1) * FURTHER_CONNECTIONS;
/// A client that is silently gone gives its connection back after this; a paused one is not taken for gone.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const TIMEOUT: Duration = Duration::from_secs(300);

type Buffers = [[u8; BUFFER_BYTES]; CONNECTIONS];
static RECEIVE: Once<Buffers> = Once::new([[0; BUFFER_BYTES]; CONNECTIONS]);
static SEND: Once<Buffers> = Once::new([[0; BUFFER_BYTES]; CONNECTIONS]);

type FurtherBuffers = [[u8; FURTHER_BUFFER_BYTES]; FURTHER_CONNECTIONS];
static FURTHER_RECEIVE: [Once<FurtherBuffers>; MAX_CARDS - 1] =
    [const { Once::new([[0; FURTHER_BUFFER_BYTES]; FURTHER_CONNECTIONS]) }; MAX_CARDS - 1];
static FURTHER_SEND: [Once<FurtherBuffers>; MAX_CARDS - 1] =
    [const { Once::new([[0; FURTHER_BUFFER_BYTES]; FURTHER_CONNECTIONS]) }; MAX_CARDS - 1];

static STORAGE: [Once<[SocketStorage<'static>; CONNECTIONS]>; MAX_CARDS] =
    [const { Once::new([SocketStorage::EMPTY; CONNECTIONS]) }; MAX_CARDS];

/// Who the guest is on a card.
pub struct Identity {
    /// Its address, and how large its network is.
    pub ip: Ipv4Cidr,
    /// Another hardware address than the card's.
    pub mac: Option<[u8; 6]>,
    /// Router to other networks.
    pub gateway: Option<Ipv4Address>,
}

/// A card with its stack.
pub struct Card {
    net: Net,
    interface: Interface,
    /// Its connections.
    pub sockets: SocketSet<'static>,
    /// Which card it is, from 0 on.
    pub number: usize,
}

fn instant(now: Nanoseconds) -> Instant {
    Instant::from_micros((now / 1000) as i64)
}

impl Card {
    /// Brings the interface up.
    pub fn new(mut net: Net, number: usize, identity: &Identity) -> Self {
        let mac = identity.mac.unwrap_or(net.mac);
        let mut settings = smoltcp::iface::Config::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        settings.random_seed = crate::cpu::time_stamp();
        let mut interface = Interface::new(settings, &mut net, instant(time::now()));
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::Ipv4(identity.ip)).expect("room for one address");
        });
        if let Some(gateway) = identity.gateway {
            interface
                .routes_mut()
                .add_default_ipv4_route(gateway)
                .expect("room for one route");
        }
        Self {
            net,
            interface,
            sockets: SocketSet::new(&mut STORAGE[number].take()[..]),
            number,
        }
    }

    /// Makes its sockets, which are closed, and calls `made` for each. To be called once.
    pub fn make_sockets(&mut self, made: impl FnMut(SocketHandle)) {
        match self.number.checked_sub(1) {
            None => self.add_sockets(RECEIVE.take(), SEND.take(), made),
            Some(further) => self.add_sockets(FURTHER_RECEIVE[further].take(), FURTHER_SEND[further].take(), made),
        }
    }

    fn add_sockets<const BYTES: usize, const COUNT: usize>(
        &mut self,
        receive: &'static mut [[u8; BYTES]; COUNT],
        send: &'static mut [[u8; BYTES]; COUNT],
        mut made: impl FnMut(SocketHandle),
    ) {
        for (receive, send) in receive.iter_mut().zip(send.iter_mut()) {
            let mut socket = Socket::new(SocketBuffer::new(&mut receive[..]), SocketBuffer::new(&mut send[..]));
            socket.set_nagle_enabled(false);
            socket.set_keep_alive(Some(KEEP_ALIVE));
            socket.set_timeout(Some(TIMEOUT));
            made(self.sockets.add(socket));
        }
    }

    /// Takes what came, and sends what is to be sent. True if anything moved.
    pub fn poll(&mut self, now: Nanoseconds) -> bool {
        if self.net.neighbour_moved() {
            // smoltcp forgets its neighbours when addresses change, and offers no other way.
            self.interface.update_ip_addrs(|_| {});
        }
        self.interface.poll(instant(now), &mut self.net, &mut self.sockets) != PollResult::None
    }

    /// Tells the device what it was given since the last time.
    pub fn flush(&mut self) {
        self.net.flush();
    }

    /// When [`Card::poll`] has to run again though no interrupt came.
    pub fn next(&mut self, now: Nanoseconds) -> Option<Nanoseconds> {
        self.interface
            .poll_delay(instant(now), &self.sockets)
            .map(|delay| now + delay.total_micros() * 1000)
    }
}
