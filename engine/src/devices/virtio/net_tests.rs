use super::*;
use crate::devices::testing::wait_until;
use crate::devices::virtio::rig::{BUFFERS, Driver, NET_SLOT, Rig, Vq};
use crate::devices::virtio::{F_EVENT_IDX, F_VERSION_1};
use std::io;
use vm_memory::{Bytes, GuestAddress};

const TX_BUFFER: u64 = BUFFERS + 0x10_0000;

struct Net2 {
    rig: Rig,
    driver: Driver,
    rx: Vq,
    tx: Vq,
}

fn net(features: u64) -> Net2 {
    let rig = Rig::new();
    let driver = rig.driver(NET_SLOT);
    let mut queues = driver.start(F_VERSION_1 | features, 16);
    let (tx, rx) = (queues.remove(1), queues.remove(0));
    rig.open();
    Net2 { rig, driver, rx, tx }
}

impl Net2 {
    /// Offers buffer `number` for a frame.
    fn offer(&mut self, number: u64, len: u32) {
        self.rx.add(&[(BUFFERS + 0x1000 * number, len, true)]);
        self.driver.notify(RX);
    }

    fn send(&mut self, frame: &[u8]) -> u16 {
        let packet = [&[0; HEADER_BYTES], frame].concat();
        self.rig.mem().write_slice(&packet, GuestAddress(TX_BUFFER)).unwrap();
        let head = self.tx.add(&[
            (TX_BUFFER, HEADER_BYTES as u32, false),
            (TX_BUFFER + 12, frame.len() as u32, false),
        ]);
        self.driver.notify(TX);
        head
    }

    fn frame(&self, number: u64, len: u32) -> Vec<u8> {
        let mut packet = vec![0; len as usize];
        self.rig
            .mem()
            .read_slice(&mut packet, GuestAddress(BUFFERS + 0x1000 * number))
            .unwrap();
        assert_eq!(
            packet[..HEADER_BYTES],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
            "one buffer, no offloads"
        );
        packet.split_off(HEADER_BYTES)
    }

    fn counts(&self) -> NetCounts {
        self.rig.set.counts().nics[0]
    }
}

#[test]
fn the_configuration_tells_address_link_and_mtu() {
    let net = net(0);
    assert_eq!(net.driver.read(0x2000, 8), 0x0001_0100_0000_0002);
    assert_eq!(net.driver.read(0x2008, 4), 1500 << 16 | 1);
    assert_eq!(
        net.driver.offered() & (F_MAC | F_MTU | F_STATUS),
        F_MAC | F_MTU | F_STATUS
    );
    assert_eq!(net.driver.offered() & 0xff87, 0, "no offloads");
}

#[test]
fn frames_go_both_ways() {
    let mut net = net(F_EVENT_IDX);
    let frame: Vec<u8> = (0..100).collect();
    let head = net.send(&frame);
    assert_eq!(net.tx.wait_used(), (head, 0));
    assert_eq!(*net.rig.wire.sent.lock().unwrap(), [frame]);

    net.offer(0, 2000);
    net.rig.wire.inject(Ok(vec![0xab; 60]));
    let (_, len) = net.rx.wait_used();
    assert_eq!(net.frame(0, len), [0xab; 60]);
    net.rig.bench.msi.wait_for(net.driver.vector_data(RX));
    let counts = wait_until("counters", || Some(net.counts()).filter(|counts| counts.rx_frames == 1));
    assert_eq!((counts.tx_frames, counts.tx_bytes, counts.rx_bytes), (1, 100, 60));
}

#[test]
fn frames_wait_in_the_backend_until_the_guest_has_buffers() {
    let mut net = net(F_EVENT_IDX);
    for number in 0..3 {
        net.rig.wire.inject(Ok(vec![number; 60]));
    }
    // The transmit queue is served in the same turns: when this comes back, reception was tried.
    net.send(&[0; 60]);
    net.tx.wait_used();
    net.rig.close();
    assert_eq!(net.rig.wire.waiting(), 3);
    net.rig.open();
    for number in 0..3 {
        net.offer(number, 2000);
        let (_, len) = net.rx.wait_used();
        assert_eq!(net.frame(number, len), [number as u8; 60]);
    }
}

#[test]
fn many_frames_keep_their_order() {
    for features in [0, F_EVENT_IDX] {
        let mut net = net(features);
        for number in 0..500u32 {
            net.send(&[&number.to_le_bytes()[..], &[0; 60]].concat());
            net.tx.wait_used();
            net.offer(u64::from(number % 16), 2000);
            net.rig.wire.inject(Ok([&number.to_le_bytes()[..], &[1; 60]].concat()));
            let (_, len) = net.rx.wait_used();
            assert_eq!(net.frame(u64::from(number % 16), len)[..4], number.to_le_bytes());
        }
        let sent = net.rig.wire.sent.lock().unwrap();
        assert!(
            sent.iter()
                .enumerate()
                .all(|(at, frame)| frame[..4] == (at as u32).to_le_bytes())
        );
        assert_eq!(sent.len(), 500);
    }
}

#[test]
fn what_is_no_frame_is_dropped_and_given_back() {
    let mut net = net(0);
    for len in [0, 13, 1500 + 19, 60_000] {
        let before = net.counts().tx_dropped;
        net.send(&vec![0; len]);
        net.tx.wait_used();
        wait_until("a drop", || (net.counts().tx_dropped > before).then_some(()));
    }
    // A header that asks for an offload that was not negotiated.
    net.rig.mem().write_slice(&[1; 100], GuestAddress(TX_BUFFER)).unwrap();
    net.tx.add(&[(TX_BUFFER, 100, false)]);
    // Nothing at all, and less than a header.
    net.tx.add(&[(TX_BUFFER, 0, false)]);
    net.tx.add(&[(TX_BUFFER, 5, false)]);
    net.driver.notify(TX);
    for _ in 0..3 {
        net.tx.wait_used();
    }
    assert!(net.rig.wire.sent.lock().unwrap().is_empty());

    net.offer(0, 20);
    net.rig.wire.inject(Ok(vec![1; 60]));
    assert_eq!(net.rx.wait_used().1, 0, "the buffer is too small");
    net.offer(1, 9000);
    net.rig.wire.inject(Ok(vec![1; 3000]));
    net.rig.wire.inject(Ok(vec![2; 60]));
    let (_, len) = net.rx.wait_used();
    assert_eq!(net.frame(1, len), [2; 60], "the frame before was longer than the MTU");
    assert_eq!(net.counts().rx_dropped, 2);
}

#[test]
fn a_failing_backend_is_reported_once_and_tried_again() {
    let mut net = net(0);
    net.offer(0, 2000);
    for _ in 0..3 {
        net.rig.wire.inject(Err(io::Error::from_raw_os_error(libc::EBADFD)));
    }
    net.rig.wire.inject(Ok(vec![5; 60]));
    let (_, len) = net.rx.wait_used();
    assert_eq!(net.frame(0, len), [5; 60]);
    assert!(matches!(
        &net.rig.bench.events.take()[..],
        [DeviceEvent::NetError { nic: 0, .. }]
    ));
}

#[test]
fn a_broken_driver_gets_needs_reset_and_a_configuration_interrupt() {
    let mut net = net(0);
    net.tx.publish(99);
    net.driver.notify(TX);
    net.rig.bench.msi.wait_for(net.driver.config_vector_data());
    assert_eq!(net.driver.status(), 15 | 0x40);
    assert_eq!(net.driver.read(0x1000, 1), 2);
    let events = net.rig.bench.events.take();
    assert!(
        matches!(&events[..], [DeviceEvent::NeedsReset { device, .. }] if device == "net0"),
        "{events:?}"
    );
    // The state of a broken device can be saved and loaded, and a reset mends it.
    let state = net.rig.save();
    let successor = net.rig.successor();
    successor.take_over(&state);
    let driver = successor.driver(NET_SLOT);
    assert_eq!(driver.status(), 15 | 0x40);
    driver.start(F_VERSION_1, 16);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_closed_gate_stops_frames_and_a_successor_delivers_them() {
    let mut net = net(F_EVENT_IDX);
    net.offer(0, 2000);
    net.send(&[1; 60]);
    net.tx.wait_used();
    net.rig.close();
    let head = net.send(&[2; 60]);
    net.rig.wire.inject(Ok(vec![3; 60]));
    let state = net.rig.save();
    assert_eq!((net.tx.take_used(), net.rx.take_used()), (None, None));
    assert_eq!(
        (net.rig.wire.waiting(), net.rig.wire.sent.lock().unwrap().len()),
        (1, 1)
    );

    // The notification was not part of the state: the kick stands in for it, also when the successor's thread has long
    // gone to sleep.
    let successor = net.rig.successor();
    let driver = successor.driver(NET_SLOT);
    let mut early = driver.start(F_VERSION_1, 16).remove(1);
    successor.open();
    early.add(&[(TX_BUFFER, 72, false)]);
    driver.notify(TX);
    early.wait_used();
    successor.close();
    successor.wire.sent.lock().unwrap().clear();
    super::super::rig::copy_ram(&net.rig.bench.platform.ram, &successor.bench.platform.ram);
    let (mut tx, mut rx) = (net.tx.moved(&successor), net.rx.moved(&successor));
    successor.wire.inject(Ok(vec![4; 60]));
    successor.take_over(&state);
    assert_eq!(tx.wait_used().0, head);
    assert_eq!(rx.wait_used().1, HEADER_BYTES as u32 + 60);
    assert_eq!(*successor.wire.sent.lock().unwrap(), [vec![2; 60]]);
}

#[test]
fn a_takeover_interrupts_every_queue_once() {
    let net = net(F_EVENT_IDX);
    let state = net.rig.save();
    let successor = net.rig.successor();
    successor.take_over(&state);
    successor.close();
    let data: Vec<u32> = successor.bench.msi.take().into_iter().map(|(_, data)| data).collect();
    assert_eq!(data, [net.driver.vector_data(RX), net.driver.vector_data(TX)]);
}

#[test]
fn another_address_or_a_larger_mtu_is_refused() {
    let net = net(0);
    let frontend = |mac: [u8; 6], mtu| Net::new(&NetConfig { mac, mtu });
    let state = frontend([2, 0, 0, 0, 0, 1], 1500).save();
    let queues = [*net.rig_queue(); 2];
    assert_eq!(frontend([2, 0, 0, 0, 0, 1], 1500).check(&state, &queues), Ok(()));
    assert!(frontend([2, 0, 0, 0, 0, 2], 1500).check(&state, &queues).is_err());
    let told = frontend([2, 0, 0, 0, 0, 1], 1400).check(&state, &queues).unwrap_err();
    for words in ["an MTU of 1500 bytes", "carries 1400:", "Raise the MTU"] {
        assert!(told.contains(words), "{told}");
    }
    for mtu in [0, MTU_MIN - 1] {
        let state = NetState { mac: state.mac, mtu };
        assert!(frontend([2, 0, 0, 0, 0, 1], 1500).check(&state, &queues).is_err());
    }
    let out = QueueState {
        next_avail: 1,
        ..queues[0]
    };
    assert!(
        frontend([2, 0, 0, 0, 0, 1], 1500)
            .check(&state, &[out, queues[0]])
            .is_err()
    );
}

/// A guest keeps its MTU on a host whose bridge carries more, and on all that follow: what it is told, what is taken from it, what it gets.
#[test]
fn a_takeover_keeps_the_guests_mtu() {
    let first = net(F_EVENT_IDX | F_MTU);
    let second = first.rig.successor_with_mtu(9000);
    second.take_over(&first.rig.save());
    assert_eq!((first.rig.set.mtus(), second.set.mtus()), (vec![1500], vec![1500]));
    let third = second.successor_with_mtu(1500);
    third.take_over(&second.save());
    assert_eq!(third.set.mtus(), [1500]);
    third.close();
    third.set.reset();
    assert_eq!(third.set.mtus(), [1500], "a guest that resets finds the same device");

    // On the second, whose tap carries more.
    let second = first.rig.successor_with_mtu(9000);
    second.take_over(&first.rig.save());
    let driver = second.driver(NET_SLOT);
    assert_eq!(driver.read(0x2008, 4), 1500 << 16 | 1);
    let (mut rx, mut tx) = (first.rx.moved(&second), first.tx.moved(&second));
    for (payload, passes) in [(1500, true), (1504, true), (1505, false), (3000, false), (9000, false)] {
        let frame = vec![7; LEAST_FRAME + payload];
        let packet = [&[0; HEADER_BYTES], &frame[..]].concat();
        second.mem().write_slice(&packet, GuestAddress(TX_BUFFER)).unwrap();
        tx.add(&[(TX_BUFFER, packet.len() as u32, false)]);
        driver.notify(TX);
        tx.wait_used();
        let sent = std::mem::take(&mut *second.wire.sent.lock().unwrap());
        assert_eq!(!sent.is_empty(), passes, "{payload} bytes out");
        // Room for more than it may get.
        second.wire.inject(Ok(frame));
        second.wire.inject(Ok(vec![1; 60]));
        rx.add(&[(BUFFERS, 12_000, true)]);
        rx.add(&[(BUFFERS + 0x4000, 12_000, true)]);
        driver.notify(RX);
        let mut got = vec![rx.wait_used().1 as usize];
        if got[0] != HEADER_BYTES + 60 {
            got.push(rx.wait_used().1 as usize);
        }
        let first = if passes {
            HEADER_BYTES + LEAST_FRAME + payload
        } else {
            HEADER_BYTES + 60
        };
        assert_eq!(got[0], first, "{payload} bytes in");
    }
    let counts = second.set.counts().nics[0];
    assert_eq!((counts.tx_dropped, counts.rx_dropped), (3, 3));
}

impl Net2 {
    fn rig_queue(&self) -> Box<QueueState> {
        Box::new(*super::super::queue::Queue::new(16).state())
    }
}
