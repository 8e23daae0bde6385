//! What the standby keeps besides checkpoints: input that the last checkpoint doesn't contain yet, and output that
//! may not have left.

use std::collections::VecDeque;

use super::PortData;

/// Input copied from the active as it arrived there, until the checkpoint that contains it is here. After a takeover
/// the guest gets it again: it then need not wait for clients to send it again.
///
/// Bounded: what doesn't fit is dropped, newest first, and counted. A network may lose frames; a connection mends
/// that.
#[derive(Debug)]
pub struct InputLog {
    items: VecDeque<(u64, PortData)>,
    bytes: usize,
    max_bytes: usize,
    dropped: u64,
}

impl InputLog {
    /// A log of up to `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            items: VecDeque::new(),
            bytes: 0,
            max_bytes,
            dropped: 0,
        }
    }

    /// Adds what was delivered to the active's guest in `epoch`.
    pub fn add(&mut self, epoch: u64, items: Vec<PortData>) {
        for item in items {
            let cost = cost(&item);
            if self.bytes + cost > self.max_bytes {
                self.dropped += 1;
                continue;
            }
            self.bytes += cost;
            self.items.push_back((epoch, item));
        }
    }

    /// A checkpoint through `epoch` is complete here: it contains the input of that epoch and those before.
    pub fn contained_through(&mut self, epoch: u64) {
        let bytes = &mut self.bytes;
        self.items.retain(|(of, item)| {
            let keep = *of > epoch;
            if !keep {
                *bytes -= cost(item);
            }
            keep
        });
    }

    /// Takeover from the checkpoint of `epoch`: the input that it lacks, in the order of arrival. Leaves the log
    /// empty.
    pub fn take_for_injection(&mut self, epoch: u64) -> Vec<PortData> {
        self.contained_through(epoch);
        self.bytes = 0;
        self.items.drain(..).map(|(_, item)| item).collect()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Items that did not fit, since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

/// Output of received epochs that may not have left the active, or may have been lost with it: the successor sends it
/// once more.
///
/// Kept are the epochs after the one up to which the active says that everything left, and always the last one.
/// Bounded: the oldest epochs go first. The last one stays whatever it takes: an epoch is bounded itself.
#[derive(Debug)]
pub struct OutputLog {
    epochs: VecDeque<(u64, Vec<PortData>, usize)>,
    bytes: usize,
    max_bytes: usize,
    dropped: u64,
}

impl OutputLog {
    /// A log of up to `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            epochs: VecDeque::new(),
            bytes: 0,
            max_bytes,
            dropped: 0,
        }
    }

    /// Adds the output of a complete epoch; everything up to `released_through` has left the active.
    pub fn add(&mut self, epoch: u64, outputs: Vec<PortData>, released_through: u64) {
        let bytes = outputs.iter().map(cost).sum();
        self.epochs.push_back((epoch, outputs, bytes));
        self.bytes += bytes;
        while self.epochs.len() > 1 && self.epochs[0].0 <= released_through {
            self.pop();
        }
        while self.bytes > self.max_bytes && self.epochs.len() > 1 {
            self.dropped += self.epochs[0].1.len() as u64;
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some((_, _, bytes)) = self.epochs.pop_front() {
            self.bytes -= bytes;
        }
    }

    /// Takeover: what to send once more, oldest first. Leaves the log empty.
    pub fn take_for_resending(&mut self) -> Vec<PortData> {
        self.bytes = 0;
        self.epochs.drain(..).flat_map(|(_, outputs, _)| outputs).collect()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Items that did not fit, since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

fn cost(item: &PortData) -> usize {
    size_of::<PortData>() + item.bytes.len()
}

#[cfg(test)]
mod tests {
    use super::super::Port;
    use super::*;

    fn item(byte: u8) -> PortData {
        PortData {
            port: Port::Nic(0),
            bytes: vec![byte; 100],
        }
    }

    fn bytes_of(items: &[PortData]) -> Vec<u8> {
        items.iter().map(|item| item.bytes[0]).collect()
    }

    #[test]
    fn injected_is_what_the_checkpoint_lacks() {
        let mut log = InputLog::new(1 << 20);
        for epoch in 1..=4u8 {
            log.add(epoch.into(), vec![item(epoch * 10), item(epoch * 10 + 1)]);
        }
        log.contained_through(1);
        assert_eq!(log.bytes(), 6 * cost(&item(0)));
        assert_eq!(bytes_of(&log.take_for_injection(2)), [30, 31, 40, 41]);
        assert_eq!(log.bytes(), 0);
        assert!(log.take_for_injection(0).is_empty());
    }

    #[test]
    fn input_that_does_not_fit_is_counted_and_room_comes_back() {
        let mut log = InputLog::new(3 * cost(&item(0)));
        log.add(1, (0..5).map(item).collect());
        assert_eq!(log.dropped(), 2);
        log.contained_through(1);
        log.add(2, vec![item(9)]);
        assert_eq!(bytes_of(&log.take_for_injection(1)), [9]);
    }

    #[test]
    fn sent_again_is_what_may_not_have_left_and_always_the_last_epoch() {
        let mut log = OutputLog::new(1 << 20);
        log.add(1, vec![item(1)], 0);
        log.add(2, vec![item(2)], 0);
        log.add(3, vec![item(3)], 1);
        assert_eq!(bytes_of(&log.take_for_resending()), [2, 3]);
        log.add(4, vec![item(4)], 3);
        log.add(5, vec![item(5)], 5);
        assert_eq!(bytes_of(&log.take_for_resending()), [5]);
    }

    #[test]
    fn output_is_bounded_oldest_first() {
        let mut log = OutputLog::new(2 * cost(&item(0)));
        (1..=5u8).for_each(|epoch| log.add(epoch.into(), vec![item(epoch)], 0));
        assert_eq!(log.dropped(), 3);
        assert_eq!(bytes_of(&log.take_for_resending()), [4, 5]);
        log.add(6, (0..9).map(item).collect(), 5);
        assert_eq!(log.take_for_resending().len(), 9, "the last one, whatever it takes");
    }
}
