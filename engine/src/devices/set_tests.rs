use super::*;
use crate::devices::event::DeviceEvent;
use crate::devices::testing::{Bench, Console, MemoryDisk, Seeded, Wire, wait_until};
use crate::devices::virtio::rig::{BLK_SLOT, NET_SLOT, RNG_SLOT, Rig, config};
use crate::devices::virtio::{F_EVENT_IDX, F_VERSION_1};
use std::time::Instant;

fn backends(nics: usize, disks: usize) -> Backends {
    Backends {
        nics: (0..nics)
            .map(|_| Wire::new().backend() as Box<dyn NetBackend>)
            .collect(),
        disks: (0..disks)
            .map(|_| Box::new(MemoryDisk::new(4096)) as Box<dyn DiskBackend>)
            .collect(),
        console: Box::new(Console::default()),
    }
}

#[test]
fn bad_configurations_are_refused_with_their_reason() {
    let bench = Bench::new();
    let build = |change: fn(&mut DeviceSetConfig), backends| {
        let mut config = config();
        change(&mut config);
        DeviceSet::new(&config, &bench.platform, backends)
            .err()
            .map(|error| error.to_string())
    };
    let refused = |change, backends, words: &str| {
        let message = build(change, backends).unwrap();
        assert!(message.contains(words), "{message}");
    };
    assert_eq!(build(|_| (), backends(1, 1)), None);
    refused(|_| (), backends(0, 1), "1 network interfaces are configured, but 0");
    refused(|_| (), backends(1, 2), "1 disks are configured, but 2");
    refused(|config| config.nics[0].mtu = 20, backends(1, 1), "MTU of 20");
    refused(|config| config.nics[0].mac = [1; 6], backends(1, 1), "MAC");
    refused(
        |config| config.nics = vec![config.nics[0].clone(); 30],
        backends(30, 1),
        "slots for 30",
    );
    let mut odd = backends(1, 0);
    odd.disks.push(Box::new(MemoryDisk::new(1000)));
    refused(|_| (), odd, "multiple of 512");
    let _first = DeviceSet::new(&config(), &bench.platform, backends(1, 1)).unwrap();
    refused(|_| (), backends(1, 1), "buses are not free");
}

#[test]
fn a_full_bus_has_all_devices() {
    let bench = Bench::new();
    let mut config = config();
    config.nics = vec![config.nics[0].clone(); 14];
    config.disks = vec![config.disks[0].clone(); 16];
    let set = DeviceSet::new(&config, &bench.platform, backends(14, 16)).unwrap();
    let mut data = [0; 4];
    for slot in 0..32u32 {
        set.buses().pio.write(0xcf8, &(0x8000_0000 | slot << 11).to_le_bytes());
        set.buses().pio.read(0xcfc, &mut data);
        assert_ne!(data, [0xff; 4], "slot {slot}");
    }
    assert_eq!(set.sections().len(), 4 + 31);
}

#[test]
fn absent_hardware_reads_as_ones() {
    let rig = Rig::new();
    for port in [
        0x60u64, 0x80, 0x92, 0x170, 0x1f0, 0x2f8, 0x3b0, 0x4d0, 0x608, 0xcfb, 0xffff,
    ] {
        let mut data = [0];
        rig.set.buses().pio.read(port, &mut data);
        assert_eq!(data, [0xff], "{port:#x}");
    }
    let mut data = [0; 8];
    rig.set.buses().mmio.read(0xe000_0000, &mut data);
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn the_legacy_devices_are_on_their_ports() {
    let rig = Rig::new();
    let pio = &rig.set.buses().pio;
    pio.write(0x3f8, b"!");
    assert_eq!(rig.console.take(), b"!");
    pio.write(0x64, &[0xfe]);
    pio.write(0xcf9, &[6]);
    pio.write(0x604, &0x3400u16.to_le_bytes());
    assert_eq!(
        rig.bench.events.take(),
        [DeviceEvent::Reset, DeviceEvent::Reset, DeviceEvent::PowerOff]
    );
    pio.write(0x70, &[9]);
    let mut year = [0];
    pio.read(0x71, &mut year);
    assert_eq!(year, [0x26]);
    rig.open();
    assert_eq!(rig.set.console_input(b"x"), 1);
    pio.write(0x3f9, &[1]);
    assert!(rig.bench.serial_line.asserted());
    pio.write(0x602, &0x100u16.to_le_bytes());
    rig.set.press_power_button();
    assert!(rig.bench.sci_line.asserted());
}

fn all_started(rig: &Rig) {
    for slot in [RNG_SLOT, NET_SLOT, BLK_SLOT] {
        rig.driver(slot).start(F_VERSION_1 | F_EVENT_IDX, 8);
    }
}

#[test]
fn states_travel_and_lines_follow() {
    let rig = Rig::new();
    all_started(&rig);
    rig.open();
    rig.set.console_input(b"typed");
    rig.set.buses().pio.write(0x3f9, &[1]);
    rig.bench.clock.advance(5_000_000_000);
    let state = rig.save();
    let successor = rig.successor();
    successor.take_over(&state);
    assert!(successor.bench.serial_line.asserted());
    let reader = StateReader::parse(&state).unwrap();
    let written: Vec<(u16, u32)> = reader
        .sections()
        .map(|section| (section.kind, section.instance))
        .collect();
    assert_eq!(written, rig.set.sections());
}

#[test]
fn a_moved_bar_and_two_that_traded_places_are_mapped_after_a_load() {
    let rig = Rig::new();
    let (net, blk) = (rig.driver(NET_SLOT), rig.driver(BLK_SLOT));
    net.config_write(4, &[0, 0]);
    net.config_write(0x10, &(blk.bar as u32).to_le_bytes());
    blk.config_write(0x10, &(net.bar as u32).to_le_bytes());
    net.config_write(4, &[6, 0]);
    let state = rig.save();
    let successor = rig.successor();
    successor.take_over(&state);
    let (net, blk) = (successor.driver(NET_SLOT), successor.driver(BLK_SLOT));
    assert_eq!((net.read(0x12, 2), blk.read(0x12, 2)), (2, 1));
    successor.close();
    successor.set.reset();
    let (net, blk) = (successor.driver(NET_SLOT), successor.driver(BLK_SLOT));
    assert!(net.bar < blk.bar);
    assert_eq!((net.read(0x12, 2), blk.read(0x12, 2)), (2, 1));
}

/// A takeover loads a state whose devices are where they were in the one before: the kernel is asked to change nothing, for each change
/// takes it a while.
#[test]
fn a_load_moves_nothing_that_is_in_its_place() {
    use std::sync::atomic::Ordering;

    let rig = Rig::new();
    let net = rig.driver(NET_SLOT);
    let successor = rig.successor();
    let registrar = successor.bench.registrar.clone();
    registrar.works.store(true, Ordering::SeqCst);
    let changes_of_a_load = || {
        let before = registrar.asked.load(Ordering::SeqCst);
        successor.set.load(&StateReader::parse(&rig.save()).unwrap()).unwrap();
        registrar.asked.load(Ordering::SeqCst) - before
    };
    net.config_write(4, &[0, 0]);
    changes_of_a_load();
    assert_eq!(registrar.addresses(), [] as [u64; 0], "it answers nowhere");
    net.config_write(4, &[6, 0]);
    assert_eq!(changes_of_a_load(), 2, "both queues of the one that moved");
    let addresses = registrar.addresses();
    assert_eq!(changes_of_a_load(), 0);
    assert_eq!(registrar.addresses(), addresses);
    net.config_write(4, &[0, 0]);
    assert_eq!(changes_of_a_load(), 2);
    assert_eq!(registrar.addresses(), [] as [u64; 0]);
}

/// Whatever a state says: it is refused and changes nothing, or it loads and saves to the same bytes.
#[test]
fn damaged_states_are_refused_or_load_completely() {
    let rig = Rig::new();
    all_started(&rig);
    let state = rig.save();
    let victim = rig.successor();
    let before = victim.save();
    let sections: Vec<Section<'_>> = StateReader::parse(&state).unwrap().sections().collect();
    let mut random = Seeded::new(3);
    let (mut refused, mut loaded) = (0, 0);
    for _ in 0..4_000 {
        let target = random.below(sections.len() as u64) as usize;
        let mut writer = StateWriter::new();
        for (index, section) in sections.iter().enumerate() {
            let mut bytes = section.bytes.to_vec();
            if index == target {
                let at = random.below(bytes.len() as u64) as usize;
                match random.below(4) {
                    0 => bytes.truncate(at),
                    1 => bytes.push(0),
                    _ => bytes[at] ^= 1 << random.below(8),
                }
            }
            writer.put(section.kind, section.version, section.instance, &bytes);
        }
        let damaged = writer.finish().to_vec();
        let reader = StateReader::parse(&damaged).unwrap();
        match victim.set.load(&reader) {
            Err(_) => {
                refused += 1;
                assert_eq!(victim.save(), before, "a refused state changes nothing");
            }
            Ok(()) => {
                loaded += 1;
                // Encodings that are not canonical are the only way to differ, and then only in form.
                let saved = victim.save();
                victim.set.load(&StateReader::parse(&saved).unwrap()).unwrap();
                assert_eq!(victim.save(), saved);
                victim.set.load(&StateReader::parse(&before).unwrap()).unwrap();
            }
        }
    }
    assert!(refused > 500 && loaded > 500, "{refused} refused, {loaded} loaded");
}

#[test]
fn a_missing_or_newer_section_is_refused() {
    let rig = Rig::new();
    let state = rig.save();
    let reader = StateReader::parse(&state).unwrap();
    for left_out in reader.sections() {
        let copy = |version: u16, drop_it: bool| {
            let mut writer = StateWriter::new();
            for section in reader.sections() {
                let target = section.kind == left_out.kind;
                if !(target && drop_it) {
                    let version = if target { version } else { section.version };
                    writer.put(section.kind, version, section.instance, section.bytes);
                }
            }
            writer.finish().to_vec()
        };
        let (missing, newer) = (copy(1, true), copy(2, false));
        assert!(matches!(
            rig.set.check(&StateReader::parse(&missing).unwrap()),
            Err(StateError::Missing { .. })
        ));
        assert!(matches!(
            rig.set.check(&StateReader::parse(&newer).unwrap()),
            Err(StateError::Version { .. })
        ));
    }
}

/// A guest that writes nonsense everywhere: nothing panics, nothing hangs, and every state on the way can be loaded.
#[test]
fn random_accesses_do_no_harm() {
    for seed in 0..60 {
        let rig = Rig::new();
        let mut random = Seeded::new(seed);
        all_started(&rig);
        rig.open();
        let bars = [RNG_SLOT, NET_SLOT, BLK_SLOT].map(|slot| rig.driver(slot).bar);
        for _ in 0..1_500 {
            let len = [1, 2, 4, 8][random.below(4) as usize];
            let data = random.next().to_le_bytes();
            match random.below(10) {
                0 => {
                    let address = 0x8000_0000 | random.next() as u32 & 0x1ffc;
                    rig.set.buses().pio.write(0xcf8, &address.to_le_bytes());
                }
                1 => drop(rig.set.buses().pio.write(0xcfc + random.below(4), &data[..len.min(4)])),
                2 => drop(rig.set.buses().pio.write(random.below(0x1_0000), &data[..len.min(4)])),
                3 => drop(
                    rig.set
                        .buses()
                        .pio
                        .read(random.below(0x1_0000), &mut [0; 8][..len.min(4)]),
                ),
                4 => rig.wire.inject(Ok(vec![1; random.below(2000) as usize])),
                5 => {
                    use vm_memory::{Bytes, GuestAddress};
                    let at = 0x14_0000 + random.below(0x10_0000);
                    rig.mem().write_slice(&data, GuestAddress(at)).unwrap();
                }
                kind => {
                    let bar = bars[random.below(3) as usize];
                    // Mostly the registers, sometimes anywhere.
                    let offset = if kind < 9 {
                        random.below(0x40)
                    } else {
                        random.below(u64::from(BAR_BYTES))
                    };
                    if random.below(3) == 0 {
                        rig.set.buses().mmio.read(bar + offset, &mut [0; 8][..len]);
                    } else {
                        let small = (random.next() & 0x0f).to_le_bytes();
                        let data = if random.below(2) == 0 { data } else { small };
                        rig.set.buses().mmio.write(bar + offset, &data[..len]);
                    }
                }
            }
        }
        let state = rig.save();
        let successor = rig.successor();
        successor
            .set
            .load(&StateReader::parse(&state).unwrap())
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(successor.save(), state, "seed {seed}");
        // The machine still works after a reset.
        rig.set.reset();
        rig.open();
        all_started(&rig);
    }
}

/// The state of a busy set is small, and saving and pausing are quick; measured, and bounded only against blunders.
#[test]
fn saving_is_small() {
    let rig = Rig::new();
    all_started(&rig);
    rig.open();
    let state = rig.save();
    assert!(state.len() < 2_000, "{} bytes", state.len());
    let mut writer = StateWriter::new();
    let start = Instant::now();
    for _ in 0..1_000 {
        writer.clear();
        rig.set.save(&mut writer);
    }
    println!("save: {:?} each, {} bytes", start.elapsed() / 1_000, state.len());
}

#[test]
fn dropping_ends_the_threads_whether_the_gate_is_open_or_closed() {
    for open in [false, true] {
        let rig = Rig::new();
        let gate = rig.bench.platform.gate.clone();
        if open {
            rig.open();
        }
        let ram = Arc::downgrade(&rig.bench.platform.ram);
        let buses = rig.set.buses().clone();
        let bar = rig.driver(NET_SLOT).bar;
        drop(rig);
        assert_eq!(gate.is_closed(), !open);
        assert!(!buses.pio.read(0xcf8, &mut [0; 4]) && !buses.mmio.read(bar, &mut [0; 4]));
        wait_until("the memory to be free", || (ram.strong_count() == 0).then_some(()));
    }
}

/// What a pause waits for when network and disk are as busy as they can be: at most a turn of each.
#[test]
fn the_gate_closes_while_all_is_busy_and_then_nothing_moves() {
    use crate::devices::virtio::rig::BUFFERS;
    use std::sync::atomic::{AtomicBool, Ordering};
    use vm_memory::{Bytes, GuestAddress};

    let rig = Rig::new();
    let (net, blk) = (rig.driver(NET_SLOT), rig.driver(BLK_SLOT));
    let mut tx = net.start(F_VERSION_1 | F_EVENT_IDX, 256).remove(1);
    let mut disk = blk.start(F_VERSION_1 | F_EVENT_IDX, 128).remove(0);
    rig.mem().write_obj([1u32, 0, 0, 0], GuestAddress(BUFFERS)).unwrap();
    rig.open();
    let stop = AtomicBool::new(false);
    let begun = Instant::now();
    let mut waits_us = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                // Full rings: 64 frames of 1,512 bytes and 30 writes of 32 KiB.
                while tx.published.wrapping_sub(tx.seen) < 64 {
                    tx.add(&[(BUFFERS + 0x10_0000, 1524, false)]);
                }
                while disk.published.wrapping_sub(disk.seen) < 30 {
                    disk.add(&[
                        (BUFFERS, 16, false),
                        (BUFFERS + 0x1000, 32 << 10, false),
                        (BUFFERS + 0x40, 1, true),
                    ]);
                }
                net.notify(1);
                blk.notify(0);
                while tx.take_used().is_some() || disk.take_used().is_some() {}
            }
        });
        let waits = (0..300).map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            let start = Instant::now();
            rig.close();
            let waited = start.elapsed().as_micros() as u64;
            assert!(rig.bench.platform.gate.is_closed());
            let done = || {
                let counts = rig.set.counts();
                (counts.nics[0].tx_frames, counts.disks[0].writes)
            };
            let before = done();
            std::thread::yield_now();
            assert_eq!(done(), before, "frames and writes behind a closed gate");
            rig.open();
            waited
        });
        let waits: Vec<u64> = waits.collect();
        stop.store(true, Ordering::SeqCst);
        waits
    });
    let took_us = begun.elapsed().as_micros() as u64;
    let counts = rig.set.counts();
    assert!(counts.nics[0].tx_frames > 0 && counts.disks[0].writes > 0, "{counts:?}");
    assert!(rig.bench.events.take().is_empty());
    waits_us.sort_unstable();
    println!(
        "closing the gate: p50 {} us, p99 {} us; {counts:?}",
        waits_us[150], waits_us[297]
    );
    // How long a turn takes is the machine's matter. None is taken while the gate is waited for but the one under way.
    let turns = counts.nics[0].tx_frames / 64 + counts.disks[0].writes / 30;
    let turn_us = took_us.saturating_sub(waits_us.iter().sum::<u64>()) / turns.max(1);
    assert!(
        waits_us[150] < (20 * turn_us).max(50_000),
        "half of all pauses wait {} us for devices, a turn of which takes {turn_us} us",
        waits_us[150]
    );
}
