//! Durations in buckets that grow by a fixed ratio: constant memory, quantiles within a few percent.

use std::time::Duration;

/// Buckets per doubling: an error of at most 1/64.
const SUB_BUCKETS: u32 = 64;
/// Up to 2^37 microseconds, far more than anything that is measured here.
const BUCKETS: usize = 32 * SUB_BUCKETS as usize;

/// A histogram of durations with a resolution of a microsecond.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: Duration,
    sum: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            total: 0,
            max: Duration::ZERO,
            sum: Duration::ZERO,
        }
    }
}

fn bucket(micros: u64) -> usize {
    if micros < u64::from(SUB_BUCKETS) {
        return micros as usize;
    }
    let doublings = micros.ilog2() - SUB_BUCKETS.ilog2();
    let within = (micros >> doublings) - u64::from(SUB_BUCKETS);
    ((doublings + 1) as usize * SUB_BUCKETS as usize + within as usize).min(BUCKETS - 1)
}

/// Largest value of a bucket, in microseconds.
fn upper_micros(bucket: usize) -> u64 {
    let sub = SUB_BUCKETS as usize;
    if bucket < sub {
        return bucket as u64;
    }
    let doublings = (bucket / sub - 1) as u32;
    let within = (bucket % sub) as u64;
    ((u64::from(SUB_BUCKETS) + within + 1) << doublings) - 1
}

impl Histogram {
    /// Adds one duration.
    pub fn add(&mut self, value: Duration) {
        let micros = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
        self.counts[bucket(micros)] += 1;
        self.total += 1;
        self.max = self.max.max(value);
        self.sum += value;
    }

    /// How many were added.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The sum of all.
    pub fn sum(&self) -> Duration {
        self.sum
    }

    /// Everything that was added, as pairs of a bucket's largest value in microseconds and how many are in it, empty buckets
    /// left out. Buckets only ever grow: what was added between two looks is their difference.
    pub fn buckets_us(&self) -> Vec<(u64, u64)> {
        let counts = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        counts.map(|(index, count)| (upper_micros(index), *count)).collect()
    }

    /// The same in these buckets alone, whose largest values in microseconds grow, for whoever has no room for all. What is longer than all of
    /// them is under `u64::MAX`. What is at most 1/64 below the largest value of a bucket may be in the next.
    pub fn within_us(&self, bounds: &[u64]) -> Vec<(u64, u64)> {
        let bounds_and_more = bounds.iter().copied().chain([u64::MAX]);
        let mut coarse: Vec<(u64, u64)> = bounds_and_more.map(|bound| (bound, 0)).collect();
        for (micros, count) in self.buckets_us() {
            let place = bounds.partition_point(|bound| *bound < micros);
            coarse[place].1 += count;
        }
        coarse.retain(|(_, count)| *count > 0);
        coarse
    }

    /// The value that a share `q` (0 to 1) of all does not exceed, in microseconds, at most 1/64 too high. Zero if empty.
    pub fn quantile_us(&self, q: f64) -> u64 {
        let rank = ((self.total as f64 * q).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper_micros(index).min(self.max.as_micros() as u64);
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_close_from_above() {
        let mut histogram = Histogram::default();
        for micros in 1..=10_000u64 {
            histogram.add(Duration::from_micros(micros));
        }
        for (q, exact) in [(0.5, 5_000u64), (0.99, 9_900), (1.0, 10_000)] {
            let got = histogram.quantile_us(q);
            assert!(got >= exact && got <= exact + exact / 64 + 1, "{q}: {got} for {exact}");
        }
        assert_eq!(histogram.max(), Duration::from_millis(10));
        assert_eq!(Histogram::default().quantile_us(0.5), 0);
    }

    #[test]
    fn two_looks_tell_what_came_between() {
        let mut histogram = Histogram::default();
        assert!(histogram.buckets_us().is_empty());
        histogram.add(Duration::from_micros(3));
        let first = histogram.buckets_us();
        histogram.add(Duration::from_micros(3));
        histogram.add(Duration::from_micros(500));
        let second = histogram.buckets_us();
        assert_eq!(first, [(3, 1)]);
        assert_eq!(second[0], (3, 2));
        assert!(
            second[1].0 >= 500 && second[1].0 < 508 && second[1].1 == 1,
            "{second:?}"
        );
    }

    #[test]
    fn few_buckets_have_all_of_it() {
        let mut histogram = Histogram::default();
        assert!(histogram.within_us(&[1_000]).is_empty());
        for micros in [0, 980, 1_001, 2_600, 2_700, 9_000_000, u64::MAX] {
            histogram.add(Duration::from_micros(micros));
        }
        assert_eq!(
            histogram.within_us(&[1_000, 2_000, 5_000, 10_000]),
            [(1_000, 2), (2_000, 1), (5_000, 2), (u64::MAX, 2)]
        );
        assert_eq!(histogram.within_us(&[]), [(u64::MAX, 7)]);
    }

    #[test]
    fn every_value_lies_in_its_bucket() {
        for micros in (0..70_000).chain([1 << 20, (1 << 30) + 7]) {
            let bucket = bucket(micros);
            assert!(upper_micros(bucket) >= micros);
            assert!(bucket == 0 || upper_micros(bucket - 1) < micros);
        }
    }
}
