//! Who a guest may say that it is: its frames are judged before they leave.
//!
//! A frame's source is the card's own MAC address, always. Where it is known which IP addresses the guest has, it speaks IPv4, ARP
//! and IPv6 with these addresses alone, whether in VLANs or not; what would give it another's traffic (ARP and neighbour discovery
//! for other addresses, router advertisements, redirects, answers of a DHCP server) does not leave, and neither does what can't be
//! read whole, for whoever receives it may read it otherwise. Of IPv6's link-local addresses the one that follows from the MAC
//! address (RFC 4291, appendix A) is the guest's; others have to be listed, for the network's router may have any.
//!
//! Invariant: a frame that is refused never was output: it is in no epoch, so no seat sends it, now or after a takeover. Judged is what
//! comes out of the guest's queue, and nothing else.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A guest that goes on is told of once in this time, for each of its cards.
const TELL_EVERY: Duration = Duration::from_secs(60);

const ETHERTYPE_AT: usize = 12;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
/// 802.1Q, 802.1ad, and what was used for the outer tag before that.
const VLAN_TAGS: [u16; 4] = [0x8100, 0x88a8, 0x9100, 0x9200];
const VLAN_TAG_BYTES: usize = 4;
/// Of one frame: an outer and an inner one.
const VLAN_TAGS_MAX: usize = 2;

/// Ethernet and IPv4, with addresses of their lengths (RFC 826).
const ARP_OF_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: u16 = 1;

const IPV4_HEADER_BYTES: usize = 20;
const IPV6_HEADER_BYTES: usize = 40;
/// More than any sender has; bounds the work for one frame.
const IPV6_HEADERS_MAX: usize = 8;

const UDP: u8 = 17;
const ICMP: u8 = 1;
/// Redirects and router advertisements (RFC 792, RFC 1256).
const ICMP_OF_ROUTERS: [u8; 2] = [5, 9];
const IGMP: u8 = 2;
const IGMP_QUERY: u8 = 0x11;
const ICMPV6: u8 = 58;
const NO_NEXT_HEADER: u8 = 59;

/// Extension headers of one form (RFC 6564): hop-by-hop, routing, destination, mobility, HIP, Shim6.
const EXTENSIONS: [u8; 6] = [0, 43, DESTINATION_OPTIONS, 135, 139, 140];
const DESTINATION_OPTIONS: u8 = 60;
/// Of destination options: the address that whoever receives it takes for the source (RFC 6275, section 6.3).
const HOME_ADDRESS: u8 = 0xc9;
/// The option that has no length.
const PAD1: u8 = 0;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;

/// MLDv1 report and done, MLDv2 report (RFC 2710, RFC 3810).
const MULTICAST_REPORTS: [u8; 3] = [131, 132, 143];
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Options of neighbour discovery that name the sender's, or the target's, link-layer address.
const LINK_LAYER_OPTIONS: [u8; 2] = [1, 2];

/// Ports of a protocol's two ends.
struct Ports {
    client: u16,
    server: u16,
}

const DHCP: Ports = Ports { client: 68, server: 67 };
const DHCPV6: Ports = Ports {
    client: 546,
    server: 547,
};

/// Why a frame does not leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its source is another MAC address.
    Mac,
    /// It is neither IPv4 nor ARP nor IPv6.
    Protocol,
    /// It is cut off, contradicts itself, or hides what it is.
    Malformed,
    /// Its source is another IP address.
    Ip,
    /// ARP that says where another address is, or that its own is elsewhere.
    Arp,
    /// The same, of IPv6's neighbour discovery.
    Neighbour,
    /// What a router says: an advertisement, or a redirect.
    Router,
    /// What a DHCP server says.
    DhcpServer,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Mac,
        Self::Protocol,
        Self::Malformed,
        Self::Ip,
        Self::Arp,
        Self::Neighbour,
        Self::Router,
        Self::DhcpServer,
    ];

    /// Its name in status and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Mac => "mac",
            Self::Protocol => "protocol",
            Self::Malformed => "malformed",
            Self::Ip => "ip",
            Self::Arp => "arp",
            Self::Neighbour => "neighbour",
            Self::Router => "router",
            Self::DhcpServer => "dhcp_server",
        }
    }

    /// What is wrong with the frame, and what to do if it should leave.
    fn text(self) -> &'static str {
        match self {
            Self::Mac => {
                "has another source MAC address than its card: let the guest leave the card's address as it is"
            }
            Self::Protocol => {
                "is neither IPv4 nor ARP nor IPv6: take the addresses out of this card's configuration if the guest needs it"
            }
            Self::Malformed => "is cut off, contradicts itself or hides what it is",
            Self::Ip => {
                "has a source that is not among its card's addresses: add it there if it is the guest's (link-local ones, too, unless they follow from the MAC address)"
            }
            Self::Arp => {
                "claims in ARP an address that is not among its card's, or that its own is at another MAC address: add it there if it is the guest's"
            }
            Self::Neighbour => {
                "claims in neighbour discovery an address that is not among its card's, or that its own is at another MAC address: add it there if it is the guest's (link-local ones, too, unless they follow from the MAC address)"
            }
            Self::Router => {
                "is a router's advertisement or redirect: take the addresses out of this card's configuration if the guest is a router"
            }
            Self::DhcpServer => {
                "is a DHCP server's answer: take the addresses out of this card's configuration if the guest is one"
            }
        }
    }
}

/// What one card of the guest may say of itself.
#[derive(Debug, Clone)]
pub struct Claims {
    mac: [u8; 6],
    /// None: it is not known which the guest has.
    addresses: Vec<IpAddr>,
    link_local: Ipv6Addr,
}

/// What an IPv6 packet carries behind its headers.
struct Upper<'a> {
    protocol: u8,
    bytes: &'a [u8],
    fragment: bool,
}

impl Claims {
    /// Of a card with this MAC address, and of a guest with these addresses there; without any, all are its own.
    pub fn new(mac: [u8; 6], addresses: &[IpAddr]) -> Self {
        Self {
            mac,
            addresses: addresses.to_vec(),
            link_local: link_local(mac),
        }
    }

    /// Whether the guest may send this frame.
    ///
    /// # Errors
    /// Why not.
    pub fn judge(&self, frame: &[u8]) -> Result<(), Reason> {
        if bytes::<6>(frame, 6)? != self.mac {
            return Err(Reason::Mac);
        }
        if self.addresses.is_empty() {
            return Ok(());
        }
        match untagged(frame)? {
            (IPV4, packet) => self.ipv4(packet),
            (ARP, packet) => self.arp(packet),
            (IPV6, packet) => self.ipv6(packet),
            _ => Err(Reason::Protocol),
        }
    }

    fn has(&self, address: impl Into<IpAddr>) -> bool {
        self.addresses.contains(&address.into())
    }

    fn has_v6(&self, address: Ipv6Addr) -> bool {
        address == self.link_local || self.has(address)
    }

    fn arp(&self, packet: &[u8]) -> Result<(), Reason> {
        if bytes::<6>(packet, 0)? != ARP_OF_IPV4 {
            return Err(Reason::Protocol);
        }
        let claimed = claimed_by_arp(packet)?;
        if bytes::<6>(packet, 8)? != self.mac || !self.has(claimed) {
            return Err(Reason::Arp);
        }
        Ok(())
    }

    fn ipv4(&self, packet: &[u8]) -> Result<(), Reason> {
        let first = byte(packet, 0)?;
        let header_bytes = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || header_bytes < IPV4_HEADER_BYTES {
            return Err(Reason::Malformed);
        }
        let packet = packet.get(..usize::from(be16(packet, 2)?)).ok_or(Reason::Malformed)?;
        let payload = packet.get(header_bytes..).ok_or(Reason::Malformed)?;
        let fragment = be16(packet, 6)?;
        let (begins, whole) = (fragment & 0x1fff == 0, fragment & 0x3fff == 0);
        let (protocol, source) = (byte(packet, 9)?, v4(packet, 12)?);
        let udp = protocol == UDP && begins;
        if source.is_unspecified() {
            let discovers =
                udp && whole && v4(packet, 16)?.is_broadcast() && ports(payload)? == (DHCP.client, DHCP.server);
            // Who has no address yet may join groups (RFC 3376, section 4.2.13).
            let joins = protocol == IGMP && whole && byte(payload, 0)? != IGMP_QUERY;
            return if discovers || joins { Ok(()) } else { Err(Reason::Ip) };
        }
        if !self.has(source) {
            return Err(Reason::Ip);
        }
        if udp {
            return no_server(payload, &DHCP);
        }
        let of_a_router = protocol == ICMP && begins && ICMP_OF_ROUTERS.contains(&byte(payload, 0)?);
        if of_a_router { Err(Reason::Router) } else { Ok(()) }
    }

    fn ipv6(&self, packet: &[u8]) -> Result<(), Reason> {
        if byte(packet, 0)? >> 4 != 6 {
            return Err(Reason::Malformed);
        }
        let length = usize::from(be16(packet, 4)?);
        let payload = packet.get(IPV6_HEADER_BYTES..IPV6_HEADER_BYTES + length);
        let upper = upper(byte(packet, 6)?, payload.ok_or(Reason::Malformed)?)?;
        let source = v6(packet, 8)?;
        if source.is_unspecified() {
            // Duplicate address detection, and what precedes the first address.
            let kind = (upper.protocol == ICMPV6).then(|| byte(upper.bytes, 0)).transpose()?;
            let may = |kind| {
                MULTICAST_REPORTS.contains(&kind) || matches!(kind, ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION)
            };
            if !kind.is_some_and(may) {
                return Err(Reason::Ip);
            }
        } else if !self.has_v6(source) {
            return Err(Reason::Ip);
        }
        match upper.protocol {
            UDP => no_server(upper.bytes, &DHCPV6),
            ICMPV6 => self.icmpv6(&upper, source),
            _ => Ok(()),
        }
    }

    /// Neighbour discovery (RFC 4861).
    fn icmpv6(&self, upper: &Upper<'_>, source: Ipv6Addr) -> Result<(), Reason> {
        let message = upper.bytes;
        let (fixed_bytes, claims_target) = match byte(message, 0)? {
            ROUTER_ADVERTISEMENT | REDIRECT => return Err(Reason::Router),
            ROUTER_SOLICITATION => (8, false),
            // Without an address the sender asks for the one that it is about to take.
            NEIGHBOUR_SOLICITATION => (24, source.is_unspecified()),
            NEIGHBOUR_ADVERTISEMENT => (24, true),
            _ => return Ok(()),
        };
        // Nobody may send it in fragments (RFC 6980): what can't be seen whole can't be judged.
        if upper.fragment {
            return Err(Reason::Malformed);
        }
        if claims_target && !self.has_v6(v6(message, 8)?) {
            return Err(Reason::Neighbour);
        }
        let mut options = message.get(fixed_bytes..).ok_or(Reason::Malformed)?;
        while !options.is_empty() {
            let (kind, length) = (byte(options, 0)?, usize::from(byte(options, 1)?) * 8);
            if length == 0 || length > options.len() {
                return Err(Reason::Malformed);
            }
            let (option, rest) = options.split_at(length);
            if LINK_LAYER_OPTIONS.contains(&kind) && option[2..] != self.mac {
                return Err(Reason::Neighbour);
            }
            options = rest;
        }
        Ok(())
    }
}

/// The link-local address of an interface with this MAC address (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// The address that ARP says is its sender's. Whether somebody has an address is asked by whoever is about to take it (RFC 5227).
fn claimed_by_arp(packet: &[u8]) -> Result<Ipv4Addr, Reason> {
    let (sender, target) = (v4(packet, 14)?, v4(packet, 24)?);
    let probe = be16(packet, 6)? == ARP_REQUEST && sender.is_unspecified();
    Ok(if probe { target } else { sender })
}

/// The address that a frame claims which was refused for this reason: whoever is told shall not have to look for it.
fn claimed(reason: Reason, frame: &[u8]) -> Option<IpAddr> {
    let (kind, packet) = untagged(frame).ok()?;
    let address = match (reason, kind) {
        (Reason::Arp, _) => claimed_by_arp(packet).map(IpAddr::V4),
        (Reason::Ip, IPV4) => v4(packet, 12).map(IpAddr::V4),
        (Reason::Ip, IPV6) => v6(packet, 8).map(IpAddr::V6),
        (Reason::Neighbour, _) => {
            let upper = upper(byte(packet, 6).ok()?, packet.get(IPV6_HEADER_BYTES..)?).ok()?;
            v6(upper.bytes, 8).map(IpAddr::V6)
        }
        _ => return None,
    };
    address.ok()
}

/// The EtherType behind a frame's VLAN tags, and what follows it.
fn untagged(frame: &[u8]) -> Result<(u16, &[u8]), Reason> {
    for tags in 0..=VLAN_TAGS_MAX {
        let at = ETHERTYPE_AT + tags * VLAN_TAG_BYTES;
        let kind = be16(frame, at)?;
        if !VLAN_TAGS.contains(&kind) {
            return Ok((kind, &frame[at + 2..]));
        }
    }
    Err(Reason::Malformed)
}

/// Goes through the headers of an IPv6 packet. What has nothing more to show, the later part of a fragmented packet, has no next header:
/// its first part is judged, and can't be written over, since only one header, whose beginning is judged, may follow that of the fragment.
fn upper(first: u8, payload: &[u8]) -> Result<Upper<'_>, Reason> {
    let (mut protocol, mut bytes, mut fragment) = (first, payload, false);
    for _ in 0..IPV6_HEADERS_MAX {
        let length = match protocol {
            FRAGMENT | AUTHENTICATION if fragment => return Err(Reason::Malformed),
            extension if EXTENSIONS.contains(&extension) && fragment => return Err(Reason::Malformed),
            extension if EXTENSIONS.contains(&extension) => (usize::from(byte(bytes, 1)?) + 1) * 8,
            AUTHENTICATION => (usize::from(byte(bytes, 1)?) + 2) * 4,
            FRAGMENT => {
                fragment = true;
                if be16(bytes, 2)? & 0xfff8 != 0 {
                    return Ok(Upper {
                        protocol: NO_NEXT_HEADER,
                        bytes: &[],
                        fragment,
                    });
                }
                8
            }
            _ => {
                return Ok(Upper {
                    protocol,
                    bytes,
                    fragment,
                });
            }
        };
        let (header, rest) = bytes.split_at_checked(length).ok_or(Reason::Malformed)?;
        if protocol == DESTINATION_OPTIONS && has_home_address(header)? {
            return Err(Reason::Malformed);
        }
        protocol = byte(header, 0)?;
        bytes = rest;
    }
    Err(Reason::Malformed)
}

fn has_home_address(header: &[u8]) -> Result<bool, Reason> {
    let mut options = header.get(2..).unwrap_or_default();
    while let [kind, rest @ ..] = options {
        if *kind == HOME_ADDRESS {
            return Ok(true);
        }
        let content_bytes = if *kind == PAD1 {
            0
        } else {
            usize::from(byte(rest, 0)?) + 1
        };
        options = rest.get(content_bytes..).ok_or(Reason::Malformed)?;
    }
    Ok(false)
}

/// Source and destination of a UDP datagram.
fn ports(datagram: &[u8]) -> Result<(u16, u16), Reason> {
    Ok((be16(datagram, 0)?, be16(datagram, 2)?))
}

/// Clients go by their own port alone, whatever the server's.
fn no_server(datagram: &[u8], known: &Ports) -> Result<(), Reason> {
    let (from, to) = ports(datagram)?;
    if from == known.server || to == known.client {
        return Err(Reason::DhcpServer);
    }
    Ok(())
}

fn bytes<const N: usize>(packet: &[u8], at: usize) -> Result<[u8; N], Reason> {
    let found = packet.get(at..).and_then(|rest| rest.first_chunk::<N>());
    found.copied().ok_or(Reason::Malformed)
}

fn byte(packet: &[u8], at: usize) -> Result<u8, Reason> {
    packet.get(at).copied().ok_or(Reason::Malformed)
}

fn be16(packet: &[u8], at: usize) -> Result<u16, Reason> {
    bytes(packet, at).map(u16::from_be_bytes)
}

fn v4(packet: &[u8], at: usize) -> Result<Ipv4Addr, Reason> {
    bytes::<4>(packet, at).map(Ipv4Addr::from)
}

fn v6(packet: &[u8], at: usize) -> Result<Ipv6Addr, Reason> {
    bytes::<16>(packet, at).map(Ipv6Addr::from)
}

/// How many frames of one card were refused since the engine started.
#[derive(Debug, Default)]
pub struct Refused([AtomicU64; Reason::ALL.len()]);

impl Refused {
    fn of(&self, reason: Reason) -> &AtomicU64 {
        // Numbered as `ALL` has them, which a test sees to.
        &self.0[reason as usize]
    }

    /// By the reasons' names, all of them.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reason::ALL
            .map(|reason| (reason.label(), self.of(reason).load(Ordering::Relaxed)))
            .into_iter()
    }
}

/// Stands between one card's queue and everything else.
pub struct Guard {
    claims: Claims,
    refused: Arc<Refused>,
    tell: Box<dyn Fn(String) + Send>,
    told: Option<Instant>,
}

impl Guard {
    /// By these claims. What is refused is counted in `refused`, and told now and then by `tell`, which must not block.
    pub fn new(claims: Claims, refused: Arc<Refused>, tell: impl Fn(String) + Send + 'static) -> Self {
        Self {
            claims,
            refused,
            tell: Box::new(tell),
            told: None,
        }
    }

    /// Whether this frame of the guest may leave.
    pub fn admits(&mut self, frame: &[u8]) -> bool {
        match self.claims.judge(frame) {
            Ok(()) => true,
            Err(reason) => {
                self.refuse(reason, frame, Instant::now());
                false
            }
        }
    }

    fn refuse(&mut self, reason: Reason, frame: &[u8], now: Instant) {
        self.refused.of(reason).fetch_add(1, Ordering::Relaxed);
        let silent = self
            .told
            .is_some_and(|told| now.saturating_duration_since(told) < TELL_EVERY);
        if silent {
            return;
        }
        self.told = Some(now);
        let claims = claimed(reason, frame).map(|address| format!(" (it claims {address})"));
        let mut text = format!(
            "a frame of the guest does not leave: it {}{}. Refused so far:",
            reason.text(),
            claims.unwrap_or_default()
        );
        for (label, count) in self.refused.counts().filter(|(_, count)| *count > 0) {
            // Writing to a string can't fail.
            let _ = write!(text, " {label} {count}");
        }
        (self.tell)(text);
    }
}

#[cfg(test)]
#[path = "claims_tests.rs"]
mod tests;
