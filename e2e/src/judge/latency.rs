//! A histogram of times with bounded memory and a relative error below 1.6 %.

/// Buckets per power of two.
const STEPS: usize = 64;
/// Powers of two that are told apart; the last bucket takes what is longer (2^37 µs are 38 hours).
const POWERS: usize = 32;

/// Times in microseconds, counted in buckets whose width is 1/64 of their power of two.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; STEPS * (POWERS + 1)],
            total: 0,
            max_us: 0,
        }
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let quantiles = [0.5, 0.99].map(|q| self.quantile_us(q));
        write!(
            f,
            "Histogram({} values, p50 {:?} µs, p99 {:?} µs, max {} µs)",
            self.total, quantiles[0], quantiles[1], self.max_us
        )
    }
}

impl Histogram {
    /// Counts one time.
    pub fn add(&mut self, time_us: u64) {
        self.counts[bucket(time_us)] += 1;
        self.total += 1;
        self.max_us = self.max_us.max(time_us);
    }

    /// How many times were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The longest time, exactly.
    pub fn max_us(&self) -> u64 {
        self.max_us
    }

    /// The time that a share `quantile` (0 to 1) of all did not exceed, rounded up to its bucket's end; none if empty.
    pub fn quantile_us(&self, quantile: f64) -> Option<u64> {
        let rank = ((self.total as f64 * quantile.clamp(0.0, 1.0)).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Some(bucket_end(index).min(self.max_us));
            }
        }
        None
    }
}

fn bucket(time_us: u64) -> usize {
    if time_us < STEPS as u64 {
        return time_us as usize;
    }
    let power = time_us.ilog2() as usize - STEPS.ilog2() as usize;
    let step = (time_us >> power) as usize - STEPS;
    ((power + 1) * STEPS + step).min(STEPS * (POWERS + 1) - 1)
}

fn bucket_end(index: usize) -> u64 {
    let (power, step) = ((index / STEPS) as u32, (index % STEPS) as u64);
    if power == 0 {
        step
    } else {
        ((STEPS as u64 + step + 1) << (power - 1)) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_the_promised_error() {
        let mut histogram = Histogram::default();
        (1..=100_000).for_each(|time| histogram.add(time));
        for (quantile, exact) in [(0.0, 1.0), (0.5, 50_000.0), (0.99, 99_000.0), (1.0, 100_000.0)] {
            let found = histogram.quantile_us(quantile).unwrap() as f64;
            assert!(
                found >= exact && found <= exact * (1.0 + 1.0 / 64.0),
                "{quantile}: {found} for {exact}"
            );
        }
        assert_eq!(histogram.max_us(), 100_000);
        assert_eq!(histogram.total(), 100_000);
    }

    #[test]
    fn every_time_lies_in_its_bucket() {
        let mut before = 0;
        for time in (0..200_000).chain([1 << 30, (1 << 36) + 12345]) {
            let index = bucket(time);
            assert!(index >= before, "{time}");
            assert!(
                time <= bucket_end(index),
                "{time} in bucket {index}, which ends at {}",
                bucket_end(index)
            );
            assert!(index == 0 || time > bucket_end(index - 1), "{time} in bucket {index}");
            before = index;
        }
    }

    #[test]
    fn nothing_and_too_much_do_not_panic() {
        assert_eq!(Histogram::default().quantile_us(0.5), None);
        let mut histogram = Histogram::default();
        histogram.add(u64::MAX);
        assert_eq!(histogram.max_us(), u64::MAX);
        assert!(histogram.quantile_us(1.0).is_some());
    }
}
