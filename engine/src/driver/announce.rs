//! Tells the network where the guest's addresses are: its MAC addresses, and the IP addresses that are known.
//!
//! Bridges learn an address's port from the source of frames. A host that stood still and goes on may send old frames once
//! more, and they teach the bridge a port behind which nobody answers, until the guest speaks again. So the active side
//! announces the guest's addresses when it takes over, when it sees a frame with such an address come from outside, and
//! when a seat connects: whoever lost its place does that as soon as it is back.
//!
//! Invariant: what an active side announces is the guest's output, and leaves through the gate like all of it.
//!
//! A standby whose leader's connection closed, whose leader's daemon says that it is gone, or whose leader stands still and
//! asked it to take over, calls frames to its own tap before it has asked the arbiter ([`Driver::call_frames_here`]): a frame
//! that goes to a dead engine is lost, and its sender waits for a retransmission timer, 200 ms as a rule. That is no output
//! of the guest, says nothing of its state (of MAC addresses alone), and gives no right to anything. Should the leader live, its own tap gets the call too (it is a broadcast), and the leader announces
//! the addresses again as soon as its gate admits that.

use std::iter::once;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_protocol::core::RoleName;
use ftvm_protocol::identity::Epoch;

use super::{Driver, Guest};
use crate::outbox::Output;

/// Between two announcements at first, and at most: each of a row doubles it, so that two hosts that were given one
/// address by mistake don't flood the network.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// After so long without an announcement a new row begins.
const CALM: Duration = Duration::from_secs(5);

/// When to announce next.
#[derive(Debug, Default)]
pub struct Announcer {
    last: Option<Instant>,
    pause: Duration,
    due: Option<Instant>,
}

impl Announcer {
    /// The network may have learnt something wrong. However many of these come in a row, an announcement follows the last.
    pub fn ask(&mut self, now: Instant) {
        if self.due.is_some() {
            return;
        }
        let calm = self.last.is_none_or(|last| now.saturating_duration_since(last) >= CALM);
        if calm {
            self.pause = Duration::ZERO;
        }
        self.due = Some(self.last.map_or(now, |last| now.max(last + self.pause)));
    }

    /// When the next one is due.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether to announce now.
    pub fn take(&mut self, now: Instant) -> bool {
        let due = self.due.take_if(|due| *due <= now).is_some();
        if due {
            self.last = Some(now);
            self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
        due
    }
}

impl Driver {
    /// The network may believe that the guest is elsewhere.
    pub(super) fn ask_to_announce(&mut self) {
        if self.guest != Guest::None && self.core.status().role == RoleName::Active {
            self.announcer.ask(Instant::now());
        }
    }

    /// Announces if that is due.
    pub(super) fn announce_if_due(&mut self) {
        if self.guest.is_here() && self.announcer.take(Instant::now()) {
            tracing::debug!("the guest's addresses are announced again");
            self.announce(self.seat.gate().epoch());
        }
    }

    /// Has the network send what is for the guest to this seat's taps, which keep it until the guest may be here.
    pub(super) fn call_frames_here(&self) {
        for (nic, mac) in self.seat.macs.iter().enumerate() {
            self.seat.send_directly(nic, &rarp_announcement(*mac));
        }
    }

    /// Tells the network where the guest's addresses are now, as soon as the gate admits `epoch`; at once for a guest that stands
    /// still until a standby has joined.
    pub(super) fn announce(&mut self, epoch: Epoch) {
        if self.holds_now() {
            return self.call_frames_here();
        }
        for (nic, (mac, addresses)) in self.seat.macs.iter().zip(&self.seat.addresses).enumerate() {
            let of_addresses = addresses.iter().map(|address| address_announcement(*mac, *address));
            for frame in once(rarp_announcement(*mac)).chain(of_addresses) {
                let frame = Output::Frame {
                    nic: nic as u8,
                    bytes: Arc::from(frame),
                };
                self.seat.outbox.put(epoch, frame);
            }
        }
    }
}

/// Shortest Ethernet frame, without its checksum.
const FRAME_BYTES_MIN: usize = 60;

/// A reverse ARP request of the guest's own address (RFC 903), broadcast: bridges learn where the address is, and
/// nobody answers.
fn rarp_announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 4]);
    frame.resize(FRAME_BYTES_MIN, 0);
    frame
}

/// What neighbours that know the address, or look for it, go by.
fn address_announcement(mac: [u8; 6], address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => arp_announcement(mac, address),
        IpAddr::V6(address) => neighbour_advertisement(mac, address),
    }
}

/// An ARP request of the guest's for its own address (RFC 5227, section 2.3), broadcast.
fn arp_announcement(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&address.octets());
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&address.octets());
    frame.resize(FRAME_BYTES_MIN, 0);
    frame
}

/// An unsolicited neighbour advertisement (RFC 4861, section 7.2.6), to all nodes. Who knows the address goes by it, others need not.
fn neighbour_advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const ICMPV6: u8 = 58;
    const MESSAGE_BYTES: u8 = 32;
    // Type 136, no checksum yet, the flag Override, and behind the target the option with its link-layer address.
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend_from_slice(&address.octets());
    message.extend_from_slice(&[2, 1]);
    message.extend_from_slice(&mac);
    // As RFC 8200, section 8.1, has it.
    let pseudo_header = [0, 0, 0, MESSAGE_BYTES, 0, 0, 0, ICMPV6];
    let sum = checksum(&[&address.octets()[..], &ALL_NODES.octets(), &pseudo_header, &message].concat());
    message[2..4].copy_from_slice(&sum);
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, MESSAGE_BYTES, ICMPV6, 255]);
    frame.extend_from_slice(&address.octets());
    frame.extend_from_slice(&ALL_NODES.octets());
    frame.extend_from_slice(&message);
    frame
}

/// The Internet checksum (RFC 1071) of an even number of bytes, few of them.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks_exact(2).map(|word| u16::from_be_bytes([word[0], word[1]]));
    let mut sum: u32 = words.map(u32::from).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seat_io::Claims;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    #[test]
    fn the_announcement_is_a_reverse_arp_request() {
        let frame = rarp_announcement(MAC);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], MAC);
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[20..22], [0, 3]);
        assert_eq!(frame[22..28], MAC);
        assert_eq!(frame[32..38], MAC);
    }

    #[test]
    fn an_address_is_announced_by_gratuitous_arp() {
        let frame = address_announcement(MAC, IpAddr::from([192, 0, 2, 7]));
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!((&frame[22..28], &frame[28..32]), (&MAC[..], &[192, 0, 2, 7][..]));
        assert_eq!((&frame[32..38], &frame[38..42]), (&[0; 6][..], &[192, 0, 2, 7][..]));
    }

    #[test]
    fn an_ipv6_address_is_announced_by_an_unsolicited_advertisement() {
        let address: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let frame = address_announcement(MAC, address.into());
        assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(frame[12..14], [0x86, 0xdd]);
        let (header, message) = frame[14..].split_at(40);
        assert_eq!(
            header[..8],
            [0x60, 0, 0, 0, 0, 32, 58, 255],
            "others are not listened to"
        );
        assert_eq!(header[8..24], address.octets());
        assert_eq!((message.len(), &message[..2]), (32, &[136, 0][..]));
        assert_eq!(message[4..8], [0x20, 0, 0, 0]);
        assert_eq!(message[8..24], address.octets());
        assert_eq!((&message[24..26], &message[26..]), (&[2, 1][..], &MAC[..]));
        // Of all that is summed, its own bytes included, the checksum is zero.
        let summed = [&header[8..], &[0, 0, 0, 32, 0, 0, 0, 58], message].concat();
        assert_eq!(checksum(&summed), [0, 0]);
        assert_ne!(message[2..4], [0, 0]);
    }

    #[test]
    fn the_checksum_is_that_of_the_internet() {
        // The example of RFC 1071, section 3.
        assert_eq!(
            checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            [0x22, 0x0d]
        );
        assert_eq!(checksum(&[0xff, 0xff, 0xff, 0xff]), [0, 0]);
    }

    /// What the engine says for the guest is what the guest itself may say.
    #[test]
    fn announcements_claim_what_is_the_guests() {
        for address in ["192.0.2.7", "2001:db8::7", "fe80::7"] {
            let address: IpAddr = address.parse().unwrap();
            let frame = address_announcement(MAC, address);
            assert_eq!(Claims::new(MAC, &[address]).judge(&frame), Ok(()), "{address}");
            let other: IpAddr = "192.0.2.8".parse().unwrap();
            assert!(Claims::new(MAC, &[other]).judge(&frame).is_err(), "{address}");
        }
    }

    #[test]
    fn the_first_is_announced_at_once_and_the_last_of_a_row_too() {
        let now = Instant::now();
        let mut announcer = Announcer::default();
        assert!(!announcer.take(now));
        announcer.ask(now);
        assert!(announcer.take(now));
        // Between two announcements: one more follows.
        announcer.ask(now);
        announcer.ask(now);
        assert!(!announcer.take(now));
        let due = announcer.due().expect("asked");
        assert!(due <= now + PAUSE_MIN);
        assert!(announcer.take(due));
        assert!(!announcer.take(due));
        assert_eq!(announcer.due(), None);
    }

    #[test]
    fn a_long_row_slows_down_and_calm_ends_it() {
        let mut now = Instant::now();
        let mut announcer = Announcer::default();
        let mut pauses = Vec::new();
        for _ in 0..16 {
            announcer.ask(now);
            let due = announcer.due().expect("asked");
            pauses.push(due - now);
            now = due;
            assert!(announcer.take(now));
        }
        assert!(pauses.is_sorted(), "{pauses:?}");
        assert_eq!((pauses[0], pauses[15]), (Duration::ZERO, PAUSE_MAX));
        now += CALM;
        announcer.ask(now);
        assert_eq!(announcer.due(), Some(now));
    }
}
