//! A window of time: what an engine and its guest did between two looks at their counters.
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::demo::system::Seat;
use crate::guest_protocol::Answer;

/// The counters of engine and guest at a time.
#[derive(Clone, Debug)]
pub struct Look {
    at: Instant,
    seat: Seat,
    guest: Answer,
}

impl Look {
    /// What both said just now.
    pub fn new(seat: Seat, guest: Answer) -> Self {
        Self {
            at: Instant::now(),
            seat,
            guest,
        }
    }

    /// What the engine's seat said.
    pub fn seat(&self) -> &Seat {
        &self.seat
    }
}

/// Between two looks.
#[derive(Debug)]
pub struct Window {
    /// Its length.
    pub seconds: f64,
    /// Pauses of the guest.
    pub pauses: Pauses,
    /// Epochs sealed.
    pub epochs: u64,
    /// Pages that the guest wrote, counted each time.
    pub written_pages: u64,
    /// Units of work that the guest did.
    pub work: u64,
    before: Seat,
    after: Seat,
}

impl Window {
    /// From one look to a later one.
    ///
    /// # Errors
    /// If they are not of one engine in one term, or counters are missing.
    pub fn between(before: Look, after: Look) -> anyhow::Result<Self> {
        ensure!(
            before.seat.term == after.seat.term,
            "the machine changed its term from {} to {} while it was measured: {}",
            before.seat.term,
            after.seat.term,
            after.seat.why
        );
        let pauses = Pauses::of(&after.seat)?.since(&Pauses::of(&before.seat)?);
        let mut window = Self {
            seconds: after.at.duration_since(before.at).as_secs_f64(),
            pauses,
            epochs: 0,
            written_pages: after.guest.churned_pages.saturating_sub(before.guest.churned_pages),
            work: after.guest.work.saturating_sub(before.guest.work),
            before: before.seat,
            after: after.seat,
        };
        window.epochs = window.counted("epochs")?;
        Ok(window)
    }

    /// By how much a counter grew.
    ///
    /// # Errors
    /// If the engine has no such counter.
    pub fn counted(&self, name: &str) -> anyhow::Result<u64> {
        let of = |seat: &Seat| {
            let value = seat.counters.get(name).and_then(Value::as_u64);
            value.with_context(|| format!("the engine has no counter {name:?}"))
        };
        Ok(of(&self.after)?.saturating_sub(of(&self.before)?))
    }

    /// The same for each epoch of the window; zero if there was none.
    ///
    /// # Errors
    /// If the engine has no such counter.
    pub fn per_epoch(&self, name: &str) -> anyhow::Result<f64> {
        Ok(self.counted(name)? as f64 / self.epochs.max(1) as f64)
    }

    /// Something counted, a second.
    pub fn rate(&self, count: u64) -> f64 {
        count as f64 / self.seconds.max(1e-9)
    }
}

/// Pauses in buckets: pairs of a bucket's largest value in microseconds and how many are in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pauses(Vec<(u64, u64)>);

impl Pauses {
    /// Single values.
    pub fn from_values(mut micros: Vec<u64>) -> Self {
        micros.sort_unstable();
        Self(micros.into_iter().map(|value| (value, 1)).collect())
    }

    /// All since the engine's start.
    fn of(seat: &Seat) -> anyhow::Result<Self> {
        let buckets = seat.counters.get("pause_us_buckets").cloned();
        let buckets = buckets.context("the engine does not tell its pauses (`pause_us_buckets`)")?;
        Ok(Self(serde_json::from_value(buckets)?))
    }

    /// What came since an earlier look.
    fn since(&self, before: &Self) -> Self {
        let earlier = |upper: u64| {
            let found = before.0.iter().find(|(other, _)| *other == upper);
            found.map_or(0, |(_, count)| *count)
        };
        let grown = self
            .0
            .iter()
            .map(|&(upper, count)| (upper, count.saturating_sub(earlier(upper))));
        Self(grown.filter(|(_, count)| *count > 0).collect())
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|(_, count)| count).sum()
    }

    /// The value that a share `quantile` (0 to 1) of all did not exceed, in microseconds; none if there are none.
    pub fn quantile_us(&self, quantile: f64) -> Option<u64> {
        let rank = ((self.count() as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        self.0.iter().find_map(|&(upper, count)| {
            seen += count;
            (seen >= rank).then_some(upper)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn look(epochs: u64, buckets: Value, term: u64) -> Look {
        let seat =
            json!({ "role": "active", "term": term, "counters": { "epochs": epochs, "pause_us_buckets": buckets } });
        Look::new(serde_json::from_value(seat).unwrap(), Answer::default())
    }

    #[test]
    fn a_window_has_only_what_came_in_it() {
        let before = look(10, json!([[100, 9], [5000, 1]]), 1);
        let after = look(14, json!([[100, 10], [300, 3], [5000, 1]]), 1);
        let window = Window::between(before, after).unwrap();
        assert_eq!((window.epochs, window.pauses.count()), (4, 4));
        assert_eq!(window.pauses.quantile_us(0.25), Some(100));
        assert_eq!(
            (window.pauses.quantile_us(0.5), window.pauses.quantile_us(0.99)),
            (Some(300), Some(300))
        );
        assert!(window.counted("absent").is_err());
    }

    #[test]
    fn a_window_across_a_failover_is_none() {
        let error = Window::between(look(1, json!([]), 1), look(2, json!([]), 2)).unwrap_err();
        assert!(error.to_string().contains("term from 1 to 2"), "{error}");
    }

    #[test]
    fn quantiles_of_nothing_are_none() {
        assert_eq!(Pauses::default().quantile_us(0.5), None);
        assert_eq!(Pauses::from_values(vec![30, 10, 20]).quantile_us(0.5), Some(20));
    }
}
