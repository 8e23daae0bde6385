//! MAC addresses, as people write them and as network cards have them.

/// Six pairs of hexadecimal digits with colons between them, such as `02:00:00:00:00:01`, and nothing else.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    // A sign is no digit, though `from_str_radix` takes one.
    let is_pair = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let pair = parts.next().filter(is_pair)?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// Can it be one network card's? A multicast address (IEEE 802: the first bit on the wire is set) and all zeros can't.
pub fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_pairs_of_digits_are_an_address() {
        for (text, mac) in [
            ("02:f7:00:00:00:0a", [0x02, 0xf7, 0, 0, 0, 0x0a]),
            ("02:F7:00:00:00:0A", [0x02, 0xf7, 0, 0, 0, 0x0a]),
            ("00:00:00:00:00:00", [0; 6]),
            ("01:00:00:00:00:00", [1, 0, 0, 0, 0, 0]),
            ("ff:ff:ff:ff:ff:ff", [0xff; 6]),
        ] {
            assert_eq!(parse_mac(text), Some(mac), "{text}");
        }
    }

    #[test]
    fn nothing_else_is_one() {
        for text in [
            "",
            ":::::",
            "02",
            "020000000001",
            "02-00-00-00-00-01",
            "02:00:00:00:00",
            "02:00:00:00:00:",
            "02:00:00:00:00:01:",
            "02:00:00:00:00:01:00",
            " 02:00:00:00:00:01",
            "02:00:00:00:00:01\n",
            "02:00:00:00:00:é",
        ] {
            assert_eq!(parse_mac(text), None, "{text:?}");
        }
        for part in ["", "0", "000", "+a", "-0", "+0", "0g", "0x", " a", "a "] {
            for text in [format!("{part}:00:00:00:00:01"), format!("02:00:00:00:00:{part}")] {
                assert_eq!(parse_mac(&text), None, "{text:?}");
            }
        }
    }

    #[test]
    fn a_card_has_an_address_of_its_own() {
        for own in [
            [2, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 1],
            [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert!(is_unicast(own), "{own:02x?}");
        }
        for other in [[0; 6], [0xff; 6], [1, 0, 0, 0, 0, 1], [3, 0, 0, 0, 0, 1]] {
            assert!(!is_unicast(other), "{other:02x?}");
        }
    }
}
