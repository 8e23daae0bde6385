//! Just enough of Ethernet, IPv4 and TCP to know what a guest's frame says. Frames are hostile: everything is checked.
use std::net::{Ipv4Addr, SocketAddrV4};

/// A MAC address.
pub type Mac = [u8; 6];

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// A TCP segment over IPv4, not a fragment.
    Tcp(Segment<'a>),
    /// Reverse ARP (RFC 903): how an active side announces the guest's address.
    ReverseArp,
    /// ARP about its sender's own address: how one is announced whose IP addresses are known.
    GratuitousArp,
    /// A neighbour advertisement: the same for IPv6.
    NeighbourAdvertisement,
    /// Anything else that is Ethernet.
    Other,
}

/// A TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Who sent it.
    pub source: SocketAddrV4,
    /// To whom.
    pub destination: SocketAddrV4,
    /// Number of the first byte of `payload` (or of the SYN).
    pub seq: u32,
    /// Number of the next byte that the sender expects; meaningful with the ACK flag.
    pub ack: u32,
    /// It opens a connection.
    pub syn: bool,
    /// It ends its sender's stream.
    pub fin: bool,
    /// It aborts the connection.
    pub rst: bool,
    /// The bytes.
    pub payload: &'a [u8],
}

/// Source address and contents of a frame; none if it is too short to be one.
pub fn parse(frame: &[u8]) -> Option<(Mac, Packet<'_>)> {
    let source = frame.get(6..12)?.try_into().ok()?;
    let packet = match be16(frame, 12)? {
        0x0800 => ipv4(&frame[14..]).map_or(Packet::Other, Packet::Tcp),
        0x0806 if is_gratuitous(&frame[14..]) => Packet::GratuitousArp,
        0x8035 => Packet::ReverseArp,
        0x86DD if is_advertisement(&frame[14..]) => Packet::NeighbourAdvertisement,
        _ => Packet::Other,
    };
    Some((source, packet))
}

fn is_gratuitous(arp: &[u8]) -> bool {
    let sender = arp.get(14..18);
    sender.is_some() && sender == arp.get(24..28)
}

/// ICMPv6 without extension headers, type 136.
fn is_advertisement(ipv6: &[u8]) -> bool {
    (ipv6.get(6), ipv6.get(40)) == (Some(&58), Some(&136))
}

fn ipv4(packet: &[u8]) -> Option<Segment<'_>> {
    let first = *packet.first()?;
    let header_bytes = usize::from(first & 0xF) * 4;
    let total_bytes = usize::from(be16(packet, 2)?);
    let fragment = be16(packet, 6)? & 0x3FFF;
    if first >> 4 != 4 || header_bytes < 20 || total_bytes < header_bytes || fragment != 0 || *packet.get(9)? != 6 {
        return None;
    }
    // Short frames are padded: the length in the header counts.
    let tcp = packet.get(header_bytes..total_bytes)?;
    let data_at = usize::from(*tcp.get(12)? >> 4) * 4;
    let flags = *tcp.get(13)?;
    if data_at < 20 {
        return None;
    }
    Some(Segment {
        source: SocketAddrV4::new(address(packet, 12)?, be16(tcp, 0)?),
        destination: SocketAddrV4::new(address(packet, 16)?, be16(tcp, 2)?),
        seq: be32(tcp, 4)?,
        ack: be32(tcp, 8)?,
        fin: flags & 1 != 0,
        syn: flags & 2 != 0,
        rst: flags & 4 != 0,
        payload: tcp.get(data_at..)?,
    })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn address(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(be32(bytes, at)?))
}

/// Builds frames for tests.
#[cfg(test)]
pub(crate) mod build {
    use super::*;

    /// A frame with this segment, checksums left at zero.
    pub(crate) fn frame(mac: Mac, segment: &Segment<'_>) -> Vec<u8> {
        let mut frame = [[0xFF; 6], mac].concat();
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend((40 + segment.payload.len() as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        frame.extend(segment.source.ip().octets());
        frame.extend(segment.destination.ip().octets());
        frame.extend(segment.source.port().to_be_bytes());
        frame.extend(segment.destination.port().to_be_bytes());
        frame.extend(segment.seq.to_be_bytes());
        frame.extend(segment.ack.to_be_bytes());
        let flags = 0x10 | u8::from(segment.fin) | u8::from(segment.syn) << 1 | u8::from(segment.rst) << 2;
        frame.extend([0x50, flags, 0xFF, 0xFF, 0, 0, 0, 0]);
        frame.extend(segment.payload);
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    fn segment(payload: &[u8]) -> Segment<'_> {
        Segment {
            source: "10.77.0.2:7777".parse().unwrap(),
            destination: "10.77.0.1:40000".parse().unwrap(),
            seq: 0xFFFF_FFF0,
            ack: 77,
            syn: false,
            fin: true,
            rst: false,
            payload,
        }
    }

    #[test]
    fn a_segment_is_read_back_without_its_padding() {
        let segment = segment(b"hello");
        let mut frame = build::frame(MAC, &segment);
        frame.resize(64, 0);
        assert_eq!(parse(&frame), Some((MAC, Packet::Tcp(segment))));
    }

    #[test]
    fn fragments_and_other_protocols_are_other() {
        let mut frame = build::frame(MAC, &segment(b"x"));
        frame[14 + 7] = 1;
        assert_eq!(parse(&frame), Some((MAC, Packet::Other)));
        let mut frame = build::frame(MAC, &segment(b"x"));
        frame[13] = 6;
        assert_eq!(parse(&frame), Some((MAC, Packet::Other)));
    }

    #[test]
    fn announcements_of_addresses_are_told_from_other_arp_and_icmp() {
        let frame = |kind: u16, packet: &[u8]| [&[0xFF; 6][..], &MAC, &kind.to_be_bytes(), packet].concat();
        let is = |frame: &[u8]| parse(frame).map(|(_, packet)| format!("{packet:?}"));
        let arp = |target: [u8; 4]| [&[0; 14][..], &[10, 77, 0, 2], &[0; 6], &target].concat();
        let announcement = frame(0x0806, &arp([10, 77, 0, 2]));
        assert_eq!(is(&announcement).as_deref(), Some("GratuitousArp"));
        assert_eq!(is(&announcement[..41]).as_deref(), Some("Other"));
        assert_eq!(is(&frame(0x0806, &arp([10, 77, 0, 1]))).as_deref(), Some("Other"));
        let mut icmp = [0; 72];
        (icmp[6], icmp[40]) = (58, 136);
        let advertisement = frame(0x86DD, &icmp);
        assert_eq!(is(&advertisement).as_deref(), Some("NeighbourAdvertisement"));
        assert_eq!(is(&advertisement[..54]).as_deref(), Some("Other"));
        icmp[40] = 135;
        assert_eq!(is(&frame(0x86DD, &icmp)).as_deref(), Some("Other"));
    }

    #[test]
    fn no_cut_and_no_byte_makes_it_panic() {
        let frame = build::frame(MAC, &segment(b"some payload"));
        for length in 0..frame.len() {
            let _ = parse(&frame[..length]);
        }
        for at in 0..frame.len() {
            for value in 0..=255 {
                let mut changed = frame.clone();
                changed[at] = value;
                let _ = parse(&changed);
            }
        }
    }
}
