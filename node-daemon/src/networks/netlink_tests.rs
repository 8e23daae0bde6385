use super::*;

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn attribute_of(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len()).unwrap();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    padded(bytes)
}

/// An interface, as the kernel tells it.
fn link_body(index: u32, flags: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut body = vec![0; LINK_HEADER_BYTES];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body.extend(attributes.concat());
    body
}

/// An address, as the kernel tells it.
fn address_body(index: u32, flags: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut body = vec![0; ADDRESS_HEADER_BYTES];
    body[2] = flags;
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body.extend(attributes.concat());
    body
}

fn eth1() -> Vec<u8> {
    let works = IFF_UP | IFF_RUNNING | IFF_LOWER_UP;
    // What this release does not know stands before and after.
    let attributes = [
        attribute_of(99, b"new"),
        attribute_of(IFLA_IFNAME, b"eth1\0"),
        attribute_of(0x8000 | 26, &[1, 2, 3]),
    ];
    link_body(2, works, &attributes)
}

/// An answer of these messages, in one datagram.
fn answer(sequence: u32, messages: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let bytes = messages
        .iter()
        .map(|(kind, body)| padded(message(*kind, 0x2, sequence, body)));
    bytes.collect::<Vec<_>>().concat()
}

fn done() -> (u16, Vec<u8>) {
    (NLMSG_DONE, vec![0; 4])
}

#[test]
fn an_interface_is_what_its_flags_say() {
    let read = |flags| link(&link_body(7, flags, &[attribute_of(IFLA_IFNAME, b"a\0")])).unwrap();
    let told = |interface: Interface| (interface.loopback, interface.set_up, interface.carrier);
    let works = IFF_RUNNING | IFF_LOWER_UP;
    assert_eq!(told(read(IFF_UP | works)), (false, true, true));
    assert_eq!(told(read(IFF_UP | IFF_LOOPBACK | works)), (true, true, true));
    // A cable is not enough where the interface itself says that it does not go on (a bond without a member, 802.1X).
    for missing in [IFF_RUNNING, IFF_LOWER_UP] {
        assert_eq!(told(read((IFF_UP | works) & !missing)), (false, true, false));
    }
    assert_eq!(told(read(0)), (false, false, false));
    let eth1 = link(&eth1()).unwrap();
    assert_eq!((eth1.index, eth1.name.as_str(), eth1.carrier), (2, "eth1", true));
    for (name, shown) in [
        (&b"eth1"[..], "eth1"),
        (&b"a\x1b[2J\0"[..], "a\u{fffd}[2J"),
        (&b"\xff\0"[..], "\u{fffd}"),
    ] {
        let body = link_body(2, 0, &[attribute_of(IFLA_IFNAME, name)]);
        assert_eq!(link(&body).unwrap().name, shown);
    }
    let nameless = link(&link_body(2, 0, &[])).unwrap_err();
    assert!(nameless.to_string().contains("has no name"), "{nameless}");
}

#[test]
fn an_address_is_the_nodes_own() {
    let four = [10, 1, 0, 7];
    let read = |flags, attributes: &[Vec<u8>]| address(&address_body(2, flags, attributes)).unwrap();
    let is = |ip: &str, usable| {
        let ip = ip.parse().unwrap();
        let main = true;
        Some((2, Address { ip, usable, main }))
    };
    // Of both ends of a tunnel this one.
    let ends = [
        attribute_of(IFA_ADDRESS, &[10, 1, 0, 8]),
        attribute_of(IFA_LOCAL, &four),
    ];
    assert_eq!(read(0x80, &ends), is("10.1.0.7", true));
    let mut six = [0; 16];
    (six[0], six[15]) = (0xfd, 7);
    assert_eq!(read(0x80, &[attribute_of(IFA_ADDRESS, &six)]), is("fd00::7", true));
    // Checked for being a duplicate, and found to be one.
    for flags in [0x40, 0x08, 0xc8] {
        assert_eq!(read(flags, &[attribute_of(IFA_ADDRESS, &six)]), is("fd00::7", false));
    }
    // The longer field of flags says more.
    let flags = attribute_of(IFA_FLAGS, &0x140_u32.to_ne_bytes());
    assert_eq!(read(0, &[attribute_of(IFA_ADDRESS, &six), flags]), is("fd00::7", false));
    // One that was added to another one, and single ones.
    let main = |prefix_bits, flags, ip: &[u8]| {
        let mut body = address_body(2, flags, &[attribute_of(IFA_ADDRESS, ip)]);
        body[1] = prefix_bits;
        address(&body).unwrap().unwrap().1.main
    };
    assert!(main(24, 0x80, &four) && main(64, 0x80, &six) && main(32, 0x80, &six));
    assert!(!main(24, 0x81, &four) && !main(64, 0x01, &six));
    assert!(!main(32, 0x80, &four) && !main(128, 0x80, &six));
    // Of a family without such addresses.
    assert_eq!(read(0, &[attribute_of(IFA_ADDRESS, &[1, 2])]), None);
    assert_eq!(read(0, &[]), None);
}

#[test]
fn an_answer_ends_where_the_kernel_says_so() {
    let mut whole = Answer::new(5);
    // Another's answer in between is not taken.
    whole.take(&answer(4, &[(RTM_NEWLINK, eth1()), done()])).unwrap();
    whole.take(&answer(5, &[(RTM_NEWLINK, eth1()), (77, vec![])])).unwrap();
    assert!(!whole.done && !whole.interrupted);
    whole
        .take(&answer(5, &[(RTM_NEWLINK, eth1()), done(), (RTM_NEWLINK, eth1())]))
        .unwrap();
    assert!(whole.done);
    let kinds: Vec<u16> = whole.messages.iter().map(|message| message.kind).collect();
    assert_eq!(kinds, [RTM_NEWLINK, 77, RTM_NEWLINK]);
    assert_eq!(link(&whole.messages[0].body).unwrap().name, "eth1");

    let mut interrupted = Answer::new(1);
    interrupted
        .take(&message(NLMSG_DONE, 0x2 | NLM_F_DUMP_INTR, 1, &[0; 4]))
        .unwrap();
    assert!(interrupted.done && interrupted.interrupted);
    for kind in [NLMSG_ERROR, NLMSG_DONE] {
        let refused = Answer::new(1).take(&message(kind, 0, 1, &(-1_i32).to_ne_bytes()));
        let NetlinkError::System(error) = refused.unwrap_err() else {
            panic!("another error")
        };
        assert_eq!(error.raw_os_error(), Some(1));
    }
    let many = answer(1, &vec![(RTM_NEWLINK, vec![]); MESSAGES_MAX + 1]);
    let many = Answer::new(1).take(&many).unwrap_err();
    assert!(matches!(many, NetlinkError::TooMany), "{many}");
}

/// Whatever is cut off or changed is an error or another value, and nothing is read that is not there.
#[test]
fn strange_answers_are_told_and_bounded() {
    let whole = answer(1, &[(RTM_NEWLINK, eth1()), done()]);
    for length in 1..whole.len() {
        let mut cut = Answer::new(1);
        // Between two messages there is nothing that could be missing but the end.
        assert!(cut.take(&whole[..length]).is_err() || !cut.done, "{length}");
    }
    for length in [0_u32, 1, 15, 0x7fff_ffff, u32::MAX] {
        let mut lies = whole.clone();
        lies[..4].copy_from_slice(&length.to_ne_bytes());
        assert!(Answer::new(1).take(&lies).is_err(), "{length}");
    }
    for length in [0_u16, 3, 9, u16::MAX] {
        let mut lies = attribute_of(IFLA_IFNAME, b"eth1");
        lies[..2].copy_from_slice(&length.to_ne_bytes());
        assert!(link(&link_body(2, 0, std::slice::from_ref(&lies))).is_err(), "{length}");
        assert!(address(&address_body(2, 0, &[lies])).is_err(), "{length}");
    }
    let address_of = address_body(2, 0, &[attribute_of(IFA_ADDRESS, &[10, 1, 0, 7])]);
    assert!(link(&eth1()[..LINK_HEADER_BYTES - 1]).is_err());
    assert!(address(&address_of[..ADDRESS_HEADER_BYTES - 1]).is_err());
    // Each byte with other values: it comes back, with whatever.
    for body in [eth1(), address_of] {
        for place in 0..body.len() {
            for value in [0, 1, 7, 0x7f, 0x80, 0xff] {
                let mut changed = body.clone();
                changed[place] = value;
                let _ = (link(&changed), address(&changed));
            }
        }
    }
}

#[test]
fn the_kernel_tells_of_the_way_back_to_the_node() {
    let found = interfaces().unwrap();
    let lo = found.iter().find(|interface| interface.name == "lo").unwrap();
    assert!(lo.loopback);
    assert_eq!(lo.index, 1);
}
