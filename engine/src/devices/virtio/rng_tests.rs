use super::*;
use crate::devices::virtio::rig::{BUFFERS, RNG_SLOT, Rig, Vq};
use crate::devices::virtio::{F_EVENT_IDX, F_VERSION_1};
use vm_memory::{Bytes, GuestAddress};

/// RFC 8439, section 2.3.2.
#[test]
fn the_block_function_agrees_with_the_rfc() {
    let mut key = [0; 32];
    key.iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8);
    let block = chacha20_block(&key, 1, [0x0900_0000, 0x4a00_0000, 0]);
    let expected = [
        0x10, 0xf1, 0xe7, 0xe4, 0xd1, 0x3b, 0x59, 0x15, 0x50, 0x0f, 0xdd, 0x1f, 0xa3, 0x20, 0x71, 0xc4, 0xc7, 0xd1,
        0xf4, 0xc7, 0x33, 0xc0, 0x68, 0x03, 0x04, 0x22, 0xaa, 0x9a, 0xc3, 0xd4, 0x6c, 0x4e, 0xd2, 0x82, 0x64, 0x46,
        0x07, 0x9f, 0xaa, 0x09, 0x14, 0xc2, 0xd7, 0x05, 0xd9, 0x8b, 0x02, 0xa2, 0xb5, 0x12, 0x9c, 0xd1, 0xde, 0x16,
        0x4e, 0xb9, 0xcb, 0xd0, 0x83, 0xe8, 0xa2, 0x50, 0x3c, 0x4e,
    ];
    assert_eq!(block, expected);
}

#[test]
fn the_stream_never_repeats_a_block_and_crosses_32_bits() {
    let mut stream = Stream {
        key: [1; 32],
        block: u64::from(u32::MAX),
    };
    let mut bytes = [0; 192];
    stream.fill(&mut bytes);
    assert_ne!(bytes[..64], bytes[64..128]);
    let mut first = [0; 64];
    Stream::new([1; 32]).fill(&mut first);
    assert_ne!(bytes[64..128], first, "the counter's upper half counts");
}

fn ask(rig: &Rig, vq: &mut Vq, len: u32) -> Vec<u8> {
    vq.add(&[(BUFFERS, len, true)]);
    rig.driver(RNG_SLOT).notify(0);
    let (_, written) = vq.wait_used();
    let mut bytes = vec![0; written as usize];
    rig.mem().read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
    bytes
}

#[test]
fn the_successor_goes_on_in_the_stream() {
    let rig = Rig::new();
    let driver = rig.driver(RNG_SLOT);
    let mut vq = driver.start(F_VERSION_1 | F_EVENT_IDX, 8).remove(0);
    rig.open();
    let first = ask(&rig, &mut vq, 64);
    assert_eq!(ask(&rig, &mut vq, 1 << 20).len(), REQUEST_BYTES, "a request is bounded");
    let state = rig.save();
    let successor = rig.successor();
    let mut moved = vq.moved(&successor);
    successor.take_over(&state);
    rig.open();
    let (here, there) = (ask(&rig, &mut vq, 256), ask(&successor, &mut moved, 256));
    assert_eq!(here, there);
    assert_ne!(first[..], here[..64]);
}
