//! MAC addresses of guests.

use ftvm_protocol::identity::VmId;

/// Address of a VM's network card, counted from 0, that names none: locally administered, unicast, from the VM's UID, so
/// that both seats and every later one have the same.
pub fn of(vm: VmId, card: u8) -> String {
    // The upper and lower half of a random UUID have 60 and 62 random bits.
    let folded = (vm.0 >> 64) as u64 ^ (vm.0 as u64).rotate_left(17);
    let [.., a, b, c, d, e, f] = folded.to_be_bytes();
    let first = (a & 0xfc) | 0x02;
    format!(
        "{first:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{:02x}",
        f.wrapping_add(card)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_local_unicast_and_differ() {
        let vm: VmId = "0123abcd-4567-4000-8000-0000000000ff".parse().unwrap();
        let other: VmId = "0123abcd-4567-4000-8000-0000000000fe".parse().unwrap();
        let first = u8::from_str_radix(&of(vm, 0)[..2], 16).unwrap();
        assert_eq!(first & 0b11, 0b10);
        assert_eq!(of(vm, 0), of(vm, 0));
        assert_ne!(of(vm, 0), of(vm, 1));
        assert_ne!(of(vm, 0), of(other, 0));
    }
}
