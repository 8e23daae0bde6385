use std::sync::Mutex;

use super::*;
use crate::devices::testing::Seeded;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const OWN: [u8; 4] = [192, 0, 2, 7];
const OTHER: [u8; 4] = [192, 0, 2, 8];
const NOBODY: [u8; 4] = [0; 4];
const BROADCAST: [u8; 4] = [255; 4];
const OWN_V6: &str = "2001:db8::7";
const OTHER_V6: &str = "2001:db8::8";
const LINK_LOCAL: &str = "fe80::ff:fe00:1";

fn claims() -> Claims {
    Claims::new(MAC, &[OWN.into(), OWN_V6.parse().unwrap()])
}

fn judge(frame: &[u8]) -> Result<(), Reason> {
    claims().judge(frame)
}

/// A frame of the guest; `kind`: its EtherType, behind tags if there are any.
fn frame(kind: &[u8], packet: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &MAC, kind, packet].concat()
}

fn arp(operation: u8, mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    [&head[..], &mac, &sender, &[0; 6], &target].concat()
}

/// An IPv4 packet; `fragment`: flags and offset.
fn ipv4(source: [u8; 4], target: [u8; 4], protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((IPV4_HEADER_BYTES as u16 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    [&packet[..], &source, &target, payload].concat()
}

fn udp(from: u16, to: u16) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 12, 0, 0], &[7; 4]].concat()
}

fn ipv6(source: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let source: Ipv6Addr = source.parse().unwrap();
    let target: Ipv6Addr = "ff02::1".parse().unwrap();
    let length = (payload.len() as u16).to_be_bytes();
    let head = [0x60, 0, 0, 0, length[0], length[1], next, 255];
    [&head[..], &source.octets(), &target.octets(), payload].concat()
}

/// A message of neighbour discovery about `target`, with an option that names a link-layer address.
fn neighbour(kind: u8, target: &str, option: Option<(u8, [u8; 6])>) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    let mut message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat();
    if let Some((kind, mac)) = option {
        message.extend([kind, 1]);
        message.extend(mac);
    }
    message
}

fn judge_arp(packet: &[u8]) -> Result<(), Reason> {
    judge(&frame(&[8, 6], packet))
}

fn judge_v4(packet: &[u8]) -> Result<(), Reason> {
    judge(&frame(&[8, 0], packet))
}

fn judge_v6(packet: &[u8]) -> Result<(), Reason> {
    judge(&frame(&[0x86, 0xdd], packet))
}

#[test]
fn without_addresses_the_mac_address_alone_counts() {
    let unknown = Claims::new(MAC, &[]);
    let from_other = frame(&[8, 0], &ipv4(OTHER, OWN, UDP, 0, &udp(1, 2)));
    assert_eq!(unknown.judge(&from_other), Ok(()));
    assert_eq!(
        claims().judge(&from_other),
        Err(Reason::Ip),
        "the same where they are known"
    );
    for known in [&unknown, &claims()] {
        let mut frame = frame(&[8, 0], &ipv4(OWN, OTHER, UDP, 0, &udp(1, 2)));
        assert_eq!(known.judge(&frame), Ok(()));
        frame[6..12].copy_from_slice(&OTHER_MAC);
        assert_eq!(known.judge(&frame), Err(Reason::Mac));
        assert_eq!(known.judge(&frame[..11]), Err(Reason::Malformed));
    }
}

#[test]
fn arp_speaks_of_the_guest_alone() {
    for operation in [1, 2] {
        assert_eq!(judge_arp(&arp(operation, MAC, OWN, OTHER)), Ok(()));
        assert_eq!(judge_arp(&arp(operation, MAC, OWN, OWN)), Ok(()), "an announcement");
        assert_eq!(judge_arp(&arp(operation, MAC, OTHER, OWN)), Err(Reason::Arp));
        assert_eq!(
            judge_arp(&arp(operation, OTHER_MAC, OWN, OTHER)),
            Err(Reason::Arp),
            "it would be looked for elsewhere"
        );
    }
    assert_eq!(judge_arp(&arp(1, MAC, NOBODY, OWN)), Ok(()), "a probe");
    assert_eq!(
        judge_arp(&arp(1, MAC, NOBODY, OTHER)),
        Err(Reason::Arp),
        "a probe for another's keeps that one from taking it"
    );
    assert_eq!(judge_arp(&arp(2, MAC, NOBODY, OWN)), Err(Reason::Arp), "no probe");
    let mut of_another_network = arp(1, MAC, OWN, OTHER);
    of_another_network[1] = 6;
    assert_eq!(judge_arp(&of_another_network), Err(Reason::Protocol));
    assert_eq!(judge_arp(&arp(1, MAC, OWN, OTHER)[..27]), Err(Reason::Malformed));
}

#[test]
fn ipv4_has_the_guests_source() {
    assert_eq!(judge_v4(&ipv4(OWN, OTHER, 6, 0, &[0; 20])), Ok(()));
    assert_eq!(judge_v4(&ipv4(OTHER, OWN, 6, 0, &[0; 20])), Err(Reason::Ip));
    assert_eq!(judge_v4(&ipv4(BROADCAST, OWN, 6, 0, &[0; 20])), Err(Reason::Ip));
    // In every fragment.
    assert_eq!(judge_v4(&ipv4(OWN, OTHER, UDP, 0x2000, &udp(9, 9))), Ok(()));
    assert_eq!(judge_v4(&ipv4(OWN, OTHER, UDP, 3, &[])), Ok(()));
    assert_eq!(judge_v4(&ipv4(OTHER, OWN, UDP, 3, &[0; 8])), Err(Reason::Ip));
}

#[test]
fn a_guest_without_an_address_asks_for_one_and_nothing_else() {
    let discover = ipv4(NOBODY, BROADCAST, UDP, 0, &udp(68, 67));
    assert_eq!(judge_v4(&discover), Ok(()));
    for refused in [
        ipv4(NOBODY, OTHER, UDP, 0, &udp(68, 67)),
        ipv4(NOBODY, BROADCAST, UDP, 0, &udp(68, 68)),
        ipv4(NOBODY, BROADCAST, UDP, 0, &udp(9, 67)),
        ipv4(NOBODY, BROADCAST, UDP, 0x2000, &udp(68, 67)),
        ipv4(NOBODY, BROADCAST, UDP, 1, &udp(68, 67)),
        ipv4(NOBODY, BROADCAST, 6, 0, &[0; 20]),
        ipv4(NOBODY, [224, 0, 0, 1], IGMP, 0, &[IGMP_QUERY, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        assert_eq!(judge_v4(&refused), Err(Reason::Ip), "{refused:02x?}");
    }
    assert_eq!(judge_v4(&ipv4(NOBODY, [224, 0, 0, 22], IGMP, 0, &[0x22; 16])), Ok(()));
}

#[test]
fn a_guest_is_no_dhcp_server() {
    for (from, to) in [(67, 68), (67, 67), (9, 68)] {
        assert_eq!(
            judge_v4(&ipv4(OWN, OTHER, UDP, 0, &udp(from, to))),
            Err(Reason::DhcpServer)
        );
        let first_part = ipv4(OWN, OTHER, UDP, 0x2000, &udp(from, to));
        assert_eq!(judge_v4(&first_part), Err(Reason::DhcpServer));
    }
    assert_eq!(judge_v4(&ipv4(OWN, OTHER, UDP, 0, &udp(68, 67))), Ok(()), "a client");
    assert_eq!(judge_v4(&ipv4(OWN, OTHER, UDP, 0, &[0; 3])), Err(Reason::Malformed));
    // IPv4 options move the ports.
    let mut options = ipv4(OWN, OTHER, UDP, 0, &[&[1; 4][..], &udp(67, 68)].concat());
    options[0] = 0x46;
    assert_eq!(judge_v4(&options), Err(Reason::DhcpServer));
    for (from, to) in [(547, 546), (9, 546), (547, 9)] {
        assert_eq!(judge_v6(&ipv6(OWN_V6, UDP, &udp(from, to))), Err(Reason::DhcpServer));
    }
    assert_eq!(judge_v6(&ipv6(LINK_LOCAL, UDP, &udp(546, 547))), Ok(()));
}

#[test]
fn a_guest_is_no_router() {
    for kind in ICMP_OF_ROUTERS {
        for fragment in [0, 0x2000] {
            let message = ipv4(OWN, OTHER, ICMP, fragment, &[kind, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(judge_v4(&message), Err(Reason::Router), "{kind}");
        }
    }
    for other in [0, 3, 8, 10, 11] {
        let message = ipv4(OWN, OTHER, ICMP, 0, &[other, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(judge_v4(&message), Ok(()), "{other}");
    }
    assert_eq!(
        judge_v4(&ipv4(OWN, OTHER, ICMP, 3, &[5; 8])),
        Ok(()),
        "more of an echo request"
    );
    assert_eq!(judge_v4(&ipv4(OWN, OTHER, ICMP, 0, &[])), Err(Reason::Malformed));
}

#[test]
fn ipv6_has_the_guests_source() {
    for own in [OWN_V6, LINK_LOCAL] {
        assert_eq!(judge_v6(&ipv6(own, 6, &[0; 20])), Ok(()));
    }
    for other in [OTHER_V6, "fe80::1", "::ffff:192.0.2.7", "ff02::1", "::"] {
        assert_eq!(judge_v6(&ipv6(other, 6, &[0; 20])), Err(Reason::Ip), "{other}");
    }
    let listed = Claims::new(MAC, &["fe80::1".parse().unwrap()]);
    assert_eq!(listed.judge(&frame(&[0x86, 0xdd], &ipv6("fe80::1", 6, &[]))), Ok(()));
}

#[test]
fn neighbour_discovery_speaks_of_the_guest_alone() {
    let source = |mac| Some((1, mac));
    let target = |mac| Some((2, mac));
    let judge = |from: &str, message: &[u8]| judge_v6(&ipv6(from, ICMPV6, message));
    let (asks, says) = (NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT);
    // Whoever asks may ask for everybody.
    assert_eq!(judge(OWN_V6, &neighbour(asks, OTHER_V6, source(MAC))), Ok(()));
    assert_eq!(
        judge(OWN_V6, &neighbour(asks, OTHER_V6, source(OTHER_MAC))),
        Err(Reason::Neighbour)
    );
    for own in [OWN_V6, LINK_LOCAL] {
        assert_eq!(judge(own, &neighbour(says, own, target(MAC))), Ok(()));
        assert_eq!(judge("::", &neighbour(asks, own, None)), Ok(()), "is it free?");
    }
    assert_eq!(
        judge(OWN_V6, &neighbour(says, OWN_V6, target(OTHER_MAC))),
        Err(Reason::Neighbour)
    );
    for other in [OTHER_V6, "fe80::1"] {
        assert_eq!(
            judge(OWN_V6, &neighbour(says, other, target(MAC))),
            Err(Reason::Neighbour)
        );
        assert_eq!(judge(OWN_V6, &neighbour(says, other, None)), Err(Reason::Neighbour));
        assert_eq!(judge("::", &neighbour(asks, other, None)), Err(Reason::Neighbour));
    }
    assert_eq!(judge("::", &neighbour(says, OWN_V6, None)), Err(Reason::Ip));
    assert_eq!(judge("::", &[ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0]), Ok(()));
    assert_eq!(judge("::", &[143, 0, 0, 0, 0, 0, 0, 0]), Ok(()), "joins a group");
    assert_eq!(
        judge("::", &[128, 0, 0, 0, 0, 0, 0, 0]),
        Err(Reason::Ip),
        "an echo request"
    );
    for of_a_router in [ROUTER_ADVERTISEMENT, REDIRECT] {
        assert_eq!(judge(LINK_LOCAL, &[of_a_router; 40]), Err(Reason::Router));
    }
    assert_eq!(judge(OWN_V6, &[128, 0, 0, 0]), Ok(()), "an echo request");
}

#[test]
fn options_of_neighbour_discovery_are_read_to_their_end() {
    let says = |options: &[u8]| {
        let message = [&neighbour(NEIGHBOUR_ADVERTISEMENT, OWN_V6, None)[..], options].concat();
        judge_v6(&ipv6(OWN_V6, ICMPV6, &message))
    };
    let own = [&[2, 1][..], &MAC].concat();
    let other = [&[2, 1][..], &OTHER_MAC].concat();
    assert_eq!(says(&[14, 1, 0, 0, 0, 0, 0, 0]), Ok(()), "a nonce");
    assert_eq!(says(&[&own[..], &own].concat()), Ok(()));
    assert_eq!(says(&[&own[..], &other].concat()), Err(Reason::Neighbour));
    assert_eq!(
        says(&[&[14, 1, 0, 0, 0, 0, 0, 0][..], &other].concat()),
        Err(Reason::Neighbour)
    );
    assert_eq!(
        says(&[&[2, 2][..], &MAC, &[0; 8]].concat()),
        Err(Reason::Neighbour),
        "another length"
    );
    for lies in [&[2, 0][..], &[2], &[2, 1, 2], &[14, 9, 0, 0, 0, 0, 0, 0]] {
        assert_eq!(says(lies), Err(Reason::Malformed), "{lies:?}");
    }
    let short = neighbour(NEIGHBOUR_ADVERTISEMENT, OWN_V6, None);
    assert_eq!(judge_v6(&ipv6(OWN_V6, ICMPV6, &short[..20])), Err(Reason::Malformed));
}

#[test]
fn vlan_tags_hide_nothing() {
    let (fits, lies) = (arp(2, MAC, OWN, OTHER), arp(2, MAC, OTHER, OWN));
    for tags in [
        &[0x81, 0, 0, 5][..],
        &[0x81, 0, 0, 0],
        &[0x88, 0xa8, 0, 5],
        &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6],
        &[0x91, 0, 0, 5, 0x81, 0, 0, 6],
    ] {
        let kind: Vec<u8> = [tags, &[8, 6]].concat();
        assert_eq!(judge(&frame(&kind, &fits)), Ok(()), "{tags:02x?}");
        assert_eq!(judge(&frame(&kind, &lies)), Err(Reason::Arp), "{tags:02x?}");
    }
    let tag: [u8; 4] = [0x81, 0, 0, 5];
    let three = [&tag.repeat(3)[..], &[8, 6]].concat();
    assert_eq!(judge(&frame(&three, &fits)), Err(Reason::Malformed));
    assert_eq!(judge(&frame(&[0x81, 0, 0], &[])), Err(Reason::Malformed));
    // 802.3 with a length (SNAP can carry IP), reverse ARP, PPPoE, MPLS.
    for other in [[0, 60], [0x80, 0x35], [0x88, 0x64], [0x88, 0x47]] {
        assert_eq!(judge(&frame(&other, &fits)), Err(Reason::Protocol), "{other:02x?}");
    }
}

#[test]
fn extension_headers_and_fragments_hide_nothing() {
    let lies = neighbour(NEIGHBOUR_ADVERTISEMENT, OTHER_V6, None);
    let fits = neighbour(NEIGHBOUR_ADVERTISEMENT, OWN_V6, None);
    let behind = |header: u8, of: &[u8], message: &[u8]| judge_v6(&ipv6(OWN_V6, header, &[of, message].concat()));
    for extension in EXTENSIONS {
        for of in [
            [&[ICMPV6, 0][..], &[0; 6]].concat(),
            [&[ICMPV6, 1][..], &[0; 14]].concat(),
        ] {
            assert_eq!(behind(extension, &of, &fits), Ok(()));
            assert_eq!(behind(extension, &of, &lies), Err(Reason::Neighbour), "{extension}");
        }
        assert_eq!(
            behind(extension, &[ICMPV6, 200], &lies),
            Err(Reason::Malformed),
            "{extension}"
        );
    }
    let authentication = [&[ICMPV6, 1][..], &[0; 10]].concat();
    assert_eq!(behind(AUTHENTICATION, &authentication, &lies), Err(Reason::Neighbour));
    let endless: Vec<u8> = [60, 0, 0, 0, 0, 0, 0, 0].repeat(IPV6_HEADERS_MAX + 1);
    assert_eq!(behind(60, &endless, &fits), Err(Reason::Malformed));
    // Fragments: the whole, the first, a later one.
    let fragment = |next: u8, offset: u8| [next, 0, 0, offset, 0, 0, 0, 1];
    for first in [0, 1] {
        for message in [&lies, &fits] {
            assert_eq!(
                behind(FRAGMENT, &fragment(ICMPV6, first), message),
                Err(Reason::Malformed)
            );
        }
        let advertisement = [ROUTER_ADVERTISEMENT; 16];
        assert_eq!(
            behind(FRAGMENT, &fragment(ICMPV6, first), &advertisement),
            Err(Reason::Router)
        );
        assert_eq!(
            behind(FRAGMENT, &fragment(ICMPV6, first), &[128; 16]),
            Ok(()),
            "an echo request"
        );
        assert_eq!(
            behind(FRAGMENT, &fragment(UDP, first), &udp(547, 546)),
            Err(Reason::DhcpServer)
        );
        // The next fragment could write over what follows such a header.
        let options = [&[ICMPV6, 0][..], &[0; 6]].concat();
        let message = [&options[..], &[128; 16]].concat();
        assert_eq!(behind(FRAGMENT, &fragment(60, first), &message), Err(Reason::Malformed));
        let again = [&fragment(ICMPV6, 0)[..], &lies].concat();
        assert_eq!(
            behind(FRAGMENT, &fragment(FRAGMENT, first), &again),
            Err(Reason::Malformed)
        );
    }
    assert_eq!(
        behind(FRAGMENT, &fragment(ICMPV6, 8), &[0; 8]),
        Ok(()),
        "more of an echo request"
    );
    let from_other = ipv6(OTHER_V6, FRAGMENT, &[&fragment(ICMPV6, 8)[..], &[0; 8]].concat());
    assert_eq!(judge_v6(&from_other), Err(Reason::Ip));
}

/// Mobile IPv6: the address in the option, not that of the header, is taken for the source.
#[test]
fn no_home_address_stands_in_for_the_source() {
    let home: Ipv6Addr = OTHER_V6.parse().unwrap();
    let home = [&[HOME_ADDRESS, 16][..], &home.octets()].concat();
    let with = |options: &[u8]| {
        let header = [&[6, 2][..], options, &vec![PAD1; 22 - options.len()]].concat();
        judge_v6(&ipv6(OWN_V6, DESTINATION_OPTIONS, &[&header[..], &[0; 20]].concat()))
    };
    assert_eq!(with(&[]), Ok(()));
    assert_eq!(with(&[1, 2, 0, 0, 5, 2, 0, 0]), Ok(()), "padding and others");
    for before in [&[0; 0][..], &[PAD1], &[1, 0], &[5, 2, 0, 0]] {
        assert_eq!(with(&[before, &home].concat()), Err(Reason::Malformed), "{before:?}");
    }
    assert_eq!(with(&[1, 21]), Err(Reason::Malformed), "longer than its header");
}

#[test]
fn whoever_is_told_learns_which_address_it_was() {
    let packets = [
        (frame(&[8, 6], &arp(2, MAC, OTHER, OWN)), "192.0.2.8"),
        (frame(&[8, 6], &arp(1, MAC, NOBODY, OTHER)), "192.0.2.8"),
        (frame(&[0x81, 0, 0, 5, 8, 0], &ipv4(OTHER, OWN, 6, 0, &[])), "192.0.2.8"),
        (frame(&[0x86, 0xdd], &ipv6("fe80::1", 6, &[])), "fe80::1"),
        (
            frame(&[0x86, 0xdd], &ipv6(OWN_V6, ICMPV6, &neighbour(136, OTHER_V6, None))),
            OTHER_V6,
        ),
    ];
    for (frame, address) in packets {
        let reason = judge(&frame).unwrap_err();
        assert_eq!(claimed(reason, &frame), address.parse::<IpAddr>().ok(), "{reason:?}");
        for cut in 0..frame.len() {
            claimed(reason, &frame[..cut]);
        }
    }
    assert_eq!(claimed(Reason::Malformed, &frame(&[8, 0], &[])), None);
}

#[test]
fn lengths_that_lie_are_refused() {
    let packet = ipv4(OWN, OTHER, UDP, 0, &udp(9, 9));
    for cut in 0..packet.len() {
        assert_eq!(judge_v4(&packet[..cut]), Err(Reason::Malformed), "{cut}");
    }
    let mut padded = packet.clone();
    padded.resize(60, 0);
    assert_eq!(judge_v4(&padded), Ok(()));
    for (at, value) in [(0, 0x44), (0, 0x4f), (0, 0x65), (3, 19), (3, 0)] {
        let mut lies = packet.clone();
        lies[at] = value;
        assert_eq!(judge_v4(&lies), Err(Reason::Malformed), "{at} {value}");
    }
    let packet = ipv6(OWN_V6, UDP, &udp(9, 9));
    for cut in 0..packet.len() {
        assert_eq!(judge_v6(&packet[..cut]), Err(Reason::Malformed), "{cut}");
    }
    // Some read on to the frame's end if there are options behind a length of zero.
    let mut jumbo = ipv6(OWN_V6, 0, &[&[ICMPV6, 0][..], &[0; 6]].concat());
    jumbo[5] = 0;
    assert_eq!(judge_v6(&jumbo), Err(Reason::Malformed));
}

/// Whatever a guest writes into its queue: no panic, and nothing leaves that claims plainly to be another.
#[test]
fn random_frames_do_no_harm() {
    let mut seeded = Seeded::new(7);
    let samples = [
        frame(&[8, 6], &arp(2, MAC, OWN, OTHER)),
        frame(&[0x81, 0, 0, 5, 8, 6], &arp(1, MAC, NOBODY, OWN)),
        frame(&[8, 0], &ipv4(OWN, OTHER, UDP, 0, &udp(9, 9))),
        frame(
            &[0x86, 0xdd],
            &ipv6(OWN_V6, ICMPV6, &neighbour(136, OWN_V6, Some((2, MAC)))),
        ),
        frame(
            &[0x86, 0xdd],
            &ipv6(OWN_V6, 0, &[&[UDP, 0][..], &[0; 6], &udp(9, 9)].concat()),
        ),
    ];
    let claims = claims();
    let mut admitted = 0;
    for round in 0..200_000_u64 {
        let mut frame = samples[seeded.below(samples.len() as u64) as usize].clone();
        if round.is_multiple_of(4) {
            frame[14..].fill_with(|| seeded.next() as u8);
        }
        for _ in 0..seeded.below(4) {
            let at = seeded.below(frame.len() as u64) as usize;
            frame[at] = seeded.next() as u8;
        }
        frame.truncate(seeded.below(2 * frame.len() as u64) as usize + 1);
        if claims.judge(&frame).is_err() {
            continue;
        }
        admitted += 1;
        assert_eq!(frame[6..12], MAC);
        match frame[12..14] {
            [8, 6] => {
                assert_eq!(frame[22..28], MAC);
                assert!(frame[28..32] == OWN || frame[28..32] == NOBODY && frame[38..42] == OWN);
            }
            [8, 0] => assert!(frame[26..30] == OWN || frame[26..30] == NOBODY),
            [0x86, 0xdd] => {
                let source = v6(&frame, 22).unwrap();
                assert!(claims.has_v6(source) || source.is_unspecified());
            }
            _ => assert!(VLAN_TAGS.contains(&be16(&frame, 12).unwrap()), "{frame:02x?}"),
        }
    }
    assert!(admitted > 10_000, "only {admitted}: nothing was tried");
}

#[test]
fn refusals_are_counted_and_told_now_and_then() {
    for (index, reason) in Reason::ALL.into_iter().enumerate() {
        assert_eq!(reason as usize, index);
    }
    let (refused, told) = (Arc::new(Refused::default()), Arc::new(Mutex::new(Vec::new())));
    let into = told.clone();
    let mut guard = Guard::new(claims(), refused.clone(), move |text| into.lock().unwrap().push(text));
    assert!(guard.admits(&frame(&[8, 6], &arp(2, MAC, OWN, OTHER))));
    for _ in 0..1000 {
        assert!(!guard.admits(&frame(&[8, 6], &arp(2, MAC, OTHER, OWN))));
    }
    let counts: Vec<_> = refused.counts().filter(|(_, count)| *count > 0).collect();
    assert_eq!(counts, [("arp", 1000)]);
    assert_eq!(refused.counts().count(), Reason::ALL.len());
    let first = told.lock().unwrap().clone();
    assert_eq!(first.len(), 1, "{first:?}");
    assert!(
        first[0].contains("claims in ARP") && first[0].ends_with("(it claims 192.0.2.8). Refused so far: arp 1"),
        "{first:?}"
    );
    guard.refuse(Reason::Mac, &frame(&[8, 0], &[]), Instant::now() + TELL_EVERY);
    let second = told.lock().unwrap().clone();
    assert_eq!(second.len(), 2);
    assert!(second[1].ends_with("mac 1 arp 1000"), "{second:?}");
}
