use super::*;
use crate::devices::testing::Msi;
use crate::devices::virtio::rig::{BLK_SLOT, BUFFERS, Driver, NET_SLOT, RNG_SLOT, Rig};

const BASIC: u64 = F_VERSION_1;

#[test]
fn a_driver_finds_every_structure_through_the_capabilities() {
    let rig = Rig::new();
    for (slot, id, class, structures) in [
        (RNG_SLOT, 0x1044, 0xff_0000, vec![1, 2, 3, 5]),
        (NET_SLOT, 0x1041, 0x02_0000, vec![1, 2, 3, 4, 5]),
        (BLK_SLOT, 0x1042, 0x01_8000, vec![1, 2, 3, 4, 5]),
    ] {
        let driver = rig.driver(slot);
        assert_eq!(driver.config_read(0), id << 16 | 0x1af4);
        assert_eq!(driver.config_read(8) >> 8, class);
        let kinds: Vec<u8> = driver
            .capabilities(9)
            .iter()
            .map(|cap| (driver.config_read(*cap) >> 24) as u8)
            .collect();
        assert_eq!(kinds, structures);
        let msix = driver.capabilities(0x11)[0];
        let vectors = driver.config_read(msix) >> 16 & 0x7ff;
        assert_eq!(
            u64::from(vectors),
            driver.read(0x12, 2),
            "one for each queue and one for configuration changes"
        );
    }
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    let rig = Rig::new();
    let driver = rig.driver(NET_SLOT);
    let offered = driver.offered();
    assert_eq!(offered & BASIC, BASIC);
    for features in [0, offered & !BASIC, offered | 1 << 40, BASIC | 1] {
        driver.set_status(0);
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(11);
        assert_eq!(driver.status(), 3, "{features:#x}");
    }
    driver.accept(offered);
    driver.set_status(11);
    assert_eq!(driver.status(), 11);
    driver.accept(BASIC);
    assert_eq!(driver.read(12, 4), offered >> 32, "settled features do not change");
    driver.write(0, 7, 4);
    assert_eq!(driver.read(4, 4), 0, "there are no more features");
}

#[test]
fn queues_are_described_and_stand_once_enabled() {
    let rig = Rig::new();
    let driver = rig.driver(NET_SLOT);
    driver.start(BASIC, 64);
    driver.write(0x16, 1, 2);
    assert_eq!(
        (driver.read(0x18, 2), driver.read(0x1c, 2), driver.read(0x1e, 2)),
        (64, 1, 1)
    );
    let before = driver.read(0x20, 8);
    driver.write(0x20, 0x123_4560, 8);
    driver.write(0x18, 32, 2);
    assert_eq!((driver.read(0x20, 8), driver.read(0x18, 2)), (before, 64));
    driver.write(0x16, 2, 2);
    assert_eq!(
        (driver.read(0x18, 2), driver.read(0x20, 8)),
        (0, 0),
        "there is no third queue"
    );
    driver.write(0x1c, 1, 2);
    driver.write(0x16, 0, 2);
    driver.write(0x1a, 3, 2);
    assert_eq!(driver.read(0x1a, 2), u64::from(NO_VECTOR), "there is no such vector");
}

#[test]
fn a_bad_queue_address_needs_a_reset() {
    let rig = Rig::new();
    let driver = rig.driver(NET_SLOT);
    driver.start(BASIC, 64);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    driver.set_status(3);
    driver.accept(BASIC);
    driver.set_status(11);
    driver.write(0x20, 0xffff_f000, 8);
    driver.write(0x1c, 1, 2);
    assert_eq!(driver.read(0x1c, 2), 0);
    assert_eq!(driver.status(), 11 | STATUS_NEEDS_RESET);
    assert!(matches!(rig.bench.events.take()[..], [DeviceEvent::NeedsReset { .. }]));
    driver.write(0x1c, 1, 2);
    assert!(rig.bench.events.take().is_empty(), "said once");
    driver.start(BASIC, 64);
    assert_eq!(driver.status(), 15, "a reset mends it");
}

/// The generator is the simplest device that interrupts.
fn request(rig: &Rig, driver: &Driver) {
    let mut vq = driver.start(BASIC, 8).remove(0);
    vq.add(&[(BUFFERS, 16, true)]);
    driver.notify(0);
    rig.open();
    vq.wait_used();
}

fn none(msi: &Msi) -> bool {
    msi.take().is_empty()
}

#[test]
fn interrupts_wait_behind_masks() {
    let rig = Rig::new();
    let driver = rig.driver(RNG_SLOT);
    let msix = driver.capabilities(0x11)[0];
    request(&rig, &driver);
    rig.bench.msi.wait_for(driver.vector_data(0));
    assert_eq!(driver.read(ISR, 1), 1);
    assert_eq!(driver.read(ISR, 1), 0, "reading clears it");

    rig.close();
    let mut vq = driver.start(BASIC, 8).remove(0);
    driver.config_write(msix + 2, &0xc000u16.to_le_bytes());
    vq.add(&[(BUFFERS, 16, true)]);
    driver.notify(0);
    rig.open();
    vq.wait_used();
    rig.close();
    assert!(none(&rig.bench.msi));
    assert_eq!(driver.read(MSIX_PENDING, 4), 1);
    // The masked state travels: the successor interrupts when its guest unmasks.
    let state = rig.save();
    let successor = rig.successor();
    successor.take_over(&state);
    successor.close();
    assert!(none(&successor.bench.msi));
    successor
        .driver(RNG_SLOT)
        .config_write(msix + 2, &0x8000u16.to_le_bytes());
    assert_eq!(successor.bench.msi.take(), [(0xfee0_0000, driver.vector_data(0))]);
}

#[test]
fn the_window_in_the_configuration_space_reaches_the_bar() {
    let rig = Rig::new();
    let driver = rig.driver(NET_SLOT);
    let window = *driver.capabilities(9).last().unwrap();
    let aim = |offset: u32, len: u32| {
        driver.config_write(window + 4, &[0]);
        driver.config_write(window + 8, &offset.to_le_bytes());
        driver.config_write(window + 12, &len.to_le_bytes());
    };
    aim(DEVICE as u32, 4);
    assert_eq!(driver.config_read(window + 16), u32::from_le_bytes([2, 0, 0, 0]));
    aim(0x14, 1);
    driver.config_write(window + 16, &3u32.to_le_bytes());
    assert_eq!(driver.status(), 3);
    for (offset, len) in [(BAR_BYTES, 4), (u32::MAX - 3, 4), (2, 4), (0, 0), (0, 8)] {
        aim(offset, len);
        assert_eq!(driver.config_read(window + 16), 0);
        driver.config_write(window + 16, &[0xff; 4]);
    }
    assert_eq!(driver.status(), 3);
}

#[test]
fn a_bar_moves_with_its_notifications() {
    let rig = Rig::new();
    rig.bench
        .registrar
        .works
        .store(true, std::sync::atomic::Ordering::SeqCst);
    let mut driver = rig.driver(NET_SLOT);
    let old = driver.bar;
    driver.config_write(4, &[0, 0]);
    assert!(!rig.set.buses().mmio.read(old, &mut [0; 4]), "decoding is off");
    driver.config_write(0x10, &[0xff; 4]);
    assert_eq!(driver.config_read(0x10), !(BAR_BYTES - 1));
    driver.config_write(0x10, &0xd000_0000u32.to_le_bytes());
    driver.config_write(4, &[6, 0]);
    driver.bar = 0xd000_0000;
    assert_eq!(driver.read(0x12, 2), 2);
    assert!(!rig.set.buses().mmio.read(old, &mut [0; 4]));
    assert_eq!(rig.bench.registrar.addresses(), [0xd000_3000, 0xd000_3004]);

    // Onto another device, into RAM, beyond the hole: it answers nowhere, and the other device stays.
    let other = rig.driver(BLK_SLOT);
    for base in [other.bar as u32, 0, 0x1000_0000, 0xfec0_0000, 0xffff_8000] {
        driver.config_write(0x10, &base.to_le_bytes());
        assert_eq!(rig.bench.registrar.addresses(), [] as [u64; 0]);
        assert_eq!(other.read(0x12, 2), 1);
    }
    driver.config_write(0x10, &(old as u32).to_le_bytes());
    driver.bar = old;
    assert_eq!(driver.read(0x12, 2), 2);
}

#[test]
fn a_changed_state_is_refused() {
    let rig = Rig::new();
    let driver = rig.driver(NET_SLOT);
    driver.start(BASIC, 64);
    let mem = rig.bench.platform.ram.mem();
    let transport = || {
        let events = crate::devices::testing::Events::new();
        let description = Description {
            name: "net9".to_owned(),
            device_id: 1,
            pci_class: 0x02_0000,
            features: 0,
            queues: &[16, 16],
            config_bytes: 12,
            bar: 0xc000_0000,
        };
        Transport::new(description, Arc::<Msi>::default(), events)
    };
    let good = transport().save();
    assert_eq!(transport().check(&good, mem), Ok(()));
    let cases: [fn(&mut TransportState); 9] = [
        |state| state.registers.status = 0x20,
        |state| state.registers.isr = 4,
        |state| state.registers.config_vector = 3,
        |state| state.registers.queue_vectors[0] = 7,
        |state| state.registers.queue_vectors.push(0),
        |state| (state.registers.status, state.registers.driver_features) = (8, 1 << 50),
        |state| state.msix = Msix::new(2),
        |state| state.queues.truncate(1),
        |state| (state.queues[1].enabled, state.queues[1].desc) = (true, 1 << 40),
    ];
    for (number, change) in cases.into_iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(transport().check(&bad, mem).is_err(), "case {number}");
    }
}
