//! The other end of a guest's Ethernet: frames as datagrams, written and read by hand.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

pub type Mac = [u8; 6];
pub const MAC_A: Mac = [2, 0, 0, 0, 0, 0xA];
pub const MAC_B: Mac = [2, 0, 0, 0, 0, 0xB];
const HOST: [u8; 4] = [10, 9, 0, 1];
const GUEST: [u8; 4] = [10, 9, 0, 2];
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;
const BROADCAST: Mac = [0xFF; 6];
const ICMP: u8 = 1;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// A link to QEMU's `dgram` network.
pub struct Wire {
    socket: UdpSocket,
    qemu: u16,
}

impl Wire {
    pub fn open() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let qemu = UdpSocket::bind("127.0.0.1:0")
            .and_then(|other| other.local_addr())
            .expect("a free port")
            .port();
        Self { socket, qemu }
    }

    /// The `-netdev` that is the other end.
    pub fn netdev(&self) -> String {
        let own = self.socket.local_addr().expect("it is bound").port();
        let end = |name, port| format!("{name}.type=inet,{name}.host=127.0.0.1,{name}.port={port}");
        format!("dgram,{},{}", end("local", self.qemu), end("remote", own))
    }

    fn send(&self, frame: &[u8]) {
        self.socket
            .send_to(frame, ("127.0.0.1", self.qemu))
            .expect("QEMU is there");
    }

    /// The next frame that `wanted` takes something from, or nothing until `deadline`.
    fn receive<T>(&self, deadline: Instant, mut wanted: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
        let mut frame = [0; 2048];
        loop {
            let left = deadline
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).expect("not zero");
            let bytes = self.socket.recv(&mut frame).ok()?;
            if let Some(found) = wanted(&frame[..bytes]) {
                return Some(found);
            }
        }
    }

    /// Asks who has the guest's address, as the host with this hardware address; the answer is the guest's.
    pub fn arp(&self, own: Mac) -> Mac {
        self.send(&arp(ARP_REQUEST, own, BROADCAST));
        let reply = self.receive(Instant::now() + Duration::from_secs(20), |frame| {
            let is_reply =
                frame[..6] == own && frame[12..14] == [8, 6] && frame[21] == ARP_REPLY && frame[28..32] == GUEST;
            is_reply.then(|| frame[22..28].try_into().expect("six bytes"))
        });
        reply.expect("the guest answers ARP")
    }

    /// Sends echo requests as the host with this hardware address, without announcing it, until one is answered to it.
    /// ARP requests of the guest are answered.
    pub fn ping(&mut self, own: Mac, guest: Mac, patience: Duration) {
        let end = Instant::now() + patience;
        for number in 0.. {
            self.send(&echo(own, guest, number));
            let next = (Instant::now() + Duration::from_millis(300)).min(end);
            let answered = self.receive(next, |frame| {
                if frame[12..14] == [8, 6] && frame[21] == ARP_REQUEST && frame[38..42] == HOST {
                    self.send(&arp(ARP_REPLY, own, guest));
                }
                (frame[..6] == own && frame[12..14] == [8, 0] && frame[23] == ICMP && frame[34] == ECHO_REPLY)
                    .then_some(())
            });
            if answered.is_some() {
                return;
            }
            assert!(Instant::now() < end, "no echo reply to {own:02x?} within {patience:?}");
        }
    }
}

fn arp(operation: u8, own: Mac, target: Mac) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(target);
    frame.extend(own);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(own);
    frame.extend(HOST);
    frame.extend(if operation == ARP_REQUEST { [0; 6] } else { target });
    frame.extend(GUEST);
    frame.resize(60, 0);
    frame
}

fn echo(own: Mac, target: Mac, number: u16) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, ICMP, 0, 0];
    ip.extend(HOST);
    ip.extend(GUEST);
    let sum = internet_checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    let mut icmp = vec![ECHO_REQUEST, 0, 0, 0, 0x12, 0x34];
    icmp.extend(number.to_be_bytes());
    let sum = internet_checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    let mut frame = Vec::new();
    frame.extend(target);
    frame.extend(own);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(icmp);
    frame.resize(60, 0);
    frame
}

fn internet_checksum(bytes: &[u8]) -> [u8; 2] {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xFFFF) + (sum >> 16);
    (!(folded as u16)).to_be_bytes()
}
