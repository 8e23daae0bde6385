//! What the guest says to the world, held until the world may hear it.
//!
//! ```text
//!   NIC, console ── put(epoch) ──► held, in order ── epoch ≤ gate? ──► tap, console file
//!                                       │                 ▲
//!                                       └ of_epoch() ► replication      driver: set_gate()
//! ```
//!
//! Invariant: the gate is compared for every single item, under the lock that orders items, immediately before the item
//! is handed to the host kernel. Nothing leaves in an order other than the guest's.
//!
//! The decision what the gate is belongs to `ftvm_protocol`; this module only obeys it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::checkpoint::Histogram;

/// The gate's value for "everything may leave at once".
const OPEN: u64 = u64::MAX;

/// Most that is held, with what it costs to hold it. While a standby follows epochs end long before. A guest whose peer is lost and whose arbiter
/// can't be reached may go on to speak for hours: what has no room is lost, as on a wire that is cut.
pub(crate) const HELD_BYTES_MAX: usize = 32 << 20;

/// Buckets in which the status tells how long output was held, by their largest values in microseconds. They are few, for the status is one
/// message of the control socket, and has the pauses' fine ones already. Node-daemons tell Prometheus the same ones.
pub const HELD_BOUNDS_US: [u64; 13] = [
    1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000,
];

/// Whether an item of an epoch (first) may leave at a value of the gate (second). It is fixed when an outbox is made.
pub type Rule = fn(u64, u64) -> bool;

/// The rule that keeps promises: what belongs to an epoch that the gate admits. Tests of the judge make outboxes with another one.
pub fn admitted(epoch: u64, gate: u64) -> bool {
    epoch <= gate
}

/// One thing that the guest emitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// An Ethernet frame.
    Frame {
        /// Which NIC, in configuration order.
        nic: u8,
        /// The frame, without any header of ours.
        bytes: Arc<[u8]>,
    },
    /// Characters of the serial console.
    Console(Arc<[u8]>),
}

impl Output {
    fn size_bytes(&self) -> usize {
        match self {
            Output::Frame { bytes, .. } | Output::Console(bytes) => bytes.len(),
        }
    }
}

/// Where released output goes. Must not block: a frame that the host can't take now is dropped, as on a wire.
pub trait Sink: Send + Sync {
    /// Hands one item to the host.
    fn emit(&self, output: &Output);
}

struct Held {
    epoch: u64,
    since: Instant,
    output: Output,
}

/// What it costs to hold an item beside its bytes: the queue doubles when it is full, and the bytes are an allocation of their own. A console's
/// items have one byte each.
const ITEM_BYTES: usize = 2 * size_of::<Held>() + 32;
/// Items for which the queue keeps room once it is empty.
const KEPT_ITEMS: usize = 4096;

#[derive(Default)]
struct Queue {
    held: VecDeque<Held>,
    held_bytes: usize,
    /// Items that had no room.
    lost: u64,
    /// Since when the epoch of the last item has had one that is held.
    waits_since: Option<Instant>,
    /// How long what was held has waited.
    waited: Histogram,
    released: Released,
    watched: Watched,
}

impl Queue {
    /// What one item more makes of what is held, without its own bytes.
    fn cost_bytes(&self) -> usize {
        self.held_bytes + (self.held.len() + 1) * ITEM_BYTES
    }

    /// Gives back what many items took, once none is held.
    fn forget_room(&mut self) {
        if self.held.is_empty() {
            self.held.shrink_to(KEPT_ITEMS);
        }
    }
}

/// When the first item of an epoch after this one left.
#[derive(Default)]
struct Watched {
    after: Option<u64>,
    first: Option<Instant>,
}

impl Watched {
    fn left(&mut self, epoch: u64) {
        if self.first.is_none() && self.after.is_some_and(|after| epoch > after) {
            self.first = Some(Instant::now());
        }
    }
}

/// What has left.
#[derive(Default)]
struct Released {
    items: u64,
    bytes: u64,
    /// Sum of the time that they were held.
    held_total: Duration,
    /// Longest time that one was held.
    held_max: Duration,
}

/// Holds output back until its epoch may be released.
pub struct Outbox {
    gate: AtomicU64,
    rule: Rule,
    queue: Mutex<Queue>,
    sink: Box<dyn Sink>,
    waits: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Outbox {
    /// An empty outbox with a closed gate.
    pub fn new(sink: Box<dyn Sink>, rule: Rule) -> Self {
        Self {
            gate: AtomicU64::new(0),
            rule,
            queue: Mutex::new(Queue::default()),
            sink,
            waits: OnceLock::new(),
        }
    }

    /// Calls `waits` whenever an epoch's first item is held: that epoch should end soon. Set once, before anything is put.
    pub fn on_waiting(&self, waits: impl Fn() + Send + Sync + 'static) {
        // A second one would never be called.
        let set = self.waits.set(Box::new(waits));
        debug_assert!(set.is_ok(), "set twice");
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Items are moved in single steps: a panic elsewhere leaves the queue whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn may_leave(&self, epoch: u64) -> bool {
        (self.rule)(epoch, self.gate.load(Ordering::SeqCst))
    }

    /// Takes an item of the running epoch `epoch`; called inside the pause gate. It leaves at once if it may, and is lost if it has to be
    /// held and there is no room.
    pub fn put(&self, epoch: u64, output: Output) {
        let mut queue = self.queue();
        if queue.held.is_empty() && self.may_leave(epoch) {
            queue.released.items += 1;
            queue.released.bytes += output.size_bytes() as u64;
            self.sink.emit(&output);
            queue.watched.left(epoch);
            return;
        }
        if queue.cost_bytes() + output.size_bytes() > HELD_BYTES_MAX {
            queue.lost += 1;
            return;
        }
        let first = queue.held.back().is_none_or(|held| held.epoch != epoch);
        let since = Instant::now();
        if first {
            queue.waits_since = Some(since);
        }
        queue.held_bytes += output.size_bytes();
        queue.held.push_back(Held { epoch, since, output });
        drop(queue);
        if let Some(waits) = self.waits.get().filter(|_| first) {
            waits();
        }
    }

    /// Sets the gate to "epochs up to and including `epoch`" and lets go what may leave. Lowering the gate holds for everything
    /// that has not left yet.
    pub fn release_through(&self, epoch: u64) {
        self.gate.store(epoch.min(OPEN - 1), Ordering::SeqCst);
        self.let_go();
    }

    /// Sets the gate to "everything", for a seat that is confirmed to be alone.
    pub fn open(&self) {
        self.gate.store(OPEN, Ordering::SeqCst);
        self.let_go();
    }

    /// Nothing leaves any more.
    pub fn close(&self) {
        self.gate.store(0, Ordering::SeqCst);
    }

    /// Emits items as long as the first one may leave; the gate is read anew for each.
    fn let_go(&self) {
        loop {
            let mut queue = self.queue();
            let Some(first) = queue.held.front() else { return };
            if !self.may_leave(first.epoch) {
                return;
            }
            let Some(held) = queue.held.pop_front() else { return };
            self.sink.emit(&held.output);
            queue.watched.left(held.epoch);
            let waited = held.since.elapsed();
            let bytes = held.output.size_bytes();
            queue.held_bytes -= bytes;
            queue.released.items += 1;
            queue.released.bytes += bytes as u64;
            queue.released.held_total += waited;
            queue.released.held_max = queue.released.held_max.max(waited);
            queue.waited.add(waited);
            queue.forget_room();
        }
    }

    /// The output of an epoch that is still held, in order: what has to travel with that epoch.
    pub fn of_epoch(&self, epoch: u64) -> Vec<Output> {
        let queue = self.queue();
        let of_epoch = queue.held.iter().filter(|held| held.epoch == epoch);
        of_epoch.map(|held| held.output.clone()).collect()
    }

    /// All output that is still held, in order.
    pub fn all_held(&self) -> Vec<Output> {
        self.queue().held.iter().map(|held| held.output.clone()).collect()
    }

    /// The oldest epoch of which something has not left yet.
    pub fn oldest_held(&self) -> Option<u64> {
        self.queue().held.front().map(|held| held.epoch)
    }

    /// Since when output waits for the running epoch to end, if any does, and how many bytes wait in all.
    pub fn waiting(&self, running_epoch: u64) -> (Option<Instant>, usize) {
        let queue = self.queue();
        let of_running = queue.held.back().is_some_and(|held| held.epoch == running_epoch);
        (queue.waits_since.filter(|_| of_running), queue.held_bytes)
    }

    /// Items that were lost for want of room.
    pub fn lost(&self) -> u64 {
        self.queue().lost
    }

    /// From now on the first item of an epoch after `epoch` is looked out for.
    pub fn watch_after(&self, epoch: u64) {
        self.queue().watched = Watched {
            after: Some(epoch),
            first: None,
        };
    }

    /// When that item left.
    pub fn first_watched(&self) -> Option<Instant> {
        self.queue().watched.first
    }

    /// Drops everything that is held: the guest that said it is not the one that goes on.
    pub fn discard(&self) {
        let mut queue = self.queue();
        queue.held.clear();
        queue.held_bytes = 0;
        queue.forget_room();
    }

    /// For the status: what has left, how long it was held (`held_us_p50`, `held_us_p90`, `held_us_buckets`: without what left at once), and
    /// since when the oldest item waits that has not left yet.
    pub fn counters(&self, into: &mut Map<String, Value>) {
        let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let queue = self.queue();
        let oldest = queue.held.front().map_or(Duration::ZERO, |held| held.since.elapsed());
        let Released {
            items,
            bytes,
            held_total,
            held_max,
        } = queue.released;
        for (name, value) in [
            ("released_items", items),
            ("released_bytes", bytes),
            ("held_us_total", us(held_total)),
            ("held_us_max", us(held_max)),
            ("held_us_p50", queue.waited.quantile_us(0.5)),
            ("held_us_p90", queue.waited.quantile_us(0.9)),
            ("output_waits_us", us(oldest)),
        ] {
            into.insert(name.to_owned(), value.into());
        }
        into.insert(
            "held_us_buckets".to_owned(),
            json!(queue.waited.within_us(&HELD_BOUNDS_US)),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default, Clone)]
    struct Wire(Arc<Mutex<Vec<Output>>>);

    impl Sink for Wire {
        fn emit(&self, output: &Output) {
            self.0.lock().unwrap().push(output.clone());
        }
    }

    fn frame(byte: u8) -> Output {
        Output::Frame {
            nic: 0,
            bytes: Arc::from([byte]),
        }
    }

    fn outbox() -> (Outbox, Wire) {
        let wire = Wire::default();
        (Outbox::new(Box::new(wire.clone()), admitted), wire)
    }

    #[test]
    fn a_closed_gate_holds_everything() {
        let (outbox, wire) = outbox();
        outbox.put(1, frame(1));
        outbox.put(2, frame(2));
        assert!(wire.0.lock().unwrap().is_empty());
        assert_eq!(outbox.of_epoch(2), [frame(2)]);
        assert_eq!(outbox.all_held(), [frame(1), frame(2)]);
        assert!(matches!(outbox.waiting(2), (Some(_), 2)));
        assert_eq!(outbox.waiting(3), (None, 2));
        assert_eq!(outbox.oldest_held(), Some(1));
        outbox.release_through(1);
        assert_eq!(outbox.oldest_held(), Some(2));
        outbox.open();
        assert_eq!(outbox.oldest_held(), None);
    }

    /// A guest that speaks and speaks while nothing may leave: some is held, in its order, and what has no room is counted. What comes
    /// when there is room again leaves as ever.
    #[test]
    fn what_may_not_leave_takes_no_more_than_its_room() {
        for len in [1, 60, 1500, 65_536] {
            let (outbox, wire) = outbox();
            let frame = |number: u64| {
                let mut bytes = vec![0; len];
                let number = number.to_le_bytes();
                let part = len.min(number.len());
                bytes[..part].copy_from_slice(&number[..part]);
                Output::Frame {
                    nic: 0,
                    bytes: bytes.into(),
                }
            };
            let fit = HELD_BYTES_MAX / (len + ITEM_BYTES);
            for number in 0..fit as u64 + 3 {
                outbox.put(1 + number % 2, frame(number));
            }
            assert_eq!(outbox.lost(), 3, "{len} bytes");
            let held = outbox.all_held();
            assert_eq!(held.len(), fit);
            assert!(held.iter().enumerate().all(|(at, output)| *output == frame(at as u64)));
            assert!(outbox.queue().held.capacity() * size_of::<Held>() + fit * len <= HELD_BYTES_MAX);
            outbox.open();
            assert!(outbox.queue().held.capacity() <= 2 * KEPT_ITEMS);
            outbox.put(3, frame(0));
            assert_eq!(outbox.lost(), 3);
            assert_eq!(wire.0.lock().unwrap().len(), fit + 1);
            // All of the room is there again, whether what was held has left or was thrown away.
            for _ in 0..2 {
                outbox.close();
                (0..=fit as u64).for_each(|number| outbox.put(4, frame(number)));
                assert_eq!(outbox.all_held().len(), fit);
                outbox.discard();
            }
            assert_eq!(outbox.lost(), 5);
        }
    }

    #[test]
    fn the_first_held_item_of_each_epoch_is_told() {
        let (outbox, _) = outbox();
        let told = Arc::new(AtomicU64::new(0));
        let counter = told.clone();
        outbox.on_waiting(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        for (epoch, told_then) in [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3)] {
            outbox.put(epoch, frame(1));
            assert_eq!(told.load(Ordering::SeqCst), told_then);
        }
        outbox.open();
        outbox.put(4, frame(1));
        assert_eq!(told.load(Ordering::SeqCst), 3, "it left at once");
    }

    #[test]
    fn the_gate_moves_epoch_by_epoch() {
        let (outbox, wire) = outbox();
        for epoch in 1..=3 {
            outbox.put(epoch, frame(epoch as u8));
        }
        outbox.watch_after(2);
        outbox.release_through(2);
        assert_eq!(*wire.0.lock().unwrap(), [frame(1), frame(2)]);
        assert_eq!(outbox.first_watched(), None);
        outbox.release_through(3);
        assert!(outbox.first_watched().is_some());
        assert_eq!(*wire.0.lock().unwrap(), [frame(1), frame(2), frame(3)]);
    }

    #[test]
    fn an_open_gate_keeps_the_order_of_what_was_held() {
        let (outbox, wire) = outbox();
        outbox.put(1, frame(1));
        outbox.open();
        outbox.put(2, frame(2));
        assert_eq!(*wire.0.lock().unwrap(), [frame(1), frame(2)]);
        outbox.close();
        outbox.put(2, frame(3));
        assert_eq!(wire.0.lock().unwrap().len(), 2);
        outbox.discard();
        outbox.open();
        assert_eq!(wire.0.lock().unwrap().len(), 2);
        assert_eq!(counter(&outbox, "released_items"), 2);
    }

    fn counter(outbox: &Outbox, name: &str) -> u64 {
        let mut counters = Map::new();
        outbox.counters(&mut counters);
        counters[name].as_u64().unwrap()
    }

    #[test]
    fn it_is_told_for_how_long_the_oldest_item_waits() {
        let (outbox, _) = outbox();
        assert_eq!(counter(&outbox, "output_waits_us"), 0);
        outbox.put(1, frame(1));
        std::thread::sleep(Duration::from_millis(20));
        outbox.put(2, frame(2));
        let both = counter(&outbox, "output_waits_us");
        assert!(both >= 20_000, "{both}");
        outbox.release_through(1);
        assert!(counter(&outbox, "held_us_max") >= both);
        std::thread::sleep(Duration::from_millis(1));
        assert!(counter(&outbox, "output_waits_us") > 0, "the other one waits");
        outbox.open();
        assert_eq!(counter(&outbox, "output_waits_us"), 0);
        assert_eq!(counter(&outbox, "released_bytes"), 2);
        let mut counters = Map::new();
        outbox.counters(&mut counters);
        let buckets: Vec<(u64, u64)> = serde_json::from_value(counters["held_us_buckets"].clone()).unwrap();
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), 2, "{buckets:?}");
        let is_known = |bound: u64| HELD_BOUNDS_US.contains(&bound) || bound == u64::MAX;
        assert!(buckets.iter().all(|(bound, _)| is_known(*bound)), "{buckets:?}");
    }

    /// A sink that closes the gate while the first item leaves: the second item of the same batch must stay.
    #[test]
    fn the_gate_is_read_for_every_item() {
        struct Closer(Arc<Mutex<Option<Arc<Outbox>>>>, Wire);
        impl Sink for Closer {
            fn emit(&self, output: &Output) {
                self.1.emit(output);
                if let Some(outbox) = &*self.0.lock().unwrap() {
                    outbox.close();
                }
            }
        }
        let cell = Arc::new(Mutex::new(None));
        let wire = Wire::default();
        let outbox = Arc::new(Outbox::new(Box::new(Closer(cell.clone(), wire.clone())), admitted));
        outbox.put(1, frame(1));
        outbox.put(1, frame(2));
        *cell.lock().unwrap() = Some(outbox.clone());
        outbox.release_through(1);
        assert_eq!(*wire.0.lock().unwrap(), [frame(1)]);
        assert_eq!(outbox.of_epoch(1), [frame(2)]);
    }
}
