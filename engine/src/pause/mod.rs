//! The gate that stops device threads at a clean point.
//!
//! A device thread holds an entry ([`PauseGate::enter`]) whenever it touches guest memory, queue state or interrupts,
//! and never across a system call that may block. The driver closes the gate; once [`PauseGate::close`] returns,
//! nobody is inside and nobody gets in until [`PauseGate::open`].
//!
//! ```text
//!   device thread:  enter ─ touch guest ─ drop │ enter … waits ………………… │ goes on
//!   driver:                          close ────┤ save, harvest, epoch+1  ├ open
//! ```
//!
//! Invariant: the epoch number changes only while the gate is closed, so whatever happens inside one entry belongs to
//! exactly one epoch.
//!
//! Invariant: vCPUs are parked *before* the gate is closed, so a vCPU thread may enter the gate from a bus handler
//! without waiting for the driver that waits for it.

pub mod clock;
pub mod futex;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Bit of the gate's word that says "closed"; the other bits count those inside.
const CLOSED: u32 = 1 << 31;

/// How often closing and entering look again before they sleep. An entry lasts microseconds.
const SPINS: u32 = 200;

/// Counts those who are inside; see the module's text.
#[derive(Debug)]
pub struct PauseGate {
    state: AtomicU32,
    epoch: AtomicU64,
}

/// Proof of being inside the gate; leaving is dropping it.
#[derive(Debug)]
pub struct Entry<'a> {
    gate: &'a PauseGate,
}

impl PauseGate {
    /// A closed gate at epoch `epoch`: devices start still, the driver opens.
    pub fn new_closed(epoch: u64) -> Self {
        Self {
            state: AtomicU32::new(CLOSED),
            epoch: AtomicU64::new(epoch),
        }
    }

    /// Goes inside; waits while the gate is closed. Entries of several threads, also nested ones, may overlap — but a
    /// nested entry would wait for ever if the gate were closed between the two, so do not nest.
    pub fn enter(&self) -> Entry<'_> {
        loop {
            if let Some(entry) = self.try_enter() {
                return entry;
            }
            futex::wait_until(&self.state, SPINS, |state| state & CLOSED == 0);
        }
    }

    /// Goes inside unless the gate is closed.
    pub fn try_enter(&self) -> Option<Entry<'_>> {
        let mut state = self.state.load(Ordering::Relaxed);
        while state & CLOSED == 0 {
            match self
                .state
                .compare_exchange_weak(state, state + 1, Ordering::SeqCst, Ordering::Relaxed)
            {
                Ok(_) => return Some(Entry { gate: self }),
                Err(now) => state = now,
            }
        }
        None
    }

    /// Closes the gate and waits until nobody is inside. Closing a closed gate does nothing.
    pub fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        futex::wait_until(&self.state, SPINS, |state| state == CLOSED);
    }

    /// Opens the gate. Opening an open gate does nothing.
    pub fn open(&self) {
        if self.state.fetch_and(!CLOSED, Ordering::SeqCst) & CLOSED != 0 {
            futex::wake_all(&self.state);
        }
    }

    /// Whether the gate is closed and empty.
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::SeqCst) == CLOSED
    }

    /// The current epoch. Inside an entry, or while the gate is closed, it can't change.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Changes the epoch.
    ///
    /// # Panics
    /// If the gate is not closed and empty: that would tear an entry in two, a defect of the caller.
    pub fn set_epoch(&self, epoch: u64) {
        assert!(self.is_closed(), "the epoch may change only while the gate is closed");
        self.epoch.store(epoch, Ordering::SeqCst);
    }
}

impl Entry<'_> {
    /// The epoch that everything done inside this entry belongs to.
    pub fn epoch(&self) -> u64 {
        self.gate.epoch()
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        // Last one out of a closed gate wakes the closer.
        if self.gate.state.fetch_sub(1, Ordering::SeqCst) == CLOSED + 1 {
            futex::wake_all(&self.gate.state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn closed_gate_keeps_out_and_open_gate_lets_in() {
        let gate = PauseGate::new_closed(7);
        assert!(gate.try_enter().is_none());
        gate.open();
        assert_eq!(gate.try_enter().expect("open").epoch(), 7);
        gate.close();
        assert!(gate.is_closed());
        assert!(gate.try_enter().is_none());
    }

    #[test]
    #[should_panic(expected = "only while the gate is closed")]
    fn epoch_may_not_change_while_open() {
        let gate = PauseGate::new_closed(0);
        gate.open();
        gate.set_epoch(1);
    }

    /// Two non-atomic counters changed inside entries are always equal when the gate is closed, and an entry never
    /// sees two epochs.
    #[test]
    fn nobody_is_inside_a_closed_gate() {
        let gate = Arc::new(PauseGate::new_closed(0));
        let counters = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let stop = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let (gate, counters, stop) = (gate.clone(), counters.clone(), stop.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let entry = gate.enter();
                        let epoch = entry.epoch();
                        counters[0].fetch_add(1, Ordering::Relaxed);
                        std::hint::spin_loop();
                        counters[1].fetch_add(1, Ordering::Relaxed);
                        assert_eq!(entry.epoch(), epoch);
                    }
                })
            })
            .collect();
        let mut last = 0;
        for epoch in 1..500 {
            gate.open();
            while counters[0].load(Ordering::Relaxed) == last {
                std::thread::yield_now();
            }
            gate.close();
            last = counters[0].load(Ordering::Relaxed);
            assert_eq!(last, counters[1].load(Ordering::Relaxed));
            gate.set_epoch(epoch);
            assert_eq!(last, counters[0].load(Ordering::Relaxed));
        }
        stop.store(true, Ordering::Relaxed);
        gate.open();
        workers.into_iter().for_each(|worker| worker.join().expect("worker"));
    }
}
