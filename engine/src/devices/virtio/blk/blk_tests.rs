use super::*;
use crate::devices::event::DeviceEvent;
use crate::devices::testing::{Seen, wait_until};
use crate::devices::virtio::rig::{BLK_SLOT, BUFFERS, Buffer, DISK_BYTES, Driver, Rig, Vq};
use crate::devices::virtio::{F_EVENT_IDX, F_VERSION_1};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// Nothing written yet.
const NO_STATUS: u8 = 0xee;
/// No test waits for its end.
const LONG_HOLD_MS: u64 = 60_000;

struct Disk {
    rig: Rig,
    driver: Driver,
    vq: Vq,
    requests: u64,
}

fn disk() -> Disk {
    let rig = Rig::new();
    let driver = rig.driver(BLK_SLOT);
    let features = driver.offered() & !F_EVENT_IDX;
    let vq = driver.start(features, 128).remove(0);
    rig.open();
    Disk {
        rig,
        driver,
        vq,
        requests: 0,
    }
}

/// A request that was published: its head, where its data and its status are.
#[derive(Clone, Copy)]
struct Asked {
    head: u16,
    data: u64,
    status: u64,
}

impl Disk {
    /// Publishes a request with header, data (to send, or room for so many bytes) and status, and says so.
    fn ask(&mut self, kind: u32, sector: u64, send: &[u8], room: u32) -> Asked {
        let asked = self.publish(kind, sector, send, room);
        self.driver.notify(0);
        asked
    }

    fn publish(&mut self, kind: u32, sector: u64, send: &[u8], room: u32) -> Asked {
        let base = BUFFERS + 0x1_0000 * (self.requests % 32);
        self.requests += 1;
        let (data, status) = (base + 0x1000, base + 0x20);
        let mem = self.rig.mem();
        mem.write_obj([kind, 0], GuestAddress(base)).unwrap();
        mem.write_obj(sector, GuestAddress(base + 8)).unwrap();
        mem.write_slice(send, GuestAddress(data)).unwrap();
        mem.write_obj(NO_STATUS, GuestAddress(status)).unwrap();
        let mut buffers: Vec<Buffer> = vec![(base, 16, false)];
        if !send.is_empty() {
            buffers.push((data, send.len() as u32, false));
        }
        if room > 0 {
            buffers.push((data, room, true));
        }
        buffers.push((status, 1, true));
        let head = self.vq.add(&buffers);
        Asked { head, data, status }
    }

    fn status(&self, asked: Asked) -> u8 {
        self.rig.mem().read_obj(GuestAddress(asked.status)).unwrap()
    }

    fn data(&self, asked: Asked, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.rig.mem().read_slice(&mut data, GuestAddress(asked.data)).unwrap();
        data
    }

    /// Asks and waits: status and used length.
    fn run(&mut self, kind: u32, sector: u64, send: &[u8], room: u32) -> (u8, u32) {
        let asked = self.ask(kind, sector, send, room);
        let (head, len) = self.vq.wait_used();
        assert_eq!(head, asked.head);
        (self.status(asked), len)
    }

    fn wait_executing(&self, count: u64) {
        let executed = &self.rig.disk.executed;
        wait_until("execution", || (executed.load(Ordering::SeqCst) >= count).then_some(()));
    }

    fn successor(&self) -> Self {
        let rig = self.rig.successor();
        Self {
            driver: rig.driver(BLK_SLOT),
            vq: self.vq.moved(&rig),
            requests: self.requests,
            rig,
        }
    }
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let disk = disk();
    assert_eq!(disk.driver.read(0x2000, 8), DISK_BYTES as u64 / 512);
    assert_eq!(disk.driver.read(0x2008, 4), u64::from(SEGMENT_BYTES));
    assert_eq!(disk.driver.read(0x200c, 4), u64::from(SEGMENTS));
    assert_eq!(disk.driver.read(0x2014, 4), 512);
    for (at, told) in [
        (0x2024, RANGE_SECTORS),
        (0x2028, 1),
        (0x2030, RANGE_SECTORS),
        (0x2034, 1),
    ] {
        assert_eq!(disk.driver.read(at, 4), u64::from(told), "{at:#x}");
    }
    assert_eq!(disk.driver.read(0x2038, 1), 0, "nothing is unmapped");
    let wanted = F_SEG_MAX | F_SIZE_MAX | F_BLK_SIZE | F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
    assert_eq!(disk.driver.offered() & (wanted | F_RO), wanted);
}

#[test]
fn blocks_are_written_read_and_flushed() {
    let mut disk = disk();
    assert_eq!(disk.run(OUT, 8, &[0x5a; 1024], 0), (OK, 1));
    let asked = disk.ask(IN, 8, &[], 1024);
    assert_eq!(disk.vq.wait_used(), (asked.head, 1025));
    assert_eq!((disk.status(asked), disk.data(asked, 1024)), (OK, vec![0x5a; 1024]));
    assert_eq!(disk.run(FLUSH, 0, &[], 0), (OK, 1));
    let asked = disk.ask(GET_ID, 0, &[], 20);
    disk.vq.wait_used();
    assert_eq!(disk.data(asked, 20), b"root-disk\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(
        disk.rig.disk.seen(),
        [Seen::Write(4096, vec![0x5a; 1024]), Seen::Read(4096, 1024), Seen::Flush]
    );
    disk.rig.bench.msi.wait_for(disk.driver.vector_data(0));
    let counts = disk.rig.set.counts().disks[0];
    assert_eq!(
        (counts.writes, counts.written_bytes, counts.read_bytes, counts.flushes),
        (1, 1024, 1024, 1)
    );
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut disk = disk();
    disk.run(OUT, 0, &[1; 8192], 0);
    assert_eq!(disk.run(DISCARD, 0, &range(1, 2, 0), 0).0, OK);
    // One range is offered. Earlier releases offered 16, and guests that run since then go by that.
    let two = [range(5, 1, 1), range(7, 1, 0)].concat();
    assert_eq!(disk.run(ZEROES, 0, &two, 0).0, OK);
    let content = disk.rig.disk.content.lock().unwrap()[..8192].to_vec();
    let zeroed = |sector: usize| matches!(sector, 1 | 2 | 5 | 7);
    assert!(
        content
            .iter()
            .enumerate()
            .all(|(at, byte)| *byte == u8::from(!zeroed(at / 512)))
    );
    assert_eq!(
        disk.rig.disk.seen()[1..],
        [
            Seen::Discard(512, 1024),
            Seen::WriteZeroes(2560, 512, true),
            Seen::WriteZeroes(3584, 512, false)
        ]
    );
    for (kind, ranges, status) in [
        (DISCARD, range(0, 1, 1), UNSUPPORTED),
        (ZEROES, range(0, 1, 2), UNSUPPORTED),
        (ZEROES, range(0, RANGE_SECTORS + 1, 0), IO_ERROR),
        (ZEROES, range(DISK_BYTES as u64 / 512, 1, 0), IO_ERROR),
        (ZEROES, range(u64::MAX, 1, 0), IO_ERROR),
        (DISCARD, range(0, 0, 0), IO_ERROR),
        (DISCARD, vec![0; 15], IO_ERROR),
        (DISCARD, vec![], IO_ERROR),
        (ZEROES, range(0, 1, 0).repeat(17), IO_ERROR),
    ] {
        assert_eq!(disk.run(kind, 0, &ranges, 0).0, status, "{kind} {ranges:?}");
    }
    assert_eq!(
        disk.rig.disk.seen().len(),
        4,
        "refused requests never reach the backend"
    );
    assert_eq!(disk.run(DISCARD, 0, &range(1, 1, 0).repeat(16), 0).0, OK);
    assert_eq!(disk.rig.disk.seen().len(), 4 + 16);
}

/// A hand-over waits until what was taken is done: what may have to be written is not taken together with more.
#[test]
fn a_large_range_is_done_alone() {
    let mut disk = disk();
    let door = disk.rig.disk.door.clone();
    let held = door.lock().unwrap();
    let zeroed = disk.publish(ZEROES, 0, &range(0, BATCH_BYTES as u32 / 512, 0), 0);
    let written = disk.publish(OUT, 0, &[1; 512], 0);
    disk.driver.notify(0);
    disk.wait_executing(1);
    disk.rig.close();
    drop(held);
    let set = &disk.rig.set;
    wait_until("what was taken is done", || {
        set.disks_in_use().end_within(Duration::ZERO).then_some(())
    });
    assert_eq!(disk.rig.disk.executed.load(Ordering::SeqCst), 1);
    disk.rig.open();
    for asked in [zeroed, written] {
        assert_eq!(disk.vq.wait_used().0, asked.head);
        assert_eq!(disk.status(asked), OK);
    }
}

#[test]
fn requests_outside_the_disk_are_errors_and_unknown_ones_unsupported() {
    let mut disk = disk();
    let last = DISK_BYTES as u64 / 512;
    for (kind, sector, send, room, status) in [
        (IN, last, 0, 512, IO_ERROR),
        (IN, last - 1, 0, 1024, IO_ERROR),
        (IN, u64::MAX, 0, 512, IO_ERROR),
        (IN, 0, 0, 511, IO_ERROR),
        (IN, 0, 0, 0, IO_ERROR),
        (OUT, last, 512, 0, IO_ERROR),
        (OUT, 0, 100, 0, IO_ERROR),
        (2, 0, 0, 0, UNSUPPORTED),
        (u32::MAX, 0, 512, 512, UNSUPPORTED),
    ] {
        assert_eq!(
            disk.run(kind, sector, &vec![0; send], room).0,
            status,
            "{kind} {sector} {send} {room}"
        );
    }
    assert_eq!(disk.run(IN, last - 1, &[], 512), (OK, 513));
    assert_eq!(disk.rig.set.counts().disks[0].errors, 9);
}

#[test]
fn a_failing_disk_is_the_guests_error_and_the_owners_event() {
    let mut disk = disk();
    disk.rig.disk.fails.store(true, Ordering::SeqCst);
    assert_eq!(disk.run(OUT, 0, &[1; 512], 0), (IO_ERROR, 1));
    assert_eq!(disk.run(IN, 0, &[], 512), (IO_ERROR, 0), "no data, so no length");
    assert_eq!(disk.run(FLUSH, 0, &[], 0).0, IO_ERROR);
    disk.rig.close();
    let completed = disk.rig.disk.completed.lock().unwrap().clone();
    assert!(completed.len() == 3 && completed.iter().all(|(_, ok)| !ok));
    let events = disk.rig.bench.events.take();
    let [DeviceEvent::DiskError { disk: 0, message }] = &events[..] else {
        panic!("{events:?}")
    };
    assert!(message.contains("writing 512 bytes at 0"), "{message}");
}

/// What a disk can't do is the guest's error only where nobody else can: a successor finds it in flight, and does it.
#[test]
fn what_fails_is_done_by_the_successor_if_there_may_be_one() {
    let mut disk = disk();
    disk.rig.disk.fails.store(true, Ordering::SeqCst);
    disk.rig.disk.hold_ms.store(LONG_HOLD_MS, Ordering::SeqCst);
    let asked = disk.ask(OUT, 0, &[1; 512], 0);
    let failing = || disk.rig.bench.events.take().into_iter().next();
    let event = wait_until("the owner hears of it", failing);
    assert!(matches!(event, DeviceEvent::DiskError { disk: 0, .. }), "{event:?}");
    let state = disk.rig.save();
    assert_eq!((disk.status(asked), disk.rig.disk.seen()), (NO_STATUS, vec![]));
    let mut successor = disk.successor();
    successor.rig.take_over(&state);
    assert_eq!(successor.vq.wait_used().0, asked.head);
    assert_eq!(successor.status(asked), OK);
    assert_eq!(successor.rig.disk.content.lock().unwrap()[..512], [1; 512]);
}

#[test]
fn what_failed_is_told_once_nobody_can_do_it() {
    let mut disk = disk();
    disk.rig.disk.fails.store(true, Ordering::SeqCst);
    disk.rig.disk.hold_ms.store(LONG_HOLD_MS, Ordering::SeqCst);
    let asked = disk.ask(FLUSH, 0, &[], 0);
    wait_until("the owner hears of it", || {
        disk.rig.bench.events.take().into_iter().next()
    });
    assert_eq!(disk.status(asked), NO_STATUS);
    disk.rig.disk.hold_ms.store(0, Ordering::SeqCst);
    assert_eq!(disk.vq.wait_used().0, asked.head);
    assert_eq!(disk.status(asked), IO_ERROR);
}

/// What was held, and for how long, is counted. What fails afterwards is told at once: nobody has taken over.
#[test]
fn what_failed_is_told_when_nobody_took_over_in_time() {
    const HOLD_MS: u64 = 120;
    let mut disk = disk();
    disk.rig.disk.fails.store(true, Ordering::SeqCst);
    disk.rig.disk.hold_ms.store(HOLD_MS, Ordering::SeqCst);
    let began = Instant::now();
    assert_eq!(disk.run(OUT, 0, &[1; 512], 0).0, IO_ERROR);
    assert!(began.elapsed() >= Duration::from_millis(HOLD_MS));
    let counts = |disk: &Disk| {
        // Counters follow the answer, in the same turn.
        disk.rig.close();
        let counts = disk.rig.set.counts().disks[0];
        disk.rig.open();
        (counts.errors, counts.held, counts.held_ms_max)
    };
    let (errors, held, lasted_ms) = counts(&disk);
    assert_eq!((errors, held), (1, 1));
    assert!(lasted_ms >= HOLD_MS, "{lasted_ms} ms");
    assert_eq!(disk.run(FLUSH, 0, &[], 0).0, IO_ERROR);
    assert_eq!(counts(&disk), (2, 1, lasted_ms));
}

/// Room is the epoch's affair, and may be long in coming: the disk does not hang meanwhile.
#[test]
fn a_request_is_under_way_once_there_is_room_for_it() {
    let mut disk = disk();
    let (room, door) = (disk.rig.disk.room.clone(), disk.rig.disk.door.clone());
    let (full, held) = (room.lock().unwrap(), door.lock().unwrap());
    let asked = disk.ask(OUT, 0, &[1; 512], 0);
    let set = &disk.rig.set;
    wait_until("the request is taken", || {
        (!set.disks_in_use().end_within(Duration::ZERO)).then_some(())
    });
    assert!(set.requests_since().iter().all(Option::is_none));
    drop(full);
    disk.wait_executing(1);
    assert!(disk.rig.set.requests_since().iter().any(Option::is_some));
    drop(held);
    assert_eq!(disk.vq.wait_used().0, asked.head);
    assert_eq!(disk.status(asked), OK);
}

#[test]
fn completion_comes_before_the_used_ring() {
    let mut disk = disk();
    for number in 0..200u64 {
        disk.ask(OUT, number % 16, &[number as u8; 512], 0);
        // Once the guest can see the request used, the backend knows of it.
        disk.vq.wait_used();
        assert_eq!(disk.rig.disk.seen().len() as u64, number + 1);
    }
}

#[test]
fn broken_requests_need_a_reset() {
    let no_status: &[Buffer] = &[(BUFFERS, 16, false)];
    let short_header: &[Buffer] = &[(BUFFERS, 15, false), (BUFFERS, 1, true)];
    let elsewhere: &[Buffer] = &[(1 << 40, 16, false), (BUFFERS, 1, true)];
    for buffers in [no_status, short_header, elsewhere] {
        let mut disk = disk();
        disk.vq.add(buffers);
        disk.driver.notify(0);
        disk.rig.bench.msi.wait_for(disk.driver.config_vector_data());
        assert_eq!(disk.driver.status(), 15 | 0x40);
        let state = disk.rig.save();
        disk.successor().rig.take_over(&state);
        disk.rig.open();
        disk.vq = disk.driver.start(F_VERSION_1, 128).remove(0);
        assert_eq!(disk.run(FLUSH, 0, &[], 0).0, OK);
    }
}

/// The heart of taking over: what was taken and not completed is executed again, completes once, and nothing is lost.
#[test]
fn requests_in_flight_are_executed_again_by_the_successor() {
    let mut disk = disk();
    let door = disk.rig.disk.door.clone();
    let held = door.lock().unwrap();
    let first = disk.ask(OUT, 0, &[1; 512], 0);
    disk.wait_executing(1);
    let second = disk.ask(OUT, 1, &[2; 512], 0);
    let third = disk.ask(IN, 0, &[], 512);
    let state = disk.rig.save();
    assert_eq!(disk.rig.disk.seen(), [], "nothing completes while the gate is closed");

    let mut successor = disk.successor();
    successor.rig.take_over(&state);
    let heads: Vec<u16> = (0..3).map(|_| successor.vq.wait_used().0).collect();
    assert_eq!(heads, [first.head, second.head, third.head]);
    assert!(
        [first, second, third]
            .iter()
            .all(|asked| successor.status(*asked) == OK)
    );
    assert_eq!(successor.data(third, 512), [1; 512]);
    let seen = [
        Seen::Write(0, vec![1; 512]),
        Seen::Write(512, vec![2; 512]),
        Seen::Read(0, 512),
    ];
    assert_eq!(successor.rig.disk.seen(), seen);

    // The first machine goes on as well: a save disturbs nothing, and nothing is executed twice there.
    drop(held);
    disk.rig.open();
    let heads: Vec<u16> = (0..3).map(|_| disk.vq.wait_used().0).collect();
    assert_eq!(heads, [first.head, second.head, third.head]);
    assert_eq!(
        (
            disk.rig.disk.seen().len(),
            disk.rig.disk.executed.load(Ordering::SeqCst)
        ),
        (3, 3)
    );
}

#[test]
fn a_state_taken_after_execution_but_before_completion_executes_again() {
    let mut disk = disk();
    let asked = {
        let door = disk.rig.disk.door.clone();
        let _held = door.lock().unwrap();
        let asked = disk.ask(OUT, 3, &[9; 512], 0);
        disk.wait_executing(1);
        disk.rig.close();
        asked
    };
    // The write reaches the disk, but the gate keeps its completion back.
    let content = disk.rig.disk.content.clone();
    wait_until("the write", || (content.lock().unwrap()[3 * 512] == 9).then_some(()));
    let state = disk.rig.save();
    assert_eq!(disk.status(asked), NO_STATUS);
    let mut successor = disk.successor();
    successor.rig.take_over(&state);
    assert_eq!(successor.vq.wait_used().0, asked.head);
    assert_eq!(successor.rig.disk.seen(), [Seen::Write(3 * 512, vec![9; 512])]);
}

#[test]
fn a_drivers_reset_waits_for_what_is_being_executed() {
    let mut disk = disk();
    let door = disk.rig.disk.door.clone();
    let held = door.lock().unwrap();
    let asked = disk.ask(OUT, 0, &[1; 512], 0);
    disk.wait_executing(1);
    disk.driver.set_status(0);
    assert_eq!(disk.driver.status(), 15, "not yet");
    let state = disk.rig.save();
    disk.rig.open();
    drop(held);
    wait_until("the reset", || (disk.driver.status() == 0).then_some(()));
    assert_eq!(
        disk.rig.disk.seen(),
        [Seen::Write(0, vec![1; 512])],
        "what changed the disk is reported"
    );
    assert_eq!(
        (disk.status(asked), disk.vq.used_index()),
        (NO_STATUS, 0),
        "the guest's memory is left alone"
    );

    let successor = disk.successor();
    successor.rig.take_over(&state);
    wait_until("the successor's reset", || {
        (successor.driver.status() == 0).then_some(())
    });
}

#[test]
fn a_machine_reset_forgets_requests_but_reports_what_was_written() {
    let mut disk = disk();
    let door = disk.rig.disk.door.clone();
    let held = door.lock().unwrap();
    let asked = disk.ask(OUT, 0, &[1; 512], 0);
    disk.wait_executing(1);
    disk.rig.close();
    disk.rig.set.reset();
    assert_eq!(disk.driver.status(), 0);
    disk.rig.open();
    drop(held);
    disk.vq = disk.driver.start(F_VERSION_1, 128).remove(0);
    assert_eq!(disk.run(FLUSH, 0, &[], 0).0, OK);
    assert_eq!(disk.rig.disk.seen(), [Seen::Write(0, vec![1; 512]), Seen::Flush]);
    assert_eq!(disk.status(asked), NO_STATUS);
}

/// A seat that gave its guest away and gets it back: what it was executing then is not its business any more.
#[test]
fn requests_of_a_past_that_was_replaced_are_forgotten() {
    let mut disk = disk();
    let idle = disk.rig.save();
    disk.rig.open();
    let door = disk.rig.disk.door.clone();
    let held = door.lock().unwrap();
    disk.ask(OUT, 0, &[1; 512], 0);
    disk.wait_executing(1);
    disk.rig.close();
    let set = &disk.rig.set;
    let waited = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let in_use = set.disks_in_use();
            assert!(!in_use.end_within(Duration::from_millis(1)), "no longer than it may");
            assert!(in_use.end_within(Duration::from_secs(60)));
            waited.store(1, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(waited.load(Ordering::SeqCst), 0, "the backend is in use");
        drop(held);
    });
    assert_eq!(disk.rig.disk.content.lock().unwrap()[0], 1);
    disk.vq = Vq::new(disk.rig.bench.platform.ram.clone(), disk.vq.desc, 128, false);
    disk.rig.take_over(&idle);
    assert_eq!(disk.run(FLUSH, 0, &[], 0).0, OK);
    assert_eq!(disk.rig.disk.seen(), [Seen::Flush]);
}

#[test]
fn a_busy_queue_is_served_in_order_with_and_without_event_idx() {
    for features in [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX] {
        let mut disk = disk();
        disk.vq = disk.driver.start(features, 128).remove(0);
        for round in 0..40u64 {
            let asked: Vec<Asked> = (0..30)
                .map(|number| disk.ask(OUT, number, &[(round + number) as u8; 512], 0))
                .collect();
            for expected in asked {
                assert_eq!(disk.vq.wait_used().0, expected.head);
                assert_eq!(disk.status(expected), OK);
            }
        }
        let content = disk.rig.disk.content.lock().unwrap();
        assert!((0..30).all(|number| content[number * 512] == (39 + number) as u8));
    }
}

/// Saves at many moments of busy traffic; each state, loaded elsewhere, finishes every request exactly once.
#[test]
fn every_moment_can_be_saved() {
    let mut disk = disk();
    for round in 0..60u8 {
        let asked: Vec<Asked> = (0..10).map(|number| disk.ask(OUT, number, &[round; 512], 0)).collect();
        (0..u32::from(round) * 50).for_each(|_| std::hint::spin_loop());
        let state = disk.rig.save();
        let mut successor = disk.successor();
        successor.rig.take_over(&state);
        for expected in &asked {
            assert_eq!(successor.vq.wait_used().0, expected.head);
        }
        assert!(asked.iter().all(|asked| successor.status(*asked) == OK));
        assert!((0..10).all(|number| successor.rig.disk.content.lock().unwrap()[number * 512] == round));
        disk.rig.open();
        for _ in 0..10 {
            disk.vq.wait_used();
        }
    }
    assert_eq!(disk.rig.disk.seen().len(), 600);
}

#[test]
fn incoherent_states_are_refused() {
    let config = DiskConfig {
        serial: "s".to_owned(),
        read_only: false,
    };
    let blk = Blk::new(&config, 4096);
    let queue = *crate::devices::virtio::queue::Queue::new(8).state();
    let good = blk.save();
    assert_eq!(blk.check(&good, &[queue]), Ok(()));
    let taken = QueueState {
        next_avail: 2,
        next_used: 1,
        ..queue
    };
    let with = |in_flight: Vec<u16>| BlkState {
        in_flight,
        ..good.clone()
    };
    assert_eq!(blk.check(&with(vec![7]), &[taken]), Ok(()));
    assert!(blk.check(&with(vec![8]), &[taken]).is_err());
    assert!(blk.check(&with(vec![]), &[taken]).is_err());
    assert!(blk.check(&with(vec![1, 2]), &[taken]).is_err());
    assert!(blk.check(&good, &[]).is_err());
    let message = Blk::new(&config, 8192).check(&good, &[queue]).unwrap_err();
    assert!(message.contains("4096") && message.contains("8192"), "{message}");
    let protected = DiskConfig {
        read_only: true,
        ..config
    };
    assert!(Blk::new(&protected, 4096).check(&good, &[queue]).is_err());
}
