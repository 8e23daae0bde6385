use super::*;
use crate::devices::testing::Seeded;
use crate::devices::virtio::rig::{INDIRECT, NEXT, Vq, WRITE, write_desc};
use crate::memory::GuestRam;
use std::sync::Arc;
use virtio_queue::desc::{RawDescriptor, split};
use virtio_queue::mock::MockSplitQueue;

const BASE: u64 = 0x1_0000;
const END: u64 = 4 << 20;

struct Rig {
    ram: Arc<GuestRam>,
    vq: Vq,
    queue: Queue,
    chain: Chain,
}

fn rig(size: u16, event_idx: bool) -> Rig {
    let ram = Arc::new(GuestRam::new(END, false).unwrap());
    let vq = Vq::new(ram.clone(), BASE, size, event_idx);
    let mut queue = Queue::new(size);
    queue.configure(|state| {
        (state.desc, state.avail, state.used) = (vq.desc, vq.avail, vq.used);
    });
    queue.set_event_idx(event_idx);
    queue.enable(ram.mem()).unwrap();
    Rig {
        ram,
        vq,
        queue,
        chain: Chain::default(),
    }
}

impl Rig {
    fn pop(&mut self) -> Result<bool, QueueError> {
        self.queue.pop(self.ram.mem(), &mut self.chain)
    }

    fn pop_error(&mut self) -> QueueError {
        let before = *self.queue.state();
        let error = self.pop().unwrap_err();
        assert_eq!(*self.queue.state(), before, "after an error nothing was taken");
        error
    }
}

#[test]
fn a_chain_comes_out_as_the_driver_wrote_it() {
    let mut rig = rig(8, false);
    assert!(!rig.pop().unwrap());
    let head = rig
        .vq
        .add(&[(0x2000, 16, false), (0x3000, 512, false), (0x4000, 1, true)]);
    assert!(rig.pop().unwrap());
    assert_eq!(rig.chain.head, head);
    assert_eq!((rig.chain.readable_len(), rig.chain.writable_len()), (528, 1));
    assert_eq!(
        rig.chain.readable[1],
        Segment {
            address: 0x3000,
            len: 512
        }
    );
    assert!(!rig.pop().unwrap());
    assert_eq!(rig.queue.outstanding(), 1);
    rig.queue.push_used(rig.ram.mem(), head, 1).unwrap();
    assert_eq!((rig.vq.take_used(), rig.queue.outstanding()), (Some((head, 1)), 0));
}

/// The same rings, written by the mock driver of another implementation.
#[test]
fn it_agrees_with_another_implementation() {
    let ram = GuestRam::new(END, false).unwrap();
    let mock = MockSplitQueue::create(ram.mem(), GuestAddress(BASE), 16);
    let desc = |address, len, flags, next| RawDescriptor::from(split::Descriptor::new(address, len, flags, next));
    let descs = [
        desc(0x8000, 100, NEXT, 1),
        desc(0x9000, 200, NEXT | WRITE, 2),
        desc(0xa000, 300, WRITE, 0),
        desc(0xb000, 400, 0, 0),
    ];
    mock.build_multiple_desc_chains(&descs).unwrap();
    let mut queue = Queue::new(16);
    queue.configure(|state| {
        state.desc = mock.desc_table_addr().0;
        state.avail = mock.avail_addr().0;
        state.used = mock.used_addr().0;
    });
    queue.enable(ram.mem()).unwrap();
    let mut chain = Chain::default();
    assert!(queue.pop(ram.mem(), &mut chain).unwrap());
    assert_eq!((chain.head, chain.readable_len(), chain.writable_len()), (0, 100, 500));
    assert!(queue.pop(ram.mem(), &mut chain).unwrap());
    assert_eq!((chain.head, chain.readable_len(), chain.writable_len()), (3, 400, 0));
    queue.push_used(ram.mem(), 3, 7).unwrap();
    assert_eq!(u16::from_le(mock.used().idx().load()), 1);
    let used = mock.used().ring().ref_at(0).unwrap().load();
    assert_eq!((used.id(), used.len()), (3, 7));
}

#[test]
fn indices_wrap_around() {
    let mut rig = rig(4, false);
    for round in 0..70_000u32 {
        let head = rig.vq.add(&[(0x2000, 4, true)]);
        assert!(rig.pop().unwrap());
        rig.queue.push_used(rig.ram.mem(), head, round).unwrap();
        assert_eq!(rig.vq.take_used(), Some((head, round)));
    }
}

#[test]
fn indirect_tables_are_followed_once() {
    let mut rig = rig(4, false);
    let mem = rig.ram.mem();
    write_desc(mem, 0x5000, 0, 0x2000, 16, NEXT, 2);
    write_desc(mem, 0x5000, 2, 0x3000, 32, WRITE, 0);
    rig.vq.write_desc(1, 0x5000, 48, INDIRECT, 0);
    rig.vq.publish(1);
    assert!(rig.pop().unwrap());
    assert_eq!(
        (rig.chain.head, rig.chain.readable_len(), rig.chain.writable_len()),
        (1, 16, 32)
    );

    for (len, flags, inner) in [
        (48, INDIRECT | NEXT, 0),
        (47, INDIRECT, 0),
        (0, INDIRECT, 0),
        (48, INDIRECT, INDIRECT),
    ] {
        let mut rig = self::rig(4, false);
        write_desc(rig.ram.mem(), 0x5000, 0, 0x6000, 16, inner, 0);
        rig.vq.write_desc(1, 0x5000, len, flags, 2);
        rig.vq.publish(1);
        assert!(
            matches!(rig.pop_error(), QueueError::Indirect { .. }),
            "{len} {flags} {inner}"
        );
    }
}

#[test]
fn hostile_chains_are_errors() {
    type Check = fn(&QueueError) -> bool;
    let buffer: Check = |error| matches!(error, QueueError::Buffer { .. });
    let index: Check = |error| matches!(error, QueueError::DescriptorIndex { .. });
    let cases: [(&str, u64, u32, u16, u16, Check); 7] = [
        ("beyond RAM", END, 1, 0, 0, buffer),
        ("across the end of RAM", END - 4, 8, 0, 0, buffer),
        ("around the end of addresses", u64::MAX - 3, 16, 0, 0, buffer),
        ("a longest buffer", 0, u32::MAX, WRITE, 0, buffer),
        ("next outside", 0x2000, 4, NEXT, 4, index),
        ("a loop", 0x2000, 4, NEXT, 0, |error| {
            matches!(error, QueueError::TooLong { .. })
        }),
        ("an indirect table outside", END, 16, INDIRECT, 0, buffer),
    ];
    for (what, address, len, flags, next, check) in cases {
        let mut rig = rig(4, false);
        rig.vq.write_desc(0, address, len, flags, next);
        rig.vq.publish(0);
        let error = rig.pop_error();
        assert!(check(&error), "{what}: {error}");
    }
    let mut rig = rig(4, false);
    rig.vq.publish(4);
    assert!(index(&rig.pop_error()), "head outside");
}

#[test]
fn readable_after_writable_is_an_error() {
    let mut rig = rig(4, false);
    rig.vq.add(&[(0x2000, 4, true), (0x3000, 4, false)]);
    assert!(matches!(rig.pop_error(), QueueError::Order { head: 0 }));
}

#[test]
fn empty_buffers_need_no_memory() {
    let mut rig = rig(4, false);
    rig.vq.add(&[(u64::MAX, 0, false), (0x2000, 4, false)]);
    assert!(rig.pop().unwrap());
    let mut data = [1; 8];
    assert_eq!(rig.chain.read(rig.ram.mem(), 0, &mut data).unwrap(), 4);
}

#[test]
fn an_available_index_that_runs_away_is_an_error() {
    for published in [5, 0x8000, 0xffff] {
        let mut rig = rig(4, false);
        rig.ram
            .mem()
            .write_obj(published, GuestAddress(rig.vq.avail + 2))
            .unwrap();
        assert!(matches!(rig.pop_error(), QueueError::AvailIndex { .. }), "{published}");
        assert!(rig.queue.enable_notification(rig.ram.mem()).is_err());
    }
    // Taken chains count: two are out, so only two more may be published.
    let mut rig = rig(4, false);
    for _ in 0..2 {
        rig.vq.add(&[(0x2000, 4, true)]);
        rig.pop().unwrap();
    }
    // Nor may any be taken back.
    for published in [5u16, 1] {
        rig.ram
            .mem()
            .write_obj(published, GuestAddress(rig.vq.avail + 2))
            .unwrap();
        assert!(matches!(rig.pop_error(), QueueError::AvailIndex { .. }), "{published}");
    }
}

#[test]
fn event_idx_asks_for_exactly_the_interrupts_the_driver_wants() {
    let mut rig = rig(8, true);
    rig.vq.want_interrupt_at(2);
    let mut raised = Vec::new();
    for round in 0..5 {
        let head = rig.vq.add(&[(0x2000, 4, true)]);
        rig.pop().unwrap();
        rig.queue.push_used(rig.ram.mem(), head, 0).unwrap();
        if rig.queue.needs_interrupt(rig.ram.mem()).unwrap() {
            raised.push(round);
        }
    }
    assert_eq!(raised, [2]);
    assert!(!rig.queue.needs_interrupt(rig.ram.mem()).unwrap(), "nothing new");
    assert!(!rig.queue.enable_notification(rig.ram.mem()).unwrap());
    assert_eq!(rig.vq.avail_event(), 5);
    rig.vq.add(&[(0x2000, 4, true)]);
    assert!(
        rig.queue.enable_notification(rig.ram.mem()).unwrap(),
        "published meanwhile"
    );
}

#[test]
fn without_event_idx_the_flags_count() {
    let mut rig = rig(8, false);
    for (flags, wanted) in [(0, true), (1, false)] {
        rig.vq.set_avail_flags(flags);
        let head = rig.vq.add(&[(0x2000, 4, true)]);
        rig.pop().unwrap();
        rig.queue.push_used(rig.ram.mem(), head, 0).unwrap();
        assert_eq!(rig.queue.needs_interrupt(rig.ram.mem()).unwrap(), wanted);
    }
    let flags = || rig.ram.mem().read_obj::<u16>(GuestAddress(rig.vq.used)).unwrap();
    rig.queue.disable_notification(rig.ram.mem()).unwrap();
    assert_eq!(flags(), 1);
    rig.queue.enable_notification(rig.ram.mem()).unwrap();
    assert_eq!(flags(), 0);
}

#[test]
fn a_queue_outside_memory_is_not_enabled() {
    let ram = GuestRam::new(END, false).unwrap();
    let cases: [fn(&mut QueueState); 8] = [
        |state| state.size = 3,
        |state| state.size = 0,
        |state| state.size = 16,
        |state| state.desc = 8,
        |state| state.desc = END - 16,
        |state| state.avail = 1,
        |state| state.used = END,
        |state| state.used = !3,
    ];
    for (number, change) in cases.into_iter().enumerate() {
        let mut queue = Queue::new(8);
        queue.configure(change);
        assert!(queue.enable(ram.mem()).is_err(), "case {number}");
        assert!(!queue.enabled());
        let enabled = QueueState {
            enabled: true,
            ..*queue.state()
        };
        assert!(
            queue.check(&enabled, ram.mem()).is_err(),
            "case {number} as a saved state"
        );
    }
    let queue = Queue::new(8);
    let ahead = QueueState {
        enabled: true,
        next_avail: 9,
        ..*queue.state()
    };
    assert!(matches!(
        queue.check(&ahead, ram.mem()),
        Err(QueueError::AvailIndex { .. })
    ));
}

#[test]
fn copies_cross_segments_and_stop_at_their_end() {
    let ram = GuestRam::new(END, false).unwrap();
    let chain = Chain {
        head: 0,
        readable: [(0x1000, 3), (0x2000, 0), (0x3000, 5)]
            .map(|(address, len)| Segment { address, len })
            .to_vec(),
        writable: [(0x1000, 3), (0x3000, 5)]
            .map(|(address, len)| Segment { address, len })
            .to_vec(),
    };
    assert_eq!(chain.write(ram.mem(), 1, b"abcdefghij").unwrap(), 7);
    let mut data = [b'.'; 10];
    assert_eq!(chain.read(ram.mem(), 2, &mut data).unwrap(), 6);
    assert_eq!(&data, b"bcdefg....");
    assert_eq!(chain.read(ram.mem(), 8, &mut data).unwrap(), 0);
}

/// Whatever stands in the rings: an answer or an error, in bounded time.
#[test]
fn random_rings_do_no_harm() {
    for seed in 0..3_000 {
        let mut random = Seeded::new(seed);
        let mut rig = rig(8, random.below(2) == 0);
        // Addresses and lengths near the edges of RAM, flags and indices near the valid ones.
        for index in 0..8 {
            let address = [0x2000, END - 8, END, u64::MAX - 8, rig.vq.desc][random.below(5) as usize];
            let len = [0, 1, 16, 64, 4096, u32::MAX][random.below(6) as usize];
            rig.vq
                .write_desc(index, address, len, random.below(8) as u16, random.below(10) as u16);
        }
        for _ in 0..random.below(12) {
            rig.vq.publish(random.below(9) as u16);
        }
        let mut taken = 0;
        while let Ok(true) = rig.pop() {
            taken += 1;
            assert!(taken <= 8, "seed {seed}: more chains than entries");
            assert!(rig.chain.readable.len() + rig.chain.writable.len() <= MAX_CHAIN);
        }
    }
}
