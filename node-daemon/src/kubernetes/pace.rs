//! How fast an engine's epochs follow each other, and how long output waits for the standby: between two looks at its counters.

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

/// Between two looks that are compared, at least.
const LOOK: Duration = Duration::from_secs(2);

/// What the counters said at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    at: Instant,
    epochs: u64,
    released: u64,
    held_us: u64,
}

/// Compares two looks.
#[derive(Debug, Default)]
pub struct Pace {
    last: Option<Look>,
    /// Average length of an epoch in milliseconds; none as long as it is not known.
    pub interval_ms: Option<u32>,
    /// Average time in milliseconds that output was held back; none if there was none.
    pub lag_ms: Option<u32>,
}

impl Pace {
    /// Takes in an engine's counters.
    pub fn look(&mut self, counters: &Map<String, Value>, at: Instant) {
        let counter = |name: &str| counters.get(name).and_then(Value::as_u64);
        let (Some(epochs), Some(released), Some(held_us)) =
            (counter("epochs"), counter("released_items"), counter("held_us_total"))
        else {
            return self.forget();
        };
        let now = Look {
            at,
            epochs,
            released,
            held_us,
        };
        let Some(last) = self.last else {
            self.last = Some(now);
            return;
        };
        let elapsed = at.saturating_duration_since(last.at);
        if elapsed < LOOK {
            return;
        }
        // Of another engine, if they went backwards.
        let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        self.interval_ms = average_ms(elapsed_us, epochs.checked_sub(last.epochs));
        self.lag_ms = held_us
            .checked_sub(last.held_us)
            .and_then(|held_us| average_ms(held_us, released.checked_sub(last.released)));
        self.last = Some(now);
    }

    /// There is no engine, or it does not lead.
    pub fn forget(&mut self) {
        *self = Pace::default();
    }
}

/// In whole milliseconds, rounded up: nothing that takes time is nothing.
fn average_ms(total_us: u64, count: Option<u64>) -> Option<u32> {
    let count = count.filter(|count| *count > 0)?;
    u32::try_from((total_us / count).div_ceil(1000)).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn counters(epochs: u64, released: u64, held_us: u64) -> Map<String, Value> {
        let value = json!({"epochs": epochs, "released_items": released, "held_us_total": held_us});
        value.as_object().unwrap().clone()
    }

    #[test]
    fn averages_are_of_what_happened_between_two_looks() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        pace.look(&counters(100, 10, 5_000), begin);
        assert_eq!((pace.interval_ms, pace.lag_ms), (None, None));
        pace.look(&counters(101, 10, 5_000), begin + Duration::from_secs(1));
        assert_eq!(pace.interval_ms, None, "too early");
        pace.look(&counters(200, 20, 15_100), begin + Duration::from_secs(4));
        assert_eq!((pace.interval_ms, pace.lag_ms), (Some(40), Some(2)));
        pace.look(&counters(400, 20, 15_100), begin + Duration::from_secs(6));
        assert_eq!((pace.interval_ms, pace.lag_ms), (Some(10), None));
    }

    #[test]
    fn another_engine_begins_anew() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        pace.look(&counters(100, 10, 5_000), begin);
        pace.look(&counters(5, 1, 100), begin + Duration::from_secs(3));
        assert_eq!((pace.interval_ms, pace.lag_ms), (None, None));
        pace.look(&counters(65, 11, 10_100), begin + Duration::from_secs(6));
        assert_eq!((pace.interval_ms, pace.lag_ms), (Some(50), Some(1)));
        pace.look(&Map::new(), begin + Duration::from_secs(9));
        assert_eq!((pace.interval_ms, pace.lag_ms), (None, None));
    }
}
